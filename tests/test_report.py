"""The printed table and the HTML report of a made-up workdir."""

import html.parser
import json
import re

import numpy as np
import pytest

from bigmed import statistics
from bigmed.evaluators.features import write_npz
from bigmed.report import html as report
from bigmed.report import svg, table

NAMES = ("mass", "<b>nodule</b>", "hernia")
N = 80


def row(stage="simclr", seed=0, metric="auc_macro", value=0.8, **overrides):
    base = {
        "stage": stage, "evaluator": "linear", "seed": seed, "task": "multi_label",
        "train_set": "cxr/train", "test_set": "cxr/test", "fraction": 1.0, "metric": metric,
        "value": value, "ci_low": None if value is None else value - 0.1,
        "ci_high": None if value is None else value + 0.1, "n_images": 150, "n_patients": 103,
        "split_sha256": "5e" * 32, "checkpoint": f"00_{stage}/10",
    }  # fmt: skip
    return base | overrides


class Checker(html.parser.HTMLParser):
    """Fails on tags that do not nest; collects attributes and text."""

    VOID = {"meta", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def workdir(tmp_path):
    """Two stages x two seeds with metrics, timing, predictions and results."""
    workdir = tmp_path / "run"
    rng = np.random.default_rng(0)
    labels = (rng.random((N, 3)) < 0.4).astype(np.int8)
    labels[:, 2] = 0
    patients = rng.integers(40, size=N)
    rows, stages = [], []
    for seed in (0, 1):
        for strength, stage in ((0.5, "untrained"), (1.5, "simclr")):
            directory = f"{len(stages):02d}_{stage}_seed{seed}"
            (workdir / directory).mkdir(parents=True)
            stages.append(
                {"name": stage, "seed": seed, "directory": directory, "state": "done",
                 "steps": 40, "init_from": None}
            )  # fmt: skip
            steps = range(10, 50, 10)
            metrics = [{"step": s, "loss": 6 - s / 20, "lr": 0.1, "probe_loss": 1} for s in steps]
            timing = [{"step": 0, "event": "compiled", "seconds": 12.4}]
            timing += [
                {"step": s, "images_per_second": s, "step_seconds": 0.5, "data_wait_fraction": 0.25}
                for s in steps
            ]
            timing += [{"step": 20, "event": "restarted", "devices": 1}] * seed
            for name, lines in (("metrics", metrics), ("timing", timing)):
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (workdir / directory / f"{name}.jsonl").write_text(text)
            scores = rng.normal(size=(N, 3)) + strength * labels
            write_npz(
                workdir / "predictions" / f"{directory}.npz",
                scores=scores.astype(np.float32), labels=labels,
                image_ids=np.arange(N).astype(str), patients=patients.astype(str),
                class_names=np.array(NAMES), task=np.array("multi_label"),
            )  # fmt: skip
            found = statistics.estimate(scores, labels, patients, NAMES, "multi_label")
            rows += [
                row(
                    stage, seed, metric, None if np.isnan(e.value) else e.value,
                    ci_low=e.low, ci_high=e.high, n_images=e.n_images, n_patients=e.n_patients,
                    label_policy="uncertain=ignore, missing=ignore", chosen={"l2": 0.1},
                    undefined_classes=["hernia"], predictions=f"{directory}.npz",
                )
                for metric, e in found.items()
            ]  # fmt: skip
    config = {"data_root": "/home/j.doe/hospital_7", "note": "<script>alert(1)</script>"}
    files = {
        "results": rows,
        "curriculum": {"stages": stages},
        "config": {"config": config, "versions": {"bigmed": "0.1.0"}, "git_commit": "c0ffee" * 6},
    }
    for name, content in files.items():
        (workdir / f"{name}.json").write_text(json.dumps(content))
    return workdir


# -------------------------------------------------------------------------------- the printed table


def test_table_has_a_column_a_stage_and_a_block_a_test_set():
    rows = [
        row("untrained", value=0.6),
        row("simclr", value=0.812),
        row("untrained", metric="auc/mass", value=0.5),
        row("untrained", evaluator="knn", value=0.55, fraction=0.1),
        row("simclr", evaluator="knn", value=None, fraction=0.1),
    ]
    text = table.format_table(rows)
    first, second, notes = text.split("\n\n")
    assert first.splitlines()[0] == "linear: cxr/train -> cxr/test (150 images of 103 patients)"
    assert first.splitlines()[1].split() == ["untrained", "simclr"]
    assert "0.600 [0.500, 0.700]  0.812 [0.712, 0.912]" in first
    assert "10 % of the labels" in second and "undefined" in second
    assert "auc/mass" not in text  # classes are in the report
    assert "patients resampled" in notes and "synthetic" not in notes


def test_table_puts_seeds_together():
    rows = [row(seed=s, value=v) for s, v in enumerate((0.7, 0.8, 0.75))]
    text = table.format_table(rows)
    assert "3 seeds" in text
    assert "0.750 [0.650, 0.850]" in text and "0.700 to 0.800" in text
    rows[1] |= {"value": None, "ci_low": None, "ci_high": None}
    text = table.format_table(rows)
    assert "0.725 [0.625, 0.825]" in text and "2 of 3 seeds" in text
    rows[0]["ci_low"] = None  # one seed without an interval: the mean of the others would mislead
    assert "0.725\n" in table.format_table(rows) + "\n"


def test_table_says_what_was_resampled_and_what_is_synthetic():
    text = table.format_table([row(synthetic=True, resample_unit="image")])
    assert "images resampled" in text and "150 images of 103 separate images" in text
    assert table.NOTE_SYNTHETIC in text
    assert "no results" in table.format_table([])


def test_a_stage_without_a_metric_leaves_a_gap():
    rows = [row("a"), row("b", metric="accuracy")]
    lines = table.format_table(rows).splitlines()
    assert [line.split()[-1] for line in lines[2:4]] == ["-", "0.900]"]


# -------------------------------------------------------------------------------------- the report


def test_report_is_whole_self_contained_and_escaped(workdir):
    path = report.write_report(workdir)
    text = path.read_text()
    checker = Checker(text)
    assert not {"script", "link", "iframe", "b"} & set(checker.tags)
    assert not [v for k, v in checker.attributes if k in ("src", "href")]
    assert "http" not in text and "url(" not in text
    words = "".join(checker.words)
    assert "<b>nodule</b>" in words  # as text
    assert "<script>alert(1)</script>" in words
    assert "@media (prefers-color-scheme: dark)" in text
    assert not [p for p in workdir.iterdir() if p.name.endswith(".tmp")]
    assert text == report.write_report(workdir).read_text()  # nothing but the run's files


def test_report_shows_no_folders(workdir):
    text = report.write_report(workdir).read_text()
    assert ".../hospital_7" in text and "j.doe" not in text
    assert str(workdir.parent) not in text


def test_report_shows_the_numbers(workdir):
    words = "".join(Checker(report.write_report(workdir).read_text()).words)
    (block,) = table.blocks(json.loads((workdir / "results.json").read_text()))
    for stage in ("untrained", "simclr"):
        for metric in ("auc_macro", "auc/mass"):
            shown, spread = table.describe_cell(block.cells[metric][stage])
            assert shown in words and spread in words
    assert "80 images of" in words and "2 seeds" in words
    assert "undefined in the test set: hernia" in words
    assert "split 5e5e5e5e5e5e" in words and "l2=0.1" in words
    assert "uncertain=ignore, missing=ignore" in words
    # timing: medians over 10, 20, 30, 40
    assert re.search(r"03_simclr_seed1.*?25\.0.*?0\.500.*?25\.0%.*?12 s", words, re.S)


def test_report_compares_stages_by_paired_resampling(workdir):
    words = "".join(Checker(report.write_report(workdir).read_text()).words)
    of_stage = []
    for stage in ("untrained", "simclr"):
        files = [np.load(p) for p in sorted((workdir / "predictions").glob(f"*{stage}*"))]
        first = files[0]
        scores = [f["scores"] for f in files]
        args = (first["labels"], first["patients"], NAMES, "multi_label")
        of_stage.append(statistics.resample(scores, *args))
    d = statistics.paired_difference(of_stage[1], of_stage[0])["auc_macro"]
    assert f"simclr - untrainedauc_macro{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" in words


@pytest.mark.parametrize("damage", ["missing", "torn", "other images"])
def test_report_without_usable_predictions_leaves_differences_out(workdir, damage):
    path = sorted((workdir / "predictions").iterdir())[-1]
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:200])
    else:
        with np.load(path) as file:
            arrays = dict(file)
        write_npz(path, **{**arrays, "image_ids": arrays["image_ids"][::-1]})
    words = "".join(Checker(report.write_report(workdir).read_text()).words)
    assert "simclr - untrained" not in words and "auc_macro" in words


def test_report_of_an_unfinished_or_empty_run(workdir, tmp_path):
    (workdir / "results.json").unlink()
    torn = workdir / "01_simclr_seed0" / "metrics.jsonl"
    torn.write_text(torn.read_text() + '{"step": 50, "lo')
    words = "".join(Checker(report.write_report(workdir).read_text()).words)
    assert "No evaluator has run" in words and "learning rate" in words
    empty = tmp_path / "empty"
    empty.mkdir()
    Checker(report.write_report(empty).read_text())


def test_synthetic_data_is_announced(workdir):
    notice = table.NOTE_SYNTHETIC.capitalize()
    assert notice not in report.write_report(workdir).read_text()
    rows = json.loads((workdir / "results.json").read_text())
    rows[0]["synthetic"] = True
    (workdir / "results.json").write_text(json.dumps(rows))
    assert notice in report.write_report(workdir).read_text()
    (workdir / "results.json").unlink()
    config = {"config": {"phantom": {"num_patients": 60}}}
    (workdir / "config.json").write_text(json.dumps(config))
    assert notice in report.write_report(workdir).read_text()


def test_gallery_is_embedded(workdir):
    text = report.write_report(workdir, gallery=[('what the "model" sees', b"\x89PNG")]).read_text()
    checker = Checker(text)
    assert ("src", "data:image/png;base64,iVBORw==") in checker.attributes
    assert ("alt", 'what the "model" sees') in checker.attributes


# -------------------------------------------------------------------------------------- the charts


def test_dots_stand_where_the_numbers_are():
    text = svg.dots("x", [("a", 0.6, 0.5, 0.7, (0.6,), "."), ("b", 0.8, 0.7, 0.9, (0.8,), ".")])
    dots = [float(x) for x in re.findall(r'circle cx="([\d.]+)"', text)]
    whiskers = re.findall(r'x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)" [^>]*whisker', text)
    ends = [tuple(map(float, pair)) for pair in whiskers]
    assert dots[0] == pytest.approx(np.mean(ends[0]), abs=0.1)
    assert ends[0][1] == pytest.approx(ends[1][0], abs=0.1)  # both 0.7
    assert dots[1] - dots[0] == pytest.approx(ends[0][1] - ends[0][0], abs=0.2)
    labels = re.findall(r'<text x="([\d.]+)"[^>]*class="soft"[^>]*>([\d.]+)<', text)
    ticks = {float(name): float(x) for x, name in labels}
    assert ticks[0.6] == pytest.approx(dots[0], abs=0.1)
    assert svg.dots("x", [("a", None, None, None, (), "undefined")]) == ""
    assert "chance" in svg.dots("x", [("a", 0.6, 0.5, 0.7, (0.6,), ".")], chance=0.5)
    assert "chance" not in svg.dots("x", [("a", 0.96, 0.95, 0.97, (0.96,), ".")], chance=0.5)


def test_curves_fall_where_values_fall_and_skip_gaps():
    y = np.array([3.0, 2.0, np.nan, 1.0])
    text = svg.curves("loss", {"seed 0": (np.arange(4), y, 1)})
    points = re.search(r'points="([^"]+)"', text).group(1).split()
    heights = [float(p.split(",")[1]) for p in points]
    assert len(points) == 3 and heights == sorted(heights)  # y grows downwards
    assert svg.curves("loss", {"seed 0": (np.arange(2), np.full(2, np.nan), 1)}) == ""
    Checker(svg.curves("a < b", {"one": (np.array([5]), np.array([1.0]), 0)}))
    x, y = svg.thin(np.arange(1000.0), np.arange(1000.0) * 2)
    assert len(x) == svg.MAX_POINTS and np.allclose(y, 2 * x)
    assert np.average(x) == pytest.approx(499.5, abs=1)


def test_ticks_are_round_and_inside():
    assert svg.ticks(0.47, 0.93) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert svg.ticks(0, 400, 4) == [0, 100, 200, 300, 400]
    assert svg.ticks(2.0, 2.0) == [2.0]
    assert [svg.number(v) for v in (0, 0.75, 12000, 1.2e-5, 1e6)] == [
        "0", "0.75", "12,000", "1.2e-05", "1e+06",
    ]  # fmt: skip
