# Everything here sets itself up: on Debian 12 it needs git, make, python3 and root (or sudo), nothing else.

PYTHON ?= python3
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup packages test test-all demo demo-azure demo-azure-physical demo-physical bench lab-up lab-down docs site format clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1 - /p' Makefile

setup: .venv/.ready  ## .venv with asrcore and its drivers, and the system packages for it

packages:
	@.ci/setup packages

# Made again only when what it was made from is newer.
.venv/.ready: pyproject.toml $(wildcard drivers/*/pyproject.toml) .ci/setup | packages
	@.ci/setup venv

# What a change needs to pass; tests/README.md says what runs where, and why.
test: setup  ## the tests that a change needs, 25 minutes; STEPS="lint azure" runs some of them
	@.ci/setup lab server azurite tests
	@.ci/test $(STEPS)

test-all: setup  ## all tests there are, every demo included; STEPS as above
	@.ci/setup lab server azurite tests
	@.ci/test --all $(STEPS)

demo: setup  ## the main job: a guest is protected, its site is lost, it carries on, and comes home
	@.ci/setup lab
	@.ci/as-root .venv/bin/python -m tests.system.demo

demo-azure: setup  ## a guest goes to Azure (Azurite, the tests' management server, QEMU) and comes home; 5 minutes
	@.ci/setup lab azurite
	@.ci/as-root .venv/bin/python -m tests.system.demo_azure

demo-azure-physical: setup  ## a physical server goes to Azure, and comes up there repaired; 5 minutes
	@.ci/setup lab server azurite
	@.ci/as-root .venv/bin/python -m tests.system.demo_azure_physical

demo-physical: setup  ## a physical server is protected by push, lost, and carries on at the other site
	@.ci/setup lab server
	@.ci/as-root .venv/bin/python -m tests.system.demo_physical

bench: setup  ## measure beside nbdcopy, virtnbdbackup, rsync, ...; ONLY=delta,verify some of it, QUICK=1 in 3 minutes
	@.ci/setup lab bench
	@.ci/as-root .venv/bin/python -m tests.bench --only "$(ONLY)" $(if $(QUICK),--quick)

lab-up: setup  ## two libvirt sites with guests, to play with
	@.ci/setup lab
	@.ci/as-root .venv/bin/python -m tests.lab up

lab-down: setup  ## take them away again
	@.ci/as-root .venv/bin/python -m tests.lab down

docs: setup  ## write the generated pages of docs/reference anew
	@.venv/bin/python -m tests.docs.generate

site: setup  ## build the documentation as a site in build/site; a broken link is an error
	@.venv/bin/mkdocs build --quiet --strict

format: setup  ## format the code as `make test` wants it
	@.venv/bin/ruff format .

clean:  ## remove what was built, environments and guest images included
	@test ! -x .venv/bin/python || .ci/as-root .venv/bin/python -m tests.lab down --dead
	@.ci/as-root rm -rf .venv .tox build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
