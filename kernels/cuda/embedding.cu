// SPDX-License-Identifier: Apache-2.0
// The backward is bound by memory: what it reads of d_out and d_table comes
// once. Atomics would add a row's terms in any order; here tokens are sorted
// with their positions, and whoever finds the first of a run of equal ones adds
// the whole run, in order. A warp does so for kSquareBlock columns: they stay
// in its registers, and of them it makes the sum of squares. Of a run as many
// rows are in flight as registers hold, for a frequent token's run is long and
// no other warp may help.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <utility>

#include "device/cuda/kernel.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Keys that one block sorts, one for each of its threads.
constexpr int kSorted = 512;
// Tokens in one turn, at most. A row's terms are added one after the other, so
// turns do not show in the sums.
constexpr int kTurn = 1 << 17;

// ---- Sorting ----------------------------------------------------------------

// Token above position: no two are equal.
__device__ inline uint64_t Key(int32_t token, int position) {
  return static_cast<uint64_t>(static_cast<uint32_t>(token)) << 32 |
         static_cast<uint32_t>(position);
}
__device__ inline uint32_t TokenOf(uint64_t key) {
  return static_cast<uint32_t>(key >> 32);
}
__device__ inline int PositionOf(uint64_t key) {
  return static_cast<int>(key & 0x7fffffffu);
}

// Where key i of n goes when sorted runs of `run` keys, a power of two, become
// runs of twice as many: past the smaller ones of the other run.
template <typename Keys>
__device__ inline int MergedPlace(Keys keys, int n, int run, int i) {
  const uint64_t key = keys[i];
  const bool in_first = (i & run) == 0;
  const int pair = i & ~(2 * run - 1);
  const int other = in_first ? pair + run : pair;
  int low = std::min(other, n), high = std::min(other + run, n);
  const int begin = low;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    const uint64_t there = keys[middle];
    if (there < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return i + (low - begin) - (in_first ? 0 : run);
}

// keys [n] = those of tokens [n], sorted within each kSorted.
__global__ void __launch_bounds__(kSorted)
    SortKernel(const int32_t* tokens, int n, uint64_t* keys) {
  SharedMemory memory;
  SharedArray<uint64_t> from = memory.Take<uint64_t>(kSorted);
  SharedArray<uint64_t> to = memory.Take<uint64_t>(kSorted);
  const int first = static_cast<int>(blockIdx.x) * kSorted;
  const int count = n - first < kSorted ? n - first : kSorted;
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) from[i] = Key(tokens[first + i], first + i);
  __syncthreads();
  for (int run = 1; run < count; run *= 2) {
    if (i < count) {
      const uint64_t key = from[i];
      to[MergedPlace(from, count, run, i)] = key;
    }
    __syncthreads();
    const SharedArray<uint64_t> sorted = to;
    to = from;
    from = sorted;
  }
  if (i < count) {
    const uint64_t key = from[i];
    keys[first + i] = key;
  }
}

__global__ void __launch_bounds__(kThreads)
    MergeKernel(const uint64_t* from, int n, int run, uint64_t* to) {
  const int i =
      static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i < n) to[MergedPlace(from, n, run, i)] = from[i];
}

// Sorts n keys of `tokens` into one of the two [n]; which, it says in *sorted.
cudaError_t Sort(const int32_t* tokens, int n, uint64_t* keys, uint64_t* room,
                 uint64_t** sorted, cudaStream_t stream) {
  cudaError_t error = Launch(
      SortKernel, dim3(static_cast<unsigned>((n + kSorted - 1) / kSorted)),
      dim3(kSorted), 2 * kSorted * sizeof(uint64_t), stream, tokens, n, keys);
  for (int run = kSorted; error == cudaSuccess && run < n; run *= 2) {
    error = Launch(MergeKernel,
                   dim3(static_cast<unsigned>((n + kThreads - 1) / kThreads)),
                   dim3(kThreads), 0, stream,
                   static_cast<const uint64_t*>(keys), n, run, room);
    std::swap(keys, room);
  }
  *sorted = keys;
  return error;
}

// ---- Adding -----------------------------------------------------------------

template <typename T>
struct Addition {
  const uint64_t* keys;  // [n], sorted
  int n;
  const T* d_out;  // [n, hidden]
  int64_t hidden;
  float* d_table;   // [vocab, hidden] +=
  double* squares;  // [vocab, tiles], or null
  int64_t tiles;    // of kSquareBlock columns
};

// kN elements as registers hold them.
template <int kN>
struct Columns {
  float value[kN];
};

// Of kN floats, at most four at a time, which is 16 bytes.
template <int kN>
__device__ inline Columns<kN> LoadColumns(const float* from) {
  constexpr int kMoved = kN < 4 ? kN : 4;
  Columns<kN> columns;
#pragma unroll
  for (int i = 0; i < kN; i += kMoved) {
    const Pack<float, kMoved> pack = LoadPack<kMoved>(from + i);
#pragma unroll
    for (int j = 0; j < kMoved; ++j) columns.value[i + j] = pack.element[j];
  }
  return columns;
}
template <int kN>
__device__ inline void StoreColumns(float* to, const Columns<kN>& columns) {
  constexpr int kMoved = kN < 4 ? kN : 4;
#pragma unroll
  for (int i = 0; i < kN; i += kMoved) {
    Pack<float, kMoved> pack;
#pragma unroll
    for (int j = 0; j < kMoved; ++j) pack.element[j] = columns.value[i + j];
    StorePack(to + i, pack);
  }
}

// A warp for each key and tile; those whose key is not its run's first have
// nothing to do.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 2) AddKernel(Addition<T> args) {
  constexpr int kPacks = static_cast<int>(kSquareBlock) / (kWarpSize * kN);
  // Rows in flight.
  constexpr int kRows = kN == 8 ? 12 : 8;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t unit =
      static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int64_t first = unit / args.tiles;
  if (first >= args.n) return;
  const uint32_t token = TokenOf(args.keys[first]);
  if (first > 0 && TokenOf(args.keys[first - 1]) == token) return;

  const int64_t tile = unit % args.tiles;
  const int64_t begin = tile * kSquareBlock + lane * kN;
  const auto column = [&](int p) { return begin + p * kWarpSize * kN; };
  float* to = args.d_table + token * args.hidden;
  Columns<kN> sums[kPacks] = {};
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (column(p) < args.hidden) sums[p] = LoadColumns<kN>(to + column(p));
  }
  // A lane looks at one key: the run is the first of those, or all and more.
  int count = kWarpSize;
  for (int64_t at = first; count == kWarpSize; at += kWarpSize) {
    const bool there = at + lane < args.n;
    const uint64_t key = there ? args.keys[at + lane] : 0;
    count =
        std::popcount(__ballot_sync(kAllLanes, there && TokenOf(key) == token));
    for (int r = 0; r < count; r += kRows) {
      Pack<T, kN> rows[kRows][kPacks];
#pragma unroll
      for (int d = 0; d < kRows; ++d) {
        if (r + d >= count) break;
        const int64_t t = __shfl_sync(kAllLanes, PositionOf(key), r + d);
        const T* from = args.d_out + t * args.hidden;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (column(p) < args.hidden) {
            rows[d][p] = LoadPack<kN>(from + column(p));
          }
        }
      }
#pragma unroll
      for (int d = 0; d < kRows; ++d) {
        if (r + d >= count) break;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (column(p) >= args.hidden) continue;
#pragma unroll
          for (int j = 0; j < kN; ++j) {
            sums[p].value[j] += static_cast<float>(rows[d][p].element[j]);
          }
        }
      }
    }
  }
  double squares = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (column(p) >= args.hidden) continue;
    StoreColumns(to + column(p), sums[p]);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const auto v = static_cast<double>(sums[p].value[j]);
      squares = fma(v, v, squares);
    }
  }
  if (args.squares == nullptr) return;
  squares = WarpSum(squares);
  if (lane == 0) args.squares[token * args.tiles + tile] = squares;
}

template <typename T>
cudaError_t Add(const Addition<T>& args, cudaStream_t stream) {
  const int64_t blocks = (args.n * args.tiles + kWarps - 1) / kWarps;
  return Launch(ArePacked<T>(args.hidden, args.d_out, args.d_table)
                    ? AddKernel<T, kPackOf<T>>
                    : AddKernel<T, 1>,
                dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream,
                args);
}

// `keys` has room for two turns.
template <typename T>
cudaError_t Backward(const Tensor& tokens, const Tensor& d_out,
                     const Tensor& d_table, const Tensor& squares,
                     uint64_t* keys, cudaStream_t stream) {
  const int64_t hidden = d_out.dim(1);
  for (int64_t begin = 0; begin < tokens.dim(0); begin += kTurn) {
    const auto n =
        static_cast<int>(std::min<int64_t>(kTurn, tokens.dim(0) - begin));
    uint64_t* sorted = nullptr;
    cudaError_t error = Sort(tokens.data<int32_t>() + begin, n, keys,
                             keys + kTurn, &sorted, stream);
    if (error == cudaSuccess) {
      error = Add<T>(
          {sorted, n, d_out.data<T>() + begin * hidden, hidden,
           d_table.data<float>(), squares.data<double>(), SquareBlocks(hidden)},
          stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

void CudaKernels::EmbeddingForward(Stream& stream, const Tensor& tokens,
                                   const Tensor& table, const Tensor& out) {
  // The table's rows named by `tokens` are what GatherRows gathers.
  GatherRows(stream, table, tokens, out);
}

void CudaKernels::EmbeddingBackward(Stream& stream, const Tensor& tokens,
                                    const Tensor& d_out, const Tensor& d_table,
                                    const Tensor& squares) {
  if (!stream.ok() || d_out.num_elements() == 0) return;
  const int64_t hidden = d_out.dim(1);
  GW_CHECK(d_out.dim(0) == tokens.dim(0) && d_table.dim(1) == hidden);
  GW_CHECK(squares.is_null() || (squares.dim(0) == d_table.dim(0) &&
                                 squares.dim(1) == SquareBlocks(hidden)));
  CudaStream& cuda = Cuda(stream);
  auto* keys = Scratch<uint64_t>(2 * kTurn);
  cuda.Check(
      d_out.dtype() == DType::kBF16
          ? Backward<BFloat16>(tokens, d_out, d_table, squares, keys,
                               cuda.get())
          : Backward<float>(tokens, d_out, d_table, squares, keys, cuda.get()),
      "the embedding's gradient");
}

}  // namespace gradwire
