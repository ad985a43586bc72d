"""Training 16-bit weights without losing small steps: the optimizer steps float32 copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

_COPY = "float32_weight"  # key in the state of a 16-bit weight
_HALF = (torch.bfloat16, torch.float16)


class Float32Weights(Optimizer):
    """Any optimizer, on float32 copies of 16-bit weights, which then take the rounded values.

    With ``precision: bf16-true``, a step that is smaller than about 2⁻⁹ of a weight is rounded away; at a learning rate of 1e-5 that
    is nearly every step of nearly every weight. The copies add up such steps until they count. Copies and states are in the
    optimizer's state, so that a resumed run continues with all digits, and FSDP2 shards them. They take 4 bytes per weight, and
    the states are those of float32 weights.

    Weights that someone else has changed since the last step, such as a callback that averages them, count as they are.

    Args:
        params: Parameters, or groups of them, as for every optimizer.
        optimizer: Builds the optimizer that takes the steps, from its parameters; every weight has a state of its own in it.
            Its settings are those of the groups here, so that schedules and resumed runs change them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        >>> optimizer = Float32Weights([weight], lambda params: torch.optim.SGD(params, lr=0.001))
        >>> for _ in range(5):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> weight.detach()  # one step alone would be rounded away, and so would be all five
        tensor([0.9961, 0.9961, 0.9961], dtype=torch.bfloat16)
    """

    def __init__(self, params: Any, optimizer: OptimizerCallable) -> None:
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        inner_groups = []
        for group in groups:
            copies = [_empty_copy(parameter) for parameter in group["params"]]
            self._copies.update(zip(group["params"], copies, strict=True))
            inner_groups.append({**group, "params": copies})
        self.optimizer = cast("Callable[[Any], Optimizer]", optimizer)(inner_groups)
        super().__init__(groups, dict(self.optimizer.defaults))
        for group, inner in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            group.update({key: value for key, value in inner.items() if key != "params"})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the copies with the weights' gradients, and round them into the weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            inner.update({key: value for key, value in group.items() if key != "params"})
        stepped = [parameter for parameter in self._copies if parameter.grad is not None]
        for parameter in stepped:
            self._prepare(parameter)
        self.optimizer.step()
        for parameter in stepped:
            copy = self._copies[parameter]
            if copy is not parameter:
                parameter.copy_(copy)
                copy.grad = None
            # The same tensors, so that checkpoints have them.
            kept = {_COPY: copy.data} if copy is not parameter else {}
            self.state[parameter] = {**kept, **self.optimizer.state[copy]}
        return loss

    def _prepare(self, parameter: nn.Parameter) -> None:
        """Bring the copy of a weight up to date, with a float32 gradient."""
        copy = self._copies[parameter]
        if copy is parameter:
            return
        if _COPY in self.state[parameter]:
            is_changed = copy.to(parameter.dtype) != parameter
            copy.copy_(torch.where(is_changed, parameter.float(), copy))
        else:
            copy.copy_(parameter)
        copy.grad = cast(Tensor, parameter.grad).float()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load copies, states and settings.

        Args:
            state_dict: As `state_dict` returned it.
        """
        # torch would round the states to the dtype of the weights.
        super().load_state_dict({**state_dict, "state": {}})
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, parameter in zip(saved["params"], group["params"], strict=True):
                if key in state_dict["state"]:
                    self._load_state(parameter, state_dict["state"][key], group)

    def _load_state(self, parameter: nn.Parameter, saved: dict[str, Any], group: dict[str, Any]) -> None:
        state = {}
        for key, value in saved.items():
            # As torch does: the number of steps stays on the CPU, unless a kernel reads it on the device.
            moves = isinstance(value, Tensor) and (key != "step" or group.get("fused") or group.get("capturable"))
            state[key] = value.to(parameter.device) if moves else value
        self.state[parameter] = state
        copy = self._copies[parameter]
        if _COPY in state:
            copy.data.copy_(state[_COPY])
            state[_COPY] = copy.data
        self.optimizer.state[copy] = {key: value for key, value in state.items() if key != _COPY}


def _empty_copy(parameter: nn.Parameter) -> nn.Parameter:
    """Return where the copy of a 16-bit weight goes at the first step, and any other weight itself."""
    if parameter.dtype not in _HALF:
        return parameter
    return nn.Parameter(torch.empty_like(parameter, dtype=torch.float32))
