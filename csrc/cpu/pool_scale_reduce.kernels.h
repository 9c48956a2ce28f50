#include "cpu/epilogue.kernels.h"

// dgate = Σ e·x, and what else that read of dy and x can give
// Count: perhaps also how often x is the maximum, where there is an array for it.
template <class T, From F, bool Count>
struct Reduce {
  using A = Acc<T>;
  const T *x, *dy, *aux;
  T *kept, *dx;
  Act act;
  A slope;
  bool output, counts;

  template <class V>
  FA_INLINE void step(int64_t i, V gate, V max, V& total, V& count) const {
    if constexpr (is_vector<V>) {
      soon(x + i), soon(dy + i);
      if (kept) soon_written(kept + i);
      if (dx) soon_written(dx + i);
    }
    const V v = load<V>(x + i);
    const V e = gradient_at<V, F>(dy, aux, v, gate, i, act, set<V>(slope), output);
    total = total + e * v;
    if (Count && counts) count = count + select(v == max, set<V>(1), V{});
    if (kept) store<V>(kept + i, e);
    if (dx) store<V>(dx + i, e * gate);
  }
};

template <class T, From F, bool Count>
FA_INLINE void reduce_run(const Reduce<T, F, Count>& f, int64_t n, Acc<T> gate, Acc<T> max, Acc<T>* dgate,
                          Acc<T>* count) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  const V g = set<V>(gate), m = set<V>(max);
  V total[4] = {}, seen[4] = {};
  int64_t i = 0;
  double aside = 0;  // as in channel_pool.kernels.h
  for (;;) {
    const int64_t stop = std::min<int64_t>(n, i + 4096);
    for (; i + 4 * W <= stop; i += 4 * W) {
      FA_UNROLL
      for (int64_t j = 0; j < 4; ++j) f.template step<V>(i + j * W, g, m, total[j], seen[j]);
    }
    if (n - i < 4 * W) break;
    aside += sum((total[0] + total[1]) + (total[2] + total[3]));
    total[0] = total[1] = total[2] = total[3] = V{};
  }
  for (; i + W <= n; i += W) f.template step<V>(i, g, m, total[0], seen[0]);
  A rest = 0, rest_seen = 0;
  for (; i < n; ++i) f.template step<A>(i, gate, max, rest, rest_seen);
  *dgate = A(aside + (sum((total[0] + total[1]) + (total[2] + total[3])) + rest));
  if (Count && f.counts) *count = sum((seen[0] + seen[1]) + (seen[2] + seen[3])) + rest_seen;
}

// Four pixels at a time, so that the sums over C are loaded and stored once for them.
template <class T, From F, bool Count>
struct ReducePixels {
  using A = Acc<T>;
  Reduce<T, F, Count> at_pixel[4];
  int rows;
  const A *gate, *max;
  A *dgate, *count;

  template <class V>
  FA_INLINE void at(int64_t c) {
    const V g = get<V>(gate + c), m = Count && max ? get<V>(max + c) : V{};
    V total{}, seen{};
    for (int j = 0; j < rows; ++j) at_pixel[j].template step<V>(c, g, m, total, seen);
    put<V>(dgate + c, get<V>(dgate + c) + total);
    if (Count && max) put<V>(count + c, get<V>(count + c) + seen);
  }
};

template <class T, From F, bool Count>
void reduce_planes_as(const Epilogue<T>& in, const Map& kept, const Map& dx, Range rows, const Acc<T>* max,
                      Acc<T>* dgate, Acc<T>* count) {
  Place at(rows.begin, in.x.c);
  for (int64_t r = rows.begin; r < rows.end; ++r, at.next()) {
    const int64_t n = at.outer, c = at.inner;
    const Reduce<T, F, Count> f{in.x.template plane<const T>(n, c),
                                plane_of<T>(in.dy, n, c),
                                plane_of<T>(in.aux, n, c),
                                const_cast<T*>(plane_of<T>(kept, n, c)),
                                const_cast<T*>(plane_of<T>(dx, n, c)),
                                in.act,
                                in.slope,
                                from_output(in.act),
                                max != nullptr};
    reduce_run<T, F, Count>(f, in.x.s, in.gate[r], Count && max ? max[r] : Acc<T>(0), dgate + r,
                            Count && max ? count + r : nullptr);
  }
}

template <class T, From F, bool Count>
void reduce_pixels_as(const Epilogue<T>& in, const Map& kept, const Map& dx, int64_t n, Range s, const Acc<T>* max,
                      Acc<T>* dgate, Acc<T>* count) {
  const int64_t c = in.x.c;
  for (int64_t i = 0; i < c; ++i) {
    dgate[i] = 0;
    if (Count && max) count[i] = 0;
  }
  for (int64_t p = s.begin; p < s.end;) {
    ReducePixels<T, F, Count> f{};
    f.rows = int(std::min<int64_t>(4, s.end - p));
    for (int j = 0; j < f.rows; ++j)
      f.at_pixel[j] = {in.x.template pixel<const T>(n, p + j),
                       pixel_of<T>(in.dy, n, p + j),
                       pixel_of<T>(in.aux, n, p + j),
                       const_cast<T*>(pixel_of<T>(kept, n, p + j)),
                       const_cast<T*>(pixel_of<T>(dx, n, p + j)),
                       in.act,
                       in.slope,
                       from_output(in.act),
                       max != nullptr};
    f.gate = in.gate + n * c, f.max = Count && max ? max + n * c : nullptr, f.dgate = dgate, f.count = count;
    each<Acc<T>>(c, f);
    p += f.rows;
  }
}

// The two that networks have most, where they are compiled, and else the one for everything. max: null for no counts.
template <class T>
void reduce_planes(const Epilogue<T>& in, const Map& kept, const Map& dx, Range rows, const Acc<T>* max, Acc<T>* dgate,
                   Acc<T>* count) {
  if constexpr (has_fast<T>) {
    const From from = from_of(in);
    if (!max && from == From::dy) return reduce_planes_as<T, From::dy, false>(in, kept, dx, rows, max, dgate, count);
    if (!max && from == From::mask)
      return reduce_planes_as<T, From::mask, false>(in, kept, dx, rows, max, dgate, count);
  }
  reduce_planes_as<T, From::any, true>(in, kept, dx, rows, max, dgate, count);
}
template <class T>
void reduce_pixels(const Epilogue<T>& in, const Map& kept, const Map& dx, int64_t n, Range s, const Acc<T>* max,
                   Acc<T>* dgate, Acc<T>* count) {
  if constexpr (has_fast<T>) {
    const From from = from_of(in);
    if (!max && from == From::dy) return reduce_pixels_as<T, From::dy, false>(in, kept, dx, n, s, max, dgate, count);
    if (!max && from == From::mask)
      return reduce_pixels_as<T, From::mask, false>(in, kept, dx, n, s, max, dgate, count);
  }
  reduce_pixels_as<T, From::any, true>(in, kept, dx, n, s, max, dgate, count);
}

template <class T>
void count_planes(const Map& x, Range rows, const Acc<T>* max, Acc<T>* count) {
  using A = Acc<T>;
  using V = Vec<A>;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* p = x.plane<const T>(r / x.c, r % x.c);
    V seen{};
    A rest = 0;
    int64_t i = 0;
    for (; i + width<A> <= x.s; i += width<A>) seen = seen + select(load<V>(p + i) == set<V>(max[r]), set<V>(1), V{});
    for (; i < x.s; ++i) rest += load<A>(p + i) == max[r] ? A(1) : A(0);
    count[r] = sum(seen) + rest;
  }
}

template <class T>
struct CountPixel {
  using A = Acc<T>;
  const T* p;
  const A* max;
  A* count;
  template <class V>
  FA_INLINE void at(int64_t c) {
    put<V>(count + c, get<V>(count + c) + select(load<V>(p + c) == get<V>(max + c), set<V>(1), V{}));
  }
};
template <class T>
void count_pixels(const Map& x, Range samples, const Acc<T>* max, Acc<T>* count) {
  for (int64_t n = samples.begin; n < samples.end; ++n) {
    for (int64_t c = 0; c < x.c; ++c) count[n * x.c + c] = 0;
    for (int64_t s = 0; s < x.s; ++s) {
      CountPixel<T> f{x.pixel<const T>(n, s), max + n * x.c, count + n * x.c};
      each<Acc<T>>(x.c, f);
    }
  }
}
