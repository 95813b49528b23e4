// SPDX-License-Identifier: MIT
#include "unit_rows_kernel.h"

namespace namedmask::cpu {

const UnitRowKernels unit_rows_portable = {sum_of_squares, scale};

}  // namespace namedmask::cpu
