// SPDX-License-Identifier: Apache-2.0
// Products of warpgroups (device/cuda/warpgroup.h) that are on their way. They
// are made when they are waited for, from what shared memory holds then, and
// until then their sums are NaN.
#pragma once

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <map>
#include <source_location>
#include <vector>

#include "tests/cuda_emulator/block.h"

namespace gradwire::cuda_emulator {

// Of one block.
class Products {
 public:
  explicit Products(int num_threads)
      : num_threads_(num_threads), warps_((num_threads + kWarp - 1) / kWarp) {}

  // One product of the hardware: 16 terms of [64, 8 tiles].
  struct Operands {
    int tiles = 0;
    bool add = false;
    uint64_t a = 0;  // descriptor; not looked at if a is in registers
    bool a_in_registers = false;
    uint64_t b = 0;
    bool b_by_columns = false;

    friend bool operator==(const Operands&, const Operands&) = default;
  };

  // By the current thread; all lanes of a warp come to the same place.
  void Begin(const std::source_location& where);
  // d [tiles][4]; a [4], or null.
  void Issue(const Operands& operands, float* d, const uint32_t* a,
             const std::source_location& where);
  void Commit(const std::source_location& where);
  void Wait(int but, const std::source_location& where);

  // When all threads of the block have ended.
  void CheckEnd() const;

 private:
  struct Product {
    Operands operands;
    float* d[kWarp];
    uint32_t a[kWarp][4];
  };
  // Of what products write: its values, and how many of them are to come.
  struct Held {
    std::vector<float> values;
    int products = 0;
  };
  struct WarpState {
    bool begun = false;
    uint64_t history = 0;  // a hash of all that it did
    int lanes = 0;         // that have issued the newest product, or committed
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
    std::map<float*, Held> held[kWarp];
  };

  WarpState& Own();
  // Whether the current lane is the first of its warp to come here; every lane
  // comes, and waits for the others after that.
  static bool IsFirst(WarpState& warp);
  static void Note(WarpState& warp, std::initializer_list<uint64_t> what);
  static void Make(const Product& product, int warp_of_group, WarpState& warp);

  int num_threads_;
  std::vector<WarpState> warps_;
};

// From here on products take panels and strips of what is read by columns for
// each other: what hardware would do that reads descriptors in another way.
void MisreadColumns(bool misread);

}  // namespace gradwire::cuda_emulator
