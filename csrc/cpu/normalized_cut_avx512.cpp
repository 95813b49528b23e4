// SPDX-License-Identifier: MIT
#include "normalized_cut_kernel.h"

namespace namedmask::cpu {

const CutKernels cut_avx512 = {connect, nullptr, nullptr, nullptr};

}  // namespace namedmask::cpu
