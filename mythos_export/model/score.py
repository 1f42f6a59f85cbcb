"""A Decoder run in torch over a whole sequence without a cache: for parity, and to be held against other models.

Shape letters: T tokens, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mythos_export.config import ModelConfig
from mythos_export.model.decoder import Decoder
from runtimes.backend import Float32, StepInput, StepOutput


def window_step(config: ModelConfig, ids: Sequence[int], n_loops: int) -> StepInput:
    """The step that feeds T token ids to an empty cache and asks for the logits of every position."""
    return StepInput(
        np.array([ids], dtype=np.int64),
        past_len=np.zeros(1, dtype=np.int64),
        past_kv=np.zeros((config.slots(n_loops), 1, 1, config.cache_width), dtype=np.float32),
        logit_positions=np.arange(len(ids), dtype=np.int64)[None],
        n_loops=np.array([n_loops], dtype=np.int64),
    )


def run_decoder(decoder: Decoder, step: StepInput) -> StepOutput:
    """Evaluates a step of one sequence in torch, at the step's n_loops, up to the decoder's max_loops."""
    if decoder.config.loop:
        decoder.fixed_loops = int(step.n_loops[0])
    with torch.no_grad():
        return StepOutput(*(output.numpy() for output in decoder(*map(torch.from_numpy, step[:4]))))


class DecoderScorer:
    """A Decoder as a mythos_export.divergence.Scorer."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def logits(self, ids: Sequence[int], n_loops: int) -> Float32:
        """Logits [T, V] float32 after each of T token ids at n_loops loops, up to the decoder's max_loops."""
        logits: Float32 = run_decoder(self.decoder, window_step(self.decoder.config, ids, n_loops)).logits[0]
        return logits
