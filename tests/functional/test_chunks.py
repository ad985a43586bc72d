from __future__ import annotations

import pytest
import reference
import torch
from reference import HALF, LargestOutput, N, V, make_head
from torch.nn import functional as F

from lit_unlearn.functional import chunks, map_logits, uniformity

TARGET = torch.linspace(0.1, 1.0, N, dtype=torch.float64)


def scaled_energy(logits, target):  # (n,), not linear in the logits, with a constant per token
    return (logits.logsumexp(-1) - target).square()


def two_columns(logits, target):
    return torch.stack([scaled_energy(logits, target), logits.softmax(-1)[:, 0]], dim=-1)


def rows_seen(logits, target):  # not token-wise: shows the chunks
    return torch.full_like(target, len(logits))


def errors_against_float64(function, head, target, chunk_size, context=None):
    """Relative errors of the chunked and of the dense form, each in the dtypes of ``head``: value, then gradients."""

    def within(form):
        def run(*operands):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=context is not None):
                return form(*operands)

        return run

    def chunked(h, w, b):
        return map_logits(function, h, w, b, target, chunk_size=chunk_size)

    def dense(h, w, b):
        return function(chunks.upcast(F.linear(h, w, b)), target)

    with torch.no_grad():
        seed = torch.ones_like(chunked(*head), dtype=torch.float64)
    seed[::2] = -0.5
    ours, grads = reference.value_and_grads(within(chunked), head, seed)
    naive, naive_grads = reference.value_and_grads(within(dense), head, seed)
    want, want_grads = reference.value_and_grads(
        lambda *x: function(reference.head_logits(*x), target), head, seed, torch.float64
    )
    pairs = [(ours, naive, want), *zip(grads, naive_grads, want_grads, strict=True)]
    assert all(a.dtype == b.dtype for a, b, _ in pairs if a is not None)
    return [(reference.relative_error(a, c), reference.relative_error(b, c)) for a, b, c in pairs if a is not None]


@pytest.mark.parametrize("function", [scaled_energy, two_columns])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 3, N + 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_dense_reference(dtype, tolerance, chunk_size, bias, function):
    for ours, _ in errors_against_float64(function, make_head(dtype, bias), TARGET.to(dtype), chunk_size):
        assert ours < tolerance


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_is_as_good_as_naive(dtype, bias):
    head = make_head(dtype, bias, n=64, d=32, v=200)
    for ours, naive in errors_against_float64(scaled_energy, head, torch.ones(64), 5):
        # Rounded like the dense form except that each chunk's share of the weight gradient is rounded once more.
        assert ours <= 1.1 * naive


def test_half_weight_gradient_keeps_small_updates():
    """512 chunks add 1 each: a bfloat16 buffer would stop growing at 256."""
    hidden = torch.ones(512, 2, dtype=torch.bfloat16)
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    map_logits(lambda z: z[:, 0], hidden, weight, bias, chunk_size=1).sum().backward()
    assert weight.grad.tolist() == [[512.0, 512.0], [0.0, 0.0], [0.0, 0.0]]
    assert bias.grad.tolist() == [512.0, 0.0, 0.0]


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_autocast(hidden_dtype):
    hidden, weight, bias = make_head(torch.float32, n=64, d=32, v=200)
    head = (hidden.to(hidden_dtype), weight, bias)
    for ours, naive in errors_against_float64(scaled_energy, head, torch.ones(64), 5, context="bfloat16"):
        assert ours <= 1.1 * naive


def test_mixed_dtypes_outside_autocast():
    hidden, weight, _ = make_head(torch.float32)
    hidden = hidden.bfloat16().requires_grad_()
    value = map_logits(scaled_energy, hidden, weight, None, TARGET.float())
    value.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    want = scaled_energy(hidden.float() @ weight.T, TARGET.float())
    assert torch.allclose(value, want)


def test_backward_recomputes_in_the_autocast_of_forward():
    """Backward usually runs outside autocast, and under Lightning's manual optimisation inside it."""
    seen = []

    def spy(logits):
        seen.append((torch.is_autocast_enabled("cpu"), F.linear(logits, torch.eye(V)).dtype))
        return logits.logsumexp(-1)

    grads = []
    for forward, backward in [(True, False), (True, True), (False, False), (False, True)]:
        hidden, weight, _ = make_head(torch.float32)
        hidden.requires_grad_()
        weight.requires_grad_()
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward):
            value = map_logits(spy, hidden, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward):
            value.sum().backward()
            assert F.linear(hidden, weight).requires_grad
        assert seen == [(forward, torch.bfloat16 if forward else torch.float32)] * 2
        grads.append((hidden.grad, weight.grad))
    for i in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(grads[i], grads[i + 1], strict=True))


def test_autocast_leaves_the_shared_head_trainable():
    hidden, weight, _ = make_head(torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        map_logits(lambda z: z.amax(-1), hidden, weight)
        assert F.linear(hidden, weight).requires_grad


def test_gradcheck():
    head = [x.requires_grad_() for x in make_head(n=4, d=3, v=5)]
    assert torch.autograd.gradcheck(lambda *x: map_logits(two_columns, *x, TARGET[:4], chunk_size=3), head)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_requested_gradient(wanted):
    head = make_head()
    seed = torch.ones(N, dtype=torch.float64)
    _, all_grads = reference.value_and_grads(lambda *x: map_logits(scaled_energy, *x, TARGET), head, seed)
    head[wanted].requires_grad_()
    map_logits(scaled_energy, *head, TARGET).backward(seed)
    assert torch.equal(head[wanted].grad, all_grads[wanted])
    assert all(x.grad is None for i, x in enumerate(head) if i != wanted)


def test_token_arguments_are_constants():
    hidden, weight, bias = make_head()
    target = TARGET.clone().requires_grad_()
    assert not map_logits(scaled_energy, hidden, weight, bias, target).requires_grad


@pytest.mark.parametrize("function", [scaled_energy, two_columns])
def test_no_tokens(function):
    hidden, weight, bias = (x.requires_grad_() for x in make_head(n=0))
    value = map_logits(function, hidden, weight, bias, TARGET[:0])
    value.sum().backward()
    assert value.shape == ((0,) if function is scaled_energy else (0, 2))
    assert hidden.grad.shape == hidden.shape
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_never_allocates_the_logits():
    hidden, weight, bias = make_head(n=64, d=4, v=50)
    with LargestOutput() as evaluated:
        map_logits(uniformity, hidden, weight, bias, chunk_size=2)
    assert evaluated.numel <= 64 * 4
    hidden.requires_grad_()
    with LargestOutput() as frozen:
        map_logits(uniformity, hidden, weight, bias, chunk_size=2).sum().backward()
    assert frozen.numel <= 64 * 4  # the gradient of hidden: a frozen head costs no buffer, not even (V, D)
    weight.requires_grad_()
    with LargestOutput() as trained:
        map_logits(uniformity, hidden, weight, bias, chunk_size=2).sum().backward()
    assert trained.numel <= max(64 * 4, 50 * 4)
    with LargestOutput() as whole:
        map_logits(uniformity, hidden, weight, bias, chunk_size=64)
    assert whole.numel == 64 * 50  # the instrument would have seen them


def test_chunks_keep_the_budget_and_are_even(monkeypatch):
    monkeypatch.setattr(chunks, "LOGIT_BUDGET", 4 * V)
    hidden, weight, bias = make_head(n=9)
    sizes = map_logits(rows_seen, hidden, weight, bias, torch.zeros(9))
    assert sizes.tolist() == [3.0] * 9  # not 4, 4, 1
    assert chunks.chunk_length(0, V) == 1
    assert chunks.chunk_length(3, 10**9) == 1


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_upcast(dtype):
    x = torch.ones(2, dtype=dtype)
    assert chunks.upcast(x).dtype == (torch.float32 if dtype in HALF else dtype)


def test_bad_arguments():
    head = make_head()
    with pytest.raises(ValueError, match=r"at least 1, got 0; use None"):
        map_logits(scaled_energy, *head, TARGET, chunk_size=0)
    with pytest.raises(ValueError, match=r"to have 7 rows, .*argument 0 has shape \(3,\)"):
        map_logits(scaled_energy, *head, TARGET[:3])
    with pytest.raises(ValueError, match=r"expected hidden \(N, D\)"):
        map_logits(scaled_energy, head[0], head[1].T, None, TARGET)
