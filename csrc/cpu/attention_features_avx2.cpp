// SPDX-License-Identifier: MIT
#include "attention_features_kernel.h"

namespace namedmask::cpu {

const AttentionKernels attention_avx2 = {attend, tap, key_norms};

}  // namespace namedmask::cpu
