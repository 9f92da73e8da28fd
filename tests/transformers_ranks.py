"""Processes on CPUs that train with the Hugging Face Trainer, for test_transformers.py.

``main([DIRECTORY])`` is one of two ranks. Sequences are padded, each by another length, and the Trainer counts the tokens that are not
padding. ``main([DIRECTORY, HOOK])`` is a process alone that is told to go (SIGTERM) in that hook of step 3, by a Trainer that saves then;
``main([DIRECTORY, "resume"])`` goes on from there.
"""

from __future__ import annotations

import os
import signal
import time

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from green_torch.transformers import GreenCallback

N_SEQUENCES, BATCH, LENGTH = 12, 2, 8
PLAIN = {
    "per_device_train_batch_size": BATCH,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


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


class Preempted(TrainerCallback):
    """SIGTERM in a hook of step 3, and time for the Trainer's handler to take note of it."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._strike)

    def _strike(self, _args, state, _control, **_named):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.manager.is_checkpoint_requested:
                time.sleep(0.01)


def alone(directory: str, hook: str) -> None:
    ids = torch.ones(LENGTH, dtype=torch.long)
    arguments = TrainingArguments(
        output_dir=directory,
        max_steps=5,
        enable_jit_checkpoint=True,
        **PLAIN,
    )
    green = GreenCallback(meters=[], intensity=100.0, flops_per_step=1e6, log_every_n_steps=1)
    resumes = hook == "resume"
    preempted = Preempted(hook)
    data = [{"input_ids": ids, "labels": ids}] * N_SEQUENCES
    trainer = Trainer(Model(), arguments, train_dataset=data, callbacks=[green] if resumes else [preempted, green])
    (theirs,) = (one for one in trainer.callback_handler.callbacks if type(one).__name__ == "JITCheckpointCallback")
    theirs.jit_manager.kill_wait = 0.0  # s; three otherwise
    preempted.manager = theirs.jit_manager
    trainer.train(resume_from_checkpoint=resumes)


def main(options: list[str]) -> None:
    if len(options) > 1:
        alone(*options)
        return
    (directory,) = options
    ids = torch.ones(LENGTH, dtype=torch.long)
    arguments = TrainingArguments(
        output_dir=directory,
        num_train_epochs=1,
        include_num_input_tokens_seen="non_padding",
        **PLAIN,
    )
    data = [{"input_ids": ids, "attention_mask": mask, "labels": ids} for mask in masks()]
    green = GreenCallback(meters=[], intensity=100.0, flops_per_step=1e6, log_every_n_steps=1)
    Trainer(Model(), arguments, train_dataset=data, callbacks=[green]).train()
    torch.distributed.destroy_process_group()
