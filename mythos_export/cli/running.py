"""Commands that run bundles: generate, eval, bench."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mythos_export.cli.app import (
    Bundle,
    DeviceName,
    Json,
    LoopList,
    MaxMemory,
    Native,
    Quiet,
    Threads,
    app,
    emit,
    memory_size,
    numbers,
    value_of,
)
from runtimes.errors import BackendError, InputError


class Backend(str, Enum):
    """Where to run."""

    auto = "auto"
    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


BackendName = Annotated[
    Backend, typer.Option(help="Where to run; auto takes an engine of the bundle that fits this GPU, else onnxruntime.")
]
EngineKey = Annotated[
    str | None, typer.Option("--engine", metavar="KEY", help="The engine to run; default the best that fits.")
]


class Form(str, Enum):
    """How bench prints."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"


@app.command()
def generate(
    bundle: Bundle,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to go on from.")] = None,
    ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Token ids to go on from, instead of --prompt.")
    ] = None,
    loops: Annotated[int | None, typer.Option(help="Loop count; default the trained one.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Candidates kept; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Probability kept; 1 keeps all.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Share of the likeliest kept; 0 keeps all.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws; default a fresh one.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text or special token that ends the output; may be repeated.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")] = False,
    backend: BackendName = Backend.auto,
    device: DeviceName = None,
    engine: EngineKey = None,
    max_context: Annotated[
        int | None,
        typer.Option(help="Tokens that device memory is planned for; default an engine's longest, else few."),
    ] = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    native: Native = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate text after a prompt."""
    from runtimes.runner import load

    if (prompt is None) == (ids is None):
        raise InputError("expected either --prompt TEXT or --ids 1,2,3")
    runner = load(
        bundle,
        backend.value,
        threads,
        native,
        device=value_of(device),
        engine=engine,
        max_context=max_context,
        memory_limit=memory_size(max_memory),
    )
    generation = runner.generate(
        prompt if prompt is not None else numbers(ids, "--ids") or [],
        max_new_tokens=max_new_tokens,
        n_loops=loops,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
    )
    if not as_json:
        _stream(generation, quiet, with_text=runner.has_tokenizer)
        return
    generation.complete()
    plain = {"ids": generation.ids, "text": generation.text, "finish_reason": generation.finish_reasons[0]}
    emit(True, {**plain, "timings": generation.stats.to_dict()})


def _stream(generation: Any, quiet: bool, with_text: bool) -> None:
    for token in generation:
        print(token.text if with_text else f"{token.id} ", end="", flush=True)
    print()
    stats = generation.stats
    if not quiet:
        exit_loop = (
            f", mean exit loop {stats.mean_exit_loop:.2f}" if stats.mean_exit_loop else ""
        )  # 0: there is no loop
        print(
            f"[{stats.prompt_tokens} prompt tokens at {stats.prefill_tokens_per_second:.1f}/s, {stats.new_tokens} new at "
            f"{stats.decode_tokens_per_second:.1f}/s{exit_loop}]",
            file=sys.stderr,
        )


@app.command("eval")
def evaluate(
    bundle: Bundle,
    text: Annotated[Path, typer.Option(help="Text to score (.jsonl or plain).")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE|SOURCE", help="Another bundle (on onnxruntime), or a checkpoint, to compare with."
        ),
    ] = None,
    loops: LoopList = None,
    max_tokens: Annotated[int | None, typer.Option(help="Score so many tokens at most.")] = None,
    backend: BackendName = Backend.auto,
    device: DeviceName = None,
    engine: EngineKey = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    native: Native = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity and bits per byte of a text, for each loop count; with --against, the divergence from another model."""
    from mythos_export import evaluate as evaluation
    from mythos_export.report import eval_report, progress_bar
    from runtimes.runner import load

    depths, limit = numbers(loops, "--loops"), memory_size(max_memory)
    with progress_bar(quiet or as_json) as tell:
        runner = load(
            bundle, backend.value, threads, native, device=value_of(device), engine=engine, memory_limit=limit
        )
        if against is None:
            alone = evaluation.evaluate(runner, text, depths, max_tokens, tell)
            results = {str(n): quality.to_dict() for n, quality in alone.items()}
        else:
            compared = evaluation.evaluate_against(
                runner, against, text, depths, max_tokens, tell, threads=threads, native=native
            )
            results = {str(n): comparison.to_dict() for n, comparison in compared.items()}
    plain = {"window": evaluation.WINDOW, "against": against, "loops": results}
    emit(as_json, plain, eval_report(plain, brief=quiet))


@app.command()
def bench(
    bundle: Bundle,
    prompt: Annotated[int, typer.Option("-p", help="Tokens of the prefill test; 0 leaves it out.")] = 512,
    new: Annotated[int, typer.Option("-n", help="Tokens of the decode test; 0 leaves it out.")] = 128,
    context: Annotated[int, typer.Option("-d", help="Tokens in the cache before the decode test.")] = 0,
    repetitions: Annotated[int, typer.Option("-r", help="Repetitions.")] = 5,
    batch: Annotated[int, typer.Option("-b", help="Sequences at once.")] = 1,
    loops: Annotated[int | None, typer.Option(help="Loop count; default the trained one.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens of a prefill step; default what suits the backend.")] = None,
    backend: BackendName = Backend.auto,
    device: DeviceName = None,
    engine: EngineKey = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    native: Native = None,
    reference: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Checkpoint to run in eager torch beside it.")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Time the attention operator alone over so many cached rows instead."),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|float16|bfloat16|int8", help="Of the rows for --attention; default the bundle's."
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also what a step's time is made of, by kernel (GPU) or operator (CPU).")
    ] = False,
    form: Annotated[Form, typer.Option("-o", "--output", help="How to print.")] = Form.table,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prefill and decode speed, bytes moved, share of the machine's read bandwidth, power."""
    from mythos_export.bench import Workload
    from mythos_export.bench import bench as run
    from mythos_export.report import attention_report, bench_report, progress_bar
    from mythos_export.report_profile import profile_report

    as_json = as_json or form is Form.json
    contexts, limit = numbers(attention, "--attention"), memory_size(max_memory)
    if contexts is not None:
        from mythos_export.bench_attention import bench_attention

        with progress_bar(quiet or as_json) as tell:
            alone = bench_attention(
                bundle,
                contexts,
                cache_dtype,
                repetitions,
                threads,
                native,
                tell,
                batch=batch,
                device=value_of(device),
            )
        emit(as_json, alone.to_dict(), "" if as_json else attention_report(alone.to_dict()))
        return
    with progress_bar(quiet or as_json) as tell:
        workload = Workload(
            prompt,
            new,
            context,
            repetitions,
            batch,
            loops,
            threads,
            native,
            backend.value,
            engine,
            limit,
            value_of(device),
            chunk,
        )
        report = run(bundle, workload, reference, tell, profile)
    tables = [] if form is Form.csv else [profile_report(step) for step in report.profiles]
    emit(as_json, report.to_dict(), "" if as_json else "\n\n".join([bench_report(report, form.value), *tables]))
    if report.profile_problem is not None:
        raise BackendError(report.profile_problem)
