"""2:4 weights on the sparse tensor cores of a GPU: which kernel is there and right, and how a layer runs by it.

Of each four weights along the inputs at most two are not zero (Mishra et al., 2021, arXiv:2104.08378). torch holds such
a weight compressed, half of its values and two bits for each of them that say where it was: 9/16 of the bytes in 16
bits. It has two kernels that multiply by it, cuSPARSELt's and CUTLASS's, each for the GPUs it was built for
(`torch.sparse.SparseSemiStructuredTensor`, which torch calls a prototype).

An opened artifact that is not to be trained has a `SparseLinear` for each 2:4 layer (`use_kernels`). On a device where
a kernel gave on a small layer what a dense product gives, the layer holds its weight compressed and runs by the
kernel. Elsewhere (a CPU, an older GPU, float32, sizes that no kernel takes) it is dense, and says why. Files, masks and
training know nothing of it.

Layers that were quantized after they were pruned run by the kernels of their scheme, as dense ones do, and reports say
so. What torch offers for int8 gives the sums as int8; its private operators can give them whole, but want a second copy
of the weights beside the one from which few tokens are decoded (`fused.py`).

The kernels have not been run on a GPU yet, and nothing is claimed of their speed. What is tested is all that leads to
their call: torch's own code down to its operators, in whose place the tests put products on the CPU.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from pipeline.layers.constants import constant
from pipeline.layers.fused import nearly
from pipeline.layers.schemes import replace
from pipeline.layers.sparsity import is_two_of_four

if TYPE_CHECKING:
    from typing_extensions import Self


class Kernel(NamedTuple):
    """A kernel's compressed form, and what the sizes of a weight [out, in] must be multiples of."""

    form: type[SparseSemiStructuredTensor]
    outputs: int
    inputs: int


KERNELS = {
    "cusparselt": Kernel(SparseSemiStructuredTensorCUSPARSELT, 16, 16),
    "cutlass": Kernel(SparseSemiStructuredTensorCUTLASS, 32, 64),
}
"""The first that works is taken, in the order in which torch prefers them."""
DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)
"""In float32 the kernels keep one weight of two, and round to TF32."""
TRAINED = "in training"


def choose(weight: Tensor) -> tuple[str | None, str]:
    """(the kernel that multiplies by `weight` [out, in] where it is, why there is none): one of them is empty."""
    if weight.device.type != DEVICE:
        return None, f"no 2:4 kernels on {weight.device.type}"
    if weight.ndim != 2:
        return None, "no 2:4 kernels for convolutions"
    if weight.dtype not in DTYPES:
        return None, f"no 2:4 kernels for {str(weight.dtype).removeprefix('torch.')}"
    if not is_two_of_four(weight):
        return None, "not 2:4"
    why = []
    for name, kernel in KERNELS.items():
        outputs, inputs = weight.shape
        if outputs % kernel.outputs or inputs % kernel.inputs:
            why.append(f"{name} takes multiples of {kernel.outputs} x {kernel.inputs}, not {outputs} x {inputs}")
        elif said := refusal(name, weight.device, weight.dtype):
            why.append(f"{name}: {said}")
        else:
            return name, ""
    return None, "; ".join(why)


def said_of(weight: Tensor) -> str:
    """What reports say of a layer with this weight."""
    return _said(*choose(weight))


def _said(name: str | None, why: str) -> str:
    return f"2:4 {name}" if name else f"dense, {why}"


@constant
def refusal(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why `kernel` is not used on `device`; empty where it gives what a dense product gives, with a bias and without,
    for one token, three and a hundred, and gives its weight back to the bit. Whatever goes wrong counts as no.
    """
    weight, bias, x = small_layer(dtype)
    want = F.linear(x.double(), weight.double())
    try:
        with torch.autocast(device.type, enabled=False):
            form = compress(weight.to(device), kernel)
            back = decompress(form).cpu()
            found = [multiply(x[:tokens].to(device), form, None).cpu() for tokens in (1, 3, 100)]
            biased = multiply(x.to(device), form, bias.to(device)).cpu()
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
    right = nearly(torch.cat(found), torch.cat((want[:1], want[:3], want)).to(dtype))
    right = right and nearly(biased, (want + bias.double()).to(dtype))
    return "" if right and torch.equal(back, weight) else "wrong results"


def small_layer(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A 2:4 weight [64, 128] with each way to keep two or fewer of four, its bias, and a hundred tokens; on the CPU."""
    places = torch.arange(64 * 128, dtype=torch.float64)
    two = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (0,), (1,), (2,), (3,), ()]
    kept = torch.tensor([[place in pair for place in range(4)] for pair in two])
    mask = kept[torch.arange(64 * 32) % len(two)].view(64, 128)
    weight = places.mul(0.7).sin().view(64, 128) * mask
    x = torch.arange(100 * 128, dtype=torch.float64).mul(1.3).cos().view(100, 128)
    return weight.to(dtype), places[:64].cos().to(dtype), x.to(dtype)


def compress(weight: Tensor, kernel: str) -> SparseSemiStructuredTensor:
    """The form in which `kernel` reads `weight` [out, in], which is 2:4.

    Raises:
        RuntimeError: the kernel does not take this device, dtype or shape.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor", category=UserWarning)
        return KERNELS[kernel].form.from_dense(weight.detach().contiguous())


@torch.no_grad()
def decompress(form: SparseSemiStructuredTensor) -> Tensor:
    """The weight [out, in] that `form` holds."""
    with torch.autocast(form.device.type, enabled=False):
        return cast(Tensor, form.to_dense())  # type: ignore[no-untyped-call]


def multiply(x: Tensor, form: SparseSemiStructuredTensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times the weight that `form` holds, plus the bias [out]: [..., out].

    torch adds rows of zeros to make the tokens a multiple of what the kernel takes. Rows of x must lie one behind
    another: cuSPARSELt is told nothing of their distance. It may leave the result lying the other way round.
    """
    rows = F.linear(x.reshape(-1, x.shape[-1]).contiguous(), form, bias)
    return rows.contiguous().view(*x.shape[:-1], -1)


class SparseLinear(nn.Linear):
    """An nn.Linear with a 2:4 weight: in eval mode compressed where a kernel multiplies by it, else dense.

    A compressed layer has no `weight`. `dense()` is the weight it stands for, as which it is saved, copied, cast and
    moved; on another device it may have another kernel or none. In train mode, and where the weight has a gradient to
    take, the layer is dense: what `model.train()` makes of it can be trained.
    """

    form: SparseSemiStructuredTensor | None = None
    """The compressed weight; None where the layer is dense."""
    _kernel: str | None = None
    _why = TRAINED

    @classmethod
    def over(cls, linear: nn.Linear) -> Self:
        """In place of `linear`, with its tensors."""
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    @property
    def kernel(self) -> str:
        """Name of what runs the layer's products; where it is dense, why."""
        return _said(self._kernel, self._why)

    def dense(self) -> Tensor:
        """The weight [out, in]; made anew where the layer is compressed."""
        return self.weight if self.form is None else decompress(self.form)

    def forward(self, x: Tensor) -> Tensor:
        form = self.form
        if form is None:
            return F.linear(x, self.weight, self.bias)
        return multiply(x, form, self.bias) if self._takes(x, form) else F.linear(x, decompress(form), self.bias)

    def _takes(self, x: Tensor, form: SparseSemiStructuredTensor) -> bool:
        """Whether the kernel can multiply x: no gradient is wanted, and nothing is cast on the way."""
        device = form.device.type
        tensors = (x,) if self.bias is None else (x, self.bias)
        return (
            x.numel() > 0
            and all(tensor.dtype == form.dtype for tensor in tensors)
            and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
            and not (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != form.dtype)
        )

    def _compress(self) -> None:
        """Hold the weight compressed where that is wanted and there is a kernel for it."""
        trained = self.training or self.weight.requires_grad
        self._kernel, self._why = (None, TRAINED) if trained else choose(self.weight)
        if self._kernel is not None:
            self.form = compress(self.weight, self._kernel)
            self._parameters["weight"] = None

    def _decompress(self) -> None:
        if self.form is not None:
            self._parameters["weight"] = nn.Parameter(decompress(self.form), requires_grad=False)
            self.form, self._kernel, self._why = None, None, TRAINED

    def train(self, mode: bool = True) -> Self:
        changed = mode != self.training
        super().train(mode)
        if changed and mode:
            self._decompress()
        elif changed:
            self._compress()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        form = self.form
        if form is not None:
            like = fn(torch.empty(0, dtype=form.dtype, device=form.device))
            if (like.dtype, like.device) != (form.dtype, form.device):
                self._decompress()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.form is None:
            self._compress()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.form is not None:
            destination[f"{prefix}weight"] = self.dense()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._decompress()
        super()._load_from_state_dict(*args, **kwargs)
        self._compress()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if state.pop("form", None) is not None:
            weight = nn.Parameter(self.dense(), requires_grad=False)
            state["_parameters"] = {**self._parameters, "weight": weight}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compress()


def use_kernels(model: nn.Module, layers: Iterable[str]) -> nn.Module:
    """`model` with a `SparseLinear` for each of the named `layers` that is 2:4, in place.

    Convolutions, and a layer whose weight is another's too, stay as they are.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name in layers:
        layer = model.get_submodule(name)
        if type(layer) is nn.Linear and uses[id(layer.weight)] == 1 and is_two_of_four(layer.weight):
            replace(model, name, SparseLinear.over(layer))
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Every layer of `model` that `use_kernels` made, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def compressed_weights(model: nn.Module) -> Iterator[Tensor]:
    """Weights that are no parameters of `model` because layers hold them compressed, made dense one by one."""
    return (layer.dense() for layer in sparse_layers(model).values() if layer.form is not None)
