"""Texts in batches: which are drawn, as a function of (seed, step), and how they are joined."""

import multiprocessing
import os

import numpy as np
import pytest
import transformers
from tokenizers import processors

from bigmed.data import phantom, pipeline, sources, texts, tokenise
from bigmed.errors import UserError

SIZE = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A phantom of 60 patients; reports: 'Synthetic phantom.' and a sentence for each finding."""
    folder = tmp_path_factory.mktemp("data") / "phantom"
    os.environ["BIGMED_CACHE"] = str(folder.parent / "cache")
    phantom.prepare(folder, num_patients=60, size=SIZE)
    yield folder
    del os.environ["BIGMED_CACHE"]


def settings(data, **overrides):
    return {
        "tokeniser": str(data / "vocab.txt"), "length": 16, "sections": "all", "unit": "sentence",
        "min_tokens": 3, "sentences": 1, "texts": 1, "headers": "known", **overrides,
    }  # fmt: skip


def make(data, text=None, workers=0, seed=0, pairs=None, batch_size=8, **blocks):
    config = {
        "sources": ("phantom",),
        "source": {"phantom": {"dir": str(data), "split": "train"}},
        "canvas": SIZE, "channels": 1, "pairs": pairs, "workers": workers, "prefetch": 2,
        "text": settings(data, **(text or {})),
    }  # fmt: skip
    return pipeline.Pipeline(config, seed=seed, batch_size=batch_size, **blocks)


def read_back(made, batch, row, number=0):
    tokens = batch["tokens"][row, number][batch["token_mask"][row, number]]
    return made.tokeniser.backend.decode(tokens.tolist())


def test_a_text_is_of_the_image_beside_it(data):
    made = make(data)
    by_image = {}
    source = made.sources[0]
    for record, report in enumerate(source.read_field("text", range(len(source)))):
        by_image.setdefault(int(source.patients[record]), report.lower())
    found = set()
    for step in range(6):
        batch = made.host_batch(step)
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: (v.shape, v.dtype) for k, v in made.batch_spec().items()
        }
        for row in range(8):
            sentence = read_back(made, batch, row)
            report = by_image[int(batch["patient"][row])]
            assert sentence in report, (sentence, report)
            found.add(sentence)
    assert "several lung nodules." in found and len(found) > 5


def test_one_case_is_met_once_and_another_sentence_drawn_at_each_visit(data):
    made = make(data)
    patients = np.concatenate([made.host_batch(s)["patient"] for s in range(4)])
    assert len(set(patients.tolist())) == len(patients)  # a case a row, no case twice an epoch
    drawn = {}
    for step in range(40):
        batch = made.host_batch(step)
        for row in range(8):
            mine = drawn.setdefault(int(batch["patient"][row]), [])
            mine.append(read_back(made, batch, row))
    several = [d for d in drawn.values() if len(set(d)) > 1]
    assert len(several) > 10
    share = [max(map(d.count, set(d))) / len(d) for d in several]
    assert np.mean(share) < 0.75  # 'no finding' alone would give 1


def test_a_draw_is_a_function_of_seed_and_step_whatever_the_workers_and_hosts(data):
    made = make(data, text={"texts": 2})
    want = [made.host_batch(step) for step in range(3)]
    other = make(data, text={"texts": 2}, workers=1).iterate(1)
    for batch in want[1:]:
        got = next(other)
        for name in batch:
            np.testing.assert_array_equal(got[name], batch[name], err_msg=name)
    other.close()
    blocks = [make(data, text={"texts": 2}, block=b, num_blocks=2).host_batch(2) for b in (0, 1)]
    for name in want[2]:
        joined = np.concatenate([b[name] for b in blocks])
        np.testing.assert_array_equal(joined, want[2][name], err_msg=name)
    reseeded = make(data, text={"texts": 2}, seed=1).host_batch(2)
    assert not np.array_equal(reseeded["tokens"], want[2]["tokens"])


def test_two_texts_of_a_row_are_distinct_where_the_report_has_two(data):
    made = make(data, text={"texts": 2})
    counts = np.diff(made._texts[0].starts)
    assert counts.max() > 1
    for step in range(4):
        batch = made.host_batch(step)
        for row in range(8):
            first, second = batch["text_id"][row]
            patient = batch["patient"][row]
            record = np.flatnonzero(made.sources[0].patients == patient)[0]
            assert (first != second) == (counts[record] > 1)


def test_sentences_are_joined_in_the_reports_order(data):
    whole = make(data, text={"sentences": 0, "length": 64})
    report = make(data, text={"unit": "report", "length": 64, "min_tokens": 1})
    a, b = whole.host_batch(0), report.host_batch(0)
    for row in range(8):
        one, other = read_back(whole, a, row), read_back(report, b, row)
        assert other.endswith(one) and len(one) > 0  # without 'synthetic phantom .', too short
    short = make(data, text={"sentences": 0, "length": 6}).host_batch(0)
    assert short["token_mask"].sum(axis=2).max() == 6  # cut, with its last token in place
    separator = whole.tokeniser.backend.token_to_id("[SEP]")
    last = np.take_along_axis(short["tokens"], short["token_mask"].sum(2, keepdims=True) - 1, 2)
    assert (last == separator).all()


@pytest.mark.parametrize(("sentences", "length"), [(0, 12), (0, 64), (2, 12), (1, 12)])
def test_records_whose_joined_units_are_cut_are_counted_and_announced(data, sentences, length):
    own = make(data, text={"sentences": sentences, "length": length})._texts[0]
    inner = make(data, text={"length": 64})._texts[0].mask.sum(axis=1) - 2
    want = 0
    for start, end in zip(own.starts[:-1], own.starts[1:], strict=True):
        units = sorted(inner[own.members[start:end]].tolist())[-sentences:]
        want += sentences != 1 and 2 + sum(units) > length
    what = "records whose joined units can exceed the length"
    assert own.counts[what] == want and (want > 0) == (length == 12 and sentences != 1)
    assert (f"{want} {what}" in own.describe()) == (want > 0)


@pytest.mark.parametrize(
    "template", ["[CLS] $A [SEP]", "[CLS] [CLS] $A [SEP]", "$A [SEP]", "[CLS] [SEP] $A"]
)
def test_units_are_joined_only_between_two_special_tokens(data, tmp_path, template):
    backend = tokenise.load(data / "vocab.txt").backend
    special = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    backend.enable_padding(length=32)  # some files say so
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    wrapped.save_pretrained(tmp_path)
    own = {"tokeniser": str(tmp_path), "length": 32}
    assert make(data, text=own).host_batch(0)["token_mask"].any()
    if template == "[CLS] $A [SEP]":
        make(data, text={**own, "sentences": 2})
        return
    with pytest.raises(UserError, match=f"tokeniser='{tmp_path}' does not put one .*sentences=1"):
        make(data, text={**own, "sentences": 2})


def _draw_elsewhere(own, queue):
    queue.put(own.draw(np.array([0, 1]), 7, np.array([3, 4])))


def test_texts_travel_to_a_worker_as_file_names(data):
    own = make(data)._texts[0]
    state = own.__getstate__()
    assert isinstance(state["tokens"], str)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_draw_elsewhere, args=(own, queue))
    process.start()
    got, want = queue.get(timeout=60), own.draw(np.array([0, 1]), 7, np.array([3, 4]))
    process.join()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_evaluation_gives_every_record_its_text_always_the_same(data):
    source = sources.open_source({"dir": str(data), "split": "val"})
    (own,), _ = texts.prepare([source], settings(data))

    def run():
        made = pipeline.evaluation_batches(
            source, canvas=SIZE, channels=1, batch_size=8, text=own
        )
        return list(made)

    first, second = run(), run()
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
        assert (one["token_mask"].any(axis=(1, 2)) == one["mask"]).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokeniser": "/no/such"}, "config.data.text.tokeniser='/no/such' does not exist"),
        ({"sentences": -1}, "config.data.text.sentences=-1"),
        ({"texts": 0}, "config.data.text.texts=0"),
        ({"sections": "impression"}, "has no text that config.data.text would keep"),
        ({"length": 2}, "does not suit"),
    ],
)
def test_mistakes_are_named(data, change, said):
    with pytest.raises(UserError, match=said):
        make(data, text=change)


def test_the_vocabulary_of_the_phantom_knows_all_its_words(data):
    tokeniser = tokenise.load(data / "vocab.txt")
    unknown = tokeniser.backend.token_to_id("[UNK]")
    source = sources.open_source({"dir": str(data), "split": "test"})
    made = tokenise.encode(source.read_field("text", range(len(source))), tokeniser, 64)
    assert not (made.tokens == unknown).any()
