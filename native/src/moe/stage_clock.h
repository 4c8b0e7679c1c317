// Measures the stages of a pass: a few dozen nanoseconds for each block of a product.
#pragma once

#include <chrono>
#include <vector>

#include "kt_expert/stage_times.h"

namespace kt_expert {

class StageClock {
 public:
  explicit StageClock(int workers) : workers_(static_cast<std::size_t>(workers)) {}

  // Runs `body`, all of it one stage.
  template <typename Body>
  void run(Stage stage, const Body& body) {
    const Clock::time_point begun = Clock::now();
    body();
    total_[static_cast<std::size_t>(stage)] += seconds(Clock::now() - begun);
  }
  // Runs `body`, whose workers tell what they spend their time on by start() and lap().
  template <typename Body>
  void run_mixed(const Body& body) {
    for (Worker& worker : workers_) worker.spent = {};
    const Clock::time_point begun = Clock::now();
    body();
    share(seconds(Clock::now() - begun));
  }
  void start(int worker) { at(worker).mark = Clock::now(); }
  // What has passed since the worker's last word was this stage.
  void lap(int worker, Stage stage) {
    Worker& own = at(worker);
    const Clock::time_point now = Clock::now();
    own.spent[static_cast<std::size_t>(stage)] += seconds(now - own.mark);
    own.mark = now;
  }
  const StageTimes& total() const { return total_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct alignas(64) Worker {
    Clock::time_point mark;
    StageTimes spent = {};
  };

  static double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }
  Worker& at(int worker) { return workers_[static_cast<std::size_t>(worker)]; }
  void share(double wall) {
    StageTimes sums = {};
    double all = 0.0;
    for (const Worker& worker : workers_) {
      for (std::size_t stage = 0; stage < kStages; ++stage) {
        sums[stage] += worker.spent[stage];
        all += worker.spent[stage];
      }
    }
    for (std::size_t stage = 0; all > 0.0 && stage < kStages; ++stage) total_[stage] += wall * sums[stage] / all;
  }

  std::vector<Worker> workers_;
  StageTimes total_ = {};
};

}  // namespace kt_expert
