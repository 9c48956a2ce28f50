// channel_pool and the gradient of a channel's gate, for all dtypes.
#include "sums.cuh"

namespace fa::cuda {

#define FA_POOL(T)                                                                                                   \
  template void pool<T>(Stream, const Shape&, Pool, const T*, Acc<T>*, Acc<T>*, int64_t*, Acc<T>*, int64_t*);        \
  template void gate_gradient<T>(Stream, const Shape&, const T*, const T*, const T*, const Acc<T>*, Act, double, T*, \
                                 T*, Acc<T>*, Acc<T>*);
FA_POOL(float)
FA_POOL(double)
FA_POOL(BFloat16)
FA_POOL(Half)

}  // namespace fa::cuda
