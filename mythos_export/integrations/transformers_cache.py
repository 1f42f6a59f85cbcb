"""What transformers passes from step to step as past_key_values: a Session of the Runner.

Shape letters: B batch, S new columns of input_ids, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from runtimes.arrays import Float32
from runtimes.errors import InputError
from runtimes.runner import Runner
from runtimes.session import Session


class SessionCache:
    """The sequences of one generation, padding left out.

    transformers counts columns of input_ids, padding included; the session counts tokens. tokens: how long the sequences are
    expected to become, 0 where nobody knows. chunk: tokens a prefill step, None for what suits the runner. The session starts
    with the first step, when prompts and depths are known.
    """

    is_compileable = False  # asked by GenerationMixin

    def __init__(self, runner: Runner, tokens: int = 0, chunk: int | None = None) -> None:
        self.runner = runner
        self._tokens, self._chunk = tokens, chunk
        self._columns = 0
        self._session: Session | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input_ids fed so far."""
        return self._columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b goes on as a copy of row beam_idx[b]. What beam search calls after every step."""
        if self._session is not None:
            self._session.keep(beam_idx.tolist())

    def advance(self, ids: Tensor, mask: Tensor | None, n_loops: int | Sequence[int] | None, last: bool) -> Float32:
        """Feeds input_ids [B, S]; mask [B, columns + S] of all columns so far.

        Returns logits [B, 1, V] of the last column, or [B, S, V] of all, zero where a column is padding. Raises InputError for a
        mask that does not fit, and as Session does.
        """
        live = self._live(ids, mask)
        if last and not live[:, -1].all():
            raise InputError(
                f"sequence {int(live[:, -1].argmin())} ends in padding, so nothing can follow its last token; pad on the left: "
                'tokenizer.padding_side = "left"'
            )
        rows = [row[kept].tolist() for row, kept in zip(ids.numpy(), live, strict=True)]
        if self._session is None:
            index, rows, n_loops = _distinct(rows, n_loops) if last else (list(range(len(rows))), rows, n_loops)
            self._session = self.runner.session(len(rows), n_loops, self._chunk, self._tokens)
        else:
            index = list(range(len(rows)))
            if n_loops is not None:
                self._session.lower_n_loops(n_loops)
        if last:
            logits = self._session.advance(rows)[0][index][:, None]
            self._session.keep(index)
        else:
            logits = self._every_column(self._session, rows, live)
        self._columns += ids.shape[1]
        return logits

    def _live(self, ids: Tensor, mask: Tensor | None) -> Any:
        """Which of the new columns [B, S] hold tokens."""
        if mask is None:
            return np.ones(tuple(ids.shape), dtype=bool)
        expected = (ids.shape[0], self._columns + ids.shape[1])
        if tuple(mask.shape) != expected:
            raise InputError(
                f"attention_mask has shape {list(mask.shape)}; expected {list(expected)}: a row a sequence, a column for every "
                "token so far, padding included"
            )
        live = mask.numpy() != 0
        past = 0 if self._session is None else self._session.past_len
        if (live[:, : self._columns].sum(1) != past).any():
            raise InputError("attention_mask hides tokens that are in past_key_values, or shows padding that is not")
        return live[:, self._columns :]

    def _every_column(self, session: Session, rows: list[list[int]], live: Any) -> Float32:
        logits = np.zeros((*live.shape, self.runner.graph.vocab_size), dtype=np.float32)
        columns = [kept.nonzero()[0] for kept in live]
        for chunk in session.advance_scored(rows):
            logits[chunk.row, columns[chunk.row][chunk.start : chunk.start + len(chunk.logits)]] = chunk.logits
        return logits


def _distinct(
    rows: list[list[int]], n_loops: int | Sequence[int] | None
) -> tuple[list[int], list[list[int]], int | list[int] | None]:
    """Rows without their repetitions, for each row where it stands among them, and their depths.

    Beams and several answers begin with the same prompt, which is fed once.
    """
    if isinstance(n_loops, Sequence) and len(n_loops) != len(rows):
        raise InputError(
            f"n_loops has {len(n_loops)} values for {len(rows)} sequences; expected one number or one each"
        )
    depths = list(n_loops) if isinstance(n_loops, Sequence) else [n_loops] * len(rows)
    places: dict[tuple[Any, ...], int] = {}
    index = [places.setdefault((depth, *row), len(places)) for depth, row in zip(depths, rows, strict=True)]
    kept = [list(key[1:]) for key in places]
    return index, kept, n_loops if not isinstance(n_loops, Sequence) else [key[0] for key in places]
