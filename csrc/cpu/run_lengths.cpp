// SPDX-License-Identifier: MIT
// The pixels that differ from the one before them in column-major order begin the runs. They are found row by row,
// since most rows equal the row above in almost all places, and then sorted by column.
#include "namedmask/run_lengths.h"

#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "for_each_image.h"
#include "truths.h"

namespace namedmask::cpu {
namespace {

class Encoder {
 public:
  // Appends the runs of mask [h, w] to `lengths`.
  void encode(const uint8_t* mask, int64_t h, int64_t w, std::vector<int32_t>* lengths) {
    count_ = 0;
    uint8_t* const above = above_.reserve(w);  // what the pixels of the first row are compared with
    above[0] = 0;
    std::copy_n(mask + (h - 1) * w, w - 1, above + 1);
    int32_t* const first = first_.reserve(w + 1);  // of the runs that begin in each column
    std::fill_n(first, w + 1, 0);
    find(mask, above, 0, h, w);
    for (int64_t y = 1; y < h; ++y) find(mask + y * w, mask + (y - 1) * w, y, h, w);

    for (int64_t x = 0; x < w; ++x) first[x + 1] += first[x];
    int32_t* const sorted = sorted_.reserve(count_);
    // Rows were visited in order, so those of a column stay in order.
    for (int64_t i = 0; i < count_; ++i) sorted[first[column_[i]]++] = begin_[i];
    lengths->reserve(count_ + 1);
    int32_t last = 0;
    for (int64_t i = 0; i < count_; ++i) {
      lengths->push_back(sorted[i] - last);
      last = sorted[i];
    }
    lengths->push_back(static_cast<int32_t>(h * w) - last);
  }

  size_t bytes() const { return above_.bytes() + first_.bytes() + column_.bytes() + begin_.bytes() + sorted_.bytes(); }

 private:
  // Notes the pixels of row y that differ from those of `before`.
  void find(const uint8_t* row, const uint8_t* before, int64_t y, int64_t h, int64_t w) {
    constexpr int64_t kWords = 8;
    int32_t* const column = column_.reserve(count_ + w);
    int32_t* const begin = begin_.reserve(count_ + w);
    const auto note = [&](int64_t x) {
      column[count_] = static_cast<int32_t>(x);
      begin[count_++] = static_cast<int32_t>(x * h + y);
      ++first_[x + 1];
    };
    int64_t x = 0;
    for (; x + 8 * kWords <= w; x += 8 * kWords) {
      uint64_t a[kWords], b[kWords], any = 0;
      std::memcpy(a, row + x, sizeof(a));
      std::memcpy(b, before + x, sizeof(b));
      for (int64_t k = 0; k < kWords; ++k) any |= a[k] ^ b[k];
      if (any == 0) continue;
      for (int64_t k = 0; k < kWords; ++k) {  // each set bit is a pixel
        for (uint64_t bits = truths(a[k]) ^ truths(b[k]); bits != 0; bits &= bits - 1)
          note(x + 8 * k + __builtin_ctzll(bits) / 8);
      }
    }
    for (; x < w; ++x) {
      if ((row[x] != 0) != (before[x] != 0)) note(x);
    }
  }

  int64_t count_ = 0;
  Buffer<uint8_t> above_;
  Buffer<int32_t> first_, column_, begin_, sorted_;
};

constexpr int64_t kMaxGroups = 7;  // characters of a number

uint8_t* append(int32_t value, uint8_t* text) {
  while (true) {
    const int32_t group = value & 31;
    value >>= 5;  // arithmetic: the sign stays
    const bool more = value != (group & 16 ? -1 : 0);
    *text++ = static_cast<uint8_t>(48 + group + 32 * more);
    if (!more) return text;
  }
}

// Writes area, box and string; returns the end of the string.
uint8_t* compress(const int32_t* lengths, int64_t runs, int64_t h, int64_t w, int32_t* area, int32_t* box,
                  uint8_t* text) {
  int64_t at = 0, left = w, top = h, right = 0, bottom = 0;
  *area = 0;
  for (int64_t i = 0; i < runs; ++i) {
    const int32_t length = lengths[i];
    text = append(i > 2 ? length - lengths[i - 2] : length, text);
    if (i % 2 == 1 && length > 0) {
      const int64_t x = at / h, y = at % h, end = y + length;
      left = std::min(left, x);
      right = std::max(right, x + (end - 1) / h + 1);
      top =
          end > h ? 0 : std::min(top, y);  // a run that reaches the next column has its first pixel and this one's last
      bottom = end > h ? h : std::max(bottom, end);
      *area += length;
    }
    at += length;
  }
  const bool none = *area == 0;
  box[0] = static_cast<int32_t>(none ? 0 : left);
  box[1] = static_cast<int32_t>(none ? 0 : top);
  box[2] = static_cast<int32_t>(none ? 0 : right - left);
  box[3] = static_cast<int32_t>(none ? 0 : bottom - top);
  return text;
}

struct Text {
  size_t bytes() const { return characters.bytes(); }
  Buffer<uint8_t> characters;
};

// Concatenates what the images have; first[b] .. first[b + 1] are those of image b.
template <class T>
std::vector<T> joined(std::vector<std::vector<T>>* parts, int32_t* first) {
  int64_t total = 0;
  first[0] = 0;
  for (size_t b = 0; b < parts->size(); ++b) {
    total += static_cast<int64_t>((*parts)[b].size());
    if (total > INT32_MAX)
      throw std::invalid_argument("run_lengths: the batch has more than 2^31 - 1 runs or characters");
    first[b + 1] = static_cast<int32_t>(total);
  }
  if (parts->size() == 1) return std::move((*parts)[0]);
  std::vector<T> all;
  all.reserve(total);
  for (const std::vector<T>& part : *parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

}  // namespace

std::vector<int32_t> run_lengths(const TensorView& mask, const TensorView& offsets, const TensorView& shapes,
                                 const TensorView& first) {
  const char* op = "run_lengths";
  expect(op, "mask", mask, DType::kBool, {-1});
  const RaggedShape batch = expect_ragged(op, offsets, shapes, mask.shape[0]);
  expect(op, "first", first, DType::kInt32, {batch.count + 1});
  std::vector<std::vector<int32_t>> lengths(batch.count, {0});  // of an image without pixels
  for_each_image<Encoder>(batch, [&](int64_t b, Encoder& encoder) {
    lengths[b].clear();
    encoder.encode(mask.as<uint8_t>() + batch.begin(b), batch.height(b), batch.width(b), &lengths[b]);
  });
  return joined(&lengths, first.as<int32_t>());
}

std::vector<uint8_t> compress_runs(const TensorView& lengths, const TensorView& first, const TensorView& shapes,
                                   const TensorView& areas, const TensorView& boxes, const TensorView& ends) {
  const char* op = "compress_runs";
  expect(op, "lengths", lengths, DType::kInt32, {-1});
  expect(op, "shapes", shapes, DType::kInt32, {-1, 2});
  const int64_t count = shapes.shape[0];
  expect(op, "first", first, DType::kInt32, {count + 1});
  expect(op, "areas", areas, DType::kInt32, {count});
  expect(op, "boxes", boxes, DType::kInt32, {count, 4});
  expect(op, "ends", ends, DType::kInt32, {count + 1});
  const int32_t* begin = first.as<int32_t>();
  if (begin[0] != 0 || begin[count] != lengths.shape[0] || !std::is_sorted(begin, begin + count + 1)) {
    throw std::invalid_argument("compress_runs: first must ascend from 0 to the number of lengths");
  }
  std::vector<std::vector<uint8_t>> text(count);
  // Its rows are the runs.
  const RaggedShape batch{begin, shapes.as<int32_t>(), count};
  for_each_image<Text>(batch, [&](int64_t b, Text& worker) {
    const int64_t runs = batch.end(b) - batch.begin(b);
    uint8_t* const out = worker.characters.reserve(kMaxGroups * runs);
    text[b].assign(out, compress(lengths.as<int32_t>() + batch.begin(b), runs, batch.height(b), batch.width(b),
                                 areas.as<int32_t>() + b, boxes.as<int32_t>() + 4 * b, out));
  });
  return joined(&text, ends.as<int32_t>());
}

}  // namespace namedmask::cpu
