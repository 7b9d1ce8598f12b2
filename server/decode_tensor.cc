// SPDX-License-Identifier: Apache-2.0
#include "server/decode_tensor.h"

#include "base/status.h"

namespace gradwire {
namespace {

constexpr int64_t kMaxTargetsPerPosition = 64;

int64_t ElementBytes(v1::DataType dtype) {
  switch (dtype) {
    case v1::DATA_TYPE_FLOAT32:
    case v1::DATA_TYPE_INT32:
      return 4;
    case v1::DATA_TYPE_INT64:
      return 8;
    default:
      return 0;
  }
}

}  // namespace

std::string TypeName(v1::DataType dtype) {
  return v1::DataType_IsValid(dtype) ? v1::DataType_Name(dtype)
                                     : std::to_string(dtype);
}

absl::StatusOr<TargetShape> ShapeOf(const v1::TensorData& tensor, int64_t n,
                                    const DatumField& where) {
  if (tensor.shape_size() < 1 || tensor.shape_size() > 2) {
    return where.Error("SHAPE_MISMATCH")
        .With("value", tensor.shape_size())
        .With("limit", 2)
        .Message(where.Name() + " must have the shape [N] or [N, K].");
  }
  if (tensor.shape(0) != n) {
    return where.Error("SHAPE_MISMATCH")
        .With("value", tensor.shape(0))
        .With("limit", n)
        .Message(where.Name() + " has " + std::to_string(tensor.shape(0)) +
                 " entries and its model_input " + std::to_string(n) +
                 " tokens. Both must be as long: the server shifts nothing.");
  }
  const int64_t k = tensor.shape_size() == 2 ? tensor.shape(1) : 1;
  if (k < 1 || k > kMaxTargetsPerPosition) {
    return where.Error("SHAPE_MISMATCH")
        .With("value", k)
        .With("limit", kMaxTargetsPerPosition)
        .Message(where.Name() + " must have 1 to " +
                 std::to_string(kMaxTargetsPerPosition) +
                 " targets a position.");
  }
  return TargetShape{n, k};
}

bool IsSparse(const v1::TensorData& tensor) {
  return !tensor.csr_columns().empty() || !tensor.csr_row_offsets().empty();
}

absl::Status CheckDense(const v1::TensorData& tensor, const TargetShape& shape,
                        const DatumField& where) {
  const int64_t bytes = shape.n * shape.k * ElementBytes(tensor.dtype());
  if (static_cast<int64_t>(tensor.data().size()) == bytes) {
    return absl::OkStatus();
  }
  return where.Error("SHAPE_MISMATCH")
      .With("value", static_cast<int64_t>(tensor.data().size()))
      .With("limit", bytes)
      .Message(where.Name() + " has " + std::to_string(tensor.data().size()) +
               " bytes and its shape asks for " + std::to_string(bytes) + ".");
}

absl::Status ReadSparse(const v1::TensorData& tensor, const TargetShape& shape,
                        const DatumField& where,
                        absl::FunctionRef<void(int64_t, int64_t)> put) {
  const auto invalid = [&](const std::string& what, int64_t value,
                           int64_t limit) {
    return where.Error("CSR_INVALID")
        .With("value", value)
        .With("limit", limit)
        .Message(where.Name() + ": " + what + ".");
  };
  if (tensor.shape_size() != 2) {
    return invalid("the sparse form needs the shape [N, K]",
                   tensor.shape_size(), 2);
  }
  const auto offset_bytes =
      static_cast<int64_t>(tensor.csr_row_offsets().size());
  if (offset_bytes != (shape.n + 1) * 8) {
    return invalid("csr_row_offsets must hold N + 1 int64", offset_bytes,
                   (shape.n + 1) * 8);
  }
  const int64_t element = ElementBytes(tensor.dtype());
  const auto data_bytes = static_cast<int64_t>(tensor.data().size());
  const int64_t stored = data_bytes / element;
  if (data_bytes % element != 0 ||
      static_cast<int64_t>(tensor.csr_columns().size()) != stored * 4) {
    return invalid("csr_columns must hold one int32 for each value",
                   static_cast<int64_t>(tensor.csr_columns().size()),
                   stored * 4);
  }
  if (ReadAt<int64_t>(tensor.csr_row_offsets(), 0) != 0) {
    return invalid("the first row offset must be 0",
                   ReadAt<int64_t>(tensor.csr_row_offsets(), 0), 0);
  }
  const auto invalid_row = [&](int64_t row, const std::string& what,
                               int64_t value, int64_t limit) {
    return WithErrorMetadata(invalid(what, value, limit), "position",
                             std::to_string(row));
  };
  int64_t at = 0;
  for (int64_t row = 0; row < shape.n; ++row) {
    const int64_t end = ReadAt<int64_t>(tensor.csr_row_offsets(), row + 1);
    if (end < at || end > stored) {
      return invalid_row(row,
                         "row offsets must ascend up to the number of values",
                         end, stored);
    }
    int64_t last = -1;
    for (; at < end; ++at) {
      const int64_t column = ReadAt<int32_t>(tensor.csr_columns(), at);
      if (column <= last || column >= shape.k) {
        return invalid_row(row, "columns must ascend within a row, below K",
                           column, shape.k);
      }
      last = column;
      put(row * shape.k + column, at);
    }
  }
  if (at != stored) {
    return invalid("the last row offset must be the number of values", at,
                   stored);
  }
  return absl::OkStatus();
}

}  // namespace gradwire
