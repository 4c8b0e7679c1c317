// A fixed team of workers that runs one parallel loop at a time.
//
// A loop calls as many workers as it has tasks for, and nobody else hears of it. Whoever is first of a group of those
// called calls the others of it, and a group that nobody has entered when the tasks are out is closed: the caller waits
// for nobody who is still waking up, and the last of a group to leave reports for all. So neither calling nor joining
// grows with the team, and no lock is taken but to wake a thread that has gone to sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kt_expert/cancel_token.h"
#include "kt_expert/span.h"

namespace kt_expert {

class ThreadPool {
 public:
  // `threads` counts the calling thread too. Workers are dealt to `nodes` groups of neighbours. Throws InvalidArgument
  // for threads outside [1, kMaxThreads] or nodes outside [1, kMaxMemoryNodes].
  explicit ThreadPool(int threads, int nodes = 1);
  // A group for every set of cores, as many workers as its share of the cores, who stay on them; the caller does while
  // it works.
  ThreadPool(int threads, std::vector<std::vector<int>> node_cpus);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }
  int nodes() const { return nodes_; }

  // Runs body(task, worker) for every task in [0, tasks); worker is in [0, size()). Returns when all have ended.
  // Which worker runs which task is not fixed, so a task must own what it writes. The first exception of a task, or
  // the token's, is rethrown here and no further task is started.
  void run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& body, const CancelToken* token = nullptr);

  // The same with one list of tasks a node, body(node, task, worker): a worker takes its own node's tasks first and
  // then helps the others.
  void run_on_nodes(Span<const std::int64_t> tasks, const std::function<void(int, std::int64_t, int)>& body,
                    const CancelToken* token = nullptr);

  static constexpr int kMaxThreads = 1024;

 private:
  // One node's tasks; alone on its cache lines, so that nodes do not slow each other.
  struct alignas(64) TaskCounter {
    std::atomic<std::int64_t> next{0};
    std::int64_t tasks = 0;
  };
  // Where a thread waits for a value to change: it watches it for a moment and then sleeps.
  class alignas(64) Bell {
   public:
    template <typename Condition>
    void wait(const Condition& rung);
    // After the change that `rung` looks for.
    void ring();

   private:
    std::atomic<bool> asleep_{false};
    std::mutex mutex_;
    std::condition_variable awake_;
  };
  // Of one worker: the loop it was called to last, and its place among those called.
  struct alignas(64) Seat {
    std::atomic<std::uint64_t> called{0};
    Bell bell;
  };
  // Neighbouring places: which loop they are of, whether it still takes anybody in, and how many are inside.
  struct alignas(64) Group {
    std::atomic<std::uint64_t> state{0};
  };

  int node_of(int worker) const;
  const std::vector<int>& cpus_of(int worker) const { return node_cpus_[static_cast<std::size_t>(node_of(worker))]; }
  void stop();
  void worker_loop(int worker);
  int choose_workers(Span<const std::int64_t> tasks, std::int64_t total);
  void call(int place);
  void call_group(int first);
  bool enter(std::uint64_t loop, int place);
  void leave(int place);
  void close_groups(int groups);
  void drain(int worker);
  bool drain_node(int node, int worker);

  const int size_;
  const int nodes_;
  const std::vector<std::vector<int>> node_cpus_;  // empty sets: anywhere
  std::vector<int> nodes_of_workers_;
  std::unique_ptr<TaskCounter[]> counters_;
  std::unique_ptr<Seat[]> seats_;    // of workers 1 to size - 1
  std::unique_ptr<Group[]> groups_;  // by place
  std::vector<std::thread> workers_;
  std::mutex run_mutex_;  // one loop at a time

  // Of the loop that runs, written before anybody is called to it.
  std::uint64_t loop_ = 0;
  std::vector<int> called_;      // workers, by place
  std::vector<char> is_called_;  // by worker
  int called_count_ = 0;
  const std::function<void(int, std::int64_t, int)>* body_ = nullptr;
  const CancelToken* token_ = nullptr;

  alignas(64) std::atomic<int> groups_left_{0};
  Bell done_;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<bool> abandon_{false};
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
};

}  // namespace kt_expert
