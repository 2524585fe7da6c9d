"""metrics.jsonl: written by a trainer that may be killed, followed by a flow."""

from pathlib import Path

from sdft.stagelog import METRICS, ROLLOUTS, MetricsReader, StageLog, read_metrics


def steps(log: StageLog, *numbers: int) -> None:
    for number in numbers:
        log.step(number, {"divergence": 1.0 / number})


def test_a_resumed_log_begins_with_the_lines_of_its_checkpoint(tmp_path: Path) -> None:
    log = StageLog(tmp_path, b"")
    steps(log, 1, 2)
    known = log.lines
    steps(log, 3)
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'{"step": 4, "ti')  # killed in the middle of a line
    reader = MetricsReader(tmp_path / METRICS)
    assert [line.step for line in reader.new()] == [1, 2, 3]
    again = StageLog(tmp_path, known)
    steps(again, 3, 4)
    assert [line.step for line in reader.new()] == [4], "each step once, whoever wrote it"
    assert [line.step for line in read_metrics(tmp_path / METRICS)] == [1, 2, 3, 4]


def test_what_altered_the_file_is_undone_by_the_next_start(tmp_path: Path) -> None:
    log = StageLog(tmp_path, b"")
    steps(log, 1, 2)
    whole = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(whole.replace(b"0.5", b"0.6"))
    StageLog(tmp_path, log.lines)
    assert (tmp_path / METRICS).read_bytes() == whole


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    log = StageLog(tmp_path, b"")
    steps(log, 1)
    whole = log.lines
    reader = MetricsReader(tmp_path / METRICS)
    (tmp_path / METRICS).write_bytes(whole[:10])
    assert reader.new() == []
    with (tmp_path / METRICS).open("ab") as file:
        file.write(whole[10:])
    assert [line.step for line in reader.new()] == [1]
    assert reader.new() == []


def test_rollouts_of_steps_that_are_run_again_are_dropped(tmp_path: Path) -> None:
    log = StageLog(tmp_path, b"")
    steps(log, 1, 2)
    known = log.lines
    row = {"id": "a", "prompt": "p", "completion": "c", "tokens": 1, "finished": True}
    for step in (1, 3):
        log.rollout({"step": step, "divergence": 0.0} | row)
        log.flush_rollouts(step + 1)
    (tmp_path / ROLLOUTS / ".step-000002.parquet.partial").touch()  # the disk was full
    StageLog(tmp_path, known)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-000002.parquet"]
