// SPDX-License-Identifier: Apache-2.0
#include "server/kernels_id.h"

#include <elf.h>
#include <link.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/string_view.h"
#include "server/payload_digest.h"
#include "server/version.h"

namespace gradwire {
namespace {

constexpr absl::string_view kVendor("GNU\0", 4);

size_t Align(size_t n, size_t to) { return (n + to - 1) / to * to; }

// The build id in a segment of notes; empty if there is none.
absl::string_view BuildIdIn(absl::string_view notes, size_t align) {
  ElfW(Nhdr) note;
  while (notes.size() >= sizeof(note)) {
    std::memcpy(&note, notes.data(), sizeof(note));
    const size_t value = Align(sizeof(note) + note.n_namesz, align);
    const size_t end = value + note.n_descsz;
    if (end > notes.size()) break;
    if (note.n_type == NT_GNU_BUILD_ID &&
        notes.substr(sizeof(note), note.n_namesz) == kVendor) {
      return notes.substr(value, note.n_descsz);
    }
    notes.remove_prefix(std::min(notes.size(), Align(end, align)));
  }
  return "";
}

std::string IdOf(const dl_phdr_info& object) {
  const bool program = object.dlpi_name == nullptr || *object.dlpi_name == 0;
  // The kernel's own code, without a file, computes nothing.
  if (!program && *object.dlpi_name != '/') return "";
  for (int i = 0; i < object.dlpi_phnum; ++i) {
    const ElfW(Phdr)& segment = object.dlpi_phdr[i];
    if (segment.p_type != PT_NOTE) continue;
    const absl::string_view notes(
        // What the loader has mapped there.
        reinterpret_cast<const char*>(object.dlpi_addr + segment.p_vaddr),
        segment.p_memsz);
    const auto id = BuildIdIn(notes, segment.p_align == 8 ? 8 : 4);
    if (!id.empty()) return std::string(id);
  }
  struct stat file = {};
  if (stat(program ? "/proc/self/exe" : object.dlpi_name, &file) != 0) {
    return "";
  }
  return std::to_string(file.st_size) + "." + std::to_string(file.st_mtime);
}

int Collect(dl_phdr_info* object, size_t, void* ids) {
  static_cast<std::vector<std::string>*>(ids)->push_back(IdOf(*object));
  return 0;
}

}  // namespace

std::string KernelsId(const std::string& device) {
  std::vector<std::string> ids;
  dl_iterate_phdr(&Collect, &ids);
  std::string all;
  for (const std::string& id : ids) {
    all += std::to_string(id.size()) + ":" + id;
  }
  return device + ", gradwire " + kVersion + ", build " +
         absl::BytesToHexString(PayloadDigest::OfBytes(all).substr(0, 8));
}

}  // namespace gradwire
