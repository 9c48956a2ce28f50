// plane_conv: y[n, h, w] = b + Σ_p Σ_i Σ_j weight[p, i, j]·q[n, p, h + i − K/2, w + j − L/2], and its gradients.
//
// Planes are taken in blocks of rows, copied with the zeros around them. Blocks don't depend on the number of threads,
// and their sums are added in order.
#define FA_KERNELS "cpu/plane_conv.kernels.h"
#include "common.h"
// common.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

static constexpr int64_t kRows = 32;

struct Planes {
  Planes(const Tensor& planes, const Tensor& weight, const OptTensor& bias) {
    STD_TORCH_CHECK(planes.dim() == 4 && weight.dim() == 4, "planes (N, P, H, W) and weight (1, P, K, L)");
    n = planes.size(0), p = planes.size(1), h = planes.size(2), w = planes.size(3);
    k = weight.size(2), l = weight.size(3);
    STD_TORCH_CHECK(p > 0 && h > 0 && w > 0 && weight.size(0) == 1 && weight.size(1) == p && k % 2 && l % 2, "shape");
    if (bias) check_shape(*bias, {1});
    blocks = (h + kRows - 1) / kRows;
    const int64_t lanes = 16, across = (w + lanes - 1) / lanes * lanes;
    pitch = across + l - 1;
    size = (kRows + k - 1) * pitch;
  }
  int64_t rows_of(int64_t block) const { return std::min(kRows, h - block * kRows); }
  int64_t n, p, h, w, k, l, blocks, pitch, size;
};

// The window around a block of every plane of `count` side by side.
template <class A>
static void windows_of(const Planes& d, const A* planes, int64_t count, int64_t block, A* out) {
  const int64_t rows = (d.rows_of(block) + 3) / 4 * 4 + d.k - 1, first = block * kRows - d.k / 2;
  for (int64_t p = 0; p < count; ++p)
    FA_CALL(plane_window, (A), planes + p * d.h * d.w, d.h, d.w, first, rows, d.l / 2, d.pitch, out + p * d.size);
}

static Tensor new_plane(const Planes& d, int64_t count, ScalarType dtype) {
  return new_dense({d.n, count, d.h, d.w}, dtype);
}

Tensor plane_conv_cpu(const Tensor& planes, const Tensor& weight, const OptTensor& bias) {
  const Planes d(planes, weight, bias);
  Tensor y = new_plane(d, 1, acc_dtype(planes.scalar_type()));
  by_dtype(y.scalar_type(), [&](auto tag) {
    using A = Acc<typename decltype(tag)::type>;
    const Dense<A> q(planes), f(weight), given(bias);
    A* out = static_cast<A*>(y.data_ptr());
    const A b = given ? *given.get() : A(0);
    parallel_for(0, d.n * d.blocks, grain(d.size * d.p * d.k), [&](int64_t begin, int64_t end) {
      const auto windows = scratch<A>(d.p * d.size);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / d.blocks, block = i % d.blocks;
        windows_of(d, q.get() + n * d.p * d.h * d.w, d.p, block, windows.get());
        FA_CALL(plane_conv_rows, (A), windows.get(), d.p, d.size, d.pitch, f.get(), d.k, d.l, b, d.rows_of(block), d.w,
                out + (n * d.h + block * kRows) * d.w);
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> plane_conv_bwd_cpu(const Tensor& planes, const Tensor& dy, const Tensor& weight,
                                                      const OptTensor& bias) {
  const Planes d(planes, weight, bias);
  check_shape(dy, {d.n, 1, d.h, d.w});
  Tensor dplanes, dweight, dbias = none_like(planes);
  by_dtype(acc_dtype(planes.scalar_type()), [&](auto tag) {
    using A = Acc<typename decltype(tag)::type>;
    const Dense<A> q(planes), f(weight), e(dy);
    const int64_t taps = d.k * d.l, weights = d.p * taps, plane = d.h * d.w, items = d.n * d.blocks;
    const auto flipped = scratch<A>(weights), sums = scratch<A>(items * weights);
    for (int64_t p = 0; p < d.p; ++p)
      for (int64_t i = 0; i < taps; ++i) flipped[p * taps + i] = f.get()[p * taps + taps - 1 - i];
    Filled<A> to_planes(planes);
    A* const dense = to_planes.get();
    parallel_for(0, items, grain(2 * d.size * d.p * d.k), [&](int64_t begin, int64_t end) {
      const auto windows = scratch<A>(d.p * d.size), around = scratch<A>(d.size);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / d.blocks, block = i % d.blocks, rows = d.rows_of(block);
        windows_of(d, q.get() + n * d.p * plane, d.p, block, windows.get());
        windows_of(d, e.get() + n * plane, 1, block, around.get());
        for (int64_t p = 0; p < d.p; ++p)
          FA_CALL(plane_conv_rows, (A), around.get(), 1, d.size, d.pitch, flipped.get() + p * taps, d.k, d.l, A(0),
                  rows, d.w, dense + (n * d.p + p) * plane + block * kRows * d.w);
        FA_CALL(plane_conv_weight_sums, (A), windows.get(), d.p, d.size, d.pitch,
                around.get() + d.k / 2 * d.pitch + d.l / 2, d.k, d.l, rows, d.w, sums.get() + i * weights);
      }
    });
    Filled<A> to_weight(weight);
    for (int64_t j = 0; j < weights; ++j) {
      double total = 0;
      for (int64_t i = 0; i < items; ++i) total += sums[i * weights + j];
      to_weight.get()[j] = A(total);
    }
    dweight = to_weight.done();
    dplanes = to_planes.done();
    if (bias) {
      double total[4] = {0, 0, 0, 0};
      const int64_t all = d.n * plane;
      int64_t i = 0;
      for (; i + 4 <= all; i += 4)
        for (int j = 0; j < 4; ++j) total[j] += e.get()[i + j];
      for (; i < all; ++i) total[0] += e.get()[i];
      Filled<A> to_bias(*bias);
      *to_bias.get() = A((total[0] + total[1]) + (total[2] + total[3]));
      dbias = to_bias.done();
    }
  });
  return {dplanes, dweight, dbias};
}

}  // namespace fa

FA_REGISTER(plane_conv)
FA_REGISTER(plane_conv_bwd)
