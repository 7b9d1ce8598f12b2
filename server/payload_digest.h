// SPDX-License-Identifier: Apache-2.0
// Counts and hashes the payload of a streamed batch, as CommitRecord defines
// it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "gradwire/v1/data.pb.h"

namespace gradwire {

class PayloadDigest {
 public:
  PayloadDigest();
  ~PayloadDigest();

  void Add(const v1::Datum& datum);
  void Add(const v1::GradientItem& item);
  void Add(const v1::LogprobItem& item);

  // XXH3-128 of `bytes`, 16 bytes.
  static std::string OfBytes(const std::string& bytes);

  void Fill(v1::CommitRecord* commit) const;
  // Errors: INVALID_ARGUMENT COMMIT_MISMATCH naming datum_count, byte_count or
  // xxh3_128.
  absl::Status Check(const v1::CommitRecord& commit) const;

 private:
  void Update(const std::string& bytes);

  struct State;
  std::unique_ptr<State> state_;
  int64_t items_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace gradwire
