// A run of a plane or of a pixel through all branches at once. Kernels take B branches, or for B = 0 any number; gates
// and what is added lie (N, branch, C) with `gn` numbers a sample, the first branch's at the pointer.

template <int B>
FA_INLINE constexpr int64_t branches_in(int64_t count) {
  return B ? B : count;
}
// f.branch(b, …) for every branch; unrolled where their number is known, so that pointers and sums stay in registers.
template <int B, class F, class... Args>
FA_INLINE void every(int64_t count, F& f, Args&&... args) {
  if constexpr (B > 1) {
    FA_UNROLL
    for (int64_t b = 0; b < B; ++b) f.branch(b, args...);
  } else {
    for (int64_t b = 0; b < branches_in<B>(count); ++b) f.branch(b, args...);
  }
}

// y = Σ_b gate_b·x_b
template <class T, int B, bool PerElement>
struct Weigh {
  using A = Acc<T>;
  const T* x[kMostBranches];
  const A* gate;  // of the first branch, at the run's start
  A own[kMostBranches];
  int64_t c, count;
  T* y;
  bool stream;

  template <class V>
  FA_INLINE void branch(int64_t b, int64_t i, V& v) const {
    if constexpr (is_vector<V>) soon(x[b] + i);
    const V term = load<V>(x[b] + i) * (PerElement ? get<V>(gate + b * c + i) : set<V>(own[b]));
    v = b ? v + term : term;
  }
  template <class V>
  FA_INLINE void at(int64_t i) {
    V v{};
    every<B>(count, *this, i, v);
    if constexpr (is_vector<V>)
      if (!stream) soon_written(y + i);
    store<V>(y + i, v, stream);
  }
};

template <class T, int B>
void weigh_runs_as(const Branches& x, const Map& y, Range runs, const Acc<T>* gate, int64_t gn, bool stream) {
  const int64_t c = y.c;
  Place at(runs.begin, y.pixels ? y.s : c);
  for (int64_t i = runs.begin; i < runs.end; ++i, at.next()) {
    const int64_t n = at.outer, k = at.inner;
    if (y.pixels) {
      Weigh<T, B, true> f;
      for (int64_t b = 0; b < branches_in<B>(x.count); ++b) f.x[b] = x.map[b].template pixel<const T>(n, k);
      f.gate = gate + n * gn, f.c = c, f.count = x.count, f.y = y.pixel<T>(n, k), f.stream = stream;
      each<Acc<T>>(c, f);
    } else {
      Weigh<T, B, false> f;
      for (int64_t b = 0; b < branches_in<B>(x.count); ++b) {
        f.x[b] = x.map[b].template plane<const T>(n, k);
        f.own[b] = gate[n * gn + b * c + k];
      }
      f.c = c, f.count = x.count, f.y = y.plane<T>(n, k), f.stream = stream;
      each<Acc<T>>(y.s, f);
    }
  }
  streamed(stream);
}

// dx_b = gate_b·dy + add_b
template <class T, int B, bool PerElement>
struct Share {
  using A = Acc<T>;
  const T* dy;
  const A *gate, *add;  // of the first branch, at the run's start
  A own[kMostBranches], more[kMostBranches];
  int64_t c, count;
  T* dx[kMostBranches];
  bool stream;

  template <class V>
  FA_INLINE void branch(int64_t b, int64_t i, V d) const {
    if constexpr (is_vector<V>)
      if (!stream) soon_written(dx[b] + i);
    const V g = PerElement ? get<V>(gate + b * c + i) : set<V>(own[b]);
    store<V>(dx[b] + i, d * g + (PerElement ? get<V>(add + b * c + i) : set<V>(more[b])), stream);
  }
  template <class V>
  FA_INLINE void at(int64_t i) {
    if constexpr (is_vector<V>) soon(dy + i);
    every<B>(count, *this, i, load<V>(dy + i));
  }
};

template <class T, int B>
void share_runs_as(const Map& dy, const Branches& dx, Range runs, const Acc<T>* gate, const Acc<T>* add, int64_t gn,
                   bool stream) {
  const int64_t c = dy.c;
  Place at(runs.begin, dy.pixels ? dy.s : c);
  for (int64_t i = runs.begin; i < runs.end; ++i, at.next()) {
    const int64_t n = at.outer, k = at.inner;
    if (dy.pixels) {
      Share<T, B, true> f;
      for (int64_t b = 0; b < branches_in<B>(dx.count); ++b) f.dx[b] = dx.map[b].template pixel<T>(n, k);
      f.dy = dy.pixel<const T>(n, k), f.gate = gate + n * gn, f.add = add + n * gn;
      f.c = c, f.count = dx.count, f.stream = stream;
      each<Acc<T>>(c, f);
    } else {
      Share<T, B, false> f;
      for (int64_t b = 0; b < branches_in<B>(dx.count); ++b) {
        f.dx[b] = dx.map[b].template plane<T>(n, k);
        f.own[b] = gate[n * gn + b * c + k], f.more[b] = add[n * gn + b * c + k];
      }
      f.dy = dy.plane<const T>(n, k), f.c = c, f.count = dx.count, f.stream = stream;
      each<Acc<T>>(dy.s, f);
    }
  }
  streamed(stream);
}

// dgate_b = Σ dy·x_b, and with Write dx_b = gate_b·dy from the same read
template <class T, int B, bool Write>
struct Project {
  using A = Acc<T>;
  const T* x[kMostBranches];
  const T* dy;
  T* dx[kMostBranches];
  int64_t count;

  template <class V>
  FA_INLINE void branch(int64_t b, int64_t i, V d, const V* gate, V* total, int64_t stride) const {
    if constexpr (is_vector<V>) {
      soon(x[b] + i);
      if constexpr (Write) soon_written(dx[b] + i);
    }
    total[b * stride] = total[b * stride] + d * load<V>(x[b] + i);
    if constexpr (Write) store<V>(dx[b] + i, d * gate[b]);
  }
  // total: `stride` numbers from one branch to the next
  template <class V>
  FA_INLINE void step(int64_t i, const V* gate, V* total, int64_t stride) const {
    if constexpr (is_vector<V>) soon(dy + i);
    every<B>(count, *this, i, load<V>(dy + i), gate, total, stride);
  }
};

// Sums are put aside every 4096 elements, in double: a plane of millions loses no more than one of thousands.
template <class T, int B, bool Write>
FA_INLINE void project_run(const Project<T, B, Write>& f, int64_t n, const Acc<T>* gate, int64_t c, Acc<T>* dgate) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = width<A>, U = B == 1 ? 4 : B == 2 ? 2 : 1;  // four chains hide the latency of an addition
  constexpr int64_t most = B ? B : kMostBranches;
  V total[most * U], gates[most];
  A rest[most], each_gate[most];
  double aside[most];
  for (int64_t b = 0; b < branches_in<B>(f.count); ++b) {
    for (int64_t u = 0; u < U; ++u) total[b * U + u] = V{};
    each_gate[b] = Write ? gate[b * c] : A(0);
    gates[b] = set<V>(each_gate[b]);
    rest[b] = 0, aside[b] = 0;
  }
  int64_t i = 0;
  for (;;) {
    const int64_t stop = std::min<int64_t>(n, i + 4096);
    for (; i + U * W <= stop; i += U * W) {
      if constexpr (U > 1) {
        FA_UNROLL
        for (int64_t u = 0; u < U; ++u) f.template step<V>(i + u * W, gates, total + u, U);
      } else {
        f.template step<V>(i, gates, total, U);
      }
    }
    for (int64_t b = 0; b < branches_in<B>(f.count); ++b) {
      V all = total[b * U];
      for (int64_t u = 1; u < U; ++u) all = all + total[b * U + u];
      aside[b] += sum(all);
      for (int64_t u = 0; u < U; ++u) total[b * U + u] = V{};
    }
    if (n - i < U * W) break;
  }
  for (; i + W <= n; i += W) f.template step<V>(i, gates, total, U);
  for (; i < n; ++i) f.template step<A>(i, each_gate, rest, 1);
  for (int64_t b = 0; b < branches_in<B>(f.count); ++b) dgate[b * c] = A(aside[b] + (sum(total[b * U]) + rest[b]));
}

template <class T, int B, bool Write>
void project_planes_as(const Branches& x, const Map& dy, const Branches& dx, Range rows, const Acc<T>* gate,
                       Acc<T>* dgate, int64_t gn) {
  const int64_t c = dy.c;
  Place at(rows.begin, c);
  for (int64_t r = rows.begin; r < rows.end; ++r, at.next()) {
    const int64_t n = at.outer, k = at.inner;
    Project<T, B, Write> f;
    for (int64_t b = 0; b < branches_in<B>(x.count); ++b) {
      f.x[b] = x.map[b].template plane<const T>(n, k);
      if constexpr (Write) f.dx[b] = dx.map[b].template plane<T>(n, k);
    }
    f.dy = dy.plane<const T>(n, k), f.count = x.count;
    project_run<T, B, Write>(f, dy.s, gate + n * gn + k, c, dgate + n * gn + k);
  }
}

// Four pixels at a time, so that the sums over C are loaded and stored once for them.
template <class T, int B, bool Write>
struct ProjectPixels {
  using A = Acc<T>;
  Project<T, B, Write> at_pixel[4];
  int rows;
  int64_t c, count;
  const A* gate;
  A* dgate;

  template <class V>
  FA_INLINE void at(int64_t i) {
    V total[B ? B : kMostBranches], gates[B ? B : kMostBranches];
    for (int64_t b = 0; b < branches_in<B>(count); ++b) {
      total[b] = get<V>(dgate + b * c + i);
      gates[b] = Write ? get<V>(gate + b * c + i) : V{};
    }
    for (int j = 0; j < rows; ++j) at_pixel[j].template step<V>(i, gates, total, 1);
    for (int64_t b = 0; b < branches_in<B>(count); ++b) put<V>(dgate + b * c + i, total[b]);
  }
};

// Pixels [s.begin, s.end) of one sample into dgate (branch, c).
template <class T, int B, bool Write>
void project_pixels_as(const Branches& x, const Map& dy, const Branches& dx, int64_t n, Range s, const Acc<T>* gate,
                       Acc<T>* dgate) {
  const int64_t c = dy.c;
  for (int64_t i = 0; i < x.count * c; ++i) dgate[i] = 0;
  for (int64_t p = s.begin; p < s.end;) {
    ProjectPixels<T, B, Write> f;
    f.rows = int(std::min<int64_t>(4, s.end - p));
    for (int j = 0; j < f.rows; ++j) {
      for (int64_t b = 0; b < branches_in<B>(x.count); ++b) {
        f.at_pixel[j].x[b] = x.map[b].template pixel<const T>(n, p + j);
        if constexpr (Write) f.at_pixel[j].dx[b] = dx.map[b].template pixel<T>(n, p + j);
      }
      f.at_pixel[j].dy = dy.pixel<const T>(n, p + j), f.at_pixel[j].count = x.count;
    }
    f.c = c, f.count = x.count, f.gate = gate, f.dgate = dgate;
    each<Acc<T>>(c, f);
    p += f.rows;
  }
}

// f(B) for a number of branches that has code of its own, else f(0).
template <class T, class F>
FA_INLINE void by_count(int64_t count, const F& f) {
  if constexpr (has_fast<T>) {
    if (count == 1) return f(std::integral_constant<int, 1>{});
    if (count == 2) return f(std::integral_constant<int, 2>{});
    if (count == 4) return f(std::integral_constant<int, 4>{});
  }
  f(std::integral_constant<int, 0>{});
}
template <class T>
void weigh_runs(const Branches& x, const Map& y, Range runs, const Acc<T>* gate, int64_t gn, bool stream) {
  by_count<T>(x.count, [&](auto b) { weigh_runs_as<T, decltype(b)::value>(x, y, runs, gate, gn, stream); });
}
template <class T>
void share_runs(const Map& dy, const Branches& dx, Range runs, const Acc<T>* gate, const Acc<T>* add, int64_t gn,
                bool stream) {
  by_count<T>(dx.count, [&](auto b) { share_runs_as<T, decltype(b)::value>(dy, dx, runs, gate, add, gn, stream); });
}
template <class T, bool Write>
void project_planes(const Branches& x, const Map& dy, const Branches& dx, Range rows, const Acc<T>* gate, Acc<T>* dgate,
                    int64_t gn) {
  by_count<T>(x.count,
              [&](auto b) { project_planes_as<T, decltype(b)::value, Write>(x, dy, dx, rows, gate, dgate, gn); });
}
template <class T, bool Write>
void project_pixels(const Branches& x, const Map& dy, const Branches& dx, int64_t n, Range s, const Acc<T>* gate,
                    Acc<T>* dgate) {
  by_count<T>(x.count, [&](auto b) { project_pixels_as<T, decltype(b)::value, Write>(x, dy, dx, n, s, gate, dgate); });
}
