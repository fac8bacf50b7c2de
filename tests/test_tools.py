"""The command-line tools that have no file of tests of their own."""

import os
import pathlib
import subprocess
import sys

import cv2
import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent


def tool(name, *flags):
    return subprocess.run(
        [sys.executable, f"tools/{name}.py", *flags],
        cwd=REPO, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_inspect_batch_draws_stored_images_and_views(tmp_path):
    out = tmp_path / "batch.png"
    flags = ["--config=configs/quickstart.py:smoke", f"--workdir={tmp_path}", f"--out={out}"]
    done = tool("inspect_batch", *flags, "--stage=micle", "--rows=3", "--draws=2")
    assert done.returncode == 0, done.stderr
    sheet = cv2.imread(str(out))
    assert sheet.shape == (3 * 32 + 2 * 4, 6 * 32 + 5 * 4, 3)  # two images and two pairs of views
    tiles = [sheet[:32, x : x + 32].astype(int) for x in range(0, 6 * 36, 36)]
    assert all(abs(a - b).mean() > 1 for i, a in enumerate(tiles) for b in tiles[:i])


def test_inspect_batch_names_a_mistake(tmp_path):
    done = tool("inspect_batch", "--config=configs/quickstart.py", f"--workdir={tmp_path}",
                "--stage=mickle")  # fmt: skip
    assert done.returncode == 2 and "did you mean 'micle'" in done.stderr


def test_bench_models_sets_a_model_beside_its_twin_with_the_rate_it_reaches():
    pytest.importorskip("torch", reason="PyTorch is in the extra 'bench'")
    flags = ("--models=minilm_l6", "--batch=1", "--size=8", "--steps=1", "--peak_tflops=0.1")
    done = tool("bench_models", *flags)
    assert done.returncode == 0, done.stderr
    *_, header, forward, train = done.stdout.splitlines()
    assert header.split()[-2:] == ["GFLOP/s", "MFU"]
    rows = [line.split() for line in (forward, train)]
    # 12 squares of the width of products a token and layer: forward, and three times of it
    for (name, mode, ours, theirs, ratio, _, rate, mfu), passes in zip(rows, (1, 3), strict=True):
        assert name == "minilm_l6" and mode == ("forward", "train")[passes // 2]
        assert float(theirs) / float(ours) == pytest.approx(float(ratio[:-1]), rel=0.1)
        flops = passes * 2 * 12 * 384**2 * 6 * 8
        assert float(rate) * float(ours) * 1e6 == pytest.approx(flops, rel=0.1)
        assert float(rate) == pytest.approx(float(mfu[:-1]), abs=0.11)  # of 100 GFLOP/s


def test_bench_data_reports_both_loops_and_their_ratio():
    done = tool("bench_data", "--rounds=2", "--batches=2", "--batch=16")
    assert done.returncode == 0, done.stderr
    assert "pipeline" in done.stdout and "ratio" in done.stdout
