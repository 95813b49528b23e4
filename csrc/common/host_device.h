// SPDX-License-Identifier: MIT
// Marks the functions of csrc/common that the CPU and the CUDA version of an operator share.
#pragma once

#ifdef __CUDACC__
#define NMK_HOST_DEVICE __host__ __device__
#else
#define NMK_HOST_DEVICE
#endif
