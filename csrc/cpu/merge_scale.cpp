// merge_scale's passes: both gates' sums without dx; dx with all that is added to it; sums of x itself, weighted.
#include "dual.h"

namespace fa {

static void check_pixel(const Tensor& pixel, const Map& x) { STD_TORCH_CHECK(pixel.numel() == x.n * x.s, "pixel"); }

static Tensor plane_like(const Tensor& pixel, ScalarType dtype) {
  int64_t sizes[16], strides[16], step = 1;
  const int64_t dim = pixel.dim();
  STD_TORCH_CHECK(dim <= 16, "too many dimensions");
  for (int64_t d = dim - 1; d >= 0; --d) {
    sizes[d] = pixel.size(d), strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return new_strided(sizes, strides, dim, dtype);
}

// x: null for ones
static std::tuple<Tensor, Tensor> sums(const Tensor* x, const Tensor& dy, const Tensor& gate, const Tensor& pixel,
                                       Merge merge) {
  check_map(dy);
  if (x) check_same(dy, *x);
  check_shape(gate, {dy.size(0), dy.size(1)});
  const auto maps = maps_of({&dy, x});
  const Map& m = maps[0];
  check_pixel(pixel, m);
  const ScalarType acc = acc_dtype(dy.scalar_type());
  Tensor dgate = new_dense({m.n, m.c}, acc), dpixel = plane_like(pixel, acc);
  by_dtype(dy.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Dense<A> g(gate), p(pixel);
    Dual<T> d;
    d.x = x ? maps[1] : m, d.dy = m, d.ones = !x, d.gate = g.get(), d.pixel = p.get(), d.merge = merge;
    d.dgate = static_cast<A*>(dgate.data_ptr()), d.dpixel = static_cast<A*>(dpixel.data_ptr());
    dual_sums<T>(d);
  });
  return {dgate, dpixel};
}

std::tuple<Tensor, Tensor> merge_scale_reduce_cpu(const Tensor& x, const Tensor& dy, const Tensor& gate,
                                                  const Tensor& pixel, const std::string& merge) {
  return sums(&x, dy, gate, pixel, merge_of(merge));
}

std::tuple<Tensor, Tensor> project_cpu(const Tensor& x, const Tensor& gate, const Tensor& pixel) {
  return sums(nullptr, x, gate, pixel, Merge::product);
}

Tensor merge_scale_apply_cpu(const Tensor& dy, const OptTensor& other, const Tensor& gate, const Tensor& pixel,
                             const Tensor& dmean, const OptTensor& weight, const OptTensor& dplane,
                             const std::string& merge_name) {
  check_map(dy);
  if (other) check_same(dy, *other);
  check_shape(gate, {dy.size(0), dy.size(1)}), check_shape(dmean, {dy.size(0), dy.size(1)});
  if (weight) check_shape(*weight, {dy.size(1)});
  STD_TORCH_CHECK(weight.has_value() == dplane.has_value(), "weight and dplane come together");
  Tensor dx = new_like(dy);
  const auto maps = maps_of({&dy, &dx, other ? &*other : nullptr});
  const Map& m = maps[0];
  check_pixel(pixel, m);
  if (dplane) check_pixel(*dplane, m);
  const Merge merge = merge_of(merge_name);
  by_dtype(dy.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Gates<A> gates(gate, pixel, m, merge);
    const Dense<A> mean(dmean), w(weight), plane(dplane);
    const auto add = scratch<A>(m.n * m.c);
    for (int64_t i = 0; i < m.n * m.c; ++i) add[i] = mean.get()[i] / A(m.s);
    scale_both<T>(m, maps[2], maps[1], gates, merge, Act::identity, 0, {add.get(), w.get(), plane.get()});
  });
  return dx;
}

}  // namespace fa

FA_REGISTER(merge_scale_reduce)
FA_REGISTER(merge_scale_apply)
FA_REGISTER(project)
