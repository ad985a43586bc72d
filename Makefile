# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOFU ?= ../shared/data/tofu

.PHONY: demo tofu test lint bench examples wheel readme results clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev]
	touch $@

# Teaches a tiny model the embedded authors, makes it forget two of them; fails if it did not, or if the bound broke.
demo: $(VENV)/.installed
	$(BIN)/lit-unlearn tokenizer --config configs/demo/tokenizer.yaml
	$(BIN)/lit-unlearn fit --config configs/demo/target.yaml
	$(BIN)/lit-unlearn fit --config configs/demo/unlearn.yaml

# The same on real TOFU rows, beside a retain-only model, and TOFU's benchmark on all three:
# make tofu TOFU=<folder with forget01.json, forget01_perturbed.json, retain99.json, …>
TOFU_TEST = $(BIN)/lit-unlearn test --config configs/eval/tofu.yaml --config configs/demo/tofu_eval.yaml --model.benchmark.source $(TOFU)
tofu: $(VENV)/.installed
	$(BIN)/lit-unlearn tokenizer --config configs/demo/tofu_tokenizer.yaml --data.source $(TOFU)
	$(BIN)/lit-unlearn fit --config configs/demo/tofu_target.yaml --data.source $(TOFU)
	$(BIN)/lit-unlearn fit --config configs/demo/tofu_target.yaml --data.source $(TOFU) --data.train_on=retain \
	  --logs.name=teach_retain_only --export.dirpath=runs/tofu/retain_only
	$(BIN)/lit-unlearn fit --config configs/tofu.yaml --config configs/demo/tofu_unlearn.yaml --data.source $(TOFU)
	$(TOFU_TEST) --model.lm.model runs/tofu/retain_only --model.results runs/tofu/retain_only.json
	$(TOFU_TEST) --model.lm.model runs/tofu/target --model.results runs/tofu/target.json
	$(TOFU_TEST) --model.lm.model runs/tofu/unlearned --model.results runs/tofu/unlearned.json
	$(BIN)/lit-unlearn compare runs/tofu/target.json runs/tofu/retain_only.json runs/tofu/unlearned.json \
	  --retain runs/tofu/retain_only.json --figure runs/tofu/compare.png

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Step time and memory against the straightforward formulation, and how they scale; tables, and JSON in build/bench.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/scaling.py

# The scripts of examples/, on the demo's target model.
examples: runs/demo/target/config.json
	for script in examples/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

runs/demo/target/config.json:
	$(MAKE) demo

# Builds the wheel, installs it alone into an empty environment outside of the checkout, and runs the demo from its packaged files.
wheel: $(VENV)/.installed-dev
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist
	.ci/wheel build/dist/*.whl

# Every figure, table and picture of the README, from the commands that it names; half an hour on two cores.
readme: $(VENV)/.installed-dev
	$(MAKE) demo tofu bench
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/readme.py

# The tables of docs/results.md from the kept results of benchmarks/quality/sweep.py.
results: $(VENV)/.installed
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/quality/gradients.py
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/quality/bounds.py
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/quality/tables.py

clean:
	rm -rf $(VENV) runs build
