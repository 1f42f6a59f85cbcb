"""The pictures of a report, drawn from its figures by matplotlib.

Shape letters: L loops, E experts.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Container
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Figures = dict[str, Any]
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa3ad",
    "axes.grid": True,
    "axes.labelcolor": "#333a42",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.dpi": 150,
    "font.size": 9,
    "grid.color": "#e6e9ed",
    "legend.frameon": False,
    "text.color": "#1c2126",
    "text.parse_math": False,  # a $ in the name of a recipe's file is a $
    "xtick.color": "#333a42",
    "ytick.color": "#333a42",
}
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito's, told apart by all
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LABEL_WIDTH, _LABEL_HEIGHT = 80, 11  # in points, of a recipe's name
_CHOSEN, _OTHER, _WARNING = "#d55e00", "#56697c", "#c0392b"


def draw(figures: Figures) -> dict[str, bytes]:
    """PNG files of all pictures there are figures for, by name."""
    makers: dict[str, Callable[[Figures], Figure]] = {"matrix_errors": matrix_errors}
    for name, maker in (
        ("activation_ranges", activation_ranges), ("expert_coverage", expert_coverage), ("recipes", size_and_divergence)
    ):  # fmt: skip
        if figures[name]:
            makers[name] = maker
    return {name: _png(maker, figures) for name, maker in makers.items()}


def _png(maker: Callable[[Figures], Figure], figures: Figures) -> bytes:
    with matplotlib.rc_context(_STYLE), io.BytesIO() as file:
        maker(figures).savefig(file, format="png", bbox_inches="tight", facecolor="white")
        return file.getvalue()


def matrix_errors(figures: Figures) -> Figure:
    """A bar a matrix in the order of the model, coloured by algorithm; other recipes as marks on the same line."""
    rows = figures["matrices"]
    figure = Figure(figsize=(8.5, 1.1 + 0.19 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    legend: list[Any] = []
    for kind, colour in zip(kinds, itertools.cycle(_COLOURS), strict=False):
        at = [index for index, row in enumerate(rows) if _kind(row) == kind]
        legend.append(axes.barh(at, [100 * rows[i]["error"] for i in at], color=colour, height=0.72, label=kind))
    others = list(dict.fromkeys(name for row in rows for name in row["other_errors"]))
    for number, name in enumerate(others):
        at = [index for index, row in enumerate(rows) if name in row["other_errors"]]
        errors = [100 * rows[i]["other_errors"][name] for i in at]
        marker = _MARKERS[number % len(_MARKERS)]
        legend.append(axes.scatter(errors, at, s=16, marker=marker, facecolor="white", edgecolor="#1c2126", linewidth=0.8,
                                   zorder=3, label=f"with {name}"))  # fmt: skip
    _label_rows(axes, [row["name"] + (" *" if row["uncalibrated_experts"] else "") for row in rows])
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"relative error of {_error_of(rows)} in %")
    axes.set_title(f"Relative error of every quantized matrix ({figures['recipe']})", loc="left")
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 3), fontsize=8)
    return figure


def _kind(row: Figures) -> str:
    block = "a scale a row" if row["block"] == "channel" else f"block {row['block']}"
    return f"{row['format']}, {row['algorithm']}, {block}"


def _error_of(rows: list[Figures]) -> str:
    over = {row["error_over"] for row in rows}
    return "the weights (no text was seen)" if over == {"weights"} else "the outputs over the calibration text"


def activation_ranges(figures: Figures) -> Figure:
    """A small picture a looped matrix: largest and rms of its inputs over the loops."""
    rows = figures["activation_ranges"]
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(2.35 * columns + 0.4, 1.75 * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for index, (axes, row) in enumerate(zip(grid.flat, rows, strict=False)):
        loops = range(1, len(row["largest"]) + 1)
        axes.plot(
            loops, _above_zero(row["largest"]), color=_CHOSEN, marker="o", markersize=3, label="largest magnitude"
        )
        axes.plot(loops, _above_zero(row["rms"]), color=_COLOURS[0], marker="s", markersize=3, label="root mean square")
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(row["name"].removeprefix("recurrent.layers.").removesuffix(".weight"), fontsize=8, loc="left")
        axes.tick_params(labelsize=7, labelbottom=index >= len(rows) - columns)
    for axes in grid.flat[len(rows) :]:
        axes.remove()
    figure.suptitle("Inputs of the looped matrices, loop by loop", x=0.01, ha="left", fontsize=10)
    figure.supxlabel("loop", fontsize=9)
    figure.supylabel("magnitude (log scale)", fontsize=9)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)
    return figure


def _above_zero(values: list[float]) -> list[float]:
    """Zeros, as of a loop that no token reached, become gaps."""
    return [value if value > 0 else math.nan for value in values]


def expert_coverage(figures: Figures) -> Figure:
    """For every mixture a heat map of experts and loops, and beside it the sums over loops with what calibration takes."""
    mixtures = figures["expert_coverage"]
    heights = [max(1.6, 0.17 * len(mixture["tokens"])) for mixture in mixtures]
    figure = Figure(figsize=(8.5, sum(heights) + 1.1 * len(mixtures) + 0.3), layout="constrained")
    parts = figure.subfigures(len(mixtures), 1, height_ratios=[height + 1.1 for height in heights], squeeze=False)
    for part, mixture in zip(parts.flat, mixtures, strict=True):
        _coverage_of(part.subplots(1, 2, sharey=True, width_ratios=[3, 2]), mixture)
    return figure


def _coverage_of(pair: Any, mixture: Figures) -> None:
    by_loop, total = pair
    tokens = mixture["tokens"]
    n_experts, n_loops = len(tokens), len(tokens[0])
    routed = n_experts - mixture["n_shared"]
    # Shared experts see every token: beyond the scale, so that it tells the routed ones apart.
    seen = [value for row in tokens[:routed] for value in row if value > 0] or [1]
    by_loop.set_facecolor("black")
    image = by_loop.imshow([[value or math.nan for value in row] for row in tokens], aspect="auto", cmap="viridis",
                           norm=LogNorm(min(seen), max(*seen, min(seen) + 1)),
                           extent=(0.5, n_loops + 0.5, n_experts - 0.5, -0.5))  # fmt: skip
    by_loop.grid(visible=False)
    by_loop.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_loop.set_xlabel("loop")
    by_loop.set_title(f"Tokens seen by each expert of {mixture['name']}", loc="left")
    beyond = "max" if routed < n_experts else "neither"
    bar = by_loop.figure.colorbar(image, ax=by_loop, label="tokens (log scale; black: none)", pad=0.02, extend=beyond)
    _plain_log(bar.ax.yaxis)
    fallen = set(mixture["uncalibrated"])
    colours = [
        _WARNING if expert in fallen else _OTHER if expert >= routed else _COLOURS[0] for expert in range(n_experts)
    ]
    total.barh(range(n_experts), [max(sum(row), 0.5) for row in tokens], color=colours, height=0.72)
    total.axvline(mixture["least"], color=_WARNING, linestyle="--", linewidth=1)
    total.set_xscale("log")
    total.set_xlim(left=0.5 * min(mixture["least"], *(max(sum(row), 1) for row in tokens)))
    _plain_log(total.xaxis, subs=(1,))
    total.set_xlabel(f"tokens in all loops (log scale)\ndashed: {mixture['least']:,.0f}, the least for calibration")
    total.set_title(_verdict(fallen), loc="left", color=_WARNING if fallen else "#1c2126")
    total.grid(axis="y", visible=False)
    total.tick_params(axis="y", left=False)
    names = [f"shared {expert - routed}" if expert >= routed else f"expert {expert}" for expert in range(n_experts)]
    _label_rows(by_loop, names, fallen)


def _verdict(fallen: set[int]) -> str:
    if not fallen:
        return "All experts were calibrated"
    return f"{len(fallen)} rounded to nearest instead (red)"


def size_and_divergence(figures: Figures) -> Figure:
    """Every recipe by size and mean KL at the default loop count, with standard errors."""
    recipes, depth = figures["recipes"], str(figures["compared_loops"])
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for recipe in recipes:
        result = recipe["loops"][depth]["against"]
        x, y, error = recipe["n_bytes"] / 1e6, result["kl_mean"], result["kl_mean_stderr"] or 0.0
        colour = _CHOSEN if recipe["chosen"] else _OTHER
        low = min(error, 0.9 * y)  # a log scale has no room below 0
        axes.errorbar(
            x, y, [[low], [error]], color=colour, capsize=3, marker="D" if recipe["chosen"] else "o", markersize=6
        )
    axes.axvline(figures["float32_bytes"] / 1e6, color="#9aa3ad", linestyle=":")
    axes.annotate("float32", (figures["float32_bytes"] / 1e6, 0.02), (-4, 0), textcoords="offset points", ha="right",
                  xycoords=("data", "axes fraction"), color="#6b7680")  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    _plain_log(axes.yaxis)
    axes.set_xlabel("size of the weights in MB")
    axes.set_ylabel("mean KL(float32 ‖ quantized) in nats a token (log scale)")
    axes.set_title(f"Size against divergence from the float32 model, {depth} loops", loc="left")
    points = [(recipe["n_bytes"] / 1e6, recipe["loops"][depth]["against"]["kl_mean"]) for recipe in recipes]
    _label_points(figure, axes, recipes, points)
    return figure


def _label_points(figure: Figure, axes: Axes, recipes: list[Figures], points: list[tuple[float, float]]) -> None:
    """Writes each recipe's name to the right of its point, from the lowest up, above what is already written there."""
    figure.draw_without_rendering()  # settles where points lie
    a_point = figure.dpi / 72
    places = [tuple(axes.transData.transform(point)) for point in points]
    written: list[tuple[float, float]] = []
    for index in sorted(range(len(points)), key=lambda i: places[i][1]):
        (x, y), up = places[index], 0.0
        for left, height in written:
            if abs(left - x) < _LABEL_WIDTH * a_point and abs(y + up - height) < _LABEL_HEIGHT * a_point:
                up = height + _LABEL_HEIGHT * a_point - y
        written.append((x, y + up))
        recipe = recipes[index]
        axes.annotate(recipe["name"], points[index], (8, up / a_point - 3), textcoords="offset points",
                      color=_CHOSEN if recipe["chosen"] else _OTHER, weight="bold" if recipe["chosen"] else "normal")  # fmt: skip


def _plain_log(axis: Axis, subs: tuple[int, ...] = (1, 2, 5)) -> None:
    """Ticks of a log axis as plain numbers."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9f}".rstrip("0").rstrip(".")))
    axis.set_minor_formatter(NullFormatter())


def _label_rows(axes: Axes, names: list[str], marked: Container[int] = ()) -> None:
    """Names every row, the first on top; marked ones in red."""
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for index, label in enumerate(axes.get_yticklabels()):
        if index in marked:
            label.set_color(_WARNING)
