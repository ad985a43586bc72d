from __future__ import annotations

import struct

import pytest
from matplotlib import image

from lit_unlearn.evaluation.picture import draw_run, read_metrics

METRICS = """\
constraint/nll/value,epoch,forget/loss,multiplier/nll,step,val/constraint/nll/value,val/forget/margin
0.2,0,210.5,100.0,0,,
0.25,0,150.0,99.5,1,,
,0,,,1,0.22,9.5
0.4,1,60.0,100.0,2,,
nan,1,20.0,101.5,3,,
,1,,,3,0.28,3.25
"""


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(METRICS, encoding="utf-8")
    return path


def test_read_metrics(metrics):
    series = read_metrics([metrics])
    steps, values = series.pop("constraint/nll/value")
    assert steps == [0, 1, 2, 3]
    assert values[:3] == [0.2, 0.25, 0.4]
    assert values[3] != values[3]  # a NaN is kept
    assert series == {
        "forget/loss": ([0, 1, 2, 3], [210.5, 150.0, 60.0, 20.0]),
        "multiplier/nll": ([0, 1, 2, 3], [100.0, 99.5, 100.0, 101.5]),
        "val/constraint/nll/value": ([1, 3], [0.22, 0.28]),
        "val/forget/margin": ([1, 3], [9.5, 3.25]),
    }


def test_a_png_shows_every_colour(metrics, tmp_path):
    target = tmp_path / "run.png"
    draw_run([metrics], target, {"nll": 0.3})
    content = target.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1050, 1050)
    pixels = (image.imread(target)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)):  # forget, retain, λ
        assert (abs(pixels - colour).max(axis=1) < 3).sum() > 20


def test_an_svg_names_what_is_drawn(metrics, tmp_path):
    target = tmp_path / "run.svg"
    draw_run([metrics], target, {"nll": 0.3, "news": 1.5})
    text = target.read_text(encoding="utf-8")
    assert "<svg" in text
    for label in (
        "nll, per step",
        "nll, all retain rows",
        "ε nll = 0.3",
        "ε news = 1.5",  # a bound without measurements is drawn all the same
        "λ nll",
        "multiplier λ",
        "forget objective, per step",
        "mean logit margin, all forget rows",
        "optimizer step",
    ):
        assert f"<!-- {label} -->" in text
    assert "news, per step" not in text
    assert text.count('id="axes_') == 3


def test_metrics_of_another_run_leave_an_empty_frame(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,0,1.5\n")
    draw_run([tmp_path / "metrics.csv"], tmp_path / "run.svg", {})
    text = (tmp_path / "run.svg").read_text()
    assert text.count('id="axes_') == 3
    assert 'id="legend' not in text
