// Vectors of the current instruction set, and the functions kernels are written in. Read once per instruction set by
// isa.h.
//
// Kernels are templates over V, which is a vector or a single number: a loop runs vectors first and the same code on
// what is left. A feature map is touched by `load` and `store` alone, which a counting build counts; small tensors by
// `get` and `put`.
namespace fa {
namespace {
namespace FA_ISA {

typedef float VecF __attribute__((vector_size(FA_BYTES)));
typedef double VecD __attribute__((vector_size(FA_BYTES)));
typedef int32_t VecI __attribute__((vector_size(FA_BYTES)));
typedef int64_t VecL __attribute__((vector_size(FA_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(FA_BYTES / 2)));
typedef uint32_t VecU __attribute__((vector_size(FA_BYTES)));

template <class A>
struct Traits;  // of an accumulator: its vector
template <>
struct Traits<float> {
  using V = VecF;
};
template <>
struct Traits<double> {
  using V = VecD;
};
template <class A>
using Vec = typename Traits<A>::V;
template <class A>
constexpr int64_t width = FA_BYTES / int64_t(sizeof(A));

template <class V>
struct Lane;  // of a vector or a number: its element, and the integers of the same size
template <>
struct Lane<float> {
  using type = float;
  using integer = int32_t;
};
template <>
struct Lane<double> {
  using type = double;
  using integer = int64_t;
};
template <>
struct Lane<VecF> {
  using type = float;
  using integer = VecI;
};
template <>
struct Lane<VecD> {
  using type = double;
  using integer = VecL;
};
template <class V>
using Element = typename Lane<V>::type;
template <class V>
using Integer = typename Lane<V>::integer;
template <class V>
constexpr bool is_vector = !std::is_same_v<V, Element<V>>;
template <class V>
constexpr int64_t count_of = is_vector<V> ? width<Element<V>> : 1;

// Whether kernels of feature maps of T have, beside the code for everything, a form of it for what networks have most.
// Each costs seconds of compilation: float64 and the baseline have none, where there is anything above it, and half
// precision only where processors are that compute in it.
#ifdef FA_X86
template <class T>
constexpr bool has_fast = std::is_same_v<T, float> ? FA_BYTES > 16 : FA_BYTES > 32 && !std::is_same_v<T, double>;
#else
template <class T>
constexpr bool has_fast = std::is_same_v<T, float>;
#endif

template <class V>
FA_INLINE V set(Element<V> a) {
  if constexpr (is_vector<V>)
    return V{} + a;
  else
    return a;
}
// a·b + c. Rounded once where the processor can, and everywhere alike: what one pass finds to be the largest, another
// must find equal to it, whatever a compiler makes of the code around.
FA_INLINE float multiply_add(float a, float b, float c) {
#if FA_BYTES > 16
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
FA_INLINE double multiply_add(double a, double b, double c) {
#if FA_BYTES > 16
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
FA_INLINE VecF multiply_add(VecF a, VecF b, VecF c) {
#if FA_BYTES == 64
  return _mm512_fmadd_ps(a, b, c);
#elif FA_BYTES == 32
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
FA_INLINE VecD multiply_add(VecD a, VecD b, VecD c) {
#if FA_BYTES == 64
  return _mm512_fmadd_pd(a, b, c);
#elif FA_BYTES == 32
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}
template <class M, class V>
FA_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}
template <class To, class From>
FA_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
template <class V>
FA_INLINE Integer<V> to_integer(V v) {
  if constexpr (is_vector<V>)
    return __builtin_convertvector(v, Integer<V>);
  else
    return Integer<V>(v);
}
template <class V>
FA_INLINE V to_float(Integer<V> v) {
  if constexpr (is_vector<V>)
    return __builtin_convertvector(v, V);
  else
    return V(v);
}
template <class V>
FA_INLINE V lanes_from_zero() {  // 0, 1, 2, …
  V v{};
  if constexpr (is_vector<V>)
    for (int64_t i = 0; i < count_of<V>; ++i) v[i] = Element<V>(i);
  return v;
}

// Sum of the lanes, by halves: the order is the same wherever it runs. Halves by intrinsics, because GCC takes a vector
// apart through memory, which at 49 elements a plane is half of the time.
FA_INLINE float sum(float v) { return v; }
FA_INLINE double sum(double v) { return v; }
#ifdef FA_X86
FA_INLINE float sum_quarter(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
}
FA_INLINE double sum_quarter(__m128d v) { return _mm_cvtsd_f64(_mm_add_sd(v, _mm_unpackhi_pd(v, v))); }
#if FA_BYTES == 16
FA_INLINE float sum(VecF v) { return sum_quarter(bits<__m128>(v)); }
FA_INLINE double sum(VecD v) { return sum_quarter(bits<__m128d>(v)); }
#else
FA_INLINE float sum_half(__m256 v) {
  return sum_quarter(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}
FA_INLINE double sum_half(__m256d v) {
  return sum_quarter(_mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1)));
}
#if FA_BYTES == 32
FA_INLINE float sum(VecF v) { return sum_half(bits<__m256>(v)); }
FA_INLINE double sum(VecD v) { return sum_half(bits<__m256d>(v)); }
#else
FA_INLINE float sum(VecF v) {
  const __m512 w = bits<__m512>(v);
  return sum_half(_mm256_add_ps(_mm512_castps512_ps256(w), _mm512_extractf32x8_ps(w, 1)));
}
FA_INLINE double sum(VecD v) {
  const __m512d w = bits<__m512d>(v);
  return sum_half(_mm256_add_pd(_mm512_castpd512_pd256(w), _mm512_extractf64x4_pd(w, 1)));
}
#endif
#endif
#else
template <class V>
FA_INLINE Element<V> sum(V v) {
  Element<V> total = 0;
  for (int64_t i = 0; i < count_of<V>; ++i) total += v[i];
  return total;
}
#endif

// The larger of two, NaN if either is: once m is NaN no comparison replaces it.
template <class V>
FA_INLINE auto beats(V v, V m) {
  return (v > m) | ((v != v) & (m == m));
}
template <class V>
FA_INLINE V larger(V v, V m) {
  return select(beats(v, m), v, m);
}

// Small tensors, in the accumulation dtype.
template <class V>
FA_INLINE V get(const Element<V>* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class V>
FA_INLINE void put(Element<V>* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// Feature maps: any dtype in memory, the accumulation dtype in a register.
FA_INLINE float widen(BFloat16 x) { return bits<float>(uint32_t(x.x) << 16); }
#if FA_BYTES > 16
FA_INLINE float widen(Half x) { return _cvtsh_ss(x.x); }
FA_INLINE Half narrow(Half*, float v) { return Half(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT), Half::from_bits()); }
#else
[[maybe_unused]] FA_NOINLINE float widen(Half x) { return static_cast<float>(x); }
[[maybe_unused]] FA_NOINLINE Half narrow(Half*, float v) { return Half(v); }
#endif
template <class T, class A>
FA_INLINE T narrow(T*, A v) {
  return static_cast<T>(v);
}
FA_INLINE float widen(float x) { return x; }
FA_INLINE double widen(double x) { return x; }

template <class V, class T>
FA_INLINE V load(const T* p) {
  count_read(count_of<V>);
  if constexpr (!is_vector<V>) {
    return widen(*p);
  } else if constexpr (std::is_same_v<T, Element<V>>) {
    return get<V>(p);
  } else {
    VecH h;
    std::memcpy(&h, p, sizeof(h));
    if constexpr (std::is_same_v<T, BFloat16>) {
      return bits<V>(__builtin_convertvector(h, VecU) << 16);
    } else {
#if FA_BYTES == 64
      return bits<V>(_mm512_cvtph_ps(bits<__m256i>(h)));
#elif FA_BYTES == 32
      return bits<V>(_mm256_cvtph_ps(bits<__m128i>(h)));
#else
      V v;
      for (int64_t i = 0; i < count_of<V>; ++i) v[i] = widen(p[i]);
      return v;
#endif
    }
  }
}

// Writes a register's bytes, past the caches where `stream` says so: p must then be aligned to them.
template <class R>
FA_INLINE void put_bytes(void* p, R r, bool stream) {
#if FA_BYTES == 64
  if constexpr (sizeof(R) == 64) {
    if (stream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits<__m512i>(r));
  }
#endif
#if FA_BYTES >= 32
  if constexpr (sizeof(R) == 32) {
    if (stream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits<__m256i>(r));
  }
#endif
#ifdef FA_X86
  if constexpr (sizeof(R) == 16) {
    if (stream) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits<__m128i>(r));
  }
#endif
  std::memcpy(p, &r, sizeof(r));
}
FA_INLINE void streamed(bool stream) {  // orders streaming stores before whatever tells another thread of them
#ifdef FA_X86
  if (stream) _mm_sfence();
#endif
}

template <class V, class T>
FA_INLINE void store(T* p, V v, bool stream = false) {
  count_write(count_of<V>);
  if constexpr (!is_vector<V>) {
    *p = narrow(p, v);
  } else if constexpr (std::is_same_v<T, Element<V>>) {
    put_bytes(p, v, stream);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const VecU u = bits<VecU>(v);  // round to nearest even; a NaN stays one
    const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const VecU kept = (bits<VecI>(v) & 0x7fffffff) > 0x7f800000 ? VecU{} + 0x7fc0u : rounded;
    put_bytes(p, __builtin_convertvector(kept, VecH), stream);
  } else {
#if FA_BYTES == 64
    put_bytes(p, _mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), stream);
#elif FA_BYTES == 32
    put_bytes(p, _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), stream);
#else
    for (int64_t i = 0; i < count_of<V>; ++i) p[i] = narrow(p, v[i]);
#endif
  }
}

// Asks for what a loop will touch 2 KB from now. Measured on a Xeon with AVX-512, x·s of 6.4 MB: 1.4 times as fast with
// both hints as without; the processor's own prefetcher stops at every page, and a line that is to be overwritten is
// fetched in the state that allows it. An address past the end is harmless.
template <class T>
FA_INLINE void soon(const T* read) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const char*>(read) + 2048, 0, 3);
#endif
}
template <class T>
FA_INLINE void soon_written(T* write) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const char*>(write) + 2048, 1, 3);
#endif
}

// f.template at<V>(i) for i over [0, n): vectors, then single numbers.
template <class A, class F>
FA_INLINE void each(int64_t n, F& f) {
  int64_t i = 0;
  for (; i + width<A> <= n; i += width<A>) f.template at<Vec<A>>(i);
  for (; i < n; ++i) f.template at<A>(i);
}

// exp by 2^k · P(r), |r| ≤ ln2/2 (Cody–Waite reduction, degree-6 minimax): 2 ulp in float32. Overflow gives inf, NaN
// stays.
template <class V>
FA_NOINLINE V exp_each(V x) {
  V y;
  for (int64_t i = 0; i < count_of<V>; ++i) y[i] = std::exp(x[i]);
  return y;
}
template <class V>
FA_INLINE V exp_of(V x) {
  if constexpr (std::is_same_v<Element<V>, double>) {
    if constexpr (is_vector<V>)
      return exp_each<V>(x);
    else
      return std::exp(x);
  } else {
    const V clamped = select(x > set<V>(89.0f), set<V>(89.0f), select(x < set<V>(-88.0f), set<V>(-88.0f), x));
    const V scaled = clamped * 1.44269504088896341f;
    const V half = select(scaled < set<V>(0.0f), set<V>(-0.5f), set<V>(0.5f));
    // NaN has no integer: keep it out of the conversion, it comes back in the last line.
    const Integer<V> k = to_integer(select(x == x, scaled + half, V{}));
    const V kf = to_float<V>(k);
    const V r = (clamped - kf * 0.693359375f) + kf * 2.12194440e-4f;
    V p = set<V>(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^k in two steps, so that k = 128 doesn't overflow before p is applied.
    const Integer<V> k1 = k >> 1, k2 = k - k1;
    const V y = p * bits<V>((k1 + 127) << 23) * bits<V>((k2 + 127) << 23);
    const V large = select(x > set<V>(88.7228390f), set<V>(std::numeric_limits<float>::infinity()), y);
    return select(x == x, select(x < set<V>(-87.9f), V{}, large), x);
  }
}

// 1 + e^x: half of exp_of's work, because an e^x below 2^-24 makes no difference, and the largest ones may be infinite.
template <class V>
FA_INLINE V one_plus_exp(V x) {
  if constexpr (std::is_same_v<Element<V>, double>) {
    return 1 + exp_of<V>(x);
  } else {
    const V clamped = select(x > set<V>(89.0f), set<V>(89.0f), select(x < set<V>(-87.0f), set<V>(-87.0f), x));
    // Added to 1.5·2^23 a number is rounded to an integer, which then stands in the lowest bits; NaN stays NaN.
    const V sum = clamped * 1.44269504088896341f + 12582912.0f, kf = sum - 12582912.0f;
    const V r = (clamped - kf * 0.693359375f) + kf * 2.12194440e-4f;
    V p = set<V>(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return 1 + p * bits<V>((bits<Integer<V>>(sum) + (127 - 0x4b400000)) << 23);
  }
}

template <class V>
FA_INLINE V sigmoid_of(V x) {
  return 1 / one_plus_exp<V>(-x);
}

template <class V>
FA_INLINE V erf_of(V x) {
  if constexpr (is_vector<V>) {
    V y;
    for (int64_t i = 0; i < count_of<V>; ++i) y[i] = std::erf(x[i]);
    return y;
  } else {
    return std::erf(x);
  }
}

// act(v) and its derivative, the C++ form of fused_attn/ops/activations.py: same names, same values at the kinks.
// `a` is the negative slope of leaky_relu and prelu.
// Calls, not inlined: a switch over all of them in every loop of every op would take minutes to compile, and the two
// that networks have after a gate, identity and relu, don't come here.
template <class V>
FA_NOINLINE V activate(Act act, V v, V a) {
  const V zero{};
  switch (act) {
    case Act::relu:
      return select(v <= zero, zero, v);
    case Act::relu6:
      return select(v <= zero, zero, select(v >= set<V>(6), set<V>(6), v));
    case Act::leaky_relu:
    case Act::prelu:
      return select(v > zero, v, v * a);
    case Act::silu:
      return v / one_plus_exp<V>(-v);
    case Act::gelu:
      return v * 0.5f * (1 + erf_of<V>(v * Element<V>(0.70710678118654752440)));
    case Act::hardswish:
      return v * select(v <= set<V>(-3), zero, select(v >= set<V>(3), set<V>(6), v + 3)) / 6;
    case Act::sigmoid:
      return sigmoid_of<V>(v);
    case Act::hard_sigmoid:
      return select(v <= set<V>(-3), zero, select(v >= set<V>(3), set<V>(6), v + 3)) / 6;
    case Act::clamp:
      return select(v < zero, zero, select(v > set<V>(1), set<V>(1), v));
    default:
      return v;
  }
}

template <class V>
FA_NOINLINE V derivative(Act act, V v, V a) {
  const V zero{}, one = set<V>(1);
  switch (act) {
    case Act::relu:
      return select(v <= zero, zero, one);
    case Act::relu6:
      return select((v > zero) & (v < set<V>(6)), one, zero);
    case Act::leaky_relu:
    case Act::prelu:
      return select(v > zero, one, a);
    case Act::silu: {
      const V s = sigmoid_of<V>(v);
      return s * (1 + v * (1 - s));
    }
    case Act::gelu:
      return (1 + erf_of<V>(v * Element<V>(0.70710678118654752440))) / 2 +
             v * exp_of<V>(v * v * Element<V>(-0.5)) * Element<V>(0.39894228040143267794);
    case Act::hardswish:
      return select(v <= set<V>(-3), zero, select(v >= set<V>(3), one, v / 3 + Element<V>(0.5)));  // NaN at NaN
    case Act::sigmoid: {
      const V s = sigmoid_of<V>(v);
      return s * (1 - s);
    }
    case Act::hard_sigmoid:
      return select((v > set<V>(-3)) & (v < set<V>(3)), one / 6, zero);
    case Act::clamp:
      return select((v >= zero) & (v <= one), one, zero);
    default:
      return one;
  }
}
