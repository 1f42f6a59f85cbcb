"""What quantized operators do to the inputs of their products, in every form there is: static scales, and float8 numbers."""

from __future__ import annotations

import dataclasses
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
from onnx import helper, parser
from test_operators import BLOCKS, FLOAT, FLOAT8, INT8, cache, experts, form, latent, norm_weight, quantized, randn

from mythos_export import ops
from mythos_export.export import attach_functions, bytes_of
from mythos_export.ops import expert_bodies
from mythos_export.ops.operator import Body, Operator
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
        yield (
            OPERATORS[name],
            tensors,
            {"scale": 0.05, **epsilon, **({"row_scale": 0.0} if dtype == torch.int8 else {})},
        )


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


@pytest.mark.parametrize("limit", [0, 10**12], ids=["walking", "gathering"])
@pytest.mark.parametrize(("kind", "activation_type"), [("int4", INT8), ("int8", INT8), ("float8", FLOAT8)])
def test_both_forms_of_the_mixture(limit: int, kind: str, activation_type: int) -> None:
    """Whichever way the body takes, also with every token at one expert, and experts without tokens."""
    operator = OPERATORS["QuantizedMixtureOfExperts"]
    bodies = {"": operator.body, "dequantized": operator.other_bodies["dequantized"].text}
    bodies = {name: text.replace(str(expert_bodies.GATHER_LIMIT), str(limit)) for name, text in bodies.items()}
    others = {"dequantized": Body(bodies["dequantized"])}
    forced = dataclasses.replace(operator, body=bodies[""], other_bodies=others)
    attributes = {"epsilon": 1e-6, "bits": 4 if kind == "int4" else 8, **form(32, activation_type)}
    for tokens in (1, 17):
        *rest, gate_up, down = experts(1, tokens, 40, 36, 6, 1)
        tensors = [*rest, *stored(gate_up, kind), *stored(down, kind), torch.tensor([0.02, 0.005])]
        check_rounded(forced, tensors, {"top_k": 2, **attributes}, most=0.15)
        tensors[3][3] = 1e4
        check_rounded(forced, tensors, {"top_k": 1, **attributes}, most=0.15)


def model_of(graph: str, operator: Operator, constants: dict[str, torch.Tensor]) -> onnx.ModelProto:
    """The graph in ONNX's textual form, with the operator's main body and initializers."""
    imports = f'<ir_version: 10, opset_import: ["": {ops.OPSET}, "{ops.DOMAIN}": {ops.DOMAIN_VERSION}]>'
    model = parser.parse_model(f"{imports} {graph}")
    model.functions.append(operator.functions[""])
    model.graph.initializer.extend(
        helper.make_tensor(name, KINDS[tensor.dtype], tensor.shape, bytes(bytes_of(tensor)), raw=True)
        for name, tensor in constants.items()
    )
    return model


@pytest.mark.parametrize("activation_type", [INT8, FLOAT8])
def test_scales_of_a_loop(activation_type: int) -> None:
    """Inside a Loop, each turn takes its row of a table of scales."""
    operator, table = OPERATORS["QuantizedResidualLinear"], torch.tensor([[0.05], [0.004], [0.02]])
    x, (weight, scale) = randn(1, 7, 40), quantized(randn(40, 40) / 7, 8, 32, True)
    expected = x
    for row in table:
        tensors = [expected, expected, weight, scale, row]
        (y,) = in_torch(operator, tensors, form(32, activation_type), double=False)
        expected = torch.from_numpy(y).float()
    graph = f"""g (float[1, seq, 40] x) => (float[1, seq, 40] out) {{
      go = Constant <value = bool {{1}}> ()
      out = Loop <body = turn (int64 i, bool go_in, float[1, seq, 40] h) => (bool go_out, float[1, seq, 40] y) {{
        go_out = Identity(go_in)
        row = Gather <axis = 0> (table, i)
        y = ai.mythos.QuantizedResidualLinear <block_size = 32, activation_type = {activation_type}> (h, h, weight, scale, row)
      }}> (turns, go, x)
    }}"""
    model = model_of(graph, operator, {"table": table, "weight": weight, "scale": scale, "turns": torch.tensor(3)})
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
    constants, expected, nodes = {}, rest[0], []
    for index, kind in enumerate(["int8", "float8"]):
        tensors = [*rest[1:], *stored(gate_up, kind), *stored(down, kind), torch.empty(0)]
        names = [f"{name}_{index}" for name, _, _ in operator.inputs[1:]]
        constants |= dict(zip(names, tensors, strict=True))
        settings_text = ", ".join(f"{name} = {value:.7g}" for name, value in attributes.items())
        nodes.append(f"x{index + 1} = ai.mythos.{operator.name} <{settings_text}> (x{index}, {', '.join(names)})")
        (y,) = in_torch(operator, [expected, *tensors], attributes, double=False)
        expected = torch.from_numpy(y).float()
    graph = f"g (float[1, 3, 8] x0) => (float[1, 3, 8] x2) {{ {' '.join(nodes)} }}"
    model = ir.from_proto(model_of(graph, operator, constants))
    attach_functions(model)
    proto = ir.to_proto(model)
    assert [node.overload for node in proto.graph.node] == ["", "dequantized"]
    assert {"", "dequantized"} <= {function.overload for function in proto.functions}
    for native in {False, native_operators.is_available()}:
        (out,) = session_of(proto, native).run(None, {"x0": rest[0].numpy()})
        np.testing.assert_allclose(out, expected.numpy(), rtol=1e-4, atol=1e-4, err_msg=f"native: {native}")


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
