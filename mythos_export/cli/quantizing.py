"""Commands around quantization: quantize, calibrate, recipes, sensitivity."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mythos_export.cli.app import Bundle, Json, LoopList, Quiet, app, emit, numbers
from runtimes.errors import InputError


class High(str, Enum):
    """What sensitive operators are raised to."""

    int8 = "int8"
    float32 = "float32"


Recipes = Annotated[
    str,
    typer.Option(
        "--recipe", metavar="NAME[,NAME…]", help="Shipped recipes or .toml files; see `mythos-export recipes`."
    ),
]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--text", help="Calibration text: .jsonl, plain text, token ids (.npy), or a Hugging Face dataset's name."
    ),
]
Sequences = Annotated[int, typer.Option("--sequences", help="Sequences to calibrate with.")]
Length = Annotated[int, typer.Option("--length", help="Tokens of each.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the choice of sequences.")]
EvalText = Annotated[
    str | None, typer.Option("--eval-text", help="Text to compare with float32 on; not the one that calibrates.")
]
EvalSequences = Annotated[int, typer.Option("--eval-sequences", help="Sequences of it, of --length tokens.")]


@app.command()
def quantize(
    bundle: Bundle,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The bundle folder to make.")],
    recipe: Recipes = "int8",
    text: CalibrationText = None,
    sequences: Sequences = 128,
    length: Length = 512,
    seed: Seed = 0,
    statistics: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER", help="What `calibrate` gathered, instead of running the model; may be repeated."
        ),
    ] = None,
    block: Annotated[
        int | None, typer.Option(metavar="32|64|128", help="Input channels that share a scale; default the recipe's.")
    ] = None,
    activation_bits: Annotated[
        int | None,
        typer.Option(metavar="8|32", help="32: inputs of products are not rounded, whatever the recipe says."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write a page with pictures of what it cost, PNG and JSON beside it."),
    ] = None,
    eval_text: EvalText = None,
    eval_sequences: EvalSequences = 16,
    compare: Annotated[
        str | None, typer.Option(metavar="NAME;NAME…", help="Recipes to set against it in the report, ; between.")
    ] = None,
    loops: LoopList = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a quantized copy of a float32 bundle by a recipe, calibrated on text where that asks for it."""
    from mythos_export.quantize.bundle import Text, quantize_bundle
    from mythos_export.quantize.recipe import load_recipe, with_overrides
    from mythos_export.report import progress_bar, quantization_report

    chosen = with_overrides(load_recipe(recipe), block, activation_bits)
    calibration_text = Text(text, sequences, length, seed) if text else None
    if report is None and (eval_text or compare or loops):
        raise InputError("--eval-text, --compare and --loops are for the report; pass --report FILE.html")
    with progress_bar(quiet or as_json) as tell:
        request = None
        if report is not None:
            from mythos_export.quantize.report import ReportRequest

            request = ReportRequest(
                report,
                bundle,
                recipe,
                text=calibration_text,
                eval_text=Text(eval_text, eval_sequences, length, seed) if eval_text else None,
                recipes=[name.strip() for name in compare.split(";")] if compare else (),
                loops=numbers(loops, "--loops"),
                progress=tell,
            )
        quantized = quantize_bundle(
            bundle,
            output,
            chosen,
            text=calibration_text,
            statistics=statistics or (),
            force=force,
            progress=tell,
            then=request.write if request else None,
        )
    plain = {"bundle": str(output), **quantized.to_dict(), "report": str(report) if report else None}
    emit(as_json, plain, "" if quiet else quantization_report(plain, recipe))


@app.command()
def calibrate(
    bundle: Bundle,
    text: Annotated[str, typer.Option(help="As for `quantize`.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the statistics go.")],
    recipe: Recipes = "int4-gptq",
    sequences: Sequences = 128,
    length: Length = 512,
    seed: Seed = 0,
    part: Annotated[
        str,
        typer.Option(metavar="K/N", help="Only the K-th of N parts of the text: processes side by side, merged later."),
    ] = "1/1",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Gather the statistics a recipe rests on, loop by loop; killed, it goes on where it stopped."""
    from mythos_export.quantize.bundle import Text, gather_statistics
    from mythos_export.quantize.recipe import load_recipe
    from mythos_export.report import progress_bar

    with progress_bar(quiet or as_json) as tell:
        found = gather_statistics(
            bundle, output, load_recipe(recipe), Text(text, sequences, length, seed), _share(part), tell
        )
    plain = {"statistics": str(output), "modules": len(found.tokens), "tokens": max(found.tokens.values())}
    emit(as_json, plain, "" if quiet else f"{output}: {plain['modules']} modules, {plain['tokens']} tokens")


@app.command()
def recipes(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the recipes that come along."""
    from mythos_export.quantize.recipe import shipped
    from mythos_export.report import markdown_table

    known = {name: recipe.description for name, recipe in shipped().items()}
    emit(as_json, known, "\n".join(known) if quiet else markdown_table(["recipe", "what it does"], list(known.items())))


@app.command()
def sensitivity(
    bundle: Bundle,
    eval_text: Annotated[str, typer.Option(help="Text to compare with float32 on.")],
    text: CalibrationText = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", metavar="NAME", help="Whose formats are the low ones; a shipped recipe or a .toml file."
        ),
    ] = "int4-gptq",
    high: Annotated[High, typer.Option(help="What a sensitive operator is raised to.")] = High.int8,
    target_size: Annotated[
        float | None, typer.Option(help="Bytes of all weights, or up to 1 a share of float32's.")
    ] = None,
    target_kl: Annotated[float | None, typer.Option(help="Mean KL divergence from float32, in nats a token.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.toml", help="Where the mixed recipe goes.")
    ] = None,
    sequences: Annotated[int, typer.Option("--sequences", help="Sequences to calibrate with.")] = 32,
    eval_sequences: Annotated[int, typer.Option("--eval-sequences", help="Sequences to compare on.")] = 4,
    length: Annotated[int, typer.Option("--length", help="Tokens of each.")] = 256,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell which operators cost most KL per byte saved, and mix formats to a size or a KL."""
    from mythos_export.quantize.bundle import Text
    from mythos_export.quantize.recipe import to_toml
    from mythos_export.quantize.sensitivity import check_recipe_file, measure_sensitivity
    from mythos_export.report import progress_bar, sensitivity_report

    check_recipe_file(output, force, has_target=target_size is not None or target_kl is not None)
    with progress_bar(quiet or as_json) as tell:
        found = measure_sensitivity(
            bundle,
            recipe,
            Text(eval_text, eval_sequences, length, seed),
            Text(text, sequences, length, seed) if text else None,
            high=high.value,  # type: ignore[arg-type]
            target_size=target_size,
            target_kl=target_kl,
            progress=tell,
        )
    if output is not None and found.mix is not None:
        output.write_text(to_toml(found.mix.recipe), "utf-8")
    plain = found.to_dict() | {"written": str(output) if output else None}
    emit(as_json, plain, sensitivity_report(plain, brief=quiet))


def _share(text: str) -> tuple[int, int]:
    part, _, of = text.partition("/")
    if not (part.isdecimal() and of.isdecimal() and 1 <= int(part) <= int(of)):
        raise InputError(f'--part is "{text}"; expected K/N with K from 1 to N, such as 2/4')
    return int(part), int(of)
