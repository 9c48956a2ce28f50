// y = act(x·g + r) over a run: one gate for a plane's run, a gate per element for a pixel's.
template <class T, Epi E, bool Residual, bool PerElement>
struct ScaleRun {
  using A = Acc<T>;
  const T* x;
  const T* residual;
  T* y;
  const A* gate;
  Act act;
  A slope;
  bool stream;

  template <class V>
  FA_INLINE void at(int64_t i) {
    if constexpr (is_vector<V>) {
      soon(x + i);
      if (!stream) soon_written(y + i);
      if constexpr (Residual) soon(residual + i);
    }
    const V g = PerElement ? get<V>(gate + i) : set<V>(*gate);
    V v = load<V>(x + i) * g;
    if constexpr (Residual) v = v + load<V>(residual + i);
    if constexpr (E == Epi::relu) v = select(v <= V{}, V{}, v);
    if constexpr (E == Epi::other) v = activate<V>(act, v, set<V>(slope));
    store<V>(y + i, v, stream);
  }
};

// Runs [begin, end): planes are numbered n·C + c, pixels n·S + s.
template <class T, Epi E, bool Residual>
void scale_runs(const Map& x, const Map& residual, const Map& y, Range runs, const Acc<T>* gate, Act act,
                Acc<T> slope) {
  const bool stream = streams<T>(y);
  Place at(runs.begin, x.pixels ? x.s : x.c);
  for (int64_t i = runs.begin; i < runs.end; ++i, at.next()) {
    if (x.pixels) {
      const int64_t n = at.outer, s = at.inner;
      ScaleRun<T, E, Residual, true> f{x.pixel<const T>(n, s),
                                       Residual ? residual.pixel<const T>(n, s) : nullptr,
                                       y.pixel<T>(n, s),
                                       gate + n * x.c,
                                       act,
                                       slope,
                                       stream};
      each<Acc<T>>(x.c, f);
    } else {
      const int64_t n = at.outer, c = at.inner;
      ScaleRun<T, E, Residual, false> f{x.plane<const T>(n, c),
                                        Residual ? residual.plane<const T>(n, c) : nullptr,
                                        y.plane<T>(n, c),
                                        gate + i,
                                        act,
                                        slope,
                                        stream};
      each<Acc<T>>(x.s, f);
    }
  }
  streamed(stream);
}
