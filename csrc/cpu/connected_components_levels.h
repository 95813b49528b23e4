// SPDX-License-Identifier: MIT
// The parts of connected_components that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

// The runs of an image: horizontal stretches of set pixels, counted through all rows.
struct Runs {
  int64_t height, width;
  int64_t words;    // of a row: at least one bit, always 0, comes after the last pixel
  uint64_t* bits;   // [height, words]; the first pixel is bit 0
  int32_t* first;   // [height + 1] runs before each row
  int32_t* label;   // of each run; kPadding more on either side can be read
  int32_t* parent;  // [runs] union-find over labels: a root is its own parent, others have a smaller one
  int32_t* top;     // [runs] the row in which a label was given first
  int32_t* ends;    // scratch [2, width / 2 + 1 + kPadding]

  static constexpr int kPadding = 16;
};

// What is added up for a component, all but the area as greatest values, so that one vector operation serves the three:
// right and bottom are the first column and row past it.
struct Extent {
  int32_t area, minus_left, right, bottom;
};

struct ComponentKernels {
  // bits and first, from bytes 0 or 1 of pixels equal to `value`.
  void (*scan)(const uint8_t* mask, bool value, const Runs& runs);
  // Gives the runs labels 0, 1, ..., in raster order where a run touches none of the row above, and unites those that
  // meet; returns how many it gave. A component's smallest label is its first run's.
  int32_t (*join)(const Runs& runs);
  // Replaces each run's label by final[label] and adds the run to extents[final[label]].
  void (*measure)(const int32_t* final, const Runs& runs, Extent* extents);
  // out: the label of each pixel's run, 0 outside runs.
  void (*paint)(const Runs& runs, int32_t* out);
  // out: whether a pixel is in a run with keep[label] == 1, or with `invert` whether it is not; the others have 0.
  void (*keep)(const uint8_t* keep, const Runs& runs, bool invert, uint8_t* out);
};

NMK_DECLARE_LEVELS(ComponentKernels, connected_components);

}  // namespace namedmask::cpu
