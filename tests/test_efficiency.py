"""Where a curve over labels reaches a reference, against a search by hand."""

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from bigmed import efficiency
from bigmed.errors import UserError

PATIENTS = np.array([10.0, 100.0, 1000.0])


def found_by_hand(curve, target):
    """The first of many numbers of patients at which the curve is at the target."""
    fine = np.logspace(1, 3, 200_001)
    above = np.interp(np.log(fine), np.log(PATIENTS), curve) >= target - 1e-12
    return fine[np.argmax(above)] if above.any() else np.nan


def test_crossings_are_those_of_a_fine_search():
    rng = np.random.default_rng(0)
    curves = rng.random((3, 200))
    targets = rng.random(200)
    found = efficiency.first_crossing(PATIENTS, curves, targets)
    expected = [found_by_hand(curves[:, r], targets[r]) for r in range(200)]
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert np.isnan(found).any() and (found == 10).any()  # both ends are met


def test_an_undefined_point_is_no_crossing():
    curves = np.array([[np.nan, 0.2], [0.9, np.nan], [0.9, np.nan]])
    found = efficiency.first_crossing(PATIENTS, curves, np.array([0.5, 0.5]))
    np.testing.assert_allclose(found, [100, np.nan])


def noisy(rng, mean, repeats, resamples=2000, by_patient=0.01, by_repeat=0.01):
    """(values [S], samples [S, R]) of repeats whose resamples share the patients' errors."""
    values = mean + by_repeat * rng.normal(size=repeats)
    return values, values[:, None] + by_patient * rng.normal(size=resamples)[None]


def test_a_saving_of_nine_tenths():
    rng = np.random.default_rng(1)
    points = [noisy(rng, mean, 5) for mean in (0.6, 0.8, 0.9)]
    reference = noisy(rng, 0.8, 3)
    found = efficiency.crossing(PATIENTS, *zip(*points, strict=True), *reference)
    assert found.patients == pytest.approx(100, rel=0.15) and not found.at_most
    assert found.low < 0.9 < found.high and found.saving == pytest.approx(0.9, abs=0.02)
    assert found.reached == 1.0


def test_repeats_widen_the_interval():
    widths = []
    for by_repeat in (0.0, 0.05):
        rng = np.random.default_rng(2)
        points = [noisy(rng, mean, 5, by_repeat=by_repeat) for mean in (0.6, 0.8, 0.9)]
        reference = noisy(rng, 0.75, 5, by_repeat=by_repeat)
        found = efficiency.crossing(PATIENTS, *zip(*points, strict=True), *reference)
        widths.append(found.high - found.low)
    assert widths[1] > 1.5 * widths[0]


def test_curves_that_begin_above_or_never_arrive():
    rng, little = np.random.default_rng(3), {"by_repeat": 0.001}
    points = [noisy(rng, mean, 9, **little) for mean in (0.6, 0.8, 0.9)]
    values, samples = zip(*points, strict=True)
    above = efficiency.crossing(PATIENTS, values, samples, *noisy(rng, 0.3, 9, **little))
    assert above.at_most and above.patients == 10 and above.saving == above.high == 0.99
    never = efficiency.crossing(PATIENTS, values, samples, *noisy(rng, 0.99, 9, **little))
    assert never.patients is None and never.saving is None
    assert (never.low, never.high, never.reached) == (0, 0, 0)


def test_rising_curves_are_scikit_learns_isotonic_regression():
    curves = np.random.default_rng(4).random((5, 50))
    expected = [IsotonicRegression().fit_transform(np.arange(5), curve) for curve in curves.T]
    np.testing.assert_allclose(efficiency.rising(curves), np.transpose(expected), atol=1e-12)
    curves[2, 7] = np.nan
    np.testing.assert_array_equal(efficiency.rising(curves)[:, 7], curves[:, 7])


@pytest.mark.parametrize("repeats", [3, 5, 10])
def test_the_interval_covers_the_saving(repeats):
    """By simulation; the truth is a curve that crosses the reference at 100 of 1000 patients."""
    rng, covered, trials = np.random.default_rng(5), 0, 300
    for _ in range(trials):
        shared = rng.normal(0, 0.01)  # of the test patients, in all curves
        resampled = rng.normal(0, 0.01, size=300)
        points = []
        for mean in (0.70, 0.80, 0.90, 0.80):
            values = mean + shared + rng.normal(0, 0.02, size=repeats)
            points.append((values, values[:, None] + resampled[None]))
        *curve, reference = points
        found = efficiency.crossing(PATIENTS, *zip(*curve, strict=True), *reference)
        covered += found.low <= 0.9 <= found.high
    # 300 trials: a standard error is 1.3 points
    assert covered / trials > 0.91


def test_with_one_repeat_the_interval_is_of_patients_alone():
    rng = np.random.default_rng(6)
    points = [noisy(rng, mean, count) for mean, count in ((0.6, 5), (0.8, 5), (0.9, 1))]
    found = efficiency.crossing(PATIENTS, *zip(*points, strict=True), *noisy(rng, 0.75, 1))
    assert not found.repeats
    points = [noisy(rng, mean, 2) for mean in (0.6, 0.8, 0.9)]
    assert efficiency.crossing(PATIENTS, *zip(*points, strict=True), *noisy(rng, 0.75, 2)).repeats


def test_refuses_numbers_that_do_not_rise():
    with pytest.raises(UserError, match="rise"):
        efficiency.crossing([10, 10], [], [], np.array([0.5]), np.array([[0.5]]))
