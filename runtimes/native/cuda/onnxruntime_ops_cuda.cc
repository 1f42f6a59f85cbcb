// The operators on GPUs, for onnxruntime's CUDA provider, and those that stand in decoder.cuda.onnx alone (mythos_export/cuda_graph.py).
#include "onnxruntime_device.h"

namespace mythos::onnxruntime {
namespace {

// NormalizedLinear whose outputs are parted in two: attribute sizes.
struct NormalizedLinearSplitKernel {
  Gpu device;
  WeightForm form;
  float epsilon;
  std::vector<int64_t> sizes;
  NormalizedLinearSplitKernel(const OrtKernelInfo* info, bool quantized)
      : device(info), form(info, quantized), epsilon(Attribute<float>(info, "epsilon")),
        sizes(Ort::ConstKernelInfo(info).GetAttributes<int64_t>("sizes")) {
    Require(sizes.size() == 2 && sizes[0] > 0 && sizes[1] > 0, "sizes holds no two positive sizes");
  }

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input x = in.Next(), norm = in.Next();
    NormalizedLinearArgs a{x.rows(), epsilon, x.floats(), norm.floats(), form.Read(in), nullptr};
    form.ReadActivationScales(in, {&a.weight});
    const size_t first = static_cast<size_t>(sizes[0]), rest = static_cast<size_t>(sizes[1]);
    Require(x.back(0) == a.weight.k && norm.size() == a.weight.k && a.weight.n == first + rest, "x, norm and sizes do not fit weight");
    a.y = OutputLike(context, 0, x, first);
    float* y_rest = OutputLike(context, 1, x, rest);
    if (a.tokens > 0) device.Run(a, first, y_rest, context);
  }
};

// Rows of a table [N, D] for ids [B, S], as float32 [B, S, D].
struct EmbeddingKernel {
  WeightForm form;
  EmbeddingKernel(const OrtKernelInfo* info, bool quantized) : form(info, quantized) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input ids = in.Next();
    const Matrix table = form.Read(in);
    mythos_cuda_embedding call{};
    call.dtype = DtypeOf(table), call.tokens = Int(ids.size()), call.rows = Int(table.n), call.dim = Int(table.k);
    call.scale_dtype = ScaleDtypeOf(table), call.block = Int(table.block);
    call.ids = ids.ints(), call.table = table.values, call.scales = table.scales;
    const int64_t shape[] = {static_cast<int64_t>(ids.dim(0)), static_cast<int64_t>(ids.dim(1)), static_cast<int64_t>(table.k)};
    call.y = Output<float>(context, 0, shape, 3);
    Calls(context, "Embedding").Launch(mythos_cuda_embedding_launch, call);
  }
};

// Rows of a table [N, D] for the positions past_len [B] and on of input_ids [B, S], as float32 [B, S, D].
struct PositionRowsKernel {
  PositionRowsKernel(const OrtKernelInfo*, bool) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input past_len = in.Next(), ids = in.Next(), table = in.Next();
    Require(ids.rank() == 2 && past_len.size() == ids.dim(0), "past_len needs one number a sequence");
    mythos_cuda_position_rows call{};
    call.batch = Int(ids.dim(0)), call.seq = Int(ids.dim(1)), call.rows = Int(table.dim(0)), call.dim = Int(table.dim(1));
    call.past_len = past_len.ints(), call.table = table.floats();
    const int64_t shape[] = {static_cast<int64_t>(ids.dim(0)), static_cast<int64_t>(ids.dim(1)), static_cast<int64_t>(table.dim(1))};
    call.y = Output<float>(context, 0, shape, 3);
    Calls(context, "PositionRows").Launch(mythos_cuda_position_rows_launch, call);
  }
};

// Rows [B, S, W] of n slots as one tensor [n, B, S, W].
struct StackRowsKernel {
  StackRowsKernel(const OrtKernelInfo*, bool) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input first = in.Next();
    const size_t count = Ort::KernelContext(context).GetInputCount();
    std::vector<const void*> parts = {first.data()};
    while (parts.size() < count) {
      const Input part = in.Next();
      Require(part.rank() == first.rank() && std::equal(part.shape(), part.shape() + part.rank(), first.shape()), "rows differ in shape");
      parts.push_back(part.data());
    }
    int64_t shape[8] = {static_cast<int64_t>(count)};
    std::copy_n(first.shape(), first.rank(), shape + 1);
    mythos_cuda_stack call{};
    call.count = Int(count), call.bytes = first.size() * SizeOf(CacheTypeOf(first)), call.parts = parts.data();
    call.y = Ort::KernelContext(context).GetOutput(0, shape, first.rank() + 1).GetTensorMutableRawData();
    Calls(context, "StackRows").Launch(mythos_cuda_stack_launch, call);
  }
};

// Rows of x [B, S, D] at positions [B, K], as [B, K, D].
struct PickRowsKernel {
  PickRowsKernel(const OrtKernelInfo*, bool) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const Input x = in.Next(), positions = in.Next();
    Require(x.rank() == 3 && positions.rank() == 2 && positions.dim(0) == x.dim(0), "positions need a row a sequence");
    mythos_cuda_pick_rows call{};
    call.batch = Int(x.dim(0)), call.seq = Int(x.dim(1)), call.dim = Int(x.dim(2)), call.count = Int(positions.dim(1));
    call.positions = positions.ints(), call.x = x.floats();
    const int64_t shape[] = {x.shape()[0], positions.shape()[1], x.shape()[2]};
    call.y = Output<float>(context, 0, shape, 3);
    Calls(context, "PickRows").Launch(mythos_cuda_pick_rows_launch, call);
  }
};

// What enters a first loop: RecurrentInput, and the zeros that the loop's end updates.
struct RecurrentStartKernel : RecurrentInputKernel<Gpu> {
  using RecurrentInputKernel<Gpu>::RecurrentInputKernel;

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const RecurrentInputArgs a = Read(in, context);
    const Input h = Inputs(context).Next();
    const int64_t shape[] = {h.shape()[0], h.shape()[1], 1};
    const Gpu::Zeros zeros{OutputLike(context, 1, h, a.dim), Output<float>(context, 2, shape, 3), Output<int64_t>(context, 3, shape, 3)};
    if (a.tokens > 0) device.Run(a, context, zeros);
  }
};

// The end of a loop and what enters the next one: RecurrentUpdate, and RecurrentInput of its next_h and e, whose loop_signal, norm and
// loop follow the update's inputs.
struct RecurrentUpdateInputKernel : RecurrentUpdateKernel<Gpu> {
  float epsilon;
  RecurrentUpdateInputKernel(const OrtKernelInfo* info, bool quantized)
      : RecurrentUpdateKernel<Gpu>(info, quantized), epsilon(Attribute<float>(info, "epsilon")) {}

  void Compute(OrtKernelContext* context) const {
    Inputs in(context);
    const RecurrentUpdateArgs a = Read(in, context);
    const Input loop_signal = in.Next(), norm = in.Next(), loop = in.Next();
    Require(norm.size() == a.dim, "norm does not fit x");
    const int64_t shape[] = {static_cast<int64_t>(a.batch), static_cast<int64_t>(a.seq), static_cast<int64_t>(a.dim)};
    const RecurrentInputArgs next{a.batch * a.seq, a.dim, epsilon, a.next_h, a.e, TableRow(loop_signal, loop.ints()[0], a.dim),
                                  norm.floats(), Output<float>(context, 4, shape, 3)};
    if (next.tokens > 0) device.Run(a, next, context);
  }
};

class CudaRegistry : public Registry<Gpu> {
 public:
  CudaRegistry() {
    ForLinear("NormalizedLinearSplit", "QuantizedNormalizedLinearSplit", [&](auto name, bool quantized, const Types& w) {
      Add<NormalizedLinearSplitKernel>(name, quantized, Join({{kFloat, kFloat}, w}), {kFloat, kFloat});
    });
    for (const Type table : Gpu::Floats()) Add<EmbeddingKernel>("Embedding", false, {kInt, table}, {kFloat});
    for (const Type table : {kInt8, kInt4, kFloat8})
      for (const Type scales : {kFloat, kHalf}) AddAs<EmbeddingKernel>("QuantizedEmbedding", true, {kInt, table, scales}, {kFloat});
    Add<PositionRowsKernel>("PositionRows", false, {kInt, kInt, kFloat}, {kFloat});
    Add<PickRowsKernel>("PickRows", false, {kFloat, kInt}, {kFloat});
    Add<RecurrentStartKernel>("RecurrentStart", false, {kFloat, kFloat, kFloat, kFloat, OnHost(kInt)}, {kFloat, kFloat, kFloat, kInt});
    Add<RecurrentUpdateInputKernel>("RecurrentUpdateInput", false, Join({UpdateInputs(), {kFloat, kFloat, OnHost(kInt)}}),
                                    {kFloat, kFloat, kFloat, kInt, kFloat});
    for (const Type cache : Gpu::Caches()) Add<StackRowsKernel>("StackRows", false, {Variadic(cache)}, {cache});
  }
};

}  // namespace
}  // namespace mythos::onnxruntime

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return mythos::onnxruntime::Register<mythos::onnxruntime::CudaRegistry>(options, base);
}
