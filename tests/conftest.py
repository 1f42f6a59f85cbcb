"""Bundles that many tests share, each exported once. What needs ../shared skips where that folder is not beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.runner import Runner, load

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    """Folder of the shipped checkpoint: 0.8 M parameters, 4 loops, 512 positions, 2048 tokens."""
    return ROOT / "examples" / "shakespeare"


@pytest.fixture(scope="session")
def tiny_bundle(shakespeare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with a dynamic loop count of up to 12."""
    from mythos_export.export import export_bundle  # needs torch; tests of the Runner alone do without

    target = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(shakespeare, target, max_loops=12)
    return target


@pytest.fixture(scope="session")
def fixed_bundle(shakespeare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with its 4 loops unrolled."""
    from mythos_export.export import export_bundle

    target = tmp_path_factory.mktemp("fixed") / "bundle"
    export_bundle(shakespeare, target, loops=4)
    return target


@pytest.fixture(scope="session")
def runner(tiny_bundle: Path) -> Runner:
    return load(tiny_bundle, threads=2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the trained checkpoints and texts."""
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip("needs ../shared (trained checkpoints and texts), which is not beside this checkout")
    return SHARED
