"""Ingest: decode a source's images once into a data set at training resolution.

The plan (which row goes where) is fixed before any pixel is read; then shards of rows are encoded
in parallel, each written atomically. A killed run is continued by the same command and gives the
same bytes. What cannot be used is listed in quarantine.csv, never dropped in silence.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from bigmed.data import images, schema, writer
from bigmed.data.ingest_worker import PixelConfig, Pool, ShardTask, encode_shard, probe_files
from bigmed.data.manifest import IMAGE_SUFFIXES, Manifest, Row, SourceConfig, read_source
from bigmed.errors import UserError

PLAN_FORMAT = 1  # to be raised when the same plan would give other bytes
SPLITS = ("train", "val", "test")
# Reasons for which a row is left out, beside those of images.py and ingest_worker.py.
NO_PATIENT, NO_SPLIT = "no patient id", "no split given"
DUPLICATE = "same bytes as row"
_CHUNK = 512  # rows a worker probes at a time


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """How the data set is to be stored: one field per flag of the command."""

    name: str = ""  # default: from the folder's name
    size: int = 256
    resize: str = "longer"
    format: str = "auto"
    bits: str = "auto"
    channels: str = "auto"
    fractions: tuple[float, ...] = (0.7, 0.1, 0.2)
    seed: int = 0


def prepare(
    source: SourceConfig,
    store: StoreConfig,
    out: pathlib.Path,
    *,
    workers: int = 1,
    max_bad: float = 0.05,
    say: Callable[[str], None] = print,
    progress: Callable[[str, int], Callable[[int], None]] = lambda label, total: lambda n: None,
) -> schema.DatasetFacts:
    """Makes the data set `out` from `source`, or goes on with it, or says that it is there.

    Args:
      workers: processes; 1 works in this one.
      max_bad: largest share of the rows that may be unusable. Duplicates do not count, nor, in a
        folder, files that do not claim to be images.
      say: takes plain lines; none names a patient or a file of one.
      progress: (label, total) -> a function to call with the number of rows done since.

    Raises:
      UserError: any mistake in the source, the flags or the output folder; a source too bad.
    """
    _check(source, store, out)
    manifest = read_source(source)
    splits = _split_rows(manifest, store)
    stats = [_stat(row.path) for row in manifest.rows]
    plan = _plan_sha256(source, store, manifest, stats)
    facts = writer.finished(out, plan)
    if facts:
        say(f"{out}: prepared already, nothing to do")
        return facts
    for note in manifest.notes:
        say(note)
    with writer.working(out) as work:
        partial = writer.partial_directory(out)
        _claim(work, partial, plan)
        if (partial / schema.INFO_FILE).exists():  # killed just before the last rename
            writer.publish(out)
            return schema.DatasetFacts.read(out)
        with Pool(workers) as pool:
            scan = _scan(pool, manifest, stats, work, progress)
            bad = {
                row.number: (row.number, row.file, reason)
                for row, reason in zip(manifest.rows, scan, strict=True)
                if isinstance(reason, str)
            }
            _refuse_too_bad(bad, manifest, source, max_bad, partial)
            pixels = _pixels(store, manifest, [h for h in scan if not isinstance(h, str)], say)
            tasks = _tasks(manifest, splits, bad, pixels, work)
            results = _encode(pool, tasks, progress)
        for result in results.values():
            bad |= {number: (number, file, reason) for number, file, reason in result["bad"]}
        _refuse_too_bad(bad, manifest, source, max_bad, partial)
        return _finish(out, manifest, store, pixels, tasks, results, bad, plan, say)


# -------------------------------------------------------------------------------------------- plan


def _check(source: SourceConfig, store: StoreConfig, out: pathlib.Path) -> None:
    """Refuses what no source could satisfy."""
    if len(store.fractions) != len(SPLITS):
        raise UserError("--fractions: give three shares, for train, val and test")
    if store.name and not re.fullmatch(r"[a-z][a-z0-9_]*", store.name):
        raise UserError(f"--name {store.name!r}: lower-case letters, digits and _ only")
    folder = pathlib.Path(source.source)
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out}: lies inside the source; choose a folder outside it")


def _split_rows(manifest: Manifest, store: StoreConfig) -> dict[int, str]:
    """Split of each row that has a patient: as given, or drawn by group."""
    rows = [row for row in manifest.rows if row.patient]
    if manifest.given_splits:
        split_of = {row.number: row.split for row in rows if row.split}
        why = "the given splits put"
    else:
        shares = dict(zip(SPLITS, store.fractions, strict=True))
        drawn = schema.patient_split([row.group for row in rows], shares, store.seed)
        split_of = {row.number: drawn[row.group] for row in rows}
        why = "--group_column puts"
    for kind in ("patient", "group"):
        first: dict[str, Row] = {}
        for row in rows:
            if row.number not in split_of:
                continue
            other = first.setdefault(getattr(row, kind), row)
            if split_of[other.number] != split_of[row.number]:
                raise UserError(
                    f"{why} rows {other.number} and {row.number}, of one {kind}, into "
                    f"'{split_of[other.number]}' and '{split_of[row.number]}'; "
                    f"a {kind} belongs to one split"
                )
    return split_of


def _stat(path: str) -> tuple[int, int] | None:
    """Size and modification time in ns; None where there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns) if path and os.path.isfile(path) else None


def _plan_sha256(source: SourceConfig, store: StoreConfig, manifest: Manifest, stats: list) -> str:
    """Hash of all that decides the data set's bytes; the source may be moved as a whole."""
    flags = dataclasses.asdict(source) | dataclasses.asdict(store)
    del flags["source"], flags["image_root"]
    digest = hashlib.sha256(json.dumps([PLAN_FORMAT, flags], sort_keys=True).encode())
    digest.update(json.dumps([manifest.class_names, manifest.task]).encode())
    for row, stat in zip(manifest.rows, stats, strict=True):
        fields = (row.number, row.file, row.patient, row.labels, row.texts, row.group, row.split)
        mask = row.mask and _stat(row.mask)
        digest.update(json.dumps([*fields, stat, mask]).encode())
    return digest.hexdigest()


def _claim(work: pathlib.Path, partial: pathlib.Path, plan: str) -> None:
    """Notes the plan in the partial directory, or checks that what was begun there follows it."""
    path = work / "plan"
    if (partial / schema.INFO_FILE).exists():
        begun = schema.DatasetFacts.read(partial).plan_sha256
    elif any(work.glob("*.done")):
        begun = path.read_text()
    else:
        begun = plan
        if not path.exists() or path.read_text() != plan:
            (work / "scan.json").unlink(missing_ok=True)
            writer.write_atomically(path, lambda temporary: temporary.write_text(plan))
    if begun != plan:
        raise UserError(
            f"{partial}: was begun with another source or other flags (or the source has changed "
            "since); delete it, or choose another --out"
        )


# ------------------------------------------------------------------------------------------- scan


def _scan(pool: "Pool", manifest: Manifest, stats: list, work: pathlib.Path, progress) -> list:
    """For each row its image's header, or the reason (text) why it is left out."""
    path = work / "scan.json"
    if path.exists():
        found = json.loads(path.read_text())
        return [one if isinstance(one, str) else images.Header(*one) for one in found]
    sizes = Counter(stat[0] for stat in stats if stat)
    jobs = [
        (row.path, bool(stat), bool(stat) and sizes[stat[0]] > 1)
        for row, stat in zip(manifest.rows, stats, strict=True)
    ]
    chunks = [jobs[k : k + _CHUNK] for k in range(0, len(jobs), _CHUNK)]
    probed: list[tuple] = []
    done = progress("reading headers", len(jobs))
    for part in pool.map(probe_files, chunks):
        probed.extend(part)
        done(len(part))
    scan: list = []
    first_with: dict[str, int] = {}
    for row, (found, sha256) in zip(manifest.rows, probed, strict=True):
        if not isinstance(found, str):
            if not row.patient:
                found = NO_PATIENT
            elif manifest.given_splits and not row.split:
                found = NO_SPLIT
            elif sha256:
                first = first_with.setdefault(sha256, row.number)
                found = found if first == row.number else f"{DUPLICATE} {first}"
        scan.append(found)
    text = json.dumps([one if isinstance(one, str) else dataclasses.astuple(one) for one in scan])
    writer.write_atomically(path, lambda temporary: temporary.write_text(text))
    return scan


def _pixels(
    store: StoreConfig, manifest: Manifest, headers: Sequence[images.Header], say
) -> PixelConfig:
    """Settles what is 'auto' by what the headers say: nothing is thrown away by default."""
    bits = max(header.bits for header in headers) if store.bits == "auto" else int(store.bits)
    channels = (
        max(header.channels for header in headers)
        if store.channels == "auto"
        else int(store.channels)
    )
    default = "jpeg" if bits == 8 else "png"
    file_format = default if store.format == "auto" else store.format
    if file_format == "jpeg" and bits == 16:
        raise UserError("--format jpeg: holds 8 bits and the source has 16; add --bits 8, or png")
    if store.bits == "auto" and len({header.bits for header in headers}) > 1:
        say("8-bit and 16-bit images together: all stored with 16 bits (see --bits)")
    if store.channels == "auto" and len({header.channels for header in headers}) > 1:
        say("grey and colour images together: all stored as RGB (see --channels)")
    return PixelConfig(store.size, store.resize, file_format, bits, channels, manifest.has_masks)


# ----------------------------------------------------------------------------------------- shards


def _tasks(
    manifest: Manifest,
    splits: dict[int, str],
    bad: dict,
    pixels: PixelConfig,
    work: pathlib.Path,
) -> dict[str, list[ShardTask]]:
    """Split -> its shards; enough of them to share out and to lose little by a kill."""
    by_split: dict[str, list[Row]] = defaultdict(list)
    for row in manifest.rows:
        if row.number not in bad:
            by_split[splits[row.number]].append(row)
    length = min(max(len(manifest.rows) // 256, 64), 4096)
    order = sorted(by_split, key=lambda split: (SPLITS + (split,)).index(split))
    return {
        split: [
            ShardTask(
                work / f"{split}-{k:05d}.array_record",
                tuple(by_split[split][start : start + length]),
                pixels,
            )
            for k, start in enumerate(range(0, len(by_split[split]), length))
        ]
        for split in order
    }


def _encode(pool: "Pool", tasks: dict[str, list[ShardTask]], progress) -> dict[pathlib.Path, dict]:
    """Encodes the shards that are not there yet; result path -> kept rows, bad rows, bytes."""
    every = [task for split in tasks.values() for task in split]
    done = progress("encoding", sum(len(task.rows) for task in every))
    todo = []
    for task in every:
        if task.result_path.exists():
            done(len(task.rows))
        else:
            todo.append(task)
    for rows in pool.map(encode_shard, todo):
        done(rows)
    return {task.result_path: json.loads(task.result_path.read_text()) for task in every}


# ----------------------------------------------------------------------------------------- the end


def _refuse_too_bad(
    bad: dict[int, tuple[int, str, str]],
    manifest: Manifest,
    source: SourceConfig,
    max_bad: float,
    partial: pathlib.Path,
) -> None:
    """Stops, with the list written, where more than `max_bad` of the rows are unusable."""
    is_folder = pathlib.Path(source.source).is_dir()

    def excused(file: str, reason: str) -> bool:
        claims = not is_folder or file.lower().endswith(IMAGE_SUFFIXES)
        return reason.startswith(DUPLICATE) or (reason == images.NOT_IMAGE and not claims)

    others = sum(excused(file, reason) for _, file, reason in bad.values())
    unusable, total = len(bad) - others, len(manifest.rows) - others
    if len(bad) < len(manifest.rows) and unusable <= max_bad * total:
        return
    writer.write_quarantine(partial, bad.values())
    listed = partial / schema.QUARANTINE_FILE
    if len(bad) == len(manifest.rows):
        raise UserError(f"--source {source.source}: no usable image among {total} rows; {listed}")
    raise UserError(
        f"{unusable} of {total} rows are unusable ({100 * unusable / total:.1f} %, more than "
        f"--max_bad {max_bad:g}); they are listed in {listed}"
    )


def _finish(
    out: pathlib.Path,
    manifest: Manifest,
    store: StoreConfig,
    pixels: PixelConfig,
    tasks: dict[str, list[ShardTask]],
    results: dict[pathlib.Path, dict],
    bad: dict[int, tuple[int, str, str]],
    plan: str,
    say: Callable[[str], None],
) -> schema.DatasetFacts:
    """Indexes, facts and the quarantine list; then the data set becomes visible."""
    by_number = {row.number: row for row in manifest.rows}
    shards, indexes, patients = {}, {}, {}
    for split, split_tasks in tasks.items():
        found = [results[task.result_path] for task in split_tasks]
        rows = [by_number[number] for result in found for number in result["kept"]]
        if not rows:
            continue
        shards[split] = [
            writer.Shard(task.path, len(result["kept"]), result["bytes"])
            for task, result in zip(split_tasks, found, strict=True)
        ]
        studies = None
        if "study_id" in manifest.text_fields:
            studies = [dict(row.texts)["study_id"] for row in rows]
        labels = np.array([row.labels for row in rows], np.int8)
        indexes[split] = schema.Index.build([row.patient for row in rows], labels, studies)
        patients[split] = {row.patient for row in rows}
    reasons = Counter(_kind(reason) for _, _, reason in bad.values())
    facts = schema.DatasetFacts(
        name=store.name or writer.dataset_name(out),
        class_names=manifest.class_names,
        task=manifest.task,
        split_sha256=schema.split_sha256(patients),
        counts={
            "rows": len(manifest.rows),
            "images": {split: len(index) for split, index in indexes.items()},
            "quarantined": dict(sorted(reasons.items())),
        },
        patients={split: len(ids) for split, ids in patients.items()},
        bits=pixels.bits,
        channels=pixels.channels,
        plan_sha256=plan,
    )
    fields = ["image", "image_id", "patient_id", *manifest.text_fields]
    fields += ["labels"] * bool(manifest.class_names) + ["mask"] * manifest.has_masks
    writer.finish(
        out,
        fields=fields,
        facts=facts,
        description="Prepared by bigmed from a user's images.",
        shards=shards,
        indexes=indexes,
        quarantine=bad.values(),
    )
    for line in summary(facts, out):
        say(line)
    if pixels.channels == 3 and not any(result["coloured"] for result in results.values()):
        say("all images are grey though stored as RGB: --channels 1 would make reading faster")
    return facts


def _kind(reason: str) -> str:
    return "duplicate" if reason.startswith(DUPLICATE) else reason


def summary(facts: schema.DatasetFacts, out: pathlib.Path) -> list[str]:
    """What came out, in plain lines: images and patients of each split, and what was left out."""
    counts = facts.counts["images"]
    parts = [
        f"{split} {n} images of {facts.patients[split]} patients" for split, n in counts.items()
    ]
    pixels = f"{facts.channels} channel{'s' * (facts.channels > 1)}, {facts.bits} bits"
    lines = [f"{out}: {sum(counts.values())} images ({pixels}): {', '.join(parts)}"]
    reasons = facts.counts["quarantined"]
    if reasons:
        total, rows = sum(reasons.values()), facts.counts["rows"]
        listed = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
        lines.append(
            f"left out {total} of {rows} rows: {listed}; see {out / schema.QUARANTINE_FILE}"
        )
    return lines
