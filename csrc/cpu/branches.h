// Branches of a feature map, as the ops over them take them (fused_attn/ops/branches.py): B maps of C channels each,
// tensors of their own or slices of one.
#pragma once

#include "stages.h"

namespace fa {

constexpr int64_t kMostBranches = 8;

struct Branches {
  Map map[kMostBranches];
  int64_t count = 0;
};

// Not called as dual.h's are: two inline functions of one name become one when they are linked.
enum class BranchMerge { sum, concat, concat_reversed };
inline BranchMerge branch_merge_of(const std::string& name) {
  if (name == "sum") return BranchMerge::sum;
  if (name == "concat") return BranchMerge::concat;
  STD_TORCH_CHECK(name == "concat_reversed", "unknown merge ", name);
  return BranchMerge::concat_reversed;
}
inline int64_t slot_of(BranchMerge merge, int64_t b, int64_t count) {
  return merge == BranchMerge::concat_reversed ? count - 1 - b : b;
}

// Channels [first, first + c) of a map.
template <class T>
Map channels_of(const Map& m, int64_t first, int64_t c) {
  Map part = m;
  part.c = c;
  if (m.data) part.data = static_cast<T*>(m.data) + first * m.sc;
  return part;
}

// The other branches, as a call has them: those that are there come first.
using Others = std::initializer_list<const OptTensor*>;
inline int64_t count_tensors(const Tensor& x, Others others) {
  int64_t count = 1;
  bool ended = false;
  for (const OptTensor* t : others) {
    if (!*t) {
      ended = true;
      continue;
    }
    STD_TORCH_CHECK(!ended, "a branch is missing");
    check_same(x, **t);
    ++count;
  }
  return count;
}
// The map that concatenated branches became, or its gradient.
inline void check_merged(const Tensor& x, const Tensor& dy, int64_t count) {
  STD_TORCH_CHECK(dy.is_cpu() && dy.scalar_type() == x.scalar_type() && dy.dim() == x.dim(), "dy");
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(dy.size(d) == (d == 1 ? count * x.size(1) : x.size(d)), "shape of dy");
}
inline const Tensor* pointer(const OptTensor& t) { return t ? &*t : nullptr; }

// An uninitialised tensor of c channels that lies as x does (branches.beside).
inline Tensor beside(const Tensor& x, int64_t c) {
  if (c == x.size(1)) return new_like(x);
  const auto sizes = x.sizes();
  const int64_t dim = int64_t(sizes.size());
  std::vector<int64_t> shape(sizes.begin(), sizes.end()), strides(dim);
  shape[1] = c;
  const bool pixels = !x.is_contiguous() && !walks_planes(x);
  int64_t step = 1;
  const auto next = [&](int64_t d) {
    strides[d] = step;
    step *= std::max<int64_t>(shape[d], 1);
  };
  if (pixels) next(1);
  for (int64_t d = dim - 1; d >= 2; --d) next(d);
  if (!pixels) next(1);
  next(0);
  return new_strided(shape, strides, x.scalar_type());
}

// Small tensors of all branches, (N, B·C) in the order of the merged channels, as a dense array (N, C) for each; what
// isn't there is 0.
template <class A>
class Slots {
 public:
  Slots(const OptTensor& t, const Tensor& x, BranchMerge merge, int64_t count) : nc_(x.size(0) * x.size(1)) {
    const int64_t c = x.size(1), n = x.size(0), all = count * c;
    own_ = scratch<A>(n * all);
    if (!t) {
      std::fill_n(own_.get(), n * all, A(0));
      return;
    }
    check_shape(*t, {n, all});
    const Dense<A> given(*t);
    for (int64_t b = 0; b < count; ++b)
      for (int64_t i = 0; i < n; ++i)
        std::copy_n(given.get() + i * all + slot_of(merge, b, count) * c, c, own_.get() + b * nc_ + i * c);
  }
  const A* of(int64_t branch) const { return own_.get() + branch * nc_; }

 private:
  int64_t nc_;
  std::unique_ptr<A[]> own_;
};

// A branch's numbers (k, N, C) among those of all, (k, N, B·C).
template <class A>
void put_slot(const A* own, int64_t k, int64_t n, int64_t c, int64_t slot, int64_t count, A* all) {
  for (int64_t i = 0; i < k * n; ++i) std::copy_n(own + i * c, c, all + (i * count + slot) * c);
}

// B branches out of the maps of the tensors that hold them.
template <class T>
Branches branches_of(const std::vector<Map>& maps, int64_t tensors, int64_t count) {
  Branches out;
  out.count = count;
  const int64_t c = maps[0].c / count;
  for (int64_t b = 0; b < count; ++b) out.map[b] = tensors == 1 ? channels_of<T>(maps[0], b * c, c) : maps[b];
  return out;
}

}  // namespace fa
