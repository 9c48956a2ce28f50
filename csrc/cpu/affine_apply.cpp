// affine_apply: y = act(scale·(x − centre) + shift + residual), or gate·act(…); one read of x and of the residual, one
// write. branch_affine: that of branches, side by side.
#define FA_KERNELS "cpu/affine.kernels.h"
#include "cpu/affine.h"
#include "cpu/branches.h"
// affine.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

template <class T>
static void pass(const Affine<T>& in) {
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
}

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
    pass<T>(in);
  });
  return y;
}

Tensor branch_affine_cpu(const Tensor& x, const Tensor& scale, const Tensor& shift, const OptTensor& centre,
                         const OptTensor& x1, const OptTensor& x2, const OptTensor& x3, const OptTensor& x4,
                         const OptTensor& x5, const OptTensor& x6, const OptTensor& x7, const std::string& merge_name,
                         const std::string& act, double slope) {
  check_map(x);
  const int64_t count = count_tensors(x, {&x1, &x2, &x3, &x4, &x5, &x6, &x7}), c = x.size(1);
  const BranchMerge merge = branch_merge_of(merge_name);
  Tensor y = beside(x, count * c);
  const auto maps =
      maps_of({&x, pointer(x1), pointer(x2), pointer(x3), pointer(x4), pointer(x5), pointer(x6), pointer(x7), &y});
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Slots<A> by(scale, x, merge, count), to(shift, x, merge, count), from(centre, x, merge, count);
    for (int64_t b = 0; b < count; ++b) {
      Affine<T> in;
      in.x = maps[b], in.y = channels_of<T>(maps[8], slot_of(merge, b, count) * c, c);
      in.scale = by.of(b), in.shift = to.of(b), in.centre = from.of(b);
      in.act = act_of(act), in.slope = A(slope), in.together = count;
      pass<T>(in);
    }
  });
  return y;
}

}  // namespace fa

FA_REGISTER(affine_apply)
FA_REGISTER(branch_affine)
