// SPDX-License-Identifier: Apache-2.0
// All jobs of this server, the deleted ones included.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/job.h"

namespace gradwire {

using JobPtr = std::shared_ptr<Job>;

// Thread rule: all methods from any thread.
class JobTable {
 public:
  explicit JobTable(JobEnvironment* environment) : environment_(environment) {}

  // Starts a job, or returns the one with this id and specification.
  // Errors: INVALID_ARGUMENT INVALID_NAME, MISSING_FIELD, PRECISION_UNKNOWN,
  // OPTION_OUT_OF_RANGE; UNIMPLEMENTED UNSUPPORTED_OPTION; ALREADY_EXISTS
  // JOB_SPEC_MISMATCH; FAILED_PRECONDITION JOB_ID_TOMBSTONED; UNAVAILABLE
  // SERVER_DRAINING; those of Job::Create.
  absl::StatusOr<JobPtr> Create(const std::string& job_id,
                                const v1::JobSpec& spec);
  // Takes and starts the jobs that an earlier server had. Errors: those of
  // Metadata.
  absl::Status Restore();
  // Errors: NOT_FOUND JOB_NOT_FOUND.
  absl::StatusOr<JobPtr> Get(const std::string& job_id) const;
  // Oldest first.
  std::vector<JobPtr> List() const;
  // Of a model_id, "<job>.<random>". Errors: NOT_FOUND MODEL_NOT_FOUND.
  absl::StatusOr<JobPtr> OfModel(const std::string& model_id) const;
  // Of an op_id, "<model>.<seq>". Errors: NOT_FOUND OPERATION_NOT_FOUND.
  absl::StatusOr<std::pair<JobPtr, OperationPtr>> OfOperation(
      const std::string& op_id) const;
  // Ends all ranks.
  void Clear();

 private:
  JobEnvironment* const environment_;
  mutable absl::Mutex mu_;
  std::vector<JobPtr> jobs_;
};

}  // namespace gradwire
