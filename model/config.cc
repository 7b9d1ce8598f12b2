// SPDX-License-Identifier: Apache-2.0
#include "model/config.h"

#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/status.h"

namespace gradwire {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxBytes = 1 << 20;
constexpr int kMaxDepth = 32;

absl::Status Invalid(const std::string& field, const std::string& value,
                     const std::string& what) {
  return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                      "MODEL_CONFIG_INVALID")
      .With("field", field)
      .With("value", value)
      .Message("config.json: " + field + " " + what +
               "; give an unmodified config.json of the model");
}

absl::Status Unsupported(const std::string& field, const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return ErrorBuilder(absl::StatusCode::kUnimplemented, "MODEL_UNSUPPORTED")
      .With("field", field)
      .With("value", text)
      .Message("config.json: " + field + " = " + text +
               " changes the mathematics in a way that gradwire does not "
               "compute; use a Llama, Qwen2 or Qwen3 model without it");
}

// Parses without ever building a document that is nested too deep.
absl::StatusOr<Json> ParseShallow(std::string_view text) {
  if (text.size() > kMaxBytes) {
    return Invalid("(file)", std::to_string(text.size()), "is over 1 MiB");
  }
  bool deep = false;
  auto callback = [&](int depth, Json::parse_event_t, Json&) {
    if (depth > kMaxDepth) deep = true;
    return !deep;
  };
  Json json = Json::parse(text.begin(), text.end(), callback,
                          /*allow_exceptions=*/false);
  if (deep) {
    return Invalid("(file)", std::to_string(kMaxDepth), "is nested too deep");
  }
  if (json.is_discarded() || !json.is_object()) {
    return Invalid("(file)", "", "is not a JSON object");
  }
  return json;
}

// Typed access that remembers the first error and which keys were understood.
class Reader {
 public:
  Reader(const Json& json, std::string prefix)
      : json_(json), prefix_(std::move(prefix)) {}

  const Json* Find(const std::string& key) {
    used_.insert(key);
    auto found = json_.find(key);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }

  int64_t Int(const std::string& key, int64_t fallback, int64_t limit) {
    const Json* value = Find(key);
    if (value == nullptr) {
      if (fallback < 0) Fail(Invalid(prefix_ + key, "", "is missing"));
      return fallback;
    }
    if (!value->is_number_integer() || value->get<double>() < 1 ||
        value->get<double>() > static_cast<double>(limit)) {
      Fail(Invalid(prefix_ + key, Text(*value),
                   "is not an integer from 1 to " + std::to_string(limit)));
      return 1;
    }
    return value->get<int64_t>();
  }

  double Number(const std::string& key, double fallback, double low,
                double high) {
    const Json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number() || !(value->get<double>() >= low) ||
        !(value->get<double>() <= high)) {
      Fail(Invalid(prefix_ + key, Text(*value), "is not a number in range"));
      return fallback;
    }
    return value->get<double>();
  }

  bool Bool(const std::string& key, bool fallback) {
    const Json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) {
      Fail(Invalid(prefix_ + key, Text(*value), "is not true or false"));
      return fallback;
    }
    return value->get<bool>();
  }

  std::string String(const std::string& key, const std::string& fallback) {
    const Json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_string()) {
      Fail(Invalid(prefix_ + key, Text(*value), "is not a string"));
      return fallback;
    }
    return value->get<std::string>();
  }

  // The field may be absent, null or `wanted`; anything else is refused.
  void Only(const std::string& key, const Json& wanted) {
    const Json* value = Find(key);
    if (value != nullptr && *value != wanted) {
      Fail(Unsupported(prefix_ + key, *value));
    }
  }

  void Ignore(const std::vector<std::string>& keys) {
    used_.insert(keys.begin(), keys.end());
  }

  void Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  // The first error, else a refusal of the first key that nobody asked for.
  absl::Status Finish() {
    if (!status_.ok()) return status_;
    for (const auto& [key, value] : json_.items()) {
      if (!used_.count(key) && !value.is_null()) {
        return Unsupported(prefix_ + key, value);
      }
    }
    return absl::OkStatus();
  }

 private:
  static std::string Text(const Json& value) {
    return value.dump(-1, ' ', true, Json::error_handler_t::replace)
        .substr(0, 80);
  }

  const Json& json_;
  const std::string prefix_;
  std::set<std::string> used_;
  absl::Status status_;
};

// What generation, tokenisation or bookkeeping read, and training does not.
const std::vector<std::string>& HarmlessKeys() {
  static const auto* keys =
      new std::vector<std::string>{"_name_or_path",
                                   "_attn_implementation",
                                   "_commit_hash",
                                   "add_cross_attention",
                                   "architectures",
                                   "attn_implementation",
                                   "auto_map",
                                   "bad_words_ids",
                                   "begin_suppress_tokens",
                                   "bos_token_id",
                                   "chunk_size_feed_forward",
                                   "cross_attention_hidden_size",
                                   "decoder_start_token_id",
                                   "diversity_penalty",
                                   "do_sample",
                                   "dtype",
                                   "early_stopping",
                                   "encoder_no_repeat_ngram_size",
                                   "eos_token_id",
                                   "exponential_decay_length_penalty",
                                   "finetuning_task",
                                   "forced_bos_token_id",
                                   "forced_eos_token_id",
                                   "id2label",
                                   "is_decoder",
                                   "is_encoder_decoder",
                                   "is_llama_config",
                                   "label2id",
                                   "length_penalty",
                                   "max_length",
                                   "max_window_layers",
                                   "min_length",
                                   "model_type",
                                   "no_repeat_ngram_size",
                                   "num_beam_groups",
                                   "num_beams",
                                   "num_return_sequences",
                                   "output_attentions",
                                   "output_hidden_states",
                                   "output_scores",
                                   "pad_token_id",
                                   "prefix",
                                   "problem_type",
                                   "pruned_heads",
                                   "remove_invalid_values",
                                   "repetition_penalty",
                                   "return_dict",
                                   "return_dict_in_generate",
                                   "sep_token_id",
                                   "suppress_tokens",
                                   "task_specific_params",
                                   "temperature",
                                   "tf_legacy_loss",
                                   "tokenizer_class",
                                   "top_k",
                                   "top_p",
                                   "torch_dtype",
                                   "torchscript",
                                   "transformers_version",
                                   "transformers.js_config",
                                   "typical_p",
                                   "use_bfloat16",
                                   "use_cache",
                                   "model_max_length",
                                   "unsloth_fixed",
                                   "unsloth_version"};
  return *keys;
}

// `json` is rope_scaling (older form) or rope_parameters (newer).
absl::Status ReadRope(const Json& json, const std::string& prefix,
                      double max_positions, RopeConfig& rope) {
  if (!json.is_object()) return Invalid(prefix, "", "is not an object");
  Reader in(json, prefix + ".");
  std::string type = in.String("rope_type", in.String("type", "default"));
  in.Ignore({"type"});
  rope.theta = in.Number("rope_theta", rope.theta, 1.0, 1e12);
  in.Only("partial_rotary_factor", 1.0);
  if (type == "default") {
    rope.type = RopeType::kPlain;
    in.Ignore({"factor"});
  } else if (type == "linear") {
    rope.type = RopeType::kLinear;
    if (in.Find("factor") == nullptr) {
      in.Fail(Invalid(prefix + ".factor", "", "is missing"));
    }
    rope.factor = in.Number("factor", 1.0, 1e-3, 1e6);
  } else if (type == "llama3") {
    rope.type = RopeType::kLlama3;
    for (const char* key : {"factor", "low_freq_factor", "high_freq_factor"}) {
      if (in.Find(key) == nullptr) {
        in.Fail(Invalid(prefix + "." + key, "", "is missing"));
      }
    }
    rope.factor = in.Number("factor", 1.0, 1e-3, 1e6);
    rope.low_freq_factor = in.Number("low_freq_factor", 1.0, 1e-3, 1e6);
    rope.high_freq_factor = in.Number("high_freq_factor", 4.0, 1e-3, 1e6);
    rope.original_max_positions =
        in.Number("original_max_position_embeddings", max_positions, 1.0, 1e12);
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      in.Fail(Invalid(prefix + ".high_freq_factor", "",
                      "is not above low_freq_factor"));
    }
  } else {
    return Unsupported(prefix + ".rope_type", type);
  }
  return in.Finish();
}

}  // namespace

std::vector<std::string> SupportedArchitectures() {
  return {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"};
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view text) {
  GW_ASSIGN_OR_RETURN(Json json, ParseShallow(text));
  Reader in(json, "");
  ModelConfig config;
  const Json* architectures = in.Find("architectures");
  if (architectures == nullptr || !architectures->is_array() ||
      architectures->size() != 1 || !(*architectures)[0].is_string()) {
    return Invalid("architectures", "", "is not a list of one name");
  }
  config.architecture = (*architectures)[0].get<std::string>();
  bool known = false;
  for (const std::string& name : SupportedArchitectures()) {
    known = known || name == config.architecture;
  }
  if (!known) return Unsupported("architectures", *architectures);
  const bool llama = config.architecture == "LlamaForCausalLM";
  const bool qwen3 = config.architecture == "Qwen3ForCausalLM";
  config.qkv_bias = config.architecture == "Qwen2ForCausalLM";
  config.qk_norm = qwen3;

  config.vocab = in.Int("vocab_size", -1, int64_t{1} << 22);
  config.hidden = in.Int("hidden_size", -1, 1 << 16);
  config.ffn = in.Int("intermediate_size", -1, 1 << 18);
  config.layers = in.Int("num_hidden_layers", -1, 1024);
  config.heads = in.Int("num_attention_heads", -1, 1024);
  config.kv_heads = in.Int("num_key_value_heads", config.heads, 1024);
  config.head_dim =
      in.Int("head_dim", qwen3 ? 128 : config.hidden / config.heads, 1024);
  config.max_positions =
      in.Int("max_position_embeddings", llama ? 2048 : 32768, 1 << 24);
  config.rms_eps = in.Number("rms_norm_eps", 1e-6, 0.0, 1.0);
  config.init_std = in.Number("initializer_range", 0.02, 0.0, 100.0);
  config.tied_embeddings = in.Bool("tie_word_embeddings", false);
  config.rope.theta = in.Number("rope_theta", 10000.0, 1.0, 1e12);
  if (const Json* pad = in.Find("pad_token_id");
      pad != nullptr && pad->is_number_integer()) {
    // Negative ones count from the end, as in torch.
    const int64_t token = pad->get<int64_t>();
    const int64_t row = token < 0 ? token + config.vocab : token;
    if (row >= 0 && row < config.vocab) config.padding_token = row;
  }
  if (config.heads % config.kv_heads != 0) {
    in.Fail(Invalid("num_key_value_heads", std::to_string(config.kv_heads),
                    "does not divide num_attention_heads"));
  }
  if (config.head_dim < 2 || config.head_dim % 2 != 0) {
    in.Fail(Invalid("head_dim", std::to_string(config.head_dim),
                    "is not an even number from 2"));
  }

  in.Only("hidden_act", "silu");
  in.Only("pretraining_tp", 1);
  in.Only("partial_rotary_factor", 1.0);
  in.Only("attention_dropout", 0.0);
  in.Only("mlp_bias", false);
  in.Only("rope_interleaved", false);
  in.Only("quantization_config", nullptr);
  in.Only("use_sliding_window", false);
  in.Only("tie_encoder_decoder", false);
  in.Only("use_mrope", false);
  if (llama || qwen3) in.Only("attention_bias", false);
  // A window that is configured but not used does nothing in Qwen models.
  if (!llama) in.Ignore({"sliding_window"});
  if (const Json* types = in.Find("layer_types"); types != nullptr) {
    if (!types->is_array() ||
        static_cast<int64_t>(types->size()) != config.layers) {
      in.Fail(Invalid("layer_types", "", "does not name every layer"));
    } else {
      for (const Json& type : *types) {
        if (type != "full_attention") {
          in.Fail(Unsupported("layer_types", type));
        }
      }
    }
  }
  in.Ignore(HarmlessKeys());
  // Names of special tokens are for tokenisers.
  for (const auto& [key, value] : json.items()) {
    if (key.ends_with("_token_id")) in.Ignore({key});
  }
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (const Json* rope = in.Find(key); rope != nullptr) {
      absl::Status status =
          ReadRope(*rope, key, config.max_positions, config.rope);
      if (!status.ok()) in.Fail(status);
    }
  }
  GW_RETURN_IF_ERROR(in.Finish());
  return config;
}

void RopeTables(const ModelConfig& config, int64_t positions, float* cos,
                float* sin) {
  const int64_t half = config.head_dim / 2;
  const RopeConfig& rope = config.rope;
  for (int64_t i = 0; i < half; ++i) {
    const float exponent =
        static_cast<float>(2 * i) / static_cast<float>(config.head_dim);
    float frequency = 1.0f / std::pow(static_cast<float>(rope.theta), exponent);
    if (rope.type == RopeType::kLinear) {
      frequency /= static_cast<float>(rope.factor);
    } else if (rope.type == RopeType::kLlama3) {
      const double wavelength = 2.0 * M_PI / frequency;
      const double low = rope.original_max_positions / rope.low_freq_factor;
      const double high = rope.original_max_positions / rope.high_freq_factor;
      if (wavelength > low) {
        frequency = static_cast<float>(frequency / rope.factor);
      } else if (wavelength >= high) {
        const double smooth =
            (rope.original_max_positions / wavelength - rope.low_freq_factor) /
            (rope.high_freq_factor - rope.low_freq_factor);
        frequency = static_cast<float>(
            (1.0 - smooth) * frequency / rope.factor + smooth * frequency);
      }
    }
    for (int64_t position = 0; position < positions; ++position) {
      const float angle = static_cast<float>(position) * frequency;
      cos[position * half + i] = std::cos(angle);
      sin[position * half + i] = std::sin(angle);
    }
  }
}

}  // namespace gradwire
