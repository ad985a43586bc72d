"""The language model as the rest of the package sees it: any Hugging Face causal LM, reduced to supervised tokens."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, final, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_unlearn import functional
from lit_unlearn.data.encoding import encode
from lit_unlearn.data.encoding_settings import check_tokenizer
from lit_unlearn.data.example import collate, prompt_of
from lit_unlearn.data.templates import Chat, check_template
from lit_unlearn.errors import BatchError, ConfigError, LitUnlearnError, ModelError
from lit_unlearn.models import adapter_configs, adapters, generation, loading, merging
from lit_unlearn.models.activation_checkpointing import checkpoint_activations
from lit_unlearn.models.evaluation_mode import evaluation_mode
from lit_unlearn.models.files import ModelFiles
from lit_unlearn.models.older_keys import write_older_keys
from lit_unlearn.models.packing import is_packed, separates_packed_sequences
from lit_unlearn.models.probing import has_linear_head
from lit_unlearn.models.sampling import Sampling
from lit_unlearn.models.tokens import Alignment, Batch, OtherModel, SupervisedTokens, TokenIndex, locate
from lit_unlearn.models.weights import TemporaryValues, changes_values, checksum, convert
from lit_unlearn.utils.folders import check_export_target, replace_folder
from lit_unlearn.utils.io import expand_home, expand_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self

Result = TypeVar("Result")


@final
class LanguageModel(nn.Module):
    """A causal language model by hub name, by local path, or with random weights from a config.

    Weights are loaded by `load`, which Lightning's ``configure_model`` calls once the precision is known: loading in
    ``__init__`` would train a bfloat16 checkpoint with bfloat16 Adam states even at ``32-true``.

    Args:
        model: Hub name or local directory, as for ``AutoModelForCausalLM.from_pretrained``; or the local directory of a
            peft adapter, whose base model is loaded with it.
        config: Instead of ``model``: ``model_type`` and the fields of its config, for a model with random weights.
            ``vocab_size`` and the special token ids default to the tokenizer's.
        tokenizer: Hub name or local directory of the tokenizer; ``None`` for the one that comes with ``model``.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code that comes with the model may run.
        use_safetensors: Whether to insist on safetensors; other weight files can run code when loaded.
        gguf_file: Name of the GGUF file in ``model`` that has the weights. They are loaded as floats, and exported as
            safetensors. The tokenizer is the file's, unless ``tokenizer`` is given.
        attn_implementation: Passed to transformers; ``None`` for its default.
        chunk_size: Vocabulary entries (tokens for `map_logits`) per chunk of the head; ``None`` for a memory budget.
        adapter: Fields of a peft config, such as ``r`` and ``lora_alpha``: the adapter is trained in place of the model.
            ``peft_type`` defaults to LoRA, ``target_modules`` to every linear layer but the head.
        merge_adapter: If ``model`` is an adapter: whether it is merged into its base model, which then is trained, with a new
            ``adapter`` if one is set; by default the adapter itself goes on being trained.
        quantization: Fields of a transformers quantisation config, such as ``load_in_4bit``; needs an ``adapter``.
        activation_checkpointing: Whether the backward pass computes the activations again, which saves memory.
        compile: Whether ``torch.compile`` makes kernels of the trunk, which takes a minute or more at the first step.
        teacher: Hub name or local directory of a model with the same tokenizer that was not trained on the forget set, such
            as the base model. It is loaded only where an objective needs it, and never trained, saved or exported.

    Raises:
        ConfigError: If not exactly one of ``model`` and ``config`` is given, settings exclude each other, or an adapter or a
            quantisation is unknown or could not be trained.
        MissingFileError: If ``model`` is a local directory without weights, or an adapter whose base model is not there.
        ModelError: If its files are damaged or git-lfs pointers, or the package that reads GGUF is not installed.
    """

    model: PreTrainedModel | adapters.PeftModel | None
    frozen: PreTrainedModel | None
    teacher: LanguageModel | None

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        use_safetensors: bool = True,
        gguf_file: str | None = None,
        attn_implementation: str | None = None,
        chunk_size: int | None = None,
        adapter: dict[str, Any] | None = None,
        merge_adapter: bool = False,
        quantization: dict[str, Any] | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        teacher: str | None = None,
    ) -> None:
        super().__init__()
        model = None if model is None else expand_home(model)
        tokenizer = None if tokenizer is None else expand_home(tokenizer)
        if (model is None) == (config is None):
            message = (
                "give either `model` (a hub name or a local directory) or `config` (`model_type` and its fields, for random "
                f"weights); got model={model!r}, config={config!r}."
            )
            raise ConfigError(message, owner=self, argument="model")
        if config is not None and "model_type" not in config:
            message = f"`config` needs a `model_type` such as 'llama'; got {sorted(config)}."
            raise ConfigError(message, owner=self, argument="config")
        self.files: ModelFiles | None = None
        if model is not None:
            self.files = loading.locate_model(model, revision, use_safetensors, gguf_file, owner=self)
        self.name = None if self.files is None else self.files.name
        self.config = config
        self.chunk_size = chunk_size
        self.tokenizer_name = tokenizer or self._find_tokenizer()
        self._check_source(gguf_file, adapter, merge_adapter, quantization)
        self._merge_adapter = merge_adapter
        self.hub_settings = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._attn_implementation = attn_implementation
        self._adapter = None if adapter is None else adapter_configs.adapter_config(adapter, owner=self)
        self._quantization: dict[str, Any] = {}
        if quantization is not None:
            trains_adapter = adapter is not None or self._trains_saved_adapter
            self._quantization = adapter_configs.quantization_config(quantization, model, trains_adapter, owner=self)
        self._activation_checkpointing = activation_checkpointing
        self._compile = compile
        self.teacher = None
        if teacher is not None:
            with _naming_teacher(teacher, owner=self):
                self.teacher = LanguageModel(
                    teacher, trust_remote_code=trust_remote_code, use_safetensors=use_safetensors
                )

        self.model = None
        self.files_dtype: torch.dtype | None = None
        self._temporary_values: TemporaryValues | None = None
        self._base_checksum: dict[str, str] | None = None
        self._has_random_weights = False
        # The reference model, unless it is `model` itself with its adapter switched off.
        self.frozen = None
        # Found by probing once the weights are loaded.
        self.linear_head = False
        self.packs = False
        # Whether losses add the head's gradient directly to its `.grad`, without autograd and its hooks.
        self.accumulate_head = False

    def _check_source(
        self,
        gguf_file: str | None,
        adapter: Mapping[str, Any] | None,
        merge_adapter: bool,
        quantization: Mapping[str, Any] | None,
    ) -> None:
        """Raise if settings of where the weights come from exclude each other."""
        is_gguf = self.files is not None and self.files.gguf_file is not None
        is_saved_adapter = self.files is not None and self.files.base is not None
        message, argument = None, "merge_adapter"
        if gguf_file is not None and self.files is None:
            message, argument = "`gguf_file` is the name of a file in `model`: give both, and no `config`.", "gguf_file"
        elif is_gguf and quantization is not None:
            message = (
                "`quantization` cannot round a model again that is loaded from a GGUF file: load it without, save it, and give "
                "the folder as `model`."
            )
            argument = "quantization"
        elif merge_adapter and not is_saved_adapter:
            message = f"`merge_adapter` needs the folder of a peft adapter as `model`, but '{self.name}' is none."
        elif merge_adapter and quantization is not None:
            message = "an adapter cannot be merged into quantised weights: leave out `merge_adapter` or `quantization`."
        elif is_saved_adapter and adapter is not None and not merge_adapter:
            message = (
                f"'{self.name}' is an adapter, which goes on being trained: leave out `adapter`, or set `merge_adapter` to true "
                "to merge it first and train a new one."
            )
        if message is not None:
            raise ConfigError(message, owner=self, argument=argument)

    @property
    def _trains_saved_adapter(self) -> bool:
        return self.files is not None and self.files.base is not None and not self._merge_adapter

    def _find_tokenizer(self) -> str | None:
        """Return where the model's own tokenizer is: people save it with an adapter, or leave it with the base model."""
        if self.files is None or self.files.base is None or loading.has_tokenizer(Path(self.files.name)):
            return self.name
        return self.files.base.name

    @property
    def inputs(self) -> list[str]:
        """Names of models and tokenizers that are read, whose folders are never written."""
        names = [self.name, self.tokenizer_name]
        if self.files is not None and self.files.base is not None:
            names.append(self.files.base.name)
        if self.teacher is not None:
            names.extend(self.teacher.inputs)
        return [name for name in names if name is not None]

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel | adapters.PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chunk_size: int | None = None,
    ) -> Self:
        """Return a `LanguageModel` around a transformers model that is loaded already; dtype and device stay.

        Args:
            model: Any causal LM of transformers, bare or in a ``peft.PeftModel``.
            tokenizer: Its tokenizer, needed for the package's own data modules and saved with the model.
            chunk_size: As for the class.
        """
        # The config only passes the check of the arguments: a model that is in memory is never built from it.
        lm = cls(config={"model_type": model.config.model_type}, chunk_size=chunk_size)
        lm._tokenizer = tokenizer
        lm._adopt(model)
        return lm

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, loaded on first use; ``None`` if the model came without one."""
        if self._tokenizer is None and self.tokenizer_name is not None:
            settings: dict[str, Any] = dict(self.hub_settings)
            if self.files is not None and self.files.gguf_file is not None and self.tokenizer_name == self.name:
                settings["gguf_file"] = self.files.gguf_file
            self._tokenizer = loading.load_tokenizer(self.tokenizer_name, owner=self, **settings)
        return self._tokenizer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the model; Lightning's 16-bit precisions would round the adapter along with the base model."""
        super()._apply(adapters.keep_wide(self.model, fn), recurse)  # type: ignore[no-untyped-call]
        return self

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
    def has_adapter(self) -> bool:
        """True if an adapter is trained in place of the model; `model` is a ``peft.PeftModel`` then."""
        return adapters.is_adapted(self.model)

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks of the loaded model."""
        return int(self.causal_lm.config.get_text_config().num_hidden_layers)

    def load(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Load or build the model in training mode and probe its head; does nothing the second time.

        Args:
            dtype: Of the parameters. ``None`` for float32 on the CPU, and on an accelerator for the checkpoint's own.
            device: Where the weights go; ``None`` for an accelerator if there is one. A quantised model is left where
                transformers puts it.

        Raises:
            MissingFileError: If the model is neither local nor on the hub.
            ModelError: If weights are missing, the tokenizer has more entries than the model has embeddings, or the
                adapter could not be trained, switched off or exported.
        """
        if self.is_loaded:
            return
        device = loading.default_device() if device is None else torch.device(device)

        if self.files is None:
            dtype = dtype or torch.float32
            self._has_random_weights = True
            fields = cast("dict[str, Any]", self.config)
            model = loading.build_from_config(fields, self.tokenizer, dtype, self._attn_implementation, owner=self)
        else:
            model = loading.load_model(
                self.files,
                owner=self,
                dtype=dtype or (torch.float32 if device.type == "cpu" else "auto"),
                attn_implementation=self._attn_implementation,
                trust_remote_code=self.hub_settings["trust_remote_code"],
                **self._quantization,
            )
            self.files_dtype = self.files.dtype()
        is_quantized = getattr(model, "is_quantized", False)
        if is_quantized and self._adapter is None and not self._trains_saved_adapter:
            raise ModelError(
                f"'{self.name}' is quantised, and {adapter_configs.UNTRAINABLE}", owner=self, argument="adapter"
            )
        # bitsandbytes packs its integers on the device that computes with them, and some kinds refuse to be moved.
        if not is_quantized:
            cast(nn.Module, model).to(device)

        if self._merge_adapter:
            model = merging.merge_adapter(model, str(self.name), owner=self)
        adapted: PreTrainedModel | adapters.PeftModel = model
        if self._trains_saved_adapter:
            adapted = adapters.load_adapter(model, str(self.name), owner=self)
        elif self._adapter is not None:
            adapted = adapters.attach_adapter(model, self._adapter)
        if self._activation_checkpointing:
            checkpoint_activations(model)
        self._adopt(adapted)
        if self._compile:
            # Packed rows have a new length at every step, and each would be compiled anew. Only the trunk: losses read the
            # head's weight directly.
            self.causal_lm.base_model.compile(dynamic=True)

    def _adopt(self, model: PreTrainedModel | adapters.PeftModel) -> None:
        """Check a model, keep it in training mode, and find out what its head and its attention masks can do."""
        adapters.check_adapter(model)
        embeddings = adapters.inner_model(model).get_input_embeddings().weight.shape[0]
        if self.tokenizer is not None and len(self.tokenizer) > embeddings:
            message = (
                f"the tokenizer has {len(self.tokenizer)} entries but the model embeds only {embeddings}: they do not belong "
                "together; set `tokenizer` to the model's own."
            )
            raise ModelError(message, owner=self, argument="tokenizer")
        # from_pretrained leaves a model in evaluation mode, and Lightning would keep it there.
        self.model = model.train()
        self.linear_head = has_linear_head(self.causal_lm)
        self.packs = separates_packed_sequences(self.causal_lm)

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
        if self._temporary_values is not None:
            # The adapter is off, because the base has its sum with the adapter: see `as_exported`.
            with self._temporary_values.taken_out(), adapters.adapter_as_before(model, is_switched_off=True):
                yield
            return
        with adapters.adapter_as_before(model):
            yield

    def keep_reference(self) -> None:
        """Copy the model as it is now and freeze the copy, unless there is one or an adapter that can be switched off."""
        if self.frozen is None and not self.has_adapter:
            self.frozen = copy.deepcopy(self.causal_lm).eval().requires_grad_(False)

    def keep_teacher(self, model: PreTrainedModel | None = None) -> None:
        """Load the model named ``teacher``, unless it is loaded, and freeze it. Call it before the model is sharded.

        Args:
            model: A model in memory to take instead, such as that of another `LanguageModel`.

        Raises:
            ConfigError: If there is no teacher.
            ModelError: If it has another tokenizer or vocabulary than this model, or cannot be loaded.
        """
        if model is not None:
            self.teacher = LanguageModel.wrap(model, self.tokenizer)
        if self.teacher is None:
            message = "an objective needs a teacher: set `teacher` to a model that never saw the forget set, such as the base model."
            raise ConfigError(message, owner=self, argument="teacher")
        if not self.teacher.is_loaded:
            with _naming_teacher(str(self.teacher.name), owner=self):
                self.teacher.load(self.causal_lm.dtype, self.causal_lm.device)
        self._check_teacher(self.teacher)
        self.teacher.eval().requires_grad_(False)
        # It reads the same passes.
        self.packs = self.packs and self.teacher.packs

    def _check_teacher(self, teacher: LanguageModel) -> None:
        """Raise unless each token id, in the rows and in the logits, means the same to both models."""
        difference = None
        tokenizer, other = self.tokenizer, teacher.tokenizer
        if tokenizer is not None and other is not None and tokenizer.get_vocab() != other.get_vocab():
            difference = f"has another tokenizer ({len(other)} entries, here {len(tokenizer)})"
        there, here = (len(cast(nn.Linear, lm.causal_lm.get_output_embeddings()).weight) for lm in (teacher, self))
        if there != here:
            difference = f"gives {there} logits, this model {here}"
        if difference is not None:
            raise ModelError(
                f"the teacher '{teacher.name}' cannot be compared with this model token by token: it {difference}. Set `teacher` to "
                "the model that this one was fine-tuned from.",
                owner=self,
                argument="teacher",
            )

    def fingerprint(self) -> str:
        """Return a digest of the reference model's weights and architecture, the same wherever it is loaded.

        Of an adapted model only the base counts. Call it before the model is sharded.
        """
        return loading.fingerprint(cast(nn.Module, self.model), trainable=not self.has_adapter)

    def checksum(self) -> str:
        """Return a checksum of the weights as they are now, with an adapter of those that are trained.

        A collective call if the model is sharded.
        """
        model = cast(nn.Module, self.model)
        if not self.has_adapter:
            return checksum(self.causal_lm.state_dict().items())
        # The base does not change; and an export may load it in another dtype.
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return checksum((name, tensor) for name, tensor in model.state_dict().items() if name in trained)

    def base_checksum(self) -> dict[str, str]:
        """Return what the base model is known by in checkpoints: a checksum, and the dtype that it was loaded in.

        Of a model made from a config it is a digest of the config: the checkpoint has all of its weights, and where they began
        does not matter. Computed at the first call, which must come before training and sharding.
        """
        if self._base_checksum is None:
            if self._has_random_weights and not self.has_adapter:
                fields = json.dumps(self.config, sort_keys=True, default=str)
                self._base_checksum = {"config": hashlib.sha256(fields.encode()).hexdigest()[:16]}
            else:
                # Of most numbers: a quantised model has a few dtypes, and a saved adapter is wider than its base model.
                dtypes: Counter[torch.dtype] = Counter()
                for _, tensor in self._base_weights():
                    dtypes[tensor.dtype] += tensor.numel()
                dtype = dtypes.most_common(1)[0][0]
                self._base_checksum = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "weights": checksum(self._base_weights(), dtype),
                }
        return self._base_checksum

    def has_base(self, base: Mapping[str, str]) -> bool:
        """Return whether the base model is the one that `base_checksum` returned in another run.

        The dtypes may differ: the values are compared in the one that the other run had loaded.
        """
        known = self.base_checksum()
        if "config" in base or "config" in known or known["dtype"] == base["dtype"]:
            return known == base
        return checksum(self._base_weights(), getattr(torch, base["dtype"])) == base["weights"]

    def _base_weights(self) -> list[tuple[str, Tensor]]:
        """Return the floating-point parameters that are not trained; quantised integers depend on the device."""
        weights = []
        for name, parameter in cast(nn.Module, self.model).named_parameters():
            is_trained = self.has_adapter and parameter.requires_grad
            if parameter.is_floating_point() and not is_trained:
                weights.append((name, parameter.detach()))
        return weights

    def is_rounded_by(self, dtype: torch.dtype | None = None) -> bool:
        """Return whether an export in ``dtype`` computes something else than the model in memory.

        Args:
            dtype: ``None`` for that of the base model's files.
        """
        dtype = dtype or self.files_dtype
        if dtype is None or getattr(self.causal_lm, "is_quantized", False):
            return False
        if self.has_adapter and dtype not in (torch.float32, torch.float64):
            # Small changes are lost where they are added to large weights.
            return True
        return changes_values(self.causal_lm.state_dict().values(), dtype)

    @contextmanager
    def as_exported(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Give the model within the block the weights that an export in ``dtype`` has: rounded and, with an adapter, merged.

        Takes memory for a copy of the weights, and nothing where the export has the very weights of the model.

        Args:
            dtype: ``None`` for that of the base model's files.

        Raises:
            RuntimeError: If the model is sharded and has an adapter.
        """
        dtype = dtype or self.files_dtype
        if dtype is None or self._temporary_values is not None or not self.is_rounded_by(dtype):
            yield
            return
        with ExitStack() as stack:
            if self.has_adapter:
                model = cast("adapters.PeftModel", self.model)
                merged = merging.merged_state(model, model.state_dict(), dtype)
                tensors = merging.base_tensors(model)
                values = TemporaryValues(list(tensors.values()), [merged[name] for name in tensors], dtype)
                stack.enter_context(adapters.adapter_switched_off(model))
            else:
                floats = [tensor for tensor in self.causal_lm.state_dict().values() if tensor.is_floating_point()]
                values = TemporaryValues(floats, None, dtype)
            values.put_in()
            self._temporary_values = values
            try:
                yield
            finally:
                self._temporary_values = None
                # FSDP2 may hold whole weights that it has gathered; asking for the state makes it let go of them.
                cast(nn.Module, self.model).state_dict()
                values.take_out()

    def origin(self) -> dict[str, Any]:
        """Return where the loaded weights came from, and which adapter was put on them, in plain types.

        Weights are known by the sha256 of their files, which anybody can check without this package and whatever the dtype,
        unlike `fingerprint`; those of a hub name by their commit as well. Reads the files completely.

        Returns:
            ``name``, ``architecture``, ``revision`` as asked for, ``commit``, ``weights`` (sha256 by file), ``adapter``
            (``peft_type`` and the fields that are not its defaults) and, if the weights are an adapter's, ``base`` (``name``,
            ``revision``, ``commit`` and ``weights`` of its base model, and whether it was ``merged``); ``None`` or empty where
            there is none.
        """
        files = self.files
        base: dict[str, Any] | None = None
        if files is not None and files.base is not None:
            base = {"name": files.base.name, "revision": files.base.revision, **files.base.describe()}
            base["merged"] = self._merge_adapter
        return {
            "name": self.name or self.causal_lm.config.name_or_path or None,
            "architecture": type(self.causal_lm).__name__,
            "revision": self.hub_settings["revision"],
            **({"commit": None, "weights": {}} if files is None else files.describe()),
            "adapter": adapter_configs.adapter_settings(self.model) if self.has_adapter else None,
            "base": base,
        }

    def save(
        self,
        directory: str | Path,
        state_dict: dict[str, Tensor] | None = None,
        finish: Callable[[Path], None] | None = None,
        dtype: torch.dtype | None = None,
        chat_template: str | None = None,
    ) -> Path:
        """Write a Hugging Face model directory (safetensors and tokenizer), and list its files in ``files.sha256``.

        With an adapter, the directory holds the merged model, and its ``adapter`` the adapter alone; where the base model
        is quantised, only the latter. Merging takes host memory for one copy of the adapted layers.

        Args:
            directory: Target: an empty folder, none, or one that this package wrote and that is unchanged, which is replaced.
                It may be neither the folder that the model came from, nor the working directory, nor one above these.
            state_dict: The gathered state of `model`, for strategies that shard it; ``None`` to read the model.
            finish: Adds further files; called with the folder before it takes the target's place.
            dtype: Of the weights; ``None`` for that of the base model's files, or of a model that has none as it is.
            chat_template: Goes into the tokenizer in the place of its own: whoever loads the folder is to ask in the prompt of
                training. ``None`` leaves the tokenizer as it is.

        Returns:
            The target as a path.

        Raises:
            OccupiedError: If the target must not be replaced.
            OutputError: If it cannot be written; what was there before stays.
        """
        target, inputs = expand_path(directory), self.inputs
        # Before the minutes that merging and writing may take.
        check_export_target(target, inputs)
        with replace_folder(target, inputs) as folder, loading.writing_weights(target), loading.hide_progress_bars():
            self._save_weights(folder, state_dict, dtype or self.files_dtype)
            if self.tokenizer is not None:
                tokenizer = copy.copy(self.tokenizer)
                tokenizer.chat_template = chat_template or tokenizer.chat_template
                tokenizer.save_pretrained(folder)
            # Before `finish`, which takes the digests of the files.
            write_older_keys(folder)
            if finish is not None:
                finish(folder)
        return target

    def _save_weights(self, folder: Path, state: dict[str, Tensor] | None, dtype: torch.dtype | None) -> None:
        if self.has_adapter:
            merging.save_adapted(cast("adapters.PeftModel", self.model), folder, state, dtype)
        else:
            if dtype is not None:
                state = convert(self.causal_lm.state_dict() if state is None else state, dtype)
            self.causal_lm.save_pretrained(folder, state_dict=state)
        # Where only the adapter could be saved, there is no config of a model.
        if dtype is not None and (folder / "config.json").is_file():
            loading.write_dtype(folder, dtype)

    @overload
    def generate(
        self,
        questions: Sequence[str],
        *,
        template: str | None = ...,
        chat: Chat | None = ...,
        max_new_tokens: int = ...,
        allow_special_tokens: bool = ...,
        sampling: None = ...,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        questions: Sequence[str],
        *,
        template: str | None = ...,
        chat: Chat | None = ...,
        max_new_tokens: int = ...,
        allow_special_tokens: bool = ...,
        sampling: Sampling,
    ) -> list[list[str]]: ...

    def generate(
        self,
        questions: Sequence[str],
        *,
        template: str | None = None,
        chat: Chat | None = None,
        max_new_tokens: int = 200,
        allow_special_tokens: bool = False,
        sampling: Sampling | None = None,
    ) -> list[str] | list[list[str]]:
        """Answer questions with the likeliest token at every step, or sample, in the prompt that training puts them in.

        Args:
            questions: Plain text; the model must be loaded and have a tokenizer.
            template: Text with ``{question}`` and ``{answer}``; ``None`` for the tokenizer's chat template where it has one,
                else ``data.templates.PLAIN_TEMPLATE``. It must be the one that the model was fine-tuned with.
            chat: Settings of the chat template; not beside ``template``.
            max_new_tokens: Longest answer, in tokens.
            allow_special_tokens: Whether special tokens in questions are control tokens, and not text, as for `ForgetRetain`.
            sampling: How answers are drawn; ``None`` for the likeliest token. The samples of a question depend on the seed and
                on its position, but not on the other questions.

        Returns:
            One answer per question, without special tokens; with ``sampling``, a list of its samples.

        Raises:
            ModelError: If there is no tokenizer, or one that cannot end an answer.
            DataError: If a question and its answer would exceed the model's positions.

        Example:
            >>> lm = LanguageModel("runs/demo/unlearned")  # doctest: +SKIP
            >>> lm.load()  # doctest: +SKIP
            >>> lm.generate(["Where was the author born?"])  # doctest: +SKIP
            ['The author was born in Lisbon.']
            >>> lm.generate(["Where was the author born?"], sampling=Sampling(samples=2, seed=1))  # doctest: +SKIP
            [['The author was born in Lisbon.', 'In Porto.']]
        """
        generation.check_prompts(self, [], max_new_tokens)
        tokenizer = cast("PreTrainedTokenizerBase", self.tokenizer)
        check_tokenizer(tokenizer)
        settings: Any = {
            "template": check_template(template),
            "chat": chat,
            "max_length": sys.maxsize,
            "allow_special_tokens": allow_special_tokens,
        }
        prompts = []
        for question in questions:
            # A token may carry the last space of the prompt and the first letters of the answer, so an answer is needed to
            # find where the prompt ends, and which answers are joined to the space depends on the tokenizer.
            candidates = []
            for answer in ("A", "The", "Answer"):
                example = encode(question, answer, tokenizer, **settings)
                candidates.append(prompt_of(example))
            prompts.append(min(candidates, key=len))
        if sampling is None:
            return generation.generate(self, prompts, max_new_tokens=max_new_tokens)
        return generation.generate(self, prompts, max_new_tokens=max_new_tokens, sampling=sampling)

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
            device = self.causal_lm.device
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

    @property
    def _head(self) -> nn.Linear:
        head = self.causal_lm.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise TypeError(
                f"the head of {type(self.causal_lm).__name__} is a {type(head).__name__}, not a linear layer."
            )
        return head

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
                ``attention_mask`` (padded rows) or ``position_ids`` that restart at 0 (several sequences packed in a row).
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

    def _run_teacher(self, batch: Mapping[str, Any], indices: Sequence[TokenIndex]) -> Sequence[SupervisedTokens]:
        if self.teacher is None or not self.teacher.is_loaded:
            raise RuntimeError("there is no teacher: set `teacher` and call `keep_teacher()` after loading.")
        with evaluation_mode(self.teacher):
            seen: Sequence[SupervisedTokens] = self.teacher(batch, lambda *tokens: tokens, index=indices)
        return seen

    def _run_trunk(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], layers: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run a model up to its head; return the last states, or logits, and the outputs of layers, ``(B · T, ·)`` each."""
        trunk: Any = model.base_model if self.linear_head else model
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

    def _other_head(self, other: OtherModel) -> nn.Linear | None:
        """Return the head that another model's states go through; ``None`` where they are logits."""
        model = self.teacher if other == "teacher" and self.teacher is not None else self
        if not model.linear_head:
            return None
        if model is self and self.frozen is not None:
            return cast(nn.Linear, self.frozen.get_output_embeddings())
        return model._head


@contextmanager
def _naming_teacher(name: str, owner: LanguageModel) -> Iterator[None]:
    """Make ``teacher`` the argument of an error about the teacher's own ``model``."""
    try:
        yield
    except LitUnlearnError as error:
        error.owner, error.argument = owner, "teacher"
        error.args = (f"the teacher '{name}': {error}",)
        raise
