"""Compiled blocks on fake tensors: the compiler's own program of a block runs, with kernels that do nothing.

torch.compile makes a Python program of a block and one of its backward pass, which make tensors, call operators and
fused kernels, and let tensors go (Ansel et al., 2024, "PyTorch 2", ASPLOS). Here the compiler does the same on fake
tensors, up to that program; building the kernels, most of the time, is left out, and so is what they would do. The
programs are those for a CPU, where a plan is a GPU's, too. A block that does not become one program runs as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, _functorch, _inductor
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensor, UnsupportedOperatorException
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from pipeline.errors import first_line
from pipeline.trainer.compiling import BACKEND

log = logging.getLogger(__name__)

Program = Callable[[list[Any]], Any]
"""Takes tensors out of a list of them, and gives what a graph gives."""


class Imitation:
    """A `Compiler` for functions that are called while modes count, which torch's takes for part of the function.

    `plain`: why a function runs as it is; empty where all are compiled.
    """

    def __init__(self) -> None:
        self.plain = ""

    def __call__(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        fast = torch.compile(plain, backend=BACKEND, fullgraph=True)

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                with _disable_current_modes():
                    return fast(*args, **kwargs)
            except TorchDynamoException as error:  # before anything of it has run
                self.plain = first_line(error)
                log.info("compiled blocks are taken for plain ones", exc_info=error)
            return plain(*args, **kwargs)

        return run


@contextmanager
def without_kernels() -> Iterator[None]:
    """What is compiled meanwhile, in either direction, runs on fake tensors, under the modes that are entered now."""
    from torch._inductor.graph import GraphLowering

    modes = _get_current_dispatch_mode_stack()

    def module(graph: Any) -> Any:
        text, _ = graph.codegen()
        program = _program(text.value, {**graph.constants, **graph.torchbind_constants})

        def call(given: list[Any]) -> Any:
            with _disable_current_modes(), ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode)
                return program(given)

        return SimpleNamespace(call=call, __file__=__file__)

    with (
        mock.patch.object(GraphLowering, "compile_to_module", module),
        _inductor.config.patch(fx_graph_cache=False),
        _functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def _program(text: str, constants: dict[str, Any]) -> Program:
    """The program of this text, on fake tensors and without its kernels."""
    from torch._inductor import async_compile

    scope = {"__name__": __name__, **constants}
    with mock.patch.object(async_compile, "AsyncCompile", _NoKernels):
        exec(text, scope)
    scope |= {
        # They are written in C++, for real tensors.
        "empty_strided_cpu": _empty,
        "reinterpret_tensor": torch.as_strided,
        "assert_size_stride": _nothing,
        "assert_alignment": _nothing,
        "extern_kernels": _Operators(scope["extern_kernels"]),
    }
    program: Program = scope["call"]
    return program


def _empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


def _nothing(*_: Any, **__: Any) -> None:
    pass


class _Operators:
    """Operators by name as a program calls them, which write into a tensor that is there. Where torch does not know
    such a one for fake tensors, as that of scaled products, it would take real ones of that size, and compute."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(self._real, name)

        def call(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
            if out is None:
                return operator(*args, **kwargs)
            assert isinstance(out, FakeTensor)
            unknown = suppress(UnsupportedOperatorException)
            with unknown, mock.patch.object(out.fake_mode, "allow_fallback_kernels", False):
                operator(*args, out=out, **kwargs)
            return out

        return call


class _NoKernels:
    """Stands for what builds kernels from their text."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: _nothing

    def wait(self, scope: dict[str, Any]) -> None:
        pass
