// affine_apply_bwd: dx = scale·e, Σ e·(x − centre), Σ e, Σ dy·act(v), and e where a residual wants it;
// moments_affine_reduce: the sums and e; branch_affine_reduce: the sums of branches. e = gate·dy·act'(v); one pass
// each.
#define FA_KERNELS "cpu/affine.kernels.h"
#include "cpu/affine.h"
#include "cpu/branches.h"
// affine.h before isa.h: the kernels use its types
#include "isa.h"
// affine_sums.h after isa.h: it calls the kernels
#include "cpu/affine_sums.h"

namespace fa {

static std::tuple<Tensor, Tensor, Tensor> behind(const Tensor& x, const Tensor& dy, const Tensor& scale,
                                                 const Tensor& shift, const OptTensor& centre, const OptTensor& aux,
                                                 const OptTensor& gate, const std::string& act_name, double slope,
                                                 bool residual, bool whole) {
  check_map(x);
  check_same(x, dy);
  if (aux) check_same(x, *aux);
  if (gate) check_shape(*gate, {x.size(0), x.size(1)});
  const Act act = act_of(act_name);
  const bool keep = residual && act != Act::identity;
  Tensor dx = whole ? new_like(x) : Tensor(), kept = keep ? new_like(x) : none_like(x);
  const auto maps = maps_of({&x, &dy, aux ? &*aux : nullptr, whole ? &dx : nullptr, keep ? &kept : nullptr});
  Tensor sums = new_dense({gate ? 3 : 2, maps[0].n, maps[0].c}, acc_dtype(x.scalar_type()));
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Filling<A> by(scale, x, 1), to(shift, x, 0), from(centre, x, 0);
    const Dense<A> g(gate);
    Affine<T> in;
    in.x = maps[0], in.dy = maps[1], in.aux = maps[2], in.y = maps[3], in.kept = maps[4];
    in.scale = by.get(), in.shift = to.get(), in.centre = from.get(), in.gate = g.get();
    in.act = act, in.slope = A(slope);
    A* out = static_cast<A*>(sums.data_ptr());
    if (gate)
      affine_sums<T, From::any, Sums::gated>(in, out);
    else if (act == Act::identity)
      affine_sums<T, From::dy, Sums::back>(in, out);
    else if (act == Act::relu && aux)
      affine_sums<T, From::mask, Sums::back>(in, out);
    else
      affine_sums<T, From::any, Sums::back>(in, out);
  });
  return {dx, sums, kept};
}

std::tuple<Tensor, Tensor, Tensor> affine_apply_bwd_cpu(const Tensor& x, const Tensor& dy, const Tensor& scale,
                                                        const Tensor& shift, const OptTensor& centre,
                                                        const OptTensor& aux, const OptTensor& gate,
                                                        const std::string& act, double slope, bool residual) {
  return behind(x, dy, scale, shift, centre, aux, gate, act, slope, residual, true);
}

std::tuple<Tensor, Tensor> moments_affine_reduce_cpu(const Tensor& x, const Tensor& dy, const Tensor& scale,
                                                     const Tensor& shift, const OptTensor& centre, const OptTensor& aux,
                                                     const std::string& act, double slope, bool residual) {
  auto [dx, sums, kept] = behind(x, dy, scale, shift, centre, aux, std::nullopt, act, slope, residual, false);
  return {sums, kept};
}

Tensor branch_affine_reduce_cpu(const Tensor& x, const Tensor& dy, const Tensor& scale, const Tensor& shift,
                                const OptTensor& centre, const OptTensor& x1, const OptTensor& x2, const OptTensor& x3,
                                const OptTensor& x4, const OptTensor& x5, const OptTensor& x6, const OptTensor& x7,
                                const std::string& merge_name, const std::string& act_name, double slope) {
  check_map(x);
  const int64_t count = count_tensors(x, {&x1, &x2, &x3, &x4, &x5, &x6, &x7});
  check_merged(x, dy, count);
  const BranchMerge merge = branch_merge_of(merge_name);
  const Act act = act_of(act_name);
  const auto maps =
      maps_of({&x, pointer(x1), pointer(x2), pointer(x3), pointer(x4), pointer(x5), pointer(x6), pointer(x7), &dy});
  const int64_t n = maps[0].n, c = maps[0].c;
  Tensor sums = new_dense({2, n, count * c}, acc_dtype(x.scalar_type()));
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Slots<A> by(scale, x, merge, count), to(shift, x, merge, count), from(centre, x, merge, count);
    const auto own = scratch<A>(2 * n * c);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t slot = slot_of(merge, b, count);
      Affine<T> in;
      in.x = maps[b], in.dy = channels_of<T>(maps[8], slot * c, c);
      in.scale = by.of(b), in.shift = to.of(b), in.centre = from.of(b);
      in.act = act, in.slope = A(slope);
      if (act == Act::identity)
        affine_sums<T, From::dy, Sums::back>(in, own.get());
      else
        affine_sums<T, From::any, Sums::back>(in, own.get());
      put_slot<A>(own.get(), 2, n, c, slot, count, static_cast<A*>(sums.data_ptr()));
    }
  });
  return sums;
}

}  // namespace fa

FA_REGISTER(branch_affine_reduce)
FA_REGISTER(affine_apply_bwd)
FA_REGISTER(moments_affine_reduce)
