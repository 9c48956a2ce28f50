// scale: y = act(x·gate + residual); one read of x and of the residual, one write. scale_bwd: dx = e·gate, dgate = Σ
// e·x, dresidual = e with e = dy·act'(v), in one pass. With a gate per pixel both are dual.cpp's.
#define FA_KERNELS "cpu/scale.kernels.h"
#include "dual.h"
// dual.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

template <class T>
void scale(const Map& x, const Map& residual, const Map& y, Range samples, const Acc<T>* gate, Act act, double slope) {
  const int64_t runs = x.pixels ? x.s : x.c, length = x.pixels ? x.c : x.s;
  const Acc<T> a = Acc<T>(slope);
  parallel_for(samples.begin * runs, samples.end * runs, grain(length),
               [&](int64_t b, int64_t e) { FA_CALL(scale_runs, (T), x, residual, y, Range{b, e}, gate, act, a); });
}
template void scale<float>(const Map&, const Map&, const Map&, Range, const float*, Act, double);
template void scale<double>(const Map&, const Map&, const Map&, Range, const double*, Act, double);
template void scale<BFloat16>(const Map&, const Map&, const Map&, Range, const float*, Act, double);
template void scale<Half>(const Map&, const Map&, const Map&, Range, const float*, Act, double);

// Whether these gates are one per channel, which `scale` and `reduce` take without another array.
static bool channels_alone(const OptTensor& pixel, Merge merge) {
  return !pixel && (merge == Merge::product || merge == Merge::sum);
}

static void check_gates(const Tensor& x, const OptTensor& gate, const OptTensor& pixel) {
  STD_TORCH_CHECK(gate || pixel, "a gate is missing");
  if (gate) check_shape(*gate, {x.size(0), x.size(1)});
  if (!pixel) return;
  STD_TORCH_CHECK(pixel->is_cpu() && pixel->dim() == x.dim() - 1 && pixel->size(0) == x.size(0), "pixel");
  for (int64_t d = 2; d < x.dim(); ++d) STD_TORCH_CHECK(pixel->size(d - 1) == x.size(d), "pixel");
}

Tensor scale_cpu(const Tensor& x, const OptTensor& gate, const OptTensor& residual, const OptTensor& pixel,
                 const std::string& act, double slope, const std::string& merge_name) {
  check_map(x);
  check_gates(x, gate, pixel);
  if (residual) check_same(x, *residual);
  const Merge merge = merge_of(merge_name);
  Tensor y = new_like(x);
  const auto maps = maps_of({&x, &y, residual ? &*residual : nullptr});
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!channels_alone(pixel, merge)) {
      const Gates<Acc<T>> gates(gate, pixel, maps[0], merge);
      return scale_both<T>(maps[0], maps[2], maps[1], gates, merge, act_of(act), slope);
    }
    const Dense<Acc<T>> g(gate);
    scale<T>(maps[0], maps[2], maps[1], {0, maps[0].n}, g.get(), act_of(act), slope);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scale_bwd_cpu(const Tensor& x, const OptTensor& gate, const OptTensor& aux,
                                                         const OptTensor& pixel, const Tensor& dy,
                                                         const std::string& act_name, double slope,
                                                         const std::string& merge_name, bool residual) {
  check_map(x);
  check_gates(x, gate, pixel);
  check_same(x, dy);
  if (aux) check_same(x, *aux);
  const Act act = act_of(act_name);
  const Merge merge = merge_of(merge_name);
  const bool keep = residual && act != Act::identity;
  Tensor dx = new_like(x), kept = keep ? new_like(x) : none_like(x);
  const auto maps = maps_of({&x, &dy, aux ? &*aux : nullptr, &dx, keep ? &kept : nullptr});
  Tensor dgate = gate ? Tensor() : none_like(x), dpixel = pixel ? Tensor() : none_like(x);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    if (channels_alone(pixel, merge)) {
      const Dense<A> g(gate);
      Filled<A> sums(*gate);
      const Epilogue<T> in{maps[0], maps[1], maps[2], g.get(), act, A(slope)};
      reduce<T>(in, maps[4], maps[3], {0, maps[0].n}, nullptr, sums.get(), nullptr);
      dgate = sums.done();
      return;
    }
    const Gates<A> gates(gate, pixel, maps[0], merge);
    Dual<T> d;
    d.x = maps[0], d.dy = maps[1], d.aux = maps[2], d.dx = maps[3], d.kept = maps[4];
    d.gate = gates.gate, d.pixel = gates.pixel, d.merge = merge, d.act = act, d.slope = A(slope);
    std::optional<Filled<A>> by_channel, by_pixel;
    if (gate) by_channel.emplace(*gate), d.dgate = by_channel->get();
    if (pixel) by_pixel.emplace(*pixel), d.dpixel = by_pixel->get();
    dual_sums<T>(d);
    if (gate) dgate = by_channel->done();
    if (pixel) dpixel = by_pixel->done();
  });
  return {dx, dgate, kept, dpixel};
}

}  // namespace fa

FA_REGISTER(scale)
FA_REGISTER(scale_bwd)
