"""The command, end to end in processes of its own: kills, signals, mistakes, other machines."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from processes import finish, start_two

from bigmed import checkpoint, metrics, sharding

REPO = pathlib.Path(__file__).resolve().parent.parent
STEPS = 40
TINY = ("--config.model.name=tiny_model:Model", "--config.augment.size=24")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One compilation cache for every run of this file."""
    return tmp_path_factory.mktemp("cache")


def command(workdir, cache, *flags, config="configs/simclr.py:smoke"):
    return [
        sys.executable, "-m", "bigmed.main", "--config", config, "--workdir", str(workdir),
        "--compile_cache", str(cache), *TINY, *flags,
    ]  # fmt: skip


def environment(devices=1):
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(REPO / "tests"),
    }


def run(workdir, cache, *flags, devices=1, timeout=300, **kwargs):
    return subprocess.run(
        command(workdir, cache, *flags, **kwargs),
        cwd=REPO, env=environment(devices), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


TRAIN_ONLY = (f"--config.stage.simclr.steps={STEPS}", "--config.evaluate=()")
STAGE = "01_simclr"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("whole")
    done = run(workdir, cache, *TRAIN_ONLY)
    assert done.returncode == 0, done.stderr
    return workdir


def final_state(workdir):
    flat, meta = checkpoint.load_flat(workdir / STAGE / "checkpoints")
    assert meta["step"] == STEPS
    return flat


def assert_bit_equal(workdir, reference):
    got, want = final_state(workdir), final_state(reference)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    metrics_file = pathlib.Path(STAGE) / "metrics.jsonl"
    assert (workdir / metrics_file).read_bytes() == (reference / metrics_file).read_bytes()


def start_until(workdir, cache, step, *flags, devices=1):
    """Starts the command and returns it as soon as its metrics have reached `step`."""
    process = subprocess.Popen(
        command(workdir, cache, *TRAIN_ONLY, *flags),
        cwd=REPO, env=environment(devices), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        lines = metrics.read_jsonl(workdir / STAGE / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return process
        time.sleep(0.01)
    raise AssertionError(f"never reached step {step}: {process.communicate()[1]}")


def test_killed_at_any_moment_and_run_again_is_bit_equal(tmp_path, cache, uninterrupted):
    """kill -9 twice, in different places, with other numbers of loader workers and threads."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    for step, loader in ((5, "--config.data.workers=1"), (20, "--config.data.threads=1")):
        process = start_until(tmp_path, cache, step, loader)
        time.sleep(rng.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = run(tmp_path, cache, *TRAIN_ONLY)
    assert last.returncode == 0, last.stderr
    assert_bit_equal(tmp_path, uninterrupted)
    events = [r.get("event") for r in metrics.read_jsonl(tmp_path / STAGE / "timing.jsonl")]
    assert "restarted" in events


@pytest.mark.parametrize("name", ["c2l", "convirt"])
def test_queue_teacher_plateau_and_texts_go_on_bit_equal_after_a_kill(tmp_path, cache, name):
    """All that an objective, a schedule or a sentence's draw depends on is in the state."""
    flags = (
        f"--config.stage.{name}.steps={STEPS}", "--config.evaluate=()", "--config.optim.patience=1"
    )  # fmt: skip

    def start(workdir):
        return subprocess.Popen(
            command(workdir, cache, *flags, config=f"configs/{name}.py:smoke"),
            cwd=REPO, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    said = process.communicate(timeout=280)[1]
    assert process.returncode == 0, said
    process = start(killed)
    file = pathlib.Path(f"01_{name}") / "metrics.jsonl"
    while not any(line["step"] >= 9 for line in metrics.read_jsonl(killed / file)):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process = start(killed)
    said = process.communicate(timeout=280)[1]
    assert process.returncode == 0, said
    assert (killed / file).read_bytes() == (whole / file).read_bytes()
    got, want = (
        checkpoint.load_flat(folder / f"01_{name}" / "checkpoints")[0] for folder in (killed, whole)
    )
    expected = "extra/queue/keys" if name == "c2l" else "waited"
    assert any(expected in leaf for leaf in want)
    for leaf in want:
        np.testing.assert_array_equal(got[leaf], want[leaf], err_msg=leaf)


def test_sigterm_saves_and_exits_75_and_goes_on(tmp_path, cache, uninterrupted):
    process = start_until(tmp_path, cache, 2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said
    saved = max(int(p.name) for p in (tmp_path / STAGE / "checkpoints").iterdir())
    assert 2 <= saved < STEPS and f"step {saved} is saved" in said
    assert run(tmp_path, cache, *TRAIN_ONLY).returncode == 0
    assert_bit_equal(tmp_path, uninterrupted)


SLOW = ("--config.optim.lr=1e-6",)


@pytest.fixture(scope="module")
def slow(tmp_path_factory, cache):
    """A run with a rate near 0, with which runs on other devices agree to rounding at every step.

    (With a real rate they part after some tens of steps, as any two roundings do.)
    """
    workdir = tmp_path_factory.mktemp("slow")
    done = run(workdir, cache, *TRAIN_ONLY, *SLOW)
    assert done.returncode == 0, done.stderr
    return workdir


def assert_losses_agree(workdir, reference):
    found, wanted = (
        metrics.read_jsonl(folder / STAGE / "metrics.jsonl") for folder in (workdir, reference)
    )
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for got, want in zip(found, wanted, strict=True):
        assert got["step"] == want["step"]
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=2e-5)


def test_continues_on_another_number_of_devices(tmp_path, cache, slow):
    """Batches and draws are the same."""
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
    process = start_until(tmp_path, cache, 5, *SLOW, *mesh, devices=4)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert run(tmp_path, cache, *TRAIN_ONLY, *SLOW).returncode == 0
    assert_losses_agree(tmp_path, slow)


def start_twice(workdir, cache, *flags):
    """The command as two processes of one run."""

    def one(port, number):
        own = ("--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
        return command(workdir, cache, *TRAIN_ONLY, *flags, *own, f"--process_id={number}")

    return start_two(one, environment())


@pytest.mark.parametrize("axis", ["data", "tensor"])
def test_two_processes_train_as_one(tmp_path, cache, slow, axis):
    """Also where the processes share every row, because the tensor axis spans them."""
    mesh = ("--config.mesh.data=1", "--config.mesh.tensor=2") if axis == "tensor" else ()
    finish(start_twice(tmp_path, cache, *SLOW, *mesh))
    assert_losses_agree(tmp_path, slow)


def test_sigterm_to_one_of_two_processes_stops_both(tmp_path, cache):
    processes = start_twice(tmp_path, cache, "--config.stage.simclr.steps=100000")
    deadline = time.monotonic() + 240
    while not metrics.read_jsonl(tmp_path / STAGE / "metrics.jsonl"):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, 75)
    assert len(list((tmp_path / STAGE / "checkpoints").iterdir())) >= 1


def test_hosts_number_their_questions_through_all_stages(monkeypatch):
    """Step numbers begin anew in each stage: one agreed on in a stage may never come after it."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda n: asked.append(n) or n == 4
    )
    stop = sharding.preemption_watch(lambda: False)
    assert [stop() for _ in range(5)] == [False] * 4 + [True]
    assert asked == [0, 1, 2, 3, 4]


def test_a_finished_workdir_says_so_and_exits_0(uninterrupted, cache):
    again = run(uninterrupted, cache, *TRAIN_ONLY)
    assert again.returncode == 0 and "is finished" in again.stderr


def test_a_nan_stops_names_the_tensor_and_keeps_the_last_good_state(tmp_path, cache):
    broken = "--config.objective.name=broken_objective:Objective"
    stopped = run(tmp_path, cache, *TRAIN_ONLY, broken)
    assert stopped.returncode == 1
    line = stopped.stderr.strip().splitlines()[-1]
    assert "batch 5 gives a non-finite 'activations/3_embeddings'" in line
    flat, meta = checkpoint.load_flat(tmp_path / STAGE / "checkpoints")
    assert meta["step"] == 5 and all(np.isfinite(leaf).all() for leaf in flat.values())
    again = run(tmp_path, cache, *TRAIN_ONLY, broken)
    assert again.returncode == 1 and again.stderr.strip().splitlines()[-1] == line
    goes_on = run(tmp_path, cache, *TRAIN_ONLY, broken, "--config.on_non_finite=rollback")
    assert goes_on.returncode == 0, goes_on.stderr


def test_a_nan_rolls_back_by_policy_and_leaves_the_batch_out(tmp_path, cache):
    broken = "--config.objective.name=broken_objective:Objective"
    rolled = run(tmp_path, cache, *TRAIN_ONLY, broken, "--config.on_non_finite=rollback")
    assert rolled.returncode == 0, rolled.stderr
    assert "the batch left out" in rolled.stderr
    assert json.loads((tmp_path / STAGE / "skipped.json").read_text()) == [5]
    lines = metrics.read_jsonl(tmp_path / STAGE / "metrics.jsonl")
    assert [i for i, line in enumerate(lines) if line["loss"] is None] == [5]
    rates = [line["lr"] for line in lines]  # the schedule counts updates, and batch 5 was none
    assert rates[4] != rates[5] == rates[6] != rates[7]
    assert all(np.isfinite(leaf).all() for leaf in final_state(tmp_path).values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.data.batch_sise=3"], "batch_size"),
        (["--config.data.batch_size=many"], "many"),
        (["--confg=x"], "confg"),
        (["--config=configs/simclr.py:smoky"], "'smoky': valid: smoke"),
        (["--config=configs/simclar.py"], "No such file or directory: 'configs/simclar.py'"),
        (["--config.stages=('simclr','mickle')"], "'mickle'"),
        (["--config.data.batch_size=7"], "config.data.batch_size=7 does not divide"),
        (["--config.micro_batch.count=3"], "in 3 micro-batches does not divide"),
        (["--config.micro_batch.batch_norm=all"], "valid: frozen, micro"),
        (["--config.objective.temperature=0.0"], "config.objective.temperature=0.0"),
        (["--config.mesh.data=3"], "does not fit 2 devices"),
        (["--config.data.source.phantom.dir=/nowhere/at/all"], "/nowhere/at/all"),
        (["--config.data.source.phantom.split=trian"], "trian"),
        (["--config.objective.name=simcl"], "did you mean 'simclr'"),
        (["--config.model.name=vit", "--config.model.variant=Q/8"], "config.model.variant='Q/8'"),
        (["--config.optim.name=larz"], "did you mean 'lars'"),
        (["--config.augment.recipe=cxrr"], "did you mean 'cxr'"),
        (["--config.augment.crop_area_min=2.0"], "crop_area"),
        (["--config.on_non_finite=ignore"], "valid: stop, rollback"),
        (["--config.precision=f16"], "valid: bf16, f32"),
        (["--process_id=1"], "need --distributed"),
        (["--distributed"], "--coordinator"),
        (["--config.seeds=()"], "config.seeds is empty"),
        (["--config.log.every=0"], "config.log.every=0"),
        (["--config.evaluator.linear.fraction=3.0"], "fraction=3.0"),
        (["--config.stage.simclr.epochs=1.0"], "give exactly one"),
        (["--config.objective.name=micle"], "config.data.pairs"),
        (["--config.init_from.allow_pickle=True"], "is of init_from.naming or"),
    ],
    ids=lambda value: value[0].split("=")[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_a_mistake_is_one_plain_line_and_exit_2(tmp_path, cache, flags, said):
    failed = run(tmp_path, cache, *flags, devices=2)
    assert failed.returncode == 2, failed.stderr
    lines = [x for x in failed.stderr.strip().splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and lines[0] == failed.stderr.strip().splitlines()[-1]
    assert said in lines[0] and "Traceback" not in failed.stderr
    assert not list(tmp_path.rglob("checkpoints/*")), "nothing half-written"
    assert not (tmp_path / "config.json").exists(), "the corrected command may use this workdir"


def test_a_checkpoint_of_another_model_is_refused(tmp_path, cache, uninterrupted):
    there = uninterrupted / STAGE / "checkpoints"
    failed = run(
        tmp_path, cache, *TRAIN_ONLY, "--config.model.variant=mu/16",
        f"--config.init_from.checkpoints={there}",
    )  # fmt: skip
    assert failed.returncode == 2
    assert "weights do not fit" in failed.stderr and "in the source" in failed.stderr


def test_another_config_in_a_used_workdir_is_refused(uninterrupted, cache):
    failed = run(uninterrupted, cache, *TRAIN_ONLY, "--config.objective.temperature=0.7")
    assert failed.returncode == 2
    assert "config.objective.temperature was 0.1 and is 0.7" in failed.stderr


def test_help_is_quick_and_imports_no_jax():
    code = "import sys, bigmed.main; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
    shown = subprocess.run(
        [sys.executable, "-m", "bigmed.main", "--help"], cwd=REPO, capture_output=True, text=True
    )
    assert "--workdir" in shown.stdout
