// SPDX-License-Identifier: MIT
// The lattice and the grid are built once per image, with the norms of both kernels multiplied into the pixels'
// weights. An update is then a single pass over the pixels: it reads the filtered marginals of the last iteration,
// computes the new ones and adds them to the next lattice and grid. The marginals themselves are never stored. With
// more than two labels the pass also filters the next grid, rows as soon as all their pixels are added, and stores it
// in place of rows that are no longer read.
#include "namedmask/dense_crf.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "buffer.h"
#include "dense_crf_levels.h"
#include "for_each_image.h"
#include "level.h"
#include "permutohedral.h"
#include "spline_grid.h"

namespace namedmask::cpu {
namespace {

constexpr int kGroup = CrfSystem::kGroup, kAxes = CrfSystem::kAxes, kCorners = CrfSystem::kCorners;
constexpr int kTaps = CrfSystem::kTaps, kSums = CrfSystem::kSums, kBlurRows = CrfSystem::kBlurRows;
static_assert(kAxes == kLatticeAxes && kTaps == kSplineTaps);

const CrfKernels& kernels() { return NMK_BEST(dense_crf); }

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

typedef LatticeKey Key;

uint64_t scrambled(uint64_t key) {
  key *= 0x9e3779b97f4a7c15u;
  return key ^ key >> 32;
}

// Vertices, numbered in the order of insertion, and the steps between them that have been walked.
class VertexTable {
 public:
  // Removes all vertices. The slots, a quarter of which are used at most, suffice for that many pixels or grow.
  void clear(int64_t pixels) {
    keys_.clear();
    steps_.clear();
    const size_t most = std::bit_ceil(static_cast<size_t>(4 * kCorners * pixels));
    slots_.assign(std::min(most, std::max<size_t>(slots_.size(), 1 << 16)), Slot{});
  }

  int32_t find(Key key) const {  // -1: not found
    for (size_t i = scrambled(key);; ++i) {
      const Slot& slot = slots_[i & (slots_.size() - 1)];
      if (slot.vertex < 0 || slot.key == key) return slot.vertex;
    }
  }

  int32_t find_or_add(Key key) {
    for (size_t i = scrambled(key);; ++i) {
      Slot& slot = slots_[i & (slots_.size() - 1)];
      if (slot.vertex >= 0 && slot.key == key) return slot.vertex;
      if (slot.vertex >= 0) continue;
      const auto vertex = static_cast<int32_t>(keys_.size());
      slot = {key, vertex};
      keys_.push_back(key);
      steps_.resize(kCorners * keys_.size(), -1);
      if (4 * keys_.size() > slots_.size()) grow();
      return vertex;
    }
  }

  // The vertex one step away. A known step has a single branch, which is nearly always predicted.
  int32_t walk(int32_t vertex, int direction) {
    const size_t step = kCorners * static_cast<size_t>(vertex) + direction;
    if (steps_[step] >= 0) return steps_[step];
    const int32_t next = find_or_add(lattice_step(keys_[vertex], direction));
    return steps_[step] = next;
  }

  int32_t find_step(int32_t vertex, int direction) const {  // -1: not found
    const int32_t next = steps_[kCorners * static_cast<size_t>(vertex) + direction];
    return next >= 0 ? next : find(lattice_step(keys_[vertex], direction));
  }

  size_t size() const { return keys_.size(); }
  size_t bytes() const {
    return keys_.capacity() * sizeof(Key) + slots_.capacity() * sizeof(Slot) + steps_.capacity() * sizeof(int32_t);
  }

 private:
  struct Slot {
    Key key = 0;
    int32_t vertex = -1;
  };

  void grow() {
    slots_.assign(2 * slots_.size(), Slot{});
    for (size_t v = 0; v < keys_.size(); ++v) {
      size_t i = scrambled(keys_[v]);
      while (slots_[i & (slots_.size() - 1)].vertex >= 0) ++i;
      slots_[i & (slots_.size() - 1)] = {keys_[v], static_cast<int32_t>(v)};
    }
  }

  std::vector<Key> keys_;
  std::vector<Slot> slots_;
  std::vector<int32_t> steps_;  // [vertices, kCorners]: the vertex in each direction; -1: not known
};

class Solver {
 public:
  // Returns false if a probability is not finite. `b`: the index of the image, for its settings.
  bool run(const float* probabilities, const uint8_t* image, int64_t h, int64_t w, int64_t labels,
           const CrfSettings& settings, int64_t b, float* out) {
    system_.height = h;
    system_.width = w;
    system_.labels = labels;
    system_.channels = labels == 2 ? 1 : round_up(labels, kGroup);
    system_.out = out;
    // Scores are logarithms to base 2; one channel holds half log-odds.
    const double unit = (labels == 2 ? 0.5 : 1) * M_LOG2E;
    build_grid(settings.gaussian_sigma[b], unit * settings.gaussian_weight);
    build_lattice(image, settings.bilateral_sigma[b], settings.bilateral_sigma_rgb);
    find_neighbors();
    system_.bilateral_weight = static_cast<float>(unit * settings.bilateral_weight);
    allocate();
    kernels().normalize(system_);
    if (!kernels().start(system_, probabilities)) return false;
    kernels().infer(system_, settings.iterations);
    return true;
  }

  size_t bytes() const {
    return taps_.bytes() + corners_.bytes() + weights_.bytes() + neighbors_.bytes() + floats_.bytes() + table_.bytes();
  }

 private:
  // 1 / sqrt of the kernel's row sums along one axis: splats ones, blurs, slices.
  std::vector<double> axis_norm(int64_t pixels, const std::vector<double>& taps, const std::vector<double>& gauss) {
    const int64_t step = system_.step, nodes = pixels / step + kTaps;
    std::vector<double> added(nodes), norm(pixels);
    for (int64_t x = 0; x < pixels; ++x) {
      for (int t = 0; t < kTaps; ++t) added[x / step + t] += taps[x % step * kTaps + t];
    }
    const auto radius = static_cast<int64_t>(gauss.size()) - 1;
    std::vector<double> blurred(nodes);
    for (int64_t i = 0; i < nodes; ++i) {
      for (int64_t j = std::max<int64_t>(0, i - radius); j < std::min(nodes, i + radius + 1); ++j) {
        blurred[i] += gauss[std::abs(i - j)] * added[j];
      }
    }
    for (int64_t x = 0; x < pixels; ++x) {
      double sum = 0;
      for (int t = 0; t < kTaps; ++t) sum += taps[x % step * kTaps + t] * blurred[x / step + t];
      norm[x] = 1 / std::sqrt(sum);
    }
    return norm;
  }

  void build_grid(double sigma, double weight) {
    CrfSystem& s = system_;
    s.step = grid_step(sigma, s.width);
    s.cells = round_up((s.width + s.step - 1) / s.step, kGroup);
    s.tile = s.channels == 1 ? s.cells : std::min<int64_t>(s.cells, CrfSystem::kTileCells);
    s.grid_width = round_up(s.cells + kTaps - 1, kGroup);
    s.grid_height = grid_nodes(s.height, s.step);
    std::vector<double> taps(s.step * kTaps);
    for (int64_t i = 0; i < s.step * kTaps; ++i) taps[i] = spline_tap(i % kTaps, i / kTaps, s.step);
    const double deviation = grid_deviation(sigma, s.step);
    s.radius = grid_radius(deviation, std::max(s.grid_height, s.grid_width));
    std::vector<double> gauss(s.radius + 1);
    for (int64_t t = 0; t <= s.radius; ++t) gauss[t] = std::exp(-0.5 * (t / deviation) * (t / deviation));

    const std::vector<double> row_norm = axis_norm(s.height, taps, gauss), norm = axis_norm(s.width, taps, gauss);
    taps_.reserve(taps.size() + 2 * s.height * kTaps + s.step * s.cells + 2 * (s.radius + kBlurRows) + 1);
    float* to = taps_.data();
    s.taps = to;
    to = std::copy(taps.begin(), taps.end(), to);
    s.row_taps = to;
    s.add_taps = to + s.height * kTaps;
    for (int64_t y = 0; y < s.height; ++y) {
      for (int t = 0; t < kTaps; ++t, ++to) {
        const double tap = row_norm[y] * taps[y % s.step * kTaps + t];
        to[0] = static_cast<float>(weight * tap);
        to[s.height * kTaps] = static_cast<float>(tap);
      }
    }
    to += s.height * kTaps;
    s.column_norm = to;
    for (int64_t i = 0; i < s.step * s.cells; ++i) {
      const int64_t x = i % s.cells * s.step + i / s.cells;
      *to++ = x < s.width ? static_cast<float>(norm[x]) : 0.0f;
    }
    to = std::fill_n(to, kBlurRows, 0.0f);
    to = std::copy(gauss.rbegin(), gauss.rend(), to);
    s.gauss = to - 1;
    to = std::copy(gauss.begin() + 1, gauss.end(), to);
    std::fill_n(to, kBlurRows, 0.0f);
  }

  // Finds all vertices, and the vertices and weights of each pixel.
  void build_lattice(const uint8_t* image, double sigma, double sigma_rgb) {
    CrfSystem& s = system_;
    float scale[kAxes];
    for (int i = 0; i < kAxes; ++i) scale[i] = lattice_scale(i, sigma, sigma_rgb);
    const int64_t groups = s.height * s.step * s.cells / kGroup, band = CrfSystem::kBandNodes * s.step;
    corners_.reserve(groups * kCorners * kGroup);
    weights_.reserve(groups * kCorners * kGroup);
    table_.clear(s.height * s.width);
    int32_t* corners = corners_.data();
    float* weights = weights_.data();
    for (int64_t top = 0; top < s.height; top += band) {
      for (int64_t first = 0; first < s.cells; first += s.tile) {
        for (int64_t y = top; y < std::min(top + band, s.height); ++y) {
          for (int64_t phase = 0; phase < s.step; ++phase) {
            for (int64_t cell = first; cell < std::min(first + s.tile, s.cells); cell += kGroup) {
              embed_group(image, scale, y, phase, cell, corners, weights);
              corners += kCorners * kGroup;
              weights += kCorners * kGroup;
            }
          }
        }
      }
    }
    s.vertices = static_cast<int64_t>(table_.size());
    s.corners = corners_.data();
    s.weights = weights_.data();
  }

  void embed_group(const uint8_t* image, const float* scale, int64_t y, int64_t phase, int64_t cell, int32_t* corners,
                   float* weights) {
    const CrfSystem& s = system_;
    const int64_t lanes = std::clamp<int64_t>((s.width - phase - 1) / s.step + 1 - cell, 0, kGroup);
    float features[kAxes * kGroup] = {};
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t x = (cell + i) * s.step + phase;
      features[i] = static_cast<float>(x) * scale[0];
      features[kGroup + i] = static_cast<float>(y) * scale[1];
      for (int c = 0; c < 3; ++c) features[(2 + c) * kGroup + i] = image[3 * (y * s.width + x) + c] * scale[2 + c];
    }
    CrfSimplices simplices;
    kernels().embed(features, &simplices, weights);
    for (int64_t i = 0; i < lanes; ++i) {
      const Key key = static_cast<Key>(simplices.low[i]) + (static_cast<Key>(simplices.middle[i]) << 24) +
                      (static_cast<Key>(simplices.high[i]) << 48);
      corners[i] = table_.find_or_add(key << 3);
    }
    for (int r = 1; r < kCorners; ++r) {  // pixel by pixel, each step would wait for the last one
      for (int64_t i = 0; i < lanes; ++i) {
        corners[r * kGroup + i] = table_.walk(corners[(r - 1) * kGroup + i], simplices.order[i] & 7);
        simplices.order[i] >>= 3;
      }
    }
    for (int64_t i = lanes; i < kGroup; ++i) {
      for (int r = 0; r < kCorners; ++r) {
        corners[r * kGroup + i] = 0;
        weights[r * kGroup + i] = 0;
      }
    }
  }

  // Fills neighbors_.
  void find_neighbors() {
    const size_t vertices = table_.size();
    const auto count = static_cast<int32_t>(vertices);
    neighbors_.reserve(2 * kCorners * vertices);
    std::fill_n(neighbors_.data(), 2 * kCorners * vertices, count);
    for (int j = 0; j < kCorners; ++j) {
      int32_t* const near = neighbors_.data() + 2 * j * vertices;
      for (int32_t v = 0; v < count; ++v) {
        const int32_t next = table_.find_step(v, j);
        if (next < 0) continue;
        near[2 * v + 1] = next;
        near[2 * next] = v;
      }
    }
    system_.neighbors = neighbors_.data();
  }

  void allocate() {
    CrfSystem& s = system_;
    const int64_t lattice = (s.vertices + 1) * std::max<int64_t>(s.channels, kSums);
    const int64_t grid = s.grid_height * s.grid_width * s.channels;
    s.ring = s.channels == 1 ? s.grid_height
                             : std::min(s.grid_height, 2 * s.radius + kTaps + kBlurRows + CrfSystem::kBandNodes - 2);
    const int64_t rows = s.channels == 1
                             ? (s.step + 1) * (s.grid_width + kTaps - 1) + 2 * s.radius + kGroup
                             : CrfSystem::kRowsAtOnce * (2 * (s.tile + kTaps) + s.step * (s.tile + 2 * kTaps));
    const std::pair<float**, int64_t> arrays[] = {
        {&s.lattice, lattice},
        {&s.next_lattice, lattice},
        {&s.grid, grid},
        {&s.next_grid, s.ring * s.grid_width * s.channels},
        {&s.rows, rows * s.channels},
        {&s.columns, s.channels == 1 ? 0 : kBlurRows * (s.grid_width + 2 * s.radius) * s.channels},
        {&s.scores, s.channels * kGroup},
        {&s.unary, s.channels == 1 ? s.height * s.step * s.cells : 0},
    };
    constexpr int64_t kLine = 16;  // floats per cache line: vectors should not cross a boundary
    int64_t total = kLine;
    for (const auto& [array, count] : arrays) total += round_up(count, kLine);
    floats_.reserve(total);
    float* next = floats_.data() + (-(reinterpret_cast<uintptr_t>(floats_.data()) / sizeof(float)) & (kLine - 1));
    for (const auto& [array, count] : arrays) *array = std::exchange(next, next + round_up(count, kLine));
  }

  CrfSystem system_ = {};
  VertexTable table_;
  Buffer<float> taps_, weights_, floats_;
  Buffer<int32_t> corners_, neighbors_;
};

}  // namespace

void dense_crf(const TensorView& probabilities, const TensorView& image, const TensorView& offsets,
               const TensorView& shapes, const TensorView& out, const CrfSettings& settings) {
  const char* op = "dense_crf";
  expect(op, "probabilities", probabilities, DType::kFloat32, {-1, -1});
  const int64_t pixels = probabilities.shape[0], labels = probabilities.shape[1];
  expect(op, "image", image, DType::kUInt8, {pixels, 3});
  expect(op, "out", out, DType::kFloat32, {pixels, labels});
  const RaggedShape batch = expect_ragged(op, offsets, shapes, pixels);
  expect_sigmas(batch, settings);
  if (labels == 0) return;
  for_each_finite_image<Solver>(op, "probabilities", batch, [&](int64_t b, Solver& solver) {
    return solver.run(probabilities.as<float>() + labels * batch.begin(b), image.as<uint8_t>() + 3 * batch.begin(b),
                      batch.height(b), batch.width(b), labels, settings, b, out.as<float>() + labels * batch.begin(b));
  });
}

}  // namespace namedmask::cpu
