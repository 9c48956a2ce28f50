#include "cpu/lanes.kernels.h"
#include "cpu/statistics.kernels.h"

// The largest or the smallest of the values seen in each lane, and where it came first. A NaN is passed over: what a
// run says of its sum tells that there is one.
template <class V, bool Largest>
struct Extremum {
  V value;
  Integer<V> where;

  FA_INLINE void take(V v, int64_t at) {
    const auto better = Largest ? v > value : v < value;
    value = select(better, v, value);
    where = select(better, Integer<V>{} + Integer<Element<V>>(at), where);
  }
};
template <class V, bool Largest>
FA_INLINE Extremum<V, Largest> no_extremum(int64_t at) {
  constexpr auto none = std::numeric_limits<Element<V>>::infinity();
  return {set<V>(Largest ? -none : none), Integer<V>{} + Integer<Element<V>>(at)};
}

template <class A, bool Largest>
struct Peak {
  A value;
  int64_t where;

  FA_INLINE void take(A v, int64_t at) {
    if (Largest ? v > value : v < value)
      value = v, where = at;
    else if (v == value && at < where)
      where = at;
  }
  FA_INLINE void take(const Extremum<Vec<A>, Largest>& lanes) {
#if FA_BYTES == 64
    if constexpr (std::is_same_v<A, float>) {
      using V = Vec<A>;
      const __m512 v = bits<__m512>(lanes.value);
      const A best = Largest ? _mm512_reduce_max_ps(v) : _mm512_reduce_min_ps(v);
      const auto at = bits<Integer<V>>(lanes.where) + to_integer(lanes_from_zero<V>());
      const __mmask16 there = _mm512_cmpeq_ps_mask(v, _mm512_set1_ps(best));
      return take(best, there ? _mm512_mask_reduce_min_epi32(there, bits<__m512i>(at)) : where);
    }
#endif
    for (int64_t l = 0; l < width<A>; ++l) take(A(lanes.value[l]), int64_t(lanes.where[l]) + l);
  }
};

// A NaN among n values `step` apart is their maximum and their minimum, where it comes first.
template <class T>
FA_NOINLINE void take_nan(const T* p, int64_t n, int64_t step, const Described<Acc<T>>& out, int64_t to) {
  for (int64_t i = 0; i < n; ++i)
    if (const Acc<T> v = widen(p[i * step]); v != v) {
      out.most[to] = out.least[to] = v, out.most_at[to] = out.least_at[to] = i;
      return;
    }
}

template <class T, bool Ends>
FA_INLINE void describe_run(const T* p, int64_t n, const Described<Acc<T>>& out, int64_t to) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  const A shift = finite_or_zero<A>(widen(p[0]));
  const V k = set<V>(shift);
  Moments<V> lanes{V{}, V{}, 0};
  auto most = no_extremum<V, true>(0);
  auto least = no_extremum<V, false>(0);
  int64_t i = 0;
  for (; i + 8 * W <= n; i += 8 * W) {
    V v[8];
    FA_UNROLL
    for (int64_t j = 0; j < 8; ++j) soon(p + i + j * W);
#pragma GCC unroll 8
    for (int64_t j = 0; j < 8; ++j) {
      v[j] = load<V>(p + i + j * W);
      if constexpr (Ends) most.take(v[j], i + j * W), least.take(v[j], i + j * W);
      v[j] = v[j] - k;
    }
    lanes.template take<8>(v);
  }
  // The last values, fewer than eight vectors, stay in registers or near, for their mean comes before their deviations.
  const int64_t from = i, count = n - i, rest = count % W;
  V last[8], total{};
  int64_t held = 0;
  for (; i + W <= n; i += W, ++held) {
    const V v = load<V>(p + i);
    if constexpr (Ends) most.take(v, i), least.take(v, i);
    last[held] = v - k;
    total = total + last[held];
  }
  if (rest) {
    const V v = load_first<V>(p + i, rest, set<V>(std::numeric_limits<A>::quiet_NaN()));
    if constexpr (Ends) most.take(v, i), least.take(v, i);
    last[held] = select(first_lanes<V>(rest), v - k, V{});
    total = total + last[held];
  }
  A mean = 0, m2 = 0;
  if (count) {
    mean = sum(total) / A(count);
    const V middle = set<V>(mean);
    V q{};
    for (int64_t j = 0; j < held; ++j) q = q + (last[j] - middle) * (last[j] - middle);
    if (rest) {
      const V d = last[held] - middle;
      q = q + select(first_lanes<V>(rest), d * d, V{});
    }
    m2 = sum(q);
  }
  if (from) {
    const A among = sum(lanes.mean) / A(W);
    const V off = lanes.mean - set<V>(among);
    const A apart = mean - among, part = A(count) / A(n);
    m2 += sum(lanes.m2 + off * off * A(lanes.n)) + apart * apart * (A(from) * part);
    mean = among + apart * part;
  }
  mean += shift;
  if (!(mean - mean == 0)) {  // a mean that isn't finite is what a plain sum says
    double total = 0;
    for (i = 0; i < n; ++i) total += widen(p[i]);
    mean = A(total / double(n));
  }
  out.mean[to] = mean, out.m2[to] = m2;
  if constexpr (Ends) {
    Peak<A, true> highest{-std::numeric_limits<A>::infinity(), n};
    Peak<A, false> lowest{std::numeric_limits<A>::infinity(), n};
    highest.take(most), lowest.take(least);
    out.most[to] = highest.value, out.most_at[to] = highest.where;
    out.least[to] = lowest.value, out.least_at[to] = lowest.where;
    if (mean != mean) take_nan<T>(p, n, 1, out, to);
  }
}

template <class T, bool Ends>
void describe_planes(const Map& x, Range rows, const Described<Acc<T>>& out) {
  Place at(rows.begin, x.c);
  for (int64_t r = rows.begin; r < rows.end; ++r, at.next())
    describe_run<T, Ends>(x.plane<const T>(at.outer, at.inner), x.s, out, r);
}

template <class T, bool Ends>
struct DescribePixels {
  using A = Acc<T>;
  const T* p;
  int64_t step, n, first;
  int rows;
  const A* shift;
  PixelRun<A> to;

  template <class V, int R>
  FA_INLINE void take(int64_t c, int64_t row, Moments<V>& m, V& total, Extremum<V, true>& most,
                      Extremum<V, false>& least) const {
    const V k = get<V>(shift + c);
    V v[R];
#pragma GCC unroll 8
    for (int64_t j = 0; j < R; ++j) {
      const T* from = p + (row + j) * step + c;
      if constexpr (is_vector<V> && R == 8) ahead(from + 8 * step);
      v[j] = load<V>(from);
      total = total + v[j];
      if constexpr (Ends) most.take(v[j], first + row + j), least.take(v[j], first + row + j);
      v[j] = v[j] - k;
    }
    m.template take<R>(v);
  }
  template <class V>
  FA_INLINE void at(int64_t c) const {
    Moments<V> m{V{}, V{}, n};
    V total{};
    auto most = no_extremum<V, true>(first);
    auto least = no_extremum<V, false>(first);
    if (n) m.mean = get<V>(to.mean + c), m.m2 = get<V>(to.m2 + c), total = get<V>(to.total + c);
    if (Ends && n) {
      most.value = get<V>(to.most + c), least.value = get<V>(to.least + c);
      std::memcpy(&most.where, to.most_at + c, sizeof(V));
      std::memcpy(&least.where, to.least_at + c, sizeof(V));
    }
    if (rows == 8)
      take<V, 8>(c, 0, m, total, most, least);
    else
      for (int j = 0; j < rows; ++j) take<V, 1>(c, j, m, total, most, least);
    put<V>(to.mean + c, m.mean), put<V>(to.m2 + c, m.m2), put<V>(to.total + c, total);
    if constexpr (Ends) {
      put<V>(to.most + c, most.value), put<V>(to.least + c, least.value);
      std::memcpy(to.most_at + c, &most.where, sizeof(V));
      std::memcpy(to.least_at + c, &least.where, sizeof(V));
    }
  }
};

// Pixels [s.begin, s.end) of one sample, relative to `shift`.
template <class T, bool Ends>
void describe_pixels(const Map& x, int64_t n, Range s, const Acc<T>* shift, const PixelRuns<Acc<T>>& runs,
                     int64_t run) {
  using A = Acc<T>;
  const auto to = runs.at(run);
  for (int64_t p = s.begin; p < s.end;) {
    const int rows = int(std::min<int64_t>(8, s.end - p));
    DescribePixels<T, Ends> f{x.pixel<const T>(n, p), x.ss, p - s.begin, p, rows, shift, to};
    each<A>(x.c, f);
    p += rows;
  }
}

// The runs of one sample, `run` pixels each but the last, merged in order and in double. A mean within the deviation of
// 0 is the plain sum's, which has the digits below the mean's own size; so is one that isn't finite.
template <class A>
struct MergeRuns {
  const PixelRuns<A>* runs;
  int64_t first, run, count, s;
  const A* shift;
  Described<A> out;

  template <class D>
  FA_INLINE void at(int64_t c) const {
    D whole{}, m2{}, total{};
    double seen = 0;
    for (int64_t j = 0; j < count; ++j) {
      const auto r = runs->at(first + j);
      const double n = double(std::min(run, s - j * run)), part = n / (seen + n);
      const D apart = doubled<D>(r.mean + c) - whole;
      whole = whole + apart * part;
      m2 = m2 + doubled<D>(r.m2 + c) + apart * apart * (seen * part);
      total = total + doubled<D>(r.total + c);
      seen += n;
    }
    const D plain = total * (1 / seen), shifted = doubled<D>(shift + c) + whole;
    const auto trusted = (shifted - shifted == D{}) & (plain * plain * seen > m2);
    put_doubled(out.mean + c, select(trusted, shifted, plain));
    put_doubled(out.m2 + c, m2);
  }
};

// The places end up in the first run's.
template <class A>
struct MergeExtrema {
  const PixelRuns<A>* runs;
  int64_t first, count;
  A *most, *least;

  template <class V, bool Largest>
  FA_INLINE void merged(int64_t c, A* PixelRun<A>::* value, typename PixelRun<A>::I* PixelRun<A>::* where,
                        A* out) const {
    Extremum<V, Largest> best{}, next{};
    for (int64_t j = 0; j < count; ++j) {
      const auto r = runs->at(first + j);
      auto& to = j ? next : best;
      to.value = get<V>(r.*value + c);
      std::memcpy(&to.where, r.*where + c, sizeof(V));
      if (j == 0) continue;
      const auto better = Largest ? next.value > best.value : next.value < best.value;
      best.value = select(better, next.value, best.value);
      best.where = select(better, next.where, best.where);
    }
    put<V>(out + c, best.value);
    std::memcpy(runs->at(first).*where + c, &best.where, sizeof(V));
  }
  template <class V>
  FA_INLINE void at(int64_t c) const {
    merged<V, true>(c, &PixelRun<A>::most, &PixelRun<A>::most_at, most);
    merged<V, false>(c, &PixelRun<A>::least, &PixelRun<A>::least_at, least);
  }
};

template <class T, bool Ends>
void merge_pixels(const Map& x, int64_t n, int64_t run, int64_t count, const Acc<T>* shift,
                  const PixelRuns<Acc<T>>& runs, const Described<Acc<T>>& out) {
  using A = Acc<T>;
  const int64_t to = n * x.c, first = n * count;
  const Described<A> here{out.mean + to, out.m2 + to, nullptr, nullptr, nullptr, nullptr};
  const MergeRuns<A> f{&runs, first, run, count, x.s, shift, here};
  int64_t c = 0;
  for (; c + width<double> <= x.c; c += width<double>) f.template at<VecD>(c);
  for (; c < x.c; ++c) f.template at<double>(c);
  if constexpr (Ends) {
    MergeExtrema<A> ends{&runs, first, count, out.most + to, out.least + to};
    each<A>(x.c, ends);
    const auto r = runs.at(first);
    for (c = 0; c < x.c; ++c) out.most_at[to + c] = r.most_at[c], out.least_at[to + c] = r.least_at[c];
    for (c = 0; c < x.c; ++c)
      if (const A mean = out.mean[to + c]; mean != mean)
        take_nan<T>(x.pixel<const T>(n, 0) + c, x.s, x.ss, out, to + c);
  }
}
