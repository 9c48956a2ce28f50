// map_scale: y = (1 + f(z))·x; one read of x, one of z, two where it is normalised, one write. map_scale_bwd: dx, dz in
// one pass, or, normalised, in two.
#define FA_KERNELS "cpu/map_scale.kernels.h"
#include "stages.h"

namespace fa {
// What z is normalised over.
enum class Over { none, channels, positions };

// What forward keeps for backward: first is the norm, or the mean, and second 1/std; count is what the variance divides
// by.
template <class A>
struct MapStats {
  A *first, *second;
  double eps, count;
};
}  // namespace fa
// stages.h and Over before isa.h: the kernels use them
#include "isa.h"

namespace fa {

static Over over_of(const std::string& name) {
  if (name == "none") return Over::none;
  if (name == "channels") return Over::channels;
  STD_TORCH_CHECK(name == "positions", "unknown norm ", name);
  return Over::positions;
}

// Whether a norm runs along the rows of memory, or across them.
static bool along(const Map& x, Over over) { return over == Over::none || x.pixels == (over == Over::channels); }

// How many columns of `rows` rows to take at a time, so that `maps` maps' parts of them stay in the second-level cache
// (1 MiB fits, of 2 MiB here); whole cache lines, and no less than four of them.
static int64_t columns_of(int64_t rows, int64_t columns, int64_t size, int64_t maps) {
  const int64_t line = 64 / size, most = std::max<int64_t>(4, (1 << 20) / (maps * rows * 64)) * line;
  const int64_t tiles = (columns + most - 1) / most, each = (columns + tiles - 1) / tiles;
  return (each + line - 1) / line * line;
}

// Without a norm no element knows its place: rows that follow one another in all maps become one, as long as several
// processes still find some, so that rows of 49 don't end with one element in a vector of 16.
static void join_rows(std::vector<Map>& maps) {
  const bool pixels = maps[0].pixels;
  const int64_t rows = pixels ? maps[0].s : maps[0].c, length = pixels ? maps[0].c : maps[0].s;
  for (const Map& m : maps)
    if ((pixels ? m.ss : m.sc) != length) return;
  int64_t together = std::min(rows, 8192 / std::max<int64_t>(length, 1));
  while (together > 1 && rows % together) --together;
  if (together <= 1) return;
  for (Map& m : maps) {
    (pixels ? m.s : m.c) /= together;
    (pixels ? m.c : m.s) *= together;
    (pixels ? m.ss : m.sc) *= together;
  }
}

template <class F>
static void over_tiles(const Map& x, int64_t size, int64_t maps, const F& f) {
  const int64_t rows = x.pixels ? x.s : x.c, columns = x.pixels ? x.c : x.s;
  const int64_t w = columns_of(rows, columns, size, maps), tiles = (columns + w - 1) / w;
  parallel_for(0, x.n * tiles, grain(rows * w), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) f(i / tiles, Range{i % tiles * w, std::min(i % tiles * w + w, columns)});
  });
}

template <class T, Over K>
static void forward(const Map& x, const Map& z, const Map& y, const MapStats<Acc<T>>& stats) {
  if (along(x, K)) {
    const int64_t runs = x.pixels ? x.s : x.c, length = x.pixels ? x.c : x.s;
    parallel_for(0, x.n * runs, grain(length),
                 [&](int64_t b, int64_t e) { FA_CALL(map_runs, (T, K), x, z, y, (Range{b, e}), stats); });
  } else if constexpr (K != Over::none) {
    over_tiles(x, sizeof(T), 1,
               [&](int64_t n, Range columns) { FA_CALL(map_tile, (T, K), x, z, y, n, columns, stats); });
  }
}

template <class T, Over K>
static void backward(const Map& x, const Map& z, const Map& dy, const Map& dx, const Map& dz,
                     const MapStats<Acc<T>>& stats) {
  if (along(x, K)) {
    const int64_t runs = x.pixels ? x.s : x.c, length = x.pixels ? x.c : x.s;
    parallel_for(0, x.n * runs, grain(length),
                 [&](int64_t b, int64_t e) { FA_CALL(map_back_runs, (T, K), x, z, dy, dx, dz, (Range{b, e}), stats); });
  } else if constexpr (K != Over::none) {
    over_tiles(x, sizeof(T), 3,
               [&](int64_t n, Range columns) { FA_CALL(map_back_tile, (T, K), x, z, dy, dx, dz, n, columns, stats); });
  }
}

// S, of an empty batch too, whose map says nothing.
static int64_t positions_of(const Tensor& x) {
  int64_t s = 1;
  for (int64_t size : x.sizes().slice(2)) s *= size;
  return s;
}

// The shape of what forward keeps, and where its parts lie.
static Tensor new_stats(const Tensor& x, Over over) {
  const ScalarType acc = acc_dtype(x.scalar_type());
  if (over == Over::channels) return new_dense({1, x.size(0), positions_of(x)}, acc);
  if (over == Over::positions) return new_dense({2, x.size(0), x.size(1)}, acc);
  return new_dense({0}, acc);
}
template <class A>
static MapStats<A> stats_of(const Map& x, A* kept, double eps, double correction) {
  return {kept, kept + x.n * x.c, eps, double(x.s) - correction};
}

template <class F>
static void by_norm(Over over, const F& f) {
  if (over == Over::none)
    f(std::integral_constant<Over, Over::none>{});
  else if (over == Over::channels)
    f(std::integral_constant<Over, Over::channels>{});
  else
    f(std::integral_constant<Over, Over::positions>{});
}

std::tuple<Tensor, Tensor> map_scale_cpu(const Tensor& x, const Tensor& z, const std::string& norm, double eps,
                                         double correction) {
  check_map(x);
  check_same(x, z);
  const Over over = over_of(norm);
  Tensor y = new_like(x);
  auto maps = maps_of({&x, &z, &y});
  if (over == Over::none) join_rows(maps);
  Tensor stats = new_stats(x, over);
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kept = stats_of(maps[0], static_cast<Acc<T>*>(stats.data_ptr()), eps, correction);
    by_norm(over, [&](auto k) { forward<T, decltype(k)::value>(maps[0], maps[1], maps[2], kept); });
  });
  return {y, stats};
}

Tensor map_scale_infer_cpu(const Tensor& x, const Tensor& z, const std::string& norm, double eps, double correction) {
  return std::get<0>(map_scale_cpu(x, z, norm, eps, correction));
}

std::tuple<Tensor, Tensor> map_scale_bwd_cpu(const Tensor& x, const Tensor& z, const Tensor& stats, const Tensor& dy,
                                             const std::string& norm, double eps, double correction) {
  check_map(x);
  check_same(x, z);
  check_same(x, dy);
  const Over over = over_of(norm);
  Tensor dx = new_like(x), dz = new_like(x);
  auto maps = maps_of({&x, &z, &dy, &dx, &dz});
  if (over == Over::none) join_rows(maps);
  if (over == Over::channels) check_shape(stats, {1, x.size(0), positions_of(x)});
  if (over == Over::positions) check_shape(stats, {2, x.size(0), x.size(1)});
  by_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Dense<A> given(stats);
    const auto kept = stats_of(maps[0], const_cast<A*>(given.get()), eps, correction);
    by_norm(over, [&](auto k) { backward<T, decltype(k)::value>(maps[0], maps[1], maps[2], maps[3], maps[4], kept); });
  });
  return {dx, dz};
}

}  // namespace fa

FA_REGISTER(map_scale)
FA_REGISTER_INFER(map_scale)
FA_REGISTER(map_scale_bwd)
