# Every target installs what it needs (Debian 12), as root or through sudo.
#   make demo   the main job in a topology of its own        make test    everything CI runs
#   make lint   ruff, mypy --strict, import-linter            make mininet the Mininet scenarios
#   make bench  tproxyd beside its peers (QUICK=1, ONLY=...)  make soak    correctness at speed (SECONDS=300)
PYTHON ?= /usr/bin/python3
VENV   := .venv
BIN    := $(VENV)/bin
# Most tests wait for something: more of them at a time than cores.
JOBS   ?= 4
SUDO   := $(if $(filter 0,$(shell id -u)),,sudo)

# python-iptables is built from source: gcc and the headers.
SYSTEM := python3-venv python3-dev gcc libnftables1 nftables iptables ipset iproute2 procps
TOPOLOGY := mininet bridge-utils iputils-ping ethtool curl bind9-dnsutils dnsmasq-base nginx-light socat tcpdump
PEERS  := conntrack dante-server haproxy iperf3 microsocks openssh-client openssh-server tinyproxy-bin
BENCH  := haproxy iperf3 nginx-light v2ray wrk
# Of `make bench`: names of workloads, other options (--strict, --chart FILE). Of `make soak`: how long.
QUICK   ?=
ONLY    ?=
OPTIONS ?=
SECONDS ?= 300

.PHONY: demo test lint mininet bench soak golden clean system-demo system-test system-bench
demo: system-demo $(VENV)/ready
	$(SUDO) $(BIN)/python mininet/demo.py

mininet: system-demo $(VENV)/ready
	$(SUDO) $(BIN)/python mininet/scenario.py

test: system-test lint
	$(SUDO) env $(if $(CI),CI=$(CI)) $(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: system-bench $(VENV)/ready
	$(SUDO) $(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(addprefix --only ,$(ONLY)) $(OPTIONS)

soak: system-test $(VENV)/ready
	$(SUDO) $(BIN)/python -m benchmarks.soak --seconds $(SECONDS)

# The rulesets in rules/ that the tests hold the renderers to, written anew.
golden: $(VENV)/ready
	$(BIN)/python -m tests.lab.golden

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Services that come with a package (nginx, sshd, HAProxy, Dante) are not started: the tests start their own, in namespaces.
define install
	@missing=$$(for package in $(1); do \
	  dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || echo $$package; done); \
	test -z "$$missing" || { \
	  test -e /usr/sbin/policy-rc.d || { made=1; printf '#!/bin/sh\nexit 101\n' | $(SUDO) tee /usr/sbin/policy-rc.d >/dev/null; \
	    $(SUDO) chmod 755 /usr/sbin/policy-rc.d; }; \
	  $(SUDO) apt-get update -q && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	  code=$$?; test -z "$$made" || $(SUDO) rm -f /usr/sbin/policy-rc.d; exit $$code; }
endef

system-demo:
	$(call install,$(SYSTEM) $(TOPOLOGY))

system-test:
	$(call install,$(SYSTEM) $(TOPOLOGY) $(PEERS))

system-bench:
	$(call install,$(SYSTEM) $(BENCH))

$(VENV)/ready: pyproject.toml | system-demo
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check wheel setuptools
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@
