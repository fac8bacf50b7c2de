"""Texts to tokens: a tokeniser from local files, fixed lengths, made once and then memory-mapped.

Nothing is ever fetched from a hub and no code from a tokeniser's folder is run.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import string
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bigmed.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # that a WordPiece vocabulary must have
# Towers' vocabularies are often rounded up to a multiple of 8, 64 or 128 rows.
SPARE_ROWS = 127
CHUNK = 4096  # texts tokenised at a time
_FILES = {"tokens": np.dtype(np.int32), "mask": np.dtype(bool)}

log = logging.getLogger("bigmed")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Texts as a text tower takes them.

    Attributes:
      tokens: [N, length] int32, special tokens included, padded on the right.
      mask: [N, length] bool, False on padding.
      truncated: how many texts were cut to the length.
      empty: how many texts have no token beside the special ones.
    """

    tokens: np.ndarray
    mask: np.ndarray
    truncated: int
    empty: int


@dataclasses.dataclass(frozen=True)
class Tokeniser:
    """A tokeniser of the `tokenizers` package, from `load`.

    Attributes:
      backend: a `tokenizers.Tokenizer`.
      path: where it is from, for messages.
      pad_id: the token of padding.
      max_length: the longest text that it was made for, or None if its files do not say.
    """

    backend: Any
    path: str
    pad_id: int
    max_length: int | None

    @functools.cached_property
    def vocab_size(self) -> int:
        """The highest token + 1."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary and of all settings."""
        self.backend.no_truncation()  # both are of the last call, not of the tokeniser
        self.backend.no_padding()
        settings = f"{self.backend.to_str()} {self.pad_id}"
        return hashlib.sha256(settings.encode()).hexdigest()


def load(path: str | os.PathLike, *, lower_case: bool | None = None) -> Tokeniser:
    """A tokeniser from a folder as transformers saves it, or from a WordPiece vocabulary file.

    Args:
      path: the folder, or a file such as vocab.txt with one token a line.
      lower_case: whether texts are lower-cased; None: as the folder says. transformers lower-cases
        where neither says otherwise, also for a cased vocabulary, for which there is a warning.

    Raises:
      UserError: there is no such folder or file, or it holds no usable tokeniser.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        tokeniser = _from_folder(path, lower_case)
    elif path.is_file():
        tokeniser = _from_vocabulary(path, lower_case is not False)
    else:
        raise UserError(
            f"config.data.text.tokeniser='{path}' does not exist; valid: a folder with a tokeniser "
            "of transformers or a vocab.txt (nothing is downloaded)"
        )
    backend = tokeniser.backend
    capitals = sum(word.isalpha() and word != word.lower() for word in backend.get_vocab())
    lowers = backend.normalizer is not None and backend.normalizer.normalize_str("A") == "a"
    if lowers and capitals > 0.01 * tokeniser.vocab_size:
        log.warning(
            "tokeniser %s lower-cases texts, but %d words of its vocabulary have capitals; if its "
            "model is a cased one, set config.data.text.lower_case=False",
            path,
            capitals,
        )
    return tokeniser


def check_fits(tokeniser: Tokeniser, vocab_size: int, max_length: int, length: int) -> None:
    """Whether a text tower can take the tokens.

    Args:
      tokeniser: from `load`.
      vocab_size, max_length: of the tower.
      length: that texts are padded or cut to.

    Raises:
      UserError: a token of the tokeniser is not in the tower, the tower has over 127 words that the
        tokeniser lacks (it is another model's), or the length is beyond either's longest.
    """
    theirs = tokeniser.vocab_size
    if not theirs <= vocab_size <= theirs + SPARE_ROWS:
        raise UserError(
            f"config.text_model.vocab_size={vocab_size} does not fit the {theirs} tokens of "
            f"config.data.text.tokeniser='{tokeniser.path}'; use the tokeniser of the tower's "
            f"weights, or a vocab_size of {theirs}"
        )
    if length > max_length:
        raise UserError(
            f"config.data.text.length={length} is beyond "
            f"config.text_model.max_length={max_length}; use at most {max_length}"
        )
    _check_length(tokeniser, length)


def encode(texts: Sequence[str], tokeniser: Tokeniser, length: int) -> Tokens:
    """Tokenises texts in memory; see `Tokens`.

    Raises:
      UserError: no texts, something that is no text, or a length that the tokeniser cannot make.
    """
    _check_texts(texts)
    _check_length(tokeniser, length)
    chunks = list(_chunks(texts, tokeniser, length))
    return Tokens(
        np.concatenate([chunk.tokens for chunk in chunks]),
        np.concatenate([chunk.mask for chunk in chunks]),
        sum(chunk.truncated for chunk in chunks),
        sum(chunk.empty for chunk in chunks),
    )


def tokenise_once(
    texts: Sequence[str], tokeniser: Tokeniser, length: int, cache_dir: str | os.PathLike
) -> Tokens:
    """`encode` with the arrays in files under `cache_dir`, made on the first call only.

    The files are found again by the texts in their order, the tokeniser and the length. They appear
    whole or not at all, also when several processes make them at once; damaged ones are made anew.

    Returns:
      Read-only memory maps.

    Raises:
      UserError: see `encode`.
      OSError: the files cannot be written.
    """
    _check_texts(texts)
    _check_length(tokeniser, length)
    cache_dir = pathlib.Path(cache_dir)
    folder = cache_dir / _key(texts, tokeniser, length)
    shape = (len(texts), length)
    found = _read(folder, shape)
    if found is None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = cache_dir / f".{uuid.uuid4().hex}"
        try:
            partial.mkdir()
            _write(partial, _chunks(texts, tokeniser, length), shape)
            _publish(partial, folder, shape)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        found = _read(folder, shape)
        if found is None:
            raise OSError(f"{folder}: what was written cannot be read back")
        log.info(
            "tokenised %d texts to %d tokens: %d were cut, %d are empty",
            *(*shape, found.truncated, found.empty),
        )
    return found


def word_vocabulary(texts: Sequence[str]) -> str:
    """A WordPiece vocabulary of these texts' lower-cased words, and of letters for all others."""
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())}
    letters = [mark + letter for mark in ("", "##") for letter in string.ascii_lowercase]
    return "\n".join([*SPECIAL, *sorted(words - set(letters)), *letters]) + "\n"


# -------------------------------------------------------------------------------- inside tokenisers


def _from_folder(path: pathlib.Path, lower_case: bool | None) -> Tokeniser:
    from transformers import AutoTokenizer

    settings = {} if lower_case is None else {"do_lower_case": lower_case}
    try:
        theirs = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, use_fast=True, trust_remote_code=False, **settings
        )
    except Exception as error:  # transformers has no error of its own; any means the same here
        reason = " ".join(str(error).split())[:200]
        hint = "; or name its vocab.txt itself" if (path / "vocab.txt").is_file() else ""
        raise UserError(
            f"config.data.text.tokeniser='{path}' holds no usable tokeniser: {reason}{hint}"
        ) from None
    if not getattr(theirs, "is_fast", False) or theirs.pad_token_id is None:
        raise UserError(
            f"config.data.text.tokeniser='{path}' is of the kind {type(theirs).__name__}; valid: "
            "one with a tokenizer.json or vocab.txt, and with a token for padding"
        )
    longest = int(theirs.model_max_length)  # a huge number where the folder does not say
    return Tokeniser(
        theirs.backend_tokenizer,
        str(path),
        theirs.pad_token_id,
        longest if longest < 2**30 else None,
    )


def _from_vocabulary(path: pathlib.Path, lower_case: bool) -> Tokeniser:
    from tokenizers import BertWordPieceTokenizer

    try:
        words = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        words = []
    vocabulary = {word: i for i, word in enumerate(words) if word}
    missing = [word for word in SPECIAL if word not in vocabulary]
    if missing:
        raise UserError(
            f"config.data.text.tokeniser='{path}' is no WordPiece vocabulary, which has one token "
            f"a line: it lacks {', '.join(missing)}"
        )
    backend = BertWordPieceTokenizer(vocabulary, lowercase=lower_case)._tokenizer
    return Tokeniser(backend, str(path), vocabulary["[PAD]"], None)


def _check_texts(texts: Sequence[str]) -> None:
    if not len(texts):
        raise UserError("there are no texts to tokenise; check the data set's column of texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"text {i} is of the type {type(text).__name__}; valid: str")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"text {i} is not valid Unicode") from None


def _check_length(tokeniser: Tokeniser, length: int) -> None:
    least = tokeniser.backend.num_special_tokens_to_add(False) + 1
    most = tokeniser.max_length
    if length < least or (most is not None and length > most):
        valid = f"{least} or more" if most is None else f"{least} to {most}"
        raise UserError(
            f"config.data.text.length={length} does not suit config.data.text.tokeniser="
            f"'{tokeniser.path}'; valid: {valid}"
        )


def _chunks(texts: Sequence[str], tokeniser: Tokeniser, length: int) -> Iterator[Tokens]:
    backend = tokeniser.backend
    backend.enable_truncation(length, direction="right")
    backend.enable_padding(
        direction="right",
        pad_id=tokeniser.pad_id,
        pad_token=backend.id_to_token(tokeniser.pad_id),
        length=length,
    )
    special = backend.num_special_tokens_to_add(False)
    for start in range(0, len(texts), CHUNK):
        batch = backend.encode_batch(list(texts[start : start + CHUNK]))
        mask = np.array([one.attention_mask for one in batch], bool)
        yield Tokens(
            np.array([one.ids for one in batch], np.int32),
            mask,
            sum(bool(one.overflowing) for one in batch),
            int(np.sum(mask.sum(1) <= special)),
        )


# ------------------------------------------------------------------------------------- inside files


def _key(texts: Sequence[str], tokeniser: Tokeniser, length: int) -> str:
    digest = hashlib.sha256(f"{tokeniser.fingerprint} {length}".encode())
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big"))  # so that no text runs into the next
        digest.update(data)
    return digest.hexdigest()[:32]


def _write(folder: pathlib.Path, chunks: Iterator[Tokens], shape: tuple[int, int]) -> None:
    counts = {"truncated": 0, "empty": 0}
    with contextlib.ExitStack() as stack:
        files = {n: stack.enter_context(open(folder / f"{n}.npy", "wb")) for n in _FILES}
        for name, dtype in _FILES.items():
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(files[name], header)
        for chunk in chunks:
            for name, file in files.items():
                # not through a memory map, where a full disk kills the process
                file.write(getattr(chunk, name).tobytes())
            for name in counts:
                counts[name] += getattr(chunk, name)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    (folder / "counts.json").write_text(json.dumps(counts), encoding="utf-8")


def _publish(partial: pathlib.Path, folder: pathlib.Path, shape: tuple[int, int]) -> None:
    if folder.exists() and _read(folder, shape) is None:  # damaged
        shutil.rmtree(folder)
    try:
        partial.rename(folder)
    except OSError:
        if _read(folder, shape) is None:  # not just another process that was first
            raise


def _read(folder: pathlib.Path, shape: tuple[int, int]) -> Tokens | None:
    """The files of a folder, or None if they are missing or damaged."""
    try:
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in _FILES
        }
        counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
        counts = {name: int(counts[name]) for name in ("truncated", "empty")}
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    fits = all(arrays[n].shape == shape and arrays[n].dtype == dtype for n, dtype in _FILES.items())
    return Tokens(**arrays, **counts) if fits else None
