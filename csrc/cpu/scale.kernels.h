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
      if (Residual && residual) soon(residual + i);
    }
    const V g = PerElement ? get<V>(gate + i) : set<V>(*gate);
    V v = load<V>(x + i) * g;
    if (Residual && residual) v = v + load<V>(residual + i);
    if (E == Epi::relu || (E == Epi::other && FA_LIKELY(act == Act::relu)))
      v = select(v <= V{}, V{}, v);
    else if (E == Epi::other && act != Act::identity)
      v = activate<V>(act, v, set<V>(slope));
    store<V>(y + i, v, stream);
  }
};

// Runs [begin, end): planes are numbered n·C + c, pixels n·S + s.
template <class T, Epi E, bool Residual>
void scale_runs_as(const Map& x, const Map& residual, const Map& y, Range runs, const Acc<T>* gate, Act act,
                   Acc<T> slope) {
  const bool stream = streams<T>(y);
  Place at(runs.begin, x.pixels ? x.s : x.c);
  for (int64_t i = runs.begin; i < runs.end; ++i, at.next()) {
    if (x.pixels) {
      const int64_t n = at.outer, s = at.inner;
      ScaleRun<T, E, Residual, true> f{x.pixel<const T>(n, s),
                                       Residual && residual.data ? residual.pixel<const T>(n, s) : nullptr,
                                       y.pixel<T>(n, s),
                                       gate + n * x.c,
                                       act,
                                       slope,
                                       stream};
      each<Acc<T>>(x.c, f);
    } else {
      const int64_t n = at.outer, c = at.inner;
      ScaleRun<T, E, Residual, false> f{x.plane<const T>(n, c),
                                        Residual && residual.data ? residual.plane<const T>(n, c) : nullptr,
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

// The ones that networks have most, where they are compiled, and else the one for everything.
template <class T>
void scale_runs(const Map& x, const Map& residual, const Map& y, Range runs, const Acc<T>* gate, Act act,
                Acc<T> slope) {
  if constexpr (has_fast<T>) {
    if (act == Act::identity && !residual.data)
      return scale_runs_as<T, Epi::identity, false>(x, residual, y, runs, gate, act, slope);
    if (act == Act::relu && residual.data)
      return scale_runs_as<T, Epi::relu, true>(x, residual, y, runs, gate, act, slope);
  }
  scale_runs_as<T, Epi::other, true>(x, residual, y, runs, gate, act, slope);
}
