// The operators of a layer's products and of the loop as onnxruntime calls them: shapes checked, plain memory to the algorithms.
#pragma once
#include "onnxruntime_tensors.h"

namespace mythos::onnxruntime {

template <typename Device>
struct NormalizedLinearKernel {
  Device device;
  WeightForm form;
  float epsilon;
  NormalizedLinearKernel(const OrtKernelInfo* info, bool quantized)
      : device(info), form(info, quantized), epsilon(Attribute<float>(info, "epsilon")) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input x = in.Next(), norm = in.Next();
    NormalizedLinearArgs a{x.rows(), epsilon, x.floats(), norm.floats(), form.Read(in), nullptr};
    form.ReadActivationScales(in, {&a.weight});
    Require(x.back(0) == a.weight.k && norm.size() == a.weight.k, "x and norm do not fit weight");
    a.y = OutputLike(context, 0, x, a.weight.n);
    if (a.tokens > 0) device.Run(a, context);
  }
};

template <typename Device>
struct ResidualLinearKernel {
  Device device;
  WeightForm form;
  ResidualLinearKernel(const OrtKernelInfo* info, bool quantized) : device(info), form(info, quantized) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input residual = in.Next(), x = in.Next();
    ResidualLinearArgs a{x.rows(), residual.floats(), x.floats(), form.Read(in), nullptr};
    form.ReadActivationScales(in, {&a.weight});
    Require(x.back(0) == a.weight.k && residual.back(0) == a.weight.n && residual.rows() == a.tokens,
            "x and residual do not fit weight");
    a.y = OutputLike(context, 0, residual, a.weight.n);
    if (a.tokens > 0) device.Run(a, context);
  }
};

template <typename Device>
struct FeedForwardKernel {
  Device device;
  WeightForm form;
  float epsilon;
  FeedForwardKernel(const OrtKernelInfo* info, bool quantized)
      : device(info), form(info, quantized), epsilon(Attribute<float>(info, "epsilon")) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input x = in.Next(), norm = in.Next();
    FeedForwardArgs a{x.rows(), epsilon, x.floats(), norm.floats(), form.Read(in), form.Read(in), nullptr};
    form.ReadActivationScales(in, {&a.gate_up, &a.down});
    Require(x.back(0) == a.gate_up.k && norm.size() == a.gate_up.k && a.down.n == a.gate_up.k && a.gate_up.n == 2 * a.down.k,
            "x, norm, gate_up and down do not fit each other");
    a.y = OutputLike(context, 0, x, a.down.n);
    if (a.tokens > 0) device.Run(a, context);
  }
};

template <typename Device>
struct MixtureOfExpertsKernel {
  Device device;
  WeightForm form;
  Routing routing;
  float epsilon;
  MixtureOfExpertsKernel(const OrtKernelInfo* info, bool quantized)
      : device(info), form(info, quantized), epsilon(Attribute<float>(info, "epsilon")) {
    routing.top_k = Count(Attribute<int64_t>(info, "top_k"), "top_k");
    // Bundles of earlier versions have none of these.
    routing.sigmoid = Attribute<int64_t>(info, "scoring", 0) != 0;
    routing.normalized = Attribute<int64_t>(info, "normalized", 1) != 0;
    routing.scale = Attribute<float>(info, "scale", 1.0f);
    routing.n_groups = Count(Attribute<int64_t>(info, "n_groups", 1), "n_groups");
    routing.top_k_groups = Count(Attribute<int64_t>(info, "top_k_groups", 1), "top_k_groups");
    routing.group_top_k = Count(Attribute<int64_t>(info, "group_top_k", 1), "group_top_k");
  }

  static size_t Count(int64_t value, const char* name) {
    if (value < 1) throw std::invalid_argument("ai.mythos: " + std::string(name) + " is below 1");
    return static_cast<size_t>(value);
  }

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input x = in.Next(), norm = in.Next(), router = in.Next(), router_bias = in.Next();
    size_t experts = 0, experts_down = 0;
    MixtureOfExpertsArgs a{};
    a.gate_up = form.Read(in, &experts);
    a.down = form.Read(in, &experts_down);
    form.ReadActivationScales(in, {&a.gate_up, &a.down});
    a.tokens = x.rows(), a.n_routed = router.dim(0), a.routing = routing, a.epsilon = epsilon;
    const size_t dim = a.gate_up.k;
    Require(x.back(0) == dim && norm.size() == dim && router.dim(1) == dim && router_bias.size() == a.n_routed,
            "x, norm and router do not fit gate_up");
    Require(a.down.n == dim && a.gate_up.n == 2 * a.down.k && experts == experts_down && a.n_routed <= experts,
            "router, gate_up and down do not fit each other");
    const size_t group = a.n_routed / routing.n_groups;
    Require(group * routing.n_groups == a.n_routed && routing.top_k_groups <= routing.n_groups && routing.group_top_k <= group,
            "the routed experts do not fit n_groups, top_k_groups and group_top_k");
    Require(routing.top_k <= routing.top_k_groups * group, "top_k is above the number of experts to choose from");
    a.n_shared = experts - a.n_routed;
    a.x = x.floats(), a.norm = norm.floats(), a.router_bias = router_bias.floats();
    a.router.values = router.data(), a.router.n = a.n_routed, a.router.k = dim;
    a.y = OutputLike(context, 0, x, dim);
    if (a.tokens > 0) device.Run(a, context);
  }
};

// Row `loop` of a table [L, n].
inline const float* TableRow(const Input& table, int64_t loop, size_t n) {
  Require(loop >= 0 && loop < table.shape()[0] && table.back(0) == n, "loop is outside a table over loops");
  return table.floats() + static_cast<size_t>(loop) * n;
}

template <typename Device>
struct RecurrentInputKernel {
  Device device;
  float epsilon;
  RecurrentInputKernel(const OrtKernelInfo* info, bool) : device(info), epsilon(Attribute<float>(info, "epsilon")) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const RecurrentInputArgs a = Read(in, context);
    if (a.tokens > 0) device.Run(a, context);
  }

  // All inputs of the operator, and its output.
  RecurrentInputArgs Read(Inputs& in, OrtKernelContext* context) const {
    const Input h = in.Next(), e = in.Next(), loop_signal = in.Next(), norm = in.Next(), loop = in.Next();
    const size_t dim = h.back(0);
    Require(e.size() == h.size() && norm.size() == dim, "h, e and norm do not fit each other");
    return {h.rows(), dim, epsilon, h.floats(), e.floats(), TableRow(loop_signal, loop.ints()[0], dim),
            norm.floats(), OutputLike(context, 0, h, dim)};
  }
};

template <typename Device>
struct RecurrentUpdateKernel {
  Device device;
  float act_threshold;
  RecurrentUpdateKernel(const OrtKernelInfo* info, bool) : device(info), act_threshold(Attribute<float>(info, "act_threshold")) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const RecurrentUpdateArgs a = Read(in, context);
    if (a.batch * a.seq > 0) device.Run(a, context);
  }

  // All inputs of the operator, and its outputs.
  RecurrentUpdateArgs Read(Inputs& in, OrtKernelContext* context) const {
    const Input x = in.Next(), h = in.Next(), e = in.Next(), result = in.Next(), halted_mass = in.Next(), exit_loop = in.Next();
    const Input loop = in.Next(), n_loops = in.Next(), lora_down = in.Next(), lora_scale = in.Next(), lora_up = in.Next();
    const Input decay = in.Next(), injection = in.Next(), halt = in.Next(), halt_bias = in.Next();
    RecurrentUpdateArgs a{};
    a.batch = x.dim(0), a.seq = x.dim(1), a.dim = x.dim(2), a.lora_rank = lora_down.dim(0), a.loop = loop.ints()[0];
    const size_t tokens = a.batch * a.seq;
    Require(h.size() == x.size() && e.size() == x.size() && result.size() == x.size(), "x, h, e and result differ in size");
    Require(halted_mass.size() == tokens && exit_loop.size() == tokens, "halted_mass and exit_loop need one number a token");
    Require(n_loops.size() == a.batch || n_loops.size() == 1, "n_loops needs one number a sequence, or one for all");
    Require(lora_down.dim(1) == a.dim && lora_up.dim(0) == a.lora_rank && lora_up.dim(1) == a.dim, "the LoRA does not fit x");
    Require(decay.size() == a.dim && injection.size() == a.dim && halt.size() == a.dim && halt_bias.size() == 1,
            "decay, injection and halt do not fit x");
    a.act_threshold = act_threshold, a.n_loops_per_row = n_loops.size() == a.batch && a.batch > 1;
    a.x = x.floats(), a.h = h.floats(), a.e = e.floats(), a.result = result.floats(), a.halted_mass = halted_mass.floats();
    a.exit_loop = exit_loop.ints(), a.n_loops = n_loops.ints(), a.lora_down = lora_down.floats();
    a.lora_scale = TableRow(lora_scale, a.loop, a.lora_rank), a.lora_up = lora_up.floats();
    a.decay = decay.floats(), a.injection = injection.floats(), a.halt = halt.floats(), a.halt_bias = halt_bias.floats()[0];
    a.next_h = OutputLike(context, 0, x, a.dim), a.next_result = OutputLike(context, 1, x, a.dim);
    a.next_halted_mass = OutputLike(context, 2, x, 1);
    const int64_t shape[] = {x.shape()[0], x.shape()[1], 1};
    a.next_exit_loop = Output<int64_t>(context, 3, shape, 3);
    return a;
  }
};

}  // namespace mythos::onnxruntime
