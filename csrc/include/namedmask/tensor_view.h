// SPDX-License-Identifier: MIT
// A borrowed n-dimensional array, and the argument checks of all operators.
//
// Operators access arrays only through TensorView, without torch or Python. A view does not own its memory: the caller
// keeps it alive for the duration of the call (and on CUDA until the work on the stream is done).
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace namedmask {

enum class DType : uint8_t { kBool, kUInt8, kInt32, kInt64, kFloat16, kBFloat16, kFloat32, kFloat64 };
#ifdef NMK_EMULATED_CUDA  // tests/kernels/cuda_emulator: the kernels run on the CPU, on the CPU's memory
enum class Device : uint8_t { kCPU, kCUDA = kCPU };
#else
enum class Device : uint8_t { kCPU, kCUDA };
#endif

constexpr int kMaxDims = 4;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device = Device::kCPU;
  int device_index = 0;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements, not bytes

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }

  int64_t element_size() const {
    switch (dtype) {
      case DType::kBool:
      case DType::kUInt8: return 1;
      case DType::kFloat16:
      case DType::kBFloat16: return 2;
      case DType::kInt64:
      case DType::kFloat64: return 8;
      default: return 4;
    }
  }

  bool aligned() const { return reinterpret_cast<uintptr_t>(data) % element_size() == 0; }

  bool contiguous() const {
    if (size() == 0) return true;  // with any strides
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

// A cudaStream_t, for headers that do not include CUDA; null is the default stream.
struct Stream {
  void* handle = nullptr;
};

const char* name(DType dtype);
std::string describe(const TensorView& view);  // "float32 [3, 4] on cpu"

// Throws std::invalid_argument "OP: ARGUMENT must be DTYPE [shape] on cpu, contiguous, but is ..." unless the view
// matches and its elements are aligned. A -1 in `shape` matches any extent.
void expect(const char* op, const char* argument, const TensorView& view, DType dtype,
            std::initializer_list<int64_t> shape, Device device = Device::kCPU);

// A packed batch of grids: image b has the rows offsets[b] .. offsets[b + 1] and the grid shapes[b] = (height, width).
struct RaggedShape {
  const int32_t* offsets = nullptr;  // [count + 1]
  const int32_t* shapes = nullptr;   // [count, 2]
  int64_t count = 0;

  int64_t begin(int64_t b) const { return offsets[b]; }
  int64_t end(int64_t b) const { return offsets[b + 1]; }
  int64_t height(int64_t b) const { return shapes[2 * b]; }
  int64_t width(int64_t b) const { return shapes[2 * b + 1]; }
};

// Checks offsets int32 [B + 1] and shapes int32 [B, 2] on the CPU: offsets start at 0 and end at `rows`, and each image
// has exactly height * width rows. Otherwise throws std::invalid_argument that names the image.
RaggedShape expect_ragged(const char* op, const TensorView& offsets, const TensorView& shapes, int64_t rows);

// A setting with one value for all images, or one for each.
struct PerImage {
  std::vector<double> values;

  double operator[](int64_t b) const { return values[values.size() == 1 ? 0 : b]; }
};

// Throws std::invalid_argument unless there is one value, or one for each of the images.
void expect_per_image(const char* op, const char* argument, const PerImage& setting, int64_t images);

}  // namespace namedmask
