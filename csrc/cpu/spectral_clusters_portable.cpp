// SPDX-License-Identifier: MIT
#include "spectral_clusters_kernel.h"

namespace namedmask::cpu {

const ClusterKernels cluster_portable = {range, project, expand, assign};

}  // namespace namedmask::cpu
