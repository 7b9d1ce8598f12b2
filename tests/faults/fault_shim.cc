// SPDX-License-Identifier: Apache-2.0
// Preloaded into a server, counts its calls to files below one directory, or
// those of its rank, and lets one of them fail. Whoever has started the server
// maps the same Control, which outlives it. Used by file_faults.py.
//
// Calls of all threads are counted together, each only where the chosen fault
// can meet it: a disk is not full for who removes a file. Descriptors that are
// not below the directory, sockets and pipes among them, are let through.
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <string_view>

namespace {

enum Fault : int64_t {
  kKillBefore,
  kKillAfter,
  kFull,     // ENOSPC
  kError,    // EIO of what changes a file
  kShort,    // half of a write, and ENOSPC for the next one of this file
  kNoInput,  // EIO of what reads
  kNumFaults,
};

// Little-endian, as file_faults.py has it.
struct Control {
  std::atomic<int64_t> armed;  // else nothing is counted
  int64_t fault;
  int64_t at;                     // the number of the call, from 1; 0 is none
  int64_t calls[kNumFaults];      // that each fault could have met so far
  std::atomic<int64_t> fired;     // 1 once the call was met,
  char what[216];                 // which is this one
  std::atomic<int64_t> resynced;  // 1 if a failed sync was made again as it was
};

enum Kind : unsigned {
  kChanges = 1,
  kReads = 2,
  kNeedsSpace = 4,
  kWrites = 8,
  kSyncs = 16,
};

Control* control = nullptr;
std::string directory;
std::mutex mutex;
// Of a short write: which file is full now. Guarded by mutex.
std::string full;
// Whose sync has failed, until it is changed. Guarded by mutex.
std::string unsynced;

template <typename Function>
Function Real(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}
// The function below this one, looked up once.
#define REAL(name) static const auto real = Real<decltype(&name)>(#name)

// "gradwired", for example.
std::string Program() {
  char path[4096];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path));
  const std::string whole(path, size < 0 ? 0 : static_cast<size_t>(size));
  return whole.substr(whole.rfind('/') + 1);
}

bool Begin() {
  const char* path = getenv("GRADWIRE_FAULT_CONTROL");
  const char* under = getenv("GRADWIRE_FAULT_UNDER");
  const char* program = getenv("GRADWIRE_FAULT_IN");
  if (program != nullptr && program != std::string_view(Program())) {
    // It may be what is started from here.
    return false;
  }
  // Nothing that is started from here.
  unsetenv("LD_PRELOAD");
  if (path == nullptr || under == nullptr) return false;
  directory = under;
  const int fd = Real<decltype(&open)>("open")(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) abort();
  void* mapped =
      mmap(nullptr, sizeof(Control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) abort();
  close(fd);
  control = static_cast<Control*>(mapped);
  return true;
}
// Before main.
[[maybe_unused]] const bool begun = Begin();

bool IsBelow(std::string_view path) {
  return path.substr(0, directory.size()) == directory &&
         (path.size() == directory.size() || path[directory.size()] == '/');
}

std::string PathOf(int fd) {
  char name[64], path[4096];
  snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(name, path, sizeof(path));
  return std::string(path, size < 0 ? 0 : static_cast<size_t>(size));
}

std::string PathOf(int parent, const char* path) {
  if (path[0] == '/' || parent == AT_FDCWD) return path;
  return PathOf(parent) + "/" + path;
}

bool CanMeet(int64_t fault, unsigned kind) {
  switch (fault) {
    case kKillBefore:
    case kKillAfter:
    case kError:
      return (kind & kChanges) != 0;
    case kFull:
      return (kind & kNeedsSpace) != 0;
    case kShort:
      return (kind & kWrites) != 0;
    case kNoInput:
      return (kind & kReads) != 0;
  }
  return false;
}

[[noreturn]] void Die() {
  kill(getpid(), SIGKILL);
  while (true) pause();
}

// A directory is changed by its entries.
bool IsChangeOf(const std::string& changed, const std::string& path) {
  return changed == path || changed == path.substr(0, path.rfind('/'));
}

// One call, from before it to after it.
class Call {
 public:
  Call(unsigned kind, const char* name, std::string path) {
    if (control == nullptr || control->armed.load() == 0 || !IsBelow(path)) {
      return;
    }
    const int before = errno;
    const std::lock_guard<std::mutex> lock(mutex);
    if ((kind & kSyncs) != 0) {
      if (path == unsynced) control->resynced = 1;
    } else if ((kind & kChanges) != 0 && IsChangeOf(unsynced, path)) {
      unsynced.clear();
    }
    errno = before;
    if (path == full && (kind & kWrites) != 0) {
      full.clear();
      error_ = ENOSPC;
      return;
    }
    for (int64_t fault = 0; fault < kNumFaults; ++fault) {
      control->calls[fault] += CanMeet(fault, kind) ? 1 : 0;
    }
    if (!CanMeet(control->fault, kind) ||
        control->calls[control->fault] != control->at) {
      return;
    }
    snprintf(control->what, sizeof(control->what), "%s %s", name,
             path.substr(directory.size()).c_str());
    control->fired = 1;
    switch (control->fault) {
      case kKillBefore:
        Die();
      case kKillAfter:
        dies_ = true;
        break;
      case kShort:
        is_short_ = true;
        full = path;
        break;
      case kFull:
        error_ = ENOSPC;
        break;
      default:
        error_ = EIO;
        break;
    }
    if (error_ != 0 && (kind & kSyncs) != 0) unsynced = path;
  }
  ~Call() {
    if (dies_) Die();
  }
  // What the call fails with instead of being made, or 0.
  int error() const { return error_; }
  size_t Shorten(size_t bytes) const {
    return is_short_ && bytes > 1 ? bytes / 2 : bytes;
  }
  // `make`, unless the call fails.
  template <typename Make>
  auto Result(const Make& make) const -> decltype(make()) {
    if (error_ == 0) return make();
    errno = error_;
    return -1;
  }

 private:
  int error_ = 0;
  bool is_short_ = false;
  bool dies_ = false;
};

unsigned KindOfOpen(int flags, const std::string& path) {
  if ((flags & (O_CREAT | O_TRUNC)) == 0) {
    return (flags & O_ACCMODE) == O_RDONLY ? kReads : kReads | kChanges;
  }
  struct stat found;
  const bool is_there = lstat(path.c_str(), &found) == 0;
  return is_there ? kReads | kChanges : kChanges | kNeedsSpace;
}

mode_t ModeOf(int flags, va_list arguments) {
  const bool creates =
      (flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE;
  return creates ? va_arg(arguments, mode_t) : 0;
}

}  // namespace

extern "C" {

#define OPEN(name)                                               \
  int name(const char* path, int flags, ...) {                   \
    REAL(name);                                                  \
    va_list arguments;                                           \
    va_start(arguments, flags);                                  \
    const mode_t mode = ModeOf(flags, arguments);                \
    va_end(arguments);                                           \
    const Call call(KindOfOpen(flags, path), "open", path);      \
    return call.Result([&] { return real(path, flags, mode); }); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                     \
  int name(int parent, const char* path, int flags, ...) {               \
    REAL(name);                                                          \
    va_list arguments;                                                   \
    va_start(arguments, flags);                                          \
    const mode_t mode = ModeOf(flags, arguments);                        \
    va_end(arguments);                                                   \
    const std::string whole = PathOf(parent, path);                      \
    const Call call(KindOfOpen(flags, whole), "open", whole);            \
    return call.Result([&] { return real(parent, path, flags, mode); }); \
  }
OPENAT(openat)
OPENAT(openat64)

DIR* opendir(const char* path) {
  REAL(opendir);
  const Call call(kReads, "opendir", path);
  if (call.error() == 0) return real(path);
  errno = call.error();
  return nullptr;
}

ssize_t read(int fd, void* out, size_t bytes) {
  REAL(read);
  const Call call(kReads, "read", PathOf(fd));
  return call.Result([&] { return real(fd, out, bytes); });
}

#define PREAD(name, offset_type)                                      \
  ssize_t name(int fd, void* out, size_t bytes, offset_type offset) { \
    REAL(name);                                                       \
    const Call call(kReads, "read", PathOf(fd));                      \
    return call.Result([&] { return real(fd, out, bytes, offset); }); \
  }
PREAD(pread, off_t)
PREAD(pread64, off64_t)

constexpr unsigned kWrite = kChanges | kNeedsSpace | kWrites;

ssize_t write(int fd, const void* data, size_t bytes) {
  REAL(write);
  const Call call(kWrite, "write", PathOf(fd));
  return call.Result([&] { return real(fd, data, call.Shorten(bytes)); });
}

ssize_t writev(int fd, const iovec* parts, int count) {
  REAL(writev);
  const Call call(kWrite, "write", PathOf(fd));
  return call.Result(
      [&] { return real(fd, parts, static_cast<int>(call.Shorten(count))); });
}

#define PWRITE(name, offset_type)                                            \
  ssize_t name(int fd, const void* data, size_t bytes, offset_type offset) { \
    REAL(name);                                                              \
    const Call call(kWrite, "write", PathOf(fd));                            \
    return call.Result(                                                      \
        [&] { return real(fd, data, call.Shorten(bytes), offset); });        \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define TRUNCATE(name, offset_type)                      \
  int name(int fd, offset_type bytes) noexcept {         \
    REAL(name);                                          \
    const Call call(kChanges, "truncate", PathOf(fd));   \
    return call.Result([&] { return real(fd, bytes); }); \
  }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define ALLOCATE(name, offset_type)                                    \
  int name(int fd, int mode, offset_type offset, offset_type bytes) {  \
    REAL(name);                                                        \
    const Call call(kChanges | kNeedsSpace, "allocate", PathOf(fd));   \
    return call.Result([&] { return real(fd, mode, offset, bytes); }); \
  }
ALLOCATE(fallocate, off_t)
ALLOCATE(fallocate64, off64_t)

#define POSIX_ALLOCATE(name, offset_type)                              \
  int name(int fd, offset_type offset, offset_type bytes) {            \
    REAL(name);                                                        \
    const Call call(kChanges | kNeedsSpace, "allocate", PathOf(fd));   \
    return call.error() != 0 ? call.error() : real(fd, offset, bytes); \
  }
POSIX_ALLOCATE(posix_fallocate, off_t)
POSIX_ALLOCATE(posix_fallocate64, off64_t)

// Space can be missing as late as here.
constexpr unsigned kSync = kChanges | kNeedsSpace | kSyncs;

int fsync(int fd) {
  REAL(fsync);
  const Call call(kSync, "sync", PathOf(fd));
  return call.Result([&] { return real(fd); });
}

int fdatasync(int fd) {
  REAL(fdatasync);
  const Call call(kSync, "sync", PathOf(fd));
  return call.Result([&] { return real(fd); });
}

int rename(const char* from, const char* to) noexcept {
  REAL(rename);
  const Call call(kChanges | kNeedsSpace, "rename", to);
  return call.Result([&] { return real(from, to); });
}

int renameat(int from_parent, const char* from, int to_parent,
             const char* to) noexcept {
  REAL(renameat);
  const Call call(kChanges | kNeedsSpace, "rename", PathOf(to_parent, to));
  return call.Result([&] { return real(from_parent, from, to_parent, to); });
}

int renameat2(int from_parent, const char* from, int to_parent, const char* to,
              unsigned flags) noexcept {
  REAL(renameat2);
  const Call call(kChanges | kNeedsSpace, "rename", PathOf(to_parent, to));
  return call.Result(
      [&] { return real(from_parent, from, to_parent, to, flags); });
}

int link(const char* from, const char* to) noexcept {
  REAL(link);
  const Call call(kChanges | kNeedsSpace, "link", to);
  return call.Result([&] { return real(from, to); });
}

int mkdir(const char* path, mode_t mode) noexcept {
  REAL(mkdir);
  const Call call(kChanges | kNeedsSpace, "mkdir", path);
  return call.Result([&] { return real(path, mode); });
}

#define REMOVE(name)                                \
  int name(const char* path) noexcept {             \
    REAL(name);                                     \
    const Call call(kChanges, #name, path);         \
    return call.Result([&] { return real(path); }); \
  }
REMOVE(unlink)
REMOVE(rmdir)
REMOVE(remove)

int unlinkat(int parent, const char* path, int flags) noexcept {
  REAL(unlinkat);
  const Call call(kChanges, "unlink", PathOf(parent, path));
  return call.Result([&] { return real(parent, path, flags); });
}

}  // extern "C"
