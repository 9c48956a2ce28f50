// Sums over the places of every channel: pooling, and the gradient of a gate. One read of each map; no atomics, so that
// the bits are the same in every run.
//
//   mean[n, c] = 1/S Σ_s x,  1/S Σ_s |x|,  max_s x with the place of the first         PoolSource
//   dgate[n, c] = Σ_s e·x,   e = dy·act'(v), written where somebody reads it again     GradientSource
//
// Planes are short or long. A block takes as many short planes as end on 16 bytes together, lays their values out in
// shared memory and sums each from there: 16-byte accesses at every S. A long plane is a warp's, or several warps',
// which walk it from its first 16-byte boundary. In pixels a thread sums the channels of 16 bytes over a run of pixels.
// Where a channel has several runs, `gather` adds them in order.
#pragma once

#include <climits>
#include <cmath>

#include "activations.cuh"

namespace fa::cuda {

// What is known of a channel so far. NaN is larger than everything, and of equals the first counts.
template <class A, bool Largest>
struct Tally {
  A sum = 0, max = -INFINITY;
  int at = INT_MAX;

  FA_DEVICE void add(A v, int place) {
    sum += v;
    if (Largest) raise(v, place);
  }
  FA_DEVICE void add(const Tally& other) {
    sum += other.sum;
    if (Largest) raise(other.max, other.at);
  }
  FA_DEVICE void raise(A v, int place) {
    const bool nan = v != v, had = max != max;
    const bool larger = nan ? !had || place < at : !had && (v > max || (v == max && place < at));
    if (larger) max = v, at = place;
  }
  // All of `lanes` lanes have what each of them had.
  FA_DEVICE void join(int lanes) {
    for (int o = lanes / 2; o > 0; o /= 2) {
      Tally other;
      other.sum = __shfl_xor_sync(kAllLanes, sum, o);
      if (Largest) {
        other.max = __shfl_xor_sync(kAllLanes, max, o);
        other.at = __shfl_xor_sync(kAllLanes, at, o);
      }
      add(other);
    }
  }
};

// Where tallies go: what isn't wanted is null. count: what the sum is divided by.
template <class A>
struct Results {
  A *sum = nullptr, *max = nullptr;
  int64_t* index = nullptr;
  A count = 1;

  template <bool Largest>
  FA_DEVICE void put(int64_t i, const Tally<A, Largest>& t) const {
    if (sum) store(sum + i, t.sum / count);
    if (Largest && max) store(max + i, t.max);
    if (Largest && index) store(index + i, int64_t(t.at));
  }
};

// ---- what is summed. `channel(j)` is the number n·C + c of the j-th element from e on.
template <class T, bool Max>
struct PoolSource {
  static constexpr bool largest = Max;
  static constexpr int ahead = 4;  // wide accesses of a thread that are under way at once
  const T* x;
  bool absolute;

  template <int V, class C>
  FA_DEVICE void values(int64_t e, const C&, Acc<T> (&out)[V]) const {
    const Pack<T, V> in = load<V>(x + e);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Acc<T> v = widen(in.v[j]);
      out[j] = absolute && v < 0 ? -v : v;
    }
  }
};

// aux: the output where act' is read off it, else the residual; absent without a residual.
template <class T, bool Plain>
struct GradientSource {
  static constexpr bool largest = false;
  static constexpr int ahead = Plain ? 4 : 1;
  const T *x, *dy, *aux;
  const Acc<T>* gate;
  T *kept, *dx;  // e, and e·gate; null where nobody wants them
  Act act;
  Acc<T> slope;
  bool output;  // aux is y

  template <int V, class C>
  FA_DEVICE void values(int64_t e, const C& channel, Acc<T> (&out)[V]) const {
    using A = Acc<T>;
    const Pack<T, V> in = load<V>(x + e), grad = load<V>(dy + e);
    Pack<T, V> behind = grad, g, back;
    if (aux) behind = load<V>(aux + e);
    const bool gated = dx || (act != Act::identity && !output);
    A d[V], v[V], f[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      f[j] = gated ? load(gate + channel(j)) : A(0);
      d[j] = widen(grad.v[j]);
      v[j] = widen(in.v[j]) * f[j];
      if (aux) v[j] = output ? widen(behind.v[j]) : v[j] + widen(behind.v[j]);
    }
    through_all<Plain>(act, d, v, slope);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      g.v[j] = narrow<T>(d[j]);
      back.v[j] = narrow<T>(d[j] * f[j]);
      out[j] = d[j] * widen(in.v[j]);
    }
    if (kept) store<V>(kept + e, g);
    if (dx) store<V>(dx + e, back);
  }
};

// ---- short planes: a block has `group` of them
constexpr int kShort = 256;       // at most this long: kStage holds as many as have their end on 16 bytes
constexpr int kStage = 4096;      // elements of a block
constexpr int kDirectRun = 8192;  // elements of a long plane that a warp takes

template <class T, int V, class Source>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_short_kernel(const Source source, const Rows rows, const Results<Acc<T>> out, const int group,
                     const int lanes) {
  using A = Acc<T>;
  FA_DYNAMIC_SHARED(A, stage);
  const int length = int(rows.length), tid = int(threadIdx.x);
  const int64_t row = int64_t(blockIdx.x) * group, first = row * length, left = rows.total - first;
  const int size = int(left < group * length ? left : group * length);
  for (int i = tid * V; i < size; i += kThreads * V) {
    if (i + V <= size) {
      A v[V];
      source.template values<V>(first + i, [&](int j) { return row + rows.by_length(i + j); }, v);
#pragma unroll
      for (int j = 0; j < V; ++j) stage[i + j] = v[j];
    } else {  // the end of the map
      for (int k = i; k < size; ++k) {
        A v[1];
        source.template values<1>(first + k, [&](int) { return row + rows.by_length(k); }, v);
        stage[k] = v[0];
      }
    }
  }
  __syncthreads();
  const int count = size / length;
  for (int r = tid / lanes; r - tid / lanes < count;
       r += kThreads / lanes) {  // as often in every thread: lanes shuffle
    Tally<A, Source::largest> t;
    if (r < count)
      for (int i = tid % lanes; i < length; i += lanes) t.add(stage[r * length + i], i);
    t.join(lanes);
    if (r < count && tid % lanes == 0) out.put(row + r, t);
  }
}

// ---- long planes: a warp has a run of one; out has `runs` tallies for a row
template <class T, int V, class Source>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_long_kernel(const Source source, const Rows rows, const Results<Acc<T>> out, const int runs) {
  using A = Acc<T>;
  const int64_t count = rows.total / rows.length * runs;
  const int64_t unit = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (unit >= count) return;
  const int64_t row = unit / runs, start = row * rows.length;
  const int from = int(unit - row * runs) * kDirectRun, length = int(rows.length);
  const int to = length - from < kDirectRun ? length : from + kDirectRun, lane = int(threadIdx.x) % kWarp;
  const auto channel = [&](int) { return row; };
  Tally<A, Source::largest> t;
  const auto one = [&](int i) {
    A v[1];
    source.template values<1>(start + i, channel, v);
    t.add(v[0], i);
  };
  // [from, head) and [tail, to) lie beside the wide accesses.
  int head = from + int((V - (start + from) % V) % V);
  if (head > to) head = to;
  const int tail = head + (to - head) / V * V;
  if (from + lane < head) one(from + lane);
#pragma unroll(Source::ahead)
  for (int i = head + lane * V; i < tail; i += kWarp * V) {
    A v[V];
    source.template values<V>(start + i, channel, v);
#pragma unroll
    for (int j = 0; j < V; ++j) t.add(v[j], i + j);
  }
  if (tail + lane < to) one(tail + lane);
  t.join(kWarp);
  if (lane == 0) out.put(unit, t);
}

// ---- pixels: a block has a run of pixels of one sample, and `columns` threads beside each other in a pixel
template <class T, int V, class Source>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_pixels_kernel(const Source source, const Rows rows, const Results<Acc<T>> out, const int runs, const int run,
                      const int columns) {
  using A = Acc<T>;
  constexpr bool largest = Source::largest;
  FA_SHARED(A, sums, kThreads * V);
  FA_SHARED(A, maxima, largest ? kThreads * V : 1);
  FA_SHARED(int, places, largest ? kThreads * V : 1);
  const int channels = int(rows.length), pixels = int(rows.per), tid = int(threadIdx.x);
  const int width = columns * V, tiles = (channels + width - 1) / width;
  const int tile = int(blockIdx.x % unsigned(tiles));
  const int64_t which = blockIdx.x / unsigned(tiles), sample = which / runs;
  const int from = int(which - sample * runs) * run, to = pixels - from < run ? pixels : from + run;
  const int c = tile * width + tid % columns * V, step = kThreads / columns;
  Tally<A, largest> t[V];
  if (c < channels) {
#pragma unroll(Source::ahead)
    for (int s = from + tid / columns; s < to; s += step) {
      A v[V];
      source.template values<V>((sample * pixels + s) * channels + c, [&](int j) { return sample * channels + c + j; },
                                v);
#pragma unroll
      for (int j = 0; j < V; ++j) t[j].add(v[j], s);
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    sums[tid * V + j] = t[j].sum;
    if (largest) maxima[tid * V + j] = t[j].max, places[tid * V + j] = t[j].at;
  }
  __syncthreads();
  for (int k = tid; k < width; k += kThreads) {
    if (tile * width + k >= channels) continue;
    Tally<A, largest> whole;
    for (int i = 0; i < step; ++i) {
      Tally<A, largest> part;
      part.sum = sums[i * width + k];
      if (largest) part.max = maxima[i * width + k], part.at = places[i * width + k];
      whole.add(part);
    }
    out.put(which * channels + tile * width + k, whole);
  }
}

// ---- several runs of a channel: added in order, and in double, which so few additions can afford
template <class A, bool Largest>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gather_kernel(const Results<A> parts, const Results<A> out, const int64_t count, const int runs, const int channels,
                  const bool pixels) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t first = pixels ? i / channels * runs * channels + i % channels : i * runs;
  const int64_t step = pixels ? channels : 1;
  Tally<A, Largest> whole;
  double sum = 0;
  for (int k = 0; k < runs; ++k) {
    sum += load(parts.sum + first + k * step);
    if (Largest) whole.raise(load(parts.max + first + k * step), int(load(parts.index + first + k * step)));
  }
  whole.sum = A(sum);
  out.put(i, whole);
}

// ---- the launches
inline int pixels_per_run(int64_t c) { return int(std::clamp<int64_t>(32768 / c, 16, 512)); }

// How many runs each channel of a map is summed in: by shape alone.
inline int runs_of(const Shape& x) {
  return int(x.pixels ? blocks_for(x.s, pixels_per_run(x.c)) : x.s <= kShort ? 1 : blocks_for(x.s, kDirectRun));
}
// Scratch memory for them, in values of Acc and in indices.
inline int64_t workspace_of(const Shape& x) { return runs_of(x) > 1 ? x.n * x.c * runs_of(x) : 0; }

// work: 2·workspace_of(shape) values where Source::largest, else workspace_of; places as many as workspace_of.
template <class T, class Source>
void sums(Stream stream, const Shape& shape, const Source& source, std::initializer_list<const void*> maps,
          const Results<Acc<T>>& results, Acc<T>* work, int64_t* places) {
  using A = Acc<T>;
  const Rows rows(shape);
  const int runs = runs_of(shape);
  Results<A> out = results;
  if (runs > 1) {
    out.sum = work;
    out.max = Source::largest ? work + workspace_of(shape) : nullptr;
    out.index = Source::largest ? places : nullptr;
    out.count = 1;
  }
  const auto with_width = [&](auto width) {
    constexpr int V = decltype(width)::value;
    if (shape.pixels) {
      int columns = 1;
      while (columns < kWarp && columns * V < shape.c) columns *= 2;
      const int64_t blocks = shape.n * runs * blocks_for(shape.c, columns * V);
      launch(stream, sum_pixels_kernel<T, V, Source>, blocks, 0, source, rows, out, runs, pixels_per_run(shape.c),
             columns);
    } else if (shape.s <= kShort) {
      const int length = int(shape.s), group = kStage / length / V * V;
      int lanes = 1;
      while (lanes < kWarp && 2 * lanes * group <= kThreads) lanes *= 2;
      launch(stream, sum_short_kernel<T, V, Source>, blocks_for(shape.n * shape.c, group),
             size_t(group) * length * sizeof(A), source, rows, out, group, lanes);
    } else {
      launch(stream, sum_long_kernel<T, V, Source>, blocks_for(shape.n * shape.c * runs, kThreads / kWarp), 0, source,
             rows, out, runs);
    }
  };
  // A pixel starts on 16 bytes where C is a multiple of them.
  if (shape.pixels && shape.c % kWide<T> != 0)
    with_width(std::integral_constant<int, 1>{});
  else
    by_width<T>(maps, with_width);
  if (runs > 1)
    launch(stream, gather_kernel<A, Source::largest>, blocks_for(shape.n * shape.c, kThreads), 0, out, results,
           shape.n * shape.c, runs, int(shape.c), shape.pixels);
}

enum class Pool { mean, max, mean_max, mean_abs };

// mean (of |x| for mean_abs), max, index of the first maximum, each (N, C); null where it isn't wanted.
template <class T>
void pool(Stream stream, const Shape& shape, Pool kind, const T* x, Acc<T>* mean, Acc<T>* max, int64_t* index,
          Acc<T>* work, int64_t* places) {
  const Results<Acc<T>> out{mean, max, index, Acc<T>(shape.s)};
  if (kind == Pool::mean || kind == Pool::mean_abs)
    sums<T>(stream, shape, PoolSource<T, false>{x, kind == Pool::mean_abs}, {x}, out, work, places);
  else
    sums<T>(stream, shape, PoolSource<T, true>{x, false}, {x}, out, work, places);
}

// dgate (N, C); e into `kept` and e·gate into dx, where they aren't null.
template <class T>
void gate_gradient(Stream stream, const Shape& shape, const T* x, const T* dy, const T* aux, const Acc<T>* gate,
                   Act act, double slope, T* kept, T* dx, Acc<T>* dgate, Acc<T>* work) {
  if (act == Act::identity) aux = nullptr;
  const auto with = [&](auto plain) {
    const GradientSource<T, decltype(plain)::value> source{
        x, dy, aux, gate, kept, dx, act, Acc<T>(slope), aux && from_output(act)};
    sums<T>(stream, shape, source, {x, dy, aux, kept, dx}, {dgate, nullptr, nullptr, Acc<T>(1)}, work, nullptr);
  };
  if (is_plain(act))
    with(std::true_type{});
  else
    with(std::false_type{});
}

}  // namespace fa::cuda
