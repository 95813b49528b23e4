// SPDX-License-Identifier: MIT
#include "connected_components_kernel.h"

namespace namedmask::cpu {

const ComponentKernels components_portable = {scan, join, measure, paint, keep};

}  // namespace namedmask::cpu
