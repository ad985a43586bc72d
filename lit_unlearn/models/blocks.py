"""The transformer blocks of a model: record what they compute, and replace it by other states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from lit_unlearn.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the transformer blocks of a model, the first one first.

    Raises:
        ModelError: If there is no list with as many modules as the config has layers.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    # Families give the list different names (`layers`, `h`, …); a list of experts within a block comes after it.
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ModelError(
        f"{type(model).__name__} has no list of its {count} transformer blocks, so their outputs cannot be read or replaced: give a "
        "model of another family."
    )


@contextmanager
def record_outputs(blocks: Sequence[nn.Module], positions: Tensor) -> Iterator[list[Tensor]]:
    """Record the output of every block in one forward pass, which must run within the context.

    Unlike ``output_hidden_states``, whose last entry most families put through the final norm, these are what `replace_output`
    takes, for the last block as well.

    Args:
        blocks: From `find_blocks`.
        positions: Indices into the flattened ``(B · T)`` states, shape ``(N,)``, on the model's device.

    Yields:
        A list that the pass fills with a tensor for each block, shape ``(N, D)``.

    Raises:
        ModelError: If the pass did not run every block once as a module.
    """
    states: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(_get_hidden(output).flatten(0, 1)[positions].detach())

    hooks = [block.register_forward_hook(record) for block in blocks]
    try:
        yield states
        # A compiled trunk keeps the graph that it had without hooks.
        if len(states) != len(blocks):
            raise ModelError(
                f"{len(states)} outputs of the model's {len(blocks)} transformer blocks can be read: load the model without `compile`, "
                "or give one of another family.",
                argument="compile",
            )
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replace_output(block: nn.Module, positions: Tensor, states: Tensor) -> Iterator[None]:
    """Replace a block's output at some positions in every forward pass within the context.

    Args:
        block: One of `find_blocks`.
        positions: Indices into the flattened ``(B · T)`` states, shape ``(N,)``, on the model's device.
        states: What stands there in place of the output, shape ``(N, D)``, of any dtype and on any device.
    """

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = _get_hidden(output)
        # A copy: the block may have returned a tensor that something else still reads.
        changed = hidden.flatten(0, 1).clone()
        changed[positions] = states.to(changed)
        changed = changed.view_as(hidden)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    hook = block.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _get_hidden(output: Any) -> Tensor:
    """Return the hidden states in a block's output, shape ``(B, T, D)``: some families return more beside them."""
    return output if isinstance(output, Tensor) else cast(Tensor, output[0])
