// scale and the last pass of a gate's gradient, for all dtypes.
#include "scale.cuh"

namespace fa::cuda {

#define FA_SCALE(T)                                                                                              \
  template void scale<T>(Stream, const Shape&, const T*, const Acc<T>*, const Acc<T>*, const T*, T*, Merge, Act, \
                         double);                                                                                \
  template void spread<T>(Stream, const Shape&, const T*, const T*, const Acc<T>*, const Acc<T>*, T*, Act, double);
FA_SCALE(float)
FA_SCALE(double)
FA_SCALE(BFloat16)
FA_SCALE(Half)

}  // namespace fa::cuda
