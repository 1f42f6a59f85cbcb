"""The whole model in export form, a pure function of tokens and cache: what is traced, and what torch runs for parity.

Shape letters: B batch, S new tokens, D dim, K positions that get logits, V vocab_size, C capacity and W width of the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_export.config import DenseConfig, LayerConfig, ModelConfig
from mythos_export.model.attention import Context, Rows, attention, join
from mythos_export.model.layers import BiasedFeedForward, FeedForward, empty
from mythos_export.model.mixture_of_experts import MixtureOfExperts
from mythos_export.model.recurrent import Recurrent


class Layer(nn.Module):
    """One pre-norm layer on x [B, S, D] float32; returns the new x and the layer's cache rows."""

    def __init__(self, dim: int, config: LayerConfig, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        feed_forward = config.feed_forward
        self.attn = attention(dim, config.attention, epsilon, dtype)
        self.ffn: nn.Module
        if isinstance(feed_forward, DenseConfig):
            self.ffn = (BiasedFeedForward if feed_forward.bias else FeedForward)(dim, feed_forward, epsilon, dtype)
        else:
            self.ffn = MixtureOfExperts(dim, feed_forward, epsilon, dtype)

    def forward(self, x: Tensor, context: Context, slot: Tensor) -> tuple[Tensor, Rows]:
        x, rows = self.attn(x, context, slot)
        return self.ffn(x), rows


class Decoder(nn.Module):
    """The decoder graph of a bundle. dtype: of the matrices; norms, router, halting and sums are float32.

    max_loops: rows of the tables over loops, the deepest n_loops that can run. fixed_loops: unroll that many loops and take
    no n_loops input. row_scale: fixed scale of an int8 cache's rows, 0 for one of its own for each.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_loops: int = 1,
        fixed_loops: int | None = None,
        dtype: torch.dtype = torch.float32,
        row_scale: float = 0.0,
    ) -> None:
        super().__init__()

        def layers(group: tuple[LayerConfig, ...]) -> nn.ModuleList:
            return nn.ModuleList([Layer(config.dim, layer, config.norm_eps, dtype) for layer in group])

        self.config, self.fixed_loops, self.row_scale = config, fixed_loops, row_scale
        self.embed = empty(config.vocab_size, config.dim, dtype=dtype)
        self.rope_cos = empty(config.max_seq_len, config.rope_dim // 2, dtype=torch.float32)
        self.rope_sin = empty(config.max_seq_len, config.rope_dim // 2, dtype=torch.float32)
        self.prelude = layers(config.prelude)
        self.recurrent = Recurrent(config, config.loop, layers(config.loop_layers), max_loops) if config.loop else None
        self.coda = layers(config.coda)
        self.norm = empty(config.dim, dtype=torch.float32)
        self.head = None if config.tie_embeddings else empty(config.vocab_size, config.dim, dtype=dtype)

    def forward(
        self,
        input_ids: Tensor,
        past_len: Tensor,
        past_kv: Tensor,
        logit_positions: Tensor,
        n_loops: Tensor | None = None,
        past_scale: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One step of prefill, chunked prefill or decode.

        input_ids [B, S] int64; past_len [B] int64: valid cache rows; past_kv [slots, B, C, W] float32, float16, bfloat16 or int8;
        logit_positions [B, K] int64: which of the S tokens get logits; n_loops [B] int64 unless the count is fixed; past_scale
        [slots, B, C] float32 where past_kv is int8. Token s of row b stands at position past_len[b] + s. Returns logits [B, K, V]
        float32, new_kv [slots, B, S, W] in the dtype of past_kv, exit_loop [B, S] int64, and where that is int8 new_scale
        [slots, B, S] float32.
        """
        position = past_len.unsqueeze(1) + torch.arange(input_ids.shape[1], device=input_ids.device)
        position = position.clamp(max=self.config.max_seq_len - 1)  # padding may stand past the end
        cos, sin = F.embedding(position, self.rope_cos), F.embedding(position, self.rope_sin)
        context = Context(cos, sin, past_kv, past_scale, past_len, self.row_scale)
        x = F.embedding(input_ids, self.embed).float()
        rows: list[Rows] = []
        for index, layer in enumerate(self.prelude):
            x, layer_rows = layer(x, context, torch.tensor(index))
            rows.append(layer_rows)
        exit_loop = torch.zeros_like(input_ids)
        if self.recurrent is not None:
            depth = n_loops if self.fixed_loops is None else self.fixed_loops
            n_slots = past_kv.shape[0] - len(self.prelude) - len(self.coda)
            x, loop_rows, exit_loop = self.recurrent(x, context, depth, n_slots)
            rows.append(loop_rows)
        for index, layer in enumerate(self.coda):
            slot = torch.full((), past_kv.shape[0] - len(self.coda) + index, dtype=torch.int64)
            x, layer_rows = layer(x, context, slot)
            rows.append(layer_rows)
        new_kv, *new_scale = join(rows)
        x = torch.gather(x, 1, logit_positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return self._logits(x), new_kv, exit_loop, *new_scale

    def _logits(self, x: Tensor) -> Tensor:
        """x [B, K, D] float32 -> [B, K, V] float32."""
        head = self.embed if self.head is None else self.head
        logits: Tensor = torch.ops.mythos.normalized_linear(x, self.norm, head, self.config.norm_eps)
        return logits.float()
