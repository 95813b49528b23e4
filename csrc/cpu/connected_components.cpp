// SPDX-License-Identifier: MIT
// Run-based labelling: a row is cut into horizontal runs, runs that touch a run of the row above are united, and the
// labels are painted run by run. Work per pixel is one bit test, eight pixels at a time.
#include "namedmask/connected_components.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

namespace namedmask::cpu {
namespace {

struct Run {
  int32_t row, begin, end;  // pixels [begin, end) of the row
  int32_t parent;           // union-find over run indices; a root is its own parent
};

// Bytes 0 or 1 of eight neighbouring pixels -> one bit each, pixel 0 in bit 0.
inline uint64_t bits_of_bytes(const uint8_t* p) {
  uint64_t bytes;
  std::memcpy(&bytes, p, 8);
  return (bytes * 0x0102040810204080ull) >> 56;
}

// 64 pixels (or the `n` that are left) as a bit word.
inline uint64_t row_word(const uint8_t* p, int64_t n) {
  uint64_t word = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) word |= bits_of_bytes(p + i) << i;
  for (; i < n; ++i) word |= static_cast<uint64_t>(p[i] & 1) << i;
  return word;
}

class Labeller {
 public:
  std::vector<Run> runs;

  // Cuts mask [h, w] into runs of pixels equal to `value` and unites those that touch.
  void scan(const uint8_t* mask, int64_t h, int64_t w, bool value) {
    runs.clear();
    size_t above_begin = 0, above_end = 0;
    for (int64_t y = 0; y < h; ++y) {
      const size_t row_begin = runs.size();
      scan_row(mask + y * w, static_cast<int32_t>(y), w, value);
      unite_rows(above_begin, above_end, row_begin);
      above_begin = row_begin;
      above_end = runs.size();
    }
  }

  int32_t root(int32_t i) {
    while (runs[i].parent != i) {
      runs[i].parent = runs[runs[i].parent].parent;
      i = runs[i].parent;
    }
    return i;
  }

  // Replaces parents by labels 1, 2, ...; the smallest run of a component is its root, and runs stand in raster
  // order, so labels come in raster order of each component's first pixel. Returns the number of components.
  int32_t number() {
    int32_t count = 0;
    for (size_t i = 0; i < runs.size(); ++i) {
      const int32_t parent = runs[i].parent;
      // A parent stands before its children and has been replaced by its label already.
      runs[i].parent = parent == static_cast<int32_t>(i) ? ++count : runs[parent].parent;
    }
    return count;
  }

 private:
  void scan_row(const uint8_t* row, int32_t y, int64_t w, bool value) {
    uint64_t before = 0;  // the pixel left of the word, in bit 0
    for (int64_t x = 0; x < w; x += 64) {
      const int64_t n = std::min<int64_t>(64, w - x);
      uint64_t word = row_word(row + x, n);
      if (!value) word = ~word & (n == 64 ? ~0ull : (1ull << n) - 1);
      uint64_t edges = word ^ (word << 1 | before);
      before = word >> 63;
      while (edges) {
        const int32_t at = static_cast<int32_t>(x) + std::countr_zero(edges);
        edges &= edges - 1;
        if (word >> (at - x) & 1) {
          const int32_t index = static_cast<int32_t>(runs.size());
          runs.push_back({y, at, static_cast<int32_t>(w), index});
        } else {
          runs.back().end = at;
        }
      }
    }
  }

  void unite_rows(size_t above, size_t above_end, size_t row_begin) {
    for (size_t i = row_begin; i < runs.size(); ++i) {
      while (above < above_end && runs[above].end <= runs[i].begin) ++above;
      for (size_t j = above; j < above_end && runs[j].begin < runs[i].end; ++j) {
        const int32_t a = root(static_cast<int32_t>(i)), b = root(static_cast<int32_t>(j));
        if (a != b) runs[std::max(a, b)].parent = std::min(a, b);
      }
    }
  }
};

void check_masks(const char* op, const TensorView& mask, const TensorView& out) {
  expect(op, "mask", mask, DType::kBool, {-1});
  expect(op, "out", out, DType::kBool, {mask.shape[0]});
}

// Calls f(b, labeller) for every photo, photos spread over threads, a labeller (and its memory) per thread.
template <class F>
void for_each_photo(const RaggedShape& batch, F f) {
#pragma omp parallel if (batch.count > 1)
  {
    Labeller labeller;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < batch.count; ++b) f(b, labeller);
  }
}

}  // namespace

void connected_components(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                          const TensorView& labels, const TensorView& counts) {
  const char* op = "connected_components";
  expect(op, "mask", mask, DType::kBool, {-1});
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  expect(op, "labels", labels, DType::kInt32, {mask.shape[0]});
  expect(op, "counts", counts, DType::kInt32, {batch.count});
  for_each_photo(batch, [&](int64_t b, Labeller& labeller) {
    const int64_t h = batch.height(b), w = batch.width(b);
    int32_t* out = labels.as<int32_t>() + batch.begin(b);
    labeller.scan(mask.as<uint8_t>() + batch.begin(b), h, w, true);
    counts.as<int32_t>()[b] = labeller.number();
    std::fill_n(out, h * w, 0);
    for (const Run& run : labeller.runs)
      std::fill(out + run.row * w + run.begin, out + run.row * w + run.end, run.parent);
  });
}

void component_stats(const TensorView& labels, const TensorView& offsets, const TensorView& shapes,
                     const TensorView& counts, const TensorView& areas, const TensorView& boxes) {
  const char* op = "component_stats";
  expect(op, "labels", labels, DType::kInt32, {-1});
  const RaggedShape batch = expect_ragged(op, offsets, shapes, labels.shape[0]);
  expect(op, "counts", counts, DType::kInt32, {batch.count});
  std::vector<int64_t> first(batch.count + 1, 0);
  for (int64_t b = 0; b < batch.count; ++b) first[b + 1] = first[b] + counts.as<int32_t>()[b];
  expect(op, "areas", areas, DType::kInt32, {first[batch.count]});
  expect(op, "boxes", boxes, DType::kInt32, {first[batch.count], 4});
#pragma omp parallel for schedule(dynamic) if (batch.count > 1)
  for (int64_t b = 0; b < batch.count; ++b) {
    const int32_t n = counts.as<int32_t>()[b];
    const int64_t h = batch.height(b), w = batch.width(b);
    int32_t* area = areas.as<int32_t>() + first[b];
    int32_t* box = boxes.as<int32_t>() + 4 * first[b];  // x0, y0, x1, y1 (inclusive) until the end
    std::fill_n(area, n, 0);
    for (int32_t c = 0; c < n; ++c) {
      box[4 * c] = static_cast<int32_t>(w);
      box[4 * c + 1] = static_cast<int32_t>(h);
      box[4 * c + 2] = box[4 * c + 3] = -1;
    }
    const int32_t* row = labels.as<int32_t>() + batch.begin(b);
    for (int32_t y = 0; y < h; ++y, row += w) {
      for (int32_t x = 0; x < w;) {
        const int32_t label = row[x], begin = x;
        while (x < w && row[x] == label) ++x;
        if (label == 0) continue;
        int32_t* e = box + 4 * (label - 1);
        area[label - 1] += x - begin;
        e[0] = std::min(e[0], begin);
        e[1] = std::min(e[1], y);
        e[2] = std::max(e[2], x - 1);
        e[3] = y;
      }
    }
    for (int32_t c = 0; c < n; ++c) {
      box[4 * c + 2] += 1 - box[4 * c];
      box[4 * c + 3] += 1 - box[4 * c + 1];
    }
  }
}

void largest_component(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                       const TensorView& out) {
  check_masks("largest_component", mask, out);
  const RaggedShape batch = expect_ragged("largest_component", offsets, shapes, mask.shape[0]);
  for_each_photo(batch, [&](int64_t b, Labeller& labeller) {
    const int64_t h = batch.height(b), w = batch.width(b);
    uint8_t* result = out.as<uint8_t>() + batch.begin(b);
    labeller.scan(mask.as<uint8_t>() + batch.begin(b), h, w, true);
    std::vector<int32_t> area(labeller.number() + 1, 0);
    for (const Run& run : labeller.runs) area[run.parent] += run.end - run.begin;
    const auto best = static_cast<int32_t>(std::max_element(area.begin(), area.end()) - area.begin());
    std::fill_n(result, h * w, 0);
    for (const Run& run : labeller.runs) {
      if (run.parent == best) std::fill(result + run.row * w + run.begin, result + run.row * w + run.end, 1);
    }
  });
}

void fill_holes(const TensorView& mask, const TensorView& offsets, const TensorView& shapes, const TensorView& out) {
  check_masks("fill_holes", mask, out);
  const RaggedShape batch = expect_ragged("fill_holes", offsets, shapes, mask.shape[0]);
  for_each_photo(batch, [&](int64_t b, Labeller& labeller) {
    const int64_t h = batch.height(b), w = batch.width(b);
    uint8_t* result = out.as<uint8_t>() + batch.begin(b);
    labeller.scan(mask.as<uint8_t>() + batch.begin(b), h, w, false);
    std::vector<uint8_t> open(labeller.number() + 1, 0);  // background components that reach the border
    for (const Run& run : labeller.runs) {
      if (run.row == 0 || run.row == h - 1 || run.begin == 0 || run.end == w) open[run.parent] = 1;
    }
    std::fill_n(result, h * w, 1);
    for (const Run& run : labeller.runs) {
      if (open[run.parent]) std::fill(result + run.row * w + run.begin, result + run.row * w + run.end, 0);
    }
  });
}

}  // namespace namedmask::cpu
