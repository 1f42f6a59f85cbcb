"""The reference model of the package open-mythos, run in eager torch: the oracle of parity and the baseline of speed."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from mythos_export.checkpoint import Checkpoint
from runtimes.errors import MythosError

_MODULE = "open_mythos.main"


class ReferenceMissingError(MythosError):
    """The reference package is not there."""


def is_available() -> bool:
    """Whether the package open-mythos is installed."""
    return importlib.util.find_spec("open_mythos") is not None


def version() -> str:
    """Name and version of the oracle, for reports."""
    return f"open-mythos {metadata.version('open-mythos')}"


def reference_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The reference's own OpenMythos in eval mode, holding the checkpoint's tensors in dtype.

    Raises ReferenceMissingError where the package is not installed. It is loaded without its __init__, which wants transformers.
    """
    module = _load_module()
    config = module.MythosConfig(**msgspec.to_builtins(checkpoint.settings))
    with torch.device("meta"):
        model = module.OpenMythos(config)
    state: dict[str, Tensor] = {name: tensor.to(dtype) for name, tensor in checkpoint.state_dict().items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.head.weight = model.embed.weight
    head_dim = config.dim // config.n_heads
    model.freqs_cis = module.precompute_rope_freqs(head_dim, config.max_seq_len, config.rope_theta)
    model.freqs_cis_mla = module.precompute_rope_freqs(config.qk_rope_head_dim, config.max_seq_len, config.rope_theta)
    return model.eval()


def _load_module() -> Any:
    if _MODULE in sys.modules:
        return sys.modules[_MODULE]
    package = importlib.util.find_spec("open_mythos")
    if package is None or not package.submodule_search_locations:
        raise ReferenceMissingError(
            "the reference model is not installed; run: pip install --no-deps open-mythos==0.5.0"
        )
    path = Path(package.submodule_search_locations[0]) / "main.py"
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise ReferenceMissingError(f"{path}: cannot be imported; reinstall open-mythos==0.5.0")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    spec.loader.exec_module(module)
    return module
