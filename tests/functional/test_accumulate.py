"""The linear head's two losses: gradients straight into ``weight.grad``, peak memory, and precision."""

from __future__ import annotations

import pytest
import reference
import torch
from allocations import peak_bytes
from reference import HALF, D, N, V, cotangent, make_head
from torch.nn import functional as F

from lit_unlearn.functional import likelihood, linear_logit_margin, linear_token_logp, logit_margin, token_logp

LABELS = torch.tensor([0, V - 1, 3, 3, 7, 1, 10])


def logp(hidden, weight, bias=None, **options):
    labels = (torch.arange(len(hidden)) * 3) % len(weight) if len(hidden) != N else LABELS
    return linear_token_logp(hidden, weight, labels, bias, **options)


FORMS = {"logp": logp, "margin": linear_logit_margin}
form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@form
@pytest.mark.parametrize("keep", [0, 3 * N, 2**24])
@pytest.mark.parametrize("chunk_size", [None, 1, 3, V + 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_accumulates_into_a_missing_and_an_existing_grad(monkeypatch, form, dtype, bias, chunk_size, keep):
    monkeypatch.setattr(likelihood, "KEEP_BUDGET", keep)
    hidden, weight, offsets = make_head(dtype, bias)
    value, (want_hidden, want, want_bias) = reference.value_and_grads(
        lambda *x: form(*x, chunk_size=chunk_size), (hidden, weight, offsets), cotangent()
    )
    for x in filter(lambda x: x is not None, (hidden, weight, offsets)):
        x.requires_grad_()
    for before in (None, torch.ones_like(weight)):
        hidden.grad = None
        weight.grad = before
        if bias:
            offsets.grad = None
        got = form(hidden, weight, offsets, chunk_size=chunk_size, accumulate=True)
        got.backward(cotangent().to(got.dtype))
        assert torch.equal(got, value)
        assert torch.equal(hidden.grad, want_hidden)
        assert not bias or torch.equal(offsets.grad, want_bias)
        expected = want if before is None else want + 1
        assert before is None or weight.grad is before  # in place: whoever holds the buffer sees the sum
        # Added before it is rounded, or after: half precision differs by a unit in the last place.
        assert torch.allclose(weight.grad, expected, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@form
@pytest.mark.parametrize("wanted", range(8))
def test_every_combination_of_requested_gradients(form, wanted):
    head = make_head()
    _, grads = reference.value_and_grads(form, head, cotangent())
    needs = [bool(wanted >> i & 1) for i in range(3)]
    for x, need in zip(head, needs, strict=True):
        x.requires_grad_(need)
    for accumulate in (False, True):
        for x in head:
            x.grad = None
        value = form(*head, accumulate=accumulate)
        assert value.requires_grad == any(needs)
        if any(needs):
            value.backward(cotangent())
        for x, need, grad in zip(head, needs, grads, strict=True):
            assert torch.equal(x.grad, grad) if need else x.grad is None


@form
@pytest.mark.parametrize("bfloat16_autocast", [False, True])
def test_weight_shared_with_the_embedding(form, bfloat16_autocast):
    """The embedding's share of the gradient comes through autograd, the head's past it, to the same buffer."""
    ids = torch.arange(N)
    grads = []
    for accumulate in (False, True):
        weight = make_head(torch.float32)[1].requires_grad_()
        for _ in range(2):  # into a missing grad, then on top of it
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16_autocast):
                value = form(F.embedding(ids, weight).tanh(), weight, accumulate=accumulate)
            (0.3 * value.sum()).backward()
        grads.append(weight.grad)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)


@form
def test_a_computed_weight_gets_its_gradient_through_autograd(form):
    hidden, weight, _ = make_head()
    grads = []
    for accumulate in (False, True):
        leaf = weight.clone().requires_grad_()
        form(hidden, 2 * leaf, accumulate=accumulate).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@form
def test_accumulates_where_saved_tensors_are_copied(form):
    hidden, weight, _ = make_head()
    weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
        value = form(hidden, weight, accumulate=True)
    value.sum().backward()
    assert torch.equal(weight.grad, reference.value_and_grads(form, (hidden, weight), torch.ones(N))[1][1])


@form
@pytest.mark.parametrize("accumulate", [False, True])
def test_no_tokens(form, accumulate):
    hidden, weight, bias = (x.requires_grad_() for x in make_head(n=0))
    form(hidden, weight, bias, accumulate=accumulate).sum().backward()
    assert hidden.grad.shape == (0, D)
    assert torch.equal(weight.grad, torch.zeros(V, D).double())
    assert torch.equal(bias.grad, torch.zeros(V).double())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_logp_is_no_worse_than_naive(monkeypatch, dtype, autocast):
    monkeypatch.setattr(likelihood, "KEEP_BUDGET", 64 * 99)
    head, labels = make_head(dtype, n=64, d=32, v=200), torch.arange(64) * 3
    head[0].add_(2 * head[1][labels])  # confident tokens, where 1 - p has few digits

    def errors(function):
        def run(*x):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return function(*x)

        value, grads = reference.value_and_grads(run, head, cotangent(64))
        return [reference.relative_error(a, b) for a, b in zip([value, *grads], exact, strict=True)]

    want, want_grads = reference.value_and_grads(
        lambda *x: reference.token_logp(reference.head_logits(*x), labels), head, cotangent(64), torch.float64
    )
    exact = [want, *want_grads]
    ours = errors(lambda h, w, b: linear_token_logp(h, w, labels, b, chunk_size=33))
    naive = errors(lambda h, w, b: token_logp(F.linear(h, w, b), labels))
    for a, b in zip(ours, naive, strict=True):
        # The share of each chunk in the gradient of hidden is rounded once more; float32 sums in another order.
        assert a <= (1.5 if dtype == torch.float32 and not autocast else 1.1) * b


def test_second_backward_pass_is_bit_equal():
    head = [x.requires_grad_() for x in make_head()]
    value = logp(*head, chunk_size=3).sum()
    first = torch.autograd.grad(value, head, retain_graph=True)  # uses up what was kept
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(value, head), strict=True))


def test_barred_words():
    """A bias of minus infinity over a whole first chunk, as for padding of the vocabulary."""
    hidden, weight, bias = make_head()
    bias[:4] = -torch.inf
    labels = LABELS.clamp_min(4)
    value, grads = reference.value_and_grads(
        lambda *x: linear_token_logp(*x[:2], labels, x[2], chunk_size=2), (hidden, weight, bias), cotangent()
    )
    want, want_grads = reference.value_and_grads(
        lambda *x: token_logp(F.linear(*x), labels), (hidden, weight, bias), cotangent()
    )
    assert torch.allclose(value, want)
    assert all(torch.allclose(a, b) for a, b in zip(grads, want_grads, strict=True))


def test_nan_is_not_hidden():
    hidden, weight, bias = make_head()
    hidden[2, 1] = torch.nan
    assert logp(hidden, weight, bias, chunk_size=2).isnan().tolist() == [n == 2 for n in range(N)]


def test_peak_memory(monkeypatch):
    """With accumulation a chunk or two and what is shaped like hidden; without it a single (V, D) buffer more."""
    n, d, v, size = 96, 16, 8000, 500
    full, buffer, chunk, small = 4 * n * v, 4 * v * d, 4 * n * size, 4 * n * d
    hidden, weight, _ = (x if x is None else x.requires_grad_() for x in make_head(torch.float32, False, n, d, v))
    monkeypatch.setattr(likelihood, "KEEP_BUDGET", 0)
    allowed = 1.5 * chunk + 8 * small
    assert allowed < buffer < full

    def peak(form, start=None, **options):
        hidden.grad, weight.grad = None, start  # before the recording, which would count what is given back
        return peak_bytes(lambda: form(hidden, weight, chunk_size=size, **options).sum().backward())

    for form in FORMS.values():
        assert peak(form, torch.zeros_like(weight), accumulate=True) <= allowed
        for options in ({"start": None, "accumulate": True}, {"start": None}, {"start": torch.zeros_like(weight)}):
            assert buffer <= peak(form, **options) <= buffer + allowed
        with torch.no_grad():
            assert peak_bytes(lambda form=form: form(hidden, weight, chunk_size=size)) <= allowed
        frozen = weight.detach()
        assert peak_bytes(lambda form=form, w=frozen: form(hidden, w, chunk_size=size).sum().backward()) <= allowed
    monkeypatch.setattr(likelihood, "KEEP_BUDGET", 2 * n * size)
    kept = peak_bytes(lambda: logp(hidden, frozen, chunk_size=size).sum().backward())
    assert 2 * chunk < kept <= 2 * chunk + allowed
    dense = peak_bytes(lambda: logit_margin(F.linear(hidden, weight)).sum().backward())
    assert dense > full
