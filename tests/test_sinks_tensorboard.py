"""TensorBoard shows the run beside the user's own loss, from one event file, and never stands in the way."""

import json
import math
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto import summary_pb2
from torch.utils.tensorboard import SummaryWriter

from green_torch.errors import ArgumentError, UsageError
from green_torch.records import DomainEnergy, Method, Phase, RunTotals
from green_torch.sinks.tensorboard import TensorBoardSink, _Cadence, open_writer
from tests.test_sinks_codec import MANIFEST, make_record, make_summary

GREEN = {
    "green/energy_per_step_J": 30.0,
    "green/emissions_per_step_gCO2e": 1e-3,
    "green/energy_per_token_J": 30.0 / 8192,
    "green/mfu": 0.4,
    "green/hfu": 0.5,
    "green/power_W": 300.0,
    "green/step_time_s": 0.1,
    "green/intensity_gCO2e_per_kWh": 56.0,
    "green/energy_total_kWh": 600.0 / 3.6e6,
    "green/emissions_total_gCO2e": 0.02,
    "green/projected_total_gCO2e": 12.0,
    "green/projected_savings_gCO2e": 3.0,
}
DETAIL = {
    "green_detail/energy_lo_per_step_J": 29.9,
    "green_detail/energy_hi_per_step_J": 30.1,
    "green_detail/facility_energy_per_step_J": 36.0,
    "green_detail/power_gpu0_W": 300.0,
    "green_detail/power_lo_gpu0_W": 299.0,
    "green_detail/power_hi_gpu0_W": 301.0,
}


@pytest.fixture
def writer(tmp_path):
    """A user's SummaryWriter in an empty directory."""
    writer = SummaryWriter(str(tmp_path))
    yield writer
    writer.close()


def event_files(folder):
    return sorted(path.name for path in folder.glob("events.out.tfevents.*"))


def load(folder):
    """What TensorBoard reads of a directory, nothing thinned out."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def values(loaded, tag):
    return {event.step: event.value for event in loaded.Scalars(tag)}


def snapshots(loaded):
    return [(event.step, json.loads(event.tensor_proto.string_val[0])) for event in loaded.Tensors("green/snapshot")]


def write_all(sink, *items):
    for item in items:
        sink.write(item)
    sink.close()


def test_a_record_becomes_the_designed_tags(tmp_path, writer):
    """Exactly the twelve tags and the details, per-step means of a ten-step record, at its step and wall time."""
    record = make_record(20, 10, projected_total_g=12.0, projected_savings_g=3.0)
    write_all(TensorBoardSink(writer), MANIFEST, record)
    loaded = load(tmp_path)
    assert set(loaded.Tags()["scalars"]) == set(GREEN) | set(DETAIL)
    assert loaded.Tags()["tensors"] == ["green/snapshot"]
    for tag, value in (GREEN | DETAIL).items():
        (event,) = loaded.Scalars(tag)
        assert (event.step, event.wall_time) == (20, record.time_unix_ns / 1e9)
        assert event.value == pytest.approx(value, rel=1e-6)


def test_details_can_be_left_out(tmp_path, writer):
    """With ``detail=False`` nothing stands under green_detail/."""
    write_all(TensorBoardSink(writer, detail=False), MANIFEST, make_record())
    assert {tag.partition("/")[0] for tag in load(tmp_path).Tags()["scalars"]} == {"green"}


def test_one_record_is_one_event(tmp_path, writer):
    """All values of a record, snapshot included, share one event: the event count is the record count."""
    write_all(TensorBoardSink(writer), MANIFEST, *(make_record(step) for step in range(1, 11)))
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (name,) = event_files(tmp_path)
    assert sum(event.HasField("summary") for event in EventFileLoader(str(tmp_path / name)).Load()) == 10


def test_unknown_and_infinite_values_are_left_out(tmp_path, writer):
    """``None``, NaN and infinities make no point; the rest of the record does."""
    record = make_record(
        energy_j=None,
        energy_lo_j=None,
        energy_hi_j=None,
        mfu=math.nan,
        hfu=math.inf,
        power_w=None,
        domains=(),
        totals=RunTotals(),
    )
    write_all(TensorBoardSink(writer), MANIFEST, record)
    tags = set(load(tmp_path).Tags()["scalars"])
    assert tags == {
        "green/emissions_per_step_gCO2e",
        "green/step_time_s",
        "green/intensity_gCO2e_per_kWh",
        "green_detail/facility_energy_per_step_J",
    }


def test_samples_stand_in_for_unknown_tokens(tmp_path, writer):
    """Without tokens the energy is per sample; without both, neither."""
    write_all(TensorBoardSink(writer), MANIFEST, make_record(1, tokens=None), make_record(2, tokens=None, samples=None))
    loaded = load(tmp_path)
    assert values(loaded, "green/energy_per_sample_J") == {1: 30.0 / 8}
    assert "green/energy_per_token_J" not in loaded.Tags()["scalars"]


def test_other_phases_move_the_totals_alone(tmp_path, writer):
    """An eval record adds to the cumulative tags and leaves the per-step curves to train."""
    write_all(TensorBoardSink(writer), MANIFEST, make_record(1), make_record(2, phase=Phase.EVAL))
    loaded = load(tmp_path)
    assert set(values(loaded, "green/energy_total_kWh")) == {1, 2}
    assert set(values(loaded, "green/emissions_total_gCO2e")) == {1, 2}
    assert set(values(loaded, "green/energy_per_step_J")) == {1}


def test_the_users_loss_stays_whole_in_the_same_file(tmp_path):
    """500 losses written from another thread through the lent writer, and 500 of our records: one event file, every point there."""
    writer = open_writer(tmp_path)
    sink = TensorBoardSink(writer)
    user = threading.Thread(target=lambda: [writer.add_scalar("loss", 1 / step, step) for step in range(1, 501)])
    user.start()
    write_all(sink, MANIFEST, *(make_record(step) for step in range(1, 501)))
    user.join()
    writer.close()
    assert len(event_files(tmp_path)) == 1
    loaded = load(tmp_path)
    assert values(loaded, "loss") == {step: pytest.approx(1 / step) for step in range(1, 501)}
    assert set(values(loaded, "green/power_W")) == set(range(1, 501))


def test_the_snapshot_carries_its_plugins_name(tmp_path, writer):
    """The tensor names the plugin and the tensor data class, without which TensorBoard drops it."""
    write_all(TensorBoardSink(writer), MANIFEST, make_record())
    metadata = load(tmp_path).SummaryMetadata("green/snapshot")
    assert metadata.plugin_data.plugin_name == "green"
    assert metadata.data_class == summary_pb2.DATA_CLASS_TENSOR


def test_snapshots_come_at_growing_intervals_and_at_the_end(tmp_path, writer):
    """With records 1, 2, 4, ... and with the summary, each complete by itself."""
    records = [make_record(step) for step in range(1, 101)]
    write_all(TensorBoardSink(writer), MANIFEST, *records, make_summary(records[-1]))
    read = snapshots(load(tmp_path))
    assert [step for step, _ in read] == [1, 2, 4, 8, 16, 32, 64, 100]
    assert [len(snapshot["blocks"]) for _, snapshot in read] == [1, 2, 4, 8, 16, 32, 64, 100]
    assert [snapshot["status"] for _, snapshot in read] == ["running"] * 7 + ["completed"]
    assert all(snapshot["manifest"]["run_id"] == "5f1c" for _, snapshot in read)


def test_snapshots_get_rarer_in_a_long_run():
    """Every 30 s once past the first records, and in 30 days of records a second apart at most 10 minutes apart."""

    def gaps(step_ns, steps):
        cadence = _Cadence()
        due = [step for step in range(1, steps) if cadence.due(step * step_ns)]
        return [(after - before) * step_ns / 1e9 for before, after in pairwise(due)], due

    second = 1_000_000_000
    waits, due = gaps(second, 3000)
    assert due[:12] == [1, 2, 4, 8, 16, 32, 62, 64, 94, 124, 128, 158]
    assert set(waits[11:]) == {30.0}
    waits, due = gaps(60 * second, 30 * 24 * 60)
    assert max(waits) == 600.0
    assert len(due) < 6000
    _, due = gaps(5_000_000, 100_000)
    assert len(due) < 30


def test_a_closed_writer_is_not_reopened(tmp_path, writer):
    """Once the user has closed it, write() raises and says what to do; no second event file appears, and close() is harmless."""
    sink = TensorBoardSink(writer)
    sink.write(MANIFEST)
    sink.write(make_record(1))
    writer.close()
    with pytest.raises(UsageError, match=r"writer\.close\(\) after leaving"):
        sink.write(make_record(2))
    with pytest.raises(UsageError):
        sink.write(make_summary(make_record(2)))
    sink.close()
    assert len(event_files(tmp_path)) == 1
    assert set(values(load(tmp_path), "green/power_W")) == {1}


def test_a_writer_closed_underneath_raises_too(tmp_path):
    """Where only the event file was closed, the error comes out of write() as it is."""
    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoardSink(writer)
    writer.file_writer.close()
    with pytest.raises(OSError, match="closed"):
        sink.write(make_record())
    assert len(event_files(tmp_path)) == 1


def test_a_writer_closed_before_is_opened_as_its_owner_would(tmp_path, writer):
    """A logger's writer that an earlier fit closed works again, in the same new file as the user's own points."""
    writer.add_scalar("loss", 1.0, 1)
    writer.close()
    sink = TensorBoardSink(writer)
    writer.add_scalar("loss", 0.5, 2)
    write_all(sink, MANIFEST, make_record(2))
    assert len(event_files(tmp_path)) == 2
    loaded = load(tmp_path)
    assert values(loaded, "loss") == {1: 1.0, 2: 0.5}
    assert set(values(loaded, "green/power_W")) == {2}


def test_closing_the_sink_flushes_and_leaves_the_writer_open(tmp_path, writer):
    """``close``, twice too, brings all points to disk, and the user goes on writing."""
    sink = TensorBoardSink(writer)
    write_all(sink, MANIFEST, make_record(1))
    assert set(values(load(tmp_path), "green/power_W")) == {1}
    sink.close()
    writer.add_scalar("loss", 1.0, 2)
    writer.flush()
    assert values(load(tmp_path), "loss") == {2: 1.0}


def test_what_is_no_writer_is_refused():
    """A wrong ``writer`` raises at construction with the type that is wanted."""
    with pytest.raises(ArgumentError, match="writer is a str"):
        TensorBoardSink("runs/bf16")


@pytest.mark.parametrize("name", ["x" * 10_000, "a b/../\n\0<script>", "😀", ""])
def test_hostile_names_make_harmless_tags(tmp_path, writer, name):
    """Long or odd domain names and manifests are cut to a readable tag; the event stays small."""
    record = make_record(domains=(DomainEnergy(name, 30.0, None, None, Method.ESTIMATED),))
    write_all(TensorBoardSink(writer), replace(MANIFEST, run_name=name * 20, model=name * 20), record)
    loaded = load(tmp_path)
    (tag,) = (tag for tag in loaded.Tags()["scalars"] if tag.startswith("green_detail/power_"))
    assert len(tag) < 100
    assert tag.isascii()
    assert tag.isprintable()
    assert snapshots(loaded)[0][1]["blocks"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 100_000


def test_a_directory_with_a_live_file_gets_a_sub_run(tmp_path):
    """Beside the user's open event file, ours goes to the sub-run ``green``, and each has one file."""
    theirs = SummaryWriter(str(tmp_path))
    ours = open_writer(tmp_path)
    write_all(TensorBoardSink(ours), MANIFEST, make_record())
    theirs.add_scalar("loss", 1.0, 1)
    theirs.close()
    ours.close()
    assert len(event_files(tmp_path)) == len(event_files(tmp_path / "green")) == 1
    assert load(tmp_path).Tags()["scalars"] == ["loss"]
    assert "green/power_W" in load(tmp_path / "green").Tags()["scalars"]


def ended_process():
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("owner", "opened_s", "age_s", "live"),
    [
        ((socket.gethostname(), os.getpid()), time.time(), 7200, True),  # this process, long silent
        ((socket.gethostname(), os.getpid()), 1_000_000_000, 0, False),  # an earlier process of the same id
        ((socket.gethostname(), ended_process()), time.time(), 0, False),
        (("elsewhere", 1), time.time(), 0, True),
        (("elsewhere", 1), time.time(), 7200, False),
        (("with.dots-" + socket.gethostname(), os.getpid()), time.time(), 7200, False),
    ],
    ids=["own", "reused-pid", "ended", "elsewhere-fresh", "elsewhere-silent", "dots"],
)
def test_only_a_live_event_file_makes_a_sub_run(tmp_path, owner, opened_s, age_s, live):
    """The file of an ended process, or a silent one of another machine, leaves the directory to us: a resumed run stays one run."""
    path = tmp_path / f"events.out.tfevents.{int(opened_s)}.{owner[0]}.{owner[1]}.0"
    path.touch()
    os.utime(path, (time.time() - age_s,) * 2)
    writer = open_writer(tmp_path)
    writer.close()
    assert (len(event_files(tmp_path)), (tmp_path / "green").exists()) == ((1, True) if live else (2, False))


def test_a_name_without_process_counts_by_its_age(tmp_path):
    """Event files of other libraries, which name no process, are live while fresh."""
    (tmp_path / "events.out.tfevents.1700000000.host").touch()
    open_writer(tmp_path).close()
    assert event_files(tmp_path / "green")


def test_an_unwritable_directory_is_refused(tmp_path):
    """Where ``log_dir`` is a file, opening raises with what to do."""
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="pass a log_dir"):
        open_writer(tmp_path / "file")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # tensorboard's own thread dies loudly
def test_a_full_disk_raises_and_does_not_hang(tmp_path):
    """Where the event file can't grow, write() raises before long and close() returns; what was flushed is there."""
    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoardSink(writer)
    write_all(sink, MANIFEST, make_record(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            for step in range(2, 2000):
                sink.write(make_record(step))
                if step % 10 == 0:
                    writer.flush()
        with pytest.raises(OSError, match="too large"):
            sink.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 1 in values(load(tmp_path), "green/power_W")


def test_importing_the_sinks_is_light():
    """The sinks' modules import neither torch nor tensorboard."""
    code = """
import sys
from green_torch.sinks import codec, jsonl, snapshot, tensorboard
print(sorted({"torch", "tensorboard", "numpy"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
