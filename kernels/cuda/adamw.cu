// SPDX-License-Identifier: Apache-2.0
// Bound by memory: one pass reads and writes every state once, and takes its
// digest while it is in registers. A warp takes a tile at a time, with all its
// loads under way before the first is needed.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "device/cuda/kernel.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/warp_digest.h"
#include "kernels/optimizer_state.h"

namespace gradwire {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Several waves on any GPU; of tiles a warp takes several where there are
// enough, which pays for its keys.
constexpr int64_t kMaxBlocks = 8192;
constexpr int64_t kTilesPerWarp = 4;

struct Factors {
  float grad_scale, keep, beta1, beta2, rest1, rest2, rate, correct2, eps;
  RoundingKey key;
};

Factors FactorsOf(const AdamWParams& params) {
  const double step = static_cast<double>(params.step);
  const double correct1 = 1.0 / (1.0 - std::pow(double{params.beta1}, step));
  const double correct2 = 1.0 / (1.0 - std::pow(double{params.beta2}, step));
  return {.grad_scale = params.grad_scale,
          .keep = 1.0f - params.learning_rate * params.weight_decay,
          .beta1 = params.beta1,
          .beta2 = params.beta2,
          .rest1 = 1.0f - params.beta1,
          .rest2 = 1.0f - params.beta2,
          .rate = static_cast<float>(params.learning_rate * correct1),
          .correct2 = static_cast<float>(correct2),
          .eps = params.eps,
          .key = RoundingKeyOf(params.seed, params.step)};
}

// Where n elements lie, the first of which is number `first` of the flat
// vector.
template <class Weight, class Moment>
struct States {
  Weight* weight;
  int16_t* low;   // null if Weight is float
  Moment *m, *v;  // null: zeros
  const float* grad;
  int64_t n, first;
  bool packed;  // all are aligned to kLaneElements elements
};

// A lane's elements of a group, as they are stored.
template <class Weight, class Moment>
struct Stored {
  Pack<Weight, kLaneElements> weight;
  Pack<int16_t, kLaneElements> low;
  Pack<Moment, kLaneElements> m, v;
};

// The first `left` elements from `from` on, if not all.
template <bool kWhole, class T>
__device__ inline Pack<T, kLaneElements> LoadFirst(const T* from,
                                                   int64_t left) {
  if constexpr (kWhole) {
    return LoadPack<kLaneElements>(from);
  } else {
    Pack<T, kLaneElements> pack = {};
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      if (j < left) pack.element[j] = from[j];
    }
    return pack;
  }
}
template <bool kWhole, class T>
__device__ inline void StoreFirst(const Pack<T, kLaneElements>& pack,
                                  int64_t left, T* to) {
  if constexpr (kWhole) {
    StorePack(to, pack);
  } else {
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      if (j < left) to[j] = pack.element[j];
    }
  }
}

template <bool kWhole, class Weight, class Moment>
__device__ inline Stored<Weight, Moment> Load(
    const States<Weight, Moment>& states, int64_t i) {
  const int64_t left = states.n - i;
  Stored<Weight, Moment> stored = {};
  stored.weight =
      LoadFirst<kWhole>(static_cast<const Weight*>(states.weight) + i, left);
  if constexpr (!std::is_same_v<Weight, float>) {
    stored.low =
        LoadFirst<kWhole>(static_cast<const int16_t*>(states.low) + i, left);
  }
  if (states.m != nullptr) {
    stored.m =
        LoadFirst<kWhole>(static_cast<const Moment*>(states.m) + i, left);
    stored.v =
        LoadFirst<kWhole>(static_cast<const Moment*>(states.v) + i, left);
  }
  return stored;
}

template <class Weight, class Moment>
__device__ inline float MasterOf(const Stored<Weight, Moment>& stored, int j) {
  if constexpr (std::is_same_v<Weight, float>) {
    return stored.weight.element[j];
  } else {
    return JoinHalves({stored.weight.element[j], stored.low.element[j]});
  }
}

// One step of element j, number `index` of the flat vector; `key` begins with
// the RoundingStart of its tile.
template <class Weight, class Moment>
__device__ inline void Update(const Factors& f, const RoundingKey& key,
                              uint32_t index, int j, float grad,
                              Stored<Weight, Moment>& stored) {
  const float g = grad * f.grad_scale;
  const float m =
      fmaf(f.rest1, g, f.beta1 * static_cast<float>(stored.m.element[j]));
  const float v =
      fmaf(f.rest2, g * g, f.beta2 * static_cast<float>(stored.v.element[j]));
  const float change = f.rate * m / (sqrtf(v * f.correct2) + f.eps);
  const float w = MasterOf(stored, j) * f.keep - change;
  if constexpr (std::is_same_v<Weight, float>) {
    stored.weight.element[j] = w;
  } else {
    const Halves halves = SplitHalves(w);
    stored.weight.element[j] = halves.high;
    stored.low.element[j] = halves.low;
  }
  if constexpr (std::is_same_v<Moment, float>) {
    stored.m.element[j] = m;
    stored.v.element[j] = v;
  } else {
    const uint32_t random = RoundingBits(key, int64_t{index});
    stored.m.element[j] = StochasticBFloat16(m, random & 0xffffu);
    stored.v.element[j] = StochasticBFloat16(v, random >> 16);
  }
}

// What is stored, not what was computed; nothing beyond the end.
template <class Weight, class Moment>
__device__ inline void AddDigest(const Stored<Weight, Moment>& stored,
                                 int group, int64_t left, WarpDigest& digest) {
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) {
    if (j >= left) continue;
    const float values[] = {MasterOf(stored, j),
                            static_cast<float>(stored.m.element[j]),
                            static_cast<float>(stored.v.element[j])};
    digest.Add(
        group, j,
        {std::bit_cast<uint32_t>(values[0]), std::bit_cast<uint32_t>(values[1]),
         std::bit_cast<uint32_t>(values[2])});
  }
}

// Without a digest: what there is in place of it.
struct NoDigest {
  __device__ void EndTile(int64_t, int64_t) {}
};
template <class S>
__device__ inline void AddDigest(const S&, int, int64_t, NoDigest&) {}

// The tile that begins with element `begin`.
template <bool kWhole, class Weight, class Moment, class Digest>
__device__ inline void UpdateTile(const States<Weight, Moment>& states,
                                  const Factors& f, int64_t begin,
                                  Digest& digest) {
  const int64_t own =
      begin + static_cast<int>(threadIdx.x) % kWarpSize * kLaneElements;
  Stored<Weight, Moment> stored[kGroups];
  Pack<float, kLaneElements> grad[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int64_t i = own + g * kGroupElements;
    stored[g] = Load<kWhole>(states, i);
    grad[g] = LoadFirst<kWhole>(states.grad + i, states.n - i);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int64_t i = own + g * kGroupElements;
    const int64_t left = kWhole ? kLaneElements : states.n - i;
    // Of four elements that begin with a multiple of four the upper halves of
    // the indices are the same.
    const int64_t index = states.first + i;
    const RoundingKey key = {RoundingStart(f.key, index), f.key.second};
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      Update(f, key, static_cast<uint32_t>(index) + j, j, grad[g].element[j],
             stored[g]);
    }
    StoreFirst<kWhole>(stored[g].weight, left, states.weight + i);
    if constexpr (!std::is_same_v<Weight, float>) {
      StoreFirst<kWhole>(stored[g].low, left, states.low + i);
    }
    StoreFirst<kWhole>(stored[g].m, left, states.m + i);
    StoreFirst<kWhole>(stored[g].v, left, states.v + i);
    AddDigest(stored[g], g, left, digest);
  }
}

template <bool kWhole, class Weight, class Moment>
__device__ inline void DigestTile(const States<Weight, Moment>& states,
                                  int64_t begin, WarpDigest& digest) {
  const int64_t own =
      begin + static_cast<int>(threadIdx.x) % kWarpSize * kLaneElements;
  Stored<Weight, Moment> stored[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    stored[g] = Load<kWhole>(states, own + g * kGroupElements);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int64_t left = states.n - own - g * kGroupElements;
    AddDigest(stored[g], g, kWhole ? kLaneElements : left, digest);
  }
}

// Calls tile(whole, begin) for the tiles of a warp, and ends each.
template <class S, class Digest, class Tile>
__device__ inline void ForTiles(const S& states, Digest& digest,
                                const Tile& tile) {
  const int64_t step = int64_t{gridDim.x} * kWarps * kTileElements;
  for (int64_t begin =
           (int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize) *
           kTileElements;
       begin < states.n; begin += step) {
    const int64_t left = states.n - begin;
    if (states.packed && left >= kTileElements) {
      tile(std::true_type(), begin);
    } else {
      tile(std::false_type(), begin);
    }
    digest.EndTile((states.first + begin) / kDigestBlock,
                   (left + kDigestBlock - 1) / kDigestBlock);
  }
}

// digest [2] += if kDigest.
template <bool kDigest, class Weight, class Moment>
__global__ void __launch_bounds__(kThreads)
    AdamWKernel(States<Weight, Moment> states, Factors factors,
                unsigned long long* digest) {
  std::conditional_t<kDigest, WarpDigest, NoDigest> sums;
  ForTiles(states, sums, [&](auto whole, int64_t begin) {
    UpdateTile<decltype(whole)::value>(states, factors, begin, sums);
  });
  if constexpr (kDigest) {
    SharedMemory memory;
    sums.AddTo(digest, memory.Take<uint64_t>(2 * kWarps));
  }
}

template <class Weight, class Moment>
__global__ void __launch_bounds__(kThreads)
    StateDigestKernel(States<Weight, Moment> states,
                      unsigned long long* digest) {
  WarpDigest sums;
  ForTiles(states, sums, [&](auto whole, int64_t begin) {
    DigestTile<decltype(whole)::value>(states, begin, sums);
  });
  SharedMemory memory;
  sums.AddTo(digest, memory.Take<uint64_t>(2 * kWarps));
}

constexpr std::size_t kSharedBytes = 2 * kWarps * sizeof(uint64_t);

template <class Weight, class Moment>
States<Weight, Moment> StatesOf(const AdamWTensors& t) {
  const auto aligned = [](const Tensor& tensor) {
    const int64_t bytes = kLaneElements * DTypeBytes(tensor.dtype());
    return reinterpret_cast<std::uintptr_t>(tensor.raw()) %
               static_cast<std::uintptr_t>(bytes) ==
           0;
  };
  return {.weight = t.weight.data<Weight>(),
          .low = t.low.data<int16_t>(),
          .m = t.m.data<Moment>(),
          .v = t.v.data<Moment>(),
          .grad = t.grad.data<float>(),
          .n = t.weight.num_elements(),
          .first = t.first,
          .packed = aligned(t.weight) && aligned(t.low) && aligned(t.m) &&
                    aligned(t.v) && aligned(t.grad)};
}

dim3 BlocksFor(int64_t n) {
  const int64_t tiles = (n + kTileElements - 1) / kTileElements;
  constexpr int64_t kOfBlock = kWarps * kTilesPerWarp;
  return dim3(static_cast<unsigned>(
      std::min((tiles + kOfBlock - 1) / kOfBlock, kMaxBlocks)));
}

unsigned long long* DigestOf(const AdamWTensors& tensors) {
  return reinterpret_cast<unsigned long long*>(tensors.digest.data<int64_t>());
}

// Calls call(weight, moment) with a null pointer to each element type.
template <class Call>
cudaError_t ByTypes(const AdamWTensors& tensors, const Call& call) {
  constexpr float* kF32 = nullptr;
  constexpr BFloat16* kBF16 = nullptr;
  const bool whole = tensors.low.is_null();
  if (tensors.m.is_null() || tensors.m.dtype() == DType::kF32) {
    return whole ? call(kF32, kF32) : call(kBF16, kF32);
  }
  return whole ? call(kF32, kBF16) : call(kBF16, kBF16);
}

void CheckSizes(const AdamWTensors& tensors) {
  const int64_t n = tensors.weight.num_elements();
  GW_CHECK(tensors.low.is_null() || tensors.low.num_elements() == n);
  GW_CHECK(tensors.digest.is_null() || tensors.digest.num_elements() == 2);
  GW_CHECK(tensors.first % kDigestBlock == 0);
}

}  // namespace

void CudaKernels::AdamW(Stream& stream, const AdamWParams& params,
                        const AdamWTensors& tensors) {
  if (!stream.ok()) return;
  const int64_t n = tensors.weight.num_elements();
  CheckSizes(tensors);
  GW_CHECK(tensors.m.num_elements() == n && tensors.v.num_elements() == n);
  GW_CHECK(tensors.grad.num_elements() == n && params.step >= 1);
  if (n == 0) return;
  const Factors factors = FactorsOf(params);
  unsigned long long* const digest = DigestOf(tensors);
  CudaStream& cuda = Cuda(stream);
  cuda.Check(
      ByTypes(tensors,
              [&]<class Weight, class Moment>(Weight*, Moment*) {
                return Launch(
                    digest == nullptr ? AdamWKernel<false, Weight, Moment>
                                      : AdamWKernel<true, Weight, Moment>,
                    BlocksFor(n), dim3(kThreads), kSharedBytes, cuda.get(),
                    StatesOf<Weight, Moment>(tensors), factors, digest);
              }),
      "AdamW");
}

void CudaKernels::StateDigest(Stream& stream, const AdamWTensors& tensors) {
  if (!stream.ok()) return;
  const int64_t n = tensors.weight.num_elements();
  CheckSizes(tensors);
  GW_CHECK(!tensors.digest.is_null());
  GW_CHECK(tensors.m.is_null() == tensors.v.is_null());
  if (n == 0) return;
  CudaStream& cuda = Cuda(stream);
  cuda.Check(ByTypes(tensors,
                     [&]<class Weight, class Moment>(Weight*, Moment*) {
                       return Launch(StateDigestKernel<Weight, Moment>,
                                     BlocksFor(n), dim3(kThreads), kSharedBytes,
                                     cuda.get(),
                                     StatesOf<Weight, Moment>(tensors),
                                     DigestOf(tensors));
                     }),
             "a digest of state");
}

}  // namespace gradwire
