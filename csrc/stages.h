// The stages, as ops call them: what the files in cpu/ lend to one another.
//
// Each walks the samples [n0, n1) of a feature map, over torch's thread pool; arrays over (n, c) are dense and start at
// sample 0. Work is cut by shape and never by thread, so the bits of a result don't depend on the number of threads.
#pragma once

#include "common.h"

namespace fa {

struct Range {
  int64_t begin, end;
};

// Pixels are cut into runs, whose sums are added in order: about 32k elements, so that a run is worth a thread, and at
// most 512 pixels, so that a float32 sum over a large map loses no more than one over its planes.
inline int64_t pixels_per_run(int64_t c) { return std::clamp<int64_t>(32768 / c, 16, 512); }

// Whether writing `out` should go past the caches: measured on a Xeon (2 MiB L2), with the next reader of it included,
// a pass over 12 MB or more is 10 % faster so, and one of 6 MB 5 % slower. Every run must start on a cache line.
// together: how many maps of this size the pass writes.
template <class T>
bool streams(const Map& out, int64_t together = 1) {
  const int64_t size = sizeof(T), step = (out.pixels ? out.ss : out.sc) * size;
  return out.n * out.c * out.s * size * together >= (8 << 20) && reinterpret_cast<uintptr_t>(out.data) % 64 == 0 &&
         out.sn * size % 64 == 0 && step % 64 == 0;
}

// The sums of a sample's runs (runs, c), added in order and in double.
template <class A>
void add_runs(const A* sums, int64_t runs, int64_t c, A* out) {
  const auto whole = scratch<double>(c);
  for (int64_t k = 0; k < c; ++k) whole[k] = sums[k];
  for (int64_t j = 1; j < runs; ++j)
    for (int64_t k = 0; k < c; ++k) whole[k] += sums[j * c + k];
  for (int64_t k = 0; k < c; ++k) out[k] = A(whole[k]);
}

// Counts (outer, inner) pairs from a flat number on: two divisions for a range, and not for every run of 49 elements in
// it.
struct Place {
  Place(int64_t flat, int64_t size) : outer(flat / size), inner(flat % size), size(size) {}
  void next() {
    if (++inner == size) inner = 0, ++outer;
  }
  int64_t outer, inner, size;
};

// Which code an epilogue needs: nothing, the one that nearly all networks have, or a switch per vector.
enum class Epi { identity, relu, other };

// Where e = dy·act'(v) comes from.
enum class From {
  dy,    // no activation: e is dy
  mask,  // relu with its output kept: e is dy where the output is positive
  any,   // the rest, and no dy at all: by a switch per vector
};

// What else the pooled gradient adds to dx besides a constant per plane.
enum class Back { add, share, any };

enum class Pool { mean, max, mean_max, mean_abs, mean_var };
Pool pool_of(const std::string& name);
// Whether ties are split; complains about another rule than "split" and "first".
bool splits(const std::string& ties);
// Whether there are two descriptors.
constexpr bool is_pair(Pool pool) { return pool == Pool::mean_max || pool == Pool::mean_var; }
constexpr bool has_max(Pool pool) { return pool == Pool::max || pool == Pool::mean_max; }

// mean[n, c] (of |x| for mean_abs), max[n, c], index[n, c] of the first maximum; a null pointer where it isn't wanted.
template <class T>
void pool(const Map& x, Range samples, Pool kind, Acc<T>* mean, Acc<T>* max, int64_t* index);

// Mean and variance (of S, not S − 1) of every plane, in one read.
template <class T>
void moments(const Map& x, Range samples, Acc<T>* mean, Acc<T>* var);

// y = act(x·gate + residual).
template <class T>
void scale(const Map& x, const Map& residual, const Map& y, Range samples, const Acc<T>* gate, Act act, double slope);

// What a backward knows of the epilogue: e = dy·act'(v), v = x·gate (+ residual). aux is the output, the residual or
// absent.
template <class T>
struct Epilogue {
  Map x, dy, aux;  // without data in dy, e is 0: the pooled gradient alone
  const Acc<T>* gate;
  Act act;
  Acc<T> slope;
};

template <class T>
From from_of(const Epilogue<T>& in) {
  if (!in.dy.data) return From::any;
  if (in.act == Act::identity) return From::dy;
  if (in.act == Act::relu && in.aux.data) return From::mask;
  return From::any;
}

// dgate = Σ_s e·x; writes e where `kept` has data; counts how often x equals max where `count` isn't null.
// With dx, also writes dx = e·gate: the whole backward of `scale` in one pass.
template <class T>
void reduce(const Epilogue<T>& in, const Map& kept, const Map& dx, Range samples, const Acc<T>* max, Acc<T>* dgate,
            Acc<T>* count);

// How often x equals max, per (n, c).
template <class T>
void count_max(const Map& x, Range samples, const Acc<T>* max, Acc<T>* count);

// The pooled gradient, spread over a plane: dx = e·gate + add + share·[x = max] + sign·sign(x) + first·[s = index]
// + slope·(x − centre).
template <class A>
struct Spread {
  const A* add = nullptr;     // the mean's: dmean / S
  const A* share = nullptr;   // the maximum's, divided among ties: dmax / count
  const A* max = nullptr;     // where it is
  const A* sign = nullptr;    // the mean of |x|'s
  const A* slope = nullptr;   // the variance's: 2·dvar / S
  const A* centre = nullptr;  // the mean
  const A* first = nullptr;   // the maximum's, all of it
  const int64_t* index = nullptr;
};
template <class T>
void apply(const Epilogue<T>& in, const Map& dx, Range samples, const Spread<Acc<T>>& back);

}  // namespace fa
