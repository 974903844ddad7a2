"""A tiny transformer on one batch that it can learn by heart, trained through a real Lightning Trainer."""

import lightning.pytorch as lightning
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTForCausalLM

VOCABULARY, LENGTH, BATCH = 32, 16, 4


class Module(lightning.LightningModule):
    def __init__(self, model, optimizer):
        super().__init__()
        self.model, self.optimizer = model, optimizer
        self.losses, self.seen = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"])
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.model.parameters())


@pytest.fixture
def make_model():
    def make(**settings):
        torch.manual_seed(0)
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=LENGTH, activation_function="gelu", dropout=0.0,
                pad_token_id=None, bos_token_id=None, eos_token_id=None, **settings,
            )
        )  # fmt: skip

    return make


@pytest.fixture
def make_loader():
    def make(batches):
        generator = torch.Generator().manual_seed(1)
        samples = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
        return DataLoader([{"input_ids": sample} for sample in samples] * batches, batch_size=BATCH)

    return make


@pytest.fixture
def make_trainer(tmp_path):
    def make(steps, plugin, **settings):
        settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False} | settings
        return lightning.Trainer(
            max_steps=steps, plugins=[plugin], enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, **settings,
        )  # fmt: skip

    return make


@pytest.fixture
def train(make_model, make_loader, make_trainer):
    """(steps, plugin, optimizer, model=, callbacks=, ...) -> the module after training, its trainer beside it."""

    def run(steps, plugin, optimizer, model=None, ckpt_path=None, **settings):
        module = Module(model or make_model(), optimizer)
        trainer = make_trainer(steps, plugin, **settings)
        trainer.fit(
            module, make_loader(steps * trainer.accumulate_grad_batches), ckpt_path=ckpt_path, weights_only=True
        )
        return module, trainer

    return run
