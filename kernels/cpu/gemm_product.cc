// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/gemm_product.h"

#include <utility>

#include "base/check.h"

namespace gradwire {
namespace {

dnnl_data_type_t DnnlType(DType dtype) {
  return dtype == DType::kBF16 ? dnnl_bf16 : dnnl_f32;
}

dnnl_memory_desc_t MatrixDesc(DType dtype, std::array<int64_t, 2> dims,
                              std::array<int64_t, 2> strides) {
  dnnl_memory_desc_t desc;
  GW_CHECK(dnnl_memory_desc_init_by_strides(&desc, 2, dims.data(),
                                            DnnlType(dtype),
                                            strides.data()) == dnnl_success);
  return desc;
}

// The caller destroys it.
dnnl_primitive_desc_t NewDesc(const GemmShape& s) {
  const dnnl_memory_desc_t a = MatrixDesc(s.ab, {s.m, s.k}, {s.a_row, s.a_col});
  const dnnl_memory_desc_t b = MatrixDesc(s.ab, {s.k, s.n}, {s.b_row, s.b_col});
  const dnnl_memory_desc_t c = MatrixDesc(s.c, {s.m, s.n}, {s.c_row, 1});
  dnnl_matmul_desc_t op;
  GW_CHECK(dnnl_matmul_desc_init(&op, &a, &b, nullptr, &c) == dnnl_success);
  dnnl_primitive_attr_t attr = nullptr;
  GW_CHECK(dnnl_primitive_attr_create(&attr) == dnnl_success);
  GW_CHECK(dnnl_primitive_attr_set_scratchpad_mode(
               attr, dnnl_scratchpad_mode_user) == dnnl_success);
  if (s.accumulate) {
    dnnl_post_ops_t ops = nullptr;
    GW_CHECK(dnnl_post_ops_create(&ops) == dnnl_success);
    GW_CHECK(dnnl_post_ops_append_sum(ops, 1.0f) == dnnl_success);
    GW_CHECK(dnnl_primitive_attr_set_post_ops(attr, ops) == dnnl_success);
    dnnl_post_ops_destroy(ops);
  }
  dnnl_primitive_desc_t desc = nullptr;
  GW_CHECK(dnnl_primitive_desc_create(&desc, &op, attr, CpuEngine(), nullptr) ==
           dnnl_success);
  dnnl_primitive_attr_destroy(attr);
  return desc;
}

}  // namespace

dnnl_engine_t CpuEngine() {
  static dnnl_engine_t engine = [] {
    dnnl_engine_t e = nullptr;
    GW_CHECK(dnnl_engine_create(&e, dnnl_cpu, 0) == dnnl_success);
    return e;
  }();
  return engine;
}

bool HasBf16Product() {
  switch (dnnl_get_effective_cpu_isa()) {
    case dnnl_cpu_isa_avx512_core_amx:
    case dnnl_cpu_isa_avx512_core_bf16:
      return true;
    default:
      return false;
  }
}

Product::Product(const GemmShape& s) {
  const dnnl_primitive_desc_t desc = NewDesc(s);
  GW_CHECK(dnnl_primitive_create(&primitive_, desc) == dnnl_success);
  const std::array<std::pair<int, dnnl_query_t>, 4> slots = {
      {{DNNL_ARG_SRC, dnnl_query_src_md},
       {DNNL_ARG_WEIGHTS, dnnl_query_weights_md},
       {DNNL_ARG_DST, dnnl_query_dst_md},
       {DNNL_ARG_SCRATCHPAD, dnnl_query_scratchpad_md}}};
  for (size_t i = 0; i < slots.size(); ++i) {
    const dnnl_memory_desc_t* md =
        dnnl_primitive_desc_query_md(desc, slots[i].second, 0);
    GW_CHECK(dnnl_memory_create(&args_[i].memory, md, CpuEngine(),
                                DNNL_MEMORY_NONE) == dnnl_success);
    args_[i].arg = slots[i].first;
    if (i == 3) {
      scratch_bytes_ = static_cast<int64_t>(dnnl_memory_desc_get_size(md));
    }
  }
  dnnl_primitive_desc_destroy(desc);
}

Product::~Product() {
  for (dnnl_exec_arg_t& arg : args_) dnnl_memory_destroy(arg.memory);
  dnnl_primitive_destroy(primitive_);
}

void Product::Execute(dnnl_stream_t stream, const std::array<void*, 4>& data) {
  for (size_t i = 0; i < args_.size(); ++i) {
    dnnl_memory_set_data_handle_v2(args_[i].memory, data[i], stream);
  }
  GW_CHECK(dnnl_primitive_execute(primitive_, stream,
                                  static_cast<int>(args_.size()),
                                  args_.data()) == dnnl_success);
}

}  // namespace gradwire
