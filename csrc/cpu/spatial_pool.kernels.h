#include "cpu/channel_pool.kernels.h"

// Sum, maximum and its channel over the rows of planes, kept in arrays over S: eight rows at a time, so that the arrays
// are loaded and stored once for them. NaN: whether it may meet one. Without, a maximum is one instruction, and the sum
// of all that it saw tells whether it should have been careful.
template <class T, Pool K, bool Index, bool Of, bool NaN, int R>
struct PoolChannels {
  using A = Acc<T>;
  const T* x[R];
  A gate[R], centre[R], shift[R];
  A *total, *most;
  Integer<A>* where;
  int64_t channel, ahead;
  Vec<A> seen;
  A seen_alone;

  template <class V>
  FA_INLINE void at(int64_t s) {
    auto r = Running<V, K, Index>::start();
    if constexpr (has_max(K)) r.most = get<V>(most + s);
    if constexpr (has_max(K) && Index) std::memcpy(&r.where, where + s, sizeof(r.where));
    FA_UNROLL
    for (int j = 0; j < R; ++j) {
#if defined(__GNUC__)
      if constexpr (is_vector<V>) __builtin_prefetch(x[j] + s + ahead, 0, 3);
#endif
      V u = load<V>(x[j] + s);
      u = Of ? multiply_add(set<V>(gate[j]), u - set<V>(centre[j]), set<V>(shift[j])) : u * set<V>(gate[j]);
      const Integer<V> c = Integer<V>{} + Integer<A>(channel + j);
      if constexpr (NaN || !has_max(K)) {
        r.take(u, c);
      } else {
        r.total = r.total + u;
        const auto better = u > r.most;
        r.most = select(better, u, r.most);
        if constexpr (Index) r.where = select(better, c, r.where);
      }
    }
    if constexpr (!NaN && has_max(K)) {
      if constexpr (is_vector<V>)
        seen = seen + r.total;
      else
        seen_alone = seen_alone + r.total;
    }
    if constexpr (K != Pool::max) put<V>(total + s, get<V>(total + s) + r.total);
    if constexpr (has_max(K)) put<V>(most + s, r.most);
    if constexpr (has_max(K) && Index) std::memcpy(where + s, &r.where, sizeof(r.where));
  }
};

// Returns the sum of what was seen, of which only its being a number matters.
template <class T, Pool K, bool Index, bool Of, bool NaN, int R>
FA_INLINE Acc<T> pool_channels(const Map& x, int64_t n, int64_t c, const Acc<T>* gate, const Centred<Acc<T>>& of,
                               Acc<T>* total, Acc<T>* most, Integer<Acc<T>>* where) {
  PoolChannels<T, K, Index, Of, NaN, R> f;
  for (int j = 0; j < R; ++j) {
    const int64_t i = n * x.c + c + j;
    f.x[j] = x.plane<const T>(n, c + j), f.gate[j] = gate[i];
    f.centre[j] = Of ? of.centre[i] : 0, f.shift[j] = Of ? of.shift[i] : 0;
  }
  f.total = total, f.most = most, f.where = where, f.channel = c, f.seen = Vec<Acc<T>>{}, f.seen_alone = 0;
  const int64_t step = R * x.sc;
  f.ahead = step * int64_t(sizeof(T)) <= 32768 ? step : 2048 / int64_t(sizeof(T));
  each<Acc<T>>(x.s, f);
  return sum(f.seen) + f.seen_alone;
}

// A chunk of channels of one sample, into arrays over S; again where it turns out that something is NaN, or that
// infinities cancel.
template <class T, Pool K, bool Index, bool Of>
void pool_chunk(const Map& x, int64_t n, Range c, const Acc<T>* gate, const Centred<Acc<T>>& of, Acc<T>* total,
                Acc<T>* most, Integer<Acc<T>>* where) {
  using A = Acc<T>;
  const auto start = [&] {
    for (int64_t s = 0; s < x.s; ++s) {
      if constexpr (K != Pool::max) total[s] = 0;
      if constexpr (has_max(K)) most[s] = -std::numeric_limits<A>::infinity();
      if constexpr (has_max(K) && Index) where[s] = Integer<A>(c.begin);
    }
  };
  start();
  A seen = 0;
  int64_t i = c.begin;
  for (; i + 8 <= c.end; i += 8)
    seen += pool_channels<T, K, Index, Of, false, 8>(x, n, i, gate, of, total, most, where);
  for (; i < c.end; ++i) seen += pool_channels<T, K, Index, Of, false, 1>(x, n, i, gate, of, total, most, where);
  if constexpr (has_max(K)) {
    if (seen == seen) return;
    start();
    for (i = c.begin; i < c.end; ++i) pool_channels<T, K, Index, Of, true, 1>(x, n, i, gate, of, total, most, where);
  }
}

// The maxima of a later chunk of channels, into those of the chunks before it.
template <class A, bool Index>
struct MergeTops {
  const A* from;
  A* to;
  const Integer<A>* from_where;
  Integer<A>* where;
  template <class V>
  FA_INLINE void at(int64_t s) {
    const V v = get<V>(from + s), m = get<V>(to + s);
    const auto better = beats(v, m);
    put<V>(to + s, select(better, v, m));
    if constexpr (Index) {
      Integer<V> a, b;
      std::memcpy(&a, from_where + s, sizeof(a));
      std::memcpy(&b, where + s, sizeof(b));
      b = select(better, a, b);
      std::memcpy(where + s, &b, sizeof(b));
    }
  }
};
template <class A, bool Index>
void merge_tops(const A* from, A* to, const Integer<A>* from_where, Integer<A>* where, int64_t n) {
  MergeTops<A, Index> f{from, to, from_where, where};
  each<A>(n, f);
}

// v·gate, or gate·(v − centre) + shift, of channels side by side.
template <bool Of, class V, class A>
FA_INLINE V gated_at(V v, const A* gate, const Centred<A>& of, int64_t i) {
  const V g = get<V>(gate + i);
  return Of ? multiply_add(g, v - get<V>(of.centre + i), get<V>(of.shift + i)) : v * g;
}

// Pixels [pixels.begin, pixels.end), numbered n·S + s, of maps whose channels lie side by side.
template <class T, Pool K, bool Index, bool Of>
void pool_columns(const Map& x, Range pixels, const Acc<T>* gate, const Centred<Acc<T>>& of, Acc<T>* total,
                  Acc<T>* most, Integer<Acc<T>>* where) {
  using A = Acc<T>;
  using V = Vec<A>;
  using Lanes = Integer<V>;
  constexpr int64_t W = width<A>;
  const Lanes lane = to_integer(lanes_from_zero<V>());
  Place at(pixels.begin, x.s);
  for (int64_t r = pixels.begin; r < pixels.end; ++r, at.next()) {
    const T* p = x.pixel<const T>(at.outer, at.inner);
    const A* g = gate + at.outer * x.c;
    const Centred<A> its = Of ? Centred<A>{of.centre + at.outer * x.c, of.shift + at.outer * x.c} : Centred<A>{};
    using R = Running<V, K, Index>;
    R run[4] = {R::start(), R::start(), R::start(), R::start()};
    int64_t i = 0;
    for (; i + 4 * W <= x.c; i += 4 * W) {
      FA_UNROLL
      for (int64_t j = 0; j < 4; ++j) {
        soon(p + i + j * W);
        run[j].take(gated_at<Of>(load<V>(p + i + j * W), g, its, i + j * W), lane + Integer<A>(i + j * W));
      }
    }
    for (; i + W <= x.c; i += W) run[0].take(gated_at<Of>(load<V>(p + i), g, its, i), lane + Integer<A>(i));
    auto tail = Running<A, K, Index>::start();
    for (; i < x.c; ++i) tail.take(gated_at<Of>(load<A>(p + i), g, its, i), Integer<A>(i));
    if constexpr (K != Pool::max)
      total[r] = sum((run[0].total + run[1].total) + (run[2].total + run[3].total)) + tail.total;
    if constexpr (has_max(K) && Index) {
      First<A> first;
      for (const auto& part : run) first.template take_lanes<V, K>(part);
      first.template take_lanes<A, K>(tail);
      most[r] = first.most;
      where[r] = Integer<A>(first.where);
    } else if constexpr (has_max(K)) {
      const V m = larger(larger(run[0].most, run[1].most), larger(run[2].most, run[3].most));
      A best = tail.most;
      for (int64_t l = 0; l < W; ++l) best = larger<A>(m[l], best);
      most[r] = best;
    }
  }
}

// How often x·gate is the pixel's maximum.
template <class T>
struct CountTop {
  using A = Acc<T>;
  const T* x;
  const A *gate, *top;
  A* count;
  template <class V>
  FA_INLINE void at(int64_t s) {
    const V one = select(load<V>(x + s) * set<V>(*gate) == get<V>(top + s), set<V>(1), V{});
    put<V>(count + s, get<V>(count + s) + one);
  }
};
template <class T>
void count_top_planes(const Map& x, Range samples, const Acc<T>* gate, const Acc<T>* top, Acc<T>* count) {
  for (int64_t n = samples.begin; n < samples.end; ++n) {
    for (int64_t s = 0; s < x.s; ++s) count[n * x.s + s] = 0;
    for (int64_t c = 0; c < x.c; ++c) {
      CountTop<T> f{x.plane<const T>(n, c), gate + n * x.c + c, top + n * x.s, count + n * x.s};
      each<Acc<T>>(x.s, f);
    }
  }
}
template <class T>
void count_top_pixels(const Map& x, Range pixels, const Acc<T>* gate, const Acc<T>* top, Acc<T>* count) {
  using A = Acc<T>;
  using V = Vec<A>;
  for (int64_t r = pixels.begin; r < pixels.end; ++r) {
    const int64_t n = r / x.s;
    const T* p = x.pixel<const T>(n, r % x.s);
    const A* g = gate + n * x.c;
    V seen{};
    A rest = 0;
    int64_t i = 0;
    for (; i + width<A> <= x.c; i += width<A>)
      seen = seen + select(load<V>(p + i) * get<V>(g + i) == set<V>(top[r]), set<V>(1), V{});
    for (; i < x.c; ++i) rest += load<A>(p + i) * g[i] == top[r] ? A(1) : A(0);
    count[r] = sum(seen) + rest;
  }
}
