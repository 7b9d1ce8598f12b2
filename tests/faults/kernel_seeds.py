# SPDX-License-Identifier: Apache-2.0
"""Bugs of kernels on GPUs, which the emulator and the suite must see."""

from seed import Seed

_SUITE = ("//kernels/cuda:conformance_test",)

KERNEL_SEEDS = (
    Seed(
        "gpu_barrier_after_writing_left_out",
        "sums of warps are read before they are written",
        "kernels/cuda/reduce.h",
        "shared[warp] = value;\n  __syncthreads();\n  V sum",
        "shared[warp] = value;\n  V sum",
        _SUITE,
    ),
    Seed(
        "gpu_barrier_before_writing_left_out",
        "sums of warps are written over while others read the last ones",
        "kernels/cuda/reduce.h",
        "value = WarpSum(value);\n  if (warps == 1) return value;\n"
        "  __syncthreads();",
        "value = WarpSum(value);\n  if (warps == 1) return value;",
        _SUITE,
    ),
    Seed(
        "gpu_copy_not_waited_for",
        "keys are multiplied while they are on their way",
        "kernels/cuda/attention_forward.cu",
        "    WaitAsync<0>();\n    __syncthreads();\n    LoadTile<kDim, "
        "Tile::kKeys>(v",
        "    __syncthreads();\n    LoadTile<kDim, Tile::kKeys>(v",
        _SUITE,
    ),
    Seed(
        "gpu_values_seen_by_one_thread_only",
        "no barrier between a copy's arrival and its use by others",
        "kernels/cuda/attention_forward.cu",
        "    WaitAsync<0>();\n    __syncthreads();\n    if (first_key",
        "    WaitAsync<0>();\n    if (first_key",
        _SUITE,
    ),
    Seed(
        "gpu_mask_off_by_one",
        "a query sees the key behind it",
        "kernels/cuda/attention_forward.cu",
        "const int ahead = first_query + lane / 4",
        "const int ahead = 1 + first_query + lane / 4",
        _SUITE,
    ),
    Seed(
        "gpu_tile_out_of_bounds",
        "a warp reads rows beyond its tile",
        "kernels/cuda/attention_tiles.h",
        "const int from_a = (row + lane % 16)",
        "const int from_a = (row + 16 + lane % 16)",
        _SUITE,
    ),
    Seed(
        "gpu_wrong_half",
        "up is read one element too far",
        "kernels/cuda/swiglu.cu",
        "const Pack<T, kN> up = LoadPack<kN>(row + ffn);",
        "const Pack<T, kN> up = LoadPack<kN>(row + ffn - kN);",
        _SUITE,
    ),
    Seed(
        "gpu_top_k_of_the_last_chunk",
        "what earlier chunks of the vocabulary had is forgotten",
        "kernels/cuda/logprob_head.cu",
        "list[i] = first ? least : KeyOf(top[i], ids[i]);",
        "list[i] = least;",
        _SUITE,
    ),
    Seed(
        "gpu_rounding_of_another_element",
        "bf16 moments are rounded by their neighbours' bits",
        "kernels/cuda/adamw.cu",
        "RoundingBits(key, int64_t{index});",
        "RoundingBits(key, int64_t{index} + 1);",
        _SUITE,
    ),
)
