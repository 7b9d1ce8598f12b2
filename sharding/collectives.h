// SPDX-License-Identifier: Apache-2.0
// What ranks say to each other. docs/sharding.md.
//
// All ranks of a group call the same methods with the same sizes in the same
// order. A call queues the collective and returns; queued ones run one after
// the other, beside the caller's own work. Sums are taken in rank order in
// float32 (float64 for doubles), so that they have the same bits on every rank
// and in every run.
//
// The first failure ends the group: that collective and all later ones fail
// with the same error on this rank, nothing blocks, and the memory they were
// given is undefined but no longer touched when Wait, or the stream's Finish,
// has returned the error.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "device/stream.h"
#include "device/tensor.h"

namespace gradwire {

// Thread rule: one thread at a time; Abort from any thread, at any time.
class Collectives {
 public:
  // A queued collective; tickets ascend.
  using Ticket = int64_t;

  // Fails and ends whatever still runs.
  virtual ~Collectives() = default;

  virtual int rank() const = 0;
  virtual int world() const = 0;

  // Collectives read what earlier work in `stream` has written, and what they
  // write is there for later work in the stream given to Wait. Memory must stay
  // valid, and be left alone, in between.

  // full = the ranks' shards, one behind the other.
  //   shard [n]; full [world * n] =, of the same type; shard may be its place
  //   in full
  virtual Ticket AllGather(Stream& stream, const Tensor& shard,
                           const Tensor& full) = 0;
  // shard = the sum over ranks of their full[rank * n, (rank + 1) * n).
  //   full f32 [world * n], read; shard f32 [n], += if accumulate else =
  Ticket ReduceScatter(Stream& stream, const Tensor& full, const Tensor& shard,
                       bool accumulate) {
    return ReduceScatterParts(stream, full, shard.num_elements(), shard,
                              accumulate);
  }
  // The same of parts that lie `stride` >= n elements apart: full[rank *
  // stride, rank * stride + n). What is between them is left alone.
  //   full f32 [(world - 1) * stride + n]
  virtual Ticket ReduceScatterParts(Stream& stream, const Tensor& full,
                                    int64_t stride, const Tensor& shard,
                                    bool accumulate) = 0;
  // values = their sum over ranks.   f32 or f64 [n] =
  virtual Ticket AllReduce(Stream& stream, const Tensor& values) = 0;
  // values = those of `root`.   any type
  virtual Ticket Broadcast(Stream& stream, const Tensor& values, int root) = 0;

  // Later work in `stream` comes after the collective. Where streams are
  // asynchronous this returns at once, and a failure that is not yet known
  // makes the stream fail, so that its Finish returns it. Errors: that of the
  // group. UNAVAILABLE COLLECTIVE_TIMEOUT (rank: whom this one waited for;
  // seconds); UNAVAILABLE COLLECTIVE_FAILED (rank, cause); that given to Abort.
  virtual absl::Status Wait(Stream& stream, Ticket ticket) = 0;

  // Ends the group with this error, which must not be OK. The first one stays.
  virtual void Abort(const absl::Status& status) = 0;

  // Since the beginning, for metrics.
  struct Statistics {
    int64_t bytes_sent = 0;
    int64_t collectives = 0;
    double busy_seconds = 0;  // collectives ran
    double wait_seconds = 0;  // Wait blocked: what was not hidden
  };
  virtual Statistics statistics() const = 0;
};

}  // namespace gradwire
