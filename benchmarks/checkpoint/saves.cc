// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/checkpoint/saves.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/status/status.h"
#include "absl/synchronization/notification.h"
#include "base/status.h"
#include "benchmarks/kernels/json_line.h"

ABSL_FLAG(std::string, directory, "/tmp/checkpoint-benchmark",
          "where checkpoints are written, and removed again");
ABSL_FLAG(int, rounds, 3, "saves; and three times as many steps without");
ABSL_FLAG(std::string, commit, "", "commit of the build, for the record");

namespace gradwire {
namespace {

double Now() {
  return std::chrono::duration<double>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void Print(const char* what, std::vector<double> values) {
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  std::printf("%-38s median %8.3f  min %8.3f  max %8.3f s\n", what,
              Median(values), *least, *most);
}

// Median, least and most.
std::vector<double> Milliseconds(const std::vector<double>& seconds) {
  const auto [least, most] =
      std::minmax_element(seconds.begin(), seconds.end());
  return {1e3 * Median(seconds), 1e3 * *least, 1e3 * *most};
}

struct StepTime {
  double backward = 0, optimizer = 0;
  double total() const { return backward + optimizer; }
};

absl::StatusOr<StepTime> Step(LocalStep& step) {
  StepTime time;
  const double begin = Now();
  GW_RETURN_IF_ERROR(step.ForwardBackward().status());
  const double middle = Now();
  GW_RETURN_IF_ERROR(step.OptimStep());
  time.backward = middle - begin;
  time.optimizer = Now() - middle;
  return time;
}

struct Plain {
  double step = 0, optimizer = 0;
};

absl::StatusOr<Plain> MeasurePlain(LocalStep& step) {
  std::vector<double> totals, optimizers;
  for (int i = 0; i < 3 * absl::GetFlag(FLAGS_rounds); ++i) {
    GW_ASSIGN_OR_RETURN(const StepTime time, Step(step));
    totals.push_back(time.total());
    optimizers.push_back(time.optimizer);
  }
  Print("step without a save", totals);
  Print("  its optimizer step", optimizers);
  return Plain{Median(totals), Median(optimizers)};
}

// One kind of save. Each of its calls saves under a name of its own.
struct Saves {
  std::string name;
  std::function<absl::StatusOr<std::string>()> still;  // what it has written
  std::function<absl::Status(std::function<void(const absl::Status&)>)> begin;
  std::function<absl::StatusOr<std::string>()> publish;
  bool same = true;  // both write the same
  std::function<void()> clear = [] {};
};

Saves Checkpoints(Trainer& trainer) {
  const std::string path = absl::GetFlag(FLAGS_directory) + "/checkpoint";
  const auto end = [](const SavedState& saved) {
    return saved.digest + " " + std::to_string(saved.bytes);
  };
  Saves saves;
  saves.name = "checkpoint";
  saves.clear = [path] { std::filesystem::remove_all(path); };
  saves.still = [&trainer, path, end]() -> absl::StatusOr<std::string> {
    GW_ASSIGN_OR_RETURN(const SavedState saved, trainer.SaveState(path, {}));
    return end(saved);
  };
  saves.begin = [&trainer, path](auto written) {
    return trainer.BeginSave(path, false, std::move(written));
  };
  saves.publish = [&trainer, end]() -> absl::StatusOr<std::string> {
    GW_ASSIGN_OR_RETURN(const SavedState saved, trainer.PublishSave({}));
    return end(saved);
  };
  return saves;
}

// Of deltas each is to the one before it.
Saves Snapshots(Trainer& trainer, SnapshotType type) {
  const auto next = [type, number = 0]() mutable {
    SnapshotOptions options;
    options.directory = absl::GetFlag(FLAGS_directory) + "/snapshots/" +
                        std::to_string(number++);
    options.type = type;
    return options;
  };
  const auto end = [](const ExportOutcome& outcome) {
    return outcome.digest + " " + std::to_string(outcome.bytes);
  };
  Saves saves;
  const bool delta = type == SnapshotType::kDelta;
  saves.name = delta ? "delta" : "base";
  saves.same = !delta;
  const auto options = std::make_shared<std::function<SnapshotOptions()>>(next);
  saves.still = [&trainer, options, end]() -> absl::StatusOr<std::string> {
    GW_ASSIGN_OR_RETURN(const ExportOutcome outcome,
                        trainer.SaveSnapshot((*options)()));
    return end(outcome);
  };
  saves.begin = [&trainer, options](auto written) {
    trainer.BeginSnapshot((*options)(), std::move(written));
    return absl::OkStatus();
  };
  saves.publish = [&trainer, end]() -> absl::StatusOr<std::string> {
    GW_ASSIGN_OR_RETURN(const ExportOutcome outcome, trainer.PublishSnapshot());
    return end(outcome);
  };
  return saves;
}

absl::Status MeasureSaves(LocalStep& step, const RunInfo& run,
                          const Plain& plain, const Saves& saves) {
  std::vector<double> still, first, written_after, stalls, extra;
  for (int round = 0; round < absl::GetFlag(FLAGS_rounds); ++round) {
    double begin = Now();
    GW_ASSIGN_OR_RETURN(const std::string want, saves.still());
    still.push_back(Now() - begin);
    saves.clear();
    // What a delta has to tell.
    if (!saves.same) GW_RETURN_IF_ERROR(Step(step).status());

    absl::Notification written;
    absl::Status status;
    double written_at = 0;
    begin = Now();
    GW_RETURN_IF_ERROR(saves.begin([&](const absl::Status& end) {
      status = end;
      written_at = Now();
      written.Notify();
    }));
    double stall = Now() - begin;
    double total = stall;
    int steps = 0;
    do {
      GW_ASSIGN_OR_RETURN(const StepTime time, Step(step));
      stall += std::max(0.0, time.optimizer - plain.optimizer);
      total += time.total();
      if (++steps == 1) first.push_back(total);
    } while (!written.HasBeenNotified());
    GW_RETURN_IF_ERROR(status);
    written_after.push_back(written_at - begin);
    const double publish = Now();
    GW_ASSIGN_OR_RETURN(const std::string saved, saves.publish());
    stall += Now() - publish;
    total += Now() - publish;
    saves.clear();
    if (saves.same && saved != want) {
      return absl::InternalError("a save beside the training has other bytes");
    }
    stalls.push_back(stall);
    extra.push_back(total - steps * plain.step);
  }
  std::printf("--- %s\n", saves.name.c_str());
  Print("save that the training stands still for", still);
  Print("first step beside a save", first);
  Print("  on the disk after", written_after);
  Print("  all that it adds to the steps", extra);
  Print("  of it the stall", stalls);
  std::printf("stall: %.1f %% of a step; standing still: %.1f %%\n",
              100 * Median(stalls) / plain.step,
              100 * Median(still) / plain.step);
  auto line = NewLine(run, saves.name);
  line["rounds"] = stalls.size();
  line["ceil_gemm"] = line["ceil_copy"] = nullptr;
  line["ms"] = Milliseconds(stalls);
  line["still_ms"] = Milliseconds(still);
  line["step_ms"] = 1e3 * plain.step;
  line["baseline"] = {{"name", "gradwire, standing still"}};
  line["ratio"] = Median(still) / Median(stalls);
  PrintLine(line);
  return absl::OkStatus();
}

}  // namespace

absl::Status RunSaves(LocalStep& step, const std::string& device, int threads) {
  RunInfo run;
  run.bench = "checkpoint";
  run.commit = absl::GetFlag(FLAGS_commit);
  run.device = device;
  run.threads = threads;
  run.model = LocalStep::Model();
  run.act = LocalStep::Act();
  run.length = step.length();
  run.tokens = step.tokens();
  std::printf("%s, %s, batches of %ld tokens\n", device.c_str(),
              DTypeName(run.act), static_cast<long>(run.tokens));
  // The first step waits for memory.
  GW_RETURN_IF_ERROR(Step(step).status());
  GW_ASSIGN_OR_RETURN(const Plain plain, MeasurePlain(step));
  GW_RETURN_IF_ERROR(
      MeasureSaves(step, run, plain, Checkpoints(step.trainer())));
  const std::string snapshots = absl::GetFlag(FLAGS_directory) + "/snapshots";
  for (const SnapshotType type : {SnapshotType::kDelta, SnapshotType::kBase}) {
    std::filesystem::remove_all(snapshots);
    if (type == SnapshotType::kDelta) {
      GW_RETURN_IF_ERROR(step.trainer().Export(snapshots + "/first").status());
      GW_RETURN_IF_ERROR(Step(step).status());
    }
    GW_RETURN_IF_ERROR(
        MeasureSaves(step, run, plain, Snapshots(step.trainer(), type)));
  }
  std::filesystem::remove_all(snapshots);
  return absl::OkStatus();
}

int RunProgram(int argc, char** argv, absl::Status (*program)()) {
  absl::ParseCommandLine(argc, argv);
  const absl::Status status = program();
  if (status.ok()) return EXIT_SUCCESS;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return EXIT_FAILURE;
}

}  // namespace gradwire
