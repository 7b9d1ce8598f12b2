// SPDX-License-Identifier: Apache-2.0
// Attention, the logprob head, and what holds for every op.
#include <cmath>
#include <string>
#include <vector>

#include "kernels/conformance.h"
#include "kernels/reference/softmax_ops.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

namespace ref = reference;

struct AttentionCase {
  AttentionShape shape;
  std::vector<int32_t> cu_seqlens;
  float deviation = 1.0f;  // of what is normally distributed
};

// Lengths from 1 on, odd head sizes, all kinds of grouping, one sequence and
// many, shorter and longer than any tile.
std::vector<AttentionCase> AttentionCases() {
  std::vector<AttentionCase> cases = {
      {{1, 1, 1, 0}, {0, 3, 5}},
      {{2, 2, 8, 0}, {0, 1, 2, 18, 100}},
      {{6, 2, 20, 0}, {0, 70}},
      {{2, 1, 96, 0}, {0, 33, 50}},
      {{1, 1, 256, 0}, {0, 40}},
      {{9, 3, 64, 0}, {0, 5, 66}},
      {{2, 1, 7, 0}, {0, 600}},
      {{5, 5, 4, 0}, {0, 300, 301, 430}},
      {{24, 1, 4, 0}, {0, 50}},
      {{2, 1, 4, 0}, {0}},
      {{3, 3, 80, 0}, {0, 1, 37}},
      {{4, 1, 128, 0}, {0, 20, 21, 60}},
      // Around a GPU's tiles: lengths one off a multiple of 32, 64 and 128.
      {{2, 1, 64, 0}, {0, 63, 127, 192, 322}},
      {{2, 2, 96, 0}, {0, 129}},
      {{4, 1, 128, 0}, {0, 65, 98}},
      {{8, 1, 8, 0}, {0, 31, 161}},
      {{2, 1, 256, 0}, {0, 66}},
      // Three of the tiles of keys that a warpgroup takes, and more.
      {{3, 1, 64, 0}, {0, 385}},
      {{2, 1, 128, 0}, {0, 130, 387}},
      {{2, 2, 112, 0}, {0, 127, 255, 384}},
      // Scores in the hundreds: what the mask hides is beyond float32.
      {{2, 1, 64, 0}, {0, 90, 230}, 20.0f},
      {{1, 1, 128, 0}, {0, 150}, 20.0f},
      {{1, 1, 96, 0}, {0, 80}, 20.0f},
      // Beyond what tensor cores' kernels are made for.
      {{1, 1, 264, 0}, {0, 5}},
  };
  for (AttentionCase& c : cases) {
    c.shape.scale = 1.0f / std::sqrt(static_cast<float>(c.shape.head_dim));
  }
  return cases;
}

TEST_P(AttentionConformanceTest, ForwardAndBackward) {
  for (const AttentionCase& c : AttentionCases()) {
    const AttentionShape& s = c.shape;
    const int64_t tokens = c.cu_seqlens.back();
    const int64_t width = s.heads * s.head_dim;
    const std::string name = std::to_string(s.heads) + "/" +
                             std::to_string(s.kv_heads) + " heads of " +
                             std::to_string(s.head_dim) + ", " +
                             std::to_string(tokens) + " tokens";
    const Operand qkv = Normal(act(), {tokens, s.QkvWidth()}, c.deviation);
    const Operand out = Unwritten(act(), {tokens, width});
    const Operand lse = Unwritten(DType::kF32, {tokens, s.heads});
    const Operand workspace = Unwritten(
        DType::kF32,
        {(kernels().AttentionWorkspaceBytes(s, act(), tokens) + 3) / 4});
    const auto args = [&](Tensor Operand::*side) {
      Kernels::Attention result;
      result.shape = s;
      result.layout = {c.cu_seqlens.data(),
                       static_cast<int64_t>(c.cu_seqlens.size()) - 1};
      result.qkv = qkv.*side;
      result.workspace = workspace.*side;
      return result;
    };
    kernels().AttentionForward(stream(), args(&Operand::device), out.device,
                               lse.device);
    const auto want = ref::AttentionForward<Tracked>(args(&Operand::host));
    ExpectWithin("out, " + name, out, want.out);
    ExpectWithin("lse, " + name, lse, want.lse);

    // The backward starts from what the forward wrote.
    const Tensor host_out = Fetch(out.device), host_lse = Fetch(lse.device);
    const Operand d_out = Normal(act(), {tokens, width});
    const auto want_grad = ref::AttentionBackward<Tracked>(
        args(&Operand::host), {d_out.host, host_out, host_lse});
    const Operand d_qkv = Unwritten(act(), {tokens, s.QkvWidth()});
    const Operand again = Unwritten(act(), {tokens, s.QkvWidth()});
    kernels().AttentionBackward(stream(), args(&Operand::device),
                                {d_out.device, out.device, lse.device},
                                d_qkv.device);
    ExpectWithin("d_qkv, " + name, d_qkv, want_grad);
    kernels().AttentionBackward(stream(), args(&Operand::device),
                                {d_out.device, out.device, lse.device},
                                again.device);
    ExpectSame("the same bits again, " + name, Fetch(d_qkv.device),
               Fetch(again.device));
  }
}

struct HeadCase {
  int64_t tokens, hidden, vocab, k, top_k;
};
const HeadCase kHeadCases[] = {
    {0, 8, 10, 1, 0},
    {1, 16, 7, 1, 7},
    {70, 32, 1300, 2, 5},
    {300, 8, 513, 3, 0},
    {2100, 3, 30, 1, 2},
    // Nearly all tokens have the same target twice.
    {9, 8, 3, 3, 3},
    {2, 4, 1, 2, 1},
    // Beyond the chunks of ids, and of tokens, that a GPU takes at a time.
    {3, 8, 8700, 3, 20},
    {8200, 2, 5, 1, 1},
};

TEST_P(KernelsConformanceTest, LogprobHead) {
  for (const HeadCase& c : kHeadCases) {
    const std::string name =
        std::to_string(c.tokens) + " tokens, vocab " + std::to_string(c.vocab);
    const Operand hidden = Normal(act(), {c.tokens, c.hidden});
    const Operand weight = Normal(act(), {c.vocab, c.hidden});
    const Operand targets =
        RandomInts({c.tokens, c.k}, static_cast<int32_t>(c.vocab));
    const Operand logprobs = Unwritten(DType::kF32, {c.tokens, c.k});
    const Operand lse = Unwritten(DType::kF32, {c.tokens});
    const Operand top = Unwritten(DType::kF32, {c.tokens, c.top_k});
    const Operand top_ids = RandomInts({c.tokens, c.top_k}, 1);
    const Operand workspace =
        Unwritten(DType::kF32, {(kernels().LogprobHeadWorkspaceBytes(
                                     act(), c.tokens, c.hidden, c.vocab) +
                                 3) /
                                4});
    const auto head = [&](Tensor Operand::*side) {
      return LogprobHead{hidden.*side, weight.*side, targets.*side};
    };
    LogprobHeadOutput out;
    out.logprobs = logprobs.device;
    out.lse = lse.device;
    if (c.top_k > 0) {
      out.top_k_logprobs = top.device;
      out.top_k_indices = top_ids.device;
    }
    kernels().LogprobHeadForward(stream(), head(&Operand::device), out,
                                 workspace.device);
    const auto want =
        ref::LogprobHeadForward<Tracked>(head(&Operand::host), c.top_k);
    ExpectWithin("logprobs, " + name, logprobs, want.logprobs);
    ExpectWithin("lse, " + name, lse, want.lse);
    if (c.top_k > 0) {
      ExpectWithin("top_k, " + name, top, want.top_k_logprobs);
      // Equal within the bounds of both, ids may trade places.
      const Tensor ids = Fetch(top_ids.device), values = Fetch(top.device);
      for (int64_t i = 0; i < ids.num_elements(); ++i) {
        const int32_t id = ids.data<int32_t>()[i];
        ASSERT_GE(id, 0);
        ASSERT_LT(id, c.vocab);
        if (id == want.top_k_indices[static_cast<size_t>(i)]) continue;
        const int64_t token = i / c.top_k;
        const Tracked logit =
            ref::Dot<Tracked>(hidden.host, token * c.hidden, weight.host,
                              int64_t{id} * c.hidden, c.hidden);
        const Tracked logprob = logit - want.lse[static_cast<size_t>(token)];
        EXPECT_NEAR(At(values, i), logprob.value, logprob.error)
            << name << ", place " << i;
      }
    }

    const Tensor host_lse = Fetch(lse.device);
    const Operand d_logprobs = Normal(DType::kF32, {c.tokens, c.k});
    const Operand d_hidden = Unwritten(act(), {c.tokens, c.hidden});
    const Operand alone = Unwritten(act(), {c.tokens, c.hidden});
    const Operand d_weight = Normal(DType::kF32, {c.vocab, c.hidden});
    const auto want_grad = ref::LogprobHeadBackward<Tracked>(
        head(&Operand::host), {d_logprobs.host, host_lse, Tensor()},
        {d_weight.host});
    kernels().LogprobHeadBackward(
        stream(), head(&Operand::device),
        {d_logprobs.device, lse.device, workspace.device}, d_hidden.device,
        {d_weight.device});
    ExpectWithin("d_hidden, " + name, d_hidden, want_grad.d_hidden);
    ExpectWithin("d_weight, " + name, d_weight, want_grad.d_weight);
    kernels().LogprobHeadBackward(
        stream(), head(&Operand::device),
        {d_logprobs.device, lse.device, workspace.device}, alone.device,
        {Tensor()});
    ExpectSame("d_hidden without d_weight, " + name, Fetch(d_hidden.device),
               Fetch(alone.device));

    // Written, not added to; and its squares.
    const Operand fresh = Unwritten(DType::kF32, {c.vocab, c.hidden});
    const Operand squares =
        Unwritten(DType::kF64, {c.vocab, SquareBlocks(c.hidden)});
    const Kernels::LogprobHeadGrad on_host = {d_logprobs.host, host_lse,
                                              Tensor()};
    kernels().LogprobHeadBackward(
        stream(), head(&Operand::device),
        {d_logprobs.device, lse.device, workspace.device}, alone.device,
        {fresh.device, false, squares.device});
    ExpectWithin("d_weight alone, " + name, fresh,
                 ref::LogprobHeadBackward<Tracked>(head(&Operand::host),
                                                   on_host, {fresh.host, false})
                     .d_weight);
    ExpectSquares("d_weight alone, " + name, fresh, squares);

    // Keeping changes no bit.
    const Operand kept = Unwritten(
        DType::kF32,
        {(kernels().LogprobHeadKeptBytes(act(), c.tokens, c.k, c.vocab) + 3) /
         4});
    const Operand logprobs_again = Unwritten(DType::kF32, {c.tokens, c.k});
    const Operand lse_again = Unwritten(DType::kF32, {c.tokens});
    const Operand d_weight_alone =
        Normal(DType::kF32, {c.vocab, c.hidden}, 0.0f);
    const Operand d_weight_kept =
        Normal(DType::kF32, {c.vocab, c.hidden}, 0.0f);
    out.logprobs = logprobs_again.device;
    out.lse = lse_again.device;
    out.kept = kept.device;
    kernels().LogprobHeadForward(stream(), head(&Operand::device), out,
                                 workspace.device);
    ExpectSame("logprobs, kept, " + name, Fetch(logprobs.device),
               Fetch(logprobs_again.device));
    ExpectSame("lse, kept, " + name, host_lse, Fetch(lse_again.device));
    kernels().LogprobHeadBackward(
        stream(), head(&Operand::device),
        {d_logprobs.device, lse.device, workspace.device}, alone.device,
        {d_weight_alone.device});
    kernels().LogprobHeadBackward(
        stream(), head(&Operand::device),
        {d_logprobs.device, lse.device, workspace.device, kept.device},
        alone.device, {d_weight_kept.device});
    ExpectSame("d_hidden, kept, " + name, Fetch(d_hidden.device),
               Fetch(alone.device));
    ExpectSame("d_weight, kept, " + name, Fetch(d_weight_alone.device),
               Fetch(d_weight_kept.device));

    // Rows of the weight's gradient by themselves, the last first.
    const Operand by_rows = Normal(DType::kF32, {c.vocab, c.hidden}, 0.0f);
    const Operand row_squares =
        Unwritten(DType::kF64, {c.vocab, SquareBlocks(c.hidden)});
    const int64_t piece = kernels().LogprobHeadWeightRows(act());
    for (int64_t end = c.vocab; end > 0 && piece > 0;) {
      const int64_t begin = (end - 1) / piece * piece;
      kernels().LogprobHeadBackwardWeight(
          stream(), head(&Operand::device),
          {d_logprobs.device, lse.device, workspace.device, kept.device}, begin,
          end, {by_rows.device, begin / piece % 2 == 0, row_squares.device});
      end = begin;
      if (end > 0) continue;
      ExpectSame("d_weight by rows, " + name, Fetch(d_weight_alone.device),
                 Fetch(by_rows.device));
      ExpectSquares("d_weight by rows, " + name, by_rows, row_squares);
    }

    // Some of the forward's rows, in another order.
    std::vector<int32_t> some;
    for (int64_t t = c.tokens - 1; t >= 0; t -= 2) {
      some.push_back(static_cast<int32_t>(t));
    }
    const int64_t count = static_cast<int64_t>(some.size());
    const Operand rows = Ints(some, {count});
    const auto gather = [&](const Tensor& from, DType dtype,
                            std::initializer_list<int64_t> shape) {
      const Operand to = Unwritten(dtype, shape);
      const Tensor fetched = Fetch(from);
      const int64_t bytes = c.tokens == 0 ? 0 : fetched.bytes() / c.tokens;
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(static_cast<char*>(to.host.raw()) + i * bytes,
                    static_cast<const char*>(fetched.raw()) +
                        some[static_cast<size_t>(i)] * bytes,
                    static_cast<size_t>(bytes));
      }
      Upload(to);
      return to;
    };
    const LogprobHead whole = head(&Operand::device);
    const Operand some_hidden = gather(whole.hidden, act(), {count, c.hidden});
    const Operand some_targets =
        gather(whole.targets, DType::kI32, {count, c.k});
    const Operand some_d = gather(d_logprobs.device, DType::kF32, {count, c.k});
    const Operand some_lse = gather(lse.device, DType::kF32, {count});
    const Operand of_some = Unwritten(act(), {count, c.hidden});
    const Operand d_weight_some = Normal(DType::kF32, {c.vocab, c.hidden});
    const auto want_some = ref::LogprobHeadBackward<Tracked>(
        {some_hidden.host, weight.host, some_targets.host},
        {some_d.host, some_lse.host, Tensor()}, {d_weight_some.host});
    kernels().LogprobHeadBackward(
        stream(), {some_hidden.device, whole.weight, some_targets.device},
        {some_d.device, some_lse.device, workspace.device, kept.device,
         rows.device, c.tokens},
        of_some.device, {d_weight_some.device});
    ExpectWithin("d_hidden of some rows, " + name, of_some, want_some.d_hidden);
    ExpectWithin("d_weight of some rows, " + name, d_weight_some,
                 want_some.d_weight);
  }
}

TEST_P(KernelsConformanceTest, EqualTopLogprobsComeByLowerId) {
  // A hidden row of zeros: all logits are equal.
  const Operand x = Normal(act(), {1, 2}, 0.0f);
  const Operand weight = Normal(act(), {6, 2});
  const Operand targets = Ints({5}, {1, 1});
  const Operand logprobs = Unwritten(DType::kF32, {1, 1});
  const Operand lse = Unwritten(DType::kF32, {1});
  const Operand top = Unwritten(DType::kF32, {1, 6});
  const Operand ids = Ints({9, 9, 9, 9, 9, 9}, {1, 6});
  const Operand workspace = Unwritten(
      DType::kF32,
      {(kernels().LogprobHeadWorkspaceBytes(act(), 1, 2, 6) + 3) / 4});
  kernels().LogprobHeadForward(
      stream(), {x.device, weight.device, targets.device},
      {logprobs.device, lse.device, top.device, ids.device}, workspace.device);
  const Tensor got = Fetch(ids.device);
  for (int32_t i = 0; i < 6; ++i) EXPECT_EQ(got.data<int32_t>()[i], i);
}

TEST_P(KernelsConformanceTest, AFailedStreamLeavesOutputsAlone) {
  const Operand x = Normal(act(), {4, 8});
  const Operand w = Normal(act(), {8, 8});
  const Operand y = Normal(act(), {4, 8});
  const Operand sums = Normal(DType::kF64, {8});
  stream().Fail(absl::InternalError("first failure"));
  kernels().MatmulForward(stream(), x.device, w.device, y.device, false);
  kernels().Add(stream(), x.device, y.device);
  EXPECT_EQ(kernels().Sum(stream(), sums.device), 0);
  EXPECT_EQ(stream().Finish().message(), "first failure");
  ExpectSame("y", Fetch(y.device).Reshape({4, 8}), y.host);
}

}  // namespace
}  // namespace gradwire
