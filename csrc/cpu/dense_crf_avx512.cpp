// SPDX-License-Identifier: MIT
#include "dense_crf_kernel.h"

namespace namedmask::cpu {

const CrfKernels crf_avx512 = {embed, normalize, start, infer};

}  // namespace namedmask::cpu
