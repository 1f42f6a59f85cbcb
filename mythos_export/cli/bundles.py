"""Commands that make bundles and look at them: export, verify, inspect, doctor, demo, version."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mythos_export import __version__
from mythos_export.cli.app import Bundle, DeviceName, Json, LoopList, Quiet, Source, app, emit, numbers, value_of
from runtimes.errors import InputError


class Dtype(str, Enum):
    """Storage of the matrices."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command()
def export(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The bundle folder to make.")],
    loops: Annotated[
        str, typer.Option(metavar="N|dynamic", help="A fixed loop count, or an input of the graph.")
    ] = "dynamic",
    max_loops: Annotated[
        int | None, typer.Option(help="Deepest n_loops of a dynamic bundle; default the trained count.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(metavar="float32|float16|bfloat16", help="Storage of the matrices.")
    ] = Dtype.float32,
    cache_dtype: Annotated[
        str | None, typer.Option(metavar="float32|float16|int8", help="Storage of the cache; default that of --dtype.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json; default the one beside the checkpoint.")
    ] = None,
    eos: Annotated[
        list[str] | None, typer.Option(metavar="TOKEN", help="A token that ends a text; default none. May be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a checkpoint into a bundle."""
    from mythos_export.export import export_bundle as run
    from mythos_export.report import depth, progress_bar, size

    count = None if loops == "dynamic" else (numbers(loops, "--loops") or [0])
    if count is not None and len(count) != 1:
        raise InputError(f'--loops is "{loops}"; expected one number or "dynamic"')
    with progress_bar(quiet or as_json) as tell:
        manifest = run(
            source,
            output,
            loops=count[0] if count else None,
            max_loops=max_loops,
            dtype=dtype.value,
            cache_dtype=cache_dtype,
            tokenizer=tokenizer,
            eos=eos or (),
            force=force,
            progress=tell,
        )
    total = sum(entry.size for entry in manifest.files.values())
    graph = manifest.graphs[0]
    plain = {
        "bundle": str(output),
        "bytes": total,
        "loops": graph.loops,
        "max_loops": graph.max_loops,
        "dtype": graph.dtype,
        "cache_dtype": graph.cache_dtype,
    }
    form = graph.dtype if graph.cache_dtype == graph.dtype else f"{graph.dtype} with a {graph.cache_dtype} cache"
    emit(as_json, plain, "" if quiet else f"{output}: {size(total)}, {form}, {depth(graph.loops, graph.max_loops)}")


@app.command()
def verify(
    bundle: Bundle,
    source: Source,
    text: Annotated[Path | None, typer.Option(help="Text to feed (.jsonl or plain); default random ids.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to feed.")] = 256,
    loops: LoopList = None,
    device: DeviceName = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a bundle on onnxruntime with its checkpoint in torch; exit 1 beyond tolerance."""
    from mythos_export.report import progress_bar
    from mythos_export.verify import verify_bundle as run

    with progress_bar(quiet or as_json) as tell:
        depths = numbers(loops, "--loops")
        parity = run(bundle, source, text=text, tokens=tokens, loops=depths, device=value_of(device), progress=tell)
    ok = all(check.ok for check in parity.checks)
    lines = [f"against {parity.oracle}, {parity.tokens} tokens"] + [
        f"{'✓' if check.ok else '✗'} loops {check.loops:<3} {check.name:<10} error {check.max_abs_error:.2e} "
        f"(tolerance {check.tolerance:.0e})"
        for check in parity.checks
    ]
    checks = [{name: getattr(check, name) for name in check.__struct_fields__} for check in parity.checks]
    plain = {"ok": ok, "oracle": parity.oracle, "tokens": parity.tokens, "checks": checks}
    emit(as_json, plain, "" if quiet else "\n".join(lines))
    if not ok:
        raise typer.Exit(1)


@app.command()
def inspect(
    bundle: Annotated[
        str | None,
        typer.Argument(metavar="BUNDLE", help="A bundle folder; or a SOURCE of export, to plan with before it is one."),
    ] = None,
    families: Annotated[bool, typer.Option("--families", help="List the checkpoints that export takes.")] = False,
    context: Annotated[
        int | None, typer.Option("--context", help="Of a SOURCE: tokens to reckon for; default 4096.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a bundle and show what it holds; or what a checkpoint will need, board by board."""
    from mythos_export import inspection, planning, report

    if families == (bundle is not None):
        raise InputError("expected a BUNDLE or a SOURCE, or --families alone")
    if bundle is None:
        listed = inspection.list_families()
        emit(as_json, listed, report.families_report(listed))
    elif (Path(bundle) / "manifest.json").is_file() or not _is_source(bundle):
        plain = inspection.inspect_bundle(bundle)
        emit(as_json, plain, report.inspection_report(plain, brief=quiet))
    else:
        planned = planning.plan(bundle, context)
        emit(as_json, planned, report.plan_report(planned))


def _is_source(text: str) -> bool:
    path = Path(text)
    found = path.is_dir() and any(child.suffix in (".pt", ".safetensors") for child in path.iterdir())
    return text.startswith("random:") or path.suffix in (".pt", ".safetensors") or found


@app.command()
def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """Tell what this environment can export and run, and what is missing."""
    from mythos_export.inspection import doctor as run
    from mythos_export.report import doctor_report

    plain = run()
    emit(as_json, plain, doctor_report(plain, brief=quiet))


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the bundle here; default a temporary folder.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export the shipped Shakespeare model, verify it, let it write, and time it."""
    from mythos_export.demo import demo as run

    emit(as_json, run(output, say=not (as_json or quiet)))


@app.command()
def version(as_json: Json = False, quiet: Quiet = False) -> None:
    """Print the version."""
    emit(as_json, {"version": __version__}, __version__)
