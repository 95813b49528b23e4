// SPDX-License-Identifier: MIT
#include "random_walk_kernel.h"

namespace namedmask::cpu {

const WalkKernels walk_avx2 = {weigh, add, add_turned};

}  // namespace namedmask::cpu
