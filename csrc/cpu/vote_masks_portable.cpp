// SPDX-License-Identifier: MIT
#include "vote_masks_kernel.h"

namespace namedmask::cpu {

const VoteKernels vote_portable = {pack, common};

}  // namespace namedmask::cpu
