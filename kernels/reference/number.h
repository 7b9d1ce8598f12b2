// SPDX-License-Identifier: Apache-2.0
// The numbers that the reference computes with.
//
// A reference op is a template over its number type. With double it is the
// op's definition. With Tracked it carries, beside each value, a bound on how
// far a correct float32 implementation may be from it, so that a tolerance
// follows from the op, its inputs and its element types and is never typed in.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "device/dtype.h"
#include "device/tensor.h"

namespace gradwire {

// Half a unit in the last place, relative.
constexpr double UnitRoundoff(DType dtype) {
  return dtype == DType::kBF16 ? 1.0 / 256 : 1.0 / (1 << 24);
}
constexpr double kF32Roundoff = UnitRoundoff(DType::kF32);
// Vector exp, log and division may be off by a few units in the last place.
constexpr double kFunctionRoundoff = 4 * kF32Roundoff;
// Below it float32 loses bits or flushes to zero.
constexpr double kF32Tiny = 1.2e-38;

struct Tracked {
  double value = 0;
  double error = 0;

  Tracked() = default;
  Tracked(double v, double e = 0) : value(v), error(e) {}  // NOLINT
};

inline Tracked operator+(const Tracked& a, const Tracked& b) {
  return {a.value + b.value,
          a.error + b.error +
              kF32Roundoff * (std::abs(a.value) + std::abs(b.value))};
}
inline Tracked operator-(const Tracked& a) { return {-a.value, a.error}; }
inline Tracked operator-(const Tracked& a, const Tracked& b) { return a + -b; }
inline Tracked operator*(const Tracked& a, const Tracked& b) {
  const double product = a.value * b.value;
  return {product, std::abs(a.value) * b.error + std::abs(b.value) * a.error +
                       a.error * b.error + kF32Roundoff * std::abs(product) +
                       kF32Tiny};
}
// f with its derivative's bound at x, which covers the whole error interval.
inline Tracked Apply(double value, double slope, const Tracked& x) {
  return {value,
          slope * x.error + kFunctionRoundoff * std::abs(value) + kF32Tiny};
}
inline Tracked Reciprocal(const Tracked& x) {
  const double least = std::max(std::abs(x.value) - x.error, kF32Tiny);
  return Apply(1 / x.value, 1 / (least * least), x);
}
inline Tracked Exp(const Tracked& x) {
  return Apply(std::exp(x.value), std::exp(x.value + x.error), x);
}
inline Tracked Log(const Tracked& x) {
  const double least = std::max(x.value - x.error, kF32Tiny);
  return Apply(std::log(x.value), 1 / least, x);
}
inline Tracked Sqrt(const Tracked& x) {
  const double least = std::max(x.value - x.error, kF32Tiny);
  return Apply(std::sqrt(x.value), 0.5 / std::sqrt(least), x);
}
// 1 / (1 + e^-x); its slope is at most its value and at most 1/4.
inline Tracked Sigmoid(const Tracked& x) {
  const double value = 1 / (1 + std::exp(-x.value));
  return Apply(value, std::min(0.25, value * std::exp(x.error)), x);
}

inline double Reciprocal(double x) { return 1 / x; }
inline double Exp(double x) { return std::exp(x); }
inline double Log(double x) { return std::log(x); }
inline double Sqrt(double x) { return std::sqrt(x); }
inline double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double Value(double x) { return x; }
inline double Value(const Tracked& x) { return x.value; }

// A value that an implementation may keep in `act` between two steps.
inline double MayRound(DType, double x) { return x; }
inline Tracked MayRound(DType act, const Tracked& x) {
  return {x.value, x.error + UnitRoundoff(act) * (std::abs(x.value) + x.error)};
}

// A sum in whatever order: n terms cost n roundings of the sum of their sizes.
template <class Num>
class Sum;
template <>
class Sum<double> {
 public:
  void Add(double x) { total_ += x; }
  double Total() const { return total_; }

 private:
  double total_ = 0;
};
template <>
class Sum<Tracked> {
 public:
  void Add(const Tracked& x) {
    value_ += x.value;
    error_ += x.error;
    size_ += std::abs(x.value) + x.error;
    ++terms_;
  }
  Tracked Total() const {
    return {value_, error_ + kF32Roundoff * terms_ * size_};
  }

 private:
  double value_ = 0, error_ = 0, size_ = 0;
  double terms_ = 0;
};

// An element of a tensor in host memory.
inline double At(const Tensor& t, int64_t i) {
  if (t.dtype() == DType::kF64) return t.data<double>()[i];
  return t.dtype() == DType::kBF16
             ? static_cast<double>(static_cast<float>(t.data<BFloat16>()[i]))
             : static_cast<double>(t.data<float>()[i]);
}

// Rounds a result into a tensor.
inline void Store(const std::vector<double>& from, const Tensor& to) {
  for (size_t i = 0; i < from.size(); ++i) {
    if (to.dtype() == DType::kBF16) {
      to.data<BFloat16>()[i] = BFloat16(static_cast<float>(from[i]));
    } else if (to.dtype() == DType::kF64) {
      to.data<double>()[i] = from[i];
    } else {
      to.data<float>()[i] = static_cast<float>(from[i]);
    }
  }
}

}  // namespace gradwire
