# Every target installs what it needs: on Debian 12 it requires only git, make, python3 and root (or sudo).

PYTHON ?= python3
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup packages test test-all demo demo-azure demo-azure-physical demo-physical bench bench-listeners lab-up lab-down docs site format clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1 - /p' Makefile

setup: .venv/.ready  ## install asrcore and its drivers in .venv, and the system packages they need

packages:
	@.ci/setup packages

# Rebuilt only when one of its inputs is newer.
.venv/.ready: pyproject.toml $(wildcard drivers/*/pyproject.toml) .ci/setup | packages
	@.ci/setup venv

# What a change must pass; tests/README.md explains what runs where, and why.
test: setup  ## run the tests that a change must pass, half an hour; STEPS="lint azure" runs some of them
	@.ci/setup lab server azurite tests
	@.ci/test $(STEPS)

test-all: setup  ## run all tests, including every demo; STEPS as above
	@.ci/setup lab server azurite tests
	@.ci/test --all $(STEPS)

demo: setup  ## main scenario: protect a guest, lose its site, fail over, re-protect and fail back
	@.ci/setup lab
	@.ci/as-root .venv/bin/python -m tests.system.demo

demo-azure: setup  ## fail a guest over to an emulated Azure (Azurite, a management server, QEMU) and back; 5 minutes
	@.ci/setup lab azurite
	@.ci/as-root .venv/bin/python -m tests.system.demo_azure

demo-azure-physical: setup  ## fail a physical server over to an emulated Azure, with repairs; 5 minutes
	@.ci/setup lab server azurite
	@.ci/as-root .venv/bin/python -m tests.system.demo_azure_physical

demo-physical: setup  ## protect a physical server by push, lose it, and fail over to a virtual machine at the other site
	@.ci/setup lab server
	@.ci/as-root .venv/bin/python -m tests.system.demo_physical

bench: setup  ## benchmark against nbdcopy, virtnbdbackup, rsync, ...; ONLY=delta,verify selects, QUICK=1 takes 3 minutes
	@.ci/setup lab bench
	@.ci/as-root .venv/bin/python -m tests.bench --only "$(ONLY)" $(if $(QUICK),--quick)

bench-listeners: setup  ## hold 2,000 silent connections and other crowds at each listener; 8 minutes, no lab
	@.venv/bin/python -m tests.bench.listeners

lab-up: setup  ## start two libvirt sites for experiments
	@.ci/setup lab
	@.ci/as-root .venv/bin/python -m tests.lab up

lab-down: setup  ## remove them
	@.ci/as-root .venv/bin/python -m tests.lab down

docs: setup  ## regenerate the pages of docs/reference that follow from the code
	@.venv/bin/python -m tests.docs.generate

site: setup  ## build the documentation site in build/site; a broken link is an error
	@.venv/bin/mkdocs build --quiet --strict

format: setup  ## format the code as `make test` requires
	@.venv/bin/ruff format .

clean:  ## delete everything that was built, including environments and guest images
	@test ! -x .venv/bin/python || .ci/as-root .venv/bin/python -m tests.lab down --dead
	@.ci/as-root rm -rf .venv .tox build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
