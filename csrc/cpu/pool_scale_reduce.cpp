// pool_scale_reduce: e = dy·act'(v), dgate = Σ_s e·x; one read of dy and x, one write of e where an activation made it.
#define FA_KERNELS "cpu/pool_scale_reduce.kernels.h"
#include "stages.h"
// stages.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

template <class T>
void reduce(const Epilogue<T>& in, const Map& kept, const Map& dx, Range samples, const Acc<T>* most, Acc<T>* dgate,
            Acc<T>* count) {
  using A = Acc<T>;
  const Map& x = in.x;
  const A* const max = count ? most : nullptr;
  const int64_t c = x.c, n = samples.end - samples.begin;
  if (!x.pixels) {
    parallel_for(samples.begin * c, samples.end * c, grain(x.s), [&](int64_t b, int64_t e) {
      FA_CALL(reduce_planes, (T), in, kept, dx, Range{b, e}, max, dgate, count);
    });
    return;
  }
  const int64_t run = pixels_per_run(c), runs = (x.s + run - 1) / run;
  const auto sums = scratch<A>(n * runs * c), seen = scratch<A>(count ? n * runs * c : 0);
  parallel_for(0, n * runs, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t s = i % runs * run;
      FA_CALL(reduce_pixels, (T), in, kept, dx, samples.begin + i / runs, (Range{s, std::min(s + run, x.s)}), max,
              sums.get() + i * c, seen.get() + (count ? i * c : 0));
    }
  });
  for (int64_t i = 0, to = samples.begin * c; i < n; ++i, to += c) {
    add_runs(sums.get() + i * runs * c, runs, c, dgate + to);
    if (count) add_runs(seen.get() + i * runs * c, runs, c, count + to);
  }
}

template <class T>
void count_max(const Map& x, Range samples, const Acc<T>* max, Acc<T>* count) {
  if (x.pixels)
    parallel_for(samples.begin, samples.end, grain(x.c * x.s),
                 [&](int64_t b, int64_t e) { FA_CALL(count_pixels, (T), x, Range{b, e}, max, count); });
  else
    parallel_for(samples.begin * x.c, samples.end * x.c, grain(x.s),
                 [&](int64_t b, int64_t e) { FA_CALL(count_planes, (T), x, Range{b, e}, max, count); });
}

#define FA_INSTANTIATE(T)                                                                                      \
  template void reduce<T>(const Epilogue<T>&, const Map&, const Map&, Range, const Acc<T>*, Acc<T>*, Acc<T>*); \
  template void count_max<T>(const Map&, Range, const Acc<T>*, Acc<T>*);
FA_INSTANTIATE(float)
FA_INSTANTIATE(double)
FA_INSTANTIATE(BFloat16)
FA_INSTANTIATE(Half)

std::tuple<Tensor, Tensor, Tensor> pool_scale_reduce_cpu(const Tensor& x, const Tensor& dy, const Tensor& gate,
                                                         const OptTensor& aux, const Tensor& values,
                                                         const std::string& act_name, double slope,
                                                         const std::string& pool_name, const std::string& ties,
                                                         bool residual) {
  check_map(x);
  check_same(x, dy);
  if (aux) check_same(x, *aux);
  check_shape(gate, {x.size(0), x.size(1)});
  const Act act = act_of(act_name);
  const bool keep = residual && act != Act::identity, split = splits(ties) && has_max(pool_of(pool_name));
  if (split) check_shape(values, {x.size(0), x.size(1)});
  const ScalarType acc = acc_dtype(x.scalar_type());
  Tensor kept = keep ? new_like(x) : none_like(x);
  const auto maps = maps_of({&x, &dy, aux ? &*aux : nullptr, keep ? &kept : nullptr});
  Tensor dgate = new_dense({maps[0].n, maps[0].c}, acc),
         count = split ? new_dense({maps[0].n, maps[0].c}, acc) : new_dense({0}, acc);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Dense<A> g(gate), max(values);
    const Epilogue<T> in{maps[0], maps[1], maps[2], g.get(), act, A(slope)};
    reduce<T>(in, maps[3], {}, {0, maps[0].n}, max.get(), static_cast<A*>(dgate.data_ptr()),
              split ? static_cast<A*>(count.data_ptr()) : nullptr);
  });
  return {dgate, kept, count};
}

}  // namespace fa

FA_REGISTER(pool_scale_reduce)
