from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import HALF, cotangent

from lit_unlearn.functional import (
    ceu,
    jensen_shannon,
    jensen_shannon_to_label,
    kl,
    kl_to_uniform,
    logit_margin,
    token_logp,
    undial,
    uniformity,
)

ROWS = st.lists(st.integers(-3000, 3000).map(lambda i: i / 64), min_size=2, max_size=12)  # exact in binary
# Half precision logits are exact inputs here; what is rounded to half is the gradient.
TOLERANCES = [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)]
EXACT = {
    "uniform_to_model": reference.kl_uniform_to_model,
    "model_to_uniform": reference.kl_model_to_uniform,
}


LABELS = torch.tensor([0, 10, 3, 3, 7, 1, 5])
PAIRS = {  # the package's form and the slow one, both of some logits z and of others w
    "kl": (kl, lambda z, w: reference.kl(reference.log_softmax(z), reference.log_softmax(w))),
    "jensen_shannon": (jensen_shannon, reference.jensen_shannon),
    "jensen_shannon_to_label": (
        lambda z, w: jensen_shannon_to_label(token_logp(z, LABELS)),
        lambda z, w: reference.jensen_shannon_to_label(z, LABELS),
    ),
    "undial": (lambda z, w: undial(z, w, LABELS, 3.0), lambda z, w: reference.undial(z, w, LABELS, 3.0)),
    "ceu": (lambda z, w: ceu(z, LABELS), lambda z, w: reference.ceu(z, LABELS)),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


def make_logits(dtype=torch.float64, scale=3.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(7, 11, generator=draw, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("direction", EXACT)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_equals_reference(direction, dtype, tolerance):
    z = make_logits(dtype)
    value, (grad,) = reference.value_and_grads(lambda x: kl_to_uniform(x, direction), [z], cotangent())
    want, (want_grad,) = reference.value_and_grads(EXACT[direction], [z], cotangent(), torch.float64)
    assert value.dtype == (torch.float32 if dtype in HALF else dtype)
    assert grad.dtype == dtype
    assert reference.relative_error(value, want) < min(tolerance, 2e-6)
    assert reference.relative_error(grad, want_grad) < tolerance


@pytest.mark.parametrize("direction", EXACT)
def test_gradcheck(direction):
    assert torch.autograd.gradcheck(lambda x: kl_to_uniform(x, direction), make_logits().requires_grad_())


def test_default_direction():
    assert torch.equal(kl_to_uniform(make_logits()), kl_to_uniform(make_logits(), "uniform_to_model"))


def test_unknown_direction():
    with pytest.raises(ValueError, match=r"'uniform_to_model', 'model_to_uniform'.*got 'forward'"):
        kl_to_uniform(make_logits(), "forward")


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_uniformity_columns(dtype):
    z = make_logits(dtype)
    columns = uniformity(z)
    want = [reference.logit_margin(z), reference.entropy(z) / math.log(11), reference.kl_uniform_to_model(z)]
    assert torch.allclose(columns.double(), torch.stack(want, dim=1), rtol=1e-5, atol=1e-6)
    assert uniformity(z[:0]).shape == (0, 3)


def test_uniform_distribution():
    assert torch.allclose(uniformity(torch.full((2, 50_000), 4.0)), torch.tensor([0.0, 1.0, 0.0]), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_certificates(row):
    """The margin bounds both divergences, and bounds KL(U, p) from below up to log V (proved for every V)."""
    z, slack = torch.tensor([row], dtype=torch.float64), 1e-12
    margin, log_v = logit_margin(z).item(), math.log(len(row))
    to_model, to_uniform = kl_to_uniform(z).item(), kl_to_uniform(z, "model_to_uniform").item()
    assert -slack <= to_uniform <= margin + slack  # log V - H(p)
    assert -slack <= to_model <= margin + slack
    assert to_model >= margin - log_v - slack
    assert (to_model < slack) == (len(set(row)) == 1)
    assert torch.allclose(uniformity(z + 17), uniformity(z), rtol=0, atol=1e-11)


# Two distributions, or one and a label -------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_pair_equals_reference(name, dtype, tolerance):
    """Where the slow form has no gradient, at the teacher, ours has none either."""
    pair, (ours, slow) = [make_logits(dtype), make_logits(dtype, seed=1)], PAIRS[name]
    value, grads = reference.value_and_grads(ours, pair, cotangent())
    want, want_grads = reference.value_and_grads(slow, pair, cotangent(), torch.float64)
    assert value.dtype == (torch.float32 if dtype in HALF else dtype)
    assert reference.relative_error(value, want) < min(tolerance, 2e-6)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert (grad is None) == (want_grad is None)
        if grad is not None:
            assert grad.dtype == dtype
            assert reference.relative_error(grad, want_grad) < tolerance


@every_pair
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_pair_at_extreme_logits(name, dtype):
    """Logits of ±10 000: values of 20 000 nats, whose rounding is all that a gradient that vanishes is made of."""
    levels, draw = torch.tensor([-1e4, 0.0, 1e4], dtype=dtype), torch.Generator().manual_seed(0)
    pair = [levels[torch.randint(3, (7, 11), generator=draw)] for _ in range(2)]
    ours, slow = PAIRS[name]
    value, grads = reference.value_and_grads(ours, pair, cotangent())
    want, want_grads = reference.value_and_grads(slow, pair, cotangent(), torch.float64)
    rounding = torch.finfo(value.dtype).eps
    torch.testing.assert_close(value.double(), want, rtol=10 * rounding, atol=10 * rounding)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        if grad is not None:
            tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e5 * rounding}
            torch.testing.assert_close(grad.double(), want_grad, **tolerance)


@pytest.mark.parametrize("function", [kl, jensen_shannon])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_words_that_are_ruled_out(function, dtype, tolerance):
    """Word 0 by p alone, word 1 by both, word 2 for the symmetric divergence by q alone: no 0 · ∞ anywhere."""
    pair = [make_logits(dtype), make_logits(dtype, seed=1)]
    for logits, words in zip(pair, [[0, 1], [1, 2] if function is jensen_shannon else [1]], strict=True):
        logits[:, words] = -torch.inf

    def slow_kl(z, w):
        rows = zip(*(reference.log_softmax(x).exp() for x in (z, w)), strict=True)
        return torch.stack([reference.kl_of_probabilities(p, q) for p, q in rows])

    value, grads = reference.value_and_grads(function, pair, cotangent())
    slow = slow_kl if function is kl else reference.jensen_shannon
    want, want_grads = reference.value_and_grads(slow, pair, cotangent(), torch.float64)
    assert reference.relative_error(value, want) < min(tolerance, 2e-6)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert reference.relative_error(grad, want_grad) < tolerance


def test_what_the_model_rules_out_and_should_not():
    """KL as good as infinite, Jensen-Shannon at its bound; gradients that an optimizer can take."""
    p, q = torch.zeros(2, 4), torch.zeros(2, 4)
    p[:, 2:], q[:, :2] = -torch.inf, -torch.inf
    value, (_, grad) = reference.value_and_grads(kl, [p, q], cotangent(2))  # p's own gradient is infinite
    assert (value > 1e38).all()
    assert grad.isfinite().all()
    value, grads = reference.value_and_grads(jensen_shannon, [p, q], cotangent(2))
    torch.testing.assert_close(value, torch.full((2,), math.log(2)))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("function", [kl, jensen_shannon])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_is_not_hidden(function, which):
    pair = [make_logits(), make_logits(seed=1)]
    pair[which][2, 4] = torch.nan
    assert function(*pair).isnan().tolist() == [row == 2 for row in range(7)]


@pytest.mark.parametrize("scale", [0.01, 3.0, 300.0])
def test_properties_of_divergences(scale):
    p, q = make_logits(scale=scale), make_logits(scale=scale, seed=1)
    both = jensen_shannon(p, q)
    assert (both > -1e-15).all()
    assert (both <= math.log(2) + 1e-15).all()
    torch.testing.assert_close(jensen_shannon(q, p), both, rtol=1e-14, atol=0)
    assert (kl(p, q) > -1e-15).all()
    assert (both <= (kl(p, q) + kl(q, p)) / 4 + 1e-15).all()  # Lin 1991
    for function in (kl, jensen_shannon):
        torch.testing.assert_close(function(p + 17, q - 5), function(p, q), rtol=1e-9, atol=1e-12)
        value, grads = reference.value_and_grads(function, [p, p], cotangent())
        assert value.abs().max() < 1e-15 * max(1, scale)
        assert max(grad.abs().max() for grad in grads) < 1e-15 * max(1, scale)


def test_kl_to_uniform_is_kl_with_a_uniform_distribution():
    z = make_logits()
    flat = torch.full_like(z, 3.0)
    torch.testing.assert_close(kl_to_uniform(z), kl(flat, z), rtol=1e-13, atol=0)
    torch.testing.assert_close(kl_to_uniform(z, "model_to_uniform"), kl(z, flat), rtol=1e-13, atol=0)


def test_jensen_shannon_to_label_is_that_to_a_one_hot_distribution():
    z = make_logits()
    one_hot = torch.full_like(z, -torch.inf).scatter(1, LABELS[:, None], 0.0)
    value, (grad, _) = reference.value_and_grads(jensen_shannon, [z, one_hot], cotangent())
    ours, (our_grad,) = reference.value_and_grads(
        lambda z: jensen_shannon_to_label(token_logp(z, LABELS)), [z], cotangent()
    )
    torch.testing.assert_close(ours, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(our_grad, grad, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jensen_shannon_to_label_from_certain_to_impossible(dtype):
    logp = torch.tensor([0.0, -1e-12, -1e-4, -1.0, -50.0, -1e4, -1e30], dtype=dtype)
    value, (grad,) = reference.value_and_grads(jensen_shannon_to_label, [logp], torch.ones(7))
    slack = 2 * torch.finfo(dtype).eps
    assert value[0].abs() <= slack
    assert (value.diff() >= -slack).all()
    torch.testing.assert_close(value[-2:], torch.full((2,), math.log(2), dtype=dtype))
    p = logp.exp()
    torch.testing.assert_close(grad, -p * (p.log1p() - logp) / 2, rtol=1e-4, atol=slack)  # pulls, weaker and weaker


def test_undial_that_lowers_nothing_leaves_the_reference_model_alone():
    z, w = make_logits(), make_logits(seed=1)
    value, (grad,) = reference.value_and_grads(lambda z: undial(z, w, LABELS, 0.0), [w], cotangent())
    torch.testing.assert_close(value, reference.entropy(w), rtol=1e-13, atol=0)
    assert grad.abs().max() < 1e-15
    torch.testing.assert_close(undial(z, w, LABELS, 0.0), kl(w, z) + reference.entropy(w), rtol=1e-13, atol=0)


def test_ceu_is_undial_from_the_model_itself_with_the_label_ruled_out():
    z = make_logits()
    forms = [lambda z: ceu(z, LABELS), lambda z: undial(z, z, LABELS, 1e6)]
    (value, (grad,)), (want, (want_grad,)) = (reference.value_and_grads(form, [z], cotangent()) for form in forms)
    torch.testing.assert_close(value, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-13, atol=1e-16)
    p, label = z.softmax(dim=-1), torch.nn.functional.one_hot(LABELS, 11).bool()
    wanted = torch.where(label, p, p - p / (1 - p[label][:, None]))  # the teacher's own gradient would change this
    torch.testing.assert_close(grad, wanted * cotangent()[:, None], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["undial", "ceu"])
def test_no_tokens(name):
    z = make_logits()[:0].requires_grad_()
    value = undial(z, z, LABELS[:0], 3.0) if name == "undial" else ceu(z, LABELS[:0])
    value.sum().backward()
    assert value.shape == (0,)
    assert z.grad.shape == (0, 11)


def test_jensen_shannon_to_a_label_that_is_ruled_out():
    logp = torch.tensor([-torch.inf, -1e30], requires_grad=True)
    value = jensen_shannon_to_label(logp)
    value.sum().backward()
    torch.testing.assert_close(value.detach(), torch.full((2,), math.log(2)))
    assert not logp.grad.any()
