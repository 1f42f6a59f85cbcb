"""How well a bundle predicts a text at each loop count, alone or held against another bundle or a checkpoint.

Windows are scored one by one: at 512 tokens, several at once gain onnxruntime less than a tenth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.text import Window, read_documents, windows
from mythos_export.divergence import Comparison, Progress, Quality, Scorer, compare, perplexity
from runtimes.arrays import Float32
from runtimes.bundle import MANIFEST
from runtimes.errors import InputError
from runtimes.folder_writer import sha256_of
from runtimes.runner import Runner, load
from runtimes.session import check_n_loops

WINDOW = 512  # tokens


class RunnerScorer:
    """A bundle as a mythos_export.divergence.Scorer."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def logits(self, ids: Sequence[int], n_loops: int) -> Float32:
        """Logits [T, V] float32 after each of T token ids. Raises InputError as Runner.score does."""
        logits: Float32 = self.runner.score(ids, n_loops, logits=True)  # type: ignore[assignment]
        return logits


def evaluate(
    runner: Runner,
    text: str | Path,
    loops: Sequence[int] | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[int, Quality]:
    """Quality at each loop count (default: the trained one), over at most max_tokens scored tokens.

    Every document of text is cut into windows of 512 tokens (fewer where the model's positions end), each scored on its own from
    its second token on. Raises InputError before scoring anything.
    """
    depths = _depths(runner, loops)
    parts = _windows(runner, text, runner.graph.max_seq_len, max_tokens)
    return perplexity(RunnerScorer(runner), [part.ids for part in parts], depths, _bytes(parts), progress)


def evaluate_against(
    runner: Runner,
    against: str | Path,
    text: str | Path,
    loops: Sequence[int] | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    *,
    threads: int | None = None,
    native: bool | None = None,
) -> dict[int, Comparison]:
    """As evaluate, held against another model at the same loop counts: KL(against ‖ bundle), ratio of perplexities, agreement.

    against: a bundle, run on onnxruntime with threads and native (see load); or a checkpoint (what load_checkpoint takes), run in
    torch in float32. It must have the bundle's vocabulary, and its tokenizer where both have one. Raises InputError, BundleError
    or CheckpointError before scoring anything.
    """
    depths = _depths(runner, loops)
    is_bundle = (Path(against) / MANIFEST).is_file()
    other = _bundle(against, depths, threads, native) if is_bundle else _checkpoint(against, depths, threads)
    if other.vocab_size != runner.graph.vocab_size:
        raise InputError(
            f"{against}: its vocabulary is {other.vocab_size} tokens, the bundle's {runner.graph.vocab_size}; expected a model of "
            "the same tokenizer"
        )
    ours = _tokenizer_sha256(runner)
    if ours and other.tokenizer_sha256 not in (None, ours):
        raise InputError(
            f"{against}: its tokenizer.json is not the bundle's, so that token ids may mean other texts; export both with the same "
            "--tokenizer"
        )
    parts = _windows(runner, text, min(runner.graph.max_seq_len, other.max_seq_len), max_tokens)
    ids = [part.ids for part in parts]
    return compare(other.scorer, RunnerScorer(runner), ids, depths, _bytes(parts), progress)


@dataclass(frozen=True)
class _Against:
    """The model held against, ready to score, and what must fit. tokenizer_sha256: None where it has no tokenizer."""

    scorer: Scorer
    vocab_size: int
    max_seq_len: int
    tokenizer_sha256: str | None


def _bundle(path: str | Path, depths: Sequence[int], threads: int | None, native: bool | None) -> _Against:
    runner = load(path, "onnxruntime", threads, native)
    for depth in depths:
        try:
            check_n_loops(runner.graph, depth, 1)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    graph = runner.graph
    return _Against(RunnerScorer(runner), graph.vocab_size, graph.max_seq_len, _tokenizer_sha256(runner))


def _checkpoint(source: str | Path, depths: Sequence[int], threads: int | None) -> _Against:
    import torch

    from mythos_export.checkpoint import load_checkpoint
    from mythos_export.model.load import load_decoder
    from mythos_export.model.score import DecoderScorer

    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = load_checkpoint(source)
    decoder = load_decoder(checkpoint, max_loops=max(depths))
    tokenizer = sha256_of(checkpoint.tokenizer) if checkpoint.tokenizer else None
    return _Against(DecoderScorer(decoder), checkpoint.config.vocab_size, checkpoint.config.max_seq_len, tokenizer)


def _tokenizer_sha256(runner: Runner) -> str | None:
    name = runner.manifest.tokenizer
    return runner.manifest.files[name].sha256 if name else None


def _depths(runner: Runner, loops: Sequence[int] | None) -> list[int]:
    return [int(check_n_loops(runner.graph, depth, 1)[0]) for depth in (loops or [None])]  # type: ignore[list-item]


def _windows(runner: Runner, text: str | Path, positions: int, max_tokens: int | None) -> list[Window]:
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; expected at least 1")
    parts = list(windows(read_documents(text), runner.encode, runner.decode, min(WINDOW, positions), max_tokens))
    if not parts:
        raise InputError(f"{text}: too short to score; expected at least two tokens in a document")
    return parts


def _bytes(parts: Sequence[Window]) -> int:
    """Of the text behind the scored tokens; at least 1, as special tokens have no text."""
    return max(1, sum(part.scored_bytes for part in parts))
