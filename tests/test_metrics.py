"""Metric files: exact resume, torn lines, JSON-safe values; progress on a terminal and off it."""

import io
import json
import math

from bigmed import metrics


def test_resume_drops_the_lines_after_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = metrics.JsonlWriter(path, resume_step=0)
    for step in range(1, 6):
        writer.write(step, {"loss": step / 3})
    writer.close()
    whole = path.read_bytes()
    with path.open("a") as torn:
        torn.write('{"step": 6, "lo')
    writer = metrics.JsonlWriter(path, resume_step=3)
    for step in (4, 5):
        writer.write(step, {"loss": step / 3})
    writer.close()
    assert path.read_bytes() == whole


def test_non_finite_values_are_null(tmp_path):
    writer = metrics.JsonlWriter(tmp_path / "m.jsonl", resume_step=0)
    writer.write(1, {"loss": math.nan, "acc": math.inf, "lr": 0.5})
    writer.close()
    line = json.loads((tmp_path / "m.jsonl").read_text())
    assert line == {"step": 1, "loss": None, "acc": None, "lr": 0.5}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_quiet_in_a_batch_log_and_lively_on_a_terminal():
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        progress = metrics.Progress("simclr", total=100, stream=stream)
        for step in range(1, 101):
            progress.update(step, "loss 1.0")
        progress.close()
    assert log.getvalue().splitlines() == ["simclr: step 100/100, loss 1.0"]
    assert "\r" in terminal.getvalue()


def test_durations_read_as_a_clock():
    assert metrics.duration(65) == "1:05" and metrics.duration(3723) == "1:02:03"
