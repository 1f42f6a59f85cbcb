"""The looped part in export form: loop signal, layers, depth-wise LoRA, injection, halting, once a loop.

The formulas stand with the operators, in mythos_export/ops/recurrent.py.

Shape letters: B batch, S new tokens, D dim, T loops, r lora_rank, C capacity and W width of the cache, n layers in the loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mythos_export.config import LoopConfig, ModelConfig
from mythos_export.model.attention import Context, Rows, join
from mythos_export.model.layers import empty


class LoopState(NamedTuple):
    """What one loop hands to the next.

    h [B, S, D]: the state. result [B, S, D]: halting-weighted sum so far. halted_mass [B, S, 1]: cumulative halting
    probability, frozen once it reaches the threshold. exit_loop [B, S, 1] int64: loops run while not halted. All else float32.
    """

    h: Tensor
    result: Tensor
    halted_mass: Tensor
    exit_loop: Tensor


class Recurrent(nn.Module):
    """One block of layers, looped. Tables over loops have max_loops rows; the LoRA's last trained row serves deeper ones."""

    def __init__(self, config: ModelConfig, loop: LoopConfig, layers: Iterable[nn.Module], max_loops: int) -> None:
        super().__init__()
        dim, dtype = config.dim, torch.float32
        self.first_slot = len(config.prelude)
        self.act_threshold = loop.act_threshold
        self.norm_eps = config.norm_eps
        self.loop_signal = empty(max_loops, dim, dtype=dtype)
        self.norm = empty(dim, dtype=dtype)
        self.layers = nn.ModuleList(layers)
        self.lora_down = empty(loop.lora_rank, dim, dtype=dtype)
        self.lora_scale = empty(max_loops, loop.lora_rank, dtype=dtype)
        self.lora_up = empty(loop.lora_rank, dim, dtype=dtype)
        self.decay = empty(dim, dtype=dtype)
        self.injection = empty(dim, dtype=dtype)
        self.halt = empty(dim, dtype=dtype)
        self.halt_bias = empty(1, dtype=dtype)

    def start(self, e: Tensor) -> LoopState:
        zero = torch.zeros_like(e[..., :1])
        return LoopState(e, torch.zeros_like(e), zero, zero.to(torch.int64))

    def step(
        self, state: LoopState, e: Tensor, loop: Tensor, n_loops: Tensor, context: Context
    ) -> tuple[LoopState, Rows]:
        """Loop number `loop` ([] int64, from 0). e [B, S, D]; n_loops [B] int64, or [1] for all rows.

        Returns the next state and the loop's new cache rows, n slots.
        """
        x = torch.ops.mythos.recurrent_input(state.h, e, self.loop_signal, self.norm, loop, self.norm_eps)
        rows = []
        for index, layer in enumerate(self.layers):
            slot = loop * len(self.layers) + (self.first_slot + index)
            x, layer_rows = layer(x, context, slot)
            rows.append(layer_rows)
        updated = torch.ops.mythos.recurrent_update(
            x,
            state.h,
            e,
            state.result,
            state.halted_mass,
            state.exit_loop,
            loop,
            n_loops,
            self.lora_down,
            self.lora_scale,
            self.lora_up,
            self.decay,
            self.injection,
            self.halt,
            self.halt_bias,
            self.act_threshold,
        )
        return LoopState(*updated), join(rows)

    def forward(self, e: Tensor, context: Context, n_loops: Tensor | int, n_slots: int) -> tuple[Tensor, Rows, Tensor]:
        """e [B, S, D] float32 -> result [B, S, D], new rows of T*n slots, exit_loop [B, S] int64.

        n_loops: an int unrolls that many loops; int64 [B] runs max(n_loops), each row keeping its result once its own are
        done. n_slots: loop rows to return, T*n; slots beyond max(n_loops) * n hold zeros.
        """
        if isinstance(n_loops, int):
            state, rows = self._unrolled(e, context, n_loops)
        else:
            state, rows = self._while(e, context, n_loops, n_slots)
        return state.result, rows, state.exit_loop.squeeze(-1)

    def _unrolled(self, e: Tensor, context: Context, n_loops: int) -> tuple[LoopState, Rows]:
        state, rows, depth = self.start(e), [], torch.tensor([n_loops])
        for index in range(n_loops):
            state, new_rows = self.step(state, e, torch.tensor(index), depth, context)
            rows.append(new_rows)
        return state, join(rows)

    def _while(self, e: Tensor, context: Context, n_loops: Tensor, n_slots: int) -> tuple[LoopState, Rows]:
        deepest = n_loops.max()
        past = [context.past_kv] if context.past_scale is None else [context.past_kv, context.past_scale]
        rows = [torch.zeros(n_slots, *e.shape[:2], *part.shape[3:], dtype=part.dtype) for part in past]

        def unfinished(loop: Tensor, *_: Tensor) -> Tensor:
            return loop < deepest

        def body(loop: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
            state, new_rows = self.step(LoopState(*carried[:4]), e, loop, n_loops, context)
            slots = loop * len(self.layers) + torch.arange(len(self.layers))
            filled = (torch.index_copy(rows, 0, slots, new) for rows, new in zip(carried[4:], new_rows, strict=True))
            return loop + 1, *state, *filled

        first = torch.zeros((), dtype=torch.int64)
        start = tuple(tensor.clone() for tensor in self.start(e))
        _, *carried = torch.while_loop(unfinished, body, (first, *start, *rows))
        return LoopState(*carried[:4]), tuple(carried[4:])
