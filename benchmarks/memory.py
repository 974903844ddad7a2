"""Bytes a parameter at the peak of training, measured, beside what the parts add up to on paper.

A GPT of 12M parameters on 8 tokens, so that activations are next to nothing: what is left are weights, gradients,
the optimizer's state, and what a step holds besides. Measured over two warm steps of the program's own fit, by the
allocator's events (pipeline/memory/measure.py); on several devices, rank 0's. Tied embeddings count once.

    python benchmarks/memory.py               # one device
    python benchmarks/memory.py --devices 2   # ddp, fsdp and tp besides, over gloo
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline import environment

environment.prepare()

from pipeline.composing import compose
from pipeline.fitting import fit
from pipeline.models.byte_tokenizer import byte_tokenizer
from pipeline.stage_input import prepared
from pipeline.tasks import lookup
from pipeline.walk import stages_of

SIZE = ["model=gpt", "model.layers=4", "model.width=512", "model.heads=8", "data.sequence_length=8"]
COMMON = [
    *SIZE, "data.evaluation_tokens=1024", "trainer.max_steps=12", "trainer.evaluate_every=0", "trainer.grad_clip=null",
    "trainer.checkpoint_every=100", "device=cpu",
]  # fmt: skip
ONE = {
    "adamw": ([], "4 weights + 4 gradients + 8 state", 16.0),
    "adamw, foreach": (["optimizer.implementation=foreach"], "the same + up to 4 while it steps", 20.0),
    "adamw8bit": (["optimizer=adamw8bit"], "4 + 4 + 2.03", 10.0),
    "sgd, momentum": (["optimizer=sgd"], "4 + 4 + 4", 12.0),
    "sgd": (["optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false"], "4 + 4", 8.0),
    "adafactor": (["optimizer=adafactor"], "4 + 4 + rows and columns", 8.0),
    "muon": (["optimizer=muon"], "4 + 4 + 4 in the blocks", 12.0),
    "bf16-mixed": (["precision=bf16-mixed"], "16 + up to 2: autocast's copy of the weights", 18.0),
    "bf16-mixed, uncached": (["precision=bf16-mixed", "precision.cache_weights=false"], "16", 16.0),
    "bf16-true": (["precision=bf16-true"], "2 + 2 + 4", 8.0),
    "bf16-true, stochastic": (
        ["precision=bf16-true", "precision.stochastic_rounding=true"], "2 + 2 + 4 + a weight", 8.0
    ),
    "bf16-true, adamw8bit": (["precision=bf16-true", "optimizer=adamw8bit"], "2 + 2 + 2.03", 6.0),
    "state on disk": (["memory.optimizer_offload=disk"], "4 + 4 + a weight's state", 8.0),
    "bfloat16 gradients": (["precision.gradient_dtype=bfloat16"], "4 + 2 + 8", 14.0),
    "step in backward": (["memory.step_in_backward=true"], "4 + 8 + a gradient", 12.0),
    "step in backward, adamw8bit": (
        ["memory.step_in_backward=true", "optimizer=adamw8bit"], "4 + 2.03 + a gradient", 6.0
    ),
    "step in backward, bf16-true, adamw8bit": (
        ["memory.step_in_backward=true", "optimizer=adamw8bit", "precision=bf16-true"], "2 + 2.03 + a gradient", 4.0
    ),
}  # fmt: skip
LONG = ["data.sequence_length=256", "trainer.batch_size=8"]
ACTIVATIONS = {
    "nothing": [],
    "selective": ["memory.activation_checkpointing=selective"],
    "full": ["memory.activation_checkpointing=full"],
    "on disk": ["memory.activation_offload=disk"],
    "loss in 8 chunks": ["memory.loss_chunks=8"],
    "full, loss in 8 chunks": ["memory.activation_checkpointing=full", "memory.loss_chunks=8"],
    "micro batches of 1": ["trainer.micro_batch_size=1"],
}
"""The same model on 2,048 tokens a step."""
SEVERAL = {
    "ddp": (["parallelism=ddp"], "16: gradients are the buckets", lambda n: 16.0),
    "ddp, no bucket view": (["parallelism=ddp", "parallelism.bucket_view=false"], "16 + 4 buckets", lambda n: 20.0),
    "fsdp": (["parallelism=fsdp"], "16/N + whole blocks at work", lambda n: 16.0 / n),
    "fsdp, bf16-true": (["parallelism=fsdp", "precision=bf16-true"], "8/N + whole blocks at work", lambda n: 8.0 / n),
    "tp": (["parallelism=tp"], "16/N of the blocks", lambda n: 16.0 / n),
}


def measured(overrides: list[str], directory: Path) -> float:
    """Bytes a parameter at the peak of this rank's fit."""
    directory.mkdir(parents=True, exist_ok=True)
    config = compose([*COMMON, *overrides])
    line, tokenizer = stages_of(config), byte_tokenizer()
    data = config.data.open(tokenizer)
    model, context = prepared(config, directory, data, tokenizer, line, line[0])
    parameters = sum(weight.numel() for weight in model.parameters())
    fitted = fit(config, line[0], model, lookup.get("causal_lm"), data, context.architecture, directory)
    assert fitted.peak_bytes is not None
    return fitted.peak_bytes / parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rank-of", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    devices = arguments.devices
    with tempfile.TemporaryDirectory() as place:
        if arguments.rank_of:
            case, file = arguments.rank_of
            words = [*SEVERAL[case][0], f"parallelism.devices={devices}", f"trainer.batch_size={devices}"]
            found = measured(words, Path(place))
            Path(f"{file}.{os.environ['RANK']}").write_text(json.dumps(found))
            return
        print(f"{'':42} {'measured':>9} {'on paper':>9}  bytes a parameter")
        for name, (words, parts, paper) in ONE.items():
            found = measured([*words, "trainer.batch_size=1"], Path(place) / name.replace(" ", "_"))
            print(f"{name:42} {found:9.2f} {paper:9.2f}  {parts}", flush=True)
        for name, words in ACTIVATIONS.items():
            found = measured([*LONG, *words], Path(place) / f"activations_{name.replace(' ', '_')}")
            print(f"{'2,048 tokens, ' + name:42} {found:9.2f} {'':9}  16 + activations", flush=True)
        for name, (_, parts, of) in SEVERAL.items() if devices > 1 else ():
            file = Path(place) / "found"
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
            command = [*torchrun, __file__, "--devices", str(devices), "--rank-of", name, str(file)]
            subprocess.run(command, check=True, capture_output=True)
            found = json.loads(Path(f"{file}.0").read_text())
            print(f"{name + f', {devices} devices':42} {found:9.2f} {of(devices):9.2f}  {parts}", flush=True)


if __name__ == "__main__":
    main()
