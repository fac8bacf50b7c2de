"""The texts of a batch: which of a record's units, drawn anew at every visit, as tokens.

Reports are cut into units (`bigmed.data.text`), which are tokenised once (`bigmed.data.tokenise`)
when a pipeline is built; a batch is then made of memory-mapped rows.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmed.data import text, tokenise
from bigmed.data.indexing import cache_folder
from bigmed.data.pairs import hash64
from bigmed.data.sources import Source
from bigmed.errors import UserError, did_you_mean

_POLICY = tuple(field.name for field in dataclasses.fields(text.TextPolicy))


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """`config.data.text`, beside what a `TextPolicy` says.

    Attributes:
      tokeniser: a folder as transformers saves it, or a WordPiece vocabulary; '' for no texts.
      lower_case: see `tokenise.load`.
      length: of the rows of tokens; longer texts are cut.
      sentences: how many units of a report are joined to a text, in the report's order; 0: all.
      texts: how many texts a row of the batch holds, of distinct units where the report has them.
    """

    tokeniser: str = ""
    lower_case: bool | None = None
    length: int = 128
    sentences: int = 1
    texts: int = 1

    def __post_init__(self) -> None:
        for name, least in (("sentences", 0), ("texts", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"config.data.text.{name}={getattr(self, name)}: valid: {least} and more"
                )


_OWN = tuple(field.name for field in dataclasses.fields(TextSettings))


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of one source.

    Attributes:
      settings: how a text is drawn.
      starts: int64 [N + 1] and
      members: int32; record i has the units members[starts[i] : starts[i + 1]].
      ids: int32 [U], a hash of each unit's text.
      tokens: int32 [U, length] and
      mask: bool [U, length], memory maps; see `tokenise.Tokens`.
      pad_id: the token of padding.
      counts: what was dropped and why, and how many units were cut to the length, and how many
        records have units that, joined, may be.
    """

    settings: TextSettings
    starts: np.ndarray
    members: np.ndarray
    ids: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    pad_id: int
    counts: Mapping[str, int]

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens the files itself."""
        maps = {name: os.fspath(getattr(self, name).filename) for name in ("tokens", "mask")}
        return {**self.__dict__, **maps}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            if isinstance(value, str):
                value = np.load(value, mmap_mode="r", allow_pickle=False)
            object.__setattr__(self, name, value)

    @property
    def has_text(self) -> np.ndarray:
        """bool [N], whether each record has a unit."""
        return np.diff(self.starts) > 0

    def describe(self) -> str:
        """How much text there is and what was left out, in one line."""
        kept = f"texts: {int(self.has_text.sum())} records with {len(self.ids)} distinct units"
        left_out = ", ".join(f"{count} {what}" for what, count in self.counts.items() if count)
        return f"{kept} ({left_out})" if left_out else kept

    def draw(self, records: np.ndarray, key: int, visits: np.ndarray) -> dict[str, np.ndarray]:
        """The texts of some records: a pure function of (record, key, visit).

        Args:
          records: int64 [B], with text.
          key: of the draws.
          visits: int64 [B], a number for each visit of a record.

        Returns:
          tokens int32 [B, R, T], token_mask bool [B, R, T] and text_id int32 [B, R].
        """
        shape = (len(records), self.settings.texts)
        drawn = {
            "tokens": np.zeros((*shape, self.settings.length), np.int32),
            "token_mask": np.zeros((*shape, self.settings.length), bool),
            "text_id": np.zeros(shape, np.int32),
        }
        for row, (record, visit) in enumerate(zip(records.tolist(), visits.tolist(), strict=True)):
            units = self.members[self.starts[record] : self.starts[record + 1]]
            order = np.argsort(hash64(key, visit, np.arange(len(units))), kind="stable")
            count = self.settings.sentences or len(units)
            for number in range(self.settings.texts):
                # in turn through the shuffled units: distinct ones as long as there are
                places = (number * count + np.arange(min(count, len(units)))) % len(units)
                chosen = units[np.sort(order[places])]
                tokens, mask, one_id = self._joined(chosen)
                drawn["tokens"][row, number], drawn["token_mask"][row, number] = tokens, mask
                drawn["text_id"][row, number] = one_id
        return drawn

    def fixed(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """As `draw`, always the same texts."""
        return self.draw(records, 0, records)

    def _joined(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Units as one text, [CLS] a b c [SEP] padding, and its hash."""
        tokens, mask = self.tokens[units[0]], self.mask[units[0]]
        if len(units) == 1:
            return tokens, mask, int(self.ids[units[0]])
        lengths = self.mask[units].sum(axis=1)
        first, last = tokens[0], tokens[lengths[0] - 1]
        inner = [self.tokens[u, 1 : n - 1] for u, n in zip(units, lengths, strict=True)]
        body = np.concatenate(inner)[: self.settings.length - 2]
        tokens = np.full_like(tokens, self.pad_id)
        tokens[: len(body) + 2] = [first, *body, last]
        mask = np.arange(len(tokens)) < len(body) + 2
        return tokens, mask, int(hash64(*self.ids[units].tolist()) >> np.uint64(33))


def prepare(
    sources: Sequence[Source], config: Mapping[str, Any]
) -> tuple[list[Texts], tokenise.Tokeniser]:
    """Cuts and tokenises the texts of the sources, or finds them in the cache.

    Args:
      sources: opened; each needs the field `text`.
      config: `config.data.text`.

    Raises:
      UserError: a key or value that cannot work; a source without texts, or none that is kept.
    """
    config = {key: value for key, value in config.items() if value is not None}
    for key in config:
        if key not in (*_OWN, *_POLICY):
            raise UserError(f"config.data.text.{key}: {did_you_mean(key, (*_OWN, *_POLICY))}")
    settings = TextSettings(**{key: config[key] for key in _OWN if key in config})
    policy = text.TextPolicy(**{key: config[key] for key in _POLICY if key in config})
    tokeniser = tokenise.load(settings.tokeniser, lower_case=settings.lower_case)
    if settings.sentences != 1:
        _check_joins(tokeniser)
    return [_of_source(source, settings, policy, tokeniser) for source in sources], tokeniser


def _check_joins(tokeniser: tokenise.Tokeniser) -> None:
    """Raises `UserError` unless a text stands between one special token and another."""
    found = tokeniser.backend.encode("a")
    pairs = zip(found.special_tokens_mask, found.attention_mask, strict=True)
    special = [mark for mark, kept in pairs if kept]  # without padding
    if special != [1] + [0] * (len(special) - 2) + [1]:
        raise UserError(
            f"config.data.text.tokeniser='{tokeniser.path}' does not put one special token before "
            "a text and one behind it, as [CLS] and [SEP], between which units are joined; valid: "
            "such a tokeniser, or config.data.text.sentences=1"
        )


def _of_source(
    source: Source, settings: TextSettings, policy: Any, tokeniser: tokenise.Tokeniser
) -> Texts:
    reports = source.read_field("text", range(len(source)))
    corpus = text.corpus(reports, policy)
    if not corpus.units:
        dropped = ", ".join(f"{count} {reason}" for reason, count in corpus.counts.items() if count)
        raise UserError(
            f"data set '{source.name}' has no text that config.data.text would keep ({dropped}); "
            "valid: other sections, headers or a smaller min_tokens"
        )
    cache = cache_folder() / "tokens"
    tokens = tokenise.tokenise_once(corpus.units, tokeniser, settings.length, cache)
    too_long = _longest_joined(corpus, tokens.mask, settings) > settings.length
    return Texts(
        settings=settings,
        starts=corpus.starts,
        members=corpus.members,
        ids=corpus.ids,
        tokens=tokens.tokens,
        mask=tokens.mask,
        pad_id=tokeniser.pad_id,
        counts={
            **corpus.counts,
            "units cut to the length": tokens.truncated,
            "records whose joined units can exceed the length": int(too_long.sum()),
        },
    )


def _longest_joined(corpus: text.Corpus, mask: np.ndarray, settings: TextSettings) -> np.ndarray:
    """int64 [N], tokens of each record's longest text of several units, uncut; 0 without any."""
    counts = np.diff(corpus.starts)
    if settings.sentences == 1:
        return np.zeros(len(counts), np.int64)
    record = np.repeat(np.arange(len(counts)), counts)
    inner = mask.sum(axis=1)[corpus.members] - 2
    longest_first = np.lexsort((-inner, record))
    rank = np.arange(len(record)) - corpus.starts[record]
    joined = inner[longest_first] * (rank < (settings.sentences or len(record)))
    return np.bincount(record, joined, minlength=len(counts)).astype(np.int64) + 2 * (counts > 0)
