// dual_scale's three passes: dpixel = Σ_c e·x·gate; dgate = Σ_s x·h; dx = gate·h + what pooling over pixels adds. And
// affine_pixel_scale, the last of the forward's where a norm comes before the gates.
#include "dual.h"

namespace fa {

static Pool plane_pool_of(const std::string& name) {
  const Pool kind = pool_of(name);
  STD_TORCH_CHECK(kind != Pool::mean_abs, "unknown pool ", name);
  return kind;
}

// What pooling over channels adds, per pixel, in arrays that live as long as this does.
template <class T>
struct Within {
  using A = Acc<T>;
  using I = typename Dual<T>::I;
  Within(const Map& x, const Tensor& dplanes, const Tensor& planes, const Tensor& index, const Tensor* shared,
         const std::string& pool, const std::string& ties)
      : kind(plane_pool_of(pool)), given(dplanes), tops(planes) {
    const int64_t p = kind == Pool::mean_max ? 2 : 1, size = x.n * x.s;
    STD_TORCH_CHECK(dplanes.numel() == p * size && dplanes.dim() >= 3, "wrong shape");
    if (kind != Pool::max) {
      mean = scratch<A>(size);
      for (int64_t n = 0; n < x.n; ++n)
        for (int64_t s = 0; s < x.s; ++s) mean[n * x.s + s] = given.get()[n * p * x.s + s] / A(x.c);
    }
    if (!has_max(kind)) return;
    most = scratch<A>(size);
    const auto at = [&](int64_t n, int64_t s) { return (n * p + p - 1) * x.s + s; };
    for (int64_t n = 0; n < x.n; ++n)
      for (int64_t s = 0; s < x.s; ++s) most[n * x.s + s] = given.get()[at(n, s)];
    if (!splits(ties)) {
      place = places_of<I>(index, x);
      return;
    }
    STD_TORCH_CHECK(planes.numel() == p * size, "wrong shape");
    top = scratch<A>(size);
    for (int64_t n = 0; n < x.n; ++n)
      for (int64_t s = 0; s < x.s; ++s) top[n * x.s + s] = tops.get()[at(n, s)];
    if (shared) {
      STD_TORCH_CHECK(shared->numel() == size, "wrong shape");
      const Dense<A> count(*shared);
      for (int64_t i = 0; i < size; ++i) most[i] /= count.get()[i];
    }
  }
  void into(Dual<T>& d) const {
    d.mean = mean.get(), d.place = place.get(), d.top = top.get();
    (top ? d.share : d.first) = most.get();
  }
  Pool kind;
  Dense<A> given, tops;
  std::unique_ptr<A[]> mean, most, top;
  std::unique_ptr<I[]> place;
};

// Centre and shift of a norm before the gates, (2, N, C), where there is one.
template <class A>
class Norm {
 public:
  Norm(const OptTensor& affine, const Tensor& x) {
    if (!affine) return;
    check_shape(*affine, {2, x.size(0), x.size(1)});
    given_ = Dense<A>(*affine), apart_ = x.size(0) * x.size(1);
  }
  Centred<A> get() const { return given_ ? Centred<A>{given_.get(), given_.get() + apart_} : Centred<A>{}; }

 private:
  Dense<A> given_;
  int64_t apart_ = 0;
};

static void check_pixel(const Tensor& pixel, const Map& x) { STD_TORCH_CHECK(pixel.numel() == x.n * x.s, "pixel"); }

static Tensor new_plane(const Tensor& pixel, ScalarType dtype) {
  int64_t sizes[16], strides[16], step = 1;
  const int64_t dim = pixel.dim();
  STD_TORCH_CHECK(dim <= 16, "too many dimensions");
  for (int64_t d = dim - 1; d >= 0; --d)
    sizes[d] = pixel.size(d), strides[d] = step, step *= std::max<int64_t>(sizes[d], 1);
  return new_strided(sizes, strides, dim, dtype);
}

std::tuple<Tensor, Tensor, Tensor> dual_scale_reduce_cpu(const Tensor& x, const Tensor& dy, const Tensor& gate,
                                                         const Tensor& pixel, const OptTensor& aux,
                                                         const Tensor& planes, const OptTensor& affine,
                                                         const std::string& act_name, double slope,
                                                         const std::string& pool, const std::string& ties,
                                                         bool residual) {
  check_map(x);
  check_same(x, dy);
  if (aux) check_same(x, *aux);
  check_shape(gate, {x.size(0), x.size(1)});
  const Act act = act_of(act_name);
  const Pool kind = plane_pool_of(pool);
  const bool keep = residual && act != Act::identity, split = splits(ties) && has_max(kind);
  Tensor kept = keep ? new_like(x) : none_like(x);
  const auto maps = maps_of({&x, &dy, aux ? &*aux : nullptr, keep ? &kept : nullptr});
  const Map& m = maps[0];
  check_pixel(pixel, m);
  const ScalarType acc = acc_dtype(x.scalar_type());
  Tensor dpixel = new_plane(pixel, acc), count = split ? new_plane(pixel, acc) : new_dense({0}, acc);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Dense<A> g(gate), q(pixel), values(planes);
    const Norm<A> of(affine, x);
    std::unique_ptr<A[]> top;
    if (split) {
      const int64_t p = kind == Pool::mean_max ? 2 : 1;
      STD_TORCH_CHECK(planes.numel() == p * m.n * m.s, "wrong shape");
      top = scratch<A>(m.n * m.s);
      for (int64_t n = 0; n < m.n; ++n) std::copy_n(values.get() + (n * p + p - 1) * m.s, m.s, top.get() + n * m.s);
    }
    Dual<T> d;
    d.x = m, d.dy = maps[1], d.aux = maps[2], d.kept = maps[3];
    d.gate = g.get(), d.pixel = q.get(), d.act = act, d.slope = A(slope), d.top = top.get(), d.of = of.get();
    d.dpixel = static_cast<A*>(dpixel.data_ptr());
    d.shared = split ? static_cast<A*>(count.data_ptr()) : nullptr;
    dual_sums<T>(d);
  });
  return {dpixel, kept, count};
}

std::tuple<Tensor, Tensor> dual_scale_gate_cpu(const Tensor& x, const Tensor& e, const Tensor& gate,
                                               const Tensor& pixel, const Tensor& dplanes, const Tensor& planes,
                                               const Tensor& places, const Tensor& shared, const Tensor& values,
                                               const OptTensor& affine, const std::string& act, double slope,
                                               const std::string& pool, const std::string& channel,
                                               const std::string& ties) {
  check_map(x);
  check_same(x, e);
  check_shape(gate, {x.size(0), x.size(1)});
  const bool split = splits(ties) && has_max(pool_of(channel));
  if (split) check_shape(values, {x.size(0), x.size(1)});
  const auto maps = maps_of({&x, &e});
  const Map& m = maps[0];
  check_pixel(pixel, m);
  const ScalarType acc = acc_dtype(x.scalar_type());
  Tensor dgate = affine ? new_dense({2, m.n, m.c}, acc) : new_dense({m.n, m.c}, acc);
  Tensor count = split ? new_dense({m.n, m.c}, acc) : new_dense({0}, acc);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Dense<A> g(gate), q(pixel), max(values);
    const Norm<A> of(affine, x);
    const Within<T> within(m, dplanes, planes, places, &shared, pool, ties);
    Dual<T> d;
    d.x = m, d.dy = maps[1], d.gate = g.get(), d.pixel = q.get(), d.act = act_of(act), d.slope = A(slope);
    d.of = of.get();
    within.into(d);
    d.dgate = static_cast<A*>(dgate.data_ptr());
    if (affine) d.dshift = d.dgate + m.n * m.c;
    if (split) d.back.max = max.get(), d.count = static_cast<A*>(count.data_ptr());
    dual_apply<T>(d);
  });
  return {dgate, count};
}

Tensor dual_scale_apply_cpu(const Tensor& x, const Tensor& e, const Tensor& gate, const Tensor& pixel,
                            const Tensor& dplanes, const Tensor& planes, const Tensor& places, const Tensor& shared,
                            const Tensor& dpooled, const Tensor& values, const Tensor& index, const Tensor& count,
                            const OptTensor& affine, const OptTensor& tilt, const std::string& act, double slope,
                            const std::string& pool, const std::string& channel, const std::string& ties) {
  check_map(x);
  check_same(x, e);
  check_shape(gate, {x.size(0), x.size(1)});
  const Pool kind = pool_of(channel);
  const bool two = kind == Pool::mean_max, split = splits(ties) && has_max(kind);
  if (two)
    check_shape(dpooled, {2, x.size(0), x.size(1)});
  else
    check_shape(dpooled, {x.size(0), x.size(1)});
  if (split) check_shape(values, {x.size(0), x.size(1)}), check_shape(count, {x.size(0), x.size(1)});
  if (tilt) check_shape(*tilt, {x.size(0), x.size(1)});
  STD_TORCH_CHECK(affine || !tilt, "tilt needs affine");
  Tensor dx = new_like(x);
  const auto maps = maps_of({&x, &e, &dx});
  const Map& m = maps[0];
  check_pixel(pixel, m);
  const Index at = has_max(kind) && !split ? Index(index, m.n, m.c, m.s) : Index();
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const int64_t nc = m.n * m.c;
    const Dense<A> g(gate), q(pixel), dp(dpooled), max(values), seen(count), slopes(tilt);
    const Norm<A> of(affine, x);
    const Within<T> within(m, dplanes, planes, places, &shared, pool, ties);
    Dual<T> d;
    d.x = m, d.dy = maps[1], d.dx = maps[2], d.gate = g.get(), d.pixel = q.get();
    d.act = act_of(act), d.slope = A(slope), d.of = of.get(), d.back.slope = slopes.get();
    within.into(d);
    const auto mean = scratch<A>(nc), share = scratch<A>(split ? nc : 0);
    const A* dmax = dp.get() + (two ? nc : 0);
    if (kind != Pool::max) {
      for (int64_t i = 0; i < nc; ++i) mean[i] = dp.get()[i] / A(m.s);
      (kind == Pool::mean_abs ? d.back.sign : d.back.add) = mean.get();
    }
    if (split) {
      for (int64_t i = 0; i < nc; ++i) share[i] = dmax[i] / seen.get()[i];
      d.back.share = share.get(), d.back.max = max.get();
    } else if (has_max(kind)) {
      d.back.first = dmax, d.back.index = at.get();
    }
    dual_apply<T>(d);
  });
  return dx;
}

Tensor affine_pixel_scale_cpu(const Tensor& x, const Tensor& gate, const Tensor& affine, const Tensor& pixel,
                              const OptTensor& residual, const std::string& act, double slope) {
  check_map(x);
  check_shape(gate, {x.size(0), x.size(1)});
  if (residual) check_same(x, *residual);
  Tensor y = new_like(x);
  const auto maps = maps_of({&x, &y, residual ? &*residual : nullptr});
  check_pixel(pixel, maps[0]);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Gates<Acc<T>> gates(gate, pixel, maps[0], Merge::product);
    const Norm<Acc<T>> of(affine, x);
    scale_both<T>(maps[0], maps[2], maps[1], gates, Merge::product, act_of(act), slope, {}, of.get());
  });
  return y;
}

std::tuple<Tensor, Tensor> spatial_pool_bwd_cpu(const Tensor& x, const OptTensor& gate, const Tensor& dplanes,
                                                const Tensor& planes, const Tensor& index, const std::string& pool,
                                                const std::string& ties) {
  check_map(x);
  if (gate) check_shape(*gate, {x.size(0), x.size(1)});
  const bool split = splits(ties) && has_max(plane_pool_of(pool));
  Tensor dx = new_like(x);
  const auto maps = maps_of({&x, &dx});
  const Map& m = maps[0];
  Tensor dgate = gate ? Tensor() : none_like(x);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto ones = scratch<A>(gate ? 0 : m.n * m.c), zeros = scratch<A>(m.n * m.s);
    if (!gate) std::fill_n(ones.get(), m.n * m.c, A(1));
    std::fill_n(zeros.get(), m.n * m.s, A(0));
    const Dense<A> given(gate);
    Within<T> within(m, dplanes, planes, index, nullptr, pool, ties);
    Dual<T> d;
    d.x = m, d.gate = gate ? given.get() : ones.get(), d.pixel = zeros.get();
    within.into(d);
    if (split) {
      const auto count = scratch<A>(m.n * m.s);
      count_top<T>(m, d.gate, d.top, count.get());
      for (int64_t i = 0; i < m.n * m.s; ++i) within.most[i] /= count[i];
    }
    d.dx = maps[1];
    if (gate) {
      Filled<A> sums(*gate);
      d.dgate = sums.get();
      dual_apply<T>(d);
      dgate = sums.done();
    } else {
      dual_apply<T>(d);
    }
  });
  return {dx, dgate};
}

}  // namespace fa

FA_REGISTER(affine_pixel_scale)
FA_REGISTER(dual_scale_reduce)
FA_REGISTER(dual_scale_gate)
FA_REGISTER(dual_scale_apply)
FA_REGISTER(spatial_pool_bwd)
