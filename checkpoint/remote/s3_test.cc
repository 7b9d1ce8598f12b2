// SPDX-License-Identifier: Apache-2.0
// What can be known of S3 without one; tests/e2e/test_object_storage.py has
// one.
#include <gtest/gtest.h>

#include "base/error.h"
#include "checkpoint/remote/s3_object_store.h"
#include "checkpoint/remote/s3_xml.h"
#include "checkpoint/remote/sha256.h"

namespace gradwire {
namespace {

TEST(S3XmlTest, ReadsListings) {
  const S3Listing page = ParseListing(
      "<?xml version=\"1.0\"?><ListBucketResult "
      "xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><IsTruncated>true"
      "</IsTruncated><Contents><Key>a/b&amp;c</Key><Size>3</Size></Contents>"
      "<Contents><Key>a/d</Key></Contents><CommonPrefixes><Prefix>a/e/</Prefix>"
      "</CommonPrefixes><NextContinuationToken>t=</NextContinuationToken>"
      "</ListBucketResult>");
  EXPECT_TRUE(page.valid);
  EXPECT_EQ(page.keys, (std::vector<std::string>{"a/b&c", "a/d"}));
  EXPECT_EQ(page.prefixes, std::vector<std::string>{"a/e/"});
  EXPECT_EQ(page.next, "t=");
}

TEST(S3XmlTest, WhatIsNoneIsEmpty) {
  for (const char* text :
       {"", "<", "<html>gateway</html>", "\xff\xfe", "<ListBucketResult",
        "<!DOCTYPE a [<!ENTITY b \"c\">]><a>&b;</a>"}) {
    EXPECT_FALSE(ParseListing(text).valid) << text;
    EXPECT_FALSE(ParseUploads(text).valid) << text;
    EXPECT_EQ(ParseUploadId(text), "") << text;
    EXPECT_EQ(ParseErrorCode(text), "") << text;
  }
  EXPECT_EQ(ParseErrorCode("<Error><Code>NoSuchKey</Code></Error>"),
            "NoSuchKey");
}

TEST(S3XmlTest, WritesCompletions) {
  EXPECT_EQ(CompletionOf({"\"a\"", "\"b\""}),
            "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>"
            "\"a\"</ETag></Part><Part><PartNumber>2</PartNumber><ETag>\"b\""
            "</ETag></Part></CompleteMultipartUpload>");
}

TEST(Sha256Test, KnownAnswers) {
  EXPECT_EQ(Sha256::Of("abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  Sha256 parts;
  parts.Add("a");
  parts.Add("");
  parts.Add("bc");
  EXPECT_EQ(parts.Finish(), Sha256::Of("abc"));
}

TEST(S3OptionsTest, AreChecked) {
  S3Options right;
  right.url = "s3://bucket/a/b/";
  right.region = "eu-central-1";
  right.access_key = "k";
  right.secret_key = "s";
  ASSERT_TRUE(OpenS3(right).ok());
  const auto refused = [&](auto change) {
    S3Options options = right;
    change(options);
    const auto detail = GetErrorDetail(OpenS3(options).status());
    return detail && detail->reason == "OBJECT_STORE_INVALID";
  };
  for (const char* url : {"", "bucket", "s3:/b", "s3://", "s3:///a",
                          "s3://b//c", "s3://b/../c", "s3://b c", "gs://b"}) {
    EXPECT_TRUE(refused([&](S3Options& o) { o.url = url; })) << url;
  }
  for (const char* endpoint :
       {"host", "ftp://host", "https://", "https://h/path", "http://u@h"}) {
    EXPECT_TRUE(refused([&](S3Options& o) { o.endpoint = endpoint; }))
        << endpoint;
  }
  EXPECT_TRUE(refused([](S3Options& o) { o.secret_key = ""; }));
  EXPECT_TRUE(refused([](S3Options& o) { o.region = "a b"; }));
  EXPECT_TRUE(refused([](S3Options& o) { o.ca_file = "/none.pem"; }));
}

TEST(S3Test, ANetworkWithoutAnAnswerIsSaid) {
  S3Options options;
  options.url = "s3://bucket";
  options.endpoint = "http://127.0.0.1:1";
  options.region = "us-east-1";
  options.access_key = "k";
  options.secret_key = "s";
  options.tries = 2;
  options.pause = absl::Milliseconds(1);
  const auto store = OpenS3(options);
  ASSERT_TRUE(store.ok());
  const absl::Status status = (*store)->Check();
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_EQ(GetErrorDetail(status)->reason, "STORAGE_UNREACHABLE");
}

}  // namespace
}  // namespace gradwire
