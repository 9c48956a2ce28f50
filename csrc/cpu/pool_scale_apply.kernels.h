#include "cpu/epilogue.kernels.h"

// dx = e·gate + the pooled gradient, spread
template <class T, From F, Back B, bool PerElement>
struct Apply {
  using A = Acc<T>;
  const T *x, *dy, *aux;
  T* dx;
  const A *gate, *add, *share, *max, *sign, *slopes, *centre;
  Act act;
  A slope;
  bool output, stream, reads;  // reads: x is needed

  template <class V>
  FA_INLINE V of(const A* p, int64_t i) const {
    return PerElement ? get<V>(p + i) : set<V>(*p);
  }
  template <class V>
  FA_INLINE V value(int64_t i) const {
    if constexpr (is_vector<V>) {
      if (F != From::any || dy) soon(dy + i);
      if (!stream) soon_written(dx + i);
    }
    V v{};
    if (B == Back::share || (B == Back::any && reads)) v = load<V>(x + i);
    V out = add ? of<V>(add, i) : V{};
    if (F != From::any || dy) {
      const V g = of<V>(gate, i);
      out = gradient_at<V, F>(dy, aux, v, g, i, act, set<V>(slope), output) * g + out;
    }
    if (B == Back::share || (B == Back::any && share)) {
      const V m = of<V>(max, i), part = of<V>(share, i);
      // Where the maximum is NaN nothing equals it: the eager form divides by 0 there, and all of the plane is NaN.
      out = out + select(v == m, part, select(m == m, V{}, m));
    }
    if (B == Back::any && sign) {
      const V d = of<V>(sign, i);
      out = out + select(v > V{}, d, select(v < V{}, -d, V{}));
    }
    if (B == Back::any && slopes) out = out + of<V>(slopes, i) * (v - of<V>(centre, i));
    return out;
  }
  template <class V>
  FA_INLINE void at(int64_t i) const {
    store<V>(dx + i, value<V>(i), stream);
  }
};

// Whether dx depends on x beyond the sums that are known.
template <class T>
FA_INLINE bool reads_x(const Epilogue<T>& in, const Spread<Acc<T>>& back) {
  return (in.dy.data && in.act != Act::identity) || back.share || back.sign || back.slope;
}

template <class T, From F, Back B>
void apply_planes_as(const Epilogue<T>& in, const Map& dx, Range rows, const Spread<Acc<T>>& back) {
  using A = Acc<T>;
  const bool stream = streams<T>(dx);
  Place place(rows.begin, dx.c);
  for (int64_t r = rows.begin; r < rows.end; ++r, place.next()) {
    const int64_t n = place.outer, c = place.inner;
    const auto at = [&](const A* p) { return p ? p + r : nullptr; };
    const Apply<T, F, B, false> f{plane_of<T>(in.x, n, c),
                                  plane_of<T>(in.dy, n, c),
                                  plane_of<T>(in.aux, n, c),
                                  dx.plane<T>(n, c),
                                  in.gate + r,
                                  at(back.add),
                                  at(back.share),
                                  at(back.max),
                                  at(back.sign),
                                  at(back.slope),
                                  at(back.centre),
                                  in.act,
                                  in.slope,
                                  from_output(in.act),
                                  stream,
                                  reads_x(in, back)};
    each<A>(dx.s, f);
    if (back.first) f.dx[back.index[r]] = static_cast<T>(f.template value<A>(back.index[r]) + back.first[r]);
  }
  streamed(stream);
}

template <class T, From F, Back B>
void apply_pixels_as(const Epilogue<T>& in, const Map& dx, Range pixels, const Spread<Acc<T>>& back) {
  using A = Acc<T>;
  const bool stream = streams<T>(dx);
  Place place(pixels.begin, dx.s);
  for (int64_t i = pixels.begin; i < pixels.end; ++i, place.next()) {
    const int64_t n = place.outer, s = place.inner, to = n * dx.c;
    const auto at = [&](const A* p) { return p ? p + to : nullptr; };
    const Apply<T, F, B, true> f{pixel_of<T>(in.x, n, s),
                                 pixel_of<T>(in.dy, n, s),
                                 pixel_of<T>(in.aux, n, s),
                                 dx.pixel<T>(n, s),
                                 in.gate + to,
                                 at(back.add),
                                 at(back.share),
                                 at(back.max),
                                 at(back.sign),
                                 at(back.slope),
                                 at(back.centre),
                                 in.act,
                                 in.slope,
                                 from_output(in.act),
                                 stream,
                                 reads_x(in, back)};
    each<A>(dx.c, f);
    if (back.first)
      for (int64_t c = 0; c < dx.c; ++c)
        if (back.index[to + c] == s) f.dx[c] = static_cast<T>(f.template value<A>(c) + back.first[to + c]);
  }
  streamed(stream);
}

// The two that networks have most, where they are compiled, and else the one for everything.
template <class T>
void apply_planes(const Epilogue<T>& in, const Map& dx, Range rows, const Spread<Acc<T>>& back) {
  if constexpr (has_fast<T>) {
    if (from_of(in) == From::dy && !back.sign && !back.slope) {
      if (back.share) return apply_planes_as<T, From::dy, Back::share>(in, dx, rows, back);
      return apply_planes_as<T, From::dy, Back::add>(in, dx, rows, back);
    }
  }
  apply_planes_as<T, From::any, Back::any>(in, dx, rows, back);
}
template <class T>
void apply_pixels(const Epilogue<T>& in, const Map& dx, Range pixels, const Spread<Acc<T>>& back) {
  if constexpr (has_fast<T>) {
    if (from_of(in) == From::dy && !back.sign && !back.slope) {
      if (back.share) return apply_pixels_as<T, From::dy, Back::share>(in, dx, pixels, back);
      return apply_pixels_as<T, From::dy, Back::add>(in, dx, pixels, back);
    }
  }
  apply_pixels_as<T, From::any, Back::any>(in, dx, pixels, back);
}
