from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lit_unlearn import NLL, LanguageModel


@pytest.mark.slow
def test_a_compiled_trunk_gives_the_same_loss_and_gradients(tiny_lm: Callable[..., LanguageModel]) -> None:
    eager, compiled = tiny_lm(), tiny_lm()
    compiled._compile = True
    for lm in (eager, compiled):
        lm.load(torch.float32)
    compiled.load_state_dict(eager.state_dict())
    for length in (9, 14, 20):  # no new kernels for every length
        ids = torch.arange(length)[None] + 5
        batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length)[None] % 5}
        gradients = []
        for lm in (eager, compiled):
            lm.zero_grad()
            lm(batch, lambda tokens, lm=lm: NLL()(lm, tokens)).sum().backward()
            gradients.append([parameter.grad for parameter in lm.parameters()])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
