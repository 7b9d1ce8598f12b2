// SPDX-License-Identifier: Apache-2.0
#include <sys/sysinfo.h>

#include <algorithm>
#include <thread>

#include "absl/strings/numbers.h"
#include "base/error.h"
#include "device/cpu_device.h"
#include "model/config.h"
#include "server/grpc_status.h"
#include "server/services.h"
#include "server/version.h"

namespace gradwire {
namespace {

constexpr absl::Duration kPoll = absl::Milliseconds(500);

}  // namespace

grpc::Status JobServiceImpl::GetServerInfo(grpc::ServerContext*,
                                           const v1::GetServerInfoRequest*,
                                           v1::ServerInfo* reply) {
  const std::string& device = context_.device;
  reply->set_version(kVersion);
  reply->set_device(device);
  const CpuDevice cpu(1);
  reply->set_cores(static_cast<int32_t>(std::thread::hardware_concurrency()));
  struct sysinfo info;
  if (sysinfo(&info) == 0) {
    reply->set_memory_bytes(static_cast<int64_t>(info.totalram) *
                            info.mem_unit);
  }
  reply->set_memory_available_bytes(cpu.AvailableBytes());
  if (const size_t space = device.find(' '); space != std::string::npos) {
    reply->add_isa(device.substr(space + 1));
  }
  reply->add_precisions("f32");
  reply->add_precisions("bf16");
  for (const std::string& name : SupportedArchitectures()) {
    reply->add_architectures(name);
  }
  reply->set_launch(context_.launch);
  reply->set_uptime_seconds(
      std::chrono::duration<double>(Clock::now() - context_.started).count());
  reply->set_metrics_address(context_.metrics_address);
  return grpc::Status::OK;
}

grpc::Status JobServiceImpl::CreateJob(grpc::ServerContext*,
                                       const v1::CreateJobRequest* request,
                                       v1::Job* reply) {
  auto job = context_.jobs->Create(request->job_id(), request->spec());
  if (!job.ok()) return ToGrpcStatus(job.status());
  *reply = (*job)->Get();
  return grpc::Status::OK;
}

grpc::Status JobServiceImpl::GetJob(grpc::ServerContext*,
                                    const v1::GetJobRequest* request,
                                    v1::Job* reply) {
  auto job = context_.jobs->Get(request->job_id());
  if (!job.ok()) return ToGrpcStatus(job.status());
  *reply = (*job)->Get();
  return grpc::Status::OK;
}

grpc::Status JobServiceImpl::ListJobs(grpc::ServerContext*,
                                      const v1::ListJobsRequest* request,
                                      v1::ListJobsResponse* reply) {
  constexpr int kMost = 200, kUsual = 50;
  if (request->page_size() < 0 || request->page_size() > kMost) {
    return ToGrpcStatus(
        ErrorBuilder(absl::StatusCode::kInvalidArgument, "OPTION_OUT_OF_RANGE")
            .With("field", "page_size")
            .With("value", request->page_size())
            .With("limit", kMost)
            .Message("page_size must be 0 to 200."));
  }
  size_t begin = 0;
  if (!request->page_token().empty() &&
      !absl::SimpleAtoi(request->page_token(), &begin)) {
    return ToGrpcStatus(
        ErrorBuilder(absl::StatusCode::kInvalidArgument, "PAGE_TOKEN_INVALID")
            .With("field", "page_token")
            .With("value", request->page_token().substr(0, 64))
            .Message("page_token must come from the previous page."));
  }
  const int size = request->page_size() == 0 ? kUsual : request->page_size();
  // The table only grows, so a place in it is a stable token.
  const std::vector<JobPtr> jobs = context_.jobs->List();
  for (size_t i = begin; i < jobs.size(); ++i) {
    if (reply->jobs_size() == size) {
      reply->set_next_page_token(std::to_string(i));
      break;
    }
    v1::Job job = jobs[i]->Get();
    const bool deleted = job.state() == v1::JOB_STATE_DELETED ||
                         job.state() == v1::JOB_STATE_DELETING;
    if (!deleted || request->show_deleted()) *reply->add_jobs() = job;
  }
  return grpc::Status::OK;
}

grpc::Status JobServiceImpl::WatchJob(grpc::ServerContext* call,
                                      const v1::WatchJobRequest* request,
                                      grpc::ServerWriter<v1::Job>* writer) {
  auto job = context_.jobs->Get(request->job_id());
  if (!job.ok()) return ToGrpcStatus(job.status());
  int64_t version = 0;
  while (!call->IsCancelled()) {
    const int64_t seen = version;
    const v1::Job now = (*job)->WaitForChange(version, kPoll);
    if (version != seen && !writer->Write(now)) break;
    if (now.state() == v1::JOB_STATE_DELETED) break;
  }
  return grpc::Status::OK;
}

grpc::Status JobServiceImpl::DeleteJob(grpc::ServerContext* call,
                                       const v1::DeleteJobRequest* request,
                                       v1::Job* reply) {
  auto job = context_.jobs->Get(request->job_id());
  if (!job.ok()) return ToGrpcStatus(job.status());
  if (!request->force()) {
    const absl::Status saved =
        (*job)->AwaitSaves([call] { return call->IsCancelled(); });
    if (!saved.ok()) return ToGrpcStatus(saved);
  }
  if (const absl::Status deleted = (*job)->Delete(); !deleted.ok()) {
    return ToGrpcStatus(deleted);
  }
  *reply = (*job)->Get();
  return grpc::Status::OK;
}

grpc::Status JobServiceImpl::RestartJob(grpc::ServerContext*,
                                        const v1::RestartJobRequest* request,
                                        v1::Job* reply) {
  auto job = context_.jobs->Get(request->job_id());
  if (!job.ok()) return ToGrpcStatus(job.status());
  auto restarted = (*job)->Restart();
  if (!restarted.ok()) return ToGrpcStatus(restarted.status());
  *reply = *std::move(restarted);
  return grpc::Status::OK;
}

grpc::Status JobServiceImpl::GetProfile(grpc::ServerContext*,
                                        const v1::GetProfileRequest* request,
                                        v1::Profile* reply) {
  auto job = context_.jobs->Get(request->job_id());
  if (!job.ok()) return ToGrpcStatus(job.status());
  auto profile = (*job)->GetProfile();
  if (!profile.ok()) return ToGrpcStatus(profile.status());
  *reply = *std::move(profile);
  return grpc::Status::OK;
}

}  // namespace gradwire
