"""``--print_config`` gives what people can read and what, read again, is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import quick

from lit_unlearn import cli
from lit_unlearn.cli.settings import format_settings

COMPLETE = {
    "tofu.yaml": [],
    "muse.yaml": [],
    "lume.yaml": [],
    "demo/target.yaml": [],
    "demo/unlearn.yaml": ["--trainer.num_sanity_val_steps=null", "--model.constraints.nll.multiplier=FixedMultiplier"],
}


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert not end.value.code
    return capsys.readouterr().out


def read(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Every setting, as jsonargparse prints what differs from the defaults."""
    return yaml.safe_load(printed([*arguments, "--print_config=skip_default"], capsys))


@pytest.mark.parametrize("config", COMPLETE)
def test_it_round_trips(config: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = [*COMPLETE[config], "--model.constraints.nll.multiplier.weight=3"] if COMPLETE[config] else []
    arguments = ["fit", "--config", config, *extra]
    text = printed([*arguments, "--print_config"], capsys)
    Path("again.yaml").write_text(text, encoding="utf-8")
    assert read(["fit", "--config=again.yaml"], capsys) == read(arguments, capsys)
    assert printed(["fit", "--config=again.yaml", "--print_config"], capsys) == text


def test_it_is_for_people(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["fit", "--config", "demo/unlearn.yaml", "--print_config"], capsys)
    settings = yaml.safe_load(text)
    assert list(settings)[:4] == ["model", "data", "trainer", "logs"]
    assert settings["data"]["init_args"]["seed"] == 0  # a default in force
    assert "# not set: config, tokenizer, revision" in text
    assert None not in settings["trainer"].values()
    assert yaml.safe_load(printed(["fit", "--print_config=skip_default"], capsys)) == {}


def test_a_null_in_place_of_a_default_stays() -> None:
    settings = {"a": None, "model": {"b": None, "c": None, "d": 1}}
    text = format_settings(settings, {"model": {"c": None}}, "# made by")
    assert text == "# made by\nmodel:\n  c: null\n  d: 1\n  # not set: b\n# not set: a\n"


def test_null_on_the_command_line_is_null_within_a_class_within_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["test", "--config=eval/lume.yaml", "--model.benchmark.template=null", "--print_config"]
    settings = yaml.safe_load(printed(arguments, capsys))
    assert settings["model"]["init_args"]["benchmark"]["init_args"]["template"] is None


@pytest.mark.slow
def test_the_saved_configuration_names_every_setting(in_tmp: Path, model_dir: str) -> None:
    cli.main(quick(model_dir, "--trainer.max_steps=1"))
    saved = yaml.safe_load((in_tmp / "log/run/version_0/config.yaml").read_text(encoding="utf-8"))
    assert saved["trainer"]["precision"] is None
