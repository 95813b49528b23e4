// SPDX-License-Identifier: MIT
#include "spectral_clusters_kernel.h"

namespace namedmask::cpu {

const ClusterKernels cluster_portable = {cosine, project, expand, assign, add_up};

}  // namespace namedmask::cpu
