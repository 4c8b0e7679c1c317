#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bind/bindings.h"
#include "kt_expert/lora.h"

namespace kt_expert {
namespace {

namespace py = pybind11;

LoraSpec make_spec(bool tied, int rank_gate, int rank_up, int rank_down, float scale_gate, float scale_up,
                   float scale_down, float dropout) {
  LoraSpec spec{tied, rank_gate, rank_up, rank_down, scale_gate, scale_up, scale_down, dropout};
  spec.validate();
  return spec;
}

py::array_t<float> tensor_view(const py::object& self, const std::string& name) {
  LoraTensors& tensors = self.cast<LoraTensors&>();
  const LoraTensor which = lora_tensor_from_name(name);
  const LoraShape shape = lora_shape(tensors.layer(), tensors.lora(), which);
  return py::array_t<float>({static_cast<py::ssize_t>(tensors.layer().experts), static_cast<py::ssize_t>(shape.rows),
                             static_cast<py::ssize_t>(shape.columns)},
                            tensors.tensor(which).data(), self);
}

std::vector<std::string> present_names(const LoraTensors& tensors) {
  std::vector<std::string> names;
  for (int t = 0; t < kLoraTensors; ++t) {
    if (!tensors.tensor(static_cast<LoraTensor>(t)).empty())
      names.emplace_back(lora_tensor_name(static_cast<LoraTensor>(t)));
  }
  return names;
}

}  // namespace

void bind_lora(py::module_& module) {
  py::class_<LoraSpec>(module, "LoraSpec")
      .def(py::init(&make_spec), py::kw_only(), py::arg("tied") = false, py::arg("rank_gate") = 0,
           py::arg("rank_up") = 0, py::arg("rank_down") = 0, py::arg("scale_gate") = 0.0f, py::arg("scale_up") = 0.0f,
           py::arg("scale_down") = 0.0f, py::arg("dropout") = 0.0f);
  py::class_<LoraTensors>(module, "LoraTensors")
      .def(py::init<const LayerSpec&, const LoraSpec&>(), py::arg("layer"), py::arg("lora"))
      .def("names", &present_names)
      .def("tensor", &tensor_view, py::arg("name"))
      .def("zero", &LoraTensors::zero, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("nbytes", &LoraTensors::bytes)
      .def_static("bytes_of", &LoraTensors::bytes_of, py::arg("layer"), py::arg("lora"));
}

}  // namespace kt_expert
