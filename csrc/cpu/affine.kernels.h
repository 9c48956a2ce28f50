#include "cpu/lanes.kernels.h"

// A pass goes by tiles of eight vectors: of a plane one behind the other, of pixels the same channels of eight pixels.
// An activation is called once for a tile, so that it costs one call and one switch, and needs no copy in every loop.
constexpr int64_t kRows = 8;
#define FA_TILE _Pragma("GCC unroll 8")

// 1/(1 + exp(−v)) to 2 ulp, in float32 and without the cases that exp_of has for inf and NaN: |v| is cut where the
// sigmoid is 1, and below that, where it is 0, that is put in at the end.
FA_INLINE VecF sigmoid_fast(VecF v) {
  const VecF end = set<VecF>(87.0f);
#if FA_BYTES == 64
  // The constant comes first: where v is NaN, the second operand is returned.
  const auto cut = bits<VecF>(_mm512_max_ps(bits<__m512>(-end), _mm512_min_ps(bits<__m512>(end), bits<__m512>(v))));
#else
  const VecF cut = select(v > end, end, select(v < -end, -end, v));
#endif
  // k = round(−v/ln2), as a number and in the low bits of one that is large enough to have no fraction.
  const VecF large = set<VecF>(12582912.0f), sum = cut * -1.44269504088896341f + large, k = sum - large;
  const VecF r = (-cut - k * 0.693359375f) + k * 2.12194440e-4f;
  VecF p = set<VecF>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const VecF below = p * bits<VecF>((bits<VecI>(sum) << 23) + 0x3f800000) + 1.0f;
#if FA_BYTES == 64
  // A reciprocal of 14 bits and a step of Newton's: a division of 16 numbers takes as long as all of the above.
  const VecF guess = bits<VecF>(_mm512_rcp14_ps(bits<__m512>(below)));
  const VecF s = guess * (2.0f - below * guess);
#else
  const VecF s = 1.0f / below;
#endif
  return select(v < -end, VecF{}, s);
}
FA_INLINE VecD sigmoid_fast(VecD v) { return sigmoid_of<VecD>(v); }

// u = act(v), and with `Both` d = act'(v), of n vectors.
template <class V, bool Both>
FA_NOINLINE void activations(Act act, int64_t n, V* v, V* u, V* d, V a) {
  switch (act) {
    case Act::identity:
      for (int64_t j = 0; j < n; ++j) {
        u[j] = v[j];
        if constexpr (Both) d[j] = set<V>(1);
      }
      return;
    case Act::relu:
      for (int64_t j = 0; j < n; ++j) {
        u[j] = select(v[j] <= V{}, V{}, v[j]);
        if constexpr (Both) d[j] = select(v[j] <= V{}, V{}, set<V>(1));
      }
      return;
    case Act::silu:
      for (int64_t j = 0; j < n; ++j) {
        const V s = sigmoid_fast(v[j]);
        u[j] = v[j] * s;
        if constexpr (Both) d[j] = u[j] * (1 - s) + s;
      }
      return;
    case Act::hardswish:
      for (int64_t j = 0; j < n; ++j) {
        const V w = v[j], three = set<V>(3), inside = select(w >= three, set<V>(6), w + 3);
        u[j] = w * select(w <= -three, V{}, inside) / 6;
        if constexpr (Both) d[j] = select(w <= -three, V{}, select(w >= three, set<V>(1), w / 3 + Element<V>(0.5)));
      }
      return;
    default:
      for (int64_t j = 0; j < n; ++j) {
        u[j] = activate<V>(act, v[j], a);
        if constexpr (Both) d[j] = derivative<V>(act, v[j], a);
      }
  }
}

// Rows of a map that a tile takes: `step` elements from one to the next, `far` to what is asked for in advance.
template <class T>
struct Rows {
  T* p = nullptr;
  int64_t step = 0, far = 0;

  FA_INLINE T* at(int64_t i, int64_t j) const { return p + i + j * step; }
  FA_INLINE void ask(int64_t i, int64_t j) const { ahead(at(i, j) + far); }
  FA_INLINE void ask_to_write(int64_t i, int64_t j) const {
#if defined(__GNUC__)
    __builtin_prefetch(at(i, j) + far, 1, 3);
#endif
  }
};
template <class T>
FA_INLINE Rows<T> rows_of_plane(const Map& m, int64_t n, int64_t c) {
  Rows<T> rows;
  if (m.data) rows.p = m.plane<T>(n, c), rows.step = width<Acc<T>>, rows.far = 2048 / int64_t(sizeof(T));
  return rows;
}
template <class T>
FA_INLINE Rows<T> rows_of_pixels(const Map& m, int64_t n, int64_t s) {
  Rows<T> rows;
  if (m.data) rows.p = m.pixel<T>(n, s), rows.step = m.ss, rows.far = kRows * m.ss;
  return rows;
}
// One pixel, by vectors.
template <class T>
FA_INLINE Rows<T> rows_of_pixel(const Map& m, int64_t n, int64_t s) {
  Rows<T> rows;
  if (m.data) rows.p = m.pixel<T>(n, s), rows.step = width<Acc<T>>, rows.far = 2048 / int64_t(sizeof(T));
  return rows;
}

// How much of a tile is there: `rows` vectors, of which those from `whole` on have `lanes` values.
struct Part {
  int64_t rows, whole, lanes;
};
template <bool Full, class V, class T>
FA_INLINE V taken(const Rows<T>& from, int64_t i, int64_t j, const Part& part) {
  if (Full || j < part.whole) {
    from.ask(i, j);
    return load<V>(from.at(i, j));
  }
  return load_first<V>(from.at(i, j), part.lanes, V{});
}
template <bool Full, class V, class T>
FA_INLINE void given(const Rows<T>& to, int64_t i, int64_t j, const Part& part, V v, bool stream) {
  if (Full || j < part.whole) {
    if (!stream) to.ask_to_write(i, j);
    store<V>(to.at(i, j), v, stream);
  } else {
    store_first<V>(to.at(i, j), part.lanes, v);
  }
}
// v, and 0 in the lanes that aren't there.
template <bool Full, class V>
FA_INLINE V there(V v, int64_t j, const Part& part) {
  if (Full || j < part.whole) return v;
  return select(first_lanes<V>(part.lanes), v, V{});
}

// ---- sums over planes, with what that read can write

template <class T, From F, Sums S>
struct SumTile {
  using A = Acc<T>;
  using V = Vec<A>;
  Rows<T> x, dy, aux, kept, dx;
  Act act;
  V slope;
  bool output, stream;
  V scale, shift, centre, gate;
  static constexpr int64_t K = how_many(S);
  V total[K];

  template <bool Full>
  FA_INLINE void add(V (&part_of)[K], int64_t i, int64_t j, const Part& part, V t, V g, V u, V d) const {
    if constexpr (S == Sums::pool) {
      part_of[0] = part_of[0] + u;
      return;
    }
    V e = g;
    if constexpr (F == From::mask) e = select(taken<Full, V>(aux, i, j, part) <= V{}, V{}, g);
    if constexpr (F == From::any) e = select(d == V{}, V{}, g * d);  // a cut gradient is 0, whatever was cut
    if constexpr (S == Sums::spread) {
      part_of[0] = part_of[0] + g * u;
      part_of[1] = part_of[1] + e;
      part_of[2] = part_of[2] + d;
      part_of[3] = part_of[3] + e * t;
      part_of[4] = part_of[4] + select(d == V{}, V{}, d * t);
    } else {
      if constexpr (S == Sums::gated) {
        part_of[2] = part_of[2] + g * u;
        e = e * gate;
      }
      part_of[0] = part_of[0] + e * t;
      part_of[1] = part_of[1] + e;
      if (kept.p) given<Full>(kept, i, j, part, e, stream);
      if (dx.p) given<Full>(dx, i, j, part, e * scale, stream);
    }
  }

  // The sums of a tile are made on their own, in two halves, and then added: short chains, for digits and for speed.
  template <bool Full>
  FA_NOINLINE void take(int64_t i, const Part& part) {
    V half[2][K] = {};
    if constexpr (F == From::any) {
      V t[kRows], g[kRows], v[kRows], u[kRows], d[kRows];
      if constexpr (Full) {
        FA_TILE
        for (int64_t j = 0; j < kRows; ++j) place<true>(i, j, part, t[j], g[j], v[j]);
      } else {
        FA_ROLLED
        for (int64_t j = 0; j < part.rows; ++j) place<false>(i, j, part, t[j], g[j], v[j]);
      }
      activations<V, S != Sums::pool>(act, Full ? kRows : part.rows, v, u, d, slope);
      if constexpr (Full) {
        FA_TILE
        for (int64_t j = 0; j < kRows; ++j) add<true>(half[j % 2], i, j, part, t[j], g[j], u[j], d[j]);
      } else {
        FA_ROLLED
        for (int64_t j = 0; j < part.rows; ++j) {
          if constexpr (S != Sums::pool) d[j] = there<false>(d[j], j, part);
          add<false>(half[0], i, j, part, t[j], g[j], there<false>(u[j], j, part), d[j]);
        }
      }
    } else {
      if constexpr (Full) {
        FA_TILE
        for (int64_t j = 0; j < kRows; ++j)
          add<true>(half[j % 2], i, j, part, taken<true, V>(x, i, j, part) - centre, taken<true, V>(dy, i, j, part),
                    V{}, V{});
      } else {
        FA_ROLLED
        for (int64_t j = 0; j < part.rows; ++j)
          add<false>(half[0], i, j, part, there<false>(taken<false, V>(x, i, j, part) - centre, j, part),
                     taken<false, V>(dy, i, j, part), V{}, V{});
      }
    }
    FA_TILE
    for (int64_t k = 0; k < K; ++k) total[k] = total[k] + (half[0][k] + half[1][k]);
  }
  template <bool Full>
  FA_INLINE void place(int64_t i, int64_t j, const Part& part, V& t, V& g, V& v) const {
    t = there<Full>(taken<Full, V>(x, i, j, part) - centre, j, part);
    if constexpr (S != Sums::pool) g = taken<Full, V>(dy, i, j, part);
    v = scale * t + shift;
    if (aux.p) {
      const V other = taken<Full, V>(aux, i, j, part);
      v = output ? other : v + other;
    }
  }
};

// sums: one array over (n, c) behind the other. Put aside every 4096 elements, in double: a plane of millions loses no
// more than one of thousands.
template <class T, From F, Sums S>
void sum_planes(const Affine<T>& in, Range rows, Acc<T>* sums) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>, K = how_many(S);
  const int64_t apart = in.x.n * in.x.c, n = in.x.s;
  const int64_t written = (in.kept.data != nullptr) + (in.y.data != nullptr);
  const bool stream = written && streams<T>(in.y.data ? in.y : in.kept, written);
  Place at(rows.begin, in.x.c);
  for (int64_t r = rows.begin; r < rows.end; ++r, at.next()) {
    SumTile<T, F, S> f;
    f.x = rows_of_plane<T>(in.x, at.outer, at.inner), f.dy = rows_of_plane<T>(in.dy, at.outer, at.inner);
    f.aux = rows_of_plane<T>(in.aux, at.outer, at.inner), f.kept = rows_of_plane<T>(in.kept, at.outer, at.inner);
    f.dx = rows_of_plane<T>(in.y, at.outer, at.inner);
    f.act = in.act, f.slope = set<V>(in.slope), f.output = from_output(in.act), f.stream = stream;
    f.scale = set<V>(in.scale[r]), f.shift = set<V>(in.shift[r]), f.centre = set<V>(in.centre[r]);
    if constexpr (S == Sums::gated) f.gate = set<V>(in.gate[r]);
    double aside[K] = {};
    FA_TILE
    for (int64_t k = 0; k < K; ++k) f.total[k] = V{};
    int64_t i = 0;
    for (;;) {
      const int64_t stop = std::min<int64_t>(n, i + 4096);
      for (; i + kRows * W <= stop; i += kRows * W) f.template take<true>(i, {});
      if (n - i < kRows * W) break;
      for (int64_t k = 0; k < K; ++k) aside[k] += sum(f.total[k]), f.total[k] = V{};
    }
    if (i < n) f.template take<false>(i, {(n - i + W - 1) / W, (n - i) / W, (n - i) % W});
    for (int64_t k = 0; k < K; ++k) sums[k * apart + r] = A(aside[k] + sum(f.total[k]));
  }
  streamed(stream);
}

// Pixels [s.begin, s.end) of one sample; the sums' arrays over C lie `apart` elements from one another.
template <class T, From F, Sums S>
void sum_pixels(const Affine<T>& in, int64_t n, Range s, Acc<T>* sums, int64_t apart) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>, K = how_many(S);
  const int64_t c = in.x.c, to = n * c, written = (in.kept.data != nullptr) + (in.y.data != nullptr);
  // Only whole cache lines: those of eight pixels are written in turn.
  const bool stream = written && sizeof(T) * W == 64 && streams<T>(in.y.data ? in.y : in.kept, written);
  for (int64_t p = s.begin; p < s.end; p += kRows) {
    const int64_t rows = std::min(kRows, s.end - p);
    SumTile<T, F, S> f;
    f.x = rows_of_pixels<T>(in.x, n, p), f.dy = rows_of_pixels<T>(in.dy, n, p);
    f.aux = rows_of_pixels<T>(in.aux, n, p), f.kept = rows_of_pixels<T>(in.kept, n, p);
    f.dx = rows_of_pixels<T>(in.y, n, p);
    f.act = in.act, f.slope = set<V>(in.slope), f.output = from_output(in.act), f.stream = stream;
    int64_t i = 0;
    for (; i + W <= c; i += W) {
      f.scale = get<V>(in.scale + to + i), f.shift = get<V>(in.shift + to + i);
      f.centre = get<V>(in.centre + to + i);
      if constexpr (S == Sums::gated) f.gate = get<V>(in.gate + to + i);
      FA_TILE
      for (int64_t k = 0; k < K; ++k) f.total[k] = p == s.begin ? V{} : get<V>(sums + k * apart + i);
      if (rows == kRows)
        f.template take<true>(i, {});
      else
        f.template take<false>(i, {rows, rows, 0});
      FA_TILE
      for (int64_t k = 0; k < K; ++k) put<V>(sums + k * apart + i, f.total[k]);
    }
    if (const int64_t rest = c - i) {
      const auto first = [&](const A* a) { return get_first<V>(a + to + i, rest, V{}); };
      f.scale = first(in.scale), f.shift = first(in.shift), f.centre = first(in.centre);
      if constexpr (S == Sums::gated) f.gate = first(in.gate);
      for (int64_t k = 0; k < K; ++k) f.total[k] = p == s.begin ? V{} : get_first<V>(sums + k * apart + i, rest, V{});
      f.template take<false>(i, {rows, 0, rest});
      FA_TILE
      for (int64_t k = 0; k < K; ++k) put_first<V>(sums + k * apart + i, rest, f.total[k]);
    }
  }
  streamed(stream);
}

// Sums of a sample's runs, arrays over C one behind the other, added in order and in double.
template <class A>
void add_in_order(const A* sums, int64_t runs, int64_t c, A* out) {
  int64_t i = 0;
  for (; i + width<double> <= c; i += width<double>) {
    VecD whole{};
    for (int64_t j = 0; j < runs; ++j) whole = whole + doubled<VecD>(sums + j * c + i);
    put_doubled(out + i, whole);
  }
  for (; i < c; ++i) {
    double whole = 0;
    for (int64_t j = 0; j < runs; ++j) whole += sums[j * c + i];
    out[i] = A(whole);
  }
}

// ---- y = act(v) or gate·act(v)

// Constants of planes are one number each, of a pixel a vector for each vector.
template <class V, bool PerElement>
struct Constant {
  const Element<V>* p;
  V held;

  template <bool Full>
  FA_INLINE V at(int64_t i, int64_t j, const Part& part) const {
    if constexpr (!PerElement) return held;
    const Element<V>* from = p + i + j * count_of<V>;
    return Full || j < part.whole ? get<V>(from) : get_first<V>(from, part.lanes, V{});
  }
};
template <class V, bool PerElement>
FA_INLINE Constant<V, PerElement> constant(const Element<V>* p, int64_t i) {
  return {p ? p + i : nullptr, !PerElement && p ? set<V>(p[i]) : V{}};
}

template <class A, class F>
FA_INLINE void in_tiles(int64_t n, const F& f) {
  constexpr int64_t W = width<A>;
  int64_t i = 0;
  for (; i + kRows * W <= n; i += kRows * W) f.template take<true>(i, {kRows, kRows, 0});
  if (i < n) f.template take<false>(i, {(n - i + W - 1) / W, (n - i) / W, (n - i) % W});
}

template <class T, Epi E, bool PerElement>
struct ApplyTile {
  using V = Vec<Acc<T>>;
  using C = Constant<V, PerElement>;
  Rows<T> x, residual, y;
  C scale, shift, centre, gate;
  Act act;
  V slope;
  bool stream;

  template <bool Full>
  FA_INLINE V value(int64_t i, int64_t j, const Part& part) const {
    const V t = taken<Full, V>(x, i, j, part) - centre.template at<Full>(i, j, part);
    V v = scale.template at<Full>(i, j, part) * t + shift.template at<Full>(i, j, part);
    if (residual.p) v = v + taken<Full, V>(residual, i, j, part);
    if constexpr (E == Epi::relu) v = select(v <= V{}, V{}, v);
    return v;
  }
  template <bool Full>
  FA_INLINE void finish(int64_t i, int64_t j, const Part& part, V u) const {
    if (gate.p) u = u * gate.template at<Full>(i, j, part);
    given<Full>(y, i, j, part, u, stream);
  }
  template <bool Full>
  FA_INLINE void take(int64_t i, const Part& part) const {
    if constexpr (E != Epi::other) {
      if constexpr (Full) {
        FA_TILE
        for (int64_t j = 0; j < kRows; ++j) finish<true>(i, j, part, value<true>(i, j, part));
      } else {
        FA_ROLLED
        for (int64_t j = 0; j < part.rows; ++j) finish<false>(i, j, part, value<false>(i, j, part));
      }
    } else {
      V v[kRows], u[kRows];
      if constexpr (Full) {
        FA_TILE
        for (int64_t j = 0; j < kRows; ++j) v[j] = value<true>(i, j, part);
      } else {
        FA_ROLLED
        for (int64_t j = 0; j < part.rows; ++j) v[j] = value<false>(i, j, part);
      }
      activations<V, false>(act, part.rows, v, u, nullptr, slope);
      if constexpr (Full) {
        FA_TILE
        for (int64_t j = 0; j < kRows; ++j) finish<true>(i, j, part, u[j]);
      } else {
        FA_ROLLED
        for (int64_t j = 0; j < part.rows; ++j) finish<false>(i, j, part, u[j]);
      }
    }
  }
};

// Runs [begin, end): planes are numbered n·C + c, pixels n·S + s.
template <class T, Epi E>
void affine_runs(const Affine<T>& in, Range runs) {
  using A = Acc<T>;
  using V = Vec<A>;
  const Map& x = in.x;
  const bool stream = streams<T>(in.y, in.together);
  Place at(runs.begin, x.pixels ? x.s : x.c);
  for (int64_t r = runs.begin; r < runs.end; ++r, at.next()) {
    const int64_t n = at.outer, k = at.inner;
    if (x.pixels) {
      const auto of = [&](const A* p) { return constant<V, true>(p, n * x.c); };
      in_tiles<A>(x.c, ApplyTile<T, E, true>{rows_of_pixel<T>(x, n, k), rows_of_pixel<T>(in.aux, n, k),
                                             rows_of_pixel<T>(in.y, n, k), of(in.scale), of(in.shift), of(in.centre),
                                             of(in.gate), in.act, set<V>(in.slope), stream});
    } else {
      const auto of = [&](const A* p) { return constant<V, false>(p, r); };
      in_tiles<A>(x.s, ApplyTile<T, E, false>{rows_of_plane<T>(x, n, k), rows_of_plane<T>(in.aux, n, k),
                                              rows_of_plane<T>(in.y, n, k), of(in.scale), of(in.shift), of(in.centre),
                                              of(in.gate), in.act, set<V>(in.slope), stream});
    }
  }
  streamed(stream);
}

// ---- dx = scale·e + tilt·(x − centre) + level

template <class T, Given F, bool PerElement>
struct SpreadTile {
  using V = Vec<Acc<T>>;
  using C = Constant<V, PerElement>;
  Rows<T> x, dy, dx;
  C scale, shift, centre, gate, spread, tilt, level;
  Act act;
  V slope;
  bool stream;
  AtPlaces<Acc<T>> places;  // from the plane's on, or from its sample's first channel's
  int64_t here;

  template <bool Full>
  FA_INLINE V off_centre(int64_t i, int64_t j, const Part& part) const {
    return taken<Full, V>(x, i, j, part) - centre.template at<Full>(i, j, part);
  }
  // e without the activation's part; of planes without an activation scale holds the gate, and level the rest.
  template <bool Full>
  FA_INLINE V gradient(int64_t i, int64_t j, const Part& part) const {
    V g{};
    if (dy.p) g = taken<Full, V>(dy, i, j, part);
    if constexpr (F == Given::any) g = g * gate.template at<Full>(i, j, part) + spread.template at<Full>(i, j, part);
    return g;
  }
  template <bool Full>
  FA_INLINE V finished(int64_t i, int64_t j, const Part& part, V e, V t) const {
    V out = level.template at<Full>(i, j, part);
    if constexpr (F != Given::nothing) out = scale.template at<Full>(i, j, part) * e + out;
    if (tilt.p) out = tilt.template at<Full>(i, j, part) * t + out;
    if (places.value) out = out + (at_place(i + j * count_of<V>, 0) + at_place(i + j * count_of<V>, places.apart));
    return out;
  }
  // What is added from element i on. Of a pixel, the arrays go on for a vector more than there are channels.
  FA_INLINE V at_place(int64_t i, int64_t second) const {
    using I = Integer<Acc<T>>;
    if constexpr (PerElement) {
      Integer<V> place;
      std::memcpy(&place, places.place + second + i, sizeof(place));
      return select(place == Integer<V>{} + I(here), get<V>(places.value + second + i), V{});
    } else {
      const Integer<V> position = to_integer(lanes_from_zero<V>()) + I(i);
      return select(position == Integer<V>{} + places.place[second], set<V>(places.value[second]), V{});
    }
  }
  template <bool Full>
  FA_INLINE V plain(int64_t i, int64_t j, const Part& part) const {
    V t{};
    if (tilt.p) t = off_centre<Full>(i, j, part);
    V e{};
    if constexpr (F != Given::nothing) e = gradient<Full>(i, j, part);
    return finished<Full>(i, j, part, e, t);
  }
  template <bool Full>
  FA_INLINE void placed(int64_t i, int64_t j, const Part& part, V& t, V& v) const {
    t = off_centre<Full>(i, j, part);
    v = scale.template at<Full>(i, j, part) * t + shift.template at<Full>(i, j, part);
  }
  template <bool Full>
  FA_INLINE V behind(int64_t i, int64_t j, const Part& part, V t, V d) const {
    const V g = gradient<Full>(i, j, part);
    return finished<Full>(i, j, part, select(d == V{}, V{}, g * d), t);  // a cut gradient is 0, whatever was cut
  }
  template <bool Full>
  FA_INLINE void take(int64_t i, const Part& part) const {
    if constexpr (F != Given::any) {
      if constexpr (Full) {
        FA_TILE
        for (int64_t j = 0; j < kRows; ++j) given<true>(dx, i, j, part, plain<true>(i, j, part), stream);
      } else {
        FA_ROLLED
        for (int64_t j = 0; j < part.rows; ++j) given<false>(dx, i, j, part, plain<false>(i, j, part), stream);
      }
    } else {
      V t[kRows], v[kRows], u[kRows], d[kRows];
      if constexpr (Full) {
        FA_TILE
        for (int64_t j = 0; j < kRows; ++j) placed<true>(i, j, part, t[j], v[j]);
      } else {
        FA_ROLLED
        for (int64_t j = 0; j < part.rows; ++j) placed<false>(i, j, part, t[j], v[j]);
      }
      activations<V, true>(act, part.rows, v, u, d, slope);
      if constexpr (Full) {
        FA_TILE
        for (int64_t j = 0; j < kRows; ++j) given<true>(dx, i, j, part, behind<true>(i, j, part, t[j], d[j]), stream);
      } else {
        FA_ROLLED
        for (int64_t j = 0; j < part.rows; ++j)
          given<false>(dx, i, j, part, behind<false>(i, j, part, t[j], d[j]), stream);
      }
    }
  }
};

template <class T, Given F, bool PerElement>
FA_INLINE SpreadTile<T, F, PerElement> spread_tile(const Affine<T>& in, const AtPlaces<Acc<T>>& places, int64_t n,
                                                   int64_t k, int64_t at, bool stream) {
  using V = Vec<Acc<T>>;
  const auto rows = [&](const Map& m) { return PerElement ? rows_of_pixel<T>(m, n, k) : rows_of_plane<T>(m, n, k); };
  const auto of = [&](const Acc<T>* p) { return constant<V, PerElement>(p, at); };
  SpreadTile<T, F, PerElement> f;
  f.x = rows(in.x), f.dy = rows(in.dy), f.dx = rows(in.y);
  f.scale = of(in.scale), f.shift = of(in.shift), f.centre = of(in.centre), f.gate = of(in.gate);
  f.spread = of(in.spread), f.tilt = of(in.tilt), f.level = of(in.level);
  f.act = in.act, f.slope = set<V>(in.slope), f.stream = stream;
  f.places = places, f.here = k;
  if (places.value) f.places.value += at, f.places.place += at;
  return f;
}

template <class T, Given F>
void spread_runs(const Affine<T>& in, Range runs, const AtPlaces<Acc<T>>& places) {
  using A = Acc<T>;
  const Map& x = in.x;
  const bool stream = streams<T>(in.y, in.together);
  Place at(runs.begin, x.pixels ? x.s : x.c);
  for (int64_t r = runs.begin; r < runs.end; ++r, at.next()) {
    const int64_t n = at.outer, k = at.inner;
    if (x.pixels) {
      in_tiles<A>(x.c, spread_tile<T, F, true>(in, places, n, k, n * x.c, stream));
    } else {
      in_tiles<A>(x.s, spread_tile<T, F, false>(in, places, n, k, r, stream));
    }
  }
  streamed(stream);
}
#undef FA_TILE
