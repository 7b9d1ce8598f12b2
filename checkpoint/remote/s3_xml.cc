// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/remote/s3_xml.h"

#include <pugixml.hpp>
#include <sstream>

namespace gradwire {
namespace {

// The answers have no depth, and a document that has is refused.
bool Load(std::string_view xml, pugi::xml_document& document) {
  constexpr size_t kMostBytes = size_t{64} << 20;
  return xml.size() <= kMostBytes &&
         document.load_buffer(xml.data(), xml.size(),
                              pugi::parse_default & ~pugi::parse_doctype);
}

}  // namespace

S3Listing ParseListing(std::string_view xml) {
  S3Listing listing;
  pugi::xml_document document;
  if (!Load(xml, document)) return listing;
  const pugi::xml_node root = document.child("ListBucketResult");
  listing.valid = !root.empty();
  for (const auto& entry : root.children("Contents")) {
    listing.keys.emplace_back(entry.child_value("Key"));
  }
  for (const auto& entry : root.children("CommonPrefixes")) {
    listing.prefixes.emplace_back(entry.child_value("Prefix"));
  }
  if (root.child("IsTruncated").text().as_bool()) {
    listing.next = root.child_value("NextContinuationToken");
  }
  return listing;
}

S3Uploads ParseUploads(std::string_view xml) {
  S3Uploads uploads;
  pugi::xml_document document;
  if (!Load(xml, document)) return uploads;
  const pugi::xml_node root = document.child("ListMultipartUploadsResult");
  uploads.valid = !root.empty();
  uploads.truncated = root.child("IsTruncated").text().as_bool();
  for (const auto& entry : root.children("Upload")) {
    uploads.uploads.emplace_back(entry.child_value("Key"),
                                 entry.child_value("UploadId"));
  }
  return uploads;
}

std::string ParseUploadId(std::string_view xml) {
  pugi::xml_document document;
  if (!Load(xml, document)) return "";
  return document.child("InitiateMultipartUploadResult")
      .child_value("UploadId");
}

std::string ParseErrorCode(std::string_view xml) {
  pugi::xml_document document;
  if (!Load(xml, document)) return "";
  return document.child("Error").child_value("Code");
}

std::string CompletionOf(const std::vector<std::string>& etags) {
  pugi::xml_document document;
  pugi::xml_node root = document.append_child("CompleteMultipartUpload");
  for (size_t i = 0; i < etags.size(); ++i) {
    pugi::xml_node part = root.append_child("Part");
    part.append_child("PartNumber").text().set(static_cast<unsigned>(i + 1));
    part.append_child("ETag").text().set(etags[i].c_str());
  }
  std::ostringstream out;
  document.save(out, "", pugi::format_raw | pugi::format_no_declaration);
  return out.str();
}

}  // namespace gradwire
