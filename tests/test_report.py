"""The report on a quantization: its figures are the model's, its page is whole and safe, and what it cannot show it says."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.observers import Wanted
from calibration.statistics import gather
from mythos_export.model.unfolded import Unfolded
from mythos_export.quantize.bundle import QuantizableBundle, Text, quantize_bundle
from mythos_export.quantize.errors import OutputError
from mythos_export.quantize.folds import Factors
from mythos_export.quantize.plan import make_plan
from mythos_export.quantize.recipe import load_recipe
from mythos_export.quantize.report import ReportRequest
from runtimes.errors import InputError

PICTURES = ("recipes", "matrix_errors", "activation_ranges", "expert_coverage")
HOSTILE = "a<b>&'\"$x_1$.toml"  # a file's name may hold all of this


class Page(HTMLParser):
    """What a browser would load, and what it would show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text, self.figures, self._in_script = "", "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.figures += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 2048, (6, 64)))
    return Text(path, 6, 64)


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it."""
    folder = tmp_path_factory.mktemp("report")
    recipe = folder / HOSTILE
    recipe.write_text(
        'description = "</script><img src=x>"\n[[weights]]\nmatrices = "*"\nformat = "int4"\nalgorithm = "gptq"\n'
    )
    request = ReportRequest(
        folder / "report.html",
        tiny_bundle,
        str(recipe),
        text=text,
        eval_text=text,
        recipes=("int8", "w8a8"),
        loops=(1, 3),
    )
    quantize_bundle(tiny_bundle, folder / "q", str(recipe), text=text, then=request.write)
    return folder


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_the_page_is_whole_and_safe(folder: Path, figures: dict) -> None:
    page = Page((folder / "report.html").read_text())
    assert len(page.sources) == page.tags.count("img") == len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.tags.count("script") == 1
    assert json.loads(page.figures) == figures
    assert HOSTILE in page.text
    assert "</script><img src=x>" in page.text
    for name in PICTURES:
        assert (folder / f"report.{name}.png").read_bytes().startswith(b"\x89PNG")


def test_sizes_and_recipes(folder: Path, figures: dict, tiny_bundle: Path) -> None:
    import onnx

    def stored(bundle: Path) -> int:
        model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
        entries = [{item.key: item.value for item in tensor.external_data} for tensor in model.graph.initializer]
        return sum(int(entry["length"]) for entry in entries if entry)

    assert figures["n_bytes"] == stored(folder / "q")
    assert figures["float32_bytes"] == stored(tiny_bundle)
    assert [recipe["name"] for recipe in figures["recipes"]] == [figures["recipe"], "int8", "w8a8"]
    assert [recipe["chosen"] for recipe in figures["recipes"]] == [True, False, False]
    assert figures["compared_loops"] == 3
    for recipe in figures["recipes"]:
        assert set(recipe["loops"]) == {"1", "3"}
        for result in recipe["loops"].values():
            assert result["against"]["kl_mean"] > 0
            assert result["against"]["kl_mean_stderr"] > 0
            assert result["perplexity_stderr"] > 0
    assert figures["left_out"] == {}


def test_matrices_in_the_order_of_the_model(figures: dict, tiny_bundle: Path) -> None:
    source = QuantizableBundle(tiny_bundle)
    assert [row["name"] for row in figures["matrices"]] == list(make_plan(load_recipe("int4"), source.config).shapes)
    for row in figures["matrices"]:
        assert row["error_over"] == "outputs"
        assert set(row["other_errors"]) == {"int8", "w8a8"}
        assert 0 < row["other_errors"]["int8"] < row["error"] < 0.5


def test_activation_ranges_are_those_of_the_model(figures: dict, tiny_bundle: Path, text: Text) -> None:
    source = QuantizableBundle(tiny_bundle)
    model = Unfolded(source.config, source.weights, source.n_loops)
    ids = torch.from_numpy(source.sample(text).ids)
    rows = {row["name"]: row for row in figures["activation_ranges"]}
    assert set(rows) == {row["name"] for row in figures["matrices"] if row["name"].startswith("recurrent.")}
    for name, modules in (
        ("recurrent.layers.0.attn.out.weight", [model.recurrent.layers[0].attn.out.weight]),
        ("recurrent.layers.0.ffn.down", list(model.recurrent.layers[0].ffn.down)),
    ):
        seen = [[] for _ in modules]
        for calls, module in zip(seen, modules, strict=True):
            module.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0].double().flatten()))
        with torch.no_grad():
            model(ids)
        for loop in range(source.n_loops):
            numbers = torch.cat([calls[loop] for calls in seen])
            assert rows[name]["largest"][loop] == pytest.approx(float(numbers.abs().max()), rel=1e-4)
            assert rows[name]["rms"][loop] == pytest.approx(float(numbers.square().mean().sqrt()), rel=1e-4)


def test_expert_coverage(figures: dict) -> None:
    """Every token of every loop goes to top_k of the routed experts and to all shared ones."""
    (mixture,) = figures["expert_coverage"]
    tokens = np.array(mixture["tokens"])
    routed = len(tokens) - mixture["n_shared"]
    assert mixture["name"] == "recurrent.layers.0.ffn"
    assert (routed, mixture["n_shared"]) == (8, 2)
    assert mixture["tokens_passed"] == 6 * 64
    assert (tokens[:routed].sum(0) == 2 * 6 * 64).all()
    assert (tokens[routed:] == 6 * 64).all()
    assert mixture["uncalibrated"] == [index for index, row in enumerate(tokens) if row.sum() < mixture["least"]]
    assert mixture["uncalibrated"]  # so that the picture has something to mark


def test_without_text(tiny_bundle: Path, tmp_path: Path) -> None:
    request = ReportRequest(tmp_path / "r.html", tiny_bundle, "int8")
    quantize_bundle(tiny_bundle, tmp_path / "q", "int8", then=request.write)
    figures = json.loads((tmp_path / "r.json").read_text())
    assert set(figures["left_out"]) == {"activation_ranges", "expert_coverage", "recipes"}
    page = Page((tmp_path / "r.html").read_text())
    assert page.tags.count("img") == 1
    for reason in figures["left_out"].values():
        assert reason in page.text
    assert sorted(path.name for path in tmp_path.glob("r.*")) == ["r.html", "r.json", "r.matrix_errors.png"]
    assert {row["error_over"] for row in figures["matrices"]} == {"weights"}


def test_refused_before_any_work(tiny_bundle: Path, text: Text, tmp_path: Path, monkeypatch) -> None:
    page = tmp_path / "r.html"
    for arguments, message in (
        ((tmp_path / "r.pdf", tiny_bundle, "int8"), "ends in .html"),
        ((tmp_path / "none" / "r.html", tiny_bundle, "int8"), "no such folder"),
        ((page, tiny_bundle, "int8", {"recipes": ["int4"]}), "pass --eval-text"),
        ((page, tiny_bundle, "int8", {"recipes": ["int3"], "eval_text": text}), 'recipe is "int3"'),
        ((page, tiny_bundle, "int8", {"recipes": ["int4-gptq"], "eval_text": text}), "int4-gptq: the recipe rests on"),
        ((page, tiny_bundle, "int8", {"eval_text": text, "loops": [99]}), "n_loops is 99"),
        ((page, tiny_bundle, "int8", {"eval_text": Text(tmp_path / "none.jsonl")}), "no such file"),
    ):
        *plain, last = arguments
        options = last if isinstance(last, dict) else {}
        with pytest.raises(InputError, match=message):
            ReportRequest(*(plain if options else arguments), **options)
    for package in ("matplotlib", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(InputError, match=rf"{package}, which is not installed.*mythos-export\[report\]"):
                ReportRequest(page, tiny_bundle, "int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hessian", [True, False])
def test_output_errors_are_those_of_the_outputs(tiny_bundle: Path, tmp_path: Path, hessian: bool) -> None:
    """Exactly with second moments; with mean squares alone, where channels are independent."""
    name = "prelude.0.attn.down.weight"
    matrix = make_plan(load_recipe("int8"), QuantizableBundle(tiny_bundle).config).matrices[name]
    generator = torch.Generator().manual_seed(0)
    out, channels = matrix.shape
    x = torch.randn(4000, channels, generator=generator)
    if hessian:
        x = x @ torch.randn(channels, channels, generator=generator)

    class Fed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("prelude", torch.nn.ModuleDict({"0": torch.nn.ModuleDict({"attn": torch.nn.ModuleDict()})}))
            self.prelude["0"]["attn"]["down"] = torch.nn.ModuleDict({"weight": torch.nn.Linear(channels, 1)})

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.prelude["0"]["attn"]["down"]["weight"](x[ids])

    ids = torch.arange(4000).reshape(4, 1000)
    statistics = gather(Fed(), ids, {name: Wanted(hessian=hessian)}, tmp_path, {"wanted": {}})
    weight = torch.randn(out, channels, generator=generator)
    rough = weight + 0.1 * torch.randn(out, channels, generator=generator)
    factors = Factors({name: weight.shape})
    error = OutputError(statistics, factors)
    error.add(matrix, None, weight, rough)
    y, difference = x.double() @ weight.double().T, x.double() @ (weight - rough).double().T
    assert error.over == ("outputs" if hessian else "channels")
    assert error.relative == pytest.approx(float(difference.norm() / y.norm()), rel=1e-3 if hessian else 0.05)
    blind = OutputError(None, factors)
    blind.add(matrix, None, weight, rough)
    assert blind.over == "weights"
    assert blind.relative == pytest.approx(float((weight - rough).norm() / weight.norm()), rel=1e-4)
