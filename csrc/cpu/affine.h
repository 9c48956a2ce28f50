// What the kernels of the affine ops share with the code that calls them: v = scale·(x − centre) + shift (+ residual).
#pragma once

#include "stages.h"

namespace fa {

// What the gradient of an affine map starts from: dy as it is, dy behind a gate and an activation, or no dy at all.
enum class Given { dy, any, nothing };

// Arrays over (n, c) of the accumulation dtype, all of them there: what a call leaves out is filled with what changes
// nothing. Only tilt and gate may be missing where a comment says so.
template <class T>
struct Affine {
  using A = Acc<T>;
  Map x, dy, aux;  // aux: the residual, or the output where the activation's derivative can be read off it
  Map y, kept;     // written: y or dx; and e
  const A *scale = nullptr, *shift = nullptr, *centre = nullptr;
  const A *gate = nullptr, *spread = nullptr, *tilt = nullptr, *level = nullptr;
  Act act = Act::identity;
  A slope = 0;
  int64_t together = 1;  // how many maps of y's size the op writes, one after the other
};

// What is added at two places of every plane: (2, N, C), the second array `apart` elements behind the first.
template <class A>
struct AtPlaces {
  using I = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
  const A* value;
  const I* place;
  int64_t apart;
};

// Which sums over a plane are wanted.
enum class Sums {
  back,    // e·(x − centre), e
  gated,   // those of e = gate·dy·act'(v), and dy·act(v)
  pool,    // act(v)
  spread,  // dy·u, dy·d, d, dy·d·t, d·t with u = act(v), d = act'(v), t = x − centre
};
constexpr int64_t how_many(Sums sums) {
  return sums == Sums::back ? 2 : sums == Sums::gated ? 3 : sums == Sums::pool ? 1 : 5;
}

// An (n, c) tensor in the accumulation dtype, or `otherwise` everywhere.
template <class A>
class Filling {
 public:
  Filling(const OptTensor& t, const Tensor& x, A otherwise) {
    const int64_t n = x.size(0), c = x.size(1);
    if (t) {
      check_shape(*t, {n, c});
      given_ = Dense<A>(*t);
      return;
    }
    own_ = scratch<A>(n * c);
    std::fill_n(own_.get(), n * c, otherwise);
  }
  const A* get() const { return own_ ? own_.get() : given_.get(); }

 private:
  Dense<A> given_;
  std::unique_ptr<A[]> own_;
};

}  // namespace fa
