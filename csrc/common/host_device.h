// SPDX-License-Identifier: MIT
// Marks what csrc/common holds: definitions that the CPU's and CUDA's versions of an operator share.
#pragma once

#ifdef __CUDACC__
#define NMK_HOST_DEVICE __host__ __device__
#else
#define NMK_HOST_DEVICE
#endif
