// group_similarity_scale: t = Σ x·mean x over a group's channels, y = act(x·sigmoid(normalised t) + residual); and its
// gradient.
//
// Planes are taken group by group, so that all reads but the first come from a cache, where the group's map lies too.
// Of pixels, whole samples are.
#define FA_KERNELS "cpu/group_similarity_scale.kernels.h"
#include "stages.h"
// stages.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {
namespace {

template <class A>
struct Parameters {
  Dense<A> weight, bias;
  int64_t groups;
  A eps;

  Parameters(const Tensor& weight, const Tensor& bias, double eps, int64_t c)
      : weight(weight), bias(bias), groups(weight.numel()), eps(A(eps)) {
    STD_TORCH_CHECK(groups > 0 && c % groups == 0 && bias.numel() == groups, "parameters");
  }
};

}  // namespace

// The kernels' view of the parameters, and of p, mean and std one after the other.
#define FA_GROUPS(w, state, x) \
  {w.weight.get(), w.bias.get(), w.groups, w.eps, state, state + x.n * x.c, state + x.n * x.c + x.n * w.groups}

template <class T>
static void gate(const Map& x, const Map& residual, const Map& y, const Parameters<Acc<T>>& w, Acc<T>* state, Act act,
                 Acc<T> slope) {
  using A = Acc<T>;
  const int64_t c = x.c, g = w.groups;
  if (!x.pixels) {
    parallel_for(0, x.n * g, grain(c / g * x.s), [&](int64_t b, int64_t e) {
      const auto room = scratch<A>(2 * x.s);
      FA_CALL(group_planes, (T), x, residual, y, (Range{b, e}), FA_GROUPS(w, state, x), room.get(), act, slope);
    });
    return;
  }
  const auto t = scratch<A>(x.s * g);
  const int64_t run = pixels_per_run(c), runs = (x.s + run - 1) / run;
  A *const mean = state + x.n * c, *const std = mean + x.n * g;
  for (int64_t n = 0; n < x.n; ++n) {
    pool<T>(x, {n, n + 1}, Pool::mean, state, nullptr, nullptr);
    parallel_for(0, runs, 1, [&](int64_t b, int64_t e) {
      const auto room = scratch<A>(c);
      FA_CALL(similar_pixels, (T), x, n, (Range{b * run, std::min(e * run, x.s)}), state + n * c, g, room.get(),
              t.get());
    });
    for (int64_t j = 0; j < g; ++j) FA_CALL(deviation, (A), t.get() + j, x.s, g, mean + n * g + j, std + n * g + j);
    parallel_for(0, runs, 1, [&](int64_t b, int64_t e) {
      const auto room = scratch<A>(c + g);
      FA_CALL(group_pixels, (T), x, residual, y, n, (Range{b * run, std::min(e * run, x.s)}), FA_GROUPS(w, state, x),
              t.get(), room.get(), act, slope);
    });
  }
}

static std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                          const OptTensor& residual, double eps, const std::string& act, double slope) {
  check_map(x);
  if (residual) check_same(x, *residual);
  Tensor y = new_like(x);
  const auto maps = maps_of({&x, &y, residual ? &*residual : nullptr});
  Tensor state = new_dense({maps[0].n * (maps[0].c + 2 * weight.numel())}, acc_dtype(x.scalar_type()));
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Parameters<A> w(weight, bias, eps, maps[0].c);
    gate<T>(maps[0], maps[2], maps[1], w, static_cast<A*>(state.data_ptr()), act_of(act), A(slope));
  });
  return {y, state};
}

std::tuple<Tensor, Tensor> group_similarity_scale_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                      const OptTensor& residual, double eps, const std::string& act,
                                                      double slope) {
  return forward(x, weight, bias, residual, eps, act, slope);
}

Tensor group_similarity_scale_infer_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                        const OptTensor& residual, double eps, const std::string& act, double slope) {
  return std::get<0>(forward(x, weight, bias, residual, eps, act, slope));
}

// Whether e depends on the gate, so that t must be there before e is.
template <class T>
static bool needs_gate(const Epilogue<T>& in) {
  return in.act != Act::identity && !(in.aux.data && from_output(in.act));
}

template <class T>
static void back(const Epilogue<T>& in, const Map& kept, const Map& dx, const Parameters<Acc<T>>& w, Acc<T>* state,
                 Acc<T>* dweight, Acc<T>* dbias) {
  using A = Acc<T>;
  const Map& x = in.x;
  const int64_t c = x.c, g = w.groups;
  const bool twice = needs_gate(in);
  if (!x.pixels) {
    parallel_for(0, x.n * g, grain(2 * c / g * x.s), [&](int64_t b, int64_t e) {
      const auto room = scratch<A>(3 * x.s);
      FA_CALL(group_back_planes, (T), in, kept, dx, (Range{b, e}), FA_GROUPS(w, state, x), twice, room.get(), dweight,
              dbias);
    });
    return;
  }
  Epilogue<T> again = in;
  if (kept.data) again.dy = kept, again.act = Act::identity;
  const int64_t run = pixels_per_run(c), runs = (x.s + run - 1) / run;
  const auto maps = scratch<A>(3 * x.s * g), parts = scratch<A>(runs * c), add = scratch<A>(c);
  const auto sums = scratch<double>(4 * g);
  A *const t = maps.get(), *const gate = t + x.s * g, *const h = gate + x.s * g;
  for (int64_t n = 0; n < x.n; ++n) {
    parallel_for(0, runs, 1, [&](int64_t b, int64_t e) {
      const auto room = scratch<A>(2 * c);
      const Range s{b * run, std::min(e * run, x.s)};
      if (twice) FA_CALL(similar_pixels, (T), x, n, s, state + n * c, g, room.get(), t);
      FA_CALL(towards_pixels, (T), in, kept, n, s, FA_GROUPS(w, state, x), t, gate, h, room.get(), twice);
    });
    FA_CALL(between_pixels, (A), n, x.s, FA_GROUPS(w, state, x), t, h, sums.get(), dweight, dbias);
    parallel_for(0, runs, 1, [&](int64_t b, int64_t e) {
      const auto room = scratch<A>(c);
      for (int64_t i = b; i < e; ++i)
        FA_CALL(inner_pixels, (T), x, n, (Range{i * run, std::min((i + 1) * run, x.s)}), g, h, room.get(),
                parts.get() + i * c);
    });
    add_runs(parts.get(), runs, c, add.get());
    for (int64_t j = 0; j < c; ++j) add[j] /= A(x.s);
    parallel_for(0, runs, 1, [&](int64_t b, int64_t e) {
      const auto room = scratch<A>(2 * c);
      FA_CALL(group_back_pixels, (T), again, dx, n, (Range{b * run, std::min(e * run, x.s)}), FA_GROUPS(w, state, x),
              gate, h, add.get(), room.get());
    });
  }
}

// The sum over the batch of (N, G), in double, in the shape and dtype of the parameter.
template <class A>
static Tensor filled(const Tensor& like, const A* values, int64_t n) {
  Filled<A> out(like);
  const int64_t g = like.numel();
  for (int64_t j = 0; j < g; ++j) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += values[i * g + j];
    out.get()[j] = A(total);
  }
  return out.done();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_similarity_scale_bwd_cpu(const Tensor& x, const Tensor& dy,
                                                                          const OptTensor& aux, const Tensor& state,
                                                                          const Tensor& weight, const Tensor& bias,
                                                                          double eps, const std::string& act_name,
                                                                          double slope, bool residual) {
  check_map(x);
  check_same(x, dy);
  if (aux) check_same(x, *aux);
  const Act act = act_of(act_name);
  const bool keep = residual && act != Act::identity;
  Tensor dx = new_like(x), kept = keep ? new_like(x) : none_like(x);
  const auto maps = maps_of({&x, &dy, aux ? &*aux : nullptr, &dx, keep ? &kept : nullptr});
  const Map& m = maps[0];
  check_shape(state, {m.n * (m.c + 2 * weight.numel())});
  Tensor dweight, dbias;
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Parameters<A> w(weight, bias, eps, m.c);
    const Dense<A> saved(state);
    A* const s = const_cast<A*>(saved.get());  // read, not written
    const auto sums = scratch<A>(2 * m.n * w.groups);
    A *const dw = sums.get(), *const db = dw + m.n * w.groups;
    const Epilogue<T> in{m, maps[1], maps[2], nullptr, act, A(slope)};
    back<T>(in, maps[4], maps[3], w, s, dw, db);
    dweight = filled<A>(weight, dw, m.n);
    dbias = filled<A>(bias, db, m.n);
  });
  return {dx, kept, dweight, dbias};
}

}  // namespace fa

FA_REGISTER(group_similarity_scale)
FA_REGISTER_INFER(group_similarity_scale)
FA_REGISTER(group_similarity_scale_bwd)
