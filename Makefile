# A newcomer needs Python >= 3.10 and make: `make demo` paints, `make test` checks. Both create .venv on first use.
#
# Variables, all optional (make test PYTHON=python3.12):
#   PYTHON       the interpreter that .venv is made with
#   VENV         where the environment lies
#   OUT          where `make demo` writes
#   TORCH_INDEX  where torch is taken from besides pip's own sources. Unset: PyTorch's CPU index when it answers within
#                seconds, else pip's sources alone. Set: used as given. Empty: pip's sources alone.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out

# What constraints.txt pins; tests/test_packaging.py holds the two to each other.
EXTRAS := cpu,openvino,export,engines,bench,serve,ray,load,dev
FOLDERS := export engines runtime calibrate serve bench

export VENV

.PHONY: help demo test bench-quick check lock clean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1#/p' Makefile | awk -F'#' '{printf "%-14s %s\n", $$1, $$2}'

demo: $(VENV)/.ready ## export the trained shapes family, paint the contact sheet into out/
	$(VENV)/bin/tandemrt demo --output-dir $(OUT)

test: $(VENV)/.ready ## everything a change must pass: make check, then the tests
	scripts/check
	scripts/test

bench-quick: demo ## measure the demo's bundle beside diffusers, into out/bench, in some minutes
	$(VENV)/bin/tandemrt bench $(OUT)/shapes-bundle --steps 10,15 --checkpoint bench/shapes/weights/large \
		--small bench/shapes/weights/small --peer diffusers --target onnxruntime:cpu --target openvino:cpu:fp32 \
		--out $(OUT)/bench --force

check: $(VENV)/.ready ## style, types and import directions
	scripts/check

lock: ## resolve constraints.txt anew; needs python3.10 and python3.11
	$(PYTHON) scripts/lock.py $(EXTRAS) python3.10 python3.11

clean: ## remove the environment and everything built
	rm -rf $(VENV) $(OUT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(FOLDERS) tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready: pyproject.toml constraints.txt scripts/install $(VENV)/.files
	scripts/install $(PYTHON) $(EXTRAS)
	@touch $@

# The strict editable install links file by file, so a new file wants it run again; an edited one does not.
$(VENV)/.files: FORCE
	@mkdir -p $(VENV)
	@find $(FOLDERS) -type f ! -path '*/__pycache__/*' | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi
