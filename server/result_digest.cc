// SPDX-License-Identifier: Apache-2.0
#include "server/result_digest.h"

#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"
#include "server/payload_digest.h"

namespace gradwire {
namespace {

// Appended with its length, so that one message's end is not the next one's
// beginning.
void Append(const google::protobuf::MessageLite& message, std::string& bytes) {
  google::protobuf::io::StringOutputStream stream(&bytes);
  google::protobuf::io::CodedOutputStream out(&stream);
  // A map's order in memory changes with every process.
  out.SetSerializationDeterministic(true);
  out.WriteVarint64(message.ByteSizeLong());
  message.SerializeToCodedStream(&out);
}

}  // namespace

std::string ResultDigest(const v1::RankDone& done,
                         const std::vector<v1::LogprobItem>& logprobs) {
  v1::RankDone result = done;
  result.clear_command_id();
  result.clear_memory_use();
  result.clear_collective_use();
  if (result.has_forward()) {
    v1::ForwardResult& forward = *result.mutable_forward();
    forward.clear_retained();
    forward.clear_retained_layers();
    forward.clear_activation_id();
    forward.clear_expires();
  }
  if (result.has_backward()) result.mutable_backward()->clear_recomputed();
  std::string bytes;
  Append(result, bytes);
  for (const v1::LogprobItem& item : logprobs) Append(item, bytes);
  return PayloadDigest::OfBytes(bytes);
}

}  // namespace gradwire
