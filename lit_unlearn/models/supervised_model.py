"""Passes through a model that end at the supervised tokens: trunk and head, reference model and teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from lit_unlearn import functional
from lit_unlearn.data.example import collate
from lit_unlearn.errors import BatchError
from lit_unlearn.models import adapters
from lit_unlearn.models.embedding_gradient import adding_to_gradient
from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.models.packed_attention import is_packed, packed_arguments
from lit_unlearn.models.tokens import Alignment, Batch, OtherModel, SupervisedTokens, TokenIndex, locate
from lit_unlearn.models.weights import TemporaryValues

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

Result = TypeVar("Result")


class SupervisedModel(nn.Module):
    """A causal language model in memory, reduced to its supervised tokens.

    `forward` runs the trunk and hands over the states of these tokens; the functions of the logits apply the head to them, in
    chunks. Where the model comes from and where it goes is `LanguageModel`'s.

    Args:
        chunk_size: Vocabulary entries (tokens for `map_logits`) per chunk of the head; ``None`` for a memory budget.
    """

    model: PreTrainedModel | adapters.PeftModel | None
    frozen: PreTrainedModel | None
    teacher: SupervisedModel | None

    def __init__(self, chunk_size: int | None) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.model = None
        # The reference model, unless it is `model` itself with its adapter switched off.
        self.frozen = None
        self.teacher = None
        # In place while the model has the weights of its export, see `exported_weights`.
        self.temporary_values: TemporaryValues | None = None
        # Found by probing once the weights are loaded.
        self.linear_head = False
        self.packs = False
        self.shares_prefix = False
        # Where the model computes, if its weights are elsewhere; see `input_device`.
        self.compute_device: torch.device | None = None
        # Whether losses and the embedding add their gradient directly to `.grad`, without autograd and its hooks.
        self.accumulate_head = False
        # Whether the margin's maximum is searched by a Triton kernel; see `linear_logit_margin`.
        self.margin_kernel = False

    @property
    def is_loaded(self) -> bool:
        """True once the weights are in memory."""
        return self.model is not None

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The loaded transformers model; with an adapter, the one inside `model`, whose layers hold the adapter."""
        if self.model is None:
            raise RuntimeError("the model is not loaded: call `load()` first (Lightning does in `configure_model`).")
        return adapters.inner_model(self.model)  # type: ignore[no-any-return]

    @property
    def is_sharded(self) -> bool:
        """True if every process has a part of the weights, so that all of them must run the same passes."""
        return isinstance(self, FSDPModule)

    def run_with_whole_weights(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call a function that runs the model past `forward`; where weights are sharded, they are whole meanwhile."""
        return function(*args, **kwargs)

    @property
    def input_device(self) -> torch.device:
        """Where batches go: the device of the weights, unless FSDP2 keeps these on the host."""
        return next(self.parameters()).device if self.compute_device is None else self.compute_device

    @property
    def has_adapter(self) -> bool:
        """True if an adapter is trained in place of the model; `model` is a ``peft.PeftModel`` then."""
        return adapters.is_adapted(self.model)

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks of the loaded model."""
        return int(self.causal_lm.config.get_text_config().num_hidden_layers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the model; Lightning's 16-bit precisions would round the adapter along with the base model."""
        super()._apply(adapters.keep_wide(self.model, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Make this the reference model within the block, bit for bit: no adapter, no dropout, no gradients.

        The reference is the base model; with an adapter that was trained before, and goes on being trained, it is the base
        model with that adapter as it was loaded.

        Raises:
            RuntimeError: If there is no adapter to switch off.
        """
        if not self.has_adapter:
            raise RuntimeError(
                "the reference model is this model with its adapter switched off, and it has none: set `adapter`, or call "
                "`keep_reference()` after loading, for a frozen copy."
            )
        model = cast("adapters.PeftModel", self.model)
        if self.temporary_values is not None:
            # The adapter is off, because the base has its sum with the adapter: see `as_exported`.
            with self.temporary_values.taken_out(), adapters.adapter_as_before(model, is_switched_off=True):
                yield
            return
        with adapters.adapter_as_before(model):
            yield

    def keep_reference(self) -> None:
        """Copy the model as it is now and freeze the copy, unless there is one or an adapter that can be switched off."""
        if self.frozen is None and not self.has_adapter:
            self.frozen = copy.deepcopy(self.causal_lm).eval().requires_grad_(False)

    def loss(self, objective: Any, batch: Batch) -> Tensor:
        """Return the mean of an objective over a batch, for a training loop of your own.

        Args:
            objective: An `Objective`. One that needs the reference model needs an adapter, or `keep_reference` after loading;
                one that needs a teacher needs `keep_teacher`.
            batch: Examples, or a Hugging Face batch on the model's device: ``input_ids``, ``attention_mask`` and ``labels``;
                for some objectives also ``alternate``, a batch with other answers, and ``reference_logp``, shape ``(B,)``.

        Returns:
            A scalar, with gradient.

        Raises:
            BatchError: If the batch lacks what the objective reads.

        Example:
            >>> loss = lm.loss(LogitMargin(), forget) + weight * lm.loss(NLL(), retain)  # doctest: +SKIP
        """
        if not isinstance(batch, Mapping):
            device = self.input_device
            batch = {key: value.to(device) for key, value in collate(batch, pad_id=0).items()}
        answers: list[Mapping[str, Any] | None] = [batch] if objective.reads != "alternate" else []
        if objective.reads != "answer":
            answers.append(batch.get("alternate"))

        tokens = []
        for answer in answers:
            if answer is None:
                raise BatchError(
                    f"{type(objective).__name__} reads alternate answers: give the batch an `alternate` batch."
                )
            index = objective.select(locate(answer, objective.alignment))
            if "reference_logp" in answer:
                index = index._replace(reference_logp=answer["reference_logp"][index.examples])
            others = {"reference": "reference" in objective.needs, "teacher": "teacher" in objective.needs}
            tokens.append(self(answer, lambda seen: seen, index=[index], layers=objective.layers, **others))
        if len(tokens) == 2:
            tokens[0] = tokens[0]._replace(alternate=tokens[1])
        values: Tensor = objective(self, tokens[0])
        return values.mean()

    def forward(
        self,
        batch: Mapping[str, Any],
        compute: Callable[..., Result],
        alignment: Alignment = "next_token",
        index: Sequence[TokenIndex] | None = None,
        reference: bool = False,
        layers: Collection[int] = (),
        teacher: bool = False,
    ) -> Result:
        """Run the trunk and hand the supervised tokens to ``compute``.

        Everything that touches weights happens inside this call: sharded strategies need it so, because the head's
        weight is whole only here.

        Args:
            batch: ``input_ids``, ``labels`` (−100 where not supervised), shape ``(B, T)``, and either
                ``attention_mask`` (padded rows) or ``position_ids`` that restart at 0 (several sequences packed in a row),
                with ``segments`` where these share their first tokens; see `packing.pack`.
            compute: Called with the batch's `SupervisedTokens`.
            alignment: See `LogitMargin`.
            index: Which tokens to hand to ``compute``, one argument each, on the batch's device; ``None`` for all of the
                batch.
            reference: Whether the reference model runs on the batch as well; see ``SupervisedTokens.reference``.
            layers: The layers whose output is to be kept, from 0; see ``SupervisedTokens.activations``.
            teacher: Whether the teacher runs on the batch as well; see ``SupervisedTokens.teacher``.

        Returns:
            What ``compute`` returns.

        Raises:
            BatchError: If the batch lacks ``input_ids`` or ``labels``, or is packed and the model lets packed sequences
                see each other.
            RuntimeError: If there is no reference model, or no teacher; see `keep_reference` and `keep_teacher`.
        """
        indices = [locate(batch, alignment)] if index is None else index
        if is_packed(batch) and not self.packs:
            raise BatchError(
                f"{type(self.causal_lm).__name__} lets sequences that are packed in one row see each other: give it padded "
                "rows, `input_ids` with `attention_mask`, and no `position_ids`."
            )
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        if is_packed(batch):
            inputs |= packed_arguments(self.causal_lm, batch)
        states, activations = self._run_trunk(self.causal_lm, inputs, layers)
        tokens = [token_index.gather(states, activations) for token_index in indices]
        if reference:
            with self._reference_model() as model:
                states, activations = self._run_trunk(model, inputs, layers)
            for i, token_index in enumerate(indices):
                tokens[i] = tokens[i]._replace(reference=token_index.gather(states, activations))
        if teacher:
            for i, seen in enumerate(self._run_teacher(batch, indices)):
                tokens[i] = tokens[i]._replace(teacher=seen)
        return compute(*tokens)

    def _run_trunk(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], layers: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run a model up to its head; return the last states, or logits, and the outputs of layers, ``(B · T, ·)`` each."""
        trunk: Any = model.base_model if self.linear_head else model
        with adding_to_gradient(model) if self.accumulate_head else nullcontext():
            output = trunk(**inputs, use_cache=False, output_hidden_states=bool(layers))
        states = (output.last_hidden_state if self.linear_head else output.logits).flatten(0, 1)
        # hidden_states[0] are the embeddings, so a layer's output is one further.
        return states, {layer: output.hidden_states[layer + 1].flatten(0, 1) for layer in layers}

    @contextmanager
    def _reference_model(self) -> Iterator[PreTrainedModel]:
        if self.frozen is None:
            with self.reference():
                yield self.causal_lm
        else:
            with evaluation_mode(self.frozen):
                yield self.frozen

    def _run_teacher(self, batch: Mapping[str, Any], indices: Sequence[TokenIndex]) -> Sequence[SupervisedTokens]:
        if self.teacher is None or not self.teacher.is_loaded:
            raise RuntimeError("there is no teacher: set `teacher` and call `keep_teacher()` after loading.")
        with evaluation_mode(self.teacher):
            seen: Sequence[SupervisedTokens] = self.teacher(batch, lambda *tokens: tokens, index=indices)
        return seen

    def logit_margin(self, tokens: SupervisedTokens) -> Tensor:
        """Logit margin of the distribution that predicts each token, shape ``(N,)``."""
        if not self.linear_head:
            return functional.logit_margin(tokens.hidden)
        return functional.linear_logit_margin(
            tokens.hidden,
            self._head.weight,
            self._head.bias,
            chunk_size=self.chunk_size,
            accumulate=self.accumulate_head,
            kernel=self.margin_kernel,
        )

    def token_logp(self, tokens: SupervisedTokens) -> Tensor:
        """Log-probability of each label, shape ``(N,)``, nats."""
        if not self.linear_head:
            return functional.token_logp(tokens.hidden, tokens.labels)
        return functional.linear_token_logp(
            tokens.hidden,
            self._head.weight,
            tokens.labels,
            self._head.bias,
            chunk_size=self.chunk_size,
            accumulate=self.accumulate_head,
        )

    def map_logits(self, function: Callable[..., Tensor], tokens: SupervisedTokens, *token_args: Tensor) -> Tensor:
        """Apply a token-wise function of the logits in chunks.

        Args:
            function: ``(logits (n, V), *token_args) -> (n,)`` or ``(n, k)``.
            tokens: The supervised tokens.
            token_args: Constants of shape ``(N, …)``, cut like the logits.

        Returns:
            Shape ``(N,)`` or ``(N, k)``.
        """
        if not self.linear_head:
            return function(functional.upcast(tokens.hidden), *token_args)
        return functional.map_logits(
            function, tokens.hidden, self._head.weight, self._head.bias, *token_args, chunk_size=self.chunk_size
        )

    def map_logit_pairs(
        self,
        function: Callable[..., Tensor],
        tokens: SupervisedTokens,
        *token_args: Tensor,
        other: OtherModel = "reference",
    ) -> Tensor:
        """Apply a token-wise function of this model's and another model's logits, in chunks of both.

        Args:
            function: ``(logits (n, V), other_logits (n, V), *token_args) -> (n,)`` or ``(n, k)``; no gradient flows into the
                other model.
            tokens: The supervised tokens, with ``reference`` or ``teacher``.
            token_args: As for `map_logits`.
            other: The other model.

        Returns:
            Shape ``(N,)`` or ``(N, k)``.

        Raises:
            RuntimeError: If the other model did not run.
        """
        seen = tokens.teacher if other == "teacher" else tokens.reference
        if seen is None:
            name = "teacher" if other == "teacher" else "reference model"
            raise RuntimeError(f'the {name} did not run on these tokens: the objective must need "{other}".')
        states = seen.hidden
        head = self._other_head(other)
        if head is None:
            return self.map_logits(
                lambda logits, other_logits, *args: function(logits, functional.upcast(other_logits), *args),
                tokens,
                states,
                *token_args,
            )
        dtype = functional.matmul_dtype(states, head.weight)
        weight, bias = head.weight.detach().to(dtype), None if head.bias is None else head.bias.detach().to(dtype)

        def with_other(logits: Tensor, states: Tensor, *args: Tensor) -> Tensor:
            return function(logits, functional.upcast(F.linear(states.to(dtype), weight, bias)), *args)

        return self.map_logits(with_other, tokens, states, *token_args)

    @property
    def _head(self) -> nn.Linear:
        head = self.causal_lm.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise TypeError(
                f"the head of {type(self.causal_lm).__name__} is a {type(head).__name__}, not a linear layer."
            )
        return head

    def _other_head(self, other: OtherModel) -> nn.Linear | None:
        """Return the head that another model's states go through; ``None`` where they are logits."""
        model = self.teacher if other == "teacher" and self.teacher is not None else self
        if not model.linear_head:
            return None
        if model is self and self.frozen is not None:
            return cast(nn.Linear, self.frozen.get_output_embeddings())
        return model._head
