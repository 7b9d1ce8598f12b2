// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <openssl/evp.h>

#include <memory>
#include <string>
#include <string_view>

namespace gradwire {

// SHA-256 of bytes that come in parts, by OpenSSL. Thread rule: one thread at a
// time.
class Sha256 {
 public:
  Sha256();
  void Add(std::string_view bytes);
  // In hexadecimal. Once, at the end.
  std::string Finish();

  static std::string Of(std::string_view bytes);

 private:
  struct Free {
    void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
  };
  const std::unique_ptr<EVP_MD_CTX, Free> context_;
};

}  // namespace gradwire
