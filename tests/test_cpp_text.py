"""The Runner in C: text as Python's tokenizer and Runner give it, and what it says where it cannot."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from c_runtime import BUNDLE, INPUT, OK, CError, CRunner, Library
from tokenizers import Tokenizer

from runtimes.generation import StreamedText
from runtimes.runner import Runner, load

PIECES = (
    *(" ", "  ", "\n", "\r\n", "\t", "\0", "\x1f", "\x85", "\u00a0", "\u2028", "\u3000", "\u200b"),
    *(
        "a",
        "Ab",
        "'s",
        "'T",
        "'ll",
        "x1",
        "12",
        "!",
        "?!",
        "_",
        "é",
        "e\u0301",
        "ﬁ",
        "İ",
        "ǅ",
        "ß",
        "א",
        "中文",
        "١",
        "Ⅷ",
        "½",
    ),
    *("👩\u200d👩\u200d👧", "🇩🇪", "\U0010ffff", "\ufffd", "\ufeff", "<|endoftext|>", "<|endoftext", "|>"),
)


@pytest.fixture(scope="session")
def text_runner(library: Library, tiny_bundle: Path) -> CRunner:
    runner = library.open(tiny_bundle, threads=1)
    if not runner.info.has_text:
        with pytest.raises(CError) as why:
            runner.encode(b"")
        pytest.skip(f"text is not built in: {why.value}")
    return runner


@pytest.fixture(scope="session")
def tokenizer(tiny_bundle: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_bundle / "tokenizer.json"))


def nasty_texts(n: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 30))) for _ in range(n)]


# The same as Python


def test_ids_and_texts_are_pythons(text_runner: CRunner, tokenizer: Tokenizer) -> None:
    characters = [chr(code) for code in range(0x33480) if not 0xD800 <= code < 0xE000]  # past the last letter
    blocks = ["".join(characters[at : at + 200]) for at in range(0, len(characters), 200)]
    mixed = [between.join(block) for block, between in zip(blocks, (" ", "a", "1 ") * len(blocks), strict=False)]
    for text in (*nasty_texts(2000), *mixed):
        ids = tokenizer.encode(text).ids
        assert text_runner.encode(text.encode()) == ids
        assert text_runner.decode(ids) == tokenizer.decode(ids)


@pytest.mark.slow
def test_documents_are_pythons(library: Library, shared: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """The evaluation texts by every trained checkpoint's tokenizer."""
    texts = [json.loads(line)["text"] for line in (shared / "text" / "eval.jsonl").read_text().splitlines()]
    for source in sorted((shared / "checkpoints").glob("*/tokenizer.json")):
        bundle = with_tokenizer(tiny_bundle, tmp_path / source.parent.name, source.read_text())
        runner, tokenizer = library.open(bundle), Tokenizer.from_file(str(source))
        for text in texts:
            ids = tokenizer.encode(text).ids
            assert (runner.encode(text.encode()), runner.decode(ids)) == (ids, tokenizer.decode(ids))


def test_streams_are_pythons(text_runner: CRunner, tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    rows = [draw.choices(range(300), k=40) for _ in range(200)]  # bytes that seldom make characters, and special tokens
    rows += [tokenizer.encode(text).ids for text in nasty_texts(200)]
    for ids in rows:
        stream = StreamedText(tokenizer, [5, 6], ())
        assert text_runner.stream(ids) == [stream.add(token, i == len(ids) - 1) for i, token in enumerate(ids)]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 4}])
@pytest.mark.parametrize("stops", [(), ("e",), ("the ", "t"), (".\n", "\n\nA"), ("<|endoftext|>", "zzz")])
def test_generated_text_is_pythons(
    text_runner: CRunner, runner: Runner, stops: tuple[str, ...], options: dict[str, Any]
) -> None:
    prompts = ["ROMEO.", "To be, or", "é"]
    told: list[tuple[int, str]] = []
    status, ids, finish, _ = text_runner.generate(
        [text_runner.encode(prompt.encode()) for prompt in prompts],
        lambda token: told.append((token.index, token.utf8.decode())),
        max_new_tokens=60,
        stop_texts=stops,
        **options,
    )
    want = runner.generate(prompts, 60, stop=stops, **options)
    assert [(token.index, token.text) for token in want] == told
    assert (status, ids, finish) == (OK, want.ids, want.finish_reasons)


# What is wrong


def test_text_that_is_no_utf8(text_runner: CRunner) -> None:
    for text, at in ((b"ab\xff", 2), (b"\xc3", 0), (b"a\xed\xa0\x80", 1), (b"\xc0\x80", 0), (b"\xf4\x90\x80\x80", 0)):
        with pytest.raises(
            CError, match=f"text is no UTF-8: no character begins with byte {at}; convert it"
        ) as refused:
            text_runner.encode(text)
        assert refused.value.status == INPUT


def with_tokenizer(bundle: Path, target: Path, text: str) -> Path:
    """A copy of a bundle with another tokenizer.json, and the manifest right."""
    shutil.copytree(bundle, target)
    data = text.encode()
    (target / "tokenizer.json").write_bytes(data)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def lower_case(file: dict[str, Any]) -> None:
    file["normalizer"] = {"type": "Lowercase"}


def other_model(file: dict[str, Any]) -> None:
    file["model"]["type"] = "WordPiece"


def other_words(file: dict[str, Any]) -> None:
    file["pre_tokenizer"]["use_regex"] = False


def begin_token(file: dict[str, Any]) -> None:
    file["post_processor"] = {"type": "TemplateProcessing"}


def spaces_taken_in(file: dict[str, Any]) -> None:
    file["added_tokens"][0]["lstrip"] = True


def token_without_a_merge(file: dict[str, Any]) -> None:
    file["model"]["merges"].pop()


def character_of_id_0(file: dict[str, Any]) -> None:
    file["added_tokens"], file["model"]["vocab"] = [], file["model"]["vocab"] | {"<|endoftext|>": 1, "!": 0}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lower_case, r'/normalizer is \{"type":"Lowercase"\}, expected null'),
        (other_model, '/model/type is "WordPiece", expected "BPE"'),
        (other_words, "/pre_tokenizer/use_regex is false, expected true"),
        (begin_token, '/post_processor/type is "TemplateProcessing", expected "ByteLevel"'),
        (spaces_taken_in, r"its added token <\|endoftext\|> is lstrip"),
        (token_without_a_merge, "no merge makes its token "),
        (character_of_id_0, "id 0 is the byte-level token !"),
    ],
)
def test_a_tokenizer_that_is_read_otherwise_gives_no_text(
    text_runner: CRunner, tiny_bundle: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], said: str
) -> None:
    file = json.loads((tiny_bundle / "tokenizer.json").read_text())
    spoil(file)
    bundle = with_tokenizer(tiny_bundle, tmp_path / "bundle", json.dumps(file))
    runner = text_runner.library.open(bundle, threads=1)
    assert not runner.info.has_text
    with pytest.raises(CError, match=said + ".*; encode in Python and pass token ids") as refused:
        runner.encode(b"a")
    assert refused.value.status == INPUT
    assert runner.generate([[1]], max_new_tokens=2)[0] == OK


def test_a_tokenizer_that_is_none(text_runner: CRunner, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CError, match=r"tokenizer\.json: not a tokenizer\.json of Hugging Face tokenizers") as refused:
        text_runner.library.open(with_tokenizer(tiny_bundle, tmp_path / "bundle", "{"))
    assert refused.value.status == BUNDLE


def test_a_bundle_without_a_tokenizer(library: Library, own_bundle: Path) -> None:
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    manifest["tokenizer"] = None
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    runner, python = library.open(own_bundle, threads=1), load(own_bundle, threads=1)
    with pytest.raises(CError) as in_c:
        runner.encode(b"a")
    with pytest.raises(Exception, match=r".") as in_python:
        python.encode("a")
    assert (in_c.value.status, str(in_c.value)) == (INPUT, str(in_python.value))
    status, ids, _, _ = runner.generate([[1]], max_new_tokens=3)
    assert (status, ids) == (OK, [python.generate([1], 3).complete().ids])
    with pytest.raises(CError, match="the bundle has no tokenizer"):
        runner.generate([[1]], stop_texts=["a"])
