"""A Decoder run in torch over a whole sequence without a cache: for parity, and to be held against other models.

Shape letters: T tokens, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mythos_export.config import ModelConfig
from mythos_export.model.decoder import Decoder
from runtimes.arrays import Float32
from runtimes.backend import StepInput, StepOutput
from runtimes.cache import Cache


def window_step(config: ModelConfig, ids: Sequence[int], n_loops: int, cache_dtype: str = "float32") -> StepInput:
    """The step that feeds T token ids to an empty cache and asks for the logits of every position."""
    cache = Cache(config.slots(n_loops), 1, config.cache_width, cache_dtype)
    positions = np.arange(len(ids), dtype=np.int64)[None]
    tokens, depth = np.array([ids], dtype=np.int64), np.array([n_loops], dtype=np.int64)
    return StepInput(tokens, cache.length, cache.rows, positions, depth, cache.scales)


def run_decoder(decoder: Decoder, step: StepInput) -> StepOutput:
    """Evaluates a step of one sequence in torch, at the step's n_loops, up to the decoder's max_loops."""
    if decoder.config.loop:
        decoder.fixed_loops = int(step.n_loops[0])
    past_scale = None if step.past_scale is None else torch.from_numpy(step.past_scale)
    with torch.no_grad():
        outputs = decoder(*map(torch.from_numpy, step[:4]), past_scale=past_scale)
    return StepOutput(*(output.numpy() for output in outputs))


class DecoderScorer:
    """A Decoder as a mythos_export.divergence.Scorer."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def logits(self, ids: Sequence[int], n_loops: int) -> Float32:
        """Logits [T, V] float32 after each of T token ids at n_loops loops, up to the decoder's max_loops."""
        logits: Float32 = run_decoder(self.decoder, window_step(self.decoder.config, ids, n_loops)).logits[0]
        return logits
