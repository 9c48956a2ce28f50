// affine_pool: mean of act(scale·(x − centre) + shift); one read of x. affine_pool_scale_reduce: the five sums that the
// backward of a gate behind it needs; one read of x and of dy.
#define FA_KERNELS "cpu/affine.kernels.h"
#include "cpu/affine.h"
// affine.h before isa.h: the kernels use its types
#include "isa.h"
// affine_sums.h after isa.h: it calls the kernels
#include "cpu/affine_sums.h"

namespace fa {

template <Sums S>
static Tensor sums_of(const Tensor& x, const Tensor* dy, const Tensor& scale, const Tensor& shift,
                      const OptTensor& centre, const std::string& act, double slope) {
  check_map(x);
  if (dy) check_same(x, *dy);
  const auto maps = maps_of({&x, dy});
  const int64_t n = maps[0].n, c = maps[0].c;
  const ScalarType acc = acc_dtype(x.scalar_type());
  Tensor out = S == Sums::pool ? new_dense({n, c}, acc) : new_dense({how_many(S), n, c}, acc);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Filling<A> by(scale, x, 1), to(shift, x, 0), from(centre, x, 0);
    Affine<T> in;
    in.x = maps[0], in.dy = maps[1];
    in.scale = by.get(), in.shift = to.get(), in.centre = from.get();
    in.act = act_of(act), in.slope = A(slope);
    A* sums = static_cast<A*>(out.data_ptr());
    affine_sums<T, From::any, S>(in, sums);
    if constexpr (S == Sums::pool)
      for (int64_t i = 0; i < n * c; ++i) sums[i] /= A(maps[0].s);
  });
  return out;
}

Tensor affine_pool_cpu(const Tensor& x, const Tensor& scale, const Tensor& shift, const OptTensor& centre,
                       const std::string& act, double slope) {
  return sums_of<Sums::pool>(x, nullptr, scale, shift, centre, act, slope);
}

Tensor affine_pool_scale_reduce_cpu(const Tensor& x, const Tensor& dy, const Tensor& scale, const Tensor& shift,
                                    const OptTensor& centre, const std::string& act, double slope) {
  return sums_of<Sums::spread>(x, &dy, scale, shift, centre, act, slope);
}

}  // namespace fa

FA_REGISTER(affine_pool)
FA_REGISTER(affine_pool_scale_reduce)
