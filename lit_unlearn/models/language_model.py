"""The language model as the rest of the package sees it: settings, loading, teacher, identity, export and answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final, overload

import torch
from torch import Tensor, nn

from lit_unlearn.data.templates import Chat
from lit_unlearn.errors import ConfigError, ModelError
from lit_unlearn.models import (
    adapter_configs,
    adapters,
    exported_weights,
    generation,
    identity,
    loading,
    locating,
    merging,
)
from lit_unlearn.models.activation_checkpointing import checkpoint_activations
from lit_unlearn.models.files import ModelFiles
from lit_unlearn.models.older_keys import write_older_keys
from lit_unlearn.models.packed_attention import check_attention, separates_packed_sequences, shares_first_tokens
from lit_unlearn.models.probing import has_linear_head
from lit_unlearn.models.prompts import encode_prompts
from lit_unlearn.models.sampling import Sampling
from lit_unlearn.models.source_checks import check_model_or_config, check_source
from lit_unlearn.models.supervised_model import SupervisedModel
from lit_unlearn.models.teacher import check_teacher, naming_teacher
from lit_unlearn.utils.folders import check_export_target, replace_folder
from lit_unlearn.utils.io import expand_home, expand_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self


@final
class LanguageModel(SupervisedModel):
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
        attn_implementation: Passed to transformers; ``None`` for its default. See `packed_attention` for what each one is told.
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
        teacher_revision: Branch, tag or commit of the teacher on the hub.

    Raises:
        ConfigError: If not exactly one of ``model`` and ``config`` is given, settings exclude each other, or an adapter or a
            quantisation is unknown or could not be trained.
        MissingFileError: If ``model`` is a local directory without weights, or an adapter whose base model is not there.
        ModelError: If its files are damaged or git-lfs pointers, or the package that reads GGUF is not installed.
    """

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
        teacher_revision: str | None = None,
    ) -> None:
        super().__init__(chunk_size)
        model = None if model is None else expand_home(model)
        tokenizer = None if tokenizer is None else expand_home(tokenizer)
        check_model_or_config(model, config, owner=self)
        self.files: ModelFiles | None = None
        if model is not None:
            self.files = locating.locate_model(model, revision, use_safetensors, gguf_file, owner=self)
        self.name = None if self.files is None else self.files.name
        self.config = config
        self.tokenizer_name = tokenizer or self._find_tokenizer()
        check_source(self.files, gguf_file, adapter, merge_adapter, quantization, owner=self)
        self.merges_adapter = merge_adapter
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
        if teacher is not None:
            with naming_teacher(teacher, owner=self):
                self.teacher = LanguageModel(
                    teacher,
                    revision=teacher_revision,
                    trust_remote_code=trust_remote_code,
                    use_safetensors=use_safetensors,
                )
        elif teacher_revision is not None:
            raise ConfigError(
                "`teacher_revision` is of a teacher, and there is none: set `teacher`, or leave it out.",
                owner=self,
                argument="teacher_revision",
            )

        self.files_dtype: torch.dtype | None = None
        self.has_random_weights = False
        self._base_checksum: dict[str, str] | None = None

    @property
    def _trains_saved_adapter(self) -> bool:
        return self.files is not None and self.files.base is not None and not self.merges_adapter

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
            argument = "model" if self.tokenizer_name == self.name else "tokenizer"
            self._tokenizer = loading.load_tokenizer(self.tokenizer_name, self, argument, **settings)
        return self._tokenizer

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
            self.has_random_weights = True
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

        if self.merges_adapter:
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
        check_attention(adapters.inner_model(model), owner=self)
        # from_pretrained leaves a model in evaluation mode, and Lightning would keep it there.
        self.model = model.train()
        self.linear_head = has_linear_head(self.causal_lm)
        self.packs = separates_packed_sequences(self.causal_lm)
        self.shares_prefix = self.packs and shares_first_tokens(self.causal_lm)

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
            message = "an objective, or `rewind`, needs a teacher: set `teacher` to a model that never saw the forget set, such as the base model."
            raise ConfigError(message, owner=self, argument="teacher")
        if not self.teacher.is_loaded:
            with naming_teacher(str(self.teacher.name), owner=self):
                self.teacher.load(self.causal_lm.dtype, self.causal_lm.device)
        check_teacher(self, self.teacher)
        self.teacher.eval().requires_grad_(False)
        # It reads the same passes.
        self.packs = self.packs and self.teacher.packs
        self.shares_prefix = self.shares_prefix and self.teacher.shares_prefix

    def fingerprint(self) -> str:
        """Return a digest of the reference model's weights and architecture, the same wherever it is loaded.

        Of an adapted model only the base counts. Call it before the model is sharded.
        """
        return loading.fingerprint(cast(nn.Module, self.model), trainable=not self.has_adapter)

    def checksum(self) -> str:
        """Return a checksum of the weights as they are now, with an adapter of those that are trained.

        A collective call if the model is sharded.
        """
        return identity.checksum_weights(self)

    def base_checksum(self) -> dict[str, str]:
        """Return what the base model is known by in checkpoints, see `identity.describe_base`.

        Computed at the first call, which must come before training and sharding.
        """
        if self._base_checksum is None:
            self._base_checksum = identity.describe_base(self)
        return self._base_checksum

    def has_base(self, base: Mapping[str, str]) -> bool:
        """Return whether the base model is the one that `base_checksum` returned in another run, maybe in another dtype."""
        return identity.has_base(self, base)

    def origin(self) -> dict[str, Any]:
        """Return where the loaded weights came from, and which adapter was put on them; see `identity.describe_origin`."""
        return identity.describe_origin(self)

    def is_rounded_by(self, dtype: torch.dtype | None = None) -> bool:
        """Return whether an export in ``dtype`` computes something else than the model in memory.

        Args:
            dtype: ``None`` for that of the base model's files.
        """
        return exported_weights.is_rounded(self, dtype)

    def as_exported(self, dtype: torch.dtype | None = None) -> AbstractContextManager[None]:
        """Give the model within the block the weights that an export in ``dtype`` has; see `exported_weights.put_in_place`."""
        return exported_weights.put_in_place(self, dtype)

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
            exported_weights.save_weights(self, folder, state_dict, dtype or self.files_dtype)
            if self.tokenizer is not None:
                tokenizer = copy.copy(self.tokenizer)
                tokenizer.chat_template = chat_template or tokenizer.chat_template
                tokenizer.save_pretrained(folder)
            # Before `finish`, which takes the digests of the files.
            write_older_keys(folder)
            if finish is not None:
                finish(folder)
        return target

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
        prompts = encode_prompts(questions, tokenizer, template, chat, allow_special_tokens)
        if sampling is None:
            return generation.generate(self, prompts, max_new_tokens=max_new_tokens)
        return generation.generate(self, prompts, max_new_tokens=max_new_tokens, sampling=sampling)
