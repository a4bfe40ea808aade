# Every target sets up what it needs: Python 3.11 or newer and make are enough.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint combinations chaos bench picture clean

TEMPLATE := {{cookiecutter.project_slug}}
STAMP := .venv/.installed
GENERATE := .venv/bin/python -m cookiecutter . --no-input --default-config --output-dir

# Cookiecutter copies whatever lies in the template folder, so every cache is kept out of it.
export PYTHONPYCACHEPREFIX := $(CURDIR)/.cache/pycache
export RUFF_CACHE_DIR := $(CURDIR)/.cache/ruff
export MYPY_CACHE_DIR := $(CURDIR)/.cache/mypy
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@echo "make demo     generate a project and train it on real digits"
	@echo "make test     run the tests of the template"
	@echo "make test-all run the long ones, too: many processes that are started and killed"
	@echo "make lint     check style and types"
	@echo "make combinations  put a project of every combination of answers through what its user does"
	@echo "make chaos    kill training runs over 100 times, and check that they end as if nobody had"
	@echo "make bench    race the Trainer against a loop written by hand and against its peers; PUBLISH=1 renews docs/speed.md"
	@echo "make picture  take the pictures of make demo and its report that the README shows (needs Chromium)"
	@echo "make clean    remove everything that the other targets made"
	@echo "Further arguments: make demo ARGS='--max_epochs 3', make test ARGS='-x -k generation'"

demo: $(STAMP)
	rm -rf build/demo
	$(GENERATE) build/demo
	@"$(MAKE)" --no-print-directory -C build/demo/my-project train VENV="$(CURDIR)/.venv"
	@echo "Its folder       build/demo/my-project"

# One test process for each CPU, with one thread each, so that they do not get in each other's way.
test: $(STAMP)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto -m "not long" $(ARGS)

test-all: $(STAMP)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto $(ARGS)

lint: $(STAMP)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	cd '$(TEMPLATE)' && ../.venv/bin/python -m mypy

# The peers get environments of their own below build/peers, which this makes once. PUBLISH=1 renews docs/speed.md.
bench: $(STAMP)
	.venv/bin/python benchmarks/run.py $(if $(PUBLISH),--publish) $(ARGS)

combinations: $(STAMP)
	.venv/bin/python tools/combinations.py

chaos: $(STAMP)
	.venv/bin/python tools/chaos.py $(ARGS)

picture: $(STAMP)
	.venv/bin/python tools/screenshot.py --columns 88 --title "make demo" docs/images/demo.svg -- "$(MAKE)" -s demo
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1120,1240 \
	  --screenshot=docs/images/report.png \
	  "file://$(CURDIR)/build/demo/my-project/logs/standard_net/version_0/report/report.html"

clean:
	rm -rf .venv build .cache *.egg-info

# The dependencies of a generated project are installed from a generated project, which proves its list.
$(STAMP): pyproject.toml $(TEMPLATE)/pyproject.toml
	@if [ ! -x .venv/bin/pip ]; then \
	  for python in python3 python3.14 python3.13 python3.12 python3.11 none; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	  done; \
	  if [ "$$python" = none ]; then \
	    echo "error: no Python 3.11 or newer is on the PATH as python3 or python3.11 to python3.14;" \
	      "install one and run make again." >&2; \
	    exit 1; \
	  fi; \
	  echo "Setting up .venv: this is done once and takes some minutes, most of them for torch."; \
	  "$$python" -m venv --clear .venv; \
	fi
	.venv/bin/python -m pip install --quiet --editable .
	rm -rf build/install
	$(GENERATE) build/install > /dev/null
	.venv/bin/python -m pip install "./build/install/my-project[dev]"
	@touch $@
