// Pooling, scaling, and the gradient of scaling.
#include "check.h"

namespace check {

// Odd sizes of every path: short and long planes, several runs of a channel, ragged ends; narrow and wide pixels.
// `large`: those of networks too, for one schedule.
static std::vector<Shape> shapes(bool large) {
  std::vector<Shape> all = {
      {2, 3, 49, false},    {1, 5, 1, false},    {3, 17, 13, false}, {2, 7, 196, false},
      {2, 9, 256, false},   {1, 3, 257, false},  {1, 2, 787, false}, {2, 8, 784, false},
      {1, 1, 20001, false}, {1, 4100, 1, false}, {2, 3, 49, true},   {2, 16, 49, true},
      {1, 24, 1500, true},  {1, 272, 33, true},  {3, 40, 1, true},   {1, 37, 70, true},
  };
  if (large) {
    all.push_back({2, 64, 3136, false});
    all.push_back({3, 130, 49, false});
    all.push_back({2, 512, 784, true});
    all.push_back({1, 3, 40000, true});
    all.push_back({17, 64, 81, false});
  }
  return all;
}

// Wide accesses everywhere but at the end of a map; a long plane has its two ends as well.
template <class T>
static int64_t narrow_of(const Shape& x, int64_t skip, bool sums) {
  if (skip || (sums && x.pixels && x.c % kWide<T>)) return -1;  // element by element
  if (!sums || x.pixels || x.s <= kShort) return kWide<T>;
  return 2 * kWide<T> * x.n * x.c * runs_of(x);
}

template <class T>
static void pool_of(const Shape& s, Pool kind, int64_t skip, unsigned seed) {
  using A = Acc<T>;
  const bool has_max = kind == Pool::max || kind == Pool::mean_max, has_mean = kind != Pool::max;
  Run run{std::string("pool ") + name_of<T>() + " " + text(s) + " kind " + std::to_string(int(kind)) + " seed " +
          std::to_string(seed) + (skip ? " unaligned" : "")};
  const int64_t nc = s.n * s.c, parts = workspace_of(s);
  Device<T> x("x", s.total(), true, false, skip);
  Device<A> mean("mean", nc, false, true), max("max", nc, false, true), work("work", 2 * parts, false, true);
  Device<int64_t> index("index", nc, false, true), places("places", parts, false, true);
  fill(x, 2, 0.5);
  for (int64_t i = 0; i < s.total(); i += 3) x[i] = T(float(int(float(x[i]))));  // ties
  if (s.n > 0 && s.s > 2 && has_max) {
    x[at(s, 0, 0, s.s / 2)] = T(NAN);
    for (int64_t i = 0; i < s.s; ++i) x[at(s, s.n - 1, s.c - 1, i)] = T(-INFINITY);
  }
  run.counted(s.total() * sizeof(T), 1, 0, narrow_of<T>(s, skip, true), [&] {
    pool<T>({seed}, s, kind, x.get(), has_mean ? mean.get() : nullptr, has_max ? max.get() : nullptr,
            has_max ? index.get() : nullptr, work.get(), places.get());
  });
  if (run.bad) return;
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t c = 0; c < s.c; ++c) {
      double sum = 0, size = 0, largest = -INFINITY;
      int64_t place = 0;
      for (int64_t i = 0; i < s.s; ++i) {
        const double v = double(x[at(s, n, c, i)]);
        sum += kind == Pool::mean_abs ? std::abs(v) : v;
        size += std::abs(v);
        if (i == 0 || (std::isnan(v) && !std::isnan(largest)) || v > largest) largest = v, place = i;
      }
      const int64_t k = n * s.c + c;
      if (has_mean) run.near("mean", k, mean[k], sum / double(s.s), size / double(s.s));
      if (!has_max) continue;
      run.near("max", k, max[k], largest, 0);
      if (!run.bad && index[k] != place) run.same("index", index[k], place), run.bad = 1;
    }
  }
}

void pools() {
  for (unsigned seed = options().first; seed < options().last; ++seed) {
    for (const Shape& s : shapes(options().slow && seed == options().first)) {
      for_dtypes([&](auto t) {
        using T = decltype(t);
        pool_of<T>(s, Pool::mean, 0, seed);
        pool_of<T>(s, Pool::mean_max, 0, seed);
        pool_of<T>(s, seed % 2 ? Pool::mean_abs : Pool::max, int64_t(seed % 2), seed);
      });
    }
    for_dtypes([&](auto t) { pool_of<decltype(t)>({0, 4, 25, false}, Pool::mean_max, 0, seed); });
  }
}

struct Gates {
  bool channel, pixel, residual;
  Merge merge;
  Act act;
};
static const std::vector<Gates>& gate_forms() {
  static const std::vector<Gates> all = {
      {true, false, false, Merge::product, Act::identity},
      {true, false, true, Merge::product, Act::relu},
      {true, true, true, Merge::product, Act::silu},
      {false, true, false, Merge::product, Act::gelu},
      {true, true, false, Merge::sum, Act::hardswish},
      {true, true, true, Merge::sigmoid_product, Act::relu6},
      {true, true, false, Merge::sigmoid_sum, Act::leaky_relu},
      {true, false, false, Merge::sigmoid_sum, Act::identity},
  };
  return all;
}

static double factor(const Gates& g, double channel, double pixel) {
  const bool product = g.merge == Merge::product || g.merge == Merge::sigmoid_product;
  const double both = !g.pixel ? channel : !g.channel ? pixel : product ? channel * pixel : channel + pixel;
  return g.merge == Merge::product || g.merge == Merge::sum ? both : 1 + 1 / (1 + std::exp(-both));
}

template <class T>
static void scale_of(const Shape& s, const Gates& g, int64_t skip, unsigned seed) {
  using A = Acc<T>;
  Run run{std::string("scale ") + name_of<T>() + " " + text(s) + " act " + std::to_string(int(g.act)) + " merge " +
          std::to_string(int(g.merge)) + " seed " + std::to_string(seed) + (skip ? " unaligned" : "")};
  Device<T> x("x", s.total(), true, false, skip), residual("residual", g.residual ? s.total() : 0, true, false),
      y("y", s.total(), true, true);
  Device<A> channel("gate", g.channel ? s.n * s.c : 0, false, false),
      pixel("pixel", g.pixel ? s.n * s.s : 0, false, false);
  for (auto* d : {&x, &residual}) fill(*d, 2);
  for (auto* d : {&channel, &pixel}) fill(*d, 1, 0.5);
  const double slope = 0.2;
  run.counted(s.total() * sizeof(T), 1 + g.residual, 1, skip ? -1 : 3 * kWide<T>, [&] {
    scale<T>({seed}, s, x.get(), channel.get(), pixel.get(), residual.get(), y.get(), g.merge, g.act, slope);
  });
  if (run.bad) return;
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < s.c; ++c)
      for (int64_t i = 0; i < s.s; ++i) {
        const int64_t k = at(s, n, c, i);
        const double f =
            factor(g, g.channel ? double(channel[n * s.c + c]) : 0, g.pixel ? double(pixel[n * s.s + i]) : 0);
        const double r = g.residual ? double(residual[k]) : 0, product = double(x[k]) * f;
        run.near("y", k, y[k], value(g.act, product + r, slope), std::abs(product) + std::abs(r));
      }
}

void scales() {
  for (unsigned seed = options().first; seed < options().last; ++seed) {
    size_t which = seed;
    for (const Shape& s : shapes(options().slow && seed == options().first))
      for_dtypes([&](auto t) {
        const auto& forms = gate_forms();
        for (size_t k = 0; k < (options().slow ? forms.size() : 2); ++k, ++which)
          scale_of<decltype(t)>(s, forms[which % forms.size()], which % 5 == 0, seed);
      });
    for_dtypes([&](auto t) { scale_of<decltype(t)>({0, 4, 25, true}, gate_forms()[0], 0, seed); });
  }
}

// dgate = Σ e·x with e and dx = e·gate beside it: the whole gradient of `scale` by a channel gate.
template <class T>
static void gradient_of(const Shape& s, Act act, bool residual, bool writes, int64_t skip, unsigned seed) {
  using A = Acc<T>;
  Run run{std::string("gradient ") + name_of<T>() + " " + text(s) + " act " + std::to_string(int(act)) +
          (residual ? " residual" : "") + " seed " + std::to_string(seed) + (skip ? " unaligned" : "")};
  const bool keep = residual && act != Act::identity;
  Device<T> x("x", s.total(), true, false, skip), dy("dy", s.total(), true, false),
      aux("aux", keep ? s.total() : 0, true, false), kept("kept", keep ? s.total() : 0, true, true),
      dx("dx", writes ? s.total() : 0, true, true);
  Device<A> gate("gate", s.n * s.c, false, false), dgate("dgate", s.n * s.c, false, true),
      work("work", workspace_of(s), false, true);
  for (auto* d : {&x, &dy, &aux}) fill(*d, 2);
  fill(gate, 1, 0.5);
  const double slope = 0.2;
  run.counted(s.total() * sizeof(T), 2 + keep, writes + keep,
              narrow_of<T>(s, skip, true) < 0 ? -1 : 5 * narrow_of<T>(s, skip, true), [&] {
                gate_gradient<T>({seed}, s, x.get(), dy.get(), aux.get(), gate.get(), act, slope, kept.get(), dx.get(),
                                 dgate.get(), work.get());
              });
  if (run.bad) return;
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < s.c; ++c) {
      const double f = double(gate[n * s.c + c]);
      double sum = 0, size = 0;
      for (int64_t i = 0; i < s.s; ++i) {
        const int64_t k = at(s, n, c, i);
        const double v = double(x[k]) * f, a = keep ? double(aux[k]) : 0;
        double d = double(dy[k]);
        d *= slope_at(act, keep && from_output(act) ? a : v + a, slope);
        sum += d * double(x[k]);
        size += std::abs(d * double(x[k])) + std::abs(double(dy[k]) * double(x[k]));
        if (keep) run.near("kept", k, kept[k], d, std::abs(double(dy[k])));
        if (writes) run.near("dx", k, dx[k], d * f, std::abs(double(dy[k]) * f));
      }
      run.near("dgate", n * s.c + c, dgate[n * s.c + c], sum, size);
    }
}

void gradients() {
  const std::vector<Act> acts = {Act::identity, Act::relu, Act::silu, Act::gelu, Act::relu6};
  for (unsigned seed = options().first; seed < options().last; ++seed) {
    unsigned which = seed;
    for (const Shape& s : shapes(options().slow && seed == options().first))
      for_dtypes([&](auto t) {
        using T = decltype(t);
        gradient_of<T>(s, acts[which % acts.size()], which % 2, which / 2 % 2, which % 7 == 0, seed);
        ++which;
      });
  }
}

// ---- beyond 2^31 elements and 2^32 bytes: the last blocks of maps that have no memory anywhere else
static void far_maps(bool pixels, unsigned seed) {
  using T = BFloat16;
  const Shape s{3, pixels ? 56 : 1021, (1 << (pixels ? 24 : 20)) + 7, pixels};
  const int64_t length = s.c * s.s, total = s.total(), touched = 1 << 17;
  Run run{"far " + text(s) + " seed " + std::to_string(seed)};
  emulation::Sparse<T> x("x", total, false), y("y", total, true);
  Device<float> gate("gate", s.n * s.c, false, false), work("work", workspace_of(s), false, true),
      sums("sums", s.n * s.c, false, true);
  fill(gate, 1, 0.5);
  for (int64_t e = total - touched; e < total; ++e) x[e] = T(float(e % 13) - 5);
  const auto channel = [&](int64_t e) { return pixels ? e / length * s.c + e % s.c : e / s.s; };
  try {
    scale<T>({seed, 3}, s, x.get(), gate.get(), nullptr, nullptr, y.get(), Merge::product, Act::identity, 0);
    for (int64_t e = total - 3 * kThreads * kWide<T>; e < total; ++e) {
      const double want = double(x[e]) * double(gate[channel(e)]);
      run.near("y", e - total, y[e], want, std::abs(want));
    }
    spread<T>({seed, 3}, s, x.get(), x.get(), gate.get(), gate.get(), y.get(), Act::identity, 0);
    for (int64_t e = total - 3 * kThreads * kWide<T>; e < total; ++e) {
      const double g = double(gate[channel(e)]), want = double(x[e]) * g + g;
      run.near("dx", e - total, y[e], want, std::abs(want) + 1);
    }
    pool<T>({seed, 4}, s, Pool::mean, x.get(), sums.get(), nullptr, nullptr, work.get(), nullptr);
    const int64_t runs = runs_of(s);
    if (pixels) {  // the last run of the last sample: its channels
      for (int64_t c = 0; c < s.c; ++c) {
        double sum = 0, size = 0;
        for (int64_t p = (runs - 1) * pixels_per_run(s.c); p < s.s; ++p) {
          const double v = double(x[at(s, s.n - 1, c, p)]);
          sum += v, size += std::abs(v);
        }
        run.near("part", c, work[(s.n * runs - 1) * s.c + c], sum, size);
      }
    } else {  // the last runs of the last plane
      for (int64_t k = runs - 4; k < runs; ++k) {
        double sum = 0, size = 0;
        for (int64_t i = k * kDirectRun; i < std::min((k + 1) * kDirectRun, s.s); ++i) {
          const double v = double(x[at(s, s.n - 1, s.c - 1, i)]);
          sum += v, size += std::abs(v);
        }
        run.near("part", k, work[(s.n * s.c - 1) * runs + k], sum, size);
      }
    }
  } catch (const emulation::Defect& defect) {
    complain(run.what, defect.what());
  }
}

void far() {
  far_maps(false, options().first);
  far_maps(true, options().first);
  // Divisions by multiplication, and places counted from a block's first, against 64-bit division.
  Run run{"far divisions"};
  std::mt19937_64 draw(5);
  for (int i = 0; i < 100000; ++i) {
    const uint32_t d = uint32_t(draw() % (uint64_t(1) << (1 + draw() % 30))) + 1, n = uint32_t(draw() >> 33);
    const uint32_t edge = n / d * d;
    const Divisor divide(d);
    if (divide(n) != n / d || divide(edge) != edge / d || (edge && divide(edge - 1) != (edge - 1) / d)) {
      run.same("quotient", divide(n), n / d);
      break;
    }
    const Shape s{int64_t(1) << 20, int64_t(draw() % 3000 + 1), int64_t(draw() % 3000 + 1), i % 2 == 0};
    const Rows rows(s);
    const int64_t first = int64_t(draw() % uint64_t(s.total())), length = s.pixels ? s.c : s.s,
                  e = first + draw() % 8192;
    const Place p = Place(rows, first).ahead(rows, uint32_t(e - first));
    if (p.row != e / length || p.at != e % length || p.sample != e / (s.c * s.s) || p.within != p.row % rows.per) {
      run.same("place", p.row, e / length);
      break;
    }
    ++checks;
  }
}

}  // namespace check
