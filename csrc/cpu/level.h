// SPDX-License-Identifier: MIT
// The instruction level that the CPU kernels run at.
//
// A kernel that gains from SIMD has one file per level, NAME_portable.cpp, NAME_avx2.cpp, NAME_avx512.cpp, all
// including the same NAME_kernel.h, and NAME.cpp picks by level(). Files of a level are compiled with its flags, so
// what they instantiate must never be shared with the others: the linker keeps one copy of an inline function, and if
// it is the AVX-512 one, the program dies on older CPUs. Hence in a kernel header: raw pointers, an anonymous
// namespace, nothing of the standard library but what is a macro, a type or a builtin.
#pragma once

namespace namedmask::cpu {

// AVX512VNNI is AVX-512 with products of bytes and 16-bit integers; a kernel without a file for it runs its AVX-512
// one. Where a kernel's AVX-512 file wants more than all such CPUs have (see CMakeLists.txt), these run its AVX2 one.
enum class Level { kPortable, kAVX2, kAVX512, kAVX512VNNI };

// The highest level that this CPU has and this build contains, found once. The environment variable NMK_LEVEL
// (portable, avx2, avx512, avx512_vnni) asks for another; std::invalid_argument when it names none or one that cannot
// run here.
Level level();

const char* name(Level level);

}  // namespace namedmask::cpu
