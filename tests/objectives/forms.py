"""Every objective in its slow form, on dense tensors; and what the package hands to it, on a model of 20 lines.

Row ``B + i`` of everything is row ``i`` with its alternate answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import reference
import torch
from command_line import ROOT
from torch import Tensor

from lit_unlearn import objectives as package
from lit_unlearn.functional import logit_margin, token_logp
from lit_unlearn.models import Alignment, SupervisedTokens, TokenIndex, locate
from lit_unlearn.models.tokens import OtherModel
from lit_unlearn.objectives import Objective

B, T, V, D = 3, 6, 11, 4
LAYER = 1

NOT = -100
LABELS = torch.tensor(
    [
        [1, 2, 3, 4, NOT, NOT],  # the first label is on the first token, which nothing predicts
        [NOT] * T,
        [NOT, NOT, 5, NOT, 7, NOT],  # a gap
        [NOT, 6, 2, NOT, NOT, NOT],
        [9, NOT, NOT, NOT, NOT, NOT],
        [NOT, NOT, NOT, 8, 9, 3],
    ]
)
ROWS = [0, 2]  # with tokens
REFERENCE_LOGP = torch.tensor([-5.0, torch.nan, -2.0, -4.0, torch.nan, -6.0], dtype=torch.float64)


class Dense(NamedTuple):
    """All that an objective may depend on, at every position: the model's logits and a layer's output, twice."""

    logits: Tensor  # (2B, T, V)
    reference: Tensor
    states: Tensor  # (2B, T, D)
    reference_states: Tensor


class Place(NamedTuple):
    """One supervised token: what a dense tensor has where it is predicted, each a batch of one."""

    z: Tensor
    z_ref: Tensor
    h: Tensor
    h_ref: Tensor
    label: Tensor


def draw() -> Dense:
    """Always the same numbers; the model's own carry gradients."""
    generator = torch.Generator().manual_seed(0)
    logits, z_ref = (3 * torch.randn(2, 2 * B, T, V, generator=generator, dtype=torch.float64)).unbind()
    states, h_ref = torch.randn(2, 2 * B, T, D, generator=generator, dtype=torch.float64).unbind()
    return Dense(logits.requires_grad_(), z_ref, states.requires_grad_(), h_ref)


# Slow forms: of a Dense, the values whose mean the objective is ------------------------------------------------------

Form = Callable[[Dense], Tensor]


def supervised(rows: Iterable[int], alignment: Alignment = "next_token") -> list[tuple[int, int, int]]:
    """(row, position of the state, label) of every supervised token."""
    back = 1 if alignment == "next_token" else 0
    return [(r, t - back, int(LABELS[r, t])) for r in rows for t in range(back, T) if LABELS[r, t] != NOT]


def per_token(
    loss: Callable[[Place], Tensor], first_row: int = 0, alignment: Alignment = "next_token", skip: int = 0
) -> Form:
    def form(dense: Dense) -> Tensor:
        values = []
        for row in range(first_row, first_row + B):
            for r, t, label in supervised([row], alignment)[skip:]:
                values.append(loss(Place(*(x[r, t][None] for x in dense), torch.tensor([label]))))
        return torch.cat(values)

    return form


def answer_logp(dense: Dense, row: int) -> Tensor:
    """log p of a whole answer, shape (1,)."""
    terms = [reference.token_logp(dense.logits[r, t][None], torch.tensor([label])) for r, t, label in supervised([row])]
    return torch.stack(terms).sum(dim=0)


def per_answer(loss: Callable[[Dense, int], Tensor]) -> Form:
    return lambda dense: torch.cat([loss(dense, row) for row in ROWS])


def gain(dense: Dense, row: int) -> Tensor:
    return answer_logp(dense, row) - REFERENCE_LOGP[row]


def logp(place: Place) -> Tensor:
    return reference.token_logp(place.z, place.label)


def towards(coefficient: float, seed: int) -> Callable[[Place], Tensor]:
    def loss(place: Place) -> Tensor:
        return reference.activation_distance(place.h, coefficient * reference.rmu_direction(place.h.shape[1], seed))

    return loss


def ceu_case(skip: int) -> tuple[Objective, Form]:
    return package.CEU(skip), per_token(lambda x: reference.ceu(x.z, x.label), skip=skip)


def match_case() -> tuple[Objective, Form]:
    objective = package.MatchUnseen(factor=1.5)
    objective.level.set(2.0)  # so the level is 3 nats per token
    return objective, per_answer(lambda dense, row: (-answer_logp(dense, row) / len(supervised([row])) - 3.0) ** 2)


def calibrated_case() -> tuple[Objective, Form]:
    objective = package.MatchCalibrated(token_weight=0.3)
    objective.level.set(0.5)  # twice the teacher's logits

    def form(dense: Dense, row: int) -> Tensor:
        differences = []
        for r, t, label in supervised([row]):
            own, teacher = (
                reference.token_logp(logits[r, t][None], torch.tensor([label]))
                for logits in (dense.logits, 2 * dense.reference)
            )
            differences.append(own - teacher)
        by_token = torch.cat(differences)
        return by_token.mean()[None] ** 2 + 0.3 * by_token.var(correction=0)

    return objective, per_answer(form)


DOCUMENTED = "EntropyTarget of docs/methods.md"


def documented_case() -> tuple[Objective, Form]:
    """Return the template for a method of your own in docs/methods.md, which passes the tests of the package's objectives."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/methods.md").read_text(encoding="utf-8"), re.DOTALL)
    module: dict[str, Any] = {"__name__": "my_methods"}
    exec(compile(example, "docs/methods.md", "exec"), module)
    # Of the tokens here, some have less entropy than this, and some more.
    target = 1.0
    return module["EntropyTarget"](target), per_token(lambda x: (target - reference.entropy(x.z)).clamp_min(0) ** 2)


CASES: dict[str, tuple[Objective, Form]] = {
    "NLL": (package.NLL(), per_token(lambda x: -logp(x))),
    "LogitMargin": (package.LogitMargin(), per_token(lambda x: reference.logit_margin(x.z) ** 2)),
    "LogitMargin, power 1": (package.LogitMargin(1), per_token(lambda x: reference.logit_margin(x.z))),
    "LogitMargin, label": (
        package.LogitMargin(2.5, "label"),
        per_token(lambda x: reference.logit_margin(x.z) ** 2.5, alignment="label"),
    ),
    "KLToUniform": (package.KLToUniform(), per_token(lambda x: reference.kl_uniform_to_model(x.z))),
    "KLToUniform, other": (
        package.KLToUniform("model_to_uniform"),
        per_token(lambda x: reference.kl_model_to_uniform(x.z)),
    ),
    "GradAscent": (package.GradAscent(), per_token(logp)),
    "WGA": (package.WGA(0.7), per_token(lambda x: reference.wga_weight(logp(x), 0.7) * logp(x))),
    "SatImp": (package.SatImp(0.5, 2), per_token(lambda x: reference.satimp_weight(logp(x), 0.5, 2) * logp(x))),
    "NPO": (
        package.NPO(0.2),
        per_answer(lambda dense, row: reference.npo(answer_logp(dense, row), REFERENCE_LOGP[row][None], 0.2)),
    ),
    "MatchUnseen": match_case(),
    "MatchCalibrated": calibrated_case(),
    "NLLFloor": (
        package.NLLFloor(9.0),
        per_answer(lambda dense, row: (9.0 + answer_logp(dense, row) / len(supervised([row]))).clamp_min(0)),
    ),
    "SimNPO": (
        package.SimNPO(1.5, 0.4),
        per_answer(
            lambda dense, row: reference.simnpo(
                answer_logp(dense, row), torch.tensor([len(supervised([row]))]), beta=1.5, delta=0.4
            )
        ),
    ),
    "DPO": (
        package.DPO(0.2),
        per_answer(lambda dense, row: reference.dpo(gain(dense, B + row), gain(dense, row), 0.2)),
    ),
    "IdkNLL": (package.IdkNLL(), per_token(lambda x: -logp(x), first_row=B)),
    "JensUn": (package.JensUn(), per_token(lambda x: reference.jensen_shannon_to_label(x.z, x.label), first_row=B)),
    "UNDIAL": (package.UNDIAL(3), per_token(lambda x: reference.undial(x.z, x.z_ref, x.label, 3))),
    "CEU": ceu_case(1),
    "CEU, skip 0": ceu_case(0),
    "CEU, skip 2": ceu_case(2),  # an answer of two tokens has none left
    "RMU": (package.RMU(3, LAYER, seed=5), per_token(towards(3, seed=5))),
    "KLToReference": (
        package.KLToReference(),
        per_token(lambda x: reference.kl(reference.log_softmax(x.z_ref), reference.log_softmax(x.z))),
    ),
    # The teacher of these tests is the model before unlearning.
    "KLToTeacher": (
        package.KLToTeacher(),
        per_token(lambda x: reference.kl(reference.log_softmax(x.z_ref), reference.log_softmax(x.z))),
    ),
    "KLToTeacher, alternate": (
        package.KLToTeacher("alternate"),
        per_token(lambda x: reference.kl(reference.log_softmax(x.z_ref), reference.log_softmax(x.z)), first_row=B),
    ),
    "JensenShannonToReference": (
        package.JensenShannonToReference(),
        per_token(lambda x: reference.jensen_shannon(x.z, x.z_ref)),
    ),
    "ActivationMatch": (
        package.ActivationMatch(LAYER),
        per_token(lambda x: reference.activation_distance(x.h, x.h_ref)),
    ),
    DOCUMENTED: documented_case(),
}
ROUNDING = {"RMU": 1e-6}  # of the direction, which is drawn and scaled in float32; otherwise float64's


# What the package hands over ------------------------------------------------------------------------------------------


def located(objective: Objective, rows: Iterable[int] = range(B)) -> TokenIndex:
    """The tokens of some rows that an objective selects, as `locate` finds them, with those of the alternate answers."""

    def find(first_row: int) -> TokenIndex:
        own = torch.full_like(LABELS, NOT)
        for row in rows:
            own[first_row + row] = LABELS[first_row + row]
        sequence = (torch.arange(2 * B) - first_row)[:, None].expand_as(own)
        tokens = locate({"input_ids": own, "labels": own, "sequence": sequence}, objective.alignment)
        return tokens._replace(reference_logp=REFERENCE_LOGP[first_row + tokens.examples])

    alternate = find(B)
    index = (alternate if objective.reads == "alternate" else find(0))._replace(alternate=alternate)
    return objective.select(index)


def fill(index: TokenIndex, dense: Dense) -> SupervisedTokens:
    """Every field, whether or not it is declared: the model's own, and what it may be compared with."""

    def gather(logits: Tensor, states: Tensor) -> SupervisedTokens:
        logits, states = (x.flatten(0, 1)[index.state] for x in (logits, states))
        places = (index.labels, index.sequence, index.num_sequences, index.examples, index.reference_logp)
        return SupervisedTokens(logits, *places, activations={LAYER: states})

    own, before = (gather(*dense[i::2]) for i in (0, 1))
    alternate = None if index.alternate is None else fill(index.alternate, dense)
    return own._replace(reference=before, teacher=before, alternate=alternate)


class FakeModel:
    """`TokenModel` of tokens whose hidden states are the logits themselves."""

    def logit_margin(self, tokens: SupervisedTokens) -> Tensor:
        return logit_margin(tokens.hidden)

    def token_logp(self, tokens: SupervisedTokens) -> Tensor:
        return token_logp(tokens.hidden, tokens.labels)

    def map_logits(self, function: Callable[..., Tensor], tokens: SupervisedTokens, *token_args: Tensor) -> Tensor:
        return function(tokens.hidden, *token_args)

    def map_logit_pairs(
        self,
        function: Callable[..., Tensor],
        tokens: SupervisedTokens,
        *token_args: Tensor,
        other: OtherModel = "reference",
    ) -> Tensor:
        return function(tokens.hidden, getattr(tokens, other).hidden, *token_args)
