"""``lit-unlearn plot``: which run is meant, what is drawn of it, and what is said where that fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lit_unlearn import cli
from lit_unlearn.plotting import write_picture_data

METRICS = (
    "step,constraint/nll/value,constraint/nll/violation,multiplier/nll,forget/loss\n0,0.2,-0.1,9,5\n1,0.4,0.1,9,4\n"
)


@pytest.fixture
def run(in_tmp: Path) -> Path:
    folder = Path("runs") / "unlearn" / "version_2"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(METRICS, encoding="utf-8")
    return folder


def refused(capsys: Any, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["plot", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert end.value.code
    return f"{captured.err}{end.value.code}"


@pytest.mark.parametrize("path", ["runs/unlearn/version_2", "runs/unlearn", "runs/unlearn/version_2/metrics.csv"])
def test_a_run_is_found_and_drawn(path: str, run: Path, capsys: Any) -> None:
    for older in ("version_1", "version_x"):
        (run.parent / older).mkdir()
        (run.parent / older / "metrics.csv").write_text("step,train/nll\n0,1\n", encoding="utf-8")
    cli.main(["plot", path])
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(run / "dual.png"), str(run / "dual.svg")]
    assert all(Path(line).stat().st_size > 1000 for line in captured.out.splitlines())
    assert "no picture 'trajectory': no validation" in captured.err
    assert "no picture 'tokens': no answers were recorded" in captured.err


def test_versions_are_counted(run: Path, capsys: Any) -> None:
    newer = run.parent / "version_10"
    newer.mkdir()
    cli.main(["plot", "runs/unlearn", "--format", "svg"])
    assert capsys.readouterr().out == f"{run / 'dual.svg'}\n"  # an empty folder is no run
    write_picture_data(newer, [run / "metrics.csv", newer / "metrics.csv"], {}, None, [])
    assert f"'{newer}' has no metrics.csv yet" in refused(capsys, "runs/unlearn")
    (newer / "metrics.csv").write_text("step,forget/loss\n1,3\n", encoding="utf-8")
    cli.main(["plot", "runs/unlearn", "--format", "pdf", "--output", "docs/pictures"])
    assert capsys.readouterr().out == "docs/pictures/dual.pdf\n"
    assert not list(newer.glob("*.pdf"))
    (run / "metrics.csv").unlink()
    capsys.readouterr()
    assert "there is nothing to draw in" in refused(capsys, str(newer))


def test_what_is_no_run(run: Path, capsys: Any) -> None:
    (run.parent / "other").mkdir()
    (run.parent / "other" / "metrics.csv").write_text(METRICS, encoding="utf-8")
    os.utime(run / "metrics.csv", (1, 1))
    message = refused(capsys, "runs")
    assert "'runs'" in message
    assert "metrics.csv" in message
    assert f"runs/unlearn/other, {run}." in message
    Path("notes.txt").touch()
    assert "'notes.txt'" in refused(capsys, "notes.txt")
    assert "'nowhere'" in refused(capsys, "nowhere")
    assert "format: expected one of png, svg, pdf, not 'jpg'" in refused(capsys, "runs/unlearn", "--format", "jpg")
    (run / "metrics.csv").write_text("step,train/loss\n0,1\n", encoding="utf-8")
    assert "nothing to draw in 'runs/unlearn/version_2': neither a constraint nor an NLL" in refused(capsys, str(run))
    (run / "metrics.csv").write_bytes(b"\xff\xfe\x00")
    assert "is no text file" in refused(capsys, str(run))


def test_a_folder_that_cannot_be_written_is_named(run: Path, capsys: Any) -> None:
    Path("taken").touch()
    assert "'taken/dual.png' cannot be written" in refused(capsys, str(run), "--output", "taken")
