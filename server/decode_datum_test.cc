// SPDX-License-Identifier: Apache-2.0
#include "server/decode_datum.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "base/error.h"

namespace gradwire {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kIndex = 7;
const RequestLimits kLimits{.vocab = 10, .max_context = 4};

template <typename T>
std::string Bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()),
          values.size() * sizeof(T)};
}

v1::TensorData Tensor(v1::DataType dtype, const std::vector<int64_t>& shape,
                      const std::string& data) {
  v1::TensorData tensor;
  tensor.set_dtype(dtype);
  for (const int64_t size : shape) tensor.add_shape(size);
  tensor.set_data(data);
  return tensor;
}

v1::TensorData Floats(const std::vector<int64_t>& shape,
                      const std::vector<float>& values) {
  return Tensor(v1::DATA_TYPE_FLOAT32, shape, Bytes(values));
}

v1::TensorData Ids(const std::vector<int64_t>& shape,
                   const std::vector<int64_t>& values) {
  return Tensor(v1::DATA_TYPE_INT64, shape, Bytes(values));
}

v1::TensorData Sparse(v1::TensorData tensor,
                      const std::vector<int32_t>& columns,
                      const std::vector<int64_t>& offsets) {
  tensor.set_csr_columns(Bytes(columns));
  tensor.set_csr_row_offsets(Bytes(offsets));
  return tensor;
}

v1::TensorData& Input(v1::Datum& datum, const std::string& name) {
  return (*datum.mutable_loss_fn_inputs())[name];
}

void SetTokens(v1::Datum& datum, const std::vector<int32_t>& tokens) {
  datum.mutable_chunks(0)->mutable_text()->set_tokens(Bytes(tokens));
}

// Three positions, one target each.
v1::Datum GoodDatum() {
  v1::Datum datum;
  datum.add_chunks();
  SetTokens(datum, {1, 2, 3});
  Input(datum, "target_tokens") = Ids({3}, {2, 3, 4});
  return datum;
}

// Three positions, two targets each.
v1::Datum PairDatum() {
  v1::Datum datum = GoodDatum();
  Input(datum, "target_tokens") = Ids({3, 2}, {2, 3, 4, 5, 6, 7});
  return datum;
}

v1::Datum RatioDatum() {
  v1::Datum datum = GoodDatum();
  Input(datum, "logprobs") = Floats({3}, {-1, -2, -3});
  Input(datum, "advantages") = Floats({3}, {1, 0, -1});
  return datum;
}

const LossInfo& Loss(const char* name) { return *FindLoss(name); }

// The detail of a user's error with this reason.
ErrorDetail Expect(const absl::Status& status, const std::string& reason,
                   absl::StatusCode code = absl::StatusCode::kInvalidArgument) {
  EXPECT_EQ(status.code(), code) << status;
  const auto detail = GetErrorDetail(status);
  if (!detail.has_value()) {
    ADD_FAILURE() << "no detail: " << status;
    return {};
  }
  EXPECT_EQ(detail->reason, reason) << status;
  EXPECT_EQ(detail->category, ErrorCategory::kUser);
  for (const char* key : {"field", "value", "limit"}) {
    EXPECT_EQ(detail->metadata.count(key), 1u) << key << ": " << status;
  }
  EXPECT_GT(status.message().size(), 20u);
  return *detail;
}

TEST(DecodeDatumTest, EquivalentForms) {
  v1::Datum datum = GoodDatum();
  const auto targets = [&](const v1::TensorData& tensor) {
    Input(datum, "target_tokens") = tensor;
    const auto out = DecodeDatum(datum, 0, Loss("cross_entropy"), kLimits);
    EXPECT_TRUE(out.ok()) << out.status();
    EXPECT_EQ(out.ok() ? out->k : -1, 1);
    return out.ok() ? out->targets : std::vector<int32_t>{};
  };
  const std::vector<int32_t> expected = {2, 0, 4};
  EXPECT_EQ(targets(Ids({3, 1}, {2, 0, 4})), expected);
  EXPECT_EQ(
      targets(Tensor(v1::DATA_TYPE_INT32, {3}, Bytes<int32_t>({2, 0, 4}))),
      expected);
  EXPECT_EQ(targets(Sparse(Ids({3, 1}, {2, 4}), {0, 0}, {0, 1, 1, 2})),
            expected);
}

TEST(DecodeDatumTest, SparseIsFilledWithZeros) {
  v1::Datum datum = GoodDatum();
  Input(datum, "target_tokens") =
      Sparse(Ids({3, 3}, {5, 6, 7}), {0, 2, 1}, {0, 2, 2, 3});
  Input(datum, "weights") = Sparse(Floats({3, 3}, {}), {}, {0, 0, 0, 0});
  const auto out = DecodeDatum(datum, 0, Loss("cross_entropy"), kLimits);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->k, 3);
  EXPECT_EQ(out->targets, (std::vector<int32_t>{5, 0, 6, 0, 0, 0, 0, 7, 0}));
  EXPECT_EQ(out->weights, std::vector<float>(9, 0));
}

TEST(DecodeDatumTest, RatioInputsAreShapedLikeTargetsOrRows) {
  v1::Datum datum = PairDatum();
  Input(datum, "logprobs") = Floats({3, 2}, {-1, -2, -3, -4, -5, -6});
  Input(datum, "advantages") = Floats({3}, {1, 2, 3});
  const auto out = DecodeDatum(datum, 0, Loss("importance_sampling"), kLimits);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->k, 2);
  EXPECT_EQ(out->logprobs.size(), 6u);
  EXPECT_EQ(out->advantages, (std::vector<float>{1, 2, 3}));
}

// Every input that a loss lists reaches the trainer.
TEST(DecodeDatumTest, EveryInputOfEveryLossIsDecoded) {
  for (const LossInfo& loss : LossTable()) {
    SCOPED_TRACE(loss.name);
    v1::Datum datum = GoodDatum();
    size_t listed = 0;
    for (const auto* names : {&loss.required, &loss.optional}) {
      for (const std::string& name : *names) {
        Input(datum, name) = Floats({3}, {1, 1, 1});
        ++listed;
      }
    }
    const auto out = DecodeDatum(datum, 0, loss, kLimits);
    ASSERT_TRUE(out.ok()) << out.status();
    size_t filled = 0;
    for (const auto* values :
         {&out->weights, &out->advantages, &out->logprobs, &out->clip_low,
          &out->clip_high, &out->sequence_ratio_mask}) {
      filled += values->size() == 3 ? 1 : 0;
    }
    EXPECT_EQ(filled, listed);
  }
}

struct BadDatum {
  const char* what;
  const char* reason;
  const char* field;
  const char* position;  // null: none
  const char* value;
  const char* limit;
  std::function<v1::Datum()> make;
  const char* loss = "cross_entropy";
};

v1::Datum With(v1::Datum datum, const std::string& name,
               const v1::TensorData& tensor) {
  Input(datum, name) = tensor;
  return datum;
}

constexpr char kTargets[] = "target_tokens";
constexpr int64_t kHuge = int64_t{1} << 62;
constexpr int64_t kMin = std::numeric_limits<int64_t>::min();

std::vector<BadDatum> BadDatums() {
  // One array of a datum that is good otherwise.
  const auto targets = [](v1::TensorData tensor) {
    return [tensor] { return With(GoodDatum(), kTargets, tensor); };
  };
  const auto weights = [](v1::TensorData tensor) {
    return [tensor] { return With(GoodDatum(), "weights", tensor); };
  };
  const auto pair_weights = [](v1::TensorData tensor) {
    return [tensor] { return With(PairDatum(), "weights", tensor); };
  };
  const auto pair_csr = [&](std::vector<float> values,
                            std::vector<int32_t> columns,
                            std::vector<int64_t> offsets) {
    return pair_weights(Sparse(Floats({3, 2}, values), columns, offsets));
  };
  const auto tokens = [](std::vector<int32_t> ids) {
    return [ids] {
      v1::Datum datum = GoodDatum();
      SetTokens(datum, ids);
      return datum;
    };
  };
  return {
      {"an image", "MODALITY_UNSUPPORTED", "chunks", nullptr, "image", "text",
       [] {
         v1::Datum datum = GoodDatum();
         datum.add_chunks()->mutable_image()->set_format("png");
         return datum;
       }},
      {"a chunk without kind", "MODALITY_UNSUPPORTED", "chunks", nullptr,
       "unset", "text",
       [] {
         v1::Datum datum = GoodDatum();
         datum.add_chunks();
         return datum;
       }},
      {"token bytes", "SHAPE_MISMATCH", "model_input", nullptr, "13", "4",
       [] {
         v1::Datum datum = GoodDatum();
         datum.mutable_chunks(0)->mutable_text()->mutable_tokens()->push_back(
             1);
         return datum;
       }},
      {"no token", "SHAPE_MISMATCH", "model_input", nullptr, "0", "1",
       tokens({})},
      {"too long", "SEQUENCE_TOO_LONG", "model_input", nullptr, "5", "4",
       tokens({1, 1, 1, 1, 1})},
      {"token -1", "TOKEN_OUT_OF_RANGE", "model_input", "2", "-1", "10",
       tokens({1, 1, -1})},
      {"token = vocab", "TOKEN_OUT_OF_RANGE", "model_input", "0", "10", "10",
       tokens({10, 1, 1})},
      {"no targets", "MISSING_LOSS_INPUT", kTargets, nullptr, "absent",
       "required by cross_entropy",
       [] {
         v1::Datum datum = GoodDatum();
         datum.clear_loss_fn_inputs();
         return datum;
       }},
      {"no advantages", "MISSING_LOSS_INPUT", "advantages", nullptr, "absent",
       "required by ppo",
       [] {
         return With(GoodDatum(), "logprobs", Floats({3}, {1, 1, 1}));
       },
       "ppo"},
      {"unknown input", "UNKNOWN_LOSS_INPUT", "advantages", nullptr,
       "cross_entropy", "target_tokens, weights",
       [] {
         return With(RatioDatum(), "zzz", Floats({3}, {1, 1, 1}));
       }},
      {"float targets", "DTYPE_MISMATCH", kTargets, nullptr,
       "DATA_TYPE_FLOAT32", "DATA_TYPE_INT64", targets(Floats({3}, {1, 1, 1}))},
      {"integer weights", "DTYPE_MISMATCH", "weights", nullptr,
       "DATA_TYPE_INT64", "DATA_TYPE_FLOAT32", weights(Ids({3}, {1, 1, 1}))},
      {"dtype of the future", "DTYPE_MISMATCH", "weights", nullptr, "99",
       "DATA_TYPE_FLOAT32",
       weights(Tensor(static_cast<v1::DataType>(99), {3}, "0123456789ab"))},
      {"target = vocab", "TOKEN_OUT_OF_RANGE", kTargets, "1", "10", "10",
       targets(Ids({3}, {1, 10, 1}))},
      {"target beyond 32 bits", "TOKEN_OUT_OF_RANGE", kTargets, "2",
       "4294967297", "10", targets(Ids({3}, {1, 1, (int64_t{1} << 32) + 1}))},
      {"second target of a row", "TOKEN_OUT_OF_RANGE", kTargets, "1", "-2",
       "10", targets(Ids({3, 2}, {1, 1, 1, -2, 1, 1}))},
      {"two rows", "SHAPE_MISMATCH", kTargets, nullptr, "2", "3",
       targets(Ids({2}, {1, 1}))},
      {"two elements of no shape", "SHAPE_MISMATCH", kTargets, nullptr, "0",
       "2", targets(Ids({}, {1, 1}))},
      {"rank 3", "SHAPE_MISMATCH", kTargets, nullptr, "3", "2",
       targets(Ids({3, 1, 1}, {1, 1, 1}))},
      {"too little data", "SHAPE_MISMATCH", kTargets, nullptr, "16", "24",
       targets(Ids({3}, {1, 1}))},
      {"half an element", "SHAPE_MISMATCH", kTargets, nullptr, "25", "24",
       targets(Tensor(v1::DATA_TYPE_INT64, {3}, std::string(25, '\0')))},
      {"K = 0", "SHAPE_MISMATCH", kTargets, nullptr, "0", "64",
       targets(Ids({3, 0}, {}))},
      {"K = 65", "SHAPE_MISMATCH", kTargets, nullptr, "65", "64",
       targets(Ids({3, 65}, std::vector<int64_t>(195, 1)))},
      {"K = 2 for ppo", "SHAPE_MISMATCH", kTargets, nullptr, "2", "1",
       [] {
         return With(RatioDatum(), kTargets, Ids({3, 2}, {1, 1, 1, 1, 1, 1}));
       },
       "ppo"},
      {"product of 0 modulo 2^64", "SHAPE_MISMATCH", kTargets, nullptr,
       "4611686018427387904", "3", targets(Ids({kHuge, 4}, {}))},
      {"huge K", "SHAPE_MISMATCH", kTargets, nullptr, "4611686018427387904",
       "64", targets(Ids({3, kHuge}, {1, 1, 1}))},
      {"negative N", "SHAPE_MISMATCH", kTargets, nullptr,
       "-9223372036854775808", "3", targets(Ids({kMin}, {1, 1, 1}))},
      {"negative K", "SHAPE_MISMATCH", "weights", nullptr,
       "-9223372036854775808", "64", weights(Floats({3, kMin}, {1, 1, 1}))},
      {"both negative", "SHAPE_MISMATCH", kTargets, nullptr, "-3", "3",
       targets(Ids({-3, -1}, {1, 1, 1}))},
      {"[N] weights of [N, K] targets", "SHAPE_MISMATCH", "weights", nullptr,
       "1", "2", pair_weights(Floats({3}, {1, 1, 1}))},
      {"[N, K] weights of [N] targets", "SHAPE_MISMATCH", "weights", nullptr,
       "2", "1", weights(Floats({3, 2}, {1, 1, 1, 1, 1, 1}))},
      {"advantages between 1 and K", "SHAPE_MISMATCH", "advantages", nullptr,
       "2", "3",
       [] {
         v1::Datum datum = RatioDatum();
         Input(datum, kTargets) = Ids({3, 3}, std::vector<int64_t>(9, 1));
         Input(datum, "advantages") = Floats({3, 2}, {1, 1, 1, 1, 1, 1});
         return datum;
       },
       "importance_sampling"},
      {"mask of two columns", "SHAPE_MISMATCH", "sequence_ratio_mask", nullptr,
       "2", "1",
       [] {
         return With(RatioDatum(), "sequence_ratio_mask",
                     Floats({3, 2}, {1, 1, 1, 1, 1, 1}));
       },
       "gspo"},
      {"NaN", "NONFINITE_INPUT", "weights", "1", "nan", "finite",
       weights(Floats({3}, {1, kNan, 1}))},
      {"infinity in a row of two", "NONFINITE_INPUT", "weights", "2", "-inf",
       "finite", pair_weights(Floats({3, 2}, {1, 1, 1, 1, 1, -kInf}))},
      {"sparse NaN", "NONFINITE_INPUT", "weights", "2", "nan", "finite",
       pair_csr({kNan}, {0}, {0, 0, 0, 1})},
      {"sparse target", "TOKEN_OUT_OF_RANGE", kTargets, "1", "-1", "10",
       targets(Sparse(Ids({3, 2}, {-1}), {1}, {0, 0, 1, 1}))},
      {"negative threshold", "LOSS_CONFIG_OUT_OF_RANGE", "clip_low_threshold",
       "1", "-0.5", "0",
       [] {
         return With(RatioDatum(), "clip_low_threshold",
                     Floats({3}, {0, -0.5f, 0}));
       },
       "ppo"},
      {"negative high threshold", "LOSS_CONFIG_OUT_OF_RANGE",
       "clip_high_threshold", "0", "-1", "0",
       [] {
         return With(RatioDatum(), "clip_high_threshold",
                     Floats({3}, {-1, 1, 1}));
       },
       "cispo"},
      {"low above high", "LOSS_CONFIG_OUT_OF_RANGE", "clip_low_threshold", "2",
       "2", "1.5",
       [] {
         v1::Datum datum = RatioDatum();
         Input(datum, "clip_low_threshold") = Floats({3}, {0, 1, 2});
         Input(datum, "clip_high_threshold") = Floats({3}, {0, 1, 1.5f});
         return datum;
       },
       "dapo"},
      {"sparse of rank 1", "CSR_INVALID", "weights", nullptr, "1", "2",
       weights(Sparse(Floats({3}, {1}), {0}, {0, 1, 1, 1}))},
      {"sparse advantages", "CSR_INVALID", "advantages", nullptr, "advantages",
       "target_tokens, weights",
       [] {
         return With(RatioDatum(), "advantages",
                     Sparse(Floats({3, 1}, {1}), {0}, {0, 1, 1, 1}));
       },
       "ppo"},
      {"too few offsets", "CSR_INVALID", "weights", nullptr, "24", "32",
       pair_csr({1}, {0}, {0, 1, 1})},
      {"no offsets", "CSR_INVALID", "weights", nullptr, "0", "32",
       pair_csr({1}, {0}, {})},
      {"odd offset bytes", "CSR_INVALID", "weights", nullptr, "33", "32",
       [] {
         v1::Datum datum = PairDatum();
         v1::TensorData tensor = Sparse(Floats({3, 2}, {1}), {0}, {0, 0, 0, 1});
         tensor.mutable_csr_row_offsets()->push_back(0);
         return With(datum, "weights", tensor);
       }},
      {"too many columns", "CSR_INVALID", "weights", nullptr, "8", "4",
       pair_csr({1}, {0, 1}, {0, 0, 0, 1})},
      {"odd column bytes", "CSR_INVALID", "weights", nullptr, "5", "4",
       [] {
         v1::TensorData tensor = Sparse(Floats({3, 2}, {1}), {0}, {0, 0, 0, 1});
         tensor.mutable_csr_columns()->push_back(0);
         return With(PairDatum(), "weights", tensor);
       }},
      {"first offset", "CSR_INVALID", "weights", nullptr, "1", "0",
       pair_csr({1}, {0}, {1, 1, 1, 1})},
      {"falling offsets", "CSR_INVALID", "weights", "1", "0", "2",
       pair_csr({1, 1}, {0, 0}, {0, 1, 0, 2})},
      {"offset beyond", "CSR_INVALID", "weights", "0", "4611686018427387904",
       "1", pair_csr({1}, {0}, {0, kHuge, kHuge, 1})},
      {"negative offset", "CSR_INVALID", "weights", "0", "-9223372036854775808",
       "1", pair_csr({1}, {0}, {0, kMin, 0, 1})},
      {"last offset", "CSR_INVALID", "weights", nullptr, "1", "2",
       pair_csr({1, 1}, {0, 1}, {0, 1, 1, 1})},
      {"column = K", "CSR_INVALID", "weights", "2", "2", "2",
       pair_csr({1}, {2}, {0, 0, 0, 1})},
      {"negative column", "CSR_INVALID", "weights", "0", "-1", "2",
       pair_csr({1}, {-1}, {0, 1, 1, 1})},
      {"repeated column", "CSR_INVALID", "weights", "0", "0", "2",
       pair_csr({1, 1}, {0, 0}, {0, 2, 2, 2})},
  };
}

TEST(DecodeDatumTest, RefusesWithReasonAndPlace) {
  for (const BadDatum& bad : BadDatums()) {
    SCOPED_TRACE(bad.what);
    const absl::Status status =
        DecodeDatum(bad.make(), kIndex, Loss(bad.loss), kLimits).status();
    const bool modality = std::string(bad.reason) == "MODALITY_UNSUPPORTED";
    const ErrorDetail detail =
        Expect(status, bad.reason,
               modality ? absl::StatusCode::kUnimplemented
                        : absl::StatusCode::kInvalidArgument);
    if (detail.metadata.empty()) continue;
    EXPECT_EQ(detail.metadata.at("datum_index"), std::to_string(kIndex));
    EXPECT_EQ(detail.metadata.at("field"), bad.field);
    EXPECT_EQ(detail.metadata.at("value"), bad.value);
    EXPECT_EQ(detail.metadata.at("limit"), bad.limit);
    EXPECT_EQ(detail.metadata.count("position"),
              bad.position == nullptr ? 0u : 1u);
    if (bad.position != nullptr && detail.metadata.count("position") > 0) {
      EXPECT_EQ(detail.metadata.at("position"), bad.position);
    }
  }
}

TEST(DecodeDatumTest, OneSidedThresholdsMeetTheConfig) {
  const v1::Datum datum =
      With(RatioDatum(), "clip_low_threshold", Floats({3}, {0, 1.5f, 0}));
  LossSpec loss{.name = "ppo", .config = {}};
  const ErrorDetail detail =
      Expect(DecodeDatum(datum, kIndex, loss, kLimits).status(),
             "LOSS_CONFIG_OUT_OF_RANGE");
  EXPECT_EQ(detail.metadata.at("field"), "clip_low_threshold");
  EXPECT_EQ(detail.metadata.at("position"), "1");
  EXPECT_EQ(detail.metadata.at("limit"), "1.2");
  // 1.2f is above 1.2, yet it is what the config's 1.2 becomes.
  const v1::Datum equal =
      With(RatioDatum(), "clip_low_threshold", Floats({3}, {0, 1.2f, 0}));
  EXPECT_TRUE(DecodeDatum(equal, kIndex, loss, kLimits).ok());
  loss.config["clip_high_threshold"] = 1.5;
  EXPECT_TRUE(DecodeDatum(datum, kIndex, loss, kLimits).ok());

  const v1::Datum high =
      With(RatioDatum(), "clip_high_threshold", Floats({3}, {1, 1, 0.5f}));
  EXPECT_EQ(Expect(DecodeDatum(high, kIndex, loss, kLimits).status(),
                   "LOSS_CONFIG_OUT_OF_RANGE")
                .metadata.at("field"),
            "clip_high_threshold");
}

TEST(DecodeGradientTest, ShapeTypeAndValues) {
  v1::GradientItem item;
  item.set_datum_index(kIndex);
  const auto decode = [&](const v1::TensorData& tensor, int64_t k) {
    *item.mutable_d_logprobs() = tensor;
    return DecodeGradient(item, 2, k);
  };
  EXPECT_EQ(*decode(Floats({2}, {1, -2}), 1), (std::vector<float>{1, -2}));
  EXPECT_EQ(*decode(Floats({2, 1}, {1, -2}), 1), (std::vector<float>{1, -2}));
  EXPECT_EQ(*decode(Floats({2, 2}, {1, 2, 3, 4}), 2),
            (std::vector<float>{1, 2, 3, 4}));
  const struct {
    const char* reason;
    v1::TensorData tensor;
    int64_t k;
    const char* position;
  } cases[] = {
      {"SHAPE_MISMATCH", Floats({3}, {1, 2, 3}), 1, nullptr},
      {"SHAPE_MISMATCH", Floats({2}, {1, 2}), 2, nullptr},
      {"SHAPE_MISMATCH", Floats({2, 2}, {1, 2, 3, 4}), 1, nullptr},
      {"SHAPE_MISMATCH", Floats({2}, {1}), 1, nullptr},
      {"SHAPE_MISMATCH", Floats({kHuge, 4}, {}), 4, nullptr},
      {"DTYPE_MISMATCH", Ids({2}, {1, 2}), 1, nullptr},
      {"DTYPE_MISMATCH", v1::TensorData(), 1, nullptr},
      {"NONFINITE_INPUT", Floats({2}, {1, kNan}), 1, "1"},
      {"NONFINITE_INPUT", Floats({2, 2}, {1, 2, 3, kNan}), 2, "1"},
      {"CSR_INVALID", Sparse(Floats({2, 1}, {1}), {0}, {0, 1, 1}), 1, nullptr},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(c.tensor.ShortDebugString());
    const ErrorDetail detail = Expect(decode(c.tensor, c.k).status(), c.reason);
    EXPECT_EQ(detail.metadata.at("datum_index"), std::to_string(kIndex));
    EXPECT_EQ(detail.metadata.at("field"), "d_logprobs");
    if (c.position != nullptr) {
      EXPECT_EQ(detail.metadata.at("position"), c.position);
    }
  }
}

}  // namespace
}  // namespace gradwire
