#include "kt_expert/thread_pool.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <string>
#include <utility>

#include "kt_expert/error.h"
#include "kt_expert/topology.h"

namespace kt_expert {
namespace {

// Long enough to bridge the gap between two loops of one forward, short enough that an oversubscribed machine
// loses nothing to waiting workers.
constexpr std::chrono::microseconds kSpinLimit{50};
constexpr int kSpinsPerLook = 32;  // at the clock, which costs as much as some tens of pauses
// Places that one thread calls and that report as one. The square root of a team of 64 to 128.
constexpr int kGroup = 8;

// A seat's call: the loop's number and the place.
constexpr int kPlaceBits = 11;
constexpr std::uint64_t kPlaceMask = (std::uint64_t{1} << kPlaceBits) - 1;
static_assert(ThreadPool::kMaxThreads <= static_cast<int>(kPlaceMask), "every place has a number");

// A group's state: the loop's number, whether it is closed, and how many are inside.
constexpr std::uint64_t kInsideMask = 0xff;
constexpr std::uint64_t kClosed = 0x100;
constexpr int kLoopShift = 9;
static_assert(kGroup <= static_cast<int>(kInsideMask), "all of a group may be inside");

}  // namespace

template <typename Condition>
void ThreadPool::Bell::wait(const Condition& rung) {
  const auto give_up = std::chrono::steady_clock::now() + kSpinLimit;
  do {
    for (int spin = 0; spin < kSpinsPerLook; ++spin) {
      if (rung()) return;
      __builtin_ia32_pause();
    }
  } while (std::chrono::steady_clock::now() < give_up);
  std::unique_lock<std::mutex> lock(mutex_);
  // Either ring() sees this, or the condition sees what was changed before ring().
  asleep_.store(true);
  awake_.wait(lock, rung);
  asleep_.store(false);
}

void ThreadPool::Bell::ring() {
  if (!asleep_.load()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
  }
  awake_.notify_one();
}

ThreadPool::ThreadPool(int threads, int nodes)
    : ThreadPool(threads, std::vector<std::vector<int>>(static_cast<std::size_t>(std::max(0, nodes)))) {}

ThreadPool::ThreadPool(int threads, std::vector<std::vector<int>> node_cpus)
    : size_(threads), nodes_(static_cast<int>(node_cpus.size())), node_cpus_(std::move(node_cpus)) {
  if (threads < 1 || threads > kMaxThreads) {
    throw InvalidArgument("thread count " + std::to_string(threads) + " is outside [1, " + std::to_string(kMaxThreads) +
                          "]; give the number of physical cores");
  }
  if (nodes_ < 1 || nodes_ > kMaxMemoryNodes) {
    throw InvalidArgument("the number of memory nodes is " + std::to_string(nodes_) + ", expected a value in [1, " +
                          std::to_string(kMaxMemoryNodes) + "]");
  }
  for (int worker = 0; worker < size_; ++worker) nodes_of_workers_.push_back(node_of(worker));
  counters_ = std::make_unique<TaskCounter[]>(static_cast<std::size_t>(nodes_));
  seats_ = std::make_unique<Seat[]>(static_cast<std::size_t>(threads));
  groups_ = std::make_unique<Group[]>(static_cast<std::size_t>((threads + kGroup - 1) / kGroup));
  called_.resize(static_cast<std::size_t>(threads));
  is_called_.resize(static_cast<std::size_t>(threads));
  workers_.reserve(static_cast<std::size_t>(threads - 1));
  try {
    for (int worker = 1; worker < threads; ++worker) {
      workers_.emplace_back([this, worker] { worker_loop(worker); });
    }
  } catch (...) {
    stop();  // a limit on processes was met; those that run must not outlive this object
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

// The node in which the worker's place lies when all nodes' cores are laid end to end; without cores, nodes count
// alike.
int ThreadPool::node_of(int worker) const {
  const auto weight = [](const std::vector<int>& cpus) {
    return std::max<std::int64_t>(1, static_cast<std::int64_t>(cpus.size()));
  };
  std::int64_t total = 0;
  for (const std::vector<int>& cpus : node_cpus_) total += weight(cpus);
  const std::int64_t place = worker * total / size_;
  int node = 0;
  for (std::int64_t end = weight(node_cpus_[0]); place >= end;
       end += weight(node_cpus_[static_cast<std::size_t>(node)])) {
    ++node;
  }
  return node;
}

void ThreadPool::stop() {
  stopping_.store(true);
  for (std::size_t worker = 1; worker <= workers_.size(); ++worker) {
    seats_[worker].called.fetch_add(1);
    seats_[worker].bell.ring();
  }
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& body, const CancelToken* token) {
  const std::array<std::int64_t, kMaxMemoryNodes> counts = {tasks};
  run_on_nodes(
      {counts.data(), static_cast<std::size_t>(nodes_)},
      [&body](int, std::int64_t task, int worker) { body(task, worker); }, token);
}

void ThreadPool::run_on_nodes(Span<const std::int64_t> tasks, const std::function<void(int, std::int64_t, int)>& body,
                              const CancelToken* token) {
  if (static_cast<int>(tasks.size()) != nodes_) {
    throw InvalidArgument("tasks for " + std::to_string(tasks.size()) + " memory nodes on a pool of " +
                          std::to_string(nodes_) + "; load the weights for this engine's nodes");
  }
  if (token != nullptr) token->check();
  std::int64_t total = 0;
  for (const std::int64_t count : tasks) total += count;
  if (total <= 0) return;
  std::lock_guard<std::mutex> one_loop(run_mutex_);
  body_ = &body;
  token_ = token;
  failure_ = nullptr;
  abandon_.store(false, std::memory_order_relaxed);
  for (int node = 0; node < nodes_; ++node) {
    counters_[static_cast<std::size_t>(node)].tasks = tasks[static_cast<std::size_t>(node)];
    counters_[static_cast<std::size_t>(node)].next.store(0, std::memory_order_relaxed);
  }
  called_count_ = choose_workers(tasks, total);
  const int groups = (called_count_ + kGroup - 1) / kGroup;
  ++loop_;
  for (int group = 0; group < groups; ++group) groups_[group].state.store(loop_ << kLoopShift);
  groups_left_.store(groups);
  for (int group = groups - 1; group > 0; --group) call(group * kGroup);
  if (groups > 0) call(0);
  if (groups == 1) call_group(0);
  {
    const PinnedThread near(cpus_of(0));
    drain(0);
  }
  close_groups(groups);
  done_.wait([this] { return groups_left_.load() == 0; });
  body_ = nullptr;
  if (failure_) std::rethrow_exception(failure_);
}

// Writes who is called, from place 0 on, and returns how many: a task each beside the caller's own, neighbours of the
// tasks first.
int ThreadPool::choose_workers(Span<const std::int64_t> tasks, std::int64_t total) {
  const int wanted = static_cast<int>(std::min<std::int64_t>(total, size_)) - 1;
  int count = 0;
  if (wanted == size_ - 1) {
    for (int worker = 1; worker < size_; ++worker) called_[static_cast<std::size_t>(count++)] = worker;
    return count;
  }
  std::array<std::int64_t, kMaxMemoryNodes> left = {};
  std::copy(tasks.begin(), tasks.end(), left.begin());
  --left[static_cast<std::size_t>(nodes_of_workers_[0])];
  std::fill(is_called_.begin(), is_called_.end(), char{0});
  for (const bool only_near : {true, false}) {
    for (int worker = 1; worker < size_ && count < wanted; ++worker) {
      const std::size_t at = static_cast<std::size_t>(worker);
      std::int64_t& of_node = left[static_cast<std::size_t>(nodes_of_workers_[at])];
      if (is_called_[at] != 0 || (only_near && of_node <= 0)) continue;
      --of_node;
      is_called_[at] = 1;
      called_[static_cast<std::size_t>(count++)] = worker;
    }
  }
  return count;
}

void ThreadPool::call(int place) {
  Seat& seat = seats_[called_[static_cast<std::size_t>(place)]];
  seat.called.store(loop_ << kPlaceBits | static_cast<std::uint64_t>(place));
  seat.bell.ring();
}

// The others of the group that begins there.
void ThreadPool::call_group(int first) {
  for (int place = first + 1; place < std::min(first + kGroup, called_count_); ++place) call(place);
}

// False where the loop has ended meanwhile; from then on nothing of it may be looked at.
bool ThreadPool::enter(std::uint64_t loop, int place) {
  std::atomic<std::uint64_t>& state = groups_[place / kGroup].state;
  std::uint64_t seen = state.load();
  do {
    if (seen >> kLoopShift != loop || (seen & kClosed) != 0) return false;
  } while (!state.compare_exchange_weak(seen, seen + 1));
  return true;
}

void ThreadPool::leave(int place) {
  const std::uint64_t before = groups_[place / kGroup].state.fetch_sub(1);
  if ((before & kClosed) == 0 || (before & kInsideMask) != 1) return;
  if (groups_left_.fetch_sub(1) == 1) done_.ring();
}

// There are no tasks left to begin: nobody else comes in, and those who are inside report when they leave.
void ThreadPool::close_groups(int groups) {
  for (int group = 0; group < groups; ++group) {
    const std::uint64_t before = groups_[group].state.fetch_or(kClosed);
    if ((before & kInsideMask) == 0) groups_left_.fetch_sub(1);
  }
}

void ThreadPool::drain(int worker) {
  const int own = nodes_of_workers_[static_cast<std::size_t>(worker)];
  for (int step = 0; step < nodes_; ++step) {
    if (!drain_node((own + step) % nodes_, worker)) return;
  }
}

// False once the loop is abandoned.
bool ThreadPool::drain_node(int node, int worker) {
  TaskCounter& counter = counters_[static_cast<std::size_t>(node)];
  while (!abandon_.load(std::memory_order_relaxed)) {
    const std::int64_t task = counter.next.fetch_add(1);
    if (task >= counter.tasks) return true;
    try {
      if (token_ != nullptr) token_->check();
      (*body_)(node, task, worker);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
      abandon_.store(true);
    }
  }
  return false;
}

void ThreadPool::worker_loop(int worker) {
  const PinnedThread near(cpus_of(worker));
  Seat& seat = seats_[worker];
  std::uint64_t seen = 0;
  while (true) {
    seat.bell.wait([&] { return seat.called.load() != seen; });
    if (stopping_.load()) return;
    seen = seat.called.load();
    const int place = static_cast<int>(seen & kPlaceMask);
    if (!enter(seen >> kPlaceBits, place)) continue;
    if (place % kGroup == 0 && called_count_ > kGroup) call_group(place);
    drain(worker);
    leave(place);
  }
}

}  // namespace kt_expert
