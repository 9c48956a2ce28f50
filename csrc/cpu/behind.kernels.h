// What follows a gate, on values that are loaded already. The activation is looked at for every vector and not compiled
// in: a branch that always goes the same way costs nothing measurable beside memory, and a kernel per activation takes
// a minute to compile. Only identity and relu, which nearly all networks have, are done without a call.

// e = dy·act'(v), v = x·gate (+ residual), which is in aux; or aux is act(v) where `output`.
template <class V>
FA_INLINE V behind(V dy, V aux, V v, Act act, V slope, bool output, bool residual) {
  if (FA_LIKELY(act == Act::identity)) return dy;
  if (residual) v = output ? aux : v + aux;
  if (FA_LIKELY(act == Act::relu)) return select(v <= V{}, V{}, dy);
  const V d = derivative<V>(act, v, slope);
  return select(d == V{}, V{}, dy * d);  // a cut gradient is 0, whatever was cut
}

template <class V>
FA_INLINE V finished(V v, Act act, V slope) {
  if (FA_LIKELY(act == Act::identity)) return v;
  if (FA_LIKELY(act == Act::relu)) return select(v <= V{}, V{}, v);
  return activate<V>(act, v, slope);
}

// each(), in the form without any of that where nothing follows the gate: f.at<Plain, V>(i).
template <class F, bool Plain>
struct Form {
  const F& f;
  template <class V>
  FA_INLINE void at(int64_t i) const {
    f.template at<Plain, V>(i);
  }
};
template <class T, class F>
FA_INLINE void each_finished(int64_t n, const F& f) {
  if constexpr (has_fast<T>) {
    if (f.act == Act::identity && !f.residual) {
      const Form<F, true> plain{f};
      return each<Acc<T>>(n, plain);
    }
  }
  const Form<F, false> whole{f};
  each<Acc<T>>(n, whole);
}
