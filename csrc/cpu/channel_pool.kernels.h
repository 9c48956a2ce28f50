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

// Sums are put aside every 4096 elements, in double: a plane of millions loses no more than one of thousands.
template <class T, Pool K, bool Index>
FA_INLINE void pool_run(const T* p, int64_t n, Acc<T>* total, Acc<T>* most, int64_t* where) {
  using A = Acc<T>;
  using V = Vec<A>;
  using I = Integer<V>;
  constexpr int64_t W = width<A>;
  using R = Running<V, K, Index>;
  R r[4] = {R::start(), R::start(), R::start(), R::start()};  // four chains hide the latency of an addition
  const I lane = to_integer(lanes_from_zero<V>());
  int64_t i = 0;
  double aside = 0;
  for (;;) {
    const int64_t stop = std::min<int64_t>(n, i + 4096);
    for (; i + 4 * W <= stop; i += 4 * W) {
      FA_UNROLL
      for (int64_t j = 0; j < 4; ++j) r[j].take(load<V>(p + i + j * W), lane + Integer<A>(i + j * W));
    }
    if (n - i < 4 * W) break;
    aside += sum((r[0].total + r[1].total) + (r[2].total + r[3].total));
    r[0].total = r[1].total = r[2].total = r[3].total = V{};
  }
  for (; i + W <= n; i += W) r[0].take(load<V>(p + i), lane + Integer<A>(i));
  auto tail = Running<A, K, Index>::start();
  for (; i < n; ++i) tail.take(load<A>(p + i), Integer<A>(i));
  if constexpr (K != Pool::max)
    *total = A(aside + (sum((r[0].total + r[1].total) + (r[2].total + r[3].total)) + tail.total));
  if constexpr (has_max(K) && Index) {
    First<A> first;
    for (const auto& part : r) first.template take_lanes<V, K>(part);
    first.template take_lanes<A, K>(tail);
    *most = first.most;
    *where = first.where;
  } else if constexpr (has_max(K)) {
    const V m = larger(larger(r[0].most, r[1].most), larger(r[2].most, r[3].most));
    A best = tail.most;
    for (int64_t l = 0; l < W; ++l) best = larger<A>(m[l], best);
    *most = best;
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
