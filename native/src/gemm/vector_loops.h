// Everything of an ISA's table but products with weights, from the templates over its vectors: I for tile_loops.h, V
// for loops over contiguous floats.
#pragma once

#include "gemm/activation_loops.h"
#include "gemm/elementwise.h"
#include "gemm/peaks.h"
#include "gemm/tile_loops.h"

namespace kt_expert {
namespace {

template <typename I, typename V>
void set_vector_loops(KernelTable& table) {
  table.outer = outer_sum<I>;
  table.activate = loop_activate<V>;
  table.activate_backward = loop_activate_backward<V>;
  table.burn = burn_fma<V>;
  table.read = read_floats<V>;
  set_float_loops(table);
}

}  // namespace
}  // namespace kt_expert
