// The gradient behind an epilogue, for both halves of a backward: e = dy·act'(v), v = x·gate (+ residual).

// F is what is known when it is compiled: From::any is code for everything, which looks as it goes.
template <class V, From F, class T>
FA_INLINE V gradient_at(const T* dy, const T* aux, V x, V gate, int64_t i, Act act, V slope, bool output) {
  if (F == From::any && !dy) return V{};
  const V g = load<V>(dy + i);
  if constexpr (F == From::dy) return g;
  if constexpr (F == From::mask) return select(load<V>(aux + i) <= V{}, V{}, g);
  if (FA_LIKELY(act == Act::identity)) return g;
  V v = x * gate;
  if (aux) {
    const V kept = load<V>(aux + i);
    v = output ? kept : v + kept;
  }
  if (FA_LIKELY(act == Act::relu)) return select(v <= V{}, V{}, g);
  const V d = derivative<V>(act, v, slope);
  return select(d == V{}, V{}, g * d);  // a cut gradient is 0, whatever was cut
}

template <class T>
FA_INLINE const T* plane_of(const Map& m, int64_t n, int64_t c) {
  return m.data ? m.plane<const T>(n, c) : nullptr;
}
template <class T>
FA_INLINE const T* pixel_of(const Map& m, int64_t n, int64_t s) {
  return m.data ? m.pixel<const T>(n, s) : nullptr;
}
