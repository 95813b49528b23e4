// SPDX-License-Identifier: MIT
#include "cosines_kernel.h"

namespace namedmask::cpu {

const CosineKernels cosines_avx2 = {connect, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace namedmask::cpu
