"""Near-duplicate images: the same film under another patient's id, in another split or data set.

Candidates are pairs whose difference hashes differ in few bits; they are confirmed by the
correlation of small copies. Copies in another size, format, compression, brightness or contrast are
found, also mirrored from left to right. Those that are cropped, turned or inverted are not searched
for.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import cv2
import numpy as np

from bigmed.data.decode import available_cores
from bigmed.data.pipeline import evaluation_batches
from bigmed.data.sources import Source, joined_patients
from bigmed.errors import UserError

BITS = 256
SIDE = 16  # BITS = SIDE x SIDE comparisons of neighbours
SMALL = 32  # side of the copies that are correlated
CANVAS = 128  # side that images are averaged down to before anything else
BLOCK = 2**18  # pairs that a thread compares at a time, such as its caches hold
CHUNK = 512  # of them whose copies are correlated at once
MOST_PAIRS = 2**22
# On real radiographs, ultrasound and dermoscopy hardly a pair so near is not of the same scene.
DISTANCE, CORRELATION = 40, 0.985
KINDS = (
    "across splits",  # of one data set, whoever's they are: a leak
    "across data sets",  # a leak if one is trained on and the other tested on
    "other patient",  # within a split
    "same patient",  # within a split, which is no mistake
)


@dataclasses.dataclass(frozen=True)
class Hashes:
    """What images are compared by.

    Attributes:
      bits: uint64 [N, 4], whether each of 16 x 16 pixels is darker than its right neighbour.
      mirrored: uint64 [N, 4], the same of the mirrored image.
      small: uint8 [N, 32, 32], the image, from its darkest pixel to its brightest.
    """

    bits: np.ndarray
    mirrored: np.ndarray
    small: np.ndarray

    def __len__(self) -> int:
        return len(self.bits)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of near-duplicates among N images, by distance and then by number.

    Attributes:
      a, b: int64 [n], the images, a < b.
      distance: int64 [n], bits of 256 that differ.
      correlation: float32 [n], of the small copies.
      mirrored: bool [n], whether one looks like the other in a mirror.
    """

    a: np.ndarray
    b: np.ndarray
    distance: np.ndarray
    correlation: np.ndarray
    mirrored: np.ndarray

    def __len__(self) -> int:
        return len(self.a)


def hash_images(images: Sequence[np.ndarray]) -> Hashes:
    """Hashes of grey images, uint8 or uint16 [H, W], of any sizes."""
    bits, mirrored = np.empty((2, len(images), BITS // 64), np.uint64)
    small = np.empty((len(images), SMALL, SMALL), np.uint8)
    for i, image in enumerate(images):
        image = image.astype(np.float32)
        grid = cv2.resize(image, (SIDE + 1, SIDE), interpolation=cv2.INTER_AREA)
        for words, seen in ((bits, grid), (mirrored, grid[:, ::-1])):
            words[i] = np.packbits(seen[:, :-1] < seen[:, 1:]).view(np.uint64)
        copy = cv2.resize(image, (SMALL, SMALL), interpolation=cv2.INTER_AREA)
        span = max(float(copy.max() - copy.min()), 1e-6)
        small[i] = np.rint((copy - copy.min()) * (255 / span))
    return Hashes(bits, mirrored, small)


def hash_source(source: Source, on_progress: Callable[[int], None] = lambda done: None) -> Hashes:
    """Hashes of all images of a source, in the order of its records, decoded on all cores.

    Args:
      source: N images; colours are made grey.
      on_progress: is told how many are done.

    Raises:
      UserError: a record cannot be decoded.
    """
    parts, done = [], 0
    for batch in evaluation_batches(source, canvas=CANVAS, channels=1, batch_size=128):
        images = [
            image[0, :height, :width, 0]
            for image, (_, _, height, width) in zip(batch["image"], batch["box"][:, 0], strict=True)
        ]
        parts.append(hash_images(images[: int(batch["mask"].sum())]))
        done += len(parts[-1])
        on_progress(done)
    return joined(parts)


def joined(parts: Sequence[Hashes]) -> Hashes:
    """The hashes of several sets of images as those of one."""
    return Hashes(
        np.concatenate([part.bits for part in parts]),
        np.concatenate([part.mirrored for part in parts]),
        np.concatenate([part.small for part in parts]),
    )


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of all splits of several data sets, in one row.

    Attributes:
      sources: S splits.
      sets: int [S], number of the data set of each.
      splits: S names.
      starts: int64 [S + 1], the first image of each, and their number N.
      patients: int64 [N], equal for equal patients of one data set alone.
    """

    sources: Sequence[Source]
    sets: np.ndarray
    splits: Sequence[str]
    starts: np.ndarray
    patients: np.ndarray

    def locate(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of images [n]: the number of their source, and that of their record there."""
        which = np.searchsorted(self.starts, images, side="right") - 1
        return which, images - self.starts[which]

    def kinds(self, pairs: Pairs) -> np.ndarray:
        """int [n]: what each pair is, of `KINDS`."""
        a, b = (self.locate(side)[0] for side in (pairs.a, pairs.b))
        other_patient = self.patients[pairs.a] != self.patients[pairs.b]
        cases = (self.sets[a] != self.sets[b], a != b, other_patient)
        found = [KINDS.index(kind) for kind in ("across data sets", "across splits")]
        found.append(KINDS.index("other patient"))
        return np.select(cases, found, KINDS.index("same patient"))

    def leaks(self, pairs: Pairs) -> np.ndarray:
        """bool [n]: whether a pair lies across splits, of one data set or of two."""
        names = np.array(self.splits)
        return names[self.locate(pairs.a)[0]] != names[self.locate(pairs.b)[0]]


def in_one_row(sources: Sequence[Source], sets: Sequence[int], splits: Sequence[str]) -> Images:
    """`Images` of these splits; a patient without an id is one for each image."""
    # Equal ids of two data sets need not be the same people.
    named = [dataclasses.replace(s, id_space=str(n)) for s, n in zip(sources, sets, strict=True)]
    starts = np.cumsum([0, *map(len, sources)])
    patients = np.concatenate(joined_patients(named)).astype(np.int64)
    return Images(sources, np.asarray(sets), splits, starts, patients)


def near_pairs(
    hashes: Hashes,
    distance: int = DISTANCE,
    correlation: float = CORRELATION,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Pairs:
    """All pairs of near-duplicates.

    Every image is compared with every other, in blocks, on all cores: time grows with N^2, memory
    with N and the number of pairs. An image of one grey value is like no other.

    Args:
      hashes: of N images.
      distance: bits of 256 in which the hashes of a pair may differ.
      correlation: that its small copies have at least.
      on_progress: is told how many images have been compared with all after them.

    Raises:
      UserError: limits that cannot be, or more than `MOST_PAIRS` pairs.
    """
    if not 0 <= distance <= BITS or not 0 < correlation <= 1:
        raise UserError(
            f"distance={distance}, correlation={correlation}: valid: distance 0 to {BITS}, "
            "correlation above 0, at most 1"
        )
    found, count = [], 0
    blocks = list(_blocks(len(hashes)))
    with futures.ThreadPoolExecutor(available_cores()) as pool:
        jobs = pool.map(lambda block: _compare(hashes, *block, distance, correlation), blocks)
        for (_, stop), part in zip(blocks, jobs, strict=True):
            found.append(part)
            on_progress(stop)
            count += len(part[0])
            if count > MOST_PAIRS:
                pool.shutdown(cancel_futures=True)
                raise UserError(
                    f"more than {MOST_PAIRS} pairs at distance={distance}, "
                    f"correlation={correlation}; nearer limits find fewer"
                )
    whole = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    order = np.lexsort((whole[1], whole[0], whole[2]))
    return Pairs(*(values[order] for values in whole))


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    """Ranges of images to compare with all after them, of about as many pairs each."""
    start = 0
    while start < count:
        stop = min(count, start + max(1, BLOCK // (count - start)))
        yield start, stop
        start = stop


def _compare(
    hashes: Hashes, start: int, stop: int, distance: int, correlation: float
) -> tuple[np.ndarray, ...]:
    """The pairs of images `start` to `stop` with those after them, as `Pairs` has them."""
    near, turned = (
        _candidates(hashes.bits, others, start, stop, distance)
        for others in (hashes.bits, hashes.mirrored)
    )
    # What looks the same from both sides is a plain pair.
    seen = np.isin(turned[0] * len(hashes) + turned[1], near[0] * len(hashes) + near[1])
    turned = [x[~seen] for x in turned]
    mirrored = np.repeat([False, True], [len(near[0]), len(turned[0])])
    a, b, bits = map(np.concatenate, zip(near, turned, strict=True))
    r = np.empty(len(a), np.float32)
    for begin in range(0, len(a), CHUNK):
        part = slice(begin, begin + CHUNK)
        other = hashes.small[b[part]]
        other = np.where(mirrored[part, None, None], other[:, :, ::-1], other)
        r[part] = _correlation(hashes.small[a[part]], other)
    return tuple(x[r >= correlation] for x in (a, b, bits, r, mirrored))


def _candidates(
    bits: np.ndarray, others: np.ndarray, start: int, stop: int, distance: int
) -> tuple[np.ndarray, ...]:
    """(a, b, distance) of images `start` to `stop` and those after them: int64 [n] each."""
    near = np.zeros((stop - start, len(bits) - start), np.uint8)  # 256 is 0, and sorted out below
    for word in range(BITS // 64):
        near += np.bitwise_count(bits[start:stop, None, word] ^ others[None, start:, word])
    a, b = (x + start for x in np.nonzero(near <= distance))
    a, b = a[a < b], b[a < b]
    exact = np.bitwise_count(bits[a] ^ others[b]).sum(axis=1, dtype=np.int64)
    return tuple(x[exact <= distance] for x in (a, b, exact))


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Pearson's, image by image, of uint8 [n, H, W]; 0 where one is constant: float32 [n]."""
    x, y = (v.reshape(len(v), -1).astype(np.float32) for v in (one, other))
    x, y = (v - v.mean(axis=1, keepdims=True) for v in (x, y))
    xx, yy, xy = (np.einsum("np,np->n", *pair) for pair in ((x, x), (y, y), (x, y)))
    scale = np.sqrt(xx * yy)
    return xy / np.where(scale > 0, scale, np.inf)
