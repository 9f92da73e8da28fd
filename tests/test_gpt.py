"""Tests of the built-in workload: the model's arithmetic, its data, and that it learns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from green_torch.errors import ArgumentError
from green_torch.experiment import Variant
from green_torch.gpt import GPT, SIZES, GPTConfig, byte_batches, next_byte_loss, workload

TINY = GPTConfig(layers=2, heads=2, width=16, block_size=16)


class TestModel:
    """The transformer."""

    def test_flops_of_gpt2(self):
        """The 124M size takes GPT-2's 7,001,333,563,392 model FLOPs a step of 8 x 1024 tokens (attention in full)."""
        size = SIZES["124M"]
        with torch.device("meta"):
            model = GPT(size.config)
            batch = torch.zeros(size.batch_size, size.config.block_size + 1, dtype=torch.int64)
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            next_byte_loss(model, batch).backward()
        assert counter.get_total_flops() == 7_001_333_563_392

    @pytest.mark.parametrize(("size", "parameters"), [("1M", 0.8e6), ("10M", 10.8e6), ("124M", 124e6)])
    def test_sizes(self, size, parameters):
        """Each size has about the parameters that its name says."""
        with torch.device("meta"):
            model = GPT(SIZES[size].config)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.1)

    def test_starts_knowing_nothing(self):
        """Before training, each of the 256 bytes is as likely as any other: a loss of ln 256."""
        torch.manual_seed(0)
        loss = next_byte_loss(GPT(TINY), next(byte_batches(0, 4, TINY.block_size)))
        assert loss.item() == pytest.approx(math.log(256), rel=0.01)

    def test_causal(self):
        """A later byte changes no earlier prediction."""
        torch.manual_seed(0)
        model = GPT(TINY)
        tokens = torch.randint(256, (1, 16))
        changed = tokens.clone()
        changed[0, 10:] = (changed[0, 10:] + 1) % 256
        before, after = model(tokens), model(changed)
        torch.testing.assert_close(before[:, :10], after[:, :10])
        assert not torch.allclose(before[:, 10:], after[:, 10:])

    def test_no_biases_and_a_tied_head(self):
        """Linear layers have no bias, and the head is the embedding: no parameter of its own."""
        names = [name for name, _ in GPT(TINY).named_parameters()]
        assert [name for name in names if name.endswith("bias") and "norm" not in name] == []
        assert not any("head" in name for name in names)

    @pytest.mark.parametrize("more", [{"heads": 3}, {"layers": 0}, {"block_size": -1}])
    def test_impossible_shapes(self, more):
        """Widths that heads don't divide, and sizes below one, are refused."""
        shape = {"layers": 1, "heads": 2, "width": 16, "block_size": 8} | more
        with pytest.raises(ArgumentError, match="GPT needs"):
            GPTConfig(**shape)


class TestData:
    """Bytes of the standard library."""

    def test_same_seed_same_data(self):
        """A seed gives the same batches in the same order; another gives others."""
        first, again, other = (list(itertools.islice(byte_batches(seed, 3, 32), 4)) for seed in (1, 1, 2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert first[0].shape == (3, 33)
        assert first[0].dtype is torch.int64

    def test_it_is_python(self):
        """The passages are ASCII text with Python's words in it."""
        batch = next(byte_batches(0, 16, 512))
        text = bytes(batch.flatten().tolist()).decode("ascii", errors="replace")
        assert text.count("�") < len(text) / 100
        assert "def " in text
        assert "self" in text


class TestWorkload:
    """What ``compare`` is given."""

    def test_learns(self):
        """A few steps on a small model bring the loss well below that of guessing."""
        torch.manual_seed(0)
        work = workload(Variant("plain", batch_size=8), device="cpu", size="1M")
        model = GPT(TINY)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for batch in itertools.islice(work.batches(0), 40):
            loss = work.loss(model, batch[:, :17])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 1

    def test_auto_on_a_cpu(self):
        """On a CPU the small model is chosen, and a batch's units are its predictions and passages."""
        work = workload(Variant("plain"), device="cpu")
        assert work.model.config == SIZES["1M"].config
        assert work.units(next(iter(work.batches(0)))) == {"tokens": 4 * 128, "samples": 4}
        assert isinstance(work.optimizer(work.model.parameters()), torch.optim.Optimizer)

    def test_batch_size_of_the_variant(self):
        """A variant's own batch size wins."""
        work = workload(Variant("wide", batch_size=2), device="cpu")
        assert next(iter(work.batches(0))).shape == (2, 129)

    def test_unknown_size(self):
        """A size that is not there lists those that are."""
        with pytest.raises(ArgumentError, match="1M, 10M, 124M, 350M and auto"):
            workload(Variant("plain"), device="cpu", size="7B")
