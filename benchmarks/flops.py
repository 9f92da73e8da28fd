"""FLOPs and peaks, ours against counts by hand, against other counters, and against datasheets; and what counting costs.

``python benchmarks/flops.py`` (about a minute). The other counters, where they are installed: ``pip install fvcore calflops
transformers deepspeed``; a counter that is missing has empty cells.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for a GPU's compiler otherwise

import torch
from flops_models import ARCHITECTURES, GPT, Architecture, gpt_by_hand
from report import table, write
from torch import nn

from green_torch.flops import LiveCounter, StepFlops, count_flops
from green_torch.peaks import known_devices, peak_flops

Counter = Callable[[nn.Module, tuple[Any, ...]], float]


# --- the counters ------------------------------------------------------------------------------------------------------------------


def ours_on_meta(model: nn.Module, args: tuple[Any, ...]) -> float:
    """``green_torch.count_flops``."""
    return count_flops(model, *args).model_flops


def ours_live(model: nn.Module, args: tuple[Any, ...]) -> float:
    """A real step, while it runs."""
    with LiveCounter() as counter:
        model(*args).sum().backward()
    return counter.count().model_flops


def torch_counter(model: nn.Module, args: tuple[Any, ...]) -> float:
    """``FlopCounterMode`` around a whole step."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(*args).sum().backward()
    return float(counter.get_total_flops())


def fvcore(model: nn.Module, args: tuple[Any, ...]) -> float:
    """Multiply-adds of a forward, so 2 FLOPs each, and 3 forwards a step, as its users do."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, args).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return 6.0 * analysis.total()


def deepspeed(model: nn.Module, args: tuple[Any, ...]) -> float:
    """FLOPs of a forward, and 3 forwards a step."""
    from deepspeed.profiling.flops_profiler import get_model_profile

    flops, _, _ = get_model_profile(model, args=list(args), print_profile=False, as_string=False, warm_up=0)
    return 3.0 * float(flops)


def calflops(model: nn.Module, args: tuple[Any, ...]) -> float:
    """FLOPs of a forward, and 3 forwards a step (its own factor for the backward is 2)."""
    from calflops import calculate_flops

    flops, _, _ = calculate_flops(model, args=list(args), print_results=False, print_detailed=False, output_as_string=False)
    return 3.0 * float(flops)


def forward_alone(model: nn.Module, args: tuple[Any, ...]) -> float:
    """Ours, of a forward: what tells apart where a counter of forwards goes wrong."""
    with LiveCounter() as counter:
        model(*args)
    return counter.count().model_flops


PEERS: dict[str, Counter] = {"FlopCounterMode": torch_counter, "fvcore": fvcore, "DeepSpeed": deepspeed, "calflops": calflops}
NOT_INSTALLED = "not installed"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Counters print, log and warn."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@dataclass(frozen=True, slots=True)
class Counted:
    """What a counter said of a model: FLOPs, or why there are none."""

    flops: float | None
    error: str = ""


def counted(counter: Counter, architecture: Architecture) -> Counted:
    """Each counter gets a model of its own; large ones are run as shapes alone."""
    torch.manual_seed(0)
    model, args = architecture.build()
    if architecture.large:
        args = tuple(arg.to("meta") for arg in args)
    try:
        with quietly():
            return Counted(counter(model, args))
    except ModuleNotFoundError as error:
        return Counted(
            None,
            NOT_INSTALLED
            if (error.name or "").split(".")[0] in {"fvcore", "deepspeed", "calflops", "transformers"}
            else str(error),
        )
    except Exception as error:
        return Counted(None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90] if str(error).strip() else ''}")


# --- why another is off ------------------------------------------------------------------------------------------------------------

REASONS = {
    "a": "3 × forward counts the gradient of the data, which nobody asks for",
    "b": "adds norms, activations, softmax, pooling or biases: element-wise work",
    "c": "the backward of grouped convolutions is counted as if there were no groups",
    "d": "SDPA counts as 0 (torch's counter: its CPU kernel, on torch ≤ 2.13)",
    "e": "the fused recurrent kernel counts as 0",
    "f": "recomputation is counted as the model's own work",
    "g": "frozen layers are counted as if they were trained",
    "h": "grouped_mm, mv or bilinear count as 0",
    "i": "raises",
    "j": "no attention, one use of each weight a token, looked-up embeddings counted as products",
    "k": "a derivative that the loss takes itself is not seen (3 × its forward)",
    "l": "the first state's gradient, which nobody asks for, is counted",
    "m": "`@`, bmm or baddbmm count as 0",
    "n": "grouped transposed convolutions are divided by their groups twice",
    "o": "einsum is read off NumPy's printed report, rounded",
}
_FORWARD_COUNTERS = frozenset({"fvcore", "DeepSpeed", "calflops"})
_STEP_IS_NOT_3_FORWARDS = {
    "frozen backbone, trained head": "ag",
    "LoRA": "ag",
    "GRU, both directions": "al",
    "LSTM": "l",
    "WGAN-GP critic": "k",
}
_SDPA = (
    "ViT/16, 224 px", "BERT-like, nn.TransformerEncoder", "nn.Transformer, cross-attention", "Llama-like (GQA, SwiGLU)", "GPT, SDPA",
    "GPT, SDPA, checkpointed", "GPT-2 124M, 8 × 1024",
)  # fmt: skip
_UNFORMULATED = ("MoE, grouped_mm", "two towers (mv, bilinear)")
_WHY: dict[tuple[str, str], str] = {
    **{("FlopCounterMode", row): "d" for row in _SDPA},
    **{(peer, row): "bd" for peer in ("fvcore", "calflops") for row in _SDPA},
    ("fvcore", "Llama-like (GQA, SwiGLU)"): "d",
    **{(peer, row): "h" for peer in PEERS for row in _UNFORMULATED},
    **{(peer, "MoE, grouped_mm"): "bh" for peer in ("DeepSpeed", "calflops")},
    **{("FlopCounterMode", a.name): "c" for a in ARCHITECTURES if "group" in a.name or "depthwise" in a.name},
    **{(peer, "linear attention (einsum)"): "o" for peer in _FORWARD_COUNTERS},
    ("FlopCounterMode", "MoE, grouped_mm"): "h",
    ("FlopCounterMode", "LSTM"): "e",
    ("fvcore", "LSTM"): "e",
    ("fvcore", "GRU, both directions"): "e",
    ("FlopCounterMode", "GPT, SDPA, checkpointed"): "df",
    ("FlopCounterMode", "GPT-2 124M, checkpointed"): "f",
    ("calflops", "GPT, attention by hand"): "bm",
    ("calflops", "GPT-2 124M, checkpointed"): "bm",
    ("calflops", "nn.MultiheadAttention on data"): "bm",
    ("calflops", "DLRM-like recommender"): "bm",
    ("calflops", "autoencoder (grouped transposed)"): "bn",
    ("DeepSpeed", "WGAN-GP critic"): "",
    ("calflops", "WGAN-GP critic"): "",
}  # inferred from how far off each is, row by row; the counters' code was not read
_ELEMENT_WISE_AT_MOST = 0.3


def reasons(peer: str, architecture: Architecture, flops: float, forward_flops: float) -> str:
    """The letters of why a counter is off; "?" where nothing known explains it."""
    name, exact = architecture.name, architecture.by_hand
    if peer not in _FORWARD_COUNTERS:
        return _WHY.get((peer, name), "?")
    letters = _STEP_IS_NOT_3_FORWARDS.get(name, "a") if 3 * forward_flops != exact else ""
    if flops != 3 * forward_flops:
        element_wise = 0 < flops / (3 * forward_flops) - 1 < _ELEMENT_WISE_AT_MOST
        letters += _WHY.get((peer, name), "b" if element_wise else "?")
    return "".join(sorted(set(letters)))


def cell(peer: str, architecture: Architecture, found: Counted, forward_flops: float) -> str:
    """How far off, with the letters of the reasons."""
    if found.flops is None:
        return NOT_INSTALLED if found.error == NOT_INSTALLED else "– (i)"
    if found.flops == architecture.by_hand:
        return "exact"
    off = found.flops / architecture.by_hand - 1
    shown = f"{off:+.1%}" if abs(off) >= 0.001 else f"{off:+.4%}"
    return f"{shown} ({', '.join(reasons(peer, architecture, found.flops, forward_flops))})"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def architectures() -> tuple[str, list[dict[str, Any]]]:
    """The table, and its figures."""
    rows, results = [], []
    right = dict.fromkeys(("by hand", *PEERS, "6ND"), 0)
    for architecture in ARCHITECTURES:
        exact = architecture.by_hand
        forward_flops = exact / 3 if architecture.large else counted(forward_alone, architecture).flops or 0.0
        mine = {"meta": counted(ours_on_meta, architecture)} | (
            {} if architecture.large else {"live": counted(ours_live, architecture)}
        )
        theirs = {peer: counted(counter, architecture) for peer, counter in PEERS.items()}
        parameters = sum(p.numel() for p in architecture.build()[0].parameters())
        six_nd = 6.0 * parameters * architecture.tokens
        own = ", ".join(
            f"{how} exact" if one.flops == exact else f"{how} {one.flops or 0:,.0f} {one.error}" for how, one in mine.items()
        )
        right["by hand"] += all(one.flops == exact for one in mine.values())
        for peer, one in theirs.items():
            right[peer] += one.flops == exact
        right["6ND"] += six_nd == exact
        rows.append(
            [
                architecture.name,
                f"{exact:,}",
                own,
                *(cell(peer, architecture, one, forward_flops) for peer, one in theirs.items()),
                "exact" if six_nd == exact else f"{six_nd / exact - 1:+.0%} (j)",
            ]
        )
        results.append(
            {
                "name": architecture.name,
                "by_hand_flops": exact,
                "ours": {how: one.flops for how, one in mine.items()},
                "peers": {peer: {"flops": one.flops, "error": one.error} for peer, one in theirs.items()}
                | {"6ND": {"flops": six_nd}},
            }
        )
    n = len(ARCHITECTURES)
    rows.append(["**exact**", f"of {n}", *(f"**{count}**" for count in right.values())])
    versions = ", ".join(f"{name} {_version(name)}" for name in ("fvcore", "deepspeed", "calflops"))
    notes = "\n".join(f"- ({letter}) {text}" for letter, text in REASONS.items())
    text = (
        "Model FLOPs of a training step, 2 a multiply-add, attention in full; by hand: `benchmarks/flops_models.py`. Counters of a "
        "forward (fvcore's multiply-adds twice) are taken three times, as their users do; 6ND takes all parameters, and D tokens, "
        "patches or samples. GPT-2 124M runs on `meta`, where SDPA is written out; with a fused kernel's backward on a GPU "
        f"FlopCounterMode reads 2.2 % more. Here: {versions}.\n\n"
        + table(["architecture", "by hand", "ours", *PEERS, "6ND"], rows)
        + f"\n\n{notes}"
    )
    return text, results


# --- names of devices --------------------------------------------------------------------------------------------------------------

TRAPS = {
    "NVIDIA GeForce RTX 4090 Laptop GPU": "a smaller chip than the RTX 4090's",
    "NVIDIA GeForce RTX 3080 Laptop GPU": "a smaller chip, sold at 80 to 150 W",
    "NVIDIA RTX A5000 Laptop GPU": "another chip than the RTX A5000's",
    "NVIDIA GeForce RTX 2080 with Max-Q Design": "lower clocks",
    "NVIDIA GeForce RTX 5090 D v2": "an export model without published tensor figures",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": "a seventh of the card",
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb": "three sevenths of the card",
    "GRID A100X-40C": "a virtual share",
    "NVIDIA T400 4GB": "holds “t4”",
    "NVIDIA RTX A400": "holds “a40”",
    "NVIDIA H999": "no such card",
    "AMD Instinct MI300X VF": "a virtual function",
    "Apple M3 Max": "no published figure",
}
"""Names that have no peak: whoever gives one is wrong."""

# torchtitan's get_peak_flops: figures in TFLOP/s by what the name holds, the first that fits (torchtitan/tools/utils.py, 2025)
_TORCHTITAN = (
    (("A100",), 312.0), (("H100", "NVL"), 835.0), (("H100", "PCIe"), 756.0), (("H100",), 989.0), (("H200",), 989.0), (("B200",), 2250.0),
    (("MI300X",), 1300.0), (("MI325X",), 1300.0), (("MI250X",), 191.5), (("l40s",), 362.0), ((), 312.0),
)  # fmt: skip
_TERA = 1e12
_ALIKE = 0.01


def lightning_tflops(name: str, dtype: torch.dtype) -> float | None:
    """``lightning.fabric.utilities.throughput``, told that this is the GPU's name."""
    from lightning.fabric.utilities.throughput import get_available_flops

    with mock.patch("torch.cuda.get_device_name", return_value=name), quietly():
        try:
            found = get_available_flops(torch.device("cuda"), dtype)
        except Exception:
            return None
    return found / _TERA if found else None


def torch_tflops(name: str, dtype: torch.dtype) -> float | None:
    """The table of TorchInductor's profile analysis; where it has none, torch estimates from the clock."""
    from torch._inductor.analysis.device_info import lookup_device_info

    found = lookup_device_info(name)
    figure = found.tops.get(dtype) if found else None
    return figure / getattr(found, "tops_sparsity_factor", 1) if figure else None


def torchtitan_tflops(name: str, dtype: torch.dtype) -> float | None:
    """Its figures, for BF16 whatever the card has."""
    del dtype
    return next(figure for holds, figure in _TORCHTITAN if all(part in name for part in holds))


def our_tflops(name: str, dtype: torch.dtype) -> float | None:
    """``green_torch.peak_flops``."""
    peak = peak_flops(name, dtype)
    return peak.flop_per_s / _TERA if peak else None


LOOKUPS: dict[str, Callable[[str, torch.dtype], float | None]] = {
    "ours": our_tflops,
    "Lightning": lightning_tflops,
    "torch": torch_tflops,
    "torchtitan": torchtitan_tflops,
}


def devices() -> tuple[str, list[dict[str, Any]]]:
    """Every name of the data file, and the traps; the datasheet's figure is that of the row that the name was filed under."""
    names: list[tuple[str, torch.dtype, float | None, str]] = []
    for known in known_devices():
        dtype = torch.bfloat16 if "bfloat16" in known.peaks_flop_per_s else torch.float16
        figure = known.peaks_flop_per_s.get(str(dtype).removeprefix("torch."))
        names += [(name, dtype, figure / _TERA, "") for name in known.examples if figure is not None]
    names += [(name, torch.bfloat16, None, why) for name, why in TRAPS.items()]
    rows, results = [], []
    tally = {who: {"right": 0, "wrong": 0, "silent": 0} for who in LOOKUPS}
    for name, dtype, true, why in names:
        found = {who: look(name, dtype) for who, look in LOOKUPS.items()}
        cells = []
        for who, figure in found.items():
            right = figure is None if true is None else figure is not None and abs(figure / true - 1) <= _ALIKE
            tally[who]["right" if right else "silent" if figure is None else "wrong"] += 1
            ratio = "" if right or not figure or not true else f" (× {figure / true:.2g})"
            cells.append("none" if figure is None else f"{figure:.4g}" if right else f"**{figure:.4g}**{ratio}")
        kind = str(dtype).removeprefix("torch.")
        rows.append([name, kind, f"{true:.4g}" if true else f"none: {why}", *cells])
        results.append(
            {"name": name, "dtype": kind, "datasheet_tflops": true, **{f"{who}_tflops": f for who, f in found.items()}}
        )
    sums = [[who, *(str(count[key]) for key in ("right", "wrong", "silent"))] for who, count in tally.items()]
    text = (
        "Dense TFLOP/s of the 16-bit dtype, by the name as the driver prints it. Right: within 1 % of the datasheet, or no figure where "
        "there is none to give. Wrong figures are bold.\n\n"
        + table(["", "right", "wrong", "no figure"], sums)
        + "\n\n"
        + table(["driver's name", "dtype", "datasheet", *LOOKUPS], rows)
    )
    return text, results


# --- what counting costs -----------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def costs() -> tuple[str, dict[str, float]]:
    """On meta, live, and of the steps that are not counted."""
    found: dict[str, float] = {}
    model, tokens = GPT(), torch.zeros(8, 1024, dtype=torch.long)
    found["meta_first_s"] = seconds(lambda: count_flops(model, tokens))
    found["meta_later_s"] = statistics.median(seconds(lambda: count_flops(model, tokens)) for _ in range(5))
    assert count_flops(model, tokens).model_flops == gpt_by_hand(8, 1024, 12, 768, 50_304)
    found |= live_costs() | idle_costs()
    rows = [
        ["GPT-2 124M at 8 × 1024 on meta, first", f"{found['meta_first_s']:.2f} s", "–"],
        ["the same, later (median of 5)", f"{found['meta_later_s']:.2f} s", "≤ 0.5 s"],
        [f"a step of {found['step_s'] * 1e3:.0f} ms, counted live", f"× {found['live_ratio']:.2f}", "≤ 1.3"],
        ["the same, of processor time", f"× {found['live_cpu_ratio']:.2f}", ""],
        ["a step that is not counted (hook and take)", f"{found['idle_us']:.1f} µs", "nothing measurable"],
        [
            f"the same, of a step of {found['step_s'] * 1e3:.0f} ms",
            f"{found['idle_us'] / found['step_s'] / 1e6:.3%}",
            "nothing measurable",
        ],
    ]
    return table(["", "cost", "target"], rows), found


def live_costs(wanted_s: float = 0.3, pairs: int = 9) -> dict[str, float]:
    """Steps of about 300 ms, counted and not in turn; the fastest of each, since whatever else runs only adds.

    Of processor time too, which other processes' work disturbs less.
    """
    model = GPT(6, 384, 6, 1000)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(batch: int) -> None:
        model(torch.randint(1000, (batch, 64))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    batch = 4
    step(batch)
    for _ in range(3):  # a larger batch takes its time by its own measure
        batch = max(1, round(batch * wanted_s / min(seconds(partial(step, batch)) for _ in range(3))))

    def counted_step() -> None:
        with LiveCounter() as counter:
            step(batch)
        counter.count()

    step(batch)
    counted_step()
    plain, live = [], []
    for _ in range(pairs):
        for run, into in ((partial(step, batch), plain), (counted_step, live)):
            begin_s = time.process_time()
            into.append((seconds(run), time.process_time() - begin_s))
    (plain_s, plain_cpu_s), (live_s, live_cpu_s) = (map(min, zip(*times, strict=True)) for times in (plain, live))
    return {"step_s": plain_s, "live_ratio": live_s / plain_s, "live_cpu_ratio": live_cpu_s / plain_cpu_s}


def idle_costs(repeats: int = 5000, rounds: int = 5) -> dict[str, float]:
    """A forward and a take on inputs that are known, less the forward alone."""
    model, x = nn.Identity(), torch.zeros(8, 16)

    def plain() -> None:
        for _ in range(repeats):
            model(x)

    flops = StepFlops(model)

    def watched() -> None:
        for _ in range(repeats):
            model(x)
            flops.take()

    plain_s, watched_s = [], []
    for _ in range(rounds):
        plain_s.append(seconds(plain))
        flops.attach()
        watched_s.append(seconds(watched))
        flops.detach()
    return {"idle_us": (min(watched_s) - min(plain_s)) / repeats * 1e6}


def main() -> None:
    """Runs everything and writes it."""
    begin = time.perf_counter()
    cost_text, cost = costs()
    torch.set_num_threads(1)  # small models
    counted_text, models = architectures()
    device_text, names = devices()
    body = (
        f"## FLOPs of a training step\n\n{counted_text}\n\n## What counting costs\n\n{cost_text}\n\n"
        f"## Peaks by the device's name\n\n{device_text}\n\nTook {time.perf_counter() - begin:.0f} s."
    )
    write("flops", "FLOPs and peaks, checked", body, {"architectures": models, "devices": names, "costs": cost})


if __name__ == "__main__":
    main()
