// What a norm leaves of one channel or position: z becomes z·scale, or (z − mean)·scale; in backward also how much of
// e's sums comes off.
template <class V>
struct Normed {
  V mean, scale, less, dot;  // less: mean of e; dot: weight of ẑ
};

// ẑ, the gate 1 + f, and e = dy·x·f'(ẑ).
template <class V, Over K>
FA_INLINE V hat(V z, const Normed<V>& n) {
  if constexpr (K == Over::channels) return z * n.scale;
  if constexpr (K == Over::positions) return (z - n.mean) * n.scale;
  return z;
}
template <class V, Over K>
FA_INLINE V gate_of(V hat) {
  return K == Over::channels ? hat : sigmoid_of<V>(hat);
}
template <class V, Over K>
FA_INLINE V through(V e, V f) {
  return K == Over::channels ? e : e * f * (1 - f);
}

// Arrays of what `Normed` holds: one number per run (Each = false), or one per element of it.
template <class A>
struct Norms {
  const A *mean, *scale, *less, *dot;

  template <class V, bool Each, bool Back>
  FA_INLINE Normed<V> at(int64_t i) const {
    const auto of = [&](const A* p) { return p == nullptr ? V{} : Each ? get<V>(p + i) : set<V>(*p); };
    return {of(mean), of(scale), Back ? of(less) : V{}, Back ? of(dot) : V{}};
  }
};

// y = (1 + f)·x. ahead: where the next thing to read is, beyond what `soon` asks for.
template <class T, Over K, bool Each>
struct MapForward {
  const T *x, *z;
  T* y;
  Norms<Acc<T>> norms;
  int64_t ahead;
  bool stream;

  template <class V>
  FA_INLINE void at(int64_t i) const {
    if constexpr (is_vector<V>) {
      soon(x + i + ahead);
      if (K == Over::none) soon(z + i);
      if (!stream) soon_written(y + i);
    }
    const auto n = norms.template at<V, Each, false>(i);
    store<V>(y + i, (1 + gate_of<V, K>(hat<V, K>(load<V>(z + i), n))) * load<V>(x + i), stream);
  }
};

// Σ e and Σ e·ẑ
template <class T, Over K, bool Each>
struct MapSums {
  const T *x, *z, *dy;
  Norms<Acc<T>> norms;
  int64_t ahead;

  template <class V>
  FA_INLINE void step(int64_t i, V& e_sum, V& dot) const {
    if constexpr (is_vector<V>) soon(x + i + ahead), soon(z + i + ahead), soon(dy + i + ahead);
    const V h = hat<V, K>(load<V>(z + i), norms.template at<V, Each, false>(i));
    const V e = through<V, K>(load<V>(dy + i) * load<V>(x + i), gate_of<V, K>(h));
    if constexpr (K == Over::positions) e_sum = e_sum + e;
    dot = dot + e * h;
  }
};

// dx = dy·(1 + f), dz = (e − less − ẑ·dot)·scale
template <class T, Over K, bool Each>
struct MapBackward {
  const T *x, *z, *dy;
  T *dx, *dz;
  Norms<Acc<T>> norms;
  bool stream;

  template <class V>
  FA_INLINE void at(int64_t i) const {
    if constexpr (is_vector<V>) {
      if (K == Over::none) soon(x + i), soon(z + i), soon(dy + i);
      if (!stream) soon_written(dx + i), soon_written(dz + i);
    }
    const auto n = norms.template at<V, Each, true>(i);
    const V g = load<V>(dy + i), h = hat<V, K>(load<V>(z + i), n), f = gate_of<V, K>(h);
    V e = through<V, K>(g * load<V>(x + i), f);
    if constexpr (K == Over::channels) e = (e - h * n.dot) * n.scale;
    if constexpr (K == Over::positions) e = (e - n.less - h * n.dot) * n.scale;
    store<V>(dx + i, g * (1 + f), stream);
    store<V>(dz + i, e, stream);
  }
};

// A feature map as rows in memory: row r of sample n.
template <class T>
FA_INLINE T* row_of(const Map& m, int64_t n, int64_t r) {
  return m.pixels ? m.pixel<T>(n, r) : m.plane<T>(n, r);
}
inline int64_t length_of(const Map& m) { return m.pixels ? m.c : m.s; }
inline int64_t rows_of(const Map& m) { return m.pixels ? m.s : m.c; }

// Sum of f.term(i) over [0, n), in four chains.
template <class A, class F>
FA_INLINE double sum_of(const F& f, int64_t n) {
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  V part[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    FA_UNROLL
    for (int64_t j = 0; j < 4; ++j) part[j] = part[j] + f.template term<V>(i + j * W);
  }
  for (; i + W <= n; i += W) part[0] = part[0] + f.template term<V>(i);
  A rest = 0;
  for (; i < n; ++i) rest += f.template term<A>(i);
  return double(sum((part[0] + part[1]) + (part[2] + part[3])) + rest);
}
template <class T>
struct Squares {
  const T* z;
  template <class V>
  FA_INLINE V term(int64_t i) const {
    if constexpr (is_vector<V>) soon(z + i);
    const V v = load<V>(z + i);
    return v * v;
  }
};
template <class T>
struct Kept {
  const T* z;
  Acc<T>* to;
  template <class V>
  FA_INLINE V term(int64_t i) const {
    if constexpr (is_vector<V>) soon(z + i);
    const V v = load<V>(z + i);
    put<V>(to + i, v);
    return v;
  }
};
template <class A>
struct Centred {
  const A* from;
  A mean;
  template <class V>
  FA_INLINE V term(int64_t i) const {
    const V v = get<V>(from + i) - set<V>(mean);
    return v * v;
  }
};

// Moments of `n` more elements into those of `before`: Chan, Golub, LeVeque. Nothing before: theirs are the whole's.
template <class V>
FA_INLINE void add_moments(V& mean, V& square, V more_mean, V more_square, Element<V> before, Element<V> n) {
  if (before == 0) {
    mean = more_mean, square = more_square;
    return;
  }
  const V off = more_mean - mean;
  mean = mean + off * (n / (before + n));
  square = square + more_square + off * off * (before * n / (before + n));
}

// Σ z², or mean and Σ (z − mean)², of one run. In pieces, each read once and centred by its own mean, so that a mean
// far from 0 costs no digits.
template <class T, Over K>
FA_INLINE void moments(const T* z, int64_t size, double& mean, double& square) {
  using A = Acc<T>;
  constexpr int64_t piece = 1024;
  A kept[piece];
  mean = square = 0;
  for (int64_t from = 0; from < size; from += piece) {
    const int64_t n = std::min(piece, size - from);
    if constexpr (K == Over::channels) {
      square += sum_of<A>(Squares<T>{z + from}, n);
    } else {
      const double here = sum_of<A>(Kept<T>{z + from, kept}, n) / double(n);
      add_moments<double>(mean, square, here, sum_of<A>(Centred<A>{kept, A(here)}, n), double(from), double(n));
    }
  }
}

// What forward keeps, and what normalises.
template <class A, Over K>
struct Stats : MapStats<A> {
  using MapStats<A>::first;
  using MapStats<A>::second;
  using MapStats<A>::eps;
  using MapStats<A>::count;

  FA_INLINE void put_at(int64_t i, double mean, double square) const {
    if constexpr (K == Over::channels) {
      first[i] = A(std::sqrt(square));
    } else {
      first[i] = A(mean);
      second[i] = A(1 / std::sqrt(square / count + eps));
    }
  }
  // What backward takes off e, from its sums: the mean's part, and the weight of ẑ.
  FA_INLINE void sums(int64_t i, double e_sum, double dots, int64_t size, A& less, A& dot) const {
    less = A(e_sum / double(size));
    dot = A(K == Over::positions ? dots / count : first[i] < A(eps) ? 0 : dots);  // below eps the norm is a constant
  }
  // The factor of z, from what is kept
  FA_INLINE A scale(int64_t i) const {
    if constexpr (K == Over::channels) return 1 / (first[i] < A(eps) ? A(eps) : first[i]);
    return second[i];
  }
};

// Runs [begin, end), rows of memory numbered n·rows + row, each normalised by itself or not at all.
template <class T, Over K>
void map_runs(const Map& x, const Map& z, const Map& y, Range runs, const MapStats<Acc<T>>& given) {
  using A = Acc<T>;
  const Stats<A, K> stats{given};
  const bool stream = streams<T>(y);
  const int64_t size = length_of(x);
  Place at(runs.begin, rows_of(x));
  for (int64_t i = runs.begin; i < runs.end; ++i, at.next()) {
    const int64_t n = at.outer, k = at.inner;
    const T* logits = row_of<const T>(z, n, k);
    A mean = 0, scale = 0;
    if constexpr (K != Over::none) {
      double first, square;
      moments<T, K>(logits, size, first, square);
      stats.put_at(i, first, square);
      mean = stats.first[i], scale = stats.scale(i);
    }
    const MapForward<T, K, false> f{row_of<const T>(x, n, k),          logits, row_of<T>(y, n, k),
                                    {&mean, &scale, nullptr, nullptr}, 0,      stream};
    each<A>(size, f);
  }
  streamed(stream);
}

template <class T, Over K>
void map_back_runs(const Map& x, const Map& z, const Map& dy, const Map& dx, const Map& dz, Range runs,
                   const MapStats<Acc<T>>& given) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  const Stats<A, K> stats{given};
  const bool stream = streams<T>(dx) && streams<T>(dz);
  const int64_t size = length_of(x);
  Place at(runs.begin, rows_of(x));
  for (int64_t r = runs.begin; r < runs.end; ++r, at.next()) {
    const int64_t n = at.outer, k = at.inner;
    A mean = 0, scale = 0, less = 0, dot = 0;
    const Norms<A> norms{&mean, &scale, &less, &dot};
    const T *from = row_of<const T>(x, n, k), *logits = row_of<const T>(z, n, k), *g = row_of<const T>(dy, n, k);
    if constexpr (K != Over::none) {
      mean = stats.first[r], scale = stats.scale(r);
      const MapSums<T, K, false> f{from, logits, g, norms, 0};
      double e_sum = 0, dots = 0;
      for (int64_t i = 0; i < size;) {
        const int64_t stop = std::min<int64_t>(size, i + 4096);
        V e[2] = {}, d[2] = {};
        for (; i + 2 * W <= stop; i += 2 * W) f.template step<V>(i, e[0], d[0]), f.template step<V>(i + W, e[1], d[1]);
        for (; i + W <= stop; i += W) f.template step<V>(i, e[0], d[0]);
        A e_rest = 0, d_rest = 0;
        for (; i < stop; ++i) f.template step<A>(i, e_rest, d_rest);
        e_sum += sum(e[0] + e[1]) + e_rest, dots += sum(d[0] + d[1]) + d_rest;
      }
      stats.sums(r, e_sum, dots, size, less, dot);
    }
    const MapBackward<T, K, false> f{from, logits, g, row_of<T>(dx, n, k), row_of<T>(dz, n, k), norms, stream};
    each<A>(size, f);
  }
  streamed(stream);
}

// Columns of rows in memory, normalised across the rows: a tile of them at a time, whose rows stay in the second-level
// cache from one pass to the next. Sums are put aside in double every 512 rows.
constexpr int64_t ROWS_ASIDE = 512, ROWS_AT_ONCE = 8;

template <class T, Over K>
struct MomentRows {
  using A = Acc<T>;
  const T* z;
  int64_t step, ahead;
  int rows, before;
  A *mean, *square;

  template <class V>
  FA_INLINE void at(int64_t i) const {
    V v[ROWS_AT_ONCE], total{}, squares{};
    for (int j = 0; j < rows; ++j) {
      if constexpr (is_vector<V>) soon(z + j * step + i + ahead);
      v[j] = load<V>(z + j * step + i);
    }
    if constexpr (K == Over::channels) {
      for (int j = 0; j < rows; ++j) squares = squares + v[j] * v[j];
      put<V>(square + i, before ? get<V>(square + i) + squares : squares);
    } else {
      for (int j = 0; j < rows; ++j) total = total + v[j];
      const V here = total * (1 / A(rows));
      for (int j = 0; j < rows; ++j) squares = squares + (v[j] - here) * (v[j] - here);
      V m{}, s{};
      if (before) m = get<V>(mean + i), s = get<V>(square + i);
      add_moments<V>(m, s, here, squares, A(before), A(rows));
      put<V>(mean + i, m), put<V>(square + i, s);
    }
  }
};

template <class T, Over K>
struct SumRows {
  using A = Acc<T>;
  MapSums<T, K, true> at_row[4];
  int rows;
  A *e_sum, *dot;

  template <class V>
  FA_INLINE void at(int64_t i) const {
    V e = get<V>(e_sum + i), d = get<V>(dot + i);
    for (int j = 0; j < rows; ++j) at_row[j].template step<V>(i, e, d);
    put<V>(e_sum + i, e), put<V>(dot + i, d);
  }
};

// Elements from one row's place to that of a few rows further down, less what `soon` adds itself
template <class T>
FA_INLINE int64_t down(int64_t rows, int64_t step) {
  return rows * step - 2048 / int64_t(sizeof(T));
}

template <class T, Over K>
void map_tile(const Map& x, const Map& z, const Map& y, int64_t n, Range columns, const MapStats<Acc<T>>& given) {
  using A = Acc<T>;
  const Stats<A, K> stats{given};
  const bool stream = streams<T>(y);
  const int64_t rows = rows_of(x), b = columns.begin, w = columns.end - b, to = n * length_of(x) + b;
  const int64_t step = z.pixels ? z.ss : z.sc;
  const auto part = scratch<A>(3 * w);
  const auto whole = scratch<double>(2 * w);
  A *mean = part.get(), *square = mean + w, *scale = square + w;
  for (int64_t from = 0; from < rows; from += ROWS_ASIDE) {
    const int64_t stop = std::min(rows, from + ROWS_ASIDE);
    for (int64_t r = from; r < stop; r += ROWS_AT_ONCE) {
      const MomentRows<T, K> f{row_of<const T>(z, n, r) + b,
                               step,
                               down<T>(ROWS_AT_ONCE, step),
                               int(std::min(ROWS_AT_ONCE, stop - r)),
                               int(r - from),
                               mean,
                               square};
      each<A>(w, f);
    }
    for (int64_t i = 0; i < w; ++i) {
      if constexpr (K == Over::channels) {
        whole[i] = from ? whole[i] + square[i] : double(square[i]);
      } else {
        double m = from ? whole[i] : 0, s = from ? whole[w + i] : 0;
        add_moments<double>(m, s, mean[i], square[i], double(from), double(stop - from));
        whole[i] = m, whole[w + i] = s;
      }
    }
  }
  for (int64_t i = 0; i < w; ++i) {
    stats.put_at(to + i, whole[i], whole[K == Over::channels ? i : w + i]);
    scale[i] = stats.scale(to + i);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const MapForward<T, K, true> f{row_of<const T>(x, n, r) + b,
                                   row_of<const T>(z, n, r) + b,
                                   row_of<T>(y, n, r) + b,
                                   {stats.first + to, scale, nullptr, nullptr},
                                   down<T>(4, x.pixels ? x.ss : x.sc),
                                   stream};
    each<A>(w, f);
  }
  streamed(stream);
}

template <class T, Over K>
void map_back_tile(const Map& x, const Map& z, const Map& dy, const Map& dx, const Map& dz, int64_t n, Range columns,
                   const MapStats<Acc<T>>& given) {
  using A = Acc<T>;
  const Stats<A, K> stats{given};
  const bool stream = streams<T>(dx) && streams<T>(dz);
  const int64_t rows = rows_of(x), b = columns.begin, w = columns.end - b, to = n * length_of(x) + b;
  const auto part = scratch<A>(3 * w);
  const auto whole = scratch<double>(2 * w);
  A *e_sum = part.get(), *dot = e_sum + w, *scale = dot + w;
  const Norms<A> norms{stats.first + to, scale, e_sum, dot};
  for (int64_t i = 0; i < w; ++i) scale[i] = stats.scale(to + i), whole[i] = whole[w + i] = 0;
  for (int64_t from = 0; from < rows; from += ROWS_ASIDE) {
    const int64_t stop = std::min(rows, from + ROWS_ASIDE);
    for (int64_t i = 0; i < w; ++i) e_sum[i] = dot[i] = 0;
    for (int64_t r = from; r < stop; r += 4) {
      SumRows<T, K> f{};
      f.rows = int(std::min<int64_t>(4, stop - r)), f.e_sum = e_sum, f.dot = dot;
      for (int j = 0; j < f.rows; ++j)
        f.at_row[j] = {row_of<const T>(x, n, r + j) + b, row_of<const T>(z, n, r + j) + b,
                       row_of<const T>(dy, n, r + j) + b, norms, down<T>(4, x.pixels ? x.ss : x.sc)};
      each<A>(w, f);
    }
    for (int64_t i = 0; i < w; ++i) whole[i] += e_sum[i], whole[w + i] += dot[i];
  }
  for (int64_t i = 0; i < w; ++i) stats.sums(to + i, whole[i], whole[w + i], rows, e_sum[i], dot[i]);
  for (int64_t r = 0; r < rows; ++r) {
    const MapBackward<T, K, true> f{row_of<const T>(x, n, r) + b,
                                    row_of<const T>(z, n, r) + b,
                                    row_of<const T>(dy, n, r) + b,
                                    row_of<T>(dx, n, r) + b,
                                    row_of<T>(dz, n, r) + b,
                                    norms,
                                    stream};
    each<A>(w, f);
  }
  streamed(stream);
}
