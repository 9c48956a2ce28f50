// moments_affine_apply: dx = scale·e + tilt·(x − centre) + level with e = (gate·dy + spread)·act'(v), and more at two
// places of each plane; one read of dy and, where it is needed, of x, one write.
#define FA_KERNELS "cpu/affine.kernels.h"
#include "cpu/affine.h"
// affine.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

Tensor moments_affine_apply_cpu(const Tensor& x, const OptTensor& dy, const OptTensor& scale, const OptTensor& shift,
                                const OptTensor& centre, const OptTensor& gate, const OptTensor& spread,
                                const OptTensor& tilt, const OptTensor& level, const OptTensor& dvalues,
                                const OptTensor& index, const std::string& act_name, double slope) {
  check_map(x);
  if (dy) check_same(x, *dy);
  const Act act = act_of(act_name);
  STD_TORCH_CHECK(scale || !(dy || spread), "scale is missing");
  STD_TORCH_CHECK(shift || act == Act::identity, "shift is missing");
  Tensor dx = new_like(x);
  const auto maps = maps_of({&x, dy ? &*dy : nullptr, &dx});
  const int64_t n = maps[0].n, c = maps[0].c, nc = n * c;
  const int64_t* places = nullptr;
  if (dvalues) {
    STD_TORCH_CHECK(index && index->scalar_type() == ScalarType::Long && index->is_contiguous(), "index");
    check_shape(*dvalues, {2, n, c});
    check_shape(*index, {2, n, c});
    STD_TORCH_CHECK(maps[0].s <= std::numeric_limits<int32_t>::max(), "plane too large");
    places = static_cast<const int64_t*>(index->data_ptr());
    for (int64_t i = 0; i < 2 * nc; ++i)
      STD_TORCH_CHECK(places[i] >= 0 && places[i] < maps[0].s, "index out of its plane");
  }
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Filling<A> by(scale, x, 0), to(shift, x, 0), from(centre, x, 0), gates(gate, x, 1), more(spread, x, 0),
        flat(level, x, 0);
    std::optional<Filling<A>> tilted;
    if (tilt) tilted.emplace(tilt, x, A(0));
    const Dense<A> values(dvalues);
    Affine<T> in;
    in.x = maps[0], in.dy = maps[1], in.y = maps[2];
    in.scale = by.get(), in.shift = to.get(), in.centre = from.get(), in.gate = gates.get(), in.spread = more.get();
    in.tilt = tilted ? tilted->get() : nullptr, in.level = flat.get();
    in.act = act, in.slope = A(slope);
    const bool curved = act != Act::identity && (dy || spread);
    // Without an activation the gate belongs to the scale, and what is spread to the level.
    const auto together = scratch<A>(curved ? 0 : 2 * nc);
    if (!curved && scale) {
      for (int64_t i = 0; i < nc; ++i) {
        together[i] = in.scale[i] * in.gate[i];
        together[nc + i] = spread ? in.level[i] + in.scale[i] * in.spread[i] : in.level[i];
      }
      in.scale = together.get(), in.level = together.get() + nc;
    }
    // Kernels read whole vectors of places and values, so behind the last there is room for one.
    using I = typename AtPlaces<A>::I;
    constexpr int64_t behind = 64 / sizeof(A);
    const auto where = scratch<I>(places ? 2 * nc + behind : 0);
    const auto value = scratch<A>(places ? 2 * nc + behind : 0);
    for (int64_t i = 0; places && i < 2 * nc + behind; ++i) {
      where[i] = i < 2 * nc ? I(places[i]) : I(-1);
      value[i] = i < 2 * nc ? values.get()[i] : A(0);
    }
    const AtPlaces<A> at{places ? value.get() : nullptr, where.get(), nc};
    const int64_t runs = n * (in.x.pixels ? in.x.s : c), length = in.x.pixels ? c : in.x.s;
    parallel_for(0, runs, grain(length), [&](int64_t b, int64_t e) {
      const Range r{b, e};
      if (curved)
        FA_CALL(spread_runs, (T, Given::any), in, r, at);
      else if (dy)
        FA_CALL(spread_runs, (T, Given::dy), in, r, at);
      else
        FA_CALL(spread_runs, (T, Given::nothing), in, r, at);
    });
  });
  return dx;
}

}  // namespace fa

FA_REGISTER(moments_affine_apply)
