#include "kt_expert/fast_path.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "kt_expert/error.h"
#include "kt_expert/routing.h"

namespace kt_expert {

struct FastPath::Request {
  std::uint32_t magic = 0;
  std::uint32_t tokens = 0;
  std::uint64_t entry = 0;
  std::uint32_t sequence = 0;
  std::uint32_t payload_bytes = 0;
  std::uint32_t zeros[2] = {};
};

namespace {

constexpr std::uint32_t kRequestMagic = 0x5146544b;  // "KTFQ"
constexpr std::uint32_t kAnswerMagic = 0x4146544b;   // "KTFA"
constexpr double kFlopsPerRoute = 6.0;               // of H x I: three products, two for a multiply and an add

struct Answer {
  std::uint32_t magic = kAnswerMagic;
  std::uint32_t sequence = 0;
  std::uint32_t status = 0;
  std::uint32_t payload_bytes = 0;
};

// Leaves the gate whatever happens.
class Inside {
 public:
  explicit Inside(Gate& gate) : gate_(gate), entered_(gate.try_enter()) {}
  ~Inside() {
    if (entered_) gate_.leave();
  }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
  explicit operator bool() const { return entered_; }

 private:
  Gate& gate_;
  const bool entered_;
};

}  // namespace

FastPath::FastPath(Engine& engine, Gate& gate, int descriptor, std::chrono::microseconds spin,
                   std::uint64_t first_entry)
    : engine_(engine),
      gate_(gate),
      descriptor_(descriptor),
      spin_(spin),
      payload_(kFastPayloadBytes),
      answer_(sizeof(Answer) + kFastPayloadBytes),
      next_entry_(first_entry),
      thread_([this] { serve(); }) {}

FastPath::~FastPath() {
  stop();
  ::close(descriptor_);
}

std::uint64_t FastPath::grant(const FastEntry& entry) {
  if (entry.weights == nullptr || entry.top_k < 1)
    throw InvalidArgument("a forward has weights and at least one route");
  if (entry.lora != nullptr && (entry.lora->layer().experts != entry.weights->spec().experts ||
                                entry.lora->layer().hidden != entry.weights->spec().hidden ||
                                entry.lora->layer().intermediate != entry.weights->spec().intermediate)) {
    throw InvalidArgument("the adapter belongs to a layer of another shape");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  entries_.emplace(next_entry_, entry);
  return next_entry_++;
}

void FastPath::revoke() {
  const std::lock_guard<std::mutex> lock(mutex_);
  entries_.clear();
}

void FastPath::stop() {
  stopped_ = true;
  ::shutdown(descriptor_, SHUT_RDWR);
  if (thread_.joinable()) thread_.join();
}

FastCounts FastPath::take_counts() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const FastCounts counts = counts_;
  counts_ = {};
  return counts;
}

void FastPath::serve() {
  answer_requests();
  ::shutdown(descriptor_, SHUT_RDWR);  // the trainer is to know
}

void FastPath::answer_requests() {
  Request request;
  while (!stopped_ && wait_for_request(request)) {
    if (request.magic != kRequestMagic || request.payload_bytes > kFastPayloadBytes) return;
    if (!receive(payload_.data(), request.payload_bytes)) return;
    std::size_t bytes = 0;
    const FastStatus status = compute(request, bytes);
    if (!send(request, status, bytes)) return;
  }
}

bool FastPath::wait_for_request(Request& request) {
  if (spin_.count() > 0) {
    const auto until = std::chrono::steady_clock::now() + spin_;
    do {
      const ssize_t got = ::recv(descriptor_, &request, sizeof(request), MSG_DONTWAIT | MSG_PEEK);
      if (got != -1 || (errno != EAGAIN && errno != EINTR)) break;
    } while (std::chrono::steady_clock::now() < until);
  }
  return receive(&request, sizeof(request));
}

bool FastPath::receive(void* into, std::size_t bytes) {
  auto* at = static_cast<std::uint8_t*>(into);
  while (bytes > 0) {
    const ssize_t got = ::recv(descriptor_, at, bytes, MSG_WAITALL);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got;
    bytes -= static_cast<std::size_t>(got);
  }
  return true;
}

bool FastPath::send(const Request& request, FastStatus status, std::size_t bytes) {
  const Answer head{kAnswerMagic, request.sequence, static_cast<std::uint32_t>(status),
                    static_cast<std::uint32_t>(bytes)};
  std::memcpy(answer_.data(), &head, sizeof(head));
  const std::uint8_t* at = answer_.data();
  std::size_t left = sizeof(head) + bytes;
  while (left > 0) {
    const ssize_t sent = ::send(descriptor_, at, left, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    at += sent;
    left -= static_cast<std::size_t>(sent);
  }
  return true;
}

FastStatus FastPath::compute(const Request& request, std::size_t& output_bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = entries_.find(request.entry);
  if (found == entries_.end()) return FastStatus::kUnknown;
  const Inside inside(gate_);
  if (!inside) {
    ++counts_.busy;
    return FastStatus::kBusy;
  }
  try {
    return run(found->second, request, output_bytes);
  } catch (const std::exception&) {  // an expert there is not, no memory
    return FastStatus::kRefused;
  }
}

FastStatus FastPath::run(const FastEntry& entry, const Request& request, std::size_t& output_bytes) {
  const LayerSpec& layer = entry.weights->spec();
  const std::size_t routes = std::size_t{request.tokens} * static_cast<std::size_t>(entry.top_k);
  const std::size_t token_bytes =
      static_cast<std::size_t>(layer.hidden) * static_cast<std::size_t>(size_of(entry.type));
  const std::size_t output = request.tokens * token_bytes;
  const std::size_t expected = routes * (sizeof(std::int32_t) + sizeof(float)) + output;
  if (request.tokens < 1 || request.tokens > kFastTokens || request.payload_bytes != expected) {
    return FastStatus::kRefused;
  }
  const auto begun = std::chrono::steady_clock::now();
  const auto* ids = reinterpret_cast<const std::int32_t*>(payload_.data());
  const auto* weights = reinterpret_cast<const float*>(ids + routes);
  ForwardArgs args;
  args.weights = entry.weights;
  args.lora = entry.lora;
  args.scales = entry.scales;
  args.x = {weights + routes, entry.type};
  args.routing =
      build_routing({ids, routes}, {weights, routes}, static_cast<int>(request.tokens), entry.top_k, layer.experts);
  args.y = {answer_.data() + sizeof(Answer), entry.type};
  engine_.forward(args);
  output_bytes = output;
  ++counts_.forwards;
  counts_.tokens += request.tokens;
  counts_.flops += kFlopsPerRoute * static_cast<double>(routes) * layer.hidden * layer.intermediate;
  counts_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  return FastStatus::kDone;
}

}  // namespace kt_expert
