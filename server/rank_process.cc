// SPDX-License-Identifier: Apache-2.0
#include "server/rank_process.h"

#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <utility>

#include "base/error.h"

extern char** environ;

namespace gradwire {

absl::StatusOr<std::unique_ptr<RankProcess>> RankProcess::Start(
    const std::vector<std::string>& argv,
    const std::map<std::string, std::string>& environment,
    std::function<void(int)> on_exit) {
  std::vector<char*> arguments;
  for (const std::string& arg : argv) {
    arguments.push_back(const_cast<char*>(arg.c_str()));
  }
  arguments.push_back(nullptr);
  std::vector<std::string> variables;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string variable = *entry;
    if (environment.count(variable.substr(0, variable.find('='))) == 0) {
      variables.push_back(variable);
    }
  }
  for (const auto& [name, value] : environment) {
    variables.push_back(name + "=" + value);
  }
  std::vector<char*> envp;
  for (std::string& variable : variables) envp.push_back(variable.data());
  envp.push_back(nullptr);

  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  // Its own group: Ctrl-C at the terminal is for the supervisor alone.
  posix_spawnattr_setpgroup(&attributes, 0);
  sigset_t none, defaults;
  sigemptyset(&none);
  sigfillset(&defaults);
  sigdelset(&defaults, SIGKILL);
  sigdelset(&defaults, SIGSTOP);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &defaults);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP |
                                            POSIX_SPAWN_SETSIGMASK |
                                            POSIX_SPAWN_SETSIGDEF);
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", 0, 0);
  std::unique_ptr<RankProcess> process(new RankProcess);
  const int failure = posix_spawn(&process->pid_, arguments[0], &files,
                                  &attributes, arguments.data(), envp.data());
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&files);
  if (failure != 0) {
    process->exited_ = true;
    return ErrorBuilder(absl::StatusCode::kInternal, "RANK_START_FAILED")
        .Server()
        .With("errno", failure)
        .Message(std::string("The rank's process could not be started: ") +
                 strerror(failure) +
                 ". gradwire_rank must lie beside gradwired, or be named by "
                 "--rank_binary.");
  }
  process->watcher_ = std::thread(
      [p = process.get(), on_exit = std::move(on_exit)] { p->Watch(on_exit); });
  return process;
}

void RankProcess::Watch(const std::function<void(int)>& on_exit) {
  // Seen but not reaped: Kill() must not meet another process of this id.
  siginfo_t info;
  while (waitid(P_PID, pid_, &info, WEXITED | WNOWAIT) != 0 && errno == EINTR) {
  }
  int wait_status = 0;
  {
    absl::MutexLock lock(&mu_);
    while (waitpid(pid_, &wait_status, 0) < 0 && errno == EINTR) {
    }
    exited_ = true;
  }
  on_exit(wait_status);
}

void RankProcess::Kill() {
  absl::MutexLock lock(&mu_);
  if (!exited_) kill(pid_, SIGKILL);
}

RankProcess::~RankProcess() {
  Kill();
  if (watcher_.joinable()) watcher_.join();
}

}  // namespace gradwire
