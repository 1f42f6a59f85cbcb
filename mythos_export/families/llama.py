"""Checkpoints of LlamaForCausalLM and MistralForCausalLM: dense layers with grouped-query attention, Mistral's with a window."""

from __future__ import annotations

from mythos_export.config import DenseConfig, LayerConfig, ModelConfig
from mythos_export.families import hugging_face
from mythos_export.families.family import Get, Pack
from mythos_export.families.hugging_face import Settings


def model_config(settings: Settings) -> ModelConfig:
    feed_forward = DenseConfig(settings.intermediate_size, settings.mlp_bias)
    layer = LayerConfig(hugging_face.attention(settings), feed_forward)
    return hugging_face.model_config(settings, [layer] * settings.num_hidden_layers)


def tensor_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    layer = hugging_face.attention_shapes(settings)
    layer |= hugging_face.swiglu_shapes("mlp.", settings.hidden_size, settings.intermediate_size, settings.mlp_bias)
    return hugging_face.tensor_shapes(settings, [layer] * settings.num_hidden_layers)


def pack(settings: Settings, get: Get, max_loops: int) -> dict[str, Pack]:
    packs = hugging_face.pack(settings, get)
    for index in range(settings.num_hidden_layers):
        packs |= hugging_face.pack_attention(settings, get, index)
        packs |= hugging_face.pack_swiglu(settings, get, index)
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
