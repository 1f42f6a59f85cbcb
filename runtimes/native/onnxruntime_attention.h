// The attention operators as onnxruntime calls them: shapes and the cache's rows checked, plain memory to the algorithms.
#pragma once
#include "onnxruntime_tensors.h"

namespace mythos::onnxruntime {

inline CacheType CacheTypeOf(const Input& past_kv) {
  switch (past_kv.type()) {
    case kHalf: return CacheType::kFloat16;
    case kBFloat16: return CacheType::kBFloat16;
    case kInt8: return CacheType::kInt8;
    default: return CacheType::kFloat32;
  }
}

// The attribute of the forms for int8 caches, which have a third output, new_scale; 0 for the others.
inline float RowScale(const OrtKernelInfo* info) {
  if (Ort::ConstKernelInfo(info).GetOutputCount() < 3) return 0.0f;
  const float row_scale = Attribute<float>(info, "row_scale");
  Require(row_scale >= 0.0f && std::isfinite(row_scale), "row_scale is negative or not finite");
  return row_scale;
}

// past_kv [slots, B, C, W], past_len [B] and slot [], with past_scale [slots, B, C] after past_kv where that is int8. A window (0:
// none) needs its own rows only, so that sequences may be longer than the cache. A device's lengths are not looked at: its kernels read
// no row that is none.
template <typename Device>
struct CacheInputs {
  Input past_kv;
  Cache slot_rows;
  const int64_t* past_len;
  size_t capacity, width;

  CacheInputs(Inputs& in, size_t batch, size_t window = 0) : past_kv(in.Next()) {
    const CacheType type = CacheTypeOf(past_kv);
    const float* scales = type == CacheType::kInt8 ? in.Next().floats() : nullptr;
    const Input lengths = in.Next(), slot = in.Next();
    capacity = past_kv.dim(2), width = past_kv.dim(3), past_len = lengths.ints();
    Require(past_kv.dim(1) == batch, "past_kv has another batch than the new tokens");
    Require(lengths.size() == batch, "past_len needs one length a sequence");
    for (size_t b = 0; b < batch && Device::kReadsLengths; ++b)
      Require(past_len[b] >= 0 && (static_cast<size_t>(past_len[b]) <= capacity || (window > 0 && capacity + 1 >= window)),
              "past_len is negative, or beyond the cache's capacity where that is less than the window");
    const int64_t index = slot.ints()[0];
    Require(index >= 0 && index < past_kv.shape()[0], "slot is outside past_kv");
    const size_t rows = static_cast<size_t>(index) * batch * capacity;
    slot_rows = {type, static_cast<const char*>(past_kv.data()) + rows * width * SizeOf(type),
                 scales == nullptr ? nullptr : scales + rows};
  }

  // The outputs for the new rows, at `index` and, for int8, at the one after it.
  NewRows Rows(OrtKernelContext* context, size_t index, const Input& x, float row_scale) const {
    const int64_t shape[] = {x.shape()[0], x.shape()[1], static_cast<int64_t>(width)};
    float* scales = slot_rows.type == CacheType::kInt8 ? Output<float>(context, index + 1, shape, 2) : nullptr;
    return {slot_rows.type, Ort::KernelContext(context).GetOutput(index, shape, 3).GetTensorMutableRawData(), scales,
            row_scale};
  }
};

template <typename Device>
struct LatentAttentionKernel {
  Device device;
  WeightForm form;
  float scale, epsilon, row_scale;
  LatentAttentionKernel(const OrtKernelInfo* info, bool quantized)
      : device(info), form(info, quantized), scale(Attribute<float>(info, "scale")), epsilon(Attribute<float>(info, "epsilon")),
        row_scale(RowScale(info)) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input q = in.Next(), kv = in.Next(), kv_norm = in.Next();
    LatentAttentionArgs a{};
    size_t heads_uv = 0;
    a.w_uk = form.Read(in, &a.n_heads);
    a.w_uv = form.Read(in, &heads_uv);
    const Input cos = in.Next(), sin = in.Next();
    a.batch = q.dim(0), a.seq = q.dim(1), a.nope = a.w_uk.k, a.rank = a.w_uk.n, a.v_head_dim = a.w_uv.n;
    const CacheInputs<Device> cache(in, a.batch);
    form.ReadActivationScales(in, {&a.w_uk, &a.w_uv});
    Require(kv.dim(2) > a.rank && kv.dim(2) == cache.width && kv_norm.size() == a.rank, "kv does not fit w_uk and past_kv");
    a.rope = kv.dim(2) - a.rank, a.capacity = cache.capacity;
    Require(q.dim(2) == a.n_heads * (a.nope + a.rope) && heads_uv == a.n_heads && a.w_uv.k == a.rank, "q does not fit w_uk and w_uv");
    Require(cos.back(0) * 2 == a.rope && sin.back(0) * 2 == a.rope, "cos and sin do not fit kv");
    a.scale = scale, a.epsilon = epsilon;
    a.q = q.floats(), a.kv = kv.floats(), a.kv_norm = kv_norm.floats(), a.cos = cos.floats(), a.sin = sin.floats();
    a.past = cache.slot_rows, a.past_len = cache.past_len;
    a.y = OutputLike(context, 0, q, a.n_heads * a.v_head_dim);
    a.new_kv = cache.Rows(context, 1, q, row_scale);
    if (a.batch * a.seq > 0) device.Run(a, context);
  }
};

template <typename Device>
struct GroupedQueryAttentionKernel {
  Device device;
  int64_t n_heads, n_kv_heads, window;
  float scale, row_scale;
  GroupedQueryAttentionKernel(const OrtKernelInfo* info, bool)
      : device(info),
        n_heads(Attribute<int64_t>(info, "n_heads")),
        n_kv_heads(Attribute<int64_t>(info, "n_kv_heads")),
        window(Attribute<int64_t>(info, "window")),
        scale(Attribute<float>(info, "scale")),
        row_scale(RowScale(info)) {
    Require(n_heads > 0 && n_kv_heads > 0 && n_heads % n_kv_heads == 0 && window >= 0,
            "n_heads is no multiple of n_kv_heads, or window is negative");
  }

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input qkv = in.Next(), cos = in.Next(), sin = in.Next();
    GroupedQueryAttentionArgs a{};
    a.batch = qkv.dim(0), a.seq = qkv.dim(1);
    a.n_heads = static_cast<size_t>(n_heads), a.n_kv_heads = static_cast<size_t>(n_kv_heads);
    a.window = static_cast<size_t>(window);
    a.head_dim = qkv.dim(2) / (a.n_heads + 2 * a.n_kv_heads);
    const CacheInputs<Device> cache(in, a.batch, a.window);
    Require(cache.width == 2 * a.n_kv_heads * a.head_dim, "past_kv does not fit qkv");
    Require(cos.back(0) * 2 == a.head_dim && sin.back(0) * 2 == a.head_dim, "cos and sin do not fit qkv");
    a.scale = scale, a.capacity = cache.capacity;
    a.qkv = qkv.floats(), a.cos = cos.floats(), a.sin = sin.floats();
    a.past = cache.slot_rows, a.past_len = cache.past_len;
    a.y = OutputLike(context, 0, qkv, a.n_heads * a.head_dim);
    a.new_kv = cache.Rows(context, 1, qkv, row_scale);
    if (a.batch * a.seq > 0) device.Run(a, context);
  }
};

}  // namespace mythos::onnxruntime
