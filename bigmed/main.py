"""`python -m bigmed.main --config configs/x.py[:arg] --workdir DIR [--config.a.b=value ...]`.

Exit codes: 0 finished; 2 a mistake of the user's, named in one line; 75 stopped on SIGTERM or
SIGINT after saving (run the same command again to go on); 1 anything else.
"""

import importlib.util
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import config_flags

from bigmed import errors, host_memory

app.define_help_flags()
sys.path.append(str(pathlib.Path(__file__).parents[1]))  # configs import one another from there

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything the run makes goes.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Start jax.distributed, one process a host; found out on Slurm, TPU, GKE."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many, where not found out.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, where not found out.")
COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache", "~/.cache/bigmed/xla", "Where compiled programs are kept; '' for nowhere."
)


def main(argv: list[str]) -> int:
    """Parses the command line, runs the curriculum and returns the exit code."""
    try:
        workdir = parse(argv)
        stop = _catch_signals()
        _start_jax()
        from bigmed import curriculum  # late: --help and mistakes answer at once

        command = ["python", "-m", "bigmed.main", *argv[1:]]
        print(curriculum.run(CONFIG.value, workdir, stop, command))
    except errors.UserError as error:
        return _say(f"error: {error}", errors.EXIT_USER_ERROR)
    except errors.Preempted as error:
        return _say(f"{error}; run the same command again to go on", errors.EXIT_PREEMPTED)
    except errors.NonFiniteError as error:
        return _say(f"error: {error}", errors.EXIT_FAILURE)
    return errors.EXIT_OK


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return code


def parse(argv: list[str]) -> pathlib.Path:
    """Parses the flags; returns the workdir, which exists.

    Raises:
      UserError: an unknown flag or config key, a value of the wrong type, a missing file.
    """
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is not None:
            CONFIG.value.keys()  # a file that did not load raises only when it is used
    except Exception as error:  # absl, the config flag and a config's own code raise what they like
        raise errors.UserError(_in_one_line(error)) from error
    if len(rest) > 1:
        raise errors.UserError(f"'{rest[1]}' is no flag; flags begin with --")
    given = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if not DISTRIBUTED.value and any(value is not None for value in given):
        raise errors.UserError("--coordinator, --num_processes, --process_id need --distributed")
    if CONFIG.value is None or not WORKDIR.value:
        raise errors.UserError("--config configs/NAME.py and --workdir DIR are both needed")
    workdir = pathlib.Path(WORKDIR.value).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.UserError(f"--workdir {workdir} cannot be made: {error.strerror}") from error
    if not os.access(workdir, os.W_OK):
        raise errors.UserError(f"--workdir {workdir} cannot be written to")
    return workdir


def _in_one_line(error: Exception) -> str:
    if error.args and isinstance(error.args[0], KeyError):  # a KeyError shows its argument's repr
        return f"the config has no such key: {' '.join(error.args[0].args[0].split())}"
    lines = [line.strip() for line in str(error).splitlines()]
    if any(line.startswith("Traceback") for line in lines):  # of the config's code, after the flag
        lines = [lines[0].split(": ")[0] + ":", lines[-1].removeprefix("ValueError: ")]
    return " ".join(line for line in lines if line)


def _catch_signals() -> Callable[[], bool]:
    """SIGTERM and a first Ctrl-C ask the run to stop after the step at hand."""
    asked = []

    def ask(number: int, frame: object) -> None:
        del frame
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means now

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    return lambda: bool(asked)


def _start_jax() -> None:
    if not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")):
        host_memory.keep_freed_memory()  # JAX will run on the CPU
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("bigmed").setLevel(logging.INFO)
    import jax

    if DISTRIBUTED.value:
        try:
            jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        except ValueError as error:
            raise errors.UserError(
                f"--distributed: {error} (give --coordinator, --num_processes and --process_id)"
            ) from error
    # Programs for several CPU devices or hosts that are read back from the cache begin their
    # collectives in no fixed order, and then wait for one another for ever (jax 0.10).
    if COMPILE_CACHE.value and not (jax.default_backend() == "cpu" and jax.device_count() > 1):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(COMPILE_CACHE.value))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
