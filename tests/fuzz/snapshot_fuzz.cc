// SPDX-License-Identifier: Apache-2.0
// The manifest of a snapshot, snapshot.json.
#include <string>

#include "base/check.h"
#include "checkpoint/crash_file_system.h"
#include "checkpoint/sealed_text.h"
#include "checkpoint/snapshot/manifest.h"
#include "tests/fuzz/fuzz.h"

namespace gradwire {

std::string FuzzSeed(Dice& dice) {
  SnapshotManifest manifest;
  manifest.name = "s";
  manifest.job = "j";
  manifest.weight_version = 4;
  manifest.optimizer_step = 3;
  manifest.weight_id = std::string(32, 'a');
  manifest.base_model = "m";
  manifest.dtype = "BF16";
  manifest.operation = "o";
  manifest.created_micros = 1'769'904'000'000'001;
  if (dice.OneIn(2)) manifest.expires_micros = 1'769'990'400'000'000;
  if (dice.OneIn(2)) {
    manifest.is_delta = true;
    manifest.parent = "p";
    manifest.parent_id = std::string(32, 'b');
    manifest.base_id = std::string(32, 'c');
    manifest.chain_length = 2;
  }
  const int64_t shards =
      !manifest.is_delta && dice.OneIn(2) ? 1 + dice.Changes() : 1;
  for (int64_t i = 1; i <= shards; ++i) {
    manifest.files.push_back(
        {manifest.is_delta ? kDeltaWeights : BaseWeightsName(i, shards), 1000,
         std::string(32, 'd')});
  }
  if (shards > 1) {
    manifest.files.push_back({kBaseIndex, 100, std::string(32, 'f')});
  }
  if (dice.OneIn(2)) {
    manifest.files.push_back({"config.json", 5, std::string(32, 'e')});
  }
  return SnapshotText(manifest);
}

void FuzzMutate(std::string& input, Dice& dice) {
  if (dice.OneIn(20)) {
    MutatePart(input, dice);
  } else {
    for (int64_t i = dice.Changes(); i > 0; --i) MutateSealed(input, dice);
  }
}

void FuzzOne(const std::string& input) {
  absl::StatusOr<SnapshotManifest> manifest;
  {
    const BoundedMemory bound(20'000, 200, input.size());
    manifest = ParseSnapshot(input);
  }
  if (!manifest.ok()) {
    CheckRefusal(manifest.status());
    return;
  }
  CountAccepted();
  // Every name is one segment: nothing outside of the directory is opened.
  for (const SnapshotFile& file : manifest->files) {
    GW_CHECK(file.name.find('/') == std::string::npos && file.name[0] != '.');
    GW_CHECK(file.bytes >= 0);
    GW_CHECK(manifest->Find(file.name) == &file);
  }
  GW_CHECK(manifest->bytes() >= manifest->weight_bytes());
  GW_CHECK(!manifest->weights().empty() && IsDigest(manifest->weight_digest()));
  GW_CHECK(manifest->parent.find('/') == std::string::npos);

  const auto again = ParseSnapshot(SnapshotText(*manifest));
  GW_CHECK(again.ok());
  SnapshotManifest same = *again;
  same.digest = manifest->digest;
  GW_CHECK(same == *manifest);

  // The name is not only what the manifest says.
  CrashFileSystem files(DiskImage{.files = {{"/d/s/snapshot.json", input}},
                                  .directories = {"/d", "/d/s"}});
  const auto read = ReadSnapshot(files, "/d", "s");
  GW_CHECK(read.ok() == (manifest->name == "s"));
  if (read.ok()) GW_CHECK(*read == *manifest);
}

}  // namespace gradwire
