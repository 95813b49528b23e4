// SPDX-License-Identifier: MIT
// Run-based labeling in two passes (He, Chao and Suzuki, IEEE TIP 2008): horizontal runs take provisional labels from
// the row above, labels of touching runs are merged, and then the final labels are painted.
// connected_components_kernel.h has the loops.
#include "namedmask/connected_components.h"

#include <algorithm>
#include <utility>

#include "buffer.h"
#include "connected_components_levels.h"
#include "for_each_image.h"
#include "level.h"
#include "prefault_pages.h"

namespace namedmask::cpu {
namespace {

const ComponentKernels& kernels() {
  return NMK_BEST_IF(connected_components,
                     __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                         __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bitalg") &&
                         __builtin_cpu_supports("bmi2"));
}

class Labeler {
 public:
  // Splits mask [h, w] into runs of pixels equal to `value`, assigns provisional labels, and merges those of touching
  // runs.
  void join(const uint8_t* mask, int64_t h, int64_t w, bool value, int64_t connectivity) {
    runs_.height = h;
    runs_.width = w;
    runs_.words = w / 64 + 1;
    runs_.bits = bits_.reserve(h * runs_.words);
    runs_.first = first_.reserve(h + 1);
    runs_.scratch = scratch_.reserve(4 * (w / 2 + 1 + Runs::kPadding) + Runs::kPadding);
    kernels().scan(mask, value, runs_);
    const size_t count = runs_.first[h];
    runs_.label = label_.reserve(count + 2 * Runs::kPadding) + Runs::kPadding;
    runs_.parent = parent_.reserve(count + Runs::kPadding);
    runs_.top = top_.reserve(count + Runs::kPadding);
    labels_ = connectivity == 8 ? kernels().join_eight(runs_) : kernels().join(runs_);
  }

  // After join: numbers the components 1, 2, ... in raster order of their first pixels, labels the runs and computes
  // areas and extents. Returns the number of components.
  int32_t measure() {
    int32_t count = 0;
    for (int32_t i = 0; i < labels_; ++i) {
      // A parent precedes its children and has already been replaced by its label. Branch-free: which labels are roots
      // is unpredictable.
      const int32_t parent = runs_.parent[i], label = runs_.parent[parent], first = parent == i;
      runs_.top[count] = runs_.top[i];
      count += first;
      runs_.parent[i] = label ^ ((label ^ count) & -first);
    }
    const Extent none = {static_cast<int32_t>(-runs_.width), 0, 0, 0};
    std::fill_n(parts_.reserve(labels_), labels_, none);
    std::fill_n(extents_.reserve(count + 1), count + 1, none);
    std::fill_n(bottom_.reserve(count + 1), count + 1, 0);
    runs_.bottom = part_bottom_.reserve(labels_);
    kernels().measure(runs_.parent, labels_, runs_, parts_.data(), extents_.data(), bottom_.data());
    return count;
  }

  int32_t area(int32_t component) const {
    const Extent& e = extents_[component];
    return static_cast<int32_t>(static_cast<uint32_t>(e.minus_begins) + static_cast<uint32_t>(e.ends));
  }
  int32_t left(int32_t component) const { return -extents_[component].minus_left; }
  int32_t right(int32_t component) const { return extents_[component].right; }
  int32_t top(int32_t component) const { return runs_.top[component - 1]; }
  int32_t bottom(int32_t component) const { return bottom_[component]; }

  // After join: writes all pixels except the components that touch the image border.
  void drop_border(uint8_t* out) {
    uint8_t* const keep = keep_.reserve(labels_);
    std::fill_n(keep, labels_, 0);
    const auto mark = [&](int32_t run) {
      int32_t label = runs_.label[run];
      while (runs_.parent[label] != label) label = runs_.parent[label];
      keep[label] = 1;
    };
    const int32_t* first = runs_.first;
    const int64_t h = runs_.height, last = runs_.width - 1;
    for (int32_t run = 0; run < first[1]; ++run) mark(run);
    for (int32_t run = first[h - 1]; run < first[h]; ++run) mark(run);
    for (int64_t y = 0; y < h; ++y) {
      const uint64_t* row = runs_.bits + y * runs_.words;
      if (row[0] & 1) mark(first[y]);
      if (row[last / 64] >> last % 64 & 1) mark(first[y + 1] - 1);
    }
    for (int32_t i = 0; i < labels_; ++i) keep[i] = keep[runs_.parent[i]];
    prefault_pages(out, runs_.height * runs_.width);
    kernels().keep(keep, runs_, true, out);
  }

  // After measure.
  void keep_component(int32_t component, int32_t components, uint8_t* out) {
    uint8_t* const keep = keep_.reserve(components + 1);
    std::fill_n(keep, components + 1, 0);
    keep[component] = 1;
    prefault_pages(out, runs_.height * runs_.width);
    kernels().keep(keep, runs_, false, out);
  }

  void paint(int32_t* out) const {
    prefault_pages(out, runs_.height * runs_.width * sizeof(int32_t));
    kernels().paint(runs_, out);
  }

  size_t bytes() const {
    return bits_.bytes() + first_.bytes() + scratch_.bytes() + label_.bytes() + parent_.bytes() + top_.bytes() +
           part_bottom_.bytes() + bottom_.bytes() + parts_.bytes() + extents_.bytes() + keep_.bytes();
  }

 private:
  Runs runs_ = {};
  int32_t labels_ = 0;  // provisional labels
  Buffer<uint64_t> bits_;
  Buffer<int32_t> first_, scratch_, label_, parent_, top_, part_bottom_;
  Buffer<Extent> parts_;    // of provisional labels
  Buffer<Extent> extents_;  // of components, numbered from 1, as is bottom_
  Buffer<int32_t> bottom_;
  Buffer<uint8_t> keep_;
};

void check_masks(const char* op, const TensorView& mask, const TensorView& out) {
  expect(op, "mask", mask, DType::kBool, {-1});
  expect(op, "out", out, DType::kBool, {mask.shape[0]});
}

ComponentStats stats_of(const Labeler& labeler, int32_t count) {
  ComponentStats stats;
  stats.areas.resize(count);
  stats.boxes.resize(4 * static_cast<size_t>(count));
  int32_t *area = stats.areas.data(), *box = stats.boxes.data();
  for (int32_t c = 1; c <= count; ++c, ++area, box += 4) {
    const int32_t left = labeler.left(c), top = labeler.top(c);
    *area = labeler.area(c);
    box[0] = left, box[1] = top, box[2] = labeler.right(c) - left, box[3] = labeler.bottom(c) - top;
  }
  return stats;
}

}  // namespace

ComponentStats connected_components(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                                    const TensorView& labels, const TensorView& first, int64_t connectivity) {
  const char* op = "connected_components";
  expect(op, "mask", mask, DType::kBool, {-1});
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  expect(op, "labels", labels, DType::kInt32, {mask.shape[0]});
  expect(op, "first", first, DType::kInt32, {batch.count + 1});
  expect_connectivity(op, connectivity);
  std::vector<ComponentStats> found(batch.count);
  for_each_image<Labeler>(batch, [&](int64_t b, Labeler& labeler) {
    labeler.join(mask.as<uint8_t>() + batch.begin(b), batch.height(b), batch.width(b), true, connectivity);
    found[b] = stats_of(labeler, labeler.measure());
    labeler.paint(labels.as<int32_t>() + batch.begin(b));
  });
  int32_t* const begin = first.as<int32_t>();
  begin[0] = 0;
  for (int64_t b = 0; b < batch.count; ++b) begin[b + 1] = begin[b] + static_cast<int32_t>(found[b].areas.size());
  if (batch.count == 1) return std::move(found[0]);
  ComponentStats all;
  all.areas.reserve(begin[batch.count]);
  all.boxes.reserve(4 * static_cast<size_t>(begin[batch.count]));
  for (const ComponentStats& one : found) {
    all.areas.insert(all.areas.end(), one.areas.begin(), one.areas.end());
    all.boxes.insert(all.boxes.end(), one.boxes.begin(), one.boxes.end());
  }
  return all;
}

void largest_component(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& out, int64_t connectivity) {
  check_masks("largest_component", mask, out);
  expect_connectivity("largest_component", connectivity);
  const RaggedShape batch = expect_ragged("largest_component", offsets, shapes, mask.shape[0]);
  for_each_image<Labeler>(batch, [&](int64_t b, Labeler& labeler) {
    labeler.join(mask.as<uint8_t>() + batch.begin(b), batch.height(b), batch.width(b), true, connectivity);
    const int32_t count = labeler.measure();
    int32_t best = 0;  // background, with area 0
    for (int32_t c = 1; c <= count; ++c) {
      if (labeler.area(c) > labeler.area(best)) best = c;
    }
    labeler.keep_component(best, count, out.as<uint8_t>() + batch.begin(b));
  });
}

void fill_holes(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& out,
                int64_t connectivity) {
  check_masks("fill_holes", mask, out);
  expect_connectivity("fill_holes", connectivity);
  const RaggedShape batch = expect_ragged("fill_holes", offsets, shapes, mask.shape[0]);
  for_each_image<Labeler>(batch, [&](int64_t b, Labeler& labeler) {
    labeler.join(mask.as<uint8_t>() + batch.begin(b), batch.height(b), batch.width(b), false, connectivity);
    labeler.drop_border(out.as<uint8_t>() + batch.begin(b));
  });
}

}  // namespace namedmask::cpu
