"""Curves, label efficiency, exports and comparisons of a report; the report in a real browser."""

import csv
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from made_up import NAMES, Checker, N, made_up_run, row
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve

from bigmed import statistics
from bigmed.evaluators.features import write_npz
from bigmed.report import curves, efficiency, export, html, runs

REPO = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def workdir(tmp_path):
    return made_up_run(tmp_path / "run")


def predictions(seed=0, task="multi_label"):
    rng = np.random.default_rng(seed)
    if task == "multi_label":
        labels = rng.integers(-2, 2, size=(N, 3)).astype(np.int8)
        scores = np.clip(0.3 * labels + rng.random((N, 3)), 0, 1).round(1)  # with ties
    else:
        labels = np.eye(3, dtype=np.int8)[rng.integers(3, size=N)]
        scores = rng.random((N, 3)) + labels
        scores /= scores.sum(axis=1, keepdims=True)
    return {"labels": labels, "scores": scores, "class_names": np.array(NAMES)}


def test_curves_are_scikit_learns():
    one = predictions()
    known = one["labels"][:, 1] >= 0
    y, score = one["labels"][known, 1], one["scores"][known, 1]
    tpr, precision = curves.roc_and_precision(one, 1)
    false, true, _ = roc_curve(y, score)
    np.testing.assert_allclose(tpr, np.interp(curves.GRID, false, true), atol=1e-12)
    found, recall, _ = precision_recall_curve(y, score)
    for at, value in zip(curves.GRID, precision, strict=True):
        reaching = np.flatnonzero(recall[:-1] >= at - 1e-12)
        # the highest threshold that reaches the recall
        assert value == pytest.approx(found[reaching[-1]])
    one["labels"][:] = 0
    assert curves.roc_and_precision(one, 1) is None


def test_reliability_and_confusion_count_by_hand():
    one = predictions(task="single_label")
    shown, came_true = curves.reliability([one, one], "single_label")
    p = one["scores"].max(axis=1)
    right = one["scores"].argmax(axis=1) == one["labels"].argmax(axis=1)
    bins = [np.floor(p * 10) == b for b in range(10)]
    expected = [(p[b].mean(), right[b].mean()) for b in bins if b.any()]
    np.testing.assert_allclose(np.stack([shown, came_true], axis=1), expected)
    one["labels"][:5] = -2
    actual, said = one["labels"][5:].argmax(axis=1), one["scores"][5:].argmax(axis=1)
    np.testing.assert_array_equal(curves.confusion(one), confusion_matrix(actual, said))


# ------------------------------------------------------------------------------- label efficiency


@pytest.fixture
def sweep(tmp_path):
    """Two stages x three fractions x two draws of labels, one training seed."""
    folder, rows = tmp_path / "sweep", []
    rng = np.random.default_rng(0)
    labels = (rng.random((N, 3)) < 0.4).astype(np.int8)
    patients = rng.integers(40, size=N).astype(str)
    for fraction, reach in ((0.1, 0.2), (0.5, 0.9), (1.0, 1.4)):
        for stage, gain in (("untrained", 0.0), ("simclr", 0.6)):
            for draw in (0, 1) if fraction < 1 else (None,):
                scores = rng.normal(size=(N, 3)) + (reach + gain) * labels
                file = f"{stage}-{fraction}-{draw}.npz"
                write_npz(
                    folder / "predictions" / file,
                    scores=scores.astype(np.float32), labels=labels, patients=patients,
                    image_ids=np.arange(N).astype(str), class_names=np.array(NAMES),
                    split_sha256=np.array("5e" * 32),
                )  # fmt: skip
                found = statistics.estimate(scores, labels, patients, NAMES, "multi_label")
                rows += [
                    row(
                        stage, 0, metric, e.value, ci_low=e.low, ci_high=e.high, fraction=fraction,
                        subset_seed=draw, predictions=file, n_train_patients=round(200 * fraction),
                    )
                    for metric, e in found.items()
                ]  # fmt: skip
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def test_label_efficiency_is_drawn_and_the_saving_told(sweep):
    text = html.write_report(sweep).read_text()
    words = "".join(Checker(text).words)
    assert text.count('class="band') == 2
    (group,) = runs.tested(runs.joined_rows([runs.read_run(sweep)]))
    found = efficiency.savings(group, "auc_macro")
    assert list(found) == ["simclr"]
    crossing = found["simclr"]
    assert 20 < crossing.patients < 200 and 0 <= crossing.low < crossing.saving < crossing.high
    said = f"simclr{crossing.patients:.0f} patients{crossing.saving:.0%} [{crossing.low:.0%}"
    assert said in words
    assert "25 %" not in words and re.search(r"10 %20 patients", words)


def test_draws_of_labels_are_compared_with_one_another(sweep):
    (group,) = runs.tested(runs.joined_rows([runs.read_run(sweep)]))
    assert [tested.repeats for tested in group] == [
        [(0, 0, 0), (0, 1, 0)], [(0, 0, 0), (0, 1, 0)], [(0, None, 0)],
    ]  # fmt: skip
    assert {len(each) for each in group[0].predictions.values()} == {2}


# ---------------------------------------------------------------------------------- side by side


def other_run(workdir, folder, key, reverse=False):
    """A copy of a run as another workdir would hold it: ids hashed with another key."""
    shutil.copytree(workdir, folder)
    for path in (folder / "predictions").iterdir():
        with np.load(path) as file:
            arrays = dict(file)
        for name in ("patients", "image_ids"):
            arrays[name] = np.array([f"{key}{value}" for value in arrays[name]])
        if reverse:
            arrays = {k: v[::-1] if len(np.atleast_1d(v)) == N else v for k, v in arrays.items()}
        write_npz(path, **arrays)
    return folder


def test_runs_side_by_side_are_compared_patient_by_patient(workdir, tmp_path):
    other = other_run(workdir, tmp_path / "other", "x")
    text = html.write_report([workdir, other], tmp_path / "both").read_text()
    words = "".join(Checker(text).words)
    assert "run: simclr" in words and "other: simclr" in words
    assert "other: simclr - run: simclrauc_macro+0.000 [+0.000, +0.000]1.000" in words
    assert (tmp_path / "both" / "results.csv").is_file()
    reversed_ = other_run(workdir, tmp_path / "reversed", "y", reverse=True)
    text = html.write_report([workdir, reversed_], tmp_path / "both").read_text()
    assert "reversed: simclr - run" not in text  # not the same images in the same order


def test_the_tool_writes_reports_and_refuses_what_is_none(workdir, tmp_path):
    tool = [sys.executable, str(REPO / "tools" / "report.py")]
    (workdir / "report.html").unlink(missing_ok=True)
    done = subprocess.run([*tool, str(workdir)], capture_output=True, text=True)
    assert done.returncode == 0 and (workdir / "report.html").is_file(), done.stderr
    for args, said in (
        ([], "give the --workdir"),
        ([str(workdir), str(workdir)], "--out"),
        ([str(tmp_path / "none")], "no folder"),
    ):
        done = subprocess.run([*tool, *args], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    (workdir / "results.json").write_text("[{")
    done = subprocess.run([*tool, str(workdir)], capture_output=True, text=True)
    assert done.returncode == 2 and "results.json is no JSON" in done.stderr


# ----------------------------------------------------------------------------------------- exports


def test_csv_has_every_row_and_no_folder(workdir):
    rows = runs.joined_rows([runs.read_run(workdir)])
    read = list(csv.DictReader(io.StringIO(export.as_csv(rows))))
    assert len(read) == len(rows)
    for got, expected in zip(read, rows, strict=True):
        assert got["metric"] == expected["metric"]
        assert got["value"] == ("" if expected["value"] is None else str(expected["value"]))
        assert json.loads(got["chosen"]) == expected["chosen"] and "/" not in got["predictions"]


def test_latex_tables_are_balanced_and_escaped(workdir, sweep):
    for folder in (workdir, sweep):
        text = export.as_latex(runs.joined_rows([runs.read_run(folder)]))
        assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") > 0
        body = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert {line.count("&") for line in body} == {2}
        assert not re.search(r"(?<!\\)[_%#$]", "\n".join(body))
    assert r"auc\_macro" in export.as_latex(runs.joined_rows([runs.read_run(workdir)]))


# ------------------------------------------------------------------------------------ in a browser


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def test_a_browser_shows_the_report_without_a_complaint(workdir, sweep, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser found; any of {', '.join(BROWSERS)} will do")
    (sweep / "pictures").mkdir()
    red = np.full((120, 400, 3), (40, 30, 200), np.uint8)  # BGR
    cv2.imwrite(str(sweep / "pictures" / "a.jpg"), red)
    about = {"kind": "neighbours", "stage": "00_simclr", "title": "t", "file": "a.jpg"}
    (sweep / "pictures" / "a.json").write_text(json.dumps(about))
    page, shot = html.write_report([sweep, workdir], tmp_path / "both"), tmp_path / "shot.png"
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,9000", f"--screenshot={shot}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    picture = cv2.imread(str(shot))
    assert picture.shape == (9000, 1000, 3)
    inked = (np.abs(picture.astype(int) - picture[0, 0]).max(axis=2) > 40).mean()
    assert 0.01 < inked < 0.5  # neither empty nor one block
    blue = np.abs(picture.astype(int) - np.array([0xB8, 0x6B, 0x0B])).max(axis=2) < 12
    assert blue.sum() > 100  # the dots and curves of the second stage are drawn
    shown = np.abs(picture.astype(int) - red[0, 0]).max(axis=2) < 12
    assert shown.sum() > 0.9 * red[..., 0].size  # the picture, too
