"""The command line: one small function a subcommand. What they do lives in the modules they call."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mythos_export import __version__
from runtimes.errors import InputError, MythosError

app = typer.Typer(
    name="mythos-export",
    help="OpenMythos training checkpoints to ONNX bundles, and everything to run, check and time them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no remarks.")]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A .pt or .safetensors checkpoint, a folder of step_*.pt, random:VARIANT[:SEED] or random:config.json.",
    ),
]
LoopList = Annotated[str | None, typer.Option("--loops", metavar="N,N,…", help="Loop counts; default the trained one.")]
Native = Annotated[
    bool | None,
    typer.Option("--native/--no-native", help="The operators' native kernels; default where they are built."),
]
Threads = Annotated[int | None, typer.Option("--threads", "-t", help="CPU threads; default all cores.")]


class Dtype(str, Enum):
    """Storage of the matrices."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Backend(str, Enum):
    """Where to run."""

    auto = "auto"
    onnxruntime = "onnxruntime"


class Form(str, Enum):
    """How bench prints."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"


def _emit(as_json: bool, plain: Any, text: str = "") -> None:
    if as_json:
        print(json.dumps(plain, ensure_ascii=False))
    elif text:
        print(text)


def _numbers(text: str | None, option: str) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f'{option} is "{text}"; expected whole numbers with commas between, such as 1,4,8') from None


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
    dtype: Annotated[Dtype, typer.Option(help="Storage of matrices and cache.")] = Dtype.float32,
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
    from mythos_export.report import progress_bar, size

    count = None if loops == "dynamic" else (_numbers(loops, "--loops") or [0])
    if count is not None and len(count) != 1:
        raise InputError(f'--loops is "{loops}"; expected one number or "dynamic"')
    with progress_bar(quiet or as_json) as tell:
        manifest = run(
            source,
            output,
            loops=count[0] if count else None,
            max_loops=max_loops,
            dtype=dtype.value,
            tokenizer=tokenizer,
            eos=eos or (),
            force=force,
            progress=tell,
        )
    total = sum(entry.size for entry in manifest.files.values())
    graph = manifest.graphs[0]
    depth = f"{graph.loops} loops" if graph.loops is not None else f"1 to {graph.max_loops} loops"
    plain = {
        "bundle": str(output),
        "bytes": total,
        "loops": graph.loops,
        "max_loops": graph.max_loops,
        "dtype": graph.dtype,
    }
    _emit(as_json, plain, "" if quiet else f"{output}: {size(total)}, {graph.dtype}, {depth}")


@app.command()
def quantize(
    bundle: Bundle,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The bundle folder to make.")],
    recipe: Annotated[str, typer.Option(metavar="int8|int4", help="What the matrices become.")] = "int8",
    block: Annotated[int, typer.Option(metavar="32|64|128", help="Input channels that share a scale.")] = 32,
    activation_bits: Annotated[
        int, typer.Option(metavar="8|32", help="8: inputs of products are rounded to 8 bits a block; 32: they are not.")
    ] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a quantized copy of a float32 bundle, by rounding to nearest."""
    from mythos_export.quantize import quantize_bundle as run
    from mythos_export.report import progress_bar, size

    with progress_bar(quiet or as_json) as tell:
        manifest = run(
            bundle,
            output,
            recipe,
            block_size=block,
            activation_bits=activation_bits,
            force=force,
            progress=tell,
        )
    total = sum(entry.size for entry in manifest.files.values())
    plain = {"bundle": str(output), "bytes": total, "quantization": manifest.quantization}
    _emit(as_json, plain, "" if quiet else f"{output}: {size(total)}, {recipe}, a scale for every {block} channels")


@app.command()
def verify(
    bundle: Bundle,
    source: Source,
    text: Annotated[Path | None, typer.Option(help="Text to feed (.jsonl or plain); default random ids.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to feed.")] = 256,
    loops: LoopList = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a bundle on onnxruntime with its checkpoint in torch; exit 1 beyond tolerance."""
    from mythos_export.report import progress_bar
    from mythos_export.verify import verify_bundle as run

    with progress_bar(quiet or as_json) as tell:
        parity = run(bundle, source, text=text, tokens=tokens, loops=_numbers(loops, "--loops"), progress=tell)
    ok = all(check.ok for check in parity.checks)
    lines = [f"against {parity.oracle}, {parity.tokens} tokens"] + [
        f"{'✓' if check.ok else '✗'} loops {check.loops:<3} {check.name:<10} max abs error {check.max_abs_error:.2e} "
        f"(tolerance {check.tolerance:.0e})"
        for check in parity.checks
    ]
    checks = [{name: getattr(check, name) for name in check.__struct_fields__} for check in parity.checks]
    plain = {"ok": ok, "oracle": parity.oracle, "tokens": parity.tokens, "checks": checks}
    _emit(as_json, plain, "" if quiet else "\n".join(lines))
    if not ok:
        raise typer.Exit(1)


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
    backend: Annotated[Backend, typer.Option(help="Where to run.")] = Backend.auto,
    threads: Threads = None,
    native: Native = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate text after a prompt."""
    from runtimes.runner import load

    if (prompt is None) == (ids is None):
        raise InputError("expected either --prompt TEXT or --ids 1,2,3")
    runner = load(bundle, backend.value, threads, native)
    generation = runner.generate(
        prompt if prompt is not None else _numbers(ids, "--ids") or [],
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
    _emit(True, {**plain, "timings": generation.stats.to_dict()})


def _stream(generation: Any, quiet: bool, with_text: bool) -> None:
    for token in generation:
        print(token.text if with_text else f"{token.id} ", end="", flush=True)
    print()
    stats = generation.stats
    if not quiet:
        print(
            f"[{stats.prompt_tokens} prompt tokens at {stats.prefill_tokens_per_second:.1f}/s, {stats.new_tokens} new at "
            f"{stats.decode_tokens_per_second:.1f}/s, mean exit loop {stats.mean_exit_loop:.2f}]",
            file=sys.stderr,
        )


@app.command("eval")
def evaluate(
    bundle: Bundle,
    text: Annotated[Path, typer.Option(help="Text to score (.jsonl or plain).")],
    loops: LoopList = None,
    max_tokens: Annotated[int | None, typer.Option(help="Score so many tokens at most.")] = None,
    threads: Threads = None,
    native: Native = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity and bits per byte of a text, for each loop count."""
    from mythos_export.evaluate import WINDOW
    from mythos_export.evaluate import evaluate as run
    from mythos_export.report import markdown_table, progress_bar
    from runtimes.runner import load

    with progress_bar(quiet or as_json) as tell:
        results = run(load(bundle, threads=threads, native=native), text, _numbers(loops, "--loops"), max_tokens, tell)
    rows = [[str(n), f"{q.perplexity:.4f}", f"{q.bits_per_byte:.4f}", str(q.tokens)] for n, q in results.items()]
    plain = {"window": WINDOW, "loops": {str(n): q.to_dict() for n, q in results.items()}}
    _emit(as_json, plain, markdown_table(["loops", "perplexity", "bits/byte", "tokens"], rows))


@app.command()
def bench(
    bundle: Bundle,
    prompt: Annotated[int, typer.Option("-p", help="Tokens of the prefill test; 0 leaves it out.")] = 512,
    new: Annotated[int, typer.Option("-n", help="Tokens of the decode test; 0 leaves it out.")] = 128,
    context: Annotated[int, typer.Option("-d", help="Tokens in the cache before the decode test.")] = 0,
    repetitions: Annotated[int, typer.Option("-r", help="Repetitions.")] = 5,
    batch: Annotated[int, typer.Option("-b", help="Sequences at once.")] = 1,
    loops: Annotated[int | None, typer.Option(help="Loop count; default the trained one.")] = None,
    threads: Threads = None,
    native: Native = None,
    reference: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Checkpoint to run in eager torch beside it.")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Time the attention operator alone over so many cached rows instead."),
    ] = None,
    cache: Annotated[
        str, typer.Option(metavar="float32|float16|bfloat16|int8", help="Number format of the rows for --attention.")
    ] = "float32",
    form: Annotated[Form, typer.Option("-o", "--output", help="How to print.")] = Form.table,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prefill and decode speed, bytes moved, share of the machine's read bandwidth."""
    from mythos_export.bench import Workload
    from mythos_export.bench import bench as run
    from mythos_export.report import attention_report, bench_report, progress_bar

    as_json = as_json or form is Form.json
    contexts = _numbers(attention, "--attention")
    if contexts is not None:
        from mythos_export.bench_attention import bench_attention

        with progress_bar(quiet or as_json) as tell:
            alone = bench_attention(bundle, contexts, cache, repetitions, threads, native, tell)
        _emit(as_json, alone.to_dict(), "" if as_json else attention_report(alone.to_dict()))
        return
    with progress_bar(quiet or as_json) as tell:
        report = run(
            bundle, Workload(prompt, new, context, repetitions, batch, loops, threads, native), reference, tell
        )
    _emit(as_json, report.to_dict(), "" if as_json else bench_report(report, form.value))


@app.command()
def inspect(bundle: Bundle, as_json: Json = False, quiet: Quiet = False) -> None:
    """Check a bundle and show what it holds."""
    from mythos_export.inspection import inspect_bundle
    from mythos_export.report import inspection_report

    plain = inspect_bundle(bundle)
    _emit(as_json, plain, inspection_report(plain, brief=quiet))


@app.command()
def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """Tell what this environment can export and run, and what is missing."""
    from mythos_export.inspection import doctor as run
    from mythos_export.report import doctor_report

    plain = run()
    _emit(as_json, plain, doctor_report(plain, brief=quiet))


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

    _emit(as_json, run(output, say=not (as_json or quiet)))


@app.command()
def version(as_json: Json = False, quiet: Quiet = False) -> None:
    """Print the version."""
    _emit(as_json, {"version": __version__}, __version__)


def main() -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    try:
        app()
    except MythosError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"torch", "onnx", "onnxscript", "onnx_ir", "safetensors"}:
            raise
        _fail(f"this needs the package {error.name}, which is not installed; run: pip install 'mythos-export[export]'")
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, as in `… | head`; nothing is left to tell anyone
        sys.exit(0)


def _fail(message: str) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": message}, ensure_ascii=False))
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
