"""Teacher-forced passes over examples, from which every likelihood-based value of a benchmark is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_unlearn.data.batches import pack_visible, to_sequence
from lit_unlearn.data.example import Example
from lit_unlearn.errors import ModelError
from lit_unlearn.models import LanguageModel, SupervisedTokens, locate
from lit_unlearn.models.evaluation_mode import evaluation_mode


class Scored(NamedTuple):
    """Scores of the ``N`` supervised tokens of one example, each of shape ``(N,)``.

    Args:
        labels: Token ids.
        predictions: The likeliest token at each position.
        logp: Log-probability of each label, nats.
        mean: Expectation of log p over the vocabulary at each position, minus the entropy, nats.
        std: Its standard deviation, nats.
    """

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    logp: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    @property
    def nll(self) -> float:
        """Mean NLL, nats per token."""
        return float(-self.logp.mean())


def score_examples(
    lm: LanguageModel,
    examples: Sequence[Example],
    token_budget: int = 8192,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Scored]:
    """Score examples in batches of bounded size, the longest first; no logits are kept.

    Args:
        lm: Loaded; it is left as it was.
        examples: Each with a supervised token.
        token_budget: Largest batch, in tokens; one example may exceed it.
        progress: Called with the number of examples of each batch.

    Returns:
        One item per example, in the order given.
    """
    scores: dict[int, Scored] = {}
    with evaluation_mode(lm):
        for indices in group_by_length(examples, token_budget):
            scores |= zip(indices, _score_batch(lm, [examples[i] for i in indices]), strict=True)
            progress(len(indices))
    return [scores[i] for i in range(len(examples))]


def measure_gradient_norms(lm: LanguageModel, examples: Sequence[Example]) -> list[float]:
    """Measure how strongly each example would move the model: the mean, over its weight tensors, of the gradient's L2 norm.

    A membership attack: the gradient of the mean NLL is small for what a model was trained on. As open-unlearning computes it, a
    mean of norms, and not the norm of the whole gradient. arXiv 2402.17012.

    Args:
        lm: Loaded; it is left as it was, gradients included. One backward pass per example needs memory for the gradients of
            all weights.
        examples: Each with a supervised token.

    Returns:
        One number per example, in the order given.

    Raises:
        ModelError: If the model is sharded.
    """
    if lm.is_sharded:
        raise ModelError("gradient norms need whole weights, and this model is sharded: leave out `gradient_norm`.")
    model = cast(nn.Module, lm.model)
    # Integers of quantised weights have no gradient.
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    trained = [parameter.requires_grad for parameter in parameters]
    accumulates = lm.accumulate_head
    device = parameters[0].device.type
    norms = []
    try:
        # Adding to `.grad` would leave gradients behind for the optimizer. All weights count, whatever was trained.
        lm.accumulate_head = False
        for parameter in parameters:
            parameter.requires_grad_()
        # Autocast keeps casts of weights that were made without gradients, through which none would flow.
        with (
            evaluation_mode(lm),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            for example in examples:
                loss = lm(build_batch(lm, [example]), lambda tokens: -lm.token_logp(tokens).mean())
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                sizes = [gradient.double().norm() for gradient in gradients if gradient is not None]
                norms.append(float(torch.stack(sizes).mean()))
    finally:
        lm.accumulate_head = accumulates
        for parameter, is_trained in zip(parameters, trained, strict=True):
            parameter.requires_grad_(is_trained)
    return norms


def build_batch(lm: LanguageModel, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Put examples into one batch on the model's device, packed if the model keeps packed sequences apart.

    Returns:
        A batch for the model, whose ``sequence`` numbers the examples: packing changes their order.
    """
    device = lm.input_device
    sequences = []
    for number, example in enumerate(examples):
        sequence = to_sequence(example, device)
        sequences.append({**sequence, "sequence": torch.full_like(sequence["labels"], number)})
    return pack_visible(sequences, lm.packs)


def group_by_length(examples: Sequence[Example], token_budget: int) -> Iterator[list[int]]:
    """Yield indices, the longest first, so that a lack of memory shows at once."""
    group: list[int] = []
    longest = 0
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids)):
        # A model that cannot pack pads every example to the longest of its batch, which is the first.
        if group and (len(group) + 1) * longest > token_budget:
            yield group
            group = []
        if not group:
            longest = len(examples[i].input_ids)
        group.append(i)
    if group:
        yield group


def _score_batch(lm: LanguageModel, examples: Sequence[Example]) -> list[Scored]:
    batch = build_batch(lm, examples)
    tokens = locate(batch)

    def compute(tokens: SupervisedTokens) -> Tensor:
        return lm.map_logits(_token_scores, tokens, tokens.labels)

    # float64 has every token id, and is what means over tokens are taken in.
    values = lm(batch, compute, index=[tokens]).double().cpu().numpy()
    labels = tokens.labels.cpu().numpy()
    # Packing changes the order of the examples, so every token is traced back to its own.
    numbers = tokens.examples[tokens.sequence].cpu().numpy()

    scores = []
    for number in range(len(examples)):
        logp, predictions, mean, std = values[numbers == number].T
        scores.append(Scored(labels[numbers == number], predictions.astype(np.int64), logp, mean, std))
    return scores


def _token_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute log-probability of the label, likeliest token, mean and standard deviation of log p, shape ``(N, 4)``."""
    logp = logits.log_softmax(dim=-1)
    # A vocabulary entry that is ruled out has log p = −∞: it has no mean, and 0 · −∞ is NaN.
    finite = logp.clamp_min(torch.finfo(logp.dtype).min / 2)
    p = logp.exp()
    mean = (p * finite).sum(dim=-1)
    variance = (p * (finite - mean[:, None]).square().nan_to_num(posinf=0.0)).sum(dim=-1)
    of_label = finite.gather(1, labels[:, None]).squeeze(1)
    return torch.stack([of_label, logits.argmax(dim=-1).to(logp.dtype), mean, variance.sqrt()], dim=1)
