"""Training of a small tokenizer, for models made from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_unlearn.utils.validation import check_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The bytes, an end and a pad token.
_MIN_VOCAB_SIZE = 256 + 2


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: Texts to train on.
        vocab_size: Largest number of entries, 258 or more: the 256 bytes and two special tokens are among them.

    Returns:
        A fast tokenizer with an end and a pad token, and no chat template.

    Raises:
        ConfigError: If ``vocab_size`` is below 258.
    """
    check_at_least(_MIN_VOCAB_SIZE, None, vocab_size=vocab_size)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end, pad = "<|endoftext|>", "<|pad|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # All 256 bytes, so that any text can be encoded, whatever the training texts held.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[end, pad], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=pad)
