"""A sudden rise of the loss is reported once, with its rows; the usual noise of a curve is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sft.training.loss_spikes import LossSpikes, Spike


def spikes_of(curve: np.ndarray | list[float]) -> list[Spike]:
    watch = LossSpikes()
    return [spike for step, loss in enumerate(curve, 1) if (spike := watch.observe(step, float(loss)))]


def falling(steps: int, noise: float, seed: int) -> np.ndarray:
    """A curve from 6 to 2 nats, as training's are, with noise that is a share of the loss."""
    rng = np.random.default_rng(seed)
    return (2 + 4 * np.exp(-np.arange(steps) / 40)) * (1 + noise * rng.standard_normal(steps))


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_a_falling_curve_has_no_spike(noise: float) -> None:
    assert [spike for seed in range(20) for spike in spikes_of(falling(1000, noise, seed))] == []


def test_steps_of_few_unequal_rows_have_no_spike() -> None:
    """Losses of single answers are skewed: most are easy and some are not."""
    for seed in range(20):
        losses = np.random.default_rng(seed).gamma(4.0, 0.3, 1000)
        assert spikes_of(losses) == []


def test_the_first_steps_are_never_spikes() -> None:
    assert spikes_of([2.0] * 10 + [50.0] + [2.0] * 9) == []


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_a_spike_is_reported_with_its_step_median_and_deviation(noise: float) -> None:
    curve = falling(600, noise, seed=1)
    before = curve[436:500]
    curve[500] *= 4
    (spike,) = spikes_of(curve)
    assert (spike.step, spike.loss) == (501, curve[500])
    assert spike.median == pytest.approx(np.median(before))
    assert spike.deviation == pytest.approx(1.4826 * np.median(np.abs(before - np.median(before))))
    assert f"step 501: the loss is {spike.loss:.4g}" in str(spike)


def test_a_loss_that_stays_high_is_reported_once() -> None:
    assert [spike.step for spike in spikes_of([2.0] * 100 + [9.0] * 100)] == [101]


def test_two_spikes_are_two_reports() -> None:
    assert [spike.step for spike in spikes_of([2.0] * 50 + [9.0, 9.0] + [2.0] * 10 + [8.0] + [2.0] * 5)] == [51, 63]


def test_a_rise_of_one_percent_is_no_spike_after_a_flat_curve() -> None:
    assert spikes_of([2.0] * 100 + [2.02] + [2.0] * 10) == []


def test_a_loss_that_is_not_finite_is_ignored() -> None:
    assert spikes_of([2.0] * 30 + [math.nan, math.inf] + [2.0] * 30) == []


def test_losses_are_sums_over_tokens_and_the_rows_of_the_spike_come_with_it() -> None:
    watch = LossSpikes()
    for step in range(1, 41):
        tokens = 10 + step % 7  # the sum alone would vary with the number of tokens
        sums = torch.tensor([2.0 * tokens, float(tokens)])
        if step == 31:
            sums[0] *= 5
        watch.note(step, sums, [torch.tensor([2 * step, -1]), torch.tensor([2 * step + 1])])
        sums.zero_()  # the caller uses it again
    (spike,) = watch.read()
    assert (spike.step, spike.loss, spike.median, spike.rows) == (31, 10.0, 2.0, (62, 63))
    assert str(spike).endswith("its training rows: 62, 63")
    assert watch.read() == []


def test_a_step_that_trained_nothing_has_no_loss() -> None:
    watch = LossSpikes()
    for step in range(1, 41):
        watch.note(step, torch.tensor([0.0, 0.0]), [])
    assert watch.read() == []
