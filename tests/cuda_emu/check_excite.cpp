// Squeeze-and-excitation, forward and backward; the emulator's own alarms; and main.
#include "check.h"

namespace check {

struct Case {
  Shape shape;
  int64_t hidden;  // 0: one layer
  bool biases, residual;
  Act act, gate, epilogue;
};

template <class W>
static std::vector<double> doubles(Device<W>& d) {
  std::vector<double> out(size_t(d.size()));
  for (int64_t i = 0; i < d.size(); ++i) out[size_t(i)] = double(d[i]);
  return out;
}

template <class T, class W>
static void excite_of(const Case& k, unsigned seed) {
  using A = Acc<T>;
  const Shape& s = k.shape;
  const int64_t c = s.c, h = k.hidden, nc = s.n * c, size = s.total();
  const bool two = h > 0, keep = k.residual && k.epilogue != Act::identity;
  Run run{std::string("excite ") + name_of<T>() + " weights " + name_of<W>() + " " + text(s) + " hidden " +
          std::to_string(h) + " epilogue " + std::to_string(int(k.epilogue)) + " seed " + std::to_string(seed)};
  Device<T> x("x", size, true, false), residual("residual", k.residual ? size : 0, true, false),
      y("y", size, true, true);
  const int64_t first = two ? h : c;
  Device<W> w1("w1", first * c, false, false), b1("b1", k.biases ? first : 0, false, false),
      w2("w2", c * h, false, false), b2("b2", two && k.biases ? c : 0, false, false);
  Device<A> p("p", nc, false, true), z("z", s.n * h, false, true), u("u", nc, false, true),
      gate("gate", nc, false, true), work("work", workspace_of(s), false, true);
  fill(x, 1, 0.3), fill(residual);
  fill(w1, 2 / std::sqrt(double(c))), fill(w2, 2 / std::sqrt(double(h + 1))), fill(b1, 0.3), fill(b2, 0.3);
  const double slope = 0.1;
  const int64_t bytes = seed % 2 ? 1 : kGroupBytes;  // as few samples at once as there can be, or all
  const Network<W> net{w1.get(), b1.get(), w2.get(), b2.get(), c, h, k.act, k.gate, slope};
  run.counted(size * sizeof(T), 2 + k.residual, 1, -1, [&] {
    excite_forward<T, W>({seed}, {s, x.get(), residual.get(), y.get(), net, p.get(), z.get(), u.get(), gate.get(),
                                  k.epilogue, slope, work.get(), bytes});
  });
  if (run.bad) return;

  const auto W1 = doubles(w1), B1 = doubles(b1), W2 = doubles(w2), B2 = doubles(b2);
  std::vector<double> P(nc, 0.0), Z(s.n * h, 0.0), U(P), G(P);
  for (int64_t n = 0; n < s.n; ++n) {
    double* const pn = &P[size_t(n * c)];
    for (int64_t j = 0; j < c; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < s.s; ++i) sum += double(x[at(s, n, j, i)]);
      pn[j] = sum / double(s.s);
    }
    for (int64_t o = 0; o < first; ++o) {
      double sum = k.biases ? B1[size_t(o)] : 0;
      for (int64_t j = 0; j < c; ++j) sum += W1[size_t(o * c + j)] * pn[j];
      (two ? Z[size_t(n * h + o)] : U[size_t(n * c + o)]) = sum;
    }
    for (int64_t o = 0; o < c; ++o) {
      if (two) {
        double sum = k.biases ? B2[size_t(o)] : 0;
        for (int64_t j = 0; j < h; ++j) sum += W2[size_t(o * h + j)] * value(k.act, Z[size_t(n * h + j)], slope);
        U[size_t(n * c + o)] = sum;
      }
      G[size_t(n * c + o)] = value(k.gate, U[size_t(n * c + o)], slope);
    }
  }
  for (int64_t i = 0; i < nc; ++i) {
    run.near("p", i, p[i], P[size_t(i)], 1);
    run.near("gate", i, gate[i], G[size_t(i)], 8);
  }
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t j = 0; j < c; ++j)
      for (int64_t i = 0; i < s.s; ++i) {
        const int64_t e = at(s, n, j, i);
        const double v = double(x[e]) * G[size_t(n * c + j)] + (k.residual ? double(residual[e]) : 0);
        run.near("y", e, y[e], value(k.epilogue, v, slope), 8 * (1 + std::abs(double(x[e]))));
      }

  // Backward, from what this forward kept.
  Device<T> dy("dy", size, true, false), dx("dx", size, true, true), kept("kept", keep ? size : 0, true, true);
  Device<A> again("gate again", nc, false, true), dgate("dgate", nc, false, true), dh("dh", s.n * h, false, true),
      dp("dp", nc, false, true);
  Device<W> dw1("dw1", first * c, false, true), db1("db1", b1.size(), false, true), dw2("dw2", c * h, false, true),
      db2("db2", b2.size(), false, true);
  fill(dy);
  T* const aux = !keep ? nullptr : from_output(k.epilogue) ? y.get() : residual.get();
  const int64_t again_x = !k.residual && k.epilogue != Act::identity;  // the last pass looks the activation up again
  run.counted(size * sizeof(T), 3 + (aux != nullptr) + again_x, 1 + keep, -1, [&] {
    excite_backward<T, W>({seed},
                          {s,         x.get(),   dy.get(),    aux,         dx.get(),   kept.get(), net,       p.get(),
                           z.get(),   u.get(),   again.get(), dgate.get(), dh.get(),   dp.get(),   dw1.get(), db1.get(),
                           dw2.get(), db2.get(), k.epilogue,  slope,       k.residual, work.get(), bytes});
  });
  if (run.bad) return;
  std::vector<double> DW1(W1.size()), DB1(first, 0.0), DW2(W2.size()), DB2(c, 0.0), E(size, 0.0);
  for (int64_t n = 0; n < s.n; ++n) {
    std::vector<double> du(c, 0.0), dz(h, 0.0), back(c, 0.0);
    for (int64_t j = 0; j < c; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < s.s; ++i) {
        const int64_t e = at(s, n, j, i);
        const double v = double(x[e]) * G[size_t(n * c + j)] + (k.residual ? double(residual[e]) : 0);
        const double place = keep && from_output(k.epilogue) ? double(y[e]) : v;
        E[size_t(e)] = double(dy[e]) * (k.epilogue == Act::identity ? 1 : slope_at(k.epilogue, place, slope));
        sum += E[size_t(e)] * double(x[e]);
      }
      du[size_t(j)] = sum * slope_at(k.gate, U[size_t(n * c + j)], slope);
      (two ? DB2 : DB1)[size_t(j)] += du[size_t(j)];
    }
    for (int64_t j = 0; j < h; ++j) {
      double sum = 0;
      for (int64_t o = 0; o < c; ++o) {
        sum += W2[size_t(o * h + j)] * du[size_t(o)];
        DW2[size_t(o * h + j)] += du[size_t(o)] * value(k.act, Z[size_t(n * h + j)], slope);
      }
      dz[size_t(j)] = sum * slope_at(k.act, Z[size_t(n * h + j)], slope);
      DB1[size_t(j)] += dz[size_t(j)];
    }
    for (int64_t o = 0; o < first; ++o)
      for (int64_t j = 0; j < c; ++j) {
        const double d = two ? dz[size_t(o)] : du[size_t(o)];
        DW1[size_t(o * c + j)] += d * P[size_t(n * c + j)];
        back[size_t(j)] += d * W1[size_t(o * c + j)] / double(s.s);
      }
    for (int64_t j = 0; j < c; ++j)
      for (int64_t i = 0; i < s.s; ++i) {
        const int64_t e = at(s, n, j, i);
        const double direct = E[size_t(e)] * G[size_t(n * c + j)];
        run.near("dx", e, dx[e], direct + back[size_t(j)], 40, keep ? std::abs(direct) : 0);
        if (keep) run.near("dresidual", e, kept[e], E[size_t(e)], 8);
      }
  }
  const double terms = 40 * double(s.n) * std::sqrt(double(s.s));
  for (int64_t i = 0; i < dw1.size(); ++i) run.near("dw1", i, dw1[i], DW1[size_t(i)], terms);
  for (int64_t i = 0; i < dw2.size(); ++i) run.near("dw2", i, dw2[i], DW2[size_t(i)], terms);
  for (int64_t i = 0; i < db1.size(); ++i) run.near("db1", i, db1[i], DB1[size_t(i)], terms);
  for (int64_t i = 0; i < db2.size(); ++i) run.near("db2", i, db2[i], DB2[size_t(i)], terms);
}

void excitations() {
  std::vector<Case> cases = {
      {{2, 32, 49, false}, 5, true, false, Act::silu, Act::sigmoid, Act::identity},
      {{3, 17, 25, false}, 0, true, true, Act::identity, Act::sigmoid, Act::relu},
      {{11, 8, 9, false}, 3, false, true, Act::gelu, Act::sigmoid, Act::silu},
      {{2, 24, 36, true}, 40, true, false, Act::silu, Act::sigmoid, Act::silu},
      {{9, 33, 4, true}, 2, true, true, Act::silu, Act::identity, Act::identity},
      {{1, 70, 300, false}, 4, true, true, Act::silu, Act::sigmoid, Act::gelu},
      {{0, 4, 9, false}, 2, true, false, Act::relu, Act::sigmoid, Act::identity},
  };
  if (options().slow) {
    cases.push_back({{4, 256, 196, false}, 16, true, true, Act::silu, Act::sigmoid, Act::relu6});
    cases.push_back({{20, 64, 49, true}, 16, true, true, Act::gelu, Act::sigmoid, Act::relu});
    cases.push_back({{18, 256, 3136, false}, 16, true, false, Act::silu, Act::sigmoid, Act::identity});  // two groups
  }
  for (unsigned seed = options().first; seed < options().last; ++seed)
    for (const Case& k : cases) {
      if (k.shape.total() > 1 << 15 && seed != options().first) continue;  // large ones under one schedule
      for_dtypes([&](auto t) {
        using T = decltype(t);
        excite_of<T, T>(k, seed);
        if constexpr (!std::is_same_v<T, Acc<T>>)
          if (seed % 2 == 0) excite_of<T, float>(k, seed);
      });
    }
}

// ---- the emulator's own alarms: each kernel here has one defect
static __global__ void no_barrier(float* out) {
  FA_SHARED(float, shared, kThreads);
  shared[threadIdx.x] = 1;
  store(out + threadIdx.x, shared[(threadIdx.x + 32) % kThreads]);
}
static __global__ void half_a_barrier(float* out) {
  if (threadIdx.x < 100) __syncthreads();
  store(out + threadIdx.x, 1.f);
}
static __global__ void half_a_shuffle(float* out) {
  float v = 1;
  if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(kAllLanes, v, 1);
  store(out + threadIdx.x, v);
}
static __global__ void two_shuffles(float* out) {
  float v = 1;
  if (threadIdx.x % 2)
    v = __shfl_xor_sync(kAllLanes, v, 1);
  else
    v = __shfl_xor_sync(kAllLanes, v, 2);
  store(out + threadIdx.x, v);
}
static __global__ void half_a_mask(float* out) {  // correct: the lanes of the mask are all there
  float v = float(threadIdx.x);
  if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(0xffffu, v, 8);
  store(out + threadIdx.x, v);
}
static __global__ void beside(float* out) { store(out + threadIdx.x + 1, 1.f); }
static __global__ void unaligned(float* out) {
  if (threadIdx.x < 8) store<4>(out + 1 + threadIdx.x * 4, Pack<float, 4>{});
}
static __global__ void constant(const float* in) { store(const_cast<float*>(in) + threadIdx.x, 1.f); }
static __global__ void behind_shared(float* out) {
  FA_SHARED(float, shared, 8);
  shared[threadIdx.x % 9] = 1;
  store(out + threadIdx.x, 1.f);
}
static __global__ void too_soon(float* out) {  // the second round writes what the first still reads
  FA_SHARED(float, shared, kThreads);
  float sum = 0;
  for (int round = 1; round <= 2; ++round) {
    shared[threadIdx.x] = float(round);
    __syncthreads();
    sum += shared[kThreads - 1 - threadIdx.x] - float(round);
  }
  store(out + threadIdx.x, sum);
}

template <class K>
static void alarm(const char* name, const char* wanted, bool writable, K kernel) {
  std::string seen = "nothing";
  for (unsigned seed = options().first; seed < options().last && seen == "nothing"; ++seed) {
    Device<float> out(name, kThreads, true, writable);
    try {
      launch(Stream{seed}, kernel, 1, 0, out.get());
      for (int i = 0; i < kThreads; ++i)
        if (std::isnan(out[i]) || (std::string(name) == "too soon" && out[i] != 0)) seen = "wrong numbers";
    } catch (const emulation::Defect& defect) {
      seen = defect.what();
    }
  }
  ++checks;
  if (seen.find(wanted) == std::string::npos)
    complain(std::string("the alarm for ") + name, "wanted \"" + std::string(wanted) + "\", saw " + seen);
}

void emulator() {
  alarm("no barrier", "wrong numbers", true, no_barrier);
  alarm("too soon", "wrong numbers", true, too_soon);
  alarm("half a barrier", "deadlock", true, half_a_barrier);
  alarm("half a shuffle", "ended", true, half_a_shuffle);
  alarm("two shuffles", "different shuffles", true, two_shuffles);
  alarm("half a mask", "nothing", true, half_a_mask);
  alarm("beside", "beside every array", true, beside);
  alarm("unaligned", "misaligned", true, unaligned);
  alarm("constant", "constant", false, constant);
  alarm("behind shared", "behind shared memory", true, behind_shared);
}

}  // namespace check

// check GROUP FIRST LAST [slow]: under the schedules FIRST to LAST - 1. Prints failures and a count; fails with 1.
int main(int argc, char** argv) {
  auto& o = check::options();
  if (argc < 4) return std::printf("check GROUP FIRST LAST [slow]\n"), 2;
  o.group = argv[1], o.first = unsigned(std::atoi(argv[2])), o.last = unsigned(std::atoi(argv[3])), o.slow = argc > 4;
  const auto run = [&](const char* name, void (*f)()) {
    if (o.group == "all" || o.group == name) f();
  };
  run("emulator", check::emulator);
  run("pool", check::pools);
  run("scale", check::scales);
  run("gradient", check::gradients);
  run("excite", check::excitations);
  run("far", check::far);
  std::printf("%lld checks, %d failures\n", static_cast<long long>(check::checks), check::failures);
  return check::failures != 0 || check::checks == 0;
}
