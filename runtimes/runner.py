"""The Runner: one bundle, loaded and checked, that generates, scores, encodes and decodes. No torch anywhere."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtimes.arrays import Float32
from runtimes.backend import Backend, StepInput, StepOutput, StopSignal
from runtimes.backends import open_backend
from runtimes.bundle import Manifest, open_bundle
from runtimes.device_memory import DeviceRequest
from runtimes.errors import BundleError, InputError
from runtimes.generation import Generation, Limits, SequenceState, StreamedText
from runtimes.sampling import Sampling, SplitMix64, log_softmax
from runtimes.session import Session, check_ids

Prompt = str | Sequence[int]


def load(
    bundle: str | Path,
    backend: str = "auto",
    threads: int | None = None,
    native: bool | None = None,
    *,
    device: str | None = None,
    engine: str | None = None,
    max_batch: int = 1,
    max_context: int | None = None,
    memory_limit: int | None = None,
) -> Runner:
    """Checks a bundle and makes it ready to run.

    backend: "auto" takes an engine of the bundle that fits this GPU and the TensorRT installed, else onnxruntime, and says once
    why; "tensorrt" and "tensorrt-rtx" are errors where they cannot run; "onnxruntime" runs anywhere. device: "cuda" runs on the
    NVIDIA GPU, an engine or onnxruntime with its CUDA provider, and is an error where that cannot be; "cpu" takes no engine; by
    default an engine runs where one fits, else the CPU. threads: onnxruntime's, default all cores. native: the operators' native
    kernels; default where they are built, False for the portable bodies.

    memory_limit: most bytes for weights and all caches together, as they lie in memory; what a step computes comes on top. An
    engine's is of the device memory that is planned, all included. What would exceed it is refused before it is allocated.

    For GPUs: max_batch, max_context: device memory is planned for so many sequences of so many tokens, default one of the longest
    the engine takes, on onnxruntime of few; more may run later if the memory is there. engine: key of the one to use
    (`mythos-export build --list`), default the bundle's own dtype first, then the fastest.

    Raises BundleError for a damaged or foreign bundle or engine, BackendError for an unknown or failing backend or too little
    device memory, MemoryLimitError for weights beyond memory_limit, InputError for numbers that are below 1 or beyond the engine.
    """
    numbers = (
        ("threads", threads),
        ("max_batch", max_batch),
        ("max_context", max_context),
        ("memory_limit", memory_limit),
    )
    for name, value in numbers:
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    folder, manifest = open_bundle(bundle)
    tokenizer = _load_tokenizer(folder / manifest.tokenizer) if manifest.tokenizer else None
    request = DeviceRequest(engine, max_batch, max_context, memory_limit, device)
    return Runner(manifest, open_backend(backend, folder, manifest, threads, native, request), tokenizer)


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path}: not a tokenizer.json of Hugging Face tokenizers: {error}; export again") from error


class Runner:
    """A loaded bundle. Any number of generations may run on it at once, each with its own cache. Made by load().

    close(), or the end of a with block, frees what it holds of a GPU; so does the garbage collector.
    """

    def __init__(self, manifest: Manifest, backend: Backend, tokenizer: Tokenizer | None) -> None:
        self.manifest = manifest
        self.graph = backend.graph
        self._backend = backend
        self._tokenizer = tokenizer

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    @property
    def device(self) -> str:
        """Where it computes: "cpu" or "cuda"."""
        return self._backend.device

    @property
    def engine(self) -> str | None:
        """Key of the engine in use; None on onnxruntime."""
        return self._backend.engine

    @property
    def memory(self) -> dict[str, int] | None:
        """Device memory as planned at load, in bytes by use (see DeviceMemory); None on the CPU."""
        memory = self._backend.memory
        return None if memory is None else memory.to_dict()

    @property
    def max_context(self) -> int:
        """Tokens a sequence can have: positions of the model, or fewer of an engine."""
        return self._backend.max_context

    @property
    def native(self) -> bool:
        """Whether the operators' native kernels run, not their portable bodies."""
        return self._backend.native

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle can encode and decode text."""
        return self._tokenizer is not None

    def close(self) -> None:
        """Frees device memory; the runner, its sessions and generations are of no use afterwards. May be called again."""
        self._backend.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_step(self, step: StepInput) -> StepOutput:
        """One evaluation of the graph as it is: cache given, new rows returned."""
        return self._backend.run(step, StopSignal())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises InputError where the bundle has no tokenizer."""
        ids: list[int] = self._need_tokenizer().encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out. Raises InputError where the bundle has no tokenizer."""
        text: str = self._need_tokenizer().decode(list(ids))
        return text

    def session(
        self,
        batch: int = 1,
        n_loops: int | Sequence[int] | None = None,
        chunk: int | None = None,
        tokens: int = 0,
    ) -> Session:
        """A batch of sequences to feed step by step with one's own sampler. chunk: tokens a prefill step, None for what
        suits the backend. tokens: how long they are expected to become, if known: too little memory is told at once."""
        return Session(self._backend, batch, n_loops, chunk, tokens)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 128,
        n_loops: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | int | Sequence[str | int] = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """Generates after a prompt, or after each of a list of prompts (text or token ids), streaming tokens.

        max_new_tokens: at least 1. n_loops: depth, one number or one a prompt; default the trained one. temperature 0 is greedy;
        top_k, top_p, min_p, repetition_penalty: see Sampling. seed: of the draws, default a fresh one (in stats.seed). stop:
        texts, special tokens or token ids that end a sequence; a stop text is left out of the output. ignore_eos: go on after a
        token that the bundle was exported with as ending a text.
        Raises InputError before any work for anything the model cannot serve, MemoryLimitError for what exceeds memory_limit.
        """
        batched = not isinstance(prompt, str) and len(prompt) > 0 and not isinstance(prompt[0], (int, np.integer))
        prompts: list[Any] = list(prompt) if batched else [prompt]
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        ids = [self._prompt_ids(item, f"prompt {i}" if batched else "the prompt") for i, item in enumerate(prompts)]
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        texts, stop_ids = self._stops([stop] if isinstance(stop, (str, int)) else list(stop))
        seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        sequences = [
            SequenceState(i, row, StreamedText(self._tokenizer, row, texts), SplitMix64(seed + i))
            for i, row in enumerate(ids)
        ]
        limits = Limits(
            max_new_tokens,
            self._backend.max_context,
            frozenset() if ignore_eos else frozenset(self.manifest.eos_token_ids),
            stop_ids,
        )
        longest = max(len(row) for row in ids)
        self._backend.check(len(ids), longest)
        session = self.session(len(ids), n_loops, tokens=min(longest + max_new_tokens, limits.max_seq_len))
        return Generation(session, sequences, sampling, limits, batched, seed)

    def score(self, ids: Prompt, n_loops: int | None = None, *, logits: bool = False) -> NDArray[np.float64] | Float32:
        """How likely the model finds a sequence.

        ids: text or T token ids. Returns the natural log-probability of every token after the first, [T-1] float64; with
        logits=True the logits of every position, [T, V] float32. Raises InputError as generate does.
        """
        row = self._prompt_ids(ids, "the sequence")
        parts: list[Any] = []
        for chunk in self.session(1, n_loops, tokens=len(row)).advance_scored([row]):
            if logits:
                parts.append(chunk.logits)
                continue
            following = row[chunk.start + 1 : chunk.start + 1 + len(chunk.logits)]
            parts.append(log_softmax(chunk.logits[: len(following)])[np.arange(len(following)), following])
        return np.concatenate(parts)

    def _stops(self, stops: list[str | int]) -> tuple[list[str], frozenset[int]]:
        """Stop texts and stop ids; a text that is a special token's name means the token, which never shows as text."""
        texts: list[str] = []
        ids: set[int] = set()
        special = self._tokenizer.get_added_tokens_decoder() if self._tokenizer is not None else {}
        named = {token.content: token_id for token_id, token in special.items() if token.special}
        for item in stops:
            if not isinstance(item, str):
                ids.add(item)
            elif item in named:
                ids.add(named[item])
            elif self._tokenizer is None or not item:
                raise InputError(
                    "stop texts need a tokenizer in the bundle and must not be empty; pass token ids instead"
                )
            else:
                texts.append(item)
        return texts, frozenset(ids)

    def _prompt_ids(self, prompt: Any, what: str) -> list[int]:
        try:
            ids = self.encode(prompt) if isinstance(prompt, str) else [operator.index(token) for token in prompt]
        except TypeError as error:
            raise InputError(f"{what} is neither text nor a list of token ids: {error}") from error
        check_ids(ids, self.graph, what)
        return ids

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InputError(
                "the bundle has no tokenizer; pass token ids, or export it with --tokenizer tokenizer.json"
            )
        return self._tokenizer
