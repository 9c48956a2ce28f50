// soft_threshold: y = sign(x)·max(|x| − τ, 0) + residual; one read of x and of the residual, one write.
// soft_threshold_bwd: dx = e·sign(x), dτ = −Σ e with e = dy·sign(x)·[|x| > τ], in one pass; pool_soft_threshold_reduce
// is its sum alone, pool_soft_threshold_apply its dx with the gradient of the pooled descriptor added.
#define FA_KERNELS "cpu/soft_threshold.kernels.h"
#include "stages.h"
// stages.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

// Thresholds as an array (N, C), whether they are one per channel or one per sample.
template <class A>
struct Thresholds {
  Thresholds(const Tensor& tau, int64_t n, int64_t c) : given(tau), shared(c > 1 && tau.numel() == n) {
    if (!shared) return;
    spread = scratch<A>(n * c);
    for (int64_t i = 0; i < n * c; ++i) spread[i] = given.get()[i / c];
  }
  const A* get() const { return shared ? spread.get() : given.get(); }

  Dense<A> given;
  bool shared;
  std::unique_ptr<A[]> spread;
};

static void check_threshold(const Tensor& tau, const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1);
  if (tau.dim() == 1)
    check_shape(tau, {n});
  else
    check_shape(tau, {n, tau.dim() == 2 && tau.size(1) == 1 ? 1 : c});
}

// dτ (N, C); and dx, where it has data.
template <class T>
static void back(const Map& x, const Map& dy, const Map& dx, const Acc<T>* tau, Acc<T>* dtau) {
  using A = Acc<T>;
  const bool wanted = dx.data != nullptr;
  if (!x.pixels) {
    parallel_for(0, x.n * x.c, grain(x.s), [&](int64_t b, int64_t e) {
      if (wanted)
        FA_CALL(passed_planes, (T, true), x, dy, dx, Range{b, e}, tau, dtau);
      else
        FA_CALL(passed_planes, (T, false), x, dy, dx, Range{b, e}, tau, dtau);
    });
    return;
  }
  const int64_t run = pixels_per_run(x.c), runs = (x.s + run - 1) / run;
  const auto sums = scratch<A>(x.n * runs * x.c);
  parallel_for(0, x.n * runs, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t n = i / runs, s = i % runs * run;
      const Range range{s, std::min(s + run, x.s)};
      if (wanted)
        FA_CALL(passed_pixels, (T, true), x, dy, dx, n, range, tau, sums.get() + i * x.c);
      else
        FA_CALL(passed_pixels, (T, false), x, dy, dx, n, range, tau, sums.get() + i * x.c);
    }
  });
  for (int64_t n = 0; n < x.n; ++n) add_runs(sums.get() + n * runs * x.c, runs, x.c, dtau + n * x.c);
}

Tensor soft_threshold_cpu(const Tensor& x, const Tensor& tau, const OptTensor& residual) {
  check_map(x);
  check_threshold(tau, x);
  if (residual) check_same(x, *residual);
  Tensor y = new_like(x);
  const auto maps = maps_of({&x, &y, residual ? &*residual : nullptr});
  const Map& m = maps[0];
  const int64_t runs = m.pixels ? m.s : m.c, length = m.pixels ? m.c : m.s;
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Thresholds<Acc<T>> t(tau, m.n, m.c);
    parallel_for(0, m.n * runs, grain(length), [&](int64_t b, int64_t e) {
      if (residual)
        FA_CALL(threshold_runs, (T, true), m, maps[2], maps[1], Range{b, e}, t.get());
      else
        FA_CALL(threshold_runs, (T, false), m, maps[2], maps[1], Range{b, e}, t.get());
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> soft_threshold_bwd_cpu(const Tensor& x, const Tensor& tau, const Tensor& dy) {
  check_map(x);
  check_threshold(tau, x);
  check_same(x, dy);
  Tensor dx = new_like(x), dtau;
  const auto maps = maps_of({&x, &dy, &dx});
  const Map& m = maps[0];
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Thresholds<A> t(tau, m.n, m.c);
    Filled<A> out(tau);
    const auto sums = scratch<A>(t.shared ? m.n * m.c : 0);
    back<T>(m, maps[1], maps[2], t.get(), t.shared ? sums.get() : out.get());
    if (t.shared)
      for (int64_t n = 0; n < m.n; ++n) {
        double total = 0;
        for (int64_t c = 0; c < m.c; ++c) total += sums[n * m.c + c];
        out.get()[n] = A(total);
      }
    dtau = out.done();
  });
  return {dx, dtau};
}

Tensor pool_soft_threshold_reduce_cpu(const Tensor& x, const Tensor& tau, const Tensor& dy) {
  check_map(x);
  check_shape(tau, {x.size(0), x.size(1)});
  check_same(x, dy);
  const auto maps = maps_of({&x, &dy});
  const Map& m = maps[0];
  Tensor dtau = new_dense({m.n, m.c}, acc_dtype(x.scalar_type()));
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Dense<Acc<T>> t(tau);
    back<T>(m, maps[1], {}, t.get(), static_cast<Acc<T>*>(dtau.data_ptr()));
  });
  return dtau;
}

Tensor pool_soft_threshold_apply_cpu(const Tensor& x, const Tensor& tau, const Tensor& dy, const Tensor& dpooled,
                                     const std::string& pool) {
  check_map(x);
  check_shape(tau, {x.size(0), x.size(1)});
  check_shape(dpooled, {x.size(0), x.size(1)});
  check_same(x, dy);
  const Pool kind = pool_of(pool);
  STD_TORCH_CHECK(!has_max(kind), "pool");
  Tensor dx = new_like(x);
  const auto maps = maps_of({&x, &dy, &dx});
  const Map& m = maps[0];
  const int64_t runs = m.pixels ? m.s : m.c, length = m.pixels ? m.c : m.s;
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Dense<A> t(tau), dp(dpooled);
    const auto add = scratch<A>(m.n * m.c);
    for (int64_t i = 0; i < m.n * m.c; ++i) add[i] = dp.get()[i] / A(m.s);
    parallel_for(0, m.n * runs, grain(length), [&](int64_t b, int64_t e) {
      if (kind == Pool::mean_abs)
        FA_CALL(shrink_back_runs, (T, true), m, maps[1], maps[2], Range{b, e}, t.get(), add.get());
      else
        FA_CALL(shrink_back_runs, (T, false), m, maps[1], maps[2], Range{b, e}, t.get(), add.get());
    });
  });
  return dx;
}

}  // namespace fa

FA_REGISTER(soft_threshold)
FA_REGISTER(soft_threshold_bwd)
FA_REGISTER(pool_soft_threshold_reduce)
FA_REGISTER(pool_soft_threshold_apply)
