// The small network between pool and apply (fused_attn/ops/shared_mlp.py): what shared_mlp.cpp lends to other ops.
//
//   z = W1 p + b1,  h = act(norm(z)),  u = Σ_p (W2 h + b2),  gate = g(u)
//
// Arrays are dense: descriptors p (P, N, C), z (P·N, H), u and gate (N, O), stats (2, H) the batch's mean and variance.
#pragma once

#include "stages.h"

namespace fa {

enum class Norm { none, batch, running };

// The ten tensors and five options that every op with a network takes, in the order of `Mlp` in shared_mlp.py.
struct NetworkArgs {
  const Tensor& w1;
  const OptTensor &b1, &w2, &b2, &norm_weight, &norm_bias, &norm_mean, &norm_var, &act_weight, &gate_weight;
  const std::string &act, &gate;
  double slope;
  const std::string& norm;
  double eps;
};

// Those arguments by their names in the schemas.
#define FA_NETWORK                                                                                                    \
  NetworkArgs {                                                                                                       \
    w1, b1, w2, b2, norm_weight, norm_bias, norm_mean, norm_var, act_weight, gate_weight, act, gate, slope, norm, eps \
  }

template <class A>
struct Network {
  Network(const NetworkArgs& args, int64_t inputs);

  int64_t saved_size(int64_t count, int64_t n) const {
    return (two ? count * n * hidden : 0) + n * outputs + (norm == Norm::batch ? 2 * hidden : 0);
  }

  Dense<A> w1, b1, w2, b2, norm_weight, norm_bias, norm_mean, norm_var, act_weight, gate_weight;
  std::unique_ptr<A[]> act_slopes, gate_slopes;  // one per column where the function has a slope, else null
  int64_t inputs, hidden, outputs;
  bool two;
  Act act, gate;
  Norm norm;
  A eps;
};

// Where the pieces of `saved` lie: z | u | stats.
template <class A>
struct State {
  State(const Network<A>& net, int64_t count, int64_t n, A* saved)
      : z(saved), u(saved + (net.two ? count * n * net.hidden : 0)), stats(u + n * net.outputs) {}
  A *z, *u, *stats;
};

// Samples [begin, end) of N; norm = batch takes all of them at once.
template <class A>
void mlp_forward(const Network<A>& net, const A* p, int64_t count, int64_t n, Range samples, const State<A>& state,
                 A* gate);

template <class A>
void gates_of(const Network<A>& net, const A* u, Range samples, A* gate);

// The gradients between the layers, which the weights' gradients need once all samples are there.
template <class A>
struct Between {
  Between(const Network<A>& net, int64_t count, int64_t n)
      : du(scratch<A>(n * net.outputs)),
        dh(scratch<A>(net.two ? n * net.hidden : 0)),
        dv(scratch<A>(net.two ? count * n * net.hidden : 0)),
        dz(scratch<A>(net.norm != Norm::none ? count * n * net.hidden : 0)) {}
  std::unique_ptr<A[]> du, dh, dv, dz;
};

template <class A>
void mlp_backward(const Network<A>& net, const A* p, int64_t count, int64_t n, Range samples, const State<A>& state,
                  const A* dgate, Between<A>& between, A* dp);

// The ten gradients, each like its tensor; empty where there is none.
template <class A>
std::vector<Tensor> mlp_weight_gradients(const NetworkArgs& args, const Network<A>& net, const A* p, int64_t count,
                                         int64_t n, const State<A>& state, const A* dgate, const Between<A>& between);

}  // namespace fa
