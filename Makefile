# Every target makes .venv with the versions in constraints.txt, once, and reuses it.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Builds of torch for GPUs bring their own; here it is for its disassembler.
TRITON := triton==3.6.0
# They ask for torchvision, which would bring another build of torch; the tests stand in for it.
LUCIDRAINS := denoising-diffusion-pytorch==2.3.4 pytorch-fid==0.3.0
SOURCES := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
FORMATTED := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

.PHONY: install demo test test-long docs bench gpu-check sanitize lint format typecheck clean
.DELETE_ON_ERROR:

install: $(VENV)/.built

$(VENV)/.built: constraints.txt pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet $(TRITON) || \
	  echo "no $(TRITON) for this machine: the tests that need its tools are skipped"
	$(BIN)/pip install --quiet --no-deps $(LUCIDRAINS) || \
	  echo "no $(LUCIDRAINS) for this machine: the tests that need them are skipped"
	touch $@

# Trains on handwritten digits and draws some: see demo-out/.
demo: OUT = demo-out
demo: install
	$(BIN)/ddpm-fast demo --out $(OUT)

# Under ten minutes on two cores: a process a core, WORKERS=8 for eight.
test: WORKERS = 2
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

# What takes longer: the whole demo, builds from scratch.
test-long: install
	$(BIN)/python -m pytest -m slow

# The documentation's site, in build/site.
docs: install
	$(BIN)/mkdocs build --strict

# Takes all figures of this machine again, and writes them where the documents state them.
bench: install
	$(BIN)/python -m pytest benchmarks --benchmark-only --results benchmarks/results
	$(BIN)/python benchmarks/report.py --update

# On a machine with an NVIDIA GPU, offline, with the packages that PYTHON has: builds for that GPU,
# tests, runs compute-sanitizer and measures. PART=build, test, sanitize, bench, sampling,
# trajectory or sessions: that part alone.
gpu-check: OUT = gpu-check
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --out $(OUT) $(if $(PART),--part $(PART))

# The CPU's native code under AddressSanitizer, UBSan, LeakSanitizer and ThreadSanitizer. PART=cuda:
# the CUDA kernels' bodies on the host. Some five minutes on two cores the first time.
sanitize: install
	$(BIN)/python tests/sanitize.py $(PART)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

typecheck: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .benchmarks *.egg-info ddpm_fast/_native*.so
