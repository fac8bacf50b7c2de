"""Reports to the texts that a model may be shown: sections, sentences, and what was left out.

Nothing is invented: a report without the wanted section gives no text, and is counted.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from bigmed.errors import UserError

FULL, PREAMBLE, LAST = "full report", "preamble", "last paragraph"
MARK = "___"  # what was taken out to hide who the patient is

_CHOICES = {
    "sections": ("findings+impression", "impression", "either", "all"),
    "unit": ("sentence", "section", "report"),
    "headers": ("known", "mimic"),
}
# What a section may be called. Keys are the names that others go by.
_NAMES = {
    "findings": (
        "finding", "findings and impression", "observations", "observation", "report", "results",
        "pa and lateral", "pa and lateral chest", "frontal and lateral", "chest pa and lateral",
        "ap chest", "chest ap", "portable chest", "portable ap chest", "chest findings", "fidings",
        "findngs", "finidngs",
    ),
    "impression": (
        "impressions", "conclusion", "conclusions", "opinion", "assessment", "summary",
        "interpretation", "diagnosis", "impresson", "imprssion", "impresion", "impession",
        "conclusion/impression",
    ),
    "indication": (
        "indications", "reason for exam", "reason for examination", "reason for study",
        "clinical indication", "clinical information", "clinical question",
    ),
    "history": ("clinical history", "patient history", "medical history"),
    "comparison": ("comparisons", "comparison studies", "prior studies", "compare"),
    "technique": ("techniques", "procedure", "procedure comments", "method"),
    "examination": ("exam", "type of exam", "study", "exams"),
    "recommendation": ("recommendations", "recommendation(s)"),
    "notification": ("notifications", "notification(s)", "communication"),
}  # fmt: skip
_SYNONYMS = {other: name for name, others in _NAMES.items() for other in others}
_KNOWN = sorted((*_NAMES, *_SYNONYMS), key=len, reverse=True)

_MIMIC_HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
_ANY_NAME = "|".join(re.escape(name).replace(r"\ ", r"\s+") for name in _KNOWN)
_KNOWN_HEADER = re.compile(
    # at the start of a line in any case; in capitals anywhere; or with one, after a sentence
    rf"^[ \t]*(?i:({_ANY_NAME}))[ \t]*:"
    rf"|(?<![A-Za-z])({_ANY_NAME.upper().replace('S+', 's+')})\s*:"
    rf"|(?<=[.!?])[ \t]+(?=[A-Z])(?i:({_ANY_NAME}))[ \t]*:",
    re.MULTILINE,
)

_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_DEIDENTIFIED = re.compile(r"\[\*\*.*?\*\*\]|X{4,}|_{2,}", re.DOTALL)
_END = re.compile(r"[.!?]+[\"')\]]*(?=\s)")
_ITEM = re.compile(r"(?:^|(?<=\s))\(?(\d{1,2})[.)](?:\s+(?=\S)|(?=[A-Z]))")
_WORD = re.compile(r"\w+")
_SAYS_SOMETHING = re.compile(r"[^\W_]")  # a letter or digit, which a mark has not
_TOKEN = re.compile(r"\w+|[^\w\s]")
_BEFORE_TEXT = tuple(
    ["dr", "mr", "mrs", "ms", "prof", "st", "vs", "e.g", "i.e"]
    + ["cf", "approx", "ca", "resp", "incl", "excl"]
)
_MONTHS = ["jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec"]
_BEFORE_NUMBER = (
    ["no", "nr", "fig", "im", "image", "ser", "se", "seg", "pp", "p", "vol", "ca"] + _MONTHS
)
_DATE_BEGINS = re.compile(rf"\b(?i:{'|'.join(_MONTHS)})\.\s*$")  # a day follows, no list's number
_BEFORE_NAME = ("by", "with")
_INITIALS = re.compile(r"(?![AP]\.M$)(?:[A-Z]\.)*[A-Z]")


@dataclasses.dataclass(frozen=True)
class TextPolicy:
    """What of a report is used (`config.data.text`).

    Attributes:
      sections: 'findings+impression' (ConVIRT, arXiv 2010.00747, section 4.1); 'impression';
        'either', the first that there is of impression, findings, last paragraph and, of a report
        without headers, all of it; 'all', the whole report without its headers.
      unit: that is drawn: a 'sentence', a 'section' or the whole 'report'.
      min_tokens: units of fewer words and punctuation marks, not counting '___', are dropped.
      headers: how sections are found: 'known', a usual name and a colon at the start of a line, in
        capitals anywhere, or with a first capital after a sentence; or 'mimic', as MIMIC-CXR's own
        section parser finds them, see `sections`.

    Raises:
      UserError: an unknown value.
    """

    sections: str = "findings+impression"
    unit: str = "sentence"
    min_tokens: int = 3
    headers: str = "known"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                valid = ", ".join(choices)
                raise UserError(f"config.data.text.{name}='{getattr(self, name)}': valid: {valid}")
        if self.min_tokens < 1:
            raise UserError(f"config.data.text.min_tokens={self.min_tokens}: valid: 1 and more")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The units of many reports, each distinct text once.

    Attributes:
      units: the texts, in order of their first appearance.
      ids: int32 [U], `text_id` of each.
      starts: int64 [N + 1] and
      members: int32; report i has the units members[starts[i] : starts[i + 1]], each once.
      counts: what was left out, by reason.
    """

    units: tuple[str, ...]
    ids: np.ndarray
    starts: np.ndarray
    members: np.ndarray
    counts: dict[str, int]


def corpus(reports: Sequence[str], policy: TextPolicy) -> Corpus:
    """Cuts reports into units; see `Corpus`."""
    number: dict[str, int] = {}
    starts, members = [0], []
    counts: collections.Counter = collections.Counter()
    for report in reports:
        if not report.strip():
            counts["without text"] += 1
        found = list(_wanted(report, policy))
        if report.strip() and not found:
            counts["without the wanted section"] += 1
        whole = [unit for text in found for unit in _units(text, policy)]
        if policy.unit == "report" and whole:
            whole = [" ".join(whole)]
        kept = [unit for unit in dict.fromkeys(whole) if _long_enough(unit, policy)]
        counts["units too short"] += sum(not _long_enough(unit, policy) for unit in whole)
        if found and not kept:
            counts["with nothing long enough"] += 1
        members += [number.setdefault(unit, len(number)) for unit in kept]
        starts.append(len(members))
    return Corpus(
        units=tuple(number),
        ids=np.array([text_id(unit) for unit in number], np.int32),
        starts=np.array(starts, np.int64),
        members=np.array(members, np.int32),
        counts=dict(counts),
    )


def text_id(text: str) -> int:
    """A hash of the text in any case, spacing and punctuation, in the range of int32.

    For telling equal texts in a batch: two different ones of a batch of 32,768 collide with a
    probability of about 0.1.
    """
    words = " ".join(_WORD.findall(text.lower()))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big", signed=True)


# -------------------------------------------------------------------------------------- sections


def sections(report: str, headers: str = "known") -> dict[str, str]:
    """The sections of a report by name; of a repeated name the last.

    With headers='mimic' the rules are those of MIMIC-CXR's section parser: a header is a line
    break, one space, capitals (or space, brackets, slash, comma, hyphen), a colon and white space,
    and the next one is looked for from the following line break on. So a header within a line, or
    one with digits in it, stays a part of the section before. Text before the first header is the
    'preamble'; a report without any is a 'full report'. Empty findings and impressions are dropped,
    and where neither is left, what follows the first empty line of the last section is the 'last
    paragraph'.
    """
    found = list(_mimic(report) if headers == "mimic" else _known(report))
    named: dict[str, str] = {}
    for name, text in found:
        if text or name not in ("findings", "impression"):
            named.pop(name, None)  # a repeated one stands where its last is
            named[name] = text
    if named and not {"findings", "impression"} & named.keys():
        first, gap, rest = _cut(list(named.values())[-1])
        if gap and rest:
            named[list(named)[-1]], named[LAST] = first, rest
    return named


def _mimic(report: str) -> Iterator[tuple[str, str]]:
    header = _MIMIC_HEADER.search(report)
    if header is None:
        yield FULL, report.strip()
        return
    if report[: header.start()].strip():
        yield PREAMBLE, report[: header.start()].strip()
    while header is not None:
        line_end = report.find("\n", header.end())
        following = _MIMIC_HEADER.search(report, line_end) if line_end >= 0 else None
        end = following.start() if following else len(report)
        yield _name(header[1]), report[header.end() : end].strip()
        header = following


def _known(report: str) -> Iterator[tuple[str, str]]:
    found = list(_KNOWN_HEADER.finditer(report))
    before = report[: found[0].start()] if found else report
    if before.strip():
        yield (PREAMBLE if found else FULL), before.strip()
    for header, following in itertools.zip_longest(found, found[1:]):
        end = following.start() if following else len(report)
        yield _name(header[header.lastindex]), report[header.end() : end].strip()


def _name(header: str) -> str:
    name = " ".join(header.lower().split())
    return _SYNONYMS.get(name, name)


def _cut(text: str) -> tuple[str, str, str]:
    """A text before its first empty line, that gap, and what follows."""
    gap = _PARAGRAPH.search(text)
    if gap is None:
        return text, "", ""
    return text[: gap.start()].strip(), gap[0], text[gap.end() :].strip()


def _wanted(report: str, policy: TextPolicy) -> Iterator[str]:
    """The texts of the sections that the policy wants, none of them empty."""
    named = sections(report, policy.headers)
    wanted = {
        "findings+impression": ("findings", "impression"),
        "impression": ("impression",),
        "either": tuple(named) if named.get(FULL) else ("impression", "findings", LAST),
        "all": tuple(named),
    }[policy.sections]
    texts = [named[name] for name in wanted if named.get(name)]
    if policy.sections == "either":
        texts = ["\n\n".join(texts)] if named.get(FULL) else texts[:1]
    yield from texts


# ------------------------------------------------------------------------------------- sentences


def _units(text: str, policy: TextPolicy) -> list[str]:
    return sentences(text) if policy.unit == "sentence" else [" ".join(sentences(text))]


def _long_enough(unit: str, policy: TextPolicy) -> bool:
    return len(_TOKEN.findall(unit.replace(MARK, ""))) >= policy.min_tokens


def unwrap(text: str) -> list[str]:
    """The paragraphs of a text, each in one line; what was taken out of it becomes '___'."""
    marked = _DEIDENTIFIED.sub(MARK, text)
    paragraphs = (" ".join(part.split()) for part in _PARAGRAPH.split(marked))
    return [part for part in paragraphs if part]


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the numbers of its lists.

    A full stop ends one unless it belongs to a number, an abbreviation, initials or the number of a
    list item; or a small letter follows, in a text that has capitals at all.
    """
    found, last = [], 0
    for paragraph in unwrap(text):
        items, last = _items(paragraph, last)
        found += [s for item in items for s in _split(item) if _SAYS_SOMETHING.search(s)]
    return found


def _items(paragraph: str, last: int) -> tuple[list[str], int]:
    """A paragraph cut before each number of a list, '1. ... 2) ...', and those taken out.

    A list is numbers from 1 on, two of them at least; one alone must begin a sentence. A paragraph
    that begins with the number after `last`, that of the item before it, goes on with its list.

    Returns:
      The parts, and the number of the last item up to here.
    """
    numbers: list[re.Match] = []
    first = _ITEM.match(paragraph)
    before_these = last if first and int(first[1]) == last + 1 else 0
    for number in _ITEM.finditer(paragraph):
        expected = int(number[1]) == before_these + len(numbers) + 1
        if expected and not _DATE_BEGINS.search(paragraph[: number.start()]):
            numbers.append(number)
    before = paragraph[: numbers[0].start()].rstrip() if numbers else ""
    if len(numbers) == 1 and before and before[-1] not in ".!?:;":
        numbers = []
    edges = [0, *(edge for number in numbers for edge in number.span()), len(paragraph)]
    parts = (paragraph[edges[i] : edges[i + 1]].strip() for i in range(0, len(edges), 2))
    return [part for part in parts if part], before_these + len(numbers) if numbers else last


def _split(text: str) -> Iterator[str]:
    start, has_capitals = 0, any(c.isupper() for c in text)
    for end in _END.finditer(text):
        rest = text[end.end() :].lstrip()
        if _goes_on(text[start : end.start()], end[0], rest, has_capitals):
            continue
        yield text[start : end.end()].strip()
        start = end.end()
    if text[start:].strip():
        yield text[start:].strip()


def _goes_on(before: str, mark: str, rest: str, has_capitals: bool) -> bool:
    """Whether a sentence goes on after what looks like its end."""
    if not rest or mark[0] in "!?":
        return False
    if has_capitals and rest[0].islower():
        return True
    word = before.split()[-1].lstrip("([\"'") if before.split() else ""
    if word.lower() in _BEFORE_TEXT or (word.lower() in _BEFORE_NUMBER and rest[0].isdigit()):
        return True
    earlier = before.split()[-2] if len(before.split()) > 1 else ""
    title = earlier.rstrip(".").lower() in _BEFORE_TEXT or (len(earlier) == 2 and earlier[1] == ".")
    name_begins = title or not earlier or earlier.lower() in _BEFORE_NAME
    name_goes_on = rest[0].isupper() or rest.startswith(MARK)
    return bool(_INITIALS.fullmatch(word)) and name_begins and name_goes_on
