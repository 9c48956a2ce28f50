// What is left of a run after its whole vectors, as one more vector.

// The first n values from p on, n less than a vector's; `other` in the lanes behind them. Of a small tensor, or with
// load_first of a feature map.
template <class V, class T>
FA_INLINE V get_first(const T* p, int64_t n, V other) {
#if FA_BYTES == 64
  const uint32_t there = (1u << n) - 1;
  if constexpr (std::is_same_v<T, float>) {
    return bits<V>(_mm512_mask_loadu_ps(bits<__m512>(other), __mmask16(there), p));
  } else if constexpr (std::is_same_v<T, double>) {
    return bits<V>(_mm512_mask_loadu_pd(bits<__m512d>(other), __mmask8(there), p));
  } else {
    const __m256i h = _mm256_maskz_loadu_epi16(__mmask16(there), p);
    __m512 v;
    if constexpr (std::is_same_v<T, BFloat16>)
      v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    else
      v = _mm512_cvtph_ps(h);
    return bits<V>(_mm512_mask_blend_ps(__mmask16(there), bits<__m512>(other), v));
  }
#else
  V v = other;
  for (int64_t i = 0; i < n; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

template <class V, class T>
FA_INLINE V load_first(const T* p, int64_t n, V other) {
  count_read(n);
  return get_first<V>(p, n, other);
}

// Writes the first n lanes.
template <class V, class T>
FA_INLINE void store_first(T* p, int64_t n, V v) {
  count_write(n);
#if FA_BYTES == 64
  const uint32_t there = (1u << n) - 1;
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(p, __mmask16(there), bits<__m512>(v));
  else if constexpr (std::is_same_v<T, double>)
    return _mm512_mask_storeu_pd(p, __mmask8(there), bits<__m512d>(v));
#endif
  for (int64_t i = 0; i < n; ++i) p[i] = narrow(p + i, v[i]);
}

template <class V>
FA_INLINE void put_first(Element<V>* p, int64_t n, V v) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// All bits set in the first n lanes.
template <class V>
FA_INLINE auto first_lanes(int64_t n) {
  return lanes_from_zero<V>() < set<V>(Element<V>(n));
}

// Asks for a place that a loop will read, wherever it is.
template <class T>
FA_INLINE void ahead(const T* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 3);
#endif
}

// Numbers of A as doubles, a vector of these at a time, and back.
typedef float FewF __attribute__((vector_size(FA_BYTES / 2)));
template <class D, class A>
FA_INLINE D doubled(const A* p) {
  if constexpr (!is_vector<D>) {
    return *p;
  } else if constexpr (std::is_same_v<A, double>) {
    return get<D>(p);
  } else {
    FewF few;
    std::memcpy(&few, p, sizeof(few));
    return __builtin_convertvector(few, D);
  }
}
template <class D, class A>
FA_INLINE void put_doubled(A* p, D d) {
  if constexpr (!is_vector<D>) {
    *p = A(d);
  } else if constexpr (std::is_same_v<A, double>) {
    put<D>(p, d);
  } else {
    const FewF few = __builtin_convertvector(d, FewF);
    std::memcpy(p, &few, sizeof(few));
  }
}
