"""The whole model in export form, a pure function of tokens and cache: what is traced, and what torch runs for parity.

Shape letters: B batch, S new tokens, D dim, K positions that get logits, V vocab_size, C capacity and W width of the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_export.config import DenseConfig, LayerConfig, ModelConfig
from mythos_export.model.attention import Context, attention
from mythos_export.model.layers import FeedForward, empty
from mythos_export.model.mixture_of_experts import MixtureOfExperts
from mythos_export.model.recurrent import Recurrent


class Layer(nn.Module):
    """One pre-norm layer on x [B, S, D] float32; returns the new x and the layer's cache rows [B, S, W]."""

    def __init__(self, dim: int, config: LayerConfig, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        feed_forward = config.feed_forward
        self.attn = attention(dim, config.attention, epsilon, dtype)
        self.ffn: nn.Module
        if isinstance(feed_forward, DenseConfig):
            self.ffn = FeedForward(dim, feed_forward, epsilon, dtype)
        else:
            self.ffn = MixtureOfExperts(dim, feed_forward, epsilon, dtype)

    def forward(self, x: Tensor, context: Context, slot: Tensor) -> tuple[Tensor, Tensor]:
        x, new_kv = self.attn(x, context, slot)
        return self.ffn(x), new_kv


class Decoder(nn.Module):
    """The decoder graph of a bundle. dtype: of the matrices and the cache; norms, router, halting and sums are float32.

    max_loops: rows of the tables over loops, the deepest n_loops that can run. fixed_loops: unroll that many loops and take
    no n_loops input.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_loops: int = 1,
        fixed_loops: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()

        def layers(group: tuple[LayerConfig, ...]) -> nn.ModuleList:
            return nn.ModuleList([Layer(config.dim, layer, config.norm_eps, dtype) for layer in group])

        self.config, self.fixed_loops = config, fixed_loops
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of prefill, chunked prefill or decode.

        input_ids [B, S] int64; past_len [B] int64: valid cache rows; past_kv [slots, B, C, W]; logit_positions [B, K] int64:
        which of the S tokens get logits; n_loops [B] int64 unless the count is fixed. Token s of row b stands at position
        past_len[b] + s. Returns logits [B, K, V] float32, new_kv [slots, B, S, W], exit_loop [B, S] int64.
        """
        position = past_len.unsqueeze(1) + torch.arange(input_ids.shape[1], device=input_ids.device)
        position = position.clamp(max=self.config.max_seq_len - 1)  # padding may stand past the end
        context = Context(F.embedding(position, self.rope_cos), F.embedding(position, self.rope_sin), past_kv, past_len)
        x = F.embedding(input_ids, self.embed).float()
        rows = []
        for index, layer in enumerate(self.prelude):
            x, new_kv = layer(x, context, torch.tensor(index))
            rows.append(new_kv.unsqueeze(0))
        exit_loop = torch.zeros_like(input_ids)
        if self.recurrent is not None:
            depth = n_loops if self.fixed_loops is None else self.fixed_loops
            n_slots = past_kv.shape[0] - len(self.prelude) - len(self.coda)
            x, loop_rows, exit_loop = self.recurrent(x, context, depth, n_slots)
            rows.append(loop_rows)
        for index, layer in enumerate(self.coda):
            slot = torch.full((), past_kv.shape[0] - len(self.coda) + index, dtype=torch.int64)
            x, new_kv = layer(x, context, slot)
            rows.append(new_kv.unsqueeze(0))
        x = torch.gather(x, 1, logit_positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return self._logits(x), torch.cat(rows), exit_loop

    def _logits(self, x: Tensor) -> Tensor:
        """x [B, K, D] float32 -> [B, K, V] float32."""
        head = self.embed if self.head is None else self.head
        logits: Tensor = torch.ops.mythos.normalized_linear(x, self.norm, head, self.config.norm_eps)
        return logits.float()
