// Compiles the kernels in FA_KERNELS once per instruction set, and picks one when the library runs.
//
// An op's file defines FA_KERNELS as the name of a header with its kernels, then includes this file. The header is read
// once for each instruction set below, inside a namespace of that name, with simd.h before it; FA_CALL(f, (types), …)
// then calls the best one this processor has. The kernels have internal linkage, so that no code for one processor can
// leak into another's. A target is set by pragma and not by a compiler flag: standard headers stay compiled for the
// portable baseline.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FA_X86 1
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 headers: gcc.gnu.org/PR105593
#pragma GCC diagnostic ignored "-Wuninitialized"        // the same
#endif

#define FA_ISA base
#define FA_BYTES 16
#include "simd.h"
#include FA_KERNELS
#include "simd_end.h"

#ifdef FA_X86

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,prfchw")
#define FA_ISA avx2
#define FA_BYTES 32
#include "simd.h"
#include FA_KERNELS
#include "simd_end.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,prfchw,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define FA_ISA avx512
#define FA_BYTES 64
#include "simd.h"
#include FA_KERNELS
#include "simd_end.h"
#pragma GCC pop_options

// Not AVX-512 for float64, which is for checking: it would take a tenth of all compilation, and makes only a sigmoid
// per element faster, by 15 %.
#define FA_CALL(function, types, ...)                                                        \
  [&] {                                                                                      \
    if constexpr (!std::is_same_v<FA_FIRST types, double>)                                   \
      if (::fa::isa_level() == 2) return ::fa::avx512::function FA_ANGLE types(__VA_ARGS__); \
    return ::fa::isa_level() ? ::fa::avx2::function FA_ANGLE types(__VA_ARGS__)              \
                             : ::fa::base::function FA_ANGLE types(__VA_ARGS__);             \
  }()
#else
#define FA_CALL(function, types, ...) ::fa::base::function FA_ANGLE types(__VA_ARGS__)
#endif
#define FA_ANGLE(...) <__VA_ARGS__>
#define FA_FIRST(...) FA_FIRST_OF(__VA_ARGS__, )
#define FA_FIRST_OF(first, ...) first
