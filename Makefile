# Everything happens in .venv. `make demo` needs nothing but Python 3.11 or later and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Installed first and by itself, so that nothing later pulls another build of it. On a Linux machine without
# a GPU, where the index serves CUDA builds: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
INSTALLED := $(VENV)/.installed

STORIES := $(wildcard notebooks/*.py)
PAGES := $(STORIES:notebooks/%.py=build/notebooks/%.html)
CODE := $(shell find mechguard -name '*.py')

.PHONY: install demo figures notebooks docs defences families look calibration test organism-check robustness audit \
	lint bench bench-peers format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	touch $@

demo: install
	$(BIN)/mechguard study organism --out figures/demo
	@echo "open figures/demo/report.html"

# The gallery, figures/README.md: the demo's study with its circuits, and a picture for every family of plots.
figures: demo
	$(BIN)/mechguard study organism --circuits --out figures/demo
	cp figures/demo/results/behaviour.csv figures/headline.csv
	cp figures/demo/results/behaviour.json figures/headline.json
	cp figures/demo/results/sweep.csv figures/demo/results/sweep.json figures/
	$(BIN)/python figures/gallery.py

# About half an hour on two cores; both go on where they were interrupted. `make figures` draws their pictures.
defences: install
	$(BIN)/mechguard compare organism --limit-tests 100 --out runs/defences
	cp runs/defences/defences.csv runs/defences/defences.json figures/
	$(BIN)/mechguard sweep organism --alternatives --layers "3 4 5" --alpha 2 --condition blank \
	    --condition image --out runs/alternatives
	cp runs/alternatives/sweep.csv figures/alternatives.csv
	cp runs/alternatives/sweep.json figures/alternatives.json

# Executed pages with their pictures, each self-contained: build/notebooks/*.html. `make -j2 notebooks` on two cores.
notebooks: $(PAGES)

build/notebooks/%.html: notebooks/%.py $(CODE) $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python docs/stories.py $< build/notebooks

# The site in build/site, warnings as errors. Tutorials have pictures where `make notebooks` has run.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html (for its search: python3 -m http.server -d build/site)"

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

families: install
	$(BIN)/python tests/families_table.py

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

organism-check: install
	GOMP_SPINCOUNT=2000 $(BIN)/python -m pytest -s -m slow tests/organism/test_behaviour.py

# Kills, mutated files and a soak at full length: about half an hour.
robustness: install
	GOMP_SPINCOUNT=2000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m long tests/test_kills.py tests/test_shards.py
	$(BIN)/python tests/fuzz.py --count 10000
	GOMP_SPINCOUNT=2000 OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --count 2000

# Known holes in what is installed. Asks the advisory service of the Python Package Index; where that cannot be
# reached, and for packages it does not know, the audit fails rather than pass for clean.
audit: install
	$(BIN)/pip-audit --strict --skip-editable --progress-spinner off

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every figure, the report and JupyterLab in a headless Chromium: screenshots in build/look, errors counted.
look: install
	test -f figures/demo/report.html || $(MAKE) demo
	$(BIN)/python tests/look.py --study figures/demo --out build/look

# About twenty minutes on one core.
calibration: install
	$(BIN)/python tests/calibration.py --planted 500 --null 500 --out figures/calibration.csv

bench: install
	$(BIN)/python tests/bench.py --out benchmarks.json

# Libraries whose pins do not go with ours, for their rows of the table: over our torch and transformers.
bench-peers: install
	$(BIN)/python -m venv --system-site-packages .venv-peers
	$(BIN)/python -c "import site; print(*site.getsitepackages(), sep='\n')" \
	    > $$(echo .venv-peers/lib/python*/site-packages)/ours.pth
	.venv-peers/bin/python -m pip install --quiet --no-deps "steering-vectors==0.12.2" "repeng==0.4.0" \
	    "pyvene==0.1.8"
	.venv-peers/bin/python -m pip install --quiet matplotlib

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) figures/demo build dist
