// batch_affine: scale = γ·r, shift = scale·(m − μ) + β out of the moments of every plane; and its gradient. Small
// arrays, read in rows of channels; what is summed over samples is summed in double.
#include <cmath>

#include "common.h"

namespace fa {
namespace {

template <class A>
void forward(const A* m, const A* m2, int64_t n, int64_t c, const A* weight, const A* bias, int64_t size, double eps,
             A* both, A* statistics) {
  const auto mu = scratch<double>(c), total = scratch<double>(c);
  for (int64_t k = 0; k < c; ++k) mu[k] = total[k] = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < c; ++k) mu[k] += m[i * c + k];
  for (int64_t k = 0; k < c; ++k) mu[k] /= double(n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < c; ++k) {
      const double d = m[i * c + k] - mu[k];
      total[k] += double(m2[i * c + k]) / double(size) + d * d;
    }
  A *const scale = both, *const shift = both + n * c;
  for (int64_t k = 0; k < c; ++k) {
    const double var = total[k] / double(n), r = 1 / std::sqrt(var + eps);
    statistics[k] = A(mu[k]);
    statistics[c + k] = A(var);
    total[k] = weight ? r * double(weight[k]) : r;
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < c; ++k) {
      scale[i * c + k] = A(total[k]);
      shift[i * c + k] = A(total[k] * (m[i * c + k] - mu[k]) + (bias ? double(bias[k]) : 0.0));
    }
}

template <class A>
void backward(const A* m, const A* dboth, const A* statistics, const A* weight, int64_t n, int64_t c, int64_t size,
              double eps, A* dmoments, A* dnorm) {
  const A *const dscale = dboth, *const dshift = dboth + n * c, *const mu = statistics;
  const auto t = scratch<double>(c), dbias = scratch<double>(c), a = scratch<double>(c);
  for (int64_t k = 0; k < c; ++k) t[k] = dbias[k] = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < c; ++k) {
      const double ds = dshift[i * c + k];
      t[k] += double(dscale[i * c + k]) + ds * (double(m[i * c + k]) - double(mu[k]));
      dbias[k] += ds;
    }
  for (int64_t k = 0; k < c; ++k) {
    const double r = 1 / std::sqrt(double(statistics[c + k]) + eps);
    dnorm[k] = A(r * t[k]);
    dnorm[c + k] = A(dbias[k]);
    a[k] = weight ? r * double(weight[k]) : r;
    t[k] *= -0.5 * r * r * a[k];  // dvar
    dbias[k] /= double(n);
  }
  const double each = 2 / double(n), spread = 1 / (double(n) * double(size));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < c; ++k) {
      const double d = double(m[i * c + k]) - double(mu[k]);
      dmoments[i * c + k] = A(a[k] * (double(dshift[i * c + k]) - dbias[k]) + each * t[k] * d);
      dmoments[(n + i) * c + k] = A(t[k] * spread);
    }
}

template <class F>
void by_acc(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Double)
    f(double());
  else
    f(float());
}

}  // namespace

std::tuple<Tensor, Tensor> batch_affine_cpu(const Tensor& moments, const OptTensor& weight, const OptTensor& bias,
                                            int64_t size, double eps) {
  const ScalarType dtype = acc_dtype(moments.scalar_type());
  STD_TORCH_CHECK(moments.dim() == 3 && moments.size(0) == 2 && size > 0 && moments.is_cpu(), "moments");
  const int64_t n = moments.size(1), c = moments.size(2);
  if (weight) check_shape(*weight, {c});
  if (bias) check_shape(*bias, {c});
  Tensor both = new_dense({2, n, c}, dtype), statistics = new_dense({2, c}, dtype);
  by_acc(dtype, [&](auto zero) {
    using A = decltype(zero);
    const Dense<A> m(moments), w(weight), b(bias);
    forward<A>(m.get(), m.get() + n * c, n, c, w.get(), b.get(), size, eps, static_cast<A*>(both.data_ptr()),
               static_cast<A*>(statistics.data_ptr()));
  });
  return {both, statistics};
}

std::tuple<Tensor, Tensor> batch_affine_bwd_cpu(const Tensor& moments, const Tensor& dboth, const Tensor& statistics,
                                                const OptTensor& weight, int64_t size, double eps) {
  const ScalarType dtype = acc_dtype(moments.scalar_type());
  STD_TORCH_CHECK(moments.dim() == 3 && moments.size(0) == 2 && size > 0 && moments.is_cpu(), "moments");
  const int64_t n = moments.size(1), c = moments.size(2);
  check_shape(dboth, {2, n, c});
  check_shape(statistics, {2, c});
  if (weight) check_shape(*weight, {c});
  Tensor dnorm = new_dense({2, c}, dtype), dmoments;
  by_acc(dtype, [&](auto zero) {
    using A = decltype(zero);
    const Dense<A> m(moments), g(dboth), s(statistics), w(weight);
    Filled<A> dm(moments);
    backward<A>(m.get(), g.get(), s.get(), w.get(), n, c, size, eps, dm.get(), static_cast<A*>(dnorm.data_ptr()));
    dmoments = dm.done();
  });
  return {dmoments, dnorm};
}

}  // namespace fa

FA_REGISTER(batch_affine)
FA_REGISTER(batch_affine_bwd)
