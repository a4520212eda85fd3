PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DEMO := outputs/demo
SHOTS := DEMO_SCREENSHOTS=$(CURDIR)/outputs/screenshots

.PHONY: install demo test test-full reproduce clean

install: $(STAMP)  ## everything there is to set up

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: install  ## features of a real photograph and of a drawn scene, as pictures
	@begin=$$(date +%s) && \
	photo=$$($(BIN)/python -c "import skimage.data as d; print(d.__path__[0] + '/chelsea.png')") && \
	$(BIN)/diffusion-features scenes $(DEMO)/scenes --split test --count 1 && \
	$(BIN)/diffusion-features visualize "$$photo" $(DEMO)/scenes/img_dir/test --model embedded --output $(DEMO) && \
	echo "The pictures are $(CURDIR)/$(DEMO)/*.png; they took $$(( $$(date +%s) - begin )) s." && \
	echo "Each activation is shown by its first three principal components as red, green and blue: alike in colour, alike to the model."

test: install  ## style, types, tests; screenshots of the demo go to outputs/screenshots
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(SHOTS) $(BIN)/python -m pytest -n auto

test-full: install  ## the slow tests too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(SHOTS) $(BIN)/python -m pytest -n auto -m ''

reproduce: install  ## every figure of docs/reproduction.md; hours, but killed it goes on where it was
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reproduce.py

clean:  ## what the build and the tests leave behind, and the environment
	rm -rf $(VENV) build dist outputs .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
