// A fixed team of workers that runs one parallel loop at a time.
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
  int node_of(int worker) const;
  const std::vector<int>& cpus_of(int worker) const { return node_cpus_[static_cast<std::size_t>(node_of(worker))]; }
  void stop();
  void worker_loop(int worker);
  void drain(int worker);
  bool drain_node(int node, int worker);
  bool wait_for_work(std::uint64_t seen_generation);

  // A counter alone on its cache line: nodes do not slow each other.
  struct alignas(64) TaskCounter {
    std::atomic<std::int64_t> next{0};
    std::int64_t tasks = 0;
  };

  const int size_;
  const int nodes_;
  const std::vector<std::vector<int>> node_cpus_;  // empty sets: anywhere
  std::unique_ptr<TaskCounter[]> counters_;
  std::vector<std::thread> workers_;
  std::mutex run_mutex_;  // one loop at a time
  std::mutex mutex_;
  std::condition_variable work_ready_;
  std::condition_variable work_done_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> abandon_{false};
  int active_workers_ = 0;
  const std::function<void(int, std::int64_t, int)>* body_ = nullptr;
  const CancelToken* token_ = nullptr;
  std::exception_ptr failure_;
};

}  // namespace kt_expert
