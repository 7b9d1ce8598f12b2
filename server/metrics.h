// SPDX-License-Identifier: Apache-2.0
// The server's Prometheus families. docs/metrics.md lists them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "gradwire/v1/jobs.pb.h"

namespace gradwire {

// Thread rule: all methods from any thread. Label values are of fixed sets, or
// jobs, which leave with RemoveJob.
class Metrics {
 public:
  Metrics();
  ~Metrics();

  // What jobs compute with, "cpu" at first: a label. Before any thread's use.
  void SetDevice(const std::string& device) { device_ = device; }

  // Text exposition format 0.0.4.
  std::string Scrape();

  void SetJobState(const std::string& job_id, const std::string& state,
                   const std::string& phase);
  void RemoveJob(const std::string& job_id);
  void SetRankUp(const std::string& job_id, int rank, bool up);
  void SetHeartbeatAge(const std::string& job_id, int rank, double seconds);
  void CountRestart(const std::string& job_id, const std::string& cause);
  void SetMemory(const std::string& job_id, const v1::MemoryPlan& plan);
  void SetMemoryUse(const std::string& job_id, const v1::MemoryUse& use);
  // What has been added to `before`, of the same ranks.
  void CountCollectives(const std::string& job_id,
                        const v1::CollectiveUse& before,
                        const v1::CollectiveUse& now);
  void SetQueue(const std::string& job_id, int64_t ops, int64_t bytes);

  struct OperationMeasure {
    std::string job_id;
    std::string op;       // "forward", ...
    std::string outcome;  // ok, user_error, server_error, cancelled
    std::string reason;   // of a failure
    double queue_seconds = 0;
    double execution_seconds = 0;  // 0: never ran
    int64_t tokens = 0;
    // Of these, those with a weight, of what adds a gradient; -1: it adds none.
    int64_t trained = -1;
  };
  void CountOperation(const OperationMeasure& measure);
  void SetStep(const std::string& job_id, int64_t step);
  // Of an optimizer step.
  void SetGradNorm(const std::string& job_id, double grad_norm,
                   double learning_rate);
  void SetLoss(const std::string& job_id, double loss);

  // Of copies in an object store; outcome: ok, error.
  void CountUpload(const std::string& outcome);
  void CountUploadBytes(int64_t bytes);
  void SetUploadsWaiting(int64_t count);

  void CountDedup(const std::string& op, const std::string& outcome);
  void CountRejected(const std::string& reason);
  void RpcStarted(const std::string& service, const std::string& method,
                  const std::string& type);
  void RpcHandled(const std::string& service, const std::string& method,
                  const std::string& type, const std::string& code);

 private:
  struct State;
  std::string device_ = "cpu";
  std::unique_ptr<State> state_;
};

}  // namespace gradwire
