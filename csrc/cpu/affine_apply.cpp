// affine_apply: y = act(scale·(x − centre) + shift + residual), or gate·act(…); one read of x and of the residual, one
// write.
#define FA_KERNELS "cpu/affine.kernels.h"
#include "cpu/affine.h"
// affine.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

Tensor affine_apply_cpu(const Tensor& x, const Tensor& scale, const Tensor& shift, const OptTensor& centre,
                        const OptTensor& residual, const OptTensor& gate, const std::string& act, double slope) {
  check_map(x);
  if (residual) check_same(x, *residual);
  if (gate) check_shape(*gate, {x.size(0), x.size(1)});
  STD_TORCH_CHECK(!residual || !gate, "residual and gate");
  Tensor y = new_like(x);
  const auto maps = maps_of({&x, residual ? &*residual : nullptr, &y});
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Filling<A> by(scale, x, 1), to(shift, x, 0), from(centre, x, 0);
    const Dense<A> g(gate);
    Affine<T> in;
    in.x = maps[0], in.aux = maps[1], in.y = maps[2];
    in.scale = by.get(), in.shift = to.get(), in.centre = from.get(), in.gate = g.get();
    in.act = act_of(act), in.slope = A(slope);
    const int64_t runs = in.x.n * (in.x.pixels ? in.x.s : in.x.c), length = in.x.pixels ? in.x.c : in.x.s;
    parallel_for(0, runs, grain(length), [&](int64_t b, int64_t e) {
      const Range r{b, e};
      if (in.act == Act::identity)
        FA_CALL(affine_runs, (T, Epi::identity), in, r);
      else if (in.act == Act::relu)
        FA_CALL(affine_runs, (T, Epi::relu), in, r);
      else
        FA_CALL(affine_runs, (T, Epi::other), in, r);
    });
  });
  return y;
}

}  // namespace fa

FA_REGISTER(affine_apply)
