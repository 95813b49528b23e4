// SPDX-License-Identifier: MIT
// Attention over packed sequences, and what else its pass over the keys can tell.
//
// Definition  per sequence and head, with P = softmax(scale * q k'): output = P v; rows[t, h, r] = the weight that
//             query taps[r] of t's sequence gives to token t; lse = log of the sum of exp(scale * q k') of each query;
//             key_norms[t] = sum over heads of |k|^2.
// Arrays      qkv float32, bfloat16 or float16 [T, 3, H, D], D at most 256; offsets int32 [B + 1] from 0 to T; taps
//             int32 [R], counted within each sequence; output like qkv [T, H, D]; rows float32 [T, H, R]; lse float32
//             [T, H]; key_norms float32 [T]. All contiguous, outputs allocated by the caller. An output that is not
//             wanted is a null pointer and is not computed.
// Empty       no sequences, sequences of length 0 and no taps are fine.
// Accuracy    computed in float32, exponentials within 2 ulp; NaN and Inf spread as in softmax. At level avx512_vnni
//             the scores of bfloat16 behind output and lse come from 16-bit fixed point, off by some
//             1e-5 |q| |k| scale; there queries and keys below 2^-100 count as 0, and an Inf in a key as NaN. That
//             level is taken where AVX512-BF16 or AMX are present too (why: attention_features_avx512_vnni.cpp).
// Errors      std::invalid_argument for a wrong array and for a tap beyond the end of a sequence that is not empty.
// Threads     OpenMP, one region, over sequence, head and block of queries. The bits of a token's results depend
//             neither on the threads nor on the other sequences. Levels differ by rounding.
// Cost        4 n^2 D flops per head and sequence of n tokens; memory O(n) per thread, and keys and values packed once.
#pragma once

#include <optional>

#include "namedmask/tensor_view.h"

namespace namedmask::cpu {

void attention_features(const TensorView& qkv, const TensorView& offsets, const TensorView& taps, double scale,
                        const std::optional<TensorView>& output, const std::optional<TensorView>& rows,
                        const std::optional<TensorView>& lse, const std::optional<TensorView>& key_norms);

}  // namespace namedmask::cpu
