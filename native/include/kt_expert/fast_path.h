// Small forwards that keep nothing, from a socket to the engine and back without the interpreter.
//
// The interpreter's way costs a small forward about a millisecond: a request passes two state machines and four
// threads. A forward that keeps no ticket changes nothing, so nothing of that is needed for it: whoever gets no answer
// asks again the ordinary way. The other end of the socket is one trainer, who may send what it likes; what its
// forwards compute with are entries, which the interpreter's side has granted.
//
// A request is 32 bytes, little-endian: magic "KTFQ", tokens, entry (eight bytes), sequence, payload bytes, and two
// zeros of four bytes each; then expert ids, int32 [tokens, k], routing weights, fp32 [tokens, k], and hidden states
// [tokens, H] in the entry's type. An answer is 16 bytes: magic "KTFA", the request's sequence, a FastStatus and
// payload bytes; then, if it is done, the output [tokens, H].
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>

#include "kt_expert/adapter.h"
#include "kt_expert/aligned_buffer.h"
#include "kt_expert/engine.h"
#include "kt_expert/layer.h"

namespace kt_expert {

// Whoever is inside has the engine for itself, and whatever its operations read and write.
class Gate {
 public:
  void enter() {
    ++waiting_;
    mutex_.lock();
    --waiting_;
  }
  // Not past anybody who waits: a mutex alone would let those in who come again at once, as small forwards do, and a
  // piece of work that has to be woken up never.
  bool try_enter() { return waiting_ == 0 && mutex_.try_lock(); }
  void leave() { mutex_.unlock(); }
  int waiting() const { return waiting_; }

 private:
  std::mutex mutex_;
  std::atomic<int> waiting_{0};
};

enum class FastStatus : std::uint32_t {
  kDone = 0,
  kBusy = 1,     // the engine has other work, which has an order that this request would not follow
  kUnknown = 2,  // an entry that was revoked, or never granted
  kRefused = 3,  // the ordinary way tells why
};

// What a granted forward computes with. The caller keeps both alive until the entry is revoked.
struct FastEntry {
  const LayerWeights* weights = nullptr;
  const AdapterTensors* lora = nullptr;  // null: base weights alone
  std::optional<AdapterScales> scales;   // in place of the adapter's own
  FloatType type = FloatType::kBf16;
  int top_k = 0;
};

struct FastCounts {
  std::int64_t forwards = 0;
  std::int64_t tokens = 0;
  double flops = 0.0;    // three products of H x I a route
  double seconds = 0.0;  // of the engine
  std::int64_t busy = 0;
};

constexpr int kFastTokens = 64;  // a batch of more is bound by its products: what the ordinary way costs does not count
constexpr std::uint32_t kFastPayloadBytes = 1 << 20;

class FastPath {
 public:
  // Takes the descriptor of a stream socket that waits. `spin`: how long to look for a request before sleeping.
  // Entries are counted from `first_entry` on: a number of another connection's should mean nothing here.
  FastPath(Engine& engine, Gate& gate, int descriptor, std::chrono::microseconds spin, std::uint64_t first_entry = 1);
  ~FastPath();
  FastPath(const FastPath&) = delete;
  FastPath& operator=(const FastPath&) = delete;

  // An entry's number, which never comes again. Throws InvalidArgument for an adapter of another layer or no routes.
  std::uint64_t grant(const FastEntry& entry);
  // Forgets all entries, and returns when none is in use any more.
  void revoke();
  // Ends the connection; safe to call twice. A forward that is under way is waited for.
  void stop();
  // Since the last call.
  FastCounts take_counts();

 private:
  struct Request;

  void serve();
  void answer_requests();
  bool wait_for_request(Request& request);
  bool receive(void* into, std::size_t bytes);
  bool send(const Request& request, FastStatus status, std::size_t bytes);
  FastStatus compute(const Request& request, std::size_t& output_bytes);
  FastStatus run(const FastEntry& entry, const Request& request, std::size_t& output_bytes);

  Engine& engine_;
  Gate& gate_;
  const int descriptor_;
  const std::chrono::microseconds spin_;
  AlignedBuffer<std::uint8_t> payload_;
  AlignedBuffer<std::uint8_t> answer_;
  std::mutex mutex_;  // of what follows; held while an entry is in use
  std::unordered_map<std::uint64_t, FastEntry> entries_;
  std::uint64_t next_entry_;
  FastCounts counts_;
  std::atomic<bool> stopped_{false};
  std::thread thread_;
};

}  // namespace kt_expert
