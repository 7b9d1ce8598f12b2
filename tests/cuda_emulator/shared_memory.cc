// SPDX-License-Identifier: Apache-2.0
#include "tests/cuda_emulator/shared_memory.h"

#include <cstring>
#include <string>
#include <utility>

namespace gradwire::cuda_emulator {

SharedState::SharedState(std::size_t bytes, bool for_products)
    : memory_(bytes, std::byte{0xff}),
      cells_((bytes + 1) / 2),
      for_products_(for_products) {}

template <typename Visit>
void SharedState::ForCells(std::size_t offset, std::size_t bytes,
                           const Visit& visit) {
  for (std::size_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    visit(cells_[i], i * 2);
  }
}

void SharedState::RefuseAt(std::size_t offset, const char* what,
                           int other) const {
  std::string line = std::string(what) + " at byte " + std::to_string(offset) +
                     " of shared memory";
  if (other == Cell::kMany || other == Cell::kWarpOf) {
    line += ", by several threads";
  } else if (other >= 0) {
    line += ", by thread " + std::to_string(other);
  }
  Refuse("thread " + std::to_string(ThreadNumber()) + ": " + line);
}

void SharedState::MarkRead(const Moment& now, Cell& cell) {
  const int thread = now.thread;
  const auto warp = static_cast<int16_t>(thread / kWarp);
  // Of an earlier time: every thread has passed a barrier since.
  if (cell.reader == Cell::kNone || cell.read_block != now.block_epoch) {
    cell.reader = static_cast<int16_t>(thread);
  } else if (cell.reader == Cell::kMany || cell.reading_warp != warp) {
    cell.reader = Cell::kMany;
  } else if (cell.reader != thread && cell.read_warp == now.warp_epoch) {
    cell.reader = Cell::kWarpOf;
  } else if (cell.read_warp < now.warp_epoch) {
    cell.reader = static_cast<int16_t>(thread);
  }
  cell.reading_warp = warp;
  cell.read_block = now.block_epoch;
  cell.read_warp = now.warp_epoch;
}

void SharedState::CheckRead(const Moment& now, const Cell& cell,
                            std::size_t at) const {
  const int thread = now.thread;
  if (cell.pending) RefuseAt(at, "read before the copy was waited for", -1);
  if (cell.writer == Cell::kNone) {
    RefuseAt(at, "read of what was never written", -1);
  }
  if (cell.writer != thread && cell.write_block == now.block_epoch &&
      !(cell.writer / kWarp == thread / kWarp &&
        cell.write_warp < now.warp_epoch)) {
    RefuseAt(at, "race: read of what no barrier parts from its write",
             cell.writer);
  }
}

void SharedState::Read(std::size_t offset, std::size_t bytes) {
  const Moment now = Now();
  ForCells(offset, bytes, [&](Cell& cell, std::size_t at) {
    CheckRead(now, cell, at);
    MarkRead(now, cell);
  });
}

void SharedState::ReadByProducts(const Moment& now, std::size_t offset,
                                 std::size_t bytes) {
  ForCells(offset, bytes, [&](Cell& cell, std::size_t at) {
    CheckRead(now, cell, at);
    if (!cell.shown) {
      RefuseAt(at, "a product's read of what was not shown to it", cell.writer);
    }
    // What the thread itself has written, too: other warps multiply with it.
    if (cell.show_block == now.block_epoch) {
      RefuseAt(at, "race: a product's read that no barrier parts from showing",
               cell.writer);
    }
    MarkRead(now, cell);
  });
}

void SharedState::ShowToProducts() {
  const Moment now = Now();
  const auto thread = static_cast<std::size_t>(now.thread);
  if (unshown_.size() <= thread) return;
  for (const auto& [offset, bytes] : unshown_[thread]) {
    ForCells(offset, bytes, [&](Cell& cell, std::size_t) {
      if (cell.writer != static_cast<int16_t>(thread)) return;
      cell.shown = true;
      cell.show_block = now.block_epoch;
    });
  }
  unshown_[thread].clear();
}

void SharedState::NoteWrite(std::size_t offset, std::size_t bytes) {
  const Moment now = Now();
  ForCells(offset, bytes, [&](Cell& cell, std::size_t) {
    cell.pending = false;
    cell.shown = false;
    cell.writer = static_cast<int16_t>(now.thread);
    cell.write_block = now.block_epoch;
    cell.write_warp = now.warp_epoch;
  });
  if (!for_products_) return;
  const auto thread = static_cast<std::size_t>(now.thread);
  if (unshown_.size() <= thread) unshown_.resize(thread + 1);
  unshown_[thread].emplace_back(offset, bytes);
}

void SharedState::CheckWrite(const Moment& now, const Cell& cell,
                             std::size_t at) const {
  const int thread = now.thread;
  if (cell.pending) RefuseAt(at, "write over a copy that is on its way", -1);
  if (cell.writer != Cell::kNone && cell.writer != thread &&
      cell.write_block == now.block_epoch &&
      !(cell.writer / kWarp == thread / kWarp &&
        cell.write_warp < now.warp_epoch)) {
    RefuseAt(at, "race: write over what no barrier parts from its write",
             cell.writer);
  }
  if (cell.reader != Cell::kNone && cell.reader != thread &&
      cell.read_block == now.block_epoch &&
      (cell.reader == Cell::kMany || cell.reading_warp != thread / kWarp ||
       cell.read_warp >= now.warp_epoch)) {
    RefuseAt(at, "race: write over what no barrier parts from its read",
             cell.reader);
  }
}

void SharedState::Write(std::size_t offset, std::size_t bytes) {
  const Moment now = Now();
  ForCells(offset, bytes,
           [&](Cell& cell, std::size_t at) { CheckWrite(now, cell, at); });
  NoteWrite(offset, bytes);
}

void SharedState::CopyLater(std::size_t offset, const void* from,
                            std::size_t bytes) {
  const Moment now = Now();
  ForCells(offset, bytes, [&](Cell& cell, std::size_t at) {
    CheckWrite(now, cell, at);
    cell.pending = true;
  });
  const auto thread = static_cast<std::size_t>(ThreadNumber());
  if (copies_.size() <= thread) copies_.resize(thread + 1);
  copies_[thread].open.push_back({offset, from, bytes});
}

void SharedState::CommitCopies() {
  const auto thread = static_cast<std::size_t>(ThreadNumber());
  if (copies_.size() <= thread) copies_.resize(thread + 1);
  copies_[thread].groups.push_back(std::move(copies_[thread].open));
  copies_[thread].open.clear();
}

void SharedState::FinishCopies(int but) {
  const auto thread = static_cast<std::size_t>(ThreadNumber());
  if (copies_.size() <= thread) return;
  auto& groups = copies_[thread].groups;
  while (static_cast<int>(groups.size()) > but) {
    for (const Copy& copy : groups.front()) {
      if (copy.from != nullptr) {
        std::memcpy(At(copy.offset), copy.from, copy.bytes);
      } else {
        std::memset(At(copy.offset), 0, copy.bytes);
      }
      NoteWrite(copy.offset, copy.bytes);
    }
    groups.pop_front();
  }
}

}  // namespace gradwire::cuda_emulator
