"""What published objectives become in their limits, what settings they refuse, and what they say is missing."""

from __future__ import annotations

import math
import re

import pytest
import torch
from objectives.forms import CASES, LAYER, B, Dense, FakeModel, answer_logp, draw, fill, located

from lit_unlearn.errors import BatchError, ConfigError
from lit_unlearn.objectives import (
    CEU,
    DPO,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    ActivationMatch,
    GradAscent,
    IdkNLL,
    JensenShannonToReference,
    JensUn,
    KLToReference,
    KLToTeacher,
    KLToUniform,
    LogitMargin,
    MatchUnseen,
    NLLFloor,
    Objective,
    SatImp,
    SimNPO,
)


def evaluate(objective: Objective, dense: Dense | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective's values and the gradient of their sum with respect to the logits."""
    dense = draw() if dense is None else dense
    values = objective(FakeModel(), fill(located(objective), dense))
    (gradient,) = torch.autograd.grad(values.sum(), dense.logits)
    return values, gradient


def unchanged() -> Dense:
    """The model is the reference model still."""
    dense = draw()
    return dense._replace(reference=dense.logits.detach(), reference_states=dense.states.detach())


# Limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [WGA(0), SatImp(0, 0)], ids=["WGA", "SatImp"])
def test_without_weights_it_is_ascent(objective):
    (values, gradient), (wanted, wanted_gradient) = evaluate(objective), evaluate(GradAscent())
    assert torch.equal(values, wanted)
    assert torch.equal(gradient, wanted_gradient)


def test_npo_becomes_ascent_for_small_beta():
    """In the gradient of the sum over answers; its value is a large constant by then."""
    _, wanted = evaluate(GradAscent())
    for beta in (1e-3, 1e-6):
        _, gradient = evaluate(NPO(beta))
        torch.testing.assert_close(gradient, wanted, rtol=20 * beta, atol=1e-15)


def test_simnpo_becomes_ascent_on_means_for_small_beta():
    _, ascent = evaluate(GradAscent())
    _, gradient = evaluate(SimNPO(1e-6))
    for row, length in ((0, 3), (2, 2)):
        torch.testing.assert_close(gradient[row], ascent[row] / length, rtol=2e-5, atol=1e-15)


def test_matching_a_far_level_becomes_ascent_on_means():
    _, ascent = evaluate(GradAscent())
    objective = MatchUnseen(factor=1.0)
    objective.level.set(1e9)
    _, gradient = evaluate(objective)
    for row, length in ((0, 3), (2, 2)):
        torch.testing.assert_close(gradient[row] / 2e9, ascent[row] / length, rtol=1e-6, atol=1e-15)


def test_matching_pulls_answers_to_the_level_from_both_sides():
    objective = MatchUnseen(factor=2.0)
    assert (evaluate(objective)[0] == math.inf).all()  # not measured yet
    dense = draw()
    lengths = {0: 3, 2: 2}
    nll = {row: -answer_logp(dense, row).item() / length for row, length in lengths.items()}
    objective.level.set(sum(nll.values()) / 4)  # halfway between them
    _, gradient = evaluate(objective, dense)
    _, ascent = evaluate(GradAscent())
    for row, own in nll.items():
        wanted = 2 * (objective.level.value - own) / lengths[row]
        torch.testing.assert_close(gradient[row], wanted * ascent[row], rtol=1e-9, atol=1e-15)


def test_a_floor_moves_only_answers_below_it_by_ascent_on_their_means():
    _, ascent = evaluate(GradAscent())
    lengths = {0: 3, 2: 2}
    dense = draw()
    nll = {row: -answer_logp(dense, row).item() / length for row, length in lengths.items()}
    likely, unlikely = sorted(nll, key=nll.__getitem__)
    values, gradient = evaluate(NLLFloor(sum(nll.values()) / 2), dense)  # between the two
    assert values.sum().item() == pytest.approx((nll[unlikely] - nll[likely]) / 2)
    torch.testing.assert_close(gradient[likely], ascent[likely] / lengths[likely], rtol=1e-9, atol=1e-15)
    assert not gradient[unlikely].any()


def test_dpo_becomes_ascent_on_the_one_answer_and_descent_on_the_other_for_small_beta():
    _, ascent = evaluate(GradAscent())
    _, descent = evaluate(IdkNLL())
    _, gradient = evaluate(DPO(1e-6))
    assert not ascent[B:].any()
    assert not descent[:B].any()
    torch.testing.assert_close(gradient, ascent + descent, rtol=2e-5, atol=1e-15)


@pytest.mark.parametrize(
    "objective", [KLToReference(), KLToTeacher(), JensenShannonToReference(), ActivationMatch(LAYER)], ids=type
)
def test_nothing_is_lost_where_the_model_is_the_reference_model(objective):
    """Otherwise an epsilon would mean nothing."""
    dense = unchanged()
    loss = objective(FakeModel(), fill(located(objective), dense)).mean()
    loss.backward()
    assert abs(loss.item()) < 1e-15
    for x in (dense.logits, dense.states):
        assert x.grad is None or x.grad.abs().max() < 1e-15
    assert objective(FakeModel(), fill(located(objective), draw())).mean().item() > 0.1


def test_undial_that_lowers_nothing_keeps_the_reference_model():
    values, gradient = evaluate(UNDIAL(0), unchanged())
    assert gradient.abs().max() < 1e-15
    assert values.mean().item() > 0  # the entropy
    _, gradient = evaluate(UNDIAL(0))
    assert gradient.abs().max() > 0.01


def test_undial_at_the_reference_model_is_ceu_for_large_beta():
    (values, gradient), (wanted, wanted_gradient) = evaluate(UNDIAL(1e6), unchanged()), evaluate(CEU(0))
    torch.testing.assert_close(values, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-15)


def test_jensen_shannon_is_bounded():
    for case in ("JensenShannonToReference", "JensUn"):
        dense = draw()
        dense.logits.data *= 1e3
        values, gradient = evaluate(CASES[case][0], dense)
        assert values.mean().item() > 0
        assert values.max().item() <= math.log(2) * (1 + 1e-15)
        assert gradient.isfinite().all()


def test_rmu_draws_to_a_vector_that_the_seed_decides_alone():
    """Read off at a layer that puts out zeros: the gradient is −2 c u / D there."""

    def direction(seed: int, width: int = 64) -> torch.Tensor:
        states = torch.zeros(B * 2, 6, width, dtype=torch.float64, requires_grad=True)
        objective = RMU(4.0, LAYER, seed)
        dense = draw()._replace(states=states, reference_states=states.detach())
        values = objective(FakeModel(), fill(located(objective), dense))
        assert values.mean().item() == pytest.approx(4.0**2 / width, rel=1e-6)
        values.sum().backward()
        return states.grad[0, 0] * width / (-2 * 4.0)

    torch.manual_seed(1)
    u, state = direction(0), torch.random.get_rng_state()
    assert torch.equal(direction(0), u)
    assert torch.equal(
        torch.random.get_rng_state(), state
    )  # on every process the same, and the run's numbers left alone
    assert u.norm().item() == pytest.approx(1.0, rel=1e-6)
    assert (u >= 0).all()
    assert torch.nn.functional.cosine_similarity(direction(1), u, dim=0) < 0.9
    assert RMU(layer=3).layers == ActivationMatch(3).layers == {3}


# Settings ------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    assert (LogitMargin().power, LogitMargin().alignment) == (2, "next_token")
    assert KLToUniform().direction == "uniform_to_model"
    assert (NPO().beta, DPO().beta, UNDIAL().beta, WGA().beta, CEU().skip) == (0.1, 0.1, 10, 1, 1)
    assert (SimNPO().beta, SimNPO().delta, SatImp().beta1, SatImp().beta2) == (4.5, 0, 5, 1)
    assert (RMU().coefficient, RMU().layer, ActivationMatch().layer) == (2, 7, 7)


ABOVE_ZERO = [
    *[(LogitMargin, "power"), (MatchUnseen, "factor"), (NLLFloor, "floor"), (RMU, "coefficient")],
    *[(NPO, "beta"), (SimNPO, "beta"), (DPO, "beta")],
]
FROM_ZERO = [
    *[(WGA, "beta"), (SatImp, "beta1"), (SatImp, "beta2"), (UNDIAL, "beta")],
    *[(CEU, "skip"), (RMU, "layer"), (ActivationMatch, "layer")],
]
NOT_A_NUMBER = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(
    ("kind", "name", "value", "wanted"),
    [
        *[(*one, value, "above 0") for one in ABOVE_ZERO for value in [0, -0.5, *NOT_A_NUMBER]],
        *[(*one, value, "at least 0") for one in FROM_ZERO for value in [-1, *NOT_A_NUMBER]],
        *[(SimNPO, "delta", value, "") for value in NOT_A_NUMBER],
    ],
)
def test_bad_number_is_refused(kind, name, value, wanted):
    parts = [kind.__name__, f"`{name}`", wanted, repr(value)]
    with pytest.raises(ConfigError, match=".*".join(map(re.escape, parts))):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), [*FROM_ZERO, (SimNPO, "delta")])
def test_zero_is_a_setting(kind, name):
    assert getattr(kind(**{name: 0}), name) == 0


@pytest.mark.parametrize("word", ["labels", "", None])
def test_bad_word_is_refused(word):
    with pytest.raises(ConfigError, match=rf"LogitMargin: `alignment`.*'label'.*{word!r}"):
        LogitMargin(alignment=word)
    with pytest.raises(ConfigError, match=rf"`direction`.*'uniform_to_model'.*{word!r}"):
        KLToUniform(word)
    with pytest.raises(ConfigError, match=rf"KLToTeacher: `reads`.*'alternate'.*{word!r}"):
        KLToTeacher(word)


# What is missing -----------------------------------------------------------------------------------------------------

NO_LOGP = r"`reference_logp`"
NO_LAYER = rf"layer {LAYER} .*`layers`"


@pytest.mark.parametrize(
    ("case", "missing", "message"),
    [
        ("NPO", {"reference_logp": None}, NO_LOGP),
        ("DPO", {"reference_logp": None}, NO_LOGP),
        ("DPO", {"alternate": None}, r'DPO: .*"alternate"'),
        ("RMU", {"activations": None}, NO_LAYER),
        ("RMU", {"activations": {LAYER + 1: torch.zeros(5, 4)}}, NO_LAYER),
        ("ActivationMatch", {"activations": {}}, NO_LAYER),
        ("ActivationMatch", {"reference": None}, r"ActivationMatch: .*`reference=True`"),
    ],
)
def test_what_is_missing_is_named(case, missing, message):
    objective, _ = CASES[case]
    tokens = fill(located(objective), draw())._replace(**missing)
    with pytest.raises(BatchError, match=message):
        objective(FakeModel(), tokens)


def test_what_only_one_of_a_pair_has_is_missing():
    tokens = fill(located(DPO()), draw())
    with pytest.raises(BatchError, match=NO_LOGP):
        DPO()(FakeModel(), tokens._replace(alternate=tokens.alternate._replace(reference_logp=None)))
    match = ActivationMatch(LAYER)
    with pytest.raises(BatchError, match=NO_LAYER):
        match(FakeModel(), tokens._replace(reference=tokens.reference._replace(activations={})))


def test_jensun_reads_no_logits_but_the_labels():
    """So that it needs no more of the head than NLL does."""

    class OnlyLogp:
        token_logp = FakeModel.token_logp

    assert len(JensUn()(OnlyLogp(), fill(located(JensUn()), draw()))) == 5


@pytest.mark.parametrize(("make", "name"), [(lambda: CEU(1.9), "skip"), (lambda: RMU(layer=1.5), "layer")])  # type: ignore[arg-type]
def test_whole_numbers_are_not_cut(make, name):
    with pytest.raises(ConfigError, match=f"`{name}` .*whole number"):
        make()


def test_the_direction_does_not_depend_on_the_default_dtype():
    values = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            states = torch.zeros(1, 7, dtype=torch.float64, requires_grad=True)
            tokens = fill(located(RMU(layer=0), [0]), draw())
            tokens = tokens._replace(activations={0: states.expand(len(tokens.labels), 7)})
            RMU(layer=0)(None, tokens).sum().backward()
            values.append(states.grad)
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)
