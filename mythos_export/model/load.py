"""Fills a Decoder from a checkpoint, for running it in torch: parity, calibration."""

from __future__ import annotations

import torch

from mythos_export.checkpoint import Checkpoint
from mythos_export.model.decoder import Decoder


def load_decoder(checkpoint: Checkpoint, *, max_loops: int, weight_dtype: torch.dtype = torch.float32) -> Decoder:
    """A Decoder in float32 whose matrices hold the checkpoint's values rounded to weight_dtype, as a bundle of it does.

    Its fixed_loops is the trained depth; set the attribute to run another, up to max_loops.
    """
    loop = checkpoint.config.loop
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config, max_loops=max_loops, fixed_loops=loop.trained_loops if loop else 0)
        stored = dict(Decoder(checkpoint.config, max_loops=max_loops, dtype=weight_dtype).named_parameters())
    decoder.to_empty(device="cpu")
    packs = checkpoint.tensors(max_loops)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            row = 0
            for piece in packs[name]():
                parameter[row : row + len(piece)] = piece.to(stored[name].dtype)
                row += len(piece)
    return decoder.eval()
