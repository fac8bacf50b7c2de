"""A workdir of a run that never was, for tests of reports."""

import html.parser
import json

import numpy as np

from bigmed import statistics
from bigmed.evaluators.features import write_npz

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


def made_up_run(workdir):
    """Two stages x two seeds with metrics, timing, predictions and results."""
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
