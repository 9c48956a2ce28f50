enum class Job { sums, apply };

template <class V>
struct Factor {
  V f, by_gate, by_pixel;  // f and its derivatives
};
// Fast: a product, the merge of networks that are in a hurry; else code for all merges that looks at `merge` as it
// goes.

template <class V, bool Fast>
FA_INLINE Factor<V> factor_of(Merge merge, V gate, V pixel) {
  if (Fast || merge == Merge::product) return {gate * pixel, pixel, gate};
  const bool product = merge == Merge::sigmoid_product;
  const V one = set<V>(1), both = product ? gate * pixel : gate + pixel;
  if (merge == Merge::sum) return {both, one, one};
  const V s = sigmoid_of<V>(both), d = s * (1 - s);
  return {1 + s, product ? d * pixel : d, product ? d * gate : d};
}

// y = act(x·f + residual) over a row.
template <class T, bool Fast, bool Planes, bool Of>
struct ScaleRow {
  using A = Acc<T>;
  const T *x, *residual;
  T* y;
  const A *gate, *pixel, *channel, *weight, *plane;
  Centred<A> of;
  Merge merge;
  Act act;
  A slope;
  bool stream;

  template <class V>
  FA_INLINE void at(int64_t i) {
    if constexpr (is_vector<V>) {
      soon(x + i);
      if (!stream) soon_written(y + i);
      if (residual) soon(residual + i);
    }
    const V g = Planes ? set<V>(*gate) : get<V>(gate + i), p = Planes ? get<V>(pixel + i) : set<V>(*pixel);
    V v = load<V>(x + i);
    if constexpr (Of)
      v = multiply_add(g, v - (Planes ? set<V>(*of.centre) : get<V>(of.centre + i)),
                       Planes ? set<V>(*of.shift) : get<V>(of.shift + i)) *
          p;
    else
      v = v * factor_of<V, Fast>(merge, g, p).f;
    if (residual) v = v + load<V>(residual + i);
    if (channel) v = v + (Planes ? set<V>(*channel) : get<V>(channel + i));
    if (plane) v = v + (Planes ? set<V>(*weight) : get<V>(weight + i)) * (Planes ? get<V>(plane + i) : set<V>(*plane));
    if (act == Act::relu)
      v = select(v <= V{}, V{}, v);
    else if (act != Act::identity)
      v = activate<V>(act, v, set<V>(slope));
    store<V>(y + i, v, stream);
  }
};

template <class T, bool Fast, bool Of>
void scale_rows_as(const Map& x, const Map& residual, const Map& y, Range rows, const Acc<T>* gate, const Acc<T>* pixel,
                   Merge merge, Act act, Acc<T> slope, const Added<Acc<T>>& added, const Centred<Acc<T>>& of) {
  const auto shift = [](const Acc<T>* p, int64_t by) { return p ? p + by : nullptr; };
  const bool stream = streams<T>(y);
  Place at(rows.begin, x.pixels ? x.s : x.c);
  for (int64_t r = rows.begin; r < rows.end; ++r, at.next()) {
    const int64_t n = at.outer, i = at.inner;
    if (x.pixels) {
      ScaleRow<T, Fast, false, Of> f{x.pixel<const T>(n, i),
                                     residual.data ? residual.pixel<const T>(n, i) : nullptr,
                                     y.pixel<T>(n, i),
                                     gate + n * x.c,
                                     pixel + r,
                                     shift(added.channel, n * x.c),
                                     added.weight,
                                     shift(added.plane, r),
                                     {shift(of.centre, n * x.c), shift(of.shift, n * x.c)},
                                     merge,
                                     act,
                                     slope,
                                     stream};
      each<Acc<T>>(x.c, f);
    } else {
      ScaleRow<T, Fast, true, Of> f{x.plane<const T>(n, i),
                                    residual.data ? residual.plane<const T>(n, i) : nullptr,
                                    y.plane<T>(n, i),
                                    gate + r,
                                    pixel + n * x.s,
                                    shift(added.channel, r),
                                    shift(added.weight, i),
                                    shift(added.plane, n * x.s),
                                    {shift(of.centre, r), shift(of.shift, r)},
                                    merge,
                                    act,
                                    slope,
                                    stream};
      each<Acc<T>>(x.s, f);
    }
  }
  streamed(stream);
}

template <class T>
void scale_rows(const Map& x, const Map& residual, const Map& y, Range rows, const Acc<T>* gate, const Acc<T>* pixel,
                Merge merge, Act act, Acc<T> slope, const Added<Acc<T>>& added, const Centred<Acc<T>>& of) {
  if (of.shift) return scale_rows_as<T, true, true>(x, residual, y, rows, gate, pixel, merge, act, slope, added, of);
  if constexpr (has_fast<T>) {
    if (merge == Merge::product)
      return scale_rows_as<T, true, false>(x, residual, y, rows, gate, pixel, merge, act, slope, added, of);
  }
  scale_rows_as<T, false, false>(x, residual, y, rows, gate, pixel, merge, act, slope, added, of);
}

// Of: whether the map is centred. R rows side by side, so that the arrays over columns are loaded and stored once for
// them.
template <class T, bool Fast, Job J, bool Planes, bool Of, int R>
struct Rows {
  using A = Acc<T>;
  using I = Integer<A>;
  const T *x[R], *dy[R], *aux[R];
  T *kept[R], *dx[R];
  const A *gate, *pixel, *mean, *share, *top, *first;
  const I* place;
  const A *add, *split, *max, *sign, *tilt;
  Centred<A> of;
  int64_t channel;  // of the first row, of planes
  int64_t ahead;
  Merge merge;
  Act act;
  A slope;
  bool output, stream, reads, sums, counts;
  A *total, *seen, *moved;  // over columns

  // A value per channel (or per pixel) is one per row or one per column.
  template <bool Channel, class V>
  FA_INLINE V its(const A* p, int j, int64_t i) const {
    return Channel == Planes ? set<V>(p[j]) : get<V>(p + i);
  }
  // What stands for x·gate where the map is centred.
  template <class V>
  FA_INLINE V gated(int j, int64_t i, V v, V g) const {
    return multiply_add(g, v - its<true, V>(of.centre, j, i), its<true, V>(of.shift, j, i));
  }
  template <class V>
  FA_INLINE V gradient(V v, V f, int j, int64_t i) const {
    const V e = load<V>(dy[j] + i);
    if (act == Act::identity) return e;
    if (act == Act::relu && aux[j]) return select(load<V>(aux[j] + i) <= V{}, V{}, e);
    V u = v * f;
    if (aux[j]) {
      const V k = load<V>(aux[j] + i);
      u = output ? k : u + k;
    }
    const V d = derivative<V>(act, u, set<V>(slope));
    return select(d == V{}, V{}, e * d);  // a cut gradient is 0, whatever was cut
  }
  // Whether column i of row j is the pixel's chosen channel.
  template <class V>
  FA_INLINE auto chosen(int j, int64_t i) const {
    if constexpr (Planes) {
      Integer<V> p;
      std::memcpy(&p, place + i, sizeof(p));
      return p == Integer<V>{} + I(channel + j);
    } else {
      return to_integer(lanes_from_zero<V>()) + I(i) == Integer<V>{} + place[j];
    }
  }
  // dx before the maxima of channels that go to one pixel. A maximum's share is multiplied by 0 where it isn't, as
  // autograd's mask is: a share that isn't finite is shown by all that competed for it, and so is a maximum that is
  // NaN, which equals nothing and whose share is divided by 0.
  template <class V>
  FA_INLINE V applied(int j, int64_t i, V v, V& h) const {
    const V g = its<true, V>(gate, j, i), p = its<false, V>(pixel, j, i);
    const V u = Of ? gated(j, i, v, g) : v * g;
    h = V{};
    if (dy[j]) h = (Of ? gradient<V>(u, p, j, i) : gradient<V>(v, g * p, j, i)) * p;
    if (mean) h = h + its<false, V>(mean, j, i);
    if (share) {
      const V part = its<false, V>(share, j, i);
      h = h + select(u == its<false, V>(top, j, i), part, part * 0);
    }
    if (first) h = h + select(chosen<V>(j, i), its<false, V>(first, j, i), V{});
    V out = h * g;
    if (add) out = out + its<true, V>(add, j, i);
    if (split) {
      const V part = its<true, V>(split, j, i);
      out = out + select(v == its<true, V>(max, j, i), part, part * 0);
    }
    if (sign) {
      const V s = its<true, V>(sign, j, i);
      out = out + select(v > V{}, s, select(v < V{}, -s, V{}));
    }
    if (Of && tilt) out = out + its<true, V>(tilt, j, i) * (v - its<true, V>(of.centre, j, i));
    return out;
  }
  // Sums over a row, or over this step's rows for one column: of v·h or x·e, how many maxima, and of h.
  template <class V>
  struct Sum {
    V total, seen, moved;
  };
  template <class V>
  FA_INLINE void step(int64_t i, Sum<V> (&by_row)[R]) const {
    Sum<V> column{};
    if constexpr (is_vector<V>) {
      FA_UNROLL
      for (int j = 0; j < R; ++j) element<V>(j, i, by_row[j], column);
    } else {
      FA_ROLLED
      for (int j = 0; j < R; ++j) element<V>(j, i, by_row[j], column);
    }
    if (total) put<V>(total + i, get<V>(total + i) + column.total);
    if (seen) put<V>(seen + i, get<V>(seen + i) + column.seen);
    if (Of && moved) put<V>(moved + i, get<V>(moved + i) + column.moved);
  }
  template <class V>
  FA_INLINE void element(int j, int64_t i, Sum<V>& by_row, Sum<V>& column) const {
    {
      if constexpr (is_vector<V>) {
        if (dy[j]) soon_after(dy[j] + i);
        if (reads) soon_after(x[j] + i);
        if (aux[j]) soon_after(aux[j] + i);
        if (dx[j] && !stream) soon_written(dx[j] + i);
      }
      if constexpr (J == Job::sums) {
        const V v = reads ? load<V>(x[j] + i) : set<V>(1), g = its<true, V>(gate, j, i), p = its<false, V>(pixel, j, i);
        if constexpr (Of) {  // no pass that has a norm before it wants dgate of the sums
          const V u = gated(j, i, v, g), e = gradient<V>(u, p, j, i);
          (Planes ? column : by_row).total = (Planes ? column : by_row).total + e * u;
          if (counts) count_equal(u, j, i, by_row, column);
          if (kept[j]) store<V>(kept[j] + i, e);
          return;
        }
        const auto f = factor_of<V, Fast>(merge, g, p);
        const V e = gradient<V>(v, f.f, j, i), t = e * v, by_gate = t * f.by_gate, by_pixel = t * f.by_pixel;
        by_row.total = by_row.total + (Planes ? by_gate : by_pixel);
        column.total = column.total + (Planes ? by_pixel : by_gate);
        if (counts) count_equal(v * g, j, i, by_row, column);
        if (kept[j]) store<V>(kept[j] + i, e);
        if (dx[j]) store<V>(dx[j] + i, e * f.f, stream);
      } else {
        const V v = reads ? load<V>(x[j] + i) : V{};
        V h;
        if (sums) {
          const V out = applied<V>(j, i, v, h);
          const V t = (Of ? v - its<true, V>(of.centre, j, i) : v) * h;
          by_row.total = by_row.total + t;
          column.total = column.total + t;
          if (Of) by_row.moved = by_row.moved + h, column.moved = column.moved + h;
          if (counts) {
            const V one = select(v == its<true, V>(max, j, i), set<V>(1), V{});
            by_row.seen = by_row.seen + one;
            column.seen = column.seen + one;
          }
          if (dx[j]) store<V>(dx[j] + i, out, stream);
        } else {
          store<V>(dx[j] + i, applied<V>(j, i, v, h), stream);
        }
      }
    }
  }
  template <class V>
  FA_INLINE void count_equal(V u, int j, int64_t i, Sum<V>& by_row, Sum<V>& column) const {
    V& to = (Planes ? column : by_row).seen;
    to = to + select(u == its<false, V>(top, j, i), set<V>(1), V{});
  }
  FA_INLINE void soon_after(const T* p) const {
#if defined(__GNUC__)
    __builtin_prefetch(p + ahead, 0, 3);
#endif
  }

  // Sums over the rows go to by_row, more_by_row and moved_by_row, where those are wanted.
  FA_INLINE void run(int64_t n, A* by_row, A* more_by_row, A* moved_by_row) const {
    using V = Vec<A>;
    Sum<V> whole[R] = {};
    Sum<A> rest[R] = {};
    double aside[R] = {}, moved_aside[R] = {};  // as in channel_pool.kernels.h
    int64_t i = 0;
    for (;;) {
      const int64_t stop = std::min<int64_t>(n, i + 4096);
      for (; i + width<A> <= stop; i += width<A>) step<V>(i, whole);
      if (n - i < width<A>) break;
      for (int j = 0; j < R; ++j) {
        aside[j] += sum(whole[j].total), whole[j].total = V{};
        if (Of && moved_by_row) moved_aside[j] += sum(whole[j].moved), whole[j].moved = V{};
      }
    }
    for (; i < n; ++i) step<A>(i, rest);
    for (int j = 0; j < R; ++j) {
      if (by_row) by_row[j] = A(aside[j] + (sum(whole[j].total) + rest[j].total));
      if (more_by_row) more_by_row[j] = sum(whole[j].seen) + rest[j].seen;
      if (Of && moved_by_row) moved_by_row[j] = A(moved_aside[j] + (sum(whole[j].moved) + rest[j].moved));
    }
  }
};

template <class T, bool Fast, Job J, bool Planes, bool Of, int R>
FA_INLINE Rows<T, Fast, J, Planes, Of, R> rows_at(const Dual<T>& d, int64_t n, int64_t row, Acc<T>* total, Acc<T>* seen,
                                                  Acc<T>* moved) {
  using A = Acc<T>;
  const Map& x = d.x;
  Rows<T, Fast, J, Planes, Of, R> f;
  const auto at = [&](const Map& m, int j) -> const T* {
    if (!m.data) return nullptr;
    return Planes ? m.plane<const T>(n, row + j) : m.pixel<const T>(n, row + j);
  };
  for (int j = 0; j < R; ++j) {
    f.x[j] = at(x, j), f.dy[j] = at(d.dy, j), f.aux[j] = at(d.aux, j);
    f.kept[j] = const_cast<T*>(at(d.kept, j)), f.dx[j] = const_cast<T*>(at(d.dx, j));
  }
  const int64_t channels = n * x.c + (Planes ? row : 0), pixels = n * x.s + (Planes ? 0 : row);
  const auto channel = [&](const A* p) { return p ? p + channels : nullptr; };
  const auto pixel = [&](const A* p) { return p ? p + pixels : nullptr; };
  f.gate = channel(d.gate), f.pixel = pixel(d.pixel);
  f.mean = pixel(d.mean), f.share = pixel(d.share), f.top = pixel(d.top), f.first = pixel(d.first);
  f.place = d.place ? d.place + pixels : nullptr;
  f.add = channel(d.back.add), f.split = channel(d.back.share), f.max = channel(d.back.max);
  f.sign = channel(d.back.sign), f.tilt = channel(d.back.slope);
  f.of = {channel(d.of.centre), channel(d.of.shift)};
  f.channel = row;
  // The same columns of the next rows, where those are near; else 2 KB on, as elsewhere.
  const int64_t step = R * (Planes ? x.sc : x.ss);
  f.ahead = step * int64_t(sizeof(T)) <= 16384 ? step : 2048 / int64_t(sizeof(T));
  f.merge = d.merge, f.act = d.act, f.slope = d.slope, f.output = from_output(d.act),
  f.stream = d.dx.data && streams<T>(d.dx);
  f.sums = d.dgate != nullptr;
  f.reads = J == Job::sums ? !d.ones : d.act != Act::identity || f.sums || f.share || f.split || f.sign || f.tilt;
  f.counts = J == Job::sums ? d.shared != nullptr : d.count != nullptr;
  f.total = total, f.seen = seen, f.moved = moved;
  return f;
}

// Rows [rows.begin, rows.end) of sample n; sums over columns go to total, seen and moved, where those are wanted.
template <class T, Job J, bool Planes, bool Of>
void dual_rows(const Dual<T>& d, int64_t n, Range rows, Acc<T>* total, Acc<T>* seen, Acc<T>* moved) {
  using A = Acc<T>;
  const int64_t columns = Planes ? d.x.s : d.x.c, every = Planes ? d.x.c : d.x.s;
  for (A* p : {total, seen, moved})
    if (p)
      for (int64_t i = 0; i < columns; ++i) p[i] = 0;
  A* by_row = Planes ? d.dgate : d.dpixel;
  A* more = Planes ? d.count : d.shared;
  A* shifted = Planes ? d.dshift : nullptr;
  int64_t r = rows.begin;
  const auto to = [&](A* p) { return p ? p + n * every + r : nullptr; };
  if constexpr (has_fast<T>) {
    constexpr int R = J == Job::sums ? 4 : 2;
    for (; d.merge == Merge::product && r + R <= rows.end; r += R)
      rows_at<T, true, J, Planes, Of, R>(d, n, r, total, seen, moved).run(columns, to(by_row), to(more), to(shifted));
  }
  for (; r < rows.end; ++r)
    rows_at<T, Of, J, Planes, Of, 1>(d, n, r, total, seen, moved).run(columns, to(by_row), to(more), to(shifted));
  if constexpr (J == Job::apply) {
    streamed(d.dx.data && streams<T>(d.dx));
    if (!d.back.first || !d.dx.data) return;
    // Few elements: what their passing wrote is computed again, so that it isn't rounded twice.
    const auto add = [&](int64_t row, int64_t column, int64_t c) {
      const auto f = rows_at<T, Of, J, Planes, Of, 1>(d, n, row, nullptr, nullptr, nullptr);
      A h;
      const A v = f.reads ? load<A>(f.x[0] + column) : A(0);
      f.dx[0][column] = static_cast<T>(f.template applied<A>(0, column, v, h) + d.back.first[n * d.x.c + c]);
    };
    const int64_t* index = d.back.index + n * d.x.c;
    if constexpr (Planes) {
      for (int64_t c = rows.begin; c < rows.end; ++c) add(c, index[c], c);
    } else {
      for (int64_t c = 0; c < columns; ++c)
        if (index[c] >= rows.begin && index[c] < rows.end) add(index[c], c, c);
    }
  }
}

template <class T, bool Sums, bool Planes>
void dual_pass(const Dual<T>& d, int64_t n, Range rows, Acc<T>* total, Acc<T>* seen, Acc<T>* moved) {
  constexpr Job J = Sums ? Job::sums : Job::apply;
  if (d.of.shift)
    dual_rows<T, J, Planes, true>(d, n, rows, total, seen, moved);
  else
    dual_rows<T, J, Planes, false>(d, n, rows, total, seen, moved);
}
