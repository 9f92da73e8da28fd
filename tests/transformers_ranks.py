"""One of two ranks on CPUs that trains with the Hugging Face Trainer, for test_transformers.py; ``main([DIRECTORY])``.

Sequences are padded, each by another length, and the Trainer counts the tokens that are not padding.
"""

from __future__ import annotations

import torch
from transformers import Trainer, TrainingArguments

from green_torch.transformers import GreenCallback

N_SEQUENCES, BATCH, LENGTH = 12, 2, 8


class Model(torch.nn.Module):
    """A single weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"loss": self.layer(input_ids.float().unsqueeze(-1)).square().mean()}


def masks() -> list[torch.Tensor]:
    """Of 1, 2, ... tokens each, up to the length, and again from 1."""
    return [(torch.arange(LENGTH) <= number % LENGTH).long() for number in range(N_SEQUENCES)]


def main(options: list[str]) -> None:
    (directory,) = options
    ids = torch.ones(LENGTH, dtype=torch.long)
    arguments = TrainingArguments(
        output_dir=directory,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"input_ids": ids, "attention_mask": mask, "labels": ids} for mask in masks()]
    green = GreenCallback(meters=[], intensity=100.0, flops_per_step=1e6, log_every_n_steps=1)
    Trainer(Model(), arguments, train_dataset=data, callbacks=[green]).train()
    torch.distributed.destroy_process_group()
