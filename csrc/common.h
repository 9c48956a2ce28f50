// What every kernel file needs: feature maps as they lie in memory, options, dtypes, allocation, and the counters of a
// counting build. The Python side of each is named in its comment.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops.gen.h"

#if defined(__GNUC__)
#define FA_INLINE inline __attribute__((always_inline))
#define FA_NOINLINE __attribute__((noinline))
#define FA_UNROLL _Pragma("GCC unroll 4")  // -O2 leaves short loops over registers rolled, and the registers in memory
#define FA_ROLLED _Pragma("GCC unroll 1")
#define FA_LIKELY(condition) __builtin_expect(condition, 1)
#else
#define FA_LIKELY(condition) (condition)
#define FA_UNROLL
#define FA_ROLLED
#define FA_INLINE inline
#define FA_NOINLINE
#endif

namespace fa {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// Sums, descriptors and gates: float64 for float64, else float32 (layout.accumulator).
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ---- passes: a counting build (-DFUSED_ATTN_COUNT) counts every element of a feature map that is read or written
#ifdef FUSED_ATTN_COUNT
inline std::atomic<int64_t> elements_read{0}, elements_written{0};
inline void count_read(int64_t n) { elements_read.fetch_add(n, std::memory_order_relaxed); }
inline void count_write(int64_t n) { elements_written.fetch_add(n, std::memory_order_relaxed); }
#else
FA_INLINE void count_read(int64_t) {}
FA_INLINE void count_write(int64_t) {}
#endif

// ---- which instruction set runs: 0 the portable baseline, 1 AVX2, 2 AVX-512 (common.cpp; FUSED_ATTN_ISA lowers it)
int isa_level();

// ---- options (ops/activations.py)
enum class Act {
  identity,
  relu,
  relu6,
  leaky_relu,
  silu,
  gelu,
  hardswish,
  prelu,
  sigmoid,
  hard_sigmoid,
  clamp,
};
Act act_of(const std::string& name);
// Whether act'(v) can be read off act(v), so that backward keeps the output and not the residual.
inline bool from_output(Act act) { return act == Act::relu || act == Act::relu6; }

// ---- feature maps (layout.py)
// (N, C, *S) with its spatial dimensions collapsed into one. planes: each (n, c) is a run of S; pixels: each (n, s) a
// run of C.
struct Map {
  void* data = nullptr;
  int64_t n = 0, c = 0, s = 0, sn = 0, sc = 0, ss = 0;
  bool pixels = false;

  template <class T>
  T* plane(int64_t i, int64_t j) const {
    return static_cast<T*>(data) + i * sn + j * sc;
  }
  template <class T>
  T* pixel(int64_t i, int64_t p) const {
    return static_cast<T*>(data) + i * sn + p * ss;
  }
};

// Views tensors of one shape as maps of one kind; complains where no kind fits all of them. Undefined tensors are
// passed over.
std::vector<Map> maps_of(std::initializer_list<const Tensor*> tensors);

// An uninitialised tensor like x: its shape, dtype and strides (dense ones where x has gaps).
Tensor new_like(const Tensor& x);
// An uninitialised tensor of any shape and strides on the CPU.
Tensor new_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype);
// Whether x can be walked as planes.
bool walks_planes(const Tensor& x);
// A dense tensor of another shape on the CPU.
Tensor new_dense(std::initializer_list<int64_t> shape, ScalarType dtype);
Tensor new_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype);

// ---- checks: short, because Python repeats them in words when one fails
inline void check_map(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 3 && x.size(1) > 0, "x must be a feature map (N, C, *S)");
  for (int64_t size : x.sizes().slice(2)) STD_TORCH_CHECK(size > 0, "empty spatial dimension");
}
inline void check_same(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.sizes().equals(other.sizes()) && x.scalar_type() == other.scalar_type(), "shape or dtype differs");
  STD_TORCH_CHECK(other.is_cpu(), "not on the CPU");
}
inline void check_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.is_cpu(), "not on the CPU");
  STD_TORCH_CHECK(t.sizes().equals({shape.begin(), shape.size()}), "wrong shape");
}

// ---- small tensors in the accumulation dtype
// Reads a floating tensor of any dtype and strides as a dense array of A, in place where it is one already.
template <class A>
class Dense {
 public:
  Dense() = default;
  explicit Dense(const Tensor& t);
  explicit Dense(const OptTensor& t) : Dense(t ? Dense(*t) : Dense()) {}
  explicit operator bool() const { return data_ != nullptr; }
  const A* get() const { return data_; }

 private:
  const A* data_ = nullptr;
  std::unique_ptr<A[]> own_;
};

// A new dense tensor of t's shape and dtype, to be filled as an array of A: in place where that is its dtype.
template <class A>
class Filled {
 public:
  explicit Filled(const Tensor& t);
  A* get() { return data_; }
  Tensor done();

 private:
  Tensor out_;
  A* data_;
  std::unique_ptr<A[]> own_;
};
inline Tensor none_like(const Tensor& t) { return new_dense({0}, t.scalar_type()); }

// Positions in a plane of s elements, (N, C): an index from elsewhere must not write outside of it.
class Index {
 public:
  Index() = default;
  Index(const Tensor& t, int64_t n, int64_t c, int64_t s);
  const int64_t* get() const { return data_; }

 private:
  const int64_t* data_ = nullptr;
};

template <class A>
std::unique_ptr<A[]> scratch(int64_t size) {
  return std::unique_ptr<A[]>(new A[std::max<int64_t>(size, 1)]);  // not zeroed
}

template <class T>
struct Tag {
  using type = T;
};
// f(Tag<T>{}) for the C++ type of a dtype.
template <class F>
auto by_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Tag<float>{});
    case ScalarType::Double:
      return f(Tag<double>{});
    case ScalarType::BFloat16:
      return f(Tag<BFloat16>{});
    case ScalarType::Half:
      return f(Tag<Half>{});
    default:
      STD_TORCH_CHECK(false, "dtype must be float32, float64, bfloat16 or float16");
  }
}
inline ScalarType acc_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// f(begin, end) over torch's thread pool; a range that one thread takes whole costs no call into torch.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end - begin > grain)
    torch::stable::parallel_for(begin, end, grain, f);
  else if (begin < end)
    f(begin, end);
}
// Work items per thread at least, so that a thread's share is worth waking it for (32k elements, about 5 µs).
inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(elements_per_item, 1));
}

}  // namespace fa

// Registers an op's kernel and its options, under the schemas in ops.gen.h; FA_REGISTER_INFER the one of its first
// output alone.
#define FA_REGISTER(op)                                                     \
  STABLE_TORCH_LIBRARY_FRAGMENT(fused_attn_cpp, m) {                        \
    m.def(fa::op##_schema);                                                 \
    m.def(fa::op##_options_schema);                                         \
    m.def(fa::op##_spelled_schema);                                         \
  }                                                                         \
  STABLE_TORCH_LIBRARY_IMPL(fused_attn_cpp, CompositeExplicitAutograd, m) { \
    m.impl(#op "_options", TORCH_BOX(&fa::op##_register));                  \
  }                                                                         \
  STABLE_TORCH_LIBRARY_IMPL(fused_attn_cpp, CPU, m) {                       \
    m.impl(#op, TORCH_BOX(&fa::op##_call));                                 \
    m.impl(#op "_spelled", TORCH_BOX(&fa::op##_spelled_call));              \
  }
#define FA_REGISTER_INFER(op)                                                        \
  STABLE_TORCH_LIBRARY_FRAGMENT(fused_attn_cpp, m) { m.def(fa::op##_infer_schema); } \
  STABLE_TORCH_LIBRARY_IMPL(fused_attn_cpp, CPU, m) { m.impl(#op "_infer", TORCH_BOX(&fa::op##_infer_call)); }
