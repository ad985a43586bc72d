"""Every implementation of attention keeps packed sequences apart, in value and in gradient.

flex attention has no backward pass on a CPU and compiles, and flash attention needs a GPU. Here the one runs uncompiled, by its own
formula in Python; of the other, transformers' side is real, and the package's function is a loop over the sequences.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention
from transformers import masking_utils, modeling_flash_attention_utils
from transformers.integrations import flex_attention as transformers_flex

from lit_unlearn import NLL, LanguageModel
from lit_unlearn.errors import ConfigError
from lit_unlearn.models.packed_attention import find_bounds, separates_packed_sequences, shares_first_tokens
from lit_unlearn.models.packing import count_shared_tokens, pack, pad

FIELDS = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
FIELDS |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*inputs: Tensor, training: bool, **settings: Any) -> Tensor:
        output = flex_attention.flex_attention(*inputs, **settings)
        assert isinstance(output, Tensor)
        return output

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", attend)
    create = flex_attention.create_block_mask
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda **settings: create(**{**settings, "_compile": False})
    )
    # It refuses gradients on a CPU, where only the compiled kernel has none.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


def varlen_by_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """As ``flash_attn_varlen_func``: shape ``(tokens, heads, width)``, one sequence after the other."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    outputs = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        rows = [x[start:end][None] for x in (q, k, v)]
        outputs.append(attend_to_rows(*rows, softmax_scale, causal)[0])
    return torch.cat(outputs)


def attend_to_rows(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """As ``flash_attn_func``: shape ``(rows, tokens, heads, width)``, one sequence in a row."""
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    output = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return output.transpose(1, 2)


@pytest.fixture
def flash_by_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    process = modeling_flash_attention_utils._lazy_define_process_function(varlen_by_loop)
    functions = (attend_to_rows, varlen_by_loop, None, None, None), (process, dict)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_, **__: functions)


def build(implementation: str) -> LanguageModel:
    torch.manual_seed(0)
    lm = LanguageModel(config=FIELDS)
    lm.load(torch.float64, "cpu")
    # Not by its setter, which asks for the packages; and the probes again, which ran with another.
    lm.causal_lm.config._attn_implementation = implementation
    lm.packs = separates_packed_sequences(lm.causal_lm)
    lm.shares_prefix = lm.packs and shares_first_tokens(lm.causal_lm)
    return lm


def draw_sequences() -> list[dict[str, Tensor]]:
    """Sequences that begin with the same twelve tokens, enough of them for more than one row."""
    draw = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 64, (12,), generator=draw)
    sequences = []
    for length in (90, 140, 30, 110, 75, 60, 140):
        ids = torch.cat([prompt, torch.randint(3, 64, (length,), generator=draw)])
        sequences.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(len(ids)) < 20, -100)})
    return sequences


def compute_loss_and_gradient(lm: LanguageModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    lm.zero_grad()
    loss = lm.loss(NLL(), batch)
    loss.backward()
    return loss.detach(), torch.cat(
        [parameter.grad.flatten() for parameter in lm.parameters() if parameter.grad is not None]
    )


def assert_same(lm: LanguageModel, batch: dict[str, Tensor]) -> None:
    """Compare with the padded rows of the dense mask."""
    wanted = compute_loss_and_gradient(build("sdpa"), pad(draw_sequences()))
    for actual, expected in zip(compute_loss_and_gradient(lm, batch), wanted, strict=True):
        # transformers' eager attention takes its softmax in float32; the others differ by 1e-14.
        assert (actual - expected).norm() <= 1e-6 * expected.norm()


FIXTURES = {"flex_attention": "uncompiled_flex", "flash_attention_2": "flash_by_loop"}
IMPLEMENTATIONS = ["sdpa", "eager", "flex_attention", "flash_attention_2"]


@pytest.fixture
def runs_here(request: pytest.FixtureRequest, implementation: str) -> None:
    if implementation in FIXTURES:
        request.getfixturevalue(FIXTURES[implementation])


@pytest.mark.usefixtures("runs_here")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_sequences_are_what_padded_ones_are(implementation: str) -> None:
    lm, packed = build(implementation), pack(draw_sequences())
    assert lm.packs
    assert len(packed["input_ids"]) > 1
    assert_same(lm, packed)


@pytest.mark.usefixtures("runs_here")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_tokens_are_shared_where_a_mask_can_say_so(implementation: str) -> None:
    lm, sequences = build(implementation), draw_sequences()
    assert lm.shares_prefix == (implementation != "flash_attention_2")
    if lm.shares_prefix:
        shared = pack(sequences, count_shared_tokens(sequences))
        assert len(shared["segments"]) > 1
        assert_same(lm, shared)


@pytest.mark.usefixtures("flash_by_loop")
def test_without_its_bounds_flash_attention_mixes_the_sequences_of_several_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why they are passed: what transformers finds out by itself is right for one row only, and the probe sees that."""
    lm = build("flash_attention_2")
    forward = type(lm.causal_lm.base_model).forward

    def forget_bounds(self: Any, *args: Any, cu_seq_lens_q: Any = None, **arguments: Any) -> Any:
        return forward(self, *args, **arguments)

    monkeypatch.setattr(type(lm.causal_lm.base_model), "forward", forget_bounds)
    assert not separates_packed_sequences(lm.causal_lm)


def test_bounds_are_where_positions_do_not_go_on() -> None:
    assert find_bounds(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]])) == [0, 3, 5, 7, 8, 10]
    # The second row goes on in the middle of a text, as a user may cut it.
    assert find_bounds(torch.tensor([[0, 1], [2, 3]])) == [0, 2, 4]


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_attention_that_could_not_train_is_refused(implementation: str) -> None:
    model = build("sdpa").causal_lm.float()
    model.config._attn_implementation = implementation
    with pytest.raises(ConfigError, match=implementation) as refused:
        LanguageModel.wrap(model)
    assert refused.value.argument == "attn_implementation"
