// SPDX-License-Identifier: MIT
#include "normalized_cut_kernel.h"

namespace namedmask::cpu {

const CutKernels cut_portable = {connect, nullptr, nullptr, nullptr};

}  // namespace namedmask::cpu
