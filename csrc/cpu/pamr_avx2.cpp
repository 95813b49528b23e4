// SPDX-License-Identifier: MIT
#include "pamr_kernel.h"

namespace namedmask::cpu {

const PamrKernels pamr_avx2 = {affinities, average};

}  // namespace namedmask::cpu
