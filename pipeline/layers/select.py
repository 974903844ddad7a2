"""Which layers of a model a method touches, which it leaves in float and why, and what is wrong with such a choice."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from pipeline.errors import did_you_mean
from pipeline.layers.experts import routers, split, stacked_experts
from pipeline.layers.pattern import parse_pattern
from pipeline.layers.quantized import quantized_layers
from pipeline.models.base import Architecture

WRITTEN_OUT = frozenset({"FalconLinear"})
"""Linear layers of models whose own forward pass is nn.Linear's, written out."""


@dataclass(frozen=True)
class Selection:
    """Names of layers a method works on, and of those of the same kind that it leaves, with the reason."""

    layers: tuple[str, ...]
    left_in_float: dict[str, str] = field(default_factory=dict)


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` (fnmatch) is for the module `name`: by whole name or last component, its own or a parent's."""
    parts = name.split(".")
    parents = (".".join(parts[: end + 1]) for end in range(len(parts)))
    return any(fnmatchcase(parent, pattern) or fnmatchcase(parent.rpartition(".")[2], pattern) for parent in parents)


def split_experts(model: nn.Module, ignore: Iterable[str] = ()) -> nn.Module:
    """`model` with the experts of its mixtures as linear layers, in place, block by block; but for those that a pattern
    of `ignore` names as a whole."""
    patterns = tuple(ignore)
    for name in stacked_experts(model):
        if not any(matches(name, pattern) for pattern in patterns):
            split(model, name)
    return model


def select(
    model: nn.Module, architecture: Architecture, ignore: Iterable[str] = (), types: tuple[type[nn.Module], ...] = ()
) -> Selection:
    """Layers of `types` (nn.Linear and nn.Conv2d where none are given) that a method works on.

    Left alone: what `ignore` names; a layer whose weight is an embedding's; the vocabulary projection of a language
    model, tied or not, as llm-compressor leaves it (a classifier's head is worked on); a layer whose weight is computed
    from other parameters (weight norm, parametrizations); an embedding that is tied, renormalises its rows, or looks
    them up in a way of its own; a layer with a forward pass of its own; what chooses among experts; what the module
    around it reads by itself; matrices of modules of another kind (experts in one tensor, the `Conv1D` of GPT-1,
    convolutions over time).
    """
    types = types or (nn.Linear, nn.Conv2d)
    embedded = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    vocabulary = _vocabulary(model, architecture)
    tied = {name: group for group in architecture.tied for name in group}
    routing, read = routers(model), read_by_parents(model)
    layers: list[str] = []
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, types):
            left |= {f"{name}.{leaf}": _unknown(module) for leaf in _matrices(module)}
            continue
        pattern = next((p for p in ignore if matches(name, p)), None)
        if pattern is not None:
            left[name] = f"ignored by '{pattern}'"
        elif not isinstance(module._parameters.get("weight"), nn.Parameter):
            left[name] = "its weight is computed from others, as by weight norm"
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            reason = _embedding_stays(module, name, tied)
            if reason is None:
                layers.append(name)
            else:
                left[name] = reason
        elif id(module.weight) in embedded:
            left[name] = f"tied to the embedding {embedded[id(module.weight)]}"
        elif _computes_otherwise(module):
            left[name] = f"{type(module).__name__} computes in its own way"
        elif name in routing:
            left[name] = "chooses among experts"
        elif name in read:
            left[name] = f"{read[name]} reads its weight by itself"
        elif name == vocabulary:
            left[name] = "projects to the vocabulary"
        else:
            layers.append(name)
    return Selection(tuple(layers), left)


def _vocabulary(model: nn.Module, architecture: Architecture) -> str | None:
    """Name of the projection to the vocabulary; None where the head is a classifier's, which may have embeddings too:
    of places, as CLIP has, or of words."""
    if architecture.head is None or not architecture.embeddings:
        return None
    head = model.get_submodule(architecture.head)
    output = getattr(model, "get_output_embeddings", None)
    if output is not None:
        return architecture.head if output() is head else None
    words = {model.get_submodule(name).num_embeddings for name in architecture.embeddings}
    return architecture.head if getattr(head, "out_features", None) in words else None


def read_by_parents(model: nn.Module) -> dict[str, str]:
    """{layer: class of the module around it} of layers whose weight that reads by itself.

    What it computes with it without a call transformers says of its classes, since accelerate's hooks must know as
    well. Else it asks for the data type, to which it casts what the layer is given: integers, of a quantized layer.
    """
    found: dict[str, str] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        function: Any = type(module).forward
        while function is not None:
            names = getattr(getattr(function, "__code__", None), "co_freevars", ())
            held = dict(zip(names, getattr(function, "__closure__", None) or (), strict=True))
            if "child_module_names" in held:  # of its `force_accelerate_hooks`
                children = held["child_module_names"].cell_contents
                found |= {f"{name}.{child}" if name else child: type(module).__name__ for child in children}
            function = getattr(function, "__wrapped__", None)
        for child in read_in(type(module).forward):
            inner = f"{name}.{child}" if name else child
            if inner in modules:
                found[inner] = type(module).__name__
    return found


@functools.cache
def read_in(forward: Callable[..., Any]) -> frozenset[str]:
    """Modules X, or X.Y (a ViT's patches), whose `self.X.weight` the method reads each time: Bloom's does within an
    `if` alone, which asks for what tensor parallelism was in training."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
        (function,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):  # there is no source to be had
        return frozenset()
    return frozenset(_read_in([function]))


def _read_in(nodes: Iterable[ast.AST]) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        match node:
            case ast.If(test, one, other):
                found |= _read_in([test]) | (_read_in(one) & _read_in(other))
                continue
            case ast.IfExp(test, one, other):
                found |= _read_in([test]) | (_read_in([one]) & _read_in([other]))
                continue
            case ast.Attribute(attr="weight", value=ast.Attribute() as owner) if path := _path(owner):
                found.add(path)
        found |= _read_in(ast.iter_child_nodes(node))
    return found


def _path(node: ast.expr) -> str:
    """X.Y of `self.X.Y`; empty where it is anything else."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=child):
            return child
        case ast.Attribute(value=ast.Attribute() as owner, attr=child) if around := _path(owner):
            return f"{around}.{child}"
    return ""


def _matrices(module: nn.Module) -> list[str]:
    """The module's own parameters that are matrices, or several in one, but for a known layer's."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | nn.EmbeddingBag):
        return []
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1]


def _computes_otherwise(module: nn.Module) -> bool:
    """Whether a model has made something else of a linear layer or a convolution, as Llama 4 has of its router."""
    kind = type(module)
    plain = kind.__module__.startswith("pipeline.") or kind.__name__ in WRITTEN_OUT
    return not plain and kind.forward not in (nn.Linear.forward, nn.Conv2d.forward)


def _unknown(module: nn.Module) -> str:
    return f"weights of {type(module).__name__}, which is no layer that is known"


def _embedding_stays(
    module: nn.Embedding | nn.EmbeddingBag, name: str, tied: Mapping[str, Sequence[str]]
) -> str | None:
    """Why an embedding stays in float; None where it can be quantized."""
    plain = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
    weight = f"{name}.weight"
    if weight in tied:
        return f"tied to {', '.join(other for other in tied[weight] if other != weight)}"
    if type(module).forward is not plain.forward:
        return f"{type(module).__name__} looks up in its own way"
    return "renormalises its rows (max_norm)" if module.max_norm is not None else None


def quantized_problems(model: nn.Module, key: str) -> list[str]:
    """A message where `model` is quantized: its weights can be neither trained nor changed."""
    quantized = quantized_layers(model)
    if not quantized:
        return []
    scheme = next(iter(quantized.values())).scheme
    return [f"{key}: the model is quantized already ({scheme}, {len(quantized)} layers); start from a float one"]


def ignore_problems(model: nn.Module, ignore: Iterable[str], key: str) -> list[str]:
    """A message for each pattern that names no module."""
    names = [name for name, _ in model.named_modules() if name]
    words = {*names, *(name.rpartition(".")[2] for name in names)}
    return [
        f"{key}.ignore={pattern}: no module of the model is called so{did_you_mean(pattern, words)}"
        for pattern in ignore
        if not any(matches(name, pattern) for name in names)
    ]


def selection_problems(
    model: nn.Module,
    architecture: Architecture,
    ignore: Iterable[str],
    key: str,
    types: tuple[type[nn.Module], ...] = (),
) -> list[str]:
    """What is wrong with working on `model`: quantized already, a pattern that names nothing, no layer left.

    `key` is the link's, `compression.<stage>`.
    """
    if told := quantized_problems(model, key):
        return told
    problems = ignore_problems(model, ignore, key)
    ignore = tuple(ignore)
    if not problems and not select(model, architecture, ignore, types).layers:
        without = len(select(model, architecture, (), types).layers)
        if without:
            said = f"[{','.join(ignore)}]"
            return [f"{key}.ignore={said}: no layer is left to work on; without it there are {without}"]
        kinds = ", ".join(cls.__name__ for cls in types or (nn.Linear, nn.Conv2d))
        unknown = dict.fromkeys(type(module).__name__ for module in model.modules() if _matrices(module))
        instead = f"; the matrices of this model are those of {', '.join(unknown)}" if unknown else ""
        problems.append(
            f"{key}: no layer to work on; it knows {kinds}, and leaves embeddings, the vocabulary and `ignore`{instead}"
        )
    return problems


def group_problems(model: nn.Module, layers: Iterable[str], group_size: int, key: str) -> list[str]:
    """One message for the linear layers whose inputs `group_size` does not divide, with sizes that divide them all."""
    inputs = {
        name: m.weight.shape[1]
        for name in layers
        if isinstance(m := model.get_submodule(name), nn.Linear | nn.Embedding | nn.EmbeddingBag)
    }
    wrong = {name: size for name, size in inputs.items() if size % group_size}
    if not wrong:
        return []
    common = math.gcd(*inputs.values())
    choices = [size for size in (16, 32, 64, 128, 256) if common % size == 0] or [
        size for size in range(2, common + 1) if common % size == 0
    ]
    shown = ", ".join(f"{name} ({size})" for name, size in list(wrong.items())[:3])
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    fix = f"choose one of {', '.join(map(str, choices))}" if choices else "leave these layers out with `ignore`"
    return [f"{key}.group_size={group_size} does not divide the inputs of {shown}{more}; {fix}"]


def pattern_problems(model: nn.Module, layers: Iterable[str], pattern: str, key: str) -> list[str]:
    """One message for the layers whose inputs (a convolution's: flattened kernels) M of N:M does not divide."""
    _, block = parse_pattern(pattern)
    inputs = {name: model.get_submodule(name).get_parameter("weight")[0].numel() for name in layers}
    wrong = {name: size for name, size in inputs.items() if size % block}
    if not wrong:
        return []
    shown = ", ".join(f"{name} ({size})" for name, size in list(wrong.items())[:3])
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return [
        f"{key}.pattern={pattern}: {block} does not divide the inputs of {shown}{more}; "
        "choose another pattern, or leave these layers out with `ignore`"
    ]
