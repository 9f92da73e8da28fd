"""A tiny GPT-2 in the Hugging Face Trainer, with energy, MFU and carbon of every step. The lines marked ``# +`` are all that this takes.

Made from a config and trained on made-up sequences: no download. At the end the emissions go into the model card::

    pip install -e ".[transformers]"
    python examples/hf_trainer.py --steps 60
    tensorboard --logdir runs/hf_trainer

On several GPUs, or two CPU processes: ``torchrun --nproc_per_node 2 examples/hf_trainer.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from huggingface_hub import metadata_load, metadata_save  # +
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from green_torch.transformers import GreenCallback  # +

VOCABULARY, LENGTH = 256, 64


def sequences(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Counting in steps of 1 to 8 from a random start, modulo the vocabulary: easy to learn."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(VOCABULARY, (n, 1), generator=generator)
    strides = torch.randint(1, 9, (n, 1), generator=generator)
    rows = (starts + strides * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    """Trains, prints what it took, and writes it into the model card."""
    parser = argparse.ArgumentParser(description="A tiny GPT-2 in the Hugging Face Trainer, with the energy of every step.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/hf_trainer"))
    args = parser.parse_args()

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    every = max(1, args.steps // 2)
    training_args = TrainingArguments(
        output_dir=str(args.log_dir),
        max_steps=args.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        report_to="tensorboard",
        use_cpu=not torch.cuda.is_available(),
    )
    green = GreenCallback(region="FR")  # +
    trainer = Trainer(
        GPT2LMHeadModel(config),
        training_args,
        train_dataset=sequences(2048, seed=0),
        eval_dataset=sequences(64, seed=1),
        callbacks=[green],  # +
    )
    trainer.train()

    if not trainer.is_world_process_zero():
        return
    print(green.summary())  # +
    trainer.create_model_card(model_name="counting-gpt2")
    card = args.log_dir / "README.md"
    metadata_save(card, {**metadata_load(card), "co2_eq_emissions": green.co2_eq_emissions("pre-training")})  # +
    print(f"\nThe model card: {card}\nSee it: tensorboard --logdir {args.log_dir}")


if __name__ == "__main__":
    main()
