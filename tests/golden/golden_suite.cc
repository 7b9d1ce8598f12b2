// SPDX-License-Identifier: Apache-2.0
// Logprobs and parameter gradients of tiny models against transformers in
// float64 (make_golden.py). The tolerance of each element is computed: the
// response of that element to rounding, measured by the generator, times the
// unit roundoff of the activation type.
#include "tests/golden/golden_suite.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>

#include "checkpoint/safetensors.h"

namespace gradwire {
namespace {

constexpr char kData[] = "tests/golden/data";

std::vector<float> Read(const SafetensorsFile& file, const std::string& name) {
  auto found = file.entries().find(name);
  EXPECT_NE(found, file.entries().end()) << name;
  if (found == file.entries().end()) return {};
  int64_t count = 1;
  for (int64_t dim : found->second.shape) count *= dim;
  std::vector<float> values(count);
  absl::Status status = file.ReadFloats(name, 0, count, values.data());
  EXPECT_TRUE(status.ok()) << status;
  return values;
}

// Of one element of a result whose response to unit relative errors is `noise`.
// An op rounds its output once (u, the activation type) and sums at most a few
// hundred float32 terms before that. The response is a root mean square of a
// dozen samples of uniform errors, so that the largest of some thousand
// elements lies several times above it; kSpread covers that and the rms of u
// itself.
class Tolerance {
 public:
  Tolerance(Precision precision, const std::vector<float>& noise,
            const std::vector<float>& expected)
      : noise_(noise), expected_(expected) {
    const double u32 = std::ldexp(1.0, -24);
    const double sums = std::sqrt(64.0) * u32;
    unit_ = precision == Precision::kF32 ? sums : std::ldexp(1.0, -8);
    double squares = 0;
    for (float value : noise) squares += double{value} * value;
    rms_ = std::sqrt(squares / std::max<size_t>(1, noise.size()));
  }
  double At(size_t i) const {
    const double response = std::max<double>(noise_[i], rms_);
    return kSpread * unit_ * response +
           std::ldexp(std::fabs(expected_[i]), -23);
  }

 private:
  static constexpr double kSpread = 6;
  const std::vector<float>& noise_;
  const std::vector<float>& expected_;
  double unit_;
  double rms_;
};

// The index of the element that exceeds its tolerance most, or -1.
int64_t Worst(const std::vector<float>& found,
              const std::vector<float>& expected, const Tolerance& tolerance) {
  int64_t worst = -1;
  double most = 1;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(double{found[i]} - expected[i]);
    const double share = error / tolerance.At(i);
    if (!(share <= most)) {
      most = share;
      worst = static_cast<int64_t>(i);
    }
  }
  return worst;
}

TEST(GoldenCheckerTest, OneWrongElementFails) {
  const std::vector<float> expected = {1.0f, -2.0f, 0.5f};
  const std::vector<float> noise = {1.0f, 2.0f, 1.0f};
  const Tolerance tolerance(Precision::kF32, noise, expected);
  EXPECT_EQ(Worst(expected, expected, tolerance), -1);
  std::vector<float> found = expected;
  found[1] += 1e-4f;
  EXPECT_EQ(Worst(found, expected, tolerance), 1);
  found = expected;
  found[2] = std::nanf("");
  EXPECT_EQ(Worst(found, expected, tolerance), 2);
}

}  // namespace

std::vector<GoldenCase> GoldenCases(
    const std::vector<GoldenBackend>& backends) {
  std::vector<std::string> models;
  for (const auto& entry : std::filesystem::directory_iterator(kData)) {
    models.push_back(entry.path().filename());
  }
  std::sort(models.begin(), models.end());
  std::vector<GoldenCase> cases;
  for (const std::string& model : models) {
    for (const Precision precision : {Precision::kF32, Precision::kBF16}) {
      for (const GoldenBackend& backend : backends) {
        cases.push_back({model, precision, backend});
      }
    }
  }
  return cases;
}

std::string CaseName(const testing::TestParamInfo<GoldenCase>& info) {
  return info.param.model +
         (info.param.precision == Precision::kF32 ? "_f32_" : "_bf16_") +
         info.param.backend.name;
}

TEST_P(GoldenTest, LogprobsAndGradientsAgreeWithTransformers) {
  const std::string directory = std::string(kData) + "/" + GetParam().model;
  auto file = SafetensorsFile::Open(directory + "/expected.safetensors");
  ASSERT_TRUE(file.ok()) << file.status();
  const std::unique_ptr<Device> device = GetParam().backend.device();
  const std::unique_ptr<Kernels> kernels = GetParam().backend.kernels();
  TrainerOptions options;
  options.model_directory = directory;
  options.precision = GetParam().precision;
  auto trainer = Trainer::Create(
      options, *device, *kernels, [](const MemoryPlan&) {}, [](double) {});
  ASSERT_TRUE(trainer.ok()) << trainer.status();

  const std::vector<float> lengths = Read(**file, "lengths");
  const std::vector<float> tokens = Read(**file, "tokens");
  const std::vector<float> targets = Read(**file, "targets");
  const std::vector<float> weights = Read(**file, "weights");
  std::vector<TrainDatum> data;
  size_t at = 0;
  for (float length : lengths) {
    TrainDatum datum;
    for (int i = 0; i < static_cast<int>(length); ++i, ++at) {
      datum.tokens.push_back(static_cast<int32_t>(tokens[at]));
      datum.targets.push_back(static_cast<int32_t>(targets[at]));
      datum.weights.push_back(weights[at]);
    }
    data.push_back(datum);
  }
  std::vector<std::vector<float>> by_datum(data.size());
  ForwardOptions forward;
  forward.backward = true;
  auto outcome = (*trainer)->Forward(data, forward, [&](DatumLogprobs done) {
    by_datum[done.index] = std::move(done.logprobs);
  });
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  std::vector<float> logprobs;
  for (const auto& part : by_datum) {
    logprobs.insert(logprobs.end(), part.begin(), part.end());
  }

  int checked = 0;
  for (const auto& [name, entry] : (*file)->entries()) {
    if (name != "logprobs" && !name.starts_with("grad/")) continue;
    const std::vector<float> expected = Read(**file, name);
    const std::vector<float> noise = Read(**file, "noise/" + name);
    std::vector<float> found = logprobs;
    if (name != "logprobs") {
      auto gradient = (*trainer)->Gradient(name.substr(5));
      ASSERT_TRUE(gradient.ok()) << gradient.status();
      found = *gradient;
    }
    ASSERT_EQ(found.size(), expected.size()) << name;
    const Tolerance tolerance(GetParam().precision, noise, expected);
    const int64_t worst = Worst(found, expected, tolerance);
    EXPECT_EQ(worst, -1) << name << "[" << worst << "] is " << found[worst]
                         << ", expected " << expected[worst] << " within "
                         << tolerance.At(worst);
    ++checked;
  }
  EXPECT_GT(checked, 10);
}

}  // namespace gradwire
