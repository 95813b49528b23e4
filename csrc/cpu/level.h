// SPDX-License-Identifier: MIT
// The instruction level (portable, AVX2, AVX-512, ...) that the CPU kernels run at.
//
// A kernel that gains from SIMD puts its inner loops into NAME_kernel.h, which ends with a table of functions:
//
//   constexpr PamrKernels kKernels = {affinities, average};
//
// CMake compiles the header once per level. NAME_levels.h declares the resulting tables with
// NMK_DECLARE_LEVELS(PamrKernels, pamr), and NAME.cpp picks the best one with NMK_BEST(pamr).
//
// Code of a level is compiled with that level's flags, so it must not share any function with other levels: the linker
// keeps one copy of an inline function, and if that is the AVX-512 copy, the program crashes on older CPUs. Kernel
// headers therefore use raw pointers and an anonymous namespace, and from the standard library only macros, types and
// builtins.
#pragma once

namespace namedmask::cpu {

// kAVX512VNNI is AVX-512 plus dot products of 8-bit and 16-bit integers, kAVX512BF16 is that plus dot products of
// bfloat16. A kernel without code for a level runs that of the level below.
enum class Level { kPortable, kAVX2, kAVX512, kAVX512VNNI, kAVX512BF16 };

// The highest level that this CPU supports and runs fast, detected once: kAVX512BF16 is for AMD, since on Intel cores
// (measured: Sapphire Rapids) vdpbf16ps runs at half the rate of float32. The environment variable NMK_LEVEL (portable,
// avx2, avx512, avx512_vnni, avx512_bf16) selects another that the CPU supports; throws std::invalid_argument if the
// name is unknown or the CPU does not support the level.
Level level();

const char* name(Level level);

// Declares the tables that level.cpp.in and the hand-written files of avx512_vnni and avx512_bf16 define. On CPUs other
// than x86-64 only the portable table exists.
#define NMK_DECLARE_LEVELS(Table, name) \
  extern const Table name##_portable, name##_avx2, name##_avx512, name##_avx512_vnni, name##_avx512_bf16

// The table to run. NMK_BEST_IF is for AVX-512 code that requires more extensions than the level guarantees
// (CMakeLists.txt lists them): CPUs without them run the AVX2 code. NMK_BEST_OR_VNNI is for kernels with VNNI code,
// NMK_BEST_OR_BF16 for kernels with code for both.
#if defined(__x86_64__)
template <class Table>
const Table& best(const Table& portable, const Table& avx2, const Table& avx512, const Table& vnni, const Table& bf16,
                  bool has_avx512) {
  if (level() >= Level::kAVX512 && has_avx512) {
    return level() == Level::kAVX512 ? avx512 : level() == Level::kAVX512VNNI ? vnni : bf16;
  }
  return level() >= Level::kAVX2 ? avx2 : portable;
}
#define NMK_BEST_OF(name, vnni, bf16, has_avx512) \
  best(name##_portable, name##_avx2, name##_avx512, name##_##vnni, name##_##bf16, has_avx512)
#else
#define NMK_BEST_OF(name, vnni, bf16, has_avx512) name##_portable
#endif
#define NMK_BEST_IF(name, has_avx512) NMK_BEST_OF(name, avx512, avx512, has_avx512)
#define NMK_BEST(name) NMK_BEST_OF(name, avx512, avx512, true)
#define NMK_BEST_OR_VNNI(name) NMK_BEST_OF(name, avx512_vnni, avx512_vnni, true)
#define NMK_BEST_OR_BF16(name) NMK_BEST_OF(name, avx512_vnni, avx512_bf16, true)

}  // namespace namedmask::cpu
