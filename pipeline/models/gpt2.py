"""GPT-2 written as OPT: the same function of the same numbers, its projections as `nn.Linear`.

GPT-2 (Radford et al., 2019) keeps them in `Conv1D`, transposed and those of attention fused, which no quantization or
pruning tool reads. OPT (Zhang et al., 2022, arXiv:2205.01068) is the same transformer: pre-norm, learned positions (two
rows that are never looked up come first), a bias everywhere, an activation by name. What it cannot say is an epsilon
of the norms other than 1e-5, cross-attention, and dropout on the embeddings: the first two stay GPT-2, the last goes.
A scale of attention other than 1/sqrt(head size) goes into the queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.layers.offload import beside, own_copy
from pipeline.models.unfilled import on_meta

EPSILON = 1e-5
"""Of OPT's norms, which its config does not say."""
OFFSET = 2
"""Rows before OPT's first position."""


def rewritten(model: Any) -> PreTrainedModel:
    """`model` as OPT where it is a GPT-2 that can be one, its weights moved block by block; else as it is."""
    if type(model) is not GPT2LMHeadModel or not can_be_opt(model.config):
        return cast(PreTrainedModel, model)
    opt: Any = on_meta(OPTForCausalLM, opt_config(model.config))
    for name, tensor in _weights(model):
        owner, _, leaf = name.rpartition(".")
        setattr(opt.get_submodule(owner), leaf, nn.Parameter(tensor))
    opt.tie_weights()
    opt.generation_config = model.generation_config
    return cast(PreTrainedModel, opt.train(model.training))


def can_be_opt(config: PreTrainedConfig) -> bool:
    """Whether this is the config of a GPT-2 that OPT's can say."""
    return type(config) is GPT2Config and config.layer_norm_epsilon == EPSILON and not config.add_cross_attention


def opt_config(config: GPT2Config) -> OPTConfig:
    """The config of the same model as OPT."""
    return OPTConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.n_positions,
        hidden_size=config.n_embd,
        ffn_dim=4 * config.n_embd if config.n_inner is None else config.n_inner,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        activation_function=config.activation_function,
        dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
        init_std=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        pad_token_id=None,  # OPT would train no embedding of it
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        dtype=config.dtype,
    )


def _weights(model: GPT2LMHeadModel) -> Iterator[tuple[str, Tensor]]:
    """OPT's weights one by one. What GPT-2 held of a block is let go of after the block."""
    body: Any = model.transformer
    yield "model.decoder.embed_tokens.weight", body.wte.weight.detach()
    positions = body.wpe.weight.detach()
    before = positions.new_zeros(OFFSET, positions.shape[1])
    yield "model.decoder.embed_positions.weight", beside(torch.cat([before, positions]), positions)
    for number, block in enumerate(body.h):
        layer = f"model.decoder.layers.{number}."
        yield from _of(f"{layer}self_attn_layer_norm", block.ln_1)
        fused, attention = block.attn.c_attn, f"{layer}self_attn."
        scale = block.attn.scaling * block.attn.head_dim**0.5
        parts = zip(fused.weight.detach().chunk(3, dim=1), fused.bias.detach().chunk(3), strict=True)
        for projection, (weight, bias), by in zip(("q_proj", "k_proj", "v_proj"), parts, (scale, 1, 1), strict=True):
            yield f"{attention}{projection}.weight", _own(weight.t(), by)
            yield f"{attention}{projection}.bias", _own(bias, by)
        yield from _transposed(f"{attention}out_proj", block.attn.c_proj)
        yield from _of(f"{layer}final_layer_norm", block.ln_2)
        yield from _transposed(f"{layer}fc1", block.mlp.c_fc)
        yield from _transposed(f"{layer}fc2", block.mlp.c_proj)
        for module in block.modules():
            module._parameters.clear()
            module._buffers.clear()
    yield from _of("model.decoder.final_layer_norm", body.ln_f)
    yield "lm_head.weight", model.lm_head.weight.detach()


def _of(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for leaf, parameter in module.named_parameters():
        yield f"{name}.{leaf}", parameter.detach()


def _transposed(name: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", _own(module.weight.detach().t())
    yield f"{name}.bias", module.bias.detach()


def _own(tensor: Tensor, by: float = 1) -> Tensor:
    copied = own_copy(tensor)
    return copied if by == 1 else copied.mul_(by)
