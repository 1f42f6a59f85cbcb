"""Checkpoints of LlamaForCausalLM and MistralForCausalLM: dense layers with grouped-query attention, Mistral's with a window."""

from __future__ import annotations

from mythos_export.config import DenseConfig, ModelConfig
from mythos_export.families import hugging_face
from mythos_export.families.family import Get, Pack
from mythos_export.families.hugging_face import Settings


def model_config(settings: Settings) -> ModelConfig:
    return hugging_face.model_config(settings, DenseConfig(settings.intermediate_size))


def tensor_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    dim, hidden = settings.hidden_size, settings.intermediate_size
    feed_forward = {
        "mlp.gate_proj.weight": (hidden, dim),
        "mlp.up_proj.weight": (hidden, dim),
        "mlp.down_proj.weight": (dim, hidden),
    }
    return hugging_face.tensor_shapes(settings, feed_forward)


def pack(settings: Settings, get: Get, max_loops: int) -> dict[str, Pack]:
    packs = hugging_face.pack(settings, get)
    for index in range(settings.num_hidden_layers):
        theirs, ours = f"model.layers.{index}.mlp.", f"prelude.{index}.ffn."
        packs[f"{ours}gate_up"] = hugging_face.joined(get, f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
        packs[f"{ours}down"] = hugging_face.joined(get, f"{theirs}down_proj.weight")
    return packs


FAMILY = hugging_face.family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    settings=Settings,
    model_config=model_config,
    tensor_shapes=tensor_shapes,
    pack=pack,
    variants={},
)
