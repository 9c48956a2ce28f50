// pool_conv_scale: p = mean x, u = a convolution of p over the channels, y = epilogue(x·gate(u) + residual); and its
// gradient.
//
// Samples go through pool, convolution and scale in groups that fit a processor's cache, as in pool_mlp_scale.cpp. The
// convolution is a millionth of the work of a large map, and runs on one thread.
#define FA_KERNELS "cpu/pool_conv_scale.kernels.h"
#include "stages.h"
// stages.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

template <class A>
static int64_t group_of(const Map& x, int64_t element) {
  return std::max<int64_t>(1, (1 << 20) / (x.c * x.s * element));
}

namespace {

template <class A>
struct Conv {
  Dense<A> w, bias, w1, b1;
  int64_t c, h, k;
  Act act, gate;
  A slope;
  bool circular;

  Conv(const Tensor& weight, const OptTensor& bias_, const OptTensor& w1_, const OptTensor& b1_,
       const std::string& act_name, const std::string& gate_name, double slope, bool circular, int64_t c)
      : w(weight),
        bias(bias_),
        w1(w1_),
        b1(b1_),
        c(c),
        h(w1_ ? w1_->size(0) : 1),
        act(act_of(act_name)),
        gate(act_of(gate_name)),
        slope(A(slope)),
        circular(circular) {
    STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == 1 && weight.size(1) == h, "weight");
    k = weight.size(2);
    STD_TORCH_CHECK(k % 2 == 1 && (!circular || k / 2 <= c), "taps");
    STD_TORCH_CHECK(!w1_ || w1_->numel() == h, "w1");
    if (bias_) check_shape(*bias_, {1});
    if (b1_) check_shape(*b1_, {h});
    STD_TORCH_CHECK(w1_ || !b1_, "b1");
    STD_TORCH_CHECK(act != Act::prelu && gate != Act::prelu, "prelu");
  }
  int64_t reach() const { return k / 2; }
  int64_t padded() const { return c + 2 * reach(); }

  // The channels beyond both ends, beside those that lie at edge + reach.
  void close(A* edge) const {
    const int64_t r = reach();
    for (int64_t i = 0; i < r; ++i) {
      edge[i] = circular ? edge[c + i] : A(0);
      edge[r + c + i] = circular ? edge[r + i] : A(0);
    }
  }
  // v of one hidden channel, with its edges; z where there is a hidden layer.
  void values(const A* p, int64_t j, A* z, A* edge) const {
    if (w1)
      FA_CALL(hidden_row, (A), p, c, w1.get()[j], b1 ? b1.get()[j] : A(0), act, slope, z, edge + reach());
    else
      std::copy(p, p + c, edge + reach());
    close(edge);
  }
};

}  // namespace

// A sum over many hidden channels is added up in parts, whose rounding doesn't grow with their number.
constexpr int64_t PART = 16;

// to += part, which begins anew.
template <class A>
static void close_part(A* part, A* to, int64_t c) {
  for (int64_t i = 0; i < c; ++i) {
    to[i] += part[i];
    part[i] = 0;
  }
}

template <class A>
static void conv_forward(const Conv<A>& net, const A* p, Range samples, A* u, A* gate) {
  const auto room = scratch<A>(net.padded() + 2 * net.c);
  A* const part = room.get() + net.padded() + net.c;
  std::fill(part, part + net.c, A(0));
  for (int64_t n = samples.begin; n < samples.end; ++n) {
    A* const out = u + n * net.c;
    std::fill(out, out + net.c, net.bias ? net.bias.get()[0] : A(0));
    for (int64_t j = 0; j < net.h; ++j) {
      net.values(p + n * net.c, j, room.get() + net.padded(), room.get());
      FA_CALL(taps, (A, false), room.get(), net.c, net.w.get() + j * net.k, net.k, net.h > PART ? part : out);
      if (net.h > PART && (j % PART == PART - 1 || j + 1 == net.h)) close_part(part, out, net.c);
    }
  }
  const int64_t at = samples.begin * net.c, size = (samples.end - samples.begin) * net.c;
  FA_CALL(gates, (A), u + at, size, net.gate, static_cast<const A*>(nullptr), gate + at);
}

// dp, and what the samples add to the gradients dw (h, k), dw1 (h), db1 (h), dbias.
template <class A>
static void conv_backward(const Conv<A>& net, const A* p, const A* u, const A* dgate, Range samples, A* dp, double* dw,
                          double* dw1, double* db1, double* dbias) {
  const int64_t c = net.c, r = net.reach();
  const auto room = scratch<A>(2 * net.padded() + 4 * c);
  A *const edge = room.get(), *const back = edge + net.padded(), *const z = back + net.padded(), *const dv = z + c,
           *const ones = dv + c, *const part = ones + c;
  std::fill(part, part + c, A(0));
  std::fill(ones, ones + c, A(1));
  for (int64_t n = samples.begin; n < samples.end; ++n) {
    const A* const pooled = p + n * c;
    A* const to = dp + n * c;
    A* const du = back + r;
    FA_CALL(gates, (A), u + n * c, c, net.gate, dgate + n * c, du);
    net.close(back);
    *dbias += FA_CALL(inner, (A), du, ones, c);
    std::fill(to, to + c, A(0));
    for (int64_t j = 0; j < net.h; ++j) {
      const A* const w = net.w.get() + j * net.k;
      net.values(pooled, j, z, edge);
      for (int64_t t = 0; t < net.k; ++t) dw[j * net.k + t] += FA_CALL(inner, (A), du, edge + t, c);
      if (!net.w1) {
        FA_CALL(taps, (A, true), back, c, w, net.k, to);
        continue;
      }
      std::fill(dv, dv + c, A(0));
      FA_CALL(taps, (A, true), back, c, w, net.k, dv);
      FA_CALL(hidden_back, (A), z, pooled, c, net.act, net.w1.get()[j], net.slope, dv, part);
      if (j % PART == PART - 1 || j + 1 == net.h) close_part(part, to, c);
      dw1[j] += FA_CALL(inner, (A), dv, pooled, c);
      db1[j] += FA_CALL(inner, (A), dv, ones, c);
    }
  }
}

#define FA_CONV weight, bias, w1, b1, act, gate, slope, circular

static std::tuple<Tensor, std::optional<Tensor>> forward(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                                         const OptTensor& w1, const OptTensor& b1,
                                                         const OptTensor& residual, const std::string& act,
                                                         const std::string& gate, double slope, bool circular,
                                                         const std::string& epilogue, double epilogue_slope,
                                                         bool save) {
  check_map(x);
  if (residual) check_same(x, *residual);
  const Act last = act_of(epilogue);
  Tensor y = new_like(x);
  const auto maps = maps_of({&x, &y, residual ? &*residual : nullptr});
  const Map& m = maps[0];
  const int64_t nc = m.n * m.c;
  std::optional<Tensor> saved;
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Conv<A> net(FA_CONV, m.c);
    if (save) saved = new_dense({2 * nc}, acc_dtype(x.scalar_type()));
    const auto own = scratch<A>(save ? nc : 3 * nc);
    A *const g = own.get(), *const p = save ? static_cast<A*>(saved->data_ptr()) : g + nc, *const u = p + nc;
    const int64_t group = group_of<A>(m, sizeof(T));
    for (int64_t n = 0; n < m.n; n += group) {
      const Range samples{n, std::min(n + group, m.n)};
      pool<T>(m, samples, Pool::mean, p, nullptr, nullptr);
      conv_forward(net, p, samples, u, g);
      scale<T>(m, maps[2], maps[1], samples, g, last, epilogue_slope);
    }
  });
  return {y, saved};
}

std::tuple<Tensor, Tensor> pool_conv_scale_cpu(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                               const OptTensor& w1, const OptTensor& b1, const OptTensor& residual,
                                               const std::string& act, const std::string& gate, double slope,
                                               bool circular, const std::string& epilogue, double epilogue_slope) {
  auto [y, saved] =
      forward(x, weight, bias, w1, b1, residual, act, gate, slope, circular, epilogue, epilogue_slope, true);
  return {y, *saved};
}

Tensor pool_conv_scale_infer_cpu(const Tensor& x, const Tensor& weight, const OptTensor& bias, const OptTensor& w1,
                                 const OptTensor& b1, const OptTensor& residual, const std::string& act,
                                 const std::string& gate, double slope, bool circular, const std::string& epilogue,
                                 double epilogue_slope) {
  return std::get<0>(
      forward(x, weight, bias, w1, b1, residual, act, gate, slope, circular, epilogue, epilogue_slope, false));
}

// A gradient summed in double, in the shape and dtype of its parameter.
template <class A>
static Tensor filled(const Tensor& like, const double* values) {
  Filled<A> out(like);
  for (int64_t i = 0, n = like.numel(); i < n; ++i) out.get()[i] = A(values[i]);
  return out.done();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pool_conv_scale_bwd_cpu(
    const Tensor& x, const Tensor& dy, const OptTensor& aux, const Tensor& saved, const Tensor& weight,
    const OptTensor& bias, const OptTensor& w1, const OptTensor& b1, const std::string& act, const std::string& gate,
    double slope, bool circular, const std::string& epilogue_name, double epilogue_slope, bool residual) {
  check_map(x);
  check_same(x, dy);
  if (aux) check_same(x, *aux);
  const Act epilogue = act_of(epilogue_name);
  const bool keep = residual && epilogue != Act::identity;
  Tensor dx = new_like(x), kept = keep ? new_like(x) : none_like(x);
  const auto maps = maps_of({&x, &dy, aux ? &*aux : nullptr, &dx, keep ? &kept : nullptr});
  const Map& m = maps[0];
  const int64_t nc = m.n * m.c;
  STD_TORCH_CHECK(saved.numel() == 2 * nc, "saved");
  Tensor dweight, dbias, dw1, db1;
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Conv<A> net(FA_CONV, m.c);
    const Dense<A> state(saved);
    const A *const p = state.get(), *const u = p + nc;
    const auto arrays = scratch<A>(3 * nc);
    A *const g = arrays.get(), *const dgate = g + nc, *const dp = dgate + nc;
    std::vector<double> sums(net.h * (net.k + 2) + 1, 0.0);
    double *const dw = sums.data(), *const d1 = dw + net.h * net.k, *const e1 = d1 + net.h, *const db = e1 + net.h;
    const Epilogue<T> in{m, maps[1], maps[2], g, epilogue, A(epilogue_slope)};
    // What the apply half reads as e: what the reduce half wrote, or dy with the activation looked up again.
    const Epilogue<T> again{m, keep ? maps[4] : maps[1], {}, g, residual ? Act::identity : epilogue, A(epilogue_slope)};
    const int64_t group = group_of<A>(m, 2 * sizeof(T));
    for (int64_t n = 0; n < m.n; n += group) {
      const Range samples{n, std::min(n + group, m.n)};
      const int64_t at = samples.begin * m.c, size = (samples.end - samples.begin) * m.c;
      FA_CALL(gates, (A), u + at, size, net.gate, static_cast<const A*>(nullptr), g + at);
      reduce<T>(in, maps[4], {}, samples, nullptr, dgate, nullptr);
      conv_backward(net, p, u, dgate, samples, dp, dw, d1, e1, db);
      for (int64_t i = at; i < at + size; ++i) dp[i] /= A(m.s);
      Spread<A> back;
      back.add = dp;
      apply<T>(again, maps[3], samples, back);
    }
    dweight = filled<A>(weight, dw);
    dbias = bias ? filled<A>(*bias, db) : none_like(weight);
    dw1 = w1 ? filled<A>(*w1, d1) : none_like(weight);
    db1 = b1 ? filled<A>(*b1, e1) : none_like(weight);
  });
  return {dx, kept, dweight, dbias, dw1, db1};
}

}  // namespace fa

FA_REGISTER(pool_conv_scale)
FA_REGISTER_INFER(pool_conv_scale)
FA_REGISTER(pool_conv_scale_bwd)
