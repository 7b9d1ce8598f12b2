// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "google/rpc/error_details.pb.h"
#include "server/decode_datum.h"
#include "server/decode_options.h"
#include "server/grpc_status.h"
#include "server/names.h"
#include "server/payload_digest.h"

namespace gradwire {
namespace {

template <typename T>
std::string Bytes(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()),
                     values.size() * sizeof(T));
}

template <typename T>
v1::TensorData Tensor(v1::DataType dtype, std::vector<int64_t> shape,
                      const std::vector<T>& values) {
  v1::TensorData tensor;
  tensor.set_dtype(dtype);
  for (int64_t dim : shape) tensor.add_shape(dim);
  tensor.set_data(Bytes(values));
  return tensor;
}

v1::TensorData Floats(std::vector<int64_t> shape,
                      const std::vector<float>& values) {
  return Tensor(v1::DATA_TYPE_FLOAT32, std::move(shape), values);
}

v1::TensorData Ints(std::vector<int64_t> shape,
                    const std::vector<int64_t>& values) {
  return Tensor(v1::DATA_TYPE_INT64, std::move(shape), values);
}

// Three tokens, their targets and weights.
v1::Datum Good() {
  v1::Datum datum;
  datum.add_chunks()->mutable_text()->set_tokens(Bytes<int32_t>({3, 1, 2}));
  auto& inputs = *datum.mutable_loss_fn_inputs();
  inputs["target_tokens"] = Ints({3}, {1, 2, 0});
  inputs["weights"] = Floats({3}, {1.0f, 0.5f, -2.0f});
  return datum;
}

const RequestLimits kLimits = {10, 8, 64};

absl::StatusOr<TrainDatum> Decode(const v1::Datum& datum,
                                  const std::string& loss = "cross_entropy") {
  return DecodeDatum(datum, 7, *FindLoss(loss), kLimits);
}

// The reason, then the values that the error names.
struct Refusal {
  std::string reason;
  std::map<std::string, std::string> metadata;
};
Refusal Refused(const absl::Status& status) {
  auto detail = GetErrorDetail(status);
  if (!detail) return {};
  EXPECT_FALSE(status.message().empty());
  return {detail->reason, detail->metadata};
}

TEST(DecodeDatumTest, AGoodDatumBecomesWhatItSays) {
  auto datum = Decode(Good());
  ASSERT_TRUE(datum.ok()) << datum.status();
  EXPECT_EQ(datum->tokens, (std::vector<int32_t>{3, 1, 2}));
  EXPECT_EQ(datum->targets, (std::vector<int32_t>{1, 2, 0}));
  EXPECT_EQ(datum->weights, (std::vector<float>{1.0f, 0.5f, -2.0f}));
  EXPECT_EQ(datum->k, 1);
}

TEST(DecodeDatumTest, ChunksAreJoined) {
  v1::Datum datum = Good();
  datum.clear_chunks();
  datum.add_chunks()->mutable_text()->set_tokens(Bytes<int32_t>({3}));
  datum.add_chunks()->mutable_text()->set_tokens(Bytes<int32_t>({1, 2}));
  EXPECT_EQ(Decode(datum)->tokens, (std::vector<int32_t>{3, 1, 2}));
}

TEST(DecodeDatumTest, SparseIsDenseWithZeros) {
  v1::Datum datum = Good();
  auto& inputs = *datum.mutable_loss_fn_inputs();
  v1::TensorData& targets = inputs["target_tokens"];
  targets = Ints({3, 2}, {5, 6, 7});
  targets.set_csr_columns(Bytes<int32_t>({1, 0, 1}));
  targets.set_csr_row_offsets(Bytes<int64_t>({0, 1, 1, 3}));
  inputs["weights"] = Floats({3, 2}, {1, 2, 3, 4, 5, 6});
  auto decoded = Decode(datum);
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(decoded->targets, (std::vector<int32_t>{0, 5, 0, 0, 6, 7}));
  EXPECT_EQ(decoded->k, 2);
}

struct BadCase {
  std::string name;
  std::string reason;
  std::string field;
  std::function<void(v1::Datum&)> spoil;
  std::string loss = "cross_entropy";
};

v1::TensorData& Input(v1::Datum& datum, const std::string& name) {
  return (*datum.mutable_loss_fn_inputs())[name];
}

std::vector<BadCase> BadCases() {
  const float nan = std::nanf("");
  const auto sparse = [](std::vector<int64_t> offsets,
                         std::vector<int32_t> columns) {
    return [=](v1::Datum& d) {
      v1::TensorData& t = Input(d, "target_tokens");
      t = Ints({3, 2}, {1, 2});
      t.set_csr_columns(Bytes(columns));
      t.set_csr_row_offsets(Bytes(offsets));
      d.mutable_loss_fn_inputs()->erase("weights");
    };
  };
  return {
      {"no_tokens", "SHAPE_MISMATCH", "model_input",
       [](v1::Datum& d) { d.clear_chunks(); }},
      {"half_a_token", "SHAPE_MISMATCH", "model_input",
       [](v1::Datum& d) {
         d.mutable_chunks(0)->mutable_text()->set_tokens("12345");
       }},
      {"image", "MODALITY_UNSUPPORTED", "chunks",
       [](v1::Datum& d) { d.add_chunks()->mutable_image(); }},
      {"nothing", "MODALITY_UNSUPPORTED", "chunks",
       [](v1::Datum& d) { d.add_chunks(); }},
      {"long", "SEQUENCE_TOO_LONG", "model_input",
       [](v1::Datum& d) {
         d.mutable_chunks(0)->mutable_text()->set_tokens(std::string(36, 0));
       }},
      {"token_high", "TOKEN_OUT_OF_RANGE", "model_input",
       [](v1::Datum& d) {
         d.mutable_chunks(0)->mutable_text()->set_tokens(
             Bytes<int32_t>({3, 10, 2}));
       }},
      {"token_low", "TOKEN_OUT_OF_RANGE", "model_input",
       [](v1::Datum& d) {
         d.mutable_chunks(0)->mutable_text()->set_tokens(
             Bytes<int32_t>({3, -1, 2}));
       }},
      {"no_targets", "MISSING_LOSS_INPUT", "target_tokens",
       [](v1::Datum& d) {
         d.mutable_loss_fn_inputs()->erase("target_tokens");
       }},
      {"no_advantages", "MISSING_LOSS_INPUT", "logprobs", [](v1::Datum&) {},
       "ppo"},
      {"unknown_input", "UNKNOWN_LOSS_INPUT", "rewards",
       [](v1::Datum& d) {
         Input(d, "rewards") = Floats({3}, {1, 2, 3});
       }},
      {"target_high", "TOKEN_OUT_OF_RANGE", "target_tokens",
       [](v1::Datum& d) {
         Input(d, "target_tokens") = Ints({3}, {1, 2, int64_t{1} << 40});
       }},
      {"target_short", "SHAPE_MISMATCH", "target_tokens",
       [](v1::Datum& d) {
         Input(d, "target_tokens") = Ints({2}, {1, 2});
       }},
      {"target_floats", "DTYPE_MISMATCH", "target_tokens",
       [](v1::Datum& d) {
         Input(d, "target_tokens") = Floats({3}, {1, 2, 3});
       }},
      {"bytes_short", "SHAPE_MISMATCH", "target_tokens",
       [](v1::Datum& d) {
         Input(d, "target_tokens") = Ints({3}, {1, 2});
       }},
      {"no_shape", "SHAPE_MISMATCH", "weights",
       [](v1::Datum& d) { Input(d, "weights").clear_shape(); }},
      {"huge_k", "SHAPE_MISMATCH", "target_tokens",
       [](v1::Datum& d) {
         Input(d, "target_tokens") = Ints({3, int64_t{1} << 62}, {1});
       }},
      {"negative_k", "SHAPE_MISMATCH", "target_tokens",
       [](v1::Datum& d) {
         Input(d, "target_tokens") = Ints({3, -1}, {1});
       }},
      {"k_of_rl", "SHAPE_MISMATCH", "target_tokens",
       [](v1::Datum& d) {
         Input(d, "target_tokens") = Ints({3, 2}, {1, 2, 3, 4, 5, 6});
         Input(d, "weights") = Floats({3, 2}, {1, 2, 3, 4, 5, 6});
         Input(d, "logprobs") = Floats({3}, {1, 2, 3});
         Input(d, "advantages") = Floats({3}, {1, 2, 3});
       },
       "ppo"},
      {"flat_weights", "SHAPE_MISMATCH", "weights",
       [](v1::Datum& d) {
         Input(d, "target_tokens") = Ints({3, 2}, {1, 2, 3, 4, 5, 6});
       }},
      {"weights_int", "DTYPE_MISMATCH", "weights",
       [](v1::Datum& d) {
         Input(d, "weights") = Ints({3}, {1, 2, 3});
       }},
      {"weight_nan", "NONFINITE_INPUT", "weights",
       [nan](v1::Datum& d) {
         Input(d, "weights") = Floats({3}, {1, nan, 3});
       }},
      {"thresholds_crossed", "LOSS_CONFIG_OUT_OF_RANGE", "clip_low_threshold",
       [](v1::Datum& d) {
         Input(d, "logprobs") = Floats({3}, {1, 2, 3});
         Input(d, "advantages") = Floats({3}, {1, 2, 3});
         Input(d, "clip_low_threshold") = Floats({3}, {0, 2, 0});
         Input(d, "clip_high_threshold") = Floats({3}, {1, 1, 1});
       },
       "ppo"},
      {"csr_offsets_few", "CSR_INVALID", "target_tokens",
       sparse({0, 2}, {0, 1})},
      {"csr_first", "CSR_INVALID", "target_tokens",
       sparse({1, 1, 2, 2}, {0, 1})},
      {"csr_backwards", "CSR_INVALID", "target_tokens",
       sparse({0, 2, 1, 2}, {0, 1})},
      {"csr_beyond", "CSR_INVALID", "target_tokens",
       sparse({0, 1, 2, int64_t{1} << 60}, {0, 1})},
      {"csr_short", "CSR_INVALID", "target_tokens",
       sparse({0, 1, 1, 1}, {0, 1})},
      {"csr_column", "CSR_INVALID", "target_tokens",
       sparse({0, 1, 2, 2}, {0, 2})},
      {"csr_negative", "CSR_INVALID", "target_tokens",
       sparse({0, 1, 2, 2}, {0, -1})},
      {"csr_twice", "CSR_INVALID", "target_tokens",
       sparse({0, 2, 2, 2}, {1, 1})},
      {"csr_columns_few", "CSR_INVALID", "target_tokens",
       sparse({0, 1, 2, 2}, {0})},
      {"csr_rank", "CSR_INVALID", "weights",
       [](v1::Datum& d) {
         Input(d, "weights").set_csr_row_offsets(Bytes<int64_t>({0, 1, 2, 3}));
       }},
  };
}

TEST(DecodeDatumTest, EveryFlawHasItsReason) {
  for (const BadCase& bad : BadCases()) {
    v1::Datum datum = Good();
    bad.spoil(datum);
    const Refusal refusal = Refused(Decode(datum, bad.loss).status());
    EXPECT_EQ(refusal.reason, bad.reason) << bad.name;
    if (refusal.reason.empty()) continue;
    EXPECT_EQ(refusal.metadata.at("field"), bad.field) << bad.name;
    EXPECT_EQ(refusal.metadata.at("datum_index"), "7") << bad.name;
  }
  v1::Datum datum = Good();
  Input(datum, "weights") =
      Floats({3}, {1, 2, std::numeric_limits<float>::infinity()});
  EXPECT_EQ(Refused(Decode(datum).status()).metadata.at("position"), "2");
}

TEST(DecodeDatumTest, LimitsAreInclusive) {
  v1::Datum datum;
  datum.add_chunks()->mutable_text()->set_tokens(
      Bytes(std::vector<int32_t>(8, 9)));
  Input(datum, "target_tokens") = Ints({8}, std::vector<int64_t>(8, 9));
  EXPECT_TRUE(Decode(datum).ok());
}

TEST(DecodeGradientTest, IsShapedLikeItsTargets) {
  v1::GradientItem item;
  *item.mutable_d_logprobs() = Floats({2}, {1, -2});
  EXPECT_EQ(*DecodeGradient(item, 2, 1), (std::vector<float>{1, -2}));
  EXPECT_EQ(Refused(DecodeGradient(item, 3, 1).status()).reason,
            "SHAPE_MISMATCH");
  EXPECT_EQ(Refused(DecodeGradient(item, 2, 2).status()).reason,
            "SHAPE_MISMATCH");
  *item.mutable_d_logprobs() = Floats({2}, {1, std::nanf("")});
  EXPECT_EQ(Refused(DecodeGradient(item, 2, 1).status()).reason,
            "NONFINITE_INPUT");
}

TEST(DecodeLossTest, TopKOfCrossEntropyIsTheForwards) {
  v1::LossConfig config;
  (*config.mutable_config())["top_k"] = 5;
  int32_t top_k = 0;
  EXPECT_EQ(DecodeLoss(config, &top_k)->name, "cross_entropy");
  EXPECT_EQ(top_k, 5);
  EXPECT_EQ(Refused(DecodeLoss(config, nullptr).status()).reason,
            "UNKNOWN_LOSS_CONFIG");
  for (const double bad : {-1.0, 2.5, 1e10, std::nan("")}) {
    (*config.mutable_config())["top_k"] = bad;
    EXPECT_EQ(Refused(DecodeLoss(config, &top_k).status()).reason,
              "TOP_K_OUT_OF_RANGE");
  }
  EXPECT_TRUE(CheckTopK(10, kLimits).ok());
  EXPECT_EQ(Refused(CheckTopK(11, kLimits)).reason, "TOP_K_OUT_OF_RANGE");
  EXPECT_EQ(Refused(CheckTopK(-1, kLimits)).reason, "TOP_K_OUT_OF_RANGE");
}

TEST(AdamParamsTest, AbsentFieldsTakeTheDefaultsAndAreEchoed) {
  auto params = DecodeAdamParams({});
  ASSERT_TRUE(params.ok());
  const v1::AdamParams echoed = EncodeAdamParams(*params);
  EXPECT_EQ(echoed.learning_rate(), 1e-4);
  EXPECT_EQ(echoed.beta2(), 0.95);
  EXPECT_EQ(echoed.eps(), 1e-12);
  EXPECT_FALSE(echoed.has_expected_ops());
}

TEST(AdamParamsTest, EveryFieldHasItsRange) {
  using Set = std::function<void(v1::AdamParams&)>;
  const std::pair<const char*, Set> cases[] = {
      {"learning_rate", [](auto& p) { p.set_learning_rate(-1); }},
      {"beta1", [](auto& p) { p.set_beta1(1); }},
      {"beta2", [](auto& p) { p.set_beta2(std::nan("")); }},
      // Infinity, and 1, once rounded to float32.
      {"learning_rate", [](auto& p) { p.set_learning_rate(1e39); }},
      {"beta2", [](auto& p) { p.set_beta2(1 - 1e-12); }},
      {"eps", [](auto& p) { p.set_eps(-1e-9); }},
      {"weight_decay", [](auto& p) { p.set_weight_decay(INFINITY); }},
      {"grad_clip_norm", [](auto& p) { p.set_grad_clip_norm(-1); }},
      {"expected_ops", [](auto& p) { p.set_expected_ops(-2); }},
      {"normalization",
       [](auto& p) {
         p.set_normalization(static_cast<v1::GradientNormalization>(9));
       }},
      {"grad_norm_metrics",
       [](auto& p) {
         p.set_grad_norm_metrics(static_cast<v1::GradientNormMetrics>(9));
       }},
  };
  for (const auto& [field, set] : cases) {
    v1::AdamParams params;
    set(params);
    const Refusal refusal = Refused(DecodeAdamParams(params).status());
    EXPECT_EQ(refusal.reason, "OPTIM_PARAM_OUT_OF_RANGE") << field;
    if (refusal.reason.empty()) continue;
    EXPECT_EQ(refusal.metadata.at("field"), field);
    EXPECT_EQ(refusal.metadata.count("value"), 1u) << field;
    EXPECT_EQ(refusal.metadata.count("limit"), 1u) << field;
  }
}

TEST(NamesTest, AreOneSafeSegment) {
  for (const char* good : {"a", "step-1.v2_x", "A9"}) {
    EXPECT_TRUE(CheckName(good, "name").ok()) << good;
  }
  for (const char* bad : {"", ".hidden", "..", "a/b", "a b", "\xff", "a\nb"}) {
    EXPECT_EQ(Refused(CheckName(bad, "name")).reason, "INVALID_NAME") << bad;
  }
  EXPECT_EQ(Refused(CheckName(std::string(129, 'a'), "name")).reason,
            "INVALID_NAME");
  EXPECT_TRUE(CheckJobId("job-1").ok());
  for (const char* bad : {"", "-a", "A", "a.b", "../x", "a_b"}) {
    EXPECT_EQ(Refused(CheckJobId(bad)).reason, "INVALID_NAME") << bad;
  }
  EXPECT_FALSE(CheckJobId(std::string(64, 'a')).ok());
}

// The digest that the Python client computes for the same datum.
TEST(PayloadDigestTest, IsTheClients) {
  PayloadDigest digest;
  digest.Add(Good());
  v1::CommitRecord commit;
  digest.Fill(&commit);
  EXPECT_EQ(commit.datum_count(), 1);
  EXPECT_EQ(commit.byte_count(), 68);
  std::string hex;
  for (unsigned char byte : commit.xxh3_128()) {
    char two[3];
    snprintf(two, sizeof(two), "%02x", byte);
    hex += two;
  }
  EXPECT_EQ(hex, "8230cdb0fbc254f872df4db3862248ba");
  EXPECT_TRUE(digest.Check(commit).ok());
  commit.set_byte_count(commit.byte_count() + 1);
  EXPECT_EQ(Refused(digest.Check(commit)).metadata.at("field"), "byte_count");
  digest.Fill(&commit);
  commit.mutable_xxh3_128()->at(3) ^= 1;
  EXPECT_EQ(Refused(digest.Check(commit)).metadata.at("field"), "xxh3_128");
}

TEST(GrpcStatusTest, CarriesOneErrorInfo) {
  const absl::Status status =
      ErrorBuilder(absl::StatusCode::kResourceExhausted, "QUEUE_FULL")
          .Server()
          .With("value", "\xff\xfe ok")
          .With("retry_after_seconds", 0.25)
          .Message("full");
  const grpc::Status wire = ToGrpcStatus(status);
  EXPECT_EQ(wire.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(wire.error_details()));
  ASSERT_EQ(details.details_size(), 2);
  google::rpc::ErrorInfo info;
  ASSERT_TRUE(details.details(0).UnpackTo(&info));
  EXPECT_EQ(info.domain(), "gradwire");
  EXPECT_EQ(info.reason(), "QUEUE_FULL");
  EXPECT_EQ(info.metadata().at("category"), "SERVER");
  EXPECT_EQ(info.metadata().at("value"), "?? ok");
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(details.details(1).UnpackTo(&retry));
  EXPECT_EQ(retry.retry_delay().nanos(), 250000000);
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
}

TEST(GrpcStatusTest, UnavailableSaysWhenToComeBack) {
  for (const char* seconds : {"", "nan", "-3", "1e300"}) {
    ErrorBuilder error(absl::StatusCode::kUnavailable, "JOB_RECOVERING");
    if (*seconds != 0) error.With("retry_after_seconds", seconds);
    google::rpc::Status details;
    ASSERT_TRUE(details.ParseFromString(
        ToGrpcStatus(error.Message("later")).error_details()));
    ASSERT_EQ(details.details_size(), 2);
    google::rpc::RetryInfo retry;
    ASSERT_TRUE(details.details(1).UnpackTo(&retry));
    EXPECT_EQ(retry.retry_delay().seconds(), 1);
  }
}

TEST(GrpcStatusTest, AnOperationErrorIsNeverOk) {
  for (const int code : {0, -1, 17, 1 << 30}) {
    v1::OperationError error;
    error.set_code(code);
    EXPECT_EQ(FromOperationError(error).code(), absl::StatusCode::kUnknown);
  }
}

TEST(GrpcStatusTest, OperationErrorsKeepEverything) {
  const absl::Status status =
      ErrorBuilder(absl::StatusCode::kInvalidArgument, "SHAPE_MISMATCH")
          .With("field", "weights")
          .Message("weights has 3 entries");
  const absl::Status back = FromOperationError(ToOperationError(status));
  EXPECT_EQ(back.code(), status.code());
  EXPECT_EQ(back.message(), status.message());
  EXPECT_EQ(Refused(back).reason, "SHAPE_MISMATCH");
  EXPECT_EQ(Refused(back).metadata.at("field"), "weights");
  EXPECT_EQ(GetErrorDetail(back)->category, ErrorCategory::kUser);
  EXPECT_EQ(ToOperationError(absl::InternalError("x")).reason(),
            "INTERNAL_ERROR");
}

TEST(ValidTextTest, ReplacesWhatIsNoUtf8AndCutsWhole) {
  EXPECT_EQ(ValidText("a\xc3\xa9z", 10), "a\xc3\xa9z");
  EXPECT_EQ(ValidText("a\xc3", 10), "a?");
  EXPECT_EQ(ValidText("\xed\xa0\x80", 10), "???");
  EXPECT_EQ(ValidText("\xc3\xa9\xc3\xa9", 3), "\xc3\xa9");
}

TEST(GrpcStatusTest, GivesBackWhatItWasMadeFrom) {
  const absl::Status status =
      ErrorBuilder(absl::StatusCode::kFailedPrecondition, "RANK_LATE")
          .Server()
          .With("rank", 3)
          .Message("late");
  const absl::Status back = FromGrpcStatus(ToGrpcStatus(status));
  EXPECT_EQ(back.code(), status.code());
  EXPECT_EQ(back.message(), status.message());
  const auto detail = GetErrorDetail(back);
  ASSERT_TRUE(detail.has_value());
  EXPECT_EQ(detail->reason, "RANK_LATE");
  EXPECT_EQ(detail->category, ErrorCategory::kServer);
  EXPECT_EQ(detail->metadata.size(), 1u);
  EXPECT_EQ(detail->metadata.at("rank"), "3");
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
  const absl::Status plain = FromGrpcStatus(
      grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone", "no details"));
  EXPECT_TRUE(absl::IsUnavailable(plain));
  EXPECT_FALSE(GetErrorDetail(plain).has_value());
}

}  // namespace
}  // namespace gradwire
