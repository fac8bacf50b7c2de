"""A synthetic data set: radiograph-like phantoms, for the quickstart, tests and benchmarks.

Not medical images. A phantom has a thorax, lungs, ribs, spine, heart and clavicles that vary from
patient to patient, and up to four findings of varied place and contrast. The 1-4 images of a
patient share anatomy and findings and differ in pose, exposure and noise. Letters, tubes, leads and
electrodes lie on the films whatever the findings, and exposure is drawn for each image, so that
neither brightness nor bright objects tell the labels.

Everything is a pure function of (seed, patient, image). Lengths are in units of half the film.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np

from bigmed.data import images, schema, writer
from bigmed.data.tokenise import word_vocabulary

NAME = "synthetic_phantom"
FINDINGS = ("nodules", "consolidation", "effusion", "cardiomegaly")
VERSION = 1  # to be raised when the same arguments give other pixels
MAX_IMAGES = 4  # of a patient

# Difficulty. Larger contrasts make findings easier; larger jitters make everything harder.
PREVALENCE = 0.3  # of each finding, drawn independently
NODULES, NODULE_RADIUS, NODULE_CONTRAST = (3, 8), (0.05, 0.085), (0.30, 0.50)
CONSOLIDATION_RADIUS, CONSOLIDATION_CONTRAST = (0.22, 0.36), (0.30, 0.50)
EFFUSION_HEIGHT, EFFUSION_CONTRAST = (0.22, 0.50), (0.30, 0.50)
HEART_NORMAL, HEART_LARGE = (0.24, 0.31), (0.37, 0.46)  # half-width
ROTATION, SHIFT, SCALE = 9.0, 0.10, (0.85, 1.20)  # degrees; of the pose in each image
GAIN, GAMMA, OFFSET, TILT = (0.75, 1.30), (0.75, 1.35), 0.08, 0.18  # of the exposure
NOISE = (0.020, 0.035)
DEVICES = {"letter": 0.5, "tube": 0.3, "box": 0.15, "electrodes": 0.3, "collimator": 0.25}


class Spot(NamedTuple):
    """Where a finding lies and how it looks; share and strength are in [0, 1]."""

    side: float  # -1: the patient's right, which is the film's left
    x: float
    y: float
    share: float
    strength: float


@dataclasses.dataclass(frozen=True)
class Patient:
    """What the images of a patient share.

    Attributes:
      labels: int8 [4], PRESENT or ABSENT for each of FINDINGS.
      anatomy: lengths and densities by name.
      places: of each finding that is present.
      texture: float32 [32, 32], the lungs' own pattern.
    """

    labels: np.ndarray
    anatomy: Mapping[str, float]
    places: Mapping[str, list[Spot]]
    texture: np.ndarray
    num_images: int
    report: str


def make_patient(seed: int, patient: int) -> Patient:
    """Draws a patient's anatomy, findings and report."""
    rng = np.random.default_rng([seed, patient])
    present = rng.random(len(FINDINGS)) < PREVALENCE
    labels = np.where(present, schema.PRESENT, schema.ABSENT).astype(np.int8)
    # Every number is drawn whatever the labels are, so that anatomy does not depend on them.
    anatomy = {
        "width": rng.uniform(0.82, 1.14),
        "lung_x": rng.uniform(0.39, 0.45),
        "lung_rx": rng.uniform(0.25, 0.35),
        "lung_ry": rng.uniform(0.54, 0.74),
        "lung_y": rng.uniform(-0.14, -0.04),
        "base_left": rng.uniform(0.26, 0.58),
        "base_right": rng.uniform(0.26, 0.58),
        "dome": rng.uniform(0.08, 0.20),
        "heart_x": rng.uniform(0.06, 0.16),
        "heart_y": rng.uniform(0.16, 0.34),
        "heart_rx": rng.uniform(*(HEART_LARGE if present[3] else HEART_NORMAL)),
        "heart_ry": rng.uniform(0.20, 0.30),
        "rib_pitch": rng.uniform(0.165, 0.185),
        "rib_phase": rng.uniform(0, 1),
        "rib_slope": rng.uniform(0.25, 0.5),
        "rib_density": rng.uniform(0.09, 0.12),
        "spine": rng.uniform(0.18, 0.26),
        "clavicle": rng.uniform(-0.62, -0.52),
        "soft_tissue": rng.uniform(0.0, 0.30),
        "lung_density": rng.uniform(0.45, 0.52),
    }
    places, words = {}, []
    for k, finding in enumerate(FINDINGS):
        count = int(rng.integers(*NODULES)) if finding == "nodules" else 1
        spots = [_spot(rng, anatomy) for _ in range(count)]
        if present[k]:
            places[finding] = spots
            words.append(_sentence(finding, spots[0]))
    texture = cv2.GaussianBlur(rng.standard_normal((32, 32)).astype(np.float32), (0, 0), 1.0)
    report = "Synthetic phantom. " + (" ".join(words) or "No finding.")
    num_images = int(rng.integers(1, MAX_IMAGES + 1))
    return Patient(labels, anatomy, places, texture, num_images, report)


def _spot(rng: np.random.Generator, anatomy: Mapping[str, float]) -> Spot:
    """A place in one of the lungs."""
    side = float(rng.choice((-1, 1)))
    angle, distance = rng.uniform(0, 2 * np.pi), 0.65 * np.sqrt(rng.uniform(0, 1))
    return Spot(
        side,
        side * anatomy["lung_x"] + distance * np.cos(angle) * anatomy["lung_rx"],
        anatomy["lung_y"] + distance * np.sin(angle) * anatomy["lung_ry"] * 0.8,
        *rng.random(2),
    )


def render(seed: int, patient: int, image: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws one film of a patient.

    Returns:
      The film, uint8 [size, size], and its lung mask, uint8 [size, size], 0 or 255.
    """
    person = make_patient(seed, patient)
    return _render(person, np.random.default_rng([seed, patient, 1 + image]), size)


def prepare(
    out: pathlib.Path | str,
    *,
    num_patients: int,
    size: int = 96,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
) -> schema.DatasetFacts:
    """Writes the data set `out` (about 2.5 images a patient), unless it is there already.

    Any number of processes may call this at the same time.

    Raises:
      UserError: `out` holds something else.
    """
    out = pathlib.Path(out)
    asked = [VERSION, num_patients, size, seed, list(fractions)]
    plan = hashlib.sha256(json.dumps([NAME, *asked]).encode()).hexdigest()
    facts = writer.finished(out, plan)
    if facts:
        return facts
    with writer.working(out, wait=True) as work:
        facts = writer.finished(out, plan)  # another process may have made it meanwhile
        if facts:
            return facts
        ids = [f"phantom-{seed}-{patient:06d}" for patient in range(num_patients)]
        shares = dict(zip(("train", "val", "test"), fractions, strict=True))
        split_of = schema.patient_split(ids, shares, seed)
        shards, indexes, patients, reports = {}, {}, {}, []
        for split in shares:
            mine = [patient for patient in range(num_patients) if split_of[ids[patient]] == split]
            if not mine:
                continue
            people = [make_patient(seed, patient) for patient in mine]
            shards[split] = [
                writer.write_shard(
                    work / f"{split}.array_record",
                    (
                        record
                        for patient, person in zip(mine, people, strict=True)
                        for record in _records(seed, patient, ids[patient], person, size)
                    ),
                )
            ]
            repeats = [person.num_images for person in people]
            names = [ids[p] for p, n in zip(mine, repeats, strict=True) for _ in range(n)]
            labels = np.repeat(np.stack([person.labels for person in people]), repeats, axis=0)
            studies = [f"{name}-study" for name in names]
            indexes[split] = schema.Index.build(names, labels, studies)
            patients[split] = [ids[patient] for patient in mine]
            reports += [person.report for person in people]
        counts = {split: len(index) for split, index in indexes.items()}
        facts = schema.DatasetFacts(
            name=NAME,
            class_names=FINDINGS,
            task="multi_label",
            split_sha256=schema.split_sha256(patients),
            counts={"rows": sum(counts.values()), "images": counts, "quarantined": {}},
            patients={split: len(names) for split, names in patients.items()},
            synthetic=True,
            plan_sha256=plan,
        )
        (work.parent / "vocab.txt").write_text(word_vocabulary(reports), encoding="utf-8")
        writer.finish(
            out,
            fields=schema.FIELDS,
            facts=facts,
            description="Synthetic radiograph-like phantoms made by bigmed; not medical images.",
            shards=shards,
            indexes=indexes,
        )
    return facts


def _records(seed: int, patient: int, patient_id: str, person: Patient, size: int):
    for image in range(person.num_images):
        rng = np.random.default_rng([seed, patient, 1 + image])
        film, mask = _render(person, rng, size)
        yield schema.encode_example(
            {
                "image": images.encode(film, "jpeg"),
                "mask": images.encode(mask, "png"),
                "labels": person.labels,
                "image_id": f"{patient_id}-{image}",
                "patient_id": patient_id,
                "study_id": f"{patient_id}-study",
                "text": person.report,
                "view": "synthetic frontal",
                "source": NAME,
            }
        )


def _sentence(finding: str, spot: Spot) -> str:
    """A line of the report."""
    where = "right" if spot.side < 0 else "left"
    zone = "upper" if spot.y < -0.3 else "middle" if spot.y < 0.05 else "lower"
    return {
        "nodules": "Several lung nodules.",
        "consolidation": f"Consolidation in the {where} {zone} zone.",
        "effusion": f"{'Large' if spot.strength > 0.5 else 'Small'} {where} pleural effusion.",
        "cardiomegaly": "Enlarged heart.",
    }[finding]


# ----------------------------------------------------------------------------------------- drawing


def _render(person: Patient, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = _pose(rng, size)
    density, lungs = _body(person, x, y)
    density += _findings(person, x, y, lungs)
    film = _expose(density, rng, size)
    _devices(film, rng, size)
    film += rng.uniform(*NOISE) * rng.standard_normal((size, size), dtype=np.float32)
    mask = np.where(lungs["left"] + lungs["right"] > 0.5, 255, 0).astype(np.uint8)
    return (np.clip(film, 0, 1) * 255).astype(np.uint8), mask


def _pose(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The patient's coordinates at each pixel: x to the film's right and y down, [size, size]."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    column, row = line[None, :], line[:, None]
    angle = np.deg2rad(rng.uniform(-ROTATION, ROTATION))
    scale = rng.uniform(*SCALE) * np.array([1, rng.uniform(0.95, 1.05)])
    shift = rng.uniform(-SHIFT, SHIFT, 2)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x = (cos * (column - shift[0]) + sin * (row - shift[1])) / scale[0]
    y = (-sin * (column - shift[0]) + cos * (row - shift[1])) / scale[1]
    return x.astype(np.float32), y.astype(np.float32)


def _inside(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 where the signed distance is well below 0, 0 well above, soft between."""
    return 0.5 - 0.5 * np.tanh(distance * np.float32(0.5 / softness))


def _ellipse(x: np.ndarray, y: np.ndarray, rx: float, ry: float) -> np.ndarray:
    return np.sqrt((x / rx) ** 2 + (y / ry) ** 2) - 1


def _body(person: Patient, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, dict]:
    """Density of the healthy thorax, and each lung's extent without the heart."""
    a = person.anatomy
    x = x / a["width"]
    trunk = _inside((x / 0.97) ** 4 + (np.maximum(-y - 0.75, 0) / 0.35) ** 2 - 1, 0.06)
    heart = _inside(
        _ellipse(
            x - a["heart_x"] - 0.25 * (y - a["heart_y"]),
            y - a["heart_y"],
            a["heart_rx"],
            a["heart_ry"],
        ),
        0.05,
    )
    whole, lungs = {}, {}
    for name, side in (("right", -1.0), ("left", 1.0)):
        lx, ly = x - side * (a["lung_x"] + 0.10 * (y - a["lung_y"])), y - a["lung_y"]
        base = a[f"base_{name}"] - a["dome"] * (1 - np.minimum((lx / a["lung_rx"]) ** 2, 1.5))
        whole[name] = _inside(_ellipse(lx, ly, a["lung_rx"], a["lung_ry"]), 0.05)
        whole[name] *= _inside(y - base, 0.02)
        lungs[name] = whole[name] * (1 - heart)
    aerated = whole["left"] + whole["right"]
    pattern = _sample(person.texture, x, y)
    wave = (y + a["rib_slope"] * x**2) / a["rib_pitch"] + a["rib_phase"]
    ribs = np.maximum(np.cos(2 * np.pi * wave), 0) ** 1.5 * _inside(np.abs(x) - 0.80, 0.03)
    ribs *= _inside(y - 0.55, 0.05) * (np.abs(x) > 0.1)
    spine = _inside(np.abs(x) - 0.09, 0.02) * (1 + 0.2 * np.cos(2 * np.pi * y / 0.13))
    clavicles = _inside(np.abs(y - a["clavicle"] + 0.22 * np.abs(x)) - 0.03, 0.012)
    clavicles *= _inside(np.abs(x) - 0.62, 0.03) * (np.abs(x) > 0.08)
    breasts = _inside(_ellipse(np.abs(x) - 0.45, y - 0.30, 0.34, 0.30), 0.15)
    density = trunk * (
        0.62
        - a["lung_density"] * aerated * (1 - 0.92 * heart)
        + 0.03 * pattern * aerated
        + a["rib_density"] * ribs
        + a["spine"] * spine
        + 0.13 * clavicles
        + a["soft_tissue"] * breasts
        + 0.10 * heart
    )
    return density, lungs


def _findings(person: Patient, x: np.ndarray, y: np.ndarray, lungs: dict) -> np.ndarray:
    """Density that the findings add; cardiomegaly is in the anatomy."""
    a = person.anatomy
    added = np.zeros_like(x)
    lung_of = {-1.0: lungs["right"], 1.0: lungs["left"]}
    x = x / a["width"]
    for spot in person.places.get("nodules", ()):
        radius = _between(NODULE_RADIUS, spot.share)
        blob = _inside(_ellipse(x - spot.x, y - spot.y, radius, radius), 0.25)
        added = np.maximum(added, _between(NODULE_CONTRAST, spot.strength) * blob)
    for spot in person.places.get("consolidation", ()):
        radius = _between(CONSOLIDATION_RADIUS, spot.share)
        outline, cloud = (_sample(person.texture, k * x + 0.3, k * y) for k in (1.7, 4.0))
        patch = _inside(_ellipse(x - spot.x, y - spot.y, radius, 1.5 * radius) + 0.4 * outline, 0.2)
        patch *= np.clip(0.7 + 0.6 * cloud, 0, 1.3) * lung_of[spot.side]
        added += _between(CONSOLIDATION_CONTRAST, spot.strength) * patch
    for spot in person.places.get("effusion", ()):
        base = a["base_left" if spot.side > 0 else "base_right"]
        outward = spot.side * x - a["lung_x"]  # the fluid climbs along the chest wall
        level = base - _between(EFFUSION_HEIGHT, spot.strength) - 0.9 * np.maximum(outward, -0.1)
        fluid = _inside(level - y, 0.035) * lung_of[spot.side]
        added += _between(EFFUSION_CONTRAST, spot.share) * fluid
    return added


def _between(limits: tuple[float, float], share: float) -> float:
    return limits[0] + share * (limits[1] - limits[0])


def _sample(texture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The texture laid over [-1, 1] x [-1, 1], wrapped."""
    column = ((x + 1) * (texture.shape[1] / 2)).astype(np.float32)
    row = ((y + 1) * (texture.shape[0] / 2)).astype(np.float32)
    wrapped = cv2.remap(texture, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return wrapped * np.float32(2.0)


def _expose(density: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Film brightness in about [0, 1]: slope over the film, gain, offset and gamma by chance."""
    line = np.linspace(-1, 1, size, dtype=np.float32)
    tilt = rng.uniform(-TILT, TILT, 2)
    film = density * (1 + tilt[0] * line[None, :] + tilt[1] * line[:, None])
    film = rng.uniform(*GAIN) * film + rng.uniform(-OFFSET, OFFSET)
    return np.clip(film, 0, 1) ** np.float32(rng.uniform(*GAMMA))


def _devices(film: np.ndarray, rng: np.random.Generator, size: int) -> None:
    """Draws what lies on the film whatever the patient has; changes `film`."""
    wanted = {name: rng.random() < chance for name, chance in DEVICES.items()}
    bright = int(rng.uniform(190, 255))
    above = np.zeros((size, size), np.uint8)  # OpenCV draws text on 8 bits only
    thick = max(1, size // 64)

    def point(x: float, y: float) -> tuple[int, int]:
        return int((x + 1) * size / 2), int((y + 1) * size / 2)

    if wanted["collimator"]:
        edges = (rng.uniform(0, 0.1, 4) * size).astype(int)
        film[: edges[0]], film[size - edges[1] :] = 0, 0
        film[:, : edges[2]], film[:, size - edges[3] :] = 0, 0
    if wanted["letter"]:
        where = point(float(rng.choice((-0.95, 0.6))), float(rng.uniform(-0.8, 0.9)))
        letter, scale = str(rng.choice(("L", "R", "AP"))), size / 200 * rng.uniform(0.8, 1.3)
        cv2.putText(above, letter, where, cv2.FONT_HERSHEY_SIMPLEX, scale, bright, thick)
    if wanted["tube"]:
        t = np.linspace(0, 1, 24)
        start, end, bow = rng.uniform(-0.25, 0.25), rng.uniform(-0.35, 0.35), rng.uniform(-0.4, 0.4)
        xs, ys = start + (end - start) * t + bow * t * (1 - t), -1 + rng.uniform(0.7, 1.8) * t
        path = np.array([point(u, v) for u, v in zip(xs, ys, strict=True)], np.int32)
        cv2.polylines(above, [path], False, 0.8 * bright, thick, cv2.LINE_AA)
    if wanted["box"]:
        cx, cy = rng.choice((-1, 1)) * rng.uniform(0.4, 0.65), rng.uniform(-0.6, -0.35)
        cv2.rectangle(above, point(cx - 0.08, cy - 0.06), point(cx + 0.08, cy + 0.06), bright, -1)
        target = point(rng.uniform(0, 0.3), rng.uniform(0.1, 0.4))
        cv2.line(above, point(cx, cy), target, 0.85 * bright, thick, cv2.LINE_AA)
    if wanted["electrodes"]:
        for _ in range(int(rng.integers(1, 4))):
            centre = point(*rng.uniform((-0.75, -0.6), (0.75, 0.7)))
            radius = max(2, round(size * rng.uniform(0.02, 0.035)))
            cv2.circle(above, centre, radius, bright, thick, cv2.LINE_AA)
    np.maximum(film, above / np.float32(255), out=film)
