"""An encoder of a run, and its folders for PyTorch's libraries."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmed import augment, networks
from bigmed.convert import mapping
from bigmed.convert import weights as ours
from bigmed.errors import UserError, did_you_mean
from bigmed.models.catalogue import build


def from_run(
    workdir: pathlib.Path, stage: str | None = None, network: str = networks.STUDENT
) -> tuple[ours.Weights, dict]:
    """The encoder of a stage of a run, and what is known of its training.

    Args:
      workdir: of the run.
      stage: the folder of a stage, '02_micle'; None where one alone is done.
      network: one of `networks.NETWORKS`.

    Returns:
      (weights, facts): facts are `stage`, `seed`, `network`, `steps`, `init_from` (the stage or
      file that the weights were taken from), `objective`, `batch_size`, `sources`, `git_commit`,
      `config_sha256` and `results`, the rows that were measured on this network of the stage.

    Raises:
      UserError: no run there, no such stage, or one that has no whole checkpoint, or no such
        network in it.
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
    if stage is None and len(done) > 1:
        raise UserError(f"{workdir} has several stages; give --stage: {', '.join(done)}")
    stage = stage or list(done)[0]
    if stage not in done:
        raise UserError(f"no finished stage '{stage}' in {workdir}; {did_you_mean(stage, done)}")
    encoder = done[stage].get("encoder")
    if encoder is None:
        raise UserError(f"{workdir}: an older version made '{stage}' and did not note its model")
    kept = pathlib.Path(workdir, stage, done[stage]["weights"])  # the last or the best checkpoint
    flat, step = networks.load(
        kept.parent, network, step=int(kept.name), patterns=("(params|batch_stats)/backbone/.*",)
    )
    weights = ours.Weights(
        **{key: encoder[key] for key in ours.FORM},
        leaves={name.replace("/backbone/", "/", 1): leaf for name, leaf in flat.items()},
    )
    path = workdir / "results.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError:
        raise UserError(f"{path} is damaged: it is no JSON; put it back or remove it") from None
    key = {"stage": done[stage]["name"], "seed": done[stage]["seed"]}
    facts = {
        **key,
        "network": network,
        **{name: encoder[name] for name in ("objective", "batch_size", "sources")},
        "steps": step,
        "init_from": (done[stage].get("init_from") or {}).get("checkpoint"),
        "git_commit": described["git_commit"],
        "config_sha256": ours.sha256(workdir / "config.json"),
        "results": [
            row
            for row in rows
            if all(row[k] == v for k, v in key.items())
            and _measured(described["config"], row["evaluator"]) == network
        ],
    }
    return weights, facts


def _measured(config: Mapping[str, Any], evaluator: str) -> str:
    """Which network of a stage an evaluator of its run measures."""
    section = config.get("evaluator", {}).get(evaluator, {})
    is_teacher = section.get("representation") == networks.TEACHER
    return networks.TEACHER if is_teacher else networks.STUDENT


def export(
    weights: ours.Weights, naming: str, folder: pathlib.Path, card: str
) -> dict[str, np.ndarray]:
    """Writes weights, config.json and a model card that `naming`'s library loads.

    For transformers also preprocessor_config.json, from which AutoImageProcessor makes the images.

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
    family = ours.family_of(weights.model, naming, to_write=True)
    module = build(weights.model)
    tensors = mapping.to_theirs(weights.leaves, family.entries(module, naming))
    shapes = {path: leaf.shape for path, leaf in weights.leaves.items()}
    files: dict[str, Any] = {"README.md": card}
    if naming != "npz":
        described = family.describe(module, naming, shapes)
        if "pretrained_cfg" in described:
            described["pretrained_cfg"] |= pixels(
                weights, described["model_args"]["in_chans"]
            )
        files["config.json"] = described
        if naming == "huggingface" and "num_channels" in described:
            files["preprocessor_config.json"] = _preprocessor(weights, described["num_channels"])
    name = "weights.npz" if naming == "npz" else "model.safetensors"
    ours.write_folder(folder, tensors, name, files)
    return tensors


def pixel_moments(weights: ours.Weights) -> tuple[list[float], list[float]]:
    """Mean and deviation to normalise images in [0, 1] with for the exported network.

    They join ours and what our network does by itself, which the exported one does not.
    """
    family = ours.families().get(weights.model["name"])
    inner_mean, inner_deviation = getattr(family, "PIXELS", mapping.PIXELS)
    mean, deviation = augment.moments(weights.normalize, weights.channels)
    joined = mean + deviation * inner_mean, deviation * inner_deviation
    return tuple([round(float(x), 6) for x in values] for values in joined)


def pixels(weights: ours.Weights, channels: int) -> dict[str, Any]:
    """`augment.eval_transform` as timm's `create_transform` takes it; see `_preprocessor`.

    Args:
      weights: of the encoder.
      channels: of the exported network, which may be 3 for grey images.
    """
    mean, deviation = pixel_moments(weights)
    repeat = channels // len(mean)
    return {
        "input_size": [channels, weights.size, weights.size],
        "crop_pct": weights.eval_crop,
        "interpolation": "bicubic",
        "mean": mean * repeat,
        "std": deviation * repeat,
    }


def _preprocessor(weights: ours.Weights, channels: int) -> dict[str, Any]:
    """`augment.eval_transform` of 8-bit images as transformers describes it.

    The same numbers where nothing is resized: there the border that is cut off must be even, as
    the two sides put an odd pixel on different ends. Elsewhere transformers also smooths before it
    shrinks.

    Args:
      weights: of the encoder.
      channels: of the exported network, which may be 3 for grey images.
    """
    border = round((weights.size / weights.eval_crop - weights.size) / 2)
    mean, deviation = pixel_moments(weights)
    repeat = channels // len(mean)
    return {
        "image_processor_type": "BitImageProcessor",  # the one that crops the centre
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": weights.size + 2 * border},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": weights.size, "width": weights.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean * repeat,
        "image_std": deviation * repeat,
    }


def model_card(weights: ours.Weights, facts: Mapping[str, Any], naming: str, licence: str) -> str:
    """A README.md: what the encoder is, what it takes, what was measured. No folder, no patient."""
    image = f"{weights.size} x {weights.size} pixels, {weights.channels} channel(s)"
    mean, deviation = pixel_moments(weights)
    pixels = f"pixels in [0, 1], less {mean}, divided by {deviation}"
    trained = f"{facts['objective']}, {facts['steps']} steps of {facts['batch_size']}"
    if facts["network"] == networks.TEACHER:
        trained += ", of which this is the teacher, a moving average of what was trained"
    lines = [
        "---",
        f"license: {licence}",
        "library_name: " + ("transformers" if naming == "huggingface" else naming),
        "---",
        "",
        f"# Image encoder: {weights.model['name']}",
        "",
        "From bigmed, self-supervised pretraining on medical images. Not a medical device.",
        "",
        f"- model: `{json.dumps(weights.model)}`",
        f"- input: {image}, {pixels}",
        *_how_to_load(weights, naming),
        f"- trained: {trained if facts['steps'] else 'not at all'}, seed {facts['seed']}",
        f"- started from: {facts['init_from'] or 'random weights'}",
        f"- data: {', '.join(facts['sources'])}",
        f"- config: sha256 {facts['config_sha256']}, commit {facts['git_commit']}",
        "",
    ]
    return "\n".join(lines + _results(facts["results"]))


def _how_to_load(weights: ours.Weights, naming: str) -> list[str]:
    if naming != "timm":
        return []
    features = "model(pixels)"
    if weights.model.get("distillation"):  # of which model(pixels) is the mean over two tokens
        features = "model.forward_features(pixels)[:, 0]"
    create = "timm.create_model('local-dir:FOLDER', pretrained=True).eval()"
    return [f"- features: `model = {create}`, then `{features}`"]


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
