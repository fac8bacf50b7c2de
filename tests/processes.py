"""Two processes of one run on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

JOINED = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", {devices})
jax.distributed.initialize("127.0.0.1:{port}", 2, {number})
"""
TESTS = pathlib.Path(__file__).resolve().parent


def start_two(command, env=None):
    """Starts `command(port, number)`, a list, for numbers 0 and 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", **(env or {})}
    return [
        subprocess.Popen(
            command(port, str(number)), cwd=TESTS.parent, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip


def finish(processes, returncode=0, timeout=280):
    """What each of them printed; all must end with `returncode`."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == returncode, errors[-3000:]
    return [out for out, _ in said]


def run_two(code, *arguments, devices=1):
    """What Python code printed as the two processes of a run, each with so many devices.

    `sys.argv[1:]` are the arguments.
    """
    own = [str(argument) for argument in arguments]
    return finish(
        start_two(
            lambda port, number: [
                sys.executable, "-c", JOINED.format(port=port, number=number, devices=devices)
                + code, *own,
            ]
        )
    )  # fmt: skip
