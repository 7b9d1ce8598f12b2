// SPDX-License-Identifier: Apache-2.0
#include "trainer/state_save.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kernels/optimizer_state.h"

namespace gradwire {
namespace {

// Between two looks at whether to give up; of a split master, what is joined at
// a time, in the second cache.
constexpr int64_t kPartElements = 1 << 16;

// What is handed to the operating system at a time of what lies there as it is
// written.
constexpr int64_t kPartBytes = int64_t{4} << 20;

}  // namespace

StateSave::StateSave(FileSystem& files, std::string directory, Part part,
                     std::function<void(const absl::Status&)> written)
    : files_(files),
      directory_(std::move(directory)),
      part_(std::move(part)),
      reader_(part_.device),
      thread_([this, written = std::move(written)] {
        const absl::Status status = Write();
        // Nobody waits for what will not be written.
        reader_.SetRead(part_.layout.num_units());
        written(status);
      }) {}

StateSave::~StateSave() {
  reader_.GiveUp();
  thread_.join();
}

absl::Status StateSave::Write() {
  GW_ASSIGN_OR_RETURN(std::unique_ptr<StateWriter> writer,
                      StateWriter::Create(files_, directory_, part_.rank));
  for (int unit = 0; unit < part_.layout.num_units(); ++unit) {
    GW_RETURN_IF_ERROR(WriteUnit(unit, *writer));
    reader_.SetRead(unit + 1);
  }
  return writer->Finish();
}

absl::Status StateSave::WriteUnit(int unit, StateWriter& writer) {
  const ShardPiece piece = part_.layout.Owned(unit, part_.rank);
  GW_RETURN_IF_ERROR(
      writer.Begin({"weight", DType::kF32, piece.begin, piece.size()}));
  GW_RETURN_IF_ERROR(WriteMaster(piece, writer));
  if (!part_.moments) return absl::OkStatus();
  for (const auto& [name, values] :
       {std::pair("m", part_.state.m), {"v", part_.state.v}}) {
    const DType dtype = values.dtype();
    GW_RETURN_IF_ERROR(writer.Begin({name, dtype, piece.begin, piece.size()}));
    GW_RETURN_IF_ERROR(WriteValues(values, piece, writer));
  }
  return absl::OkStatus();
}

absl::Status StateSave::WriteValues(const Tensor& values,
                                    const ShardPiece& piece,
                                    StateWriter& writer) {
  const int64_t element = DTypeBytes(values.dtype());
  std::vector<char> copy;
  for (int64_t done = 0; done < piece.size();) {
    GW_RETURN_IF_ERROR(reader_.CheckGoesOn());
    const int64_t n = std::min(piece.size() - done, kPartBytes / element);
    GW_ASSIGN_OR_RETURN(
        const void* data,
        reader_.InHostMemory(values, piece.offset + done, n, copy));
    GW_RETURN_IF_ERROR(writer.Write(data, n * element));
    done += n;
  }
  return absl::OkStatus();
}

absl::Status StateSave::WriteMaster(const ShardPiece& piece,
                                    StateWriter& writer) {
  const FlatState& state = part_.state;
  if (state.low.is_null()) return WriteValues(state.weight, piece, writer);
  std::vector<float> joined(kPartElements);
  std::vector<char> high_copy, low_copy;
  for (int64_t done = 0; done < piece.size();) {
    GW_RETURN_IF_ERROR(reader_.CheckGoesOn());
    const int64_t n = std::min(piece.size() - done, kPartElements);
    const int64_t begin = piece.offset + done;
    GW_ASSIGN_OR_RETURN(
        const void* highs,
        reader_.InHostMemory(state.weight, begin, n, high_copy));
    GW_ASSIGN_OR_RETURN(const void* lows,
                        reader_.InHostMemory(state.low, begin, n, low_copy));
    const auto* high = static_cast<const BFloat16*>(highs);
    const auto* low = static_cast<const int16_t*>(lows);
    for (int64_t i = 0; i < n; ++i) {
      joined[static_cast<size_t>(i)] = JoinHalves({high[i], low[i]});
    }
    GW_RETURN_IF_ERROR(
        writer.Write(joined.data(), n * DTypeBytes(DType::kF32)));
    done += n;
  }
  return absl::OkStatus();
}

}  // namespace gradwire
