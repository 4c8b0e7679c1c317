#include "kt_expert/fast_path.h"

#include <doctest/doctest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "kt_expert/error.h"
#include "layer_reference.h"

namespace kt_expert {
namespace {

constexpr int kTokens = 3, kTopK = 2;

LayerCase small_case(int tokens = kTokens) {
  LayerCase spec;
  spec.layer.experts = 4;
  spec.layer.hidden = 64;
  spec.layer.intermediate = 48;
  spec.lora.rank_gate = spec.lora.rank_up = spec.lora.rank_down = 4;
  spec.lora.scale_gate = spec.lora.scale_up = spec.lora.scale_down = 0.5f;
  spec.tokens = tokens;
  spec.top_k = kTopK;
  return spec;
}

struct Reply {
  std::uint32_t sequence = 0;
  FastStatus status = FastStatus::kRefused;
  std::vector<float> output;
  bool closed = false;
};

// A server's end with an engine, and the trainer's.
class Connection {
 public:
  explicit Connection(std::chrono::microseconds spin = std::chrono::microseconds(0))
      : inputs_(make_inputs(small_case(), 7)),
        engine_(2, "scalar", 1),
        weights_(load_weights(inputs_, 1)),
        adapter_(load_adapter(inputs_)) {
    std::array<int, 2> ends{};
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()) == 0);
    trainer_ = ends[0];
    path_ = std::make_unique<FastPath>(engine_, gate_, ends[1], spin, 1ull << 40);
  }
  ~Connection() { ::close(trainer_); }

  FastEntry entry(bool with_lora = true) const {
    return {&weights_, with_lora ? &adapter_ : nullptr, std::nullopt, FloatType::kF32, kTopK};
  }

  std::vector<std::uint8_t> request(std::uint64_t entry, std::uint32_t sequence) const {
    const std::uint32_t payload = static_cast<std::uint32_t>(inputs_.ids.size() * 4 + inputs_.route_weights.size() * 4 +
                                                             inputs_.x.size() * sizeof(float));
    const std::array<std::uint32_t, 8> head{0x5146544b,
                                            kTokens,
                                            static_cast<std::uint32_t>(entry),
                                            static_cast<std::uint32_t>(entry >> 32),
                                            sequence,
                                            payload,
                                            0,
                                            0};
    std::vector<std::uint8_t> bytes(sizeof(head) + payload);
    std::uint8_t* at = bytes.data();
    const auto put = [&](const void* from, std::size_t size) {
      std::memcpy(at, from, size);
      at += size;
    };
    put(head.data(), sizeof(head));
    put(inputs_.ids.data(), inputs_.ids.size() * 4);
    put(inputs_.route_weights.data(), inputs_.route_weights.size() * 4);
    put(inputs_.x.data(), inputs_.x.size() * sizeof(float));
    return bytes;
  }

  void send(const std::vector<std::uint8_t>& bytes) {
    REQUIRE(::send(trainer_, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()));
  }

  Reply receive() {
    Reply reply;
    std::array<std::uint32_t, 4> head{};
    if (::recv(trainer_, head.data(), sizeof(head), MSG_WAITALL) != sizeof(head)) {
      reply.closed = true;
      return reply;
    }
    REQUIRE(head[0] == 0x4146544b);
    reply.sequence = head[1];
    reply.status = static_cast<FastStatus>(head[2]);
    reply.output.resize(head[3] / sizeof(float));
    if (head[3] > 0)
      REQUIRE(::recv(trainer_, reply.output.data(), head[3], MSG_WAITALL) == static_cast<ssize_t>(head[3]));
    return reply;
  }

  Reply ask(std::uint64_t entry, std::uint32_t sequence = 1) {
    send(request(entry, sequence));
    return receive();
  }

  std::vector<float> expected(bool with_lora = true) {
    std::vector<float> y(inputs_.x.size());
    ForwardArgs args;
    args.weights = &weights_;
    args.lora = with_lora ? &adapter_ : nullptr;
    args.x = {inputs_.x.data(), FloatType::kF32};
    args.routing = build_routing({inputs_.ids.data(), inputs_.ids.size()},
                                 {inputs_.route_weights.data(), inputs_.route_weights.size()}, kTokens, kTopK,
                                 inputs_.spec.layer.experts);
    args.y = {y.data(), FloatType::kF32};
    engine_.forward(args);
    return y;
  }

  LayerInputs inputs_;
  Engine engine_;
  Gate gate_;
  LayerWeights weights_;
  AdapterTensors adapter_;
  int trainer_ = -1;
  std::unique_ptr<FastPath> path_;
};

TEST_SUITE_BEGIN("sockets");  // which the emulated machine has not

TEST_CASE("a fast forward has the engine's bits, with an adapter and without") {
  for (const int spin : {0, 50}) {
    Connection connection{std::chrono::microseconds(spin)};
    for (const bool with_lora : {true, false}) {
      const std::uint64_t entry = connection.path_->grant(connection.entry(with_lora));
      for (std::uint32_t sequence = 1; sequence < 4; ++sequence) {
        const Reply reply = connection.ask(entry, sequence);
        CHECK(reply.status == FastStatus::kDone);
        CHECK(reply.sequence == sequence);
        CHECK(reply.output == connection.expected(with_lora));
      }
    }
    const FastCounts counts = connection.path_->take_counts();
    CHECK(counts.forwards == 6);
    CHECK(counts.tokens == 6 * kTokens);
    CHECK(counts.flops == 6.0 * 6 * kTokens * kTopK * 64 * 48);
    CHECK(counts.seconds > 0.0);
    CHECK(connection.path_->take_counts().forwards == 0);
  }
}

TEST_CASE("what was not granted, or was revoked, is not computed with") {
  Connection connection;
  CHECK(connection.ask(1).status == FastStatus::kUnknown);
  const std::uint64_t entry = connection.path_->grant(connection.entry());
  CHECK(connection.ask(entry).status == FastStatus::kDone);
  connection.path_->revoke();
  CHECK(connection.ask(entry).status == FastStatus::kUnknown);
  const std::uint64_t next = connection.path_->grant(connection.entry());
  CHECK(next > entry);
  CHECK(connection.ask(entry).status == FastStatus::kUnknown);
  CHECK(connection.ask(next).status == FastStatus::kDone);
}

TEST_CASE("who is inside the gate is not waited for") {
  Connection connection;
  const std::uint64_t entry = connection.path_->grant(connection.entry());
  connection.gate_.enter();
  CHECK(connection.ask(entry).status == FastStatus::kBusy);
  connection.gate_.leave();
  CHECK(connection.ask(entry).status == FastStatus::kDone);
  CHECK(connection.path_->take_counts().busy == 1);
}

TEST_CASE("nobody passes whoever waits at the gate") {
  Gate gate;
  for (int round = 0; round < 200; ++round) {
    gate.enter();
    std::atomic<bool> may_leave{false};
    std::thread waits([&] {
      gate.enter();
      while (!may_leave) std::this_thread::yield();
      gate.leave();
    });
    while (gate.waiting() == 0) std::this_thread::yield();
    gate.leave();
    bool passed = false;
    for (int attempt = 0; attempt < 100; ++attempt) passed = gate.try_enter() || passed;
    CHECK_FALSE(passed);
    may_leave = true;
    waits.join();
    CHECK(gate.try_enter());
    gate.leave();
  }
}

TEST_CASE("what makes no sense is refused, and the next request is served") {
  Connection connection;
  const std::uint64_t entry = connection.path_->grant(connection.entry());
  const std::vector<std::uint8_t> good = connection.request(entry, 1);
  const auto changed = [&](std::size_t word, std::uint32_t value) {
    std::vector<std::uint8_t> bytes = good;
    std::memcpy(bytes.data() + word * 4, &value, 4);
    return bytes;
  };
  constexpr std::uint32_t kNoExpert = 5, kNegative = 0xffffffff;
  for (const auto& bytes : {changed(8, kNoExpert), changed(8, kNegative), changed(1, 0), changed(1, kTokens + 1),
                            changed(1, 1u << 31), changed(1, kFastTokens + 1)}) {
    connection.send(bytes);
    CHECK(connection.receive().status == FastStatus::kRefused);
  }
  std::vector<std::uint8_t> shorter(good.begin(), good.end() - 4);
  const std::uint32_t payload = static_cast<std::uint32_t>(shorter.size() - 32);
  std::memcpy(shorter.data() + 20, &payload, 4);
  connection.send(shorter);
  CHECK(connection.receive().status == FastStatus::kRefused);
  CHECK(connection.ask(entry).output == connection.expected());
}

TEST_CASE("what is no request ends the connection") {
  for (const std::size_t word : {std::size_t{0}, std::size_t{5}}) {
    Connection connection;
    std::vector<std::uint8_t> bytes = connection.request(connection.path_->grant(connection.entry()), 1);
    const std::uint32_t value = word == 0 ? 0u : kFastPayloadBytes + 1;
    std::memcpy(bytes.data() + word * 4, &value, 4);
    connection.send(bytes);
    CHECK(connection.receive().closed);
  }
}

TEST_CASE("it can be stopped whatever the trainer does") {
  SUBCASE("nothing") {
    Connection connection;
    connection.path_->stop();
    connection.path_->stop();
    CHECK(connection.receive().closed);
  }
  SUBCASE("half a request") {
    Connection connection{std::chrono::microseconds(20)};
    std::vector<std::uint8_t> bytes = connection.request(connection.path_->grant(connection.entry()), 1);
    bytes.resize(bytes.size() / 2);
    connection.send(bytes);
    connection.path_->stop();
    CHECK(connection.receive().closed);
  }
  SUBCASE("requests whose answers it does not read") {
    Connection connection;
    const std::vector<std::uint8_t> bytes = connection.request(connection.path_->grant(connection.entry()), 1);
    for (int sent = 0; sent < 100000; ++sent) {
      if (::send(connection.trainer_, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) break;
    }
    connection.path_->stop();
    connection.path_->revoke();
  }
  SUBCASE("it goes") {
    Connection connection;
    ::shutdown(connection.trainer_, SHUT_RDWR);
    connection.path_->stop();
  }
}

TEST_CASE("revoking waits for what is under way") {
  Connection connection;
  for (int round = 0; round < 50; ++round) {
    const std::uint64_t entry = connection.path_->grant(connection.entry());
    connection.send(connection.request(entry, 1));
    connection.path_->revoke();
    connection.adapter_.zero();  // would be a race with a forward that reads it
    const FastStatus status = connection.receive().status;
    CHECK((status == FastStatus::kDone || status == FastStatus::kUnknown));
  }
}

TEST_CASE("an entry without a layer is refused") {
  Connection connection;
  CHECK_THROWS_AS(connection.path_->grant({}), InvalidArgument);
  FastEntry entry = connection.entry();
  entry.top_k = 0;
  CHECK_THROWS_AS(connection.path_->grant(entry), InvalidArgument);
}

TEST_SUITE_END();

}  // namespace
}  // namespace kt_expert
