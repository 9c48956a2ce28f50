// spatial_pool: q[n, s] = mean and max over c of x·gate; one read of x. affine_spatial_pool: of gate·(x − centre) +
// shift.
#define FA_KERNELS "cpu/spatial_pool.kernels.h"
#include "dual.h"
// dual.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

template <class T, Pool K, bool Index, bool Of>
static void planes_of(const Map& x, const Acc<T>* gate, const Centred<Acc<T>>& of, Acc<T>* total, Acc<T>* most,
                      int64_t* where) {
  using A = Acc<T>;
  using I = typename Dual<T>::I;
  const auto places = scratch<I>(Index ? x.n * x.s : 0);
  if (x.pixels) {
    parallel_for(0, x.n * x.s, grain(x.c), [&](int64_t b, int64_t e) {
      FA_CALL(pool_columns, (T, K, Index, Of), x, (Range{b, e}), gate, of, total, most, places.get());
    });
    if constexpr (Index)
      for (int64_t i = 0; i < x.n * x.s; ++i) where[i] = places[i];
  } else {
    const int64_t chunk = (rows_per_chunk(x) + 7) / 8 * 8, parts = (x.c + chunk - 1) / chunk;
    const auto sums = scratch<A>(K != Pool::max ? x.n * parts * x.s : 0);
    const auto tops = scratch<A>(has_max(K) ? x.n * parts * x.s : 0);
    const auto found = scratch<I>(Index ? x.n * parts * x.s : 0);
    parallel_for(0, x.n * parts, 1, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t c = i % parts * chunk;
        FA_CALL(pool_chunk, (T, K, Index, Of), x, i / parts, (Range{c, std::min(c + chunk, x.c)}), gate, of,
                sums.get() + (K != Pool::max ? i * x.s : 0), tops.get() + (has_max(K) ? i * x.s : 0),
                found.get() + (Index ? i * x.s : 0));
      }
    });
    for (int64_t n = 0; n < x.n; ++n) {
      if constexpr (K != Pool::max) add_runs(sums.get() + n * parts * x.s, parts, x.s, total + n * x.s);
      if constexpr (has_max(K)) {
        A* const top = tops.get() + n * parts * x.s;
        I* const at = found.get() + (Index ? n * parts * x.s : 0);
        for (int64_t j = 1; j < parts; ++j)
          FA_CALL(merge_tops, (A, Index), top + j * x.s, top, Index ? at + j * x.s : at, at, x.s);
        std::copy_n(top, x.s, most + n * x.s);
        if constexpr (Index)
          for (int64_t s = 0; s < x.s; ++s) where[n * x.s + s] = at[s];
      }
    }
  }
  if constexpr (K != Pool::max)
    for (int64_t i = 0; i < x.n * x.s; ++i) total[i] /= A(x.c);
}

template <class T, Pool K, bool Index>
static void planes_as(const Map& x, const Acc<T>* gate, const Centred<Acc<T>>& of, Acc<T>* total, Acc<T>* most,
                      int64_t* where) {
  if (of.shift)
    planes_of<T, K, Index, true>(x, gate, of, total, most, where);
  else
    planes_of<T, K, Index, false>(x, gate, of, total, most, where);
}

template <class T>
void count_top(const Map& x, const Acc<T>* gate, const Acc<T>* top, Acc<T>* count) {
  if (x.pixels)
    parallel_for(0, x.n * x.s, grain(x.c),
                 [&](int64_t b, int64_t e) { FA_CALL(count_top_pixels, (T), x, (Range{b, e}), gate, top, count); });
  else
    parallel_for(0, x.n, grain(x.c * x.s),
                 [&](int64_t b, int64_t e) { FA_CALL(count_top_planes, (T), x, (Range{b, e}), gate, top, count); });
}
template void count_top<float>(const Map&, const float*, const float*, float*);
template void count_top<double>(const Map&, const double*, const double*, double*);
template void count_top<BFloat16>(const Map&, const float*, const float*, float*);
template void count_top<Half>(const Map&, const float*, const float*, float*);

// A dense tensor (N, P, *S), or (N, *S) for P = 0.
static Tensor new_planes(const Tensor& x, int64_t p, ScalarType dtype) {
  int64_t sizes[16], strides[16], dim = 0, step = 1;
  STD_TORCH_CHECK(x.dim() <= 16, "too many dimensions");
  sizes[dim++] = x.size(0);
  if (p) sizes[dim++] = p;
  for (int64_t d = 2; d < x.dim(); ++d) sizes[dim++] = x.size(d);
  for (int64_t d = dim - 1; d >= 0; --d) strides[d] = step, step *= std::max<int64_t>(sizes[d], 1);
  return new_strided(sizes, strides, dim, dtype);
}

static std::tuple<Tensor, std::optional<Tensor>> pooled(const Tensor& x, const OptTensor& gate, const OptTensor& affine,
                                                        const std::string& pool_name, bool index) {
  check_map(x);
  if (affine) check_shape(*affine, {2, x.size(0), x.size(1)});
  if (gate) check_shape(*gate, {x.size(0), x.size(1)});
  const Pool kind = pool_of(pool_name);
  STD_TORCH_CHECK(kind != Pool::mean_abs, "unknown pool ", pool_name);
  const Map m = maps_of({&x})[0];
  STD_TORCH_CHECK(m.c <= std::numeric_limits<int32_t>::max(), "too many channels");
  const int64_t p = kind == Pool::mean_max ? 2 : 1;
  Tensor planes = new_planes(x, p, acc_dtype(x.scalar_type()));
  std::optional<Tensor> where;
  if (index && has_max(kind)) where = new_planes(x, 0, ScalarType::Long);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Dense<A> given(gate), map(affine);
    const Centred<A> of = map ? Centred<A>{map.get(), map.get() + m.n * m.c} : Centred<A>{};
    const auto ones = scratch<A>(gate ? 0 : m.n * m.c);
    if (!gate) std::fill_n(ones.get(), m.n * m.c, A(1));
    const A* g = gate ? given.get() : ones.get();
    auto* out = static_cast<A*>(planes.data_ptr());
    auto* at = where ? static_cast<int64_t*>(where->data_ptr()) : nullptr;
    const auto mean = scratch<A>(p == 2 ? m.n * m.s : 0), most = scratch<A>(p == 2 ? m.n * m.s : 0);
    switch (kind) {
      case Pool::mean:
        return planes_as<T, Pool::mean, false>(m, g, of, out, nullptr, nullptr);
      case Pool::max:
        return at ? planes_as<T, Pool::max, true>(m, g, of, nullptr, out, at)
                  : planes_as<T, Pool::max, false>(m, g, of, nullptr, out, nullptr);
      default:
        at ? planes_as<T, Pool::mean_max, true>(m, g, of, mean.get(), most.get(), at)
           : planes_as<T, Pool::mean_max, false>(m, g, of, mean.get(), most.get(), nullptr);
    }
    for (int64_t n = 0; n < m.n; ++n) {
      std::copy_n(mean.get() + n * m.s, m.s, out + 2 * n * m.s);
      std::copy_n(most.get() + n * m.s, m.s, out + (2 * n + 1) * m.s);
    }
  });
  return {planes, where};
}

std::tuple<Tensor, Tensor> spatial_pool_cpu(const Tensor& x, const OptTensor& gate, const std::string& pool,
                                            const std::string& ties, bool return_index) {
  STD_TORCH_CHECK(!return_index || has_max(pool_of(pool)), "return_index");
  auto [planes, where] = pooled(x, gate, {}, pool, !splits(ties) || return_index);
  return {planes, where ? *where : new_dense({0}, ScalarType::Long)};
}

Tensor spatial_pool_infer_cpu(const Tensor& x, const OptTensor& gate, const std::string& pool, const std::string& ties,
                              bool return_index) {
  splits(ties);
  return std::get<0>(pooled(x, gate, {}, pool, false));
}

std::tuple<Tensor, Tensor> affine_spatial_pool_cpu(const Tensor& x, const Tensor& gate, const Tensor& affine,
                                                   const std::string& pool, bool return_index) {
  STD_TORCH_CHECK(!return_index || has_max(pool_of(pool)), "return_index");
  auto [planes, where] = pooled(x, gate, affine, pool, return_index);
  return {planes, where ? *where : new_dense({0}, ScalarType::Long)};
}

}  // namespace fa

FA_REGISTER(affine_spatial_pool)
FA_REGISTER(spatial_pool)
FA_REGISTER_INFER(spatial_pool)
