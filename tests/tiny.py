"""Models of each kind, small enough to be made anew for every test (in eval mode), and what they are given."""

import torch
from torch import nn
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from pipeline.compression.base import Context
from pipeline.models.architecture import describe


def opt(tied=True, **changes):
    """Two blocks of width 32, 64 tokens, no dropout."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
        "max_position_embeddings": 32, "word_embed_proj_dim": 32, "dropout": 0.0, "tie_word_embeddings": tied,
    }  # fmt: skip
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**{**sizes, **changes})).eval()


def llama(**changes):
    """Two blocks of width 32, 64 tokens."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def odd_llama(layers=1, **changes):
    """One of a width (48) and a feed-forward (80) that are no powers of two, with a head of its own."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": layers, "tie_word_embeddings": False}
    return llama(**{**sizes, **changes})


def mixtral(**changes):
    """Two blocks of width 32, 64 tokens, each with five experts of which two are chosen."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_local_experts": 5, "max_position_embeddings": 32,
    }  # fmt: skip
    return mixture(MixtralForCausalLM, MixtralConfig(**{**sizes, **changes}))


def mixture(cls, config):
    """Experts that differ, which those of a fresh model hardly do."""
    torch.manual_seed(0)
    model = cls(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 3:
            nn.init.normal_(parameter, std=0.2)
    return model


def fresh_efficientnet(**changes):
    """Two blocks, images of 16 x 16 in one channel, four classes."""
    sizes = {
        "image_size": 16, "num_channels": 1, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320,
        "in_channels": [32, 16], "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2],
        "num_block_repeats": [1, 1], "expand_ratios": [1, 6], "depthwise_padding": [], "num_labels": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    return EfficientNetForImageClassification(EfficientNetConfig(**{**sizes, **changes})).eval()


def efficientnet(**changes):
    """With larger weights: those of a fresh one are so small that outputs vanish."""
    model = fresh_efficientnet(**changes)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    return model


def context(model, stage="link", steps=0, batches=None):
    """What a link is given; `batches` are the calibration set."""
    return Context(
        stage=stage, architecture=describe(model), device="cpu", steps=steps, seed=0,
        calibration=None if batches is None else lambda: batches,
    )  # fmt: skip


def token_batches(count=4):
    """Calibration batches of four rows of 16 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (4, 16), generator=generator)} for _ in range(count)]


def uneven_batches():
    """Calibration batches of three rows and of two."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (size, 16), generator=generator)} for size in (3, 2)]


def image_batches():
    """Calibration batches of four images."""
    return [{"pixel_values": torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(n))} for n in range(3)]


def labelled_batch(model):
    """A batch with labels of the kind that `model` takes."""
    if isinstance(model, EfficientNetForImageClassification):
        return {"pixel_values": torch.randn(4, 1, 16, 16), "labels": torch.tensor([0, 1, 2, 3])}
    ids = torch.randint(0, 64, (2, 16))
    return {"input_ids": ids, "labels": ids}


def trained(model, steps=5):
    """`model` after some steps of AdamW on batches of noise."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**labelled_batch(model)).loss.backward()
        optimizer.step()
    return model
