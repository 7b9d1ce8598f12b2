// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/crash_disk.h"

#include <algorithm>
#include <random>
#include <utility>

#include "base/check.h"
#include "checkpoint/file_system.h"

namespace gradwire {
namespace {

bool ChangesNamesOf(const DiskEvent& event, const std::string& directory) {
  return DirectoryOf(event.path) == directory ||
         (!event.to.empty() && DirectoryOf(event.to) == directory);
}

bool IsWithin(const std::string& path, const std::string& directory) {
  return path.size() > directory.size() && path.starts_with(directory) &&
         path[directory.size()] == '/';
}

bool MovesDirectory(const DiskEvent& event) {
  return event.kind == DiskEvent::Kind::kExchange ||
         (event.kind == DiskEvent::Kind::kRename && event.file < 0);
}

// The path of what was at `path` before directories were moved.
std::string Moved(const std::string& path, const DiskEvent& move) {
  if (path == move.path || IsWithin(path, move.path)) {
    return move.to + path.substr(move.path.size());
  }
  if (move.kind == DiskEvent::Kind::kExchange &&
      (path == move.to || IsWithin(path, move.to))) {
    return move.path + path.substr(move.to.size());
  }
  return path;
}

// Where the directory at `path` was before.
std::string PlaceBefore(const std::string& path, const DiskEvent& move) {
  if (path == move.to) return move.path;
  if (move.kind == DiskEvent::Kind::kExchange && path == move.path) {
    return move.to;
  }
  return path;
}

}  // namespace

CrashDisk::CrashDisk(const DiskImage& start, int64_t page_bytes)
    : page_bytes_(page_bytes) {
  for (const std::string& path : start.directories) names_[path] = -1;
  for (const auto& [path, content] : start.files) {
    names_[path] = num_files();
    File& made = files_.emplace_back();
    Write(made, 0, content);
    made.length.Synced();
    for (auto& page : made.pages) page.Synced();
  }
  synced_names_ = names_;
}

void CrashDisk::Change(const DiskEvent& event, Names& names) {
  switch (event.kind) {
    case DiskEvent::Kind::kLink:
      names[event.path] = event.file;
      break;
    case DiskEvent::Kind::kUnlink:
      names.erase(event.path);
      break;
    case DiskEvent::Kind::kRename:
    case DiskEvent::Kind::kExchange: {
      if (event.kind == DiskEvent::Kind::kRename) {
        names.erase(event.path);
        names[event.to] = event.file;
      } else {
        // What is on the disk names both, whether or not their making was.
        names[event.path] = names[event.to] = -1;
      }
      if (!MovesDirectory(event)) break;
      // What is in a directory goes with it.
      Names moved;
      for (const auto& [path, number] : names) {
        moved[Moved(path, event)] = number;
      }
      names = std::move(moved);
      break;
    }
    default:
      GW_CHECK(false);
  }
}

void CrashDisk::Apply(const DiskEvent& event) {
  switch (event.kind) {
    case DiskEvent::Kind::kWrite:
      Write(file(event.file), event.offset, event.bytes);
      break;
    case DiskEvent::Kind::kTruncate:
      Truncate(file(event.file), event.offset);
      break;
    case DiskEvent::Kind::kSync:
      file(event.file).length.Synced();
      for (auto& page : file(event.file).pages) page.Synced();
      break;
    case DiskEvent::Kind::kFailedSync:
      file(event.file).length.SyncFailed();
      for (auto& page : file(event.file).pages) page.SyncFailed();
      break;
    case DiskEvent::Kind::kLink:
    case DiskEvent::Kind::kUnlink:
    case DiskEvent::Kind::kRename:
    case DiskEvent::Kind::kExchange:
      if (event.kind == DiskEvent::Kind::kLink && event.file == num_files()) {
        files_.emplace_back();
      }
      Change(event, names_);
      unsynced_changes_.push_back(event);
      break;
    case DiskEvent::Kind::kSyncDirectory:
      SyncDirectory(event.path);
      break;
  }
}

void CrashDisk::SyncDirectory(const std::string& path) {
  // Changes bear the names of their time: from the last to the first, where the
  // directory was then.
  std::vector<bool> is_synced(unsynced_changes_.size());
  std::string directory = path;
  for (size_t i = unsynced_changes_.size(); i-- > 0;) {
    const DiskEvent& change = unsynced_changes_[i];
    is_synced[i] = ChangesNamesOf(change, directory);
    if (MovesDirectory(change)) directory = PlaceBefore(directory, change);
  }
  std::vector<DiskEvent> rest;
  for (size_t i = 0; i < unsynced_changes_.size(); ++i) {
    DiskEvent& change = unsynced_changes_[i];
    if (!is_synced[i]) {
      rest.push_back(std::move(change));
      continue;
    }
    Change(change, synced_names_);
    if (!MovesDirectory(change)) continue;
    // What is still to happen in the directory happens where it is by then.
    for (DiskEvent& earlier : rest) {
      earlier.path = Moved(earlier.path, change);
      if (!earlier.to.empty()) earlier.to = Moved(earlier.to, change);
    }
  }
  unsynced_changes_ = std::move(rest);
}

void CrashDisk::Write(File& file, int64_t offset, const std::string& bytes) {
  const int64_t end = offset + static_cast<int64_t>(bytes.size());
  const int64_t length = static_cast<int64_t>(file.content.size());
  if (end > length) file.content.resize(static_cast<size_t>(end), '\0');
  file.content.replace(static_cast<size_t>(offset), bytes.size(), bytes);
  // A write that ends at the end writes the length again.
  if (end >= length) file.length.Set(end);
  SetPages(file, std::min(offset, length), end);
}

void CrashDisk::Truncate(File& file, int64_t length) {
  const int64_t before = static_cast<int64_t>(file.content.size());
  file.content.resize(static_cast<size_t>(length), '\0');
  file.length.Set(length);
  SetPages(file, std::min(before, length), std::max(before, length));
}

void CrashDisk::SetPages(File& file, int64_t begin, int64_t end) {
  const int64_t length = static_cast<int64_t>(file.content.size());
  const std::string zeros(static_cast<size_t>(page_bytes_), '\0');
  for (int64_t page = begin / page_bytes_; page * page_bytes_ < end; ++page) {
    while (std::ssize(file.pages) <= page) file.pages.emplace_back(zeros);
    const int64_t at = page * page_bytes_;
    std::string bytes;
    if (at < length) {
      bytes = file.content.substr(static_cast<size_t>(at), zeros.size());
    }
    bytes.resize(zeros.size(), '\0');
    file.pages[static_cast<size_t>(page)].Set(std::move(bytes));
  }
}

DiskImage CrashDisk::Image(const Names& names,
                           const std::function<std::string(int)>& content) {
  DiskImage image;
  // In ascending order a directory comes before what is in it.
  for (const auto& [path, number] : names) {
    const std::string directory = DirectoryOf(path);
    if (directory != "/" && !image.directories.contains(directory)) continue;
    if (number < 0) {
      image.directories.insert(path);
    } else {
      image.files[path] = content(number);
    }
  }
  return image;
}

DiskImage CrashDisk::Latest() const {
  return Image(names_, [this](int number) { return content(number); });
}

// Changes of names in order, then of each file the length and the pages.
std::vector<CrashDisk::Choice> CrashDisk::Choices() const {
  std::vector<Choice> choices(unsynced_changes_.size(), Choice{.versions = 2});
  for (const File& file : files_) {
    choices.push_back({.versions = std::ssize(file.length.versions())});
    for (const auto& page : file.pages) {
      choices.push_back({.versions = std::ssize(page.versions())});
    }
  }
  return choices;
}

DiskImage CrashDisk::Chosen(const std::vector<Choice>& choices) const {
  auto next = choices.begin();
  const auto version_of = [&](const auto& uncertain) {
    return uncertain.versions()[static_cast<size_t>((next++)->chosen)];
  };
  Names names = synced_names_;
  for (const DiskEvent& change : unsynced_changes_) {
    if ((next++)->chosen == 1) Change(change, names);
  }
  std::vector<std::string> contents;
  for (const File& file : files_) {
    const int64_t length = version_of(file.length);
    std::string& content = contents.emplace_back();
    for (const auto& page : file.pages) content += version_of(page);
    content.resize(static_cast<size_t>(length), '\0');
  }
  return Image(
      names, [&](int number) { return contents[static_cast<size_t>(number)]; });
}

int64_t CrashDisk::ForEachPowerLoss(
    int64_t limit, uint64_t seed,
    const std::function<void(const DiskImage&)>& check) const {
  std::vector<Choice> choices = Choices();
  int64_t combinations = 1;
  for (const Choice& choice : choices) {
    combinations = std::min(combinations * choice.versions, limit + 1);
  }
  std::set<std::pair<std::map<std::string, std::string>, std::set<std::string>>>
      seen;
  const auto try_chosen = [&] {
    const DiskImage image = Chosen(choices);
    if (seen.emplace(image.files, image.directories).second) check(image);
  };

  if (combinations <= limit) {
    for (bool more = true; more;) {
      try_chosen();
      more = false;
      for (Choice& choice : choices) {
        if (++choice.chosen < choice.versions) {
          more = true;
          break;
        }
        choice.chosen = 0;
      }
    }
    return std::ssize(seen);
  }

  std::mt19937_64 random(seed);
  const auto draw = [&](int64_t count) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(count));
  };
  for (int64_t i = 0; i < limit; ++i) {
    // Of a hundred: 0 is the emptiest disk, 100 the fullest.
    const int64_t share = i == 0 ? 0 : i == 1 ? 100 : draw(101);
    for (Choice& choice : choices) {
      choice.chosen = draw(100) < share ? choice.versions - 1 : 0;
    }
    // Every other disk is empty or full, but for a few changes: what goes wrong
    // mostly takes few, and the right ones are hardly drawn among many.
    if (i > 1 && i % 2 == 0) {
      const bool full = draw(2) == 0;
      for (Choice& choice : choices) {
        choice.chosen = full ? choice.versions - 1 : 0;
      }
    }
    for (int64_t few = i > 1 ? 1 + draw(3) : 0; few > 0;) {
      Choice& choice = choices[static_cast<size_t>(draw(std::ssize(choices)))];
      // Most of a disk has one version. There is some choice, or all
      // combinations would have been tried.
      if (choice.versions == 1) continue;
      choice.chosen = draw(choice.versions);
      --few;
    }
    try_chosen();
  }
  return std::ssize(seen);
}

}  // namespace gradwire
