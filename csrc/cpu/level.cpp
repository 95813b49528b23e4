// SPDX-License-Identifier: MIT
#include "level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace namedmask::cpu {
namespace {

constexpr Level kLevels[] = {Level::kPortable, Level::kAVX2, Level::kAVX512, Level::kAVX512VNNI, Level::kAVX512BF16};

Level highest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512vnni")) return Level::kAVX512;
    return __builtin_cpu_supports("avx512bf16") ? Level::kAVX512BF16 : Level::kAVX512VNNI;
  }
  if (avx2) return Level::kAVX2;
#endif
  return Level::kPortable;
}

bool has_fast_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Level choose() {
  const Level best = highest();
  const char* asked = std::getenv("NMK_LEVEL");
  if (asked == nullptr || *asked == '\0') {
    return best == Level::kAVX512BF16 && !has_fast_bfloat16() ? Level::kAVX512VNNI : best;
  }
  for (Level level : kLevels) {
    if (std::string(asked) != name(level)) continue;
    if (level <= best) return level;
    throw std::invalid_argument(std::string("NMK_LEVEL=") + asked + ": the highest level of this CPU is " + name(best));
  }
  throw std::invalid_argument(std::string("NMK_LEVEL=") + asked +
                              ": must be portable, avx2, avx512, avx512_vnni or avx512_bf16");
}

}  // namespace

Level level() {
  static const Level chosen = choose();
  return chosen;
}

const char* name(Level level) {
  switch (level) {
    case Level::kPortable: return "portable";
    case Level::kAVX2: return "avx2";
    case Level::kAVX512: return "avx512";
    case Level::kAVX512VNNI: return "avx512_vnni";
    case Level::kAVX512BF16: return "avx512_bf16";
  }
  return "unknown";
}

}  // namespace namedmask::cpu
