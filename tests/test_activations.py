"""What quantized operators do to the inputs of their products: static scales, float8; in every form there is."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from harness import KINDS, OPERATORS, Attributes, check, check_rounded, everywhere, in_native, in_torch, session_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from test_operators import BLOCKS, FLOAT, FLOAT8, INT8, cache, experts, form, latent, norm_weight, quantized, randn

from mythos_export import ops
from mythos_export.export import attach_functions, bytes_of
from mythos_export.ops.operator import Operator
from mythos_export.ops.products import dequantize
from runtimes import native_operators
from runtimes.errors import InputError

FEW = settings(max_examples=12, deadline=None)
needs_library = pytest.mark.skipif(
    not native_operators.is_available(),
    reason="the native operators are not built; make native builds them, or says what is missing",
)
Case = tuple[Operator, list[torch.Tensor], Attributes]


def stored(weight: torch.Tensor, kind: str, block_size: int = 32) -> list[torch.Tensor]:
    """Values and scales of a matrix as "int4", "int8" or "float8"."""
    if kind != "float8":
        return quantized(weight, int(kind.removeprefix("int")), block_size, True)
    blocks = F.pad(weight, (0, -weight.shape[-1] % block_size)).unflatten(-1, (-1, block_size))
    scales = (blocks.abs().amax(-1) / 448).half()
    levels = (blocks / scales.float().unsqueeze(-1)).clamp(-448, 448).flatten(-2)[..., : weight.shape[-1]]
    return [levels.to(torch.float8_e4m3fn), scales]


def every_operator(seq: int, dim: int, hidden: int, kind: str, scales: tuple[float, ...] = ()) -> Iterator[Case]:
    """Each quantized operator with random tensors; scales: one for the first product and one for the second, or none."""
    one, two = torch.tensor(scales[:1]), torch.tensor(scales)
    x, residual, norm = randn(1, seq, dim), randn(1, seq, hidden), norm_weight(dim)
    weight = stored(randn(hidden, dim) / dim**0.5, kind)
    epsilon = {"epsilon": 1e-6}
    yield OPERATORS["QuantizedNormalizedLinear"], [x, norm, *weight, one], epsilon
    yield OPERATORS["QuantizedResidualLinear"], [residual, x, *weight, one], {}
    gate_up, down = randn(2 * hidden, dim) / dim**0.5, randn(dim, hidden) / hidden**0.5
    matrices = [*stored(gate_up, kind), *stored(down, kind)]
    yield OPERATORS["QuantizedFeedForward"], [x, norm, *matrices, two], epsilon
    *rest, gate_up, down = experts(1, seq, dim, hidden, 5, 1)
    matrices = [*stored(gate_up, kind), *stored(down, kind)]
    attributes = {"top_k": 2, **epsilon, "bits": 4 if kind == "int4" else 8}
    yield OPERATORS["QuantizedMixtureOfExperts"], [*rest, *matrices, two], attributes
    for dtype in (torch.float32, torch.int8):
        tensors = latent([4, 1], seq, 3, (dim, 2, 5, hidden))
        tensors[3:5] = stored(tensors[3] / dim**0.5, kind) + stored(tensors[4] / hidden**0.5, kind)
        name = f"QuantizedLatentAttention{'Int8Cache' if dtype == torch.int8 else ''}"
        tensors += [*cache(2, [4, 1], 6, hidden + 4, dtype), two]
        yield OPERATORS[name], tensors, {"scale": 0.05, **epsilon}


@FEW
@given(
    seq=st.integers(1, 20),
    n_in=st.integers(1, 75),
    n_out=st.integers(1, 20),
    block=BLOCKS,
    kind=st.sampled_from(["int4", "int8", "float8"]),
    activation_type=st.sampled_from([INT8, FLOAT8]),
)
def test_static_levels(seq: int, n_in: int, n_out: int, block: int, kind: str, activation_type: int) -> None:
    """Halves of a step, so every other number is a tie, far beyond the last level: symmetric, ties to even, saturating."""
    n_in, step, last = 2 * n_in, 2.0**-5, 1200
    x = torch.randint(-last, last + 1, (1, seq, n_in), generator=torch.Generator().manual_seed(seq)) * (step / 2)
    weight, scales = stored(randn(n_out, n_in) / n_in**0.5, kind, block)
    quotient = x.double().numpy() / step
    if activation_type == INT8:
        levels = np.clip(np.round(quotient), -127, 127)
    else:
        levels = np.clip(quotient, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    residual = randn(1, seq, n_out)
    truth = residual.double().numpy() + levels * step @ dequantize(weight, scales, block).double().numpy().T
    tensors = [residual, x, weight, scales, torch.tensor([step])]
    for name, (y,) in everywhere(OPERATORS["QuantizedResidualLinear"], tensors, form(block, activation_type)).items():
        np.testing.assert_allclose(y, truth, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "activation_type", "scales"),
    [
        ("int4", INT8, (0.02, 0.005)),
        ("int8", INT8, (0.02, 0.005)),
        ("int8", FLOAT8, (0.02, 0.005)),
        ("float8", FLOAT8, (0.02, 0.005)),
        ("float8", INT8, (0.02, 0.005)),
        ("float8", INT8, ()),
        ("float8", FLOAT, ()),
    ],
)
@settings(max_examples=2, deadline=None)
@given(seq=st.integers(1, 18), dim=st.integers(10, 30), hidden=st.integers(10, 30))
def test_every_operator(
    kind: str, activation_type: int, scales: tuple[float, ...], seq: int, dim: int, hidden: int
) -> None:
    """Some inputs saturate, and the scale of one product is not that of the other. A level of float8 is up to an eighth of its
    number, so one that falls to the other side shows."""
    for operator, tensors, attributes in every_operator(seq, 2 * dim, 2 * hidden, kind, scales):
        attributes = {**attributes, **form(32, activation_type)}
        if activation_type == FLOAT and "Int8Cache" not in operator.name:
            check(operator, tensors, attributes, atol=1e-4)
        else:
            check_rounded(operator, tensors, attributes, most=0.15 if activation_type == FLOAT8 else 0.05)


@pytest.mark.parametrize("activation_type", [INT8, FLOAT8])
def test_scales_of_a_loop(activation_type: int) -> None:
    """Inside a Loop, each turn takes its row of a table of scales."""
    operator, table = OPERATORS["QuantizedResidualLinear"], torch.tensor([[0.05], [0.004], [0.02]])
    x, weight = randn(1, 7, 40), quantized(randn(40, 40) / 7, 8, 32, True)
    attributes = form(32, activation_type)
    expected = x
    for scale in table:
        (y,) = in_torch(operator, [expected, expected, *weight, scale], attributes, double=False)
        expected = torch.from_numpy(y).float()
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "turn"], ["activation_scale"], axis=0),
            helper.make_node(
                operator.name, ["h", "h", "weight", "scale", "activation_scale"], ["y"], domain=ops.DOMAIN, **attributes
            ),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", FLOAT, [1, "seq", 40]),
        ],
        [
            helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", FLOAT, [1, "seq", 40]),
        ],
    )
    constants = {"table": table, "weight": weight[0], "scale": weight[1], "turns": torch.tensor(3)}
    graph = helper.make_graph(
        [helper.make_node("Loop", ["turns", "", "x"], ["out"], body=body)],
        "loop",
        [helper.make_tensor_value_info("x", FLOAT, [1, "seq", 40])],
        [helper.make_tensor_value_info("out", FLOAT, [1, "seq", 40])],
        [
            helper.make_tensor(name, KINDS[tensor.dtype], tensor.shape, bytes(bytes_of(tensor)), raw=True)
            for name, tensor in constants.items()
        ],
    )
    imports = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, ops.DOMAIN_VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=[operator.functions[""]])
    onnx.checker.check_model(model, full_check=True)
    for native in {False, native_operators.is_available()}:
        (out,) = session_of(model, native).run(None, {"x": x.numpy()})
        np.testing.assert_allclose(out, expected.numpy(), rtol=1e-4, atol=1e-4, err_msg=f"native: {native}")


def test_one_graph_with_both_bodies_of_the_mixture() -> None:
    """Stacks of float8 matrices need a body of their own: the graph carries both, and each node names its own."""
    operator, attributes = (
        OPERATORS["QuantizedMixtureOfExperts"],
        {"top_k": 2, "epsilon": 1e-6, "bits": 8, **form(32, FLOAT)},
    )
    *rest, gate_up, down = experts(1, 3, 8, 6, 4, 1)
    initializers, nodes, expected = [], [], rest[0]
    for index, kind in enumerate(["int8", "float8"]):
        tensors = [*rest[1:], *stored(gate_up, kind), *stored(down, kind), torch.empty(0)]
        names = [f"{name}_{index}" for name, _, _ in operator.inputs[1:]]
        for name, tensor in zip(names, tensors, strict=True):
            initializers.append(
                helper.make_tensor(name, KINDS[tensor.dtype], tensor.shape, bytes(bytes_of(tensor)), raw=True)
            )
        nodes.append(
            helper.make_node(operator.name, [f"x_{index}", *names], [f"x_{index + 1}"], domain=ops.DOMAIN, **attributes)
        )
        expected = torch.from_numpy(in_torch(operator, [expected, *tensors], attributes, double=False)[0]).float()
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x_0", FLOAT, [1, 3, 8])],
        [helper.make_tensor_value_info("x_2", FLOAT, [1, 3, 8])],
        initializers,
    )
    imports = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, ops.DOMAIN_VERSION)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))
    attach_functions(model)
    proto = ir.to_proto(model)
    assert [node.overload for node in proto.graph.node] == ["", "dequantized"]
    assert sorted(function.overload for function in proto.functions) == ["", "dequantized"]
    for native in {False, native_operators.is_available()}:
        (out,) = session_of(proto, native).run(None, {"x_0": rest[0].numpy()})
        np.testing.assert_allclose(out, expected.numpy(), rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("activation_type", [INT8, FLOAT8])
def test_nan_is_not_rounded_away(kind: str, activation_type: int) -> None:
    """A NaN makes its token's results NaN, in torch and in every kernel, and no other's; an infinity is the last level."""
    for tokens in (3, 20):
        x = randn(1, tokens, 70)
        x[0, 1, 68], x[0, 2, 3] = float("nan"), float("inf")
        tensors = [randn(1, tokens, 9), x, *stored(randn(9, 70), kind), torch.tensor([0.01])]
        operator, attributes = OPERATORS["QuantizedResidualLinear"], form(32, activation_type)
        results = {
            "torch": in_torch(operator, tensors, attributes, double=False),
            **in_native(operator, tensors, attributes),
        }
        for name, (y,) in results.items():
            assert np.isnan(y[0, 1]).all(), name
            assert np.isfinite(np.delete(y, 1, axis=1)).all(), name


@needs_library
@pytest.mark.parametrize(
    ("scales", "activation_type", "in_kernel", "in_python"),
    [
        ([0.1, 0.1], INT8, "one scale for every matrix, or none", "holds 2 scales; expected none or 1"),
        ([], FLOAT8, "FLOAT8E4M3FN needs static scales", "FLOAT8E4M3FN needs static scales"),
        (
            [],
            2,
            r"activation_type is not 1 \(FLOAT\), 3 \(INT8\) or 17",
            "activation_type is 2; expected one of 1, 3, 17",
        ),
        ([0.0], INT8, "not positive and finite", "not positive and finite"),
        ([float("nan")], FLOAT8, "not positive and finite", "not positive and finite"),
    ],
)
def test_bad_scales(scales: list[float], activation_type: int, in_kernel: str, in_python: str) -> None:
    tensors = [randn(1, 2, 4), randn(1, 2, 8), *quantized(randn(4, 8), 8, 32, True), torch.tensor(scales)]
    operator, attributes = OPERATORS["QuantizedResidualLinear"], form(32, activation_type)
    with pytest.raises(Exception, match=in_kernel):
        in_native(operator, tensors, attributes)
    with pytest.raises(InputError, match=in_python):
        in_torch(operator, tensors, attributes, double=False)
