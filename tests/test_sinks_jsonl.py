"""A run's file survives full disks, kills and rivals; what was flushed can be read."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from green_torch.errors import ArgumentError, LedgerError, UsageError
from green_torch.sinks.codec import to_dict
from green_torch.sinks.jsonl import JsonlSink, next_segment, read_jsonl, read_last, run_file
from tests.test_sinks_codec import MANIFEST, make_record, make_summary


def child(code, *arguments, **options):
    """A Python process that runs the code, with a sink's imports at hand."""
    imports = "import sys\nfrom green_torch.sinks.jsonl import *\nfrom tests.test_sinks_codec import MANIFEST, make_record, make_summary\n"
    command = [sys.executable, "-c", imports + code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def written(tmp_path, *items, tail=b""):
    """A file with these items, and what else stands at its end."""
    sink = JsonlSink(run_file(tmp_path, 0, 1))
    for item in items:
        sink.write(item)
    sink.close()
    with sink.path.open("ab") as file:
        file.write(tail)
    return sink.path


def test_a_run_reads_back_as_written(tmp_path):
    """Manifest, records and summary come back equal, from the path that the design names."""
    records = tuple(make_record(step) for step in (1, 2, 3))
    summary = make_summary(records[-1])
    path = written(tmp_path, MANIFEST, *records, summary)
    assert path == tmp_path / "green" / "rank-00000.segment-0001.jsonl"
    run = read_jsonl(path)
    assert (run.manifest, run.records, run.summary, run.torn) == (MANIFEST, records, summary, False)
    assert [json.loads(line)["type"] for line in path.read_text().splitlines()] == [
        "manifest",
        "record",
        "record",
        "record",
        "summary",
    ]


def test_the_last_manifest_counts(tmp_path):
    """A manifest written again replaces the first."""
    newer = replace(MANIFEST, parameters=7)
    assert read_jsonl(written(tmp_path, MANIFEST, make_record(), newer)).manifest == newer


def test_every_line_is_in_the_file_at_once(tmp_path):
    """A record may be the last for hours (a long evaluation, a slow step): it waits for no other."""
    sink = JsonlSink(run_file(tmp_path, 0, 1))
    for number, item in enumerate((MANIFEST, make_record(1), make_record(2), make_summary(make_record(2))), start=1):
        sink.write(item)
        assert len(sink.path.read_bytes().splitlines()) == number
    sink.close()


def test_closing_twice_is_harmless_and_writing_after_is_not_silent(tmp_path):
    """``close`` may come twice; a write after it raises and leaves the file as it was."""
    sink = JsonlSink(run_file(tmp_path, 0, 1))
    sink.write(MANIFEST)
    sink.close()
    sink.close()
    before = sink.path.read_bytes()
    with pytest.raises(UsageError, match="closed"):
        sink.write(make_record())
    assert sink.path.read_bytes() == before


def test_the_next_segment_follows_the_last_of_the_same_rank(tmp_path):
    """Segments count from 1 for each rank by itself; other files don't matter."""
    assert next_segment(tmp_path, 0) == 1
    for rank, segment in ((0, 1), (0, 12), (1, 30)):
        JsonlSink(run_file(tmp_path, rank, segment)).close()
    (tmp_path / "green" / "rank-00000.segment-9999.jsonl.bak").touch()
    assert [next_segment(tmp_path, rank) for rank in (0, 1, 2)] == [13, 31, 1]


def test_a_taken_segment_is_left_alone(tmp_path):
    """Where the file exists, the next free segment is taken and told; the first is untouched."""
    first = written(tmp_path, MANIFEST)
    before = first.read_bytes()
    sink = JsonlSink(first)
    assert (sink.segment, sink.path) == (2, run_file(tmp_path, 0, 2))
    sink.write(MANIFEST)
    sink.close()
    assert first.read_bytes() == before


def test_two_processes_never_share_a_file(tmp_path):
    """Two processes that open the same segment at the same moment, 20 times, end up with 40 files of one writer each."""
    code = """
from dataclasses import replace
sys.stdin.readline()
for number in range(20):
    sink = JsonlSink(run_file(sys.argv[1], 0, 1))
    sink.write(replace(MANIFEST, run_id=f"{sys.argv[2]}-{number}", segment=sink.segment))
"""
    rivals = [child(code, tmp_path, name) for name in "ab"]
    for rival in rivals:
        rival.stdin.write("\n")
        rival.stdin.flush()
    assert [rival.wait() for rival in rivals] == [0, 0]
    for rival in rivals:
        rival.communicate()
    runs = [read_jsonl(run_file(tmp_path, 0, segment)) for segment in range(1, 41)]
    assert {run.manifest.run_id for run in runs} == {f"{name}-{number}" for name in "ab" for number in range(20)}
    assert [run.manifest.segment for run in runs] == list(range(1, 41))


def test_a_killed_writer_leaves_every_flushed_record(tmp_path):
    """After SIGKILL in the midst of writing, all that was flushed reads back in order."""
    code = """
sink = JsonlSink(run_file(sys.argv[1], 0, 1))
sink.write(MANIFEST)
for step in range(1, 1_000_000):
    sink.write(make_record(step))
    print(step, flush=True)
"""
    writer = child(code, tmp_path)
    for _ in range(50):
        flushed = int(writer.stdout.readline())
    writer.kill()
    writer.communicate()
    run = read_jsonl(run_file(tmp_path, 0, 1))
    assert [record.step for record in run.records] == list(range(1, len(run.records) + 1))
    assert len(run.records) >= flushed == 50
    assert read_last(run_file(tmp_path, 0, 1)).records[-1] == run.records[-1]


def test_a_full_disk_raises_and_harms_no_earlier_line(tmp_path):
    """Where the file can't grow, write() raises; earlier lines are whole, the cut one is the last; with room again it is completed."""
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = run_file(sys.argv[1], 0, 1)
sink = JsonlSink(path)
sink.write(MANIFEST)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
step = 0
try:
    for step in range(1, 100):
        sink.write(make_record(step))
except OSError:
    run = read_jsonl(path)
    assert path.stat().st_size == 10_000 and run.torn and len(run.records) == step - 1, (run.torn, len(run.records), step)
try:
    sink.close()
except OSError:
    pass
else:
    raise SystemExit("close() hid the full disk")
sink = JsonlSink(run_file(sys.argv[1], 0, 2))
sink.write(MANIFEST)
try:
    for step in range(1, 100):
        sink.write(make_record(step))
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sink.write(make_record(step + 1))
    sink.close()
print(step + 1)
"""
    writer = child(code, tmp_path)
    last, _ = writer.communicate()
    assert writer.returncode == 0
    cut, mended = (read_jsonl(run_file(tmp_path, 0, segment)) for segment in (1, 2))
    assert cut.torn
    assert len(cut.records) >= 3
    assert not mended.torn
    assert [record.step for record in mended.records] == list(range(1, int(last) + 1))


@pytest.mark.parametrize(
    "tail", [b'{"type":"rec', b"\xff\xfe", b"\0\0\0\0", b'{"type":"rec\n', b'{"type":"record","name":"\xc3']
)
def test_a_torn_last_line_is_left_out(tmp_path, tail):
    """Whatever the last line was cut to, everything before it reads back, and ``torn`` says so."""
    path = written(tmp_path, MANIFEST, make_record(1), make_record(2), tail=tail)
    run = read_jsonl(path)
    assert run.torn
    assert [record.step for record in run.records] == [1, 2]
    last = read_last(path)
    assert (last.torn, last.records) == (True, (make_record(2),))


@pytest.mark.parametrize("keep", range(0, 60, 7))
def test_a_file_cut_anywhere_in_its_last_line_reads(tmp_path, keep):
    """Cut at any byte of the last line, the file reads up to the line before; without its newline alone, the line is whole."""
    path = written(tmp_path, MANIFEST, make_record(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1][:keep])
    assert read_jsonl(path).records == (make_record(1),)
    path.write_bytes(whole[:-1])
    assert (read_jsonl(path).records, read_jsonl(path).torn) == ((make_record(1),), False)


def test_garbage_in_the_middle_names_its_line(tmp_path):
    """A line that is not ours before the last one raises with its number; near the end the short reader sees it too."""
    path = written(
        tmp_path, MANIFEST, make_record(1), tail=b'{"type":"rec\n' + json.dumps(to_dict(make_record(2))).encode() + b"\n{}\n"
    )
    with pytest.raises(LedgerError, match=r"line 3 of .*segment-0001\.jsonl"):
        read_jsonl(path)
    path = written(tmp_path, MANIFEST, tail=b"garbage\n{}")
    with pytest.raises(LedgerError, match="line 2"):
        read_jsonl(path)
    path = written(tmp_path, MANIFEST, make_record(1), tail=b"garbage\n[]")
    with pytest.raises(LedgerError, match="near the end"):
        read_last(path)


def test_a_whole_line_that_is_not_ours_is_refused_even_at_the_end(tmp_path):
    """JSON of an unknown type is no torn line."""
    path = written(tmp_path, MANIFEST, tail=b'{"type":"banana"}\n')
    for reader in (read_jsonl, read_last):
        with pytest.raises(LedgerError, match="banana"):
            reader(path)


@pytest.mark.parametrize("content", [b"", b'{"type":"mani', b"\n"])
def test_a_file_without_manifest_is_refused(tmp_path, content):
    """An empty or at once cut file raises and says why."""
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    for reader in (read_jsonl, read_last):
        with pytest.raises(LedgerError, match="no manifest"):
            reader(path)


def test_a_missing_file_is_refused(tmp_path):
    """No file raises LedgerError, not a bare OSError."""
    for reader in (read_jsonl, read_last):
        with pytest.raises(LedgerError, match="No such file"):
            reader(tmp_path / "none.jsonl")


def test_read_last_finds_the_run_so_far(tmp_path):
    """From a file of many chunks: the last record; with a summary also that, and its manifest."""
    records = [make_record(step) for step in range(1, 301)]
    newer = replace(MANIFEST, parameters=9)
    path = written(tmp_path, MANIFEST, *records)
    assert path.stat().st_size > 3 * 64 * 1024
    assert read_last(path).records == (records[-1],)
    path = written(tmp_path, MANIFEST, *records, newer)
    assert read_last(path).manifest == newer
    summary = make_summary(records[-1], manifest=newer, warnings=("w" * 200_000,))
    path = written(tmp_path, MANIFEST, *records, summary)
    last = read_last(path)
    assert (last.manifest, last.records, last.summary) == (newer, (records[-1],), summary)
    assert read_last(written(tmp_path, MANIFEST)).records == ()


def test_a_directory_that_cannot_be_written_raises_at_once(tmp_path):
    """Where ``log_dir`` is a file, or the name is taken and can't be counted up, construction raises with what to do."""
    (tmp_path / "file").touch()
    for path in (run_file(tmp_path / "file", 0, 1), tmp_path / "file"):
        with pytest.raises(ArgumentError, match="pass a log_dir"):
            JsonlSink(path)
