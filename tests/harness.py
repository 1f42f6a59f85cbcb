"""Runs one operator every way there is: torch, portable body on onnxruntime and in onnx's evaluator, native kernels with every
instruction set this processor has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from mythos_export import ops
from mythos_export.export import bytes_of
from mythos_export.ops.operator import Operator
from runtimes import native_operators

OPERATORS = {operator.name: operator for operator in ops.OPERATORS}
INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon", "neon_dotprod", "neon_i8mm")
KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
}
STORED = ("activation_scale", torch.int8, torch.uint8, torch.float8_e4m3fn)  # initializers, by name or dtype
Attributes = dict[str, float]


def one_node_model(operator: Operator, tensors: Sequence[torch.Tensor], attributes: Attributes) -> onnx.ModelProto:
    """A graph of one node. Inputs that are neither float32 nor integers of the interface are initializers or casts, outputs are
    cast to float32, so that numpy can hold everything."""
    nodes, inputs, initializers, names = [], [], [], []
    for (name, spec, _), tensor in zip(operator.inputs, tensors, strict=True):
        kind, shape = KINDS[tensor.dtype], list(tensor.shape)
        names.append(name)
        if name in STORED or tensor.dtype in STORED:
            if spec in ("Q", "Q2") and tensor.dtype == torch.uint8:
                kind, shape = TensorProto.INT4, [*shape[:-1], 2 * shape[-1]]
            initializers.append(helper.make_tensor(name, kind, shape, bytes(bytes_of(tensor)), raw=True))
        elif tensor.dtype in (torch.float16, torch.bfloat16):
            inputs.append(helper.make_tensor_value_info(f"{name}_wide", TensorProto.FLOAT, shape))
            nodes.append(helper.make_node("Cast", [f"{name}_wide"], [name], to=kind))
        else:
            inputs.append(helper.make_tensor_value_info(name, kind, shape))
    outs, given = [name for name, _, _ in operator.outputs], {**operator.defaults, **attributes}
    overload = operator.overload_for(KINDS[tensor.dtype] for tensor in tensors)
    nodes.append(helper.make_node(operator.name, names, outs, domain=ops.DOMAIN, overload=overload, **given))
    nodes += [helper.make_node("Cast", [name], [f"{name}_out"], to=TensorProto.FLOAT) for name in outs]
    outputs = [
        helper.make_tensor_value_info(
            f"{name}_out", TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(2 if name == "new_scale" else 3)]
        )
        for name in outs
    ]
    imports = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, ops.DOMAIN_VERSION)]
    graph = helper.make_graph(nodes, "one_node", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=[operator.functions[overload]])
    onnx.checker.check_model(model, full_check=True)
    return model


def feeds_of(operator: Operator, tensors: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    feeds = {}
    for (name, _, _), tensor in zip(operator.inputs, tensors, strict=True):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            feeds[f"{name}_wide"] = tensor.float().numpy()
        elif name not in STORED and tensor.dtype not in STORED:
            feeds[name] = tensor.numpy()
    return feeds


def in_torch(
    operator: Operator, tensors: Sequence[torch.Tensor], attributes: Attributes, *, double: bool
) -> list[np.ndarray]:
    """The torch op's outputs as float64; double: computed so, from float32 inputs."""
    args = [tensor.double() if double and tensor.dtype == torch.float32 else tensor for tensor in tensors]
    given = {**operator.defaults, **attributes}
    outputs = operator.torch_op(*args, *(given[name] for name in operator.attributes))
    return [output.double().numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def session_of(model: onnx.ModelProto, native: bool, threads: int = 2) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdqisint8allowed", "1")  # fuse what is fused on ARM as well
    if native:
        options.register_custom_ops_library(str(native_operators.LIBRARY))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def in_native(
    operator: Operator, tensors: Sequence[torch.Tensor], attributes: Attributes
) -> dict[str, list[np.ndarray]]:
    """Outputs by instruction set; empty where the library is not built."""
    if not native_operators.is_available():
        return {}
    session, feeds = session_of(one_node_model(operator, tensors, attributes), native=True), feeds_of(operator, tensors)
    best, results = native_operators.instruction_set(), {}
    try:
        for instruction_set in filter(native_operators.use_instruction_set, INSTRUCTION_SETS):
            results[f"native {instruction_set}"] = session.run(None, feeds)
    finally:
        native_operators.use_instruction_set(best)
    return results


def everywhere(
    operator: Operator, tensors: Sequence[torch.Tensor], attributes: Attributes
) -> dict[str, list[np.ndarray]]:
    model, feeds = one_node_model(operator, tensors, attributes), feeds_of(operator, tensors)
    return {
        "torch": in_torch(operator, tensors, attributes, double=False),
        "onnxruntime": session_of(model, native=False).run(None, feeds),
        "onnx": ReferenceEvaluator(model).run(None, feeds),
        **in_native(operator, tensors, attributes),
    }


def ring(operator: Operator, tensors: Sequence[torch.Tensor], capacity: int) -> list[torch.Tensor]:
    """The same with a cache of that capacity, which holds the last rows of each sequence: that of position p at p mod capacity."""
    names = [name for name, _, _ in operator.inputs]
    result, lengths = list(tensors), tensors[names.index("past_len")].tolist()
    for at in (index for index, name in enumerate(names) if name in ("past_kv", "past_scale")):
        past = tensors[at]
        result[at] = past.new_zeros(*past.shape[:2], capacity, *past.shape[3:])
        if past.is_floating_point():
            result[at].fill_(float("nan"))
        for b, length in enumerate(lengths):
            for position in range(max(0, length - capacity), length):
                result[at][:, b, position % capacity] = past[:, b, position]
    return result


def check(
    operator: Operator,
    tensors: Sequence[torch.Tensor],
    attributes: Attributes,
    atol: float = 2e-5,
    rtol: float = 1e-4,
    like: Sequence[torch.Tensor] | None = None,
) -> None:
    """All ways agree with float64, of the same tensors or of those in `like`."""
    truth = in_torch(operator, like or tensors, attributes, double=True)
    for name, outputs in everywhere(operator, tensors, attributes).items():
        for output, expected in zip(outputs, truth, strict=True):
            np.testing.assert_allclose(output, expected, rtol=rtol, atol=atol, err_msg=f"{operator.name}, {name}")


def check_rounded(
    operator: Operator,
    tensors: Sequence[torch.Tensor],
    attributes: Attributes,
    most: float = 0.05,
    like: Sequence[torch.Tensor] | None = None,
) -> None:
    """For operators that round what they compute to few levels: the last bit of a float can move a number by a level, so a few
    results may be off by `most` of the largest one, and on average they are not."""
    truth = in_torch(operator, like or tensors, attributes, double=True)
    for name, outputs in everywhere(operator, tensors, attributes).items():
        for output, expected in zip(outputs, truth, strict=True):
            error = np.abs(output - expected) / (np.abs(expected).max() + 1e-6)
            assert np.isfinite(output).all(), f"{operator.name}, {name}"
            assert error.max() < most, f"{operator.name}, {name}: {error.max()}"
            assert error.mean() < most / 10, f"{operator.name}, {name}: {error.mean()}"
