#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bind/bindings.h"
#include "kt_expert/adapter.h"

namespace kt_expert {
namespace {

namespace py = pybind11;

AdapterSpec make_spec(bool tied, int rank_gate, int rank_up, int rank_down, float scale_gate, float scale_up,
                      float scale_down, float dropout, bool full) {
  AdapterSpec spec{tied, rank_gate, rank_up, rank_down, scale_gate, scale_up, scale_down, dropout, full};
  spec.validate();
  return spec;
}

py::array_t<float> tensor_view(const py::object& self, const std::string& name) {
  AdapterTensors& tensors = self.cast<AdapterTensors&>();
  const AdapterTensor which = adapter_tensor_from_name(name);
  const TensorShape shape = tensor_shape(tensors.layer(), tensors.spec(), which);
  return py::array_t<float>({static_cast<py::ssize_t>(tensors.layer().experts), static_cast<py::ssize_t>(shape.rows),
                             static_cast<py::ssize_t>(shape.columns)},
                            tensors.tensor(which).data(), self);
}

std::vector<std::string> present_names(const AdapterTensors& tensors) {
  std::vector<std::string> names;
  for (int t = 0; t < kAdapterTensors; ++t) {
    if (!tensors.tensor(static_cast<AdapterTensor>(t)).empty())
      names.emplace_back(adapter_tensor_name(static_cast<AdapterTensor>(t)));
  }
  return names;
}

}  // namespace

void bind_adapter(py::module_& module) {
  py::class_<AdapterSpec>(module, "AdapterSpec")
      .def(py::init(&make_spec), py::kw_only(), py::arg("tied") = false, py::arg("rank_gate") = 0,
           py::arg("rank_up") = 0, py::arg("rank_down") = 0, py::arg("scale_gate") = 0.0f, py::arg("scale_up") = 0.0f,
           py::arg("scale_down") = 0.0f, py::arg("dropout") = 0.0f, py::arg("full") = false);
  py::class_<AdapterTensors>(module, "AdapterTensors")
      .def(py::init<const LayerSpec&, const AdapterSpec&>(), py::arg("layer"), py::arg("lora"))
      .def("names", &present_names)
      .def("tensor", &tensor_view, py::arg("name"))
      .def("zero", &AdapterTensors::zero, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("nbytes", &AdapterTensors::bytes)
      .def_static("bytes_of", &AdapterTensors::bytes_of, py::arg("layer"), py::arg("lora"))
      .def_static(
          "shape_of",
          [](const LayerSpec& layer, const AdapterSpec& lora, const std::string& name) {
            const TensorShape shape = tensor_shape(layer, lora, adapter_tensor_from_name(name));
            return std::make_tuple(layer.experts, shape.rows, shape.columns);
          },
          py::arg("layer"), py::arg("lora"), py::arg("name"));
}

}  // namespace kt_expert
