#include <string>

#include "gemm/kernels.h"
#include "kt_expert/error.h"

namespace kt_expert {

const KernelTable& kernels_for(Isa isa) {
  if (!isa_supported(isa)) {
    throw Unsupported(std::string("kernels for '") + isa_name(isa) + "' cannot run on this CPU");
  }
  switch (isa) {
#define KT_KERNEL(enumerator, table) \
  case Isa::enumerator:              \
    return table();
#include "gemm/registry.inc"
#undef KT_KERNEL
  }
  throw Unsupported("no kernels are registered for the instruction set");
}

}  // namespace kt_expert
