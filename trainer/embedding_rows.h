// SPDX-License-Identifier: Apache-2.0
// The gradient of a sharded model's embedding. It has rows for the tokens of a
// micro-batch and zeros for the rest of the vocabulary, so ranks hand each
// other these rows instead of summing tables, and each adds those that lie in
// its shard. docs/sharding.md.
//
// Rows are added in float32, behind the head's sum if that is of the table, in
// the order of ranks, and of a rank in that of its tokens.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "device/device.h"
#include "kernels/kernels.h"
#include "sharding/collectives.h"
#include "sharding/layout.h"
#include "sharding/reduced_gradients.h"

namespace gradwire {

// All ranks make the same calls in the same order: Announce and Await once for
// a micro-batch, then, if Await has said so, Add. Thread rule: one thread at a
// time.
class EmbeddingRows {
 public:
  struct Options {
    // Unit 0 begins with the embedding.
    const ShardLayout* layout;
    int64_t vocab, hidden;
    DType act;
    int64_t max_tokens;  // of a micro-batch
    // Whether the head's gradient is in the same table.
    bool tied;
  };
  // `shard`: f32 [layout.shard_elements()], where sums go. All must outlive it.
  static absl::StatusOr<std::unique_ptr<EmbeddingRows>> Create(
      const Options& options, const Tensor& shard, ReducedGradients& gradients,
      Collectives& collectives, Device& device, Kernels& kernels);
  // Of the memory that it takes.
  static int64_t Bytes(const Options& options);

  ReducedGradients& gradients() { return gradients_; }

  // Tells the others whose rows this rank will add: ids of tokens, at most
  // max_tokens, each below the vocabulary's size. None: it has no micro-batch.
  void Announce(const std::vector<int32_t>& ids);
  // Whether rows are added by Add. If not, all ranks have so many that the sum
  // of tables is no more to send: the unit's gradient is to be made as others
  // are. To be asked before unit 0 ends.
  bool Await(Stream& stream);
  // Adds all ranks' rows; this one's are act [tokens, hidden], or null if it
  // has none. If the head has a table of its own, and unless `accumulate`, rows
  // are all that the embedding's gradient is made of. REQUIRES: Await has
  // returned true; all units but 0 have ended, and 0 if it was begun.
  void Add(Stream& stream, const Tensor& rows, bool accumulate);

 private:
  EmbeddingRows(const Options& options, const Tensor& shard,
                ReducedGradients& gradients, Collectives& collectives,
                Device& device, Kernels& kernels)
      : options_(options),
        shard_(shard),
        gradients_(gradients),
        collectives_(collectives),
        device_(device),
        kernels_(kernels) {}
  // Adds rows of `all`, at `positions`, to rows `ids` of a table.
  struct Listed {
    std::vector<int32_t> positions, ids;
  };
  void AddListed(Stream& stream, const Tensor& all, const Listed& listed,
                 const Tensor& table);
  // Of all ranks' rows, as many of each as the longest has.
  int64_t RowBytes() const;
  // Elements [begin, end) of the flat vector, which are in this rank's shard.
  Tensor Held(int64_t begin, int64_t end) const;

  const Options options_;
  const Tensor shard_;
  ReducedGradients& gradients_;
  Collectives& collectives_;
  Device& device_;
  Kernels& kernels_;
  std::unique_ptr<DeviceBuffer> buffer_;
  Tensor all_ids_;   // i32 [world * max_tokens]
  Tensor lists_;     // i32 [2 * world * max_tokens]
  Tensor edge_row_;  // f32 [1, hidden]
  // A rank whose other work has failed still finds what all find.
  std::unique_ptr<Stream> ids_stream_;
  Collectives::Ticket announced_ = 0;
  // What copies to the device read.
  std::vector<int32_t> own_ids_;
  Listed inner_, edges_[2];
  // By rank; how much of lists_ is taken, and of the rows that were picked.
  std::vector<std::vector<int32_t>> ids_;
  int64_t most_ = 0;
  int64_t listed_ = 0;
  Tensor picked_;  // act [rows, hidden]
};

}  // namespace gradwire
