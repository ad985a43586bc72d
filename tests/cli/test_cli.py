"""The command line as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import ROOT, UNLEARN, instantiate, quick
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_unlearn import LitEvaluate, LitFinetune, LitUnlearn, cli
from lit_unlearn.callbacks import StopAtDamage

# All but policies, lists of attacks and sweeps, which are no configurations of a run.
CONFIGS = sorted(
    file for file in (ROOT / "configs").rglob("*.yaml") if file.parent.name not in ("policy", "attack", "sweep")
)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["-h"], []])
def test_version_and_help_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from lit_unlearn.cli import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules); sys.exit(f'{heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("lit-unlearn 0", "usage: lit-unlearn COMMAND"))


@pytest.mark.usefixtures("draws_pictures")
def test_a_fit_leaves_model_metrics_picture_and_report(in_tmp: Path, model_dir: str, capsys: Any) -> None:
    before = AutoModelForCausalLM.from_pretrained(model_dir)
    cli.main(
        quick(
            model_dir,
            "--model.constraints.nll.epsilon.relative=0.3",
            "--model.constraints.nll.warmup_epochs=1",
            "--picture.answers=1",
        )
    )
    folder = in_tmp / "log" / "run" / "version_0"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    reference = report["before"]["constraint/nll/value"]
    assert report["constraints"]["nll"]["epsilon"] == pytest.approx(1.3 * reference)
    assert report["after"]["forget/margin"] < report["before"]["forget/margin"]
    assert report["steps"] == 4
    assert all((folder / f"{name}.png").stat().st_size > 10_000 for name in ("dual", "trajectory", "tokens"))
    assert "multiplier/nll" in (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()[0]
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert "0.3" in str(saved["model"])
    after, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    assert (in_tmp / "out" / "model.safetensors").is_file()
    assert tokenizer.eos_token is not None
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert not any(torch.equal(b, a) for b, a in pairs)  # what was trained is what is exported
    assert "(feasible)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_misses_what_is_required_fails(in_tmp: Path, model_dir: str) -> None:
    required = ("--report.max_forget_probability=1e-9", "--report.require_forgotten=true")
    with pytest.raises(SystemExit, match="max_forget_probability"):
        cli.main(quick(model_dir, *required, "--trainer.max_steps=1"))
    with pytest.raises(SystemExit, match="nll"):
        cli.main(quick(model_dir, "--report.require_feasible=true", "--model.constraints.nll.epsilon=0.01"))


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_checkpoint(in_tmp: Path, model_dir: str) -> None:
    constant = "--model.scheduler=null"  # a schedule over the shorter run would have other rates
    cli.main(quick(model_dir, constant, "--trainer.max_epochs=4"))
    cli.main(quick(model_dir, constant, "--trainer.max_epochs=2", "--export.dirpath=half"))
    checkpoint = in_tmp / "log" / "run" / "checkpoints" / "last-step=4.ckpt"
    cli.main(
        quick(model_dir, constant, "--trainer.max_epochs=4", "--export.dirpath=resumed", f"--ckpt_path={checkpoint}")
    )
    reports = [json.loads((in_tmp / "log" / "run" / f"version_{n}" / "report.json").read_text()) for n in (0, 2)]
    for report in reports:
        del report["seconds"], report["peak_memory_mib"]
    assert reports[0] == reports[1]  # "before" too: it is the model before unlearning, not before resuming
    whole, resumed = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("out", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_measuring_without_training(command: str, in_tmp: Path, model_dir: str, capsys: Any) -> None:
    arguments = quick(model_dir)[1:]
    kept = [a for a in arguments if not a.startswith(("--export", "--report"))]
    shared = yaml.safe_load(UNLEARN.read_text(encoding="utf-8"))  # the demo's own file works for validate as it is
    assert {"export", "report"} <= shared.keys()
    cli.main([command, *kept])
    assert f"{'val' if command == 'validate' else 'test'}/forget/margin" in capsys.readouterr().out


def test_tokenizer_command(in_tmp: Path) -> None:
    cli.main(["tokenizer", "--config", "demo/tokenizer.yaml", "--vocab_size=300", "--output=tok"])
    assert len(AutoTokenizer.from_pretrained("tok")) == 300


def test_a_vocabulary_without_room_for_the_bytes_is_refused(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tokenizer", "--config", "demo/tokenizer.yaml", "--vocab_size=257", "--output=tok"])
    assert "error: `vocab_size` must be a whole number of at least 258, not 257" in capsys.readouterr().err
    assert not Path("tok").exists()


def test_a_local_file_comes_before_the_packaged_one(in_tmp: Path) -> None:
    packaged = cli.find_configs(
        ["fit", "--config", "tofu.yaml", "-c=configs/demo/unlearn.yaml", "--config=nowhere.yaml"]
    )
    assert packaged == ["fit", "--config", str(ROOT / "configs/tofu.yaml"), f"-c={UNLEARN}", "--config=nowhere.yaml"]
    (in_tmp / "tofu.yaml").touch()
    assert cli.find_configs(["fit", "--config", "tofu.yaml"])[2] == "tofu.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=pytest.mark.neighbour if path.stem == "lm_eval" else ()) for path in CONFIGS],
    ids=lambda path: str(path.relative_to(ROOT / "configs")),
)
def test_every_config_parses_and_instantiates(
    config: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, model_dir: str, tokenizer_dir: str
) -> None:
    for target in (
        "runs/demo/target",
        "runs/tofu/target",
        "runs/real/target",
        "path/or/hub-name",
    ):  # what the files before it in the Makefile would have made
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).symlink_to(model_dir)
    if config.stem == "lm_eval":
        pytest.importorskip("lm_eval", reason="the extra 'neighbours' is not installed")
    if "tokenizer" in config.stem:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        assert {"data", "vocab_size", "output"} == settings.keys()
        return  # test_tokenizer_command runs one
    # What the overlays go over.
    bases = {
        "tofu_unlearn.yaml": "tofu.yaml",
        "tofu_eval.yaml": "eval/tofu.yaml",
        "retain_only.yaml": "real/target.yaml",
    }
    families = {
        "hardware": "demo/unlearn.yaml",
        "method": "demo/unlearn.yaml",
        "matched": "demo/unlearn.yaml",
        "robust": "demo/unlearn.yaml",
        "paper": f"{config.stem.split('_')[0]}.yaml",
    }
    base = bases.get(config.name) or families.get(config.parent.name)
    files = (["--config", str(ROOT / "configs" / base)] if base else []) + ["--config", str(config)]
    evaluates = "eval" in (config.parent.name, config.stem.rpartition("_")[2])
    made = instantiate(["test" if evaluates else "fit", *files, "--trainer.accelerator=cpu"], monkeypatch)
    finetunes = "target" in config.stem or config.stem == "retain_only"
    kind = LitEvaluate if evaluates else LitFinetune if finetunes else LitUnlearn
    assert isinstance(made.model, kind)
    complete = config.stem in ("tofu", "muse", "lume", "unlearn") and not evaluates
    if complete:  # every key of every class family is written down
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
        nll = settings["constraints"]["nll"]
        keys = {"LogitMargin": {"power", "alignment"}, "MatchCalibrated": {"stream", "token_weight", "temperature"}}
        assert settings["forget"]["init_args"].keys() == keys[settings["forget"]["class_path"]]
        assert nll["multiplier"]["init_args"].keys() == {"lr", "init", "max"}
        assert nll.keys() == {"objective", "epsilon", "multiplier", "stream", "warmup_epochs"}


@pytest.mark.parametrize(("measure", "rows"), [("kl", 64), ("nll", None)])
def test_any_method_ends_at_matched_damage(
    measure: str, rows: int | None, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = ["tofu.yaml", "method/npo_constrained.yaml", f"method/matched/{measure}.yaml"]
    files = [f"--config={ROOT / 'configs' / config}" for config in configs]
    made = instantiate(["fit", *files, "--trainer.accelerator=cpu"], monkeypatch)
    (stop,) = [callback for callback in made.trainer.callbacks if isinstance(callback, StopAtDamage)]
    assert (stop.measure, stop.rows, made.model.keep) == (measure, rows, "last")
    assert made.trainer.callbacks.index(stop) < made.trainer.callbacks.index(made.config_init["fit"].report)


def test_the_papers_run(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = instantiate(["fit", "--config", "tofu.yaml", "--trainer.accelerator=cpu"], monkeypatch)
    nll = made.model.constraints["nll"]
    assert (nll.epsilon, nll.multiplier.value, nll.multiplier.lr, nll.warmup_epochs) == (0.3, 100.0, 5.0, 5)
    (optimizer,) = [made.model._optimizer([torch.nn.Parameter(torch.zeros(1))])]
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-5, 0.01)
    assert made.datamodule.sources["forget"].name == "forget10"
    assert made.datamodule.sources["retain"].name == "retain90"


def test_overrides_reach_the_objects(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, model_dir: str) -> None:
    made = instantiate(
        quick(
            model_dir,
            "--model.constraints.nll.multiplier.lr=7",
            "--model.forget.power=1",
            "--model.optimizer.lr=0.5",
            "--trainer.gradient_clip_val=0.25",
        ),
        monkeypatch,
    )
    assert made.model.constraints["nll"].multiplier.lr == 7
    assert made.model.forget.power == 1
    assert made.model.gradient_clip_val == 0.25  # Lightning refuses its own flag under manual optimisation
    assert made.trainer.gradient_clip_val is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--model.constraints.nll.epsilon=-0.5", "`epsilon` must be finite and above 0, not -0.5"),
        ("--model.constraints.nll.epsilon=.nan", "`epsilon` must be finite and above 0, not nan"),
        ("--model.constraints.nll.multiplier.init=-5", "`init` must be finite and at least 0, not -5"),
        ("--model.constraints.nll.epsilon.relative=-2", "`relative` must be finite and above -1"),
        ("--model.forget=LogitMargn", "model.forget: there is no class 'LogitMargn': did you mean 'LogitMargin'?"),
        ("--model.forget.powr=3", "LogitMargin has no setting 'powr': did you mean 'power'?"),
        ("--model.constraints.nll.warmup_epoch=3", "warmup_epoch"),
        ("--data=FictionalAuthorz", "data: there is no class 'FictionalAuthorz': did you mean 'FictionalAuthors'?"),
        ("--data.batch_size=0", "at least 1, not 0"),
        ("--data.forget_authors=3", "`forget_authors` must be at least 1 and below `num_authors`"),
        ("--model.lm.model=./nowhere", "./nowhere"),
        ("--model.lm.model=empty", "'empty'"),
        ("--trainer.max_epochs=many", "trainer.max_epochs"),
        ("--config=missing.yaml", "there is no configuration file 'missing.yaml'"),
    ],
)
def test_bad_input_is_a_readable_error_before_any_training(
    extra: str, message: str, in_tmp: Path, model_dir: str, capsys: Any
) -> None:
    (in_tmp / "empty").mkdir()
    with pytest.raises(SystemExit) as end:
        cli.main(quick(model_dir, extra))
    text = str(end.value.code) + capsys.readouterr().err
    assert message in text
    assert len(text) < 600
    assert not (in_tmp / "log").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--trainer.accumulate_grad_batches=4", "`accumulate_grad_batches=4` is refused"),
        ("--trainer.gradient_clip_algorithm=value", "only clipping by the norm of the whole gradient is exact"),
        ("--trainer.overfit_batches=1", "Set `max_rows` of the data instead"),
        ("--trainer.reload_dataloaders_every_n_epochs=1", "every epoch has its own order anyway"),
        ("--trainer.strategy=fsdp", "the strategy 'fsdp' is refused: FSDP1 fails under manual optimisation"),
        ("--trainer.strategy=deepspeed_stage_2", "DeepSpeed keeps only the last of a step's backward passes"),
        ("--trainer.strategy=lightning.pytorch.strategies.FSDPStrategy", "configs/hardware/fsdp2.yaml"),
        ("--trainer.strategy=lightning.pytorch.strategies.XLAStrategy", "has not been shown to take exact steps"),
    ],
)
def test_trainer_flags_that_cannot_work_are_refused_with_what_to_write_instead(
    extra: str, message: str, in_tmp: Path, model_dir: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(quick(model_dir, extra))
    assert message in str(end.value.code) + capsys.readouterr().err
    assert not (in_tmp / "log").exists()


@pytest.mark.slow
def test_last_goes_on_where_there_is_something_and_says_what_changed(in_tmp: Path, model_dir: str, caplog: Any) -> None:
    arguments = quick(model_dir, "--model.scheduler=null", "--ckpt_path=last")
    with caplog.at_level("INFO"):
        cli.main([*arguments, "--trainer.max_epochs=1"])
    assert "no checkpoint of this run in log/run/checkpoints" in caplog.text
    assert "resumed with changed settings" not in caplog.text
    with caplog.at_level("INFO"):
        cli.main([*arguments, "--trainer.max_epochs=3", "--model.constraints.nll.multiplier.lr=7"])
    said = next(record.getMessage() for record in caplog.records if "changed settings" in record.getMessage())
    assert "model.init_args.constraints.nll.multiplier.init_args.lr: 100.0 → 7.0" in said
    assert "trainer.max_epochs: 1 → 3" in said
    assert said.count("→") == 2
    report = json.loads((in_tmp / "log/run/version_1/report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 6
    steps = (in_tmp / "log/run/version_1/metrics.csv").read_text(encoding="utf-8")
    assert ",2," in steps
    assert [path.name for path in (in_tmp / "log/run/checkpoints").iterdir()] == ["last-step=6.ckpt"]


def test_several_constraints_are_overridden_by_key(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, model_dir: str, rows_dir: str
) -> None:
    (in_tmp / "general.yaml").write_text(
        "model:\n  constraints:\n    nll: {}\n    general:\n      objective: {class_path: NLL}\n      epsilon: 0.3\n"
        "      multiplier: {class_path: PIMultiplier, init_args: {lr: 1, kp: 4, init: 10}}\n      stream: general\n"
        f"data:\n  init_args:\n    streams: {{general: {rows_dir}/general.jsonl}}\n",
        encoding="utf-8",
    )
    extra = ["--config=general.yaml", "--model.constraints.general.epsilon=0.7", "--model.constraints.nll.epsilon=0.4"]
    arguments = quick(model_dir)
    made = instantiate([*arguments[:2], *extra, *arguments[2:]], monkeypatch)
    constraints = made.model.constraints
    assert {name: constraint.epsilon for name, constraint in constraints.items()} == {"nll": 0.4, "general": 0.7}
    assert (constraints["general"].multiplier.kp, constraints["general"].stream) == (4, "general")
    assert constraints["nll"].multiplier.lr == 100
    assert made.datamodule.sources.keys() == {"forget", "retain", "general"}


@pytest.mark.parametrize(
    ("rows", "extra", "message"),
    [
        (None, [], "the forget set's file"),
        ([], [], "the forget set is empty"),
        ([{"prompt": "q", "answer": "a"}], [], "the forget set has no column 'question'"),
        ([{"question": "q", "answer": ""}], [], "row 0 of the forget set has no supervised token"),
        ([{"question": "q " * 300, "answer": "a"}], [], "fills `max_length` (100); raise it."),
        ([{"question": "q", "answer": "a"}], ["--model.lm.tokenizer=no-eos"], "has no end-of-sequence token"),
    ],
)
def test_bad_rows_are_refused_before_the_model_is_loaded(
    rows: Any,
    extra: list[str],
    message: str,
    in_tmp: Path,
    write_rows: Callable[..., str],
    model_dir: str,
    tokenizer: Any,
    capsys: Any,
) -> None:
    if "no-eos" in str(extra):
        bare = AutoTokenizer.from_pretrained(model_dir, eos_token=None, bos_token=None, pad_token=None)
        bare.save_pretrained("no-eos")
    if rows is not None:
        write_rows("forget.jsonl", rows)
    write_rows("retain.jsonl", [{"question": "What?", "answer": "That."}])
    arguments = [a for a in quick(model_dir, *extra) if not a.startswith("--data")]
    files = ["--data=ForgetRetain", "--data.forget=forget.jsonl", "--data.retain=retain.jsonl", "--data.max_length=100"]
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, *files])
    assert message in str(end.value.code) + capsys.readouterr().err


def test_own_files_end_to_end(
    in_tmp: Path, write_rows: Callable[..., str], model_dir: str, recwarn: pytest.WarningsRecorder
) -> None:
    write_rows("forget.jsonl", [{"q": f"Who is {n}?", "a": f"Person {n}."} for n in range(3)])
    write_rows("retain.jsonl", [{"q": f"Who is {n}?", "a": f"Person {n}."} for n in range(2, 9)])
    arguments = [a for a in quick(model_dir) if not a.startswith("--data")]
    columns = ["--data.question_column=q", "--data.answer_column=a"]
    cli.main([*arguments, "--data=ForgetRetain", "--data.forget=forget.jsonl", "--data.retain=retain.jsonl", *columns])
    assert any("1 of 3 forget rows are also retain rows" in str(warning.message) for warning in recwarn)
    assert (in_tmp / "out" / "model.safetensors").is_file()


def test_our_errors_have_no_traceback_but_others_do(
    in_tmp: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        int("x")

    monkeypatch.setattr("lightning.pytorch.Trainer.fit", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(quick(model_dir))
