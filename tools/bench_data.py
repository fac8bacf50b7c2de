"""Times the input pipeline beside a hand-written read-and-decode loop, in one run.

    python tools/bench_data.py                     # 256x256 grey JPEG, made for the purpose
    python tools/bench_data.py --data DIR --split train

The loop is what one would write by hand for this data set alone: each thread makes whole batches
by itself, reading a batch of ArrayRecord records in one call and decoding them with OpenCV into a
canvas. The pipeline adds sampling, boxes, labels, order and error handling. Rounds alternate, so
that a change of the machine's load meets both. The target is 85 % of the loop's images/s.
"""

import collections
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent import futures

import cv2
import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags
from array_record.python import array_record_data_source
from tensorflow_datasets.proto import tf_example_pb2

from bigmed.data.decode import available_cores
from bigmed.data.pipeline import Pipeline
from bigmed.data.records import Shard
from bigmed.data.sources import open_source

DATA = flags.DEFINE_string("data", None, "TFDS directory; by default a synthetic set is made")
SPLIT = flags.DEFINE_string("split", "train", "its split")
SIZE = flags.DEFINE_integer("size", 256, "canvas, and size of the synthetic images")
BATCH = flags.DEFINE_integer("batch", 256, "images in a batch")
BATCHES = flags.DEFINE_integer("batches", 30, "batches a round")
ROUNDS = flags.DEFINE_integer("rounds", 7, "rounds of each")
THREADS = flags.DEFINE_integer("threads", None, "decoding threads; by default all cores")
WORKERS = flags.DEFINE_integer("workers", 0, "worker processes of the pipeline")

_NUM_SYNTHETIC = 2048
_TARGET = 0.85


class GreyJpegs(tfds.core.GeneratorBasedBuilder):
    """Synthetic smooth grey images with some noise, about as large in bytes as radiographs."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(shape=(None, None, 1))}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        rng = np.random.default_rng(0)
        size = SIZE.value
        for number in range(_NUM_SYNTHETIC):
            coarse = rng.uniform(0, 255, (12, 12)).astype(np.float32)
            image = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
            image = np.clip(image + rng.normal(0, 1.5, image.shape), 0, 255).astype(np.uint8)
            jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
            yield number, {"image": jpeg}


def hand_written(shards: Sequence[Shard], threads: int) -> Iterator[np.ndarray]:
    """Batches uint8 [B, H, W, 1] of random records from all the shards."""
    files = [f"{shard.path}[{shard.skip}:{shard.skip + shard.take}]" for shard in shards]
    records = array_record_data_source.ArrayRecordDataSource(files)
    size = SIZE.value

    def make_batch(step: int) -> np.ndarray:
        ids = np.random.default_rng(step).integers(0, len(records), BATCH.value).tolist()
        canvas = np.empty((BATCH.value, size, size, 1), np.uint8)
        for row, record in enumerate(records.__getitems__(ids)):
            feature = tf_example_pb2.Example.FromString(record).features.feature
            encoded = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8)
            image = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)
            height, width = image.shape
            canvas[row, height:] = 0
            canvas[row, :height, width:] = 0
            canvas[row, :height, :width, 0] = image
        return canvas

    with futures.ThreadPoolExecutor(threads) as pool:
        steps = itertools.count()
        ahead = collections.deque(pool.submit(make_batch, next(steps)) for _ in range(threads + 1))
        try:
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(make_batch, next(steps)))
                yield batch
        finally:
            for job in ahead:
                job.cancel()


def images_per_second(batches: Iterator) -> tuple[float, float]:
    """Of `BATCHES` batches after the first, which pays for threads and processes to start.

    Returns:
      Images a second by the clock, and by the processor time of this process (for one core): the
      second does not suffer from what else the machine does, but is blind to worker processes.
    """
    next(batches)
    start, start_cpu = time.perf_counter(), time.process_time()
    for _ in range(BATCHES.value):
        next(batches)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    batches.close()
    images = BATCHES.value * BATCH.value
    return images / seconds, images / cpu_seconds


def main(argv) -> None:
    del argv
    cv2.setNumThreads(1)
    threads = THREADS.value or available_cores()
    with tempfile.TemporaryDirectory() as folder:
        directory = DATA.value
        if directory is None:
            builder = GreyJpegs(data_dir=folder, file_format="array_record")
            builder.download_and_prepare()
            directory = builder.data_path
        source = {"dir": str(directory), "split": SPLIT.value}
        shards = open_source(source).records.shards
        pipeline = Pipeline(
            {
                "sources": ("bench",),
                "source": {"bench": source},
                "canvas": SIZE.value,
                "channels": 1,
                "workers": WORKERS.value,
                "threads": threads,
                "prefetch": threads + 1,
            },
            seed=0,
            batch_size=BATCH.value,
        )
        print(f"{pipeline.describe()}; {threads} threads")
        rounds = []
        for number in range(ROUNDS.value):
            hand = images_per_second(hand_written(shards, threads))
            ours = images_per_second(pipeline.iterate(number * BATCHES.value))
            rounds.append((*hand, *ours, ours[0] / hand[0], ours[1] / hand[1]))
            print(_line(f"round {number}", rounds[-1]), flush=True)
        print(_line("median", [statistics.median(column) for column in zip(*rounds, strict=True)]))
        print(f"target: {_TARGET:.2f} of the images/s")


def _line(title: str, values) -> str:
    hand, hand_cpu, ours, ours_cpu, ratio, ratio_cpu = values
    return (
        f"{title}: images/s (a core's processor second): hand-written {hand:,.0f} ({hand_cpu:,.0f})"
        f", pipeline {ours:,.0f} ({ours_cpu:,.0f}), ratio {ratio:.2f} ({ratio_cpu:.2f})"
    )


if __name__ == "__main__":
    app.run(main)
