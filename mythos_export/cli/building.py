"""The command that makes TensorRT engines from a bundle: build."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from mythos_export.build.options import MAX_CONTEXT, Limits, Options
from mythos_export.cli.app import Bundle, Json, Quiet, app, emit
from mythos_export.cli.bundles import Dtype


class EngineBackend(str, Enum):
    """Libraries that engines are built with."""

    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


@app.command()
def build(
    bundle: Bundle,
    backend: Annotated[EngineBackend, typer.Option(help="The library to build with.")] = EngineBackend.tensorrt,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of matrices and cache (before TensorRT 10, of experts alone); default the bundle's, of quantized ones float16 "
            "(float32 before TensorRT 10)."
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Most sequences at once.")] = Limits.batch,
    max_seq: Annotated[int, typer.Option(help="Most new tokens of each in a prefill step.")] = Limits.seq,
    max_context: Annotated[
        int | None,
        typer.Option(
            help=f"Most tokens of a sequence; default {MAX_CONTEXT}, at most what the model has positions for."
        ),
    ] = Limits.context,
    workspace: Annotated[
        int | None,
        typer.Option(metavar="MIB", help="Most device memory for scratch while building; default all there is."),
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="How hard TensorRT searches; default its own, 3.")
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            metavar="8.6,8.9,…", help="Build for these instead of the GPU at hand; TensorRT-RTX only, needs no GPU."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Hold the engine against onnxruntime and keep it only where both agree.")
    ] = Options.check,
    plugins: Annotated[
        bool | None,
        typer.Option(
            help="Leave the operators to our TensorRT plugins (TensorRT 10 and later); default where their library is built."
        ),
    ] = Options.plugins,
    list_only: Annotated[bool, typer.Option("--list", help="List the bundle's engines and build nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an engine for the same GPU, version and dtype.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build a TensorRT engine of a bundle, on the GPU it is to run on."""
    from mythos_export.report import engines_report, progress_bar, size
    from runtimes.bundle import open_bundle
    from runtimes.engine_folder import engine_summaries, engine_summary

    if list_only:
        listed = engine_summaries(*open_bundle(bundle))
        emit(as_json, {"bundle": str(bundle), "engines": listed}, "" if quiet else engines_report(listed))
        return
    from mythos_export.build.engine import build_engine

    options = Options(
        None if workspace is None else workspace << 20,
        optimization_level,
        tuple(compute_capability.split(",")) if compute_capability else (),
        check,
        plugins,
    )
    with progress_bar(quiet or as_json) as tell:
        path, engine, manifest = build_engine(
            bundle,
            backend=backend.value,
            dtype=None if dtype is None else dtype.value,
            limits=Limits(max_batch, max_seq, max_context),
            options=options,
            force=force,
            progress=tell,
        )
    total = sum(plan.size for plan in engine.plans)
    plain = engine_summary(path, engine, manifest)
    emit(as_json, plain, "" if quiet else f"{path}: {size(total)} in {engine.build_seconds:.0f} s")
