// pool_mlp_scale and its gradient: weights of the map's dtype, or float32 beside halves.
#include "excite.cuh"

namespace fa::cuda {

// These are compiled in pool.cu and scale.cu.
#define FA_ELSEWHERE(T)                                                                                              \
  extern template void pool<T>(Stream, const Shape&, Pool, const T*, Acc<T>*, Acc<T>*, int64_t*, Acc<T>*, int64_t*); \
  extern template void gate_gradient<T>(Stream, const Shape&, const T*, const T*, const T*, const Acc<T>*, Act,      \
                                        double, T*, T*, Acc<T>*, Acc<T>*);                                           \
  extern template void scale<T>(Stream, const Shape&, const T*, const Acc<T>*, const Acc<T>*, const T*, T*, Merge,   \
                                Act, double);                                                                        \
  extern template void spread<T>(Stream, const Shape&, const T*, const T*, const Acc<T>*, const Acc<T>*, T*, Act,    \
                                 double);
FA_ELSEWHERE(float)
FA_ELSEWHERE(double)
FA_ELSEWHERE(BFloat16)
FA_ELSEWHERE(Half)

#define FA_EXCITE(T, W)                                                   \
  template void excite_forward<T, W>(Stream, const ExciteForward<T, W>&); \
  template void excite_backward<T, W>(Stream, const ExciteBackward<T, W>&);
FA_EXCITE(float, float)
FA_EXCITE(double, double)
FA_EXCITE(BFloat16, BFloat16)
FA_EXCITE(BFloat16, float)
FA_EXCITE(Half, Half)
FA_EXCITE(Half, float)

}  // namespace fa::cuda
