// SPDX-License-Identifier: Apache-2.0
// What a Hugging Face config.json says about a model of the llama family, after
// everything that would change the mathematics has been understood or refused.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace gradwire {

enum class RopeType { kPlain, kLinear, kLlama3 };

struct RopeConfig {
  RopeType type = RopeType::kPlain;
  double theta = 10000.0;
  double factor = 1.0;  // linear, llama3
  // llama3
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  double original_max_positions = 8192.0;
};

// Llama (2, 3.x, SmolLM2), Qwen2, Qwen3: the same block with three switches.
struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM", ...
  int64_t vocab = 0;
  int64_t hidden = 0;
  int64_t ffn = 0;
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t max_positions = 0;
  double rms_eps = 1e-6;
  double init_std = 0.02;
  RopeConfig rope;
  bool qkv_bias = false;  // Qwen2
  bool qk_norm = false;   // Qwen3
  bool tied_embeddings = false;
  // Its row of the embedding takes no gradient from the input side, as in
  // torch.nn.Embedding(padding_idx); -1: none.
  int64_t padding_token = -1;

  int64_t QkvWidth() const { return (heads + 2 * kv_heads) * head_dim; }
  int64_t AttentionWidth() const { return heads * head_dim; }
};

// Reads the text of a config.json, in the older form (rope_theta, rope_scaling,
// torch_dtype) and in the newer (rope_parameters, dtype, layer_types).
// Errors: INVALID_ARGUMENT MODEL_CONFIG_INVALID (not JSON, wrong type, number
// out of range, nested too deep, over 1 MiB); UNIMPLEMENTED MODEL_UNSUPPORTED
// (architecture, activation, rope type, sliding window in use, quantisation,
// bias or any other field that changes the mathematics), both naming field and
// value.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json);

// The architectures that ParseModelConfig accepts.
std::vector<std::string> SupportedArchitectures();

// f32 [positions, head_dim / 2] each: cos and sin of position * frequency, the
// frequencies as transformers computes them (float32) for the rope type.
// REQUIRES: cos and sin have positions * head_dim / 2 elements.
void RopeTables(const ModelConfig& config, int64_t positions, float* cos,
                float* sin);

}  // namespace gradwire
