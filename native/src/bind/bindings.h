// One function per area of the Python module.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "kt_expert/engine.h"

namespace kt_expert {

// bf16 or fp32. Throws InvalidArgument.
FloatType float_type_from(const std::string& name);

void bind_errors(pybind11::module_& module);
void bind_layer(pybind11::module_& module);
void bind_adapter(pybind11::module_& module);
void bind_optimizer(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_fast_path(pybind11::module_& module);

}  // namespace kt_expert
