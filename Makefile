# Two commands are enough:   make run    a relay under supervisor, on port 4001
#                            make test   all tests
# Both need Python 3.10 or newer, make and gcc, and put everything into .venv/ and var/ below this folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONF := etc/supervisord.conf
RELAY_LISTEN ?= 4001
RELAY_WEBSOCKET ?= 4002
RELAY_STATUS_LISTEN ?= 4080
export RELAY_LISTEN RELAY_WEBSOCKET RELAY_STATUS_LISTEN
# Stamps older than these files are made anew.
DISTRIBUTION := setup.py setup.cfg pyproject.toml relay/__init__.py

.PHONY: run foreground stop rolling-restart status test lint types check bench bench-crowds bench-paths soak dist test-pythons clean
.DEFAULT_GOAL := run

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "On Debian: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.relay: $(DISTRIBUTION) | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[all]'
	touch $@

$(VENV)/.test: $(DISTRIBUTION) | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.relay

# Returns when the relay accepts connections; supervisord goes on in the background. The addresses are those that the logs
# tell: supervisord may have been running already, or been told of others by its file.
run: $(VENV)/.relay
	@$(BIN)/supervisorctl -c $(CONF) pid >/dev/null 2>&1 || $(BIN)/supervisord -c $(CONF)
	@for try in $$(seq 60); do \
	    sleep 0.5; $(BIN)/supervisorctl -c $(CONF) status 'relay:*' >var/.status; \
	    grep -q FATAL var/.status && break; \
	    pid=$$(sed -n 's/^relay:relay-0 *RUNNING *pid \([0-9]*\),.*/\1/p' var/.status); \
	    if grep -qv RUNNING var/.status || ! grep -qs "relay-gevent\[$$pid\] listening on " var/relay-0.log; then continue; fi; \
	    sleep 0.2; rm var/.status; \
	    sed -n "s/.*relay-gevent\[$$pid\] \(listening on .*\)/The relay runs, \1/p; s/.*relay-gevent\[$$pid\] \(WebSocket on .*\)/    \1/p" \
	        var/relay-0.log; exit 0; \
	done; rm -f var/.status; $(BIN)/supervisorctl -c $(CONF) status; tail -n 5 var/*.log; exit 1
	@if $(BIN)/supervisorctl -c $(CONF) status status | grep -q RUNNING; \
	    then sed -n 's/.*the status page is at \(.*\)/Seen live: \1/p' var/status.log | tail -n 1; \
	    else echo "The status page does not run: $$(tail -n 1 var/status.log)"; fi
	@echo "What it does: var/*.log; its usage: var/relay/usage.jsonl, var/relay/usage.sqlite. Next: make status, make stop"

# The same, but it stays in this terminal until it gets Ctrl-C.
foreground: $(VENV)/.relay
	$(BIN)/supervisord -n -c $(CONF)

# Returns when all have ended; transfers get their --grace.
stop:
	$(BIN)/supervisorctl -c $(CONF) shutdown
	@for try in $$(seq 100); do [ -e var/supervisord.pid ] || exit 0; sleep 0.3; done; exit 1

# One worker after another, without ending a transfer.
rolling-restart: $(VENV)/.relay
	PATH="$$PWD/$(BIN):$$PATH" misc/rolling-restart $(CONF)

status:
	$(BIN)/supervisorctl -c $(CONF) status

# Two at a time, since they wait more than they compute; docs/internals.md has the rest. Others:   make test TESTS_AT_A_TIME=4
TESTS_AT_A_TIME ?= 2
SIDE_BY_SIDE = -n $(TESTS_AT_A_TIME) --dist loadfile --no-loadscope-reorder --max-worker-restart 2
test: $(VENV)/.test
	@# Thousands of relays are started, and where PYTHONDONTWRITEBYTECODE is set none would keep what it has compiled.
	$(BIN)/python -m compileall -q relay
	$(BIN)/python -m pytest $(if $(filter-out 1,$(TESTS_AT_A_TIME)),$(SIDE_BY_SIDE)) $(PYTEST_OPTIONS)

# mypy reads the tests and the benchmark too, and with them what they import.
$(VENV)/.lint: $(VENV)/.test $(VENV)/.bench
	$(BIN)/pip install --quiet --editable '.[lint]'
	touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo --no-cache setup.cfg

types: $(VENV)/.lint
	$(BIN)/mypy
	$(BIN)/mypy misc/import-twisted-usage
	$(BIN)/mypy misc/munin/relay_

check: lint types test

# Without options also what tens of thousands of clients are like.
bench: $(VENV)/.bench $(VENV)/.test
	$(BIN)/python misc/bench/run.py $(BENCH_OPTIONS)
	$(if $(BENCH_OPTIONS),,$(BIN)/python misc/multitudes.py)

bench-crowds: $(VENV)/.test
	$(BIN)/python misc/multitudes.py

# Long paths that lose packets, simulated; needs root. For the whole of it: more than an hour.
bench-paths: $(VENV)/.bench
	$(BIN)/python misc/bench/paths.py $(BENCH_OPTIONS)

$(VENV)/.bench: $(DISTRIBUTION) | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[bench]'
	touch $@ $(VENV)/.relay

# Honest and hostile clients, restarts and kills:   make soak MINUTES=30
MINUTES ?= 30
soak: $(VENV)/.test
	$(BIN)/python misc/soak.py --minutes $(MINUTES)

# The same commit makes the same bytes, whoever builds it and when.
dist: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# All tests with each Python, 3.10 and on, that is installed here or kept by pyenv; PYTHONS names others.
test-pythons:
	PYTEST_OPTIONS="$(PYTEST_OPTIONS)" misc/test-pythons $(PYTHONS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
