// SPDX-License-Identifier: MIT
#include "vote_masks_kernel.h"

namespace namedmask::cpu {

const VoteKernels vote_avx512 = {pack, common};

}  // namespace namedmask::cpu
