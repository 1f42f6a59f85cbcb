"""The three operators: torch op, portable body on onnxruntime and in onnx's evaluator, native kernels with every instruction
set where they are built, and float64, agree on any shape."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from onnx.reference import ReferenceEvaluator

from mythos_export import ops
from mythos_export.ops import mixture_of_experts
from mythos_export.ops.operator import Operator
from runtimes import native_operators

OPERATORS = {operator.name: operator for operator in ops.OPERATORS}
KINDS = {torch.float32: "float", torch.int64: "int64", torch.float16: "float16"}
INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "neon")
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def one_node_model(operator: Operator, tensors: list[torch.Tensor], attributes: str) -> onnx.ModelProto:
    names = [name for name, _, _ in operator.inputs]
    typed = ", ".join(
        f"{KINDS[tensor.dtype]}[{', '.join(map(str, tensor.shape))}] {name}".replace("[]", "")
        for name, tensor in zip(names, tensors, strict=True)
    )
    out_names = [name for name, _, _ in operator.outputs]
    outputs = ", ".join(f"{KINDS[tensors[0].dtype]}[{name}_0, {name}_1, {name}_2] {name}" for name in out_names)
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {ops.OPSET}, "{ops.DOMAIN}": {ops.DOMAIN_VERSION}]> '
        f"one_node ({typed}) => ({outputs}) "
        f"{{ {', '.join(out_names)} = {ops.DOMAIN}.{operator.name} <{attributes}> ({', '.join(names)}) }}"
    )
    model.functions.append(operator.function)
    return model


def check(operator: Operator, tensors: list[torch.Tensor], attributes: dict[str, float], atol: float = 2e-5) -> None:
    text = ", ".join(f"{name} = {value}" for name, value in attributes.items())
    model = one_node_model(operator, tensors, text)
    onnx.checker.check_model(model, full_check=True)
    feeds = {name: tensor.numpy() for (name, _, _), tensor in zip(operator.inputs, tensors, strict=True)}
    wide = [tensor.double() if tensor.dtype == torch.float32 else tensor for tensor in tensors]
    truth = as_tuple(operator.torch_op(*wide, *attributes.values()))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    results = {
        "torch": [output.numpy() for output in as_tuple(operator.torch_op(*tensors, *attributes.values()))],
        "onnxruntime": onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds),
        "onnx": ReferenceEvaluator(model).run(None, feeds),
    }
    if native_operators.is_available():
        options.register_custom_ops_library(str(native_operators.LIBRARY))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        best = native_operators.instruction_set()
        for instruction_set in filter(native_operators.use_instruction_set, INSTRUCTION_SETS):
            results[f"native {instruction_set}"] = session.run(None, feeds)
        native_operators.use_instruction_set(best)
    for name, outputs in results.items():
        for output, expected in zip(outputs, truth, strict=True):
            np.testing.assert_allclose(output, expected.numpy(), rtol=1e-4, atol=atol, err_msg=name)


def as_tuple(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def past(slots: int, lengths: list[int], capacity: int, width: int) -> list[torch.Tensor]:
    """past_kv with NaN in its dead rows, past_len, and a slot."""
    past_kv = randn(slots, len(lengths), capacity, width)
    for b, length in enumerate(lengths):
        past_kv[:, b, length:] = float("nan")
    return [past_kv, torch.tensor(lengths), torch.tensor(slots - 1)]


SMALL = st.integers(1, 5)
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=3)


@settings(max_examples=20, deadline=None)
@given(
    lengths=LENGTHS, seq=SMALL, heads=SMALL, nope=SMALL, half=st.integers(1, 3), value=SMALL, rank=SMALL, extra=SMALL
)
def test_latent_attention(
    lengths: list[int], seq: int, heads: int, nope: int, half: int, value: int, rank: int, extra: int
) -> None:
    batch, rope = len(lengths), 2 * half
    tensors = [
        randn(batch, seq, heads * (nope + rope)),
        randn(batch, seq, rank + rope),
        torch.rand(rank, generator=GENERATOR) + 0.5,
        randn(heads, nope, rank),
        randn(heads, value, rank),
        randn(batch, seq, half),
        randn(batch, seq, half),
        *past(3, lengths, max(lengths) + extra, rank + rope),
    ]
    check(OPERATORS["LatentAttention"], tensors, {"scale": 0.25, "epsilon": 1e-6})


@settings(max_examples=20, deadline=None)
@given(
    lengths=LENGTHS, seq=SMALL, kv_heads=st.integers(1, 3), group=st.integers(1, 3), half=st.integers(1, 3), extra=SMALL
)
def test_grouped_query_attention(
    lengths: list[int], seq: int, kv_heads: int, group: int, half: int, extra: int
) -> None:
    batch, heads = len(lengths), kv_heads * group
    tensors = [
        randn(batch, seq, (heads + 2 * kv_heads) * 2 * half),
        randn(batch, seq, half),
        randn(batch, seq, half),
        *past(2, lengths, max(lengths) + extra, 4 * kv_heads * half),
    ]
    check(OPERATORS["GroupedQueryAttention"], tensors, {"n_heads": heads, "n_kv_heads": kv_heads, "scale": 0.25})


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    seq=st.integers(1, 12),
    dim=st.integers(1, 9),
    hidden=st.integers(1, 9),
    experts=st.integers(1, 12),
    data=st.data(),
)
def test_mixture_of_experts(batch: int, seq: int, dim: int, hidden: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    tensors = moe_tensors(batch, seq, dim, hidden, experts)
    check(OPERATORS["MixtureOfExperts"], tensors, {"top_k": top_k})


@pytest.mark.parametrize("limit", [0, 10**12], ids=["walking", "gathering"])
def test_both_forms_of_the_mixture(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way the body takes, the result is one: also with every token at one expert, and experts without tokens."""
    operator = OPERATORS["MixtureOfExperts"]
    body = operator.body.replace(str(mixture_of_experts.GATHER_LIMIT), str(limit))
    forced = dataclasses.replace(operator, body=body)
    for tokens in (1, 17):
        tensors = moe_tensors(1, tokens, 8, 5, 6)
        check(forced, tensors, {"top_k": 2})
        tensors[2][3] = 1e4  # the bias sends all tokens to expert 3, and moves no weight
        check(forced, tensors, {"top_k": 1})


def moe_tensors(batch: int, seq: int, dim: int, hidden: int, experts: int) -> list[torch.Tensor]:
    return [
        randn(batch, seq, dim),
        randn(dim, experts),
        randn(experts),
        randn(experts, 2 * hidden, dim) / dim**0.5,
        randn(experts, dim, hidden) / hidden**0.5,
    ]


def test_schemas_infer_shapes() -> None:
    ops.register_schemas()
    ops.register_schemas()  # twice is once
    operator = OPERATORS["LatentAttention"]
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {ops.OPSET}, "ai.mythos": 1]> g (float[b, s, 27] q, float[b, s, 10] kv, '
        "float[6] kv_norm, float[3, 5, 6] w_uk, float[3, 7, 6] w_uv, float[b, s, 2] cos, float[b, s, 2] sin, "
        "float[n, b, c, 10] past_kv, int64[b] past_len, int64 slot) => (float y0, float rows) "
        "{ y0, rows = ai.mythos.LatentAttention <scale = 0.1, epsilon = 1e-6> "
        "(q, kv, kv_norm, w_uk, w_uv, cos, sin, past_kv, past_len, slot) }"
    )
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    model.functions.append(operator.function)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    shapes = [[d.dim_param or d.dim_value for d in out.type.tensor_type.shape.dim] for out in inferred.graph.output]
    assert shapes == [["b", "s", 21], ["b", "s", 10]]
