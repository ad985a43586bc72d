"""The language model as the rest of the package sees it: any Hugging Face causal LM, reduced to supervised tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, final

import torch
from torch import Tensor, nn

from lit_unlearn import functional
from lit_unlearn.lm.files import check_model_directory, fresh_directory
from lit_unlearn.lm.packing import check_packing, is_packed
from lit_unlearn.lm.tokens import Alignment, SupervisedTokens, locate

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
        chunk_size: Tokens (vocabulary entries for the margin) per chunk of the head; ``None`` for a memory budget.

    Raises:
        ValueError: If not exactly one of ``model`` and ``config`` is given.
        FileNotFoundError: If ``model`` is a local directory without weights.
    """

    model: PreTrainedModel | None

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
        self.model = None
        self.linear_head = False
        self._packing_checked = False

    @classmethod
    def wrap(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, chunk_size: int | None = None
    ) -> LanguageModel:
        """A `LanguageModel` around a transformers model that is loaded already; its dtype is left as it is.

        Args:
            model: Any causal LM of transformers.
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

    def load(self, dtype: torch.dtype) -> None:
        """Loads or builds the model in training mode and probes its head; does nothing the second time.

        Args:
            dtype: Of the parameters: what the Trainer's precision calls for.

        Raises:
            FileNotFoundError: If the model is neither local nor on the hub.
            ValueError: If weights are missing, or the tokenizer has more entries than the model has embeddings.
        """
        if self.is_loaded:
            return
        from transformers import AutoConfig, AutoModelForCausalLM

        if self.config is not None:
            config = AutoConfig.for_model(**{**self._tokenizer_fields(), **self.config})
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=self._attn_implementation)
        else:
            try:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    str(self.name),
                    dtype=dtype,
                    use_safetensors=self._use_safetensors or None,  # False would refuse safetensors
                    attn_implementation=self._attn_implementation,
                    output_loading_info=True,
                    **self._hub,
                )
            except OSError as error:
                raise FileNotFoundError(
                    f"no model at '{self.name}': neither a local directory nor a name that the hub answers to with "
                    f"{'safetensors' if self._use_safetensors else 'weights'}. The reason given: {error}"
                ) from error
            model, info = loaded
            if info["missing_keys"]:
                raise ValueError(
                    f"the model '{self.name}' is incomplete: it has no {', '.join(sorted(info['missing_keys'])[:3])} (of "
                    f"{len(info['missing_keys'])} missing), which would start at random. Get a whole copy of it."
                )
        self._adopt(model)

    def _tokenizer_fields(self) -> dict[str, Any]:
        if self.tokenizer is None:
            return {}
        ids = {f"{kind}_token_id": getattr(self.tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        return {"vocab_size": len(self.tokenizer), **ids}

    def _adopt(self, model: PreTrainedModel) -> None:
        embeddings = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        if self.tokenizer is not None and len(self.tokenizer) > embeddings:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} entries but the model embeds only {embeddings}: they do not "
                "belong together; set `model.lm.tokenizer` to the model's own."
            )
        self.model = model.train()  # from_pretrained leaves it in eval mode, and Lightning keeps it there
        self.linear_head = self._probe_head()

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
        return self.model

    @torch.no_grad()
    def _probe_head(self) -> bool:
        """Whether the logits are exactly the head applied to the trunk's last hidden state (no softcap, no scaling)."""
        model = self._loaded
        head, seen = model.get_output_embeddings(), dict[str, Tensor]()
        if type(head) is not nn.Linear:  # a subclass may compute anything from its weight
            return False
        hooks = [
            model.base_model.register_forward_hook(lambda _m, _i, out: seen.update(trunk=out[0])),
            head.register_forward_hook(lambda _m, args, _out: seen.update(into=args[0])),
        ]
        ids = torch.arange(1, 9, device=head.weight.device).remainder(head.weight.shape[0])[None]
        try:
            logits = model.eval()(input_ids=ids, use_cache=False).logits
            if "trunk" not in seen:  # OPT calls a part of its trunk, past the hook
                model.base_model(input_ids=ids, use_cache=False)
        finally:
            model.train()
            for hook in hooks:
                hook.remove()
        if len(seen) < 2 or not torch.equal(seen["trunk"], seen["into"]):
            return False
        return torch.equal(logits, nn.functional.linear(seen["into"], head.weight, head.bias).to(logits))

    def forward(
        self,
        batch: Mapping[str, Tensor],
        compute: Callable[[SupervisedTokens], Result],
        alignment: Alignment = "next_token",
    ) -> Result:
        """Runs the trunk and hands the supervised tokens to ``compute``.

        Everything that touches weights happens inside this call: sharded strategies need it so, because the head's
        weight is whole only here.

        Args:
            batch: ``input_ids``, ``labels`` (−100 where not supervised), shape ``(B, T)``, and either
                ``attention_mask`` (padded rows) or ``position_ids`` that restart at 0 (several sequences packed in a row).
            compute: Closure over the objectives.
            alignment: See `LogitMargin`.

        Returns:
            What ``compute`` returns.

        Raises:
            KeyError: If the batch lacks ``input_ids`` or ``labels``.
            ValueError: If rows are packed and the model lets packed sequences see each other.
        """
        located = locate(batch, alignment)
        if is_packed(batch) and not self._packing_checked:
            check_packing(self._loaded)
            self._packing_checked = True
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        if self.linear_head:
            states = self._loaded.base_model(**inputs, use_cache=False).last_hidden_state
        else:
            states = self._loaded(**inputs, use_cache=False).logits
        width = states.shape[-1]
        return compute(located._replace(hidden=states.reshape(-1, width)[located.hidden]))

    def logit_margin(self, tokens: SupervisedTokens) -> Tensor:
        """Logit margin of the distribution that predicts each token, shape ``(N,)``."""
        if not self.linear_head:
            return functional.logit_margin(tokens.hidden)
        return functional.linear_logit_margin(
            tokens.hidden, self._head.weight, self._head.bias, chunk_size=self.chunk_size
        )

    def token_logp(self, tokens: SupervisedTokens) -> Tensor:
        """Log-probability of each label, shape ``(N,)``, nats."""
        return self.map_logits(functional.token_logp, tokens, tokens.labels)

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

    def save(self, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> Path:
        """Writes a Hugging Face model directory (safetensors and tokenizer); a half-written one never replaces a whole.

        Args:
            directory: Target; an earlier export there is replaced.
            state_dict: The model's own weights, whole, for strategies that shard them; ``None`` to read the model.

        Returns:
            The target as a path.

        Raises:
            FileExistsError: If the target holds something that is not a model directory.
        """
        target = Path(directory)
        if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file()):
            raise FileExistsError(
                f"'{target}' is not empty and not a model directory: choose another place to export to."
            )
        with fresh_directory(target) as folder:
            self._loaded.save_pretrained(folder, state_dict=state_dict)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
        return target
