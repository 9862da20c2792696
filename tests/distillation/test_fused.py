"""Head and divergence in one: the same numbers as a plain float64 reference, in the memory of a chunk."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cascade.distillation.losses.divergences import DIVERGENCES, Options
from cascade.distillation.losses.fused import chunk_rule, fused_loss
from cascade.distillation.options import Objective
from cascade.models.architecture.head import Head
from cascade.runtime.errors import UserError


def reference_divergence(name, log_q, log_p, options):
    """Written from the definitions, for autograd."""
    p, q = log_p.exp(), log_q.exp()
    kl = {
        "forward_kl": lambda: (p * (log_p - log_q)).sum(-1),
        "reverse_kl": lambda: (q * (log_q - log_p)).sum(-1),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
    }
    if name in kl:
        return kl[name]()
    if name == "jsd":
        if options.beta in (0.0, 1.0):
            return kl["forward_kl" if options.beta == 0 else "reverse_kl"]()
        m = options.beta * p + (1 - options.beta) * q
        return options.beta * (p * (log_p - m.log())).sum(-1) + (1 - options.beta) * (q * (log_q - m.log())).sum(-1)
    if name == "skew_forward_kl":
        return (p * (log_p - (options.skew * p + (1 - options.skew) * q).log())).sum(-1)
    if name == "skew_reverse_kl":
        return (q * (log_q - (options.skew * q + (1 - options.skew) * p).log())).sum(-1)
    ids = log_p.topk(min(options.top_k, p.shape[-1]), -1).indices
    listed_p, listed_q = p.gather(-1, ids), q.gather(-1, ids)
    rest_p, rest_q = ((1 - one.sum(-1)).clamp(min=1e-8) for one in (listed_p, listed_q))
    return (listed_p * (listed_p / listed_q).log()).sum(-1) + rest_p * (rest_p / rest_q).log()


def reference(hidden, head, targets, objective, teacher_hidden=None, teacher_head=None):
    """(sum of losses, divergence, cross-entropy) by plain operations on whole float64 logits."""

    def logits_of(states, one):
        logits = (states @ one.weight.T + (0 if one.bias is None else one.bias)) * one.scale
        return logits if one.softcap is None else one.softcap * torch.tanh(logits / one.softcap)

    logits = logits_of(hidden, head)
    if teacher_head is not None:
        common = min(len(head.weight), len(teacher_head.weight))
        logits = logits[:, :common]
    ce = F.cross_entropy(logits, targets, reduction="none")
    if teacher_head is None:
        return ce.sum(), torch.zeros_like(ce), ce
    expected = logits_of(teacher_hidden, teacher_head)[:, :common]
    temperature = objective.temperature
    log_q, log_p = F.log_softmax(logits / temperature, -1), F.log_softmax(expected / temperature, -1)
    kd = reference_divergence(objective.divergence, log_q, log_p, objective.options)
    kd = kd * (temperature**2 if objective.temperature_scale == "tsq" else 1)
    share = objective.cross_entropy_weight
    return ((1 - share) * kd + share * ce).sum(), kd, ce


def draw_case(seed, tokens, vocabulary, teacher_vocabulary, scale, bias, softcap):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, teacher_hidden = normal(tokens, 7), normal(tokens, 5)
    head = Head(scale * normal(vocabulary, 7), normal(vocabulary) if bias else None, 0.7 if bias else 1.0, softcap)
    teacher_head = Head(scale * normal(teacher_vocabulary, 5), None, 1.3, softcap)
    targets = torch.randint(0, min(vocabulary, teacher_vocabulary), (tokens,), generator=generator)
    return hidden, head, targets, teacher_hidden, teacher_head


def single(head):
    return Head(head.weight.float(), None if head.bias is None else head.bias.float(), head.scale, head.softcap)


def with_leaves(head):
    """(head, its parameters) with gradients asked for."""
    weight = head.weight.clone().requires_grad_()
    bias = None if head.bias is None else head.bias.clone().requires_grad_()
    return Head(weight, bias, head.scale, head.softcap), [one for one in (weight, bias) if one is not None]


@settings(deadline=None, max_examples=300)
@given(
    divergence=st.sampled_from(sorted(DIVERGENCES)),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    temperature_scale=st.sampled_from(["tsq", "none"]),
    cross_entropy_weight=st.sampled_from([0.0, 0.3]),
    beta=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    tokens=st.integers(1, 9),
    vocabulary=st.integers(3, 40),
    padding=st.integers(-2, 3),
    chunk=st.integers(1, 10),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    scale=st.sampled_from([0.1, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_loss_and_gradients_equal_the_float64_reference(
    divergence, temperature, temperature_scale, cross_entropy_weight, beta, tokens, vocabulary, padding, chunk, bias,
    softcap, scale, seed,
):  # fmt: skip
    hidden, head, targets, teacher_hidden, teacher_head = draw_case(
        seed, tokens, vocabulary, vocabulary + padding, scale, bias, softcap
    )
    options = Options(beta=beta, skew=0.1, top_k=5)
    objective = Objective(divergence, temperature, temperature_scale, cross_entropy_weight, options)
    exact_hidden = hidden.clone().requires_grad_()
    exact_head, exact_leaves = with_leaves(head)
    expected, kd, ce = reference(exact_hidden, exact_head, targets, objective, teacher_hidden, teacher_head)
    expected.backward()
    ours_hidden = hidden.float().requires_grad_()
    ours_head, leaves = with_leaves(single(head))
    found = fused_loss(
        ours_hidden, ours_head, targets, objective,
        teacher_hidden=teacher_hidden.float(), teacher_head=single(teacher_head), chunk_size=chunk,
    )  # fmt: skip
    (3 * found.loss).backward()
    close = {"rtol": 2e-4, "atol": 2e-5 * max(1.0, temperature**2)}
    torch.testing.assert_close(found.loss.double(), expected, **close)
    torch.testing.assert_close(found.divergence.double(), kd, **close)
    torch.testing.assert_close(found.cross_entropy.double(), ce, **close)
    for ours, theirs in zip([ours_hidden, *leaves], [exact_hidden, *exact_leaves], strict=True):
        torch.testing.assert_close(ours.grad.double() / 3, theirs.grad, **close)


@given(seed=st.integers(0, 999), chunk=st.integers(1, 7), softcap=st.sampled_from([None, 5.0]))
def test_without_a_teacher_it_is_cross_entropy(seed, chunk, softcap):
    hidden, head, targets, _, _ = draw_case(seed, 6, 11, 11, 1.0, True, softcap)
    exact = hidden.clone().requires_grad_()
    expected, _, _ = reference(exact, head, targets, Objective())
    expected.backward()
    ours = hidden.float().requires_grad_()
    found = fused_loss(ours, single(head), targets, Objective(), chunk_size=chunk)
    found.loss.backward()
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    assert torch.count_nonzero(found.divergence) == 0


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_extreme_logits_give_finite_loss_and_gradient(divergence, temperature):
    head = Head(torch.eye(3) * 1e4, None)
    hidden = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    objective = Objective(divergence, temperature, options=Options(top_k=1))
    found = fused_loss(hidden, head, torch.tensor([0, 2]), objective, teacher_hidden=teacher, teacher_head=head)
    found.loss.backward()
    assert torch.isfinite(found.loss) and torch.isfinite(hidden.grad).all()
    assert found.divergence[0] > 0.5 and found.divergence[1] < 1e-6


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(divergence):
    hidden, head, targets, _, _ = draw_case(0, 6, 11, 11, 1.0, True, None)
    ours = hidden.float().requires_grad_()
    found = fused_loss(
        ours, single(head), targets, Objective(divergence), teacher_hidden=hidden.float(), teacher_head=single(head)
    )
    found.loss.backward()
    assert found.loss.abs() < 1e-6 and ours.grad.abs().max() < 1e-6
    if divergence == "forward_kl":
        assert found.loss == 0 and torch.count_nonzero(ours.grad) == 0
    assert found.agrees.sum() == len(targets)


@pytest.mark.parametrize("frozen", [False, True])
def test_hidden_states_of_16_bits_under_a_float32_head_get_their_gradients_and_the_head_its_own_in_float32(frozen):
    hidden, head, targets, teacher_hidden, teacher_head = draw_case(3, 9, 31, 31, 0.5, False, None)
    exact = hidden.bfloat16().double().requires_grad_()
    exact_head = Head(head.weight.bfloat16().double().requires_grad_(), None)
    rounded = Head(teacher_head.weight.bfloat16().double(), None, teacher_head.scale)
    expected, _, _ = reference(exact, exact_head, targets, Objective(), teacher_hidden.bfloat16().double(), rounded)
    expected.backward()
    ours = hidden.bfloat16().requires_grad_()  # as autocast leaves them
    weight = head.weight.float().requires_grad_(not frozen)
    found = fused_loss(
        ours, Head(weight, None), targets, Objective(), chunk_size=4,
        teacher_hidden=teacher_hidden.bfloat16(), teacher_head=single(teacher_head),
    )  # fmt: skip
    found.loss.backward()
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert (ours.grad.double() - exact.grad).norm() / exact.grad.norm() < 1e-2
    if not frozen:
        assert weight.grad.dtype == torch.float32
        assert (weight.grad.double() - exact_head.weight.grad).norm() / exact_head.weight.grad.norm() < 1e-2


def test_a_frozen_head_gets_no_gradient_and_hidden_states_get_the_same():
    hidden, head, targets, teacher_hidden, teacher_head = draw_case(1, 6, 11, 11, 1.0, False, None)
    gradients = []
    for frozen in (False, True):
        ours = hidden.float().requires_grad_()
        weight = head.weight.float().requires_grad_(not frozen)
        found = fused_loss(
            ours, Head(weight, None), targets, Objective(),
            teacher_hidden=teacher_hidden.float(), teacher_head=single(teacher_head),
        )  # fmt: skip
        found.loss.backward()
        gradients.append(ours.grad)
        assert (weight.grad is None) == frozen
    assert torch.equal(*gradients)


def test_what_each_token_contributed_is_reported():
    hidden, head, targets, teacher_hidden, teacher_head = draw_case(2, 6, 11, 11, 1.0, False, None)
    found = fused_loss(
        hidden.float(), single(head), targets, Objective(temperature=2.0),
        teacher_hidden=teacher_hidden.float(), teacher_head=single(teacher_head),
    )  # fmt: skip
    expected = (teacher_hidden @ teacher_head.weight.T) * teacher_head.scale
    log_p = F.log_softmax(expected / 2, -1)
    torch.testing.assert_close(found.teacher_entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    logits = hidden @ head.weight.T
    assert torch.equal(found.agrees, (logits.argmax(-1) == expected.argmax(-1)).float())
    assert found.loss == pytest.approx(float(found.divergence.sum()), rel=1e-6)


def test_a_target_beyond_the_common_vocabulary_and_an_unknown_divergence_are_refused():
    head, other = Head(torch.zeros(5, 2), None), Head(torch.zeros(4, 2), None)
    states = torch.zeros(1, 2)
    with pytest.raises(UserError, match="token id 4 is beyond the models' common vocabulary of 4"):
        fused_loss(states, head, torch.tensor([4]), Objective(), teacher_hidden=states, teacher_head=other)
    with pytest.raises(UserError, match="loss 'kl' is unknown; known: forward_kl"):
        fused_loss(states, head, torch.tensor([0]), Objective("kl"))


def test_the_chunk_is_a_power_of_two_within_its_memory_and_no_longer_than_the_batch():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert chunk_rule(10_000, 32_000, cpu) == 256 and chunk_rule(10_000, 128_256, gpu) == 1024
    assert chunk_rule(100, 512, cpu) == 128
    for vocabulary in (512, 32_000, 256_000):
        size = chunk_rule(1 << 20, vocabulary, cpu)
        assert math.log2(size).is_integer() and (size == 16 or 4 * size * vocabulary <= 1 << 25)
