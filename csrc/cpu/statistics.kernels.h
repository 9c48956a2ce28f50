// Mean and variance in one read: blocks of values are merged by the rule of Chan, Golub & LeVeque (1979), in each lane
// of a vector on its own. Everything is taken relative to the first value, so that a mean a thousand times the standard
// deviation, and float32 with 24 bits, leave the variance its digits.

// Of the n values seen in each lane: their mean, and Σ (v − mean)².
template <class V>
struct Moments {
  V mean, m2;
  int64_t n;

  template <int R>
  FA_INLINE void take(const V (&v)[R]) {
    using A = Element<V>;
    V m = v[0];
    FA_UNROLL
    for (int j = 1; j < R; ++j) m = m + v[j];
    m = m * (A(1) / R);
    V q{};
    FA_UNROLL
    for (int j = 0; j < R; ++j) q = q + (v[j] - m) * (v[j] - m);
    const A part = A(R) / A(n + R);
    const V apart = m - mean;
    mean = mean + apart * part;
    m2 = m2 + q + apart * apart * (A(n) * part);
    n += R;
  }
};

template <class A>
FA_INLINE A finite_or_zero(A v) {
  return v - v == 0 ? v : A(0);
}

template <class T>
FA_INLINE void moments_run(const T* p, int64_t n, Acc<T>* mean, Acc<T>* var) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  const A shift = finite_or_zero<A>(widen(p[0]));
  const V k = set<V>(shift);
  Moments<V> m{V{}, V{}, 0};
  int64_t i = 0;
  for (; i + 8 * W <= n; i += 8 * W) {
    V v[8];
    FA_UNROLL
    for (int j = 0; j < 8; ++j) v[j] = load<V>(p + i + j * W) - k;
    m.template take<8>(v);
  }
  for (; i + W <= n; i += W) {
    const V v[1] = {load<V>(p + i) - k};
    m.template take<1>(v);
  }
  Moments<A> rest{0, 0, 0};
  for (; i < n; ++i) {
    const A v[1] = {load<A>(p + i) - shift};
    rest.template take<1>(v);
  }
  double whole = rest.mean, m2 = rest.m2;
  if (m.n) {
    const A among = sum(m.mean) / A(W);
    const V off = m.mean - set<V>(among);
    const double lanes = sum(m.m2) + double(m.n) * sum(off * off), n1 = double(m.n * W), n2 = double(rest.n);
    const double apart = whole - among;
    whole = among + apart * n2 / (n1 + n2);
    m2 += lanes + apart * apart * n1 * n2 / (n1 + n2);
  }
  *mean = A(shift + whole);
  *var = A(m2 / double(n));
  if (*mean - *mean == 0) return;
  double total = 0;  // a mean that isn't finite is what a plain sum says
  for (i = 0; i < n; ++i) total += widen(p[i]);
  *mean = A(total / double(n));
}

template <class T>
void moments_planes(const Map& x, Range rows, Acc<T>* mean, Acc<T>* var) {
  Place at(rows.begin, x.c);
  for (int64_t r = rows.begin; r < rows.end; ++r, at.next())
    moments_run<T>(x.plane<const T>(at.outer, at.inner), x.s, mean + r, var + r);
}

template <class T>
struct MomentsPixel {
  using A = Acc<T>;
  const T* p;
  int64_t step;
  const A* shift;
  A *mean, *m2, *total;
  int rows;
  int64_t n;

  template <class V>
  FA_INLINE void at(int64_t c) const {
    const V k = get<V>(shift + c);
    Moments<V> m{get<V>(mean + c), get<V>(m2 + c), n};
    V plain = get<V>(total + c);
    if (rows == 8) {
      V v[8];
      FA_UNROLL
      for (int j = 0; j < 8; ++j) {
        v[j] = load<V>(p + j * step + c);
        plain = plain + v[j];
        v[j] = v[j] - k;
      }
      m.template take<8>(v);
    } else {
      for (int j = 0; j < rows; ++j) {
        const V x = load<V>(p + j * step + c), v[1] = {x - k};
        plain = plain + x;
        m.template take<1>(v);
      }
    }
    put<V>(mean + c, m.mean);
    put<V>(m2 + c, m.m2);
    put<V>(total + c, plain);
  }
};

template <class T>
void first_pixel(const Map& x, int64_t n, Acc<T>* shift) {
  const T* p = x.pixel<const T>(n, 0);
  for (int64_t c = 0; c < x.c; ++c) shift[c] = finite_or_zero<Acc<T>>(widen(p[c]));
}

// Pixels [s.begin, s.end) of one sample, relative to `shift`.
template <class T>
void moments_pixels(const Map& x, int64_t n, Range s, const Acc<T>* shift, Acc<T>* mean, Acc<T>* m2, Acc<T>* total) {
  for (int64_t c = 0; c < x.c; ++c) mean[c] = m2[c] = total[c] = 0;
  for (int64_t p = s.begin; p < s.end;) {
    const int rows = int(std::min<int64_t>(8, s.end - p));
    MomentsPixel<T> f{x.pixel<const T>(n, p), x.ss, shift, mean, m2, total, rows, p - s.begin};
    each<Acc<T>>(x.c, f);
    p += rows;
  }
}

// The runs of one sample, `run` pixels each but the last, merged in order. A mean within the deviation of 0 is the
// plain sum's, which has the digits below the mean's own size; so is one that isn't finite.
template <class A>
void moments_merge(const Map& x, int64_t run, const A* shift, const A* means, const A* m2s, const A* totals, A* mean,
                   A* var) {
  const int64_t runs = (x.s + run - 1) / run;
  for (int64_t c = 0; c < x.c; ++c) {
    double whole = 0, m2 = 0, seen = 0, total = 0;
    for (int64_t j = 0; j < runs; ++j) {
      const double count = double(std::min(run, x.s - j * run)), apart = means[j * x.c + c] - whole;
      whole += apart * count / (seen + count);
      m2 += m2s[j * x.c + c] + apart * apart * seen * count / (seen + count);
      seen += count;
      total += totals[j * x.c + c];
    }
    const double plain = total / seen, shifted = shift[c] + whole;
    var[c] = A(m2 / seen);
    mean[c] = A(shifted - shifted == 0 && plain * plain > var[c] ? shifted : plain);
  }
}
