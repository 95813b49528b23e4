// SPDX-License-Identifier: MIT
// Attention over packed sequences, with softmax rows and key norms from the same pass over the keys.
//
// Definition  per sequence and head, with P = softmax(scale * q k'): output = P v; rows[t, h, r] = the weight that
//             query taps[r] of t's sequence gives to token t; lse = log of the sum of exp(scale * q k') for each query;
//             key_norms[t] = sum over heads of |k|^2.
// Arrays      qkv float32, bfloat16 or float16 [T, 3, H, D], D at most 256; offsets int32 [B + 1] from 0 to T; taps
//             int32 [R], token indices within each sequence; output like qkv [T, H, D]; rows float32 [T, H, R]; lse
//             float32 [T, H]; key_norms float32 [T]. All contiguous; the caller allocates outputs. An output that is
//             std::nullopt is not computed.
// Empty       no sequences, sequences of length 0 and no taps are allowed.
// Accuracy    computed in float32, exponentials within 2 ulp; NaN and Inf propagate as in softmax. For bfloat16 inputs,
//             two levels compute output and lse differently. avx512_vnni uses scores from 16-bit fixed point, with an
//             error of about 1e-5 |q| |k| scale; queries and keys below 2^-100 count as 0, and an Inf in a key as NaN.
//             avx512_bf16 rounds the weights to bfloat16 before they are multiplied with the values, and takes inputs
//             below 2^-126 as 0. Intel CPUs use avx512_vnni even if they have AVX512-BF16 or AMX (level.h).
// Errors      std::invalid_argument for a wrong array and for a tap beyond the end of a sequence that is not empty.
// Threads     OpenMP, one region, over sequence, head and block of queries. A token's results are bit-identical for any
//             number of threads and any other sequences in the batch. Levels differ by rounding.
// Cost        4 n^2 D flops per head and sequence of n tokens; O(n) memory per thread; keys and values are packed once.
#pragma once

#include <optional>

#include "namedmask/tensor_view.h"

namespace namedmask::cpu {

void attention_features(const TensorView& qkv, const TensorView& offsets, const TensorView& taps, double scale,
                        const std::optional<TensorView>& output, const std::optional<TensorView>& rows,
                        const std::optional<TensorView>& lse, const std::optional<TensorView>& key_norms);

}  // namespace namedmask::cpu
