"""The callbacks of every run and their order."""

from __future__ import annotations

from lightning.pytorch.callbacks import TQDMProgressBar

from lit_unlearn.callbacks import (
    AtomicCheckpointIO,
    AttachFiles,
    ExportModel,
    FinishedRun,
    ProgressBar,
    ResumeCheckpoint,
    RunAdvice,
    RunPicture,
    RunReport,
    default_callbacks,
    default_plugins,
)


def test_the_callbacks_of_a_run_and_their_order() -> None:
    export = ExportModel("out")
    callbacks = default_callbacks(export=export)
    kinds = [type(callback) for callback in callbacks]
    assert kinds == [
        ProgressBar,
        RunAdvice,
        RunReport,
        RunPicture,
        ExportModel,
        AttachFiles,
        FinishedRun,
        ResumeCheckpoint,
    ]
    assert callbacks[4] is export


def test_a_given_kind_is_not_doubled() -> None:
    callbacks = default_callbacks(checkpoint=False, given=[TQDMProgressBar(), RunPicture(0)])
    assert [type(callback) for callback in callbacks] == [RunAdvice, RunReport, ExportModel, AttachFiles, FinishedRun]
    assert [type(plugin) for plugin in default_plugins()] == [AtomicCheckpointIO]
    assert default_plugins([AtomicCheckpointIO()]) == []
