// Stages with a value per pixel beside the one per channel. Arrays over (n, s) are dense, as those over (n, c) are.
//
// Maps are walked by rows: of planes a row is a channel and a column a pixel, of pixels the other way round. A sum over
// a row stays in registers; a sum over a column is kept in an array of one chunk of rows, and the chunks' arrays are
// added in order, so the bits don't depend on the number of threads.
//
// Where a map is centred, gate·(x − centre) + shift stands for x·gate (Centred): a norm before the gates.
#pragma once

#include "stages.h"

namespace fa {

// Two arrays over (n, c), both there or neither.
template <class A>
struct Centred {
  const A *centre = nullptr, *shift = nullptr;
};

enum class Merge { product, sum, sigmoid_product, sigmoid_sum };
Merge merge_of(const std::string& name);

// Both gates, where the one that is missing changes nothing.
template <class A>
struct Gates {
  Gates(const OptTensor& gate, const OptTensor& pixel, const Map& x, Merge merge);
  const A *gate, *pixel;

 private:
  Dense<A> given_gate_, given_pixel_;
  std::unique_ptr<A[]> neutral_;
};

// Rows in a chunk: enough that its array of column sums is small beside it.
inline int64_t rows_per_chunk(const Map& x) {
  if (x.pixels) return pixels_per_run(x.c);
  return std::max<int64_t>(16, 65536 / x.s / 4 * 4);
}

// One pass over x and dy. A map without data and a null pointer stand for what a call doesn't have.
template <class T>
struct Dual {
  using A = Acc<T>;
  using I = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
  Map x, dy, aux, kept, dx;
  const A *gate = nullptr, *pixel = nullptr;
  Merge merge = Merge::product;
  Act act = Act::identity;
  A slope = 0;
  // what pooling over channels adds to the gradient of x·gate, per pixel: the mean's; the maximum's divided among ties,
  // and where it is; or all of it at one channel
  const A *mean = nullptr, *share = nullptr, *top = nullptr, *first = nullptr;
  const I* place = nullptr;
  Centred<A> of;                          // then of a product of gates, dgate with the shift's dshift
  Spread<A> back;                         // what pooling over pixels adds to dx; slope is of x − of.centre
  bool ones = false;                      // of sums: x is 1 everywhere, and not read
  A *dgate = nullptr, *dpixel = nullptr;  // sums, with
  A *count = nullptr, *shared = nullptr;  // how often x is back.max, per channel; x·gate is top, per pixel
  A* dshift = nullptr;
};

// Sums: dgate, dpixel, shared; writes e to kept and e·f to dx where they have data.
template <class T>
void dual_sums(const Dual<T>& d);
// dx with all that pooling adds to it, and the sums of it that are wanted: dgate, count.
template <class T>
void dual_apply(const Dual<T>& d);

// Added before the activation: one value per channel, and the product of one per channel and one per pixel.
template <class A>
struct Added {
  const A *channel = nullptr, *weight = nullptr, *plane = nullptr;  // (N, C), (C,), (N, S); any may be null
};

// y = act(x·f + residual + added).
template <class T>
void scale_both(const Map& x, const Map& residual, const Map& y, const Gates<Acc<T>>& gates, Merge merge, Act act,
                double slope, const Added<Acc<T>>& added = {}, const Centred<Acc<T>>& of = {});

// How often x·gate is the pixel's maximum.
template <class T>
void count_top(const Map& x, const Acc<T>* gate, const Acc<T>* top, Acc<T>* count);

// Channels in a plane of positions (N, S), as kernels compare them; complains about one that isn't there.
template <class I>
std::unique_ptr<I[]> places_of(const Tensor& index, const Map& x);

}  // namespace fa
