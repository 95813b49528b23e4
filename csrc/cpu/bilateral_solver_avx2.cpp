// SPDX-License-Identifier: MIT
#include "bilateral_solver_kernel.h"

namespace namedmask::cpu {

const BilateralKernels bilateral_avx2 = {keys, solve, slice};

}  // namespace namedmask::cpu
