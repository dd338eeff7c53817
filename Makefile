# make run          start a server on embedded defaults and walk through the demo; ARGS=--once ends after it
# make test         every check that CI runs, in the order in which they fail fastest
# make bench        the benchmark table
# make lint, unit, integration, clean
# PYTHON=…          the interpreter for .venv (any ≥ 3.11); ARGS=… goes to the demo, the benchmark or pytest

PY := .venv/bin/python

.PHONY: run test lint unit integration bench clean
.NOTPARALLEL:

run:
	@PYTHON="$(PYTHON)" .ci/environment run
	@exec .venv/bin/gatehouse demo $(ARGS)

test:
	@PYTHON="$(PYTHON)" .ci/environment test
	@missing=$$(sh tests/parts.sh) && export MISSING_PARTS="$$missing" && \
		$(MAKE) --no-print-directory lint && exec $(PY) -m tests unit integration -- $(ARGS)

lint:
	@PYTHON="$(PYTHON)" .ci/environment test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

unit:
	@PYTHON="$(PYTHON)" .ci/environment test
	@exec $(PY) -m tests unit -- $(ARGS)

integration:
	@PYTHON="$(PYTHON)" .ci/environment test
	@exec $(PY) -m tests integration -- $(ARGS)

bench:
	@PYTHON="$(PYTHON)" .ci/environment test
	@exec $(PY) -m tests.bench $(ARGS)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
