// plane_gate_shuffle: v = x·sigmoid of the plane's statistics, y = act(shuffle(v) + residual); and its gradient.
//
// Planes are taken one by one, statistics and gate, so that the second read of a plane comes from the first cache. Of
// pixels, whole samples are.
#define FA_KERNELS "cpu/plane_gate_shuffle.kernels.h"
#include "stages.h"
// stages.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {
namespace {

// The parameters as dense arrays.
template <class A>
struct Parameters {
  Dense<A> arrays[6];
  int64_t k;
  A eps;

  Parameters(const Tensor& cweight, const Tensor& cbias, const Tensor& sweight, const Tensor& sbias,
             const OptTensor& norm_weight, const OptTensor& norm_bias, double eps, int64_t c)
      : arrays{Dense<A>(cweight), Dense<A>(cbias),       Dense<A>(sweight),
               Dense<A>(sbias),   Dense<A>(norm_weight), Dense<A>(norm_bias)},
        k(cweight.numel()),
        eps(A(eps)) {
    STD_TORCH_CHECK(k > 0 && c % (2 * k) == 0, "cweight");
    for (const Tensor* t : {&cbias, &sweight, &sbias}) STD_TORCH_CHECK(t->numel() == k, "parameters");
    for (const OptTensor* t : {&norm_weight, &norm_bias}) STD_TORCH_CHECK(!*t || (*t)->numel() == k, "parameters");
  }
  bool second(int64_t c) const { return c % (2 * k) >= k; }
  // Slope and offset of every channel's logit in one sample, for pixels.
  void logits(int64_t c, const A* mean, const A* rstd, A* slope, A* offset) const {
    for (int64_t j = 0; j < c; ++j) {
      const int64_t i = j % k;
      const bool is_second = second(j);
      slope[j] = is_second ? arrays[2].get()[i] * (arrays[4] ? arrays[4].get()[i] : A(1)) * rstd[j] : A(0);
      offset[j] = is_second ? arrays[2].get()[i] * (arrays[5] ? arrays[5].get()[i] : A(0)) + arrays[3].get()[i]
                            : arrays[0].get()[i] * mean[j] + arrays[1].get()[i];
    }
  }
};

}  // namespace

// The kernels' view of them.
#define FA_VIEW(parameters)    \
  {parameters.arrays[0].get(), \
   parameters.arrays[1].get(), \
   parameters.arrays[2].get(), \
   parameters.arrays[3].get(), \
   parameters.arrays[4].get(), \
   parameters.arrays[5].get(), \
   parameters.k,               \
   parameters.eps}

template <class T>
static void gate(const Map& x, const Map& residual, const Map& y, const Parameters<Acc<T>>& w, Acc<T>* stats, Act act,
                 Acc<T> slope) {
  using A = Acc<T>;
  const int64_t c = x.c;
  A *const mean = stats, *const rstd = stats + x.n * c;
  if (!x.pixels) {
    parallel_for(0, x.n * c, grain(x.s), [&](int64_t b, int64_t e) {
      FA_CALL(gate_planes, (T), x, residual, y, (Range{b, e}), FA_VIEW(w), mean, rstd, act, slope);
    });
    return;
  }
  const auto logits = scratch<A>(2 * x.n * c);
  const int64_t run = pixels_per_run(c), runs = (x.s + run - 1) / run;
  for (int64_t n = 0; n < x.n; ++n) {
    const int64_t at = n * c;
    moments<T>(x, {n, n + 1}, mean, rstd);
    for (int64_t j = at; j < at + c; ++j) rstd[j] = w.second(j - at) ? 1 / std::sqrt(rstd[j] + w.eps) : A(0);
    A *const slopes = logits.get() + at, *const offsets = slopes + x.n * c;
    w.logits(c, mean + at, rstd + at, slopes, offsets);
    parallel_for(0, runs, 1, [&](int64_t b, int64_t e) {
      const auto room = scratch<A>(c);
      FA_CALL(gate_pixels, (T), x, residual, y, n, (Range{b * run, std::min(e * run, x.s)}),
              {mean + at, slopes, offsets}, room.get(), act, slope);
    });
  }
}

static std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& cweight, const Tensor& cbias,
                                          const Tensor& sweight, const Tensor& sbias, const OptTensor& norm_weight,
                                          const OptTensor& norm_bias, const OptTensor& residual, double eps,
                                          const std::string& act, double slope) {
  check_map(x);
  if (residual) check_same(x, *residual);
  Tensor y = new_like(x);
  const auto maps = maps_of({&x, &y, residual ? &*residual : nullptr});
  Tensor stats = new_dense({2, maps[0].n, maps[0].c}, acc_dtype(x.scalar_type()));
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Parameters<A> w(cweight, cbias, sweight, sbias, norm_weight, norm_bias, eps, maps[0].c);
    gate<T>(maps[0], maps[2], maps[1], w, static_cast<A*>(stats.data_ptr()), act_of(act), A(slope));
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor> plane_gate_shuffle_cpu(const Tensor& x, const Tensor& cweight, const Tensor& cbias,
                                                  const Tensor& sweight, const Tensor& sbias,
                                                  const OptTensor& norm_weight, const OptTensor& norm_bias,
                                                  const OptTensor& residual, double eps, const std::string& act,
                                                  double slope) {
  return forward(x, cweight, cbias, sweight, sbias, norm_weight, norm_bias, residual, eps, act, slope);
}

Tensor plane_gate_shuffle_infer_cpu(const Tensor& x, const Tensor& cweight, const Tensor& cbias, const Tensor& sweight,
                                    const Tensor& sbias, const OptTensor& norm_weight, const OptTensor& norm_bias,
                                    const OptTensor& residual, double eps, const std::string& act, double slope) {
  return std::get<0>(forward(x, cweight, cbias, sweight, sbias, norm_weight, norm_bias, residual, eps, act, slope));
}

template <class T>
static void back(const Epilogue<T>& in, const Map& kept, const Map& dx, const Parameters<Acc<T>>& w,
                 const Acc<T>* stats, Acc<T>* q0, Acc<T>* q1) {
  using A = Acc<T>;
  const Map& x = in.x;
  const int64_t c = x.c;
  const A *const mean = stats, *const rstd = stats + x.n * c;
  if (!x.pixels) {
    parallel_for(0, x.n * c, grain(2 * x.s), [&](int64_t b, int64_t e) {
      FA_CALL(back_planes, (T), in, kept, dx, (Range{b, e}), FA_VIEW(w), mean, rstd, q0, q1);
    });
    return;
  }
  Epilogue<T> again = in;
  if (kept.data) again.dy = kept, again.act = Act::identity;
  const int64_t run = pixels_per_run(c), runs = (x.s + run - 1) / run;
  const auto parts = scratch<A>(2 * runs * c), rows = scratch<A>(4 * c);
  A *const slopes = rows.get(), *const offsets = slopes + c, *const add = offsets + c, *const along = add + c;
  for (int64_t n = 0; n < x.n; ++n) {
    const int64_t at = n * c;
    w.logits(c, mean + at, rstd + at, slopes, offsets);
    parallel_for(0, runs, 1, [&](int64_t b, int64_t e) {
      const auto room = scratch<A>(2 * c);
      for (int64_t i = b; i < e; ++i)
        FA_CALL(sum_pixels, (T), in, kept, n, (Range{i * run, std::min((i + 1) * run, x.s)}),
                {mean + at, slopes, offsets}, rstd + at, room.get(), parts.get() + i * c, parts.get() + (runs + i) * c);
    });
    add_runs(parts.get(), runs, c, q0 + at);
    add_runs(parts.get() + runs * c, runs, c, q1 + at);
    for (int64_t j = 0; j < c; ++j) {
      const bool second = w.second(j);
      add[j] = (second ? -slopes[j] : w.arrays[0].get()[j % w.k]) * q0[at + j] / A(x.s);
      along[j] = q1[at + j] / A(x.s) * rstd[at + j];
    }
    parallel_for(0, runs, 1, [&](int64_t b, int64_t e) {
      const auto room = scratch<A>(c);
      FA_CALL(back_pixels, (T), again, dx, n, (Range{b * run, std::min(e * run, x.s)}), {mean + at, slopes, offsets},
              add, along, room.get());
    });
  }
}

template <class A>
static Tensor filled(const Tensor& like, const std::vector<double>& values) {
  Filled<A> out(like);
  for (size_t i = 0; i < values.size(); ++i) out.get()[i] = A(values[i]);
  return out.done();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> plane_gate_shuffle_bwd_cpu(
    const Tensor& x, const Tensor& dy, const OptTensor& aux, const Tensor& stats, const Tensor& cweight,
    const Tensor& cbias, const Tensor& sweight, const Tensor& sbias, const OptTensor& norm_weight,
    const OptTensor& norm_bias, const std::string& act_name, double slope, bool residual) {
  check_map(x);
  check_same(x, dy);
  if (aux) check_same(x, *aux);
  const Act act = act_of(act_name);
  const bool keep = residual && act != Act::identity;
  Tensor dx = new_like(x), kept = keep ? new_like(x) : none_like(x);
  const auto maps = maps_of({&x, &dy, aux ? &*aux : nullptr, &dx, keep ? &kept : nullptr});
  const Map& m = maps[0];
  check_shape(stats, {2, m.n, m.c});
  Tensor found[6];
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Parameters<A> w(cweight, cbias, sweight, sbias, norm_weight, norm_bias, 0, m.c);
    const Dense<A> s(stats);
    const int64_t nc = m.n * m.c, k = w.k;
    const auto sums = scratch<A>(2 * nc);
    A *const q0 = sums.get(), *const q1 = q0 + nc;
    const Epilogue<T> in{m, maps[1], maps[2], nullptr, act, A(slope)};
    back<T>(in, maps[4], maps[3], w, s.get(), q0, q1);
    std::vector<double> d[6];
    for (auto& v : d) v.assign(k, 0.0);
    for (int64_t r = 0; r < nc; ++r) {
      const int64_t c = r % m.c, i = c % k;
      if (w.second(c)) {
        const double nw = w.arrays[4] ? w.arrays[4].get()[i] : 1, nb = w.arrays[5] ? w.arrays[5].get()[i] : 0;
        d[2][i] += nw * q1[r] + nb * q0[r];
        d[3][i] += q0[r];
        d[4][i] += double(w.arrays[2].get()[i]) * q1[r];
        d[5][i] += double(w.arrays[2].get()[i]) * q0[r];
      } else {
        d[0][i] += double(q0[r]) * s.get()[r];
        d[1][i] += q0[r];
      }
    }
    const Tensor* const given[] = {
        &cweight, &cbias, &sweight, &sbias, norm_weight ? &*norm_weight : nullptr, norm_bias ? &*norm_bias : nullptr};
    for (int j = 0; j < 6; ++j) found[j] = given[j] ? filled<A>(*given[j], d[j]) : none_like(x);
  });
  return {dx, kept, found[0], found[1], found[2], found[3], found[4], found[5]};
}

}  // namespace fa

FA_REGISTER(plane_gate_shuffle)
FA_REGISTER_INFER(plane_gate_shuffle)
FA_REGISTER(plane_gate_shuffle_bwd)
