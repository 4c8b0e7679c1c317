#include <pybind11/stl.h>

#include <chrono>
#include <map>
#include <memory>
#include <string>

#include "bind/bindings.h"
#include "kt_expert/fast_path.h"

namespace kt_expert {
namespace {

namespace py = pybind11;

std::uint64_t grant(FastPath& path, const LayerWeights& weights, const AdapterTensors* adapter,
                    const std::optional<std::array<float, 3>>& scales, const std::string& dtype, int top_k) {
  FastEntry entry;
  entry.weights = &weights;
  entry.lora = adapter;
  if (scales) entry.scales = AdapterScales{(*scales)[0], (*scales)[1], (*scales)[2]};
  entry.type = float_type_from(dtype);
  entry.top_k = top_k;
  const py::gil_scoped_release release;
  return path.grant(entry);
}

std::map<std::string, double> take_counts(FastPath& path) {
  FastCounts counts;
  {
    const py::gil_scoped_release release;
    counts = path.take_counts();
  }
  return {{"forwards", static_cast<double>(counts.forwards)},
          {"tokens", static_cast<double>(counts.tokens)},
          {"flops", counts.flops},
          {"seconds", counts.seconds},
          {"busy", static_cast<double>(counts.busy)}};
}

}  // namespace

void bind_fast_path(py::module_& module) {
  module.attr("FAST_TOKENS") = kFastTokens;
  module.attr("FAST_PAYLOAD_BYTES") = kFastPayloadBytes;
  py::class_<Gate>(module, "Gate")
      .def(py::init<>())
      .def("__enter__", &Gate::enter, py::call_guard<py::gil_scoped_release>())
      .def("__exit__", [](Gate& gate, const py::args&) { gate.leave(); });
  py::class_<FastPath>(module, "FastPath")
      .def(py::init([](Engine& engine, Gate& gate, int descriptor, double spin_s, std::uint64_t first_entry) {
             const auto spin =
                 std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::duration<double>(spin_s));
             return std::make_unique<FastPath>(engine, gate, descriptor, spin, first_entry);
           }),
           py::arg("engine"), py::arg("gate"), py::arg("descriptor"), py::arg("spin_s"), py::arg("first_entry"),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
      .def("grant", &grant, py::arg("weights"), py::arg("adapter").none(true), py::arg("scales"), py::arg("dtype"),
           py::arg("top_k"))
      .def("revoke", &FastPath::revoke, py::call_guard<py::gil_scoped_release>())
      .def("stop", &FastPath::stop, py::call_guard<py::gil_scoped_release>())
      .def("take_counts", &take_counts);
}

}  // namespace kt_expert
