// branch_scale: y = Σ_b gate_b·x_b, or gate_b·x_b side by side. branch_scale_bwd: dgate and every dx_b in one pass;
// branch_scale_reduce: dgate alone; branch_scale_apply: dx_b = gate_b·dy_b + dpooled/S.
#define FA_KERNELS "cpu/branch_scale.kernels.h"
#include "branches.h"
// branches.h before isa.h: the kernels use its types
#include "isa.h"

namespace fa {

// How one call sees its branches: in the sum all of them beside one map, else one after the other beside its slot.
struct Step {
  int64_t first, count;  // branches
  int64_t slot;          // of the merged map, or −1 for all of it
};
static std::vector<Step> steps_of(BranchMerge merge, int64_t count) {
  if (merge == BranchMerge::sum) return {{0, count, -1}};
  std::vector<Step> steps;
  for (int64_t b = 0; b < count; ++b) steps.push_back({b, 1, slot_of(merge, b, count)});
  return steps;
}
static Branches part(const Branches& all, const Step& step) {
  Branches out;
  out.count = step.count;
  for (int64_t b = 0; b < step.count; ++b) out.map[b] = all.map[step.first + b];
  return out;
}
template <class T>
static Map part(const Map& merged, const Step& step, int64_t c) {
  return step.slot < 0 ? merged : channels_of<T>(merged, step.slot * c, c);
}

// Work items of a map: planes or pixels, and the elements of each.
static int64_t runs_of(const Map& m) { return m.n * (m.pixels ? m.s : m.c); }
static int64_t length_of(const Map& m) { return m.pixels ? m.c : m.s; }

template <class T>
static void weigh(const Branches& x, const Map& y, const Acc<T>* gate, int64_t gn, bool stream) {
  parallel_for(0, runs_of(y), grain(length_of(y) * x.count),
               [&](int64_t b, int64_t e) { FA_CALL(weigh_runs, (T), x, y, Range{b, e}, gate, gn, stream); });
}

template <class T>
static void share(const Map& dy, const Branches& dx, const Acc<T>* gate, const Acc<T>* add, int64_t gn, bool stream) {
  parallel_for(0, runs_of(dy), grain(length_of(dy) * dx.count),
               [&](int64_t b, int64_t e) { FA_CALL(share_runs, (T), dy, dx, Range{b, e}, gate, add, gn, stream); });
}

// dgate lies (n, branch, c) with gn numbers a sample; dx is written where it has maps.
template <class T, bool Write>
static void project(const Branches& x, const Map& dy, const Branches& dx, const Acc<T>* gate, Acc<T>* dgate,
                    int64_t gn) {
  using A = Acc<T>;
  const int64_t c = dy.c, all = x.count * c;
  if (!dy.pixels) {
    parallel_for(0, dy.n * c, grain(dy.s * x.count), [&](int64_t b, int64_t e) {
      FA_CALL(project_planes, (T, Write), x, dy, dx, Range{b, e}, gate, dgate, gn);
    });
    return;
  }
  const int64_t run = pixels_per_run(all), runs = (dy.s + run - 1) / run;
  const auto sums = scratch<A>(dy.n * runs * all);
  parallel_for(0, dy.n * runs, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t n = i / runs, s = i % runs * run;
      FA_CALL(project_pixels, (T, Write), x, dy, dx, n, (Range{s, std::min(s + run, dy.s)}), gate + n * gn,
              sums.get() + i * all);
    }
  });
  for (int64_t n = 0; n < dy.n; ++n) add_runs(sums.get() + n * runs * all, runs, all, dgate + n * gn);
}

// The checks that all four have in common; the number of branches.
static int64_t check_branches(const Tensor& x, const Tensor& gate, int64_t tensors) {
  check_map(x);
  STD_TORCH_CHECK(gate.dim() == 3, "gate must be (N, B, C)");
  const int64_t count = gate.size(1);
  STD_TORCH_CHECK(count >= 1 && count <= kMostBranches && (tensors == 1 || tensors == count), "number of branches");
  STD_TORCH_CHECK(x.size(1) % count == 0 || tensors > 1, "branches of different sizes");
  check_shape(gate, {x.size(0), count, tensors == 1 ? x.size(1) / count : x.size(1)});
  return count;
}
static void check_merged(const Tensor& x, const Tensor& gate, const Tensor& dy, BranchMerge merge) {
  STD_TORCH_CHECK(dy.is_cpu() && dy.scalar_type() == x.scalar_type() && dy.dim() == x.dim(), "dy");
  const int64_t c = merge == BranchMerge::sum ? gate.size(2) : gate.size(1) * gate.size(2);
  for (int64_t d = 0; d < x.dim(); ++d) STD_TORCH_CHECK(dy.size(d) == (d == 1 ? c : x.size(d)), "shape of dy");
}

// The eight outputs dx: a tensor for each that holds branches, empty ones after them.
static std::vector<Tensor> gradients(const Tensor& x, int64_t tensors) {
  std::vector<Tensor> out;
  for (int64_t t = 0; t < kMostBranches; ++t) out.push_back(t < tensors ? new_like(x) : none_like(x));
  return out;
}
static std::vector<Map> maps_beside(const Tensor& x, const Tensor& dy, const std::vector<Tensor>& dx, int64_t tensors) {
  const auto at = [&](int64_t t) { return t < tensors ? &dx[t] : nullptr; };
  return maps_of({&x, &dy, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)});
}

Tensor branch_scale_cpu(const Tensor& x, const Tensor& gate, const OptTensor& x1, const OptTensor& x2,
                        const OptTensor& x3, const OptTensor& x4, const OptTensor& x5, const OptTensor& x6,
                        const OptTensor& x7, const std::string& merge_name) {
  const int64_t tensors = count_tensors(x, {&x1, &x2, &x3, &x4, &x5, &x6, &x7});
  const int64_t count = check_branches(x, gate, tensors), c = gate.size(2);
  const BranchMerge merge = branch_merge_of(merge_name);
  Tensor y = beside(x, merge == BranchMerge::sum ? c : count * c);
  auto maps =
      maps_of({&x, pointer(x1), pointer(x2), pointer(x3), pointer(x4), pointer(x5), pointer(x6), pointer(x7), &y});
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Dense<Acc<T>> g(gate);
    const Branches all = branches_of<T>(maps, tensors, count);
    for (const Step& step : steps_of(merge, count)) {
      const Map to = part<T>(maps[8], step, c);
      weigh<T>(part(all, step), to, g.get() + step.first * c, count * c, streams<T>(to, maps[8].c / to.c));
    }
  });
  return y;
}

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Nine branch_scale_bwd_cpu(const Tensor& x, const Tensor& gate, const Tensor& dy, const OptTensor& x1,
                          const OptTensor& x2, const OptTensor& x3, const OptTensor& x4, const OptTensor& x5,
                          const OptTensor& x6, const OptTensor& x7, const std::string& merge_name) {
  const int64_t tensors = count_tensors(x, {&x1, &x2, &x3, &x4, &x5, &x6, &x7});
  const int64_t count = check_branches(x, gate, tensors), c = gate.size(2);
  const BranchMerge merge = branch_merge_of(merge_name);
  check_merged(x, gate, dy, merge);
  std::vector<Tensor> d = gradients(x, tensors);
  const auto at = [&](int64_t t) { return t < tensors ? &d[t] : nullptr; };
  const auto maps = maps_of({&x, pointer(x1), pointer(x2), pointer(x3), pointer(x4), pointer(x5), pointer(x6),
                             pointer(x7), &dy, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)});
  const std::vector<Map> outs(maps.begin() + 9, maps.end());
  Tensor dgate;
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Dense<A> g(gate);
    Filled<A> sums(gate);
    const Branches in = branches_of<T>(maps, tensors, count), out = branches_of<T>(outs, tensors, count);
    for (const Step& step : steps_of(merge, count))
      project<T, true>(part(in, step), part<T>(maps[8], step, c), part(out, step), g.get() + step.first * c,
                       sums.get() + step.first * c, count * c);
    dgate = sums.done();
  });
  return {dgate, d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]};
}

Tensor branch_scale_reduce_cpu(const Tensor& x, const Tensor& dy, const Tensor& gate, const OptTensor& x1,
                               const OptTensor& x2, const OptTensor& x3, const OptTensor& x4, const OptTensor& x5,
                               const OptTensor& x6, const OptTensor& x7, const std::string& merge_name) {
  const int64_t tensors = count_tensors(x, {&x1, &x2, &x3, &x4, &x5, &x6, &x7});
  const int64_t count = check_branches(x, gate, tensors), c = gate.size(2);
  const BranchMerge merge = branch_merge_of(merge_name);
  check_merged(x, gate, dy, merge);
  const auto maps =
      maps_of({&x, pointer(x1), pointer(x2), pointer(x3), pointer(x4), pointer(x5), pointer(x6), pointer(x7), &dy});
  Tensor dgate = new_dense({x.size(0), count, c}, acc_dtype(x.scalar_type()));
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    A* sums = static_cast<A*>(dgate.data_ptr());
    const Branches in = branches_of<T>(maps, tensors, count);
    for (const Step& step : steps_of(merge, count))
      project<T, false>(part(in, step), part<T>(maps[8], step, c), {}, nullptr, sums + step.first * c, count * c);
  });
  return dgate;
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Eight branch_scale_apply_cpu(const Tensor& x, const Tensor& dy, const Tensor& gate, const Tensor& dpooled,
                             const std::string& merge_name) {
  check_map(x);
  STD_TORCH_CHECK(gate.dim() == 3 && gate.size(1) >= 1 && gate.size(1) <= kMostBranches, "gate must be (N, B, C)");
  const int64_t count = gate.size(1), c = gate.size(2);
  const int64_t tensors = x.size(1) == c * count ? 1 : count;
  check_shape(gate, {x.size(0), count, tensors == 1 ? x.size(1) / count : x.size(1)});
  const BranchMerge merge = branch_merge_of(merge_name);
  check_merged(x, gate, dy, merge);
  const bool each = dpooled.dim() == 3;
  if (each)
    check_shape(dpooled, {x.size(0), count, c});
  else
    check_shape(dpooled, {x.size(0), c});
  std::vector<Tensor> d = gradients(x, tensors);
  const auto maps = maps_beside(x, dy, d, tensors);
  const std::vector<Map> outs(maps.begin() + 2, maps.end());
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Dense<A> g(gate), dp(dpooled);
    const int64_t n = maps[0].n, all = count * c;
    const auto add = scratch<A>(n * all);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < all; ++k) add[i * all + k] = dp.get()[each ? i * all + k : i * c + k % c] / A(maps[0].s);
    const Branches out = branches_of<T>(outs, tensors, count);
    bool stream = true;
    for (int64_t b = 0; b < count; ++b) stream = stream && streams<T>(out.map[b], count);
    for (const Step& step : steps_of(merge, count))
      share<T>(part<T>(maps[1], step, c), part(out, step), g.get() + step.first * c, add.get() + step.first * c, all,
               stream);
  });
  return {d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]};
}

}  // namespace fa

FA_REGISTER(branch_scale)
FA_REGISTER(branch_scale_bwd)
FA_REGISTER(branch_scale_reduce)
FA_REGISTER(branch_scale_apply)
