#include "cpu/statistics.kernels.h"

// Running sum and maximum of one channel, V lanes at a time.
template <class V, Pool K, bool Index>
struct Running {
  V total, most;
  Integer<V> where;

  // Not default member initialisers: a constructor that the compiler writes is compiled for the baseline.
  static FA_INLINE Running start() { return {V{}, set<V>(-std::numeric_limits<Element<V>>::infinity()), Integer<V>{}}; }
  FA_INLINE void take(V v, Integer<V> at) {
    if constexpr (K == Pool::mean || K == Pool::mean_max) total = total + v;
    if constexpr (K == Pool::mean_abs) total = total + select(v < V{}, -v, v);
    if constexpr (has_max(K)) {
      const auto better = beats(v, most);
      most = select(better, v, most);
      if constexpr (Index) where = select(better, at, where);
    }
  }
};

// The first of equal maxima, or of NaNs, out of any lanes: lanes hold positions in no particular order.
template <class A>
struct First {
  A most = -std::numeric_limits<A>::infinity();
  int64_t where = std::numeric_limits<int64_t>::max();

  FA_INLINE void take(A v, int64_t at) {
    const bool tie = v == most || (v != v && most != most);
    if (beats(v, most) || (tie && at < where)) {
      most = v;
      where = at;
    }
  }
  template <class V, Pool K>
  FA_INLINE void take_lanes(const Running<V, K, true>& r) {
    if constexpr (is_vector<V>)
      for (int64_t i = 0; i < count_of<V>; ++i) take(r.most[i], int64_t(r.where[i]));
    else
      take(r.most, int64_t(r.where));
  }
};

// Running maximum where nothing is NaN: one instruction. Of its place only the first of the `span` vectors taken
// together is kept, and the element is looked for once, at the end.
template <class V, bool Index>
struct Peak {
  V most;
  Integer<V> base;

  static FA_INLINE Peak start() { return {set<V>(-std::numeric_limits<Element<V>>::infinity()), Integer<V>{}}; }
  FA_INLINE void take(V v, int64_t at) {
    const auto better = v > most;
    most = select(better, v, most);
    if constexpr (Index) base = select(better, Integer<V>{} + Integer<Element<V>>(at), base);
  }
};

template <Pool K, class V>
FA_INLINE V addend(V v) {
  if constexpr (K == Pool::mean_abs)
    return select(v < V{}, -v, v);
  else
    return v;
}
template <class V>
FA_INLINE V higher(V a, V b) {
  return select(a > b, a, b);
}

// Where `best` is first: in the part of the run that came in fours, else among the single vectors; n if it is in
// neither.
template <class T, bool Index>
FA_INLINE int64_t first_of(const T* p, int64_t n, Acc<T> best, const Peak<Vec<Acc<T>>, Index>& peak,
                           const Peak<Vec<Acc<T>>, Index>& rest, int64_t whole, int64_t vectors) {
  using A = Acc<T>;
  constexpr int64_t W = width<A>;
  int64_t at = n;
  if (whole > 0) {
    int64_t base = n;
    for (int64_t l = 0; l < W; ++l)
      if (peak.most[l] == best) base = std::min<int64_t>(base, peak.base[l]);
    for (int64_t l = 0; l < W; ++l)
      if (peak.most[l] == best && peak.base[l] == base)
        for (int64_t k = base + l; k < at; k += W)
          if (k >= base + 3 * W || load<A>(p + k) == best) at = k;  // it is in one of the four
  }
  if (at == n && vectors > whole)
    for (int64_t l = 0; l < W; ++l)
      if (rest.most[l] == best) at = std::min(at, std::max<int64_t>(rest.base[l], whole) + l);
  return at;
}

// Adds the elements of a run, and finds their maximum if none is NaN.
//
// Sums are put aside every 4096 elements, in double: a plane of millions loses no more than one of thousands. A sum is
// also how a NaN is noticed; then, and where infinities cancel, the run is searched for it, element by element.
template <class T, Pool K, bool Index>
FA_INLINE void pool_run(const T* p, int64_t n, Acc<T>* total, Acc<T>* most, int64_t* where) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  constexpr bool has = has_max(K);
  // In a short run three elements to look at again would be many: there each vector keeps its place.
  const int64_t fours = has && Index && n < 16 * W ? 0 : n;
  V t[4] = {};  // four chains hide the latency of an addition
  auto peak = Peak<V, Index>::start(), rest = Peak<V, Index>::start();
  int64_t i = 0;
  double aside = 0;
  for (;;) {
    const int64_t stop = std::min<int64_t>(fours, i + 4096);
    for (; i + 4 * W <= stop; i += 4 * W) {
      FA_UNROLL
      for (int64_t j = 0; j < 4; ++j) soon(p + i + j * W);
      const V v0 = load<V>(p + i), v1 = load<V>(p + i + W), v2 = load<V>(p + i + 2 * W), v3 = load<V>(p + i + 3 * W);
      t[0] = t[0] + addend<K>(v0), t[1] = t[1] + addend<K>(v1), t[2] = t[2] + addend<K>(v2),
      t[3] = t[3] + addend<K>(v3);
      if constexpr (has) peak.take(higher(higher(v0, v1), higher(v2, v3)), i);
    }
    if (fours - i < 4 * W) break;
    aside += sum((t[0] + t[1]) + (t[2] + t[3]));
    t[0] = t[1] = t[2] = t[3] = V{};
  }
  const int64_t whole = i;
  for (; i + W <= n; i += W) {
    const V v = load<V>(p + i);
    t[0] = t[0] + addend<K>(v);
    if constexpr (has) rest.take(v, i);
  }
  const int64_t vectors = i;
  A tail = 0, highest = -std::numeric_limits<A>::infinity();
  int64_t highest_at = vectors;
  for (; i < n; ++i) {
    const A v = load<A>(p + i);
    tail += addend<K>(v);
    if (has && v > highest) highest = v, highest_at = i;
  }
  const A all = A(aside + (sum((t[0] + t[1]) + (t[2] + t[3])) + tail));
  if constexpr (K != Pool::max) *total = all;
  if constexpr (has) {
    A best = highest;
    for (int64_t l = 0; l < W; ++l) best = std::max(best, std::max(A(peak.most[l]), A(rest.most[l])));
    int64_t at = 0;
    if (all != all) {
      for (int64_t k = 0; k < n && best == best; ++k)
        if (const A v = load<A>(p + k); v != v) best = v, at = k;
    }
    if (Index && best == best) {
      at = first_of<T>(p, n, best, peak, rest, whole, vectors);
      if (at == n) at = highest_at;
    }
    *most = best;
    if constexpr (Index) *where = at;
  }
}

template <class T, Pool K, bool Index>
struct PoolPixel {
  using A = Acc<T>;
  const T* p;
  int64_t step, first;
  A* total;
  A* most;
  Integer<A>* where;
  int rows;

  template <class V>
  FA_INLINE void at(int64_t c) {
    auto r = Running<V, K, Index>::start();
    if constexpr (has_max(K)) r.most = get<V>(most + c);
    if constexpr (has_max(K) && Index) std::memcpy(&r.where, where + c, sizeof(r.where));
    for (int j = 0; j < rows; ++j) r.take(load<V>(p + j * step + c), Integer<V>{} + Integer<A>(first + j));
    if constexpr (K != Pool::max) put<V>(total + c, get<V>(total + c) + r.total);
    if constexpr (has_max(K)) put<V>(most + c, r.most);
    if constexpr (has_max(K) && Index) std::memcpy(where + c, &r.where, sizeof(r.where));
  }
};

template <class T, Pool K, bool Index>
void pool_planes(const Map& x, Range rows, Acc<T>* total, Acc<T>* most, int64_t* where) {
  Place at(rows.begin, x.c);
  for (int64_t r = rows.begin; r < rows.end; ++r, at.next())
    pool_run<T, K, Index>(x.plane<const T>(at.outer, at.inner), x.s, total ? total + r : nullptr,
                          most ? most + r : nullptr, where ? where + r : nullptr);
}

// Pixels [s.begin, s.end) of one sample into arrays over C; four pixels at a time, so that the arrays are touched less.
template <class T, Pool K, bool Index>
void pool_pixels(const Map& x, int64_t n, Range s, Acc<T>* total, Acc<T>* most, Integer<Acc<T>>* where) {
  using A = Acc<T>;
  for (int64_t c = 0; c < x.c; ++c) {
    if constexpr (K != Pool::max) total[c] = 0;
    if constexpr (has_max(K)) most[c] = -std::numeric_limits<A>::infinity();
    if constexpr (has_max(K) && Index) where[c] = Integer<A>(s.begin);
  }
  for (int64_t p = s.begin; p < s.end;) {
    const int rows = int(std::min<int64_t>(4, s.end - p));
    PoolPixel<T, K, Index> f{x.pixel<const T>(n, p), x.ss, p, total, most, where, rows};
    each<A>(x.c, f);
    p += rows;
  }
}
