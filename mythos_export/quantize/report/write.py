"""Writes a report: the page from its template, the pictures and the figures beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mythos_export.quantize.bundle import QuantizableBundle
from mythos_export.quantize.compute import Quantizer
from mythos_export.quantize.judge import Trial
from mythos_export.quantize.report.figures import report_figures
from mythos_export.report import size

_TEMPLATE = "page.html.jinja"


def write_report(
    path: str | Path,
    source: QuantizableBundle,
    quantizer: Quantizer,
    name: str,
    trials: Sequence[Trial] = (),
    eval_text: Mapping[str, str | int] | None = None,
) -> dict[str, Any]:
    """Writes path (.html), and beside it its pictures as STEM.PICTURE.png and its figures as STEM.json; returns the figures.

    quantizer: has quantized every matrix, and its statistics can still be read. The rest is as for report_figures. Raises OSError
    where the files cannot be written, ModuleNotFoundError without matplotlib or Jinja (see check_report).
    """
    from mythos_export.quantize.report.pictures import draw

    target = Path(path)
    figures = report_figures(source, quantizer, name, trials, eval_text)
    pictures = draw(figures)
    for picture, png in pictures.items():
        target.with_suffix(f".{picture}.png").write_bytes(png)
    target.with_suffix(".json").write_text(json.dumps(figures, ensure_ascii=False, indent=1), "utf-8")
    target.write_text(_page(figures, pictures), "utf-8")
    return figures


def _page(figures: dict[str, Any], pictures: dict[str, bytes]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = size
    encoded = {name: base64.b64encode(png).decode("ascii") for name, png in pictures.items()}
    return environment.get_template(_TEMPLATE).render(figures=figures, pictures=encoded)
