"""Text to judge or calibrate a model with: documents from a file, cut into windows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from runtimes.errors import InputError


@dataclass(frozen=True)
class Window:
    """Token ids that are scored together, and the bytes of text behind the tokens after the first."""

    ids: list[int]
    scored_bytes: int


def read_documents(path: str | Path) -> list[str]:
    """Documents of a file: one a line of a .jsonl ({"text": …}), else the whole file as one. Raises InputError, naming the line."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f'{file}: no such text file; expected .jsonl with a "text" field a line, or plain text')
    try:
        content = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if file.suffix != ".jsonl":
        documents = [content]
    else:
        documents = [
            _document(file, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()
        ]
    documents = [document for document in documents if document]
    if not documents:
        raise InputError(f"{file}: holds no text")
    return documents


def _document(file: Path, number: int, line: str) -> str:
    try:
        return msgspec.json.decode(line, type=_Line).text
    except msgspec.DecodeError as error:
        raise InputError(f'{file}, line {number}: expected an object with a "text" string: {error}') from error


class _Line(msgspec.Struct):
    text: str


def windows(
    documents: Sequence[str],
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    length: int = 512,
    max_tokens: int | None = None,
) -> Iterator[Window]:
    """Cuts every document into windows of `length` tokens that do not overlap; a last one of a single token is left out.

    max_tokens: stop after so many scored tokens (every token of a window but its first is scored).
    """
    left = max_tokens
    for document in documents:
        ids = encode(document)
        for start in range(0, len(ids) - 1, length):
            part = ids[start : start + length]
            if left is not None:
                part = part[: left + 1]
            if len(part) < 2:
                continue
            yield Window(part, len(decode(part[1:]).encode()))
            if left is not None:
                left -= len(part) - 1
                if left <= 0:
                    return
