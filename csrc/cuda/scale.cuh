// y = act(x·f + residual), one read of x and of the residual and one write; and the gradient's last pass
// dx = e·gate + add, e = dy·act'(x·gate).
//
// A map is walked as one array, 16 bytes at a time whatever S and C are: a wide access may cross from one row into the
// next, and the gate changes in the middle of it. Planes have a gate per row (`outer`, the channel's) and may have one
// per place in the row (`inner`, the pixel's); in pixels the two change places.
#pragma once

#include "activations.cuh"

namespace fa::cuda {

enum class Merge { product, sum, sigmoid_product, sigmoid_sum };

template <class A>
FA_DEVICE A merged(Merge merge, A outer, A inner) {
  const A both = merge == Merge::product || merge == Merge::sigmoid_product ? outer * inner : outer + inner;
  return merge == Merge::sigmoid_product || merge == Merge::sigmoid_sum ? A(1) + sigmoid(both) : both;
}

// Wide accesses per thread, all under way before the first is used: 16 KiB a block.
constexpr int kAhead = 4;

template <class T>
struct ScaleArgs {
  Rows rows;
  const T *x, *residual;
  T* y;
  const Acc<T>*outer, *inner;  // (N·per) and (N, length); one of the two may be missing
  Merge merge;
  Act act;
  Acc<T> slope;

  // What a missing gate stands for in the merge: 1 in a product, 0 in a sum.
  FA_DEVICE Acc<T> nothing() const { return merge == Merge::product || merge == Merge::sigmoid_product ? 1 : 0; }
};

// Plain: one gate per row, and nothing but relu behind it.
template <bool Plain, class T, int V>
FA_DEVICE void scale_at(const ScaleArgs<T>& a, Place p, int64_t e, const Pack<T, V>& x, const Pack<T, V>& residual) {
  using A = Acc<T>;
  A v[V], outer = a.nothing();
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if ((Plain || a.outer) && (j == 0 || p.at == 0)) outer = load(a.outer + p.row);
    A f = outer;
    if constexpr (!Plain)
      f = merged(a.merge, outer, a.inner ? load(a.inner + p.sample * a.rows.length + p.at) : a.nothing());
    v[j] = widen(x.v[j]) * f;
    if (a.residual) v[j] += widen(residual.v[j]);
    if (j + 1 < V) p.next(a.rows);
  }
  activate_all<Plain>(a.act, v, a.slope);
  Pack<T, V> y;
#pragma unroll
  for (int j = 0; j < V; ++j) y.v[j] = narrow<T>(v[j]);
  store<V>(a.y + e, y);
}

template <class T, int V, bool Plain>
__global__ void __launch_bounds__(kThreads, kBlocks) scale_kernel(const ScaleArgs<T> a) {
  constexpr int tile = kThreads * V * kAhead;
  const int64_t first = int64_t(blockIdx.x) * tile;
  const Place start(a.rows, first);
  const int mine = int(threadIdx.x) * V;
  const int left = int(a.rows.total - first < tile ? a.rows.total - first : tile);
  if (Plain && left == tile) {
    Pack<T, V> x[kAhead], residual[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t e = first + mine + k * kThreads * V;
      x[k] = load<V>(a.x + e);
      if (a.residual) residual[k] = load<V>(a.residual + e);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int step = mine + k * kThreads * V;
      scale_at<Plain, T, V>(a, start.ahead(a.rows, step), first + step, x[k], residual[k]);
    }
    return;
  }
#pragma unroll 1
  for (int step = mine; step < left; step += kThreads * V) {
    if (step + V <= left) {
      const int64_t e = first + step;
      const Pack<T, V> x = load<V>(a.x + e);
      scale_at<Plain, T, V>(a, start.ahead(a.rows, step), e, x, a.residual ? load<V>(a.residual + e) : x);
    } else {  // the end of the map
#pragma unroll 1
      for (int64_t e = first + step; e < a.rows.total; ++e) {
        const Pack<T, 1> x = load<1>(a.x + e);
        scale_at<Plain, T, 1>(a, start.ahead(a.rows, int(e - first)), e, x, a.residual ? load<1>(a.residual + e) : x);
      }
    }
  }
}

// channel (N, C), pixel (N, S): one of them may be null.
template <class T>
void scale(Stream stream, const Shape& shape, const T* x, const Acc<T>* channel, const Acc<T>* pixel, const T* residual,
           T* y, Merge merge, Act act, double slope) {
  const ScaleArgs<T> args{
      Rows(shape), x,   residual,     y, shape.pixels ? pixel : channel, shape.pixels ? channel : pixel,
      merge,       act, Acc<T>(slope)};
  const bool plain = !args.inner && (merge == Merge::product || merge == Merge::sum) && is_plain(act);
  by_width<T>({x, residual, y}, [&](auto width) {
    constexpr int V = decltype(width)::value;
    launch(stream, plain ? scale_kernel<T, V, true> : scale_kernel<T, V, false>,
           blocks_for(shape.total(), kThreads * V * kAhead), 0, args);
  });
}

// ---- dx = e·gate + add
template <class T>
struct SpreadArgs {
  Rows rows;
  bool pixels;
  const T *x, *dy;  // x is null where nothing is asked of it: the activation is the identity
  T* dx;
  const Acc<T>*gate, *add;  // (N, C)
  Act act;
  Acc<T> slope;
};

template <bool Plain, class T, int V>
FA_DEVICE void spread_at(const SpreadArgs<T>& a, Place p, int64_t e) {
  using A = Acc<T>;
  const Pack<T, V> dy = load<V>(a.dy + e);
  Pack<T, V> dx, x = dy;
  if (a.x) x = load<V>(a.x + e);
  A d[V], v[V], gate[V], add[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (a.pixels || j == 0 || p.at == 0) {
      const int64_t channel = a.pixels ? p.sample * a.rows.length + p.at : p.row;
      gate[j] = load(a.gate + channel);
      add[j] = load(a.add + channel);
    } else {
      gate[j] = gate[j - 1];
      add[j] = add[j - 1];
    }
    d[j] = widen(dy.v[j]);
    v[j] = widen(x.v[j]) * gate[j];
    if (j + 1 < V) p.next(a.rows);
  }
  through_all<Plain>(a.act, d, v, a.slope);
#pragma unroll
  for (int j = 0; j < V; ++j) dx.v[j] = narrow<T>(d[j] * gate[j] + add[j]);
  store<V>(a.dx + e, dx);
}

template <class T, int V, bool Plain>
__global__ void __launch_bounds__(kThreads, kBlocks) spread_kernel(const SpreadArgs<T> a) {
  constexpr int tile = kThreads * V * kAhead;
  const int64_t first = int64_t(blockIdx.x) * tile;
  const Place start(a.rows, first);
  const int left = int(a.rows.total - first < tile ? a.rows.total - first : tile);
#pragma unroll(Plain ? kAhead : 1)
  for (int k = 0; k < kAhead; ++k) {
    const int step = (int(threadIdx.x) + k * kThreads) * V;
    if (step + V <= left) {
      spread_at<Plain, T, V>(a, start.ahead(a.rows, step), first + step);
    } else {
#pragma unroll 1
      for (int s = step; s < left; ++s) spread_at<Plain, T, 1>(a, start.ahead(a.rows, s), first + s);
    }
  }
}

template <class T>
void spread(Stream stream, const Shape& shape, const T* x, const T* dy, const Acc<T>* gate, const Acc<T>* add, T* dx,
            Act act, double slope) {
  const SpreadArgs<T> args{Rows(shape), shape.pixels, act == Act::identity ? nullptr : x, dy, dx, gate, add,
                           act,         Acc<T>(slope)};
  by_width<T>({args.x, dy, dx}, [&](auto width) {
    constexpr int V = decltype(width)::value;
    launch(stream, is_plain(act) ? spread_kernel<T, V, true> : spread_kernel<T, V, false>,
           blocks_for(shape.total(), kThreads * V * kAhead), 0, args);
  });
}

}  // namespace fa::cuda
