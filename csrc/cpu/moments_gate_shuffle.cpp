// gate_shuffle: y = act(shuffle(u·s) + residual), u = scale·(x − mean) + shift, s = sigmoid(steep·(x − mean) + offset);
// gate_shuffle_reduce: the sums of its gradient, and e; gate_shuffle_apply: dx. One pass each.
#define FA_KERNELS "cpu/moments_gate_shuffle.kernels.h"
#include "cpu/moments_gate_shuffle.h"
// moments_gate_shuffle.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {
namespace {

// The values as dense arrays; steep is 0 in first halves, tilt and level where they aren't given.
template <class T>
class Held {
 public:
  using A = Acc<T>;
  Held(const Tensor& mean, const Tensor& values, const OptTensor& tilt, const OptTensor& level, int64_t k,
       const std::string& act, double slope, const std::vector<Map>& maps)
      : mean_(mean), values_(values), tilt_(tilt), level_(level) {
    const Map& x = maps[0];
    const int64_t nc = x.n * x.c;
    steep_ = scratch<A>(2 * nc);
    const A* const given = values_.get();
    for (int64_t r = 0; r < nc; ++r) {
      steep_[r] = r % x.c % (2 * k) >= k ? given[2 * nc + r] : A(0);
      steep_[nc + r] = 0;
    }
    const A* const none = steep_.get() + nc;
    in.x = x, in.dy = maps[1], in.aux = maps[2], in.y = maps[3];
    in.mean = mean_.get(), in.scale = given, in.shift = given + nc, in.steep = steep_.get();
    in.offset = given + 3 * nc, in.tilt = tilt_ ? tilt_.get() : none, in.level = level_ ? level_.get() : none;
    in.k = k, in.act = act_of(act), in.slope = A(slope);
  }
  SelfGate<T> in;

 private:
  Dense<A> mean_, values_, tilt_, level_;
  std::unique_ptr<A[]> steep_;
};

void check_values(const Tensor& x, const Tensor& mean, const Tensor& values, int64_t k) {
  check_map(x);
  check_shape(mean, {x.size(0), x.size(1)});
  check_shape(values, {4, x.size(0), x.size(1)});
  STD_TORCH_CHECK(k > 0 && x.size(1) % (2 * k) == 0, "k");
}

}  // namespace

// planes(rows), or pixels(n, pixels, room) with room for `rooms` numbers a channel.
template <class T, class P, class Q>
static void over(const Map& x, int64_t rooms, const P& planes, const Q& pixels) {
  if (!x.pixels) {
    parallel_for(0, x.n * x.c, grain(x.s), [&](int64_t b, int64_t e) { planes(Range{b, e}); });
    return;
  }
  const int64_t run = pixels_per_run(x.c), runs = (x.s + run - 1) / run;
  parallel_for(0, x.n * runs, 1, [&](int64_t b, int64_t e) {
    const auto room = scratch<Acc<T>>(rooms * x.c);
    for (int64_t i = b; i < e; ++i) {
      const int64_t s = i % runs * run;
      pixels(i / runs, Range{s, std::min(s + run, x.s)}, room.get());
    }
  });
}

Tensor gate_shuffle_cpu(const Tensor& x, const Tensor& mean, const Tensor& values, const OptTensor& residual, int64_t k,
                        const std::string& act, double slope) {
  check_values(x, mean, values, k);
  if (residual) check_same(x, *residual);
  Tensor y = new_like(x);
  const auto maps = maps_of({&x, nullptr, residual ? &*residual : nullptr, &y});
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Held<T> held(mean, values, std::nullopt, std::nullopt, k, act, slope, maps);
    over<T>(
        maps[0], 1, [&](Range rows) { FA_CALL(self_gate_planes, (T), held.in, rows); },
        [&](int64_t n, Range s, Acc<T>* room) { FA_CALL(self_gate_pixels, (T), held.in, n, s, room); });
  });
  return y;
}

std::tuple<Tensor, Tensor> gate_shuffle_reduce_cpu(const Tensor& x, const Tensor& dy, const Tensor& mean,
                                                   const Tensor& values, const OptTensor& aux, int64_t k,
                                                   const std::string& act, double slope, bool residual) {
  check_values(x, mean, values, k);
  check_same(x, dy);
  if (aux) check_same(x, *aux);
  const bool keep = residual && act_of(act) != Act::identity;
  Tensor kept = keep ? new_like(x) : none_like(x);
  const auto maps = maps_of({&x, &dy, aux ? &*aux : nullptr, keep ? &kept : nullptr});
  const int64_t n = maps[0].n, c = maps[0].c;
  Tensor sums = new_dense({4, n, c}, acc_dtype(x.scalar_type()));
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Held<T> held(mean, values, std::nullopt, std::nullopt, k, act, slope, maps);
    A* const out = static_cast<A*>(sums.data_ptr());
    const Map& m = maps[0];
    const int64_t run = pixels_per_run(c), runs = (m.s + run - 1) / run;
    const auto parts = scratch<A>(m.pixels ? 4 * n * runs * c : 0);  // of a sample: run by run, sum by sum
    over<T>(
        m, 2, [&](Range rows) { FA_CALL(self_sum_planes, (T), held.in, rows, out); },
        [&](int64_t i, Range s, A* room) {
          FA_CALL(self_sum_pixels, (T), held.in, i, s, room, parts.get() + (i * runs + s.begin / run) * 4 * c);
        });
    if (!m.pixels) return;
    const auto whole = scratch<A>(4 * c);
    for (int64_t i = 0; i < n; ++i) {
      add_runs(parts.get() + i * runs * 4 * c, runs, 4 * c, whole.get());
      for (int64_t j = 0; j < 4; ++j)
        for (int64_t d = 0; d < c; ++d)
          out[(j * n + i) * c + d] = j == 2 && !held.in.second(d) ? A(0) : whole[j * c + d];
    }
  });
  return {sums, kept};
}

Tensor gate_shuffle_apply_cpu(const Tensor& x, const Tensor& dy, const Tensor& mean, const Tensor& values,
                              const Tensor& tilt, const Tensor& level, int64_t k, const std::string& act,
                              double slope) {
  check_values(x, mean, values, k);
  check_same(x, dy);
  check_shape(tilt, {x.size(0), x.size(1)});
  check_shape(level, {x.size(0), x.size(1)});
  Tensor dx = new_like(x);
  const auto maps = maps_of({&x, &dy, nullptr, &dx});
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Held<T> held(mean, values, tilt, level, k, act, slope, maps);
    over<T>(
        maps[0], 1, [&](Range rows) { FA_CALL(self_back_planes, (T), held.in, rows); },
        [&](int64_t n, Range s, Acc<T>* room) { FA_CALL(self_back_pixels, (T), held.in, n, s, room); });
  });
  return dx;
}

}  // namespace fa

FA_REGISTER(gate_shuffle)
FA_REGISTER(gate_shuffle_reduce)
FA_REGISTER(gate_shuffle_apply)
