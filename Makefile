# Three commands do everything on a fresh machine: `make demo`, `make real` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOFU ?= ../shared/data/tofu

.PHONY: demo real tofu test slow neighbours kernel lint bench gpu examples wheel readme results docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing the package with torch and transformers into $(VENV), which takes minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev]
	touch $@

# Builds the documentation; the package's own libraries are not needed for it, but are there for `make test` anyway.
$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .[docs]
	touch $@

# Reads models in GGUF.
$(VENV)/.installed-gguf: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .[gguf]
	touch $@

# The tools of docs/neighbours.md. The first two are only to be had as source: to build them in isolation, pip fetches setuptools once more for
# each, which has hung.
$(VENV)/.installed-neighbours: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation word2number sqlitedict
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .[neighbours] "ray[tune]"
	touch $@

# Fine-tune a tiny model on the embedded authors, unlearn two of them, and audit that; fails if they are not forgotten or a constraint
# is violated.
demo: $(VENV)/.installed
	$(BIN)/lit-unlearn tokenizer --config configs/demo/tokenizer.yaml
	$(BIN)/lit-unlearn fit --config configs/demo/target.yaml
	$(BIN)/lit-unlearn fit --config configs/demo/unlearn.yaml
# The audit's verdict is what the demo shows: fail (1) and not decidable (3) are no failure of the demo, if an audit was written.
	@rm -rf runs/demo/audit
	$(BIN)/lit-unlearn audit runs/demo/unlearned --policy policy/short.yaml --before runs/demo/target --output runs/demo/audit \
	  || { code=$$?; test -f runs/demo/audit/audit.html && { test $$code -eq 1 || test $$code -eq 3; }; }
	@echo "for people: runs/demo/audit/audit.html; what the verdict means: docs/audit.md"

# A pretrained model of 135M parameters forgets a person, beside a retain-only model; 15 minutes on two idle cores that multiply matrices in
# bfloat16, and over an hour on others (docs/real.md). The same command resumes it. TOFU comes from the hub, unless there is a folder with its files.
REAL_TOFU = $(or $(wildcard $(TOFU)),$(if $(filter file,$(origin TOFU)),locuslab/TOFU,$(TOFU)))
real: $(VENV)/.installed-gguf
	$(BIN)/python -m benchmarks.real --tofu $(REAL_TOFU)

# The same as the demo on TOFU rows, beside a retain-only model, and TOFU's benchmark on all three:
# make tofu TOFU=<folder with forget01.json, forget01_perturbed.json, retain99.json, …>
TOFU_TEST = $(BIN)/lit-unlearn test --config configs/eval/tofu.yaml --config configs/demo/tofu_eval.yaml --model.benchmark.source $(TOFU)
tofu: $(VENV)/.installed
	$(BIN)/lit-unlearn tokenizer --config configs/demo/tofu_tokenizer.yaml --data.source $(TOFU)
	$(BIN)/lit-unlearn fit --config configs/demo/tofu_target.yaml --data.source $(TOFU)
	$(BIN)/lit-unlearn fit --config configs/demo/tofu_target.yaml --data.source $(TOFU) --data.train_on=retain \
	  --logs.name=finetune_retain_only --export.dirpath=runs/tofu/retain_only
	$(BIN)/lit-unlearn fit --config configs/tofu.yaml --config configs/demo/tofu_unlearn.yaml --data.source $(TOFU)
	$(TOFU_TEST) --model.lm.model runs/tofu/retain_only --model.results runs/tofu/retain_only.json
	$(TOFU_TEST) --model.lm.model runs/tofu/target --model.results runs/tofu/target.json
	$(TOFU_TEST) --model.lm.model runs/tofu/unlearned --model.results runs/tofu/unlearned.json
	$(BIN)/lit-unlearn compare runs/tofu/target.json runs/tofu/retain_only.json runs/tofu/unlearned.json \
	  --retain runs/tofu/retain_only.json --figure runs/tofu/compare.png

# The default tests, in two processes with one thread each. Another number: make test PROCESSES=8
PROCESSES ?= 2
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES)

# The tests that start whole commands or many processes; they take minutes.
slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not neighbour" -n $(PROCESSES) --dist worksteal

# Those of the slow tests that need other tools, which are installed first.
neighbours: $(VENV)/.installed-neighbours
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m neighbour -n $(PROCESSES) --dist worksteal

# The margin's Triton kernel, in Triton's interpreter. Triton (200 MB) comes with torch for CUDA alone: here, it lies beside the environment.
build/triton/.installed: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/triton triton==3.7.1
	touch $@

kernel: build/triton/.installed
	TRITON_INTERPRET=1 PYTHONPATH=build/triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/functional/test_margin_kernel.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Measure step time and memory against the straightforward formulation, and how they scale: tables, and JSON in build/bench.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.scaling

# Prove and measure on a GPU, in under ten minutes; the same command continues. It runs in the environment of PYTHON, which has the CUDA
# build of torch and the package with its tests: constraints.txt names that of a CPU.
gpu:
	$(PYTHON) -m benchmarks.gpu

# Run the scripts of examples/ on the demo's target model, but those that need other tools.
examples: runs/demo/target/config.json
	for script in $(filter-out examples/optuna_search.py examples/ray_search.py,$(wildcard examples/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

runs/demo/target/config.json:
	$(MAKE) demo

# Build wheel and sdist, check what an index checks, install the wheel outside of the checkout, and run the demo from its packaged files.
wheel: $(VENV)/.installed-dev
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist
	$(BIN)/twine check --strict build/dist/*
	.ci/wheel build/dist/*.whl $(VENV)

# Write every figure, table and picture of the README from the commands that it names; half an hour on two cores.
readme: $(VENV)/.installed-dev
	$(MAKE) demo tofu bench
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.readme

# Write the tables and pictures of docs/results.md from the stored results of benchmarks.quality.
results: $(VENV)/.installed
	$(BIN)/python -m benchmarks.quality.gradients
	$(BIN)/python -m benchmarks.quality.bound_pictures
	$(BIN)/python -m benchmarks.quality.tables
	$(BIN)/python -m benchmarks.readme comparison

# Build the documentation site into build/site; a broken link, anchor or reference is an error. Not with --quiet: only warnings that are
# printed count.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) runs build
