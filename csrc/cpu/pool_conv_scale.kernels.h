// A convolution over the channels of one sample, on arrays in the accumulation dtype. `edge` has k//2 more channels on
// each side.

// z = w1·p + b1 and v = act(z), for one hidden channel.
template <class A>
struct HiddenRow {
  const A* p;
  A w, b, slope;
  Act act;
  A *z, *v;
  template <class V>
  FA_INLINE void at(int64_t c) {
    const V u = get<V>(p + c) * w + b;
    put<V>(z + c, u);
    put<V>(v + c, activate<V>(act, u, set<V>(slope)));
  }
};
template <class A>
void hidden_row(const A* p, int64_t c, A w, A b, Act act, A slope, A* z, A* v) {
  HiddenRow<A> f{p, w, b, slope, act, z, v};
  each<A>(c, f);
}

// out[c] += Σ_t w[t]·edge[c + t], or with the taps in reverse.
template <class A, bool Reverse>
struct Taps {
  const A *edge, *w;
  int64_t k;
  A* out;
  template <class V>
  FA_INLINE void at(int64_t c) {
    V total = get<V>(out + c);
    for (int64_t t = 0; t < k; ++t) total = total + get<V>(edge + c + (Reverse ? k - 1 - t : t)) * w[t];
    put<V>(out + c, total);
  }
};
template <class A, bool Reverse>
void taps(const A* edge, int64_t c, const A* w, int64_t k, A* out) {
  Taps<A, Reverse> f{edge, w, k, out};
  each<A>(c, f);
}

template <class A>
struct Gates {
  const A* u;
  Act gate;
  const A* dgate;
  A* out;
  template <class V>
  FA_INLINE void at(int64_t i) {
    const V v = get<V>(u + i);
    if (!dgate) return put<V>(out + i, activate<V>(gate, v, V{}));
    put<V>(out + i, get<V>(dgate + i) * derivative<V>(gate, v, V{}));
  }
};
// gate(u), or with dgate the gradient of u.
template <class A>
void gates(const A* u, int64_t size, Act gate, const A* dgate, A* out) {
  Gates<A> f{u, gate, dgate, out};
  each<A>(size, f);
}

// Σ_c a[c]·b[c]
template <class A>
double inner(const A* a, const A* b, int64_t c) {
  using V = Vec<A>;
  V total{};
  int64_t i = 0;
  for (; i + width<A> <= c; i += width<A>) total = total + get<V>(a + i) * get<V>(b + i);
  double rest = 0;
  for (; i < c; ++i) rest += double(a[i]) * b[i];
  return rest + sum(total);
}

// dz = dv·act'(z) in place of dv; dp += w·dz; Σ dz·p and Σ dz.
template <class A>
struct HiddenBack {
  const A *z, *p;
  Act act;
  A w, slope;
  A *dv, *dp;
  template <class V>
  FA_INLINE void at(int64_t c) {
    const V dz = get<V>(dv + c) * derivative<V>(act, get<V>(z + c), set<V>(slope));
    put<V>(dv + c, dz);
    put<V>(dp + c, get<V>(dp + c) + dz * w);
  }
};
template <class A>
void hidden_back(const A* z, const A* p, int64_t c, Act act, A w, A slope, A* dv, A* dp) {
  HiddenBack<A> f{z, p, act, w, slope, dv, dp};
  each<A>(c, f);
}
