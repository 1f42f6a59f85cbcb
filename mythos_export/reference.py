"""The reference model in eager torch, the oracle of parity and the baseline of speed: of the package open-mythos, or of
transformers for checkpoints of its architectures.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from mythos_export.checkpoint import Checkpoint
from runtimes.errors import MythosError

_MODULE = "open_mythos.main"


class ReferenceMissingError(MythosError):
    """The reference package is not there."""


def is_available(checkpoint: Checkpoint) -> bool:
    """Whether the package that has the checkpoint's reference model is installed."""
    return importlib.util.find_spec(_package(checkpoint).replace("-", "_")) is not None


def version(checkpoint: Checkpoint) -> str:
    """Name and version of the oracle, for reports."""
    package = _package(checkpoint)
    return f"{package} {metadata.version(package)}"


def _package(checkpoint: Checkpoint) -> str:
    return "transformers" if checkpoint.family.architectures else "open-mythos"


def reference_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The reference's own model in eval mode, holding the checkpoint's tensors in dtype. To be called as open-mythos's is: with
    input_ids [B, S], and n_loops, kv_cache (a dict it fills) and start_pos where wanted; returns logits [B, S, V].

    Raises ReferenceMissingError where its package is not installed.
    """
    state = {name: tensor.to(dtype) for name, tensor in checkpoint.state_dict().items()}
    if checkpoint.family.architectures:
        return _Transformers(checkpoint, state)
    module = _load_module()
    config = module.MythosConfig(**msgspec.to_builtins(checkpoint.settings))
    with torch.device("meta"):
        model = module.OpenMythos(config)
    model.load_state_dict(state, strict=False, assign=True)
    model.head.weight = model.embed.weight
    head_dim = config.dim // config.n_heads
    model.freqs_cis = module.precompute_rope_freqs(head_dim, config.max_seq_len, config.rope_theta)
    model.freqs_cis_mla = module.precompute_rope_freqs(config.qk_rope_head_dim, config.max_seq_len, config.rope_theta)
    return model.eval()


def _given(settings: Any) -> dict[str, Any]:
    """The fields that config.json gives: null means none where its absence is an error, else the default. Not how tensors are
    quantized: they are read as floats."""
    asked_for = {field.name for field in msgspec.structs.fields(settings) if field.default is msgspec.UNSET}
    fields = msgspec.to_builtins(settings).items()
    given = {name: value for name, value in fields if value is not None or name in asked_for}
    given.pop("quantization_config", None)
    return given


class _Transformers:
    """A model of transformers, called as open-mythos's is; n_loops means nothing to it."""

    def __init__(self, checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
        if not is_available(checkpoint):
            raise ReferenceMissingError("the reference model is not installed; run: pip install transformers")
        transformers = importlib.import_module("transformers")
        fields = _given(checkpoint.settings)
        head, _ = checkpoint.family.tied(checkpoint.settings) or ("", "")
        state = {name: tensor.contiguous() for name, tensor in state.items() if name != head}
        model_class = getattr(transformers, checkpoint.settings.architectures[0])
        config = model_class.config_class(**fields, attn_implementation="eager")
        with tempfile.TemporaryDirectory() as folder:  # its own reader knows how names of tensors changed over releases
            save_file(state, Path(folder, "model.safetensors"))
            config.save_pretrained(folder)
            transformers.utils.logging.disable_progress_bar()
            model, report = model_class.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
        lost = sorted({*report["missing_keys"], *report["unexpected_keys"]})
        if lost:
            raise ReferenceMissingError(
                f"{version(checkpoint)} takes the checkpoint for another model ({lost[0]} is not in both), so it is no oracle"
            )
        self._model = model.eval()

    def __call__(
        self,
        input_ids: Tensor,
        n_loops: int | None = None,
        kv_cache: dict[str, Any] | None = None,
        start_pos: int = 0,
    ) -> Tensor:
        past = None if kv_cache is None else kv_cache.get("past")
        out = self._model(input_ids, past_key_values=past, use_cache=kv_cache is not None)
        if kv_cache is not None:
            kv_cache["past"] = out.past_key_values
        logits: Tensor = out.logits
        return logits


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
