#include <pybind11/numpy.h>

#include "bind/bindings.h"
#include "kt_expert/error.h"
#include "kt_expert/layer.h"

namespace kt_expert {
namespace {

namespace py = pybind11;
using Bf16Array = py::array_t<bf16_t, py::array::c_style>;
using FloatArray = py::array_t<float, py::array::c_style>;

Activation activation_from(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gpt_oss") return Activation::kGptOss;
  throw InvalidArgument("activation '" + name + "' is not known; choose one of: silu, gpt_oss");
}

Projection projection_from(const std::string& name) {
  if (name == "gate") return Projection::kGate;
  if (name == "up") return Projection::kUp;
  if (name == "down") return Projection::kDown;
  throw InvalidArgument("projection '" + name + "' is not known; choose one of: gate, up, down");
}

LayerSpec make_spec(int experts, int hidden, int intermediate, const std::string& activation, float alpha, float limit,
                    bool has_bias) {
  LayerSpec spec;
  spec.experts = experts;
  spec.hidden = hidden;
  spec.intermediate = intermediate;
  spec.activation = {activation_from(activation), alpha, limit};
  spec.has_bias = has_bias;
  spec.validate();
  return spec;
}

// A view of one expert's matrix that keeps the weights alive.
py::array_t<bf16_t> matrix_view(const py::object& self, const std::string& projection, int expert) {
  LayerWeights& weights = self.cast<LayerWeights&>();
  const Projection which = projection_from(projection);
  const LayerSpec& spec = weights.spec();
  const py::ssize_t rows = which == Projection::kDown ? spec.hidden : spec.intermediate;
  const py::ssize_t columns = which == Projection::kDown ? spec.intermediate : spec.hidden;
  return py::array_t<bf16_t>({rows, columns}, weights.matrix(which, expert).data(), self);
}

py::array_t<float> bias_view(const py::object& self, const std::string& projection, int expert) {
  LayerWeights& weights = self.cast<LayerWeights&>();
  const Span<float> bias = weights.bias(projection_from(projection), expert);
  return py::array_t<float>({static_cast<py::ssize_t>(bias.size())}, bias.data(), self);
}

GateUpOrder order_from(bool interleaved) {
  return interleaved ? GateUpOrder::kInterleaved : GateUpOrder::kConcatenated;
}

template <typename T>
Span<const T> span_of(const py::array_t<T, py::array::c_style>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

}  // namespace

void bind_layer(py::module_& module) {
  py::class_<LayerSpec>(module, "LayerSpec")
      .def(py::init(&make_spec), py::arg("num_experts"), py::arg("hidden_size"), py::arg("intermediate_size"),
           py::arg("activation") = "silu", py::arg("alpha") = 1.0f, py::arg("limit") = 0.0f,
           py::arg("has_bias") = false)
      .def_readonly("num_experts", &LayerSpec::experts)
      .def_readonly("hidden_size", &LayerSpec::hidden)
      .def_readonly("intermediate_size", &LayerSpec::intermediate)
      .def_readonly("has_bias", &LayerSpec::has_bias);
  py::class_<LayerWeights>(module, "LayerWeights")
      .def(py::init<const LayerSpec&>(), py::arg("spec"))
      .def_property_readonly("spec", &LayerWeights::spec)
      .def_property_readonly("nbytes", &LayerWeights::bytes)
      .def("matrix", &matrix_view, py::arg("projection"), py::arg("expert"))
      .def("bias", &bias_view, py::arg("projection"), py::arg("expert"))
      .def(
          "set_gate_up",
          [](LayerWeights& self, int expert, const Bf16Array& source, bool interleaved, bool transposed) {
            const Span<const bf16_t> span = span_of(source);
            py::gil_scoped_release release;
            self.set_gate_up(expert, span, order_from(interleaved), transposed);
          },
          py::arg("expert"), py::arg("source"), py::arg("interleaved"), py::arg("transposed"))
      .def(
          "set_gate_up_bias",
          [](LayerWeights& self, int expert, const FloatArray& source, bool interleaved) {
            self.set_gate_up_bias(expert, span_of(source), order_from(interleaved));
          },
          py::arg("expert"), py::arg("source"), py::arg("interleaved"))
      .def(
          "set_down",
          [](LayerWeights& self, int expert, const Bf16Array& source, bool transposed) {
            const Span<const bf16_t> span = span_of(source);
            py::gil_scoped_release release;
            self.set_down(expert, span, transposed);
          },
          py::arg("expert"), py::arg("source"), py::arg("transposed"));
}

}  // namespace kt_expert
