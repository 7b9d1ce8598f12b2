// SPDX-License-Identifier: Apache-2.0
#include "server/metrics.h"

#include <dirent.h>
#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <map>
#include <tuple>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "server/version.h"

namespace gradwire {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using Labels = std::map<std::string, std::string>;

constexpr const char* kStates[] = {"creating",  "pending",   "running",
                                   "idle",      "paused",    "failed",
                                   "cancelled", "completed", "deleting"};
constexpr const char* kPhases[] = {"placing", "loading",    "collectives",
                                   "warming", "ready",      "recovering",
                                   "saving",  "preempting", "draining"};

// Seconds of operations.
const Histogram::BucketBoundaries kSeconds = {
    .001, .0025, .005, .01, .025, .05, .1,  .25, .5,
    1,    2.5,   5,    10,  30,   60,  120, 300, 600};

double UnixNow() {
  return std::chrono::duration<double>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

int64_t ResidentBytes() {
  long pages = 0, resident = 0;
  if (FILE* file = std::fopen("/proc/self/statm", "r"); file != nullptr) {
    if (std::fscanf(file, "%ld %ld", &pages, &resident) != 2) resident = 0;
    std::fclose(file);
  }
  return static_cast<int64_t>(resident) * sysconf(_SC_PAGESIZE);
}

int64_t OpenFiles() {
  DIR* folder = opendir("/proc/self/fd");
  if (folder == nullptr) return 0;
  int64_t count = -3;  // ".", "..", and this one
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count;
}

double CpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) +
           1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace

struct Metrics::State {
  prometheus::Registry registry;
  absl::Mutex mu;
  // What RemoveJob takes out again.
  std::map<std::string, std::vector<std::pair<Family<Gauge>*, Gauge*>>> gauges
      ABSL_GUARDED_BY(mu);
  std::map<std::string, std::vector<std::pair<Family<Counter>*, Counter*>>>
      counters ABSL_GUARDED_BY(mu);

  Family<Gauge>& MakeGauge(const char* name, const char* help) {
    return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
  }
  Family<Counter>& MakeCounter(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
  }
  Family<Histogram>& MakeHistogram(const char* name, const char* help) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(
        registry);
  }
  Gauge& OfJob(Family<Gauge>& family, const std::string& job_id,
               Labels labels = {}) {
    labels["job_id"] = job_id;
    const bool known = family.Has(labels);
    Gauge& gauge = family.Add(labels);
    if (!known) {
      absl::MutexLock lock(&mu);
      gauges[job_id].emplace_back(&family, &gauge);
    }
    return gauge;
  }
  Counter& OfJob(Family<Counter>& family, const std::string& job_id,
                 Labels labels) {
    labels["job_id"] = job_id;
    const bool known = family.Has(labels);
    Counter& counter = family.Add(labels);
    if (!known) {
      absl::MutexLock lock(&mu);
      counters[job_id].emplace_back(&family, &counter);
    }
    return counter;
  }

  Family<Gauge>& build_info =
      MakeGauge("gradwire_build_info", "1; the build as labels.");
  Family<Gauge>& job_state =
      MakeGauge("gradwire_job_state", "1 for the state a job is in, else 0.");
  Family<Gauge>& job_phase =
      MakeGauge("gradwire_job_phase", "1 for the phase a job is in, else 0.");
  Family<Gauge>& job_progress =
      MakeGauge("gradwire_job_last_progress_timestamp_seconds",
                "When the job last changed state or ended an operation.");
  Family<Gauge>& job_step =
      MakeGauge("gradwire_job_step", "Optimizer steps applied.");
  Family<Counter>& restarts = MakeCounter(
      "gradwire_job_restarts_total", "Restarts, by what made them necessary.");
  Family<Counter>& uploads =
      MakeCounter("gradwire_object_store_uploads_total",
                  "Checkpoints and snapshots copied, by outcome of a try.");
  Family<Counter>& upload_bytes = MakeCounter(
      "gradwire_object_store_upload_bytes_total", "Bytes of such copies.");
  Family<Gauge>& uploads_waiting =
      MakeGauge("gradwire_object_store_uploads_waiting",
                "Checkpoints and snapshots that have no copy yet.");
  Family<Gauge>& queue_depth =
      MakeGauge("gradwire_ops_queue_depth", "Operations that wait.");
  Family<Gauge>& queue_bytes =
      MakeGauge("gradwire_queue_bytes", "Payload bytes that wait.");
  Family<Counter>& ops =
      MakeCounter("gradwire_op_total", "Operations ended, by outcome.");
  Family<Histogram>& queue_seconds = MakeHistogram(
      "gradwire_op_queue_seconds", "Time between submission and start.");
  Family<Histogram>& execution_seconds = MakeHistogram(
      "gradwire_op_execution_seconds", "Time between start and end.");
  Family<Counter>& tokens =
      MakeCounter("gradwire_tokens_total", "Tokens of ended operations.");
  Family<Counter>& optim_steps =
      MakeCounter("gradwire_optim_steps_total", "Optimizer steps, by outcome.");
  Family<Gauge>& loss =
      MakeGauge("gradwire_loss", "loss:sum of the last forward_backward.");
  Family<Gauge>& grad_norm = MakeGauge(
      "gradwire_grad_norm", "Gradient norm of the last step, before clipping.");
  Family<Gauge>& learning_rate =
      MakeGauge("gradwire_learning_rate", "Learning rate of the last step.");
  Family<Counter>& nonfinite = MakeCounter(
      "gradwire_nonfinite_total", "Values that were not finite, by place.");
  Family<Gauge>& rank_up =
      MakeGauge("gradwire_rank_up", "Whether a rank is connected.");
  Family<Gauge>& heartbeat_age =
      MakeGauge("gradwire_rank_heartbeat_age_seconds",
                "Time since a rank's last sign of life.");
  Family<Gauge>& device_memory =
      MakeGauge("gradwire_device_memory_bytes", "The memory plan, by kind.");
  Family<Gauge>& memory_used =
      MakeGauge("gradwire_device_memory_used_bytes",
                "The most memory in use, or kept for it, at once, by kind.");
  Family<Counter>& collective_bytes =
      MakeCounter("gradwire_collective_bytes_total", "Sent between ranks.");
  Family<Counter>& collective_busy =
      MakeCounter("gradwire_collective_busy_seconds_total",
                  "Collectives ran, beside a rank's own work.");
  Family<Counter>& collective_wait =
      MakeCounter("gradwire_collective_wait_seconds_total",
                  "A rank's own work waited for a collective.");
  Family<Counter>& dedup =
      MakeCounter("gradwire_rpc_dedup_total", "Requests that came twice.");
  Family<Counter>& rejected =
      MakeCounter("gradwire_rpc_rejected_total", "Requests refused unread.");
  Family<Counter>& rpc_started =
      MakeCounter("grpc_server_started_total", "Calls begun.");
  Family<Counter>& rpc_handled =
      MakeCounter("grpc_server_handled_total", "Calls ended, by code.");
  Family<Gauge>& rpc_in_flight =
      MakeGauge("gradwire_rpc_in_flight", "Calls that run.");
  Family<Gauge>& resident =
      MakeGauge("process_resident_memory_bytes", "Resident memory.");
  Family<Gauge>& start_time =
      MakeGauge("process_start_time_seconds", "When the process began.");
  Family<Counter>& cpu =
      MakeCounter("process_cpu_seconds_total", "User and system time.");
  Family<Gauge>& open_files =
      MakeGauge("process_open_fds", "Open file descriptors.");
};

Metrics::Metrics() : state_(std::make_unique<State>()) {
  state_->build_info
      .Add({{"version", kVersion}, {"commit", ""}, {"cuda", ""}, {"nccl", ""}})
      .Set(1);
  state_->start_time.Add({}).Set(UnixNow());
  // Counters begin at 0, so that rates see their first event.
  for (const char* reason : {"queue_full", "too_large", "draining"}) {
    state_->rejected.Add({{"reason", reason}});
  }
  for (const char* op :
       {"forward", "forward_backward", "backward", "optim_step", "zero_grad",
        "save_snapshot", "save_state", "load_state", "unload_model",
        "release_activations"}) {
    for (const char* outcome : {"replayed", "joined", "conflict"}) {
      state_->dedup.Add({{"op", op}, {"outcome", outcome}});
    }
    for (const char* outcome :
         {"ok", "user_error", "server_error", "cancelled"}) {
      state_->ops.Add({{"op", op}, {"outcome", outcome}});
    }
  }
}
Metrics::~Metrics() = default;

std::string Metrics::Scrape() {
  state_->resident.Add({}).Set(static_cast<double>(ResidentBytes()));
  state_->open_files.Add({}).Set(static_cast<double>(OpenFiles()));
  Counter& cpu = state_->cpu.Add({});
  const double more = CpuSeconds() - cpu.Value();
  if (more > 0) cpu.Increment(more);
  return prometheus::TextSerializer().Serialize(state_->registry.Collect());
}

void Metrics::SetJobState(const std::string& job_id, const std::string& state,
                          const std::string& phase) {
  for (const char* name : kStates) {
    state_->OfJob(state_->job_state, job_id, {{"state", name}})
        .Set(state == name ? 1 : 0);
  }
  for (const char* name : kPhases) {
    state_->OfJob(state_->job_phase, job_id, {{"phase", name}})
        .Set(phase == name ? 1 : 0);
  }
  for (const char* cause : {"rank_exit", "rank_signal", "hang", "oom", "node",
                            "storage", "operator"}) {
    state_->OfJob(state_->restarts, job_id, {{"cause", cause}});
  }
  for (const char* where : {"client_grad", "logprob", "grad"}) {
    state_->OfJob(state_->nonfinite, job_id, {{"where", where}});
  }
  state_->OfJob(state_->job_progress, job_id).Set(UnixNow());
}

void Metrics::RemoveJob(const std::string& job_id) {
  absl::MutexLock lock(&state_->mu);
  for (auto [family, gauge] : state_->gauges[job_id]) family->Remove(gauge);
  for (auto [family, counter] : state_->counters[job_id]) {
    family->Remove(counter);
  }
  state_->gauges.erase(job_id);
  state_->counters.erase(job_id);
}

void Metrics::SetRankUp(const std::string& job_id, int rank, bool up) {
  state_
      ->OfJob(state_->rank_up, job_id,
              {{"rank", job_id + "/" + std::to_string(rank)}})
      .Set(up ? 1 : 0);
}

void Metrics::SetHeartbeatAge(const std::string& job_id, int rank,
                              double seconds) {
  state_
      ->OfJob(state_->heartbeat_age, job_id,
              {{"rank", job_id + "/" + std::to_string(rank)}})
      .Set(seconds);
}

void Metrics::CountRestart(const std::string& job_id,
                           const std::string& cause) {
  state_->OfJob(state_->restarts, job_id, {{"cause", cause}}).Increment();
}

void Metrics::SetMemory(const std::string& job_id, const v1::MemoryPlan& plan) {
  const std::pair<const char*, int64_t> kinds[] = {
      {"weights", plan.weights()},     {"grads", plan.gradients()},
      {"optimizer", plan.optimizer()}, {"activations", plan.activations()},
      {"workspace", plan.workspace()}, {"free", plan.available()},
  };
  for (const auto& [kind, bytes] : kinds) {
    state_
        ->OfJob(state_->device_memory, job_id,
                {{"device", device_}, {"kind", kind}})
        .Set(static_cast<double>(bytes));
  }
}

void Metrics::SetMemoryUse(const std::string& job_id,
                           const v1::MemoryUse& use) {
  const std::pair<const char*, int64_t> kinds[] = {
      {"weights", use.weights()},        {"grads", use.gradients()},
      {"optimizer", use.optimizer()},    {"activations", use.activations()},
      {"workspace", use.workspace()},    {"other", use.other()},
      {"resident", use.resident_peak()},
  };
  for (const auto& [kind, bytes] : kinds) {
    state_
        ->OfJob(state_->memory_used, job_id,
                {{"device", device_}, {"kind", kind}})
        .Set(static_cast<double>(bytes));
  }
}

void Metrics::CountCollectives(const std::string& job_id,
                               const v1::CollectiveUse& before,
                               const v1::CollectiveUse& now) {
  const std::tuple<Family<Counter>*, double, double> counts[] = {
      {&state_->collective_bytes, static_cast<double>(before.bytes_sent()),
       static_cast<double>(now.bytes_sent())},
      {&state_->collective_busy, before.busy_seconds(), now.busy_seconds()},
      {&state_->collective_wait, before.wait_seconds(), now.wait_seconds()},
  };
  for (const auto& [family, from, to] : counts) {
    state_->OfJob(*family, job_id, {{"axis", "dp"}})
        .Increment(std::max(0.0, to - from));
  }
}

void Metrics::SetQueue(const std::string& job_id, int64_t ops, int64_t bytes) {
  state_->OfJob(state_->queue_depth, job_id).Set(static_cast<double>(ops));
  state_->OfJob(state_->queue_bytes, job_id).Set(static_cast<double>(bytes));
}

void Metrics::CountOperation(const OperationMeasure& measure) {
  state_->ops.Add({{"op", measure.op}, {"outcome", measure.outcome}})
      .Increment();
  if (measure.execution_seconds > 0) {
    state_->queue_seconds.Add({{"op", measure.op}}, kSeconds)
        .Observe(measure.queue_seconds);
    state_->execution_seconds.Add({{"op", measure.op}}, kSeconds)
        .Observe(measure.execution_seconds);
  }
  const std::pair<const char*, int64_t> kinds[] = {
      {"trained", std::max<int64_t>(0, measure.trained)},
      {"prompt", measure.trained < 0 ? 0 : measure.tokens - measure.trained},
      {"scored", measure.trained < 0 ? measure.tokens : 0}};
  for (const auto& [kind, tokens] : kinds) {
    if (tokens <= 0) continue;
    state_
        ->OfJob(state_->tokens, measure.job_id,
                {{"op", measure.op}, {"kind", kind}})
        .Increment(static_cast<double>(tokens));
  }
  if (measure.op == "optim_step") {
    const std::string outcome = measure.outcome == "ok" ? "applied"
                                : measure.reason == "NONFINITE_GRADIENT"
                                    ? "skipped_nonfinite"
                                    : "rejected";
    state_->OfJob(state_->optim_steps, measure.job_id, {{"outcome", outcome}})
        .Increment();
  }
  const std::map<std::string, std::string> places = {
      {"NONFINITE_INPUT", "client_grad"},
      {"NONFINITE_OUTPUT", "logprob"},
      {"NONFINITE_GRADIENT", "grad"}};
  if (auto it = places.find(measure.reason); it != places.end()) {
    state_->OfJob(state_->nonfinite, measure.job_id, {{"where", it->second}})
        .Increment();
  }
  state_->OfJob(state_->job_progress, measure.job_id).Set(UnixNow());
}

void Metrics::SetStep(const std::string& job_id, int64_t step) {
  state_->OfJob(state_->job_step, job_id).Set(static_cast<double>(step));
}

void Metrics::SetGradNorm(const std::string& job_id, double grad_norm,
                          double learning_rate) {
  state_->OfJob(state_->grad_norm, job_id).Set(grad_norm);
  state_->OfJob(state_->learning_rate, job_id).Set(learning_rate);
}

void Metrics::SetLoss(const std::string& job_id, double loss) {
  state_->OfJob(state_->loss, job_id).Set(loss);
}

void Metrics::CountUpload(const std::string& outcome) {
  state_->uploads.Add({{"outcome", outcome}}).Increment();
}

void Metrics::CountUploadBytes(int64_t bytes) {
  state_->upload_bytes.Add({}).Increment(static_cast<double>(bytes));
}

void Metrics::SetUploadsWaiting(int64_t count) {
  state_->uploads_waiting.Add({}).Set(static_cast<double>(count));
}

void Metrics::CountDedup(const std::string& op, const std::string& outcome) {
  state_->dedup.Add({{"op", op}, {"outcome", outcome}}).Increment();
}

void Metrics::CountRejected(const std::string& reason) {
  state_->rejected.Add({{"reason", reason}}).Increment();
}

void Metrics::RpcStarted(const std::string& service, const std::string& method,
                         const std::string& type) {
  state_->rpc_started
      .Add({{"grpc_service", service},
            {"grpc_method", method},
            {"grpc_type", type}})
      .Increment();
  state_->rpc_in_flight.Add({{"method", method}}).Increment();
}

void Metrics::RpcHandled(const std::string& service, const std::string& method,
                         const std::string& type, const std::string& code) {
  state_->rpc_handled
      .Add({{"grpc_service", service},
            {"grpc_method", method},
            {"grpc_type", type},
            {"grpc_code", code}})
      .Increment();
  state_->rpc_in_flight.Add({{"method", method}}).Decrement();
}

}  // namespace gradwire
