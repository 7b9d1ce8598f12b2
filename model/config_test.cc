// SPDX-License-Identifier: Apache-2.0
#include "model/config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"
#include "model/param_table.h"

namespace gradwire {
namespace {

// `extra` is put into an otherwise complete configuration.
std::string Json(const std::string& extra,
                 const std::string& architecture = "LlamaForCausalLM") {
  return R"({"architectures": [")" + architecture + R"("],
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
    "hidden_act": "silu", "rms_norm_eps": 1e-5)" +
         (extra.empty() ? "" : ", " + extra) + "}";
}

TEST(ConfigTest, ReadsTheOlderForm) {
  auto config = ParseModelConfig(Json(
      R"("rope_theta": 500000.0, "torch_dtype": "bfloat16",
         "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
           "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32})"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->head_dim, 4);
  EXPECT_EQ(config->rope.type, RopeType::kLlama3);
  EXPECT_EQ(config->rope.theta, 500000.0);
  EXPECT_EQ(config->rope.original_max_positions, 32);
  EXPECT_FALSE(config->tied_embeddings);
  EXPECT_FALSE(config->qkv_bias);
}

TEST(ConfigTest, ReadsTheNewerForm) {
  auto config =
      ParseModelConfig(Json(R"("dtype": "bfloat16", "tie_word_embeddings": true,
              "layer_types": ["full_attention", "full_attention"],
              "rope_parameters": {"rope_type": "default",
                                  "rope_theta": 1000000.0})",
                            "Qwen3ForCausalLM"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope.theta, 1000000.0);
  EXPECT_EQ(config->head_dim, 128);  // Qwen3's default, not hidden / heads.
  EXPECT_TRUE(config->qk_norm);
  EXPECT_TRUE(config->tied_embeddings);
}

TEST(ConfigTest, AnUnusedSlidingWindowOfQwenIsHarmless) {
  EXPECT_TRUE(ParseModelConfig(Json(R"("use_sliding_window": false,
      "sliding_window": 4096, "max_window_layers": 2)",
                                    "Qwen2ForCausalLM"))
                  .ok());
}

TEST(ConfigTest, TokensOfTokenisersAreHarmlessAndPaddingIsKept) {
  auto config = ParseModelConfig(
      Json(R"("unk_token_id": 0, "image_token_id": 7, "pad_token_id": 2)"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->padding_token, 2);
  EXPECT_EQ(ParseModelConfig(Json(R"("pad_token_id": -1)"))->padding_token, 31);
  EXPECT_EQ(ParseModelConfig(Json(R"("pad_token_id": null)"))->padding_token,
            -1);
}

TEST(ConfigTest, RefusesByNameWhatChangesTheMathematics) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"("quantization_config": {"bits": 4})", "quantization_config"},
      {R"("attention_bias": true)", "attention_bias"},
      {R"("mlp_bias": true)", "mlp_bias"},
      {R"("attention_dropout": 0.1)", "attention_dropout"},
      {R"("pretraining_tp": 2)", "pretraining_tp"},
      {R"("sliding_window": 128)", "sliding_window"},
      {R"("use_sliding_window": true)", "use_sliding_window"},
      {R"("num_experts": 8)", "num_experts"},
      {R"("rope_scaling": {"type": "yarn", "factor": 4.0})",
       "rope_scaling.rope_type"},
      {R"("rope_scaling": {"type": "dynamic", "factor": 4.0})",
       "rope_scaling.rope_type"},
      {R"("rope_parameters": {"rope_type": "default", "surprise": 1})",
       "rope_parameters.surprise"},
      {R"("layer_types": ["full_attention", "sliding_attention"])",
       "layer_types"},
      {R"("partial_rotary_factor": 0.5)", "partial_rotary_factor"},
      {R"("logit_scale": 2.0)", "logit_scale"},
  };
  for (const auto& [extra, field] : cases) {
    auto config = ParseModelConfig(Json(extra));
    ASSERT_FALSE(config.ok()) << extra;
    EXPECT_EQ(config.status().code(), absl::StatusCode::kUnimplemented);
    auto detail = GetErrorDetail(config.status());
    ASSERT_TRUE(detail.has_value());
    EXPECT_EQ(detail->reason, "MODEL_UNSUPPORTED");
    EXPECT_EQ(detail->metadata.at("field"), field);
  }
  auto other = ParseModelConfig(Json("", "GPT2LMHeadModel"));
  EXPECT_EQ(GetErrorDetail(other.status())->metadata.at("field"),
            "architectures");
  auto activation = ParseModelConfig(
      R"({"architectures": ["LlamaForCausalLM"], "vocab_size": 8,
          "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
          "num_attention_heads": 1, "hidden_act": "gelu"})");
  EXPECT_EQ(GetErrorDetail(activation.status())->metadata.at("field"),
            "hidden_act");
}

TEST(ConfigTest, RefusesWhatIsNotAConfiguration) {
  std::string deep(100, '[');
  const std::vector<std::string> cases = {
      "",
      "[]",
      "{",
      "null",
      R"({"architectures": ["LlamaForCausalLM"]})",
      R"({"a": )" + deep + std::string(100, ']') + "}",
      std::string(2 << 20, ' ') + "{}",
      Json(R"("head_dim": -4)"),
      Json(R"("head_dim": 3)"),
      Json(R"("head_dim": 1e30)"),
      Json(R"("head_dim": "8")"),
      Json(R"("rope_theta": "x")"),
      Json(R"("rope_scaling": 3)"),
      Json(R"("rope_scaling": {"type": "linear"})"),
      Json(R"("layer_types": ["full_attention"])"),
  };
  for (const std::string& text : cases) {
    auto config = ParseModelConfig(text);
    ASSERT_FALSE(config.ok()) << text.substr(0, 200);
    ASSERT_TRUE(GetErrorDetail(config.status()).has_value());
    EXPECT_EQ(GetErrorDetail(config.status())->reason, "MODEL_CONFIG_INVALID")
        << config.status();
  }
}

TEST(ConfigTest, EveryPrefixOfAConfigurationIsRefused) {
  const std::string text = Json("");
  for (size_t size = 0; size < text.size(); ++size) {
    EXPECT_FALSE(ParseModelConfig(text.substr(0, size)).ok());
  }
}

TEST(RopeTest, PlainTablesAreCosAndSinOfPositionTimesFrequency) {
  ModelConfig config = *ParseModelConfig(Json(""));
  std::vector<float> cos(10 * 2), sin(10 * 2);
  RopeTables(config, 10, cos.data(), sin.data());
  for (int p = 0; p < 10; ++p) {
    for (int i = 0; i < 2; ++i) {
      const double angle = p * std::pow(10000.0, -2.0 * i / 4);
      EXPECT_NEAR(cos[p * 2 + i], std::cos(angle), 1e-6 * (1 + angle));
      EXPECT_NEAR(sin[p * 2 + i], std::sin(angle), 1e-6 * (1 + angle));
    }
  }
}

TEST(ParamTableTest, RowsAreDisjointFusedViewsAreContiguous) {
  for (const char* architecture :
       {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}) {
    ModelConfig config = *ParseModelConfig(Json("", architecture));
    ParamTable table(config);
    std::set<std::string> names;
    int64_t end = 0, parameters = 0;
    for (const ParamRow& row : table.rows()) {
      EXPECT_TRUE(names.insert(row.hf_name).second);
      EXPECT_GE(row.offset, end);
      end = row.offset + row.num_elements;
      parameters += row.num_elements;
      EXPECT_EQ(table.Find(row.hf_name), &row);
    }
    EXPECT_EQ(parameters, table.num_parameters());
    EXPECT_LE(end, table.num_elements());
    const BlockOffsets& block = table.blocks()[1];
    const ParamRow* k = table.Find("model.layers.1.self_attn.k_proj.weight");
    EXPECT_EQ(k->offset,
              block.qkv + config.heads * config.head_dim * config.hidden);
    const ParamRow* up = table.Find("model.layers.1.mlp.up_proj.weight");
    EXPECT_EQ(up->offset, block.gate_up + config.ffn * config.hidden);
    EXPECT_EQ(block.qkv_bias >= 0, config.qkv_bias);
    EXPECT_EQ(block.q_norm >= 0, config.qk_norm);
    EXPECT_EQ(table.Find("nothing"), nullptr);
  }
}

TEST(ParamTableTest, ATiedHeadIsTheEmbedding) {
  ModelConfig config =
      *ParseModelConfig(Json(R"("tie_word_embeddings": true)"));
  ParamTable table(config);
  EXPECT_EQ(table.head(), table.embedding());
  EXPECT_EQ(table.Find("lm_head.weight"), nullptr);
}

}  // namespace
}  // namespace gradwire
