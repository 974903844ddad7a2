"""Compressing a checkpoint in less memory than it has bytes: peak anonymous memory, seconds; also under a hard limit.

A Llama of random weights is written in several shards, then compressed, in float32, by a process of its own (which
starts one more, for the receipt). `in memory` is the same program told to hold all weights in memory, as it does for
training; what transformers maps from a float32 checkpoint by itself stays mapped there too. RssAnon of all its
processes together is sampled: pages of files are not in it, for the system may drop them at any time. `--limit 0.8`
puts the processes into a memory control group of 0.8 times the checkpoint's bytes, in which page cache counts too
(Linux, as root): whoever needs more is killed.

    python benchmarks/larger_than_memory.py [--layers 36] [--methods int4 int4_gptq] [--limit 0.8]
    python benchmarks/larger_than_memory.py --methods int4_awq "wanda compression.wanda.steps=0"   # settings may follow
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.control_group import control_group, within
from pipeline.models.byte_tokenizer import byte_tokenizer

WIDTH, INNER, VOCABULARY, LAYERS_A_SHARD = 1024, 2816, 256, 4
SETTINGS = [
    "device=cpu", "trainer.max_steps=0", "data.sequence_length=16", "data.evaluation_tokens=256",
    "trainer.evaluation_batch_size=8", "calibration.samples=16", "calibration.batch_size=4",
]  # fmt: skip
PROGRAM = """
import sys
import pipeline.stage_input, pipeline.proof
from pipeline.app import main
if sys.argv.pop(1) == "in memory":
    pipeline.stage_input.trains = pipeline.proof.trains = lambda line: True
sys.exit(main())
"""


def write_checkpoint(directory: Path, layers: int, dtype: torch.dtype) -> int:
    """A Llama of random weights in shards of a few layers; returns the bytes of its tensors."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }  # fmt: skip
    shards = -(-layers // LAYERS_A_SHARD)
    weight_map: dict[str, str] = {}
    size = 0
    for shard in range(shards):
        tensors = {}
        for layer in range(shard * LAYERS_A_SHARD, min(layers, (shard + 1) * LAYERS_A_SHARD)):
            name = f"model.layers.{layer}"
            tensors.update({f"{name}.{part}.weight": random(*shape) for part, shape in shapes.items()})
            tensors.update(
                {
                    f"{name}.{n}.weight": torch.ones(WIDTH, dtype=dtype)
                    for n in ("input_layernorm", "post_attention_layernorm")
                }
            )
        if shard == 0:
            tensors["model.embed_tokens.weight"] = random(VOCABULARY, WIDTH)
        if shard == shards - 1:
            tensors.update(
                {"model.norm.weight": torch.ones(WIDTH, dtype=dtype), "lm_head.weight": random(VOCABULARY, WIDTH)}
            )
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=16, max_position_embeddings=512, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return size


def anonymous(pid: int) -> int:
    """RssAnon in bytes of a process and all that it started."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        own = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0) * 1024
        tasks = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
        return own + sum(anonymous(int(child)) for task in tasks for child in task.read_text().split())
    except (OSError, ValueError):  # it has ended
        return 0


@dataclass
class Outcome:
    code: int
    peak: int
    seconds: float
    last: str


def measure(command: list[str], directory: Path, limit: int | None = None) -> Outcome:
    """Run `command` in `directory`; the largest RssAnon seen of all its processes together."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    limited = nullcontext() if limit is None else control_group(limit)
    with limited as group, tempfile.TemporaryFile("w+") as output:
        if group is not None:
            command = within(group, command)
        started, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
        output.seek(0)
        lines = output.read().strip().splitlines()
    return Outcome(process.returncode, peak, time.perf_counter() - started, lines[-1] if lines else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36, help="51 MB each; 36 (default) are 1.85 GB")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the checkpoint")
    parser.add_argument("--methods", nargs="+", default=["int4", "int4_gptq"])
    parser.add_argument("--ways", nargs="+", default=["in memory", "in files"], choices=["in memory", "in files"])
    parser.add_argument("--limit", type=float, help="under a hard limit of so many times the checkpoint's bytes")
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary directory)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as place:
        directory = Path(place)
        checkpoint = directory / "checkpoint"
        checkpoint.mkdir()
        size = write_checkpoint(checkpoint, given.layers, getattr(torch, given.dtype))
        print(f"checkpoint: {size / 1e6:.0f} MB in {len(list(checkpoint.glob('*.safetensors')))} shards", flush=True)
        empty = measure([sys.executable, "-c", "import pipeline.runner, transformers.models.llama"], directory)
        print(f"imports alone: {empty.peak / 1e6:.0f} MB", flush=True)
        limit = None if given.limit is None else int(given.limit * size)
        said = "" if limit is None else f", at most {limit / 1e6:.0f} MB"
        for method in given.methods:
            for way in given.ways:
                command = [sys.executable, "-c", PROGRAM, way, *f"compression={method}".split(), *SETTINGS]
                found = measure([*command, "model=hf", f"model.pretrained={checkpoint}"], directory, limit)
                ended = "done" if found.code == 0 else f"exit code {found.code}: {found.last[:200]}"
                print(
                    f"{method}, {way}{said}: peak {found.peak / 1e6:.0f} MB, {found.seconds:.0f} s, {ended}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
