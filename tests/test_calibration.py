"""Calibration: what observers keep, how algorithms use it, what becomes of text, models and recipes that do not serve."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from calibration.activation_scales import METHODS, activation_limit
from calibration.gptq import gptq
from calibration.observers import BINS, Observer, Wanted, merge_moments, rotary_envelope
from calibration.rounding import Format, nearest_scales, restore, round_to_nearest, round_with, searched_scales
from calibration.smoothing import awq, smoothquant, weighted_error
from calibration.statistics import Statistics, gather
from runtimes.errors import InputError


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Looped(nn.Module):
    """Looks ids up and runs one Linear three times, each time on other numbers."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.table = _noise(10, channels)
        self.inner = nn.Linear(channels, channels, bias=False)
        self.inner.weight = nn.Parameter(_noise(channels, channels, seed=1), requires_grad=False)
        self.contribution = nn.Identity()
        self.seen: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table[ids]
        for loop in range(3):
            self.contribution(torch.full((*ids.shape, 1), 1.0 - loop / 2))
            self.seen.append(x.flatten(0, -2))
            x = torch.tanh(self.inner(x)) * (loop + 1)
        return x


IDS = torch.arange(40).reshape(8, 5) % 10
FULL = {"inner": Wanted(hessian=True, histogram=True)}


def test_statistics_are_kept_by_loop(tmp_path: Path) -> None:
    model = Looped()
    moments = gather(model, IDS, FULL, tmp_path, {}, n_loops=3).moments("inner")
    by_loop = [torch.cat(model.seen[loop::3]).double() for loop in range(3)]
    for loop, x in enumerate(by_loop):
        assert moments["tokens"][loop] == 40
        torch.testing.assert_close(moments["hessian"][loop].double(), x.T @ x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments["square"][loop].double(), x.square().sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments["magnitude"][loop].double(), x.abs().sum(0), rtol=1e-5, atol=1e-5)
        assert torch.equal(moments["largest"][loop].double(), x.abs().amax(0))
        assert moments["histogram"][loop].sum() == x.numel()
        assert 2.0 ** (moments["exponent"][loop] - 1) <= x.abs().max() <= 2.0 ** moments["exponent"][loop]


@pytest.mark.parametrize(("keep", "loops"), [("sum", [0, 1, 2]), (-1, [2]), (0, [0])])
def test_only_what_is_asked_for_is_kept(tmp_path: Path, keep: str | int, loops: list[int]) -> None:
    every = gather(Looped(), IDS, FULL, tmp_path / "a", {}, n_loops=3).moments("inner", "hessian")["hessian"]
    wanted = {"inner": Wanted(hessian=True, keep_loop=keep)}
    one = gather(Looped(), IDS, wanted, tmp_path / "b", {}, n_loops=3).moments("inner", "hessian")["hessian"]
    torch.testing.assert_close(one[0], every[loops].sum(0))


def test_tokens_weigh_what_they_can_still_contribute(tmp_path: Path) -> None:
    plain = gather(Looped(), IDS, FULL, tmp_path / "a", {}, n_loops=3).moments("inner")
    # The module beside it has no name of its own here, so the weights hold for a part called "model".
    outer = nn.Sequential()
    outer.add_module("model", Looped())
    weighed = gather(
        outer, IDS, {"model.inner": FULL["inner"]}, tmp_path / "b", {}, n_loops=3, contribution=True
    ).moments("model.inner")
    for loop, weight in enumerate((1.0, 0.5, 0.0)):
        torch.testing.assert_close(weighed["hessian"][loop], plain["hessian"][loop] * weight)
        assert weighed["weight"][loop] == 40 * weight


def test_several_passes_and_processes_give_what_one_does(tmp_path: Path) -> None:
    layers = [nn.Linear(6, 6, bias=False) for _ in range(2)]
    for seed, layer in enumerate(layers):
        layer.weight.data = _noise(6, 6, seed=seed)
    model = nn.Sequential(nn.Embedding.from_pretrained(_noise(10, 6)), *layers)
    wanted = {name: Wanted(hessian=True, histogram=True) for name in ("1", "2")}
    one = gather(model, IDS, wanted, tmp_path / "one", {"share": 0})
    split = gather(model, IDS, wanted, tmp_path / "split", {"share": 0}, memory=1)
    assert len(list((tmp_path / "split").glob("part-*"))) == 2
    for part in (0, 1):
        gather(model, IDS[part::2], wanted, tmp_path / f"share{part}", {"share": part})
    shares = Statistics([tmp_path / "share0", tmp_path / "share1"])
    for name in wanted:
        expected = one.moments(name)
        for other in (split.moments(name), shares.moments(name)):
            for key, value in expected.items():
                torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-5)


def test_folders_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    gather(Looped(), IDS, FULL, tmp_path / "a", {"weights": "1"}, n_loops=3)
    gather(Looped(), IDS, FULL, tmp_path / "b", {"weights": "2"}, n_loops=3)
    with pytest.raises(InputError, match="another model"):
        Statistics([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(InputError, match="holds no statistics"):
        Statistics([tmp_path])
    part = next((tmp_path / "a").glob("part-*"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match="unfinished or damaged"):
        Statistics([tmp_path / "a"])


@pytest.mark.parametrize(("value", "loop"), [(float("nan"), 2), (float("inf"), 1)])
def test_activations_that_are_not_finite_name_module_and_loop(tmp_path: Path, value: float, loop: int) -> None:
    model = Looped()
    (model.inner.weight if loop == 2 else model.table)[0, 0] = value
    with pytest.raises(InputError, match=f"inner, loop {loop}: its inputs hold NaN or infinite"):
        gather(model, IDS, FULL, tmp_path, {}, n_loops=3)


_KILLED = """
import sys, time, torch
import calibration.statistics as statistics
sys.path.insert(0, sys.argv[2])
from test_calibration import FULL, IDS, Looped
statistics._SAVE_SECONDS = 0.0
statistics._BATCH_TOKENS = 5
def progress(_, done, total):
    print(done, flush=True)
    time.sleep(0.05 if sys.argv[3] == "slow" else 0)
statistics.gather(Looped(), IDS, FULL, sys.argv[1], {}, n_loops=3, progress=progress)
"""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def run(folder: str, pace: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", _KILLED, str(tmp_path / folder), str(Path(__file__).parent), pace]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)

    whole = run("whole", "fast")
    whole.communicate()
    killed = run("killed", "slow")
    while int(killed.stdout.readline()) < 3:  # type: ignore[union-attr]
        pass
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    resumed = run("killed", "fast")
    first = int(resumed.communicate()[0].split()[0])
    assert first >= 2  # what was seen before the kill is not seen again
    expected, got = (Statistics([tmp_path / folder]).moments("inner") for folder in ("whole", "killed"))
    assert all(torch.equal(value, got[key]) for key, value in expected.items())


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.sampled_from([0.0, 1e-6, 0.3, 1.0, 7.0, 1e4]), min_size=2, max_size=4))
def test_histograms_of_any_ranges_merge(sizes: list[float]) -> None:
    together = Observer("m", 3, 1, Wanted(histogram=True))
    parts = []
    for seed, size in enumerate(sizes):
        x = _noise(50, 3, seed=seed) * size
        together.see(x, None, 0)
        alone = Observer("m", 3, 1, Wanted(histogram=True))
        alone.see(x, None, 0)
        parts.append(alone.moments)
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_moments(merged, part)
    assert merged["histogram"].shape == (1, BINS)
    for key, value in together.moments.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-5, atol=0)


def test_rotation_never_leaves_the_envelope() -> None:
    heads = _noise(20, 8)
    envelope = rotary_envelope(heads.abs(), 0, 8, 4)
    for angle in torch.linspace(0, 6.3, 50):
        first, second = heads.unflatten(1, (2, 2, 2)).unbind(2)
        turned = torch.stack(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], 2
        )
        assert (turned.flatten(1).abs() <= envelope + 1e-6).all()


def _inputs(channels: int, tokens: int = 400) -> Tensor:
    """Correlated inputs of uneven size, as activations are."""
    return _noise(tokens, channels) @ _noise(channels, channels, seed=1) * torch.linspace(0.1, 3.0, channels)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(8, 40),
    channels=st.integers(33, 200),
    form=st.sampled_from([Format("int4"), Format("int8", 64), Format("int4", 128, whole_rows=True), Format("fp8", 32)]),
)
def test_gptq_beats_rounding_where_inputs_correlate(rows: int, channels: int, form: Format) -> None:
    weight, x = _noise(rows, channels, seed=3), _inputs(channels).double()
    h = x.T @ x

    def error(values: Tensor, scales: Tensor) -> float:
        difference = restore(values, form, scales).double() - weight.double()
        return float(((difference @ h) * difference).sum())

    scales = searched_scales(weight, form, h.diagonal().float())
    values, fitted = gptq(weight, h.float(), form, scales)
    assert (fitted > 0).all()
    assert torch.isfinite(fitted).all()
    assert values.float().abs().max() <= max(form.limit, -form.lowest)
    assert error(values, fitted) <= error(round_with(weight, form, scales), scales) * 1.001


def test_gptq_without_any_inputs_rounds_to_nearest() -> None:
    weight, form = _noise(4, 64), Format("int4")
    scales = nearest_scales(weight, form)
    values, fitted = gptq(weight, torch.zeros(64, 64), form, scales, sweeps=0)
    assert torch.equal(values, round_with(weight, form, scales))
    assert torch.equal(fitted, scales)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("whole_rows", [False, True])
def test_searched_scales_cost_less_and_are_sound(kind: str, whole_rows: bool) -> None:
    form, weight = Format(kind, 32, whole_rows), _noise(8, 100) ** 3
    importance = torch.linspace(0.01, 2.0, 100)
    nearest, searched = nearest_scales(weight, form), searched_scales(weight, form, importance)
    costs = [
        weighted_error([(weight, restore(round_with(weight, form, scales), form, scales))], importance)
        for scales in (nearest, searched)
    ]
    assert costs[1] <= costs[0]
    assert (searched > 0).all()
    if whole_rows:
        assert (searched == searched[:, :1]).all()


def test_smoothing_keeps_the_product_and_helps() -> None:
    x, weight = _inputs(64), _noise(32, 64, seed=2)
    x[:, 5] *= 50  # an outlier channel
    square, form = x.square().mean(0), Format("int4")

    def loss(factors: Tensor) -> float:
        scaled = weight * factors
        return weighted_error([(weight, restore(*_with_form(round_to_nearest(scaled, form), form)) / factors)], square)

    found, exponent = awq(x.abs().mean(0), loss)
    assert 0 < exponent < 1
    assert loss(found) < loss(torch.ones(64))
    torch.testing.assert_close((x / found) @ (weight * found).T, x @ weight.T, rtol=1e-3, atol=1e-2)
    even = smoothquant(x.abs().amax(0), weight.abs().amax(0))
    assert (x / even).abs().amax() < x.abs().amax()
    assert torch.equal(smoothquant(torch.zeros(4), torch.ones(4)), torch.ones(4))


def _with_form(pair: tuple[Tensor, Tensor], form: Format) -> tuple[Tensor, Format, Tensor]:
    return pair[0], form, pair[1]


@pytest.mark.parametrize("method", METHODS)
def test_limits_of_activations(method: str) -> None:
    observer = Observer("m", 10, 1, Wanted(histogram=True))
    x = _noise(2000, 10)
    x[0, 0] = 40.0  # one outlier
    observer.see(x, None, 0)
    moments = observer.moments
    limit = activation_limit(moments["histogram"][0], float(moments["exponent"][0]), 40.0, method)
    assert limit == 40.0 if method == "minmax" else 2.0 < limit <= 40.0
    if method in ("percentile", "entropy"):
        assert limit < 10.0
    assert activation_limit(torch.zeros(BINS), float("-inf"), 0.0, method) == 0.0


def test_time_is_not_part_of_any_result(tmp_path: Path) -> None:
    """Two runs at different times write the same bytes."""
    files = []
    for folder in ("a", "b"):
        gather(Looped(), IDS, FULL, tmp_path / folder, {}, n_loops=3)
        files.append(next((tmp_path / folder).glob("part-*")).read_bytes())
        time.sleep(0.01)
    assert files[0] == files[1]
    assert np.frombuffer(files[0][:8], "<u8")[0] > 0
