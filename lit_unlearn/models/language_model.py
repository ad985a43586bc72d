"""The language model as the rest of the package sees it: any Hugging Face causal LM, reduced to supervised tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast, final

from torch import Tensor, nn
from torch.nn import functional as F

from lit_unlearn import functional
from lit_unlearn.models.loading import LoadedModel
from lit_unlearn.models.packing import is_packed
from lit_unlearn.models.probing import without_dropout
from lit_unlearn.models.tokens import Alignment, Batch, SupervisedTokens, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = TypeVar("Result")


@final
class LanguageModel(LoadedModel):
    """A causal language model by hub name, by local path, or with random weights from a config.

    Weights are loaded by `load`, which Lightning's ``configure_model`` calls once the precision is known: loading in
    ``__init__`` would train a bfloat16 checkpoint with bfloat16 Adam states even at ``32-true``.

    Args:
        model: Hub name or local directory, as for ``AutoModelForCausalLM.from_pretrained``.
        config: Instead of ``model``: ``model_type`` and the fields of its config, for a model with random weights.
            ``vocab_size`` and the special token ids default to the tokenizer's.
        tokenizer: Hub name or local directory of the tokenizer; ``None`` for the one that comes with ``model``.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code that comes with the model may run.
        use_safetensors: Whether to insist on safetensors; other weight files can run code when loaded.
        attn_implementation: Passed to transformers; ``None`` for its default.
        chunk_size: Vocabulary entries (tokens for `map_logits`) per chunk of the head; ``None`` for a memory budget.
        adapter: Fields of a peft config, such as ``r`` and ``lora_alpha``: the adapter is trained in place of the model.
            ``peft_type`` defaults to LoRA, ``target_modules`` to every linear layer but the head.
        quantization: Fields of a transformers quantisation config, such as ``load_in_4bit``; needs an ``adapter``.
        activation_checkpointing: Whether the backward pass computes the activations again, which saves memory.
        compile: Whether ``torch.compile`` makes kernels of the trunk, which takes a minute or more at the first step.

    Raises:
        ValueError: If not exactly one of ``model`` and ``config`` is given, or an adapter or a quantisation is unknown
            or could not be trained.
        FileNotFoundError: If ``model`` is a local directory without weights.
    """

    def forward(
        self,
        batch: Batch,
        compute: Callable[..., Result],
        alignment: Alignment = "next_token",
        located: Sequence[SupervisedTokens] | None = None,
        reference: bool = False,
        layers: Collection[int] = (),
    ) -> Result:
        """Runs the trunk and hands the supervised tokens to ``compute``.

        Everything that touches weights happens inside this call: sharded strategies need it so, because the head's
        weight is whole only here.

        Args:
            batch: ``input_ids``, ``labels`` (−100 where not supervised), shape ``(B, T)``, and either
                ``attention_mask`` (padded rows) or ``position_ids`` that restart at 0 (several sequences packed in a row).
            compute: Closure over the objectives, called with the batch's `SupervisedTokens`.
            alignment: See `LogitMargin`.
            located: Which tokens to hand to ``compute``, one argument each, where `locate` was called before; ``None``
                for all of the batch.
            reference: Whether the reference model runs on the batch as well; see ``SupervisedTokens.reference``.
            layers: The layers whose output is to be kept, from 0; see ``SupervisedTokens.activations``.

        Returns:
            What ``compute`` returns.

        Raises:
            KeyError: If the batch lacks ``input_ids`` or ``labels``.
            ValueError: If rows are packed and the model lets packed sequences see each other.
            RuntimeError: If there is no reference model; see `keep_reference`.
        """
        located = [locate(batch, alignment)] if located is None else located
        if is_packed(batch) and not self.packs:
            raise ValueError(
                f"{type(self._loaded).__name__} lets sequences that are packed in one row see each other: give it padded "
                "rows, `input_ids` with `attention_mask`, and no `position_ids`."
            )
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        gather = self._run(self._loaded, inputs, layers)
        if not reference:
            return compute(*(gather(tokens) for tokens in located))
        with self._reference_model() as model:
            gather_reference = self._run(model, inputs, layers)
        return compute(*(gather(tokens)._replace(reference=gather_reference(tokens)) for tokens in located))

    def _run(
        self, model: PreTrainedModel, inputs: Batch, layers: Collection[int]
    ) -> Callable[[SupervisedTokens], SupervisedTokens]:
        """Runs a model; returns what turns indices into states."""
        trunk: Any = model.base_model if self.linear_head else model
        output = trunk(**inputs, use_cache=False, output_hidden_states=bool(layers))
        states = (output.last_hidden_state if self.linear_head else output.logits).flatten(0, 1)
        kept = {layer: output.hidden_states[layer + 1].flatten(0, 1) for layer in layers}  # [0] is the embeddings

        def gather(tokens: SupervisedTokens) -> SupervisedTokens:
            return tokens._replace(
                hidden=states[tokens.hidden],
                activations={layer: state[tokens.hidden] for layer, state in kept.items()},
                alternate=None if tokens.alternate is None else gather(tokens.alternate),
            )

        return gather

    @contextmanager
    def _reference_model(self) -> Iterator[PreTrainedModel]:
        if self.frozen is None:
            with self.reference():
                yield self._loaded
        else:
            with without_dropout(self.frozen):
                yield self.frozen

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
        """Applies a token-wise function of the logits in chunks.

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

    def map_logit_pairs(self, function: Callable[..., Tensor], tokens: SupervisedTokens, *token_args: Tensor) -> Tensor:
        """Applies a token-wise function of this model's and the reference model's logits, in chunks of both.

        Args:
            function: ``(logits (n, V), reference_logits (n, V), *token_args) -> (n,)`` or ``(n, k)``; no gradient flows
                into the reference model.
            tokens: The supervised tokens, with ``reference``.
            token_args: As for `map_logits`.

        Returns:
            Shape ``(N,)`` or ``(N, k)``.

        Raises:
            RuntimeError: If the reference model did not run.
        """
        if tokens.reference is None:
            raise RuntimeError('the reference model did not run on these tokens: the objective must need "reference".')
        states = tokens.reference.hidden
        if not self.linear_head:
            return function(functional.upcast(tokens.hidden), functional.upcast(states), *token_args)
        head = self._head if self.frozen is None else cast(nn.Linear, self.frozen.get_output_embeddings())
        dtype = functional.matmul_dtype(states, head.weight)
        weight, bias = head.weight.detach().to(dtype), None if head.bias is None else head.bias.detach().to(dtype)

        def with_reference(logits: Tensor, states: Tensor, *args: Tensor) -> Tensor:
            return function(logits, functional.upcast(F.linear(states.to(dtype), weight, bias)), *args)

        return self.map_logits(with_reference, tokens, states, *token_args)
