"""From a name, a folder or a config to a model in memory, with its tokenizer and adapter; and back to a folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lit_unlearn.models import adapters
from lit_unlearn.models.packing import keeps_packed_apart
from lit_unlearn.models.probing import has_linear_head
from lit_unlearn.models.weight_files import (
    check_model_directory,
    fingerprint,
    load_pretrained,
    weight_files,
    weight_folder,
    without_bars,
)
from lit_unlearn.utils.io import atomic_directory, check_export_target, file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self


class LoadedModel(nn.Module):
    """What `LanguageModel` is made from, and what becomes of it; its arguments are described there."""

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
    ) -> Self:
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

    def origin(self) -> dict[str, Any]:
        """Where the loaded weights came from, and what adapter was put on them, in plain types.

        Weights are known by the sha256 of their files, which anybody can check without this package and whatever the dtype,
        unlike `fingerprint`; those of a hub name by their commit as well. Reads the whole files.

        Returns:
            ``name``, ``architecture``, ``revision`` as asked for, ``commit``, ``weights`` (sha256 by file) and ``adapter``
            (``peft_type`` and the fields that are not its defaults); ``None`` or empty where there is none.
        """
        revision = self._hub["revision"]
        folder, commit = (None, None) if self.name is None else weight_folder(self.name, cast("str | None", revision))
        files = [] if folder is None else weight_files(folder, self._use_safetensors)
        return {
            "name": self.name or self._loaded.config.name_or_path or None,
            "architecture": type(self._loaded).__name__,
            "revision": revision,
            "commit": commit,
            "weights": {file.name: file_digest(file) for file in files},
            "adapter": _adapter_settings(self.model) if self.has_adapter else None,
        }

    def save(
        self,
        directory: str | Path,
        state_dict: dict[str, Tensor] | None = None,
        finish: Callable[[Path], None] | None = None,
    ) -> Path:
        """Writes a Hugging Face model directory (safetensors and tokenizer); a half-written one never replaces a whole.

        With an adapter, the directory holds the merged model, and its ``adapter`` the adapter alone; where the base model
        is quantised, only the latter. Merging takes memory of the host for one copy of the adapted layers.

        Args:
            directory: Target; an earlier export there is replaced.
            state_dict: The state of `model`, whole, for strategies that shard it; ``None`` to read the model.
            finish: Adds files of its own; called with the folder before it takes the target's place.

        Returns:
            The target as a path.

        Raises:
            FileExistsError: If the target holds something that is not a model directory.
        """
        target = Path(directory)
        check_export_target(target)
        with atomic_directory(target) as folder, without_bars():
            if self.has_adapter:
                adapters.save_adapted(cast("adapters.PeftModel", self.model), folder, state_dict)
            else:
                self._loaded.save_pretrained(folder, state_dict=state_dict)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            if finish is not None:
                finish(folder)
        return target


def _adapter_settings(model: Any) -> dict[str, Any]:
    """What `adapter_config` was given, as far as it is not the default, from the adapter in use."""
    config = next(iter(model.peft_config.values()))
    place = ("base_model_name_or_path", "inference_mode", "revision", "peft_version")  # of no account for training
    defaults = vars(type(config)())
    changed = {key: value for key, value in vars(config).items() if key not in place and value != defaults.get(key)}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in changed.items()}
    return {"peft_type": config.peft_type.value, **plain}
