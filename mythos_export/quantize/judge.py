"""Holds quantized models against the float32 model they come from, over text that no calibration has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mythos_export.divergence import Comparison, Progress, Scorer, compare
from mythos_export.model.unfolded import Unfolded
from mythos_export.quantize.bundle import QuantizableBundle, Text
from mythos_export.quantize.compute import Outcome, Quantizer
from mythos_export.quantize.simulation import UnfoldedScorer, quantized_model
from runtimes.arrays import Float32
from runtimes.errors import InputError
from runtimes.session import check_n_loops

_REMEMBERED_BYTES = 2**30  # of the float32 model's logits


@dataclass(frozen=True)
class Trial:
    """One recipe and what it costs. n_bytes: of the weights. comparisons: KL(float32 ‖ quantized) and the rest, by loop count.
    outcomes: of every matrix."""

    name: str
    n_bytes: int
    comparisons: dict[int, Comparison]
    outcomes: dict[str, Outcome]


class Judge:
    """Scores models against a bundle's float32 weights at the same loop counts.

    text: sampled as for calibration, `text.length` tokens a window, scored from the second on. loops: default 1, 2, 4, … and the
    bundle's own depth, or a fixed bundle's only one. Raises InputError for text or loop counts that do not serve.
    """

    def __init__(self, source: QuantizableBundle, text: Text, loops: Sequence[int] | None = None) -> None:
        if text.length < 2:
            raise InputError(
                f"length is {text.length}; expected at least 2 tokens, as the first of a sequence is not scored"
            )
        self.source = source
        wanted = list(loops) if loops is not None else default_loops(source)
        self.loops = [int(check_n_loops(source.graph, n_loops, 1)[0]) for n_loops in wanted]
        chosen = source.sample(text)
        self.record, self.windows = chosen.record, chosen.ids.tolist()
        reference = Unfolded(source.config, source.weights, source.n_loops)
        self._against = _Remembering(UnfoldedScorer(reference), _REMEMBERED_BYTES)

    def compare(
        self, model: Unfolded, progress: Progress | None = None, name: str = "scoring"
    ) -> dict[int, Comparison]:
        """KL(float32 ‖ model) and the rest at each loop count. name: what progress is told."""

        def tell(_: str, done: int, total: int) -> None:
            if progress:
                progress(name, done, total)

        return compare(self._against, UnfoldedScorer(model), self.windows, self.loops, progress=tell)

    def trial(self, name: str, quantizer: Quantizer, progress: Progress | None = None) -> Trial:
        """Scores what a quantizer makes."""
        model = quantized_model(quantizer, self.source.n_loops)
        comparisons = self.compare(model, progress, f"scoring {name}")
        return Trial(name, self.source.n_bytes(quantizer.plan), comparisons, dict(quantizer.outcomes))


def default_loops(source: QuantizableBundle) -> list[int]:
    """Powers of two below a dynamic bundle's default loop count, and that; a fixed bundle's own."""
    if source.graph.loops is not None:
        return [source.graph.loops]
    depth = source.graph.default_loops
    return [2**i for i in range(depth.bit_length()) if 2**i < depth] + [depth]


class _Remembering:
    """A Scorer that keeps what another gave, up to so many bytes."""

    def __init__(self, scorer: Scorer, n_bytes: int) -> None:
        self._scorer, self._left = scorer, n_bytes
        self._kept: dict[tuple[int, tuple[int, ...]], Float32] = {}

    def logits(self, ids: Sequence[int], n_loops: int) -> Float32:
        key = (n_loops, tuple(ids))
        if key in self._kept:
            return self._kept[key]
        logits = self._scorer.logits(ids, n_loops)
        if logits.nbytes <= self._left:
            self._left -= logits.nbytes
            self._kept[key] = logits
        return logits
