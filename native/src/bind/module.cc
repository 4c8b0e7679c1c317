#include <pybind11/stl.h>

#include "bind/bindings.h"
#include "gemm/kernels.h"
#include "kt_expert/cpu_features.h"
#include "kt_expert/error.h"
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
  module.def("list_weight_formats", &kt_expert::list_weight_formats, "Every form weights can be held in.");
  module.attr("MAX_MEMORY_NODES") = kt_expert::kMaxMemoryNodes;
  module.def("list_memory_nodes", &kt_expert::list_memory_nodes,
             "Ids of the machine's memory nodes and the cores of each that this process may run on.");
  module.def("list_isas", &kt_expert::list_isas,
             "Every instruction set (ISA) and what keeps it from running here, empty where nothing does.");
}
