// SPDX-License-Identifier: MIT
#include "bilateral_solver_kernel.h"

namespace namedmask::cpu {

const BilateralKernels bilateral_portable = {keys, solve, slice};

}  // namespace namedmask::cpu
