"""Few draws that stand for all probabilities: unbiased, even, and a function of their place alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.teacher.targets.sampling import shifts, systematic_draws


def probabilities(rows, vocabulary, seed):
    draw = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocabulary, generator=draw)).softmax(-1)


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(2, 60))
def test_an_id_is_drawn_as_often_as_its_probability_says_but_for_rounding(seed, draws, vocabulary):
    p = probabilities(5, vocabulary, seed)
    ids = systematic_draws(p, shifts(b"root", seed.to_bytes(4, "little"), 5), draws)
    counts = torch.zeros(5, vocabulary, dtype=torch.float64).scatter_add_(1, ids, torch.ones(5, draws).double())
    assert torch.equal(counts.sum(1), torch.full((5,), float(draws)).double())
    assert ((counts - draws * p.double()).abs() < 1 + 1e-4).all()


def test_draws_are_unbiased():
    p, draws, count = probabilities(1, 40, 0), 7, 20_000
    # Every shift once, evenly: the mean over them is the expectation but for one part in `count`.
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids = systematic_draws(p.expand(count, -1), even, draws)
    share = torch.bincount(ids.flatten(), minlength=40).double() / (count * draws)
    assert (share - p[0].double()).abs().max() < 2 / count


def test_shifts_depend_on_root_window_and_position_alone_and_are_even():
    first = shifts(b"root", b"window", 4096)
    assert torch.equal(shifts(b"root", b"window", 100), first[:100])
    assert not torch.equal(shifts(b"other", b"window", 100), first[:100])
    assert not torch.equal(shifts(b"root", b"another", 100), first[:100])
    assert 0 <= first.min() and first.max() < 1
    assert first.mean().item() == pytest.approx(0.5, abs=0.02) and len(first.unique()) == 4096


def test_systematic_draws_add_less_noise_than_as_many_independent_ones():
    p = probabilities(200, 500, 1)
    errors = []
    for kind in ("systematic", "independent"):
        if kind == "systematic":
            ids = systematic_draws(p, shifts(b"r", b"w", 200), 16)
        else:
            ids = torch.multinomial(p, 16, replacement=True, generator=torch.Generator().manual_seed(0))
        t = torch.zeros_like(p).scatter_add_(1, ids, torch.full(ids.shape, 1 / 16))
        errors.append((t - p).norm().item())
    assert errors[0] < 0.8 * errors[1]


def test_ten_thousand_windows_draws_average_to_the_probabilities():
    p, draws, count = probabilities(1, 40, 2), 5, 10_000
    shift = torch.cat([shifts(b"root", window.to_bytes(4, "little"), 1) for window in range(count)])
    ids = systematic_draws(p.expand(count, -1), shift, draws)
    shares = torch.zeros(count, 40, dtype=torch.float64).scatter_add_(1, ids, torch.full(ids.shape, 1 / draws).double())
    noise = (shares.std(0) / count**0.5).clamp_min(1e-9)
    z = (shares.mean(0) - p[0].double()) / noise
    assert z.abs().max() < 4 and z.square().mean() < 2  # as far off as chance puts it, and no farther


def test_ids_without_weight_are_never_drawn():
    weights = torch.zeros(4, 3000)
    weights[:, [7, 2999]] = torch.tensor([1e-6, 1.0])
    ids = systematic_draws(weights, torch.tensor([0.0, 0.5, 0.999999999, 1 - 1e-16]), 50)
    assert set(ids.unique().tolist()) <= {7, 2999}
