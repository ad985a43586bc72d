from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, StrategyRegistry

from lit_unlearn import NLL, Constraint, FictionalAuthors, FixedMultiplier, LanguageModel, LitUnlearn, LogitMargin
from lit_unlearn.training import FSDP2Strategy
from lit_unlearn.training.strategies import check_strategy, leave_process_group

REGISTERED = [*StrategyRegistry.available_strategies(), "auto", "my.own.HorovodStrategy"]
TAKEN = [name for name in REGISTERED if name.startswith(("ddp", "auto", "single_device"))]


@pytest.mark.parametrize("name", [*TAKEN, FSDP2Strategy.__name__, "lightning.pytorch.strategies.ModelParallelStrategy"])
def test_these_strategies_are_taken(name: str) -> None:
    check_strategy(name)


@pytest.mark.parametrize(
    "name", [*sorted(set(REGISTERED) - set(TAKEN)), FSDPStrategy.__name__, DeepSpeedStrategy.__name__, "XLAStrategy"]
)
def test_every_other_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"the strategy '{name}' is refused.*configs/hardware/fsdp2.yaml"):
        check_strategy(name)


def test_a_static_graph_is_refused(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # so that what Lightning sets is gone afterwards
        monkeypatch.delenv(name)
    module = LitUnlearn(tiny_lm(), LogitMargin(), {"nll": Constraint(NLL(), 5.0, FixedMultiplier(1.0))}, lambda p: None)
    trainer = make_trainer(strategy=DDPStrategy(static_graph=True), max_steps=1)
    with pytest.raises(ValueError, match=r"static_graph=True\) is refused: a step has several backward passes"):
        trainer.fit(module, datamodule=FictionalAuthors(4, 1))
    leave_process_group()
