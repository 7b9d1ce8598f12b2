// SPDX-License-Identifier: Apache-2.0
#include "server/oplog/payload_hash.h"

#include <xxhash.h>

#include "base/check.h"

namespace gradwire {

PayloadHash::PayloadHash() : state_(XXH3_createState()) {
  GW_CHECK(state_ != nullptr);
  XXH3_128bits_reset(state_);
}

PayloadHash::~PayloadHash() { XXH3_freeState(state_); }

void PayloadHash::Update(std::string_view bytes) {
  XXH3_128bits_update(state_, bytes.data(), bytes.size());
}

std::string PayloadHash::Digest() const {
  XXH128_canonical_t canonical;
  static_assert(sizeof(canonical.digest) == kRecordDigestBytes);
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_));
  return std::string(reinterpret_cast<const char*>(canonical.digest),
                     sizeof(canonical.digest));
}

}  // namespace gradwire
