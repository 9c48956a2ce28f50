// The passes of scale and dual_scale that have a gate per pixel: forward, and the sums and dx of backward.
#define FA_KERNELS "cpu/dual.kernels.h"
#include "dual.h"
// dual.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

Merge merge_of(const std::string& name) {
  if (name == "product") return Merge::product;
  if (name == "sum") return Merge::sum;
  if (name == "sigmoid_product") return Merge::sigmoid_product;
  STD_TORCH_CHECK(name == "sigmoid_sum", "unknown merge ", name);
  return Merge::sigmoid_sum;
}

template <class A>
Gates<A>::Gates(const OptTensor& given_gate, const OptTensor& given_pixel, const Map& x, Merge merge)
    : given_gate_(given_gate), given_pixel_(given_pixel) {
  gate = given_gate_.get(), pixel = given_pixel_.get();
  if (gate && pixel) return;
  const int64_t size = x.n * (gate ? x.s : x.c);
  neutral_ = scratch<A>(size);
  const bool product = merge == Merge::product || merge == Merge::sigmoid_product;
  for (int64_t i = 0; i < size; ++i) neutral_[i] = A(product);
  (gate ? pixel : gate) = neutral_.get();
}
template struct Gates<float>;
template struct Gates<double>;

template <class I>
std::unique_ptr<I[]> places_of(const Tensor& index, const Map& x) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.is_contiguous() && index.is_cpu(),
                  "index must be contiguous int64");
  STD_TORCH_CHECK(index.numel() == x.n * x.s, "wrong shape");
  auto out = scratch<I>(x.n * x.s);
  const auto* from = static_cast<const int64_t*>(index.data_ptr());
  for (int64_t i = 0; i < x.n * x.s; ++i) {
    STD_TORCH_CHECK(from[i] >= 0 && from[i] < x.c, "index out of the channels");
    out[i] = I(from[i]);
  }
  return out;
}
template std::unique_ptr<int32_t[]> places_of(const Tensor&, const Map&);
template std::unique_ptr<int64_t[]> places_of(const Tensor&, const Map&);

template <class T>
void scale_both(const Map& x, const Map& residual, const Map& y, const Gates<Acc<T>>& gates, Merge merge, Act act,
                double slope, const Added<Acc<T>>& added, const Centred<Acc<T>>& of) {
  const int64_t rows = x.n * (x.pixels ? x.s : x.c), length = x.pixels ? x.c : x.s;
  parallel_for(0, rows, grain(length), [&](int64_t b, int64_t e) {
    FA_CALL(scale_rows, (T), x, residual, y, (Range{b, e}), gates.gate, gates.pixel, merge, act, Acc<T>(slope), added,
            of);
  });
}

template <class T, bool Sums>
static void dual(const Dual<T>& d) {
  using A = Acc<T>;
  const Map& x = d.x;
  const int64_t every = x.pixels ? x.s : x.c, columns = x.pixels ? x.c : x.s, chunk = rows_per_chunk(x);
  const int64_t parts = (every + chunk - 1) / chunk;
  A* total = x.pixels ? d.dgate : d.dpixel;
  A* seen = x.pixels ? d.count : d.shared;
  A* moved = x.pixels ? d.dshift : nullptr;
  const bool one = parts == 1;  // then the sums are written where they belong
  const auto totals = scratch<A>(total && !one ? x.n * parts * columns : 0);
  const auto counts = scratch<A>(seen && !one ? x.n * parts * columns : 0);
  const auto moves = scratch<A>(moved && !one ? x.n * parts * columns : 0);
  parallel_for(0, x.n * parts, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t n = i / parts, first = i % parts * chunk;
      const Range rows{first, std::min(first + chunk, every)};
      A* to = total ? (one ? total : totals.get()) + i * columns : nullptr;
      A* counted = seen ? (one ? seen : counts.get()) + i * columns : nullptr;
      A* shifted = moved ? (one ? moved : moves.get()) + i * columns : nullptr;
      constexpr bool S = Sums;
      if (x.pixels)
        FA_CALL(dual_pass, (T, S, false), d, n, rows, to, counted, shifted);
      else
        FA_CALL(dual_pass, (T, S, true), d, n, rows, to, counted, shifted);
    }
  });
  if (one) return;
  for (int64_t n = 0; n < x.n; ++n) {
    if (total) add_runs(totals.get() + n * parts * columns, parts, columns, total + n * columns);
    if (seen) add_runs(counts.get() + n * parts * columns, parts, columns, seen + n * columns);
    if (moved) add_runs(moves.get() + n * parts * columns, parts, columns, moved + n * columns);
  }
}
template <class T>
void dual_sums(const Dual<T>& d) {
  dual<T, true>(d);
}
template <class T>
void dual_apply(const Dual<T>& d) {
  dual<T, false>(d);
}

#define FA_INSTANTIATE(T)                                                                                   \
  template void scale_both<T>(const Map&, const Map&, const Map&, const Gates<Acc<T>>&, Merge, Act, double, \
                              const Added<Acc<T>>&, const Centred<Acc<T>>&);                                \
  template void dual_sums<T>(const Dual<T>&);                                                               \
  template void dual_apply<T>(const Dual<T>&);
FA_INSTANTIATE(float)
FA_INSTANTIATE(double)
FA_INSTANTIATE(BFloat16)
FA_INSTANTIATE(Half)

}  // namespace fa
