"""How much memory a training step takes, by formulas: from the sizes of a model and of its passes, before anything is loaded.

At four moments a step may need the most, and the plan is that of the largest:

* *backward begins*: every activation of a pass exists, and gradients as far as earlier passes, or the head, have made them;
* *backward ends*: every gradient exists, and the embeddings have just added theirs;
* *optimizer step*: every gradient exists, and the optimizer's temporaries;
* *validation*: no gradients, but blocks of whole logits and, where an export rounds or merges the weights, a copy of them.

Terms, in bytes, with P parameters, of which T are trained, L layers of width D, MLP width I, heads of H · d, vocabulary V, and N
supervised tokens of a pass:

* **weights**: P · (4, or 2 with a ``-true`` 16-bit precision); of 4- and 8-bit weights, the linear layers of the blocks take that.
* **casts**: under mixed precision autocast keeps a 16-bit copy of every trained weight of a linear layer through the whole step.
* **gradients**: T, in the dtype of the weights; adapters are float32. **optimizer states**: what its first step creates; AdamW 2 T.
* **reference, teacher**: all weights of a frozen copy. An adapter needs no copy for the reference: it is switched off.
* **activations**: what autograd saves per token and layer, `activation_bytes`; with checkpointing a layer's input, D, and one layer
  in full. Packed rows have a mask, which every layer keeps as numbers: a row's length per token.
* **head**: blocks of logits and the exponentials that are kept, never all N · V logits; see `head_bytes`.

Sharding divides weights, gradients and optimizer states by the number of devices. Whole are, for a while, two blocks and what lies
outside of the blocks. DDP has a second copy of the gradients, in its buckets. What is left out: the libraries, a GPU's context, and
memory that an allocator has reserved and does not use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from lit_unlearn.functional.chunks import ENTRY_BUDGET, LOGIT_BUDGET, chunk_length
from lit_unlearn.functional.likelihood import KEEP_BUDGET
from lit_unlearn.models.model_sizes import ModelSizes

HeadKind = Literal["nll", "margin", "dense"]
"""What an objective makes of the logits: log-probabilities, margins, or a function of whole logits in blocks of tokens."""

Parts = dict[str, int]


@dataclass(frozen=True)
class PassSizes:
    """One pass through the model.

    Args:
        rows: Packed or padded rows.
        width: Tokens of a row.
        is_masked: Whether attention needs a mask: several examples share a row, or some rows end early.
        heads: For each objective that reads the pass, how it uses the head, and its supervised tokens.
        num_models: Models that run on it: the trained one, and the reference or the teacher.
    """

    rows: int
    width: int
    is_masked: bool
    heads: tuple[tuple[HeadKind, int], ...]
    num_models: int = 1

    @property
    def tokens(self) -> int:
        """Tokens, with what little padding there is."""
        return self.rows * self.width


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    Args:
        dtype: Of the weights.
        is_mixed: Whether autocast computes in 16 bits.
        device: ``"cuda"`` or ``"cpu"``, whose kernels keep different things.
        strategy: How devices share the work.
        devices: Number of them, on all nodes.
        optimizer_bytes: Of its states, for all trained parameters.
        optimizer_is_fused: Whether its step needs no temporaries.
        checkpointing: Whether the backward pass computes activations again.
        weight_bits: 4 or 8 for quantised linear layers of the blocks, else 0.
        frozen: Frozen models beside the trained one.
        gradient_copies: Further copies of the gradients, or of the trained weights, that `robustness` keeps.
        validation_tokens: Supervised tokens of a validation batch, at most.
        rounds: Whether validations measure other weights than those that are trained, and so keep a copy of the latter.
    """

    dtype: torch.dtype
    is_mixed: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    strategy: Literal["single", "ddp", "fsdp2"] = "single"
    devices: int = 1
    optimizer_bytes: int = 0
    optimizer_is_fused: bool = False
    checkpointing: bool = False
    weight_bits: int = 0
    frozen: tuple[ModelSizes, ...] = ()
    gradient_copies: int = 0
    validation_tokens: int = 1
    rounds: bool = False

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the linear layers."""
        return 2 if self.is_mixed else self.dtype.itemsize

    @property
    def shards(self) -> int:
        """Number of parts that the model is divided into."""
        return self.devices if self.strategy == "fsdp2" else 1


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one device, in bytes, at every moment that may need the most.

    Args:
        moments: By the moment, its parts by name.
    """

    moments: dict[str, Parts] = field(default_factory=dict)

    @property
    def at(self) -> str:
        """The moment with the most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        """The parts at that moment."""
        return self.moments[self.at]

    @property
    def peak(self) -> int:
        """Bytes at that moment."""
        return sum(self.parts.values())


def plan_memory(model: ModelSizes, setup: Setup, passes: Sequence[PassSizes]) -> MemoryPlan:
    """Return the memory of a step.

    Args:
        model: That is trained.
        setup: How.
        passes: Of one step on one device.
    """
    weights = weight_bytes(model, setup)
    gradients = sum(parameter.numel() * parameter.itemsize for parameter in model.trainable)
    largest = max((parameter.numel() * parameter.itemsize for parameter in model.trainable), default=0)
    head = 0 if model.has_adapter else model.vocabulary * model.block.hidden * setup.dtype.itemsize
    trained_linears = 0 if model.has_adapter else model.layers * model.block.linear_parameters
    shards = setup.shards
    standing: Parts = {
        "weights": weights // shards,
        "reference and teacher": sum(weight_bytes(other, setup, frozen=True) for other in setup.frozen) // shards,
        "optimizer states": setup.optimizer_bytes // shards,
        "16-bit casts": 2 * trained_linears if setup.is_mixed else 0,
    }
    gathered = gathered_bytes(model, setup, gradients, head) if shards > 1 else 0
    buckets = gradients if setup.strategy == "ddp" else 0

    activations = head_work = 0
    for forward_pass in passes:
        of_pass = pass_bytes(model, setup, forward_pass)
        if sum(of_pass) > activations + head_work:
            activations, head_work = of_pass
    # The first backward pass begins without gradients, but for that of the head; each later one begins with all of them.
    runs_again = len(passes) > 1 or setup.gradient_copies > 0
    begun = gradients // shards if runs_again else min(head, gradients) // shards
    # Only on a single device does the head add to its gradient in place, and only some losses do.
    kinds = set[str]()
    for forward_pass in passes:
        kinds.update(kind for kind, _ in forward_pass.heads)
    adds_in_place = setup.strategy == "single" and "dense" not in kinds
    head_buffer = 0 if adds_in_place or not runs_again else head
    copies = setup.gradient_copies * gradients // shards
    # On a single device, a float32 embedding adds to the gradient that is there; elsewhere autograd makes another.
    adds_rows = setup.strategy == "single" and setup.dtype.itemsize >= 4
    ended = head if (model.tied or runs_again) and not model.has_adapter and not adds_rows else 0

    if setup.optimizer_is_fused or not setup.optimizer_bytes:
        temporaries = 0
    else:
        # For all parameters at once on a GPU ("foreach"), one after the other on a CPU.
        temporaries = gradients // shards if setup.device == "cuda" else 2 * largest
    shared: Parts = {"gathered for sharding": gathered, "gradient buckets": buckets, "copies": copies}
    moments: dict[str, Parts] = {
        "backward begins": {
            **standing,
            "gradients": begun,
            "activations": activations,
            "head": head_work + head_buffer,
            **shared,
        },
        "backward ends": {**standing, "gradients": gradients // shards, "head": ended, **shared},
        "optimizer step": {**standing, "gradients": gradients // shards, **shared, "temporaries": temporaries},
    }
    # Gradients are freed between steps. What is measured may be rounded weights; the present ones are then kept beside them.
    copies = weights // shards if setup.rounds else 0
    # The suite reads whole logits in blocks, and makes about seven tensors of their size (fitted to one measured run).
    block_tokens = chunk_length(setup.validation_tokens, model.vocabulary, budget=LOGIT_BUDGET)
    suite = 7 * 4 * block_tokens * model.vocabulary
    moments["validation"] = {**standing, "copies": copies, "head": suite, "gathered for sharding": gathered}
    return MemoryPlan(moments)


def weight_bytes(model: ModelSizes, setup: Setup, frozen: bool = False) -> int:
    """Return the bytes of a model's weights, with the adapter unless it is a ``frozen`` one."""
    size = setup.dtype.itemsize
    quantised = model.layers * model.block.linear_parameters if setup.weight_bits else 0
    total = (model.parameters - quantised) * size
    if quantised:
        # Every 64 numbers of 4 bits share a float32 scale; of 8 bits, every row.
        total += quantised * setup.weight_bits // 8 + (quantised // 16 if setup.weight_bits == 4 else 0)
    if model.has_adapter and not frozen:
        total += sum(parameter.numel() * parameter.itemsize for parameter in model.trainable)
    return total


def gathered_bytes(model: ModelSizes, setup: Setup, gradients: int, head: int) -> int:
    """Return what a sharded step holds whole: two blocks, and embedding, head and norms, with the gradients of both."""
    size = setup.dtype.itemsize
    whole = 0
    for each in (model, *setup.frozen):
        whole += (each.root_parameters + 2 * each.block.parameters) * size
    # An adapter's gradients are small, and those of one block at a time.
    outside = 0 if model.has_adapter else model.root_parameters * size
    in_blocks = max(0, gradients - outside)
    return whole + outside + 2 * in_blocks // model.layers


def pass_bytes(model: ModelSizes, setup: Setup, forward_pass: PassSizes) -> tuple[int, int]:
    """Return the bytes of a pass's activations, and of its work at the head."""
    block, tokens = model.block, forward_pass.tokens
    per_layer = activation_bytes(model, setup, forward_pass)
    # Every layer's weights are cast, and its cast ones are needed in backward: autocast keeps casts of trained weights alone.
    casts = 2 * block.linear_parameters if setup.is_mixed and model.has_adapter else 0
    residual = 4 if setup.is_mixed else setup.dtype.itemsize
    of_layer = per_layer * tokens + casts
    if setup.checkpointing:
        total = model.layers * residual * block.hidden * tokens + of_layer
    else:
        total = model.layers * of_layer
    # Gradients of the layer that backward has reached: three of the MLP's and two of the residual stream.
    passing = (3 * setup.compute_bytes * block.intermediate + 2 * residual * block.hidden) * tokens
    # The final norm: its input, the normed states, the result.
    total += passing + 3 * residual * block.hidden * tokens
    if setup.weight_bits:
        # The layer that is computed has its weights as floats.
        total += block.intermediate * block.hidden * setup.compute_bytes
    if not model.linear_head:
        # Logits of every token, their float32 copy and its gradient.
        return total, tokens * model.vocabulary * (2 * setup.compute_bytes + 4)
    at_head = [head_bytes(model, setup, kind, count, forward_pass.num_models) for kind, count in forward_pass.heads]
    # What is kept for backward adds up; of the temporaries, the largest decides.
    kept = sum(each[0] for each in at_head)
    return total, kept + max((each[1] for each in at_head), default=0)


def activation_bytes(model: ModelSizes, setup: Setup, forward_pass: PassSizes) -> int:
    """Return what autograd saves of one block, per token, without checkpointing.

    * A norm keeps its input in float32 and, if it is trained, the normed states.
    * A linear layer that is trained keeps its input. Under autocast each has a copy of its own.
    * Attention keeps queries, keys, values, its result and, of every head, a sum. Under a mask every head has its own keys and values,
      and the mask is kept as numbers. The ``eager`` implementation keeps the probabilities in place of sum and mask.
    * The MLP keeps what its activation function and its product read, and the product.
    """
    block = model.block
    compute = setup.compute_bytes
    wide = max(4, setup.dtype.itemsize)
    residual = 4 if setup.is_mixed else setup.dtype.itemsize
    total = 2 * wide * block.hidden
    if not model.has_adapter:
        total += 2 * residual * block.hidden
    total += _linear_input_bytes(model, setup)

    is_eager = model.attention == "eager"
    repeats = (forward_pass.is_masked or is_eager) and not model.attention.startswith("flash")
    kv_heads = block.heads if repeats else block.kv_heads
    total += compute * block.head_dim * (2 * block.heads + 2 * kv_heads)
    if is_eager:
        total += block.heads * forward_pass.width * (4 if compute == 4 else 4 + compute)
    else:
        total += 4 * block.heads
        if forward_pass.is_masked and not model.attention.startswith("flash"):
            total += compute * forward_pass.width
    return total + (3 if block.is_gated else 1) * compute * block.intermediate


def _linear_input_bytes(model: ModelSizes, setup: Setup) -> int:
    compute, block = setup.compute_bytes, model.block
    total = 0
    keeps_normed = False
    for linear in block.linears:
        if model.has_adapter and not linear.rank:
            continue
        total += linear.rank * (2 if setup.is_mixed else 4)
        if linear.rank and model.dropout:
            # The mask, as numbers on a CPU and as truth values on a GPU, and the input where it is not zeroed.
            total += linear.inputs * ((4 if setup.device == "cpu" else 1) + (2 if setup.is_mixed else 4))
        elif linear.rank and setup.dtype.itemsize == 2:
            # Adapters compute in float32: each has a copy of its own.
            total += 4 * linear.inputs
        elif setup.is_mixed and (linear.rank or linear.fed_by == "norm"):
            total += 2 * linear.inputs
        elif linear.fed_by == "norm":
            keeps_normed = True
        elif linear.fed_by == "mlp":
            total += compute * linear.inputs
        # Otherwise it reads the attention's result, which the attention keeps.
    # Queries, keys and values read the same tensor, and so do the projections of the MLP.
    return total + (2 * compute * block.hidden if keeps_normed else 0)


def head_bytes(model: ModelSizes, setup: Setup, kind: HeadKind, count: int, num_models: int = 1) -> tuple[int, int]:
    """Return what an objective's work at the head keeps for backward, and its temporaries; see `lit_unlearn.functional`.

    Args:
        model: With its vocabulary.
        setup: With the dtype.
        kind: How the objective uses the head.
        count: Supervised tokens.
        num_models: Models whose logits it compares.
    """
    if count == 0:
        return 0, 0
    hidden, vocabulary = model.block.hidden, model.vocabulary
    state = 4 if setup.is_mixed else setup.dtype.itemsize
    # The states of its tokens, and their gradient.
    states = 2 * count * hidden * state
    if kind == "dense":
        chunk = chunk_length(count, vocabulary, budget=LOGIT_BUDGET) * vocabulary
        gradient = 0 if model.has_adapter else 4 * vocabulary * hidden
        cast = 2 * vocabulary * hidden if setup.is_mixed else 0
        # Logits of every model, and what autograd saves of the function: about three more of them.
        return states * num_models, gradient + cast * num_models + 4 * chunk * (num_models + 3)
    entries = chunk_length(vocabulary, max(count, hidden), budget=max(ENTRY_BUDGET, count * hidden))
    chunk = entries * count
    casts = 2 * entries * hidden if setup.compute_bytes == 2 else 0
    if kind == "margin":
        # Rows of the weight at the largest logits, in float32.
        return states, max(setup.compute_bytes * chunk + casts, 12 * count * hidden)
    kept = 4 * chunk * min(KEEP_BUDGET // chunk, -(-vocabulary // entries))
    return states + kept, 4 * chunk + setup.compute_bytes * chunk + casts + 4 * count * hidden
