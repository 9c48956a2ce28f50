// The parts of common.h that need no template.
#include "common.h"

#include <cstdlib>
#include <cstring>

namespace fa {

#ifdef FUSED_ATTN_COUNT
static void count_reset() { elements_read = elements_written = 0; }
static int64_t count_of_reads() { return elements_read; }
static int64_t count_of_writes() { return elements_written; }
#endif

static int detect() {
  int level = 0;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) level = 1;
  if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    level = 2;
#endif
  if (const char* want = std::getenv("FUSED_ATTN_ISA")) {
    const int limit = !std::strcmp(want, "base") ? 0 : !std::strcmp(want, "avx2") ? 1 : 2;
    level = std::min(level, limit);
  }
  return level;
}

int isa_level() {
  static const int level = detect();
  return level;
}

static std::string isa_name() {
  static const char* const names[] = {"base", "avx2", "avx512"};
  return names[isa_level()];
}

Act act_of(const std::string& name) {
  static const struct {
    const char* name;
    Act act;
  } table[] = {
      {"identity", Act::identity},         {"relu", Act::relu},   {"relu6", Act::relu6},
      {"leaky_relu", Act::leaky_relu},     {"silu", Act::silu},   {"gelu", Act::gelu},
      {"hardswish", Act::hardswish},       {"prelu", Act::prelu}, {"sigmoid", Act::sigmoid},
      {"hard_sigmoid", Act::hard_sigmoid}, {"clamp", Act::clamp},
  };
  for (const auto& row : table)
    if (name == row.name) return row.act;
  STD_TORCH_CHECK(false, "unknown activation ", name);
}

static std::optional<Map> map_as(const Tensor& t, bool pixels) {
  const auto sizes = t.sizes(), strides = t.strides();
  Map m;
  m.n = sizes[0], m.c = sizes[1], m.s = 1, m.ss = 1;
  if (m.n == 0) return m;  // whose strides may be anything
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 2; --d) {
    if (sizes[d] == 1) continue;
    if (m.s == 1)
      m.ss = strides[d];
    else if (strides[d] != m.ss * m.s)
      return std::nullopt;
    m.s *= sizes[d];
  }
  m.sn = strides[0], m.sc = strides[1], m.pixels = pixels;
  // A stride that is never stepped over says nothing: it gets the dense layout's value.
  if (pixels) {
    if (!((m.sc == 1 || m.c == 1) && (m.ss >= m.c || m.s == 1))) return std::nullopt;
    m.sc = 1;
    if (m.s == 1) m.ss = m.c;
  } else {
    if (!(m.ss == 1 || m.s == 1)) return std::nullopt;
    m.ss = 1;
    if (m.c == 1) m.sc = m.s;
  }
  if (m.n == 1) m.sn = m.c * m.s;
  m.data = t.data_ptr();
  return m;
}

std::vector<Map> maps_of(std::initializer_list<const Tensor*> tensors) {
  // Where both kinds fit, the longer run wins: a 1×1 map is one pixel of C channels, not C planes of one element.
  const Tensor& x = **tensors.begin();
  int64_t s = 1;
  for (int64_t size : x.sizes().slice(2)) s *= size;
  for (const bool pixels : {s == 1, s != 1}) {
    std::vector<Map> maps;
    bool fits = true;
    for (const Tensor* t : tensors) {
      if (t == nullptr || !t->defined()) {
        maps.emplace_back();
        continue;
      }
      const auto m = map_as(*t, pixels);
      if (!(fits = m.has_value())) break;
      maps.push_back(*m);
    }
    if (fits) return maps;
  }
  STD_TORCH_CHECK(false, "no common memory format");
}

Tensor new_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const int32_t code = dtype == ScalarType::Float    ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Double ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::Half   ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::Long   ? aoti_torch_dtype_int64()
                                                     : aoti_torch_dtype_bfloat16();
  // Not torch::stable::empty: it goes through the dispatcher by name, and costs three times as much.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor new_dense(std::initializer_list<int64_t> shape, ScalarType dtype) {
  int64_t strides[4], step = 1, dim = int64_t(shape.size());
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(shape.begin()[d], 1);
  }
  return new_strided(shape.begin(), strides, dim, dtype);
}

Tensor new_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType dtype) {
  return new_strided(shape.data(), strides.data(), int64_t(shape.size()), dtype);
}

bool walks_planes(const Tensor& x) { return map_as(x, false).has_value(); }

Tensor new_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  bool dense = x.is_contiguous();
  if (!dense && x.dim() >= 3) {  // channels_last: C innermost, then the spatial dimensions, then N
    int64_t step = 1;
    dense = true;
    auto next = [&](int64_t d) {
      dense = dense && (strides[d] == step || sizes[d] == 1);
      step *= sizes[d];
    };
    next(1);
    for (int64_t d = x.dim() - 1; d >= 2; --d) next(d);
    next(0);
  }
  if (!dense) return torch::stable::empty_like(x);
  return new_strided(sizes.data(), strides.data(), x.dim(), x.scalar_type());
}

template <class A, class T>
static void gather(const T* from, const int64_t* sizes, const int64_t* strides, int64_t dim, A*& to) {
  if (dim == 0) {
    *to++ = static_cast<A>(*from);
    return;
  }
  for (int64_t i = 0; i < sizes[0]; ++i) gather(from + i * strides[0], sizes + 1, strides + 1, dim - 1, to);
}

template <class A>
Dense<A>::Dense(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), "not on the CPU");
  const bool same = t.scalar_type() == (std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  if (same && t.is_contiguous()) {
    data_ = static_cast<const A*>(t.data_ptr());
    static const A nothing = 0;
    if (data_ == nullptr) data_ = &nothing;  // an empty tensor is still there
    return;
  }
  own_ = scratch<A>(t.numel());
  data_ = own_.get();
  by_dtype(t.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* from = static_cast<const T*>(t.data_ptr());
    A* to = own_.get();
    if (t.is_contiguous())
      for (int64_t i = 0, n = t.numel(); i < n; ++i) to[i] = static_cast<A>(from[i]);
    else
      gather<A, T>(from, t.sizes().data(), t.strides().data(), t.dim(), to);
  });
}
template class Dense<float>;
template class Dense<double>;

Index::Index(const Tensor& t, int64_t n, int64_t c, int64_t s) {
  check_shape(t, {n, c});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous(), "index must be contiguous int64");
  data_ = static_cast<const int64_t*>(t.data_ptr());
  for (int64_t i = 0; i < n * c; ++i) STD_TORCH_CHECK(data_[i] >= 0 && data_[i] < s, "index out of its plane");
}

template <class A>
Filled<A>::Filled(const Tensor& t) {
  const auto sizes = t.sizes();
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  out_ = new_strided(sizes.data(), strides.data(), int64_t(sizes.size()), t.scalar_type());
  if (t.scalar_type() == (std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float))
    data_ = static_cast<A*>(out_.data_ptr());
  else
    data_ = (own_ = scratch<A>(out_.numel())).get();
}

template <class A>
Tensor Filled<A>::done() {
  if (own_)
    by_dtype(out_.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* to = static_cast<T*>(out_.data_ptr());
      for (int64_t i = 0, n = out_.numel(); i < n; ++i) to[i] = static_cast<T>(data_[i]);
    });
  return out_;
}
template class Filled<float>;
template class Filled<double>;

}  // namespace fa

STABLE_TORCH_LIBRARY_FRAGMENT(fused_attn_cpp, m) {
  m.def("_isa() -> str");
#ifdef FUSED_ATTN_COUNT
  m.def("_count_reset() -> ()");
  m.def("_count_read() -> int");
  m.def("_count_write() -> int");
#endif
}
STABLE_TORCH_LIBRARY_IMPL(fused_attn_cpp, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&fa::isa_name));
#ifdef FUSED_ATTN_COUNT
  m.impl("_count_reset", TORCH_BOX(&fa::count_reset));
  m.impl("_count_read", TORCH_BOX(&fa::count_of_reads));
  m.impl("_count_write", TORCH_BOX(&fa::count_of_writes));
#endif
}
