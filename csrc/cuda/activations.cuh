// act(v) and its derivative, the device form of fused_attn/ops/activations.py: same names, same values at the kinks. A
// switch that all threads take the same way costs nothing beside memory, and a kernel per activation would be a binary
// ten times as large.
#pragma once

#include "device.cuh"

namespace fa::cuda {

enum class Act { identity, relu, relu6, leaky_relu, silu, gelu, hardswish, sigmoid, hard_sigmoid, clamp };

// Whether act'(v) can be read off act(v), so that backward keeps the output and not the residual.
inline bool from_output(Act act) { return act == Act::relu || act == Act::relu6; }

FA_DEVICE float exp_of(float v) { return expf(v); }
FA_DEVICE double exp_of(double v) { return exp(v); }
FA_DEVICE float erf_of(float v) { return erff(v); }
FA_DEVICE double erf_of(double v) { return erf(v); }

template <class A>
FA_DEVICE A sigmoid(A v) {
  return A(1) / (A(1) + exp_of(-v));
}
// NaN passes both comparisons and stays.
template <class A>
FA_DEVICE A between(A v, A low, A high) {
  return v <= low ? low : v >= high ? high : v;
}

template <class A>
FA_DEVICE A activate(Act act, A v, A slope) {
  switch (act) {
    case Act::relu:
      return v <= A(0) ? A(0) : v;
    case Act::relu6:
      return between(v, A(0), A(6));
    case Act::leaky_relu:
      return v > A(0) ? v : v * slope;
    case Act::silu:
      return v / (A(1) + exp_of(-v));
    case Act::gelu:
      return v * A(0.5) * (A(1) + erf_of(v * A(0.70710678118654752440)));
    case Act::hardswish:
      return v * between(v + A(3), A(0), A(6)) / A(6);
    case Act::sigmoid:
      return sigmoid(v);
    case Act::hard_sigmoid:
      return between(v + A(3), A(0), A(6)) / A(6);
    case Act::clamp:
      return between(v, A(0), A(1));
    default:
      return v;
  }
}

template <class A>
FA_DEVICE A derivative(Act act, A v, A slope) {
  switch (act) {
    case Act::relu:
      return v <= A(0) ? A(0) : A(1);
    case Act::relu6:
      return v > A(0) && v < A(6) ? A(1) : A(0);
    case Act::leaky_relu:
      return v > A(0) ? A(1) : slope;
    case Act::silu: {
      const A s = sigmoid(v);
      return s * (A(1) + v * (A(1) - s));
    }
    case Act::gelu:
      return A(0.5) * (A(1) + erf_of(v * A(0.70710678118654752440))) +
             v * exp_of(A(-0.5) * v * v) * A(0.39894228040143267794);
    case Act::hardswish:
      return v <= A(-3) ? A(0) : v >= A(3) ? A(1) : v / A(3) + A(0.5);
    case Act::sigmoid: {
      const A s = sigmoid(v);
      return s * (A(1) - s);
    }
    case Act::hard_sigmoid:
      return v > A(-3) && v < A(3) ? A(1) / A(6) : A(0);
    case Act::clamp:
      return v >= A(0) && v <= A(1) ? A(1) : A(0);
    default:
      return A(1);
  }
}

template <Act act>
using Fixed = std::integral_constant<Act, act>;

// f(Fixed<act>{}): one branch for all that a thread has in its registers, and not one per element.
template <class F>
FA_DEVICE void with_act(Act act, const F& f) {
  switch (act) {
    case Act::identity:
      return f(Fixed<Act::identity>{});
    case Act::relu:
      return f(Fixed<Act::relu>{});
    case Act::relu6:
      return f(Fixed<Act::relu6>{});
    case Act::leaky_relu:
      return f(Fixed<Act::leaky_relu>{});
    case Act::silu:
      return f(Fixed<Act::silu>{});
    case Act::gelu:
      return f(Fixed<Act::gelu>{});
    case Act::hardswish:
      return f(Fixed<Act::hardswish>{});
    case Act::sigmoid:
      return f(Fixed<Act::sigmoid>{});
    case Act::hard_sigmoid:
      return f(Fixed<Act::hard_sigmoid>{});
    case Act::clamp:
      return f(Fixed<Act::clamp>{});
  }
}
// The same where only identity and relu can come: what nearly all networks have behind a gate. Such code is short
// enough to be unrolled, so that several accesses of a thread are under way at once.
inline bool is_plain(Act act) { return act == Act::identity || act == Act::relu; }
template <bool Plain, class F>
FA_DEVICE void with_act(Act act, const F& f) {
  if constexpr (!Plain)
    with_act(act, f);
  else if (act == Act::relu)
    f(Fixed<Act::relu>{});
  else
    f(Fixed<Act::identity>{});
}

template <bool Plain, class A, int V>
FA_DEVICE void activate_all(Act act, A (&v)[V], A slope) {
  with_act<Plain>(act, [&](auto fixed) {
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = activate(decltype(fixed)::value, v[j], slope);
  });
}

// d = d·act'(v). A cut gradient is 0, whatever was cut.
template <bool Plain, class A, int V>
FA_DEVICE void through_all(Act act, A (&d)[V], const A (&v)[V], A slope) {
  with_act<Plain>(act, [&](auto fixed) {
    constexpr Act kind = decltype(fixed)::value;
    if constexpr (kind != Act::identity) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A local = derivative(kind, v[j], slope);
        d[j] = local == A(0) ? A(0) : d[j] * local;
      }
    }
  });
}

}  // namespace fa::cuda
