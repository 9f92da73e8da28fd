"""Tests of a LightningModule as a workload, without a Trainer, against a real Trainer."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from green_torch.errors import ArgumentError
from green_torch.experiment import Variant, Workload
from green_torch.experiment.applied import CACHE_VARIABLE, CannotRunError, applied
from green_torch.experiment.worker import Order, Warm
from tests import tiny_attention
from tests.test_experiment import blocks_of, script, serve
from tests.test_experiment_variants import compiles

QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Module(pytorch_lightning.LightningModule):
    """A regression that logs, with a learning rate that falls at each step."""

    def __init__(self, configured=None):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.configured = configured

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch["x"]) - batch["y"]).square().mean()
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        if self.configured is not None:
            return self.configured(self)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        self.made = optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rows(n=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    return [{"x": one, "y": one.sum(1, keepdim=True)} for one in x.split(2)]


class Jittered(list):
    """Data that Python's generator augments."""

    def __iter__(self):
        return ({**one, "x": one["x"] + random.random()} for one in super().__iter__())


class TestLightning:
    """A LightningModule without a Trainer."""

    def test_augmentation_is_seeded(self):
        """An epoch of a seed is the same one, also where Python's generator augments it."""
        work = Workload.from_lightning(Module(), Jittered(rows()), trainer={"accelerator": "cpu"})
        first, second = ([batch["x"] for batch in work.batches(5)] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_trains_as_its_trainer_would(self):
        """The same losses, weights and learning rate as under a real Trainer with accumulation and clipping."""
        arguments = {
            "accelerator": "cpu",
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.5,
            "logger": False,
            "max_epochs": 1,
        }
        torch.manual_seed(0)
        module = Module()
        work = Workload.from_lightning(module, rows(), trainer=arguments)
        trainee = applied(Variant("a"), work, 0)
        steps = [trainee.train() for _ in range(3)]
        assert steps[-1][1] == {"samples": 4}
        torch.manual_seed(0)
        reference = Module()
        pytorch_lightning.Trainer(**arguments, **QUIET).fit(reference, DataLoader(rows(), batch_size=None))
        torch.testing.assert_close(module.layer.weight, reference.layer.weight)
        assert (
            module.made.param_groups[0]["lr"] == pytest.approx(0.1 / 8) == pytest.approx(reference.made.param_groups[0]["lr"])
        )

    @pytest.mark.parametrize("limit", [None, 4, 0.67])
    @pytest.mark.parametrize("frequency", [1, 2])
    def test_epochs(self, limit, frequency):
        """A scheduler by the epoch, and batches numbered within it: the same weights and learning rate as after three of a Trainer's epochs."""

        class Numbered(Module):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx)["loss"] * (1 + batch_idx)

        def configured(module):
            module.made = torch.optim.SGD(module.parameters(), lr=0.01)
            falling = torch.optim.lr_scheduler.StepLR(module.made, 1, gamma=0.5)
            return {"optimizer": module.made, "lr_scheduler": {"scheduler": falling, "frequency": frequency}}

        arguments = {"accelerator": "cpu", "limit_train_batches": limit, "max_epochs": 3, "logger": False}
        torch.manual_seed(0)
        module = Numbered(configured)
        trainee = applied(Variant("a"), Workload.from_lightning(module, rows(), trainer=arguments), 0)
        for _ in range(3 * (4 if limit else 6)):
            trainee.train()
        torch.manual_seed(0)
        reference = Numbered(configured)
        pytorch_lightning.Trainer(**arguments, **QUIET).fit(reference, DataLoader(rows(), batch_size=None))
        torch.testing.assert_close(module.layer.weight, reference.layer.weight)
        trainee.train()  # the next epoch begins, so the scheduler has had the end of the last one
        assert module.made.param_groups[0]["lr"] == pytest.approx(reference.made.param_groups[0]["lr"])

    def test_a_datamodule_and_a_run(self):
        """A datamodule serves as well; the run is named after the module, and its FLOPs are counted."""

        class Data(pytorch_lightning.LightningDataModule):
            def setup(self, stage):
                self.rows = rows()

            def train_dataloader(self):
                return self.rows

        def build(_):
            work = Workload.from_lightning(Module(), Data(), trainer={"accelerator": "cpu"})
            return replace(work, loss=lambda model, batch: (clock.advance(0.1), work.loss(model, batch))[1])

        _, track = script()
        clock = track["clock"]
        replies = serve(Variant("a"), [Order(0, 0, 8)], build=build, track=track)
        (block,) = blocks_of(replies)
        assert block.samples == 16
        assert block.model_flops > 0
        assert replies[-1].summary.manifest.model == "Module"

    @pytest.mark.parametrize(
        ("trainer", "match"),
        [
            ({"precision": "bf16-mixed"}, "the variant sets the precision"),
            ({"strategy": "fsdp"}, "in one process on one device"),
            ({"devices": 4}, "green-torch compare runs/a runs/b"),
            ({"num_nodes": 2}, "in one process on one device"),
            ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "clipped by their norm"),
            ({"callbacks": [pytorch_lightning.callbacks.StochasticWeightAveraging(1e-3)]}, "no Trainer to call their hooks"),
            ({"overfit_batches": 2}, "nothing here knows what it does"),
            ({"limit_train_batches": 0}, "leaves nothing"),
            ({"limit_train_batches": 1.5}, "leaves nothing"),
            ({"accelerator": "gpu"}, "no accelerator"),
        ],
    )
    def test_arguments_that_are_not_covered(self, trainer, match):
        """They would change the training, so they are refused by name."""
        with pytest.raises(ArgumentError, match=match):
            Workload.from_lightning(Module(), rows(), trainer=trainer)

    def test_callbacks_that_watch(self):
        """Those that change nothing about the training are passed over."""
        watching = [pytorch_lightning.callbacks.LearningRateMonitor(), pytorch_lightning.callbacks.ModelCheckpoint()]
        for callbacks in (watching, watching[0], []):
            work = Workload.from_lightning(Module(), rows(), trainer={"accelerator": "cpu", "callbacks": callbacks})
            assert applied(Variant("a"), work, 0).train()[0] > 0

    def test_a_share_of_no_length(self):
        """A share of the batches needs to know how many there are."""
        work = Workload.from_lightning(Module(), iter(rows()), trainer={"accelerator": "cpu", "limit_train_batches": 0.5})
        with pytest.raises(ArgumentError, match="no length"):
            applied(Variant("a"), work, 0).train()

    def test_a_step_of_the_modules_own(self):
        """A module that says itself how a step is taken is refused by the name of what it overrides."""

        class Own(Module):
            def optimizer_step(self, *arguments, **more):
                super().optimizer_step(*arguments, **more)

        with pytest.raises(ArgumentError, match="Own overrides optimizer_step"):
            Workload.from_lightning(Own(), rows())

    def test_schedulers_that_are_not_covered(self):
        """One that goes by a metric has none to go by."""

        def configured(module):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}

        with pytest.raises(ArgumentError, match="ReduceLROnPlateau, which goes by a metric"):
            applied(Variant("a"), Workload.from_lightning(Module(configured), rows()), 0)

    def test_optimizers_that_are_not_covered(self):
        """Several optimizers, none, or optimization by hand."""
        two = Module(lambda m: [torch.optim.SGD(m.parameters(), lr=0.1), torch.optim.SGD(m.parameters(), lr=0.1)])
        for module in (two, Module(lambda _: [])):
            with pytest.raises(ArgumentError, match="not one optimizer"):
                applied(Variant("a"), Workload.from_lightning(module, rows(), trainer={"accelerator": "cpu"}), 0)
        by_hand = Module()
        by_hand.automatic_optimization = False
        with pytest.raises(ArgumentError, match="by hand"):
            Workload.from_lightning(by_hand, rows())

    @pytest.mark.parametrize("shape", ["one", "list", "pair"])
    def test_shapes_of_configure_optimizers(self, shape):
        """An optimizer alone, in a list, or beside a list of schedulers."""

        def configured(module):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return {"one": optimizer, "list": [optimizer], "pair": ([optimizer], [scheduler])}[shape]

        work = Workload.from_lightning(Module(configured), rows(), trainer={"accelerator": "cpu"})
        assert applied(Variant("a"), work, 0).train()[0] > 0


B, T, W = tiny_attention.BATCH, tiny_attention.LENGTH, tiny_attention.WIDTH


class Attentive(pytorch_lightning.LightningModule):
    """The small attention model, its loss weighted by the number of the batch."""

    def __init__(self):
        super().__init__()
        self.model = tiny_attention.Attentive()

    def training_step(self, batch, batch_idx):
        loss = tiny_attention.loss(self.model, batch) * (1 + batch_idx) / 16
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def ran(variant):
    """A small LightningModule under a variant: its warm-up, a block of eight steps, and the dtypes of outputs, weights and loss."""
    _, track = script()
    dtypes = set()
    torch.manual_seed(0)
    module = Attentive()
    module.model.block.qkv.register_forward_hook(lambda qkv, _, out: dtypes.update({out.dtype, qkv.weight.dtype}))

    def build(_):
        data, blocks = tiny_attention.batches(0, 12), (tiny_attention.Block,)
        work = Workload.from_lightning(module, data, trainer={"accelerator": "cpu"}, checkpoint_blocks=blocks)
        return replace(work, loss=lambda model, batch: (track["clock"].advance(0.1), work.loss(model, batch))[1])

    replies = serve(variant, [Order(0, 0, 8)], build=build, track=track)
    (warm,) = (reply for reply in replies if isinstance(reply, Warm))
    (block,) = blocks_of(replies)
    return warm, block, dtypes


@pytest.fixture(scope="module")
def plain():
    """The module as it is."""
    return ran(Variant("plain", sdpa_backend="math"))


class TestVariants:
    """What a variant does to a LightningModule, by what ran."""

    @pytest.mark.parametrize(
        ("precision", "expected", "rel"),
        [
            ("32-true", {torch.float32}, 1e-6),
            ("bf16-mixed", {torch.bfloat16, torch.float32}, 0.01),
            ("bf16-true", {torch.bfloat16}, 0.03),
            ("16-mixed", {torch.float16, torch.float32}, 0.01),
        ],
    )
    def test_precision(self, plain, precision, expected, rel):
        """Matmuls compute in the variant's dtype, on weights of it where it is a true one; about the same training."""
        warm, block, dtypes = ran(Variant("a", precision=precision, sdpa_backend="math"))
        assert dtypes == expected
        assert block.loss == pytest.approx(plain[1].loss, rel=rel)
        assert block.model_flops == plain[1].model_flops
        assert block.n_skipped == 0
        assert (warm.ran == plain[0].ran) == (precision == "32-true")

    def test_attention(self, plain):
        """The pinned kernel ran, forward and backward, and the training is the same."""
        warm, block, _ = ran(Variant("a", sdpa_backend="flash"))
        assert (plain[0].kernels, warm.kernels) == (("math",), ("flash",))
        assert block.loss == pytest.approx(plain[1].loss, rel=1e-4)
        with pytest.raises(CannotRunError, match="cudnn"):
            ran(Variant("a", sdpa_backend="cudnn"))

    def test_checkpointing(self, plain):
        """Blocks of the classes that are named are recomputed: the same losses and model FLOPs, and the FLOPs of their forward once more."""
        _, block, _ = ran(Variant("a", sdpa_backend="math", gradient_checkpointing=True))
        assert block.loss == pytest.approx(plain[1].loss, rel=1e-6)
        assert block.model_flops == plain[1].model_flops == plain[1].hardware_flops
        qkv, attention = 2 * B * T * W * 3 * W, 2 * 2 * B * T * T * W  # forward; the last matmul's result is not needed again
        assert block.hardware_flops - block.model_flops == 8 * (qkv + attention / 2)

    def test_checkpointing_needs_blocks(self):
        """A module without lists of modules is refused by its own name, with what to give."""
        work = Workload.from_lightning(Attentive(), tiny_attention.batches(0), trainer={"accelerator": "cpu"})
        with pytest.raises(
            ArgumentError, match=r"Attentive has no torch.nn.ModuleList.*checkpoint_blocks=\(Block,\).*from_lightning"
        ):
            applied(Variant("a", gradient_checkpointing=True), work, 0)

    @compiles
    def test_compiled(self, plain, tmp_path, monkeypatch):
        """All of a training step, its logging too, is one compiled graph, and stays so whatever the batch's number; its flash is named."""
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
        torch._dynamo.reset()
        counted = torch._dynamo.utils.counters
        before, broken = counted["stats"]["unique_graphs"], counted["graph_break"].total()
        warm, block, _ = ran(Variant("a", sdpa_backend="flash", compile=True))
        assert counted["stats"]["unique_graphs"] - before == 2  # of the first number, and of any
        assert counted["graph_break"].total() == broken
        assert warm.kernels == ("flash",)
        assert "compiled" in warm.ran
        assert block.loss == pytest.approx(plain[1].loss, rel=1e-4)
        assert block.model_flops == pytest.approx(plain[1].model_flops)
