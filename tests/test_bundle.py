"""Bundles as data from elsewhere, checked before use."""

import hashlib
import json
import shutil

import onnx
import pytest

from runtimes.bundle import open_bundle, rewrite_manifest
from runtimes.errors import BackendError, BundleError, MythosError
from runtimes.runner import load

FILES = ("decoder.cuda.onnx", "decoder.onnx", "weights.bin", "tokenizer.json")


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy to damage, alone in a folder."""
    return shutil.copytree(tiny_bundle, tmp_path / "home" / "bundle")


def edit(bundle, change):
    """Changes manifest.json in place."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))


def put(bundle, name, data):
    """Replaces a file of the bundle, the manifest's checksum included."""
    (bundle / name).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(bundle, lambda manifest: manifest["files"].update({name: entry}))


def list_file(bundle, name, data=b"x"):
    """Adds a file to the manifest, not to the folder."""
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(bundle, lambda manifest: manifest["files"].update({name: entry}))


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(bundle, match, kind=BundleError):
    with pytest.raises(kind, match=match):
        load(bundle, threads=1)


# Reading: files


def test_an_untouched_copy_is_accepted(bundle, tiny_bundle):
    assert open_bundle(bundle)[1] == open_bundle(str(tiny_bundle))[1]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_bit_is_refused(bundle, name, place):
    data = bytearray((bundle / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    (bundle / name).write_bytes(data)
    refused(bundle, rf"{name}: sha256 \w{{16}}… does not match the manifest's .*; copy the bundle again or export")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(bundle, name):
    (bundle / name).unlink()
    refused(bundle, rf"{name}: missing, though the manifest lists it; copy the whole bundle again")
    (bundle / name).mkdir()
    refused(bundle, rf"{name}: missing, though the manifest lists it")


@pytest.mark.parametrize("name", FILES)
def test_a_changed_size_is_refused(bundle, name):
    data = (bundle / name).read_bytes()
    for changed in (b"", data[:-1], data + b"\0"):
        (bundle / name).write_bytes(changed)
        refused(bundle, rf"{name}: {len(changed)} bytes, the manifest says {len(data)}; copy the whole bundle again")


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "..", "{root}/secret", "sub\\secret", "", "."])
def test_a_name_that_leaves_the_folder_is_refused(bundle, name):
    (bundle.parent / "secret").write_bytes(b"x")
    list_file(bundle, name.format(root=bundle.parent))
    refused(bundle, r"manifest\.json: names \".*\", which leaves the bundle's folder; do not use this bundle")


@pytest.mark.parametrize("name", ["n" * 300, "nul\0byte", "decoder.onnx/inside"])
def test_a_name_that_no_file_can_have_is_refused(bundle, name):
    list_file(bundle, name)
    refused(bundle, "home/bundle")


def test_a_linked_file_is_refused(bundle):
    outside = bundle.parent / "elsewhere.bin"
    (bundle / "weights.bin").rename(outside)
    (bundle / "weights.bin").symlink_to(outside)
    refused(bundle, r"weights\.bin: is a link; a bundle holds plain files only, copy the file in its place")


def test_a_linked_folder_on_the_way_is_refused(bundle):
    outside = bundle.parent / "outside"
    outside.mkdir()
    (outside / "data.bin").write_bytes(b"x")
    (bundle / "sub").symlink_to(outside, target_is_directory=True)
    list_file(bundle, "sub/data.bin")
    refused(bundle, r"bundle/sub: is a link")


def test_a_linked_manifest_is_refused(bundle):
    (bundle / "manifest.json").rename(bundle.parent / "manifest.json")
    (bundle / "manifest.json").symlink_to(bundle.parent / "manifest.json")
    refused(bundle, r"manifest\.json")


def test_a_file_in_a_folder_of_the_bundle_is_accepted(bundle):
    (bundle / "sub").mkdir()
    put(bundle, "sub/data.bin", b"x")
    open_bundle(bundle)


# Reading: the manifest


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"format_version": 7},
            "format version 7, this release reads 4 to 6; export the checkpoint again, or install",
        ),
        ({"format_version": None}, "format version None, this release reads 4 to 6"),
        ({"format": "something"}, r'"format" is not "mythos-bundle"; this is not a bundle of mythos-export'),
        ({"colour": "red"}, "damaged manifest: .*unknown field `colour`.*; export the checkpoint again"),
        ({"graphs": []}, "names no graph"),
        (
            {"files": {}},
            r"names decoder\.cuda\.onnx, decoder\.onnx, tokenizer\.json, weights\.bin without a checksum; ",
        ),
        ({"tokenizer": "other.json"}, r"names other\.json without a checksum"),
        ({"files": {"decoder.onnx": {"size": "1", "sha256": ""}}}, r"damaged manifest: .*Expected `int`, got `str`"),
        ({"source": {"kind": "pt"}}, "damaged manifest: .*missing required field `name`"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(bundle, change, match):
    edit(bundle, lambda manifest: manifest.update(change))
    refused(bundle, rf"manifest\.json: {match}")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"not json", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000], ids=lambda data: repr(data[:9])
)
def test_a_manifest_that_is_no_json_object_is_refused(bundle, data):
    (bundle / "manifest.json").write_bytes(data)
    refused(bundle, r"manifest\.json: ")


@pytest.mark.parametrize("name", ["format", "format_version", "producer", "model", "graphs", "files", "source"])
def test_a_manifest_without_one_of_its_fields_is_refused(bundle, name):
    edit(bundle, lambda manifest: manifest.pop(name))
    refused(bundle, r"manifest\.json: ")


@pytest.mark.parametrize("name", ["missing", "file", "empty"])
def test_a_folder_that_is_no_bundle_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path / name, rf"{name}: (no such folder|not a bundle, it holds no manifest\.json).*mythos-export export"
    )


def test_the_manifest_is_replaced_in_one_step(bundle):
    _, manifest = open_bundle(bundle)
    before = (bundle / "manifest.json").stat().st_ino
    rewrite_manifest(bundle, manifest)
    assert (bundle / "manifest.json").stat().st_ino != before
    assert open_bundle(bundle)[1] == manifest
    assert sorted(content(bundle)) == sorted([*FILES, "manifest.json"])


# Reading: what the checksums cannot tell


@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin", "{root}/secret.bin", "link.bin"])
def test_weights_outside_the_folder_are_refused(bundle, location):
    secret = bundle.parent / "secret.bin"
    shutil.copy(bundle / "weights.bin", secret)
    (bundle / "sub").mkdir()
    (bundle / "link.bin").symlink_to(secret)
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.format(root=bundle.parent)
    put(bundle, "decoder.onnx", model.SerializeToString())
    refused(bundle, r"decoder\.onnx", MythosError)


@pytest.mark.parametrize("name", ["decoder.onnx", "weights.bin"])
def test_a_graph_that_onnxruntime_refuses_is_named(bundle, name):
    put(bundle, name, (bundle / name).read_bytes()[:20_000])
    refused(bundle, r"decoder\.onnx: onnxruntime .* refuses it", BackendError)


def test_a_tokenizer_that_cannot_be_read_is_named(bundle):
    put(bundle, "tokenizer.json", b"{}")
    refused(bundle, r"tokenizer\.json", MythosError)


@pytest.mark.parametrize(
    "change", [{"vocab_size": 1000}, {"cache_width": 10}, {"loops": 4}, {"max_loops": 100}, {"dtype": "float16"}]
)
def test_a_manifest_that_contradicts_its_graph_is_refused(bundle, change):
    edit(bundle, lambda manifest: manifest["graphs"][0].update(change))
    with pytest.raises(MythosError):
        load(bundle, threads=1).generate("A", 2, n_loops=change.get("max_loops")).complete()
