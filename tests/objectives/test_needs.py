"""Every objective reads what it declares in `needs`, `reads` and `layers`, all of it, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from objectives.forms import CASES, LAYER, FakeModel, draw, fill, located
from torch import Tensor

from lit_unlearn.models import SupervisedTokens
from lit_unlearn.objectives import WGA, Objective
from lit_unlearn.objectives.base import TokenModel

every_case = pytest.mark.parametrize("case", CASES)
ALWAYS = {"logit_margin", "token_logp", "map_logits"}
FIELDS = {"reference", "reference_logp", "teacher", "activations", "alternate"}


class UndeclaredError(Exception):
    """Not an AttributeError, which `getattr` with a default would swallow."""


def undeclared(objective: Objective) -> set[str]:
    """Fields of `SupervisedTokens`, and methods of the model, that an objective must not touch."""
    fields = set(objective.needs)
    if objective.layers:
        fields |= {"activations"}
    if {"reference", "teacher"} & objective.needs:
        fields |= {"map_logit_pairs"}
    if objective.reads == "pair":
        fields |= {"alternate"}
    return {*FIELDS, "map_logit_pairs"} - fields


def guarded(tokens: SupervisedTokens, closed: set[str], layers: frozenset[int]) -> SupervisedTokens:
    """Tokens that raise where a closed field, or the output of another layer than these, is read."""

    class Layers(dict):
        def __missing__(self, layer: int) -> Any:
            raise UndeclaredError(f"layer {layer}")

    class Guarded(SupervisedTokens):
        def __getattribute__(self, name: str) -> Any:
            if name in closed:
                raise UndeclaredError(name)
            return super().__getattribute__(name)

        def __getitem__(self, index: Any) -> Any:
            raise UndeclaredError(f"field {index}, not by its name")

    def guard(tokens: SupervisedTokens) -> SupervisedTokens:
        nested = {"reference": tokens.reference, "teacher": tokens.teacher, "alternate": tokens.alternate}
        kept = Layers({layer: states for layer, states in tokens.activations.items() if layer in layers})
        inner = {name: None if value is None else guard(value) for name, value in nested.items()}
        return Guarded._make(tokens._replace(activations=kept, **inner))

    return guard(tokens)


class GuardedModel:
    """A `FakeModel` of which only the methods of the protocol exist, and of those only some are open."""

    def __init__(self, closed: set[str]) -> None:
        self._open = (ALWAYS | {"map_logit_pairs"}) - closed

    def __getattr__(self, name: str) -> Any:
        if name not in self._open:
            raise UndeclaredError(name)
        return getattr(FakeModel(), name)


def run(objective: Objective, closed: set[str]) -> Tensor:
    tokens = guarded(fill(located(objective), draw()), closed, objective.layers)
    return objective(GuardedModel(closed), tokens)


@every_case
def test_nothing_undeclared_is_read(case):
    objective, form = CASES[case]
    values = run(objective, undeclared(objective))
    values.sum().backward()
    assert values.shape == form(draw()).shape


@every_case
def test_everything_declared_is_read(case):
    """Each need costs a run something: a second model, a measurement, other answers, states that are kept."""
    objective, _ = CASES[case]
    read = FIELDS - undeclared(objective)
    for field in read:
        closed = {field, "map_logit_pairs"} if field in ("reference", "teacher") else {field}
        with pytest.raises(UndeclaredError):
            run(objective, undeclared(objective) | closed)


def test_requirements_are_said_once_and_listed():
    listed = {case: objective.requirements for case, (objective, _) in CASES.items()}
    assert listed["NLL"] == []
    assert listed["DPO"] == ["reference_logp", "alternate"]
    assert listed["JensUn"] == ["alternate"]
    assert listed["RMU"] == ["activations"]
    assert listed["KLToTeacher, alternate"] == ["teacher", "alternate"]
    assert listed["ActivationMatch"] == ["reference", "activations"]


@every_case
def test_count_reads_labels_alone(case):
    objective, form = CASES[case]
    closed = {"hidden", *FIELDS}
    assert objective.count(guarded(fill(located(objective), draw()), closed, frozenset())) == len(form(draw()))


@every_case
def test_a_message_can_name_the_unit(case):
    assert CASES[case][0].unit


@pytest.mark.parametrize("name", ["reference", "reference_logp", "alternate", "activations", "lm", "map_logit_pairs"])
def test_the_guard_sees_a_weighted_ascent_that_reads_too_much(name):
    class Greedy(WGA):
        def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
            if name == "lm":
                getattr(lm, "model", None)
            else:
                getattr(lm if name == "map_logit_pairs" else tokens, name, None)
            return super().forward(lm, tokens)

    run(WGA(), undeclared(WGA()))
    with pytest.raises(UndeclaredError):
        run(Greedy(), undeclared(Greedy()))


def test_the_guard_sees_another_layer_and_a_field_by_number():
    class Other(Objective):
        layers = frozenset({LAYER + 1})

        def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
            return tokens.activations[LAYER].sum(dim=-1)

    class ByNumber(Objective):
        def forward(self, lm: TokenModel, tokens: SupervisedTokens) -> Tensor:
            return tokens[6]

    for kind in (Other, ByNumber):
        with pytest.raises(UndeclaredError):
            run(kind(), undeclared(kind()))
