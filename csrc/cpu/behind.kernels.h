// What follows a gate, on values that are loaded already.

// e = dy·act'(v) out of values that are loaded already: dy, aux, and x·gate.
template <class V, From F>
FA_INLINE V behind(V dy, V aux, V v, Act act, V slope, bool output, bool residual) {
  if constexpr (F == From::dy) return dy;
  if constexpr (F == From::mask) return select(aux <= V{}, V{}, dy);
  if (residual) v = output ? aux : v + aux;
  const V d = derivative<V>(act, v, slope);
  return select(d == V{}, V{}, dy * d);  // a cut gradient is 0, whatever was cut
}

template <class V, Epi E>
FA_INLINE V finished(V v, Act act, V slope) {
  if constexpr (E == Epi::relu) return select(v <= V{}, V{}, v);
  if constexpr (E == Epi::other) return activate<V>(act, v, slope);
  return v;
}
