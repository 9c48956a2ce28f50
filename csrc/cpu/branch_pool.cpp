// branch_pool: p[n, c] = mean over s of the sum over branches, or p[n, b, c] of each branch; one read of each.
#include "branches.h"

namespace fa {

Tensor branch_pool_cpu(const Tensor& x, const OptTensor& x1, const OptTensor& x2, const OptTensor& x3,
                       const OptTensor& x4, const OptTensor& x5, const OptTensor& x6, const OptTensor& x7,
                       int64_t splits, bool each) {
  check_map(x);
  const int64_t tensors = count_tensors(x, {&x1, &x2, &x3, &x4, &x5, &x6, &x7});
  STD_TORCH_CHECK(splits >= 1 && splits <= kMostBranches && (tensors == 1 || splits == 1), "splits");
  STD_TORCH_CHECK(x.size(1) % splits == 0, "branches of different sizes");
  const int64_t count = std::max(tensors, splits);
  const auto maps =
      maps_of({&x, pointer(x1), pointer(x2), pointer(x3), pointer(x4), pointer(x5), pointer(x6), pointer(x7)});
  const int64_t n = maps[0].n, c = maps[0].c / splits;
  const ScalarType acc = acc_dtype(x.scalar_type());
  Tensor out = each ? new_dense({n, count, c}, acc) : new_dense({n, c}, acc);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    A* to = static_cast<A*>(out.data_ptr());
    if (count == 1 || (each && tensors == 1)) return pool<T>(maps[0], {0, n}, Pool::mean, to, nullptr, nullptr);
    // Means of the branches lie (tensor, n, inside, c); what is wanted is (n, branch, c) or their sum.
    const int64_t inside = splits, size = n * inside * c;
    const auto means = scratch<A>(tensors * size);
    for (int64_t t = 0; t < tensors; ++t)
      pool<T>(maps[t], {0, n}, Pool::mean, means.get() + t * size, nullptr, nullptr);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t b = 0; b < count; ++b) {
        const A* from = means.get() + (tensors == 1 ? (i * inside + b) * c : b * size + i * c);
        A* at = to + (each ? i * count + b : i) * c;
        for (int64_t k = 0; k < c; ++k) at[k] = each || b == 0 ? from[k] : at[k] + from[k];
      }
  });
  return out;
}

}  // namespace fa

FA_REGISTER(branch_pool)
