"""Makes a checkpoint of MixtralForCausalLM as large as wanted, exports and quantizes it, and says what memory that took.
By hand: `make streaming GB=3` (disk for the checkpoint, twice that for the float32 bundle, a third for the int4 one).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from mythos_export.families import mixtral

SHARD = 2**29  # bytes at most, or one tensor


def write_checkpoint(folder: Path, gigabytes: float, dim: int = 2048, expert_dim: int = 7168) -> None:
    """Random bfloat16 weights of 8 experts a layer, of so many layers as come closest to the size; in folder."""
    layer = 2 * (8 * 3 * dim * expert_dim + 4 * dim * dim)
    settings = {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": dim,
        "intermediate_size": expert_dim,
        "num_hidden_layers": max(1, round(gigabytes * 1e9 / layer)),
        "num_attention_heads": dim // 128,
        "num_key_value_heads": dim // 128,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in mixtral.FAMILY.tensor_shapes(mixtral.Settings(**settings)).items():
        if sum(2 * torch.Size(other).numel() for other in (*shards[-1].values(), shape)) > SHARD and shards[-1]:
            shards.append({})
        shards[-1][name] = shape
    where = {}
    generator = torch.Generator().manual_seed(0)
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(shard, file)
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in shard.items()
        }
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def peak_of(*arguments: object) -> str:
    """Runs the command line; the most memory that it had resident, files it had mapped included."""
    process = subprocess.Popen([sys.executable, "-m", "mythos_export.cli", *map(str, arguments), "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{arguments[0]} failed")
    return f"{arguments[0]}: at most {usage.ru_maxrss / 1000:.0f} MB of memory"


def show(gigabytes: str) -> None:
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        # In a process of its own: what a child's parent held counts as the child's.
        subprocess.run([sys.executable, __file__, gigabytes, home / "checkpoint"], check=True)
        print(f"a checkpoint of {sum(path.stat().st_size for path in (home / 'checkpoint').iterdir()) / 1e9:.2f} GB")
        print(peak_of("export", home / "checkpoint", "-o", home / "bundle"))
        print(peak_of("quantize", home / "bundle", "-o", home / "quantized", "--recipe", "int4"))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        write_checkpoint(Path(sys.argv[2]), float(sys.argv[1]))
    else:
        show(sys.argv[1])
