// Squeeze-and-excitation as launches (fused_attn/ops/pool_mlp_scale.py, norm "none", the mean alone):
//
//   forward    p = mean_s x | z, u, gate | y = epilogue(x·gate + residual)                             2R + 1W
//   backward   dgate = Σ_s e·x (e is written where a residual wants it) | dp, dh | dx = e·gate + dp/S   3R + 1W
//
// Samples go through in groups whose maps stay in the second-level cache (50 MB on Hopper, 40 on Ampere), so that the
// second read doesn't come from memory. Weights' gradients need all samples and come last.
#pragma once

#include "dense.cuh"
#include "scale.cuh"
#include "sums.cuh"

namespace fa::cuda {

constexpr int64_t kGroupBytes = 16 << 20;  // of all maps that a group reads, unless the caller says otherwise

// Whole samples, as many as start on 16 bytes again: a group is cut by shape alone.
template <class T>
int64_t samples_per_group(const Shape& x, int maps, int64_t bytes) {
  const int64_t sample = x.c * x.s * int64_t(sizeof(T)) * maps;
  return std::max<int64_t>(kWide<T>, bytes / sample / kWide<T> * kWide<T>);
}

template <class T, class W>
struct ExciteForward {
  Shape shape;
  const T *x, *residual;
  T* y;
  Network<W> network;
  Acc<T>*p, *z, *u, *gate;  // (N, C) (N, H) (N, C) (N, C)
  Act epilogue;
  double slope;
  Acc<T>* work;  // workspace_of(shape)
  int64_t group_bytes = kGroupBytes;
};

template <class T, class W>
void excite_forward(Stream stream, const ExciteForward<T, W>& a) {
  const int64_t c = a.shape.c, h = a.network.inner(), size = c * a.shape.s;
  const int64_t group = samples_per_group<T>(a.shape, 1, a.group_bytes);
  for (int64_t n = 0; n < a.shape.n; n += group) {
    const Shape part{std::min(group, a.shape.n - n), c, a.shape.s, a.shape.pixels};
    const T *x = a.x + n * size, *residual = a.residual ? a.residual + n * size : nullptr;
    Acc<T>*p = a.p + n * c, *u = a.u + n * c, *gate = a.gate + n * c;
    pool<T>(stream, part, Pool::mean, x, p, nullptr, nullptr, a.work, nullptr);
    network_forward<Acc<T>, W>(stream, a.network, part.n, p, a.z + n * h, u, gate);
    scale<T>(stream, part, x, gate, nullptr, residual, a.y + n * size, Merge::product, a.epilogue, a.slope);
  }
}

template <class T, class W>
struct ExciteBackward {
  Shape shape;
  const T *x, *dy, *aux;  // aux: the output or the residual, where the epilogue's derivative needs it
  T *dx, *kept;           // kept: e, the residual's gradient where there is an activation behind it; else null
  Network<W> network;
  const Acc<T>*p, *z, *u;
  Acc<T>*gate, *dgate, *dh, *dp;  // scratch: (N, C) (N, C) (N, H) (N, C)
  W *dw1, *db1, *dw2, *db2;
  Act epilogue;
  double slope;
  bool residual;
  Acc<T>* work;
  int64_t group_bytes = kGroupBytes;
};

template <class T, class W>
void excite_backward(Stream stream, const ExciteBackward<T, W>& a) {
  using A = Acc<T>;
  const int64_t c = a.shape.c, h = a.network.inner(), size = c * a.shape.s;
  const int64_t group = samples_per_group<T>(a.shape, 2, a.group_bytes);
  gates<A>(stream, a.network.gate, a.network.slope, a.shape.n * c, a.u, a.gate);
  for (int64_t n = 0; n < a.shape.n; n += group) {
    const Shape part{std::min(group, a.shape.n - n), c, a.shape.s, a.shape.pixels};
    const auto at = [&](auto* map) { return map ? map + n * size : nullptr; };
    A *gate = a.gate + n * c, *dgate = a.dgate + n * c, *dp = a.dp + n * c;
    gate_gradient<T>(stream, part, at(a.x), at(a.dy), at(a.aux), gate, a.epilogue, a.slope, at(a.kept),
                     static_cast<T*>(nullptr), dgate, a.work);
    network_backward<A, W>(stream, a.network, part.n, a.z + n * h, a.u + n * c, dgate, a.dh + n * h, dp,
                           1 / double(a.shape.s));
    // With a residual the epilogue's derivative was taken above; without one it is taken again, from x·gate.
    spread<T>(stream, part, at(a.x), a.kept ? at(a.kept) : at(a.dy), gate, dp, at(a.dx),
              a.residual ? Act::identity : a.epilogue, a.slope);
  }
  network_weight_gradients<A, W>(stream, a.network, a.shape.n, a.p, a.z, a.u, a.dgate, a.dh, a.dw1, a.db1, a.dw2,
                                 a.db2);
}

}  // namespace fa::cuda
