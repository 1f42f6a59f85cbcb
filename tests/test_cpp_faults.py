"""The Runner in C: what it says of damaged bundles and of arguments that make no sense; the same words as Python's."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from c_runtime import BACKEND, BUNDLE, INPUT, MEMORY, CError, Library, Stats

from runtimes.runner import load


def damaged_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")


def other_format(bundle: Path) -> None:
    change(bundle, lambda manifest: manifest.update(format="something"))


def other_version(bundle: Path) -> None:
    change(bundle, lambda manifest: manifest.update(format_version=99))


def unknown_member(bundle: Path) -> None:
    change(bundle, lambda manifest: manifest.update(surprise=1))


def a_path_that_leaves(bundle: Path) -> None:
    change(bundle, lambda manifest: manifest["files"].update({"../x": {"size": 1, "sha256": "0"}}))


def no_checksum(bundle: Path) -> None:
    change(bundle, lambda manifest: manifest["files"].pop("weights.bin"))


def a_missing_file(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()


def a_short_file(bundle: Path) -> None:
    path = bundle / "weights.bin"
    path.write_bytes(path.read_bytes()[:-1])


def a_changed_file(bundle: Path) -> None:
    path = bundle / "weights.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(bytes(data))


def a_linked_file(bundle: Path) -> None:
    path = bundle / "weights.bin"
    path.symlink_to(path.rename(bundle.parent / "elsewhere"))


def no_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def no_folder(bundle: Path) -> None:
    shutil.rmtree(bundle)


def change(bundle: Path, how: Callable[[dict[str, object]], object]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    how(manifest)
    path.write_text(json.dumps(manifest))


SPOILERS = (
    other_format,
    other_version,
    a_path_that_leaves,
    no_checksum,
    a_missing_file,
    a_short_file,
    a_changed_file,
    a_linked_file,
    no_manifest,
    no_folder,
)


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_bundle_is_refused_in_pythons_words(
    library: Library, own_bundle: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(own_bundle)
    with pytest.raises(CError) as in_c:
        library.open(own_bundle)
    with pytest.raises(Exception, match=r".") as in_python:
        load(own_bundle)
    assert in_c.value.status == BUNDLE
    assert str(in_c.value) == str(in_python.value)


@pytest.mark.parametrize("spoil", [damaged_manifest, unknown_member])
def test_a_damaged_manifest_is_refused(library: Library, own_bundle: Path, spoil: Callable[[Path], None]) -> None:
    spoil(own_bundle)
    with pytest.raises(CError, match=r"manifest\.json: damaged manifest: .*; export the checkpoint again") as refused:
        library.open(own_bundle)
    assert refused.value.status == BUNDLE


def test_arguments_that_make_no_sense(library: Library, tiny_bundle: Path) -> None:
    runner, python = library.open(tiny_bundle, threads=1), load(tiny_bundle, threads=1)
    session = runner.session()
    session.advance([[1, 2]])
    requests = (
        ([[]], {}),
        ([[2048]], {}),
        ([[-1]], {}),
        ([[1] * 513], {}),
        ([[1]], {"max_new_tokens": 0}),
        ([[1]], {"n_loops": [13]}),
    )
    for prompts, options in requests:
        with pytest.raises(CError) as in_c:
            runner.generate(prompts, **options)
        with pytest.raises(Exception, match=r".") as in_python:
            python.generate(prompts, **options)
        assert in_c.value.status == INPUT
        assert str(in_c.value).replace("sequence 0", "prompt 0") == str(in_python.value).replace(
            "sequence 0", "prompt 0"
        )
    for name, value in (
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 2.0),
    ):
        with pytest.raises(CError, match=f"{name} is .*; expected ") as in_c:
            runner.generate([[1]], **{name: value})
        assert in_c.value.status == INPUT
    for call in (
        lambda: library.call("mythos_runner_open", None, None, None),
        lambda: runner.session(0),
        lambda: runner.score([1]),
        lambda: session.keep([1]),
        lambda: session.keep([]),
        lambda: session.advance([[]]),
        lambda: library.call("mythos_runner_info", runner.handle, ctypes.byref(Stats(size=1))),
    ):
        with pytest.raises(CError) as in_c:
            call()
        assert in_c.value.status == INPUT
        assert str(in_c.value)
    session.advance([[3]])  # it is as it was
    assert session.past_len == [3]


def test_operators_that_are_not_there(library: Library, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CError, match="native operators are asked for, but there is no ") as refused:
        library.open(tiny_bundle, native=1, operators_library=str(tmp_path / "none.so").encode())
    assert refused.value.status == BACKEND
    assert not library.open(tiny_bundle, operators_library=str(tmp_path / "none.so").encode()).info.native


def test_a_memory_limit(library: Library, tiny_bundle: Path) -> None:
    with pytest.raises(CError, match=r"the weights take .* bytes, more than the memory_limit of 1000") as refused:
        library.open(tiny_bundle, memory_limit=1000)
    assert refused.value.status == MEMORY
    plain = library.open(tiny_bundle, threads=1)
    cache = plain.info.cache_bytes_per_token * 256
    runner = library.open(tiny_bundle, threads=1, memory_limit=plain.info.weight_bytes + cache + cache // 2)
    session = runner.session()
    with pytest.raises(
        CError, match=r"would exceed the memory_limit of .*; close sessions, shorten them, or raise it"
    ) as refused:
        runner.session()
    assert refused.value.status == MEMORY
    session.close()
    runner.session()
