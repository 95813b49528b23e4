// SPDX-License-Identifier: MIT
#include "namedmask/tensor_view.h"

namespace namedmask {

const char* name(DType dtype) {
  switch (dtype) {
    case DType::kBool: return "bool";
    case DType::kUInt8: return "uint8";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
  }
  return "?";
}

namespace {

template <class Extents>
std::string bracket(const Extents& extents, int n) {
  std::string text = "[";
  for (int i = 0; i < n; ++i) {
    if (i) text += ", ";
    text += extents[i] < 0 ? std::string("*") : std::to_string(extents[i]);
  }
  return text + "]";
}

}  // namespace

std::string describe(const TensorView& view) {
  return std::string(name(view.dtype)) + " " + bracket(view.shape, view.ndim) +
         (view.device == Device::kCPU ? " on cpu" : " on cuda") + (view.contiguous() ? "" : ", not contiguous") +
         (view.aligned() ? "" : ", not aligned to its elements");
}

void expect(const char* op, const char* argument, const TensorView& view, DType dtype,
            std::initializer_list<int64_t> shape, Device device) {
  bool ok = view.dtype == dtype && view.device == device && view.ndim == static_cast<int>(shape.size()) &&
            view.contiguous() && view.aligned() && (view.data != nullptr || view.size() == 0);
  const int64_t* want = shape.begin();
  for (int i = 0; ok && i < view.ndim; ++i) ok = want[i] < 0 || want[i] == view.shape[i];
  if (ok) return;
  throw std::invalid_argument(std::string(op) + ": " + argument + " must be " + name(dtype) + " " +
                              bracket(want, static_cast<int>(shape.size())) +
                              (device == Device::kCPU ? " on cpu" : " on cuda") + ", contiguous, but is " +
                              describe(view));
}

RaggedShape expect_ragged(const char* op, const TensorView& offsets, const TensorView& shapes, int64_t rows) {
  expect(op, "shapes", shapes, DType::kInt32, {-1, 2});
  const int64_t count = shapes.shape[0];
  expect(op, "offsets", offsets, DType::kInt32, {count + 1});
  RaggedShape ragged{offsets.as<int32_t>(), shapes.as<int32_t>(), count};
  if (ragged.offsets[0] != 0 || ragged.offsets[count] != rows) {
    throw std::invalid_argument(std::string(op) + ": offsets must run from 0 to the " + std::to_string(rows) +
                                " rows, but run from " + std::to_string(ragged.offsets[0]) + " to " +
                                std::to_string(ragged.offsets[count]));
  }
  for (int64_t b = 0; b < count; ++b) {
    const int64_t h = ragged.height(b), w = ragged.width(b);
    if (h < 0 || w < 0 || ragged.end(b) - ragged.begin(b) != h * w) {
      throw std::invalid_argument(std::string(op) + ": image " + std::to_string(b) + " has shape " + std::to_string(h) +
                                  " x " + std::to_string(w) + " but owns rows " + std::to_string(ragged.begin(b)) +
                                  " to " + std::to_string(ragged.end(b)));
    }
  }
  return ragged;
}

void expect_per_image(const char* op, const char* argument, const PerImage& setting, int64_t images) {
  const auto count = static_cast<int64_t>(setting.values.size());
  if (count == 1 || count == images) return;
  throw std::invalid_argument(std::string(op) + ": " + argument + " must be one number, or one for each of the " +
                              std::to_string(images) + " images, but has " + std::to_string(count));
}

}  // namespace namedmask
