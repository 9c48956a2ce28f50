// shared_mlp: one or two small dense layers, a norm and an activation between them, a gate at the end; and its
// gradients.
#define FA_KERNELS "cpu/shared_mlp.kernels.h"
#include "mlp.h"
// mlp.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

template <class A>
static std::unique_ptr<A[]> slopes_of(Act act, const Dense<A>& weight, int64_t weights, A slope, int64_t columns) {
  if (act != Act::leaky_relu && act != Act::prelu) return nullptr;
  auto slopes = scratch<A>(columns);
  for (int64_t i = 0; i < columns; ++i) slopes[i] = act == Act::leaky_relu ? slope : weight.get()[weights == 1 ? 0 : i];
  return slopes;
}

static void check_row(const OptTensor& t, int64_t width) {
  if (t) check_shape(*t, {width});
}

template <class A>
Network<A>::Network(const NetworkArgs& a, int64_t in)
    : w1(a.w1),
      b1(a.b1),
      w2(a.w2),
      b2(a.b2),
      norm_weight(a.norm_weight),
      norm_bias(a.norm_bias),
      norm_mean(a.norm_mean),
      norm_var(a.norm_var),
      act_weight(a.act_weight),
      gate_weight(a.gate_weight),
      inputs(in),
      hidden(a.w1.size(0)),
      outputs(a.w2 ? a.w2->size(0) : a.w1.size(0)),
      two(a.w2.has_value()),
      act(act_of(a.act)),
      gate(act_of(a.gate)),
      norm(a.norm == "none"    ? Norm::none
           : a.norm == "batch" ? Norm::batch
                               : Norm::running),
      eps(A(a.eps)) {
  STD_TORCH_CHECK(a.w1.dim() >= 2 && a.w1.numel() == hidden * inputs && a.w1.size(1) == inputs, "w1");
  if (two) STD_TORCH_CHECK(a.w2->dim() >= 2 && a.w2->numel() == outputs * hidden && a.w2->size(1) == hidden, "w2");
  STD_TORCH_CHECK(two || !a.b2, "b2");
  check_row(a.b1, hidden), check_row(a.b2, outputs);
  for (const OptTensor* t : {&a.norm_weight, &a.norm_bias, &a.norm_mean, &a.norm_var}) check_row(*t, hidden);
  STD_TORCH_CHECK(norm != Norm::running || a.norm == "running", "norm");
  STD_TORCH_CHECK(norm == Norm::none || two, "norm");
  STD_TORCH_CHECK(norm != Norm::running || (norm_mean && norm_var), "norm");
  const auto check_slopes = [](Act f, const OptTensor& w, int64_t width) {
    if (f == Act::prelu) STD_TORCH_CHECK(w.has_value(), "slopes");
    if (w) STD_TORCH_CHECK(w->dim() == 1 && (w->numel() == 1 || w->numel() == width), "slopes");
  };
  check_slopes(act, a.act_weight, hidden), check_slopes(gate, a.gate_weight, outputs);
  act_slopes = slopes_of<A>(act, act_weight, a.act_weight ? a.act_weight->numel() : 0, A(a.slope), hidden);
  gate_slopes = slopes_of<A>(gate, gate_weight, a.gate_weight ? a.gate_weight->numel() : 0, A(a.slope), outputs);
}
template struct Network<float>;
template struct Network<double>;

// out (n, m) = a (n, k) · b (m, k)ᵀ + times·bias
template <class A>
static void dense(const A* a, const Dense<A>& b, const Dense<A>& bias, A times, int64_t n, int64_t m, int64_t k,
                  A* out) {
  parallel_for(0, m, grain(n * k), [&](int64_t from, int64_t to) {
    FA_CALL(dense_rows, (A), a, b.get(), bias.get(), times, n, k, (Range{from, to}), m, out);
  });
}

// out (i, k) = Σ_j coef[i·ci + j·cj]·rows (j, k)
template <class A>
static void combine(const A* coef, int64_t ci, int64_t cj, int64_t count, const A* rows, int64_t k, int64_t i, A* out) {
  parallel_for(0, i, grain(count * k), [&](int64_t from, int64_t to) {
    FA_CALL(combine_rows, (A), coef, ci, cj, count, rows, k, (Range{from, to}), out);
  });
}

template <class A>
static void activations(Act act, const A* v, const A* g, const A* slopes, int64_t rows, int64_t columns, A* out) {
  FA_CALL(activate_rows, (A), act, v, g, slopes, rows, columns, out);
}

template <class A>
static void column_sums(const A* v, int64_t rows, int64_t columns, A* out) {
  for (int64_t c = 0; c < columns; ++c) out[c] = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c] += v[r * columns + c];
}

// ẑ of rows (rows, H); for batch statistics the mean and variance are computed first, in two passes.
template <class A>
static void normalise(const Network<A>& net, const A* z, int64_t rows, const A* mean, const A* var, A* zhat) {
  const int64_t h = net.hidden;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < h; ++c) zhat[r * h + c] = (z[r * h + c] - mean[c]) / std::sqrt(var[c] + net.eps);
}

template <class A>
static void statistics(const Network<A>& net, const A* z, int64_t rows, A* stats) {
  const int64_t h = net.hidden;
  for (int64_t c = 0; c < h; ++c) {
    double mean = 0, square = 0;
    for (int64_t r = 0; r < rows; ++r) mean += z[r * h + c];
    mean /= double(rows);
    for (int64_t r = 0; r < rows; ++r) square += (z[r * h + c] - mean) * (z[r * h + c] - mean);
    stats[c] = A(mean), stats[h + c] = A(square / double(rows));
  }
}

// The activation's input v, and ẑ: z itself and nothing where there is no norm.
template <class A>
struct Normed {
  Normed(const Network<A>& net, const A* z, int64_t rows, const State<A>& state) : v(z) {
    if (net.norm == Norm::none) return;
    const int64_t h = net.hidden;
    mean = net.norm == Norm::batch ? state.stats : net.norm_mean.get();
    var = net.norm == Norm::batch ? state.stats + h : net.norm_var.get();
    own = scratch<A>(2 * rows * h);
    zhat = own.get() + rows * h;
    normalise(net, z, rows, mean, var, zhat);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < h; ++c) {
        const A scaled = net.norm_weight ? zhat[r * h + c] * net.norm_weight.get()[c] : zhat[r * h + c];
        own[r * h + c] = net.norm_bias ? scaled + net.norm_bias.get()[c] : scaled;
      }
    v = own.get();
  }
  const A* v;
  A* zhat = nullptr;
  const A *mean = nullptr, *var = nullptr;
  std::unique_ptr<A[]> own;
};

template <class A>
void gates_of(const Network<A>& net, const A* u, Range s, A* gate) {
  const int64_t o = net.outputs;
  activations<A>(net.gate, u + s.begin * o, nullptr, net.gate_slopes.get(), s.end - s.begin, o, gate + s.begin * o);
}

template <class A>
static void add_to(A* to, const A* from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}

template <class A>
void mlp_forward(const Network<A>& net, const A* p, int64_t count, int64_t n, Range s, const State<A>& state, A* gate) {
  const int64_t rows = s.end - s.begin, h = net.hidden, o = net.outputs, c = net.inputs;
  // The second layer is linear: the activations of two descriptors are added before it, and it runs once.
  const int64_t width = net.two ? h : c;
  const auto added = scratch<A>(count > 1 || net.two ? rows * width : 0);
  const A* total = p + s.begin * c;
  if (net.two) {
    for (int64_t j = 0; j < count; ++j)
      dense(p + (j * n + s.begin) * c, net.w1, net.b1, A(1), rows, h, c, state.z + (j * n + s.begin) * h);
    if (net.norm == Norm::batch) statistics(net, state.z, count * n, state.stats);
    const auto one = scratch<A>(count > 1 ? rows * h : 0);
    for (int64_t j = 0; j < count; ++j) {
      const Normed<A> normed(net, state.z + (j * n + s.begin) * h, rows, state);
      A* to = j ? one.get() : added.get();
      activations<A>(net.act, normed.v, nullptr, net.act_slopes.get(), rows, h, to);
      if (j) add_to(added.get(), to, rows * h);
    }
    total = added.get();
  } else if (count > 1) {
    std::copy(total, total + rows * c, added.get());
    for (int64_t j = 1; j < count; ++j) add_to(added.get(), p + (j * n + s.begin) * c, rows * c);
    total = added.get();
  }
  dense(total, net.two ? net.w2 : net.w1, net.two ? net.b2 : net.b1, A(count), rows, o, width, state.u + s.begin * o);
  gates_of(net, state.u, s, gate);
}

// dz from dv, the gradient of the activation's input.
template <class A>
static const A* norm_backward(const Network<A>& net, const Normed<A>& normed, const A* dv, int64_t rows, A* dz) {
  const int64_t h = net.hidden;
  for (int64_t k = 0; k < h; ++k) {
    const A scale = (net.norm_weight ? net.norm_weight.get()[k] : A(1)) / std::sqrt(normed.var[k] + net.eps);
    double mean = 0, slope = 0;  // of dẑ and of dẑ·ẑ, which the batch's statistics send back
    if (net.norm == Norm::batch) {
      for (int64_t r = 0; r < rows; ++r) mean += dv[r * h + k], slope += double(dv[r * h + k]) * normed.zhat[r * h + k];
      mean /= double(rows), slope /= double(rows);
    }
    for (int64_t r = 0; r < rows; ++r)
      dz[r * h + k] = A(scale * (dv[r * h + k] - mean - normed.zhat[r * h + k] * slope));
  }
  return dz;
}

template <class A>
void mlp_backward(const Network<A>& net, const A* p, int64_t count, int64_t n, Range s, const State<A>& state,
                  const A* dgate, Between<A>& b, A* dp) {
  const int64_t rows = s.end - s.begin, h = net.hidden, o = net.outputs, c = net.inputs;
  activations<A>(net.gate, state.u + s.begin * o, dgate + s.begin * o, net.gate_slopes.get(), rows, o,
                 b.du.get() + s.begin * o);
  const A* back = b.du.get() + s.begin * o;  // what reaches the first layer
  if (net.two) combine(back, o, 1, o, net.w2.get(), h, rows, b.dh.get() + s.begin * h);
  // Statistics of a batch tie all rows together; anything else goes descriptor by descriptor.
  const bool batch = net.norm == Norm::batch;
  for (int64_t j = 0; j < (batch ? 1 : count); ++j) {
    const int64_t at = j * n + s.begin, size = batch ? count * n : rows;
    if (net.two) {
      A* dv = b.dv.get() + at * h;
      const Normed<A> normed(net, state.z + at * h, size, state);
      for (int64_t i = 0; i < size; i += rows)
        activations<A>(net.act, normed.v + i * h, b.dh.get() + s.begin * h, net.act_slopes.get(), rows, h, dv + i * h);
      back = dv;
      if (net.norm != Norm::none) back = norm_backward(net, normed, dv, size, b.dz.get() + at * h);
    }
    for (int64_t i = 0; i < size; i += rows)
      combine(net.two ? back + i * h : back, h, 1, h, net.w1.get(), c, rows, dp + (at + i) * c);
  }
}

template <class A>
std::vector<Tensor> mlp_weight_gradients(const NetworkArgs& args, const Network<A>& net, const A* p, int64_t count,
                                         int64_t n, const State<A>& state, const A* dgate, const Between<A>& b) {
  const int64_t h = net.hidden, o = net.outputs, c = net.inputs, rows = count * n;
  std::vector<Tensor> out;  // ten tensors and not one ten times: an operator's outputs may not alias
  for (int i = 0; i < 10; ++i) out.push_back(none_like(args.w1));
  const A* first = !net.two ? b.du.get() : net.norm == Norm::none ? b.dv.get() : b.dz.get();
  const auto sums = [&](const OptTensor& like, const A* v, int64_t r, int64_t columns, A times) {
    Filled<A> values(*like);
    column_sums(v, r, columns, values.get());
    for (int64_t k = 0; k < columns; ++k) values.get()[k] *= times;
    return values.done();
  };
  const auto product = [&](const Tensor& like, const A* d, int64_t r, int64_t outs, const A* v, int64_t columns) {
    Filled<A> values(like);
    combine(d, 1, outs, r, v, columns, outs, values.get());
    return values.done();
  };
  const auto slopes = [&](const OptTensor& weight, const A* v, const A* g, int64_t r, int64_t columns) {
    const auto each = scratch<A>(columns);
    for (int64_t k = 0; k < columns; ++k) each[k] = 0;
    for (int64_t i = 0; i < r; ++i)
      for (int64_t k = 0; k < columns; ++k)
        if (!(v[i * columns + k] > 0)) each[k] += v[i * columns + k] * g[i * columns + k];
    return sums(weight, each.get(), weight->numel() == 1 ? columns : 1, weight->numel() == 1 ? 1 : columns, A(1));
  };
  if (net.gate == Act::prelu) out[9] = slopes(args.gate_weight, state.u, dgate, n, o);
  if (!net.two) {
    // u = Σ_p W1 p + P·b1: one gradient serves all descriptors.
    const auto total = scratch<A>(n * c);
    std::copy(p, p + n * c, total.get());
    for (int64_t j = 1; j < count; ++j) add_to(total.get(), p + j * n * c, n * c);
    out[0] = product(args.w1, first, n, o, total.get(), c);
    if (args.b1) out[1] = sums(args.b1, first, n, o, A(count));
    return out;
  }
  out[0] = product(args.w1, first, rows, h, p, c);
  if (args.b1) out[1] = sums(args.b1, first, rows, h, A(1));

  const Normed<A> normed(net, state.z, rows, state);
  const auto hidden = scratch<A>(rows * h);
  activations<A>(net.act, normed.v, nullptr, net.act_slopes.get(), rows, h, hidden.get());
  for (int64_t j = 1; j < count; ++j) add_to(hidden.get(), hidden.get() + j * n * h, n * h);
  out[2] = product(*args.w2, b.du.get(), n, o, hidden.get(), h);
  if (args.b2) out[3] = sums(args.b2, b.du.get(), n, o, A(count));
  if (net.act == Act::prelu) {
    const auto dh = scratch<A>(rows * h);
    for (int64_t j = 0; j < count; ++j) std::copy(b.dh.get(), b.dh.get() + n * h, dh.get() + j * n * h);
    out[8] = slopes(args.act_weight, normed.v, dh.get(), rows, h);
  }
  if (net.norm == Norm::none) return out;
  const A* dv = b.dv.get();
  const auto with_zhat = scratch<A>(rows * h);
  for (int64_t i = 0; i < rows * h; ++i) with_zhat[i] = dv[i] * normed.zhat[i];
  if (args.norm_weight) out[4] = sums(args.norm_weight, with_zhat.get(), rows, h, A(1));
  if (args.norm_bias) out[5] = sums(args.norm_bias, dv, rows, h, A(1));
  if (net.norm == Norm::running) {
    out[6] = sums(args.norm_mean, first, rows, h, A(-1));
    for (int64_t i = 0; i < rows * h; ++i) {
      const A weight = net.norm_weight ? net.norm_weight.get()[i % h] : A(1);
      with_zhat[i] *= weight / (normed.var[i % h] + net.eps);
    }
    out[7] = sums(args.norm_var, with_zhat.get(), rows, h, A(-0.5));
  }
  return out;
}

#define FA_INSTANTIATE(A)                                                                                              \
  template void gates_of(const Network<A>&, const A*, Range, A*);                                                      \
  template void mlp_forward(const Network<A>&, const A*, int64_t, int64_t, Range, const State<A>&, A*);                \
  template void mlp_backward(const Network<A>&, const A*, int64_t, int64_t, Range, const State<A>&, const A*,          \
                             Between<A>&, A*);                                                                         \
  template std::vector<Tensor> mlp_weight_gradients(const NetworkArgs&, const Network<A>&, const A*, int64_t, int64_t, \
                                                    const State<A>&, const A*, const Between<A>&);
FA_INSTANTIATE(float)
FA_INSTANTIATE(double)

template <class F>
static auto by_acc(ScalarType dtype, const F& f) {
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

static std::tuple<Tensor, Tensor> gate_and_state(const Tensor& pooled, const NetworkArgs& args) {
  const int64_t d = pooled.dim();
  STD_TORCH_CHECK(d == 2 || (d == 3 && (pooled.size(0) == 1 || pooled.size(0) == 2)), "pooled");
  const int64_t count = d == 3 ? pooled.size(0) : 1, n = pooled.size(d - 2), c = pooled.size(d - 1);
  const ScalarType acc = acc_dtype(pooled.scalar_type());
  return by_acc(acc, [&](auto zero) {
    using A = decltype(zero);
    const Dense<A> p(pooled);
    const Network<A> net(args, c);
    STD_TORCH_CHECK(net.norm != Norm::batch || count * n != 1, "batch");
    Tensor gate = new_dense({n, net.outputs}, acc), saved = new_dense({net.saved_size(count, n)}, acc);
    const State<A> state(net, count, n, static_cast<A*>(saved.data_ptr()));
    mlp_forward(net, p.get(), count, n, {0, n}, state, static_cast<A*>(gate.data_ptr()));
    return std::tuple<Tensor, Tensor>{gate, saved};
  });
}

std::tuple<Tensor, Tensor> shared_mlp_cpu(const Tensor& pooled, const Tensor& w1, const OptTensor& b1,
                                          const OptTensor& w2, const OptTensor& b2, const OptTensor& norm_weight,
                                          const OptTensor& norm_bias, const OptTensor& norm_mean,
                                          const OptTensor& norm_var, const OptTensor& act_weight,
                                          const OptTensor& gate_weight, const std::string& act, const std::string& gate,
                                          double slope, const std::string& norm, double eps) {
  return gate_and_state(pooled, FA_NETWORK);
}

Tensor shared_mlp_infer_cpu(const Tensor& pooled, const Tensor& w1, const OptTensor& b1, const OptTensor& w2,
                            const OptTensor& b2, const OptTensor& norm_weight, const OptTensor& norm_bias,
                            const OptTensor& norm_mean, const OptTensor& norm_var, const OptTensor& act_weight,
                            const OptTensor& gate_weight, const std::string& act, const std::string& gate, double slope,
                            const std::string& norm, double eps) {
  return std::get<0>(gate_and_state(pooled, FA_NETWORK));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shared_mlp_bwd_cpu(
    const Tensor& pooled, const Tensor& dgate, const Tensor& saved, const Tensor& w1, const OptTensor& b1,
    const OptTensor& w2, const OptTensor& b2, const OptTensor& norm_weight, const OptTensor& norm_bias,
    const OptTensor& norm_mean, const OptTensor& norm_var, const OptTensor& act_weight, const OptTensor& gate_weight,
    const std::string& act, const std::string& gate, double slope, const std::string& norm, double eps) {
  const int64_t d = pooled.dim();
  STD_TORCH_CHECK(d == 2 || (d == 3 && (pooled.size(0) == 1 || pooled.size(0) == 2)), "pooled");
  const int64_t count = d == 3 ? pooled.size(0) : 1, n = pooled.size(d - 2), c = pooled.size(d - 1);
  const NetworkArgs args = FA_NETWORK;
  return by_acc(acc_dtype(pooled.scalar_type()), [&](auto zero) {
    using A = decltype(zero);
    const Dense<A> p(pooled), dg(dgate), kept(saved);
    const Network<A> net(args, c);
    check_shape(dgate, {n, net.outputs});
    STD_TORCH_CHECK(saved.numel() == net.saved_size(count, n), "saved");
    const State<A> state(net, count, n, const_cast<A*>(kept.get()));
    Between<A> between(net, count, n);
    Filled<A> dp(pooled);
    mlp_backward(net, p.get(), count, n, {0, n}, state, dg.get(), between, dp.get());
    auto g = mlp_weight_gradients(args, net, p.get(), count, n, state, dg.get(), between);
    return std::make_tuple(dp.done(), g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9]);
  });
}

}  // namespace fa

FA_REGISTER(shared_mlp)
FA_REGISTER_INFER(shared_mlp)
FA_REGISTER(shared_mlp_bwd)
