// SPDX-License-Identifier: MIT
#include "unit_rows_kernel.h"

namespace namedmask::cpu {

const UnitRowKernels unit_rows_avx2 = {sum_of_squares, scale};

}  // namespace namedmask::cpu
