// moments_affine_apply: dx = scale·e + tilt·(x − centre) + level with e = (gate·dy + spread)·act'(v), and more at two
// places of each plane; one read of dy and, where it is needed, of x, one write. branch_affine_apply: that of branches.
#define FA_KERNELS "cpu/affine.kernels.h"
#include "cpu/affine.h"
#include "cpu/branches.h"
// affine.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

// curved: whether the activation is between dy and x; given: whether there is dy
template <class T>
static void pass(const Affine<T>& in, const AtPlaces<Acc<T>>& at, bool curved, bool given) {
  const int64_t runs = in.x.n * (in.x.pixels ? in.x.s : in.x.c), length = in.x.pixels ? in.x.c : in.x.s;
  parallel_for(0, runs, grain(length), [&](int64_t b, int64_t e) {
    const Range r{b, e};
    if (curved)
      FA_CALL(spread_runs, (T, Given::any), in, r, at);
    else if (given)
      FA_CALL(spread_runs, (T, Given::dy), in, r, at);
    else
      FA_CALL(spread_runs, (T, Given::nothing), in, r, at);
  });
}

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
    pass<T>(in, at, curved, dy.has_value());
  });
  return dx;
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Eight branch_affine_apply_cpu(const Tensor& x, const Tensor& dy, const Tensor& scale, const Tensor& shift,
                              const OptTensor& centre, const OptTensor& tilt, const OptTensor& level,
                              const OptTensor& x1, const OptTensor& x2, const OptTensor& x3, const OptTensor& x4,
                              const OptTensor& x5, const OptTensor& x6, const OptTensor& x7,
                              const std::string& merge_name, const std::string& act_name, double slope) {
  check_map(x);
  const int64_t count = count_tensors(x, {&x1, &x2, &x3, &x4, &x5, &x6, &x7});
  check_merged(x, dy, count);
  const BranchMerge merge = branch_merge_of(merge_name);
  const Act act = act_of(act_name);
  std::vector<Tensor> d;
  for (int64_t b = 0; b < kMostBranches; ++b) d.push_back(b < count ? new_like(x) : none_like(x));
  const auto at = [&](int64_t b) { return b < count ? &d[b] : nullptr; };
  const auto maps = maps_of({&x, pointer(x1), pointer(x2), pointer(x3), pointer(x4), pointer(x5), pointer(x6),
                             pointer(x7), &dy, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)});
  const int64_t n = maps[0].n, c = maps[0].c;
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Slots<A> by(scale, x, merge, count), to(shift, x, merge, count), from(centre, x, merge, count),
        tilted(tilt, x, merge, count), flat(level, x, merge, count);
    const auto zeros = scratch<A>(n * c), ones = scratch<A>(n * c);
    std::fill_n(zeros.get(), n * c, A(0));
    std::fill_n(ones.get(), n * c, A(1));
    for (int64_t b = 0; b < count; ++b) {
      Affine<T> in;
      in.x = maps[b], in.dy = channels_of<T>(maps[8], slot_of(merge, b, count) * c, c), in.y = maps[9 + b];
      in.scale = by.of(b), in.shift = to.of(b), in.centre = from.of(b), in.gate = ones.get(), in.spread = zeros.get();
      in.tilt = tilt ? tilted.of(b) : nullptr, in.level = flat.of(b);
      in.act = act, in.slope = A(slope), in.together = count;
      pass<T>(in, {nullptr, nullptr, n * c}, act != Act::identity, true);
    }
  });
  return {d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]};
}

}  // namespace fa

FA_REGISTER(branch_affine_apply)
FA_REGISTER(moments_affine_apply)
