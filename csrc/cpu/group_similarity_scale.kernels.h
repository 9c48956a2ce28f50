// Maps of groups: how much a position resembles the group's mean, and the gate made of it. A map and what belongs to it
// stay in a cache; they are small beside x.
#include "cpu/behind.kernels.h"
#include "cpu/channel_pool.kernels.h"

// Mean and unbiased standard deviation of t[0], t[step], …; in two passes, for they are in a cache.
template <class A>
void deviation(const A* t, int64_t n, int64_t step, A* mean, A* std) {
  double total = 0, m2 = 0;
  for (int64_t i = 0; i < n; ++i) total += t[i * step];
  const double m = total / double(n);
  for (int64_t i = 0; i < n; ++i) m2 += (t[i * step] - m) * (t[i * step] - m);
  *mean = A(m);
  *std = A(std::sqrt(m2 / double(n - 1)));  // NaN for a single position
}
// The same of dense t.
template <class A>
void deviation_run(const A* t, int64_t n, A* mean, A* std) {
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  double total = 0, m2 = 0;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    total += sum((get<V>(t + i) + get<V>(t + i + W)) + (get<V>(t + i + 2 * W) + get<V>(t + i + 3 * W)));
  for (; i < n; ++i) total += t[i];
  const A m = A(total / double(n));
  for (i = 0; i + 4 * W <= n; i += 4 * W) {
    V square{};
    FA_UNROLL
    for (int j = 0; j < 4; ++j) {
      const V d = get<V>(t + i + j * W) - m;
      square = square + d * d;
    }
    m2 += sum(square);
  }
  for (; i < n; ++i) m2 += double(t[i] - m) * (t[i] - m);
  *mean = m;
  *std = A(std::sqrt(m2 / double(n - 1)));
}

// gate = sigmoid(weight·(t − mean)/(std + eps) + bias), of one group.
template <class A>
struct GateOf {
  const A* t;
  A mean, std, weight, bias;  // std with eps
  A* gate;
  template <class V>
  FA_INLINE void at(int64_t i) const {
    put<V>(gate + i, sigmoid_of<V>((get<V>(t + i) - mean) / std * weight + bias));
  }
};

// t += x·p for up to four planes at once.
template <class T, int C>
struct Similar {
  using A = Acc<T>;
  const T* x[4];
  A p[4];
  A* t;
  bool first;
  template <class V>
  FA_INLINE void at(int64_t i) const {
    V total = first ? V{} : get<V>(t + i);
    FA_UNROLL
    for (int j = 0; j < C; ++j) {
      if constexpr (is_vector<V>) soon(x[j] + i);
      total = total + load<V>(x[j] + i) * p[j];
    }
    put<V>(t + i, total);
  }
};
template <class T, int C>
FA_INLINE void similar_planes(const Map& x, int64_t n, int64_t c, const Acc<T>* p, Acc<T>* t, bool first) {
  Similar<T, C> f{};
  for (int j = 0; j < C; ++j) f.x[j] = x.plane<const T>(n, c + j), f.p[j] = p[j];
  f.t = t, f.first = first;
  each<Acc<T>>(x.s, f);
}
// t of the channels [c, c + count) of one sample; p starts at channel c.
template <class T>
FA_INLINE void similar(const Map& x, int64_t n, int64_t c, int64_t count, const Acc<T>* p, Acc<T>* t) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) similar_planes<T, 4>(x, n, c + j, p + j, t, j == 0);
  for (; j < count; ++j) similar_planes<T, 1>(x, n, c + j, p + j, t, j == 0);
}

template <class T>
struct ScaleBy {
  using A = Acc<T>;
  const T *x, *residual;
  T* y;
  const A* gate;
  Act act;
  A slope;
  bool stream;

  template <bool Plain, class V>
  FA_INLINE void at(int64_t i) const {
    if constexpr (is_vector<V>) {
      if (!stream) soon_written(y + i);
      if (!Plain && residual) soon(residual + i);
    }
    V v = load<V>(x + i) * get<V>(gate + i);
    if (!Plain && residual) v = v + load<V>(residual + i);
    store<V>(y + i, Plain ? v : finished<V>(v, act, set<V>(slope)), stream);
  }
};

// What a group needs: its parameters, and where its statistics are kept.
template <class A>
struct Groups {
  const A *weight, *bias;
  int64_t groups;
  A eps;
  A *p, *mean, *std;  // (N, C), (N, G), (N, G)
};

// Groups [begin, end), numbered n·G + g. room: 2·S.
template <class T>
void group_planes(const Map& x, const Map& residual, const Map& y, Range rows, const Groups<Acc<T>>& in, Acc<T>* room,
                  Act act, Acc<T> slope) {
  using A = Acc<T>;
  const bool stream = streams<T>(y);
  const int64_t count = x.c / in.groups;
  A *const t = room, *const gate = room + x.s;
  Place at(rows.begin, in.groups);
  for (int64_t r = rows.begin; r < rows.end; ++r, at.next()) {
    const int64_t n = at.outer, g = at.inner, c = g * count;
    A* const p = in.p + n * x.c + c;
    for (int64_t j = 0; j < count; ++j) {
      pool_run<T, Pool::mean, false>(x.plane<const T>(n, c + j), x.s, p + j, nullptr, nullptr);
      p[j] /= A(x.s);
    }
    similar<T>(x, n, c, count, p, t);
    deviation_run<A>(t, x.s, in.mean + r, in.std + r);
    const GateOf<A> f{t, in.mean[r], in.std[r] + in.eps, in.weight[g], in.bias[g], gate};
    each<A>(x.s, f);
    for (int64_t j = c; j < c + count; ++j) {
      const ScaleBy<T> s{x.plane<const T>(n, j),
                         residual.data ? residual.plane<const T>(n, j) : nullptr,
                         y.plane<T>(n, j),
                         gate,
                         act,
                         slope,
                         stream};
      each_finished<T>(x.s, s);
    }
  }
  streamed(stream);
}

// h += e·x and t += x·p of one plane; e where it is kept. Without `gate` e doesn't need it.
template <class T>
struct Towards {
  using A = Acc<T>;
  const T *x, *dy, *aux;
  T* kept;
  const A* gate;
  A p;
  A *t, *h;
  bool first;
  Act act;
  A slope;
  bool output;

  template <class V>
  FA_INLINE void at(int64_t i) const {
    if constexpr (is_vector<V>) {
      soon(x + i), soon(dy + i);
      if (aux) soon(aux + i);
      if (kept) soon_written(kept + i);
    }
    const V v = load<V>(x + i);
    const V s = gate ? v * get<V>(gate + i) : V{};
    const V e = behind<V>(load<V>(dy + i), aux ? load<V>(aux + i) : V{}, s, act, set<V>(slope), output, aux != nullptr);
    if (kept) store<V>(kept + i, e);
    if (t) put<V>(t + i, (first ? V{} : get<V>(t + i)) + v * p);
    put<V>(h + i, (first ? V{} : get<V>(h + i)) + e * v);
  }
};

// h = a·(1 − a)·h, and Σ h, Σ h·d, for one group; then dt in place of h.
template <class A>
struct ThroughSigmoid {
  const A *t, *gate;
  A mean;
  A* h;
  template <class V>
  FA_INLINE void step(int64_t i, V& total, V& along) const {
    const V a = get<V>(gate + i), q = get<V>(h + i) * a * (1 - a);
    put<V>(h + i, q);
    total = total + q;
    along = along + q * (get<V>(t + i) - mean);
  }
};
template <class A>
struct ThroughNorm {
  const A* t;
  A mean, scale, shift, along;  // dt = scale·h − shift − (t − mean)·along
  A* h;
  template <class V>
  FA_INLINE void at(int64_t i) const {
    put<V>(h + i, get<V>(h + i) * scale - shift - (get<V>(t + i) - mean) * along);
  }
};
// The factors of dt out of Σ h and Σ h·d. torch lets no gradient through a standard deviation of 0.
template <class A>
FA_INLINE ThroughNorm<A> through_norm(const A* t, A mean, A std, A eps, A weight, double total, double along, int64_t n,
                                      A* h) {
  const double scale = double(weight) / (double(std) + eps);
  const double back = std == 0 ? 0 : scale * along / ((double(std) + eps) * std * double(n - 1));
  return {t, mean, A(scale), A(scale * total / double(n)), A(back), h};
}

template <class T>
FA_INLINE double inner_run(const T* x, const Acc<T>* dt, int64_t n) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  double aside = 0;
  int64_t i = 0;
  for (; i + 4 * W <= n;) {
    const int64_t stop = std::min<int64_t>(n, i + 4096);
    V total[4] = {};
    for (; i + 4 * W <= stop; i += 4 * W) {
      FA_UNROLL
      for (int j = 0; j < 4; ++j) total[j] = total[j] + load<V>(x + i + j * W) * get<V>(dt + i + j * W);
    }
    aside += sum((total[0] + total[1]) + (total[2] + total[3]));
  }
  V last{};
  for (; i + W <= n; i += W) last = last + load<V>(x + i) * get<V>(dt + i);
  A rest = 0;
  for (; i < n; ++i) rest += load<A>(x + i) * dt[i];
  return aside + sum(last) + rest;
}

template <class T, bool PerElement>
struct BackBy {
  using A = Acc<T>;
  const T *x, *dy;
  T* dx;
  const A *gate, *dt, *p, *add;  // a plane has one p and one add, a pixel one of each per channel
  Act act;
  A slope;
  bool stream;

  template <class V>
  FA_INLINE V of(const A* v, int64_t i) const {
    return PerElement ? get<V>(v + i) : set<V>(*v);
  }
  template <class V>
  FA_INLINE void at(int64_t i) const {
    if constexpr (is_vector<V>)
      if (!stream) soon_written(dx + i);
    const V a = get<V>(gate + i);
    const V v = act == Act::identity ? V{} : load<V>(x + i) * a;
    const V e = behind<V>(load<V>(dy + i), V{}, v, act, set<V>(slope), false, false);
    store<V>(dx + i, e * a + (get<V>(dt + i) * of<V>(p, i) + of<V>(add, i)), stream);
  }
};

// twice: e depends on the gate, so that t must be there before e is. room: 3·S. dweight and dbias: (N, G).
template <class T>
void group_back_planes(const Epilogue<T>& in, const Map& kept, const Map& dx, Range rows, const Groups<Acc<T>>& w,
                       bool twice, Acc<T>* room, Acc<T>* dweight, Acc<T>* dbias) {
  using A = Acc<T>;
  using V = Vec<A>;
  const bool stream = streams<T>(dx);
  const Map& x = in.x;
  const Act again = kept.data ? Act::identity : in.act;  // what was kept is e
  const int64_t count = x.c / w.groups, s = x.s;
  A *const t = room, *const gate = t + s, *const h = gate + s;
  Place at(rows.begin, w.groups);
  for (int64_t r = rows.begin; r < rows.end; ++r, at.next()) {
    const int64_t n = at.outer, g = at.inner, c = g * count;
    const A* const p = w.p + n * x.c + c;
    const GateOf<A> gates{t, w.mean[r], w.std[r] + w.eps, w.weight[g], w.bias[g], gate};
    if (twice) {
      similar<T>(x, n, c, count, p, t);
      each<A>(s, gates);
    }
    for (int64_t j = 0; j < count; ++j) {
      const Towards<T> f{x.plane<const T>(n, c + j),
                         in.dy.template plane<const T>(n, c + j),
                         in.aux.data ? in.aux.template plane<const T>(n, c + j) : nullptr,
                         kept.data ? kept.plane<T>(n, c + j) : nullptr,
                         twice ? gate : nullptr,
                         p[j],
                         twice ? nullptr : t,
                         h,
                         j == 0,
                         in.act,
                         in.slope,
                         from_output(in.act)};
      each<A>(s, f);
    }
    if (!twice) each<A>(s, gates);
    const ThroughSigmoid<A> through{t, gate, w.mean[r], h};
    V totals{}, alongs{};
    A rest = 0, rest_along = 0;
    double total = 0, along = 0;
    int64_t i = 0;
    for (; i + width<A> <= s; i += width<A>) {
      through.template step<V>(i, totals, alongs);
      if (i % 4096 == 0) total += sum(totals), along += sum(alongs), totals = alongs = V{};
    }
    for (; i < s; ++i) through.template step<A>(i, rest, rest_along);
    total += sum(totals) + rest, along += sum(alongs) + rest_along;
    dbias[r] = A(total);
    dweight[r] = A(along / (double(w.std[r]) + w.eps));
    const auto norm = through_norm<A>(t, w.mean[r], w.std[r], w.eps, w.weight[g], total, along, s, h);
    each<A>(s, norm);
    for (int64_t j = 0; j < count; ++j) {
      const T* const plane = x.plane<const T>(n, c + j);
      const A add = A(inner_run<T>(plane, h, s) / double(s));
      const T* const e = kept.data ? kept.plane<const T>(n, c + j) : in.dy.template plane<const T>(n, c + j);
      const BackBy<T, false> back{plane, e, dx.plane<T>(n, c + j), gate, h, p + j, &add, again, in.slope, stream};
      each<A>(s, back);
    }
  }
  streamed(stream);
}

// ---- pixels of one sample: maps lie as (S, G), rows of C beside them

template <class T>
struct Products {
  using A = Acc<T>;
  const T* x;
  const A* p;
  A* out;
  template <class V>
  FA_INLINE void at(int64_t c) const {
    if constexpr (is_vector<V>) soon(x + c);
    put<V>(out + c, load<V>(x + c) * get<V>(p + c));
  }
};
// out[g] = the sum of a group's elements of a row.
template <class A>
FA_INLINE void add_groups(const A* row, int64_t groups, int64_t count, A* out) {
  for (int64_t g = 0; g < groups; ++g) {
    A total[4] = {};
    const A* const v = row + g * count;
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) total[0] += v[j], total[1] += v[j + 1], total[2] += v[j + 2], total[3] += v[j + 3];
    for (; j < count; ++j) total[0] += v[j];
    out[g] = (total[0] + total[1]) + (total[2] + total[3]);
  }
}
// A row of C that repeats each group's value.
template <class A>
FA_INLINE void repeat(const A* v, int64_t groups, int64_t count, A* row) {
  for (int64_t g = 0; g < groups; ++g) std::fill(row + g * count, row + (g + 1) * count, v[g]);
}

// t (S, G) of the pixels s of sample n; room: C.
template <class T>
void similar_pixels(const Map& x, int64_t n, Range s, const Acc<T>* p, int64_t groups, Acc<T>* room, Acc<T>* t) {
  for (int64_t i = s.begin; i < s.end; ++i) {
    const Products<T> f{x.pixel<const T>(n, i), p, room};
    each<Acc<T>>(x.c, f);
    add_groups(room, groups, x.c / groups, t + i * groups);
  }
}

// Like GateOf with a mean, std, weight and bias per group.
template <class A>
struct GateRow {
  const A *t, *mean, *std, *weight, *bias;
  A eps;
  A* gate;
  template <class V>
  FA_INLINE void at(int64_t g) const {
    const V z = (get<V>(t + g) - get<V>(mean + g)) / (get<V>(std + g) + eps);
    put<V>(gate + g, sigmoid_of<V>(z * get<V>(weight + g) + get<V>(bias + g)));
  }
};

// mean and std: of this sample's groups. room: C + G.
template <class T>
void group_pixels(const Map& x, const Map& residual, const Map& y, int64_t n, Range s, const Groups<Acc<T>>& in,
                  const Acc<T>* t, Acc<T>* room, Act act, Acc<T> slope) {
  using A = Acc<T>;
  const bool stream = streams<T>(y);
  const int64_t g = in.groups;
  A *const row = room, *const gate = room + x.c;
  for (int64_t i = s.begin; i < s.end; ++i) {
    const GateRow<A> f{t + i * g, in.mean + n * g, in.std + n * g, in.weight, in.bias, in.eps, gate};
    each<A>(g, f);
    repeat(gate, g, x.c / g, row);
    const ScaleBy<T> scaled{x.pixel<const T>(n, i),
                            residual.data ? residual.pixel<const T>(n, i) : nullptr,
                            y.pixel<T>(n, i),
                            row,
                            act,
                            slope,
                            stream};
    each_finished<T>(x.c, scaled);
  }
  streamed(stream);
}

// e·x of a pixel, and e where it is kept.
template <class T>
struct TowardsRow {
  using A = Acc<T>;
  const T *x, *dy, *aux;
  T* kept;
  const A *gate, *p;
  A *similar, *ex;
  Act act;
  A slope;
  bool output;

  template <class V>
  FA_INLINE void at(int64_t c) const {
    if constexpr (is_vector<V>) soon(x + c), soon(dy + c);
    const V v = load<V>(x + c);
    const V s = gate ? v * get<V>(gate + c) : V{};
    const V e = behind<V>(load<V>(dy + c), aux ? load<V>(aux + c) : V{}, s, act, set<V>(slope), output, aux != nullptr);
    if (kept) store<V>(kept + c, e);
    if (similar) put<V>(similar + c, v * get<V>(p + c));
    put<V>(ex + c, e * v);
  }
};

// First pass: t (unless e needs the gate: then it is there), gate (S, G), and h = a·(1 − a)·Σ e·x. room: 2·C + G.
template <class T>
void towards_pixels(const Epilogue<T>& in, const Map& kept, int64_t n, Range s, const Groups<Acc<T>>& w, Acc<T>* t,
                    Acc<T>* gate, Acc<T>* h, Acc<T>* room, bool twice) {
  using A = Acc<T>;
  const Map& x = in.x;
  const int64_t g = w.groups, count = x.c / g;
  A *const row = room, *const ex = room + x.c;
  for (int64_t i = s.begin; i < s.end; ++i) {
    const GateRow<A> f{t + i * g, w.mean + n * g, w.std + n * g, w.weight, w.bias, w.eps, gate + i * g};
    if (twice) {
      each<A>(g, f);
      repeat(gate + i * g, g, count, row);
    }
    const TowardsRow<T> towards{x.pixel<const T>(n, i),
                                in.dy.template pixel<const T>(n, i),
                                in.aux.data ? in.aux.template pixel<const T>(n, i) : nullptr,
                                kept.data ? kept.pixel<T>(n, i) : nullptr,
                                twice ? row : nullptr,
                                w.p + n * x.c,
                                twice ? nullptr : row,
                                ex,
                                in.act,
                                in.slope,
                                from_output(in.act)};
    each<A>(x.c, towards);
    if (!twice) {
      add_groups(row, g, count, t + i * g);
      each<A>(g, f);
    }
    add_groups(ex, g, count, h + i * g);
    for (int64_t j = 0; j < g; ++j) {
      const A a = gate[i * g + j];
      h[i * g + j] *= a * (1 - a);
    }
  }
}

// Between the passes: Σ h and Σ h·d of every group of one sample, and dt in place of h. room: 4·G doubles.
template <class A>
void between_pixels(int64_t n, int64_t size, const Groups<A>& w, const A* t, A* h, double* room, A* dweight, A* dbias) {
  const int64_t g = w.groups;
  double *const total = room, *const along = room + g;
  std::fill(room, room + 2 * g, 0.0);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < g; ++j) {
      const double q = h[i * g + j];
      total[j] += q;
      along[j] += q * (double(t[i * g + j]) - w.mean[n * g + j]);
    }
  A* const factors = reinterpret_cast<A*>(room + 2 * g);
  A *const scale = factors, *const shift = factors + g;
  std::fill(factors, factors + 2 * g, A(0));
  for (int64_t j = 0; j < g; ++j) {
    const A std = w.std[n * g + j];
    dbias[n * g + j] = A(total[j]);
    dweight[n * g + j] = A(along[j] / (double(std) + w.eps));
    const auto norm = through_norm<A>(t, w.mean[n * g + j], std, w.eps, w.weight[j], total[j], along[j], size, h);
    scale[j] = norm.scale, shift[j] = norm.shift, along[j] = norm.along;
  }
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < g; ++j)
      h[i * g + j] = h[i * g + j] * scale[j] - shift[j] - (t[i * g + j] - w.mean[n * g + j]) * A(along[j]);
}

template <class T>
struct AddInner {
  using A = Acc<T>;
  const T* x;
  const A* dt;
  A* to;
  template <class V>
  FA_INLINE void at(int64_t c) const {
    if constexpr (is_vector<V>) soon(x + c);
    put<V>(to + c, get<V>(to + c) + load<V>(x + c) * get<V>(dt + c));
  }
};
// Σ_s dt·x over the pixels s into `to` (C). room: C.
template <class T>
void inner_pixels(const Map& x, int64_t n, Range s, int64_t groups, const Acc<T>* dt, Acc<T>* room, Acc<T>* to) {
  std::fill(to, to + x.c, Acc<T>(0));
  for (int64_t i = s.begin; i < s.end; ++i) {
    repeat(dt + i * groups, groups, x.c / groups, room);
    const AddInner<T> f{x.pixel<const T>(n, i), room, to};
    each<Acc<T>>(x.c, f);
  }
}

// room: 2·C
template <class T>
void group_back_pixels(const Epilogue<T>& in, const Map& dx, int64_t n, Range s, const Groups<Acc<T>>& w,
                       const Acc<T>* gate, const Acc<T>* dt, const Acc<T>* add, Acc<T>* room) {
  using A = Acc<T>;
  const bool stream = streams<T>(dx);
  const int64_t g = w.groups, c = in.x.c;
  for (int64_t i = s.begin; i < s.end; ++i) {
    repeat(gate + i * g, g, c / g, room);
    repeat(dt + i * g, g, c / g, room + c);
    const BackBy<T, true> f{in.x.template pixel<const T>(n, i),
                            in.dy.template pixel<const T>(n, i),
                            dx.pixel<T>(n, i),
                            room,
                            room + c,
                            w.p + n * c,
                            add,
                            in.act,
                            in.slope,
                            stream};
    each<A>(c, f);
  }
  streamed(stream);
}
