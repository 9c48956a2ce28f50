// How a kernel is called: the list of the tensors that are there, and the number of a set of options registered before.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fa {

using torch::stable::Tensor;

// The sets of options of one op. They are few, live as long as the process, and are read without a lock.
template <class O>
class Table {
 public:
  static int64_t add(O options) {
    const int64_t number = size().fetch_add(1);
    STD_TORCH_CHECK(number < int64_t(entries().size()), "too many different options");
    entries()[number] = new O(std::move(options));
    return number;
  }
  static const O& at(int64_t number) {
    STD_TORCH_CHECK(number >= 0 && number < int64_t(entries().size()) && entries()[number].load(), "unknown options");
    return *entries()[number].load();
  }

 private:
  static std::array<std::atomic<const O*>, 4096>& entries() {
    static std::array<std::atomic<const O*>, 4096> all{};
    return all;
  }
  static std::atomic<int64_t>& size() {
    static std::atomic<int64_t> count{0};
    return count;
  }
};

// Bit i of the mask says whether argument i is there; the list holds those that are.
inline int64_t place(int64_t mask, int i) {
  int64_t before = 0;
  for (int j = 0; j < i; ++j) before += mask >> j & 1;
  return before;
}
inline const Tensor& required(const std::vector<Tensor>& tensors, int64_t mask, int i) {
  const int64_t at = place(mask, i);
  STD_TORCH_CHECK((mask >> i & 1) && at < int64_t(tensors.size()), "a tensor is missing");
  return tensors[at];
}
inline std::optional<Tensor> optional(const std::vector<Tensor>& tensors, int64_t mask, int i) {
  if (!(mask >> i & 1)) return std::nullopt;
  return required(tensors, mask, i);
}

}  // namespace fa
