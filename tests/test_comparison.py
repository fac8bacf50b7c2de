"""Tests between models and intervals: against O(N^2) sums, exact tests, and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from bigmed import comparison, statistics
from bigmed.errors import UserError


def clustered_set(rng, patients=60, models=2, within=1.0):
    """Scores of images whose patients share an effect; the true AUC of both models is equal."""
    sizes = rng.integers(1, 5, size=patients)
    of = np.repeat(np.arange(patients), sizes)
    labels = (rng.random(patients) < 0.5).astype(np.int8)[of]  # a finding of the patient
    effect = rng.normal(size=(models, patients)) * within
    scores = labels[None] * 1.2 + effect[:, of] + rng.normal(size=(models, len(of)))
    return scores, labels, of


def slow_delong(scores, labels):
    """DeLong's covariance from all pairs."""
    positive, negative = labels == 1, labels == 0
    v10, v01, aucs = [], [], []
    for s in scores:
        psi = (s[positive][:, None] > s[negative]) + 0.5 * (s[positive][:, None] == s[negative])
        v10.append(psi.mean(axis=1))
        v01.append(psi.mean(axis=0))
        aucs.append(psi.mean())
    return aucs, np.cov(v10) / positive.sum() + np.cov(v01) / negative.sum()


def test_delong_of_single_images_equals_all_pairs():
    rng = np.random.default_rng(0)
    labels = rng.choice([1, 0, -1], size=80, p=[0.4, 0.5, 0.1])
    scores = np.round(rng.normal(size=(2, 80)) + labels, 1)
    found = comparison.delong(scores, labels, np.arange(80))
    known = labels >= 0
    aucs, covariance = slow_delong(scores[:, known], labels[known])
    np.testing.assert_allclose(found.aucs, aucs, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-10)
    found = found.contrast(np.array([1.0, -1.0]))
    value, low, high, p = found.value, found.low, found.high, found.p
    spread = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert value == pytest.approx(aucs[0] - aucs[1])
    assert (low, high) == pytest.approx((value - 1.959964 * spread, value + 1.959964 * spread))
    assert p == pytest.approx(2 * stats.norm.sf(abs(value) / spread))


def test_clustered_delong_equals_obuchowskis_sums():
    scores, labels, patients = clustered_set(np.random.default_rng(1))
    found = comparison.delong(scores, labels, patients)
    people = np.unique(patients)
    positive, negative = labels == 1, labels == 0
    m, n = positive.sum(), negative.sum()
    psi = [
        (s[positive][:, None] > s[negative]) + 0.5 * (s[positive][:, None] == s[negative])
        for s in scores
    ]
    v10, v01 = [p.mean(axis=1) for p in psi], [p.mean(axis=0) for p in psi]
    for r, s in itertools.product(range(2), repeat=2):
        s10 = s01 = s11 = 0.0
        i10 = i01 = 0
        for person in people:
            a, b = patients[positive] == person, patients[negative] == person
            i10, i01 = i10 + a.any(), i01 + b.any()
            x = [(v10[k][a] - found.aucs[k]).sum() for k in range(2)]
            y = [(v01[k][b] - found.aucs[k]).sum() for k in range(2)]
            s10, s01 = s10 + x[r] * x[s], s01 + y[r] * y[s]
            s11 += x[r] * y[s] + x[s] * y[r]
        expected = i10 / (i10 - 1) * s10 / m**2 + i01 / (i01 - 1) * s01 / n**2
        expected += len(people) / (len(people) - 1) * s11 / (m * n)
        assert found.covariance[r, s] == pytest.approx(expected, rel=1e-10)


def test_delong_of_one_patient_is_refused():
    with pytest.raises(UserError, match="there are 1 and 3"):
        comparison.delong([np.arange(4.0)], np.array([1, 0, 0, 0]), np.arange(4))


def test_intervals_cover_and_tests_hold_their_level_where_patients_are_clusters():
    """Of 300 simulated test sets, 95 % +- 3.1 points (2.5 standard errors of a binomial) are
    covered by what goes by patients; what goes by images falls short of that."""
    rng, trials = np.random.default_rng(2), 300
    truth = stats.norm.cdf(1.2 / np.sqrt(2 * (1 + 1.0)))
    covered = {"bootstrap": 0, "delong": 0, "images": 0}
    rejected = 0
    for trial in range(trials):
        scores, labels, patients = clustered_set(rng, patients=80)
        columns = scores[0][:, None], labels[:, None]
        for name, of in (("bootstrap", patients), ("images", np.arange(len(labels)))):
            found = statistics.estimate(
                *columns, of, ("x",), "multi_label", num_resamples=300, seed=trial
            )["auc/x"]
            covered[name] += found.low <= truth <= found.high
        both = comparison.delong(scores, labels, patients)
        low, high = both.interval(0)
        covered["delong"] += low <= truth <= high
        rejected += both.contrast(np.array([1.0, -1.0])).p < 0.05
    band = 2.5 * np.sqrt(0.95 * 0.05 / trials)
    # percentile intervals of 80 patients fall short by a point or two (Efron and Tibshirani, 14.3)
    assert covered["bootstrap"] / trials > 0.95 - band - 0.02
    assert abs(covered["delong"] / trials - 0.95) < band + 0.01
    assert covered["images"] / trials < 0.90
    assert abs(rejected / trials - 0.05) < band + 0.01


def test_permutations_equal_the_exact_mcnemar_test():
    rng = np.random.default_rng(3)
    a, b = rng.random(60) < 0.8, rng.random(60) < 0.6
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    exact = stats.binomtest(only_a, only_a + only_b).pvalue
    found = comparison.permutation_test(a, b, np.arange(60), num_permutations=100_000)
    # four standard errors of 100,000 draws
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 1e5))


def test_patients_are_exchanged_whole():
    rng = np.random.default_rng(4)
    patients = np.repeat(np.arange(8), 3)
    a, b = rng.random(24), rng.random(24) - 0.2
    of_patient = np.bincount(patients, a - b)
    signs = np.array(list(itertools.product([-1, 1], repeat=8)))
    exact = np.mean(np.abs(signs @ of_patient) >= abs(of_patient.sum()) - 1e-9)
    found = comparison.permutation_test(a, b, patients, num_permutations=50_000)
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 5e4) + 1e-4)
    assert comparison.permutation_test(a, a, patients) == 1.0
    with pytest.raises(UserError, match="24 and 23 values, of patients of 24"):
        comparison.permutation_test(a, b[1:], patients)
    b[3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        comparison.permutation_test(a, b, patients)
    with pytest.raises(UserError, match="not finite"):
        comparison.delong([a, b], a > 0.5, patients)
    with pytest.raises(UserError, match="23 and 24 values"):
        comparison.delong([a[1:]], a > 0.5, patients)


def test_without_variance_delong_gives_no_interval_and_no_p():
    labels = np.array([0, 0, 0, 1, 1, 1])
    found = comparison.delong([labels * 1.0, np.zeros(6)], labels, np.arange(6))
    np.testing.assert_array_equal(found.aucs, [1, 0.5])
    assert found.interval(0) is None and found.interval(1) is None
    assert found.contrast(np.array([1.0, -1.0])) == comparison.Contrast(0.5, None, None, None)


def test_a_contrast_of_means_of_seeds():
    scores, labels, patients = clustered_set(np.random.default_rng(8))
    found = comparison.delong([*scores, *scores[::-1]], labels, patients)
    of_means = found.contrast(np.array([0.5, -0.5, -0.5, 0.5]))
    alone = comparison.delong(scores, labels, patients).contrast(np.array([1.0, -1.0]))
    assert (of_means.value, of_means.p) == pytest.approx((alone.value, alone.p))


def test_bootstrap_p_is_the_inverted_interval():
    samples = np.random.default_rng(5).normal(0.1, 0.05, size=9999)
    level = comparison.bootstrap_p(samples)
    edge = np.quantile(samples, level / 2)  # the interval of that level ends at 0
    assert abs(edge) < 0.005
    assert comparison.bootstrap_p(samples + 1) == pytest.approx(2 / 10_000)
    assert comparison.bootstrap_p(np.zeros(10)) == 1.0
    assert comparison.bootstrap_p(np.full(3, np.nan)) is None


def test_holm_equals_statsmodels():
    p = np.random.default_rng(7).random(12) ** 3
    expected = multipletests(p, method="holm")[1]
    np.testing.assert_allclose(comparison.holm(list(p)), expected)


def test_holm_by_hand():
    assert comparison.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparison.holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert comparison.holm([]) == []


def test_seeds_and_patients_are_kept_apart_and_added():
    rng, covered, apart, trials = np.random.default_rng(6), 0, 0, 400
    for _ in range(trials):  # of a mean of five seeds, with an error that the patients share
        shared, seeds = rng.normal(0, 0.02), rng.normal(0, 0.03, size=5)
        values = 0.8 + shared + seeds
        samples = values[:, None] + rng.normal(0, 0.02, size=400)[None]
        found = comparison.over_seeds(values, samples)
        covered += found.low <= 0.8 <= found.high
        apart += found.patient_low <= 0.8 <= found.patient_high
        assert found.seed_sd == pytest.approx(values.std(ddof=1))
        assert found.mean == pytest.approx(values.mean())
    # 400 trials: one point is a standard error
    assert 0.92 < covered / trials < 0.98 and apart / trials < covered / trials
    for count in (2, 3, 10):  # where hardly anything but the seeds varies
        covered = 0
        for _ in range(trials):
            values = 0.8 + rng.normal(0, 0.03, size=count)
            found = comparison.over_seeds(values, values[:, None] + rng.normal(0, 1e-3, size=99))
            covered += found.low <= 0.8 <= found.high
        assert 0.91 < covered / trials < 0.985, count
    one = comparison.over_seeds([0.5], np.array([[0.4, 0.5, 0.6]]))
    assert one.seed_sd is None and one.low is None
