// SPDX-License-Identifier: Apache-2.0
#include "tests/cuda_emulator/products.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "tests/cuda_emulator/shared_memory.h"

namespace gradwire::cuda_emulator {
namespace {

constexpr int kWarpsOfGroup = 4;
constexpr int kTerms = 16;
constexpr int kRowsOfWarp = 16;
constexpr int kPiece = 8;   // elements of 16 bytes
constexpr int kPanel = 64;  // elements of 128 bytes
constexpr int kMaxRows = 256;

// PTX ISA, "Matrix Descriptor", in bytes.
struct Descriptor {
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1)
      Refuse("a descriptor of another swizzle than 128 bytes");
    if ((bits & 0x3fffc000c000c000) != 0)
      Refuse("a descriptor with stray bits");
    // The places of 16 bytes are exchanged by address.
    if (start % 1024 >= 128) {
      Refuse("an operand that does not begin at a multiple of 1024 bytes");
    }
  }

  std::size_t start, leading, stride;
};

// The 8 elements at an address, before their place is exchanged.
void ReadPiece(const Moment& now, std::size_t address, double* to) {
  const std::size_t at = address ^ (address >> 7 & 7) << 4;
  if (address % 16 != 0 || at + 16 > Shared().bytes()) {
    Refuse("a product reads byte " + std::to_string(at) +
           " of shared memory of " + std::to_string(Shared().bytes()));
  }
  SharedState& shared = Shared();
  shared.ReadByProducts(now, at, 16);
  uint16_t bits[kPiece];
  std::memcpy(bits, shared.At(at), sizeof(bits));
  for (int i = 0; i < kPiece; ++i) {
    to[i] = static_cast<double>(
        std::bit_cast<float>(static_cast<uint32_t>(bits[i]) << 16));
  }
}

std::atomic<bool> misread_columns = false;

// Rows of terms. Those of zeros are most in tests of short sequences.
struct Terms {
  double value[kMaxRows][kTerms];
  bool zero[kMaxRows], finite[kMaxRows];

  double* operator[](int row) { return value[row]; }
  void Look(int rows) {
    for (int r = 0; r < rows; ++r) {
      const double* const of = value[r];
      zero[r] = std::all_of(of, of + kTerms, [](double x) { return x == 0; });
      finite[r] = std::all_of(of, of + kTerms,
                              [](double x) { return std::isfinite(x); });
    }
  }
};

// The sum of a row's products with another.
double SumOfProducts(const Terms& a, int row, const Terms& b, int column) {
  if ((a.zero[row] && b.finite[column]) || (b.zero[column] && a.finite[row])) {
    return 0;
  }
  double sum = 0;
  for (int k = 0; k < kTerms; ++k) {
    sum += a.value[row][k] * b.value[column][k];
  }
  return sum;
}

// [rows][16]: terms along rows.
void ReadRows(uint64_t bits, int rows, Terms& to) {
  const Descriptor of(bits);
  const Moment now = Now();
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k < kTerms; k += kPiece) {
      ReadPiece(now,
                of.start + static_cast<std::size_t>(r / 8) * of.stride +
                    static_cast<std::size_t>(r % 8 * 128 + k * 2),
                to[r] + k);
    }
  }
}

// The same of a matrix [16, columns] whose terms lie along columns.
void ReadColumns(uint64_t bits, int columns, Terms& to) {
  Descriptor of(bits);
  if (misread_columns) std::swap(of.leading, of.stride);
  const Moment now = Now();
  for (int k = 0; k < kTerms; ++k) {
    for (int n = 0; n < columns; n += kPiece) {
      double piece[kPiece];
      ReadPiece(now,
                of.start + static_cast<std::size_t>(n / kPanel) * of.leading +
                    static_cast<std::size_t>(k / 8) * of.stride +
                    static_cast<std::size_t>(k % 8 * 128 + n % kPanel * 2),
                piece);
      for (int i = 0; i < kPiece; ++i) to[n + i][k] = piece[i];
    }
  }
}

double Half(uint32_t pair, int i) {
  return static_cast<double>(
      std::bit_cast<float>(i == 0 ? pair << 16 : pair & 0xffff0000u));
}

// A warp's 16 rows from its lanes' registers.
void TakeRegisters(const uint32_t (&a)[kWarp][4], Terms& to) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < 2; ++i) {
        to[lane / 4 + r % 2 * 8][lane % 4 * 2 + r / 2 * 8 + i] =
            Half(a[lane][r], i);
      }
    }
  }
}

}  // namespace

void MisreadColumns(bool misread) { misread_columns = misread; }

Products::WarpState& Products::Own() {
  if (num_threads_ % (kWarpsOfGroup * kWarp) != 0) {
    Refuse("a product in a block that is not of whole warpgroups");
  }
  return warps_[static_cast<std::size_t>(ThreadNumber() / kWarp)];
}

bool Products::IsFirst(WarpState& warp) {
  const bool first = warp.lanes == 0;
  warp.lanes = (warp.lanes + 1) % kWarp;
  return first;
}

// FNV-1a, by words.
void Products::Note(WarpState& warp, std::initializer_list<uint64_t> what) {
  for (const uint64_t word : what) {
    warp.history = (warp.history ^ word) * 0x100000001b3;
  }
}

void Products::Begin(const std::source_location& where) {
  Own().begun = true;
  const char nothing = 0;
  ExchangeInWarp(&nothing, 1, where);
}

void Products::Issue(const Operands& operands, float* d, const uint32_t* a,
                     const std::source_location& where) {
  WarpState& warp = Own();
  if (!warp.begun) {
    Refuse("a product of a group without BeginProducts", &where);
  }
  if (IsFirst(warp)) {
    warp.open.push_back({operands, {}, {}});
    Note(warp, {operands.a, operands.b, uint64_t(operands.tiles),
                uint64_t(operands.add), uint64_t(operands.a_in_registers)});
  }
  Product& product = warp.open.back();
  if (!(product.operands == operands)) {
    Refuse("lanes of a warp name different operands", &where);
  }
  const int lane = ThreadNumber() % kWarp;
  product.d[lane] = d;
  if (a != nullptr) std::copy_n(a, 4, product.a[lane]);
  Held& held = warp.held[lane][d];
  const int n = operands.tiles * 4;
  if (held.products++ == 0) {
    held.values.assign(d, d + n);
    std::fill_n(d, n, std::numeric_limits<float>::quiet_NaN());
  }
  const char nothing = 0;
  ExchangeInWarp(&nothing, 1, where);
}

void Products::Commit(const std::source_location& where) {
  WarpState& warp = Own();
  if (IsFirst(warp)) {
    warp.groups.push_back(std::exchange(warp.open, {}));
    warp.begun = false;
    Note(warp, {1});
  }
  const char nothing = 0;
  ExchangeInWarp(&nothing, 1, where);
}

void Products::Wait(int but, const std::source_location& where) {
  WarpState& warp = Own();
  const char nothing = 0;
  ExchangeInWarp(&nothing, 1, where);
  if (ThreadNumber() % kWarp == 0) {
    Note(warp, {2, static_cast<uint64_t>(but)});
    const int of_group = ThreadNumber() / kWarp % kWarpsOfGroup;
    while (static_cast<int>(warp.groups.size()) > but) {
      for (const Product& product : warp.groups.front()) {
        Make(product, of_group, warp);
      }
      warp.groups.pop_front();
    }
  }
  ExchangeInWarp(&nothing, 1, where);
}

void Products::Make(const Product& product, int warp_of_group,
                    WarpState& warp) {
  const Operands& operands = product.operands;
  // Too large for a fiber's stack.
  thread_local Terms a, b;
  int first_row = 0;
  if (operands.a_in_registers) {
    TakeRegisters(product.a, a);
  } else {
    // The hardware takes all of them for each of the four warps, for all we
    // know.
    ReadRows(operands.a, kRowsOfWarp * kWarpsOfGroup, a);
    first_row = warp_of_group * kRowsOfWarp;
  }
  if (operands.b_by_columns) {
    ReadColumns(operands.b, operands.tiles * 8, b);
  } else {
    ReadRows(operands.b, operands.tiles * 8, b);
  }
  a.Look(first_row + kRowsOfWarp);
  b.Look(operands.tiles * 8);
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto entry = warp.held[lane].find(product.d[lane]);
    Held& held = entry->second;
    for (int n = 0; n < operands.tiles; ++n) {
      for (int i = 0; i < 4; ++i) {
        const double sum = SumOfProducts(a, first_row + lane / 4 + i / 2 * 8, b,
                                         n * 8 + lane % 4 * 2 + i % 2);
        float& d = held.values[static_cast<std::size_t>(n * 4 + i)];
        d = static_cast<float>((operands.add ? static_cast<double>(d) : 0.0) +
                               sum);
      }
    }
    if (--held.products > 0) continue;
    const float* const d = product.d[lane];
    if (!std::all_of(d, d + held.values.size(),
                     [](float value) { return std::isnan(value); })) {
      Refuse("a sum was written while a product with it was on its way");
    }
    std::copy(held.values.begin(), held.values.end(), product.d[lane]);
    warp.held[lane].erase(entry);
  }
}

void Products::CheckEnd() const {
  for (std::size_t i = 0; i < warps_.size(); ++i) {
    const WarpState& warp = warps_[i];
    if (!warp.open.empty() || !warp.groups.empty()) {
      Refuse("warp " + std::to_string(i) +
             " ends before its products are waited for");
    }
    const std::size_t first = i / kWarpsOfGroup * kWarpsOfGroup;
    // The hardware's instruction is one of all four warps.
    if (warp.history != warps_[first].history) {
      Refuse("warp " + std::to_string(i) +
             " has made other products than warp " + std::to_string(first) +
             " of its warpgroup");
    }
  }
}

}  // namespace gradwire::cuda_emulator
