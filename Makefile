PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DEMO := outputs/demo.png

.PHONY: install demo test test-full clean

install: $(STAMP)  ## everything there is to set up

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: install  ## features of a real photograph, as a picture
	@mkdir -p $(dir $(DEMO))
	@begin=$$(date +%s) && \
	photo=$$($(BIN)/python -c "import skimage.data as d; print(d.__path__[0] + '/chelsea.png')") && \
	$(BIN)/diffusion-features visualize "$$photo" --model embedded --output $(DEMO) && \
	echo "The picture is $(CURDIR)/$(DEMO); it took $$(( $$(date +%s) - begin )) s."

test: install  ## style, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-full: install  ## the slow tests too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m ''

clean:  ## what the build and the tests leave behind, and the environment
	rm -rf $(VENV) build dist outputs .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
