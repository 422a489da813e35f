"""Intervals against a hand-written bootstrap, and how often they hold the truth where patients have several records."""

import random

import numpy as np
import pytest

from medground.scoring import bootstrap
from medground.scoring.bootstrap import Group, group_sums, interval, resampled_sums


def bounds(values, patients, resamples=4000, seed=0):
    """95 % interval of the mean of `values`."""
    names, patient = np.unique(patients, return_inverse=True)
    (group,) = group_sums(patient, np.zeros(len(values), dtype=int), 1, [np.asarray(values), np.ones(len(values))])
    (drawn,) = resampled_sums([group], len(names), resamples, seed)
    low, high = interval(drawn[:, :1] / drawn[:, 1:])
    return low[0], high[0]


@pytest.mark.parametrize("shape", ["normal", "skewed", "coins"])
def test_without_clusters_it_is_the_plain_percentile_bootstrap(shape):
    rng = np.random.default_rng(1)
    values = {"normal": rng.normal(size=80), "skewed": rng.exponential(size=80), "coins": rng.integers(0, 2, 80)}[shape]
    values = values.astype(float)
    plain = random.Random(2)
    means = sorted(sum(plain.choices(values.tolist(), k=80)) / 80 for _ in range(4000))
    low, high = bounds(values, np.arange(80))
    width = means[3900] - means[100]
    # both ends wander with the draws: by some hundredths of the width at 4,000 resamples
    assert low == pytest.approx((means[99] + means[100]) / 2, abs=0.06 * width)
    assert high == pytest.approx((means[3899] + means[3900]) / 2, abs=0.06 * width)


def test_percentiles_are_those_of_numpy_without_nan():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(317, 5))
    values[rng.random(values.shape) < 0.3] = np.nan
    values[1:, 3] = np.nan
    low, high = interval(values)
    want = np.nanpercentile(values, [2.5, 97.5], axis=0)
    assert np.array([low, high]) == pytest.approx(want)
    assert np.isnan(interval(np.full((4, 1), np.nan))[0][0])


def test_the_interval_holds_the_truth_95_times_in_100_only_if_it_draws_patients():
    rng = np.random.default_rng(4)
    held, blind = 0, 0
    rounds, people = 1000, 200
    for seed in range(rounds):
        sizes = rng.integers(1, 7, people)
        patients = np.repeat(np.arange(people), sizes)
        # the true mean is 0: a patient's records share what is his
        values = rng.normal(size=people)[patients] + 0.5 * rng.normal(size=len(patients))
        low, high = bounds(values, patients, 400, seed)
        held += low <= 0 <= high
        if seed < 200:
            low, high = bounds(values, np.arange(len(patients)), 400, seed)
            blind += low <= 0 <= high
    assert 0.93 * rounds <= held <= 0.97 * rounds, held
    assert blind < 0.85 * 200, blind


def test_blocks_and_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(5)
    patient, groups = rng.integers(0, 30, 500), rng.integers(-1, 4, 500)
    counts = [rng.random(500), np.ones(500)]
    parts = group_sums(patient, groups, 4, counts)
    once = list(resampled_sums(parts, 30, 60, 7))
    monkeypatch.setattr(bootstrap, "_WEIGHTS", 90)
    monkeypatch.setattr(bootstrap, "_DRAWN", 1)
    monkeypatch.setattr(bootstrap, "_TILE", 7)
    again = list(resampled_sums(parts, 30, 60, 7))
    assert np.array(once) == pytest.approx(np.array(again), abs=1e-9)
    assert np.abs(np.array(once) - np.array(list(resampled_sums(parts, 30, 60, 8)))).max() > 1, "another seed"
    for group, part in enumerate(parts):
        assert part.sums.sum(0) == pytest.approx([counts[0][groups == group].sum(), (groups == group).sum()])
        assert part.patients.tolist() == sorted(set(patient[groups == group].tolist()))


def test_a_resample_is_a_draw_of_as_many_patients():
    eye = Group(np.arange(6), np.eye(6))
    (drawn,) = resampled_sums([eye], 6, 4000, 0)
    assert (drawn.sum(1) == 6).all() and (drawn == np.round(drawn)).all()
    assert drawn.mean(0) == pytest.approx(np.ones(6), abs=0.06)
    assert drawn.var(0) == pytest.approx(np.full(6, 5 / 6), abs=0.08)  # binomial: 6 draws of 1 in 6
