# A newcomer needs two: `make run` and `make test`. Bare `make` prints the list.

PYTHON ?= python3
VENV   ?= .venv
# What follows the command of a target, e.g. make test ARGS="-k reactions -x"
ARGS   ?=

BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Where it is set, each of the many processes of a test run compiles all modules for itself.
unexport PYTHONDONTWRITEBYTECODE

# The stamps remember what was installed: a repeat run installs again only when the lists have changed.
CREATED := $(VENV)/.created
RUNTIME := $(VENV)/.installed-runtime
DEV     := $(VENV)/.installed-dev

$(CREATED):
	@command -v $(PYTHON) >/dev/null || { echo "'$(PYTHON)' was not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Dialect needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1): name a newer one, e.g. make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(RUNTIME): requirements.txt $(CREATED)
	@echo "Installing what the server needs (a minute or so)..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(DEV): requirements-dev.txt requirements.txt $(CREATED)
	@echo "Installing what the server and its tests need (a minute or two)..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(RUNTIME)

.PHONY: help run test check lint format docs venv mysql mysql-stop chaos soak schemathesis fuzz browser deployment bench bench-peers clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: $(RUNTIME) ## install, migrate the database and start the server
	$(BIN)/python -m app migrate
	$(BIN)/python -m app $(ARGS)

test: $(DEV) ## run the tests on SQLite, and on MySQL too if DIALECT_TEST_MYSQL_URL is set
	$(BIN)/python -m pytest -n auto $(ARGS)

check: lint test ## everything a change must pass: lint, then the tests

lint: $(DEV) ## formatting, ruff, mypy, the import contracts, shell scripts, the Dockerfile and compose.yaml
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck scripts/*.sh .ci/run
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(DEV) ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DEV) ## refresh the generated documents
	$(BIN)/python scripts/settings_table.py --write
	$(BIN)/python scripts/metrics_table.py --write
	$(BIN)/python scripts/api_documents.py --write

venv: $(DEV) ## make .venv with everything that tests and checks need

mysql: ## start a throwaway MySQL 8+ without Docker and print its URL
	@scripts/mysql.sh start

mysql-stop: ## stop that MySQL
	@scripts/mysql.sh stop

chaos: $(DEV) ## attack the server and what it depends on; print what each promise is worth (docs/reliability.md)
	$(BIN)/python -m pytest tests/chaos -m chaos $(ARGS)

soak: $(DEV) ## half an hour of mixed load (DIALECT_SOAK_MINUTES=2: a short one); memory, tasks and files must not grow
	$(BIN)/python -m pytest -s -m soak tests/soak $(ARGS)

schemathesis: $(DEV) ## fuzz the HTTP API from its own OpenAPI document
	$(BIN)/python -m pytest -m schemathesis $(ARGS)

fuzz: $(DEV) ## 100,000 fuzzed frames through every door of the socket
	DIALECT_FUZZ_FRAMES=$${DIALECT_FUZZ_FRAMES:-100000} $(BIN)/python -m pytest -s tests/api/test_fuzz.py $(ARGS)

browser: $(DEV) ## open served files and /docs in Chromium; no script of a stranger may run
	$(BIN)/python -m pytest -m browser $(ARGS)

deployment: $(DEV) ## build and run the image and a real nginx; on Debian as root, no Docker needed
	$(BIN)/python -m pytest -m deployment -n 2 --dist loadfile $(ARGS)

bench: $(DEV) ## measure throughput and latency
	$(BIN)/python -m bench $(ARGS)

bench-peers: $(DEV) ## pairs and groups beside Debian's ejabberd with its archive in the same MySQL
	$(BIN)/python -m bench --peers $(ARGS)

clean: ## remove .venv and the tools' caches (no data)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
