#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "bind/bindings.h"
#include "kt_expert/engine.h"
#include "kt_expert/error.h"

namespace kt_expert {
namespace {

namespace py = pybind11;
using IdArray = py::array_t<std::int32_t, py::array::c_style>;
using FloatArray = py::array_t<float, py::array::c_style>;

SavePolicy save_policy_from(const std::string& name) {
  if (name == "nothing") return SavePolicy::kNothing;
  if (name == "activations") return SavePolicy::kActivations;
  if (name == "inputs") return SavePolicy::kInputs;
  throw InvalidArgument("save policy '" + name + "' is not known; choose one of: nothing, activations, inputs");
}

std::string shape_text(const py::array& array) { return py::str(array.attr("shape")).cast<std::string>(); }

// bf16 travels as uint16 bits, fp32 as float32; anything else is refused here, before a pointer is taken.
FloatType token_type(const py::array& array, const char* name, py::ssize_t tokens, py::ssize_t hidden) {
  if (array.ndim() != 2 || array.shape(0) != tokens || array.shape(1) != hidden) {
    throw InvalidArgument(std::string(name) + " has shape " + shape_text(array) + ", expected (" +
                          std::to_string(tokens) + ", " + std::to_string(hidden) + ")");
  }
  if ((array.flags() & py::array::c_style) == 0) throw InvalidArgument(std::string(name) + " must be C-contiguous");
  if (py::isinstance<py::array_t<bf16_t>>(array)) return FloatType::kBf16;
  if (py::isinstance<py::array_t<float>>(array)) return FloatType::kF32;
  throw InvalidArgument(std::string(name) + " has dtype " + py::str(array.dtype()).cast<std::string>() +
                        ", expected uint16 (bf16 bits) or float32");
}

TokensIn tokens_in(const py::array& array, const char* name, py::ssize_t tokens, py::ssize_t hidden) {
  return {array.data(), token_type(array, name, tokens, hidden)};
}

TokensOut tokens_out(py::array& array, const char* name, py::ssize_t tokens, py::ssize_t hidden) {
  const FloatType type = token_type(array, name, tokens, hidden);
  return {array.mutable_data(), type};
}

// One batch's forward: arguments whose memory the caller holds, and the routes, which are built without the GIL.
class ForwardCall {
 public:
  ForwardCall(const LayerWeights& weights, const AdapterTensors* adapter, const py::array& x,
              const py::array& expert_ids, const py::array& routing_weights, py::array& y, const std::string& save,
              std::uint64_t dropout_seed, std::uint32_t dropout_layer,
              const std::optional<std::array<float, 3>>& scales, std::uint32_t first_token, const CancelToken* token) {
    if (!py::isinstance<IdArray>(expert_ids) || !py::isinstance<FloatArray>(routing_weights)) {
      throw InvalidArgument("expert_ids must be C-contiguous int32 and routing_weights float32");
    }
    if (expert_ids.ndim() != 2 || routing_weights.ndim() != 2 || routing_weights.shape(0) != expert_ids.shape(0) ||
        routing_weights.shape(1) != expert_ids.shape(1)) {
      throw InvalidArgument("expert_ids has shape " + shape_text(expert_ids) + " and routing_weights " +
                            shape_text(routing_weights) + ", expected one (tokens, top_k) for both");
    }
    const py::ssize_t tokens = expert_ids.shape(0);
    args_.weights = &weights;
    args_.lora = adapter;
    if (scales) args_.scales = AdapterScales{(*scales)[0], (*scales)[1], (*scales)[2]};
    args_.x = tokens_in(x, "x", tokens, weights.spec().hidden);
    args_.y = tokens_out(y, "y", tokens, weights.spec().hidden);
    args_.save = save_policy_from(save);
    args_.token = token;
    args_.dropout = {dropout_seed, dropout_layer, first_token};
    const std::size_t slots = static_cast<std::size_t>(expert_ids.size());
    ids_ = {static_cast<const std::int32_t*>(expert_ids.data()), slots};
    route_weights_ = {static_cast<const float*>(routing_weights.data()), slots};
    tokens_ = static_cast<int>(tokens);
    top_k_ = static_cast<int>(expert_ids.shape(1));
  }

  ForwardArgs args() const {
    ForwardArgs args = args_;
    args.routing =
        build_routing(ids_, route_weights_, tokens_, top_k_, args.weights->spec().experts, args.dropout.first_token);
    return args;
  }

 private:
  ForwardArgs args_;
  Span<const std::int32_t> ids_;
  Span<const float> route_weights_;
  int tokens_ = 0;
  int top_k_ = 0;
};

std::unique_ptr<Ticket> forward(Engine& engine, const LayerWeights& weights, const AdapterTensors* adapter,
                                const py::array& x, const py::array& expert_ids, const py::array& routing_weights,
                                py::array y, const std::string& save, std::uint64_t dropout_seed,
                                std::uint32_t dropout_layer, const std::optional<std::array<float, 3>>& scales,
                                std::uint32_t first_token, const CancelToken* token) {
  const ForwardCall call(weights, adapter, x, expert_ids, routing_weights, y, save, dropout_seed, dropout_layer, scales,
                         first_token, token);
  py::gil_scoped_release release;
  return engine.forward(call.args());
}

// The arguments of forward().
using ForwardTuple =
    std::tuple<const LayerWeights*, const AdapterTensors*, py::array, py::array, py::array, py::array, std::string,
               std::uint64_t, std::uint32_t, std::optional<std::array<float, 3>>, std::uint32_t, const CancelToken*>;

std::vector<std::unique_ptr<Ticket>> forward_together(Engine& engine, std::vector<ForwardTuple> batches) {
  std::vector<ForwardCall> calls;
  for (auto& [weights, adapter, x, ids, route_weights, y, save, seed, layer, scales, first_token, token] : batches) {
    calls.emplace_back(*weights, adapter, x, ids, route_weights, y, save, seed, layer, scales, first_token, token);
  }
  py::gil_scoped_release release;
  std::vector<ForwardArgs> args;
  for (const ForwardCall& call : calls) args.push_back(call.args());
  return engine.forward_together({args.data(), args.size()});
}

AdapterTensorSet tensor_set(const std::vector<std::string>& names) {
  AdapterTensorSet set = 0;
  for (const std::string& name : names) set |= 1u << static_cast<int>(adapter_tensor_from_name(name));
  return set;
}

BackwardArgs backward_args(const LayerWeights& weights, const AdapterTensors* adapter, AdapterTensors* gradients,
                           const Ticket& ticket, const py::array& dy, py::array& dx, py::array& d_weights,
                           const std::optional<std::vector<std::string>>& wanted,
                           const std::vector<std::string>& replaced, AdapterTensors* weight_gradients,
                           const CancelToken* token) {
  const py::ssize_t tokens = ticket.routing().tokens;
  const py::ssize_t top_k = ticket.routing().top_k;
  BackwardArgs args;
  args.weights = &weights;
  args.lora = adapter;
  args.gradients = gradients;
  args.weight_gradients = weight_gradients;
  args.ticket = &ticket;
  args.dy = tokens_in(dy, "dy", tokens, weights.spec().hidden);
  args.dx = tokens_out(dx, "dx", tokens, weights.spec().hidden);
  if (!py::isinstance<FloatArray>(d_weights)) throw InvalidArgument("d_weights must be C-contiguous float32");
  if (d_weights.ndim() != 2 || d_weights.shape(0) != tokens || d_weights.shape(1) != top_k) {
    throw InvalidArgument("d_weights has shape " + shape_text(d_weights) + ", expected (" + std::to_string(tokens) +
                          ", " + std::to_string(top_k) + ")");
  }
  args.d_weights = static_cast<float*>(d_weights.mutable_data());
  if (wanted) args.wanted = tensor_set(*wanted);
  args.replaced = tensor_set(replaced);
  args.token = token;
  return args;
}

void backward(Engine& engine, const LayerWeights& weights, const AdapterTensors* adapter, AdapterTensors* gradients,
              const Ticket& ticket, const py::array& dy, py::array dx, py::array d_weights,
              const std::optional<std::vector<std::string>>& wanted, const std::vector<std::string>& replaced,
              AdapterTensors* weight_gradients, const CancelToken* token) {
  const BackwardArgs args =
      backward_args(weights, adapter, gradients, ticket, dy, dx, d_weights, wanted, replaced, weight_gradients, token);
  py::gil_scoped_release release;
  engine.backward(args);
}

// The arguments of backward().
using BackwardTuple = std::tuple<const LayerWeights*, const AdapterTensors*, AdapterTensors*, const Ticket*, py::array,
                                 py::array, py::array, std::optional<std::vector<std::string>>,
                                 std::vector<std::string>, AdapterTensors*, const CancelToken*>;

void backward_together(Engine& engine, std::vector<BackwardTuple> batches) {
  std::vector<BackwardArgs> args;
  for (auto& [weights, adapter, gradients, ticket, dy, dx, d_weights, wanted, replaced, weight_gradients, token] :
       batches) {
    args.push_back(backward_args(*weights, adapter, gradients, *ticket, dy, dx, d_weights, wanted, replaced,
                                 weight_gradients, token));
  }
  py::gil_scoped_release release;
  engine.backward_together({args.data(), args.size()});
}

using LayerTuple =
    std::tuple<const LayerStep*, std::vector<const AdapterTensors*>, AdapterTensors*, OptimizerState*, LayerWeights*>;

void take_step(Engine& engine, const std::vector<LayerTuple>& layers) {
  py::gil_scoped_release release;
  std::vector<LayerUpdate> updates;
  for (const auto& [step, gradients, parameters, state, weights] : layers) {
    updates.push_back({*step, gradients, parameters, state, weights});
  }
  engine.step(updates);
}

NormKind norm_kind_from(double order) {
  if (std::isinf(order)) return order > 0.0 ? NormKind::kLargest : NormKind::kSmallest;
  if (std::isnan(order)) throw InvalidArgument("the order of a norm is not a number");
  return order == 0.0 ? NormKind::kNonzeros : NormKind::kPowers;
}

// Of the tensors that are there: for a finite order but 0 the sum of powers, whose root the caller takes.
std::map<std::string, double> gradient_norms(Engine& engine, double order, double scale,
                                             const std::vector<const AdapterTensors*>& gradients) {
  std::array<double, kAdapterTensors> norms;
  {
    const py::gil_scoped_release release;
    norms = engine.gradient_norms(norm_kind_from(order), order, scale, gradients);
  }
  std::map<std::string, double> found;
  for (int t = 0; t < kAdapterTensors; ++t) {
    const AdapterTensor tensor = static_cast<AdapterTensor>(t);
    if (!gradients.front()->tensor(tensor).empty())
      found[adapter_tensor_name(tensor)] = norms[static_cast<std::size_t>(t)];
  }
  return found;
}

}  // namespace

FloatType float_type_from(const std::string& name) {
  if (name == "bf16") return FloatType::kBf16;
  if (name == "fp32") return FloatType::kF32;
  throw InvalidArgument("token dtype '" + name + "' is not known; choose one of: bf16, fp32");
}

void bind_engine(py::module_& module) {
  py::class_<CancelToken>(module, "CancelToken")
      .def(py::init<>())
      .def(py::init<double>(), py::arg("timeout_s"))
      .def("cancel", &CancelToken::cancel)
      .def("fired", &CancelToken::fired);
  py::class_<Ticket>(module, "Ticket")
      .def_property_readonly("nbytes", &Ticket::bytes)
      .def_property_readonly("tokens", [](const Ticket& ticket) { return ticket.routing().tokens; })
      .def_property_readonly("top_k", [](const Ticket& ticket) { return ticket.routing().top_k; });
  py::class_<Engine>(module, "Engine")
      .def(py::init<int, const std::string&, int, const std::vector<int>&>(), py::arg("threads"), py::arg("isa") = "",
           py::arg("nodes") = 1, py::arg("memory_nodes") = std::vector<int>{})
      .def_property_readonly("nodes", &Engine::nodes)
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("isa", &Engine::isa)
      .def(
          "kernel",
          [](const Engine& engine, const std::string& format, const std::string& dtype) {
            return engine.kernel(weight_format_from_name(format), float_type_from(dtype));
          },
          py::arg("weight_format"), py::arg("dtype") = "bf16")
      .def_property_readonly("reason", &Engine::reason)
      .def("measure_peak_flops", &Engine::measure_peak_flops, py::call_guard<py::gil_scoped_release>())
      .def("measure_read_bandwidth", &Engine::measure_read_bandwidth, py::call_guard<py::gil_scoped_release>())
      .def("measure_update_bandwidth", &Engine::measure_update_bandwidth, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("kept_bytes", &Engine::kept_bytes)
      .def("drop_kept", &Engine::drop_kept)
      .def("forward", &forward, py::arg("weights"), py::arg("adapter").none(true), py::arg("x"), py::arg("expert_ids"),
           py::arg("routing_weights"), py::arg("y"), py::arg("save") = "nothing", py::arg("dropout_seed") = 0,
           py::arg("dropout_layer") = 0, py::arg("scales") = py::none(), py::arg("first_token") = 0,
           py::arg("token").none(true) = nullptr)
      .def("backward", &backward, py::arg("weights"), py::arg("adapter").none(true), py::arg("gradients").none(true),
           py::arg("ticket"), py::arg("dy"), py::arg("dx"), py::arg("d_weights"), py::arg("wanted") = py::none(),
           py::arg("replaced") = std::vector<std::string>{}, py::arg("weight_gradients").none(true) = nullptr,
           py::arg("token").none(true) = nullptr)
      .def("forward_together", &forward_together, py::arg("batches"))
      .def("backward_together", &backward_together, py::arg("batches"))
      .def("last_stages",
           [](const Engine& engine) {
             StageTimes times;
             {
               const py::gil_scoped_release release;
               times = engine.last_stages();
             }
             std::map<std::string, double> named;
             for (std::size_t stage = 0; stage < kStages; ++stage) {
               named[stage_name(static_cast<Stage>(stage))] = times[stage];
             }
             return named;
           })
      .def("step", &take_step, py::arg("layers"))
      .def("decode_weights", &Engine::decode_weights, py::arg("weights"), py::arg("into"),
           py::call_guard<py::gil_scoped_release>())
      .def("encode_weights", &Engine::encode_weights, py::arg("source"), py::arg("first_expert"), py::arg("experts"),
           py::arg("into"), py::call_guard<py::gil_scoped_release>())
      .def("gradient_norms", &gradient_norms, py::arg("order"), py::arg("scale"), py::arg("gradients"))
      .def("scratch_bytes", &Engine::scratch_bytes, py::arg("layer"), py::arg("lora"), py::arg("tokens"),
           py::arg("top_k"), py::arg("trains_weights") = false)
      .def_static(
          "step_bytes",
          [](const LayerSpec& layer, const AdapterSpec& lora, const std::string& kind, int ranks, int threads) {
            return Engine::step_bytes(layer, lora, optimizer_from_name(kind), ranks, threads);
          },
          py::arg("layer"), py::arg("lora"), py::arg("kind"), py::arg("ranks"), py::arg("threads"))
      .def_static(
          "ticket_bytes",
          [](const LayerSpec& layer, const AdapterSpec& lora, std::int64_t tokens, int top_k, const std::string& dtype,
             const std::string& save) {
            return Engine::ticket_bytes(layer, lora, tokens, top_k, float_type_from(dtype), save_policy_from(save));
          },
          py::arg("layer"), py::arg("lora"), py::arg("tokens"), py::arg("top_k"), py::arg("dtype"),
          py::arg("save") = "activations");
}

}  // namespace kt_expert
