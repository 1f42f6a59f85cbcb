"""Text to judge or calibrate a model with: documents, cut into windows of token ids, or a seeded sample of such windows.

Shape letters: N sequences, T tokens of each.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtimes.errors import InputError

MOST_UNKNOWN = 0.2  # share of unknown tokens beyond which a tokenizer is not the one for a text
_FILES = (".jsonl", ".npy", ".txt")  # never the name of a dataset
_DATASET_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:.*)?")
_log = logging.getLogger("mythos_export")
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Token ids that are scored together, and the bytes of text behind the tokens after the first."""

    ids: list[int]
    scored_bytes: int


@dataclass(frozen=True)
class Sample:
    """ids: [N, T] int64. record: where they came from, in plain JSON types, for a manifest; its keys:

    source: file name or dataset. sha256: of the file, or of the dataset's texts, each ended by a zero byte. seed.
    n_sequences: N. n_sequences_requested: more than N where the source holds no more. length: T. ids_sha256: of ids as
    little-endian bytes.
    """

    ids: Int64
    record: dict[str, str | int]


def read_documents(path: str | Path) -> list[str]:
    """Documents of a file: one a line of a .jsonl ({"text": …}), else the whole file as one. Raises InputError, naming the line."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f'{file}: no such text file; expected .jsonl with a "text" field a line, or plain text')
    return _documents(file, file.read_bytes())


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


def sample(
    source: str | Path,
    encode: Callable[[str], list[int]] | None,
    vocab_size: int,
    n_sequences: int = 128,
    length: int = 512,
    seed: int = 0,
    unk_id: int | None = None,
) -> Sample:
    """N sequences of T tokens for calibration: the documents' tokens joined in order, cut every T, and N of the pieces drawn.

    source: a .jsonl ({"text": …} a line), a plain text file, a .npy of token ids (integers, 1-D or 2-D, rows joined in order),
    or, where no such file exists and the package datasets is installed, a Hugging Face dataset with a "text" column, as
    name[:config][:split], split "train" unless given (`name::split` for one without configs; a split may be sliced:
    `train[:1%]`). encode: token ids of a text, None where source holds ids. vocab_size: of the model. n_sequences: N; where
    there are fewer pieces, all are taken, with a logged remark. length: T. seed: at least 0; the same seed draws the same
    pieces, and a smaller N the first of them. unk_id: the tokenizer's unknown token, see unk_token_id.
    Raises InputError for what cannot be read, holds less than one sequence, or was not tokenized for the model: ids outside
    vocab_size, more than 20 % unknown tokens.
    """
    for name, value, least in (("n_sequences", n_sequences, 1), ("length", length, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name} is {value}; expected at least {least}")
    tokens, sha256 = _tokens(source, encode)
    _check_tokens(source, tokens, vocab_size, unk_id)
    available = len(tokens) // length
    if not available:
        raise InputError(
            f"{source}: holds {len(tokens)} tokens, fewer than one sequence of {length}; give more text or a --length of at most "
            f"{len(tokens)}"
        )
    if available < n_sequences:
        _log.warning(
            "%s: holds %d sequences of %d tokens, not %d; all are taken", source, available, length, n_sequences
        )
    # Sorted by raw bits of PCG64: they stay what they are, whereas numpy may change its Generator's methods (NEP 19).
    drawn = np.argsort(np.random.PCG64(seed).random_raw(available), kind="stable")[:n_sequences]
    ids = tokens[: available * length].reshape(available, length)[drawn].astype(np.int64)
    record: dict[str, str | int] = {
        "source": Path(source).name if Path(source).is_file() else str(source),
        "sha256": sha256,
        "seed": seed,
        "n_sequences": len(ids),
        "n_sequences_requested": n_sequences,
        "length": length,
        "ids_sha256": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
    }
    return Sample(ids, record)


def unk_token_id(tokenizer: Tokenizer) -> int | None:
    """Id of the token that a tokenizer puts where it knows none; None where it has no such token, as those over bytes."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    found: int | None = model.get("unk_id") if token is None else tokenizer.token_to_id(token)
    return found


def _tokens(source: str | Path, encode: Callable[[str], list[int]] | None) -> tuple[NDArray[Any], str]:
    """All tokens of a source, in order, and its sha256."""
    file = Path(source)
    if file.is_file():
        content = file.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if file.suffix == ".npy":
            return _stored_ids(file), sha256
        documents = _documents(file, content)
    elif isinstance(source, str) and _DATASET_NAME.fullmatch(source) and file.suffix not in _FILES:
        documents = _dataset_documents(source)
        sha256 = hashlib.sha256(b"".join(document.encode() + b"\0" for document in documents)).hexdigest()
    else:
        raise InputError(
            f'{source}: no such file; expected .jsonl with a "text" field a line, plain text, a .npy of token ids, or the name '
            "of a Hugging Face dataset"
        )
    if encode is None:
        raise InputError(f"{source}: is text, and there is no tokenizer for it; pass one, or token ids in a .npy file")
    return np.concatenate([np.array(encode(document), dtype=np.int64) for document in documents]), sha256


def _check_tokens(source: str | Path, tokens: NDArray[Any], vocab_size: int, unk_id: int | None) -> None:
    """Refuses tokens that another tokenizer than the model's has made."""
    if not tokens.size:
        raise InputError(f"{source}: holds no tokens")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"{source}: token id {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}; tokenize it with "
            "the model's own tokenizer.json"
        )
    unknown = 0.0 if unk_id is None else float((tokens == unk_id).mean())
    if unknown > MOST_UNKNOWN:
        raise InputError(
            f"{source}: {100 * unknown:.0f} % of its tokens are unknown to the tokenizer (id {unk_id}), expected at most "
            f"{100 * MOST_UNKNOWN:.0f} %; use the model's own tokenizer.json, or text of the kind it was trained on"
        )


def _documents(file: Path, content: bytes) -> list[str]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if file.suffix != ".jsonl":
        return _not_empty(str(file), [text])
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return _not_empty(str(file), [_document(file, number, line) for number, line in lines])


def _not_empty(name: str, documents: Iterable[str]) -> list[str]:
    kept = [document for document in documents if document]
    if not kept:
        raise InputError(f"{name}: holds no text")
    return kept


def _document(file: Path, number: int, line: str) -> str:
    try:
        return msgspec.json.decode(line, type=_Line).text
    except msgspec.DecodeError as error:
        raise InputError(f'{file}, line {number}: expected an object with a "text" string: {error}') from error


class _Line(msgspec.Struct):
    text: str


def _stored_ids(file: Path) -> NDArray[Any]:
    """The token ids of a .npy file, flat and mapped; numpy maps no file that would have to be unpickled."""
    try:
        ids: NDArray[Any] = np.lib.format.open_memmap(file, mode="r")
    except (ValueError, SyntaxError, TokenError) as error:  # the latter two for damaged headers
        raise InputError(f"{file}: not an .npy file of numbers: {error}; save token ids with numpy.save") from error
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise InputError(
            f"{file}: an array of {ids.dtype} with shape {list(ids.shape)}; expected integers, [tokens] or [sequences, tokens]"
        )
    return ids.reshape(-1)


def _dataset_documents(source: str) -> list[str]:
    """The "text" column of name[:config][:split]."""
    name, config, split = (*source.split(":", 2), "", "")[:3]
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise InputError(
            f"{source}: no such file, and Hugging Face datasets need the package {error.name}, which is not installed; run: "
            "pip install 'mythos-export[datasets]', or pass a .jsonl, text or .npy file"
        ) from error
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # network; config or split; the rest
        raise InputError(
            f"{source}: no such file, and not readable as a Hugging Face dataset name[:config][:split]: {error}"
        ) from error
    if "text" not in dataset.column_names:
        raise InputError(
            f'{source}: has the columns {", ".join(dataset.column_names)}; expected one named "text", or pass the texts as .jsonl'
        )
    texts = list(dataset["text"])
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f'{source}: its column "text" does not hold strings only; pass the texts as .jsonl')
    return _not_empty(source, texts)
