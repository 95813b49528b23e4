// SPDX-License-Identifier: MIT
// Hash tables: of keys, and of the first item of every key, which does not depend on the order of threads.
#pragma once

#include "launch.h"

namespace namedmask::cuda {
namespace {

constexpr int32_t kNone = -1;

// The slot of `size` where the search for a key begins.
__device__ inline int32_t home_of(uint64_t key, int32_t size) {
  const unsigned scrambled = static_cast<unsigned>(key * 0x9e3779b97f4a7c15u >> 32);
  return static_cast<int32_t>(static_cast<uint64_t>(scrambled) * static_cast<unsigned>(size) >> 32);
}

constexpr uint64_t kNoKey = ~uint64_t{0};

// A slot holds a key or kNoKey. There must be more slots than keys.
struct KeyTable {
  uint64_t* keys;  // [size], in global or shared memory
  int32_t size;

  // Returns the slot of the key; *is_new = it was not in the table.
  __device__ int32_t insert(uint64_t key, bool* is_new) const {
    for (int32_t i = home_of(key, size);; i = i + 1 == size ? 0 : i + 1) {
      uint64_t held = *const_cast<volatile uint64_t*>(&keys[i]);
      if (held == kNoKey) {
        typedef unsigned long long Word;  // of atomicCAS
        held = atomicCAS(reinterpret_cast<Word*>(&keys[i]), static_cast<Word>(kNoKey), static_cast<Word>(key));
      }
      *is_new = held == kNoKey;
      if (*is_new || held == key) return i;
    }
  }

  // The slot of a key, or kNone.
  __device__ int32_t find(uint64_t key) const {
    for (int32_t i = home_of(key, size);; i = i + 1 == size ? 0 : i + 1) {
      if (keys[i] == key) return i;
      if (keys[i] == kNoKey) return kNone;
    }
  }
};

// A range of slots that is a separate table.
struct Region {
  int64_t begin;
  int32_t size;
};

// A slot holds kNone or an item; after all insertions, the first item of its key. A region must have more slots than
// keys; with twice as many, searches are short.
struct FirstTable {
  int32_t* slots;
  const int32_t* keys;  // of the items

  // Returns the slot of the item's key, relative to the region.
  __device__ int32_t insert(const Region& region, int32_t item) const {
    const int32_t key = keys[item];
    for (int32_t i = home_of(static_cast<uint64_t>(key), region.size);; i = i + 1 == region.size ? 0 : i + 1) {
      int32_t* const slot = &slots[region.begin + i];
      int32_t held = *const_cast<volatile int32_t*>(slot);
      if (held == kNone) held = atomicCAS(slot, kNone, item);
      if (held == kNone) return i;
      if (keys[held] != key) continue;
      if (item < held) atomicMin(slot, item);
      return i;
    }
  }

  // The first item of a key, or kNone.
  __device__ int32_t find(const Region& region, int32_t key) const {
    for (int32_t i = home_of(static_cast<uint64_t>(key), region.size);; i = i + 1 == region.size ? 0 : i + 1) {
      const int32_t held = slots[region.begin + i];
      if (held == kNone || keys[held] == key) return held;
    }
  }
};

}  // namespace
}  // namespace namedmask::cuda
