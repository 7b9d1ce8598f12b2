// SPDX-License-Identifier: Apache-2.0
#include "server/job_table.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/numbers.h"
#include "base/error.h"
#include "base/status.h"
#include "google/protobuf/text_format.h"
#include "google/protobuf/util/message_differencer.h"
#include "server/names.h"

namespace gradwire {
namespace {

constexpr int64_t kMostRanks = 1024;

absl::Status Unsupported(const std::string& field, const std::string& value,
                         const std::string& limit) {
  return ErrorBuilder(absl::StatusCode::kUnimplemented, "UNSUPPORTED_OPTION")
      .With("field", field)
      .With("value", value)
      .With("limit", limit)
      .Message(field + " = " + value +
               " is not supported by this server; use " + limit + ".");
}

// `otherwise`: what an empty value means.
absl::Status CheckPrecision(const std::string& field, const std::string& value,
                            const std::string& otherwise) {
  if (value.empty() || value == "f32" || value == "bf16") {
    return absl::OkStatus();
  }
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "PRECISION_UNKNOWN")
      .With("field", field)
      .With("value", value.substr(0, 32))
      .With("limit", "f32, bf16")
      .Message(field + " must be f32 or bf16, or empty for " + otherwise + ".");
}

absl::Status CheckSpec(const v1::JobSpec& spec) {
  if (spec.base_model().empty()) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "MISSING_FIELD")
        .With("field", "base_model")
        .Message(
            "base_model must name a Hugging Face directory on the "
            "server's machine.");
  }
  GW_RETURN_IF_ERROR(
      CheckPrecision("precision", spec.precision(), "the device's default"));
  GW_RETURN_IF_ERROR(
      CheckPrecision("moment_precision", spec.moment_precision(), "f32"));
  constexpr int64_t kMost = int64_t{1} << 50;
  constexpr int64_t kMostThreads = 1024;
  const std::tuple<const char*, int64_t, int64_t> counts[] = {
      {"world_size", spec.world_size(), kMostRanks},
      {"replicas", spec.replicas(), std::max(1, spec.world_size())},
      {"max_context_length", spec.max_context_length(), kMost},
      {"activation_bytes", spec.activation_bytes(), kMost},
      {"micro_batch_tokens", spec.micro_batch_tokens(), kMost},
      {"threads", spec.threads(), kMostThreads},
  };
  for (const auto& [field, value, most] : counts) {
    if (value >= 0 && value <= most) continue;
    return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                        "OPTION_OUT_OF_RANGE")
        .With("field", field)
        .With("value", value)
        .With("limit", value < 0 ? 0 : most)
        .Message(std::string(field) + " is out of range; 0 means the default.");
  }
  if (std::max(1, spec.world_size()) % std::max(1, spec.replicas()) != 0) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                        "OPTION_OUT_OF_RANGE")
        .With("field", "replicas")
        .With("value", spec.replicas())
        .With("limit", spec.world_size())
        .Message("replicas must divide world_size: groups are of one size.");
  }
  if (spec.lora().max_rank() != 0) {
    return Unsupported("lora.max_rank", std::to_string(spec.lora().max_rank()),
                       "0");
  }
  if (spec.lora().max_adapters() != 0) {
    return Unsupported("lora.max_adapters",
                       std::to_string(spec.lora().max_adapters()), "0");
  }
  if (const auto& unknown = spec.GetReflection()->GetUnknownFields(spec);
      !unknown.empty()) {
    const std::string field = std::to_string(unknown.field(0).number());
    return Unsupported("spec field " + field, "set",
                       "a field that this server knows");
  }
  if (spec.forward_only() && !spec.moment_precision().empty()) {
    return Unsupported("moment_precision", spec.moment_precision(),
                       "an empty one with forward_only");
  }
  if (spec.preemptible()) return Unsupported("preemptible", "true", "false");
  if (spec.inactivity_timeout_seconds() != 0) {
    return Unsupported("inactivity_timeout_seconds",
                       std::to_string(spec.inactivity_timeout_seconds()),
                       "0 (never)");
  }
  return absl::OkStatus();
}

// The first field in which two specifications differ.
const google::protobuf::FieldDescriptor* Difference(const v1::JobSpec& a,
                                                    const v1::JobSpec& b) {
  const google::protobuf::Descriptor* type = v1::JobSpec::descriptor();
  for (int i = 0; i < type->field_count(); ++i) {
    google::protobuf::util::MessageDifferencer differencer;
    if (!differencer.CompareWithFields(a, b, {type->field(i)},
                                       {type->field(i)})) {
      return type->field(i);
    }
  }
  return nullptr;
}

// One rank is one rank, whether it was said or not.
v1::JobSpec WithDefaults(v1::JobSpec spec) {
  spec.set_world_size(std::max(1, spec.world_size()));
  spec.set_replicas(std::max(1, spec.replicas()));
  return spec;
}

std::string ValueOf(const v1::JobSpec& spec,
                    const google::protobuf::FieldDescriptor& field) {
  if (field.is_repeated() ||
      (field.has_presence() && !spec.GetReflection()->HasField(spec, &field))) {
    return "";
  }
  std::string text;
  google::protobuf::TextFormat::PrintFieldValueToString(spec, &field, -1,
                                                        &text);
  return text.substr(0, 160);
}

absl::Status NotFound(const std::string& field, const std::string& reason,
                      const std::string& value) {
  return ErrorBuilder(absl::StatusCode::kNotFound, reason)
      .With("field", field)
      .With("value", value.substr(0, 160))
      .Message("There is no " + field + " of this name.");
}

}  // namespace

absl::StatusOr<JobPtr> JobTable::Create(const std::string& job_id,
                                        const v1::JobSpec& spec) {
  GW_RETURN_IF_ERROR(CheckJobId(job_id));
  GW_RETURN_IF_ERROR(CheckSpec(spec));
  JobPtr job;
  {
    absl::MutexLock lock(&mu_);
    for (const JobPtr& existing : jobs_) {
      if (existing->id() != job_id) continue;
      const v1::JobState state = existing->Get().state();
      if (state == v1::JOB_STATE_DELETING || state == v1::JOB_STATE_DELETED) {
        return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                            "JOB_ID_TOMBSTONED")
            .With("field", "job_id")
            .With("value", job_id)
            .Message(
                "A job of this id was deleted; ids are not used again. "
                "Choose another.");
      }
      const v1::JobSpec asked = WithDefaults(spec);
      const v1::JobSpec has = WithDefaults(existing->spec());
      const auto* const field = Difference(asked, has);
      if (field == nullptr) return existing;
      return ErrorBuilder(absl::StatusCode::kAlreadyExists, "JOB_SPEC_MISMATCH")
          .With("field", field->name())
          .With("value", ValueOf(asked, *field))
          .With("limit", ValueOf(has, *field))
          .With("job_id", job_id)
          .Message("A job of this id exists with another " + field->name() +
                   ". Choose another id, or use its specification.");
    }
    if (environment_->draining) {
      return ErrorBuilder(absl::StatusCode::kUnavailable, "SERVER_DRAINING")
          .Server()
          .With("retry_after_seconds", 1.0)
          .Message("The server is stopping. Try again when it is back.");
    }
    job = std::make_shared<Job>(job_id, spec, environment_);
    GW_RETURN_IF_ERROR(job->Create());
    jobs_.push_back(job);
  }
  job->Start();
  return job;
}

absl::Status JobTable::Restore() {
  GW_ASSIGN_OR_RETURN(const auto rows, environment_->metadata->Jobs());
  for (const JobRow& row : rows) {
    v1::JobSpec spec;
    spec.ParseFromString(row.spec);
    auto job = std::make_shared<Job>(row.job_id, spec, environment_);
    job->Restore(row);
    {
      absl::MutexLock lock(&mu_);
      jobs_.push_back(job);
    }
    if (row.state != JobRow::kDeleted) job->Start();
  }
  return absl::OkStatus();
}

absl::StatusOr<JobPtr> JobTable::Get(const std::string& job_id) const {
  absl::MutexLock lock(&mu_);
  for (const JobPtr& job : jobs_) {
    if (job->id() == job_id) return job;
  }
  return NotFound("job", "JOB_NOT_FOUND", job_id);
}

std::vector<JobPtr> JobTable::List() const {
  absl::MutexLock lock(&mu_);
  return jobs_;
}

absl::StatusOr<JobPtr> JobTable::OfModel(const std::string& model_id) const {
  auto job = Get(model_id.substr(0, model_id.find('.')));
  if (job.ok()) return job;
  return NotFound("model", "MODEL_NOT_FOUND", model_id);
}

absl::StatusOr<std::pair<JobPtr, OperationPtr>> JobTable::OfOperation(
    const std::string& op_id) const {
  const size_t dot = op_id.rfind('.');
  int64_t seq = 0;
  if (dot != std::string::npos &&
      absl::SimpleAtoi(op_id.substr(dot + 1), &seq)) {
    const std::string model_id = op_id.substr(0, dot);
    if (auto job = OfModel(model_id); job.ok()) {
      if (OperationPtr op = (*job)->FindOperation(model_id, seq);
          op != nullptr) {
        return std::make_pair(*job, op);
      }
    }
  }
  return NotFound("operation", "OPERATION_NOT_FOUND", op_id);
}

void JobTable::Clear() {
  std::vector<JobPtr> jobs;
  {
    absl::MutexLock lock(&mu_);
    jobs.swap(jobs_);
  }
}

}  // namespace gradwire
