template <class V>
FA_INLINE V sign_of(V x) {  // 0 at NaN, as torch.sign
  return select(x > V{}, set<V>(1), select(x < V{}, set<V>(-1), V{}));
}
template <class V>
FA_INLINE V beyond(V x, V tau) {  // |x| − τ
  return select(x < V{}, -x, x) - tau;
}

// y = sign(x)·max(|x| − τ, 0) + r over a run: one threshold for a plane's run, one per element for a pixel's.
template <class T, bool Residual, bool PerElement>
struct ThresholdRun {
  using A = Acc<T>;
  const T *x, *residual;
  T* y;
  const A* tau;
  bool stream;

  template <class V>
  FA_INLINE void at(int64_t i) const {
    if constexpr (is_vector<V>) {
      soon(x + i);
      if (!stream) soon_written(y + i);
      if constexpr (Residual) soon(residual + i);
    }
    const V v = load<V>(x + i), over = beyond(v, PerElement ? get<V>(tau + i) : set<V>(*tau));
    V out = sign_of(v) * select(over <= V{}, V{}, over);  // a product: 0·NaN is NaN
    if constexpr (Residual) out = out + load<V>(residual + i);
    store<V>(y + i, out, stream);
  }
};

// Runs [begin, end): planes are numbered n·C + c, pixels n·S + s.
template <class T, bool Residual>
void threshold_runs(const Map& x, const Map& residual, const Map& y, Range runs, const Acc<T>* tau) {
  const bool stream = streams<T>(y);
  Place at(runs.begin, x.pixels ? x.s : x.c);
  for (int64_t i = runs.begin; i < runs.end; ++i, at.next()) {
    const int64_t n = at.outer, k = at.inner;
    if (x.pixels) {
      const ThresholdRun<T, Residual, true> f{x.pixel<const T>(n, k),
                                              Residual ? residual.pixel<const T>(n, k) : nullptr, y.pixel<T>(n, k),
                                              tau + n * x.c, stream};
      each<Acc<T>>(x.c, f);
    } else {
      const ThresholdRun<T, Residual, false> f{x.plane<const T>(n, k),
                                               Residual ? residual.plane<const T>(n, k) : nullptr, y.plane<T>(n, k),
                                               tau + i, stream};
      each<Acc<T>>(x.s, f);
    }
  }
  streamed(stream);
}

// e = dy·sign(x)·[|x| > τ], and what one read of dy and x can give: Σ e, and dx = e·sign(x) where it is wanted.
template <class T, bool Dx>
struct Passed {
  using A = Acc<T>;
  const T *x, *dy;
  T* dx;
  bool stream;

  template <class V>
  FA_INLINE void step(int64_t i, V tau, V& total) const {
    if constexpr (is_vector<V>) {
      soon(x + i), soon(dy + i);
      if (Dx && !stream) soon_written(dx + i);
    }
    const V v = load<V>(x + i), sign = sign_of(v), through = load<V>(dy + i) * sign;
    const V e = select(beyond(v, tau) <= V{}, V{}, through);
    total = total - e;
    if constexpr (Dx) store<V>(dx + i, e * sign, stream);
  }
};

template <class T, bool Dx>
FA_INLINE Acc<T> passed_run(const Passed<T, Dx>& f, int64_t n, Acc<T> tau) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  const V t = set<V>(tau);
  V total[4] = {};
  int64_t i = 0;
  double aside = 0;  // as in channel_pool.kernels.h
  for (;;) {
    const int64_t stop = std::min<int64_t>(n, i + 4096);
    for (; i + 4 * W <= stop; i += 4 * W) {
      FA_UNROLL
      for (int64_t j = 0; j < 4; ++j) f.template step<V>(i + j * W, t, total[j]);
    }
    if (n - i < 4 * W) break;
    aside += sum((total[0] + total[1]) + (total[2] + total[3]));
    total[0] = total[1] = total[2] = total[3] = V{};
  }
  for (; i + W <= n; i += W) f.template step<V>(i, t, total[0]);
  A rest = 0;
  for (; i < n; ++i) f.template step<A>(i, tau, rest);
  return A(aside + (sum((total[0] + total[1]) + (total[2] + total[3])) + rest));
}

// Four pixels at a time, so that the sums over C are loaded and stored once for them.
template <class T, bool Dx>
struct PassedPixels {
  using A = Acc<T>;
  Passed<T, Dx> at_pixel[4];
  int rows;
  const A* tau;
  A* dtau;

  template <class V>
  FA_INLINE void at(int64_t c) const {
    const V t = get<V>(tau + c);
    V total = get<V>(dtau + c);
    for (int j = 0; j < rows; ++j) at_pixel[j].template step<V>(c, t, total);
    put<V>(dtau + c, total);
  }
};

template <class T, bool Dx>
void passed_planes(const Map& x, const Map& dy, const Map& dx, Range rows, const Acc<T>* tau, Acc<T>* dtau) {
  const bool stream = Dx && streams<T>(dx);
  Place at(rows.begin, x.c);
  for (int64_t r = rows.begin; r < rows.end; ++r, at.next()) {
    const int64_t n = at.outer, c = at.inner;
    const Passed<T, Dx> f{x.plane<const T>(n, c), dy.plane<const T>(n, c), Dx ? dx.plane<T>(n, c) : nullptr, stream};
    dtau[r] = passed_run(f, x.s, tau[r]);
  }
  streamed(stream);
}

template <class T, bool Dx>
void passed_pixels(const Map& x, const Map& dy, const Map& dx, int64_t n, Range s, const Acc<T>* tau, Acc<T>* dtau) {
  const bool stream = Dx && streams<T>(dx);
  for (int64_t c = 0; c < x.c; ++c) dtau[c] = 0;
  for (int64_t p = s.begin; p < s.end;) {
    PassedPixels<T, Dx> f{};
    f.rows = int(std::min<int64_t>(4, s.end - p));
    for (int j = 0; j < f.rows; ++j)
      f.at_pixel[j] = {x.pixel<const T>(n, p + j), dy.pixel<const T>(n, p + j), Dx ? dx.pixel<T>(n, p + j) : nullptr,
                       stream};
    f.tau = tau + n * x.c, f.dtau = dtau;
    each<Acc<T>>(x.c, f);
    p += f.rows;
  }
  streamed(stream);
}

// dx = e·sign(x) + the descriptor's gradient: a constant per plane for the mean, times sign(x) for the mean of |x|.
template <class T, bool Abs, bool PerElement>
struct ShrinkBack {
  using A = Acc<T>;
  const T *x, *dy;
  T* dx;
  const A *tau, *add;
  bool stream;

  template <class V>
  FA_INLINE void at(int64_t i) const {
    if constexpr (is_vector<V>) {
      soon(x + i), soon(dy + i);
      if (!stream) soon_written(dx + i);
    }
    const V v = load<V>(x + i), sign = sign_of(v), through = load<V>(dy + i) * sign;
    const V e = select(beyond(v, PerElement ? get<V>(tau + i) : set<V>(*tau)) <= V{}, V{}, through);
    const V d = PerElement ? get<V>(add + i) : set<V>(*add);
    store<V>(dx + i, Abs ? (e + d) * sign : e * sign + d, stream);
  }
};

template <class T, bool Abs>
void shrink_back_runs(const Map& x, const Map& dy, const Map& dx, Range runs, const Acc<T>* tau, const Acc<T>* add) {
  const bool stream = streams<T>(dx);
  Place at(runs.begin, x.pixels ? x.s : x.c);
  for (int64_t i = runs.begin; i < runs.end; ++i, at.next()) {
    const int64_t n = at.outer, k = at.inner;
    if (x.pixels) {
      const ShrinkBack<T, Abs, true> f{x.pixel<const T>(n, k), dy.pixel<const T>(n, k), dx.pixel<T>(n, k),
                                       tau + n * x.c,          add + n * x.c,           stream};
      each<Acc<T>>(x.c, f);
    } else {
      const ShrinkBack<T, Abs, false> f{
          x.plane<const T>(n, k), dy.plane<const T>(n, k), dx.plane<T>(n, k), tau + i, add + i, stream};
      each<Acc<T>>(x.s, f);
    }
  }
  streamed(stream);
}
