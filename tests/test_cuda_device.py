"""The CUDA kernels on a GPU, against float64: what each computes.

Outputs and workspaces are NaN before a call. Shape letters: S new tokens of a sequence, H n_heads, R kv_lora_rank, V v_head_dim,
D dim, I inputs, O outputs, F expert_dim, E routed and s shared experts, K top_k.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from cuda_device import (
    DEVICE,
    FORMS,
    LIMITS,
    QUICK,
    RANDOM,
    Call,
    Form,
    blank,
    error,
    integers,
    norm_weight,
    normal,
    rms_norm,
    sizes,
    some,
    torch,
)
from cuda_device import (
    seed as seed,
)
from hypothesis import given
from hypothesis import strategies as st

from runtimes.choosing import Chooser
from runtimes.sampling import Sampling, SplitMix64

TOKENS = (1, 5, 40) if QUICK else (1, 2, 3, 4, 5, 16, 33, 300)


def skip_odd(form: Form, *columns: int) -> None:
    if any(each % form.packed for each in columns):
        pytest.skip("rows of int4 are of even length")


# Products


def check_linear(form: Form, tokens: int, inputs: int, outputs: int, norm: int, residual: int, split: int) -> None:
    x, weight, added = normal(tokens, inputs), norm_weight(inputs), normal(tokens, outputs)
    stored, scales, exact = form.weights(outputs, inputs)
    y, rest = blank(tokens, split or outputs), blank(tokens, outputs - split if split else 0)
    fields = {"tokens": tokens, "inputs": inputs, "outputs": outputs, "split": split, "epsilon": 1e-6}
    fields |= {"x": x, "weight": stored, "scales": scales, "y": y, "rest": rest}
    fields |= {"norm": weight if norm else None, "residual": added if residual else None}
    Call("linear", **form._asdict(), **fields).run()
    want = (rms_norm(x, weight, 1e-6) if norm else x.double()) @ exact.T + (added.double() if residual else 0)
    limit = LIMITS.get(form.dtype, 3e-5 if form.is_few(tokens, inputs) else 1e-3)
    assert error(torch.cat([y, rest], 1) if split else y, want) < limit, f"{tokens} tokens"


LINEARS = """96 64 1 1 0, 40 33 0 0 7, 33 17 1 1 0, 512 544 1 0 256, 512 1536 1 1 0, 2048 800 1 0 0, 2730 65 1 1 0, 160 300 1 0 0,
    1024 2048 0 1 0, 1376 48 1 0 0, 64 40 1 1 0, 136 72 1 0 71, 2730 64 0 1 0"""


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", sizes("inputs outputs norm residual split", LINEARS, 4))
def test_linear(form: Form, shape: dict[str, int]) -> None:
    skip_odd(form, shape["inputs"])
    for tokens in TOKENS:
        check_linear(form, tokens, **shape)


@RANDOM
@given(form=st.sampled_from(FORMS), tokens=st.integers(1, 70), inputs=st.integers(1, 300), data=st.data())
def test_linear_of_any_sizes(form: Form, tokens: int, inputs: int, data: st.DataObject) -> None:
    outputs, norm = data.draw(st.integers(2, 200)), data.draw(st.booleans())
    split = data.draw(st.sampled_from([0, 1, outputs // 2, outputs - 1]))
    residual = not split and data.draw(st.booleans())
    check_linear(form, tokens, inputs * form.packed, outputs, norm, residual, split)


def test_the_residual_may_be_the_output() -> None:
    x, weight, y = normal(9, 64), normal(40, 64, scale=0.1), normal(9, 40)
    want = y.double() + x.double() @ weight.double().T
    Call("linear", dtype="float32", tokens=9, inputs=64, outputs=40, x=x, weight=weight, residual=y, y=y).run()
    assert error(y, want) < 1e-5


EXPERTS = """128 96 2 8 0, 50 34 3 5 2, 96 160 2 6 2, 51 33 3 5 2, 2048 512 4 16 2, 64 32 2 4 1, 256 344 0 0 1, 264 200 4 32 0,
    1024 128 0 0 3, 160 2048 4 12 1, 512 256 8 64 2, 256 342 0 0 2, 2048 2730 0 0 1"""


def check_experts(form: Form, shape: dict[str, int], counts: Sequence[int]) -> None:
    """Of counts of tokens. A quarter of the routed experts have none."""
    dim, expert_dim, top_k, routed, shared = shape.values()
    skip_odd(form, dim, expert_dim)
    gate_up, down = form.weights(routed + shared, 2 * expert_dim, dim), form.weights(routed + shared, dim, expert_dim)
    stacks = {}
    for name, (stored, scales, _) in (("gate_up", gate_up), ("down", down)):
        for kind, part in (("routed", slice(routed)), ("shared", slice(routed, None))):
            stacks |= {f"{name}_{kind}": stored[part].clone(), f"{name}_{kind}_scales": scales[part].clone()}
    for tokens in counts:
        x, norm, residual, mixed = normal(tokens, dim), norm_weight(dim), normal(tokens, dim), blank(tokens, dim)
        among = torch.randperm(routed, device=DEVICE)[: max(top_k, routed * 3 // 4)]
        chosen = among[torch.rand(tokens, len(among), device=DEVICE).topk(top_k).indices]
        weight = torch.softmax(normal(tokens, top_k), -1)
        rows = {"epsilon": 1e-6, "tokens": tokens, "normed": x, "chosen": chosen.int(), "weight": weight, "norm": norm}
        Call("experts", **form._asdict(), **shape, **rows, **stacks, residual=residual, mixed=mixed).run()
        share = torch.ones(tokens, routed + shared, device=DEVICE, dtype=torch.float64)
        share[:, :routed] = torch.zeros_like(share[:, :routed]).scatter(1, chosen, weight.double())
        gate, up = (rms_norm(x, norm, 1e-6) @ gate_up[2].mT).chunk(2, -1)
        want = torch.einsum("te,etd->td", share, (torch.nn.functional.silu(gate) * up) @ down[2].mT)
        limit = LIMITS.get(form.dtype, 5e-5 if form.is_few(tokens, dim, expert_dim) else 1.5e-3)
        assert error(mixed - residual, want) < limit, f"{tokens} tokens"


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", sizes("dim expert_dim top_k routed shared", EXPERTS))
def test_experts(form: Form, shape: dict[str, int]) -> None:
    check_experts(form, shape, TOKENS)


@pytest.mark.skipif(QUICK, reason="many tokens")
@pytest.mark.parametrize("form", [form for form in FORMS if form.dtype != "float32"], ids=str)
@pytest.mark.parametrize("shape", sizes("dim expert_dim top_k routed shared", "1024 136 1 40 3, 1000 264 0 0 2"))
def test_experts_of_many_tokens(form: Form, shape: dict[str, int]) -> None:
    """So many that the shared ones are summed at once, and that groups of routed ones take more than a tile."""
    check_experts(form, shape, (4100,))


# Around the layers

ROUTINGS = "64 4 1 1 1, 33 5 3 2 1, 8 8 1 1 1, 32 4 8 4 2, 256 8 8 4 2, 1000 32 20 7 3"


@pytest.mark.parametrize("tokens", some([5, 1, 130], 1))
@pytest.mark.parametrize("sigmoid", [0, 1])
@pytest.mark.parametrize("normalized", [0, 1])
@pytest.mark.parametrize("shape", sizes("experts top_k groups top_k_groups group_top_k", ROUTINGS, 6))
def test_routing(tokens: int, sigmoid: int, normalized: int, shape: dict[str, int]) -> None:
    experts, top_k, groups, top_k_groups, group_top_k = shape.values()
    options = {"tokens": tokens, "sigmoid": sigmoid, "normalized": normalized, "scale": 2.5}
    logits, bias = normal(tokens, experts), normal(experts, scale=0.3)
    chosen, weight = blank(tokens, top_k, dtype=torch.int32), blank(tokens, top_k)
    Call("routing", **shape, **options, logits=logits, bias=bias, chosen=chosen, weight=weight).run()
    scores = logits.double().sigmoid() if sigmoid else logits.double()
    grouped = (scores + bias).unflatten(-1, (groups, -1))
    best = grouped.topk(group_top_k, -1).values.sum(-1).topk(top_k_groups, -1).indices
    kept = torch.zeros(tokens, groups, dtype=torch.bool, device=DEVICE).scatter(-1, best, True)
    choice = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2).topk(top_k, -1).indices
    assert torch.equal(chosen, choice.int())
    want = (scores if sigmoid else scores.softmax(-1)).gather(-1, choice)
    assert error(weight, 2.5 * (want / want.sum(-1, keepdim=True) if normalized else want)) < 1e-5


UPDATES = "3 4 100 3 1, 1 1 2048 8 0, 2 1 7 1 1, 1 3 1000 0 0, 2 5 3000 9 1, 1 2 8192 20 0"


@pytest.mark.parametrize("shape", sizes("batch seq dim lora_rank n_loops_per_row", UPDATES, 2))
def test_recurrent(shape: dict[str, int]) -> None:
    """The update alone, and with what enters the next loop."""
    batch, seq, dim, rank, per_row = shape.values()
    tokens = batch * seq
    inputs = {name: normal(tokens, dim) for name in ("x", "h", "e", "result")}
    signal, norm, y = normal(dim), norm_weight(dim), blank(tokens, dim)
    fields = {"tokens": tokens, "dim": dim, "epsilon": 1e-6, "loop_signal": signal, "norm": norm, "y": y}
    zeros = blank(tokens, dim), blank(tokens), blank(tokens, dtype=torch.int64)
    for more in ({}, dict(zip(("result", "halted_mass", "exit_loop"), zeros, strict=True))):
        y.fill_(torch.nan)
        Call("recurrent_input", **fields, **more, h=inputs["h"], e=inputs["e"]).run()
    assert not any(each.any() for each in zeros)
    assert error(y, rms_norm(inputs["h"].double() + signal.double() + inputs["e"].double(), norm, 1e-6)) < 1e-5
    inputs |= {
        "lora_down": normal(rank, dim, scale=dim**-0.5),
        "lora_up": normal(rank, dim),
        "lora_scale": normal(rank),
    }
    inputs |= {"halt": normal(dim, scale=dim**-0.5), "decay": normal(dim), "injection": normal(dim)}
    inputs |= {"halted_mass": torch.rand(tokens, device=DEVICE) * 1.2, "exit_loop": integers(0, 5, tokens)}
    inputs |= {"n_loops": integers(2, 6, batch if per_row else 1)}
    entry, updates = {"loop_signal": signal, "norm": norm, "epsilon": 1e-6, "y": blank(tokens, dim)}, []
    for more in ({}, entry):
        outputs = {"next_h": blank(tokens, dim), "next_result": blank(tokens, dim), "next_halted_mass": blank(tokens)}
        outputs["next_exit_loop"] = blank(tokens, dtype=torch.int64)
        fields = {"act_threshold": 0.99, "halt_bias": 0.1, "loop": 3, **outputs, **more}
        Call("recurrent_update", **shape, **inputs, **fields).run()
        updates.append(outputs)
    assert all(torch.equal(updates[0][name], updates[1][name]) for name in updates[0])
    next_h, next_result, next_mass, next_exit = updates[0].values()
    a = SimpleNamespace(**{name: tensor.double() for name, tensor in inputs.items()})
    want = a.decay * a.h + a.injection * a.e + a.x + (a.x @ a.lora_down.T * a.lora_scale) @ a.lora_up
    probability = torch.sigmoid(want @ a.halt + 0.1)
    running = (a.halted_mass < 0.99) & (a.n_loops.repeat_interleave(tokens // len(a.n_loops)) > 3)
    mass = a.halted_mass + probability
    weight = torch.where(mass >= 0.99, (1 - a.halted_mass).clamp(min=0), probability) * running
    assert error(next_h, want) < 1e-5
    assert error(entry["y"], rms_norm(want + signal.double() + a.e, norm, 1e-6)) < 1e-5
    assert error(next_result, a.result + weight[:, None] * want) < 1e-5
    assert error(next_mass, a.halted_mass + probability * running) < 1e-5
    assert torch.equal(next_exit, inputs["exit_loop"] + running)


APPENDS = "3 2 5 16 36, 2 3 4 7 10, 2 2 20 7 48, 20 1 1 256 576, 4 1 64 300 512"


@pytest.mark.parametrize("shape", sizes("slots batch seq capacity row_bytes", APPENDS))
def test_append_and_advance(shape: dict[str, int]) -> None:
    """More new rows than the capacity, too."""
    slots, batch, seq, capacity, row_bytes = shape.values()
    new_rows = integers(0, 256, slots, batch, seq, row_bytes).byte()
    rows = blank(slots, batch, capacity, row_bytes, dtype=torch.uint8)
    past_len, counts = integers(0, 40, batch), integers(0, seq + 1, batch)
    want = rows.clone()
    for b, (past, count) in enumerate(zip(past_len.tolist(), counts.tolist(), strict=True)):
        for s in range(count):
            want[:, b, (past + s) % capacity] = new_rows[:, b, s]
    Call("append", **shape, new_rows=new_rows, rows=rows, past_len=past_len, counts=counts).run()
    assert torch.equal(rows, want)
    tokens, input_ids, longer = integers(0, 9, batch), blank(batch, dtype=torch.int64), past_len + counts
    Call("advance", batch=batch, past_len=past_len, counts=counts, tokens=tokens, input_ids=input_ids).run()
    assert torch.equal(past_len, longer)
    assert torch.equal(input_ids, tokens)


@pytest.mark.parametrize("shape", sizes("rows vocab", "5 17, 3 4096, 1 1, 1 32000, 2 129280"))
def test_likeliest(shape: dict[str, int]) -> None:
    """The last row's largest is there many times."""
    rows, vocab = shape.values()
    logits, tokens, logprobs = normal(rows, vocab, scale=4), blank(rows, dtype=torch.int64), blank(rows)
    logits[-1, vocab // 2 :] = logits[-1].max()
    Call("likeliest", **shape, logits=logits, tokens=tokens, logprobs=logprobs).run()
    best = torch.stack([(row == row.max()).nonzero()[0] for row in logits])
    assert torch.equal(tokens, best[:, 0])
    want = logits.double().log_softmax(-1).gather(-1, best)[:, 0]
    torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-6)


SAMPLINGS = [
    Sampling(0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
    Sampling(1.0),
    Sampling(1.5, top_p=0.95),
    Sampling(0.0, repetition_penalty=1.3),
    Sampling(0.7, top_k=5),
    Sampling(30.0, min_p=0.9),
]


@pytest.mark.parametrize("sampling", some(SAMPLINGS, 2), ids=str)
@pytest.mark.parametrize("shape", sizes("rows vocab", "3 4096, 1 1, 2 17, 5 32000, 2 262144", 1))
def test_choose(sampling: Sampling, shape: dict[str, int]) -> None:
    """The host's tokens, with its random numbers; many logits are equal. In the last row no token can be drawn."""
    rows, vocab = shape.values()
    logits, tokens, logprobs = normal(rows, vocab, scale=3), blank(rows, dtype=torch.int64), blank(rows)
    logits[0] = logits[0].round()
    seen = [integers(0, vocab, 9).tolist() for _ in range(rows)]
    chooser = Chooser(sampling, seen, [SplitMix64(seed) for seed in range(rows)])
    random = torch.from_numpy(chooser.random_states().view("int64")).to(DEVICE)
    bits = torch.from_numpy(chooser.seen_bits(vocab).view("int32")).to(DEVICE)
    fields = {**shape, **vars(sampling), "logits": logits, "seen": bits, "random": random}
    Call("choose", **fields, tokens=tokens, logprobs=logprobs).run()
    want, want_logprobs = chooser.choose(logits.cpu().numpy(), range(rows))
    assert tokens.tolist() == want.tolist()
    torch.testing.assert_close(logprobs.cpu().double(), torch.from_numpy(want_logprobs), rtol=1e-5, atol=1e-6)
    assert (random.cpu().numpy().view("uint64") == chooser.random_states()).all()
    if sampling.temperature:
        logits[-1, vocab // 2] = math.nan
        Call("choose", **fields, tokens=tokens, logprobs=logprobs).run()
        assert int(tokens[-1]) == -1
        assert bool((tokens[:-1] >= 0).all())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("rows", "dim"), some([(10, 66), (7, 2048), (300, 34)], 1))
def test_embedding(form: Form, rows: int, dim: int) -> None:
    """Of ids that there are not, the nearest row."""
    table, scales, exact = form.weights(rows, dim)
    ids, y = torch.tensor([0, rows - 1, -5, rows, 2**40, 3, 3], device=DEVICE), blank(7, dim)
    Call("embedding", **form._asdict(), tokens=7, rows=rows, dim=dim, ids=ids, table=table, scales=scales, y=y).run()
    assert torch.equal(y, exact[ids.clamp(0, rows - 1)].float())


def test_position_rows() -> None:
    table, y = normal(20, 37), blank(3, 6, 37)
    past_len = torch.tensor([0, 17, 500], device=DEVICE)
    Call("position_rows", batch=3, seq=6, rows=20, dim=37, past_len=past_len, table=table, y=y).run()
    assert torch.equal(y, table[(past_len[:, None] + torch.arange(6, device=DEVICE)).clamp(max=19)])


def test_pick_rows() -> None:
    x, y, positions = normal(3, 6, 300), blank(3, 4, 300), torch.tensor([[0, 5, 5, 2], [-3, 1, 6, 0], [3, 3, 3, 2**40]])
    Call("pick_rows", batch=3, seq=6, count=4, dim=300, positions=positions.to(DEVICE), x=x, y=y).run()
    inside = positions.clamp(0, 5).to(DEVICE)[..., None].expand(-1, -1, 300)
    assert torch.equal(y, x.gather(1, inside))


@pytest.mark.parametrize(("count", "size"), [(3, 4096), (300, 48), (5, 13), (1, 100_000)])
def test_stack(count: int, size: int) -> None:
    parts, y = [integers(0, 256, size).byte() for _ in range(count)], blank(count, size, dtype=torch.uint8)
    addresses = (ctypes.c_void_p * count)(*[part.data_ptr() for part in parts])
    Call("stack", count=count, bytes=size, parts=ctypes.addressof(addresses), y=y).run()
    assert torch.equal(y, torch.stack(parts))
