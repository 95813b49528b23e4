// SPDX-License-Identifier: MIT
#include "lanczos_kernel.h"

namespace namedmask::cpu {

const LanczosKernels lanczos_avx512 = {project, add};

}  // namespace namedmask::cpu
