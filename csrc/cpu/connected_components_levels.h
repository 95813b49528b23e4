// SPDX-License-Identifier: MIT
// The parts of connected_components that exist once per instruction level; see level.h.
#pragma once

#include <cstdint>

#include "level.h"

namespace namedmask::cpu {

// The runs of an image: maximal horizontal sequences of set pixels, numbered in raster order.
struct Runs {
  int64_t height, width;
  int64_t words;     // per row; at least one bit, always 0, follows the last pixel
  uint64_t* bits;    // [height, words]; the first pixel is bit 0
  int32_t* first;    // [height + 1] number of runs before each row
  int32_t* label;    // of each run; readable and writable for kPadding more on either side
  int32_t* parent;   // [runs + kPadding] union-find over labels: a root is its own parent, others have a smaller parent
  int32_t* top;      // [runs + kPadding] the first row of a label
  int32_t* bottom;   // [runs] the row after the last of a label
  int32_t* scratch;  // [4, width / 2 + 1 + kPadding] and kPadding more

  static constexpr int kPadding = 64;
};

// Of a component or of the runs with a label: the maxima of two coordinates, and two sums, whose difference is the area
// and which may wrap around. For a run, both halves are the same. right and `ends` are columns after the last.
struct Extent {
  int32_t minus_left, right;
  int32_t minus_begins, ends;
};

struct ComponentKernels {
  // Fills bits and first from the mask (bytes 0 or 1): set pixels are those equal to `value`.
  void (*scan)(const uint8_t* mask, bool value, const Runs& runs);
  // Assigns provisional labels 0, 1, ...: a new label, in raster order, to a run that touches no run of the row above.
  // Merges labels that meet and returns their number. A component's smallest label is that of its first run.
  int32_t (*join)(const Runs& runs);
  // The same for 8-connectivity.
  int32_t (*join_eight)(const Runs& runs);
  // Adds each run to parts[label] and writes runs.bottom, replaces the run's label by final[label], and then adds the
  // parts and bottoms of all labels to extents[final[label]] and bottom[final[label]].
  void (*measure)(const int32_t* final, int32_t labels, const Runs& runs, Extent* parts, Extent* extents,
                  int32_t* bottom);
  // out = the label of each pixel's run, 0 outside runs.
  void (*paint)(const Runs& runs, int32_t* out);
  // out = whether a pixel is in a run with keep[label] == 1, or with `invert` whether it is not; keep is 0 or 1.
  // Overwrites the labels of the runs.
  void (*keep)(const uint8_t* keep, const Runs& runs, bool invert, uint8_t* out);
};

NMK_DECLARE_LEVELS(ComponentKernels, connected_components);

}  // namespace namedmask::cpu
