// pool_mlp_scale: p = (1−w)·mean x + w·max x, gate = small network of p, y = epilogue(x·gate + residual); and its
// gradient.
//
// Samples go through pool, network and scale in groups that fit a processor's cache, so that the second read of x comes
// from there; a group is whole samples, chosen by shape alone. Measured against sample by sample and against all at
// once.
#include "mlp.h"

namespace fa {

// A group's part of x should stay in a core's second-level cache (1 MiB fits, of 2 MiB here), unless the weights, which
// every group reads again, are larger.
template <class A>
static int64_t group_of(const Map& x, int64_t element, const Network<A>& net) {
  if (net.norm == Norm::batch) return std::max<int64_t>(x.n, 1);
  const int64_t weights = net.hidden * (net.inputs + (net.two ? net.outputs : 0)) * int64_t(sizeof(A));
  const int64_t bytes = std::max<int64_t>(1 << 20, 2 * weights);
  return std::max<int64_t>(1, bytes / (x.c * x.s * element));
}

struct Descriptor {
  double max_weight;
  bool split;
  bool keeps_max() const { return max_weight != 0 && split; }
  bool keeps_index() const { return max_weight != 0 && !split; }
};

static Descriptor descriptor(double max_weight, const std::string& ties) {
  STD_TORCH_CHECK(0 <= max_weight && max_weight <= 1, "max_weight");
  return {max_weight, splits(ties)};
}

static std::tuple<Tensor, std::optional<Tensor>, std::optional<Tensor>> forward(
    const Tensor& x, const NetworkArgs& args, const OptTensor& residual, const Descriptor& d,
    const std::string& epilogue, double epilogue_slope, bool save) {
  check_map(x);
  if (residual) check_same(x, *residual);
  const Act act = act_of(epilogue);
  Tensor y = new_like(x);
  const auto maps = maps_of({&x, &y, residual ? &*residual : nullptr});
  const Map& m = maps[0];
  std::optional<Tensor> saved, index;
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const int64_t nc = m.n * m.c;
    const Network<A> net(args, m.c);
    STD_TORCH_CHECK(net.outputs == m.c, "network");
    STD_TORCH_CHECK(net.norm != Norm::batch || m.n != 1, "batch");
    const int64_t size = nc + (d.keeps_max() ? nc : 0) + net.saved_size(1, m.n);
    std::unique_ptr<A[]> own;
    if (save) saved = new_dense({size}, acc_dtype(x.scalar_type()));
    A* const p = save ? static_cast<A*>(saved->data_ptr()) : (own = scratch<A>(size)).get();
    if (save && d.keeps_index()) index = new_dense({m.n, m.c}, ScalarType::Long);
    const auto other = scratch<A>(d.max_weight != 0 && !d.keeps_max() ? nc : 0);
    A* const max = d.max_weight == 0 ? nullptr : d.keeps_max() ? p + nc : other.get();
    const State<A> state(net, 1, m.n, p + nc + (d.keeps_max() ? nc : 0));
    const auto gate = scratch<A>(nc);
    if (m.n == 0) std::fill(p, p + size, A(0));  // statistics of nothing
    const Pool kind = d.max_weight == 0 ? Pool::mean : d.max_weight == 1 ? Pool::max : Pool::mean_max;
    const int64_t group = group_of(m, sizeof(T), net);
    for (int64_t n = 0; n < m.n; n += group) {
      const Range samples{n, std::min(n + group, m.n)};
      pool<T>(m, samples, kind, p, max, index ? static_cast<int64_t*>(index->data_ptr()) : nullptr);
      const A w = A(d.max_weight);
      if (max)
        for (int64_t i = samples.begin * m.c; i < samples.end * m.c; ++i)
          p[i] = w == 1 ? max[i] : (1 - w) * p[i] + w * max[i];
      mlp_forward(net, p, 1, m.n, samples, state, gate.get());
      scale<T>(m, maps[2], maps[1], samples, gate.get(), act, epilogue_slope);
    }
  });
  return {y, saved, index};
}

std::tuple<Tensor, Tensor, Tensor> pool_mlp_scale_cpu(
    const Tensor& x, const Tensor& w1, const OptTensor& b1, const OptTensor& w2, const OptTensor& b2,
    const OptTensor& norm_weight, const OptTensor& norm_bias, const OptTensor& norm_mean, const OptTensor& norm_var,
    const OptTensor& act_weight, const OptTensor& gate_weight, const OptTensor& residual, const std::string& act,
    const std::string& gate, double slope, const std::string& norm, double eps, double max_weight,
    const std::string& ties, const std::string& epilogue, double epilogue_slope) {
  auto [y, saved, index] =
      forward(x, FA_NETWORK, residual, descriptor(max_weight, ties), epilogue, epilogue_slope, true);
  return {y, *saved, index ? *index : new_dense({0}, ScalarType::Long)};
}

Tensor pool_mlp_scale_infer_cpu(const Tensor& x, const Tensor& w1, const OptTensor& b1, const OptTensor& w2,
                                const OptTensor& b2, const OptTensor& norm_weight, const OptTensor& norm_bias,
                                const OptTensor& norm_mean, const OptTensor& norm_var, const OptTensor& act_weight,
                                const OptTensor& gate_weight, const OptTensor& residual, const std::string& act,
                                const std::string& gate, double slope, const std::string& norm, double eps,
                                double max_weight, const std::string& ties, const std::string& epilogue,
                                double epilogue_slope) {
  return std::get<0>(forward(x, FA_NETWORK, residual, descriptor(max_weight, ties), epilogue, epilogue_slope, false));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
pool_mlp_scale_bwd_cpu(const Tensor& x, const Tensor& dy, const OptTensor& aux, const Tensor& saved,
                       const Tensor& index, const Tensor& w1, const OptTensor& b1, const OptTensor& w2,
                       const OptTensor& b2, const OptTensor& norm_weight, const OptTensor& norm_bias,
                       const OptTensor& norm_mean, const OptTensor& norm_var, const OptTensor& act_weight,
                       const OptTensor& gate_weight, const std::string& act, const std::string& gate, double slope,
                       const std::string& norm, double eps, double max_weight, const std::string& ties,
                       const std::string& epilogue_name, double epilogue_slope, bool residual) {
  check_map(x);
  check_same(x, dy);
  if (aux) check_same(x, *aux);
  const Descriptor d = descriptor(max_weight, ties);
  const Act epilogue = act_of(epilogue_name);
  const bool keep = residual && epilogue != Act::identity;
  Tensor dx = new_like(x), kept = keep ? new_like(x) : none_like(x);
  const auto maps = maps_of({&x, &dy, aux ? &*aux : nullptr, &dx, keep ? &kept : nullptr});
  const Map& m = maps[0];
  const NetworkArgs args = FA_NETWORK;
  const Index places = d.keeps_index() ? Index(index, m.n, m.c, m.s) : Index();
  std::vector<Tensor> weights;
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const int64_t nc = m.n * m.c;
    const Network<A> net(args, m.c);
    STD_TORCH_CHECK(net.outputs == m.c, "network");
    const Dense<A> state_of(saved);
    STD_TORCH_CHECK(saved.numel() == nc + (d.keeps_max() ? nc : 0) + net.saved_size(1, m.n), "saved");
    A* const p = const_cast<A*>(state_of.get());
    const A* const max = d.keeps_max() ? p + nc : nullptr;
    const State<A> state(net, 1, m.n, p + nc + (d.keeps_max() ? nc : 0));
    const auto arrays = scratch<A>(6 * nc);
    A *const g = arrays.get(), *const dgate = g + nc, *const count = g + 2 * nc, *const dp = g + 3 * nc,
             *const share = g + 4 * nc, *const whole = g + 5 * nc;
    Between<A> between(net, 1, m.n);
    const Epilogue<T> in{m, maps[1], maps[2], g, epilogue, A(epilogue_slope)};
    // What the apply half reads as e: what the reduce half wrote, or dy with the activation looked up again.
    const Epilogue<T> again{m, keep ? maps[4] : maps[1], {}, g, residual ? Act::identity : epilogue, A(epilogue_slope)};
    const int64_t group = group_of(m, 2 * sizeof(T), net);
    const A w = A(max_weight);
    for (int64_t n = 0; n < m.n; n += group) {
      const Range samples{n, std::min(n + group, m.n)};
      gates_of(net, state.u, samples, g);
      reduce<T>(in, maps[4], {}, samples, max, dgate, max ? count : nullptr);
      mlp_backward(net, p, 1, m.n, samples, state, dgate, between, dp);
      Spread<A> back;
      for (int64_t i = samples.begin * m.c; i < samples.end * m.c; ++i) {
        if (max) share[i] = w * dp[i] / count[i];
        whole[i] = w * dp[i];
        dp[i] *= (1 - w) / A(m.s);
      }
      if (w != 1) back.add = dp;
      if (max) back.share = share, back.max = max;
      if (d.keeps_index()) back.first = whole, back.index = places.get();
      apply<T>(again, maps[3], samples, back);
    }
    weights = mlp_weight_gradients(args, net, p, 1, m.n, state, dgate, between);
  });
  auto& g = weights;
  return {dx, kept, g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9]};
}

}  // namespace fa

FA_REGISTER(pool_mlp_scale)
FA_REGISTER_INFER(pool_mlp_scale)
FA_REGISTER(pool_mlp_scale_bwd)
