"""Reports: sections with the odd cases of MIMIC-CXR, sentences, policies, what is left out."""

import re
import tarfile
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from bigmed.data import text
from bigmed.errors import UserError

MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough  // ?pneumonia

 COMPARISON:  Chest radiograph ___ at 3:15 P.M.: no change

 FINDINGS:

 The lungs are clear. The heart measures
 1.5 cm more than before.

 IMPRESSION:

 No acute process.
"""


def test_the_sections_of_a_usual_report():
    found = text.sections(MIMIC, "mimic")
    assert list(found) == [
        "preamble", "examination", "indication", "comparison", "findings", "impression"
    ]  # fmt: skip
    assert found["preamble"] == "FINAL REPORT"
    assert found["findings"].startswith("The lungs are clear.")
    assert found["impression"] == "No acute process."


@pytest.mark.parametrize(
    ("report", "want"),
    [
        ("No header at all.\n Second line.", {"full report": "No header at all.\n Second line."}),
        ("", {"full report": ""}),
        # a header within a line is no header
        ("\n FINDINGS: Clear. IMPRESSION: None.\n", {"findings": "Clear. IMPRESSION: None."}),
        # nor is one with digits, or without the space at its start
        (
            "\n FINDINGS: Clear.\n 3:15 P.M.: called.\nIMPRESSION: None.",
            {"findings": "Clear.\n 3:15 P.M.: called.\nIMPRESSION: None."},
        ),
        # the next header is looked for from the next line break on
        ("\n FINDINGS:\n IMPRESSION: One.\n", {"findings": "IMPRESSION: One."}),
        ("\n IMPRESSION: One.\n IMPRESSION: Two.\n", {"impression": "Two."}),
        # the last section is that of the last header, though its name came before
        (
            "\n HISTORY: Old.\n TECHNIQUE: AP.\n\n Not this.\n HISTORY: Cough.\n\n Clear.\n",
            {"technique": "AP.\n\n Not this.", "history": "Cough.", "last paragraph": "Clear."},
        ),
        (
            "\n CONCLUSION: One.\n PA AND LATERAL: Clear.\n",
            {"impression": "One.", "findings": "Clear."},
        ),
        # an empty findings is dropped, and the end of the last section stands in
        (
            "\n FINDINGS: \n\n COMPARISON: None.\n \n The lungs are clear.\n",
            {"comparison": "None.", "last paragraph": "The lungs are clear."},
        ),
    ],
)  # fmt: skip
def test_odd_reports_as_mimics_parser_has_them(report, want):
    assert text.sections(report, "mimic") == want


@pytest.mark.parametrize(
    ("report", "want"),
    [
        ("FINDINGS: Clear. IMPRESSION: None.", {"findings": "Clear.", "impression": "None."}),
        ("Findings: Clear.\nConclusion: None.", {"findings": "Clear.", "impression": "None."}),
        ("The findings: none of note.", {"full report": "The findings: none of note."}),
        ("FINDINGS:\n IMPRESSION: One.", {"impression": "One."}),
        (
            "findings: Effusion seen.  Impression: Pneumonia. See impression: it is old.",
            {"findings": "Effusion seen.", "impression": "Pneumonia. See impression: it is old."},
        ),
        ("Findings: Seen. Of note: old.", {"findings": "Seen. Of note: old."}),
    ],
)
def test_known_headers_are_found_in_reports_of_other_origin(report, want):
    assert text.sections(report) == want


SENTENCES = [
    ("Heart size is normal. No effusion.", ["Heart size is normal.", "No effusion."]),
    ("A 2.5 cm nodule. Another of .5 mm is new.", ["A 2.5 cm nodule.", "Another of .5 mm is new."]),
    ("Told to Dr. Smith. He agreed.", ["Told to Dr. Smith.", "He agreed."]),
    ("Told to Dr. J. Smith at noon.", ["Told to Dr. J. Smith at noon."]),
    ("Seen by M.D. Smith today. Old.", ["Seen by M.D. Smith today.", "Old."]),
    ("M.D. Smith was told. Old.", ["M.D. Smith was told.", "Old."]),
    ("Film by K. ___, M.D. It is old.", ["Film by K. ___, M.D.", "It is old."]),
    ("Read with K. Smith, M.D. Clear.", ["Read with K. Smith, M.D.", "Clear."]),
    ("Seen at 3 P.M. Clear. By A.M. Old.", ["Seen at 3 P.M.", "Clear.", "By A.M.", "Old."]),
    ("As on Jan. 5. Clear since Sept. 12.", ["As on Jan. 5.", "Clear since Sept. 12."]),
    ("As on Jan. 1. Clear now.", ["As on Jan. 1.", "Clear now."]),
    ("Edema, e.g. at the bases. Clear.", ["Edema, e.g. at the bases.", "Clear."]),
    ("Stable vs. Prior study.", ["Stable vs. Prior study."]),
    ("Approx. 3 cm above the carina.", ["Approx. 3 cm above the carina."]),
    ("At 3 p.m. the tube was moved. Fine.", ["At 3 p.m. the tube was moved.", "Fine."]),
    ("Image No. 3 shows it. No. 2 does not.", ["Image No. 3 shows it.", "No. 2 does not."]),
    ("Is it new? Yes! Follow up.", ["Is it new?", "Yes!", "Follow up."]),
    ("1. Clear lungs. 2. Large heart.", ["Clear lungs.", "Large heart."]),
    ("1) Clear lungs 2) Large heart", ["Clear lungs", "Large heart"]),
    ("Impression 1. Clear lungs 2. 7 mm nodule.", ["Impression", "Clear lungs", "7 mm nodule."]),
    ("1.Clear lungs. 2.Large heart.", ["Clear lungs.", "Large heart."]),
    ("1. Clear.\n\n2. Large heart.\n\n3. Old.", ["Clear.", "Large heart.", "Old."]),
    ("1. Clear 2. Old\n\nSee above.\n\n3. New", ["Clear", "Old", "See above.", "New"]),
    ("1. Clear.\n\n1. Old. 2. New.\n\n3. Last.", ["Clear.", "Old.", "New.", "Last."]),
    ("1. Clear.\n\nThere are 2. All old.", ["Clear.", "There are 2.", "All old."]),
    ("There are 3. They are small.", ["There are 3.", "They are small."]),
    ("Fracture of T12. Wedging of L1.", ["Fracture of T12.", "Wedging of L1."]),
    ("no effusion. heart is normal.", ["no effusion.", "heart is normal."]),
    ("Clear... Stable.", ["Clear...", "Stable."]),
    ("Seen by [**Last Name**] today. Well.", ["Seen by ___ today.", "Well."]),
    ("XXXX-year-old man. Well.", ["___-year-old man.", "Well."]),
    ("The lungs\n are clear.\n\nThe heart is big.", ["The lungs are clear.", "The heart is big."]),
    ("No stop at the end\n \nNor here", ["No stop at the end", "Nor here"]),
    ('He said "clear." It is.', ['He said "clear."', "It is."]),
    ("Small; unchanged; benign.", ["Small; unchanged; benign."]),
    ("___ ___ ___. Seen by ___.", ["Seen by ___."]),
    (" . ", []),
    ("", []),
]


@pytest.mark.parametrize(("given", "want"), SENTENCES, ids=range(len(SENTENCES)))
def test_sentences(given, want):
    assert text.sentences(given) == want


def policy(**overrides):
    return text.TextPolicy(**{"headers": "mimic", **overrides})


def test_what_of_a_report_is_drawn():
    def units(**overrides):
        return text.corpus([MIMIC], policy(**overrides)).units

    first, second = "The lungs are clear.", "The heart measures 1.5 cm more than before."
    assert units() == (first, second, "No acute process.")
    assert units(sections="impression") == ("No acute process.",)
    assert units(unit="section") == (f"{first} {second}", "No acute process.")
    assert units(unit="report") == (f"{first} {second} No acute process.",)
    assert units(min_tokens=6) == (second,)


def test_nothing_is_invented_and_what_is_dropped_is_counted():
    reports = ["", "\n COMPARISON: None.\n", MIMIC, "\n FINDINGS: Clear.\n", MIMIC]
    made = text.corpus(reports, policy())
    np.testing.assert_array_equal(made.starts, [0, 0, 0, 3, 3, 6])
    np.testing.assert_array_equal(made.members, [0, 1, 2, 0, 1, 2])
    assert made.counts == {
        "without text": 1, "without the wanted section": 1, "with nothing long enough": 1,
        "units too short": 1,
    }  # fmt: skip
    either = text.corpus(["A note without any header."], policy(sections="either"))
    assert either.units == ("A note without any header.",)


def test_either_is_all_of_a_report_without_headers_and_one_section_of_another():
    def units(report, **overrides):
        return text.corpus([report], policy(sections="either", **overrides)).units

    note = "The lungs are clear.\n\nThe heart is large.\n \nNo pneumothorax is seen."
    assert units(note) == (
        "The lungs are clear.", "The heart is large.", "No pneumothorax is seen.",
    )  # fmt: skip
    whole = "The lungs are clear. The heart is large. No pneumothorax is seen."
    assert units(note, unit="section") == (whole,)
    assert units(MIMIC) == ("No acute process.",)
    assert units("\n COMPARISON: None is there.\n\n" + whole, unit="section") == (whole,)


@pytest.mark.parametrize("unit", ["sentence", "section", "report"])
def test_what_was_taken_out_to_hide_a_patient_is_no_text(unit):
    made = text.corpus(
        ["\n FINDINGS: ___ ___ ___ ___.\n", "\n FINDINGS: ___ ___ seen.\n"], policy(unit=unit)
    )
    assert made.units == () and made.counts["with nothing long enough"] == 2
    made = text.corpus(["\n FINDINGS: ___ has pneumonia.\n"], policy(unit=unit))
    assert made.units == ("___ has pneumonia.",)


def test_equal_texts_have_equal_ids_whatever_their_case_and_spacing():
    assert text.text_id("No effusion.") == text.text_id("  no EFFUSION") == -2064644081
    assert text.text_id("No effusion.") != text.text_id("No effusions.")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sections": "finding"}, "config.data.text.sections='finding': valid: findings"),
        ({"unit": "word"}, "valid: sentence, section, report"),
        ({"headers": "none"}, "valid: known, mimic"),
        ({"min_tokens": 0}, "config.data.text.min_tokens=0"),
    ],
)
def test_mistakes_are_named(change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        text.TextPolicy(**change)


def test_real_reports(shared_data):
    reports = []
    with tarfile.open(shared_data / "openi_reports" / "NLMCXR_reports.tgz") as archive:
        for member in archive:
            if member.name.endswith(".xml"):
                root = ElementTree.fromstring(archive.extractfile(member).read())
                parts = ((a.get("Label"), a.text or "") for a in root.iter("AbstractText"))
                reports.append("\n".join(f"{label}: {part}" for label, part in parts))
    made = text.corpus(reports, text.TextPolicy())
    assert len(reports) == 3955 and made.counts["without the wanted section"] == 28
    assert np.mean(np.diff(made.starts) > 0) > 0.99
    assert 4 < np.diff(made.starts).mean() < 6
    for unit in made.units:
        assert not re.search(r"\b(FINDINGS|IMPRESSION|INDICATION|COMPARISON):", unit)
        assert "XXXX" not in unit and "\n" not in unit
    # what might be a number cut in two: an end in a lone digit, or a start with 'cm' or 'mm'
    cut = [u for u in made.units if re.search(r"\s\d\.$", u) or re.match(r"[cm]m\b", u)]
    assert len(cut) < len(made.units) / 1000
