// The small network between pool and apply, for all samples at once:
//
//   z = W1 p + b1,  u = W2 act(z) + b2,  gate = g(u)        two layers
//   u = W1 p + b1,  gate = g(u)                             one
//
// and its gradient: du = dgate·g'(u), dh = W2ᵀ du, dz = dh·act'(z), dp = W1ᵀ dz, dW2 = Σ_n du hᵀ, dW1 = Σ_n dz pᵀ,
// db2 = Σ_n du, db1 = Σ_n dz. Sums over samples run in order, in one thread.
//
// Several samples share a read of the weights, which for 7×7 maps are larger than the map (W1 of 2048 × 128 in float32
// has 1 MiB, a sample of 2048 × 7 × 7 in bfloat16 0.2).
#pragma once

#include "activations.cuh"

namespace fa::cuda {

// So many samples share a read of the weights; in float64, whose functions take many registers, fewer.
template <class A>
constexpr int kSamples = sizeof(A) == 8 ? 2 : 8;

// An array (N, K) behind an activation, or a gradient times the activation's derivative at `at`: never stored.
template <class A>
struct Behind {
  const A *values, *at;  // at: null forwards
  Act act;
  A slope;

  // The first `count` of K values, `step` apart; the others are as if they were 0.
  template <int K>
  FA_DEVICE void get(int64_t first, int64_t step, int count, A (&out)[K]) const {
    A where[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      out[k] = k < count ? load(values + first + k * step) : A(0);
      where[k] = at && k < count ? load(at + first + k * step) : A(0);
    }
    if (at)
      through_all<false>(act, out, where, slope);
    else
      activate_all<false>(act, out, slope);
  }
};

// out[n, o] = Σ_i W[o, i]·in[n, i] + b[o]; gate = g(out) where it isn't null. A warp has one o of kSamples samples.
template <class A, class W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dense_kernel(const Behind<A> in, const W* weight, const W* bias, A* out, A* gate, const Act act, const A slope,
                 const int n, const int inputs, const int outputs) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t unit = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int o = int(unit % outputs);
  const int64_t first = unit / outputs * kSamples<A>;
  if (first >= n) return;
  const int samples = n - first < kSamples<A> ? int(n - first) : kSamples<A>;
  A sum[kSamples<A>] = {};
#pragma unroll 1
  for (int i = lane; i < inputs; i += kWarp) {
    const A w = widen(load(weight + int64_t(o) * inputs + i));
    A v[kSamples<A>];
    in.get(first * inputs + i, inputs, samples, v);
#pragma unroll
    for (int k = 0; k < kSamples<A>; ++k) sum[k] += w * v[k];
  }
  const A b = bias ? widen(load(bias + o)) : A(0);
  A mine[1] = {};
#pragma unroll
  for (int k = 0; k < kSamples<A>; ++k) {
    const A whole = sum_of_lanes(sum[k], kWarp) + b;
    if (lane == k) mine[0] = whole;  // lane k writes sample k's
  }
  if (lane >= samples) return;
  const int64_t to = (first + lane) * outputs + o;
  store(out + to, mine[0]);
  if (!gate) return;
  activate_all<false>(act, mine, slope);
  store(gate + to, mine[0]);
}

// out[n, i] = factor · Σ_o W[o, i]·in[n, o]. A block has 32 neighbours i of kSamples samples; its warps share the rows
// o and their sums are added in order.
template <class A, class W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dense_transposed_kernel(const Behind<A> in, const W* weight, A* out, const A factor, const int n, const int inputs,
                            const int outputs) {
  constexpr int warps = kThreads / kWarp;
  FA_SHARED(A, parts, warps * kSamples<A> * kWarp);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int tiles = (inputs + kWarp - 1) / kWarp;
  const int i = int(blockIdx.x % unsigned(tiles)) * kWarp + lane;
  const int64_t first = int64_t(blockIdx.x / unsigned(tiles)) * kSamples<A>;
  const int samples = n - first < kSamples<A> ? int(n - first) : kSamples<A>;
  A sum[kSamples<A>] = {};
  if (i < inputs) {
#pragma unroll 1
    for (int o = warp; o < outputs; o += warps) {
      const A w = widen(load(weight + int64_t(o) * inputs + i));
      A v[kSamples<A>];
      in.get(first * outputs + o, outputs, samples, v);
#pragma unroll
      for (int k = 0; k < kSamples<A>; ++k) sum[k] += w * v[k];
    }
  }
#pragma unroll
  for (int k = 0; k < kSamples<A>; ++k) parts[(warp * kSamples<A> + k) * kWarp + lane] = sum[k];
  __syncthreads();
  static_assert(warps >= kSamples<A>, "each sample's parts are added by a warp of its own");
  if (warp >= samples || i >= inputs) return;
  A whole = 0;
#pragma unroll
  for (int p = 0; p < warps; ++p) whole += parts[(p * kSamples<A> + warp) * kWarp + lane];
  store(out + (first + warp) * inputs + i, whole * factor);
}

// dW[o, i] = Σ_n left[n, o]·right[n, i], db[o] = Σ_n left[n, o]: a thread per weight.
template <class A, class W>
__global__ void __launch_bounds__(kThreads, kBlocks)
    weight_gradient_kernel(const Behind<A> left, const Behind<A> right, W* dweight, W* dbias, const int n,
                           const int inputs, const int outputs) {
  const int64_t which = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (which >= int64_t(inputs) * outputs) return;
  const int o = int(which / inputs), i = int(which - int64_t(o) * inputs);
  A sum = 0, alone = 0;
#pragma unroll 1
  for (int k = 0; k < n; k += kSamples<A>) {
    const int count = n - k < kSamples<A> ? n - k : kSamples<A>;
    A l[kSamples<A>], r[kSamples<A>];
    left.get(int64_t(k) * outputs + o, outputs, count, l);
    right.get(int64_t(k) * inputs + i, inputs, count, r);
#pragma unroll
    for (int j = 0; j < kSamples<A>; ++j) {
      if (j >= count) break;  // act(0) need not be 0
      sum += l[j] * r[j];
      alone += l[j];
    }
  }
  store(dweight + which, narrow<W>(sum));
  if (dbias && i == 0) store(dbias + o, narrow<W>(alone));
}

template <class W>
struct Network {
  const W *w1, *b1, *w2, *b2;  // (H, C) (H) (C, H) (C); w2 null: one layer, w1 (C, C)
  int64_t channels, hidden;
  Act act, gate;
  double slope;

  int64_t inner() const { return w2 ? hidden : 0; }  // elements of z per sample
};

// z (N, H), u and gate (N, C); z isn't there with one layer.
template <class A, class W>
void network_forward(Stream stream, const Network<W>& net, int64_t n, const A* p, A* z, A* u, A* gate) {
  const auto layer = [&](const Behind<A>& in, const W* weight, const W* bias, A* out, A* gated, int64_t inputs,
                         int64_t outputs) {
    launch(stream, dense_kernel<A, W>, blocks_for(blocks_for(n, kSamples<A>) * outputs, kThreads / kWarp), 0, in,
           weight, bias, out, gated, net.gate, A(net.slope), int(n), int(inputs), int(outputs));
  };
  const Behind<A> plain{p, nullptr, Act::identity, A(0)};
  if (!net.w2) return layer(plain, net.w1, net.b1, u, gate, net.channels, net.channels);
  layer(plain, net.w1, net.b1, z, nullptr, net.channels, net.hidden);
  layer({z, nullptr, net.act, A(net.slope)}, net.w2, net.b2, u, gate, net.hidden, net.channels);
}

// gate = g(u), for a backward that kept u.
template <class A>
__global__ void __launch_bounds__(kThreads, kBlocks) gates_kernel(const Behind<A> u, A* gate, const int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  A v[1];
  u.get(i, 0, 1, v);
  store(gate + i, v[0]);
}
template <class A>
void gates(Stream stream, Act act, double slope, int64_t count, const A* u, A* gate) {
  launch(stream, gates_kernel<A>, blocks_for(count, kThreads), 0, Behind<A>{u, nullptr, act, A(slope)}, gate, count);
}

// dp (N, C) times factor; dh (N, H) is kept for the weights' gradients.
template <class A, class W>
void network_backward(Stream stream, const Network<W>& net, int64_t n, const A* z, const A* u, const A* dgate, A* dh,
                      A* dp, double factor) {
  const auto back = [&](const Behind<A>& in, const W* weight, A* out, double times, int64_t inputs, int64_t outputs) {
    launch(stream, dense_transposed_kernel<A, W>, blocks_for(n, kSamples<A>) * blocks_for(inputs, kWarp), 0, in, weight,
           out, A(times), int(n), int(inputs), int(outputs));
  };
  const Behind<A> du{dgate, u, net.gate, A(net.slope)};
  if (!net.w2) return back(du, net.w1, dp, factor, net.channels, net.channels);
  back(du, net.w2, dh, 1, net.hidden, net.channels);
  back({dh, z, net.act, A(net.slope)}, net.w1, dp, factor, net.channels, net.hidden);
}

// Gradients of the weights, of all samples together; those of absent biases are null.
template <class A, class W>
void network_weight_gradients(Stream stream, const Network<W>& net, int64_t n, const A* p, const A* z, const A* u,
                              const A* dgate, const A* dh, W* dw1, W* db1, W* dw2, W* db2) {
  const auto layer = [&](const Behind<A>& left, const Behind<A>& right, W* dweight, W* dbias, int64_t inputs,
                         int64_t outputs) {
    launch(stream, weight_gradient_kernel<A, W>, blocks_for(inputs * outputs, kThreads), 0, left, right, dweight, dbias,
           int(n), int(inputs), int(outputs));
  };
  const Behind<A> du{dgate, u, net.gate, A(net.slope)}, plain{p, nullptr, Act::identity, A(0)};
  if (!net.w2) return layer(du, plain, dw1, db1, net.channels, net.channels);
  layer(du, {z, nullptr, net.act, A(net.slope)}, dw2, db2, net.hidden, net.channels);
  layer({dh, z, net.act, A(net.slope)}, plain, dw1, db1, net.channels, net.hidden);
}

}  // namespace fa::cuda
