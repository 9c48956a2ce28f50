// Sums over planes by the kernels in affine.kernels.h. Included after isa.h.
#pragma once

namespace fa {

template <class T, From F, Sums S>
static void affine_sums(const Affine<T>& in, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int64_t K = how_many(S);
  const Map& x = in.x;
  const int64_t c = x.c, n = x.n;
  if (!x.pixels) {
    parallel_for(0, n * c, grain(x.s),
                 [&](int64_t b, int64_t e) { FA_CALL(sum_planes, (T, F, S), in, Range{b, e}, sums); });
    return;
  }
  const int64_t run = pixels_per_run(c), runs = (x.s + run - 1) / run;
  const auto parts = scratch<A>(n * K * runs * c);  // of a sample: sum by sum, run by run
  parallel_for(0, n * runs, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t s = i % runs * run;
      FA_CALL(sum_pixels, (T, F, S), in, i / runs, (Range{s, std::min(s + run, x.s)}),
              parts.get() + (i / runs * K * runs + i % runs) * c, runs * c);
    }
  });
  parallel_for(0, n * K, grain(c * runs), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i)
      FA_CALL(add_in_order, (A), parts.get() + i * runs * c, runs, c, sums + (i % K * n + i / K) * c);
  });
}

}  // namespace fa
