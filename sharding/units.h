// SPDX-License-Identifier: Apache-2.0
// The parameters of a model unit by unit (layout.h), as a training step uses
// them: whether they lie here whole or are gathered from the ranks that hold
// them, and whether a gradient is added where it stays or sent to its owners.
#pragma once

#include <cstdint>
#include <utility>

#include "device/stream.h"
#include "device/tensor.h"
#include "sharding/layout.h"

namespace gradwire {

// What products compute with. Failures stick to the stream. All ranks make the
// same calls in the same order. Thread rule: one thread at a time.
class UnitWeights {
 public:
  virtual ~UnitWeights() = default;
  // Has the unit on its way when Acquire asks for it, if there is room.
  virtual void Prefetch(Stream& stream, int unit) = 0;
  // act [unit.size()], until Release. The units that a step holds at once:
  // one block, the first, and the last.
  virtual Tensor Acquire(Stream& stream, int unit) = 0;
  virtual void Release(int unit) = 0;
  // The weights change from here on: what was gathered is out of date.
  virtual void NewVersion() = 0;
  // There is room for so many units, from the first on, before one is acquired.
  virtual int room() const = 0;
};

// A unit that is held for as long as this lives.
class AcquiredUnit {
 public:
  AcquiredUnit(UnitWeights& weights, Stream& stream, int unit)
      : weights_(weights),
        unit_(unit),
        values_(weights.Acquire(stream, unit)) {}
  ~AcquiredUnit() { weights_.Release(unit_); }
  AcquiredUnit(const AcquiredUnit&) = delete;
  AcquiredUnit& operator=(const AcquiredUnit&) = delete;

  const Tensor& values() const { return values_; }

 private:
  UnitWeights& weights_;
  const int unit_;
  const Tensor values_;
};

// Where a backward leaves gradients. Failures, order and threads as above.
class UnitGradients {
 public:
  virtual ~UnitGradients() = default;
  // Of the backward that begins: whether it adds to what earlier ones have
  // left, or writes over it.
  virtual void Start(bool accumulate) = 0;
  // A unit's gradient, f32 [unit.size()], to be filled until End.
  struct Place {
    Tensor values;
    // Whether to add to `values`, which hold earlier gradients; else they hold
    // nothing of use.
    bool accumulate = false;
  };
  virtual Place Begin(Stream& stream, int unit) = 0;
  virtual void End(Stream& stream, int unit) = 0;
  // After the last unit: all gradients are where they belong.
  virtual void Finish(Stream& stream) = 0;
};

// Everything is here: views of flat vectors of layout.num_elements().
class ResidentWeights : public UnitWeights {
 public:
  ResidentWeights(const ShardLayout& layout, const Tensor& flat)
      : layout_(layout), flat_(flat) {}
  void Prefetch(Stream&, int) override {}
  Tensor Acquire(Stream&, int unit) override {
    return flat_.Rows(layout_.unit(unit).begin, layout_.unit(unit).end);
  }
  void Release(int) override {}
  void NewVersion() override {}
  int room() const override { return 0; }

 private:
  const ShardLayout& layout_;
  const Tensor flat_;
};

class ResidentGradients : public UnitGradients {
 public:
  ResidentGradients(const ShardLayout& layout, const Tensor& flat)
      : layout_(layout), flat_(flat) {}
  void Start(bool accumulate) override { accumulate_ = accumulate; }
  Place Begin(Stream&, int unit) override {
    return {flat_.Rows(layout_.unit(unit).begin, layout_.unit(unit).end),
            accumulate_};
  }
  void End(Stream&, int) override {}
  void Finish(Stream&) override {}

 private:
  const ShardLayout& layout_;
  const Tensor flat_;
  bool accumulate_ = false;
};

}  // namespace gradwire
