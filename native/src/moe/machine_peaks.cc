// The bounds that speed is stated against, measured on the engine's own threads.
#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

#include "gemm/kernels.h"
#include "kt_expert/engine.h"

namespace kt_expert {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begun) { return std::chrono::duration<double>(Clock::now() - begun).count(); }

constexpr double kPieceSeconds = 0.01;
constexpr int kPieces = 24;  // a thread; the last ones all run at once with the others

}  // namespace

double Engine::measure_peak_flops() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::int64_t rounds = 1000;
  for (double seconds = 0.0; seconds < kPieceSeconds; rounds *= 2) {
    const auto begun = Clock::now();
    kernels_.burn(rounds);
    seconds = seconds_since(begun);
  }
  const std::int64_t tasks = std::int64_t{kPieces} * pool_.size();
  double flops = 0.0;
  std::vector<double> done(static_cast<std::size_t>(tasks));
  const auto begun = Clock::now();
  pool_.run(tasks, [&](std::int64_t task, int) { done[static_cast<std::size_t>(task)] = kernels_.burn(rounds); });
  const double seconds = seconds_since(begun);
  for (double value : done) flops += value;
  return flops / seconds;
}

double Engine::measure_read_bandwidth() {
  return measure_sweeps(1, [this](float* piece, std::int64_t count) { kernels_.read(piece, count); });
}

double Engine::measure_update_bandwidth() {
  return measure_sweeps(2, [this](float* piece, std::int64_t count) { kernels_.scale(0.5f, piece, count); });
}

double Engine::measure_sweeps(int passes, const std::function<void(float*, std::int64_t)>& body) {
  std::lock_guard<std::mutex> lock(mutex_);
  constexpr std::int64_t kFloats = std::int64_t{64} << 20, kTaskFloats = std::int64_t{1} << 18;
  constexpr int kSweeps = 4;
  AlignedBuffer<float> memory(static_cast<std::size_t>(kFloats));
  pool_.run(kFloats / kTaskFloats,
            [&](std::int64_t task, int) { std::fill_n(memory.data() + task * kTaskFloats, kTaskFloats, 1.0f); });
  const auto begun = Clock::now();
  pool_.run(kSweeps * kFloats / kTaskFloats, [&](std::int64_t task, int) {
    body(memory.data() + task % (kFloats / kTaskFloats) * kTaskFloats, kTaskFloats);
  });
  return static_cast<double>(passes * kSweeps * kFloats) * static_cast<double>(sizeof(float)) / seconds_since(begun);
}

}  // namespace kt_expert
