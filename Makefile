.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NT := $(BIN)/nnunet-torchserve
TOGETHER := -n 3 --durations=20
comma := ,
BENCHMARKS ?= request.command request.overhead request.whole_request request.recipes request.dicom_series stages.codecs \
	stages.preprocess stages.export stages.postprocess stages.dicom stages.dicom_seg load.throughput load.fairness load.priority \
	load.memory load.reuse load.service load.stopping \
	client.folder client.footprint client.outage client.transfer engine.gap engine.engine_memory engine.idle engine.backends \
	training.region_loader
MODEL ?= demo/model/Dataset811_BrainTissueDemo/nnUNetTrainer__nnUNetPlans__3d_fullres

# pip's own words are shown if it fails, all of them, and not otherwise.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --root-user-action=ignore --constraint constraints.txt
# Meanwhile a line every half minute says that it goes on, for as long as this shell is there.
define install
while sleep 30 &>/dev/null && kill -0 $$$$ 2>/dev/null; do \
	echo "         ... $$SECONDS s, .venv has $$(du -sh .venv 2>/dev/null | cut -f1)"; done & \
trap "kill $$! 2>/dev/null" EXIT; \
said=$$($(PIP_INSTALL) $(1) 2>&1) || { printf '%s\n' "$$said" >&2; echo "pip failed: see above" >&2; exit 1; }
endef

.venv/ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "make setup: installs about 7 GB into .venv, PyTorch mostly; 3 to 15 minutes the first time"
	@echo "  1 of 2: PyTorch (most of it)"
	@$(call install,torch torchvision)
	@echo "  2 of 2: nnU-Net, TorchServe with a Java runtime, tools for tests and demo"
	@$(call install,--editable '.[server$(comma)dicom$(comma)openvino$(comma)quantize$(comma)demo$(comma)dev]')
	@touch $@
	@echo "  done: .venv takes $$(du -sh .venv | cut -f1)"

# What a Helm chart can read lies in its own folder.
CHART := deploy/helm/nnunet-torchserve
COPIED := deploy/nginx.conf deploy/prometheus/alerts.yaml deploy/grafana/dashboard.json config.properties

.PHONY: help setup demo archive serve stop test test-long image-test cluster-test lint type parity bench figures fuzz soak chart clean
help: ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: .venv/ready ## make .venv with everything in it

demo: .venv/ready ## segment a brain template with the demo model, and show the result
	@echo "make demo: loads PyTorch and nnU-Net first, then four steps; one to three minutes in all"
	@$(BIN)/python demo/run.py

archive: .venv/ready ## package MODEL=<trained model folder> (default: the demo model) into model_store/
	$(NT) archive $(MODEL)

serve: .venv/ready ## serve every archive of model_store/
	$(NT) serve

stop: ## stop that server
	$(NT) stop

test: .venv/ready ## run the tests (about 9 minutes on two cores)
	@tests/deploy/install_tools.sh || echo "make test: tools for tests/deploy are missing; its tests are skipped" >&2
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TOGETHER) -m "not long and not threads and not image and not cluster"

test-long: .venv/ready ## run all tests, the long ones too, with all examples
	@tests/deploy/install_tools.sh --checkov || echo "make test-long: tools for tests/deploy are missing; its tests are skipped" >&2
	@tests/dicom/install_tools.sh || echo "make test-long: OHIF's reader for tests/dicom is missing; its tests are skipped" >&2
	$(BIN)/pytest $(TOGETHER) --hypothesis-profile long -m "not image and not cluster"

image-test: .venv/ready ## build the image of deploy/container and run it (podman, buildah, debootstrap; as root)
	@tests/deploy/install_tools.sh
	NNUNET_TORCHSERVE_IMAGE=$${NNUNET_TORCHSERVE_IMAGE:-build} $(BIN)/pytest tests/image -m image

cluster-test: .venv/ready ## run the charts on the cluster of KUBECONFIG (IMAGE=repository:tag, PULL=Never if its nodes have it)
	@test -n "$(IMAGE)" || { echo "make cluster-test: IMAGE=repository:tag, which the cluster's nodes have or can pull" >&2; exit 2; }
	@tests/deploy/install_tools.sh
	NNUNET_TORCHSERVE_CLUSTER_IMAGE="$(IMAGE)" NNUNET_TORCHSERVE_CLUSTER_PULL="$(PULL)" \
		$(BIN)/pytest tests/cluster -m cluster -v --durations=0

lint: .venv/ready ## ruff, and the layers of the serving core
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

type: .venv/ready ## mypy --strict
	$(BIN)/mypy

parity: .venv/ready ## compare with stock nnU-Net, voxel by voxel, on all of PyTorch's threads
	$(BIN)/pytest tests/parity/test_stock_parity.py -m "not long and not serve"

bench: .venv/ready ## measure against stock nnU-Net (about four hours; BENCHMARKS="request.command" for one); see benchmarks/README.md
	status=0; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || status=1; done; exit $$status

figures: .venv/ready ## draw docs/figures and write the tables of docs/performance.md from benchmarks/results/
	$(BIN)/python -m benchmarks.report

fuzz: .venv/ready ## fuzz decoders, options and requests (10 minutes); finds go to .nnunet-torchserve/fuzz/
	status=0; export PYTHONPATH=tests; \
	$(BIN)/python -m fuzz.mutate --seconds 210 --targets image || status=1; \
	$(BIN)/python -m fuzz.mutate --seconds 90 --targets options geometry request || status=1; \
	$(BIN)/python -m fuzz.coverage_guided --seconds 300 || status=1; exit $$status

soak: .venv/ready ## 1,000 requests while engines and workers are killed (a quarter of an hour)
	$(BIN)/python -m benchmarks.load.soak

chart: ## copy what the Helm chart shares with others into its folder
	cp $(COPIED) $(CHART)/files/

clean: ## remove what these verbs made (stops the server first)
	test ! -x $(NT) || $(NT) stop
	rm -rf .venv .tools model_store/*.mar demo/output .nnunet-torchserve .pytest_cache .mypy_cache .ruff_cache
