"""A bundle as a model of transformers, whose own model on the same checkpoint is the oracle; and Optimum's command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_cli import run_json
from test_families import save
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, StoppingCriteria, TextStreamer, pipeline

from mythos_export import MythosForCausalLM, export_bundle, load
from mythos_export.quantize import quantize_bundle
from runtimes.errors import BundleError, InputError

ROOT = Path(__file__).parent.parent
PROMPT = "To be, or not to be"
IDS = torch.tensor([[0, 0, 11, 12], [5, 6, 7, 8], [0, 21, 22, 23]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def llama(shakespeare: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """transformers' model of 192 positions, its folder with a tokenizer, and the bundle."""
    home = tmp_path_factory.mktemp("llama")
    model = save("Llama", home / "checkpoint", vocab_size=2048, initializer_range=0.1)
    shutil.copy(shakespeare / "tokenizer.json", home / "checkpoint")
    export_bundle(home / "checkpoint", home / "bundle")
    return model, home / "checkpoint", home / "bundle"


@pytest.fixture(scope="module")
def model(llama: tuple[Any, Path, Path]) -> MythosForCausalLM:
    return MythosForCausalLM.from_pretrained(llama[2], threads=1)


@pytest.fixture(scope="module")
def looped(tiny_bundle: Path) -> MythosForCausalLM:
    return MythosForCausalLM.from_pretrained(tiny_bundle, threads=1)


def generate(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    fed = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 24, "pad_token_id": 0, "do_sample": False}
    return model.generate(**{**fed, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "ends": True, "early_stopping": True},
        {"num_beams": 2, "do_sample": True, "temperature": 0.9},
        {"do_sample": True, "top_k": 50, "top_p": 0.9, "num_return_sequences": 2},
        {"ends": True, "min_new_tokens": 9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"use_cache": False, "max_new_tokens": 6},
        {"prefill_chunk_size": 2, "guidance_scale": 1.5},
    ],
    ids=str,
)
def test_generate_gives_the_tokens_of_transformers(
    llama: tuple[Any, Path, Path], model: MythosForCausalLM, options: dict[str, Any]
) -> None:
    """Over prompts of unequal length. ends: two sequences meet an end-of-text token on their way."""
    chosen = dict(options)
    if chosen.pop("ends", False):
        chosen["eos_token_id"] = generate(llama[0])[[0, 2], [10, 14]].tolist()
    assert generate(model, **chosen).tolist() == generate(llama[0], **chosen).tolist()


def test_a_padded_batch_gives_what_each_prompt_gives_alone(model: MythosForCausalLM) -> None:
    together = generate(model)
    for ids, mask, row in zip(IDS, MASK, together, strict=True):
        assert (
            generate(model, input_ids=ids[mask == 1][None], attention_mask=None)[0].tolist()
            == row[mask.argmax() :].tolist()
        )


def test_logits_and_a_cache_that_goes_on(llama: tuple[Any, Path, Path], model: MythosForCausalLM) -> None:
    """Padding on either side; a second turn after what the first returned, its mask covering both."""
    for ids, mask in ((IDS, MASK), (IDS.flip(1), MASK.flip(1))):
        expected = llama[0](ids, attention_mask=mask).logits[mask == 1].detach()
        got = model(ids, attention_mask=mask)
        torch.testing.assert_close(got.logits[mask == 1], expected, rtol=0, atol=2e-4)
        assert not got.logits[mask == 0].any()
        assert got.past_key_values.get_seq_length() == 4
        assert model(ids, attention_mask=mask, return_dict=False)[0].equal(got.logits)
        assert model(ids, attention_mask=mask, logits_to_keep=2).logits.equal(got.logits[:, -2:])
    turns = []
    for one in (llama[0], model):
        first = generate(one, max_new_tokens=5, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[3, 4]] * 3)], 1)
        mask = torch.cat([MASK, torch.ones(3, 7, dtype=torch.int64)], 1)
        turns.append(generate(one, input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values).tolist())
    assert turns[0] == turns[1]


def test_pipelines_streamers_and_processors(llama: tuple[Any, Path, Path], model: MythosForCausalLM) -> None:
    """The text of `mythos-export generate`, also in a batch, streamed, and until a criterion or a stop text ends it."""
    bundle = llama[2]
    tokenizer = AutoTokenizer.from_pretrained(bundle, pad_token="<|endoftext|>")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"do_sample": False, "max_new_tokens": 20, "return_full_text": False}
    prompts = [PROMPT, "O", "ROMEO. But soft"]
    texts = [run_json("generate", bundle, "--prompt", prompt, "-n", 20)["text"] for prompt in prompts]
    assert [out[0]["generated_text"] for out in write(prompts, batch_size=3, **options)] == texts

    parts: list[str] = []

    class Collected(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            parts.append(text)

    write(PROMPT, streamer=Collected(tokenizer, skip_prompt=True), **options)
    assert "".join(parts) == texts[0]
    assert len(parts) > 3

    class After(StoppingCriteria):
        def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), ids.shape[1] >= 9)

    class Never(LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, first, -torch.inf)

    first = generate(model)[:, 4]
    limited = generate(model, stopping_criteria=[After()], logits_processor=LogitsProcessorList([Never()]))
    assert limited.shape == (3, 9)
    assert not torch.isin(limited[:, 4:], first).any()
    stop = texts[0][4:9]
    ended = write(PROMPT, stop_sequence=stop, **options)[0]["generated_text"]
    assert texts[0].startswith(ended)
    assert stop in ended
    assert len(ended) < len(texts[0])


def test_pipelines_leave_the_model_where_it_is(llama: tuple[Any, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """They move models to the GPU that they find; where a bundle runs is its backend's matter."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(transformers.pipelines.base, "is_torch_cuda_available", lambda: True)
    told = MythosForCausalLM.from_pretrained(llama[2])
    write = pipeline("text-generation", model=told, tokenizer=AutoTokenizer.from_pretrained(llama[2]))
    assert write.device == torch.device("cpu")


def test_depth_may_be_chosen(looped: MythosForCausalLM, tiny_bundle: Path) -> None:
    """By call, sequence and model, with beams as well; it may not rise on a cache."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [5, 6, 7]])
    depths = torch.tensor([2, 7, 3])
    expected = looped.runner.generate(ids.tolist(), 12, n_loops=depths.tolist()).complete().ids
    plain = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert looped.generate(ids, n_loops=depths, **plain)[:, 3:].tolist() == expected
    alone = MythosForCausalLM.from_pretrained(tiny_bundle, n_loops=2)
    assert alone.generate(ids[:1], **plain | {"attention_mask": None})[0, 3:].tolist() == expected[0]
    beams = [looped.generate(ids[:2], n_loops=torch.tensor([2, 7]), num_beams=3, **plain | {"attention_mask": None})]
    for row, depth in enumerate((2, 7)):
        beams.append(
            looped.generate(ids[row : row + 1], n_loops=depth, num_beams=3, max_new_tokens=12, do_sample=False)
        )
    assert beams[0].tolist() == torch.cat(beams[1:]).tolist()
    shallow = looped(ids, n_loops=2)
    with pytest.raises(InputError, match="would rise from 2 to 3"):
        looped(ids[:, :1], past_key_values=shallow.past_key_values, n_loops=3)
    with pytest.raises(InputError, match="n_loops has 2 values for 3 sequences"):
        looped.generate(ids, n_loops=[1, 2])
    with pytest.raises(InputError, match="expected 1 to 12"):
        MythosForCausalLM.from_pretrained(tiny_bundle, n_loops=13)


def test_the_checkpoints_settings_come_along(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    """generation_config.json gives generate()'s defaults, tokenizer settings a chat its form; quantizing keeps both."""
    folder = Path(shutil.copytree(llama[1], tmp_path / "checkpoint"))
    settings = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "top_k": 5, "eos_token_id": 9}
    (folder / "generation_config.json").write_text(json.dumps({**settings, "cache_implementation": "hybrid"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text(CHAT)
    export_bundle(folder, tmp_path / "bundle", eos=["<|endoftext|>"])
    quantize_bundle(tmp_path / "bundle", tmp_path / "int8", "int8")
    for bundle in (tmp_path / "bundle", tmp_path / "int8"):
        told = MythosForCausalLM.from_pretrained(bundle)
        assert told.generation_config.eos_token_id == [0]  # what the bundle was exported with
        assert told.generation_config.temperature == 0.5
        assert told.generate(IDS[1:2], pad_token_id=0).shape == (1, 11)
        write = pipeline("text-generation", model=told, tokenizer=AutoTokenizer.from_pretrained(bundle))
        answer = write([{"role": "user", "content": PROMPT}])[0]["generated_text"][-1]
        assert answer["role"] == "assistant"
    (tmp_path / "bundle" / "generation_config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"generation_config\.json: 2 bytes"):
        MythosForCausalLM.from_pretrained(tmp_path / "bundle")
    (folder / "generation_config.json").write_text('{"max_new_tokens": -1}')
    export_bundle(folder, tmp_path / "odd")
    with pytest.raises(BundleError, match="transformers cannot read it"):
        MythosForCausalLM.from_pretrained(tmp_path / "odd")


def test_generation_ends_where_the_positions_do(
    llama: tuple[Any, Path, Path], model: MythosForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    """As the Runner's own does, with a word about it; padding takes no position."""
    long = torch.from_numpy(np.random.default_rng(0).integers(1, 2048, (2, 180)))
    mask = torch.ones_like(long)
    mask[:, :3] = 0
    got = generate(model, input_ids=long, attention_mask=mask, max_new_tokens=40)
    assert "generation ends at 193 tokens" in caplog.text
    assert got[:, 180:].tolist() == load(llama[2]).generate(long[:, 3:].tolist(), 40).complete().ids


BAD: dict[str, tuple[Callable[[Any], object], str]] = {
    "a GPU": (lambda model: model.to("cuda"), r"the backend decides where it runs \(backend=, device=\)"),
    "half": (lambda model: model.half(), "--dtype"),
    "training": (lambda model: model.train(), "for inference only"),
    "labels": (lambda model: model(IDS, labels=IDS), "for inference only"),
    "saving": (lambda model: model.save_pretrained("never"), "copying its folder"),
    "a token id of another tokenizer": (lambda model: generate(model, input_ids=IDS + 2040), "is this the model's tokenizer"),
    "loops of a plain model": (lambda model: generate(model, n_loops=2), "the model has no loop"),
    "another cache": (lambda model: generate(model, cache_implementation="static"), "--cache-dtype"),
    "a paged cache": (lambda model: generate(model, cache_implementation="paged"), "no paged cache"),
    "a torch model's cache": (
        lambda model: generate(model, past_key_values=transformers.DynamicCache()), "past_key_values is a DynamicCache"
    ),
    "padding on the right": (lambda model: generate(model, attention_mask=MASK.flip(1)), "padding_side"),
    "attentions": (lambda model: model(IDS, output_attentions=True), "output_attentions is given"),
    "embeddings": (lambda model: model(inputs_embeds=torch.zeros(1, 2, 48)), "inputs_embeds is given"),
    "floats": (lambda model: model(IDS.float()), r"torch.float32 \[3, 4\]; expected an integer tensor"),
    "a mask of another length": (lambda model: model(IDS, attention_mask=MASK[:, :3]), r"expected \[3, 4\]"),
    "a mask that hides the past": (
        lambda model: model(IDS, attention_mask=MASK.repeat(1, 2), past_key_values=model(IDS).past_key_values),
        "hides tokens that are in past_key_values",
    ),
    "too long a prompt": (lambda model: generate(model, input_ids=torch.ones(1, 193, dtype=torch.int64), attention_mask=None),
                          "max_seq_len of 192"),
    "nothing": (lambda model: model(), "input_ids is NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_a_bundle_cannot_do_is_said(model: MythosForCausalLM, case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(InputError, match=message):
        call(model)


def test_what_is_no_bundle_is_said(
    llama: tuple[Any, Path, Path], looped: MythosForCausalLM, model: MythosForCausalLM
) -> None:
    with pytest.raises(BundleError, match=r"not a bundle, it holds no manifest\.json"):
        MythosForCausalLM.from_pretrained(llama[1])
    with pytest.raises(BundleError, match="no such folder"):
        MythosForCausalLM.from_pretrained("some/model-of-the-hub")
    with pytest.raises(InputError, match="device_map is 'auto'; the backend decides"):
        MythosForCausalLM.from_pretrained(llama[2], device_map="auto")
    with pytest.raises(InputError, match="revision is 'main'; a bundle takes no such argument"):
        MythosForCausalLM.from_pretrained(llama[2], revision="main")
    with pytest.raises(InputError, match="of another model"):
        looped(IDS, past_key_values=model(IDS).past_key_values)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model, prompt_lookup_num_tokens=2)


def test_optimums_command_line_exports(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    """Run as a command, with the options, messages and exit codes of `mythos-export export`."""
    pytest.importorskip(
        "optimum.commands.base", reason="needs the package optimum: pip install 'mythos-export[optimum]'"
    )
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "mythos"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        line = [str(part) for part in (*command, *arguments)]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    told = run("--help").stdout
    for option in ("--output", "-o BUNDLE", "--max-loops", "float32|float16|bfloat16", "--eos TOKEN", "--json"):
        assert option in told
    made = run(llama[1], "-o", "bundle", "--eos", "<|endoftext|>", "--cache-dtype", "int8", "--json").stdout
    assert json.loads(made)["cache_dtype"] == "int8"
    assert load(tmp_path / "bundle").manifest.eos_token_ids == (0,)
    assert run_json("verify", tmp_path / "bundle", llama[1], "--tokens", 40)["ok"] is True
    assert "exists already" in run(llama[1], "-o", "bundle", code=2).stderr
