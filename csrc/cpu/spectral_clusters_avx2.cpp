// SPDX-License-Identifier: MIT
#include "spectral_clusters_kernel.h"

namespace namedmask::cpu {

const ClusterKernels cluster_avx2 = {cosine, project, expand, assign, add_up};

}  // namespace namedmask::cpu
