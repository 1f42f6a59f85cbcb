"""A bundle as a model of transformers: what `model.generate()` and `pipeline("text-generation")` take, on top of the Runner.

Shape letters: B batch, P past columns of input_ids, S new ones, K columns with logits, V vocab_size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mythos_export.config import ModelConfig
from mythos_export.integrations.transformers_cache import SessionCache
from runtimes.backend import say_once
from runtimes.bundle import GENERATION_CONFIG
from runtimes.errors import BundleError, InputError
from runtimes.runner import Runner, load
from runtimes.session import check_n_loops

_HINTS = {
    "device_map": "the backend decides where the model runs: backend=, device=",
    "dtype": "a bundle has the dtype it was exported in: `mythos-export export --dtype`",
    "torch_dtype": "a bundle has the dtype it was exported in: `mythos-export export --dtype`",
    "quantization_config": "a bundle is quantized with `mythos-export quantize`",
    "load_in_8bit": "a bundle is quantized with `mythos-export quantize`",
    "load_in_4bit": "a bundle is quantized with `mythos-export quantize`",
    "trust_remote_code": "a bundle holds no code",
}
# What generate() hands on and the model has no use for: the tokenizer of stop_strings; positions, in transformers 5.0.
_NOT_FOR_THE_MODEL = ("tokenizer", "cache_position")


class MythosConfig(PreTrainedConfig):
    """What transformers asks of a model's configuration; the model's own description is `model.runner.manifest.model`."""

    model_type = "mythos_export"


class MythosForCausalLM(PreTrainedModel, GenerationMixin):
    """A bundle that generates as transformers' models do: greedy, sampling, beam search, batches padded on the left, logits
    processors, stopping criteria, streamers. Inference only, tensors on the CPU. Made by from_pretrained.

    runner: the Runner it stands on. n_loops: depth where a call names none; None is the trained one.
    """

    config_class = MythosConfig
    main_input_name = "input_ids"
    _is_stateful = True  # past_key_values cannot be cut back, so no assisted generation

    def __init__(self, runner: Runner, n_loops: int | None = None, folder: str = "") -> None:
        model = ModelConfig.from_dict(runner.manifest.model)
        check_n_loops(runner.graph, n_loops, 1)
        described: dict[str, Any] = {
            "architectures": [type(self).__name__],
            "name_or_path": folder,
            "vocab_size": model.vocab_size,
            "hidden_size": model.dim,
            "num_hidden_layers": len(model.layers),
            "max_position_embeddings": runner.max_context,
        }
        super().__init__(MythosConfig(**described))
        self.runner, self.n_loops, self.training = runner, n_loops, False
        self.generation_config = GenerationConfig(eos_token_id=_ends(runner))
        if torch.accelerator.is_available():
            self.hf_device_map = {"": "cpu"}  # else a pipeline moves the model to the accelerator it finds

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, bundle: str | Path, *, n_loops: int | None = None, **options: Any
    ) -> MythosForCausalLM:
        """Loads a bundle folder. n_loops: depth where a call names none. options: those of `mythos_export.load`: backend, device,
        threads, native, engine, max_batch, max_context, memory_limit.

        The generation_config.json of the checkpoint, where the bundle carries one, gives the defaults of generate(); tokens that
        end a text are those of the bundle (`export --eos`). Raises BundleError and BackendError as load does, InputError for
        arguments that a bundle has no use for.
        """
        known = inspect.signature(load).parameters
        for name, value in options.items():
            if name not in known and value is not None:
                raise InputError(f"{name} is {value!r}; {_HINTS.get(name, 'a bundle takes no such argument')}")
        runner = load(bundle, **{name: value for name, value in options.items() if name in known})
        model = cls(runner, n_loops, str(bundle))
        if GENERATION_CONFIG in runner.manifest.files:
            model.generation_config = _generation_config(Path(bundle) / GENERATION_CONFIG, runner)
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SessionCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        n_loops: int | Sequence[int] | Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, K, V] float32 of input_ids [B, S] after past_key_values.

        attention_mask: [B, P + S], 0 at padding, which never enters the model; logits there are 0. logits_to_keep: the last so
        many columns, 0 for all, or their indices. n_loops: depth, one number or one a sequence, default the model's; it may fall
        within a sequence, never rise. past_key_values: what the call before returned; unlike a tensor it is changed by the call.
        Raises InputError for labels and for all that the Runner cannot serve.
        """
        if labels is not None:
            raise InputError(
                "labels are given, but a bundle is for inference only; train the checkpoint it was exported from"
            )
        for name, value in others.items():
            if value is not None and value is not False and name not in _NOT_FOR_THE_MODEL:
                raise InputError(f"{name} is given, which a bundle cannot serve; leave it out")
        cache = past_key_values if past_key_values is not None else SessionCache(self.runner)
        _check_cache(cache, self.runner)
        ids = _on_cpu("input_ids", input_ids)
        mask = None if attention_mask is None else _on_cpu("attention_mask", attention_mask)
        depth = n_loops.tolist() if isinstance(n_loops, Tensor) else n_loops
        if depth is None and cache.get_seq_length() == 0:
            depth = self.n_loops
        last = isinstance(logits_to_keep, int) and logits_to_keep == 1
        logits = torch.from_numpy(cache.advance(ids, mask, depth, last))
        if not last:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = logits[:, kept]
        output = CausalLMOutputWithPast(
            logits=logits,  # type: ignore[arg-type]
            past_key_values=None if use_cache is False else cache,  # type: ignore[arg-type]
        )
        return output.to_tuple() if return_dict is False else output

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """What GenerationMixin calls before the first step: makes the cache, and ends a generation where the positions do."""
        if generation_config.cache_implementation is not None:
            raise InputError(
                f'cache_implementation is "{generation_config.cache_implementation}"; a bundle has the cache it was exported with '
                "(`mythos-export export --cache-dtype`), leave it out"
            )
        mask = model_kwargs.get("attention_mask")
        padding = 0 if mask is None else int((mask == 0).sum(1).min())
        longest = self.runner.max_context + padding + 1  # the last token is not fed
        if generation_config.max_length > longest:
            say_once(
                f"generation ends at {longest - padding} tokens, prompt included: the model has positions for "
                f"{self.runner.max_context}; max_length was {generation_config.max_length}"
            )
            generation_config.max_length = longest
        if model_kwargs.get("past_key_values") is not None:
            _check_cache(model_kwargs["past_key_values"], self.runner)
        elif generation_config.use_cache is not False:
            tokens = min(max_cache_length - padding, self.runner.max_context)
            chunk = generation_config.prefill_chunk_size
            model_kwargs["past_key_values"] = SessionCache(self.runner, tokens, chunk)
        generation_config.prefill_chunk_size = None  # sessions cut prompts themselves, where no chunk is all padding

    @property
    def device(self) -> torch.device:
        """Of the tensors it takes and gives; the backend has its own."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    def train(self, mode: bool = True) -> MythosForCausalLM:
        """Only train(False), which is eval()."""
        if mode:
            raise InputError("a bundle is for inference only; train the checkpoint it was exported from")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MythosForCausalLM:
        """What to(), cuda(), half() and their like end in: refused where they would change anything."""
        try:
            moved = fn(torch.empty(0))
        except (AssertionError, RuntimeError) as error:  # a device that is not there
            raise InputError(
                f"{error}; the model stays as it is: the backend decides where it runs (backend=, device=)"
            ) from error
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            raise InputError(
                f"the model cannot be moved to {moved.device} as {moved.dtype}: the backend decides where it runs (backend=, "
                "device=), and the export in which dtype (`mythos-export export --dtype`)"
            )
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raises InputError: a bundle is saved by copying its folder."""
        raise InputError(f"a bundle is saved by copying its folder: {self.name_or_path}")

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Raises InputError: transformers' paged cache needs a torch model."""
        raise InputError("a bundle has no paged cache; pass a batch to generate()")


# A pipeline looks for the class's name here, and logs an error where it is missing.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MythosConfig.model_type] = MythosForCausalLM.__name__


def _ends(runner: Runner) -> list[int] | None:
    return list(runner.manifest.eos_token_ids) or None


def _generation_config(path: Path, runner: Runner) -> GenerationConfig:
    """The checkpoint's defaults; what ends a text and which cache there is are the bundle's."""
    try:
        config = GenerationConfig.from_pretrained(path.parent, path.name, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: transformers cannot read it: {error}; export again without it") from error
    config.eos_token_id, config.cache_implementation = _ends(runner), None
    return config


def _check_cache(cache: Any, runner: Runner) -> None:
    if not isinstance(cache, SessionCache):
        raise InputError(
            f"past_key_values is a {type(cache).__name__}; expected what this model returned, or none to begin with"
        )
    if cache.runner is not runner:
        raise InputError("past_key_values is of another model; begin without it")


def _on_cpu(name: str, tensor: Tensor | None) -> Tensor:
    """An integer tensor [B, columns]. Raises InputError for anything else."""
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or tensor.is_floating_point():
        found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputError(f"{name} is {found}; expected an integer tensor [batch, tokens]")
    if tensor.device.type != "cpu":
        raise InputError(f"{name} is on {tensor.device}; the model's tensors are on the CPU: pass {name}.cpu()")
    return tensor
