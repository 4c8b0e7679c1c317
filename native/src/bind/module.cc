#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "bind/bindings.h"
#include "gemm/kernels.h"
#include "kt_expert/cpu_features.h"
#include "kt_expert/error.h"
#include "kt_expert/thread_pool.h"
#include "kt_expert/topology.h"

namespace kt_expert {
namespace {

std::vector<std::pair<std::string, std::string>> list_isas() {
  std::vector<std::pair<std::string, std::string>> isas;
  for (Isa isa : all_isas()) isas.emplace_back(isa_name(isa), isa_obstacle(isa));
  return isas;
}

std::vector<std::pair<int, std::vector<int>>> list_memory_nodes() {
  std::vector<std::pair<int, std::vector<int>>> nodes;
  for (const MemoryNode& node : memory_nodes()) nodes.emplace_back(node.id, node.cpus);
  return nodes;
}

std::vector<std::string> list_weight_formats() {
  std::vector<std::string> names;
  for (WeightFormat format : all_weight_formats()) names.emplace_back(weight_format_name(format));
  return names;
}

// Median seconds of a loop of `tasks` tasks, each of which spins for `task_s`.
double measure_loops(int threads, std::int64_t tasks, double task_s, int loops) {
  using Clock = std::chrono::steady_clock;
  if (tasks < 1 || loops < 1 || !(task_s >= 0.0 && task_s <= 1.0)) {
    throw InvalidArgument("loops and tasks must be at least 1 and a task between 0 and 1 s");
  }
  const pybind11::gil_scoped_release release;
  const auto work = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(task_s));
  ThreadPool pool(threads);
  std::vector<double> seconds;
  for (int loop = 0; loop < loops; ++loop) {
    const auto begun = Clock::now();
    pool.run(tasks, [&](std::int64_t, int) {
      for (const auto end = Clock::now() + work; work.count() > 0 && Clock::now() < end;) __builtin_ia32_pause();
    });
    seconds.push_back(std::chrono::duration<double>(Clock::now() - begun).count());
  }
  const auto middle = seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2);
  std::nth_element(seconds.begin(), middle, seconds.end());
  return *middle;
}

}  // namespace

void bind_errors(pybind11::module_& module) {
  namespace py = pybind11;
  const auto base = py::register_exception<Error>(module, "NativeError", PyExc_RuntimeError);
  py::register_exception<InvalidArgument>(module, "InvalidArgument", base);
  py::register_exception<Unsupported>(module, "Unsupported", base);
  py::register_exception<Cancelled>(module, "Cancelled", base);
  py::register_exception<DeadlineExceeded>(module, "DeadlineExceeded", base);
}

}  // namespace kt_expert

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native core of kt-expert: buffers in, buffers out.";
  kt_expert::bind_errors(module);
  kt_expert::bind_layer(module);
  kt_expert::bind_adapter(module);
  kt_expert::bind_optimizer(module);
  kt_expert::bind_engine(module);
  kt_expert::bind_fast_path(module);
  module.def("list_weight_formats", &kt_expert::list_weight_formats, "Every form weights can be held in.");
  module.attr("MAX_MEMORY_NODES") = kt_expert::kMaxMemoryNodes;
  module.def("list_memory_nodes", &kt_expert::list_memory_nodes,
             "Ids of the machine's memory nodes and the cores of each that this process may run on.");
  module.def("measure_loops", &kt_expert::measure_loops, pybind11::arg("threads"), pybind11::arg("tasks"),
             pybind11::arg("task_s"), pybind11::arg("loops"),
             "Median seconds of a loop of the engine's threads over so many tasks of so many seconds.");
  module.def("list_isas", &kt_expert::list_isas,
             "Every instruction set (ISA) and what keeps it from running here, empty where nothing does.");
}
