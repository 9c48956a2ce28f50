// channel_moments: mean, Σ (x − mean)², and where asked the maximum and the minimum of every plane with their first
// places, in one read of x. branch_moments: the first two of branches, side by side.
#define FA_KERNELS "cpu/channel_moments.kernels.h"
#include "cpu/branches.h"
#include "cpu/moments.h"
// moments.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

template <class T, bool Ends>
static void describe(const Map& x, const Described<Acc<T>>& out) {
  using A = Acc<T>;
  const int64_t c = x.c, n = x.n;
  if (!x.pixels) {
    parallel_for(0, n * c, grain(x.s),
                 [&](int64_t b, int64_t e) { FA_CALL(describe_planes, (T, Ends), x, Range{b, e}, out); });
    return;
  }
  const int64_t run = pixels_per_run(c), count = (x.s + run - 1) / run;
  const auto numbers = scratch<A>(n * count * c * PixelRuns<A>::per_channel(Ends)), shift = scratch<A>(n * c);
  const auto places = scratch<typename PixelRuns<A>::I>(Ends ? n * count * c * 2 : 0);
  const PixelRuns<A> runs{numbers.get(), places.get(), c, Ends};
  for (int64_t i = 0; i < n; ++i) FA_CALL(first_pixel, (T), x, i, shift.get() + i * c);
  parallel_for(0, n * count, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t s = i % count * run;
      FA_CALL(describe_pixels, (T, Ends), x, i / count, (Range{s, std::min(s + run, x.s)}), shift.get() + i / count * c,
              runs, i);
    }
  });
  parallel_for(0, n, grain(c * count), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) FA_CALL(merge_pixels, (T, Ends), x, i, run, count, shift.get() + i * c, runs, out);
  });
}

static std::tuple<Tensor, std::optional<Tensor>> described(const Tensor& x, bool extrema) {
  check_map(x);
  const Map map = maps_of({&x})[0];
  STD_TORCH_CHECK(map.s <= std::numeric_limits<int32_t>::max(), "plane too large");
  const int64_t nc = map.n * map.c;
  Tensor moments = new_dense({extrema ? 4 : 2, map.n, map.c}, acc_dtype(x.scalar_type()));
  std::optional<Tensor> index;
  if (extrema) index = new_dense({2, map.n, map.c}, ScalarType::Long);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* m = static_cast<Acc<T>*>(moments.data_ptr());
    auto* at = index ? static_cast<int64_t*>(index->data_ptr()) : nullptr;
    const Described<Acc<T>> out{m, m + nc, m + 2 * nc, m + 3 * nc, at, at + nc};
    if (extrema)
      describe<T, true>(map, out);
    else
      describe<T, false>(map, out);
  });
  return {moments, index};
}

std::tuple<Tensor, Tensor> channel_moments_cpu(const Tensor& x, bool extrema) {
  auto [moments, index] = described(x, extrema);
  return {moments, index ? *index : new_dense({0}, ScalarType::Long)};
}

Tensor channel_moments_infer_cpu(const Tensor& x, bool extrema) { return std::get<0>(described(x, extrema)); }

Tensor branch_moments_cpu(const Tensor& x, const OptTensor& x1, const OptTensor& x2, const OptTensor& x3,
                          const OptTensor& x4, const OptTensor& x5, const OptTensor& x6, const OptTensor& x7,
                          const std::string& merge_name) {
  check_map(x);
  const int64_t count = count_tensors(x, {&x1, &x2, &x3, &x4, &x5, &x6, &x7});
  const BranchMerge merge = branch_merge_of(merge_name);
  const auto maps =
      maps_of({&x, pointer(x1), pointer(x2), pointer(x3), pointer(x4), pointer(x5), pointer(x6), pointer(x7)});
  const int64_t n = maps[0].n, c = maps[0].c, nc = n * c;
  STD_TORCH_CHECK(maps[0].s <= std::numeric_limits<int32_t>::max(), "plane too large");
  Tensor moments = new_dense({2, n, count * c}, acc_dtype(x.scalar_type()));
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto own = scratch<A>(2 * nc);
    for (int64_t b = 0; b < count; ++b) {
      describe<T, false>(maps[b], {own.get(), own.get() + nc, nullptr, nullptr, nullptr, nullptr});
      put_slot<A>(own.get(), 2, n, c, slot_of(merge, b, count), count, static_cast<A*>(moments.data_ptr()));
    }
  });
  return moments;
}

}  // namespace fa

FA_REGISTER(channel_moments)
FA_REGISTER(branch_moments)
FA_REGISTER_INFER(channel_moments)
