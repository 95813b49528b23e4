// SPDX-License-Identifier: MIT
// Products of small byte matrices by a warp, on the tensor cores of sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__  // tests/kernels/cuda_emulator defines its own

namespace namedmask::cuda {

// c [16, 8] += a [16, 32] b [32, 8], unsigned times signed bytes, exact. A lane holds, with g = lane / 4, t = lane % 4,
//   a[0] = row g, columns 4 t to 4 t + 3; a[1] = row g + 8, the same; a[2], a[3] = as a[0], a[1], 16 columns further
//   b[0] = column g, rows 4 t to 4 t + 3; b[1] = 16 rows further
//   c[0], c[1] = row g, columns 2 t and 2 t + 1; c[2], c[3] = row g + 8, the same
// (PTX ISA, "Matrix fragments for mma.m16n8k32").
__device__ inline void multiply_add_bytes(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace namedmask::cuda

#endif
