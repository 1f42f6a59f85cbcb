"""A new engine is held against onnxruntime; here on a fake TensorRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mythos_export.build import check
from runtimes.bundle import open_bundle
from runtimes.engine_folder import read_engine
from runtimes.errors import BackendError
from runtimes.runner import Runner


def test_an_engine_that_agrees_stays(engine: Path, own_bundle: Path) -> None:
    agreement = check.check_engine(own_bundle, open_bundle(own_bundle)[1], engine.name, read_engine(engine))
    assert agreement.mean_kl < 1e-6
    assert agreement.top1 == 1.0
    assert agreement.tokens > 100


@pytest.mark.parametrize("wrong", [0.5, np.nan])
def test_an_engine_that_does_not_is_refused(
    wrong: float, engine: Path, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its results are no numbers."""
    right = check._logits

    def logits(runner: Runner, ids: list[list[int]], length: int) -> np.ndarray:
        found = right(runner, ids, length)
        if runner.backend != "onnxruntime":
            found[:, : found.shape[1] // 2] += wrong
        return found

    monkeypatch.setattr(check, "_logits", logits)
    with pytest.raises(BackendError, match=r"computes something else than onnxruntime: mean KL .*was not kept"):
        check.check_engine(own_bundle, open_bundle(own_bundle)[1], engine.name, read_engine(engine))
