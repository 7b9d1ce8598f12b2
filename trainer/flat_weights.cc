// SPDX-License-Identifier: Apache-2.0
#include "trainer/flat_weights.h"

#include <algorithm>

#include "base/status.h"

namespace gradwire {
namespace {

constexpr int64_t kPieceElements = 1 << 20;

Tensor RowsOrNull(const Tensor& t, int64_t begin, int64_t end) {
  return t.is_null() ? t : t.Rows(begin, end);
}

}  // namespace

absl::StatusOr<FlatWeights> FlatWeights::Create(const Tensor& weight,
                                                const Tensor& low,
                                                Device& device,
                                                Kernels& kernels,
                                                Stream& stream) {
  FlatWeights weights(weight, low, device, kernels, stream);
  if (weight.dtype() == DType::kBF16) {
    const int64_t n = std::min(kPieceElements, weight.num_elements());
    GW_ASSIGN_OR_RETURN(weights.buffer_,
                        device.Allocate(n * DTypeBytes(DType::kF32)));
    weights.piece_ = Tensor(weights.buffer_->data(), DType::kF32, {n});
  }
  return weights;
}

absl::Status FlatWeights::Write(int64_t begin, int64_t count,
                                const float* from) {
  for (const int64_t end = begin + count; begin < end;) {
    const int64_t next = std::min(end, begin + kPieceElements);
    const Tensor to = weight_.Rows(begin, next);
    if (piece_.is_null()) {
      device_.CopyFromHost(stream_, from, to);
    } else {
      const Tensor piece = piece_.Rows(0, next - begin);
      device_.CopyFromHost(stream_, from, piece);
      kernels_.SplitMaster(stream_, piece, to, RowsOrNull(low_, begin, next));
    }
    from += next - begin;
    begin = next;
  }
  return stream_.Finish();
}

absl::Status FlatWeights::Read(int64_t begin, int64_t count, float* to) {
  for (const int64_t end = begin + count; begin < end;) {
    const int64_t next = std::min(end, begin + kPieceElements);
    const Tensor from = weight_.Rows(begin, next);
    if (piece_.is_null()) {
      device_.CopyToHost(stream_, from, to);
    } else {
      const Tensor piece = piece_.Rows(0, next - begin);
      if (low_.is_null()) {
        kernels_.Cast(stream_, from, piece);
      } else {
        kernels_.JoinMaster(stream_, from, low_.Rows(begin, next), piece);
      }
      device_.CopyToHost(stream_, piece, to);
    }
    to += next - begin;
    begin = next;
  }
  return stream_.Finish();
}

}  // namespace gradwire
