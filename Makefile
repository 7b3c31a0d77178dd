# make reproduce [PROFILE=sample] [DATA=<folder>] [RUN=<name>] [SET="stage.name=value;..."] [TORCH=cpu|cuda] [TORCH_INDEX=<URL>]
PYTHON ?= python3
PROFILE ?= sample
DATA ?=
RUN ?=
SET ?=
TORCH ?= auto
TORCH_INDEX ?=
UPGRADE ?=
WORKERS ?= 2
# in the conda environment of environment.yml that one, elsewhere one of our own; VENV=$CONDA_PREFIX names any other
VENV ?= $(if $(filter deescal,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX),.venv)
# packages in the user's home folder would come before those of a conda environment
export PYTHONNOUSERSITE := 1
BIN := $(VENV)/bin
ARGS = --profile "$(PROFILE)" $(if $(DATA),--data "$(DATA)") $(if $(RUN),--run "$(RUN)") $(if $(SET),--set "$(SET)")

.PHONY: help env data reproduce check test test-all lab pages publish verify export stale lock clean
help:            ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24
env:             ## install the pinned versions into .venv, or VENV=<folder> (all other targets do it themselves)
	@$(PYTHON) setup_env.py --torch "$(TORCH)" --torch-index "$(TORCH_INDEX)" --venv "$(VENV)"
reproduce: env   ## run the series on a profile; only what changed is executed
	@$(BIN)/deescal reproduce $(ARGS)
data: env        ## fetch the released transcripts by their DOI, to data/released/ (or DATA=<folder>)
	@$(BIN)/python -m deescal.fetch --to "$(if $(DATA),$(DATA),data/released)"
check: env       ## what a run lacks and what it will do, before it does it
	@$(BIN)/deescal check $(ARGS)
test: env        ## every fast test
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"
test-all: env    ## the long ones too, and which were the slowest
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15
lab: env         ## open JupyterLab on the index
	@$(BIN)/python -m jupyterlab --config jupyter_config.py nbs/index.ipynb
pages: env       ## execute the lessons that are no stage, to figures/lessons/
	@$(BIN)/deescal lesson
publish: env     ## copy a finished sample run to figures/published/
	@$(BIN)/deescal publish $(ARGS)
verify: env      ## compare a run with its recorded hashes and with the published tables
	@$(BIN)/deescal verify $(ARGS)
export: env      ## notebooks -> library, tests, README
	@$(BIN)/python -c "from deescal.engine.export import export; export()"
stale: env       ## fail where library, tests, README or notebooks are out of step
	@$(BIN)/python -c "from deescal.engine.export import stale_files; import sys; sys.exit(stale_files())"
lock: env        ## resolve settings.ini into requirements.lock, with hashes (UPGRADE=1: newest versions)
	@$(BIN)/python -c "from deescal.engine.export import write_lock; write_lock(upgrade=bool('$(UPGRADE)'))"
clean:           ## remove runs and figures (not figures/published)
	rm -rf data/runs .snakemake $(addprefix figures/,$(filter-out published,$(notdir $(wildcard figures/*))))
