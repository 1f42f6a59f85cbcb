"""The operators: torch op, portable body on onnxruntime and in onnx's evaluator, native kernels with every instruction set where
they are built, and float64, agree on any shape."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from harness import OPERATORS, check, check_rounded, everywhere, feeds_of, in_torch, one_node_model, ring, session_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from calibration.rounding import Format, pack_int4, round_to_nearest
from mythos_export import ops
from mythos_export.ops import expert_bodies
from runtimes import native_operators

FLOAT, INT8, FLOAT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN
GENERATOR = torch.Generator().manual_seed(0)
SMALL = st.integers(1, 5)
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=3)
BLOCKS = st.sampled_from([32, 64, 128])
CACHES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
ROW_SCALES = st.sampled_from([0.0, 0.01, 0.04])  # each row's own; fixed, too small for some rows; wide enough for all
FEW = settings(max_examples=15, deadline=None)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def norm_weight(dim: int) -> torch.Tensor:
    return torch.rand(dim, generator=GENERATOR) + 0.5


def quantized(weight: torch.Tensor, bits: int, block_size: int, half: bool) -> list[torch.Tensor]:
    """Values and scales as the operators take them."""
    values, scales = round_to_nearest(weight, Format(f"int{bits}", block_size))
    return [pack_int4(values) if bits == 4 else values, scales if half else scales.float()]


def form(block_size: int, activation_type: int) -> dict[str, float]:
    return {"block_size": block_size, "activation_type": activation_type}


DYNAMIC = torch.empty(0)  # activation_scale where every block of every token has a scale


@FEW
@given(batch=SMALL, seq=st.integers(1, 20), n_in=st.integers(1, 40), n_out=st.integers(1, 40))
def test_linear(batch: int, seq: int, n_in: int, n_out: int) -> None:
    x, weight = randn(batch, seq, n_in), randn(n_out, n_in) / n_in**0.5
    check(OPERATORS["NormalizedLinear"], [x, norm_weight(n_in), weight], {"epsilon": 1e-6})
    check(OPERATORS["ResidualLinear"], [randn(batch, seq, n_out), x, weight], {})


@FEW
@given(
    seq=st.integers(1, 20),
    n_in=st.integers(1, 150),
    n_out=st.integers(1, 30),
    block=BLOCKS,
    half=st.booleans(),
    bits=st.sampled_from([4, 8]),
)
def test_quantized_linear(seq: int, n_in: int, n_out: int, block: int, half: bool, bits: int) -> None:
    n_in = n_in + n_in % 2 if bits == 4 else n_in
    x, pair = randn(1, seq, n_in), quantized(randn(n_out, n_in) / n_in**0.5, bits, block, half)
    residual, norm = randn(1, seq, n_out), norm_weight(n_in)
    for operator, tensors, attributes in (
        (OPERATORS["QuantizedNormalizedLinear"], [x, norm, *pair, DYNAMIC], {"epsilon": 1e-6}),
        (OPERATORS["QuantizedResidualLinear"], [residual, x, *pair, DYNAMIC], {}),
    ):
        check(operator, tensors, {**attributes, **form(block, FLOAT)})
        check_rounded(operator, tensors, {**attributes, **form(block, INT8)})


@FEW
@given(seq=st.integers(1, 20), dim=st.integers(1, 40), hidden=st.integers(1, 40), bits=st.sampled_from([4, 8]))
def test_feed_forward(seq: int, dim: int, hidden: int, bits: int) -> None:
    gate_up, down = randn(2 * hidden, dim) / dim**0.5, randn(dim, hidden) / hidden**0.5
    check(OPERATORS["FeedForward"], [randn(1, seq, dim), norm_weight(dim), gate_up, down], {"epsilon": 1e-6})
    of_down = 8 if hidden % 2 else bits  # int4 takes an even number of input channels
    pairs = quantized(gate_up, 8 if dim % 2 else bits, 32, True) + quantized(down, of_down, 32, True)
    tensors = [randn(1, seq, dim), norm_weight(dim), *pairs, DYNAMIC]
    check(OPERATORS["QuantizedFeedForward"], tensors, {"epsilon": 1e-6, **form(32, FLOAT)})
    check_rounded(OPERATORS["QuantizedFeedForward"], tensors, {"epsilon": 1e-6, **form(32, INT8)})


def experts(batch: int, seq: int, dim: int, hidden: int, routed: int, shared: int) -> list[torch.Tensor]:
    return [
        randn(batch, seq, dim),
        norm_weight(dim),
        randn(routed, dim),
        randn(routed),
        randn(routed + shared, 2 * hidden, dim) / dim**0.5,
        randn(routed + shared, dim, hidden) / hidden**0.5,
    ]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    seq=st.integers(1, 12),
    dim=st.integers(1, 9),
    hidden=st.integers(1, 9),
    routed=st.integers(1, 12),
    shared=st.integers(0, 3),
    data=st.data(),
)
def test_mixture_of_experts(
    batch: int, seq: int, dim: int, hidden: int, routed: int, shared: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, routed))
    tensors = experts(batch, seq, dim, hidden, routed, shared)
    check(OPERATORS["MixtureOfExperts"], tensors, {"top_k": top_k, "epsilon": 1e-6})


@FEW
@given(
    scoring=st.sampled_from([0, 1]),
    normalized=st.sampled_from([0, 1]),
    groups=st.integers(1, 4),
    group=st.integers(1, 4),
    data=st.data(),
)
def test_experts_are_chosen_and_weighed_in_every_way(
    scoring: int, normalized: int, groups: int, group: int, data: st.DataObject
) -> None:
    """By softmax or sigmoid, normalized or not, scaled, out of the best groups."""
    best_groups = data.draw(st.integers(1, groups))
    attributes = {
        "top_k": data.draw(st.integers(1, best_groups * group)),
        "epsilon": 1e-6,
        "scoring": scoring,
        "normalized": normalized,
        "scale": data.draw(st.sampled_from([1.0, 2.5])),
        "n_groups": groups,
        "top_k_groups": best_groups,
        "group_top_k": data.draw(st.integers(1, min(2, group))),
    }
    check(OPERATORS["MixtureOfExperts"], experts(1, 7, 9, 6, groups * group, 1), attributes)


def test_a_mixture_without_what_later_versions_added() -> None:
    """Nodes of earlier bundles lack these attributes: natively and through the body they mean what they meant."""
    tensors, attributes = experts(1, 5, 8, 6, 6, 1), {"top_k": 2, "epsilon": 1e-6}
    (expected,) = in_torch(OPERATORS["MixtureOfExperts"], tensors, attributes, double=True)
    model = one_node_model(OPERATORS["MixtureOfExperts"], tensors, attributes)
    (node,) = (node for node in model.graph.node if node.op_type == "MixtureOfExperts")
    kept = [attribute for attribute in node.attribute if attribute.name in attributes]
    del node.attribute[:]
    node.attribute.extend(kept)
    for native in {False, native_operators.is_available()}:
        (y,) = session_of(model, native).run(None, feeds_of(OPERATORS["MixtureOfExperts"], tensors))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=2e-5)


@FEW
@given(
    seq=st.integers(1, 12),
    dim=st.integers(1, 40),
    hidden=st.integers(1, 40),
    shared=st.integers(0, 2),
    bits=st.sampled_from([4, 8]),
    half=st.booleans(),
)
def test_quantized_mixture_of_experts(seq: int, dim: int, hidden: int, shared: int, bits: int, half: bool) -> None:
    bits = 8 if dim % 2 or hidden % 2 else bits
    *rest, gate_up, down = experts(1, seq, dim, hidden, 6, shared)
    tensors = [*rest, *quantized(gate_up, bits, 32, half), *quantized(down, bits, 32, half), DYNAMIC]
    attributes = {"top_k": 2, "epsilon": 1e-6, "bits": bits}
    check(OPERATORS["QuantizedMixtureOfExperts"], tensors, {**attributes, **form(32, FLOAT)})
    check_rounded(OPERATORS["QuantizedMixtureOfExperts"], tensors, {**attributes, **form(32, INT8)})


@pytest.mark.parametrize("limit", [0, 10**12], ids=["walking", "gathering"])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_both_forms_of_the_mixture(limit: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way the body takes, the result is one: also with every token at one expert, and experts without tokens."""
    operator = OPERATORS["MixtureOfExperts" if bits == 32 else "QuantizedMixtureOfExperts"]
    forced = dataclasses.replace(operator, body=operator.body.replace(str(expert_bodies.GATHER_LIMIT), str(limit)))
    for tokens in (1, 17):
        tensors = experts(1, tokens, 8, 6, 6, 1)
        quantization = {}
        if bits < 32:
            *rest, gate_up, down = tensors
            tensors = [*rest, *quantized(gate_up, bits, 32, True), *quantized(down, bits, 32, True), DYNAMIC]
            quantization = {"bits": bits, **form(32, FLOAT)}
        check(forced, tensors, {"top_k": 2, "epsilon": 1e-6, **quantization})
        tensors[3][3] = 1e4  # the bias sends all tokens to expert 3, and moves no weight
        check(forced, tensors, {"top_k": 1, "epsilon": 1e-6, **quantization})


def cache(slots: int, lengths: list[int], capacity: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """past_kv (and past_scale) with rubbish in the dead rows, past_len, and a slot."""
    past_kv, past_scale = randn(slots, len(lengths), capacity, width).to(dtype), []
    if dtype == torch.int8:
        past_kv = torch.randint(-127, 128, past_kv.shape, generator=GENERATOR).to(torch.int8)
        past_scale = [torch.rand(slots, len(lengths), capacity, generator=GENERATOR) / 100]
    for b, length in enumerate(lengths):
        (past_scale[0] if past_scale else past_kv)[:, b, length:] = float("nan")
    return [past_kv, *past_scale, torch.tensor(lengths), torch.tensor(slots - 1)]


def latent(lengths: list[int], seq: int, heads: int, sizes: tuple[int, int, int, int]) -> list[torch.Tensor]:
    nope, half, value, rank = sizes
    batch, rope = len(lengths), 2 * half
    return [
        randn(batch, seq, heads * (nope + rope)),
        randn(batch, seq, rank + rope),
        norm_weight(rank),
        randn(heads, rank, nope),
        randn(heads, value, rank),
        randn(batch, seq, half),
        randn(batch, seq, half),
    ]


@settings(max_examples=20, deadline=None)
@given(
    lengths=LENGTHS,
    seq=SMALL,
    heads=SMALL,
    nope=SMALL,
    half=st.integers(1, 3),
    value=SMALL,
    rank=SMALL,
    extra=SMALL,
    dtype=CACHES,
)
def test_latent_attention(
    lengths: list[int],
    seq: int,
    heads: int,
    nope: int,
    half: int,
    value: int,
    rank: int,
    extra: int,
    dtype: torch.dtype,
) -> None:
    tensors = latent(lengths, seq, heads, (nope, half, value, rank))
    tensors += cache(3, lengths, max(lengths) + extra, rank + 2 * half, dtype)
    attributes = {"scale": 0.25, "epsilon": 1e-6}
    if dtype == torch.float32:
        check(OPERATORS["LatentAttention"], tensors, attributes)
    else:
        check_rounded(OPERATORS["LatentAttention"], tensors, attributes)


@FEW
@given(lengths=LENGTHS, seq=SMALL, heads=SMALL, extra=SMALL, bits=st.sampled_from([4, 8, 32]), row_scale=ROW_SCALES)
def test_latent_attention_int8_cache(
    lengths: list[int], seq: int, heads: int, extra: int, bits: int, row_scale: float
) -> None:
    tensors = latent(lengths, seq, heads, (4, 2, 5, 6))
    tensors += cache(2, lengths, max(lengths) + extra, 10, torch.int8)
    attributes, name = {"scale": 0.25, "epsilon": 1e-6, "row_scale": row_scale}, "LatentAttentionInt8Cache"
    if bits < 32:
        tensors[3:5] = [*quantized(tensors[3], bits, 32, True), *quantized(tensors[4], bits, 32, True)]
        tensors.append(DYNAMIC)
        attributes, name = {**attributes, **form(32, INT8)}, f"Quantized{name}"
    check_rounded(OPERATORS[name], tensors, attributes)


@FEW
@given(lengths=LENGTHS, seq=SMALL, nope=st.integers(1, 40), rank=st.integers(1, 40), bits=st.sampled_from([4, 8]))
def test_quantized_latent_attention(lengths: list[int], seq: int, nope: int, rank: int, bits: int) -> None:
    tensors = latent(lengths, seq, 3, (nope, 2, 5, rank))
    tensors += cache(2, lengths, max(lengths) + 1, rank + 4, torch.float32)
    tensors[3:5] = quantized(tensors[3], 8 if nope % 2 else bits, 32, True) + quantized(
        tensors[4], 8 if rank % 2 else bits, 32, True
    )
    tensors.append(DYNAMIC)
    attributes = {"scale": 0.05, "epsilon": 1e-6}
    check(OPERATORS["QuantizedLatentAttention"], tensors, {**attributes, **form(32, FLOAT)}, atol=1e-4)
    check_rounded(OPERATORS["QuantizedLatentAttention"], tensors, {**attributes, **form(32, INT8)})


@settings(max_examples=25, deadline=None)
@given(
    lengths=LENGTHS,
    seq=SMALL,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 3),
    extra=st.integers(-4, 5),
    window=st.sampled_from([0, 1, 2, 4, 100]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]),
    row_scale=ROW_SCALES,
)
def test_grouped_query_attention(
    lengths: list[int],
    seq: int,
    kv_heads: int,
    group: int,
    half: int,
    extra: int,
    window: int,
    dtype: torch.dtype,
    row_scale: float,
) -> None:
    """A cache with room for all, or, with a window, for fewer."""
    batch, heads = len(lengths), kv_heads * group
    tensors = [
        randn(batch, seq, (heads + 2 * kv_heads) * 2 * half),
        randn(batch, seq, half),
        randn(batch, seq, half),
        *cache(2, lengths, max(lengths) + max(extra, 1), 4 * kv_heads * half, dtype),
    ]
    attributes = {"n_heads": heads, "n_kv_heads": kv_heads, "window": window, "scale": 0.25}
    name = "GroupedQueryAttention"
    if dtype == torch.int8:
        attributes, name = {**attributes, "row_scale": row_scale}, f"{name}Int8Cache"
    capacity = max(1, max(lengths) + extra, window - 1 if window else max(lengths))
    given = ring(OPERATORS[name], tensors, capacity)
    (check if dtype == torch.float32 else check_rounded)(OPERATORS[name], given, attributes, like=tensors)


@FEW
@given(
    largest=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    row_scale=st.sampled_from([0.0, 0.0078125, 0.5]),
    seq=SMALL,
    kv_heads=SMALL,
)
def test_rows_of_an_int8_cache(largest: float, row_scale: float, seq: int, kv_heads: int) -> None:
    """What is stored: the nearest level of each row's own scale, largest magnitude / 127, or of the fixed one, cut off at 127."""
    width = 4 * kv_heads
    value = torch.randn(1, seq, 3 * kv_heads, 2, generator=GENERATOR)
    value *= largest / value.abs().max()
    upright = [torch.ones(1, seq, 1), torch.zeros(1, seq, 1)]  # cos and sin of no rotation
    tensors = [value.flatten(2), *upright, *cache(1, [0], 1, width, torch.int8)]
    attributes = {"n_heads": kv_heads, "n_kv_heads": kv_heads, "window": 0, "scale": 0.5, "row_scale": row_scale}
    rows = value[:, :, kv_heads:].flatten(2).double().numpy()
    scale = np.full((1, seq), row_scale) if row_scale else np.abs(rows).max(-1) / 127
    wanted = np.clip(rows, -127 * scale[..., None], 127 * scale[..., None])
    results = everywhere(OPERATORS["GroupedQueryAttentionInt8Cache"], tensors, attributes)
    for name, (_, new_kv, new_scale) in results.items():
        np.testing.assert_allclose(new_scale, scale, rtol=1e-6, err_msg=name)
        assert np.abs(new_kv).max() <= 127, name
        error = np.abs(new_kv * new_scale[..., None] - wanted)
        assert (error <= 0.5001 * new_scale[..., None]).all(), name


@FEW
@given(batch=SMALL, seq=SMALL, dim=st.integers(1, 20), rank=SMALL, per_row=st.booleans())
def test_recurrent(batch: int, seq: int, dim: int, rank: int, per_row: bool) -> None:
    x, h, e, result = (randn(batch, seq, dim) for _ in range(4))
    loop = torch.tensor(2)
    check(OPERATORS["RecurrentInput"], [h, e, randn(4, dim), norm_weight(dim), loop], {"epsilon": 1e-6})
    mass = torch.rand(batch, seq, 1, generator=GENERATOR) * 1.2
    exit_loop = torch.randint(0, 3, (batch, seq, 1), generator=GENERATOR)
    n_loops = torch.randint(1, 5, (batch if per_row else 1,), generator=GENERATOR)
    tables = [randn(rank, dim), randn(4, rank), randn(rank, dim), randn(dim), randn(dim), randn(dim), randn(1)]
    tensors = [x, h, e, result, mass, exit_loop, loop, n_loops, *tables]
    check(OPERATORS["RecurrentUpdate"], tensors, {"act_threshold": 0.9}, atol=1e-4)


def test_schemas_infer_shapes() -> None:
    ops.register_schemas()
    ops.register_schemas()  # twice is once
    operator = OPERATORS["LatentAttention"]
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {ops.OPSET}, "ai.mythos": 1]> g (float[b, s, 27] q, float[b, s, 10] kv, '
        "float[6] kv_norm, float[3, 6, 5] w_uk, float[3, 7, 6] w_uv, float[b, s, 2] cos, float[b, s, 2] sin, "
        "float16[n, b, c, 10] past_kv, int64[b] past_len, int64 slot) => (float y0, float16 rows) "
        "{ y0, rows = ai.mythos.LatentAttention <scale = 0.1, epsilon = 1e-6> "
        "(q, kv, kv_norm, w_uk, w_uv, cos, sin, past_kv, past_len, slot) }"
    )
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    model.functions.append(operator.functions[""])
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    shapes = [[d.dim_param or d.dim_value for d in out.type.tensor_type.shape.dim] for out in inferred.graph.output]
    assert shapes == [["b", "s", 21], ["b", "s", 10]]
