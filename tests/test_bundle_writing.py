"""Bundles as output: whole or not at all."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from test_bundle import FILES, content
from test_bundle import bundle as bundle

import mythos_export.export
from mythos_export.checkpoint import load_checkpoint
from mythos_export.export import export_bundle
from mythos_export.trace import Traced, trace
from runtimes.bundle import BundleWriter, open_bundle
from runtimes.errors import BundleError
from runtimes.folder_writer import HashedFile
from runtimes.runner import load


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
