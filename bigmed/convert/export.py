"""An encoder of a run, and its folders for PyTorch's libraries."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmed import augment, checkpoint
from bigmed.convert import mapping
from bigmed.convert import weights as ours
from bigmed.errors import UserError, did_you_mean
from bigmed.models.catalogue import build


def from_run(workdir: pathlib.Path, stage: str | None = None) -> tuple[ours.Weights, dict]:
    """The encoder of a stage of a run, and what is known of its training.

    Args:
      workdir: of the run.
      stage: the folder of a stage, '02_micle'; None: the last one that is done.

    Returns:
      (weights, facts): facts are `stage`, `seed`, `steps`, `objective`, `batch_size`, `sources`,
      `git_commit`, `config_sha256` and `results`, the rows that were measured on the stage.

    Raises:
      UserError: no run there, no such stage, or one that has no whole checkpoint.
    """
    workdir = pathlib.Path(workdir)
    try:
        described = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        stages = json.loads((workdir / "curriculum.json").read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{workdir} holds no run (config.json, curriculum.json)") from None
    done = {s["directory"]: s for s in stages if s["state"] == "done"}
    if not done:
        raise UserError(f"no stage of {workdir} is done")
    stage = stage or list(done)[-1]
    if stage not in done:
        raise UserError(f"no finished stage '{stage}' in {workdir}; {did_you_mean(stage, done)}")
    encoder = done[stage]["encoder"]
    flat, meta = checkpoint.load_flat(
        workdir / stage / "checkpoints", ("(params|batch_stats)/backbone/.*",)
    )
    weights = ours.Weights(
        **{key: encoder[key] for key in ("model", "size", "channels", "normalize")},
        leaves={name.replace("/backbone/", "/", 1): leaf for name, leaf in flat.items()},
    )
    path = workdir / "results.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    key = {"stage": done[stage]["name"], "seed": done[stage]["seed"]}
    facts = {
        **key,
        **{name: encoder[name] for name in ("objective", "batch_size", "sources")},
        "steps": meta["step"],
        "git_commit": described["git_commit"],
        "config_sha256": ours.sha256(workdir / "config.json"),
        "results": [row for row in rows if all(row[k] == v for k, v in key.items())],
    }
    return weights, facts


def export(
    weights: ours.Weights, naming: str, folder: pathlib.Path, card: str
) -> dict[str, np.ndarray]:
    """Writes weights, config.json and a model card that `naming`'s library loads.

    Args:
      weights: of the encoder.
      naming: a naming of the family; 'npz' writes weights.npz.
      folder: must not exist, or be empty.
      card: README.md.

    Returns:
      The tensors that were written, by name.

    Raises:
      UserError: the library has no such model, or the folder is not empty.
    """
    family = ours.family_of(weights.model, naming)
    module = build(weights.model)
    tensors = mapping.to_theirs(weights.leaves, family.entries(module, naming))
    shapes = {path: leaf.shape for path, leaf in weights.leaves.items()}
    files: dict[str, Any] = {"README.md": card}
    if naming != "npz":
        described = family.describe(module, naming, shapes)
        if "pretrained_cfg" in described:
            _normalise_first(described["pretrained_cfg"], weights)
        files["config.json"] = described
    name = "weights.npz" if naming == "npz" else "model.safetensors"
    ours.write_folder(folder, tensors, name, files)
    return tensors


def _normalise_first(pretrained_cfg: dict[str, Any], weights: ours.Weights) -> None:
    """timm normalises once: ours, and then what the network itself does."""
    mean, deviation = augment.moments(weights.normalize, weights.channels)
    inner_mean, inner_std = (np.array(pretrained_cfg[key]) for key in ("mean", "std"))
    pretrained_cfg["mean"] = [round(float(x), 6) for x in mean + deviation * inner_mean]
    pretrained_cfg["std"] = [round(float(x), 6) for x in deviation * inner_std]


def model_card(weights: ours.Weights, facts: Mapping[str, Any], naming: str, licence: str) -> str:
    """A README.md: what the encoder is, what it takes, what was measured. No folder, no patient."""
    image = f"{weights.size} x {weights.size} pixels, {weights.channels} channel(s)"
    pixels = {
        "none": "pixels in [0, 1], no mean or deviation subtracted",
        "imagenet": "pixels in [0, 1], then ImageNet's mean and deviation",
        "half": "pixels in [-1, 1]",
    }[weights.normalize]
    lines = [
        "---",
        f"license: {licence}",
        "library_name: " + ("transformers" if naming == "huggingface" else naming),
        "---",
        "",
        f"# Image encoder: {weights.model['name']}",
        "",
        "Pretrained with bigmed without labels. Not a medical device.",
        "",
        f"- model: `{json.dumps(weights.model)}`",
        f"- input: {image}, {pixels}",
        f"- objective: {facts['objective']}, {facts['steps']} steps of {facts['batch_size']}, "
        f"seed {facts['seed']}",
        f"- data: {', '.join(facts['sources'])}",
        f"- config: sha256 {facts['config_sha256']}, commit {facts['git_commit']}",
        "",
    ]
    return "\n".join(lines + _results(facts["results"]))


def _results(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["Nothing was measured on this stage.", ""]
    lines = [
        "| evaluator | trained on | tested on | metric | value | 95 % interval | n, patients |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        value = ["missing" if row[k] is None else f"{row[k]:.3f}" for k in _VALUES]
        lines.append(
            f"| {row['evaluator']} | {row['train_set']} | {row['test_set']} | {row['metric']} | "
            f"{value[0]} | {value[1]} to {value[2]} | {row['n_images']}, {row['n_patients']} |"
        )
    return [*lines, ""]


_VALUES = ("value", "ci_low", "ci_high")
