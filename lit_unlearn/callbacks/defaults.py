"""The callbacks and plugins of every run, from the command line and from Python."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.plugins import CheckpointIO

from lit_unlearn.callbacks.advice import RunAdvice
from lit_unlearn.callbacks.attachments import AttachFiles
from lit_unlearn.callbacks.checkpoints import ResumeCheckpoint
from lit_unlearn.callbacks.export import ExportModel
from lit_unlearn.callbacks.finished import FinishedRun
from lit_unlearn.callbacks.picture import RunPicture
from lit_unlearn.callbacks.plugins import AtomicCheckpointIO
from lit_unlearn.callbacks.progress import ProgressBar
from lit_unlearn.callbacks.report import RunReport


def default_callbacks(
    report: RunReport | None = None,
    picture: RunPicture | None = None,
    export: ExportModel | None = None,
    attach: AttachFiles | None = None,
    *,
    progress_bar: bool = True,
    checkpoint: bool = True,
    given: Sequence[Callback] = (),
) -> list[Callback]:
    """Return the callbacks of a run, in the order in which the Trainer must call them.

    Args:
        report: ``None`` for one with its defaults, as for ``picture`` and ``export``.
        picture: Draws the run.
        export: Writes the kept model.
        attach: Gives files to the loggers.
        progress_bar: Whether there is a `ProgressBar`.
        checkpoint: Whether there is a `ResumeCheckpoint`.
        given: Callbacks that the Trainer gets as well. A default of a kind that is among them is left out.

    Example:
        >>> [type(callback).__name__ for callback in default_callbacks(checkpoint=False)]
        ['ProgressBar', 'RunAdvice', 'RunReport', 'RunPicture', 'ExportModel', 'AttachFiles', 'FinishedRun']
    """
    # The order: advice is about the settings, so it comes before whatever takes time. The report is first at the end of a
    # fit: it writes what was achieved, even if the pictures or the export fail, and the pictures read it. Files are attached
    # after the export, which must not wait for a server. Lightning calls checkpoints after all others, wherever they are, so
    # that they hold the state of the others after the step.
    kinds: list[tuple[type, Callback]] = []
    if progress_bar:
        kinds.append((AnyProgressBar, ProgressBar()))
    kinds.append((RunAdvice, RunAdvice()))
    kinds.append((RunReport, report or RunReport()))
    kinds.append((RunPicture, picture or RunPicture()))
    kinds.append((ExportModel, export or ExportModel()))
    kinds.append((AttachFiles, attach or AttachFiles()))
    kinds.append((FinishedRun, FinishedRun()))
    if checkpoint:
        kinds.append((ResumeCheckpoint, ResumeCheckpoint()))

    callbacks = []
    for kind, callback in kinds:
        is_given = any(isinstance(candidate, kind) for candidate in given)
        if not is_given:
            callbacks.append(callback)
    return callbacks


def default_plugins(given: Sequence[object] = ()) -> list[CheckpointIO]:
    """Return the plugins of a run: checkpoints appear completely or not at all.

    Args:
        given: Plugins that the Trainer gets as well; with a ``CheckpointIO`` among them there are no defaults.
    """
    if any(isinstance(plugin, CheckpointIO) for plugin in given):
        return []
    return [AtomicCheckpointIO()]
