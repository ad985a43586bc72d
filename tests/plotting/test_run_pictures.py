"""What is read of a run's files, and what the pictures of its numbers show."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from lit_unlearn.plotting import (
    NothingToDraw,
    RunLog,
    draw_dual,
    draw_finetuning,
    draw_run,
    draw_trajectory,
    read_run,
    write_picture_data,
)
from lit_unlearn.plotting.run_log import read_metrics

METRICS = """\
constraint/nll/value,constraint/nll/violation,epoch,forget/loss,multiplier/nll,step,val/constraint/nll/value,val/forget/loss,val/forget/nll
0.2,-0.1,0,210.5,100.0,0,,,
0.25,-0.05,0,150.0,99.5,1,,,
,,0,,,1,0.22,9.5,2.5
0.4,0.1,1,60.0,100.0,2,,,
nan,nan,1,20.0,101.5,3,,,
,,1,,,3,0.38,3.25,4.0
"""
BEFORE = {"constraint/nll/value": 0.15, "forget/loss": 212.0, "forget/nll": 0.1}
COLOURS = ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73))  # forget, retain, λ


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.csv").write_text(METRICS, encoding="utf-8")
    write_picture_data(tmp_path, [tmp_path / "metrics.csv"], BEFORE, 2, [])
    return tmp_path


def comments(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    assert "<svg" in text
    return text


# Reading ----------------------------------------------------------------------------------------------------------------


def test_read_metrics(folder: Path) -> None:
    series = read_metrics([folder / "metrics.csv"])
    steps, values = series["constraint/nll/value"]
    assert steps == [0, 1, 2, 3]
    assert values[:3] == [0.2, 0.25, 0.4]
    assert math.isnan(values[3])
    assert series["multiplier/nll"] == ([0, 1, 2, 3], [100.0, 99.5, 100.0, 101.5])
    assert series["val/forget/nll"] == ([1, 3], [2.5, 4.0])
    assert not {"step", "epoch"} & series.keys()


def test_what_a_resumed_run_does_again_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("step,a,b\n0,1,\n1,2,\n1,,5\n2,3,\n3,4,\n3,,6\n", encoding="utf-8")
    second.write_text("step,a\n2,30\n9,9", encoding="utf-8")  # its last line is half written
    assert read_metrics([first, second]) == {"a": ([0, 1, 2], [1.0, 2.0, 30.0]), "b": ([1], [5.0])}


def test_a_run_and_the_steps_taken_before_each_value(folder: Path) -> None:
    run = read_run(folder)
    assert run.constraints == ["nll"]
    assert run.get_step_values("forget/loss")[0] == [0, 1, 2, 3]
    assert run.get_stream_values("forget/loss") == ([0, 2, 4], [212.0, 9.5, 3.25])
    assert run.find_epsilon("nll") == pytest.approx(0.3)
    assert run.find_epsilon("other") is None
    assert (run.kept_step, run.answers, run.missing) == (2, [], [])


def test_epsilon_is_taken_where_digits_are_left() -> None:
    def float32(x: float) -> float:
        return float(struct.unpack("f", struct.pack("f", x))[0])

    values = [3e6, 0.2, math.inf, 5e4]
    metrics = {
        "constraint/nll/value": ([0, 1, 2, 3], [float32(value) for value in values]),
        "constraint/nll/violation": ([0, 1, 2, 3], [float32(value - 0.3) for value in values]),
    }
    assert RunLog(metrics, {}, None, [], []).find_epsilon("nll") == pytest.approx(0.3, abs=1e-7)


def test_a_run_of_an_older_version_has_its_report(folder: Path) -> None:
    (folder / "pictures.json").unlink()
    assert read_run(folder).before == {}
    (folder / "report.json").write_text('{"before": {"forget/nll": 0.5}, "kept_step": 4}', encoding="utf-8")
    run = read_run(folder)
    assert (run.before, run.kept_step) == ({"forget/nll": 0.5}, 4)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.csv", "hello\n", r"metrics\.csv' is no metrics file.*\['hello'\]"),
        ("metrics.csv", "step,a\n0,x\n", r"metrics\.csv' is no metrics file.*could not convert string to float: 'x'"),
        ("metrics.csv", "step,a\n,1\n", r"metrics\.csv' is no metrics file"),
        ("pictures.json", "{", r"pictures\.json' is no JSON file .*: remove it"),
        ("pictures.json", '{"answers": [{"stream": "forget"}]}', r"pictures\.json' is damaged .*missing 4 required"),
    ],
)
def test_damaged_files_are_named(file: str, content: str, message: str, folder: Path) -> None:
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_run(folder)


def test_files_that_are_gone(folder: Path) -> None:
    write_picture_data(folder, [folder.parent / "gone" / "metrics.csv", folder / "metrics.csv"], {}, None, [])
    run = read_run(folder)
    assert run.missing == [folder.parent / "gone" / "metrics.csv"]
    assert run.get_step_values("forget/loss")[0] == [0, 1, 2, 3]
    (folder / "metrics.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.csv yet"):
        read_run(folder)


# Drawing ----------------------------------------------------------------------------------------------------------------


def test_a_png_shows_every_colour(folder: Path) -> None:
    target = folder / "new" / "dual.png"
    draw_dual(read_run(folder), target)
    content = target.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1050, 900)
    pixels = (image.imread(target)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for colour in COLOURS:
        assert (abs(pixels - colour).max(axis=1) < 3).sum() > 20
    assert [path.name for path in target.parent.iterdir()] == ["dual.png"]


def test_svgs_name_what_is_drawn(folder: Path) -> None:
    run = read_run(folder)
    drawn = draw_run(run, folder, ["svg"])
    assert drawn == {
        "dual": [folder / "dual.svg"],
        "trajectory": [folder / "trajectory.svg"],
        "tokens": "no answers were recorded (set the configuration's `picture.answers`, or `answers` of `RunPicture`, above 0)",
    }
    dual, trajectory = comments(folder / "dual.svg"), comments(folder / "trajectory.svg")
    for label in (
        "nll",
        "batch of the step",
        "all examples",
        "ε = 0.3",
        "violated",
        "kept model, step 2",
        "multiplier λ",
    ):
        assert f"<!-- {label} -->" in dual
    assert dual.count('id="axes_') == 3
    for label in (
        "before",
        "step 2",
        "step 4",
        "ε = 0.3",
        "feasible",
        "violated",
        "kept: step 2, lowest objective of the feasible",
        "forget objective, all forget examples (lower: forgotten more)",
        "constraint nll",
    ):
        assert f"<!-- {label} -->" in trajectory
    assert not list(folder.glob(".*"))


def test_the_same_run_gives_the_same_files_whatever_the_users_style(folder: Path, monkeypatch: Any) -> None:
    import matplotlib

    draw_run(read_run(folder), folder / "a")
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)
    draw_run(read_run(folder), folder / "b")
    names = {path.name for path in (folder / "a").iterdir()}
    assert names == {f"{name}.{suffix}" for name in ("dual", "trajectory") for suffix in ("png", "svg")}
    assert all((folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes() for name in names)
    assert matplotlib.rcParams["font.size"] == 20.0


def drawn(draw: Callable[..., None], run: RunLog, target: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure, once it is drawn."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *rest, **kw: (save(self, *rest, **kw), figures.append(self)))
    draw(run, target)
    figures[0].canvas.draw()
    return figures[0]


def two_constraints(validations: int) -> RunLog:
    steps = list(range(1, 4 * validations, 4))
    metrics: dict[str, Any] = {"val/forget/nll": (steps, [8 * i / validations for i in range(validations)])}
    for name, scale, epsilon in (("nll", 1.0, 0.6), ("a_constraint_with_a_long_name", 1e-3, 5e-4)):
        values = [scale * abs(math.sin(0.3 * i + 0.1)) for i in range(validations)]
        metrics[f"val/constraint/{name}/value"] = (steps, values)
        metrics[f"val/constraint/{name}/violation"] = (steps, [value - epsilon for value in values])
    return RunLog(metrics, {}, steps[validations // 2] + 1, [], [])


@pytest.mark.parametrize("validations", [1, 2, 7, 60])
def test_a_trajectory_is_marked_where_the_constraint_is_violated(
    validations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    run = two_constraints(validations)
    figure = drawn(draw_trajectory, run, tmp_path / "trajectory.png", monkeypatch)
    assert len(figure.axes) == 2
    for axes, name in zip(figure.axes, run.constraints, strict=True):
        lines = {str(line.get_label()).partition(":")[0]: line for line in axes.lines}
        epsilon = run.find_epsilon(name)
        assert epsilon is not None
        values = run.get_stream_values(f"constraint/{name}/value")[1]
        for label, is_violated in (("feasible", False), ("violated", True)):
            expected = [value for value in values if (value > epsilon) == is_violated]
            assert (list(lines[label].get_ydata()) if label in lines else []) == expected
        assert lines["kept"].get_ydata() == values[validations // 2]
        assert axes.get_ylim()[1] > epsilon  # the infeasible side is seen
        labels = [label for label in axes.texts if label.get_text()]
        assert {f"step {run.kept_step}", f"step {4 * validations - 2}"} <= {label.get_text() for label in labels}
        assert len(labels) <= 5
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    assert [str(warning.message) for warning in recwarn] == []


def test_values_that_are_not_finite_are_left_out(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run = two_constraints(7)
    for name, (steps, values) in list(run.metrics.items()):
        run.metrics[name.removeprefix("val/")] = (steps, [*values[:5], math.nan, math.inf])
        run.metrics[name] = (steps, [*values[:5], math.nan, math.inf])
    run.metrics["multiplier/nll"] = run.metrics["constraint/nll/value"]
    files = draw_run(run, tmp_path, ["png"])
    assert files["dual"] == [tmp_path / "dual.png"]
    assert files["trajectory"] == [tmp_path / "trajectory.png"]
    assert [str(warning.message) for warning in recwarn] == []


def test_a_run_that_fine_tunes_shows_its_nll(tmp_path: Path) -> None:
    metrics = {"train/nll": ([0, 1], [6.0, 5.0]), "val/retain/nll": ([1], [5.5]), "test/retain/nll": ([1], [5.5])}
    files = draw_run(RunLog(metrics, {"retain/nll": 6.5}, None, [], []), tmp_path, ["svg"])
    assert list(files) == ["finetuning", "tokens"]
    text = comments(tmp_path / "finetuning.svg")
    for label in ("train, batch of the step", "retain, all examples", "NLL (nats per token)"):
        assert f"<!-- {label} -->" in text
    assert "test" not in text


@pytest.mark.parametrize("draw", [draw_dual, draw_trajectory, draw_finetuning])
def test_there_may_be_nothing_to_draw(draw: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(NothingToDraw, match=r"was logged|no validation"):
        draw(RunLog({"train/loss": ([0], [1.5])}, {}, None, [], []), tmp_path / "picture.svg")
    assert not list(tmp_path.iterdir())
