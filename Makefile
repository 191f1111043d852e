# Every command of the project. Each one sets up what it needs; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two workers, a file's tests on one of them, so that they share its engines. One process: make test PARALLEL=
PARALLEL ?= -n 2 --dist loadfile
# What `make bench` runs, in this order; the options keep each below ten minutes. One alone: make bench BENCHES=fork
BENCHES := sched fork resume cold_siblings sdk server turns agents adapters busy nano kernels int8 peers_cpu spmd step retention \
	"pauses --seeds 6" models deadlock_race recorder host_copies "cancel --events 2000 --kills 10"
.PHONY: demo test check conformance bench format model model-large simulate clean

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; a few minutes, most of it torch) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/python examples/agents/quickstart.py

test: $(STAMP)
	$(BIN)/python -m pytest -q $(PARALLEL)

# A check whose reference is missing fails here instead of being skipped (tests/support/needs.py).
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports
	AGENTSPEED_CHECK=1 $(BIN)/python -m pytest -q $(PARALLEL)

# Other projects' own suites, in an environment that has the packages of .venv and a group of pyproject.toml beside them:
# torch is not installed twice, and the plugins of pytest that the suites bring change no other run. -W ignore: their
# warnings are theirs.
.venv-langchain/.installed: $(STAMP)
	@echo "Setting up .venv-langchain (once) ..."
	@test -x .venv-langchain/bin/python || $(PYTHON) -m venv .venv-langchain
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(.venv-langchain/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_venv.pth
	@.venv-langchain/bin/python -m pip install -q --disable-pip-version-check -U 'pip>=25.1'
	@.venv-langchain/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt --group conformance-langchain
	@touch $@

.venv-server/.installed: $(STAMP)
	@echo "Setting up .venv-server (once) ..."
	@test -x .venv-server/bin/python || $(PYTHON) -m venv .venv-server
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(.venv-server/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_venv.pth
	@.venv-server/bin/python -m pip install -q --disable-pip-version-check -U 'pip>=25.1'
	@.venv-server/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt --group conformance-server
	@touch $@

conformance: .venv-langchain/.installed .venv-server/.installed
	.venv-langchain/bin/python -m pytest -q -W ignore tests/adapters
	.venv-server/bin/python -m pytest -q -W ignore tests/adapters/test_openapi_conformance.py \
		tests/adapters/test_ui_browser.py

bench: $(STAMP)
	@for run in $(BENCHES); do name=$${run%% *}; echo "== bench/$$name.py$${run#$$name}"; \
		$(BIN)/python bench/$$name.py$${run#$$name} || exit 1; done

# Mends what the lint rules can mend, and sets line breaks (docs/decisions/0024-ruff-formats.md).
format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

model: $(STAMP)
	PYTHONPATH=engine:kernels $(BIN)/python -m tests.modelcheck --bounds small

model-large: $(STAMP)
	PYTHONPATH=engine:kernels $(BIN)/python -m tests.modelcheck --bounds large

simulate: $(STAMP)
	PYTHONPATH=engine:kernels $(BIN)/python -m tests.simulation --seeds 25 --marks

clean:
	rm -rf $(VENV) .venv-langchain .venv-server .checkpoints
