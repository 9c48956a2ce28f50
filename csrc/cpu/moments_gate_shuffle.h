// What the kernels of moments_gate_shuffle share with the code that calls them.
#pragma once

#include "stages.h"

namespace fa {

// Of one sample, arrays over C.
template <class A>
struct SelfValues {
  const A *mean, *scale, *shift, *steep, *offset, *tilt, *level;
};

template <class T>
struct SelfGate {
  using A = Acc<T>;
  Map x, dy, aux, y;  // y: what is written, of a pass that only sums e, or nothing
  const A *mean, *scale, *shift, *steep, *offset, *tilt, *level;  // over (n, c)
  int64_t k;
  Act act;
  A slope;

  bool second(int64_t c) const { return c % (2 * k) >= k; }
  SelfValues<A> values(int64_t n) const {
    const int64_t at = n * x.c;
    return {mean + at, scale + at, shift + at, steep + at, offset + at, tilt + at, level + at};
  }
};

}  // namespace fa
