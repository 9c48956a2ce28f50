// Small dense layers on row-major arrays, no larger than descriptors and weights are.

// out[n, m] = Σ_k a[n, k]·b[m, k] + bias[m]·times: NN × MM dot products at once, so that each load serves several.
template <class A, int NN, int MM>
FA_INLINE void dots(const A* a, const A* b, const A* bias, A times, int64_t k, int64_t m, int64_t ldo, A* out) {
  using V = Vec<A>;
  V total[NN][MM] = {};
  int64_t i = 0;
  for (; i + width<A> <= k; i += width<A>) {
    V right[MM];
    FA_UNROLL
    for (int y = 0; y < MM; ++y) right[y] = get<V>(b + y * k + i);
    FA_UNROLL
    for (int x = 0; x < NN; ++x) {
      const V left = get<V>(a + x * k + i);
      FA_UNROLL
      for (int y = 0; y < MM; ++y) total[x][y] = total[x][y] + left * right[y];
    }
  }
  FA_UNROLL
  for (int x = 0; x < NN; ++x) FA_UNROLL
  for (int y = 0; y < MM; ++y) {
    A rest = sum(total[x][y]);
    for (int64_t j = i; j < k; ++j) rest += a[x * k + j] * b[y * k + j];
    out[x * ldo + m + y] = rest + (bias ? bias[m + y] * times : A(0));
  }
}

template <class A, int MM>
FA_INLINE void dots_of(const A* a, const A* b, const A* bias, A times, int64_t n, int64_t k, int64_t m, int64_t ldo,
                       A* out) {
  int64_t x = 0;
  for (; x + 4 <= n; x += 4) dots<A, 4, MM>(a + x * k, b, bias, times, k, m, ldo, out + x * ldo);
  for (; x < n; ++x) dots<A, 1, MM>(a + x * k, b, bias, times, k, m, ldo, out + x * ldo);
}

template <class A>
void dense_rows(const A* a, const A* b, const A* bias, A times, int64_t n, int64_t k, Range rows, int64_t ldo, A* out) {
  constexpr int step = FA_BYTES == 64 ? 4 : 2;  // 4 × step sums at once, in 32 registers or in 16
  int64_t m = rows.begin;
  for (; m + step <= rows.end; m += step) dots_of<A, step>(a, b + m * k, bias, times, n, k, m, ldo, out);
  for (; m < rows.end; ++m) dots_of<A, 1>(a, b + m * k, bias, times, n, k, m, ldo, out);
}

// out[i, k] = Σ_j coef[i·ci + j·cj]·rows[j, k]: a product whose inner sum runs over rows that lie densely in k.
template <class A, int II>
struct Combine {
  const A *coef, *rows;
  int64_t ci, cj, count, ld, ldo;
  A* out;

  template <class V>
  FA_INLINE void at(int64_t k) {
    V total[II] = {};
    for (int64_t j = 0; j < count; ++j) {
      const V row = get<V>(rows + j * ld + k);
      FA_UNROLL
      for (int i = 0; i < II; ++i) total[i] = total[i] + row * coef[i * ci + j * cj];
    }
    FA_UNROLL
    for (int i = 0; i < II; ++i) put<V>(out + i * ldo + k, total[i]);
  }
};

template <class A>
void combine_rows(const A* coef, int64_t ci, int64_t cj, int64_t count, const A* rows, int64_t k, Range outs, A* out) {
  int64_t i = outs.begin;
  for (; i + 4 <= outs.end; i += 4) {
    Combine<A, 4> f{coef + i * ci, rows, ci, cj, count, k, k, out + i * k};
    each<A>(k, f);
  }
  for (; i < outs.end; ++i) {
    Combine<A, 1> f{coef + i * ci, rows, ci, cj, count, k, k, out + i * k};
    each<A>(k, f);
  }
}

// out = act(v), or with `g` its gradient g·act'(v); slopes has a value per column.
template <class A>
struct Activate {
  const A *v, *g, *slopes;
  A* out;
  Act act;
  template <class V>
  FA_INLINE void at(int64_t i) {
    const V value = get<V>(v + i), a = slopes ? get<V>(slopes + i) : V{};
    // A product, not a choice: a gradient that isn't finite shows in the weights' gradients, where a loss scaler looks.
    put<V>(out + i, g ? get<V>(g + i) * derivative<V>(act, value, a) : activate<V>(act, value, a));
  }
};

template <class A>
void activate_rows(Act act, const A* v, const A* g, const A* slopes, int64_t rows, int64_t columns, A* out) {
  if (!slopes) columns *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r) {
    Activate<A> f{v + r * columns, g ? g + r * columns : nullptr, slopes, out + r * columns, act};
    each<A>(columns, f);
  }
}
