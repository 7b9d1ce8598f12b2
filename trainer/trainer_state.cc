// SPDX-License-Identifier: Apache-2.0
// Training checkpoints: every rank writes and reads what it holds.
#include <algorithm>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"
#include "checkpoint/file_system.h"
#include "checkpoint/sealed_text.h"
#include "checkpoint/training_state.h"
#include "trainer/trainer_impl.h"
#include "xxhash.h"

namespace gradwire {
namespace {

// What is between the model and a file at a time.
constexpr int64_t kPartElements = 1 << 20;

absl::Status Incompatible(const std::string& field, const std::string& value,
                          const std::string& limit,
                          const std::string& message) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "CHECKPOINT_INCOMPATIBLE")
      .With("field", field)
      .With("value", value)
      .With("limit", limit)
      .Message(message);
}

absl::StatusOr<PendingState> CreatePending(FileSystem& files,
                                           const std::string& directory,
                                           bool replaces) {
  GW_RETURN_IF_ERROR(MakeDirectories(files, DirectoryOf(directory)));
  return PendingState::Create(files, directory, replaces);
}

// The moments, by the names that they have in a checkpoint.
struct Moment {
  const char* name;
  Tensor values;
};

}  // namespace

std::string TrainerImpl::ModelDigest() const {
  std::string text;
  for (const ParamRow& row : table_.rows()) {
    text += row.hf_name + " " + std::to_string(row.offset);
    for (const int64_t dim : row.shape) text += " " + std::to_string(dim);
    text += "\n";
  }
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(text.data(), text.size()));
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string digest;
  for (const unsigned char byte : canonical.digest) {
    digest += {kDigits[byte >> 4], kDigits[byte & 15]};
  }
  return digest;
}

absl::Status TrainerImpl::ForEachPart(
    const std::function<absl::Status(const ShardPiece& piece,
                                     const ShardPiece& part)>& visit) const {
  for (int unit = 0; unit < layout_.num_units(); ++unit) {
    const ShardPiece piece = layout_.Owned(unit, shard_rank_);
    for (int64_t begin = piece.begin; begin < piece.end;
         begin += kPartElements) {
      ShardPiece part = piece;
      part.begin = begin;
      part.end = std::min(piece.end, begin + kPartElements);
      part.offset += begin - piece.begin;
      GW_RETURN_IF_ERROR(visit(piece, part));
    }
  }
  return absl::OkStatus();
}

absl::Status TrainerImpl::CheckShared(const std::string& path) {
  std::vector<double> seen = {files_.Stat(path).ok() ? 1.0 : 0.0};
  GW_RETURN_IF_ERROR(agreement_->Sum(seen));
  const auto count = static_cast<int64_t>(seen[0]);
  if (count == 0 || count == world()) return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "STATE_DIRECTORY_NOT_SHARED")
      .Server()
      .With("value", count)
      .With("limit", world())
      .Message("only " + std::to_string(count) + " of " +
               std::to_string(world()) +
               " ranks see the server's state directory, to which each writes "
               "its part; put it on a file system that is mounted under the "
               "same path on all hosts");
}

absl::Status TrainerImpl::CheckSame(const std::string& directory,
                                    const std::string& digest) {
  // Sums of so many small numbers are exact. The last one counts ranks that
  // have none, and an error of their own.
  constexpr size_t kParts = 16;
  std::vector<double> sums(kParts + 1);
  for (size_t i = 0; i < digest.size(); ++i) {
    sums[i % kParts] +=
        static_cast<double>(static_cast<unsigned char>(digest[i])) *
        (i < kParts ? 1 : 256);
  }
  sums[kParts] = digest.empty() ? 1 : 0;
  const std::vector<double> own = sums;
  GW_RETURN_IF_ERROR(agreement_->Sum(sums));
  if (sums[kParts] > 0) return absl::OkStatus();
  for (size_t i = 0; i < sums.size(); ++i) {
    if (sums[i] == own[i] * world()) continue;
    return ErrorBuilder(absl::StatusCode::kAborted, "CHECKPOINT_REPLACED")
        .With("checkpoint", LastSegment(directory))
        .Message(
            "another checkpoint has taken the place of this one while the "
            "ranks opened it; try again");
  }
  return absl::OkStatus();
}

absl::Status TrainerImpl::BeginSave(
    const std::string& directory, bool replaces,
    std::function<void(const absl::Status&)> written) {
  GW_CHECK(!options_.forward_only && saving_ == nullptr);
  auto saving = std::make_unique<Saving>();
  absl::Status status;
  if (rank_ == 0) {
    auto made = CreatePending(files_, directory, replaces);
    status = made.status();
    if (made.ok()) {
      saving->pending = std::make_unique<PendingState>(*std::move(made));
    }
  }
  GW_RETURN_IF_ERROR(Agree(status));
  GW_RETURN_IF_ERROR(CheckShared(PendingPath(directory)));
  saving->optimizer_step = optimizer_->step();
  saving->weight_version = weight_version_;
  // Replicas of the model hold the same.
  if (rank_ >= layout_.world()) {
    written(absl::OkStatus());
  } else {
    // Until the first step moments are zero.
    const StateSave::Part part = {layout_, shard_rank_, device_, state_,
                                  optimizer_->step() > 0};
    saving->part = std::make_unique<StateSave>(files_, PendingPath(directory),
                                               part, std::move(written));
  }
  saving_ = std::move(saving);
  return absl::OkStatus();
}

absl::StatusOr<SavedState> TrainerImpl::PublishSave(
    const std::map<std::string, std::string>& attributes) {
  GW_CHECK(saving_ != nullptr);
  const std::unique_ptr<Saving> saving = std::move(saving_);
  saving->part.reset();
  SavedState saved;
  saved.optimizer_step = saving->optimizer_step;
  saved.weight_version = saving->weight_version;
  absl::Status status;
  if (rank_ == 0) {
    const auto summary =
        saving->pending->Publish({.num_parameters = table_.num_elements(),
                                  .model_digest = ModelDigest(),
                                  .optimizer_step = saved.optimizer_step,
                                  .weight_version = saved.weight_version,
                                  .attributes = attributes},
                                 layout_.world());
    status = summary.status();
    if (summary.ok()) {
      saved.bytes = summary->bytes;
      saved.digest = summary->digest;
    }
  }
  GW_RETURN_IF_ERROR(Agree(status));
  return saved;
}

absl::StatusOr<SavedState> TrainerImpl::SaveState(
    const std::string& directory,
    const std::map<std::string, std::string>& attributes) {
  std::promise<absl::Status> written;
  GW_RETURN_IF_ERROR(BeginSave(
      directory, /*replaces=*/false,
      [&](const absl::Status& status) { written.set_value(status); }));
  if (absl::Status status = Agree(written.get_future().get()); !status.ok()) {
    AbandonSave();
    return status;
  }
  return PublishSave(attributes);
}

absl::Status TrainerImpl::CheckState(StateReader& reader,
                                     bool optimizer) const {
  const StateHeader& header = reader.header();
  if (header.model_digest != ModelDigest() ||
      header.num_parameters != table_.num_elements()) {
    return Incompatible(
        "model", header.model_digest, ModelDigest(),
        "The checkpoint is of a model with other parameters; load it into a "
        "job whose base model has the same architecture.");
  }
  std::vector<std::string> vectors = {"weight"};
  if (optimizer && header.optimizer_step > 0) {
    for (const Moment& moment :
         {Moment{"m", state_.m}, Moment{"v", state_.v}}) {
      const auto dtype = reader.dtype(moment.name);
      if (dtype != moment.values.dtype()) {
        return Incompatible(
            "moment_precision", dtype ? DTypeName(*dtype) : "none",
            DTypeName(moment.values.dtype()),
            "The checkpoint's optimizer state is of another precision than "
            "the job's; load it without the optimizer, or into a job with "
            "the same moment precision.");
      }
      vectors.push_back(moment.name);
    }
  }
  for (const std::string& vector : vectors) {
    GW_RETURN_IF_ERROR(
        ForEachPart([&](const ShardPiece&, const ShardPiece& part) {
          return reader.Verify(vector, part.begin, part.size());
        }));
  }
  return absl::OkStatus();
}

absl::Status TrainerImpl::ReadState(StateReader& reader, bool optimizer) {
  GW_ASSIGN_OR_RETURN(FlatWeights weights, Weights());
  std::vector<double> buffer(kPartElements / 2);
  GW_RETURN_IF_ERROR(ForEachPart([&](const ShardPiece&,
                                     const ShardPiece& part) -> absl::Status {
    float* values = reinterpret_cast<float*>(buffer.data());
    GW_RETURN_IF_ERROR(reader.Read("weight", part.begin, part.size(), values));
    return weights.Write(part.offset, part.size(), values);
  }));
  if (options_.forward_only) return absl::OkStatus();
  const bool moments = optimizer && reader.header().optimizer_step > 0;
  has_moments_ = has_moments_ || moments;
  for (const Moment& moment : {Moment{"m", state_.m}, Moment{"v", state_.v}}) {
    GW_RETURN_IF_ERROR(ForEachPart(
        [&](const ShardPiece&, const ShardPiece& part) -> absl::Status {
          const Tensor values =
              moment.values.Rows(part.offset, part.offset + part.size());
          if (moments) {
            GW_RETURN_IF_ERROR(reader.Read(moment.name, part.begin, part.size(),
                                           buffer.data()));
            device_.CopyFromHost(step_->stream(), buffer.data(), values);
          } else if (optimizer_->step() > 0) {
            device_.Zero(step_->stream(), values);
          }
          return step_->stream().Finish();
        }));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> TrainerImpl::StateDigest() {
  GW_CHECK(!options_.forward_only);
  GW_ASSIGN_OR_RETURN(const DigestSums sums, optimizer_->StateDigest());
  const uint64_t all[] = {static_cast<uint64_t>(optimizer_->step()),
                          static_cast<uint64_t>(weight_version_), sums.lane[0],
                          sums.lane[1]};
  std::string bytes;
  for (const uint64_t number : all) {
    for (int i = 0; i < 64; i += 8) {
      bytes += static_cast<char>((number >> i) & 0xff);
    }
  }
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical,
                           XXH3_128bits(bytes.data(), bytes.size()));
  return std::string(reinterpret_cast<const char*>(canonical.digest),
                     sizeof(canonical.digest));
}

absl::StatusOr<int64_t> TrainerImpl::LoadState(const std::string& directory,
                                               bool optimizer) {
  GW_CHECK(!options_.forward_only || !optimizer);
  GW_RETURN_IF_ERROR(CheckShared(directory));
  auto reader = StateReader::Open(files_, directory);
  absl::Status status = reader.status();
  if (status.ok()) status = CheckState(**reader, optimizer);
  status.Update(
      CheckSame(directory, reader.ok() ? (*reader)->summary().digest : ""));
  GW_RETURN_IF_ERROR(Agree(status));
  // Behind this in the queue of those that share the model, no gather reads the
  // weights any more.
  GW_RETURN_IF_ERROR(shard_agreement_->Agree(absl::OkStatus(), nullptr));
  AwaitRead(layout_.num_units() - 1);
  const int64_t dropped = Reset();
  valid_ = false;
  GW_RETURN_IF_ERROR(Agree(ReadState(**reader, optimizer)));
  valid_ = true;
  unit_weights_->NewVersion();
  const StateHeader& header = (*reader)->header();
  weight_version_ = header.weight_version;
  optimizer_->Resume(optimizer ? header.optimizer_step : 0);
  return dropped;
}

}  // namespace gradwire
