"""The receipt: an artifact, opened in a fresh process, gives the outputs its model gave before it was saved.

`python -m pipeline.artifact.receipt DIRECTORY [PLACE]` prints it as JSON; weights then lie in files in PLACE. The same
kernels on the same machine with as many threads must give a difference of 0; anywhere else the largest may be 1e-3 of
the largest output. Where the format is public the directory is opened with plain transformers too, which must agree
within 1e-3. Models narrower than float32 are compared there in float32, so that what is compared is the stored weights
and not the rounding of two programs.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline import environment
from pipeline.device.system_memory import oom_kills, suspicion
from pipeline.errors import LeanfitError
from pipeline.interrupts import ended_with_parent

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pipeline.layers.quantized import QuantizedLayer

RELATIVE = 1e-3
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}


@dataclass(frozen=True)
class Receipt:
    """`max_abs_diff`: largest difference from the outputs before saving. `tolerance`: what was allowed, absolute.

    `transformers_max_rel_diff`: plain transformers against ours, relative to the largest output; None where it cannot
    open the format.
    """

    ok: bool
    max_abs_diff: float | None
    problems: list[str]
    transformers_max_rel_diff: float | None = None
    tolerance: float | None = None


def check(directory: Path, offload_to: Path | None = None) -> Receipt:
    """The receipt of `directory`, from a fresh process. It never raises for what is wrong with the artifact.

    `offload_to`: where weights lie in files instead of in memory, those that plain transformers unpacks too.
    """
    places = [str(Path(place).resolve()) for place in (directory, offload_to) if place is not None]
    command = [sys.executable, "-m", "pipeline.artifact.receipt", *places]
    before = oom_kills()
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment.child(), check=False,
        preexec_fn=ended_with_parent(signal.SIGKILL),
    )  # fmt: skip
    if done.returncode < 0:  # what it said last, a library's warning, explains nothing
        name = signal.Signals(-done.returncode).name
        why = f"was killed by {name}" + (suspicion(before) if name == "SIGKILL" else "")
        return Receipt(False, None, [f"{directory}: the process that opened it {why}"])
    try:
        return Receipt(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Receipt(False, None, [f"{directory}: the process that opened it failed: {last}"])


def examine(directory: Path, offload_to: Path | None = None) -> Receipt:
    """The receipt of `directory`, in this process."""
    import torch
    from safetensors.torch import load_file

    from pipeline.artifact import manifest as manifests
    from pipeline.artifact import store
    from pipeline.artifact.machine import machine

    try:
        manifest = store.read_manifest(directory)
        made = manifest.get("probe") or {}
        if isinstance(made.get("threads"), int) and 0 < made["threads"] <= 4096:
            torch.set_num_threads(made["threads"])
        device = _device(str(made.get("device", "cpu")))
        model = store.load(directory, device=device, offload_to=offload_to)
    except LeanfitError as error:
        return Receipt(False, None, [str(error)])
    stored = load_file(directory / manifests.PROBE, device="cpu")
    before = stored.pop("output")
    batch = {name.removeprefix("input."): tensor.to(device) for name, tensor in stored.items()}
    output = store.output_of(model, batch)
    if output.shape != before.shape:
        return Receipt(
            False, None, [f"{directory}: outputs of shape {list(output.shape)}, before {list(before.shape)}"]
        )
    difference = _largest(output.double() - before.double())
    same = made == {"device": device, **machine()} and manifest.get("kernels") == _kernels(model)
    allowed = 0.0 if same else RELATIVE * _largest(before.double())
    problems = []
    if manifest.get("digest") != manifests.digest(manifest):
        problems.append(f"{directory / manifests.NAME}: altered, it does not say what was written")
    if not difference <= allowed:  # a NaN is a problem too
        where = "same machine and kernels" if same else "another machine or kernel"
        problems.append(
            f"{directory}: outputs differ by {difference:.3g} from those before saving ({where}: {allowed:.3g})"
        )
    relative = None
    if manifest["format"] != "leanfit":
        try:
            relative = _against_transformers(directory, manifest, model, batch, offload_to)
        except Exception as error:  # any failure of plain transformers to open it is what the receipt reports
            problems.append(f"{directory}: transformers cannot open it: {type(error).__name__}: {str(error)[:200]}")
        else:
            if relative is not None and not relative <= RELATIVE:
                problems.append(f"{directory}: plain transformers differs by {relative:.3g} of the largest output")
    return Receipt(not problems, difference, problems, relative, allowed)


def _device(recorded: str) -> str:
    import torch

    kind = recorded.partition(":")[0]
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return recorded if here.get(kind, False) else "cpu"


def _kernels(model: nn.Module) -> dict[str, int]:
    from collections import Counter

    from pipeline.layers.quantized import quantized_layers

    return dict(Counter(layer.kernel for layer in quantized_layers(model).values()))


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _against_transformers(
    directory: Path, manifest: dict[str, Any], model: nn.Module, batch: dict[str, Tensor], offload_to: Path | None
) -> float | None:
    """Relative difference of plain transformers' outputs from ours; None for a kind of model without an auto class."""
    import torch
    import transformers

    from pipeline.artifact import store
    from pipeline.layers import kernels

    name = str(manifest["model"]["class"])
    auto = next((cls for suffix, cls in AUTO_CLASSES.items() if name.endswith(suffix)), None)
    if auto is None:
        return None
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtype = torch.promote_types(floats[0], torch.float32)
    with _put_together_in_files(offload_to if manifest["model"].get("linear_experts") else None):
        plain = getattr(transformers, auto).from_pretrained(
            directory, dtype=dtype, attn_implementation=manifest["model"]["attention"], local_files_only=True
        )
    if offload_to is not None:
        _unpack_into_files(plain, offload_to)
    _widen_experts(plain, dtype, offload_to)
    if manifest["format"] == "pack-quantized":
        _round_experts(model)
    # The product that plain transformers computes: an integer kernel moves single activations over a rounding edge.
    with kernels.forced("float"):
        ours = store.output_of(model.to(dtype), batch).double()
    theirs = store.output_of(plain.to(next(iter(batch.values())).device), batch).double()
    return _largest(ours - theirs) / max(_largest(ours), 1e-30)


@contextmanager
def _put_together_in_files(directory: Path | None) -> Iterator[None]:
    """What transformers opens meanwhile goes into files in `directory`, as soon as it is put together, the stacked
    experts of a mixture of those of each expert; None: stays where it is."""
    from pipeline.layers.offload import offload_parameter
    from pipeline.models.unfilled import one_by_one, registering

    if directory is None:
        yield
    else:
        with one_by_one(), registering(lambda _, __, parameter: offload_parameter(parameter, directory)):
            yield


def _widen_experts(plain: Any, dtype: torch.dtype, offload_to: Path | None) -> None:
    """The experts of `plain` in `dtype`: those that were quantized it leaves in the dtype of their scales."""
    from pipeline.layers.experts import stacked_experts
    from pipeline.layers.offload import offload

    for module in stacked_experts(plain).values():
        for parameter in module.parameters():
            if parameter.dtype != dtype:
                wide = parameter.data.to(dtype) if offload_to is None else offload(parameter, offload_to, dtype)
                parameter.data = wide


def _round_experts(model: nn.Module) -> None:
    """Let packed experts multiply by the weights that transformers makes of them when it opens them: integers times
    scales, rounded to the dtype that the scales have now, where it unpacks other layers in that of the model."""
    from pipeline.layers.experts import linear_experts
    from pipeline.layers.quantized import quantized_layers

    mixtures = tuple(f"{name}." for name in linear_experts(model))
    for name, layer in quantized_layers(model).items():
        if name.startswith(mixtures):
            cast(Any, layer).forward = partial(_rounded_product, layer, layer.get_buffer("weight_scale").dtype)


def _rounded_product(layer: QuantizedLayer, dtype: torch.dtype, x: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.linear(x, layer.dequantized().to(dtype).to(x.dtype))


def _unpack_into_files(plain: Any, directory: Path) -> None:
    """What compressed-tensors does before the first forward pass of `plain`, but each weight goes into a file."""
    from pipeline.layers.offload import offload_module

    compressor = getattr(getattr(plain, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        from compressed_tensors.compressors import decompress_module
    for module in plain.modules():
        if compressor is not None:
            decompress_module(module, compressor.force_compression_format)
        offload_module(module, directory)
    if compressor is not None:
        compressor.remove_decompression_hook(plain)


def main(arguments: list[str]) -> int:
    """Print the receipt of the directory named first; 0 where it is good, 3 where it is not."""
    receipt = examine(*map(Path, arguments))
    print(json.dumps(asdict(receipt)))
    return 0 if receipt.ok else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
