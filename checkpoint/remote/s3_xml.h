// SPDX-License-Identifier: Apache-2.0
// The answers of S3 that are XML. Text that is none of them gives what is
// empty.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gradwire {

struct S3Listing {
  std::vector<std::string> keys;
  std::vector<std::string> prefixes;
  // What to begin the next page with; empty at the end.
  std::string next;
  // It is a listing.
  bool valid = false;
};

struct S3Uploads {
  std::vector<std::pair<std::string, std::string>> uploads;  // key, id
  bool truncated = false;
  bool valid = false;
};

S3Listing ParseListing(std::string_view xml);
S3Uploads ParseUploads(std::string_view xml);
// Of CreateMultipartUpload.
std::string ParseUploadId(std::string_view xml);
// "NoSuchKey", ...: of an error, also of one behind status 200, as
// CompleteMultipartUpload may answer.
std::string ParseErrorCode(std::string_view xml);
// The request of CompleteMultipartUpload.
std::string CompletionOf(const std::vector<std::string>& etags);

}  // namespace gradwire
