// SPDX-License-Identifier: Apache-2.0
// The golden models on any backend:
//   INSTANTIATE_TEST_SUITE_P(Models, GoldenTest,
//                            testing::ValuesIn(GoldenCases({...})), CaseName);
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "device/device.h"
#include "kernels/kernels.h"
#include "trainer/trainer.h"

namespace gradwire {

struct GoldenBackend {
  std::string name;
  std::function<std::unique_ptr<Device>()> device;
  std::function<std::unique_ptr<Kernels>()> kernels;
};

struct GoldenCase {
  std::string model;
  Precision precision;
  GoldenBackend backend;
};

inline void PrintTo(const GoldenCase& golden, std::ostream* out) {
  *out << golden.model << " " << golden.backend.name;
}

// Each model in each precision.
std::vector<GoldenCase> GoldenCases(const std::vector<GoldenBackend>& backends);
std::string CaseName(const testing::TestParamInfo<GoldenCase>& info);

class GoldenTest : public testing::TestWithParam<GoldenCase> {};

}  // namespace gradwire
