// pool_scale_apply: dx = e·gate + pool'(x)·dpooled; one read of e, one write.
#define FA_KERNELS "cpu/pool_scale_apply.kernels.h"
#include "stages.h"
// stages.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

template <class T>
void apply(const Epilogue<T>& in, const Map& dx, Range samples, const Spread<Acc<T>>& back) {
  if (dx.pixels)
    parallel_for(samples.begin * dx.s, samples.end * dx.s, grain(dx.c),
                 [&](int64_t b, int64_t e) { FA_CALL(apply_pixels, (T), in, dx, Range{b, e}, back); });
  else
    parallel_for(samples.begin * dx.c, samples.end * dx.c, grain(dx.s),
                 [&](int64_t b, int64_t e) { FA_CALL(apply_planes, (T), in, dx, Range{b, e}, back); });
}

#define FA_INSTANTIATE(T) template void apply<T>(const Epilogue<T>&, const Map&, Range, const Spread<Acc<T>>&);
FA_INSTANTIATE(float)
FA_INSTANTIATE(double)
FA_INSTANTIATE(BFloat16)
FA_INSTANTIATE(Half)

Tensor pool_scale_apply_cpu(const Tensor& x, const Tensor& e, const Tensor& gate, const Tensor& dpooled,
                            const Tensor& values, const Tensor& index, const Tensor& count, const std::string& act,
                            double slope, const std::string& pool_name, const std::string& ties) {
  check_map(x);
  check_same(x, e);
  check_shape(gate, {x.size(0), x.size(1)});
  const Pool kind = pool_of(pool_name);
  const bool two = is_pair(kind), split = splits(ties) && has_max(kind);
  if (two)
    check_shape(dpooled, {2, x.size(0), x.size(1)});
  else
    check_shape(dpooled, {x.size(0), x.size(1)});
  if (split || kind == Pool::mean_var) check_shape(values, {x.size(0), x.size(1)});
  if (split) check_shape(count, {x.size(0), x.size(1)});
  Tensor dx = new_like(x);
  const auto maps = maps_of({&x, &e, &dx});
  const Index places = has_max(kind) && !split ? Index(index, maps[0].n, maps[0].c, maps[0].s) : Index();
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const int64_t nc = maps[0].n * maps[0].c;
    const Dense<A> g(gate), dp(dpooled), max(values), seen(count);
    const auto mean = scratch<A>(nc), share = scratch<A>(split || kind == Pool::mean_var ? nc : 0);
    const A* dmax = dp.get() + (two ? nc : 0);
    Spread<A> back;
    if (kind != Pool::max) {
      for (int64_t i = 0; i < nc; ++i) mean[i] = dp.get()[i] / A(maps[0].s);
      (kind == Pool::mean_abs ? back.sign : back.add) = mean.get();
    }
    if (kind == Pool::mean_var) {
      for (int64_t i = 0; i < nc; ++i) share[i] = 2 * dmax[i] / A(maps[0].s);
      back.slope = share.get();
      back.centre = max.get();
    } else if (split) {
      for (int64_t i = 0; i < nc; ++i) share[i] = dmax[i] / seen.get()[i];
      back.share = share.get();
      back.max = max.get();
    } else if (has_max(kind)) {
      back.first = dmax;
      back.index = places.get();
    }
    const Epilogue<T> in{maps[0], maps[1], {}, g.get(), act_of(act), A(slope)};
    apply<T>(in, maps[2], {0, maps[0].n}, back);
  });
  return dx;
}

}  // namespace fa

FA_REGISTER(pool_scale_apply)
