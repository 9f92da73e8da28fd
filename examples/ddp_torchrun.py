"""DistributedDataParallel under torchrun: each rank meters its own GPU, a node's CPU once, and rank zero shows the job's sums.

A small network guesses the next byte of Python's standard library from the 32 before it: no download, and gloo where there is no GPU::

    torchrun --standalone --nproc-per-node 2 examples/ddp_torchrun.py --steps 200
    tensorboard --logdir runs/ddp_torchrun

Run it again and it goes on from its checkpoint, as the same run: the tracker's state is in it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import green_torch

CONTEXT, BATCH = 32, 128


def main() -> None:
    """Trains, then prints on rank zero what all ranks took."""
    parser = argparse.ArgumentParser(description="DDP, with energy, MFU and carbon of all ranks together.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/ddp_torchrun"))
    args = parser.parse_args()

    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank()

    files = sorted(Path(os.__file__).parent.glob("*.py"))
    data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(rank)  # each rank draws batches of its own

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 64), nn.Flatten(), nn.Linear(64 * CONTEXT, 512), nn.GELU(), nn.Linear(512, 256)).to(
        device
    )
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)

    tracker = green_torch.track(model, log_dir=args.log_dir, region="FR", log_every_n_steps=1)
    checkpoint = args.log_dir / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        tracker.load_state_dict(saved["green"])  # on every rank: same run, and steps count on

    with tracker:
        for step in range(tracker.last_step + 1, tracker.last_step + 1 + args.steps):
            starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
            windows = data[starts + torch.arange(CONTEXT + 1)].long().to(device)
            loss = functional.cross_entropy(parallel(windows[:, :-1]), windows[:, -1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.step(samples=BATCH)  # this rank's; rank zero adds them up
            if tracker.writer is not None:  # writes on rank zero alone
                tracker.writer.add_scalar("loss", loss.item(), step)

        if rank == 0:
            with tracker.phase("save"):
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "green": tracker.state_dict()}
                torch.save(state, checkpoint)

    if rank == 0:
        print(tracker.summary())
        print(f"\nSee it: tensorboard --logdir {args.log_dir}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
