// What channel_moments' kernels share with the code that calls them.
#pragma once

#include "stages.h"

namespace fa {

// Where it writes: arrays over planes; null pointers for the extrema where they aren't wanted.
template <class A>
struct Described {
  A *mean, *m2, *most, *least;
  int64_t *most_at, *least_at;
};

// What a run of pixels leaves, in arrays over C.
template <class A>
struct PixelRun {
  using I = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
  A *mean, *m2, *total, *most, *least;
  I *most_at, *least_at;
};

// All runs of all samples, in one array of numbers and one of places.
template <class A>
struct PixelRuns {
  using I = typename PixelRun<A>::I;
  A* numbers;
  I* places;
  int64_t c;
  bool ends;

  static int64_t per_channel(bool ends) { return ends ? 5 : 3; }
  PixelRun<A> at(int64_t run) const {
    A* p = numbers + run * c * per_channel(ends);
    I* w = ends ? places + run * c * 2 : nullptr;
    return {p, p + c, p + 2 * c, p + 3 * c, p + 4 * c, w, w + c};
  }
};

}  // namespace fa
