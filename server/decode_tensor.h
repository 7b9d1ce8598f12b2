// SPDX-License-Identifier: Apache-2.0
// The tensors of a datum: shapes, dense bytes, sparse rows. Sizes are checked
// against the shape, and the shape against the datum, before anything of that
// size is allocated.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/error.h"
#include "gradwire/v1/data.pb.h"

namespace gradwire {

// Makes errors about one datum.
struct DatumField {
  int64_t datum_index = 0;
  std::string field;
  ErrorBuilder Error(const std::string& reason) const {
    ErrorBuilder error(absl::StatusCode::kInvalidArgument, reason);
    error.With("datum_index", datum_index).With("field", field);
    return error;
  }
  std::string Name() const {
    return field + " of datum " + std::to_string(datum_index);
  }
};

// For errors; what this version does not know has a number only.
std::string TypeName(v1::DataType dtype);

// Element i of packed little-endian values. REQUIRES: it is there.
template <typename T>
T ReadAt(const std::string& bytes, int64_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

// Element i as a 64-bit integer. REQUIRES: an integer dtype.
inline int64_t IntegerAt(const v1::TensorData& tensor, int64_t i) {
  return tensor.dtype() == v1::DATA_TYPE_INT32
             ? ReadAt<int32_t>(tensor.data(), i)
             : ReadAt<int64_t>(tensor.data(), i);
}

struct TargetShape {
  int64_t n = 0;
  int64_t k = 1;
};

// The shape [n] or [n, k] of a tensor for n positions. Does not look at data.
// Errors: INVALID_ARGUMENT SHAPE_MISMATCH.
absl::StatusOr<TargetShape> ShapeOf(const v1::TensorData& tensor, int64_t n,
                                    const DatumField& where);

bool IsSparse(const v1::TensorData& tensor);

// That the dense bytes are as many as the shape says. Errors: INVALID_ARGUMENT
// SHAPE_MISMATCH.
absl::Status CheckDense(const v1::TensorData& tensor, const TargetShape& shape,
                        const DatumField& where);

// Calls put(element of [n, k], stored index) for every stored value of a row,
// after the row's structure has been checked. Errors: INVALID_ARGUMENT
// CSR_INVALID.
absl::Status ReadSparse(const v1::TensorData& tensor, const TargetShape& shape,
                        const DatumField& where,
                        absl::FunctionRef<void(int64_t, int64_t)> put);

}  // namespace gradwire
