"""A resumed run is the uninterrupted one; with changed settings it is the one that these ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import runner

from lit_unlearn import NLL, Constraint, DualAscent, FictionalAuthors, LanguageModel, LitUnlearn, LogitMargin, Schedule

STEPS = 9  # three epochs of three


@pytest.fixture(scope="module")
def whole(models: dict[str, str], rows_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """An uninterrupted run with dropout, two constraints and controllers, and a checkpoint after every step or epoch."""
    done: dict[Any, Any] = {}

    def get(update_every: str) -> Any:
        if update_every not in done:
            folder = tmp_path_factory.mktemp("whole")
            settings = {
                "model": models["dropout"],
                "data": rows_dir,
                "optimizer": "adamw",
                "update_every": update_every,
                "smoothing": 0.5,
            }
            result = runner.run({**settings, "checkpoints": "steps"}, folder / "steps", devices=1)
            runner.run({**settings, "checkpoints": "epochs"}, folder / "epochs", devices=1)
            done[update_every] = (settings, result, folder)
        return done[update_every]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "after"), [*[("steps", step) for step in (1, 2, 3, 4, 6, 8)], *[("epochs", step) for step in (3, 6)]]
)
@pytest.mark.parametrize("update_every", ["step", "epoch"])
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(
    kind: str, after: int, update_every: str, whole: Callable[[str], Any], tmp_path: Path
) -> None:
    settings, expected, folder = whole(update_every)
    checkpoint = str(folder / kind / f"{after}.ckpt")
    result = runner.run({**settings, "seed": 1, "ckpt_path": checkpoint}, tmp_path, devices=1)
    rest = expected["steps"][after:]
    assert len(rest) == STEPS - after
    for key in ("logged", "multipliers", "rows"):
        assert [step[key] for step in result["steps"]] == [step[key] for step in rest], key
    for key in ("values", "multipliers", "best"):
        assert result[key] == expected[key], key
    assert all(torch.equal(result["weights"][name], value) for name, value in expected["weights"].items())
    before, end = expected["steps"][after - 1]["multipliers"], expected["multipliers"]
    assert after == 8 or all(before[name] != end[name] for name in end)  # there was something to get wrong


@pytest.mark.slow
def test_resuming_twice_over_the_end_of_an_epoch(whole: Callable[[str], Any], tmp_path: Path) -> None:
    """Lightning counts epochs wrongly from a checkpoint of an epoch's last step on, which shows at the next resume."""
    settings, expected, folder = whole("step")
    first = {**settings, "ckpt_path": str(folder / "steps" / "3.ckpt"), "checkpoints": "steps"}
    runner.run(first, tmp_path / "first", devices=1)
    for after in (5, 6, 7):
        second = {**settings, "ckpt_path": str(tmp_path / "first" / f"{after}.ckpt")}
        result = runner.run(second, tmp_path, devices=1)
        assert [step["logged"] for step in result["steps"]] == [step["logged"] for step in expected["steps"][after:]]
        assert all(torch.equal(result["weights"][name], value) for name, value in expected["weights"].items())


@pytest.mark.slow
def test_the_packages_own_checkpoint_callback(whole: Callable[[str], Any], tmp_path: Path) -> None:
    """It saves an epoch's last step when validation is through, so that the resumed run does not leave that out."""
    settings, expected, _ = whole("epoch")
    for after in (2, 3, 4, 6):
        own = {**settings, "checkpoints": "own", "stop_after": after}
        stopped = runner.run(own, tmp_path / str(after), devices=1)
        assert len(stopped["steps"]) == after + 1  # stopped in the midst of the next one
        (checkpoint,) = (tmp_path / str(after)).glob("last-*.ckpt")
        assert checkpoint.name == f"last-step={after}.ckpt"
        result = runner.run({**own, "stop_after": None, "ckpt_path": str(checkpoint)}, tmp_path / str(after), devices=1)
        assert [step["logged"] for step in result["steps"]] == [step["logged"] for step in expected["steps"][after:]]
        for key in ("values", "multipliers", "best"):
            assert result[key] == expected[key], key


def test_checkpoints_hold_plain_types(whole: Callable[[str], Any]) -> None:
    _, _, folder = whole("step")
    saved = torch.load(folder / "steps" / "4.ckpt", weights_only=True)
    assert saved["constraints"]["nll"].keys() == {"multiplier", "reference", "smoothed", "epsilon"}
    assert saved["run"].keys() == {"seed", "optimizer", "base", "best", "dual_epochs", "forget_level"}
    assert not any("slack" in name or "violation" in name for name in saved["run"]["best"]["values"])


def make(lm: LanguageModel, *, lr: float = 0.01, momentum: float = 0.0, **settings: Any) -> LitUnlearn:
    constraint = Constraint(NLL(), settings.pop("epsilon", 5.0), DualAscent(lr=settings.pop("dual", 5.0), init=3.0))

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)

    return LitUnlearn(lm, LogitMargin(), {"nll": constraint}, optimizer, Schedule("linear"), **settings)


def data() -> FictionalAuthors:
    return FictionalAuthors(4, 1, batch_size=5, retain_batch_size=4, max_length=200)


class Steps(L.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        group = trainer.optimizers[0].param_groups[0]
        after = {"λ": pl_module.constraints["nll"].multiplier.value, "lr": group["lr"], "momentum": group["momentum"]}
        self.seen.append({**values, **after})


@pytest.fixture
def stopped(tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path) -> Any:
    """A checkpoint after 4 of 8 steps, and the learning rate there."""
    steps = Steps()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = make_trainer(max_epochs=4, callbacks=[steps, saver], enable_checkpointing=True)
    trainer.fit(make(tiny_lm()), datamodule=data())
    assert len(steps.seen) == 8
    return tmp_path / "step=4.ckpt", steps.seen[:4]


def test_changed_settings_are_the_ones_used(
    stopped: Any, tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    checkpoint, before = stopped
    runs = {}
    for name, changes in {
        "same": {},
        "changed": {"lr": 0.005, "momentum": 0.5, "dual": 1.0, "epsilon": 5.5},
    }.items():
        steps = Steps()
        make_trainer(max_epochs=4, callbacks=[steps]).fit(
            make(tiny_lm(), **changes), datamodule=data(), ckpt_path=checkpoint
        )
        runs[name] = steps.seen
    assert len(runs["same"]) == len(runs["changed"]) == 4
    for same, changed in zip(runs["same"], runs["changed"], strict=True):
        assert changed["lr"] == pytest.approx(
            same["lr"] / 2, abs=1e-12
        )  # half of it, at the same place of the schedule
        assert (same["momentum"], changed["momentum"]) == (0.0, 0.5)
        assert changed["constraint/nll/violation"] == pytest.approx(changed["constraint/nll/value"] - 5.5, abs=1e-5)
    first = runs["changed"][0]
    assert first["multiplier/nll"] == pytest.approx(before[-1]["λ"])  # λ goes on from where it was
    assert first["λ"] == pytest.approx(before[-1]["λ"] + 1.0 * first["constraint/nll/violation"])


def test_another_seed_is_refused(
    stopped: Any, tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    with pytest.raises(ValueError, match=r"`seed` was 0, is 3\. Restore it, or start a new run"):
        make_trainer(max_epochs=4).fit(make(tiny_lm(), seed=3), datamodule=data(), ckpt_path=stopped[0])
    make_trainer().validate(make(tiny_lm(), seed=3), datamodule=data(), ckpt_path=stopped[0], verbose=False)


def test_a_checkpoint_of_another_kind_is_refused(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    from lit_unlearn import LitFinetune

    trainer = make_trainer(max_steps=1)
    trainer.fit(LitFinetune(tiny_lm(), torch.optim.SGD), datamodule=FictionalAuthors(4, 1, train_on="all"))
    trainer.save_checkpoint(tmp_path / "taught.ckpt")
    with pytest.raises(ValueError, match="the checkpoint is of no LitUnlearn run"):
        make_trainer(max_epochs=1).fit(make(tiny_lm()), datamodule=data(), ckpt_path=tmp_path / "taught.ckpt")


def test_a_fit_without_a_checkpoint_starts_afresh(
    tiny_lm: Callable[..., LanguageModel], make_trainer: Callable[..., L.Trainer]
) -> None:
    module = make(tiny_lm())
    make_trainer(max_epochs=2).fit(module, datamodule=data())
    assert module.best is not None
    make_trainer(max_epochs=1, limit_val_batches=0).fit(module, datamodule=data())
    assert module.best is None
