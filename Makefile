# `make demo` and `make test` set up all they need in .venv.
PYTHON ?= python3
PY = .venv/bin/python

demo: .venv/demo
	$(PY) -m paper table3 fig1 fig2 loss --scale tiny --schedules cosine

test: .venv/dev
	$(PY) -m pytest -q -n 2 tests

# A minute: the unit tests and the linters
check: lint
	$(PY) -m pytest -q -n 2 tests/unit

# What results/tiny holds, anew, on two CPU cores; goes on where it was. Three seeds of the base model, one of the others
LETTERS = --sft configs/tasks/letters/examples.jsonl --tasks next_letter --data_dir configs/tasks
results-tiny: .venv/dev
	$(PY) -m paper fig1 fig2 fig3 table1 fig4 fig5 table2 table3 table9 fig6 table10 table13 loss --scale tiny --seeds 3
	$(PY) -m paper order moments footnote2 --scale tiny --seeds 3
	$(PY) -m paper table5 table6 table7 table8 table12 --scale tiny
	$(PY) -m paper table4 --scale tiny --seeds 3 $(LETTERS)
	$(PY) -m paper table11 --scale tiny $(LETTERS)
	mkdir -p results/tiny && cp out/tiny/results/* results/tiny/

# Averaging beside its rivals in two settings, and increments that differ in kind (docs/beyond.md)
results-beyond: .venv/dev
	$(PY) -m paper beyond decays drift --scale tiny --seeds 3
	test -e data/bytes/meta.json || $(PY) data.py prepare --out data/bytes --tokenizer bytes
	$(PY) -m paper beyond --scale bytes
	$(PY) -m paper decays --scale bytes --seeds 3
	mkdir -p results/tiny results/bytes && cp out/tiny/results/* results/tiny/ && cp out/bytes/results/* results/bytes/

# The same at 25M parameters, for a GPU; TEXT is some 200 MB of text: make results-small TEXT='my/*.jsonl' [PY=python3]
results-small: $(if $(filter .venv/%,$(PY)),.venv/dev)
	test -e data/small.tiktoken || $(PY) data.py vocab --out data/small.tiktoken --vocab_size 8192 --val 0.02 --source '$(TEXT)'
	test -e data/small/meta.json || $(PY) data.py prepare --out data/small --tokenizer data/small.tiktoken --val 0.02 --source '$(TEXT)'
	$(PY) -m paper fig1 fig2 fig3 table1 table3 table9 fig6 loss --scale small
	$(PY) -m paper table2 --scale small
	$(PY) -m paper fig4 fig5 --scale small
	mkdir -p results/small && cp out/small/results/* results/small/

# On a machine with a CUDA GPU: the tests that need one, then every benchmark, figures into results/gpu. What fails is
# named at the end. Where all of requirements-dev.txt is installed already: make bench PY=python3
SIZES = 203m 1.2b 3.1b
FIGURES = results/gpu
bench: $(if $(filter .venv/%,$(PY)),.venv/dev)
	@$(PY) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make bench: needs a CUDA GPU')"
	@mkdir -p $(FIGURES); failed=; \
	run() { echo "$$*"; "$$@" || failed="$$failed\n  $$*"; }; \
	measure() { name=$$1; shift; run $(PY) -m bench "$$@" --json $(FIGURES)/$$name.json; }; \
	run $(PY) -m pytest -q -m gpu tests; \
	measure kernels kernels; \
	for size in $(SIZES); do measure step-$$size step --size $$size; done; \
	measure checkpoint checkpoint --size 1.2b; \
	test -z "$$failed" || { printf "make bench: failed:$$failed\n"; exit 1; }

# Break real runs and compare with undisturbed ones: one round of all faults, or rounds for so many minutes
MINUTES = 0
soak: .venv/dev
	$(PY) tests/soak.py --minutes $(MINUTES)

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy *.py kernels runtime text tools paper bench

.venv/demo: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt matplotlib
	touch $@

.venv/dev: requirements.txt requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ .venv/demo

.PHONY: demo test results-tiny results-beyond results-small check bench soak lint
