# `make demo` and `make test` are all one needs; each sets up what is missing first.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: real long interop reproduce bench-test chaos docs demo families test lint types unit format lock wheel-check setup clean-venv help

BIN := .venv/bin

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

demo: .venv/.ready ## the whole loop on the embedded model, on this machine's CPU
	@$(BIN)/spa demo $(ARGS)

test: lint types ## lint, types, all tests but `make long`'s, coverage of the pure rooms
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 40 --cov --cov-fail-under=0 --cov-report= -m "not bench and not chaos and not alone and not long" $(ARGS)
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 15 --cov --cov-append --cov-report=term -m "alone and not families and not long" --ignore tests/test_engine_vllm.py $(ARGS)
	$(BIN)/python -m pytest -m "alone and not long" tests/test_engine_vllm.py $(ARGS) # an engine that ends takes the process group of other tests with it
	$(BIN)/python -m pytest -m chaos $(ARGS)

real: .venv/.ready ## the whole loop on a real instruct model of 135 M parameters (about 20 minutes)
	@$(BIN)/python scripts/real.py $(ARGS)

long: .venv/.ready ## what takes minutes each: killed runs, growing clusters, ZeRO-3 memory, TRL's curve, all examples
	$(BIN)/python -m pytest -m "long and not alone" --durations 10 $(ARGS)
	$(BIN)/python -m pytest -m "long and alone" --durations 10 $(ARGS)
	SPA_ALL_EXAMPLES=1 $(BIN)/python -m pytest -n 2 tests/test_generation_fuzz.py tests/test_preferences_*.py $(ARGS)

reproduce: .venv/.ready ## the SPA paper's tables on the embedded world, 5 seeds (about 90 minutes; ARGS=--extended: 4 hours)
	@$(BIN)/spa reproduce --paper spa $(ARGS)

unit: .venv/.ready ## the tests that start no engine
	$(BIN)/python -m pytest -m "not engine and not bench and not chaos" $(ARGS)

interop: .venv/.ready ## compare with lm-evaluation-harness, and open our pairs in other trainers (.cache/interop; 15 minutes)
	scripts/interop.sh
	$(BIN)/python scripts/real_model.py smollm2-135m .cache/real/smollm2-135m
	$(BIN)/python -m pytest -n0 -m long tests/test_interop.py tests/test_interop_pairs.py $(ARGS)

bench-test: .venv/.ready ## every benchmark at toy size
	$(BIN)/python -m pytest -m bench $(ARGS)

families: .venv/.ready ## every model family through rendering, training, export and vLLM; writes docs/MODELS.md
	SPA_FAMILIES_OUT=docs/MODELS.json $(BIN)/python -m pytest -m alone tests/test_families.py $(ARGS)
	$(BIN)/python scripts/families_doc.py

chaos: .venv/.ready ## kill generation and training at random, again and again, and look for what it cost (up to 2 hours)
	$(BIN)/python -m tests.chaos_generation --schedules 100
	$(BIN)/python -m tests.chaos_generation --schedules 5 --engine vllm
	$(BIN)/python -m tests.chaos_training --kills 20

lint: .venv/.ready ## ruff, lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready ## mypy
	$(BIN)/mypy

format: .venv/.ready ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: .venv/.ready ## resolve pyproject.toml into requirements/*.lock (ARGS=--upgrade takes newer versions)
	scripts/lock.sh $(ARGS)

docs: .venv/.ready ## write docs/CONFIG.md from the config models
	$(BIN)/python scripts/config_doc.py

wheel-check: .venv/.ready ## build wheel and sdist, and use the wheel outside the checkout
	scripts/wheel_check.sh

setup: .venv/.ready ## .venv from the lock

.venv/.ready: scripts/setup.sh requirements/cpu.lock requirements/gpu.lock pyproject.toml
	@scripts/setup.sh

clean-venv: ## remove .venv; the next call sets up again
	rm -rf .venv
