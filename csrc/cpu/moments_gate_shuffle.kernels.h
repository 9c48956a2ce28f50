// u = scale·t + shift with t = x − mean, gated by s = sigmoid(steep·t + offset): one number in the first half of a
// group.
#include "cpu/plane_gate_shuffle.kernels.h"

template <class T, bool Spatial>
struct SelfPlane {
  using A = Acc<T>;
  const T *x, *residual;
  T* y;
  A mean, scale, shift, steep, offset;  // not Spatial: scale and shift are times the gate
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
    const V t = load<V>(x + i) - mean;
    V v = t * scale + shift;
    if constexpr (Spatial) v = v * sigmoid_of<V>(t * steep + offset);
    if (!Plain && residual) v = v + load<V>(residual + i);
    store<V>(y + i, Plain ? v : finished<V>(v, act, set<V>(epilogue_slope)), stream);
  }
};

template <class T>
void self_gate_planes(const SelfGate<T>& in, Range rows) {
  using A = Acc<T>;
  const bool stream = streams<T>(in.y);
  const int64_t channels = in.x.c;
  Place at(rows.begin, channels);
  for (int64_t i = rows.begin; i < rows.end; ++i, at.next()) {
    const int64_t n = at.outer, d = at.inner, c = source_of(d, channels), r = n * channels + c;
    const T* const from = in.x.template plane<const T>(n, c);
    const T* const add = in.aux.data ? in.aux.template plane<const T>(n, d) : nullptr;
    T* const to = in.y.template plane<T>(n, d);
    if (in.second(c)) {
      const SelfPlane<T, true> f{from,        add,          to,     in.mean[r], in.scale[r], in.shift[r],
                                 in.steep[r], in.offset[r], in.act, in.slope,   stream};
      each_finished<T>(in.x.s, f);
    } else {
      const A gate = sigmoid_of<A>(in.offset[r]);
      const SelfPlane<T, false> f{from, add,    to,       in.mean[r], in.scale[r] * gate, in.shift[r] * gate, 0,
                                  0,    in.act, in.slope, stream};
      each_finished<T>(in.x.s, f);
    }
  }
  streamed(stream);
}

// Σ e·s·t, Σ e·s, Σ q·t, Σ q; in the first half Σ e·t and Σ e.
template <class T, bool Spatial>
struct SelfSumPlane {
  using A = Acc<T>;
  const T *x, *dy, *aux;
  T* kept;
  A mean, scale, shift, steep, offset;
  Act act;
  A epilogue_slope;
  bool output, stream;
  static constexpr int kSums = Spatial ? 4 : 2;

  template <class V>
  FA_INLINE void step(int64_t i, V* sums) const {
    if constexpr (is_vector<V>) {
      soon(x + i), soon(dy + i);
      if (aux) soon(aux + i);
      if (kept && !stream) soon_written(kept + i);
    }
    const V t = load<V>(x + i) - mean, u = t * scale + shift;
    V s = set<V>(1);
    if constexpr (Spatial) s = sigmoid_of<V>(t * steep + offset);
    const V e = behind<V>(load<V>(dy + i), aux ? load<V>(aux + i) : V{}, u * s, act, set<V>(epilogue_slope), output,
                          aux != nullptr);
    if (kept) store<V>(kept + i, e, stream);
    const V es = Spatial ? e * s : e;
    sums[0] = sums[0] + es * t;
    sums[1] = sums[1] + es;
    if constexpr (Spatial) {
      const V q = es * u * (1 - s);
      sums[2] = sums[2] + q * t;
      sums[3] = sums[3] + q;
    }
  }
};

// Sums are put aside every 4096 elements, in double.
template <class T, bool Spatial>
FA_INLINE void self_sum_run(const SelfSumPlane<T, Spatial>& f, int64_t n, double* found) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  constexpr int K = SelfSumPlane<T, Spatial>::kSums;
  A rest[K] = {};
  int64_t i = 0;
  for (int k = 0; k < K; ++k) found[k] = 0;
  do {
    const int64_t stop = std::min<int64_t>(n, i + 4096);
    V even[K] = {}, odd[K] = {};
    for (; i + 2 * W <= stop; i += 2 * W) {
      f.template step<V>(i, even);
      f.template step<V>(i + W, odd);
    }
    if (n - i < 2 * W) {
      for (; i + W <= n; i += W) f.template step<V>(i, even);
      for (; i < n; ++i) f.template step<A>(i, rest);
    }
    for (int k = 0; k < K; ++k) found[k] += sum(even[k] + odd[k]);
  } while (i < n);
  for (int k = 0; k < K; ++k) found[k] += rest[k];
}

template <class T>
void self_sum_planes(const SelfGate<T>& in, Range rows, Acc<T>* sums) {
  using A = Acc<T>;
  const bool stream = in.y.data && streams<T>(in.y);
  const int64_t channels = in.x.c, apart = in.x.n * channels;
  Place at(rows.begin, channels);
  for (int64_t i = rows.begin; i < rows.end; ++i, at.next()) {
    const int64_t n = at.outer, d = at.inner, c = source_of(d, channels), r = n * channels + c;
    const T* const x = in.x.template plane<const T>(n, c);
    const T* const dy = in.dy.template plane<const T>(n, d);
    const T* const aux = in.aux.data ? in.aux.template plane<const T>(n, d) : nullptr;
    T* const kept = in.y.data ? in.y.template plane<T>(n, d) : nullptr;
    double found[4] = {};
    if (in.second(c)) {
      const SelfSumPlane<T, true> f{x,           dy,          aux,          kept,   in.mean[r], in.scale[r],
                                    in.shift[r], in.steep[r], in.offset[r], in.act, in.slope,   from_output(in.act),
                                    stream};
      self_sum_run<T, true>(f, in.x.s, found);
    } else {
      const double g = sigmoid_of<A>(in.offset[r]), scale = in.scale[r], shift = in.shift[r];
      const SelfSumPlane<T, false> f{x, dy, aux,    kept,     in.mean[r],          A(scale * g), A(shift * g),
                                     0, 0,  in.act, in.slope, from_output(in.act), stream};
      self_sum_run<T, false>(f, in.x.s, found);
      found[3] = (found[0] * scale + found[1] * shift) * g * (1 - g);
      found[0] *= g, found[1] *= g;
    }
    for (int k = 0; k < 4; ++k) sums[k * apart + r] = A(found[k]);
  }
  streamed(stream);
}

// dx = e·s·(scale + steep·u·(1 − s)) + tilt·t + level
template <class T, bool Spatial>
struct SelfBackPlane {
  using A = Acc<T>;
  const T *x, *dy;
  T* dx;
  A mean, scale, shift, steep, offset, tilt, level;
  Act act;
  A epilogue_slope;
  bool stream;

  template <class V>
  FA_INLINE void at(int64_t i) const {
    if constexpr (is_vector<V>) {
      soon(x + i), soon(dy + i);
      if (!stream) soon_written(dx + i);
    }
    const V t = load<V>(x + i) - mean, u = t * scale + shift;
    V s = set<V>(1);
    if constexpr (Spatial) s = sigmoid_of<V>(t * steep + offset);
    const V e = behind<V>(load<V>(dy + i), V{}, u * s, act, set<V>(epilogue_slope), false, false);
    const V by = Spatial ? s * (u * (1 - s) * steep + scale) : set<V>(scale);
    store<V>(dx + i, e * by + (t * tilt + level), stream);
  }
};

template <class T>
void self_back_planes(const SelfGate<T>& in, Range rows) {
  using A = Acc<T>;
  const bool stream = streams<T>(in.y);
  const int64_t channels = in.x.c;
  Place at(rows.begin, channels);
  for (int64_t i = rows.begin; i < rows.end; ++i, at.next()) {
    const int64_t n = at.outer, d = at.inner, c = source_of(d, channels), r = n * channels + c;
    const T* const x = in.x.template plane<const T>(n, c);
    const T* const dy = in.dy.template plane<const T>(n, d);
    T* const dx = in.y.template plane<T>(n, c);
    if (in.second(c)) {
      const SelfBackPlane<T, true> f{x,           dy,          dx,           in.mean[r], in.scale[r],
                                     in.shift[r], in.steep[r], in.offset[r], in.tilt[r], in.level[r],
                                     in.act,      in.slope,    stream};
      each<A>(in.x.s, f);
    } else {
      const A g = sigmoid_of<A>(in.offset[r]);
      const SelfBackPlane<T, false> f{x, dy,         dx,          in.mean[r], in.scale[r] * g, in.shift[r] * g, 0,
                                      0, in.tilt[r], in.level[r], in.act,     in.slope,        stream};
      each<A>(in.x.s, f);
    }
  }
  streamed(stream);
}

// ---- pixels: rows of C are shuffled in the first-level cache, in the accumulation dtype

// steep is 0 in first halves here.
template <class T>
struct SelfPixel {
  using A = Acc<T>;
  const T* x;
  SelfValues<A> of;
  A* v;

  template <class V>
  FA_INLINE void at(int64_t c) const {
    if constexpr (is_vector<V>) soon(x + c);
    const V t = load<V>(x + c) - get<V>(of.mean + c);
    const V u = t * get<V>(of.scale + c) + get<V>(of.shift + c);
    put<V>(v + c, u * gate_at<V>(t, V{}, get<V>(of.steep + c), get<V>(of.offset + c)));
  }
};

template <class T>
void self_gate_pixels(const SelfGate<T>& in, int64_t n, Range s, Acc<T>* room) {
  using A = Acc<T>;
  const int64_t c = in.x.c;
  for (int64_t p = s.begin; p < s.end; ++p) {
    const SelfPixel<T> f{in.x.template pixel<const T>(n, p), in.values(n), room};
    each<A>(c, f);
    const Weave<T> w{
        room,   c / 2,   in.aux.data ? in.aux.template pixel<const T>(n, p) : nullptr, in.y.template pixel<T>(n, p),
        in.act, in.slope};
    each<A>(c / 2, w);
  }
}

template <class T>
struct SelfSumPixel {
  using A = Acc<T>;
  const T* x;
  A* e;  // dy before, e after
  const A* aux;
  SelfValues<A> of;
  A* sums;  // four arrays over C
  int64_t channels;
  Act act;
  A slope;
  bool output;

  template <class V>
  FA_INLINE void at(int64_t c) const {
    if constexpr (is_vector<V>) soon(x + c);
    const V t = load<V>(x + c) - get<V>(of.mean + c);
    const V u = t * get<V>(of.scale + c) + get<V>(of.shift + c);
    const V s = gate_at<V>(t, V{}, get<V>(of.steep + c), get<V>(of.offset + c));
    const V g =
        behind<V>(get<V>(e + c), aux ? get<V>(aux + c) : V{}, u * s, act, set<V>(slope), output, aux != nullptr);
    put<V>(e + c, g);
    const V es = g * s, q = es * u * (1 - s);
    A* const to = sums + c;
    put<V>(to, get<V>(to) + es * t);
    put<V>(to + channels, get<V>(to + channels) + es);
    put<V>(to + 2 * channels, get<V>(to + 2 * channels) + q * t);
    put<V>(to + 3 * channels, get<V>(to + 3 * channels) + q);
  }
};

// Sums over the pixels s of one sample, four arrays over C, and e where it is kept. room: 2·C.
template <class T>
void self_sum_pixels(const SelfGate<T>& in, int64_t n, Range s, Acc<T>* room, Acc<T>* sums) {
  using A = Acc<T>;
  const int64_t c = in.x.c;
  for (int64_t i = 0; i < 4 * c; ++i) sums[i] = 0;
  for (int64_t p = s.begin; p < s.end; ++p) {
    const Unweave<T> f{in.dy.template pixel<const T>(n, p), room, c / 2};
    each<A>(c / 2, f);
    if (in.aux.data) {
      const Unweave<T> g{in.aux.template pixel<const T>(n, p), room + c, c / 2};
      each<A>(c / 2, g);
    }
    const SelfSumPixel<T> f2{in.x.template pixel<const T>(n, p),
                             room,
                             in.aux.data ? room + c : nullptr,
                             in.values(n),
                             sums,
                             c,
                             in.act,
                             in.slope,
                             from_output(in.act)};
    each<A>(c, f2);
    if (in.y.data) {
      const Weave<T> w{room, c / 2, nullptr, in.y.template pixel<T>(n, p), Act::identity, 0};
      each<A>(c / 2, w);
    }
  }
}

template <class T>
struct SelfBackPixel {
  using A = Acc<T>;
  const T* x;
  const A* e;
  T* dx;
  SelfValues<A> of;
  Act act;
  A epilogue_slope;
  bool stream;

  template <class V>
  FA_INLINE void at(int64_t c) const {
    if constexpr (is_vector<V>) {
      soon(x + c);
      if (!stream) soon_written(dx + c);
    }
    const V t = load<V>(x + c) - get<V>(of.mean + c), scale = get<V>(of.scale + c), steep = get<V>(of.steep + c);
    const V u = t * scale + get<V>(of.shift + c);
    const V s = gate_at<V>(t, V{}, steep, get<V>(of.offset + c));
    const V g = behind<V>(get<V>(e + c), V{}, u * s, act, set<V>(epilogue_slope), false, false);
    const V by = s * (select(steep == V{}, V{}, u * (1 - s) * steep) + scale);
    store<V>(dx + c, g * by + (t * get<V>(of.tilt + c) + get<V>(of.level + c)), stream);
  }
};

template <class T>
void self_back_pixels(const SelfGate<T>& in, int64_t n, Range s, Acc<T>* room) {
  using A = Acc<T>;
  const bool stream = streams<T>(in.y);
  const int64_t c = in.x.c;
  for (int64_t p = s.begin; p < s.end; ++p) {
    const Unweave<T> f{in.dy.template pixel<const T>(n, p), room, c / 2};
    each<A>(c / 2, f);
    const SelfBackPixel<T> back{
        in.x.template pixel<const T>(n, p), room, in.y.template pixel<T>(n, p), in.values(n), in.act, in.slope, stream};
    each<A>(c, back);
  }
  streamed(stream);
}
