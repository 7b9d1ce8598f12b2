// SPDX-License-Identifier: Apache-2.0
// Where the ranks of one program leave their addresses for each other, be they
// threads or forked processes. For tests and benchmarks.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "sharding/gloo/gloo_options.h"

namespace gradwire {

class AddressBoard {
 public:
  // Make it before the ranks. REQUIRES: world <= 16.
  explicit AddressBoard(int world);
  ~AddressBoard();
  AddressBoard(const AddressBoard&) = delete;
  AddressBoard& operator=(const AddressBoard&) = delete;

  // For one rank; waits for all others. Must not outlive the board.
  ExchangeAddresses ForRank(int rank);

 private:
  struct Shared;

  const int world_;
  Shared* const shared_;
};

}  // namespace gradwire
