"""Calls of the CUDA kernels on a GPU: sizes that are refused, nothing to do, and CUDA graphs."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from cuda_device import Call, Form, blank, integers, library, norm_weight, normal, parse, torch
from cuda_header import STRUCTS

VALID = {
    "linear": "dtype=float16 tokens=2 inputs=64 outputs=32 residual=0",
    "experts": "dtype=int4 block=32 tokens=2 dim=64 expert_dim=64 top_k=2 routed=4 shared=1",
    "attention": "batch=1 seq=2 n_heads=4 nope=16 rope=8 rank=32 v_head_dim=16 capacity=8",
    "routing": "tokens=2 experts=64 top_k=4 groups=4 top_k_groups=2 group_top_k=1",
    "recurrent_input": "tokens=2 dim=64",
    "recurrent_update": "batch=1 seq=2 dim=64 lora_rank=2",
    "append": "slots=1 batch=1 seq=2 capacity=4 row_bytes=16",
    "likeliest": "rows=2 vocab=64",
    "choose": "rows=2 vocab=64 temperature=1 top_p=1 repetition_penalty=1",
    "advance": "batch=2",
    "embedding": "dtype=int8 block=32 tokens=2 rows=4 dim=64",
    "position_rows": "batch=1 seq=2 rows=4 dim=64",
    "pick_rows": "batch=1 seq=2 count=1 dim=64",
    "stack": "count=1 bytes=16",
}
REFUSED = {  # a change each, or several that go together
    "linear": "dtype=6 dtype=-1 dtype=int4,block=48 tokens=-1 inputs=0 inputs=99999 outputs=0 split=32 split=-1 split=8,residual=1",
    "experts": "block=48 scale_dtype=2 dim=63 expert_dim=0 top_k=5 shared=-1 tokens=1073741824",
    "attention": "dtype=3 cache_dtype=4 cache_dtype=3,row_scale=-1 rank=513 rope=7 nope=0 window=-1 n_kv_heads=3 seq=65536 "
    "capacity=-1",
    "routing": "top_k=0 top_k=33 experts=63 groups=0 top_k_groups=5 group_top_k=17 experts=2048",
    "recurrent_input": "dim=0 dim=8193 tokens=-1 result=0 exit_loop=0",
    "recurrent_update": "dim=0 dim=8193 lora_rank=-1 batch=-1 loop_signal=0 norm=0",
    "append": "capacity=0 row_bytes=0 batch=65536 slots=-1",
    "likeliest": "vocab=0 rows=65536",
    "choose": "vocab=0 vocab=1048577 rows=-1 top_k=-1 temperature=-1 top_p=0 top_p=2 min_p=-1 min_p=2 repetition_penalty=0",
    "advance": "batch=-1",
    "embedding": "dtype=6 rows=0 dim=0 block=0 tokens=-1 scales=0",
    "position_rows": "rows=0 dim=0 batch=65536 seq=-1",
    "pick_rows": "seq=0 dim=0 batch=65536 count=-1",
    "stack": "count=-1",
}


def call_over(memory: Any, kind: str, change: str) -> Call:
    """Whatever has an address is the same memory."""
    addresses = {name: memory for name, field in STRUCTS[kind]._fields_ if field is ctypes.c_void_p}
    workspace = {"workspace_bytes": 2**40} if "workspace" in addresses else {}
    return Call(kind, **addresses | workspace | parse(VALID[kind]) | parse(change, ","))


@pytest.mark.parametrize("kind", VALID)
def test_bad_sizes_are_refused(kind: str) -> None:
    memory = blank(1 << 20, dtype=torch.uint8)
    for change in ["size=8", *REFUSED[kind].split()]:
        call = call_over(memory, kind, change)
        assert call.enqueue() != 0, change
        assert "workspace" not in call.names or call.workspace_bytes() == 0, change
    if "workspace" in call.names:
        least = call_over(memory, kind, "workspace_bytes=0").workspace_bytes()
        assert call_over(memory, kind, f"workspace_bytes={least - 1}").enqueue() != 0
    assert getattr(library(), f"mythos_cuda_{kind}_launch")(None, None) != 0
    torch.cuda.synchronize()
    assert bool((memory == 255).all())


@pytest.mark.parametrize("kind", VALID)
def test_nothing_to_do(kind: str) -> None:
    """No tokens, no sequences: it is done, and writes nothing."""
    memory = blank(1 << 20, dtype=torch.uint8)
    counts = parse(VALID[kind]).keys() & {"tokens", "batch", "seq", "count", "slots"}
    for name in counts - ({"seq"} if kind == "pick_rows" else set()) or {"rows"}:  # rows to pick from there must be
        call_over(memory, kind, f"{name}=0").run()
    assert bool((memory == 255).all())


def test_a_graph_replays_them() -> None:
    """Of a router, experts, the logits and the choice of a token: with other inputs as well."""
    x, norm, bias = normal(6, 128), norm_weight(128), normal(8)
    router, out = Form("float32").weights(8, 128)[0], Form("float16").weights(300, 128)[0]
    gate_up, down = Form("float16").weights(8, 2 * 64, 128)[0], Form("float16").weights(8, 128, 64)[0]
    routed, chosen, weight = blank(6, 8), blank(6, 2, dtype=torch.int32), blank(6, 2)
    mixed, logits, best, logprobs = blank(6, 128), blank(6, 300), blank(6, dtype=torch.int64), blank(6)
    past_len, counts = integers(0, 1, 6), integers(1, 4, 6)
    first, last = (
        parse("dtype=float32 tokens=6 inputs=128 outputs=8"),
        parse("dtype=float16 tokens=6 inputs=128 outputs=300"),
    )
    router_sizes = parse("tokens=6 experts=8 top_k=2 normalized=1 scale=1 groups=1 top_k_groups=1 group_top_k=1")
    experts = parse("dtype=float16 tokens=6 dim=128 expert_dim=64 top_k=2 routed=8")
    experts |= {
        "gate_up_routed": gate_up,
        "down_routed": down,
        "normed": x,
        "residual": x,
        "norm": norm,
        "epsilon": 1e-6,
    }
    calls = [
        Call("linear", **first, x=x, weight=router, y=routed),
        Call("routing", **router_sizes, logits=routed, bias=bias, chosen=chosen, weight=weight),
        Call("experts", **experts, chosen=chosen, weight=weight, mixed=mixed),
        Call("linear", **last, norm=norm, epsilon=1e-6, x=mixed, weight=out, y=logits),
        Call("likeliest", rows=6, vocab=300, logits=logits, tokens=best, logprobs=logprobs),
        Call("advance", batch=6, past_len=past_len, counts=counts),
    ]
    outputs = [routed, chosen, weight, mixed, logits, best, logprobs]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for call in calls:
        call.run()
    with torch.cuda.graph(graph, stream=stream):
        assert [call.enqueue() for call in calls] == [0] * len(calls)
    for replay in (1, 2, 3):
        for call in calls[:-1]:
            call.run()
        want = [output.clone() for output in outputs]
        for output in outputs:
            output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for got, expected in zip(outputs, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(past_len, (1 + replay) * counts)
        x.copy_(normal(6, 128))


@pytest.mark.parametrize("cache_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("groups", "batch", "capacity"), [(0, 32, 1200), (2, 32, 1200), (0, 1, 40000), (0, 2, 9000)])
def test_rows_and_lengths_of_the_kernels_right_before(groups: int, batch: int, capacity: int, cache_dtype: str) -> None:
    """Steps one behind the other give what they do with waits between: rows are read before the kernels in front have ended. So
    many sequences, or so long ones, that a block has several steps of rows."""
    steps, heads = 20, 4
    width, out = (2 * groups * 32, 32) if groups else (64 + 16, 16)
    head, half = (32, 16) if groups else (16 + 16, 8)
    sizes = parse(f"batch={batch} seq=1 n_heads={heads} capacity={capacity}")
    sizes |= parse(f"n_kv_heads={groups} v_head_dim=32" if groups else "nope=16 rope=16 rank=64 v_head_dim=16")
    given = {"w_uk": normal(heads, 64, 16), "w_uv": normal(heads, 16, 64), "kv_norm": norm_weight(64)}
    widths = {"q": (heads + 2 * groups) * head, "kv": 80, "cos": half, "sin": half}
    inputs = [{name: normal(batch, columns) for name, columns in widths.items()} for _ in range(steps)]
    filled = normal(batch, capacity, width, dtype=cache_dtype)
    lengths = capacity - 30 - torch.arange(batch, device="cuda") * 36
    rows, past_len, counts = filled.clone(), lengths.clone(), torch.ones_like(lengths)
    results, new_kv = [blank(batch, heads * out) for _ in range(steps)], blank(batch, width, dtype=rows.dtype)
    cache = {"past_len": past_len, "counts": counts}
    step_end = [
        Call(
            "append",
            slots=1,
            **parse(f"batch={batch} seq=1 capacity={capacity} row_bytes={2 * width}"),
            new_rows=new_kv,
            rows=rows,
            **cache,
        ),
        Call("advance", batch=batch, **cache),
    ]
    calls = []
    for own, y in zip(inputs, results, strict=True):
        fields = {
            **sizes,
            **given,
            **own,
            "dtype": "float32",
            "cache_dtype": cache_dtype,
            "scale": 0.1,
            "epsilon": 1e-6,
        }
        calls += [Call("attention", **fields, past=rows, past_len=past_len, y=y, new_kv=new_kv), *step_end]
    for call in calls:
        call.run()
    want = [y.clone() for y in results]
    assert torch.equal(past_len, lengths + steps)
    for _ in range(3):
        rows.copy_(filled), past_len.copy_(lengths)
        for y in results:
            y.zero_()
        assert [call.enqueue() for call in calls] == [0] * len(calls)
        torch.cuda.synchronize()
        assert all(torch.equal(got, expected) for got, expected in zip(results, want, strict=True))
