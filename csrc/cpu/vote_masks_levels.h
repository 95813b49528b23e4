// SPDX-License-Identifier: MIT
// The parts of vote_masks that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

constexpr int64_t kVoteWords = 8;  // rows of bits are padded to a multiple of this many 64-bit words
constexpr int64_t kVoteMasks = 4;  // masks that are compared with one mask per call

struct VoteKernels {
  // Bit i % 64 of bits[i / 64] = (bytes[i] != 0), i < n; bits beyond n, up to the next multiple of kVoteWords, are 0.
  void (*pack)(const uint8_t* bytes, int64_t n, uint64_t* bits);
  // counts[k] = bits set in both a and b + k * words, k < kVoteMasks.
  void (*common)(const uint64_t* a, const uint64_t* b, int64_t words, int64_t* counts);
};

NMK_DECLARE_LEVELS(VoteKernels, vote_masks);

}  // namespace namedmask::cpu
