// SPDX-License-Identifier: MIT
// How tokens stand side by side for products of all with all; free of code, so that files of a level may include it.
#pragma once

#include <cstdint>

namespace namedmask::cpu {

constexpr int64_t kPanel = 16;      // tokens of a panel [C, kPanel]
constexpr int64_t kWord = 32;       // tokens (two panels) of a micro tile
constexpr int64_t kMicroRows = 12;  // rows of micro tiles come in multiples of this
constexpr int64_t kBlock = 96;      // rows of a tile: whole words and whole micro rows

}  // namespace namedmask::cpu
