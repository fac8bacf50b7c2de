"""What the benchmarks share: timing in turns, and what devices are called and sold for."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# dense bf16 TFLOP/s, by a part of `device_kind`; the first that fits
PEAK_TFLOPS = {
    "H200": 989, "H100": 989, "A100": 312, "L40": 181, "L4": 121, "B200": 2250,
    "TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459, "TPU v6 lite": 918,
}  # fmt: skip


def time_in_turns(runs: dict[str, Callable[[], None]], steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each, after two untimed ones."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(steps + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def device_name(device: Any) -> str:
    """What JAX calls the device; of a CPU, where that says nothing, what Linux knows of it too."""
    cpus = Path("/proc/cpuinfo")
    if device.platform != "cpu" or not cpus.exists():
        return device.device_kind
    first = cpus.read_text().split("\n\n")[0]
    known = dict(map(str.strip, line.split(":", 1)) for line in first.splitlines())
    kept = [f"{key} {known[key]}" for key in ("cpu family", "model") if key in known]
    return ", ".join([known.get("model name", device.device_kind), *kept])


def peak_flops(device: Any, given_tflops: float | None) -> float | None:
    """FLOP/s that `device` is sold for, in bf16; None if unknown and not given."""
    if given_tflops:
        return given_tflops * 1e12
    kind = device.device_kind
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in kind), None)
