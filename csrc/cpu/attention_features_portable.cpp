// SPDX-License-Identifier: MIT
#include "attention_features_kernel.h"

namespace namedmask::cpu {

const AttentionKernels attention_portable = {pack<FloatScores>, attend<FloatScores>, tap, key_norms};

}  // namespace namedmask::cpu
