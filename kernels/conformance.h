// SPDX-License-Identifier: Apache-2.0
// One suite for every backend: each op on each case against its definition in
// kernels/reference, with tolerances that follow from it.
//
// A backend's test instantiates it, and attention's part for every way that the
// backend has to make it:
//   INSTANTIATE_TEST_SUITE_P(Cpu, KernelsConformanceTest,
//   testing::Values(...));
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "device/device.h"
#include "kernels/kernels.h"
#include "kernels/reference/number.h"
#include "kernels/state_digest.h"

namespace gradwire {

struct KernelsBackend {
  std::string name;
  std::function<std::unique_ptr<Device>()> device;
  std::function<std::unique_ptr<Kernels>()> kernels;
  DType act = DType::kF32;
};

inline void PrintTo(const KernelsBackend& backend, std::ostream* out) {
  *out << backend.name << " " << DTypeName(backend.act);
}

// Empty if every element of `got` lies within its bound and one rounding to
// got's type; else a sentence on the worst element.
std::string CompareWithin(const Tensor& got, const std::vector<Tracked>& want);

// A tensor on the device with the values it began with on the host.
struct Operand {
  Tensor host;
  Tensor device;
};

// What AdamW changes, with a gradient and a digest.
struct OptimizerState {
  Operand weight, low, m, v, grad, digest;

  // `first` is the place of element 0 in the model.
  AdamWTensors Device(int64_t first) const {
    return {weight.device, low.device, m.device,     v.device,
            grad.device,   first,      digest.device};
  }
  AdamWTensors Host(int64_t first) const {
    return {weight.host, low.host, m.host, v.host, grad.host, first};
  }
};

class KernelsConformanceTest : public testing::TestWithParam<KernelsBackend> {
 protected:
  KernelsConformanceTest();
  ~KernelsConformanceTest() override;

  DType act() const { return GetParam().act; }
  Kernels& kernels() { return *kernels_; }
  Stream& stream() { return *stream_; }

  // Normally distributed, rounded to dtype.
  Operand Normal(DType dtype, std::initializer_list<int64_t> shape,
                 float deviation = 1.0f);
  // NaN everywhere, or of an integer type some odd value: an element that an
  // op should write and does not, shows.
  Operand Unwritten(DType dtype, std::initializer_list<int64_t> shape);
  Operand Ints(const std::vector<int32_t>& values,
               std::initializer_list<int64_t> shape);
  // Values in [0, limit).
  Operand RandomInts(std::initializer_list<int64_t> shape, int32_t limit);

  // Sends host values that were changed to the device.
  void Upload(const Operand& operand);
  // What the device holds now, in host memory.
  Tensor Fetch(const Tensor& device);
  void ExpectWithin(const std::string& what, const Operand& got,
                    const std::vector<Tracked>& want);
  void ExpectSame(const std::string& what, const Tensor& a, const Tensor& b);
  // That `squares` are the sums of squares of what `matrix` holds now.
  void ExpectSquares(const std::string& what, const Operand& matrix,
                     const Operand& squares);

  // Of any bits, NaNs and infinities among them; the digest is zero.
  OptimizerState AnyState(int64_t n, DType moment);
  void SetDigest(const OptimizerState& state, const DigestSums& sums);
  DigestSums FetchDigest(const OptimizerState& state);
  // Of what it holds, by the op of its own.
  DigestSums DigestOf(const OptimizerState& state, int64_t first);

  std::mt19937 random_{17};

 private:
  Tensor NewHost(DType dtype, std::initializer_list<int64_t> shape);
  Tensor NewDevice(const Tensor& host);

  std::unique_ptr<Device> device_;
  std::unique_ptr<Kernels> kernels_;
  std::unique_ptr<Stream> stream_;
  std::vector<std::vector<char>> host_memory_;
  std::vector<std::unique_ptr<DeviceBuffer>> device_memory_;
  std::vector<Tensor> guards_;  // memory around the tensors, checked at the end
};

class AttentionConformanceTest : public KernelsConformanceTest {};

}  // namespace gradwire
