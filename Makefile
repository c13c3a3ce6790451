# sollune: three commands, each a make target. Every target makes .venv first and then only what is missing.

CONFIG ?= configs/tiny.yaml
empty :=
RUN ?= runs/$(subst $(empty) $(empty),-,$(basename $(notdir $(CONFIG))))
ARGS ?=
PYTHON ?= python3
# Processes that share the work of each target: one for each GPU, or else two where there are as many cores.
GPUS = $(filter-out 0,$(shell nvidia-smi -L 2>/dev/null | wc -l))
PROCESSES ?= $(or $(GPUS),$(if $(filter-out 1,$(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 1)),2,1))

# What would end in the middle of a command, or in a rule for another file, is refused before anything is made.
# $(call given,NAME): its value as it was given, before make opens what begins with a dollar; nothing for our own value.
given = $(if $(filter file default undefined,$(origin $(1))),,$(value $(1)))
comma := ,
hash := \#
quotes = ' " ` $$ & ; | < > ( ) * ? [ ] { } ! % : = \ $(comma) $(hash)
# $(call refused,NAME,CHARACTERS): those of the characters that its value holds.
refused = $(strip $(foreach letter,$(2),$(if $(findstring $(letter),$(call given,$(1))),$(letter))))
missing = $(strip $(foreach file,$(CONFIG),$(if $(wildcard $(file)),,$(file))))

ifeq ($(wildcard pyproject.toml),)
$(error make runs in the folder of its Makefile - say make -C $(patsubst %/,%,$(dir $(firstword $(MAKEFILE_LIST)))) $(MAKECMDGOALS))
endif
ifneq ($(call refused,RUN,$(quotes)),)
$(error RUN = $(call given,RUN): holds $(call refused,RUN,$(quotes)) - name a folder in letters, digits, dots, dashes and slashes, such as RUN=runs/tiny)
endif
ifneq ($(words $(RUN)),1)
$(error RUN = '$(RUN)': should be one word - name a folder without blanks, such as RUN=runs/tiny)
endif
ifneq ($(filter -%,$(RUN)),)
$(error RUN = $(RUN): begins with a dash, as options do - name a folder such as RUN=runs/tiny)
endif
ifneq ($(if $(word 2,$(CURDIR)),,$(filter $(patsubst %/,%,$(abspath $(RUN)))/%,$(CURDIR)/)),)
$(error RUN = $(RUN): is the folder of the program, or holds it - name a folder of its own, such as RUN=runs/tiny)
endif
# The model and the base run of `convert`; its RUN, unless one is given, is called as the model is.
TEACHER ?=
BASE ?=
ifneq ($(filter convert,$(MAKECMDGOALS)),)
ifneq ($(call refused,TEACHER,$(filter-out : = $(comma),$(quotes))),)
$(error TEACHER = $(call given,TEACHER): holds $(call refused,TEACHER,$(filter-out : = $(comma),$(quotes))) - name a folder, a file or a hub id)
endif
ifneq ($(words $(TEACHER)),1)
$(error TEACHER = '$(TEACHER)': should be one word - name the fine-tune, such as TEACHER=models/style.safetensors)
endif
ifneq ($(filter -%,$(TEACHER)),)
$(error TEACHER = $(TEACHER): begins with a dash, as options do - name a folder, a file or a hub id)
endif
ifneq ($(call refused,BASE,$(quotes)),)
$(error BASE = $(call given,BASE): holds $(call refused,BASE,$(quotes)) - name the run folder of its base model, such as BASE=runs/tiny)
endif
ifneq ($(words $(BASE)),1)
$(error BASE = '$(BASE)': should be one word - name the run folder of its base model, such as BASE=runs/tiny)
endif
ifneq ($(filter -%,$(BASE)),)
$(error BASE = $(BASE): begins with a dash, as options do - name a run folder such as BASE=runs/tiny)
endif
endif
ifneq ($(call refused,CONFIG,$(filter-out * ? : = $(comma),$(quotes))),)
$(error CONFIG = $(call given,CONFIG): holds $(call refused,CONFIG,$(filter-out * ? : = $(comma),$(quotes))) - name YAML files such as CONFIG=configs/tiny.yaml)
endif
ifeq ($(strip $(CONFIG)),)
$(error CONFIG is empty - name YAML files such as CONFIG=configs/tiny.yaml)
endif
ifneq ($(missing),)
$(error CONFIG = $(CONFIG): there is no $(missing) - name YAML files such as CONFIG=configs/tiny.yaml)
endif

# The numbers of windows of `distill-fast`, each student from the one before.
WINDOWS ?= 4
ifneq ($(filter distill-fast,$(MAKECMDGOALS)),)
ifneq ($(or $(call refused,WINDOWS,$(quotes)),$(if $(strip $(WINDOWS)),,none)),)
$(error WINDOWS = '$(call given,WINDOWS)': holds $(or $(call refused,WINDOWS,$(quotes)),no number) - take some of 8 4 2 1, such as WINDOWS='4 2 1')
endif
ifneq ($(strip $(WINDOWS)),$(filter $(WINDOWS),8 4 2 1))
$(error WINDOWS = '$(call given,WINDOWS)': should be numbers of steps that fall by divisors - take some of 8 4 2 1, such as WINDOWS='4 2 1')
endif
endif

# The studies of `ablate`, by default those of configs/ablation, and whether it runs their small versions.
STUDIES ?=
QUICK ?=
ifneq ($(filter ablate,$(MAKECMDGOALS)),)
ifneq ($(call refused,STUDIES,$(quotes)),)
$(error STUDIES = $(call given,STUDIES): holds $(call refused,STUDIES,$(quotes)) - name YAML files such as STUDIES=configs/ablation/david.yaml)
endif
ifneq ($(filter-out $(wildcard $(STUDIES)),$(STUDIES)),)
$(error STUDIES = $(STUDIES): there is no $(filter-out $(wildcard $(STUDIES)),$(STUDIES)) - name YAML files such as STUDIES=configs/ablation/david.yaml)
endif
ifneq ($(filter-out 1,$(QUICK)),)
$(error QUICK = $(QUICK): should be 1, or left out)
endif
endif

STAMP := .venv/.stamp
# What only tests and checks need: no run does.
TOOLS := .venv/.tools
BIN := .venv/bin
CACHE := $(RUN)/cache/COMPLETE
DISTILL := $(RUN)/distill/COMPLETE
CLASSES := $(RUN)/classes/COMPLETE
# In one line, whatever blanks they were given with; the last is made last, and one before it may be missing alone.
STEPS := $(filter $(WINDOWS),8 4 2 1)
STUDENTS := $(STEPS:%=$(RUN)/fast/%/COMPLETE)
FAST := $(lastword $(STUDENTS))
# Only the ending of a file is left out: the dot of a version belongs to the name.
unended = $(patsubst %.safetensors,%,$(patsubst %.ckpt,%,$(patsubst %.pt,%,$(1))))
CONVERTED = $(if $(call given,RUN),$(RUN),runs/$(call unended,$(notdir $(patsubst %/,%,$(TEACHER)))))

# Spinning threads and an allocator that returns every big tensor to the kernel cost a third of the time on a CPU, and
# the embedded networks are so small that a second thread slows them (94 samples/s against 130).
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
export MALLOC_TOP_PAD_ ?= 268435456
export HF_HUB_DISABLE_TELEMETRY ?= 1

# $(call command,NAME,OPTIONS): ARGS go to the target on make's command line, not to those that it needs first.
command = $(eval called := yes)$(BIN)/sollune $(1) --config $(CONFIG) --run $(RUN) $(2) $(if $(filter $(1),$(MAKECMDGOALS)),$(ARGS))
# $(call rest,FOLDER): what to say when nothing had to be called.
rest = $(if $(called),:,echo "$(RUN)/$(1) is complete: nothing to do")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv cache-teacher distill distill-fast finetune-classes ablate convert report test check format clean clean-run FORCE

help: ## this list
	@echo "usage: make TARGET [CONFIG='a.yaml b.yaml'] [RUN=runs/name] [ARGS='--option value']"
	@echo "now:   CONFIG=$(CONFIG)  RUN=$(RUN)"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | awk -F'\t' '{ printf "  %-17s %s\n", $$1, $$2 }'

cache-teacher: $(CACHE) ## run the teacher once, keep what it predicts in RUN/cache
	@$(call rest,cache)

distill: $(DISTILL) ## train a velocity model from the cache, export it to RUN/distill
	@$(call rest,distill)

distill-fast: $(FAST) ## train it on for few steps, WINDOWS='4 2 1', export each to RUN/fast/WINDOWS
	@$(call rest,fast)

finetune-classes: $(CLASSES) ## fine-tune it by class priorities, export it to RUN/classes
	@$(call rest,classes)

ablate: $(STAMP) ## compare settings of distill: QUICK=1 in minutes, without it in a day; STUDIES='a.yaml b.yaml'
	$(BIN)/sollune ablate $(STUDIES) --run $(RUN) --out $(RUN)/ablation --processes $(PROCESSES) $(if $(QUICK),--quick) $(ARGS)

convert: $(STAMP) ## convert a fine-tune: TEACHER=MODEL BASE=RUN, into RUN or runs/MODEL
	$(BIN)/sollune convert $(TEACHER) --config $(CONFIG) --base $(BASE) --out $(CONVERTED) --workers $(PROCESSES) $(ARGS)

report: $(STAMP) ## write RUN/report.html: pictures, curves and figures of all runs in RUN
	$(BIN)/sollune report $(RUN) --out $(RUN)/report.html $(if $(wildcard docs/ablation.parquet),--table docs/ablation.parquet) $(ARGS)

# A command writes COMPLETE last. It is called again when its configuration is newer, or when ARGS are for it;
# the program then finds what is already there, or says which fields differ.
$(CACHE): $(wildcard $(CONFIG)) $(if $(and $(ARGS),$(filter cache-teacher,$(MAKECMDGOALS))),FORCE) | $(STAMP)
	$(call command,cache-teacher,--workers $(PROCESSES))
	@touch -c $@

$(DISTILL): $(wildcard $(CONFIG)) $(if $(and $(ARGS),$(filter distill,$(MAKECMDGOALS))),FORCE) | $(STAMP) $(CACHE)
	$(call command,distill,--processes $(PROCESSES))
	@touch -c $@

$(FAST): $(wildcard $(CONFIG)) $(if $(or $(and $(ARGS),$(filter distill-fast,$(MAKECMDGOALS))),$(filter-out $(wildcard $(STUDENTS)),$(STUDENTS))),FORCE) | $(STAMP) $(DISTILL)
	$(eval called := yes)$(BIN)/sollune distill --config $(CONFIG) --run $(RUN) --windows $(STEPS) --processes $(PROCESSES) $(if $(filter distill-fast,$(MAKECMDGOALS)),$(ARGS))
	@touch -c $@

$(CLASSES): $(wildcard $(CONFIG)) $(if $(and $(ARGS),$(filter finetune-classes,$(MAKECMDGOALS))),FORCE) | $(STAMP) $(DISTILL)
	$(call command,finetune-classes,--processes $(PROCESSES))
	@touch -c $@

FORCE:

test: $(TOOLS) ## run the tests, two processes of one thread each
	$(BIN)/pytest -n 2 -q tests $(ARGS)

check: $(TOOLS) ## formatting, lint, strict types, the import staircase
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(TOOLS) ## format the code and repair what lint can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

venv: $(TOOLS) ## make .venv (the other targets do it themselves)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "sollune needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1) - say make PYTHON=python3.12" >&2; exit 2; }
	@echo "making .venv: torch and its company take some minutes and 1.6 GB (more with CUDA)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report]'
	@touch $@

$(TOOLS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean: ## remove what test and check leave behind; keeps .venv and runs
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find configs shards stages tests -name __pycache__ -prune -exec rm -rf {} +

clean-run: ## remove the run folder RUN with its cache, checkpoints and exports
	rm -rf $(RUN)
