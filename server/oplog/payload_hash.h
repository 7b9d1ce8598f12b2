// SPDX-License-Identifier: Apache-2.0
// XXH3-128 of a payload that comes in parts.
#pragma once

#include <string>
#include <string_view>

#include "server/oplog/format.h"

struct XXH3_state_s;

namespace gradwire {

class PayloadHash {
 public:
  PayloadHash();
  ~PayloadHash();
  PayloadHash(const PayloadHash&) = delete;
  PayloadHash& operator=(const PayloadHash&) = delete;

  void Update(std::string_view bytes);
  // kRecordDigestBytes in the canonical order, of all bytes up to now.
  std::string Digest() const;

 private:
  XXH3_state_s* const state_;
};

}  // namespace gradwire
