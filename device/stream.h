// SPDX-License-Identifier: Apache-2.0
// The order of work on one device, with a sticky first failure.
#pragma once

#include <functional>
#include <utility>

#include "absl/status/status.h"

namespace gradwire {

// Ops queue on a stream in program order and return nothing: the first failure
// sticks, later ops do nothing, and Finish() returns it. A block of a model
// thus reads as a list of ops with one check a step. Thread rule: one thread at
// a time.
class Stream {
 public:
  virtual ~Stream() = default;

  bool ok() const { return status_.ok(); }

  // Keeps the first failure; later ones are dropped.
  void Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  // Queues what `body` queues on this stream, which waits for nothing: a device
  // may take it in one piece, and faster if it has taken the same before.
  virtual void Section(const std::function<void()>& body) { body(); }

  // Waits for all queued work; returns the first failure and clears it.
  absl::Status Finish() {
    Synchronize();
    absl::Status status = std::move(status_);
    status_ = absl::OkStatus();
    return status;
  }

 protected:
  // Waits until the device has done everything queued so far.
  virtual void Synchronize() = 0;

 private:
  absl::Status status_;
};

}  // namespace gradwire
