// channel_pool: p[n, c] = mean, max or mean of |x| over s; one read of x. Backward of the maximum: dp where x is it.
#define FA_KERNELS "cpu/channel_pool.kernels.h"
#include "stages.h"
// stages.h before isa.h: the kernels use its enums
#include "isa.h"

namespace fa {

Pool pool_of(const std::string& name) {
  if (name == "mean") return Pool::mean;
  if (name == "max") return Pool::max;
  if (name == "mean_max") return Pool::mean_max;
  if (name == "mean_var") return Pool::mean_var;
  STD_TORCH_CHECK(name == "mean_abs", "unknown pool ", name);
  return Pool::mean_abs;
}

bool splits(const std::string& ties) {
  STD_TORCH_CHECK(ties == "split" || ties == "first", "unknown rule for ties ", ties);
  return ties == "split";
}

template <class T, Pool K, bool Index>
static void pool_as(const Map& x, Range samples, Acc<T>* total, Acc<T>* most, int64_t* where) {
  using A = Acc<T>;
  using I = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
  const int64_t c = x.c, n = samples.end - samples.begin;
  if (!x.pixels) {
    parallel_for(samples.begin * c, samples.end * c, grain(x.s), [&](int64_t b, int64_t e) {
      FA_CALL(pool_planes, (T, K, Index), x, Range{b, e}, total, most, where);
    });
  } else {
    const int64_t run = pixels_per_run(c), runs = (x.s + run - 1) / run;
    const auto sums = scratch<A>(K == Pool::max ? 0 : n * runs * c), tops = scratch<A>(has_max(K) ? n * runs * c : 0);
    const auto places = scratch<I>(has_max(K) && Index ? n * runs * c : 0);
    parallel_for(0, n * runs, 1, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t s = i % runs * run;
        FA_CALL(pool_pixels, (T, K, Index), x, samples.begin + i / runs, (Range{s, std::min(s + run, x.s)}),
                sums.get() + (K == Pool::max ? 0 : i * c), tops.get() + (has_max(K) ? i * c : 0),
                places.get() + (has_max(K) && Index ? i * c : 0));
      }
    });
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to = (samples.begin + i) * c;
      if constexpr (K != Pool::max) add_runs(sums.get() + i * runs * c, runs, c, total + to);
      for (int64_t j = 0; j < runs; ++j) {
        [[maybe_unused]] const int64_t from = (i * runs + j) * c;
        if constexpr (has_max(K))
          for (int64_t k = 0; k < c; ++k) {
            const A v = tops[from + k];
            if (j && !(v > most[to + k] || (v != v && most[to + k] == most[to + k]))) continue;
            most[to + k] = v;
            if constexpr (Index) where[to + k] = places[from + k];
          }
      }
    }
  }
  if constexpr (K != Pool::max)
    for (int64_t i = samples.begin * c; i < samples.end * c; ++i) total[i] /= A(x.s);
}

template <class T>
void moments(const Map& x, Range samples, Acc<T>* mean, Acc<T>* var) {
  using A = Acc<T>;
  const int64_t c = x.c, n = samples.end - samples.begin;
  if (!x.pixels) {
    parallel_for(samples.begin * c, samples.end * c, grain(x.s),
                 [&](int64_t b, int64_t e) { FA_CALL(moments_planes, (T), x, Range{b, e}, mean, var); });
    return;
  }
  const int64_t run = pixels_per_run(c), runs = (x.s + run - 1) / run;
  const auto means = scratch<A>(n * runs * c), m2s = scratch<A>(n * runs * c), totals = scratch<A>(n * runs * c),
             shift = scratch<A>(n * c);
  for (int64_t i = 0; i < n; ++i) FA_CALL(first_pixel, (T), x, samples.begin + i, shift.get() + i * c);
  parallel_for(0, n * runs, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t s = i % runs * run;
      FA_CALL(moments_pixels, (T), x, samples.begin + i / runs, (Range{s, std::min(s + run, x.s)}),
              shift.get() + i / runs * c, means.get() + i * c, m2s.get() + i * c, totals.get() + i * c);
    }
  });
  for (int64_t i = 0; i < n; ++i)
    FA_CALL(moments_merge, (A), x, run, shift.get() + i * c, means.get() + i * runs * c, m2s.get() + i * runs * c,
            totals.get() + i * runs * c, mean + (samples.begin + i) * c, var + (samples.begin + i) * c);
}
template void moments<float>(const Map&, Range, float*, float*);
template void moments<double>(const Map&, Range, double*, double*);
template void moments<BFloat16>(const Map&, Range, float*, float*);
template void moments<Half>(const Map&, Range, float*, float*);

template <class T>
void pool(const Map& x, Range samples, Pool kind, Acc<T>* mean, Acc<T>* max, int64_t* index) {
  switch (kind) {
    case Pool::mean:
      return pool_as<T, Pool::mean, false>(x, samples, mean, nullptr, nullptr);
    case Pool::mean_abs:
      return pool_as<T, Pool::mean_abs, false>(x, samples, mean, nullptr, nullptr);
    case Pool::mean_var:
      return moments<T>(x, samples, mean, max);
    case Pool::max:
      return index ? pool_as<T, Pool::max, true>(x, samples, nullptr, max, index)
                   : pool_as<T, Pool::max, false>(x, samples, nullptr, max, nullptr);
    case Pool::mean_max:
      return index ? pool_as<T, Pool::mean_max, true>(x, samples, mean, max, index)
                   : pool_as<T, Pool::mean_max, false>(x, samples, mean, max, nullptr);
  }
}
template void pool<float>(const Map&, Range, Pool, float*, float*, int64_t*);
template void pool<double>(const Map&, Range, Pool, double*, double*, int64_t*);
template void pool<BFloat16>(const Map&, Range, Pool, float*, float*, int64_t*);
template void pool<Half>(const Map&, Range, Pool, float*, float*, int64_t*);

static std::tuple<Tensor, std::optional<Tensor>> pooled(const Tensor& x, const std::string& pool_name, bool index) {
  check_map(x);
  const Pool kind = pool_of(pool_name);
  const Map map = maps_of({&x})[0];
  STD_TORCH_CHECK(map.s <= std::numeric_limits<int32_t>::max(), "plane too large");
  const bool two = is_pair(kind);
  const ScalarType acc = acc_dtype(x.scalar_type());
  Tensor value = two ? new_dense({2, map.n, map.c}, acc) : new_dense({map.n, map.c}, acc);
  std::optional<Tensor> where;
  if (index && has_max(kind)) where = new_dense({map.n, map.c}, ScalarType::Long);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* first = static_cast<Acc<T>*>(value.data_ptr());
    pool<T>(map, {0, map.n}, kind, first, two ? first + map.n * map.c : first,
            where ? static_cast<int64_t*>(where->data_ptr()) : nullptr);
  });
  return {value, where};
}

std::tuple<Tensor, Tensor> channel_pool_cpu(const Tensor& x, const std::string& pool, const std::string& ties,
                                            bool return_index) {
  STD_TORCH_CHECK(!return_index || has_max(pool_of(pool)), "return_index");
  auto [value, where] = pooled(x, pool, !splits(ties) || return_index);
  return {value, where ? *where : new_dense({0}, ScalarType::Long)};
}

Tensor channel_pool_infer_cpu(const Tensor& x, const std::string& pool, const std::string& ties, bool return_index) {
  splits(ties);
  return std::get<0>(pooled(x, pool, false));
}

Tensor channel_pool_bwd_cpu(const Tensor& x, const Tensor& dpooled, const Tensor& values, const Tensor& index,
                            const std::string& pool_name, const std::string& ties) {
  check_map(x);
  const Pool kind = pool_of(pool_name);
  const bool two = is_pair(kind), split = splits(ties) && has_max(kind);
  Tensor dx = new_like(x);
  const auto maps = maps_of({&x, &dx});
  const Map m = maps[0];
  for (const Tensor* t : {&dpooled, &values}) {
    if (t == &values && !split && kind != Pool::mean_var) continue;
    if (two)
      check_shape(*t, {2, m.n, m.c});
    else
      check_shape(*t, {m.n, m.c});
  }
  const Index places = has_max(kind) && !split ? Index(index, m.n, m.c, m.s) : Index();
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const int64_t nc = m.n * m.c;
    const Dense<A> dp(dpooled), v(values);
    const auto zero = scratch<A>(nc), mean = scratch<A>(nc), share = scratch<A>(nc);
    const A* dmax = dp.get() + (two ? nc : 0);
    const A* max = split ? v.get() + (two ? nc : 0) : nullptr;
    for (int64_t i = 0; i < nc; ++i) zero[i] = 0, mean[i] = dp.get()[i] / A(m.s);
    Spread<A> back;
    if (two || kind == Pool::mean) back.add = mean.get();
    if (kind == Pool::mean_abs) back.sign = mean.get();
    const Epilogue<T> none{m, {}, {}, zero.get(), Act::identity, 0};
    if (kind == Pool::mean_var) {
      for (int64_t i = 0; i < nc; ++i) share[i] = 2 * dmax[i] / A(m.s);
      back.slope = share.get();
      back.centre = v.get();
    } else if (split) {
      count_max<T>(m, {0, m.n}, max, share.get());
      for (int64_t i = 0; i < nc; ++i) share[i] = dmax[i] / share[i];
      back.share = share.get();
      back.max = max;
    } else if (has_max(kind)) {
      back.first = dmax;
      back.index = places.get();
    }
    apply<T>(none, maps[1], {0, m.n}, back);
  });
  return dx;
}

}  // namespace fa

FA_REGISTER(channel_pool)
FA_REGISTER_INFER(channel_pool)
FA_REGISTER(channel_pool_bwd)
