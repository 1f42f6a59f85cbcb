"""Generating text: a loop of session steps and choices, streamed as tokens whose text is whole characters only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from runtimes.arrays import Int64
from runtimes.backend import Cancelled
from runtimes.choosing import Chooser
from runtimes.sampling import Sampling, SplitMix64
from runtimes.session import Session


@dataclass(frozen=True)
class Token:
    """A generated token. text: what it adds to the output, "" while a character or a possible stop text is unfinished.

    logprob: its natural log-probability under the model, before temperature and filters. index: its sequence in the batch.
    """

    id: int
    text: str
    logprob: float
    index: int = 0


@dataclass
class Stats:
    """Counts and times of a generation. Seconds are wall clock; rates are tokens of all sequences a second."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    exit_loops: int = 0
    seed: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def mean_exit_loop(self) -> float:
        """Mean loop at which the new tokens halted: how much depth they used."""
        return self.exit_loops / self.new_tokens if self.new_tokens else 0.0

    def to_dict(self) -> dict[str, float]:
        """For --json."""
        names = ("prompt_tokens", "new_tokens", "prefill_seconds", "decode_seconds", "seed")
        rates = ("prefill_tokens_per_second", "decode_tokens_per_second", "mean_exit_loop")
        return {name: getattr(self, name) for name in (*names, *rates)}


class StreamedText:
    """The text of one sequence as it grows: whole characters, nothing that may still become part of a stop text."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.stopped = False
        self.emitted = ""
        self._tokenizer, self._stops = tokenizer, stops
        self._context = self._context_of(prompt)
        self._ids: list[int] = []
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=True)
        self._decoded = ""

    def _context_of(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens: some decoders treat the first token of a text in its own way. None of them where the prompt
        ends within a character, which would then be shown as part of the output."""
        context = list(prompt[-8:])
        if self._tokenizer is None or self._tokenizer.decode(context).endswith("\ufffd"):
            return []
        return context

    def add(self, token: int, last: bool) -> str:
        """What this token lets out. last: nothing follows, so unfinished bytes come out as replacement characters."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._ids.append(token)
        self._decoded += self._stream.step(self._tokenizer, token) or ""
        if last:
            self._decoded = self._all(self._tokenizer)
        found = [at for at in (self._decoded.find(stop) for stop in self._stops) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._decoded) - (0 if last else self._held_back())
        text = self._decoded[len(self.emitted) : end]
        self.emitted += text
        return text

    def flush(self) -> None:
        """Lets out what was held back, where a generation ends without a last token."""
        if self._tokenizer is not None and not self.stopped:
            self.emitted = self._all(self._tokenizer)

    def _all(self, tokenizer: Tokenizer) -> str:
        """The whole output so far; unfinished bytes are replacement characters."""
        before = tokenizer.decode(self._context)
        text: str = tokenizer.decode(self._context + self._ids)[len(before) :]
        return text

    def _held_back(self) -> int:
        """Length of the longest tail that a stop text begins with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for n in range(min(longest, len(self._decoded)), 0, -1):
            if any(stop.startswith(self._decoded[-n:]) for stop in self._stops):
                return n
        return 0


@dataclass
class SequenceState:
    """One sequence of a generation."""

    index: int
    seen: list[int]
    text: StreamedText
    random: SplitMix64
    new_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True)
class Limits:
    """When a sequence ends: after max_new_tokens ("length"), at a token of eos ("eos") or of stop_ids or a stop text ("stop"), at
    the model's last position ("context")."""

    max_new_tokens: int
    max_seq_len: int
    eos: frozenset[int]
    stop_ids: frozenset[int]


class Generation:
    """Iterate over it for tokens as they come, of all sequences in turn; or call complete().

    cancel() may be called from another thread, also during a step (a GPU finishes that step first). finish_reasons: "length",
    "eos", "stop", "context" or "cancelled", one a sequence. Made by Runner.generate.
    """

    def __init__(
        self,
        session: Session,
        sequences: list[SequenceState],
        sampling: Sampling,
        limits: Limits,
        batched: bool,
        seed: int,
    ) -> None:
        self.stats = Stats(prompt_tokens=sum(len(sequence.seen) for sequence in sequences), seed=seed)
        self._session, self._sequences, self._sampling, self._limits = session, sequences, sampling, limits
        self._batched = batched
        self._tokens = self._generate()

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def complete(self) -> Generation:
        """Generates all that is left and returns itself."""
        for _ in self._tokens:
            pass
        return self

    def cancel(self) -> None:
        """Stops the generation; what was generated so far stays."""
        self._session.stop.set()

    @property
    def ids(self) -> list[int] | list[list[int]]:
        """New token ids so far: a list, or a list a sequence if the prompt was a list of prompts."""
        rows = [list(sequence.new_ids) for sequence in self._sequences]
        return rows if self._batched else rows[0]

    @property
    def text(self) -> str | list[str]:
        """New text so far, one a sequence if the prompt was a list of prompts; "" without a tokenizer."""
        texts = [sequence.text.emitted for sequence in self._sequences]
        return texts if self._batched else texts[0]

    @property
    def finish_reasons(self) -> list[str | None]:
        return [sequence.finish_reason for sequence in self._sequences]

    def _generate(self) -> Iterator[Token]:
        active = list(self._sequences)
        step = [list(sequence.seen) for sequence in active]
        decoding = False
        try:
            while active:
                if self._session.stop.is_set:
                    raise Cancelled
                began = time.perf_counter()
                tokens, exit_loop = self._step(active, step)
                self._count(time.perf_counter() - began, len(active), int(exit_loop.sum()), decoding)
                yield from tokens
                going = [b for b, sequence in enumerate(active) if sequence.finish_reason is None]
                if len(going) < len(active):
                    active = [active[b] for b in going]
                    if active:
                        self._session.keep(going)
                step, decoding = [[sequence.new_ids[-1]] for sequence in active], True
        except Cancelled:
            for sequence in active:
                sequence.finish_reason = sequence.finish_reason or "cancelled"
                sequence.text.flush()
        finally:
            self._session.close()

    def _step(self, active: list[SequenceState], step: list[list[int]]) -> tuple[list[Token], Int64]:
        """Feeds each active sequence its next ids and chooses a token for each; returns exit_loop [B] as well."""
        chooser = Chooser(
            self._sampling, [sequence.seen for sequence in active], [sequence.random for sequence in active]
        )
        more = not any(self._reached(sequence, 1) for sequence in active)
        chosen = self._session.advance_choosing(step, chooser, more=more)
        choices = zip(active, chosen.tokens.tolist(), chosen.logprobs.tolist(), strict=True)
        return [self._accept(*choice) for choice in choices], chosen.exit_loop

    def _reached(self, sequence: SequenceState, more: int = 0) -> str | None:
        """The limit that a sequence has reached, or will have after so many more tokens."""
        if len(sequence.new_ids) + more >= self._limits.max_new_tokens:
            return "length"
        return "context" if len(sequence.seen) + more > self._limits.max_seq_len else None

    def _accept(self, sequence: SequenceState, token: int, logprob: float) -> Token:
        sequence.seen.append(token)
        sequence.new_ids.append(token)
        limits = self._limits
        if token in limits.eos:
            sequence.finish_reason = "eos"
        elif token in limits.stop_ids:
            sequence.finish_reason = "stop"
        else:
            sequence.finish_reason = self._reached(sequence)
        text = sequence.text.add(token, last=sequence.finish_reason is not None)
        if sequence.text.stopped:
            sequence.finish_reason = "stop"
        return Token(token, text, logprob, sequence.index)

    def _count(self, seconds: float, tokens: int, exit_loops: int, decoding: bool) -> None:
        stats = self.stats
        stats.new_tokens += tokens
        stats.exit_loops += exit_loops
        if decoding:
            stats.decode_seconds += seconds
            stats.decode_tokens += tokens
        else:
            stats.prefill_seconds += seconds
