// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "checkpoint/state_format.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

// What is hashed and written at a time: hashing finds it in the cache, and the
// disk is told to begin with it while the next is on its way.
constexpr int64_t kSliceBytes = int64_t{4} << 20;

}  // namespace

absl::StatusOr<std::unique_ptr<StateWriter>> StateWriter::Create(
    FileSystem& files, const std::string& directory, int rank,
    const StateWriterOptions& options) {
  GW_CHECK(rank >= 0 && rank < kMaxRanks);
  GW_CHECK(options.chunk_bytes > 0);
  GW_ASSIGN_OR_RETURN(std::unique_ptr<File> data,
                      files.Create(directory + "/" + DataName(rank)));
  auto table = std::make_unique<StateTable>();
  table->rank = rank;
  table->chunk_bytes = options.chunk_bytes;
  return std::unique_ptr<StateWriter>(
      new StateWriter(files, directory, std::move(data), std::move(table)));
}

StateWriter::StateWriter(FileSystem& files, const std::string& directory,
                         std::unique_ptr<File> data,
                         std::unique_ptr<StateTable> table)
    : files_(files),
      directory_(directory),
      data_(std::move(data)),
      table_(std::move(table)),
      chunk_(std::make_unique<StreamDigest>()) {}

StateWriter::~StateWriter() = default;

absl::Status StateWriter::Stick(absl::Status status) {
  if (status_.ok()) status_ = std::move(status);
  return status_;
}

absl::Status StateWriter::Begin(const StatePiece& piece) {
  GW_RETURN_IF_ERROR(status_);
  if (missing_bytes_ > 0) {
    return Stick(PiecesInvalid(
        piece.vector, missing_bytes_,
        "begins although the piece before it lacks bytes; write them first"));
  }
  GW_RETURN_IF_ERROR(Stick(CheckPiece(piece)));
  missing_bytes_ = piece.count * DTypeBytes(piece.dtype);
  if (piece.count > 0) table_->pieces.push_back(piece);
  return absl::OkStatus();
}

absl::Status StateWriter::Write(const void* data, int64_t bytes) {
  GW_RETURN_IF_ERROR(status_);
  if (bytes < 0 || bytes > missing_bytes_) {
    return Stick(PiecesInvalid("bytes", bytes,
                               "is not a number from 0 to what the piece still "
                               "lacks; begin a piece of the right count"));
  }
  missing_bytes_ -= bytes;
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const int64_t chunk_left =
        table_->chunk_bytes - bytes_written_ % table_->chunk_bytes;
    const int64_t slice = std::min({bytes, chunk_left, kSliceBytes});
    GW_RETURN_IF_ERROR(Stick(WriteSlice(next, slice)));
    next += slice;
    bytes -= slice;
  }
  return absl::OkStatus();
}

absl::Status StateWriter::WriteSlice(const char* data, int64_t bytes) {
  const std::string_view slice(data, static_cast<size_t>(bytes));
  GW_RETURN_IF_ERROR(data_->WriteAt(bytes_written_, slice));
  chunk_->Add(slice);
  bytes_written_ += bytes;
  if (bytes_written_ % table_->chunk_bytes == 0) EndChunk();
  const int64_t waiting = bytes_written_ - write_back_begin_;
  if (waiting >= kSliceBytes) {
    data_->StartWriteBack(write_back_begin_, waiting);
    write_back_begin_ = bytes_written_;
  }
  return absl::OkStatus();
}

void StateWriter::EndChunk() {
  table_->chunk_digests.push_back(chunk_->Take());
}

absl::Status StateWriter::Finish() {
  GW_RETURN_IF_ERROR(status_);
  if (missing_bytes_ > 0) {
    return Stick(PiecesInvalid("bytes", missing_bytes_,
                               "of the last piece are missing; write them"));
  }
  if (bytes_written_ % table_->chunk_bytes != 0) EndChunk();
  table_->data_bytes = bytes_written_;
  const std::string text = TableText(*table_);
  if (std::ssize(text) > kMaxTableBytes) {
    return Stick(PiecesInvalid("pieces", std::ssize(table_->pieces),
                               "are too many for a table of 32 MiB; write "
                               "fewer, longer ones"));
  }
  // The table says that the data is there: so that is true at any time.
  GW_RETURN_IF_ERROR(Stick(data_->Sync()));
  auto file = files_.Create(directory_ + "/" + TableName(table_->rank));
  if (!file.ok()) return Stick(file.status());
  GW_RETURN_IF_ERROR(Stick((*file)->WriteAt(0, text)));
  return Stick((*file)->Sync());
}

}  // namespace gradwire
