// SPDX-License-Identifier: Apache-2.0
#include "server/rank_hello.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "absl/strings/ascii.h"
#include "base/error.h"
#include "server/version.h"

namespace gradwire {
namespace {

constexpr size_t kLeastToken = 32;
constexpr size_t kMostToken = 4096;

ErrorBuilder Refusal(absl::StatusCode code, const std::string& reason,
                     const v1::RankHello& hello) {
  ErrorBuilder error(code, reason);
  error.With("job_id", hello.job_id().substr(0, 64)).With("rank", hello.rank());
  return error;
}

absl::Status Unusable(const std::string& what) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "JOIN_TOKEN_UNUSABLE")
      .With("field", "join_token_file")
      .Message("The join token's file " + what +
               ". Make one with: (umask 077; openssl rand -hex 32 > FILE).");
}

}  // namespace

bool SameSecret(const std::string& a, const std::string& b) {
  if (a.size() != b.size()) return false;
  volatile unsigned char difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference = difference | static_cast<unsigned char>(a[i] ^ b[i]);
  }
  return difference == 0;
}

absl::Status CheckToken(const v1::RankHello& hello, const std::string& token) {
  if (!token.empty() && SameSecret(hello.join_token(), token)) {
    return absl::OkStatus();
  }
  return ErrorBuilder(absl::StatusCode::kPermissionDenied, "RANK_TOKEN_WRONG")
      .Message(
          "The join token is not this server's. A rank takes it from "
          "GRADWIRE_JOIN_TOKEN or --join_token_file.");
}

absl::Status CheckHello(const v1::RankHello& hello, int world_size) {
  if (hello.version() != kVersion) {
    return Refusal(absl::StatusCode::kFailedPrecondition,
                   "RANK_VERSION_MISMATCH", hello)
        .With("value", hello.version().substr(0, 64))
        .With("limit", kVersion)
        .Message("The rank is of build " + hello.version().substr(0, 64) +
                 " and its supervisor of " + kVersion +
                 ". Install one build everywhere.");
  }
  if (hello.world_size() != world_size) {
    return Refusal(absl::StatusCode::kFailedPrecondition, "RANK_WORLD_MISMATCH",
                   hello)
        .With("value", hello.world_size())
        .With("limit", world_size)
        .Message("The job has world_size " + std::to_string(world_size) +
                 "; start its ranks with --world_size=" +
                 std::to_string(world_size) + ".");
  }
  if (hello.rank() < 0 || hello.rank() >= world_size) {
    return Refusal(absl::StatusCode::kFailedPrecondition, "RANK_OUT_OF_RANGE",
                   hello)
        .With("value", hello.rank())
        .With("limit", world_size - 1)
        .Message("--rank must be from 0 to " + std::to_string(world_size - 1) +
                 ".");
  }
  return absl::OkStatus();
}

absl::Status RankLate(const v1::RankHello& hello) {
  return Refusal(absl::StatusCode::kFailedPrecondition, "RANK_LATE", hello)
      .Message("The job's ranks are all there.");
}

absl::Status RankGroupEnded(const v1::RankHello& hello) {
  return Refusal(absl::StatusCode::kFailedPrecondition, "RANK_GROUP_ENDED",
                 hello)
      .Message("The job has ended; ranks may join once it is restarted.");
}

absl::Status RankDuplicate(const v1::RankHello& hello) {
  return Refusal(absl::StatusCode::kAlreadyExists, "RANK_DUPLICATE", hello)
      .Message("Another process is rank " + std::to_string(hello.rank()) +
               " of this job already. Give every rank a --rank of its own.");
}

absl::Status RankJobUnknown(const v1::RankHello& hello) {
  return Refusal(absl::StatusCode::kNotFound, "RANK_JOB_UNKNOWN", hello)
      .Message("There is no job of this id that ranks could join.");
}

absl::StatusOr<std::string> ReadJoinToken(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    return Unusable(std::string("cannot be opened: ") + strerror(errno));
  }
  struct stat info;
  const bool seen = fstat(fd, &info) == 0;
  char text[kMostToken] = {};
  const ssize_t size = seen ? read(fd, text, sizeof(text)) : -1;
  close(fd);
  if (size < 0) return Unusable("cannot be read");
  if ((info.st_mode & S_IRWXO) != 0) {
    return Unusable("can be read by everybody; chmod o= it");
  }
  const std::string token(absl::StripAsciiWhitespace(
      absl::string_view(text, static_cast<size_t>(size))));
  if (token.size() < kLeastToken) {
    return Unusable("has fewer than 32 characters");
  }
  return token;
}

}  // namespace gradwire
