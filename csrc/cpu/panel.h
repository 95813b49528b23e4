// SPDX-License-Identifier: MIT
// The layout of tokens for products of all tokens with all. Contains no code, so that kernel headers may include it.
#pragma once

#include <cstdint>

namespace namedmask::cpu {

constexpr int64_t kPanel = 16;      // tokens per panel [C, kPanel]
constexpr int64_t kWord = 32;       // tokens per micro tile (two panels)
constexpr int64_t kMicroRows = 12;  // the number of rows is a multiple of this
constexpr int64_t kBlock = 96;      // rows per tile: a multiple of kWord and kMicroRows

}  // namespace namedmask::cpu
