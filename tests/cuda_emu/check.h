// The emulated kernels against the same equations in float64: what every check needs.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "excite.cuh"

namespace check {

using namespace fa::cuda;
using emulation::Device;
using emulation::memory;

// What the command line asked for.
struct Options {
  std::string group = "all";
  unsigned first = 0, last = 1;  // seeds
  bool slow = false;
};
inline Options& options() {
  static Options all;
  return all;
}

inline int failures = 0;
inline int64_t checks = 0;

inline void complain(const std::string& where, const std::string& what) {
  if (++failures <= 20) std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
}

template <class T>
const char* name_of() {
  return std::is_same_v<T, float>    ? "float32"
         : std::is_same_v<T, double> ? "float64"
         : std::is_same_v<T, Half>   ? "float16"
                                     : "bfloat16";
}

// The spacing of T's numbers at 1, and what its arithmetic may lose beside that, per unit of the terms' size.
template <class T>
constexpr double epsilon = std::is_same_v<T, double>  ? 2.2e-16
                           : std::is_same_v<T, float> ? 1.2e-7
                           : std::is_same_v<T, Half>  ? 9.8e-4
                                                      : 7.9e-3;
template <class T>
constexpr double slack = std::is_same_v<T, double> ? 2e-14 : 4e-6;
// Half's numbers below 2^-14 lie this far apart.
template <class T>
constexpr double least = std::is_same_v<T, Half> ? 6e-8 : 0;

// One launch sequence that is being checked.
struct Run {
  std::string what;
  int bad = 0;

  // size: of the terms that were added; rounded: of a term that was rounded to T on the way.
  template <class T>
  void near(const char* name, int64_t i, T got, double want, double size, double rounded = 0) {
    ++checks;
    const double g = double(got);
    const bool fine = std::isnan(want)   ? std::isnan(g)
                      : std::isinf(want) ? g == want
                                         : std::abs(g - want) <= epsilon<T> * (std::abs(want) + rounded) +
                                                                     slack<Acc<T>> * size + least<T>;
    if (fine || bad++) return;
    complain(what, std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(g) + ", not " +
                       std::to_string(want));
  }
  void same(const char* name, int64_t got, int64_t want) {
    ++checks;
    if (got != want) complain(what, std::string(name) + " is " + std::to_string(got) + ", not " + std::to_string(want));
  }
  void at_most(const char* name, int64_t got, int64_t limit) {
    ++checks;
    if (got > limit)
      complain(what, std::string(name) + " is " + std::to_string(got) + ", more than " + std::to_string(limit));
  }

  // Runs f, and asserts how many elements of maps it reads and writes.
  template <class F>
  void counted(int64_t bytes_of_a_map, int64_t reads, int64_t writes, int64_t narrow, const F& f) {
    auto& m = memory();
    m.read = m.written = m.narrow = 0;
    try {
      f();
    } catch (const emulation::Defect& defect) {
      complain(what, defect.what());
      bad = 1;
      return;
    }
    same("bytes of maps read", m.read, reads * bytes_of_a_map);
    same("bytes of maps written", m.written, writes * bytes_of_a_map);
    if (narrow >= 0) at_most("accesses of less than 16 bytes", m.narrow, narrow);
  }
};

inline std::mt19937& numbers() {
  static std::mt19937 source(17);
  return source;
}
template <class T>
void fill(Device<T>& d, double spread = 1, double centre = 0) {
  std::normal_distribution<double> normal(centre, spread);
  for (int64_t i = 0; i < d.size(); ++i) d[i] = T(float(normal(numbers())));
}

// The flat position of (n, c, s).
inline int64_t at(const Shape& x, int64_t n, int64_t c, int64_t s) {
  return x.pixels ? (n * x.s + s) * x.c + c : (n * x.c + c) * x.s + s;
}
inline std::string text(const Shape& x) {
  return std::to_string(x.n) + "x" + std::to_string(x.c) + "x" + std::to_string(x.s) +
         (x.pixels ? " pixels" : " planes");
}

// act once more, from its definition.
template <class R>
R value(Act act, R v, double slope) {
  const R zero = 0, one = 1, six = 6;
  switch (act) {
    case Act::relu:
      return v <= 0 ? zero : v;
    case Act::relu6:
      return v <= 0 ? zero : v >= 6 ? six : v;
    case Act::leaky_relu:
      return v > 0 ? v : R(slope) * v;
    case Act::silu:
      return v / (1 + std::exp(-v));
    case Act::gelu:
      return v / 2 * std::erfc(-v / std::sqrt(R(2)));
    case Act::hardswish:
      return v * std::min(std::max(v + 3, zero), six) / 6;
    case Act::sigmoid:
      return 1 / (1 + std::exp(-v));
    case Act::hard_sigmoid:
      return std::min(std::max(v + 3, zero), six) / 6;
    case Act::clamp:
      return std::min(std::max(v, zero), one);
    default:
      return v;
  }
}
// act': by differences of fourth order in 80 bits where it is smooth (error 1e-15), so that no formula of the kernels
// is repeated; by cases where it has kinks.
inline double slope_at(Act act, double v, double slope) {
  switch (act) {
    case Act::identity:
      return 1;
    case Act::relu:
      return v > 0;
    case Act::relu6:
      return v > 0 && v < 6;
    case Act::leaky_relu:
      return v > 0 ? 1 : slope;
    case Act::hardswish:
      return v <= -3 ? 0 : v >= 3 ? 1 : v / 3 + 0.5;
    case Act::hard_sigmoid:
      return v > -3 && v < 3 ? 1.0 / 6 : 0;
    case Act::clamp:
      return v >= 0 && v <= 1;
    default:
      break;
  }
  const long double h = 3e-4L, x = v;
  const auto f = [&](long double at) { return value<long double>(act, at, slope); };
  return double((8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h));
}

// f(T{}) for every dtype that is compiled in: all four take a compiler a minute.
#ifndef CHECK_DTYPES
#define CHECK_DTYPES 4
#endif
template <class F>
void for_dtypes(const F& f) {
  f(float{});
  if constexpr (CHECK_DTYPES >= 2) f(BFloat16{});
  if constexpr (CHECK_DTYPES >= 4) f(double{}), f(Half{});
}

void pools();
void scales();
void gradients();
void excitations();
void far();
void emulator();

}  // namespace check
