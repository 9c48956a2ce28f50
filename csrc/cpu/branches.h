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
inline const Tensor* pointer(const OptTensor& t) { return t ? &*t : nullptr; }

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
