"""``green-torch report``: every format says the same, is read back by its own readers, and survives hostile names."""

from __future__ import annotations

import csv
import gc
import io
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from green_torch.cli import main, report
from green_torch.records import Deferral, Domain, Embodied, IntensityPoint, Method
from green_torch.units import kwh
from tests.test_ledger import FRANCE, MANIFEST, START_NS, written

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = '=HYPERLINK("http://x")|`<img src=x onerror=alert(1)>`\x1b[31m\u202e[x](javascript:y)\n---\n$\\frac$ \'q\' "q" \udcff,; [bold]'
DAY_NS = 86_400 * 10**9


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two projects: a run of two ranks, one that failed, one resumed, one of another month, and a broken file."""
    top = tmp_path / "runs"
    for rank in (0, 1):
        written(top, folder="llm/ddp", run_id="ddp", rank=rank, world_size=2, model="GPT")
    written(top, folder="llm/bad", run_id="bad", status="failed", model="GPT", run_name="bad")
    written(top, folder="vision/on", run_id="on", status=None, model="ResNet")
    later = {"resumed_from_step": 6, "previous_segment": 1, "started_unix_ns": START_NS + DAY_NS}
    written(top, folder="vision/on", run_id="on", segment=2, model="ResNet", **later)
    written(top, folder="vision/late", run_id="late", model="ResNet", started_unix_ns=START_NS + 40 * DAY_NS)
    (top / "vision" / "broken" / "green").mkdir(parents=True)
    (top / "vision" / "broken" / "green" / "rank-00000.segment-0001.jsonl").touch()
    return top


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What the command prints; on stderr where it fails."""
    if code:
        with pytest.raises(SystemExit) as left:
            main(["report", *map(str, arguments)])
        assert left.value.code == code
        return capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["report", *map(str, arguments)])
    assert left.value.code in {0, None}
    return capsys.readouterr().out


# ── the table ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", ["80", "140"])
def test_the_table_tells_what_was_used_and_wasted(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    """Groups with their sum, energy by domain, grams by part with grid and PUE, waste by cause, SCI, and what was left out."""
    monkeypatch.setenv("COLUMNS", width)
    text = run(capsys, runs, "--target-failed-share", "5%")
    assert "5 runs by project" not in text
    assert "4 runs by project" in text
    assert re.search(r"llm +1 completed +250 mWh", text)
    assert re.search(r"all +3 completed +500 mWh", text)
    assert "1 of 4 runs that ended failed or were killed: 25.0 % of them" in text
    assert "Were it 5 %:" in text
    assert re.search(r"steps done again after a resume +33.3 mWh", text)
    assert "100 gCO2e/kWh: FR (lifecycle, average; a table)" in text
    assert "PUE: 1.2 (user)" in text
    assert "±5 %" in text
    assert "per token" in text
    assert "Left out: 1" in text
    assert max(map(len, text.partition("Energy is")[0].splitlines())) <= int(width)


DEFERRAL = Deferral(
    policy="a pause, waiting in place",
    baseline="running on without a pause",
    method="forecast",
    region="GB",
    source="UK NESO",
    kind="direct, average",
    baseline_unix_ns=START_NS,
    deadline_unix_ns=START_NS + 10 * 3600 * 10**9,
    work_s=4 * 3600.0,
    stop_unix_ns=START_NS,
    resume_unix_ns=START_NS + 2 * 3600 * 10**9,
    planned_g_per_kwh=150.0,
    planned_baseline_g_per_kwh=200.0,
    idle_share=0.2,
    idle_basis="assumed",
    realised_g_per_kwh=180.0,
    realised_baseline_g_per_kwh=200.0,
    realised_work_s=3 * 3600.0,
    unknown="",
)


def test_planned_and_realised_savings_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With baseline, interval, zone, slack, policy and method; what is not known says why; JSON has the fractions."""
    blind = replace(
        DEFERRAL, baseline_unix_ns=START_NS + 1, realised_g_per_kwh=None, realised_work_s=None, unknown="nobody looked"
    )
    written(tmp_path, deferrals=(DEFERRAL, blind))
    text = run(capsys, tmp_path, "--format", "markdown").replace("<br>", " ")
    for said in (
        r"25.0 % (150 against 200) idle draw 20% of that at work, assumed | 10.0 % (180 against 200) over 3 h of work",
        "not known nobody looked",
        "running on without a pause from",
        "slack 6 h",
        "GB: forecast, direct, average, UK NESO",
    ):
        assert said in text
    (told,) = json.loads(run(capsys, tmp_path, "--format", "json"))["runs"]
    assert [one["planned_saving"] for one in told["put_off"]] == [0.25, 0.25]
    assert [one["realised_saving"] for one in told["put_off"]] == [pytest.approx(0.1), None]
    assert "Put off" not in run(capsys, written(tmp_path / "other").parents[1])


def test_energy_adds_up_over_groups(runs: Path) -> None:
    """However the runs are grouped, groups sum to the whole, and domains to its joules."""
    for by in ("project", "model", "status", "month", "run"):
        found = report.examine([runs], by=by)
        assert sum(group.totals.energy_j or 0.0 for group in found.groups) == pytest.approx(60 * 30.0)
        assert sum(found.whole.energy_by_kind_j.values()) == pytest.approx(60 * 30.0)


def test_detail_reads_the_records(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With --detail each run's records and each file with what of it counts."""
    monkeypatch.setenv("COLUMNS", "160")
    text = run(capsys, runs, "--detail")
    assert re.search(r"bf16 +20 +167 mWh.*\nddp +\n", text)
    assert re.search(r" +killed +10 +after 6 +83.3 mWh +50.0 mWh.*\non +\nrank 0, start 1 ", text)


def test_no_table_crops_a_unit(runs: Path) -> None:
    """At every width from 40 up all that a table holds is printed, folded where it must be: "mWh" never reads as "mW"."""

    def letters(text: str) -> Counter[str]:
        return Counter(char for char in text if not char.isspace() and char != "─")

    for section in report.sections(report.examine([runs], detail=True)):
        for width in range(40, 130) if section.headings else ():
            console = Console(file=io.StringIO(), width=width)
            console.print(report._table(section))
            wanted = letters("".join(section.headings) + "".join("".join(row) for row in section.rows))
            assert letters(console.file.getvalue()) == wanted, (section.title, width)


def test_nothing_of_what_was_lost_is_useful(tmp_path: Path) -> None:
    """In the table of files a failed run has no useful energy, nor has a start whose every step was done again."""
    written(tmp_path, folder="a/bad", run_id="bad", status="failed")
    later = {"resumed_from_step": -1, "previous_segment": 1, "started_unix_ns": START_NS + DAY_NS}
    written(tmp_path, folder="a/on", run_id="on", status=None)
    written(tmp_path, folder="a/on", run_id="on", segment=2, **later)
    (files,) = (one for one in report.sections(report.examine([tmp_path], detail=True)) if one.title == "Files")
    assert {row[1]: row[5] for row in files.rows} == {"failed": "0 Wh", "superseded": "0 Wh", "completed": "83.3 mWh"}


def test_runs_are_chosen_by_their_day(runs: Path) -> None:
    """--since and --until take whole days, or instants with an offset."""
    days = {"since": "2023-11-14", "until": "2023-11-14"}
    assert {one.run_id for one in report.examine([runs], **days).whole.runs} == {"ddp", "bad", "on"}
    assert {one.run_id for one in report.examine([runs], since="2023-11-15").whole.runs} == {"late"}
    assert not report.examine([runs], until="2023-11-14T23:13:19+01:00").whole.runs
    assert len(report.examine([runs], until="2023-11-14T23:13:21+01:00").whole.runs) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere"],
        [".", "--by", "colour"],
        [".", "--since", "soon"],
        [".", "--target-failed-share", "lots"],
        [".", "--target-failed-share", "100%"],
        [".", "--format", "pdf"],
        [".", "--format", "png"],
        [".", "--format", "png", "--output", "nowhere/x.png"],
        [".", "--output", "nowhere/x.txt"],
        [".", "--format", "model-card", "--training-type", "foo"],
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Each ends with 2 and a line that says what to type."""
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *arguments, code=2).startswith("green-torch: ")


def test_an_empty_directory_says_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No runs are no error; every format that lists runs works with none."""
    assert "No runs found" in run(capsys, tmp_path)
    assert json.loads(run(capsys, tmp_path, "--format", "json"))["runs"] == []
    assert run(capsys, tmp_path, "--format", "csv").strip() == ""
    assert "no emissions are known" in run(capsys, tmp_path, "--format", "paper", code=1)


def test_a_report_loads_nothing_heavy(runs: Path) -> None:
    """Neither torch nor codecarbon nor pandas is loaded for tables."""
    script = f"import sys\nfrom green_torch.cli import main\ntry:\n main(['report', {str(runs)!r}])\nfinally:\n print(sorted({{n.partition('.')[0] for n in sys.modules}}))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(re.findall(r"'(\w+)'", ran.stdout.splitlines()[-1]))
    assert "green_torch" in loaded
    assert not loaded & {"torch", "numpy", "codecarbon", "pandas", "matplotlib", "tensorboard"}


# ── exports ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pandas_reads_the_csv(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row a run with units in the columns' names; the columns sum to the report."""
    import pandas as pd

    frame = pd.read_csv(io.StringIO(run(capsys, runs, "--format", "csv"))).set_index("run_id")
    assert list(frame.index) == ["bad", "ddp", "on", "late"]
    assert frame.energy_j.sum() == pytest.approx(60 * 30.0)
    assert frame.wasted_energy_j.to_dict() == pytest.approx({"ddp": 0, "bad": 300, "on": 120, "late": 0})
    assert frame.loc["ddp", "tokens"] == 20 * 8192
    assert frame.loc["ddp", "hardware"] == "2 × NVIDIA H100 80GB HBM3"
    assert frame.loc["on", "intensity_g_per_kwh"] == pytest.approx(1e-3 / (36 / 3.6e6))
    assert (frame.emissions_g - frame.operational_g - frame.embodied_g).abs().max() < 1e-12


def test_the_json_holds_everything(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Groups, runs with their files, waste by cause and what was left out; --output writes it to a file."""
    run(capsys, runs, "--format", "json", "--output", tmp_path / "x.json", "--detail", "--by", "model")
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert found["schema"] == "green_torch.report/1"
    assert [group["name"] for group in found["groups"]] == ["GPT", "ResNet"]
    assert found["all"]["wasted_by_cause_j"] == pytest.approx(
        {"failed_or_killed": 300, "steps_done_again": 120, "set_up_again": 0}
    )
    assert found["failed"]["share"] == 0.25
    assert {len(one["files"]) for one in found["runs"]} == {1, 2}
    assert found["runs"][0]["detail"]["n_records"] > 0
    assert len(found["left_out"]) == 1


def test_the_model_card_is_read_by_the_hub(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """huggingface_hub's parser finds grams, place, hardware and training type."""
    from huggingface_hub import ModelCard

    text = run(capsys, runs, "--format", "model-card", "--training-type", "fine-tuning")
    found = ModelCard(text + "\n# A model\n").data.to_dict()["co2_eq_emissions"]
    assert found["emissions"] == pytest.approx(60 * 1.2e-3)
    assert found["geographical_location"] == "FR"
    assert found["training_type"] == "fine-tuning"
    assert "NVIDIA H100" in found["hardware_used"]
    assert "hardware counters" in found["source"]
    assert "PUE 1.2" in found["source"]


def test_codecarbon_reads_its_own_columns(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Codecarbon takes the file for its own: it appends a run and finds ours there, in kg and kWh of the facility."""
    import pandas as pd
    from codecarbon.output_methods.emissions_data import EmissionsData
    from codecarbon.output_methods.file import FileOutput

    run(capsys, runs, "--format", "codecarbon", "--output", tmp_path / "emissions.csv")
    frame = pd.read_csv(tmp_path / "emissions.csv").set_index("run_id")
    assert frame.emissions.sum() == pytest.approx(60 * 1e-3 / 1000)
    assert frame.loc["ddp", "energy_consumed"] == pytest.approx(20 * 36 / 3.6e6)
    assert frame.loc["ddp", "gpu_energy"] == pytest.approx(20 * 36 / 3.6e6)
    assert (frame.loc["ddp", "country_iso_code"], frame.loc["ddp", "gpu_count"]) == ("FRA", 2)
    output = FileOutput("emissions.csv", str(tmp_path), on_csv_write="update")
    row = EmissionsData(**{**frame.reset_index().iloc[0].to_dict(), "run_id": "theirs"})
    assert output.has_valid_headers(row)
    output.out(row, None)
    assert list(pd.read_csv(tmp_path / "emissions.csv").run_id) == ["bad", "ddp", "on", "late", "theirs"]


def test_lines_for_a_paper_say_what_goes_on_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without an end is counted as far as it came, and that is said."""
    written(tmp_path / "runs", folder="a", run_id="a")
    assert "of an end yet" not in run(capsys, tmp_path / "runs", "--format", "paper")
    written(tmp_path / "runs", folder="b", run_id="b", status=None, age_s=60.0)
    assert "1 of them has not told of an end yet" in run(capsys, tmp_path / "runs", "--format", "paper")


def test_lines_for_a_paper_say_what_they_rest_on(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Energy with bounds, hardware, waste, grid with source and basis, PUE, embodied share, method and gain error."""
    text = run(capsys, runs, "--format", "paper")
    for words in (
        "4 training runs on",
        "500 mWh (483 to 517) of IT energy",
        "gpu by hardware counters (100.0%)",
        "gain error of up to 5%",
        "1 run that failed or was killed",
        "PUE of 1.2 (user)",
        "FR; lifecycle, average; a table",
        "60.0 mgCO2e",
        "Embodied emissions are 12.0 mgCO2e",
        "utilisation was 7.1%",
    ):
        assert words in text, words


def test_the_picture_is_drawn(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A PNG of a size to look at, with bars on it."""
    from matplotlib.image import imread

    written(runs, folder=f"{'x' * 200}/$a", run_id="odd", run_name=HOSTILE.replace("\udcff", ""))
    run(capsys, runs, "--format", "png", "--output", tmp_path / "x.png", "--by", "run")
    image = imread(tmp_path / "x.png")
    assert image.shape[0] > 500
    assert len({tuple(pixel) for pixel in image[::7, ::7, :3].reshape(-1, 3).round(2)}) > 5


# ── hostile and mixed ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run whose every text is hostile."""
    names = dict.fromkeys(("run_name", "model", "device", "pue_source"), HOSTILE.replace("\udcff", "\x85"))
    written(
        tmp_path,
        folder="=cmd|x/ok",
        intensity=replace(FRANCE, region=HOSTILE.replace("\udcff", ""), source=HOSTILE.replace("\udcff", "")),
        domains=(Domain("gpu0", Method.COUNTER, HOSTILE.replace("\udcff", ""), "NVML", 700.0),),
        **names,
    )
    return tmp_path


def test_hostile_names_break_no_format(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No escape sequence, line break, table cell, formula, HTML, link or YAML key comes out of a name."""
    from huggingface_hub import ModelCard

    for by in ("run", "model"):
        table = run(capsys, hostile, "--by", by)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x85\u202e]", table)
        text = run(capsys, hostile, "--by", by, "--format", "markdown")
        row = next(line for line in text.splitlines() if "HYPERLINK" in line and line.startswith("|"))
        assert len(re.findall(r"(?<!\\)\|", row)) == 8
        assert "<img" not in text
        assert not re.search(r"(?<!\\)\]\(", text)
    rows = list(csv.reader(io.StringIO(run(capsys, hostile, "--format", "csv"))))
    assert len(rows) == 2
    assert len(rows[1]) == len(rows[0])
    assert not [cell for cell in rows[1] if cell.startswith(("=", "+", "@", "\t"))]
    assert "'=cmd|x" in rows[1]
    card = ModelCard(run(capsys, hostile, "--format", "model-card"))
    assert list(card.data.to_dict()) == ["co2_eq_emissions"]
    assert card.data.to_dict()["co2_eq_emissions"]["emissions"] == pytest.approx(0.012)
    assert len(run(capsys, hostile, "--format", "paper").splitlines()) == 1
    codecarbon = list(csv.reader(io.StringIO(run(capsys, hostile, "--format", "codecarbon"))))
    assert len(codecarbon) == 2
    assert not [cell for cell in codecarbon[1] if cell.startswith(("=", "+", "@"))]
    json.loads(run(capsys, hostile, "--format", "json"))


def test_bases_are_kept_apart_in_words_and_refused_in_one_number(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With lifecycle and direct figures the table shows both, and what needs one number says why it gives none."""
    written(runs, folder="llm/direct", run_id="direct", intensity=IntensityPoint(80.0, "GB", "NESO", "direct"))
    text = run(capsys, runs)
    assert "operational (direct, average)" in text
    assert "operational (lifecycle, average)" in text
    assert "several" in text
    assert "per token" not in text
    for form in ("model-card", "paper"):
        assert "differ in basis" in run(capsys, runs, "--format", form, code=1)


def test_numbers_are_text_only_where_they_are_text() -> None:
    """A negative number stays one in CSV; text that begins like a formula, even after spaces, gets a quote."""
    from green_torch.cli.report_exports import csv_text

    rows = [{"a": -1.5, "b": "-1+2", "c": " =x", "d": "plain", "e": None}]
    assert csv_text(rows).splitlines()[1] == "-1.5,'-1+2,' =x,plain,"


def test_the_manifest_of_the_tests_is_what_they_say() -> None:
    """The figures above rest on these."""
    assert (MANIFEST.pue, MANIFEST.pue_source) == (1.2, "user")


# ── what an auditor asks for ───────────────────────────────────────────────────────────────────────────────────────────


def test_it_and_facility_energy_stand_apart(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The domains' sum, and that times the PUE, which the grams follow from."""
    text = run(capsys, runs)
    assert re.search(r"IT +the domains together +500 mWh", text)
    facility = report.examine([runs]).whole.totals.facility_energy_j
    assert re.search(rf"facility +IT energy × PUE +{re.escape(kwh(facility))}", text)


def test_the_embodied_part_carries_its_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the table and for a paper; where one device's is not known, none is made up for the sum."""
    made = Embodied(164.0, "a maker", manufacturing_lo_kg=82.0, manufacturing_hi_kg=656.0)
    written(tmp_path / "runs", folder="a/one", run_id="one", embodied=made)
    embodied_g = report.examine([tmp_path / "runs"]).whole.totals.embodied_g
    assert embodied_g
    assert report.examine([tmp_path / "runs"]).whole.embodied_span_g == pytest.approx((embodied_g / 2, embodied_g * 4))
    assert "164 kgCO2e (82 to 656)" in run(capsys, tmp_path / "runs")
    assert "164 kgCO2e (82 to 656)" in run(capsys, tmp_path / "runs", "--format", "paper")
    written(tmp_path / "runs", folder="a/two", run_id="two", embodied=Embodied(100.0, "a model"))
    assert report.examine([tmp_path / "runs"]).whole.embodied_span_g == (None, None)
    assert "100 kgCO2e (spread not known)" in run(capsys, tmp_path / "runs")


def test_a_cpu_is_named_and_not_its_architecture(tmp_path: Path) -> None:
    """What a processor is called, where the system says x86_64; a GPU that could not be metered stays named."""
    cpu = Domain("cpu", Method.ESTIMATED, "AMD EPYC 7763", "a model")
    written(tmp_path, folder="a/cpu", run_id="cpu", device="x86_64", domains=(cpu,))
    written(tmp_path, folder="a/gpu", run_id="gpu", device="NVIDIA T4", domains=(cpu,))
    assert [report.hardware(one) for one in report.examine([tmp_path]).whole.runs] == ["AMD EPYC 7763", "NVIDIA T4"]


def test_codecarbons_columns_hold_no_made_up_zero(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device that was not metered, water, loads and a system that no run told are empty, not 0."""
    for row in csv.DictReader(io.StringIO(run(capsys, runs, "--format", "codecarbon"))):
        assert float(row["gpu_energy"]) > 0
        assert [row[key] for key in ("ram_energy", "ram_power", "water_consumed", "gpu_utilization_percent", "wue", "os")] == [
            ""
        ] * 6


def test_codecarbons_columns_tell_the_system_and_that_the_machine_was_metered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of the CPU is one of the whole machine, as a counter is."""
    cpu = Domain("cpu", Method.ESTIMATED, "AMD EPYC 7763", "a model")
    written(tmp_path, domains=(cpu,), versions={"os": "Linux-6.1"})
    (row,) = csv.DictReader(io.StringIO(run(capsys, tmp_path, "--format", "codecarbon")))
    assert (row["tracking_mode"], row["os"], row["cpu_model"]) == ("machine", "Linux-6.1", "AMD EPYC 7763")


def test_modelled_joules_are_not_called_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in a model card nor in a paper."""
    written(tmp_path / "runs")
    for form in ("paper", "model-card"):
        assert "measured with" not in run(capsys, tmp_path / "runs", "--format", form)


def test_a_report_leaves_the_garbage_collector_as_it_was(runs: Path) -> None:
    """On where it was on, off where it was off."""
    for was_on in (False, True):
        (gc.enable if was_on else gc.disable)()
        report.examine([runs])
        assert gc.isenabled() is was_on
