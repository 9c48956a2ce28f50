// Gates of planes out of their statistics. A plane's logit is slope·(x − mean) + offset; in the first half of a group
// slope is 0, and the logit one number.
#include "cpu/behind.kernels.h"
#include "cpu/channel_pool.kernels.h"

// What a plane's gate is made of, one value per channel of a sample.
template <class A>
struct PlaneGate {
  const A *mean, *slope, *offset;
};

template <class T, bool Spatial>
struct GatePlane {
  using A = Acc<T>;
  const T *x, *residual;
  T* y;
  A mean, slope, offset, gate;
  Act act;
  A epilogue_slope;
  bool stream;

  template <bool Plain, class V>
  FA_INLINE void at(int64_t i) const {
    if constexpr (is_vector<V>) {
      soon(x + i);
      if (!stream) soon_written(y + i);
      if (!Plain && residual) soon(residual + i);
    }
    V v = load<V>(x + i);
    if constexpr (Spatial)
      v = v * sigmoid_of<V>((v - mean) * slope + offset);
    else
      v = v * gate;
    if (!Plain && residual) v = v + load<V>(residual + i);
    store<V>(y + i, Plain ? v : finished<V>(v, act, set<V>(epilogue_slope)), stream);
  }
};

// Planes of y [begin, end), numbered n·C + d: source channel d/2, of the second half of the channels where d is odd.
FA_INLINE int64_t source_of(int64_t d, int64_t c) { return d / 2 + (d % 2 ? c / 2 : 0); }

// The parameters, K elements each.
template <class A>
struct Affine {
  const A *cweight, *cbias, *sweight, *sbias, *norm_weight, *norm_bias;
  int64_t k;
  A eps;

  bool second(int64_t c) const { return c % (2 * k) >= k; }
  // slope and offset of the logit of channel c, out of its mean and rstd.
  FA_INLINE void logit(int64_t c, A mean, A rstd, A* slope, A* offset) const {
    const int64_t i = c % k;
    const bool is_second = second(c);
    *slope = is_second ? sweight[i] * (norm_weight ? norm_weight[i] : A(1)) * rstd : A(0);
    *offset = is_second ? sweight[i] * (norm_bias ? norm_bias[i] : A(0)) + sbias[i] : cweight[i] * mean + cbias[i];
  }
};

template <class T>
void gate_planes(const Map& x, const Map& residual, const Map& y, Range rows, const Affine<Acc<T>>& affine,
                 Acc<T>* means, Acc<T>* rstds, Act act, Acc<T> epilogue_slope) {
  using A = Acc<T>;
  const bool stream = streams<T>(y);
  Place at(rows.begin, x.c);
  for (int64_t i = rows.begin; i < rows.end; ++i, at.next()) {
    const int64_t n = at.outer, d = at.inner, c = source_of(d, x.c), r = n * x.c + c;
    const T* const from = x.plane<const T>(n, c);
    const T* const add = residual.data ? residual.plane<const T>(n, d) : nullptr;
    A mean, var = 0, slope, offset;
    if (affine.second(c)) {
      moments_run<T>(from, x.s, &mean, &var);
      var = 1 / std::sqrt(var + affine.eps);
    } else {
      pool_run<T, Pool::mean, false>(from, x.s, &mean, nullptr, nullptr);
      mean /= A(x.s);
    }
    means[r] = mean, rstds[r] = var;
    affine.logit(c, mean, var, &slope, &offset);
    if (affine.second(c)) {
      const GatePlane<T, true> f{from, add, y.plane<T>(n, d), mean, slope, offset, 0, act, epilogue_slope, stream};
      each_finished<T>(x.s, f);
    } else {
      const GatePlane<T, false> f{
          from, add, y.plane<T>(n, d), mean, slope, offset, sigmoid_of<A>(offset), act, epilogue_slope, stream};
      each_finished<T>(x.s, f);
    }
  }
  streamed(stream);
}

template <class T, bool Spatial>
struct SumPlane {
  using A = Acc<T>;
  const T *x, *dy, *aux;
  T* kept;
  A mean, rstd, slope, offset, gate;
  Act act;
  A epilogue_slope;
  bool output;

  // q = e·x·s·(1 − s), and q·x̂; in the first half e·x.
  template <class V>
  FA_INLINE void step(int64_t i, V& q0, V& q1) const {
    if constexpr (is_vector<V>) {
      soon(x + i), soon(dy + i);
      if (aux) soon(aux + i);
      if (kept) soon_written(kept + i);
    }
    const V v = load<V>(x + i), apart = v - mean;
    const V s = Spatial ? sigmoid_of<V>(apart * slope + offset) : set<V>(gate);
    const V e = behind<V>(load<V>(dy + i), aux ? load<V>(aux + i) : V{}, v * s, act, set<V>(epilogue_slope), output,
                          aux != nullptr);
    if (kept) store<V>(kept + i, e);
    if constexpr (Spatial) {
      const V q = e * v * s * (1 - s);
      q0 = q0 + q;
      q1 = q1 + q * (apart * rstd);
    } else {
      q0 = q0 + e * v;
    }
  }
};

template <class T, bool Spatial>
FA_INLINE void sum_run(const SumPlane<T, Spatial>& f, int64_t n, Acc<T>* q0, Acc<T>* q1) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  double aside0 = 0, aside1 = 0;
  A rest0 = 0, rest1 = 0;
  int64_t i = 0;
  do {  // sums are put aside every 4096 elements, in double
    const int64_t stop = std::min<int64_t>(n, i + 4096);
    V t0[2] = {}, t1[2] = {};
    for (; i + 2 * W <= stop; i += 2 * W) {
      f.template step<V>(i, t0[0], t1[0]);
      f.template step<V>(i + W, t0[1], t1[1]);
    }
    if (n - i < 2 * W) {
      for (; i + W <= n; i += W) f.template step<V>(i, t0[0], t1[0]);
      for (; i < n; ++i) f.template step<A>(i, rest0, rest1);
    }
    aside0 += sum(t0[0] + t0[1]), aside1 += sum(t1[0] + t1[1]);
  } while (i < n);
  *q0 = A(aside0 + rest0), *q1 = A(aside1 + rest1);
}

template <class T, bool Spatial>
struct BackPlane {
  using A = Acc<T>;
  const T *x, *dy;
  T* dx;
  A mean, rstd, slope, offset, gate, add, along;  // Spatial: slope·(q − add − x̂·along), else + add
  Act act;
  A epilogue_slope;
  bool stream;

  template <class V>
  FA_INLINE void at(int64_t i) const {
    if constexpr (is_vector<V>) {
      soon(dy + i);
      if (!stream) soon_written(dx + i);
    }
    V v{};
    if (Spatial || act != Act::identity) v = load<V>(x + i);
    const V apart = v - mean;
    const V s = Spatial ? sigmoid_of<V>(apart * slope + offset) : set<V>(gate);
    const V e = behind<V>(load<V>(dy + i), V{}, v * s, act, set<V>(epilogue_slope), false, false);
    V out = e * s;
    if constexpr (Spatial)
      out = out + (out * v * (1 - s) - add - apart * along) * slope;
    else
      out = out + add;
    store<V>(dx + i, out, stream);
  }
};

template <class T, bool Spatial>
FA_INLINE void back_plane(const Epilogue<T>& in, const Map& kept, const Map& dx, int64_t n, int64_t d, int64_t c,
                          const Affine<Acc<T>>& affine, Acc<T> mean, Acc<T> rstd, Acc<T>* q0, Acc<T>* q1, bool stream) {
  using A = Acc<T>;
  A slope, offset;
  affine.logit(c, mean, rstd, &slope, &offset);
  const A gate = sigmoid_of<A>(offset);
  const T *const x = in.x.template plane<const T>(n, c), *const dy = in.dy.template plane<const T>(n, d);
  const T* const aux = in.aux.data ? in.aux.template plane<const T>(n, d) : nullptr;
  T* const keep = kept.data ? kept.plane<T>(n, d) : nullptr;
  const SumPlane<T, Spatial> sums{x,     dy,     aux,  keep,   mean,     rstd,
                                  slope, offset, gate, in.act, in.slope, from_output(in.act)};
  sum_run<T, Spatial>(sums, in.x.s, q0, q1);
  const A size = A(in.x.s);
  if (!Spatial) *q0 *= gate * (1 - gate);
  const A add = Spatial ? *q0 / size : affine.cweight[c % affine.k] * *q0 / size;
  const BackPlane<T, Spatial> back{x,
                                   keep ? keep : dy,
                                   dx.plane<T>(n, c),
                                   mean,
                                   rstd,
                                   slope,
                                   offset,
                                   gate,
                                   add,
                                   *q1 / size * rstd,
                                   keep ? Act::identity : in.act,  // what was kept is e
                                   in.slope,
                                   stream};
  each<A>(in.x.s, back);
}

// Planes of dy, numbered as those of y.
template <class T>
void back_planes(const Epilogue<T>& in, const Map& kept, const Map& dx, Range rows, const Affine<Acc<T>>& affine,
                 const Acc<T>* means, const Acc<T>* rstds, Acc<T>* q0, Acc<T>* q1) {
  const bool stream = streams<T>(dx);
  const int64_t channels = in.x.c;
  Place at(rows.begin, channels);
  for (int64_t i = rows.begin; i < rows.end; ++i, at.next()) {
    const int64_t n = at.outer, d = at.inner, c = source_of(d, channels), r = n * channels + c;
    if (affine.second(c))
      back_plane<T, true>(in, kept, dx, n, d, c, affine, means[r], rstds[r], q0 + r, q1 + r, stream);
    else
      back_plane<T, false>(in, kept, dx, n, d, c, affine, means[r], rstds[r], q0 + r, q1 + r, stream);
  }
  streamed(stream);
}

// ---- pixels: rows of C are shuffled in the first-level cache, in the accumulation dtype

// a0 b0 a1 b1 …
template <class V>
FA_INLINE void interleave(V a, V b, V& low, V& high) {
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (is_vector<V>) {
    constexpr int64_t N = count_of<V>;
    Integer<V> first{}, second{};
    for (int64_t i = 0; i < N; ++i) {
      first[i] = i / 2 + (i % 2) * N;
      second[i] = N / 2 + i / 2 + (i % 2) * N;
    }
    low = __builtin_shuffle(a, b, first);
    high = __builtin_shuffle(a, b, second);
    return;
  }
#endif
  if constexpr (!is_vector<V>)
    low = a, high = b;
  else
    for (int64_t i = 0, half = count_of<V> / 2; i < half; ++i) {
      low[2 * i] = a[i], low[2 * i + 1] = b[i];
      high[2 * i] = a[half + i], high[2 * i + 1] = b[half + i];
    }
}
template <class V>
FA_INLINE void deinterleave(V low, V high, V& a, V& b) {
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (is_vector<V>) {
    constexpr int64_t N = count_of<V>;
    Integer<V> even{}, odd{};
    for (int64_t i = 0; i < N; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    a = __builtin_shuffle(low, high, even);
    b = __builtin_shuffle(low, high, odd);
    return;
  }
#endif
  if constexpr (!is_vector<V>)
    a = low, b = high;
  else
    for (int64_t i = 0, half = count_of<V> / 2; i < half; ++i) {
      a[i] = low[2 * i], b[i] = low[2 * i + 1];
      a[half + i] = high[2 * i], b[half + i] = high[2 * i + 1];
    }
}

// y[2j] and y[2j + 1] out of the j-th of each half of v, with what follows the gate.
template <class T>
struct Weave {
  using A = Acc<T>;
  const A* v;
  int64_t half;
  const T* residual;
  T* y;
  Act act;
  A slope;

  template <class V>
  FA_INLINE void at(int64_t j) const {
    constexpr int64_t W = count_of<V>;
    V low, high;
    interleave<V>(get<V>(v + j), get<V>(v + half + j), low, high);
    if (residual) {
      low = low + load<V>(residual + 2 * j);
      high = high + load<V>(residual + 2 * j + W);
    }
    store<V>(y + 2 * j, finished<V>(low, act, set<V>(slope)));
    store<V>(y + 2 * j + W, finished<V>(high, act, set<V>(slope)));
  }
};
template <class T>
struct Unweave {
  using A = Acc<T>;
  const T* from;
  A* to;
  int64_t half;

  template <class V>
  FA_INLINE void at(int64_t j) const {
    V a, b;
    deinterleave<V>(load<V>(from + 2 * j), load<V>(from + 2 * j + count_of<V>), a, b);
    put<V>(to + j, a);
    put<V>(to + half + j, b);
  }
};

// x·s for a pixel's channels. Where slope is 0 the logit is the offset, whatever x is.
template <class V>
FA_INLINE V gate_at(V x, V mean, V slope, V offset) {
  return sigmoid_of<V>(select(slope == V{}, offset, (x - mean) * slope + offset));
}
template <class T>
struct GatePixel {
  using A = Acc<T>;
  const T* x;
  PlaneGate<A> gate;
  A* v;

  template <class V>
  FA_INLINE void at(int64_t c) const {
    if constexpr (is_vector<V>) soon(x + c);
    const V p = load<V>(x + c);
    put<V>(v + c, p * gate_at<V>(p, get<V>(gate.mean + c), get<V>(gate.slope + c), get<V>(gate.offset + c)));
  }
};

template <class T>
void gate_pixels(const Map& x, const Map& residual, const Map& y, int64_t n, Range s, const PlaneGate<Acc<T>>& gate,
                 Acc<T>* room, Act act, Acc<T> slope) {
  for (int64_t p = s.begin; p < s.end; ++p) {
    const GatePixel<T> f{x.pixel<const T>(n, p), gate, room};
    each<Acc<T>>(x.c, f);
    const Weave<T> w{room, x.c / 2, residual.data ? residual.pixel<const T>(n, p) : nullptr, y.pixel<T>(n, p),
                     act,  slope};
    each<Acc<T>>(x.c / 2, w);
  }
}

template <class T>
struct SumPixel {
  using A = Acc<T>;
  const T* x;
  A* e;  // dy before, e after
  const A* aux;
  PlaneGate<A> gate;
  const A* rstd;
  A *q0, *q1;
  Act act;
  A slope;
  bool output;

  template <class V>
  FA_INLINE void at(int64_t c) const {
    if constexpr (is_vector<V>) soon(x + c);
    const V v = load<V>(x + c), mean = get<V>(gate.mean + c);
    const V s = gate_at<V>(v, mean, get<V>(gate.slope + c), get<V>(gate.offset + c));
    const V g =
        behind<V>(get<V>(e + c), aux ? get<V>(aux + c) : V{}, v * s, act, set<V>(slope), output, aux != nullptr);
    put<V>(e + c, g);
    const V q = g * v * s * (1 - s);
    put<V>(q0 + c, get<V>(q0 + c) + q);
    put<V>(q1 + c, get<V>(q1 + c) + q * ((v - mean) * get<V>(rstd + c)));
  }
};

// Sums over the pixels s of one sample into q0 and q1, and e where it is kept. room: 2·C.
template <class T>
void sum_pixels(const Epilogue<T>& in, const Map& kept, int64_t n, Range s, const PlaneGate<Acc<T>>& gate,
                const Acc<T>* rstd, Acc<T>* room, Acc<T>* q0, Acc<T>* q1) {
  using A = Acc<T>;
  const int64_t c = in.x.c;
  for (int64_t i = 0; i < c; ++i) q0[i] = q1[i] = 0;
  for (int64_t p = s.begin; p < s.end; ++p) {
    const Unweave<T> f{in.dy.template pixel<const T>(n, p), room, c / 2};
    each<A>(c / 2, f);
    if (in.aux.data) {
      const Unweave<T> g{in.aux.template pixel<const T>(n, p), room + c, c / 2};
      each<A>(c / 2, g);
    }
    const SumPixel<T> sums{in.x.template pixel<const T>(n, p),
                           room,
                           in.aux.data ? room + c : nullptr,
                           gate,
                           rstd,
                           q0,
                           q1,
                           in.act,
                           in.slope,
                           from_output(in.act)};
    each<A>(c, sums);
    if (kept.data) {
      const Weave<T> w{room, c / 2, nullptr, kept.pixel<T>(n, p), Act::identity, 0};
      each<A>(c / 2, w);
    }
  }
}

template <class T>
struct BackPixel {
  using A = Acc<T>;
  const T* x;
  const A* e;
  T* dx;
  PlaneGate<A> gate;
  const A *add, *along;  // dx = e·s + slope·(q − x̂·mean(q·x̂)) + add; along = rstd·mean(q·x̂)
  Act act;
  A epilogue_slope;
  bool stream;

  template <class V>
  FA_INLINE void at(int64_t c) const {
    if constexpr (is_vector<V>)
      if (!stream) soon_written(dx + c);
    const V v = load<V>(x + c), mean = get<V>(gate.mean + c), slope = get<V>(gate.slope + c);
    const V s = gate_at<V>(v, mean, slope, get<V>(gate.offset + c));
    const V g = behind<V>(get<V>(e + c), V{}, v * s, act, set<V>(epilogue_slope), false, false) * s;
    const V back = (g * v * (1 - s) - (v - mean) * get<V>(along + c)) * slope;
    store<V>(dx + c, g + select(slope == V{}, V{}, back) + get<V>(add + c), stream);
  }
};

template <class T>
void back_pixels(const Epilogue<T>& in, const Map& dx, int64_t n, Range s, const PlaneGate<Acc<T>>& gate,
                 const Acc<T>* add, const Acc<T>* along, Acc<T>* room) {
  using A = Acc<T>;
  const bool stream = streams<T>(dx);
  for (int64_t p = s.begin; p < s.end; ++p) {
    const Unweave<T> f{in.dy.template pixel<const T>(n, p), room, in.x.c / 2};
    each<A>(in.x.c / 2, f);
    const BackPixel<T> back{
        in.x.template pixel<const T>(n, p), room, dx.pixel<T>(n, p), gate, add, along, in.act, in.slope, stream};
    each<A>(in.x.c, back);
  }
  streamed(stream);
}
