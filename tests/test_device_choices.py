"""Tokens chosen on the device by onnxruntime's CUDA backend, and steps begun there before the host has read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_onnxruntime import FakeOnnxRuntime
from test_onnxruntime_cuda import PROMPTS, on_cpu

from runtimes.choosing import Chooser
from runtimes.errors import BackendError
from runtimes.runner import Runner
from runtimes.sampling import Sampling, SplitMix64
from runtimes.session import Session


def test_tokens_are_drawn_on_the_device(runner_on_gpu: Runner, gpu: FakeOnnxRuntime) -> None:
    """No logits come to the host; of seen tokens a bit each goes to the device, where there is a penalty."""
    moved = gpu.cuda.moved
    for penalty, seen in ((1.0, 0), (1.2, runner_on_gpu.graph.vocab_size // 8)):
        moved.clear()
        gpu.cuda.calls.clear()
        options = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": penalty, "seed": 0, "ignore_eos": True}
        runner_on_gpu.generate(PROMPTS[2], 12, **options).complete()
        assert moved["cudaMemcpyDeviceToHost"] <= 13 * 3 * 256
        assert 12 * seen <= moved["cudaMemcpyHostToDevice"] <= 12 * (7 * 256 + seen)
        assert gpu.cuda.calls["cudaGraphLaunch"] >= 9


def test_no_number_is_drawn_from(runner_on_gpu: Runner, gpu: FakeOnnxRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    find = gpu.kernels._draw

    def spoilt(call: Any) -> None:
        gpu.kernels._array(call.logits, (call.rows, call.vocab))[-1, 7] = np.nan
        find(call)

    monkeypatch.setattr(gpu.kernels, "_draw", spoilt)
    with pytest.raises(BackendError, match="the model's logits are no numbers"):
        runner_on_gpu.generate(PROMPTS, 3, temperature=1.0).complete()


def pending(gpu: FakeOnnxRuntime) -> bool:
    """Whether work is left on a stream."""
    return any(stream.work for stream in gpu.cuda.streams.values())


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 20, "seed": 4}])
def test_the_next_step_is_under_way_before_a_token_is_read(
    runner_on_gpu: Runner, gpu: FakeOnnxRuntime, options: dict[str, Any]
) -> None:
    """But after the last one, so that none is computed in vain unless a sequence ends early."""
    generation = runner_on_gpu.generate(PROMPTS[0], 20, ignore_eos=True, **options)
    under_way = []
    for _ in generation:
        under_way.append(pending(gpu))
    assert under_way == [False] + [True] * 18 + [False]  # what follows a prefill is of another shape
    assert gpu.shapes_run == [(1, len(PROMPTS[0]))] + [(1, 1)] * 19
    gpu.shapes_run.clear()
    stop = generation.ids[10]
    stopped = runner_on_gpu.generate(PROMPTS[0], 20, ignore_eos=True, stop=stop, **options).complete()
    assert stopped.ids == generation.ids[: generation.ids.index(stop) + 1]
    assert len(gpu.shapes_run) == len(stopped.ids) + 1


def test_a_step_begun_in_vain_changes_nothing(runner_on_gpu: Runner, gpu: FakeOnnxRuntime, fixed: Path) -> None:
    """Tokens other than those chosen, logits, other rows, another session in between, other random numbers."""
    cpu = on_cpu(fixed)
    sessions, others = ([each.session(2) for each in (runner_on_gpu, cpu)] for _ in range(2))
    for one, other in zip(sessions, others, strict=True):
        one.advance([[5, 6, 7], [8]])
        other.advance([[9], [10, 11]])
    results: list[list[Any]] = [[], []]
    for session, other, told in zip(sessions, others, results, strict=True):
        chooser = Chooser(Sampling(1.0), [(), ()], [SplitMix64(1), SplitMix64(2)])

        def go(
            step: list[list[int]], which: Session = session, how: Chooser = chooser, told: list[Any] = told
        ) -> list[list[int]]:
            chosen = which.advance_choosing(step, how, more=True)
            told.append((chosen.tokens.tolist(), which.past_len.tolist(), chosen.exit_loop.tolist()))
            return [[token] for token in chosen.tokens.tolist()]

        step = go(go([[1], [2]]))
        step = go([[3], [4]])  # not what was chosen
        step = go(go(step))
        told.append(session.advance(step)[0].argmax(-1).tolist())
        step = go([[5], [6]], other)
        step = go(go([[7], [8]]), session)
        for _ in range(4):  # in turn
            go(step, other)
            step = go(step)
        chooser.random[0].next()
        step = go(step)
        greedy = Chooser.greedy(2)
        for _ in range(3):
            step = go(step, how=greedy)
        session.keep([1])
        told.append(session.advance_choosing([[3]], Chooser.greedy(1), more=True).tokens.tolist())
        session.close()
    assert results[0] == results[1]
    assert gpu.cuda.calls["cudaGraphLaunch"] > 5
