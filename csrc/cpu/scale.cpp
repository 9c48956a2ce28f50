// scale: y = act(x·gate + residual); one read of x and of the residual, one write. scale_bwd: dx = e·gate, dgate = Σ
// e·x, dresidual = e with e = dy·act'(v), in one pass.
#define FA_KERNELS "cpu/scale.kernels.h"
#include "stages.h"
// stages.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

template <class T>
void scale(const Map& x, const Map& residual, const Map& y, Range samples, const Acc<T>* gate, Act act, double slope) {
  const int64_t runs = x.pixels ? x.s : x.c, length = x.pixels ? x.c : x.s;
  const Acc<T> a = Acc<T>(slope);
  parallel_for(samples.begin * runs, samples.end * runs, grain(length), [&](int64_t b, int64_t e) {
    const Range r{b, e};
    if (residual.data) {
      if (act == Act::identity)
        FA_CALL(scale_runs, (T, Epi::identity, true), x, residual, y, r, gate, act, a);
      else if (act == Act::relu)
        FA_CALL(scale_runs, (T, Epi::relu, true), x, residual, y, r, gate, act, a);
      else
        FA_CALL(scale_runs, (T, Epi::other, true), x, residual, y, r, gate, act, a);
    } else {
      if (act == Act::identity)
        FA_CALL(scale_runs, (T, Epi::identity, false), x, residual, y, r, gate, act, a);
      else if (act == Act::relu)
        FA_CALL(scale_runs, (T, Epi::relu, false), x, residual, y, r, gate, act, a);
      else
        FA_CALL(scale_runs, (T, Epi::other, false), x, residual, y, r, gate, act, a);
    }
  });
}
template void scale<float>(const Map&, const Map&, const Map&, Range, const float*, Act, double);
template void scale<double>(const Map&, const Map&, const Map&, Range, const double*, Act, double);
template void scale<BFloat16>(const Map&, const Map&, const Map&, Range, const float*, Act, double);
template void scale<Half>(const Map&, const Map&, const Map&, Range, const float*, Act, double);

Tensor scale_cpu(const Tensor& x, const Tensor& gate, const OptTensor& residual, const std::string& act, double slope) {
  check_map(x);
  check_shape(gate, {x.size(0), x.size(1)});
  if (residual) check_same(x, *residual);
  Tensor y = new_like(x);
  const auto maps = maps_of({&x, &y, residual ? &*residual : nullptr});
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Dense<Acc<T>> g(gate);
    scale<T>(maps[0], maps[2], maps[1], {0, maps[0].n}, g.get(), act_of(act), slope);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> scale_bwd_cpu(const Tensor& x, const Tensor& gate, const OptTensor& aux,
                                                 const Tensor& dy, const std::string& act_name, double slope,
                                                 bool residual) {
  check_map(x);
  check_shape(gate, {x.size(0), x.size(1)});
  check_same(x, dy);
  if (aux) check_same(x, *aux);
  const Act act = act_of(act_name);
  const bool keep = residual && act != Act::identity;
  Tensor dx = new_like(x), kept = keep ? new_like(x) : none_like(x);
  const auto maps = maps_of({&x, &dy, aux ? &*aux : nullptr, &dx, keep ? &kept : nullptr});
  Tensor dgate;
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Dense<A> g(gate);
    Filled<A> sums(gate);
    const Epilogue<T> in{maps[0], maps[1], maps[2], g.get(), act, A(slope)};
    reduce<T>(in, maps[4], maps[3], {0, maps[0].n}, nullptr, sums.get(), nullptr);
    dgate = sums.done();
  });
  return {dx, dgate, kept};
}

}  // namespace fa

FA_REGISTER(scale)
FA_REGISTER(scale_bwd)
