// SPDX-License-Identifier: MIT
// The image is processed one spatial cell at a time. Pixels of a cell differ only in color, so a table indexed by color
// key finds their vertices without hashing or sorting. The same table finds neighbors: those in color directly, those
// to the left and above by looking up the neighboring cell's keys. Then the used entries of the table are cleared.
#include "namedmask/bilateral_solver.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "bilateral_solver_levels.h"
#include "buffer.h"
#include "for_each_image.h"
#include "level.h"
#include "prefault_pages.h"
#include "scale.h"

namespace namedmask::cpu {

int32_t color_key(const ColorGrid& grid, int r, int g, int b) { return grid.key(r, g, b); }

namespace {

constexpr int kSlice = BilateralSystem::kSlice;
constexpr int kDirections = 10;  // both ways along five axes

const BilateralKernels& kernels() { return NMK_BEST(bilateral_solver); }

// first[c] = the first pixel of cell c along one axis. A cell is at least one pixel wide, so none is skipped.
std::vector<int32_t> cell_starts(int64_t pixels, double sigma) {
  std::vector<int32_t> first;
  for (int32_t x = 0; x < pixels; ++x) {
    if (spatial_cell(x, sigma) == static_cast<int32_t>(first.size())) first.push_back(x);
  }
  first.push_back(static_cast<int32_t>(pixels));
  return first;
}

// Sum of the target and number of pixels, or with a confidence per pixel, sums of confidence * target and confidence,
// in one vector.
typedef double Sum __attribute__((vector_size(16)));

class Solver {
 public:
  // Returns false if the target is not finite. `confidence` is null if all pixels have that of the settings; `sigma` is
  // the image's spatial one.
  bool run(const float* target, const uint8_t* image, const float* confidence, int64_t h, int64_t w,
           const BilateralSettings& settings, double sigma, float* out) {
    prepare(settings);
    build(target, image, confidence, h, w, sigma);
    arrange();
    if (!fill(settings, confidence != nullptr)) return false;
    kernels().solve(system_);
    for (int32_t v = 0; v < count_; ++v) values_[v] = system_.value[place_[v]];
    for (int32_t v = 0; scale_ != 1 && v < count_; ++v) values_[v] = unscaled(values_[v], scale_);
    prefault_pages(out, h * w * sizeof(float));
    kernels().slice(values_.data(), vertex_of_pixel_.data(), h * w, out);
    return true;
  }

  size_t bytes() const {
    return table_.bytes() + vertex_of_pixel_.bytes() + keys_.bytes() + key_.bytes() + degree_.bytes() +
           joined_.bytes() + pixels_.bytes() + sums_.bytes() + lanes_.bytes() + local_.bytes() + place_.bytes() +
           at_.bytes() + widths_.bytes() + neighbors_.bytes() + floats_.bytes() + values_.bytes();
  }

 private:
  void prepare(const BilateralSettings& settings) {
    grid_ = ColorTable(settings);
    for (int v = 0; v < 256; ++v) grid_.gray[v] = grid_.key(v, v, v);
    table_.reserve(grid_.keys());
    std::fill_n(table_.data(), grid_.keys(), 0);
  }

  // Finds the vertices with their keys, sums and neighbors, and fills vertex_of_pixel_.
  void build(const float* target, const uint8_t* image, const float* confidence, int64_t h, int64_t w, double sigma) {
    const std::vector<int32_t> ys = cell_starts(h, sigma), xs = cell_starts(w, sigma);
    const size_t columns = xs.size() - 1;
    std::vector<int32_t> above(columns + 1), current(columns + 1);  // first vertex of each cell of a row of cells
    vertex_of_pixel_.reserve(h * w);
    count_ = 0;
    for (size_t cy = 0; cy + 1 < ys.size(); ++cy) {
      const int64_t rows = ys[cy + 1] - ys[cy], start = ys[cy] * w;
      keys_.reserve(rows * w);
      kernels().keys(image + 3 * start, rows * w, grid_, keys_.data());
      above.swap(current);
      for (size_t cx = 0; cx < columns; ++cx) {
        const int32_t first = current[cx] = count_;
        reserve_vertices(rows * (xs[cx + 1] - xs[cx]));
        if (confidence) {
          splat<true>(target + start, confidence + start, vertex_of_pixel_.data() + start, rows, w, xs[cx], xs[cx + 1]);
        } else {
          splat<false>(target + start, nullptr, vertex_of_pixel_.data() + start, rows, w, xs[cx], xs[cx + 1]);
        }
        connect(first);
        if (cx > 0) connect(first, current[cx - 1], first);
        if (cy > 0) connect(first, above[cx], above[cx + 1]);
        for (int32_t v = first; v < count_; ++v) table_[key_[v]] = 0;
      }
      current[columns] = count_;
    }
  }

  // Reserves memory for the vertices of a cell of that many pixels.
  void reserve_vertices(size_t pixels) {
    const size_t most = count_ + pixels;
    key_.reserve(most);
    degree_.reserve(most);
    joined_.reserve(kDirections * most);
    sums_.reserve(most);
    pixels_.reserve(most);
    lanes_.reserve(kSums * pixels);
    local_.reserve(pixels);
  }

  // Adds up one cell, pixels [begin, end) of `rows` rows. The table then holds its vertices, numbered from 1. Not
  // inlined: the loops would run out of registers.
  template <bool kConfidence>
  [[gnu::noinline]] void splat(const float* target, const float* confidence, int32_t* vertex_of_pixel, int64_t rows,
                               int64_t w, int32_t begin, int32_t end) {
    int32_t* const table = table_.data();
    int32_t* const key_of = key_.data() + count_;
    int32_t* local = local_.data();
    int32_t count = 0;
    for (int64_t y = 0; y < rows; ++y) {
      const int32_t* keys = keys_.data() + y * w;
      // The rows are too far apart for the hardware prefetcher: prefetch those of the next cell.
      __builtin_prefetch(target + y * w + end);
      __builtin_prefetch(vertex_of_pixel + y * w + end, 1);
      for (int32_t x = begin; x < end; ++x) {
        int32_t id = table[keys[x]];
        if (id == 0) {
          key_of[count] = keys[x];
          id = table[keys[x]] = ++count;
        }
        *local++ = id - 1;
      }
    }
    Sum* const lanes = lanes_.data();
    const int32_t first = count_;
    std::fill_n(lanes, kSums * count, Sum{});
    if constexpr (kConfidence) std::fill_n(pixels_.data() + first, count, 0);
    local = local_.data();
    for (int64_t y = 0; y < rows; ++y, target += w, vertex_of_pixel += w) {
      for (int32_t x = begin; x < end; ++x, ++local) {
        vertex_of_pixel[x] = first + *local;
        // Neighboring pixels often share a vertex: alternating between several sums avoids waiting for each addition.
        Sum& sum = lanes[kSums * *local + (x & (kSums - 1))];
        if constexpr (kConfidence) {
          sum += Sum{double{confidence[x]} * target[x], confidence[x]};
          ++pixels_[first + *local];
        } else {
          sum += Sum{target[x], 1.0};
        }
      }
      if constexpr (kConfidence) confidence += w;
    }
    for (int32_t v = 0; v < count; ++v) {
      const Sum* sum = lanes + kSums * v;
      sums_[count_ + v] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    std::fill_n(degree_.data() + count_, count, 0);
    count_ += count;
  }

  void join(int32_t a, int32_t b) {
    joined_[kDirections * a + degree_[a]++] = b;
    joined_[kDirections * b + degree_[b]++] = a;
  }

  // Connects the vertices of the current cell, from `first` on, with each other.
  void connect(int32_t first) {
    for (int32_t v = first; v < count_; ++v) {
      for (int32_t step : grid_.steps) {
        if (const int32_t id = table_[key_[v] - step]) join(v, first + id - 1);
      }
    }
  }

  // Connects them with the vertices [begin, end) of a neighboring cell.
  void connect(int32_t first, int32_t begin, int32_t end) {
    for (int32_t v = begin; v < end; ++v) {
      if (const int32_t id = table_[key_[v]]) join(v, first + id - 1);
    }
  }

  // Sorts the vertices by number of neighbors and builds place_, at_ and the slices of the system.
  void arrange() {
    const int32_t padded = (count_ + kSlice - 1) / kSlice * kSlice;
    int32_t start[kDirections + 2] = {};
    size_t edges = 0;
    for (int32_t v = 0; v < count_; ++v) ++start[kDirections - degree_[v] + 1];
    for (int d = 0; d <= kDirections; ++d) {
      edges += static_cast<size_t>(start[d + 1]) * (kDirections - d);
      start[d + 1] += start[d];
    }
    place_.reserve(count_);
    at_.reserve(count_);
    for (int32_t v = 0; v < count_; ++v) {
      const int32_t place = start[kDirections - degree_[v]]++;
      place_[v] = place;
      at_[place] = v;
    }
    widths_.reserve(padded / kSlice);
    // Widths never increase, so padding takes less than one slice of the largest width.
    neighbors_.reserve(edges + kSlice * kDirections);
    int32_t* slice = neighbors_.data();
    for (int32_t s = 0; s < padded; s += kSlice) {
      const int32_t width = widths_[s / kSlice] = degree_[at_[s]];
      for (int lane = 0; lane < kSlice; ++lane) {
        const int32_t v = s + lane < count_ ? at_[s + lane] : -1, degree = v < 0 ? 0 : degree_[v];
        for (int32_t j = 0; j < degree; ++j) slice[j * kSlice + lane] = place_[joined_[kDirections * v + j]];
        for (int32_t j = degree; j < width; ++j) slice[j * kSlice + lane] = padded;
      }
      slice += width * kSlice;
    }
    system_.count = padded;
    system_.widths = widths_.data();
    system_.neighbors = neighbors_.data();
  }

  // Fills the rest of the system. Returns false if a sum is not finite; a sum of finite targets cannot overflow a
  // double.
  bool fill(const BilateralSettings& settings, bool has_confidences) {
    const size_t stride = system_.count + kSlice;
    floats_.reserve(stride * (3 + std::size(system_.scratch)));
    values_.reserve(count_);
    float* array = floats_.data();
    float* const mass = array;
    float* const weight = array += stride;
    float* const value = system_.value = array += stride;
    for (float*& scratch : system_.scratch) scratch = array += stride;
    for (float* end = mass + system_.count; end <= array + system_.count; end += stride) std::fill_n(end, kSlice, 0.0f);
    bool finite = true;
    const float confidence = static_cast<float>(settings.confidence);
    Sum total = {};
    for (int32_t v = 0; has_confidences && v < count_; ++v) total += sums_[v];
    const double mean = total[1] > 0 ? total[0] / total[1] : 0;
    for (int64_t i = 0; i < system_.count; ++i) {
      const Sum sum = i < count_ ? sums_[at_[i]] : Sum{0, 1};
      finite = finite && std::isfinite(sum[0]);
      mass[i] = has_confidences && i < count_ ? static_cast<float>(pixels_[at_[i]]) : static_cast<float>(sum[1]);
      weight[i] = has_confidences ? std::max(static_cast<float>(sum[1]), kLeastWeight) : confidence * mass[i];
      value[i] = static_cast<float>(sum[1] > 0 ? sum[0] / sum[1] : mean);
    }
    scale_ = scale_of(finite ? largest_finite(value, system_.count) : 0);
    for (int64_t i = 0; scale_ != 1 && i < system_.count; ++i) value[i] *= scale_;
    system_.mass = mass;
    system_.weight = weight;
    system_.smoothness = settings.smoothness;
    system_.tolerance = settings.tolerance;
    system_.iterations = settings.iterations;
    return finite;
  }

  static constexpr int kSums = 4;

  ColorTable grid_{BilateralSettings()};
  Buffer<int32_t> table_;  // key -> vertex of the current cell, numbered from 1; 0: none
  Buffer<int32_t> vertex_of_pixel_;
  Buffer<int32_t> keys_;          // of the pixels in a row of cells
  Buffer<int32_t> local_;         // vertex of each pixel of a cell, relative to the cell's first
  Buffer<Sum> lanes_;             // [vertices of a cell, kSums]
  int32_t count_ = 0;             // vertices, ordered by cell:
  Buffer<int32_t> key_, degree_;  // degree: number of neighbors
  Buffer<int32_t> joined_;        // neighbors, [count, kDirections]
  Buffer<int32_t> pixels_;        // number of pixels, with a confidence per pixel
  Buffer<Sum> sums_;
  Buffer<int32_t> place_, at_;  // vertex -> its index in the system, and back
  Buffer<int32_t> widths_, neighbors_;
  Buffer<float> floats_, values_;
  BilateralSystem system_ = {};
  float scale_ = 1;  // of the values, while the system is solved
};

}  // namespace

void bilateral_solver(const TensorView& target, const TensorView& image, const TensorView& confidence,
                      const TensorView& offsets, const TensorView& shapes, const TensorView& out,
                      const BilateralSettings& settings) {
  const char* op = "bilateral_solver";
  expect(op, "target", target, DType::kFloat32, {-1});
  expect(op, "image", image, DType::kUInt8, {target.shape[0], 3});
  const bool has_confidences = confidence.shape[0] != 0;
  expect(op, "confidence", confidence, DType::kFloat32, {has_confidences ? target.shape[0] : 0});
  expect(op, "out", out, DType::kFloat32, {target.shape[0]});
  const RaggedShape batch = expect_ragged(op, offsets, shapes, target.shape[0]);
  expect_cells(settings, batch.count);
  for_each_finite_image<Solver>(op, "target", batch, [&](int64_t b, Solver& solver) {
    const int64_t begin = batch.begin(b);
    return solver.run(target.as<float>() + begin, image.as<uint8_t>() + 3 * begin,
                      has_confidences ? confidence.as<float>() + begin : nullptr, batch.height(b), batch.width(b),
                      settings, settings.sigma_spatial[b], out.as<float>() + begin);
  });
}

}  // namespace namedmask::cpu
