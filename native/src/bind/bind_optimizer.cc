#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>

#include "bind/bindings.h"
#include "kt_expert/error.h"
#include "kt_expert/optimizer.h"

namespace kt_expert {
namespace {

namespace py = pybind11;

MomentType moment_type_from(const std::string& name) {
  if (name == "fp32") return MomentType::kF32;
  if (name == "bf16") return MomentType::kBf16;
  throw InvalidArgument("moment dtype '" + name + "' is not known; choose one of: fp32, bf16");
}

OptimizerUpdate make_update(const std::string& kind, double learning_rate, double weight_decay, double beta1,
                            double beta2, double eps, double momentum, double dampening, bool nesterov,
                            double beta2_decay, double eps1, double eps2, double clip_threshold) {
  OptimizerUpdate update{optimizer_from_name(kind),
                         learning_rate,
                         weight_decay,
                         beta1,
                         beta2,
                         eps,
                         momentum,
                         dampening,
                         nesterov,
                         beta2_decay,
                         eps1,
                         eps2,
                         clip_threshold};
  update.validate();
  return update;
}

LayerStep make_step(const std::map<std::string, std::pair<OptimizerUpdate, double>>& tensors) {
  LayerStep made;
  for (const auto& [name, step] : tensors) {
    made.tensors[static_cast<std::size_t>(adapter_tensor_from_name(name))] = TensorStep{step.first, step.second};
  }
  return made;
}

// fp32 as float32, bf16 as the uint16 bits.
py::array slot_view(const py::object& self, const std::string& slot, const std::string& name) {
  OptimizerState& state = self.cast<OptimizerState&>();
  const std::vector<std::string> slots = OptimizerState::slot_names(state.kind());
  const auto found = std::find(slots.begin(), slots.end(), slot);
  if (found == slots.end()) {
    throw InvalidArgument("optimizer state of " + std::string(optimizer_name(state.kind())) + " has no '" + slot + "'");
  }
  const int index = static_cast<int>(found - slots.begin());
  const AdapterTensor tensor = adapter_tensor_from_name(name);
  const SlotShape shape = state.slot_shape(index, tensor);
  const std::vector<py::ssize_t> extents{static_cast<py::ssize_t>(shape.experts), static_cast<py::ssize_t>(shape.rows),
                                         static_cast<py::ssize_t>(shape.columns)};
  std::uint8_t* data = state.data(index, tensor);
  if (state.slot_type(index) == MomentType::kBf16) {
    return py::array_t<bf16_t>(extents, reinterpret_cast<bf16_t*>(data), self);
  }
  return py::array_t<float>(extents, reinterpret_cast<float*>(data), self);
}

std::vector<std::string> tensor_names(const OptimizerState& state) {
  std::vector<std::string> names;
  for (int t = 0; t < kAdapterTensors; ++t) {
    const AdapterTensor tensor = static_cast<AdapterTensor>(t);
    if (tensor_shape(state.layer(), state.spec(), tensor).rows > 0) names.emplace_back(adapter_tensor_name(tensor));
  }
  return names;
}

}  // namespace

void bind_optimizer(py::module_& module) {
  py::class_<OptimizerUpdate>(module, "OptimizerUpdate")
      .def(py::init(&make_update), py::arg("kind"), py::kw_only(), py::arg("learning_rate"),
           py::arg("weight_decay") = 0.0, py::arg("beta1") = 0.9, py::arg("beta2") = 0.999, py::arg("eps") = 1e-8,
           py::arg("momentum") = 0.0, py::arg("dampening") = 0.0, py::arg("nesterov") = false,
           py::arg("beta2_decay") = -0.8, py::arg("eps1") = OptimizerUpdate{}.eps1, py::arg("eps2") = 1e-3,
           py::arg("clip_threshold") = 1.0);
  py::class_<LayerStep>(module, "LayerStep").def(py::init(&make_step), py::arg("tensors"));
  py::class_<OptimizerState>(module, "OptimizerState")
      .def(py::init([](const LayerSpec& layer, const AdapterSpec& lora, const std::string& kind,
                       const std::string& moments) {
             return OptimizerState(layer, lora, optimizer_from_name(kind), moment_type_from(moments));
           }),
           py::arg("layer"), py::arg("lora"), py::arg("kind"), py::arg("moments") = "fp32")
      .def_property_readonly("kind", [](const OptimizerState& state) { return optimizer_name(state.kind()); })
      .def_property_readonly("nbytes", &OptimizerState::bytes)
      .def("slots", [](const OptimizerState& state) { return OptimizerState::slot_names(state.kind()); })
      .def("names", &tensor_names)
      .def("tensor", &slot_view, py::arg("slot"), py::arg("name"))
      .def_static(
          "bytes_of",
          [](const LayerSpec& layer, const AdapterSpec& lora, const std::string& kind, const std::string& moments) {
            return OptimizerState::bytes_of(layer, lora, optimizer_from_name(kind), moment_type_from(moments));
          },
          py::arg("layer"), py::arg("lora"), py::arg("kind"), py::arg("moments") = "fp32");
}

}  // namespace kt_expert
