// SPDX-License-Identifier: MIT
#include "normalized_rows_kernel.h"

namespace namedmask::cpu {

const UnitRowKernels normalized_rows_avx512 = {sum_of_squares, scale};

}  // namespace namedmask::cpu
