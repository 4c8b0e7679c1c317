#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bind/bindings.h"
#include "kt_expert/error.h"
#include "kt_expert/layer.h"

namespace kt_expert {
namespace {

namespace py = pybind11;
using Bf16Array = py::array_t<bf16_t, py::array::c_style>;
using FloatArray = py::array_t<float, py::array::c_style>;
using ByteArray = py::array_t<std::uint8_t, py::array::c_style>;

struct NamedActivation {
  const char* name;
  Activation kind;
};
constexpr NamedActivation kActivations[] = {{"silu", Activation::kSilu},
                                            {"gpt_oss", Activation::kGptOss},
                                            {"gelu_tanh", Activation::kGeluTanh},
                                            {"relu2", Activation::kRelu2},
                                            {"clamped_silu", Activation::kClampedSilu}};

Activation activation_from(const std::string& name) {
  std::string known;
  for (const NamedActivation& activation : kActivations) {
    if (name == activation.name) return activation.kind;
    known += (known.empty() ? "" : ", ") + std::string(activation.name);
  }
  throw InvalidArgument("activation '" + name + "' is not known; choose one of: " + known);
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

py::array_t<float> dequantized(const LayerWeights& weights, const std::string& projection, int expert) {
  const Projection which = projection_from(projection);
  const LayerSpec& spec = weights.spec();
  const std::vector<float> values = weights.dequantized(which, expert);
  const py::ssize_t rows = which == Projection::kDown ? spec.hidden : spec.intermediate;
  py::array_t<float> array({rows, static_cast<py::ssize_t>(values.size()) / rows});
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
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
      .def(py::init(
               [](const LayerSpec& spec, const std::string& format, int nodes, const std::vector<int>& memory_nodes) {
                 return LayerWeights(spec, weight_format_from_name(format), nodes, memory_nodes);
               }),
           py::arg("spec"), py::arg("weight_format") = "bf16", py::arg("nodes") = 1,
           py::arg("memory_nodes") = std::vector<int>{})
      .def_property_readonly("placement_obstacle", &LayerWeights::placement_obstacle)
      .def_property_readonly("spec", &LayerWeights::spec)
      .def_property_readonly("weight_format",
                             [](const LayerWeights& self) { return weight_format_name(self.format()); })
      .def_property_readonly("nbytes", &LayerWeights::bytes)
      .def_property_readonly("nodes", [](const LayerWeights& self) { return self.slices().size(); })
      .def(
          "empty_like",
          [](const LayerWeights& self, const std::string& format) {
            return self.empty_like(weight_format_from_name(format));
          },
          py::arg("weight_format"))
      .def_static(
          "nbytes_of",
          [](const LayerSpec& spec, const std::string& format, int nodes) {
            return LayerWeights::bytes_of(spec, weight_format_from_name(format), nodes);
          },
          py::arg("spec"), py::arg("weight_format") = "bf16", py::arg("nodes") = 1)
      .def("dequantized", &dequantized, py::arg("projection"), py::arg("expert"))
      .def(
          "set_matrix",
          [](LayerWeights& self, const std::string& projection, int expert, const Bf16Array& source) {
            const Span<const bf16_t> span = span_of(source);
            py::gil_scoped_release release;
            self.set_matrix(projection_from(projection), expert, span);
          },
          py::arg("projection"), py::arg("expert"), py::arg("source"))
      .def(
          "set_native",
          [](LayerWeights& self, const std::string& projection, int expert, const ByteArray& codes,
             const ByteArray& scales) {
            const Span<const std::uint8_t> code_span = span_of(codes), scale_span = span_of(scales);
            py::gil_scoped_release release;
            self.set_native(projection_from(projection), expert, code_span, scale_span);
          },
          py::arg("projection"), py::arg("expert"), py::arg("codes"), py::arg("scales"))
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
