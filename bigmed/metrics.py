"""Metric files, TensorBoard events and progress: what a run says while it works."""

import json
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

QUIET_SECONDS = 30.0  # between the plain progress lines of a batch job


def json_safe(value: Any) -> Any:
    """A scalar as JSON can hold it: NaN and infinities become null."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of one."""
    path = pathlib.Path(path)
    replace_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def temporary_for(path: pathlib.Path) -> pathlib.Path:
    """Beside `path`, what is to take its place; of this process and thread alone.

    The cells of a sweep run in threads of one process.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")


def replace_text(path: pathlib.Path, text: str) -> None:
    """Puts `text` in the place of a file, also if the power fails in between."""
    temporary = temporary_for(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file; [] where there is none. A torn last line is left out."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


class JsonlWriter:
    """Appends one JSON object a line.

    Args:
      path: the file.
      resume_step: keep only the lines whose 'step' is at most this, so that a run that was killed
        after its last checkpoint writes the lines after it once. None keeps every line.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int | None = None):
        self._path = pathlib.Path(path)
        lines = read_jsonl(self._path)
        if resume_step is not None:
            lines = [line for line in lines if line["step"] <= resume_step]
        replace_text(self._path, "".join(map(_line, lines)))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(_line({"step": step, **{k: json_safe(v) for k, v in values.items()}}))
        self._file.flush()

    def sync(self) -> None:
        """Waits until what was written would survive a power cut."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


class TensorBoard:
    """TensorBoard scalars of one stage; later events replace those after a resumed step."""

    def __init__(self, directory: str | os.PathLike, resume_step: int = 0):
        from tensorboardX import SummaryWriter  # imported late: it costs start-up time

        self._writer = SummaryWriter(str(directory), purge_step=resume_step, write_to_disk=True)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        self._writer.close()


class Progress:
    """A bar on a terminal; in a batch log, a plain line at most every `QUIET_SECONDS`."""

    def __init__(self, label: str, total: int, start: int = 0, stream: Any = None):
        self._label, self._total = label, total
        self._stream = sys.stderr if stream is None else stream
        self._said = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=start, desc=label, unit="step", file=self._stream,
                dynamic_ncols=True, mininterval=0.5,
            )  # fmt: skip

    def update(self, step: int, note: str) -> None:
        """Says that `step` of the total steps are done, with a note such as the images/s."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._said >= QUIET_SECONDS or step == self._total:
            self._said = time.monotonic()
            self.say(f"{self._label}: step {step}/{self._total}, {note}")

    def say(self, line: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Stopwatch:
    """Step time, data wait and time to go over the steps since the last reading."""

    def __init__(self, step: int) -> None:
        self._since, self._step, self._waited = time.monotonic(), step, 0.0

    def waited(self, seconds: float) -> None:
        """Adds to the time that the host spent waiting for data."""
        self._waited += seconds

    def read(self, step: int, batch_size: int, total_steps: int) -> dict[str, float]:
        """Figures since the last call, `step` being done; starts anew. Times are in seconds."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        steps = max(step - self._step, 1)
        figures = {
            "images_per_second": batch_size * steps / elapsed,
            "step_seconds": elapsed / steps,
            "data_wait_seconds": self._waited / steps,
            "data_wait_fraction": self._waited / elapsed,
            "eta_seconds": (total_steps - step) * elapsed / steps,
        }
        self.__init__(step)
        return figures


def duration(seconds: float) -> str:
    """'1:02:03' or '4:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
