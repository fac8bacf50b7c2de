"""The printed table and the HTML report of a made-up workdir."""

import dataclasses
import json
import re

import numpy as np
import pytest
from made_up import NAMES, Checker, N, made_up_run, row

from bigmed import comparison, statistics
from bigmed.errors import UserError
from bigmed.evaluators.features import write_npz
from bigmed.report import html as report
from bigmed.report import results, runs, svg, table


@pytest.fixture
def workdir(tmp_path):
    return made_up_run(tmp_path / "run")


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


def test_what_is_not_the_same_measurement_is_not_averaged():
    one, other = row(value=0.9), row(value=0.6)
    for key, values in (
        ("shift", (None, "elsewhere")),
        ("split_sha256", ("5e" * 32, "6f" * 32)),
        ("averaged", (None, "scores")),
        ("label_policy", ("uncertain=ones", "uncertain=zeros")),
    ):
        rows = [{**one, key: values[0]}, {**other, key: values[1]}]
        first, second = table.blocks(rows)
        assert first.cells["auc_macro"]["simclr"].mean == 0.9
        assert second.cells["auc_macro"]["simclr"].mean == 0.6
        assert key in first.title() and first.title() != second.title()
    # of one stage with two settings of its evaluator, as after a change between two sweeps
    rows = [{**one, "settings": "a" * 16}, {**other, "settings": "b" * 16}]
    marks = [block.mark for block in table.blocks(rows)]
    assert marks == ["settings aaaaaa", "settings bbbbbb"]
    # stages that were evaluated with different ones stand side by side still
    rows[1]["stage"] = "micle"
    (block,) = table.blocks(rows)
    assert block.stages == ("simclr", "micle") and "settings" not in block.title()


def test_an_empty_draw_has_no_part_in_the_mean_number_of_labels():
    rows = [
        row(value=0.7, subset_seed=0, n_train_patients=10),
        row(value=None, subset_seed=1, n_train_patients=0, n_images=0, n_patients=0),
        row("micle", value=None, subset_seed=0, n_train_patients=0, n_images=0, n_patients=0),
    ]
    (block,) = table.blocks(rows)
    assert block.cells["auc_macro"]["simclr"].n_labelled == 10
    assert block.cells["auc_macro"]["micle"].n_labelled is None
    assert block.size() == "150 images of 103 patients, 1-2 seeds"


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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/j doe/hospital 7/", ".../hospital 7"),
        ("--config.x.checkpoints=('/home/j.doe/a/b',)", "--config.x.checkpoints=('.../b',)"),
        ("file:///home/j.doe/b", "file:.../b"),
        ("~/j.doe/b", ".../b"),
        ("C:\\j.doe\\b", ".../b"),
        ("{data_root}/dataset", "{data_root}/dataset"),
        ("(params|batch_stats)/backbone/.*", "(params|batch_stats)/backbone/.*"),
        ("configs/few_label.py:smoke", "configs/few_label.py:smoke"),
        ({"a": ["--workdir", "/tmp/j.doe/run"]}, {"a": ["--workdir", ".../run"]}),
    ],
)
def test_folders_are_cut_wherever_they_stand(value, shown):
    assert report.without_folders(value) == shown


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("results.json", '{"a": 1}'),
        ("results.json", "null"),
        ("results.json", '[{"stage": "x"}]'),
        ("pictures/a.json", "["),
        ("curriculum.json", "[]"),
    ],
)
def test_files_that_no_run_wrote_are_named(workdir, file, content):
    (workdir / "pictures").mkdir()
    (workdir / file).write_text(content)
    with pytest.raises(UserError, match=file) as error:
        report.write_report(workdir)
    assert "\n" not in str(error.value)


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
    of_stage, each = [], []
    for stage in ("untrained", "simclr"):
        files = [np.load(p) for p in sorted((workdir / "predictions").glob(f"*{stage}*"))]
        first = files[0]
        codes = [list(first["patients"]).index(patient) for patient in first["patients"]]
        args = (first["labels"], np.array(codes), NAMES, "multi_label")
        of_stage.append(statistics.resample([f["scores"] for f in files], *args))
        each.append([statistics.resample([f["scores"]], *args) for f in files])
    d = statistics.paired_difference(of_stage[1], of_stage[0])["auc_macro"]
    samples = of_stage[1].samples["auc_macro"] - of_stage[0].samples["auc_macro"]
    p = comparison.bootstrap_p(samples)
    seeds = [a.values["auc_macro"] - b.values["auc_macro"] for b, a in zip(*each, strict=True)]
    shown = f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{p:.3f}{p:.3f}{np.std(seeds, ddof=1):.3f}"
    assert f"simclr - untrainedauc_macro{shown}" in words


def test_classes_are_compared_by_delong_and_accuracies_by_permutation(tmp_path):
    rng = np.random.default_rng(0)
    actual, patients = rng.integers(3, size=N), rng.integers(40, size=N).astype(str)
    labels, rows, scores = np.eye(3, dtype=np.int8)[actual], [], {}
    for stage, strength in (("untrained", 0.5), ("simclr", 1.5)):
        p = np.exp(rng.normal(size=(N, 3)) + strength * labels)
        scores[stage] = (p / p.sum(axis=1, keepdims=True)).astype(np.float32)
        write_npz(
            tmp_path / "predictions" / f"{stage}.npz",
            scores=scores[stage], labels=labels, patients=patients, class_names=np.array(NAMES),
            image_ids=np.arange(N).astype(str),
        )  # fmt: skip
        rows += [
            row(stage, metric=m, predictions=f"{stage}.npz", task="single_label")
            for m in ("auc_macro", "accuracy", "auc/mass")
        ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    text = report.write_report(tmp_path).read_text()
    words = "".join(Checker(text).words)
    both = [scores["simclr"][:, 0], scores["untrained"][:, 0]]
    d = comparison.delong(both, labels[:, 0], patients).contrast(np.array([1.0, -1.0]))
    assert f"masssimclr - untrained{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{d.p:.3f}" in words
    right = [scores[s].argmax(axis=1) == actual for s in ("simclr", "untrained")]
    p = comparison.permutation_test(*right, patients, num_permutations=results.PERMUTATIONS)
    gain = right[0].mean() - right[1].mean()
    assert re.search(rf"simclr - untrainedaccuracy\{gain:+.3f} \[[^]]*\].*?{p:.3f}", words)
    assert text.count("confusion") >= 2  # a matrix for each stage


def test_one_test_patient_gives_neither_interval_nor_p(workdir):
    for path in (workdir / "predictions").iterdir():
        with np.load(path) as file:
            arrays = dict(file)
        write_npz(path, **{**arrays, "patients": np.full(N, "one")})
    ((tested,),) = runs.tested(runs.joined_rows([runs.read_run(workdir)]))
    for d in results.differences(tested):
        assert d.found.low is None and d.p is None and d.p_holm is None and d.seeds is None


def test_a_class_that_was_not_learnt_is_not_compared(workdir):
    rows = json.loads((workdir / "results.json").read_text())
    ((tested,),) = runs.tested(
        runs.joined_rows([dataclasses.replace(runs.read_run(workdir), rows=[
            {**r, "untrained_classes": ["mass"]} for r in rows
        ])])
    )  # fmt: skip
    for each in tested.resampled.values():
        for one in each:
            assert np.isnan(one.values["auc/mass"])
            assert one.values["auc_macro"] == one.values["auc/<b>nodule</b>"]


def test_p_values_are_adjusted_for_all_pairs_of_a_metric(workdir):
    rows = json.loads((workdir / "results.json").read_text())
    third = [{**r, "stage": "again"} for r in rows if r["stage"] == "simclr"]
    made = runs.read_run(workdir)
    joined = runs.joined_rows([dataclasses.replace(made, rows=[*rows, *third])])
    ((tested,),) = runs.tested(joined)
    found = [d for d in results.differences(tested) if d.metric == "auc_macro"]
    assert [(d.after, d.before) for d in found] == [
        ("simclr", "untrained"), ("again", "untrained"), ("again", "simclr"),
    ]  # fmt: skip
    assert [d.p_holm for d in found] == comparison.holm([d.p for d in found])
    assert found[2].found.value == 0 and found[2].p == 1 and found[0].p_holm > found[0].p


@pytest.mark.parametrize("damage", ["missing", "torn", "other images", "NaN", "no scores"])
def test_report_without_usable_predictions_leaves_differences_out(workdir, damage):
    path = sorted((workdir / "predictions").iterdir())[-1]
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:200])
    else:
        with np.load(path) as file:
            arrays = dict(file)
        if damage == "no scores":
            del arrays["scores"]
        elif damage == "NaN":
            arrays["scores"][3, 1] = np.nan
        else:
            arrays["image_ids"] = arrays["image_ids"][::-1]
        write_npz(path, **arrays)
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


def test_pictures_are_embedded(workdir):
    folder = workdir / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    about = {"stage": "00_simclr", "title": 'what the "model" sees'}
    points = {"x": [0.0, 1.0, 2.0], "y": [2.0, 1.0, 0.0], "group": [0, 1, 1], "names": ["a", "b<"]}
    (folder / "a.json").write_text(json.dumps({"kind": "views", "file": "a.jpg", **about}))
    (folder / "b.json").write_text(json.dumps({"kind": "map", **about, **points}))
    text = report.write_report(workdir).read_text()
    checker = Checker(text)
    assert ("src", "data:image/jpeg;base64,/9j/4A==") in checker.attributes
    assert ("alt", '00_simclr: what the "model" sees') in checker.attributes
    assert text.count('class="point s1"') == 2 and "b&lt;" in text
    (folder / "a.jpg").unlink()
    assert "data:image" not in report.write_report(workdir).read_text()


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
