// One input as what a trainer sends: a forward, backwards and a step with any numbers in them.
#pragma once

#include "fuzz/bytes.h"

namespace kt_expert {

// Aborts where something is not as it must be.
void check_requests(Bytes& bytes);

}  // namespace kt_expert
