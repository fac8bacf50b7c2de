"""Host batches for training and evaluation: a training batch is a pure function of (seed, step).

A `Plan` says which records make up the batch of a step; grain fetches batches ahead, in threads or
in worker processes, by mapping a batch-level read and decode over the plan. As nothing else enters
a batch, resuming needs the step alone, and the number of workers, threads or hosts changes nothing.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from bigmed.data import schema, texts
from bigmed.data.decode import BatchDecoder, available_cores
from bigmed.data.indexing import digest
from bigmed.data.pairs import EveryUnit, Plan, Units, hash64, integer_proportions
from bigmed.data.sources import Source, joined_patients, open_source
from bigmed.errors import UserError, did_you_mean

_EVAL_PREFETCH = 2
Batch = dict[str, np.ndarray]


class Pipeline:
    """Training batches from one data set or a mixture.

    Attributes:
      sources: the opened sources.
      class_names: names of the L label columns: the union over the sources, in their order.
      task: 'single_label', 'multi_label' or 'none'.
      units_per_epoch: images; or cases with `pairs='case'` or with texts.
      tokeniser: of the texts, or None without.
      fingerprint: hash of all that determines the batches.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        seed: int,
        batch_size: int,
        block: int = 0,
        num_blocks: int = 1,
        every_unit: bool = False,
    ):
        """Opens the sources and plans the batches.

        Args:
          config: `sources`, names to mix, each described under `source` (see `open_source`; a
            `weight` is the share of the batch, by default in proportion to the units); `canvas`,
            height and width of the arrays; `channels` 1 or 3; `pairs`, None, or 'case' for two
            distinct images of a case; `single_image`, see `pairs.Units.cases`; `text`, see
            `texts.prepare`, with which a unit is a case that has a text, of which one image (or
            two) is drawn, and the text is that of the first; `workers`,
            processes, 0 for threads alone, which keep a handful of cores busy, as decoding needs
            no interpreter lock; `threads`, None for all cores; `prefetch`, batches made ahead.
          seed: of the order of the data.
          batch_size: global, in units.
          block: which block of the rows this host makes, of `num_blocks` equal ones in order; what
            `jax.make_array_from_process_local_data` wants (`sharding.host_block`).
          num_blocks: usually the number of hosts.
          every_unit: whether the batches visit all units in turn (`pairs.EveryUnit`), unweighted.

        Raises:
          UserError: a value that cannot work, or more units in a batch than there are.
        """
        self._config = config
        self._batch_size = batch_size
        rows = _host_rows(batch_size, block, num_blocks)
        pairs = config.get("pairs")
        if pairs not in (None, "case"):
            raise UserError(f"data.pairs={pairs!r}; valid: None, 'case'")
        _check_canvas(config["canvas"], config["channels"])
        self.sources = _open_sources(config)
        self.tokeniser, self._texts = None, None
        if (config.get("text") or {}).get("tokeniser"):
            self._texts, self.tokeniser = texts.prepare(self.sources, config["text"])
        own_texts = self._texts or []
        of_sources = own_texts or [None] * len(self.sources)
        units = [_units(s, t, config) for s, t in zip(self.sources, of_sources, strict=True)]
        proportions = _proportions(config, units, batch_size, self.sources)
        self.units_per_epoch = sum(map(len, units))
        self.class_names, labels = _joined_labels(self.sources)
        tasks = {source.task for source in self.sources if source.task != "none"}
        names = {source.class_names for source in self.sources if source.task != "none"}
        self.task = "none" if not tasks else "multi_label"
        if len(tasks) == 1 and len(names) == 1:
            self.task = tasks.pop()
        self._bits = max(source.bits for source in self.sources)
        self.fingerprint = digest(
            [(source.fingerprint, source.id_space) for source in self.sources],
            [(own.starts, own.members) for own in units],
            proportions,
            [seed, batch_size, pairs, config["canvas"], config["channels"]],
            self.tokeniser.fingerprint if self.tokeniser else None,
            *([dataclasses.astuple(t.settings)[1:], t.ids, t.starts, t.members] for t in own_texts),
        )
        plan = (EveryUnit if every_unit else Plan)(
            units, proportions, seed=seed, batch_size=batch_size, rows=rows, pairs=pairs == "case"
        )
        workers = int(config.get("workers") or 0)
        threads = int(config.get("threads") or available_cores())
        decoder = BatchDecoder(
            [source.records for source in self.sources],
            config["canvas"],
            config["channels"],
            self._bits,
            max(1, threads // max(1, workers)),
        )
        patients = joined_patients(self.sources)
        assemble = _Assemble(decoder, labels, patients, rows.start, self._texts, seed)
        self._batches = grain.MapDataset.source(plan).map(assemble)

    def batch_spec(self) -> dict[str, Any]:
        """Name -> jax.ShapeDtypeStruct of the global batch; see `host_batch`."""
        import jax  # here alone: worker processes import this module and need no jax

        size, canvas = self._batch_size, self._config["canvas"]
        images = 2 if self._config.get("pairs") else 1
        spec = {
            "image": jax.ShapeDtypeStruct(
                (size, images, canvas, canvas, self._config["channels"]),
                np.uint16 if self._bits == 16 else np.uint8,
            ),
            "box": jax.ShapeDtypeStruct((size, images, 4), np.int32),
            "labels": jax.ShapeDtypeStruct((size, len(self.class_names)), np.int32),
            "patient": jax.ShapeDtypeStruct((size,), np.int32),
            "index": jax.ShapeDtypeStruct((size,), np.int32),
        }
        if self._texts:
            settings = self._texts[0].settings
            shape = (size, settings.texts, settings.length)
            spec["tokens"] = jax.ShapeDtypeStruct(shape, np.int32)
            spec["token_mask"] = jax.ShapeDtypeStruct(shape, np.bool_)
            spec["text_id"] = jax.ShapeDtypeStruct(shape[:2], np.int32)
        return spec

    def host_batch(self, step: int) -> Batch:
        """This host's rows of the batch of a step: a pure function of (seed, step).

        Returns:
          image uint8 or uint16 [B, K, H, W, C], at the top left of the canvas, zeros beyond it;
          box int32 [B, K, 4], its (top, left, height, width); labels int32 [B, L], -2 where there
          are none; patient int32 [B]; index int32 [B], the row number in the global batch; with
          texts also tokens, token_mask and text_id, see `texts.Texts.draw`.

        Raises:
          UserError: a record cannot be read or decoded; names data set, split and record number.
        """
        return self._batches[step]

    def iterate(self, start_step: int) -> Iterator[Batch]:
        """The batches of `start_step` and on without end, made ahead; as `host_batch` gives."""
        workers = int(self._config.get("workers") or 0)
        prefetch = int(self._config.get("prefetch") or 0)
        return _fetch_ahead(self._batches[start_step:], workers, prefetch)

    def describe(self) -> str:
        """What is trained on, in one line for each source."""
        kind = _kind(self._config)
        head = f"{self.units_per_epoch} {kind} an epoch in batches of {self._batch_size}"
        described = [source.describe() for source in self.sources]
        described += [own.describe() for own in self._texts or ()]
        return "\n".join([head, *described])


def evaluation_batches(
    source: Source,
    *,
    canvas: int,
    channels: int,
    batch_size: int,
    block: int = 0,
    num_blocks: int = 1,
    text: texts.Texts | None = None,
) -> Iterator[Batch]:
    """All records of a source once, in order, in batches of equal size; the last one is padded.

    Every host yields the same number of batches; a host makes its block of the rows of each.

    Returns:
      Batches as `Pipeline.host_batch` gives them with K = 1, and mask bool [B], False in padding
      rows, and record int32 [B], the record number (-1 in padding). With `text` also its texts,
      always the same ones, whose token_mask is False throughout where a record has none.

    Raises:
      UserError: as the pipeline.
    """
    rows = _host_rows(batch_size, block, num_blocks)
    _check_canvas(canvas, channels)
    decoder = BatchDecoder([source.records], canvas, channels, source.bits, available_cores())
    patients = [source.patients]
    assemble = _Assemble(
        decoder, [source.labels], patients, rows.start, [text] if text else None, evaluation=True
    )
    batches = grain.MapDataset.source(_InOrder(len(source), batch_size, rows)).map(assemble)
    return _fetch_ahead(batches, 0, _EVAL_PREFETCH)


class _InOrder:
    """A plan that visits every record once, in order; -1 in the rows beyond the last."""

    def __init__(self, num_records: int, batch_size: int, rows: slice):
        self._num_records = num_records
        self._batch_size = batch_size
        self._rows = np.arange(batch_size)[rows]

    def __len__(self) -> int:
        return -(-self._num_records // self._batch_size)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        records = step * self._batch_size + self._rows
        records = np.where(records < self._num_records, records, -1)
        # each record is visited once, so the record itself numbers the visit
        return np.zeros(len(records), np.int64), records[:, None], records


class _Assemble:
    """Planned rows -> host batch; picklable, so that it can run in a worker process."""

    def __init__(
        self,
        decoder: BatchDecoder,
        labels: Sequence[np.ndarray],
        patients: Sequence[np.ndarray],
        first_row: int,
        of_sources: Sequence[texts.Texts] | None,
        seed: int = 0,
        evaluation: bool = False,
    ):
        self._decoder = decoder
        self._texts = of_sources
        self._text_keys = [int(hash64(seed, n, 2)) for n in range(len(labels))]
        self._labels = labels  # per source int8 [N, L]
        self._patients = patients  # per source int32 [N]
        self._first_row = first_row
        self._evaluation = evaluation

    def __call__(self, planned: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Batch:
        source, records, visits = planned  # [B], [B, K], [B]
        count, images_per_row = records.shape
        wanted = records.copy()
        # A case of one image: decode it once, for both places.
        twice = np.zeros(count, bool) if images_per_row == 1 else records[:, 0] == records[:, 1]
        wanted[twice, 1:] = -1
        image, box = self._decoder(np.repeat(source, images_per_row), wanted.reshape(-1))
        image = image.reshape(count, images_per_row, *image.shape[1:])
        box = box.reshape(count, images_per_row, 4)
        image[twice, 1:], box[twice, 1:] = image[twice, :1], box[twice, :1]
        labels = np.full((count, self._labels[0].shape[1]), schema.MISSING, np.int32)
        patient = np.full(count, -1, np.int32)
        for number in np.unique(source).tolist():
            mine = (source == number) & (records[:, 0] >= 0)
            labels[mine] = self._labels[number][records[mine, 0]]
            patient[mine] = self._patients[number][records[mine, 0]]
        index = np.arange(self._first_row, self._first_row + count, dtype=np.int32)
        batch = {"image": image, "box": box, "labels": labels, "patient": patient, "index": index}
        if self._texts:
            batch |= self._draw_texts(source, records[:, 0], visits)
        if self._evaluation:
            batch |= {"mask": records[:, 0] >= 0, "record": records[:, 0].astype(np.int32)}
        return batch

    def _draw_texts(self, source: np.ndarray, records: np.ndarray, visits: np.ndarray) -> Batch:
        settings, count = self._texts[0].settings, len(source)
        shape = (count, settings.texts, settings.length)
        batch = {
            "tokens": np.zeros(shape, np.int32),
            "token_mask": np.zeros(shape, bool),
            "text_id": np.zeros(shape[:2], np.int32),
        }
        for number, own in enumerate(self._texts):
            mine = np.flatnonzero((source == number) & (records >= 0))
            mine = mine[own.has_text[records[mine]]]  # in evaluation some have none
            if self._evaluation:
                drawn = own.fixed(records[mine])
            else:
                drawn = own.draw(records[mine], self._text_keys[number], visits[mine])
            for name, rows in drawn.items():
                batch[name][mine] = rows
        return batch


def _fetch_ahead(batches: grain.MapDataset, workers: int, prefetch: int) -> Iterator[Batch]:
    """The elements of `batches` in order, made ahead by threads or by worker processes."""
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain hands its flags on to the workers
        dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=max(1, prefetch // workers)
            )
        )
    else:
        # Two batches at a time: the decoding threads stay busy where one batch ends.
        options = grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch)
        dataset = batches.to_iter_dataset(options)
    with contextlib.closing(iter(dataset)) as iterator:
        yield from iterator


def _host_rows(batch_size: int, block: int, num_blocks: int) -> slice:
    """The rows of the global batch that a host makes: contiguous blocks in order of the hosts."""
    if batch_size < 1 or batch_size % num_blocks:
        raise UserError(
            f"batch_size={batch_size} does not divide over {num_blocks} hosts; "
            f"valid: multiples of {num_blocks}"
        )
    size = batch_size // num_blocks
    return slice(block * size, (block + 1) * size)


def _check_canvas(canvas: int, channels: int) -> None:
    if canvas < 1:
        raise UserError(f"canvas={canvas}; valid: a height and width in pixels, such as 256")
    if channels not in (1, 3):
        raise UserError(f"channels={channels}; valid: 1 (grey), 3 (RGB)")


def _open_sources(config: Mapping[str, Any]) -> list[Source]:
    if not config["sources"]:
        raise UserError("data.sources is empty; name at least one of data.source")
    for name in config["sources"]:
        if name not in config["source"]:
            raise UserError(
                f"data.sources names '{name}' but data.source has no such entry; "
                f"{did_you_mean(name, config['source'])}"
            )
    return [open_source(config["source"][name]) for name in config["sources"]]


def _kind(config: Mapping[str, Any]) -> str:
    text = (config.get("text") or {}).get("tokeniser")
    return "cases" if config.get("pairs") or text else "images"


def _units(source: Source, own: texts.Texts | None, config: Mapping[str, Any]) -> Units:
    """What one source is sampled by."""
    if _kind(config) == "images":
        return Units.images(len(source))
    single_image = (config.get("single_image") or "augment") if config.get("pairs") else "augment"
    units = Units.cases(source.cases, single_image, own.has_text if own else None)
    if not len(units):
        raise UserError(
            f"'{source.name}' has no case with two images, so pairs='case' with "
            "single_image='drop' leaves nothing; valid: single_image='augment'"
        )
    return units


def _proportions(
    config: Mapping[str, Any], units: Sequence[Units], batch_size: int, sources: Sequence[Source]
) -> tuple[int, ...]:
    """Shares of the sources in the batch, checked against their sizes."""
    names = list(config["sources"])
    weights = [config["source"][name].get("weight") for name in names]
    if any(weight is None for weight in weights):
        if any(weight is not None for weight in weights):
            raise UserError("data.source: give a weight to each of the mixed sources or to none")
        weights = [len(u) for u in units]
    for name, weight in zip(names, weights, strict=True):
        if not weight > 0:
            raise UserError(f"data.source.{name}.weight={weight}; valid: a number above 0")
    proportions = integer_proportions(weights)
    for source, own, proportion in zip(sources, units, proportions, strict=True):
        share = int(np.ceil(batch_size * proportion / sum(proportions)))
        if share > len(own):
            raise UserError(
                f"a batch of {batch_size} takes {share} {_kind(config)} of '{source.name}', which "
                f"has {len(own)}; valid: a smaller batch_size"
            )
    return proportions


def _joined_labels(sources: Sequence[Source]) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """The union of the class names, and each source's labels in those columns, int8 [N, L].

    A class that a source does not know is missing in all its rows.
    """
    names = tuple(dict.fromkeys(name for source in sources for name in source.class_names))
    joined = []
    for source in sources:
        labels = np.full((len(source), len(names)), schema.MISSING, np.int8)
        labels[:, [names.index(name) for name in source.class_names]] = source.labels
        joined.append(labels)
    return names, joined
