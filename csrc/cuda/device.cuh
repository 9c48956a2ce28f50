// What all kernels stand on: types, 16-byte accesses, row numbers without 64-bit divisions, launches.
//
// The same files compile in two ways: with nvcc, and with -DFA_HOST_EMU as C++ for tests/cuda_emu, which runs a
// kernel's threads on the CPU under any schedule and watches each access. So memory is reached through `load` and
// `store` only.
#pragma once

#ifdef FA_HOST_EMU
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#define FA_DEVICE __device__ __forceinline__

namespace fa::cuda {

#ifdef FA_HOST_EMU
using BFloat16 = emulation::BFloat16;
using Half = emulation::Half;
using Stream = emulation::Schedule;
#else
using BFloat16 = __nv_bfloat16;
using Half = __half;
using Stream = cudaStream_t;
#endif

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // per block, of every kernel
constexpr int kBlocks = 2;     // per multiprocessor at least; without a number ptxas 13 spills to make room for more
constexpr unsigned kAllLanes = 0xffffffffu;

// Sums, descriptors and gates: float64 for float64, else float32.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

FA_DEVICE float widen(float v) { return v; }
FA_DEVICE double widen(double v) { return v; }
FA_DEVICE float widen(BFloat16 v) { return __bfloat162float(v); }
FA_DEVICE float widen(Half v) { return __half2float(v); }

template <class T>
FA_DEVICE T narrow(Acc<T> v) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return __float2bfloat16_rn(v);
  else if constexpr (std::is_same_v<T, Half>)
    return __float2half_rn(v);
  else
    return v;
}

// ---- memory
// V elements that lie side by side: 16 bytes, or one element where a map doesn't start on 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};
template <class T>
constexpr int kWide = 16 / int(sizeof(T));
// What they are moved as: a struct of halves would go piece by piece, and for sm_80 two doubles in a uint4 in three.
template <class T>
using Moved = std::conditional_t<sizeof(T) == 8, ulonglong2, uint4>;

template <int V, class T>
FA_DEVICE Pack<T, V> load(const T* p) {
#ifdef FA_HOST_EMU
  emulation::touch(p, sizeof(T) * V, false);
#endif
  Pack<T, V> out;
  if constexpr (V == 1) {
    out.v[0] = *p;
  } else {
    static_assert(sizeof(T) * V == 16, "a wide access has 16 bytes");
    const Moved<T> raw = *reinterpret_cast<const Moved<T>*>(p);
    memcpy(&out, &raw, 16);
  }
  return out;
}

template <int V, class T>
FA_DEVICE void store(T* p, const Pack<T, V>& values) {
#ifdef FA_HOST_EMU
  emulation::touch(p, sizeof(T) * V, true);
#endif
  if constexpr (V == 1) {
    *p = values.v[0];
  } else {
    static_assert(sizeof(T) * V == 16, "a wide access has 16 bytes");
    Moved<T> raw;
    memcpy(&raw, &values, 16);
    *reinterpret_cast<Moved<T>*>(p) = raw;
  }
}

template <class T>
FA_DEVICE T load(const T* p) {
  return load<1>(p).v[0];
}
template <class T>
FA_DEVICE void store(T* p, T value) {
  store<1>(p, Pack<T, 1>{{value}});
}

// ---- rows
// n / d for n < 2^31 by a multiplication (Granlund & Montgomery, PLDI 1994, §4): a division costs twenty instructions,
// and every 16 bytes need one.
struct Divisor {
  uint32_t d = 1, factor = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : d(uint32_t(divisor)) {
    while ((uint64_t(1) << shift) < d) ++shift;
    factor = uint32_t((((uint64_t(1) << shift) - d) << 32) / d + 1);
  }
  FA_DEVICE uint32_t operator()(uint32_t n) const { return uint32_t((uint64_t(n) * factor >> 32) + n) >> shift; }
};

// A dense feature map: planes (N, C, S), or pixels (N, S, C).
struct Shape {
  int64_t n, c, s;
  bool pixels;

  int64_t total() const { return n * c * s; }
};

// It as N·per rows of `length` elements: planes are rows of S, C to a sample; pixels are rows of C, S to a sample.
struct Rows {
  int64_t total;
  uint32_t length, per;
  Divisor by_length, by_per;

  explicit Rows(const Shape& x)
      : total(x.total()),
        length(uint32_t(x.pixels ? x.c : x.s)),
        per(uint32_t(x.pixels ? x.s : x.c)),
        by_length(length),
        by_per(per) {
    // A place in a row and the steps of a block from there are 31 bits; a map may have any number of elements.
    if (std::max(x.c, x.s) > 1 << 30) throw std::length_error("fused_attn: more than 2^30 channels or pixels");
  }
};

// Where an element lies: its row, the row's number within its sample, its place in the row. Two 64-bit divisions for
// the first element of a block, none for the others.
struct Place {
  int64_t row, sample;
  uint32_t within, at;

  FA_DEVICE Place(const Rows& rows, int64_t element)
      : row(element / rows.length),
        sample(row / rows.per),
        within(uint32_t(row - sample * rows.per)),
        at(uint32_t(element - row * rows.length)) {}

  // The place `step` elements on; steps stay within a block's share.
  FA_DEVICE Place ahead(const Rows& rows, uint32_t step) const {
    Place p = *this;
    const uint32_t crossed = rows.by_length(at + step);
    p.at = at + step - crossed * rows.length;
    p.row += crossed;
    p.within += crossed;
    const uint32_t samples = rows.by_per(p.within);
    p.within -= samples * rows.per;
    p.sample += samples;
    return p;
  }
  FA_DEVICE void next(const Rows& rows) {
    if (++at < rows.length) return;
    at = 0;
    ++row;
    if (++within < rows.per) return;
    within = 0;
    ++sample;
  }
};

// ---- shuffles
// The values of all lanes of a group of `lanes`, a power of two, are brought together in a fixed order.
template <class A>
FA_DEVICE A sum_of_lanes(A v, int lanes) {
  for (int o = lanes / 2; o > 0; o /= 2) v += __shfl_xor_sync(kAllLanes, v, o);
  return v;
}

// ---- launches
inline int64_t blocks_for(int64_t work, int64_t per_block) { return (work + per_block - 1) / per_block; }
inline bool is_wide(std::initializer_list<const void*> maps) {
  return std::all_of(maps.begin(), maps.end(), [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// f(std::integral_constant<int, V>) with the elements per access that all maps allow.
template <class T, class F>
void by_width(std::initializer_list<const void*> maps, const F& f) {
  if (is_wide(maps))
    f(std::integral_constant<int, kWide<T>>{});
  else
    f(std::integral_constant<int, 1>{});
}

#ifdef FA_HOST_EMU
using emulation::launch;
#else
template <class... P, class... A>
void launch(Stream stream, void (*kernel)(P...), int64_t blocks, size_t shared, const A&... args) {
  if (blocks == 0) return;  // an empty batch
  if (blocks > 0x7fffffff) throw std::runtime_error("fused_attn: map too large for one launch");
  kernel<<<unsigned(blocks), kThreads, shared, stream>>>(P(args)...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("fused_attn: launch: ") + cudaGetErrorString(error));
}
#endif

}  // namespace fa::cuda

// Shared memory of a block. FA_SHARED is of a fixed size, FA_DYNAMIC_SHARED what the launch asked for.
#ifndef FA_HOST_EMU
#define FA_SHARED(type, name, count) __shared__ type name[count]
#define FA_DYNAMIC_SHARED(type, name)                         \
  extern __shared__ __align__(16) unsigned char fa_dynamic[]; \
  type* const name = reinterpret_cast<type*>(fa_dynamic)
#endif
