"""Turns results into what a terminal shows: tables, sizes, progress. Everything machine-readable goes through --json."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mythos_export.bench import Report


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well in a terminal and is Markdown, as llama-bench prints."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def size(n_bytes: float) -> str:
    """12.3 MB, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def bench_report(report: Report, form: str) -> str:
    """form: table, md or csv."""
    kind = "copy" if report.environment["engine"] else "read"  # what was probed, of the GPU's memory or the host's
    header = ["test", "t/s", "± std", "bytes/token", "GB/s", f"share of {kind} bandwidth"]
    rows = [
        [
            row.test,
            f"{row.tokens_per_second:.2f}",
            f"{row.std:.2f}",
            size(row.bytes_per_token),
            f"{row.gb_per_second:.2f}",
            f"{100 * row.bandwidth_share:.1f} %",
        ]
        for row in report.rows
    ]
    if any(row.ratio_to_reference for row in report.rows):
        header += ["reference t/s", "ratio"]
        for cells, row in zip(rows, report.rows, strict=True):
            cells += [f"{row.reference_tokens_per_second:.2f}", f"{row.ratio_to_reference:.2f}×"]
    if any(row.watts for row in report.rows):
        header += ["W", "t/J"]
        for cells, row in zip(rows, report.rows, strict=True):
            cells += [f"{row.watts:.1f}", f"{row.tokens_per_joule:.3g}"]
    if form == "csv":
        text = io.StringIO()
        names = list(report.to_dict()["rows"][0])
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(report.to_dict()["rows"])
        return text.getvalue().rstrip("\n")
    table = markdown_table(header, rows)
    if form == "md":
        return table
    environment = report.environment
    loops = environment["loops"]
    return (
        f"{_where(environment)}; "
        f"{environment['parameters'] / 1e6:.1f} M parameters in {environment['weight_dtype']}, {environment['cache_dtype']} cache, "
        f"{depth(loops, loops)}, batch {environment['batch']}\n{table}\n"
        f"{kind} bandwidth here {report.read_bandwidth_gb_per_second:.1f} GB/s; "
        f"{_memory(report)}\n{_power(report)}"
    )


def _power(report: Report) -> str:
    source = report.power.get("source")
    return f"power by {source}" if source else f"power not measured: {report.power['problem']}"


def _where(environment: dict[str, Any]) -> str:
    if environment["engine"]:
        return f"{environment['device']}, engine {environment['engine']}"
    return (
        f"{environment['cpu']}, {environment['threads']} threads, {environment['backend']} {environment['onnxruntime']}, "
        f"{environment['operators']} operators"
    )


def _memory(report: Report) -> str:
    planned, taken = report.environment["device_memory"], report.device_memory_bytes
    peak = "" if taken is None else f", at most {size(taken)} taken"
    if planned is not None:
        names = ("weights", "activations", "workspace", "cache", "staging")
        parts = ", ".join(f"{name} {size(planned[name])}" for name in names if planned[name])
        return f"device memory planned {size(planned['needed'])} ({parts}){peak}"
    return (
        f"peak memory {size(report.peak_memory_bytes)}, of it weights {size(report.weights_bytes)}, "
        f"cache {size(report.cache_bytes)}"
    )


def attention_report(plain: dict[str, Any]) -> str:
    """What `bench --attention` shows."""
    rows = [
        [
            f"{row['context']}",
            f"{row['microseconds']:.0f}",
            size(row["bytes"]),
            f"{row['gb_per_second']:.2f}",
            f"{100 * row['bandwidth_share']:.1f} %",
        ]
        for row in plain["rows"]
    ]
    environment = plain["environment"]
    kind, device = environment["attention"]["kind"], environment["device"]
    where = device or f"{environment['cpu']}, {environment['threads']} threads"
    probe = "copy bandwidth" if device else "read bandwidth"
    return (
        f"{where}, {environment['operators']} operators; {kind} attention of one token of {environment['batch']} sequence(s), "
        f"{environment['cache_dtype']} cache\n"
        + markdown_table(["cached rows", "µs", "bytes", "GB/s", f"share of {probe}"], rows)
        + f"\n{probe} here {plain['read_bandwidth_gb_per_second']:.1f} GB/s"
    )


def quantization_report(plain: dict[str, Any], recipe: str) -> str:
    """What `quantize` shows."""
    quantization = plain["quantization"]
    formats = Counter(matrix["format"] for matrix in quantization["matrices"].values())
    lines = [
        f"{plain['bundle']}: {size(plain['bytes'])}, {recipe}: "
        + (", ".join(f"{count} matrices {kind}" for kind, count in formats.items()) or "weights as they were")
    ]
    if quantization["text"]:
        text = quantization["text"]
        lines.append(f"calibrated on {text['n_sequences']} sequences of {text['length']} tokens of {text['source']}")
    for name, seen in quantization["uncalibrated_experts"].items():
        lines.append(f"{name}: rounded to nearest, too few tokens: experts {', '.join(seen)}")
    return "\n".join(lines)


def eval_report(plain: dict[str, Any], brief: bool = False) -> str:
    """What `eval` shows, with --against or without; brief: the table alone."""
    header = ["loops", "perplexity", "bits/byte"]
    if plain["against"] is not None:
        header += ["against", "ratio", "mean KL", "median KL", "99.9 % KL", "top-1 agreement"]
    rows = []
    for n_loops, result in plain["loops"].items():
        rows.append([n_loops, _estimate(result, "perplexity", ".4f"), f"{result['bits_per_byte']:.4f}"])
        if plain["against"] is not None:
            other = result["against"]
            rows[-1] += [
                _estimate(other, "perplexity", ".4f"),
                _estimate(other, "perplexity_ratio", ".5f"),
                _estimate(other, "kl_mean", ".3g"),
                f"{other['kl_median']:.3g}",
                f"{other['kl_q999']:.3g}",
                f"{100 * other['top1_agreement']:.2f} %",
            ]
    table = markdown_table(header, rows)
    if brief:
        return table
    against = f"against {plain['against']}; KL(against ‖ bundle) in nats\n" if plain["against"] is not None else ""
    scored = f"tokens: {result['tokens']}, windows: {result['windows']}"
    return f"{against}{table}\n{scored}; ±: standard error over windows"


def _estimate(plain: dict[str, Any], name: str, form: str) -> str:
    """A figure with its standard error, where there is one."""
    stderr = plain[f"{name}_stderr"]
    return f"{plain[name]:{form}}" + ("" if stderr is None else f" ± {stderr:{form}}")


def sensitivity_report(plain: dict[str, Any], brief: bool = False) -> str:
    """What `sensitivity` shows: operators, the ends of the scale, and the mix; brief: the last alone."""
    high = next((row["high"] for row in plain["operators"] if row["high"]), "")
    rows = []
    for row in plain["operators"]:
        cells = [row["operator"], row["low"], _estimate(row, "low_kl", ".2g"), "", "", ""]
        if row["high"]:
            more = row["high_bytes"] - row["low_bytes"]
            cells[3:] = [_estimate(row, "high_kl", ".2g"), size(more), f"{1e6 * row['kl_per_byte']:.2g}"]
        rows.append(cells)
    table = markdown_table(["operator alone", "format", "mean KL", f"in {high}", "saves", "KL a MB saved"], rows)
    ends = [("the recipe", plain["low"]), (f"all in {high}", plain["high"]), ("the mix", plain["mix"])]
    lines = [
        f"{name}: {size(mix['n_bytes'])}, {100 * mix['n_bytes'] / plain['float32_bytes']:.1f} % of float32, "
        f"{len(mix['raised'])} operators in {high}; mean KL {_estimate(mix['against'], 'kl_mean', '.3g')}, perplexity "
        f"× {_estimate(mix['against'], 'perplexity_ratio', '.4f')}"
        for name, mix in ends
        if mix
    ]
    if plain["written"]:
        lines.append(f"{plain['written']}: quantize with --recipe {plain['written']}")
    if brief:
        return "\n".join(lines[2:])
    text = plain["eval_text"]
    scored = (
        f"KL(float32 ‖ quantized) in nats at {plain['n_loops']} loops, {text['n_sequences']} windows of {text['length']} tokens of "
        f"{text['source']}; ±: standard error over windows"
    )
    return "\n".join([table, scored, *lines])


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on a terminal, nothing in a pipe."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    tasks: dict[str, Any] = {}

    def tell(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)

    with bar:
        yield tell


def depth(loops: int | None, max_loops: int) -> str:
    """How often a graph's loop runs, None where that is up to the caller; 0: it has none."""
    if loops is None:
        return f"1 to {max_loops} loops"
    return f"{loops} loops" if loops else "no loop"


def families_report(listed: list[dict[str, Any]]) -> str:
    """What `inspect --families` shows."""
    rows = [
        [item["name"], ", ".join(item["architectures"]) or "MythosConfig", ", ".join(item["variants"]) or "none"]
        for item in listed
    ]
    return markdown_table(["family", "config names", "random:VARIANT"], rows)


def plan_report(plain: dict[str, Any]) -> str:
    """What `inspect` shows of a checkpoint that is not exported yet."""
    forms = plain["forms"]
    head = (
        f"{plain['source']} ({plain['family']}): {plain['parameters'] / 1e6:.1f} M parameters, {plain['layers']} layers, "
        f"{depth(plain['loops'], 0)}; one sequence of {plain['context']} tokens"
    )
    sizes = [
        [form["stored"], size(form["weight_bytes"]), size(form["cache_bytes"]), size(form["bytes_per_token"])]
        for form in forms
    ]
    boards = [
        [part["board"], *(_limit(form["boards"][index]) for form in forms)]
        for index, part in enumerate(forms[0]["boards"])
    ]
    return "\n".join(
        [
            head,
            markdown_table(["stored as", "weights", "cache", "read a token"], sizes),
            "tokens/s that the memory's bandwidth allows at most, by data sheet; weights and cache must fit:",
            markdown_table(["board", *(form["stored"] for form in forms)], boards),
        ]
    )


def _limit(board: dict[str, Any]) -> str:
    missing = board["missing_bytes"]
    return f"{size(missing)} short" if missing else f"{board['tokens_per_second_limit']:.3g}"


def _kept(graph: dict[str, Any]) -> str:
    return f"of the last {graph['window']} tokens" if graph["window"] else f"of {graph['max_seq_len']} tokens"


def inspection_report(plain: dict[str, Any], brief: bool = False) -> str:
    """What `inspect` shows: the model, the graphs, where it came from, how well it agreed."""
    model, source, graphs = plain["model"], plain["source"], plain["graphs"]
    attention = model["prelude"] + model["loop_layers"] + model["coda"]
    loops = depth(graphs[0]["loops"], graphs[0]["max_loops"])
    millions = plain["parameters"] / 1e6
    weights = graphs[0]["weight_dtype"]
    head = f"{plain['bundle']}: {millions:.1f} M parameters, {weights}, {loops}, {size(plain['bytes'])}"
    if brief:
        return head
    layers = f"{len(model['prelude'])} prelude, {len(model['loop_layers'])} looped, {len(model['coda'])} coda"
    rows = [
        ["layers", layers],
        ["attention", ", ".join(sorted({layer["attention"]["kind"] for layer in attention}))],
        ["dim, vocabulary, positions", f"{model['dim']}, {model['vocab_size']}, {model['max_seq_len']}"],
        ["weights read a token", f"{plain['weights_read_per_token'] / 1e6:.1f} M at {plain['loops']} loops"],
        [
            "cache a token",
            f"{size(plain['cache_bytes_per_token'])}, {graphs[0]['cache_dtype']}, at {plain['loops']} loops",
        ],
        ["cache at most", f"{size(plain['cache_bytes'])} a sequence, {_kept(graphs[0])}"],
        ["source", " ".join(str(source[key]) for key in ("name", "step") if source.get(key) is not None)],
        ["made by", plain["producer"]],
        ["tokenizer", plain["tokenizer"] or "none: token ids only"],
        *(
            [
                f"graph {graph['file']}",
                f"{graph['dtype']} over {graph['weight_dtype']} weights, {graph['cache_dtype']} cache",
            ]
            for graph in graphs
        ),
        *(
            [
                f"engine {item['key']}",
                item["problem"] or f"{item['dtype']}, batch {item['max_batch']}, context {item['max_context']}",
            ]
            for item in plain["engines"]
        ),
    ]
    parity = plain.get("parity")
    if parity:
        worst = max(parity["checks"], key=lambda check: check["max_abs_error"])
        verdict = "agrees" if all(check["ok"] for check in parity["checks"]) else "DISAGREES"
        rows.append(
            ["verified", f"{verdict} with {parity['oracle']}, worst {worst['name']} {worst['max_abs_error']:.1e}"]
        )
    else:
        rows.append(["verified", "not yet: mythos-export verify BUNDLE SOURCE"])
    return f"{head}\n{markdown_table(['what', 'value'], rows)}"


def engines_report(engines: list[dict[str, Any]]) -> str:
    """A table of a bundle's engines, and what is wrong with any."""
    if not engines:
        return "no engines; build one with `mythos-export build BUNDLE`"
    rows = [
        [
            item["key"],
            item["dtype"],
            str(item["max_batch"]),
            str(item["max_context"]),
            ", ".join(f"{form} {size(n_bytes)}" for form, n_bytes in item["plans"].items()),
            "damaged" if item["problem"] else "ok",
        ]
        for item in engines
        if "dtype" in item
    ]
    table = markdown_table(["engine", "dtype", "batch", "context", "plans", "state"], rows) if rows else ""
    problems = [f"{item['key']}: {item['problem']}" for item in engines if item["problem"]]
    return "\n".join([part for part in [table, *problems] if part])


def doctor_report(plain: dict[str, Any], brief: bool = False) -> str:
    """What `doctor` shows."""
    can = [
        f"{'✓' if ok else '✗'} {task}" + ("" if ok else f": {plain['missing'][task]}")
        for task, ok in plain["can"].items()
    ]
    if brief:
        return "\n".join(can)
    if plain["native_operators"]:
        native = f"{plain['native_operators']}, loaded from {plain['native_library']}"
    else:
        native = f"none, the portable bodies run: {plain['missing']['native operators']}"
    kernels = plain["cuda_kernels"] or f"none: {plain['missing']['CUDA kernels']}"
    operators = plain["cuda_operators"] or "none"
    packages = [[name, version or "missing"] for name, version in plain["packages"].items()]
    return (
        f"mythos-export {plain['mythos_export']}, Python {plain['python']}, {plain['cpu']}\n{plain['platform']}\n"
        + markdown_table(["package", "version"], packages)
        + f"\nnative operators: {native}"
        + f"\nCUDA kernels: {kernels}"
        + f"\nCUDA operators for onnxruntime: {operators}"
        + f"\nonnxruntime providers: {', '.join(plain['onnxruntime_providers']) or 'none'}\n"
        + "\n".join(can)
    )
