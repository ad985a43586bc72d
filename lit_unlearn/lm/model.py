"""The language model as the rest of the package sees it: any Hugging Face causal LM, reduced to supervised tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_unlearn import functional
from lit_unlearn.lm import adapters
from lit_unlearn.lm.files import (
    check_export_target,
    check_model_directory,
    fingerprint,
    fresh_directory,
    load_pretrained,
)
from lit_unlearn.lm.head import has_linear_head, without_dropout
from lit_unlearn.lm.packing import is_packed, keeps_packed_apart
from lit_unlearn.lm.tokens import Alignment, Batch, SupervisedTokens, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Result = TypeVar("Result")


@final
class LanguageModel(nn.Module):
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

    model: PreTrainedModel | adapters.PeftModel | None
    frozen: PreTrainedModel | None

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        use_safetensors: bool = True,
        attn_implementation: str | None = None,
        chunk_size: int | None = None,
        adapter: dict[str, Any] | None = None,
        quantization: dict[str, Any] | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if (model is None) == (config is None):
            raise ValueError(
                "LanguageModel: give either `model` (a hub name or a local directory) or `config` (`model_type` and its "
                f"fields, for random weights); got model={model!r}, config={config!r}."
            )
        if config is not None and "model_type" not in config:
            raise ValueError(f"LanguageModel: `config` needs a `model_type` such as 'llama'; got {sorted(config)}.")
        if model is not None:
            check_model_directory(model, use_safetensors)
        self.name = model
        self.config = config
        self.chunk_size = chunk_size
        self._tokenizer_name = tokenizer or model
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._use_safetensors = use_safetensors
        self._attn_implementation = attn_implementation
        self._adapter = None if adapter is None else adapters.adapter_config(adapter)
        self._quantization = {} if quantization is None else adapters.quantization_config(quantization, model, adapter)
        self._activation_checkpointing = activation_checkpointing
        self._compile = compile
        self.model = None
        self.frozen = None  # the reference model, where it is not the model itself with its adapter off
        self.linear_head = False
        self.packs = False
        self.accumulate_head = (
            False  # whether losses add the head's gradient to its `.grad`, past autograd and its hooks
        )

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel | adapters.PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chunk_size: int | None = None,
    ) -> LanguageModel:
        """A `LanguageModel` around a transformers model that is loaded already; its dtype is left as it is.

        Args:
            model: Any causal LM of transformers, bare or in a ``peft.PeftModel``.
            tokenizer: Its tokenizer, needed for the package's own data modules and saved with the model.
            chunk_size: As for the class.
        """
        lm = cls(config={"model_type": model.config.model_type}, chunk_size=chunk_size)
        lm._tokenizer = tokenizer
        lm._adopt(model)
        return lm

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, loaded on first use; ``None`` if the model came without one."""
        if self._tokenizer is None and self._tokenizer_name is not None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_name, **self._hub)
            except (OSError, ValueError) as error:
                raise FileNotFoundError(
                    f"no tokenizer at '{self._tokenizer_name}': neither a local directory with tokenizer files nor a "
                    "name that the hub answers to. Set `model.lm.tokenizer`."
                ) from error
        return self._tokenizer

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self.model is not None

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained in place of the model; `model` is a ``peft.PeftModel`` then."""
        return adapters.is_adapted(self.model)

    @property
    def num_layers(self) -> int:
        """How many transformer blocks the loaded model has."""
        return int(self._loaded.config.get_text_config().num_hidden_layers)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within the block this is the reference model, bit for bit: no adapter, no dropout, no gradients.

        The reference is the base model. An adapter that was trained before, and is to be a part of it, must be merged first.

        Raises:
            RuntimeError: If there is no adapter to switch off.
        """
        if not self.has_adapter:
            raise RuntimeError(
                "the reference model is this model with its adapter switched off, and it has none: set `model.lm.adapter`, or "
                "call `keep_reference()` after loading, for a frozen copy."
            )
        with adapters.reference(cast("adapters.PeftModel", self.model)):
            yield

    def keep_reference(self) -> None:
        """Makes a frozen copy of the model as it is now, unless there is one or an adapter that can be switched off."""
        if self.frozen is None and not self.has_adapter:
            self.frozen = copy.deepcopy(self._loaded).eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """A digest of the reference model's weights and architecture: the same wherever and however often it is loaded.

        Of an adapted model only the base counts. Call it before the model is sharded.
        """
        return fingerprint(cast(nn.Module, self.model), trainable=not self.has_adapter)

    def load(self, dtype: torch.dtype) -> None:
        """Loads or builds the model in training mode and probes its head; does nothing the second time.

        Args:
            dtype: Of the parameters: what the Trainer's precision calls for.

        Raises:
            FileNotFoundError: If the model is neither local nor on the hub.
            ValueError: If weights are missing, the tokenizer has more entries than the model has embeddings, or the
                adapter could not be trained, switched off or exported.
        """
        if self.is_loaded:
            return
        if self.config is not None:
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.for_model(**{**self._tokenizer_fields(), **self.config})
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=self._attn_implementation)
        else:
            model = load_pretrained(
                str(self.name),
                self._use_safetensors,
                dtype=dtype,
                attn_implementation=self._attn_implementation,
                **self._hub,
                **self._quantization,
            )
            if getattr(model, "is_quantized", False) and self._adapter is None:
                raise ValueError(f"LanguageModel: '{self.name}' is quantised, and {adapters.UNTRAINABLE}")
        adapted = model if self._adapter is None else adapters.attach(model, self._adapter)
        if self._activation_checkpointing:
            adapters.checkpoint_activations(model)
        self._adopt(adapted)
        if self._compile:
            self._loaded.base_model.compile(dynamic=True)  # packed rows have a new length at every step

    def _tokenizer_fields(self) -> dict[str, Any]:
        if self.tokenizer is None:
            return {}
        ids = {f"{kind}_token_id": getattr(self.tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        return {"vocab_size": len(self.tokenizer), **ids}

    def _adopt(self, model: PreTrainedModel | adapters.PeftModel) -> None:
        adapters.check_adapter(model)
        embeddings = adapters.inner_model(model).get_input_embeddings().weight.shape[0]
        if self.tokenizer is not None and len(self.tokenizer) > embeddings:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} entries but the model embeds only {embeddings}: they do not "
                "belong together; set `model.lm.tokenizer` to the model's own."
            )
        self.model = model.train()  # from_pretrained leaves it in eval mode, and Lightning keeps it there
        self.linear_head = has_linear_head(self._loaded)
        self.packs = keeps_packed_apart(self._loaded)

    @property
    def _head(self) -> nn.Linear:
        head = self._loaded.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise TypeError(
                f"the head of {type(self._loaded).__name__} is a {type(head).__name__}, not a linear layer."
            )
        return head

    @property
    def _loaded(self) -> PreTrainedModel:
        if self.model is None:
            raise RuntimeError(
                "the model is not loaded: call `load(dtype)` first (Lightning does in `configure_model`)."
            )
        return adapters.inner_model(self.model)  # type: ignore[no-any-return]

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

    def save(self, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> Path:
        """Writes a Hugging Face model directory (safetensors and tokenizer); a half-written one never replaces a whole.

        With an adapter, the directory holds the merged model, and its ``adapter`` the adapter alone; where the base model
        is quantised, only the latter. Merging takes memory of the host for one copy of the adapted layers.

        Args:
            directory: Target; an earlier export there is replaced.
            state_dict: The state of `model`, whole, for strategies that shard it; ``None`` to read the model.

        Returns:
            The target as a path.

        Raises:
            FileExistsError: If the target holds something that is not a model directory.
        """
        target = Path(directory)
        check_export_target(target)
        with fresh_directory(target) as folder:
            if self.has_adapter:
                adapters.save_adapted(cast("adapters.PeftModel", self.model), folder, state_dict)
            else:
                self._loaded.save_pretrained(folder, state_dict=state_dict)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
        return target
