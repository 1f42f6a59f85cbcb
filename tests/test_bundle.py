"""Bundles as data from elsewhere (checked before use), and as output (whole or not at all)."""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import onnx
import pytest
import torch

import mythos_export.export
from mythos_export.checkpoint import load_checkpoint
from mythos_export.export import export_bundle
from mythos_export.trace import Traced, trace
from runtimes.bundle import BundleWriter, open_bundle, rewrite_manifest
from runtimes.errors import BackendError, BundleError, MythosError
from runtimes.folder_writer import HashedFile
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


# Writing


@pytest.fixture
def quick_export(monkeypatch, shakespeare):
    """export_bundle of the shipped checkpoint at one loop; the graph is traced once for all tests."""

    def traced_once(config, **options):
        key = (config, *sorted(options.items(), key=str))
        if key not in _traced:
            _traced[key] = trace(config, **options)
        return Traced(_traced[key].model.clone(), _traced[key].parameters)

    monkeypatch.setattr(mythos_export.export, "trace", traced_once)
    return lambda target, source=shakespeare, **options: export_bundle(source, target, loops=1, **options)


_traced = {}


@pytest.fixture
def home(tmp_path):
    """A folder where nothing but bundles may appear."""
    folder = tmp_path / "home"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(params=["unnamed files", "staging folder"])
def file_system(request, monkeypatch):
    """With and without O_TMPFILE, which not every file system knows."""
    if request.param == "staging folder":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("needs O_TMPFILE")


@pytest.fixture
def write(tiny_bundle):
    """Writes a small bundle through BundleWriter; then, if given, is called before it is committed."""
    _, manifest = open_bundle(tiny_bundle)

    def write(target, then=lambda: None, **options):
        with BundleWriter(target, **options) as writer:
            for name in FILES:
                writer.create(name).write(f"new {name}".encode())
            then()
            writer.commit(manifest)
        return open_bundle(target)

    return write


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_bundle_appears_whole_and_only_at_the_end(home, quick_export):
    seen = []
    quick_export(home / "bundle", progress=lambda *_: seen.append(list(home.iterdir())))
    assert len(seen) > 10
    assert not any(seen)
    assert [path.name for path in home.iterdir()] == ["bundle"]
    assert sorted(content(home / "bundle")) == sorted([*FILES, "manifest.json"])
    assert len(load(home / "bundle", threads=1).generate("A", 3, ignore_eos=True).complete().ids) == 3


def test_end_tokens_are_those_asked_for(home, quick_export):
    assert quick_export(home / "none").eos_token_ids == ()
    assert quick_export(home / "one", eos=["<|endoftext|>"]).eos_token_ids == (0,)


def test_two_exports_are_the_same_bytes(home, quick_export):
    quick_export(home / "one")
    quick_export(home / "two")
    assert content(home / "one") == content(home / "two")


def test_writing_works_with_and_without_unnamed_files(home, write, file_system):
    write(home / "deep" / "bundle")
    assert sorted(content(home)) == sorted(
        ["deep", "deep/bundle", *(f"deep/bundle/{n}" for n in (*FILES, "manifest.json"))]
    )
    assert (home / "deep" / "bundle" / "weights.bin").read_bytes() == b"new weights.bin"
    assert (home / "deep" / "bundle" / "weights.bin").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_checkpoints_export_like_their_float32_copies(tmp_path, quick_export, shakespeare, dtype):
    checkpoint = load_checkpoint(shakespeare)
    settings = {name: getattr(checkpoint.settings, name) for name in checkpoint.settings.__struct_fields__}
    reduced = {name: tensor.to(dtype) for name, tensor in checkpoint.state_dict().items()}
    weights = []
    for name, model in (("reduced", reduced), ("wide", {name: tensor.float() for name, tensor in reduced.items()})):
        torch.save({"model": model, "cfg": settings}, tmp_path / f"{name}.pt")
        manifest = quick_export(tmp_path / name, source=tmp_path / f"{name}.pt")
        assert manifest.graphs[0].weight_dtype == "float32"
        weights.append(manifest.files["weights.bin"])
    assert weights[0] == weights[1]
    assert load(tmp_path / "reduced", threads=1).generate([5, 6, 7], 2, ignore_eos=True).complete().ids


def test_an_existing_target_is_refused_and_left_alone(home, bundle, write, quick_export):
    before = content(home)
    for attempt in (write, quick_export):
        with pytest.raises(
            BundleError, match=r"bundle: exists already; choose another folder or pass --force to replace"
        ):
            attempt(bundle)
        with pytest.raises(BundleError, match="exists already"):
            attempt(f"{bundle}/")
    assert content(home) == before


def test_force_replaces_a_bundle(home, bundle, write, file_system):
    (bundle / "stale.bin").write_bytes(b"x")
    write(bundle, force=True)
    assert (bundle / "weights.bin").read_bytes() == b"new weights.bin"
    assert sorted(content(bundle)) == sorted([*FILES, "manifest.json"])
    assert [path.name for path in home.iterdir()] == ["bundle"]


def test_force_takes_an_empty_folder(home, write):
    (home / "bundle").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        write(home / "bundle")
    write(home / "bundle", force=True)


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_force_replaces_nothing_but_bundles(home, bundle, write, kind):
    target = home / "target"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
    elif kind == "file":
        target.write_text("years of work")
    else:
        target.symlink_to(bundle if kind == "link" else home / "nowhere")
    before = content(home)
    with pytest.raises(
        BundleError, match="target: exists and is no bundle; --force replaces bundles and empty folders only"
    ):
        write(target, force=True)
    assert content(home) == before


def test_a_target_within_a_file_is_refused(home, write):
    (home / "file").write_text("x")
    with pytest.raises(BundleError, match="file"):
        write(home / "file" / "bundle")


def test_a_failed_replacement_keeps_the_old_bundle(home, bundle, write, monkeypatch, file_system):
    before, rename = content(home), Path.rename

    def full(self, target):
        if Path(target).name == "bundle" and "old" not in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(BundleError, match="disk is full"):
        write(bundle, force=True)
    assert content(home) == before


def test_an_error_on_the_way_leaves_nothing(home, bundle, write, file_system):
    def fail():
        raise KeyboardInterrupt

    before = content(home)
    for target in (home / "new", bundle):
        with pytest.raises(KeyboardInterrupt):
            write(target, then=fail, force=True)
    assert content(home) == before


# Full disks


def test_too_little_space_is_told_before_any_work(home, quick_export, monkeypatch):
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1_000_000))
    steps = []
    with pytest.raises(
        BundleError, match=r"bundle: the bundle needs 0\.0\d GB, 0\.00 GB are free there; free some space"
    ):
        quick_export(home / "bundle", progress=lambda *step: steps.append(step))
    assert not steps
    assert not list(home.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("after", [0, 10])
def test_a_disk_that_fills_up_leaves_nothing(home, quick_export, monkeypatch, file_system, code, after):
    writes, write = [], HashedFile.write

    def full(self, data):
        writes.append(len(data))
        if len(writes) > after:
            raise OSError(code, os.strerror(code))
        write(self, data)

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(BundleError, match=r"bundle: the disk is full \(.*\); nothing was left behind, free some space"):
        quick_export(home / "bundle")
    assert not list(home.iterdir())


@pytest.mark.parametrize("limit", [1000, 2_000_000])
def test_a_disk_that_really_ends_leaves_nothing(home, bundle, quick_export, file_system, limit):
    """The kernel ends the file at the limit, within a write or at the flush of what was buffered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = content(home)
    for target in (home / "new", bundle):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(BundleError, match="the disk is full"):
                quick_export(target, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(home) == before


# Killed exports


def test_a_killed_export_leaves_no_trace(home, shakespeare, quick_export):
    script = """if True:
        import sys, time
        from mythos_export.export import export_bundle
        def progress(what, done, total):
            if what == "writing weights" and done > total // 2:
                print("half way", flush=True)
                time.sleep(60)
        export_bundle(sys.argv[1], sys.argv[2], loops=1, progress=progress)
    """
    command = [sys.executable, "-c", script, shakespeare, home / "bundle"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half way\n"
        process.kill()
    assert not list(home.iterdir())
    quick_export(home / "bundle")
    open_bundle(home / "bundle")


@pytest.mark.parametrize("name", ["bundle", "bundle[1]", "*"])
def test_what_a_killed_export_left_goes_with_the_next(home, write, name):
    for pid in (dead_pid(), dead_pid()):
        leftover = home / f".{name}.partial-{pid}"
        leftover.mkdir()
        (leftover / "weights.bin").write_bytes(b"half")
    other = home / f".other.partial-{dead_pid()}"
    other.mkdir()
    write(home / name)
    assert sorted(path.name for path in home.iterdir()) == sorted([name, other.name])


def test_another_running_export_is_left_alone(home, write):
    running = home / f".bundle.partial-{os.getppid()}"
    running.mkdir()
    strangers = [home / f".bundle.partial-{name}" for name in ("", "notes")]
    for stranger in strangers:
        stranger.mkdir()
    write(home / "bundle")
    assert all(folder.is_dir() for folder in (running, *strangers))


def test_a_leftover_of_an_impossible_process_does_not_stop_an_export(home, write):
    (home / ".bundle.partial-99999999999999999999").mkdir()
    write(home / "bundle")


def test_a_leftover_under_this_process_number_does_not_get_in(home, write, file_system):
    """In a container every export is process 1, and so was the one that was killed."""
    stale = home / f".bundle.partial-{os.getpid()}"
    stale.mkdir()
    for name in ("weights.bin", "more.bin"):
        (stale / name).write_bytes(b"stale")
    write(home / "bundle")
    assert (home / "bundle" / "weights.bin").read_bytes() == b"new weights.bin"
    assert [path.name for path in home.iterdir()] == ["bundle"]
    assert not (home / "bundle" / "more.bin").exists()


def test_a_bundle_that_a_killed_export_moved_aside_comes_back(home, bundle, write):
    before = content(bundle)
    bundle.rename(home / f".bundle.partial-old-{dead_pid()}")
    (home / f".bundle.partial-{dead_pid()}").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        write(bundle)
    assert content(bundle) == before
    assert [path.name for path in home.iterdir()] == ["bundle"]


def test_a_replaced_bundle_that_a_killed_export_did_not_remove_goes(home, bundle, write):
    shutil.copytree(bundle, home / f".bundle.partial-old-{dead_pid()}")
    write(bundle, force=True)
    assert (bundle / "weights.bin").read_bytes() == b"new weights.bin"
    assert [path.name for path in home.iterdir()] == ["bundle"]
