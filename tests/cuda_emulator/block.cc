// SPDX-License-Identifier: Apache-2.0
#include "tests/cuda_emulator/block.h"

#include <sys/mman.h>

#include <algorithm>
#include <boost/context/fiber.hpp>
#include <boost/context/preallocated.hpp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/cuda_emulator/products.h"
#include "tests/cuda_emulator/shared_memory.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace gradwire::cuda_emulator {
namespace {

using boost::context::fiber;

constexpr std::size_t kStackBytes = std::size_t{256} << 10;
constexpr int kMaxThreads = 1024;

// Of all threads of a block; pages that are not touched take no memory.
class Stacks {
 public:
  Stacks() {
    void* memory =
        mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("cuda_emulator: mmap");
      std::abort();
    }
    memory_ = static_cast<char*>(memory);
  }
  ~Stacks() { munmap(memory_, kStackBytes * kMaxThreads); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* Bottom(int thread) const {
    return memory_ + kStackBytes * static_cast<std::size_t>(thread);
  }

 private:
  char* memory_;
};

// For a fiber whose stack is owned by others.
struct KeepsStack {
  void deallocate(boost::context::stack_context&) noexcept {}
};

// What the sanitizers have to know of a change of stacks.
struct SwitchNotes {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  std::size_t bytes = 0;
#elif defined(__SANITIZE_THREAD__)
  void* context = nullptr;
#endif

  // From this stack to that of `to`; `ends`: never to come back.
  void Leave([[maybe_unused]] const SwitchNotes& to,
             [[maybe_unused]] bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(ends ? nullptr : &fake_stack, to.bottom,
                                   to.bytes);
#elif defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.context, 0);
#endif
  }
  // On this stack again, or for the first time, after `from` was left.
  void Arrive([[maybe_unused]] SwitchNotes* from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &from->bottom, &from->bytes);
#endif
  }
};

struct Thread {
  fiber own;
  SwitchNotes notes;
  uint3 index;
  bool ended = false;
  uint32_t warp_epoch = 0;
  // What it waits for; not waiting: null.
  enum class Waits { kNo, kBlock, kWarp } waits = Waits::kNo;
  std::source_location where;
};

struct Warp {
  std::byte given[kWarp * kSlotBytes];
  std::byte taken[kWarp * kSlotBytes];
  int arrived = 0;
  std::source_location where;
};

std::string PlaceOf(const std::source_location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

bool IsSame(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

class Block {
 public:
  Block(dim3 size, std::size_t shared_bytes, bool warpgroups,
        const std::function<void()>& body)
      : threads_(size.x * size.y * size.z),
        warps_((threads_.size() + kWarp - 1) / kWarp),
        shared_(shared_bytes, warpgroups),
        body_(body) {
    if (warpgroups) products_ = std::make_unique<Products>(num_threads());
    int i = 0;
    for (unsigned z = 0; z < size.z; ++z) {
      for (unsigned y = 0; y < size.y; ++y) {
        for (unsigned x = 0; x < size.x; ++x) threads_[i++].index = {x, y, z};
      }
    }
  }

  // To the end of all threads.
  void Run(const Stacks& stacks, std::mt19937& random);

  int current() const { return current_; }
  SharedState& shared() { return shared_; }
  Products* products() { return products_.get(); }
  uint32_t epoch() const { return epoch_; }
  uint32_t warp_epoch() const { return threads_[current_].warp_epoch; }

  void WaitForBlock(const std::source_location& where);
  const std::byte* Exchange(const void* value, std::size_t bytes,
                            const std::source_location& where);
  void AdvanceWarpEpoch() { ++threads_[current_].warp_epoch; }

 private:
  int num_threads() const { return static_cast<int>(threads_.size()); }
  void Start(int thread, const Stacks& stacks);
  void Resume(int thread);
  // From a thread, until its turn comes again.
  void Yield();
  [[noreturn]] void RefuseToWait() const;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  SharedState shared_;
  std::unique_ptr<Products> products_;  // or null
  const std::function<void()>& body_;
  fiber scheduler_;
  SwitchNotes scheduler_notes_;
  int current_ = 0;
  int num_ended_ = 0;
  int num_at_barrier_ = 0;
  std::source_location barrier_;
  uint32_t epoch_ = 0;
};

thread_local Block* running = nullptr;

void Block::Start(int thread, const Stacks& stacks) {
  Thread& t = threads_[thread];
  char* const bottom = stacks.Bottom(thread);
#if defined(__SANITIZE_ADDRESS__)
  t.notes.bottom = bottom;
  t.notes.bytes = kStackBytes;
#elif defined(__SANITIZE_THREAD__)
  t.notes.context = __tsan_create_fiber(0);
#endif
  boost::context::stack_context context;
  context.sp = bottom + kStackBytes;
  context.size = kStackBytes;
  t.own = fiber(std::allocator_arg,
                boost::context::preallocated(context.sp, kStackBytes, context),
                KeepsStack(), [this, &t](fiber&& scheduler) {
                  scheduler_ = std::move(scheduler);
                  t.notes.Arrive(&scheduler_notes_);
                  body_();
                  t.ended = true;
                  t.notes.Leave(scheduler_notes_, true);
                  return std::move(scheduler_);
                });
}

void Block::Resume(int thread) {
  Thread& t = threads_[thread];
  current_ = thread;
  threadIdx = t.index;
  scheduler_notes_.Leave(t.notes);
  t.own = std::move(t.own).resume();
  scheduler_notes_.Arrive(&t.notes);
#if defined(__SANITIZE_THREAD__)
  if (t.ended) __tsan_destroy_fiber(t.notes.context);
#endif
}

void Block::Yield() {
  Thread& t = threads_[current_];
  t.notes.Leave(scheduler_notes_);
  scheduler_ = std::move(scheduler_).resume();
  t.notes.Arrive(&scheduler_notes_);
}

void Block::Run(const Stacks& stacks, std::mt19937& random) {
  running = this;
#if defined(__SANITIZE_THREAD__)
  scheduler_notes_.context = __tsan_get_current_fiber();
#endif
  std::vector<int> order(threads_.size());
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (int thread : order) Start(thread, stacks);
  while (num_ended_ < num_threads()) {
    bool moved = false;
    for (int thread : order) {
      const Thread& t = threads_[thread];
      if (t.ended || t.waits != Thread::Waits::kNo) continue;
      Resume(thread);
      moved = true;
      if (t.ended) ++num_ended_;
    }
    if (!moved) RefuseToWait();
  }
  if (products_) products_->CheckEnd();
  running = nullptr;
}

void Block::RefuseToWait() const {
  std::string what = "threads wait for others that will not come:";
  // One of each kind.
  std::vector<std::source_location> told;
  for (int i = 0; i < num_threads(); ++i) {
    const Thread& t = threads_[i];
    if (t.ended || std::any_of(told.begin(), told.end(), [&](const auto& at) {
          return IsSame(at, t.where);
        })) {
      continue;
    }
    told.push_back(t.where);
    what += " thread " + std::to_string(i) + " at " + PlaceOf(t.where) + ";";
  }
  Refuse(what + " " + std::to_string(num_ended_) + " have ended");
}

void Block::WaitForBlock(const std::source_location& where) {
  Thread& t = threads_[current_];
  if (num_at_barrier_ == 0) {
    barrier_ = where;
  } else if (!IsSame(barrier_, where)) {
    Refuse("divergent barrier: others wait at " + PlaceOf(barrier_), &where);
  }
  if (++num_at_barrier_ < num_threads()) {
    t.waits = Thread::Waits::kBlock;
    t.where = where;
    Yield();
    return;
  }
  num_at_barrier_ = 0;
  ++epoch_;
  for (Thread& other : threads_) other.waits = Thread::Waits::kNo;
}

const std::byte* Block::Exchange(const void* value, std::size_t bytes,
                                 const std::source_location& where) {
  if (bytes > kSlotBytes) Refuse("too much for one exchange", &where);
  const int number = current_ / kWarp;
  Warp& warp = warps_[number];
  const int first = number * kWarp;
  const int lanes = std::min(kWarp, num_threads() - first);
  if (lanes < kWarp) {
    Refuse("the warp has " + std::to_string(lanes) + " threads only", &where);
  }
  if (warp.arrived == 0) {
    warp.where = where;
  } else if (!IsSame(warp.where, where)) {
    Refuse("divergent warp: other lanes wait at " + PlaceOf(warp.where),
           &where);
  }
  std::memcpy(warp.given + (current_ - first) * kSlotBytes, value, bytes);
  if (++warp.arrived < lanes) {
    Thread& t = threads_[current_];
    t.waits = Thread::Waits::kWarp;
    t.where = where;
    Yield();
    return warp.taken;
  }
  warp.arrived = 0;
  // What was taken before has been read: all lanes are here.
  std::memcpy(warp.taken, warp.given, sizeof(warp.taken));
  for (int lane = 0; lane < lanes; ++lane) {
    threads_[first + lane].waits = Thread::Waits::kNo;
  }
  return warp.taken;
}

Block& Running() {
  if (running == nullptr) {
    Refuse("a kernel of LaunchIndependent waits, or shares memory");
  }
  return *running;
}

}  // namespace

void Refuse(const std::string& what, const std::source_location* where) {
  std::string line = "cuda_emulator: block (" + std::to_string(blockIdx.x) +
                     ", " + std::to_string(blockIdx.y) + ", " +
                     std::to_string(blockIdx.z) + ") thread (" +
                     std::to_string(threadIdx.x) + ", " +
                     std::to_string(threadIdx.y) + ", " +
                     std::to_string(threadIdx.z) + "): " + what;
  if (where != nullptr) line += ", at " + PlaceOf(*where);
  std::fprintf(stderr, "%s\n", line.c_str());
  std::abort();
}

bool Fits(dim3 grid, dim3 block) {
  return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 2147483647u &&
         grid.y <= 65535 && grid.z <= 65535 && block.x > 0 && block.y > 0 &&
         block.z > 0 && block.z <= 64 &&
         block.x * block.y * block.z <= kMaxThreads;
}

namespace {

void RunBlocks(dim3 grid, dim3 block, std::size_t shared_bytes, bool warpgroups,
               const std::function<void()>& thread) {
  thread_local Stacks stacks;
  gridDim = grid;
  blockDim = block;
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::mt19937 random(static_cast<unsigned>(blocks));
  std::shuffle(order.begin(), order.end(), random);
  for (int64_t number : order) {
    blockIdx.x = static_cast<unsigned>(number % grid.x);
    blockIdx.y = static_cast<unsigned>(number / grid.x % grid.y);
    blockIdx.z = static_cast<unsigned>(number / grid.x / grid.y);
    Block(block, shared_bytes, warpgroups, thread).Run(stacks, random);
  }
}

}  // namespace

void RunGrid(dim3 grid, dim3 block, std::size_t shared_bytes,
             const std::function<void()>& thread) {
  RunBlocks(grid, block, shared_bytes, false, thread);
}

void RunGridOfWarpgroups(dim3 grid, dim3 block, std::size_t shared_bytes,
                         const std::function<void()>& thread) {
  RunBlocks(grid, block, shared_bytes, true, thread);
}

void RunIndependentGrid(dim3 grid, dim3 block,
                        const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        for (threadIdx.z = 0; threadIdx.z < block.z; ++threadIdx.z) {
          for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y) {
            for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) {
              thread();
            }
          }
        }
      }
    }
  }
}

int ThreadNumber() { return Running().current(); }

void WaitForBlock(const std::source_location& where) {
  Running().WaitForBlock(where);
}

const std::byte* ExchangeInWarp(const void* value, std::size_t bytes,
                                const std::source_location& where) {
  return Running().Exchange(value, bytes, where);
}

void WaitForWarp(const std::source_location& where) {
  const char nothing = 0;
  Running().Exchange(&nothing, 1, where);
  Running().AdvanceWarpEpoch();
}

SharedState& Shared() { return Running().shared(); }
Products& ProductsOfBlock() {
  Products* const products = Running().products();
  if (products == nullptr) {
    Refuse("products of warpgroups in a kernel of Launch");
  }
  return *products;
}
Moment Now() {
  const Block& block = Running();
  return {block.current(), block.epoch(), block.warp_epoch()};
}

}  // namespace gradwire::cuda_emulator
