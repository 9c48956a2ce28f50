// A block of rows of one plane with what lies around it, zeros outside: rows [first, first + rows) by pitch columns,
// the plane's column 0 at `left`.
template <class A>
void plane_window(const A* plane, int64_t h, int64_t w, int64_t first, int64_t rows, int64_t left, int64_t pitch,
                  A* out) {
  for (int64_t i = 0; i < rows; ++i, out += pitch) {
    const bool inside = first + i >= 0 && first + i < h;
    for (int64_t j = 0; j < left; ++j) out[j] = 0;
    if (inside) std::memcpy(out + left, plane + (first + i) * w, sizeof(A) * size_t(w));
    for (int64_t j = inside ? left + w : left; j < pitch; ++j) out[j] = 0;
  }
}

// Four rows of a vector side by side: four chains hide the latency of a multiplication. The window has rows and columns
// enough for a whole number of both; what is beyond the plane is computed and not written.
template <class A>
void plane_conv_rows(const A* windows, int64_t planes, int64_t size, int64_t pitch, const A* weight, int64_t k,
                     int64_t l, A bias, int64_t rows, int64_t w, A* out) {
  using V = Vec<A>;
  constexpr int64_t W = width<A>;
  for (int64_t i = 0; i < rows; i += 4) {
    for (int64_t j = 0; j < w; j += W) {
      V t[4] = {set<V>(bias), set<V>(bias), set<V>(bias), set<V>(bias)};
      const A* by = weight;
      for (int64_t p = 0; p < planes; ++p)
        for (int64_t a = 0; a < k; ++a) {
          const A* from = windows + p * size + (i + a) * pitch + j;
          for (int64_t b = 0; b < l; ++b, ++from, ++by) {
            const V f = set<V>(*by);
            FA_UNROLL
            for (int r = 0; r < 4; ++r) t[r] = t[r] + f * get<V>(from + r * pitch);
          }
        }
      FA_UNROLL
      for (int r = 0; r < 4; ++r) {
        if (i + r >= rows) break;
        A* to = out + (i + r) * w + j;
        if (j + W <= w)
          put<V>(to, t[r]);
        else
          for (int64_t c = 0; c < w - j; ++c) to[c] = t[r][c];
      }
    }
  }
}

// D neighbours in a row of the weight's gradient.
template <class A, int D>
FA_INLINE void plane_conv_row_sums(const A* window, const A* dy, int64_t pitch, int64_t rows, int64_t w, A* out) {
  using V = Vec<A>;
  V t[D] = {};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < w; j += width<A>) {
      const V e = get<V>(dy + i * pitch + j);
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) t[d] = t[d] + e * get<V>(window + i * pitch + j + d);
    }
  for (int d = 0; d < D; ++d) out[d] = sum(t[d]);
}

// dweight (planes, k, l) of a block of rows; dy's own window starts at its first row and column.
template <class A>
void plane_conv_weight_sums(const A* windows, int64_t planes, int64_t size, int64_t pitch, const A* dy, int64_t k,
                            int64_t l, int64_t rows, int64_t w, A* out) {
  for (int64_t p = 0; p < planes; ++p)
    for (int64_t a = 0; a < k; ++a) {
      const A* from = windows + p * size + a * pitch;
      int64_t b = 0;
      for (; b + 7 <= l; b += 7, out += 7) plane_conv_row_sums<A, 7>(from + b, dy, pitch, rows, w, out);
      for (; b + 3 <= l; b += 3, out += 3) plane_conv_row_sums<A, 3>(from + b, dy, pitch, rows, w, out);
      for (; b < l; ++b, ++out) plane_conv_row_sums<A, 1>(from + b, dy, pitch, rows, w, out);
    }
}
