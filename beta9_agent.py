#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests", "psutil", "nvidia-ml-py", "pyyaml"]
# ///
"""Registers this machine with a Beta9 gateway and keeps it ready for work until told to stop.

Read this file before you run it: the tokens that you give it let the gateway run anything on this
machine. Rooms 1 to 10 are the agent, all that runs while a machine is kept. Rooms 11 to 14 are
the desk, what a person calls by hand. A function calls only what stands above it.

    settings -> machine facts -> register -> keepalive, keepalive, ... -> register again -> exit
                                    ^-- forgotten, or changed --'         (takes no new work)

Connects to  the gateway you name, or the proxy that the environment names for it: POST
             /api/v1/machine/register (with the k3s token) and /api/v1/machine/keepalive; your
             DNS, for its name; with --ssh the gateway through ssh alone.
             This machine's k3s, at --k3s-url and through no proxy: with --k3s-ca-file for the
             gateway's rights there, worker pods and the node; else for a TLS handshake, without
             any token. --check also --hostname, and what the gateway names for workers
Listens      nowhere (--dev: on 127.0.0.1; --ssh: ssh, on a Unix socket that is this user's;
             --ssh-reverse: the other host, on a port that leads to this machine's k3s)
Reads        the files you name, its state folder, /etc/machine-id, the hardware through psutil
             and NVML; ssh reads its own configuration and keys
Writes       its state folder (with --ssh a socket, there or in /tmp), log lines to standard error
             and systemd, answers to standard output
Starts       no other program; with --ssh the system's ssh, which does what its own configuration
             says besides, through setpriv where it is there, and ssh-keygen for --print-install
Exits        0 stopped as asked, 1 unexpected error, 2 bad setting, 69 gateway out of reach,
             75 already running, 77 token refused, 78 machine refused
"""
# ---- 1 What this program does, sends, writes and runs
import argparse
import collections
import contextlib
import enum
import fcntl
import functools
import hashlib
import ipaddress
import json
import logging
import math
import os
import random
import re
import select
import signal
import socket
import stat
import sys
import threading
import time
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple

if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed: install one, or use `uv run`, which brings its own")

# ---- 2 Vocabulary
VERSION = "0.2.0"
REGISTER, KEEPALIVE = "register", "keepalive"
FILE_LIMIT = 64 * 1024          # bytes: of a token, of settings, of a state file
ANSWER_LIMIT = 64 * 1024        # bytes
CONFIG_LIMIT = 4 * 1024 * 1024  # bytes, with the gateway's configuration: 117 kB were seen
REQUEST_DEADLINE = 10.0         # seconds, for a whole request from the name look-up on
HOST_DEADLINE = 5.0             # seconds, for driver and disk together, and for a look at k3s
K3S_PERIOD = 10.0               # seconds between two looks at k3s; never above the interval
K3S_PATIENCE = 1.0              # seconds, for the first look, and between two glances at one
FILES_PERIOD = 2.0              # seconds between two looks at the files of tokens and k3s's CA
STOP_DEADLINE = 1.0             # seconds that a stop leaves to a request in flight
LEAVE_DEADLINE = 1.8            # seconds from the stop to the end of the last request
DENIED_PATIENCE = 60.0          # seconds: a 401 can be trouble of the gateway's database
WORKER_PATIENCE = 600.0         # seconds: idle workers end after 300
LOSS_PATIENCE = 30.0            # seconds: a registration without CPU, and a look at k3s after it
QUIET = 600.0                   # seconds between lines about the same thing
TUNNEL_DEADLINE = 25.0          # seconds that ssh may take until it carries
CHECK_DEADLINE = 14.0           # seconds, for all of --check
TICK = 0.5                      # seconds between two looks at the stop flag
STATUS_FORMAT = 1               # of the status record
USER_DATA_LIMIT = 64 * 1024     # bytes: that of most clouds
LOG = logging.getLogger("beta9-agent")


class AgentError(Exception):
    """What ends the program. Its text is for people and holds the remedy."""

    def __init__(self, text: str, exit_code: int = 2) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class UnsafeAddress(AgentError):
    """The tokens would travel to a public address in cleartext."""

    remedy = "Give --tls, or --ssh for a tunnel, or accept it with --allow-cleartext"

    def __init__(self, fault: str, by_name: bool) -> None:
        super().__init__(f"{fault}. {self.remedy}")
        self.fault, self.by_name = fault, by_name   # by a name, which may lead elsewhere later


class Secret:
    """A token. It shows its length; the text leaves through `reveal` alone."""

    def __init__(self, text: str) -> None:
        self.__text = text

    def __repr__(self) -> str:
        return f"set ({len(self.__text)} characters)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.__text == self.__text

    def __hash__(self) -> int:
        return hash(self.__text)

    def reveal(self) -> str:
        """The token, for the place where a request is built."""
        return self.__text


class Kind(enum.Enum):
    """What an attempt to reach the gateway came to."""

    OK = enum.auto()
    TROUBLE = enum.auto()           # passing, as far as anybody can tell
    FORGOTTEN = enum.auto()         # the gateway does not know this machine any more
    DENIED = enum.auto()            # 401
    FORBIDDEN = enum.auto()         # 403
    REFUSED = enum.auto()           # the gateway cannot use a machine that is configured so
    UNSAFE = enum.auto()            # a public address in digits, in cleartext
    UNSAFE_NAME = enum.auto()       # a name that leads to one


EXIT_CODES = {Kind.TROUBLE: 69, Kind.FORGOTTEN: 69, Kind.UNSAFE_NAME: 69, Kind.DENIED: 77,
              Kind.FORBIDDEN: 77, Kind.REFUSED: 78, Kind.UNSAFE: 2}


class Outcome(NamedTuple):
    """What an attempt came to: what happened, what a person can do, what the answer told."""

    kind: Kind
    text: str = ""
    remedy: str = ""
    ttl: float | None = None        # seconds
    retry_after: float = 0.0        # seconds, 0 for none
    placement: str = ""             # why no work will come, as far as a registration's answer tells


class Lease(NamedTuple):
    """What the gateway knows of this machine, and when the next attempt is due, in seconds."""

    due: float
    ttl: float = 299.0                      # a guess, until the gateway tells
    registered: bool = False
    kept: bool = False                      # by a keepalive since the registration
    confirmed_at: float | None = None
    failing_since: float | None = None
    denied_since: float | None = None       # by 401, 403 or a name that is public for now
    reregistered_at: float = -math.inf


class Gpu(NamedTuple):
    """A card as the driver tells it; a lost one has no name."""

    name: str | None
    free: bool


class Metrics(NamedTuple):
    """The gateway's own keys, CPU in millicores, memory in MiB. None is unknown and not sent."""

    cpu_utilization_pct: float | None
    memory_utilization_pct: float | None
    total_cpu_available: int | None
    total_memory_available: int | None
    total_disk_space_bytes: int | None
    total_disk_free_bytes: int | None
    free_gpu_count: int
    worker_count: int | None = None


class Offer(NamedTuple):
    """What is registered as this machine's capacity: millicores, MiB, GPUs. None is unknown."""

    cpu: int | None
    memory: int | None
    gpu_count: int | None


class Worker(NamedTuple):
    """A worker's pod: its status as `kubectl get pods` shows it, and when it was made."""

    status: str
    since: float


class K3sView(NamedTuple):
    """What a look at k3s found, or what is believed after several. None is unknown."""

    fault: str = ""                                 # why no worker can run, with the remedy
    workers: Mapping[str, Worker] | None = None     # by the names of the pods
    gpu_count: int | None = None                    # that its node has for workers


class K3sState(NamedTuple):
    """What is believed of k3s, and what that rests on."""

    view: K3sView
    last: K3sView | None = None             # of the last look
    seen: bool = False                      # usable at least once
    since: float = 0.0                      # when it became usable, or unusable


class OfferPlan(NamedTuple):
    """What is offered, and what a lower `gpu_count` has to wait for.

    Lowering it below what workers hold, with CPU on offer, makes a counter of the gateway wrap
    around, which then starts workers without end and cordons the whole pool (measured).
    """

    offer: Offer
    found: Offer                            # what two samples agreed on
    sample: Offer                           # the last one
    promised: int = 0                       # GPUs of the last offer with CPU: workers may hold them
    held_until: float | None = None         # no CPU is offered before
    lost_at: float | None = None            # GPUs, with the workers known that may hold them
    reason: str = ""                        # why not all is offered, with the remedy


def format_host(host: str) -> str:
    """The host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


class Config(argparse.Namespace):
    """The checked settings by their names in OPTIONS, and where each came from."""

    @property
    def gateway(self) -> str:
        """The gateway's URL."""
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{format_host(self.gateway_host)}:{self.gateway_port}"

    @property
    def gateway_flags(self) -> str:
        """The options that say where the gateway is."""
        return "--ssh-gateway" if self.ssh else "--gateway-host and --gateway-port"


# ---- 3 Decisions
def printable(value: object, limit: int = 200) -> str:
    """One line of at most `limit` characters, control characters spelled out."""
    text = str(value)[:limit]
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)[:limit]


def explain_error(error: BaseException) -> str:
    """What went wrong, without the system's number for it."""
    return printable(getattr(error, "strerror", None) or error)


def parse_json(body: bytes) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def as_mapping(value: object) -> dict[str, Any]:
    """The value where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def number_in(mapping: Mapping[str, Any], name: str) -> float | None:
    """A number of a JSON object; None for anything else."""
    value: Any = mapping.get(name)      # True is no number, though Python has it be one
    return value if type(value) in (int, float) and abs(value) < 2 ** 63 else None


# Loopback, RFC 1918, shared addresses (Tailscale's), link-local, and the same in IPv6.
PRIVATE_NETWORKS = [ipaddress.ip_network(network) for network in (
    "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10",
    "169.254.0.0/16", "::1/128", "fc00::/7", "fe80::/10")]


def is_private(address: str) -> bool:
    """Whether only this machine, its site or its VPN can be at this IP address."""
    return any(ipaddress.ip_address(address) in network for network in PRIVATE_NETWORKS)


def is_loopback(host: str) -> bool:
    """Whether the host is this machine, however it is written."""
    return re.fullmatch(r"(?i)localhost\.?|127\.[0-9.]+|[0:]+1", host) is not None


def parse_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, 0 for none or garbage. A date counts from the answer's own `Date`."""
    value = headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return float(value[:9])
    import email.utils  # slow, and hardly ever needed
    try:
        until, sent = (email.utils.parsedate_to_datetime(text)
                       for text in (value, headers.get("Date", "")))
        return max(0.0, (until - sent).total_seconds())
    except Exception:  # of any kind, from a stranger's text
        return 0.0


def describe_body(body: bytes) -> str:
    """An answer for the log, without what is nested in it, such as `config` with its secrets."""
    fields = as_mapping(parse_json(body))
    if not fields:
        hidden = b"config" in body
        return "not shown" if hidden else printable(body.decode(errors="replace"), 1000)
    for key, value in fields.items():
        if key == "config" or (isinstance(value, (dict, list)) and key != "machine_state"):
            fields[key] = "not shown"
    return printable(json.dumps(fields), 1000)


NEW_TOKEN = "Get a new one with `beta9 machine create --pool {config.pool_name}`"
TRY_HEALTH = ("Check {config.gateway_flags};"
              " `curl {config.gateway}/api/v1/health` should answer")

# What an answer means that is no confirmation. The first pattern that matches the line
# "<call> <status> <what it says>" wins: the gateway says 500 for a bad pool name, for a machine
# that it forgot and for real trouble alike. Source: the gateway's handlers.
ANSWERS = (
    ("keepalive .*(machine_expired|machine.not.found)", Kind.FORGOTTEN,
     "The gateway does not know this machine any more, as after a restart of its Redis"),
    (".*invalid.pool", Kind.REFUSED,
     "The gateway has no pool {config.pool_name}: check --pool-name"),
    (".*(invalid (machine|gpu|payload)|are required)", Kind.REFUSED,
     "Look at what is sent with --dry-run"),
    (".*unable to create remote config|keepalive 404 not found", Kind.REFUSED,
     "This is an upstream gateway, without keepalive route: the Beta9 fork is needed"),
    (r"\S+ 401|.*invalid_token", Kind.DENIED,
     "The token is unknown, expired or disabled, or the gateway's database is away. " + NEW_TOKEN),
    (r"\S+ 403", Kind.FORBIDDEN, "This is a token of another kind, not a machine's. " + NEW_TOKEN),
    (r"\S+ 3", Kind.TROUBLE, "Redirects are never followed. " + TRY_HEALTH),
    (r"\S+ (5|429)", Kind.TROUBLE, "The gateway, its Redis or database has trouble. " + TRY_HEALTH),
    ("", Kind.TROUBLE, "Is this the gateway? " + TRY_HEALTH),
)


def explain_answer(call: str, status: int, headers: Mapping[str, str], body: bytes,
                   config: Config) -> Outcome:
    """What an answer means that is no confirmation."""
    fields = as_mapping(parse_json(body))
    parts = [fields.get(key) for key in ("error_code", "message", "suggestion")]
    said = " ".join(str(part) for part in parts if part)
    line = f"{call} {status} {said}".lower()
    kind, remedy = next(row[1:] for row in ANSWERS if re.match(row[0], line, re.DOTALL))
    if 300 <= status < 400:
        location = headers.get("Location", "nowhere")
        said = f"redirect to {location}"
        tls_here = f"(?i)https://{re.escape(format_host(config.gateway_host))}(:[0-9]+)?(/|$)"
        if not config.tls and re.match(tls_here, location):
            remedy = "Redirects are never followed: give --tls, and the port of https"
    said = said or f"{headers.get('Content-Type')} {describe_body(body) or 'empty'}"
    return Outcome(kind, f"{status} {printable(said)}", remedy.format(config=config),
                   retry_after=parse_retry_after(headers) if status in (429, 503) else 0.0)


def explain_placement(fields: Mapping[str, Any], config: Config) -> str:
    """Why no work will come, with the remedy, by the configuration that a registration's answer
    holds; "" where that says nothing against it.
    """
    if "config" in fields and fields["config"] is None:
        return ("the gateway cannot place workers anywhere: set tailscale.directRedisHost in its"
                " configuration, or let it log in to a tailnet")
    pools = as_mapping(as_mapping(as_mapping(fields.get("config")).get("worker")).get("pools"))
    pool = as_mapping(pools.get(config.pool_name))
    mode, provider = pool.get("mode", "external"), pool.get("provider") or config.provider_name
    if mode != "external":
        return (f"pool {config.pool_name} is of mode {printable(mode, 60)}, so the gateway never"
                " looks at this machine: give a pool of mode external")
    if provider != config.provider_name:
        return (f"pool {config.pool_name} is of provider {printable(provider, 60)}, so the gateway"
                f" never looks at this machine: give --provider-name {printable(provider, 60)}")
    return ""


def classify(call: str, status: int, headers: Mapping[str, str], body: bytes, machine_id: str,
             config: Config) -> Outcome:
    """What the gateway's answer to a register or keepalive means. Source: gateway-api."""
    answer = parse_json(body)
    fields = as_mapping(answer)
    state = as_mapping(fields.get("machine_state"))
    confirmed = (isinstance(answer, dict) and status == 200 and not fields.get("error_code")
                 and (call == REGISTER or fields.get("status") == "ok")
                 and state.get("machine_id", machine_id) == machine_id)
    if not confirmed:
        return explain_answer(call, status, headers, body, config)
    ttl: Any = state.get("ttl_seconds")
    sane = type(ttl) in (int, float) and 1 <= ttl <= 86400
    return Outcome(Kind.OK, ttl=ttl if sane else None, placement=explain_placement(fields, config))


# Nothing that fits can be an option of ssh, or a command in the shell that it runs for ProxyJump.
HOST_PATTERN = r"([A-Za-z0-9_][\w.-]*|\[[0-9A-Fa-f:.]+\])"
SSH_HOST_PATTERN = rf"(?:([A-Za-z0-9_][\w.-]*)@)?{HOST_PATTERN}(?::([0-9]{{1,5}}))?"


def split_place(text: str) -> tuple[str, str, str]:
    """User, host and port of [user@]host[:port], "" for what is not there."""
    found = re.fullmatch(SSH_HOST_PATTERN, text, re.ASCII)
    return (found[1] or "", found[2].strip("[]"), found[3] or "") if found else ("", "", "")


# What ssh's words mean. The first pattern that is in any line of them holds.
SSH_WORDS = (
    ("IDENTIFICATION HAS CHANGED", "Its host key is not the one in known_hosts: somebody may sit in"
     " between. {compare}, then correct known_hosts"),
    ("Host key verification failed", "Its host key is not in known_hosts. {compare}, then"
     " `{keyscan} >> ~/.ssh/known_hosts`"),
    ("not accessible|UNPROTECTED PRIVATE KEY|Load key",
     "Check --ssh-identity: a private key that only this user can read"),
    ("Permission denied|Too many authentication", "The public half of {key} must be in"
     " authorized_keys of {user} there, and the key must have no passphrase"),
    ("remote port forwarding failed", "Port {config.ssh_reverse} there is taken, or not in"
     " permitlisten in authorized_keys. Check --ssh-reverse"),
    ("administratively prohibited",
     "permitopen in authorized_keys there must say {config.ssh_gateway}"),
    ("open failed", "Is the gateway at {config.ssh_gateway}, seen from there? Check --ssh-gateway"),
    ("", "Check --ssh, and that sshd is up there: `ssh -v` says more"),
)


def explain_ssh(said: str, config: Config) -> tuple[str, str]:
    """The line that matters of what ssh said, "" for none, and the remedy."""
    user, host, port = split_place(config.ssh)
    lines = [line.strip(" \r.@") for line in said.split("\n") if line.strip()] or [""]
    line, remedy = next((line, remedy) for pattern, remedy in SSH_WORDS
                        for line in reversed(lines) if re.search(pattern, line))
    keyscan = f"ssh-keyscan -p {port or 22} {host}"
    return printable(line), remedy.format(
        config=config, user=user or "the user", key=config.ssh_identity or "a key in ~/.ssh",
        keyscan=keyscan, compare=f"Compare `{keyscan} | ssh-keygen -lf -` with `ssh-keygen -lf"
        " /etc/ssh/ssh_host_ed25519_key.pub` there")


Draw = Callable[[float, float], float]      # a random number between two others


def backoff(failing_for: float, cap: float, draw: Draw) -> float:
    """Seconds to the next attempt: full jitter, from a floor to a ceiling that grows with the
    outage.

    Drawn after the cap, so that a fleet stays spread when all have reached it.
    """
    ceiling = min(max(4.0, min(failing_for, 60.0)), cap)
    return draw(min(1.0, ceiling / 4), ceiling)


def tunnel_pause(failures: int, draw: Draw) -> float:
    """Seconds from the last of so many failures of ssh in a row to its next start."""
    ceiling = min(2.0 ** min(failures, 5), 30.0)
    return draw(ceiling / 2, ceiling)


def next_call(lease: Lease, now: float) -> str:
    """Keepalive, or register where this machine is not registered or its TTL is over."""
    known = (lease.registered and lease.confirmed_at is not None
             and now - lease.confirmed_at <= lease.ttl)
    return KEEPALIVE if known else REGISTER


def interval_of(lease: Lease, config: Config) -> float:
    """Seconds between keepalives, never over a third of the TTL."""
    return min(float(config.keepalive_interval), lease.ttl / 3)


def deadline_of(call: str, lease: Lease, config: Config) -> float:
    """Seconds that a call may take. The gateway can need 5 for any registration."""
    if call == REGISTER:
        return REQUEST_DEADLINE
    return max(2.0, min(REQUEST_DEADLINE, interval_of(lease, config)))


def lease_after_success(lease: Lease, call: str, now: float, interval: float, draw: Draw) -> Lease:
    """The lease after a confirmed call."""
    if call == REGISTER:    # kept alive at once: a machine that is just registered takes no work
        # Only a later registration counts as another one.
        again = lease.reregistered_at if lease.confirmed_at is None else now
        return lease._replace(due=now, registered=True, kept=False, confirmed_at=now,
                              denied_since=None, reregistered_at=again)
    # The first pause is random, so that machines started together spread out.
    pause = interval * (draw(0.9, 1.1) if lease.kept else draw(0.1, 1.0))
    overdue = lease.due + pause <= now      # after a suspend: what was missed is not made up
    return lease._replace(due=(now if overdue else lease.due) + pause, kept=True, confirmed_at=now,
                          failing_since=None, denied_since=None)


def lease_after_failure(lease: Lease, outcome: Outcome, now: float, interval: float,
                        draw: Draw) -> Lease:
    """The lease after a call that failed."""
    since = now if lease.failing_since is None else lease.failing_since
    denied_since = None
    if outcome.kind in (Kind.DENIED, Kind.FORBIDDEN, Kind.UNSAFE_NAME):
        denied_since = now if lease.denied_since is None else lease.denied_since
    lease = lease._replace(failing_since=since, denied_since=denied_since)
    if outcome.kind is Kind.FORGOTTEN:      # registers at once, then once an interval
        due = max(now, lease.reregistered_at + interval)
        return lease._replace(due=due, registered=False)
    if outcome.retry_after > 0:
        pause = min(outcome.retry_after, 75.0, lease.ttl / 4) + draw(0.0, min(25.0, lease.ttl / 12))
        return lease._replace(due=now + pause)
    denied_later = denied_since is not None and lease.confirmed_at is not None
    failing_for = math.inf if denied_later else now - since     # the longest pause
    return lease._replace(due=now + backoff(failing_for, interval * 1.1, draw))


def lease_after(lease: Lease, call: str, outcome: Outcome, now: float, config: Config,
                draw: Draw) -> Lease:
    """What a call that ended so at `now` makes of the lease: the whole schedule."""
    if outcome.ttl is not None:
        lease = lease._replace(ttl=outcome.ttl)
    interval = interval_of(lease, config)
    if outcome.kind is Kind.OK:
        return lease_after_success(lease, call, now, interval, draw)
    return lease_after_failure(lease, outcome, now, interval, draw)


def exit_code_after(outcome: Outcome, lease: Lease, waited: float, now: float,
                    config: Config) -> int | None:
    """The exit code of a failure before the first ready, `waited` seconds in; None: go on."""
    hopeless = outcome.kind in (Kind.FORBIDDEN, Kind.REFUSED, Kind.UNSAFE)
    late = config.startup_timeout is not None and waited >= config.startup_timeout
    denied = lease.denied_since is not None and now - lease.denied_since >= DENIED_PATIENCE
    return EXIT_CODES[outcome.kind] if config.once or hopeless or late or denied else None


def offer_of(metrics: Metrics, gpus: list[Gpu] | None, config: Config) -> Offer:
    """What is there, under the operator's caps; a lost GPU is not."""
    def capped(found: int | None, cap: int | None) -> int | None:
        return found if found is None or cap is None else min(found, cap)

    gpu_count = None if gpus is None else sum(gpu.name is not None for gpu in gpus)
    return Offer(capped(metrics.total_cpu_available, config.max_cpu),
                 capped(metrics.total_memory_available, config.max_memory),
                 capped(gpu_count, config.max_gpus))


QUANTITIES = {"m": 1.0, "": 1000.0, "Mi": 1.0, "Gi": 1024.0}    # in millicores, and in MiB


def parse_quantity(text: object) -> float:
    """Millicores of "8000m" or "8", MiB of "16Gi" or "512Mi"; 0 for anything else."""
    found = re.fullmatch("([0-9]{1,15})(m|Mi|Gi|)", str(text))
    return float(found[1]) * QUANTITIES[found[2]] if found else 0.0


def parse_expiry(token: str) -> float | None:
    """When a JWT expires, in seconds since 1970; None for one without end, and for no JWT."""
    import base64
    part = f"{token}..".split(".")[1]
    with contextlib.suppress(ValueError):
        claims = parse_json(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        return number_in(as_mapping(claims), "exp")
    return None


# What the gateway does in k3s: API group, resource, verb. Source: gateway-api.
NEEDED_RULES = (("batch", "jobs", "list"), ("batch", "jobs", "create"), ("batch", "jobs", "delete"),
                ("", "pods", "list"))
NO_CPU = "so no worker can run here and no CPU is offered"
TRY_K3S = "look at `systemctl status k3s`, and check --k3s-url and --k3s-ca-file"
TRY_PLUGIN = ("is NVIDIA's device plugin in `kubectl get pods -A`, and was nvidia-container-runtime"
              " there before k3s started? See `nvidia-smi` too")
NEW_K3S_TOKEN = "make a new one with `kubectl create token`"


def as_list(value: object) -> list[Any]:
    """The value where it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else []


def allows(rule: object, group: str, resource: str, verb: str) -> bool:
    """Whether a rule of a SelfSubjectRulesReview allows this for every object."""
    fields = as_mapping(rule)
    return not fields.get("resourceNames") and all(
        {word, "*"} & {str(each) for each in as_list(fields.get(key))}
        for key, word in (("apiGroups", group), ("resources", resource), ("verbs", verb)))


def explain_rules(status: int, body: bytes) -> str:
    """Why the gateway cannot use k3s, by a SelfSubjectRulesReview; "" where it can."""
    fields = as_mapping(parse_json(body))
    rules = as_mapping(fields.get("status")).get("resourceRules")
    if status == 401:
        return (f"k3s refuses the token, which expired or whose account was deleted, {NO_CPU}:"
                f" {NEW_K3S_TOKEN}")
    if status == 201 and isinstance(rules, list):
        missing = [f"{verb} {resource}" for group, resource, verb in NEEDED_RULES
                   if not any(allows(rule, group, resource, verb) for rule in rules)]
        if not missing:
            return ""
        return (f"the k3s token may not {', '.join(missing)} in namespace default, {NO_CPU}: apply"
                " what --print-file k3s-accounts prints")
    said = printable(fields.get("message") or "no Kubernetes API", 120)
    return f"k3s answers {status}, {said}, {NO_CPU}: {TRY_K3S}"


AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "y": 365 * 86400}


def parse_workers(body: bytes, now: float) -> dict[str, Worker] | None:
    """The pods in a Table of the Kubernetes API; None where it is none."""
    table = as_mapping(parse_json(body))
    if table.get("kind") != "Table":
        return None
    columns = [as_mapping(each).get("name") for each in as_list(table.get("columnDefinitions"))]
    workers = {}
    for row in as_list(table.get("rows")):
        cells = dict(zip(map(str, columns), as_list(as_mapping(row).get("cells"))))
        ages = re.findall("([0-9]{1,9})([smhdy])", str(cells.get("Age")))
        age = sum(int(count) * AGE_UNITS[unit] for count, unit in ages)
        workers[printable(cells.get("Name"), 100)] = Worker(printable(cells.get("Status"), 60),
                                                            now - age)
    return workers


def count_running(workers: Mapping[str, Worker] | None) -> int | None:
    """The workers that run; None where they are not known."""
    return None if workers is None else [each.status for each in workers.values()].count("Running")


def find_node(body: bytes, hostname: str) -> dict[str, Any]:
    """This machine's node in a NodeList: the only one, or the one of its name; else {}."""
    nodes = [as_mapping(node) for node in as_list(as_mapping(parse_json(body)).get("items"))]
    named = [node for node in nodes
             if as_mapping(node.get("metadata")).get("name") == hostname.lower()]
    chosen = nodes if len(nodes) == 1 else named
    return chosen[0] if chosen else {}


def count_node_gpus(node: Mapping[str, Any]) -> int | None:
    """The GPUs that k3s can give to workers, 0 without a device plugin; None for no node."""
    allocatable = as_mapping(as_mapping(node.get("status")).get("allocatable"))
    count = str(allocatable.get("nvidia.com/gpu", "0"))
    return int(count) if node and re.fullmatch("[0-9]{1,5}", count) else None


def believe(state: K3sState, look: K3sView, now: float) -> K3sState:
    """What is believed after one more look. Usability and GPU count change after two equal looks in
    a row, as k3s and its device plugin restart; the first good look is believed at once.
    """
    view, last = state.view, state.last
    usable = look.fault == ""
    changes = usable != (view.fault == "")
    confirmed = last is not None and usable == (last.fault == "")
    if usable and not state.seen:
        confirmed = True
    fault = view.fault if changes and not confirmed else look.fault
    gpu_count = view.gpu_count
    agreed = last is not None and look.gpu_count == last.gpu_count
    if look.gpu_count is not None and (agreed or gpu_count is None):
        gpu_count = look.gpu_count
    workers, known = look.workers, view.workers or {}
    if workers is not None:     # the age of a pod is told in whole seconds, minutes or hours
        workers = {name: worker._replace(since=known.get(name, worker).since)
                   for name, worker in workers.items()}
    return K3sState(K3sView(fault, workers, gpu_count), look, state.seen or usable,
                    now if changes and confirmed else state.since)


def plan_after_loss(plan: OfferPlan, offer: Offer, workers: Mapping[str, Worker] | None,
                    now: float) -> OfferPlan:
    """What to offer where there are fewer GPUs than workers may hold."""
    gpus, promised = offer.gpu_count or 0, plan.promised
    lost = f"{promised - gpus} of {promised} GPUs are lost"
    fewer = gpus < (plan.offer.gpu_count or 0)
    if workers is not None:
        lost_at = now if plan.lost_at is None or fewer else plan.lost_at
        plan = plan._replace(lost_at=lost_at, held_until=None)
        # One may have been placed until the gateway knew that there is no CPU any more.
        if not workers and now - lost_at >= LOSS_PATIENCE:
            return plan._replace(offer=offer, promised=gpus, lost_at=None, reason="")
    if plan.lost_at is not None:
        count = "unknown" if workers is None else len(workers)
        reason = (f"{lost}: no work is taken until the workers that may hold them have ended (now:"
                  f" {count}): look at `nvidia-smi`; `beta9 machine drain` helps")
    elif plan.held_until is None:       # lost while workers may run
        reason = (f"{lost}, but stay registered, as the"
                  " gateway cannot take them back from workers: look at `nvidia-smi`, then"
                  " `beta9 machine drain` this machine and restart the agent")
        return plan._replace(offer=offer._replace(gpu_count=promised), reason=reason)
    else:
        reason = (f"{gpus} GPUs are offered where {promised} were before the start: no work is"
                  f" taken for {WORKER_PATIENCE / 60:.0f} minutes, in which idle workers end")
        if fewer:           # workers get the time anew
            plan = plan._replace(held_until=now + WORKER_PATIENCE)
    return plan._replace(offer=offer._replace(cpu=0), reason=reason)


def plan_offer(plan: OfferPlan, sample: Offer | None, k3s: K3sView, now: float) -> OfferPlan:
    """What to offer after a sample of the machine, None for none, and with what is believed of k3s.

    Another capacity counts once two samples agree; what is unknown in one stays as it was. Where
    k3s has a fault no worker can run: without CPU on offer the gateway does not try, which it else
    does once a second, for ever (measured).
    """
    if sample is not None:
        if sample.gpu_count is None and plan.held_until is not None:    # the driver hangs
            plan = plan._replace(held_until=now + WORKER_PATIENCE)
        sample = Offer(*(old if new is None else new for new, old in zip(sample, plan.sample)))
        found = sample if sample == plan.sample else plan.found
        plan = plan._replace(found=found, sample=sample)
    cpu, memory, gpus = (value or 0 for value in plan.found)
    shortage = ""
    if k3s.gpu_count is not None and k3s.gpu_count < gpus:
        shortage = (f"k3s has {k3s.gpu_count} of {gpus} GPUs for workers, and no more are offered:"
                    f" {TRY_PLUGIN}")
        gpus = k3s.gpu_count
    offer = Offer(cpu, memory, gpus)
    waited = plan.held_until is not None and now >= plan.held_until
    if waited and k3s.workers is None and not k3s.fault:    # idle workers have ended
        plan = plan._replace(promised=gpus)
    if gpus < plan.promised:
        plan = plan_after_loss(plan, offer, k3s.workers, now)
    else:
        plan = plan._replace(offer=offer, held_until=None, lost_at=None, reason="")
    if k3s.fault:
        return plan._replace(offer=plan.offer._replace(cpu=0), reason=k3s.fault)
    if (plan.offer.cpu or 0) > 0:
        plan = plan._replace(promised=plan.offer.gpu_count or 0)
    return plan._replace(reason="; ".join(text for text in (plan.reason, shortage) if text))


def first_offer(sample: Offer, promised: int, k3s: K3sView, now: float) -> OfferPlan:
    """What to offer at the start, where `promised` GPUs were when this machine took work last."""
    found = Offer(*(value or 0 for value in sample))
    fewer = (found.gpu_count or 0) < promised
    plan = OfferPlan(found, found, found, promised, now + WORKER_PATIENCE if fewer else None)
    return plan_offer(plan, None, k3s, now)


class LineBudget:
    """Which of many lines about one thing are written: the first `free`, the 1st, 2nd, 4th, 8th,
    then one in `quiet` seconds; anew after as many seconds without any.
    """

    def __init__(self, quiet: float = QUIET, free: int = 1) -> None:
        self.quiet, self.free = quiet, free
        self.count, self.next_count = 0, 1
        self.last = self.next_time = -math.inf

    def allows(self, now: float) -> bool:
        """Whether a line that comes up at `now` is written."""
        if now - self.last > self.quiet:
            self.count, self.next_count = 0, 1
        self.last, self.count = now, self.count + 1
        if self.free < self.count < self.next_count and now < self.next_time:
            return False
        if self.count >= self.next_count:
            self.next_count *= 2
        self.next_time = now + self.quiet
        return True

    def rest(self) -> None:
        """After a line that was written outside the budget: the next one comes later."""
        self.next_time += 2 * self.quiet


class LineQuota:
    """At most `size` lines in `seconds`; `left_out` counts what was not written since."""

    def __init__(self, size: int = 20, seconds: float = QUIET) -> None:
        self.times: collections.deque[float] = collections.deque([-math.inf] * size, size)
        self.seconds, self.left_out = seconds, 0

    def allows(self, now: float) -> bool:
        """Whether one more line is written."""
        allowed = now - self.times[0] >= self.seconds
        if allowed:
            self.times.append(now)
        return allowed


class Trouble:
    """The failures of the present outage, and which lines are written about it and its end."""

    def __init__(self) -> None:
        self.budget, self.count, self.told = LineBudget(), 0, False

    def failed(self, now: float) -> bool:
        """Counts a failure; whether a line is written about it."""
        self.count += 1
        allowed = self.budget.allows(now)
        self.told = self.told or allowed
        return allowed

    def recovered(self) -> bool:
        """Ends the outage; whether a line is written about it, as one was about a failure."""
        told, self.told, self.count = self.told, False, 0
        if told:
            self.budget.rest()
        return told


# ---- 4 Wire shapes, texts and the masking of tokens
def format_offer(offer: Offer) -> str:
    """The offer for people."""
    return f"{(offer.cpu or 0) / 1000:g} CPUs, {offer.memory} MiB memory, {offer.gpu_count} GPUs"


def register_payload(config: Config, machine_id: str, offer: Offer,
                     private_ip: str) -> dict[str, Any]:
    """The body of a registration: all strings, `token` being that of k3s. Source: gateway-api."""
    return {"token": config.k3s_token or "", "machine_id": machine_id,
            "provider_name": config.provider_name, "pool_name": config.pool_name,
            "hostname": config.hostname or f"machine-{machine_id}", "private_ip": private_ip,
            "cpu": f"{offer.cpu}m", "memory": f"{offer.memory}Mi",
            "gpu_count": f"{offer.gpu_count}"}


def keepalive_payload(config: Config, machine_id: str, metrics: Metrics) -> dict[str, Any]:
    """The body of a keepalive. Source: gateway-api, which panics without `metrics`."""
    known = {key: value for key, value in metrics._asdict().items() if value is not None}
    return {"machine_id": machine_id, "provider_name": config.provider_name,
            "pool_name": config.pool_name, "agent_version": f"{VERSION}-python", "metrics": known}


# Of two that name the same, ssh takes the first. LogLevel, as its words are needed.
SSH_OPTIONS = ("BatchMode=yes", "ExitOnForwardFailure=yes", "ServerAliveInterval=15",
               "ServerAliveCountMax=3", "ConnectTimeout=10", "ControlMaster=no", "ControlPath=none",
               "ForwardAgent=no", "ForwardX11=no", "UpdateHostKeys=no", "PermitLocalCommand=no",
               "StreamLocalBindMask=0177", "StreamLocalBindUnlink=yes", "LogLevel=INFO")


def ssh_arguments(config: Config, path: str) -> list[str]:
    """What ssh is started with, to listen on a socket at `path`. Source: ssh(1), ssh_config(5)."""
    user, host, port = split_place(config.ssh)
    words = ["-N", "-T", "-L", f"{path}:{format_host(config.gateway_host)}:{config.gateway_port}"]
    if config.ssh_reverse:
        words += ["-R", f"{config.ssh_reverse}:localhost:6443"]
    options = [*SSH_OPTIONS]
    if config.ssh_identity:
        words += ["-i", config.ssh_identity]
        options.append("IdentitiesOnly=yes")
    for option in [*options, *(config.ssh_option or ())]:
        words += ["-o", option]
    if user:
        words += ["-l", user]
    if port:
        words += ["-p", port]
    return [*words, "--", host]


class Redactor:
    """Masks tokens in what is printed: any 8 characters of them in a row, encoded ones too.

    It knows the current token of each name and the one before.
    """

    WINDOW = 8      # characters; a shorter token is refused

    def __init__(self) -> None:
        self.known: dict[str, list[Secret]] = {}
        self.pieces: dict[Secret, set[str]] = {}

    def remember(self, name: str, secret: Secret) -> None:
        """Masks this token from now on."""
        if secret in self.known.get(name, ())[:1]:
            return
        self.known[name] = [secret, *self.known.get(name, ())[:1]]
        self.pieces = {each: self.pieces.get(each) or self.pieces_of(each.reveal())
                       for secrets in self.known.values() for each in secrets}

    def pieces_of(self, text: str) -> set[str]:
        """All windows of the token and of its base64 forms, at any of 3 offsets."""
        import base64
        forms = [text] + [base64.b64encode(bytes(shift) + text.encode(), signs).decode()
                          for shift in range(3) for signs in (b"+/", b"-_")]
        return {form[at:at + self.WINDOW] for form in forms
                for at in range(len(form) - self.WINDOW + 1)}

    def mask(self, text: str) -> str:
        """The text without the tokens that can be read in it."""
        shown, end = "", 0
        for at in range(len(text) - self.WINDOW + 1):
            window = text[at:at + self.WINDOW]
            if any(window in pieces for pieces in self.pieces.values()):
                if at > end or not shown:
                    shown += text[end:at] + "[redacted]"
                end = at + self.WINDOW
        return shown + text[end:]

    def redact(self, text: str) -> str:
        """The text without tokens; where URL or HTML encoding hid one, that is undone."""
        import urllib.parse
        result = plain = self.mask(text)
        for _ in range(4):      # as often as somebody may have encoded it
            decoded = urllib.parse.unquote(plain)
            if "&" in decoded:
                import html
                decoded = html.unescape(decoded)
            if decoded == plain:
                break
            plain = self.mask(decoded)
            if plain != decoded:
                result = plain
        return result


# ---- 5 Configuration
def checked(pattern: str, fault: str, convert: Callable[[str], Any] = str, low: float = -math.inf,
            high: float = math.inf) -> Callable[[str], Any]:
    """A parser of a setting's text. It raises ValueError with what is wrong and what is right."""
    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(fault)
        value = convert(text)
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ValueError(fault)
        return value
    return parse


DECIMAL = r"[0-9]{1,9}(\.[0-9]{1,9})?"
NO_HOST = "is not a host or IP: leave out scheme, port and path, as in gateway.example.com"
parse_name = checked(r"(?! )[^\x00-\x1f\x7f]+(?<! )",
                     "is empty, or has control characters or blanks around it: give printable text")
parse_token = checked(r"[!#-\[\]-~]{8,}", "is not a token: give 8 or more characters, without"
                      " blanks, quotes, backslashes and line ends", Secret)
parse_url = checked("https://[A-Za-z0-9.-]+(:[0-9]+)?/[!-~]*",
                    "is not an address: give https://host/path, without user and password")
NO_K3S_URL = "is not an address of k3s: give https and its host, as in https://127.0.0.1:6443"
parse_k3s_place = checked(r"https://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?/?",
                          NO_K3S_URL)
parse_switch = checked("(?i)1|true|yes|on|0|false|no|off",
                       "is neither yes nor no: give 1, true, yes, on, or 0, false, no, off",
                       lambda text: text.lower() in ("1", "true", "yes", "on"))


def parse_memory(text: str) -> int:
    """MiB."""
    return int(text[:-2]) * (1024 if text.endswith("Gi") else 1)


def parse_ip(text: str) -> str:
    """An IP address."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("is not an IP address: give one such as 10.1.2.3") from None


def parse_host(text: str) -> str:
    """A host name or an IP address, without the brackets of IPv6."""
    host = text.strip("[]")
    number = host.rpartition(".")[2].isdigit()      # no top-level domain is one
    if "%" in host:     # a zone, for which a URL has no room
        raise ValueError(NO_HOST)
    try:
        if ":" in host:
            ipaddress.IPv6Address(host)
        elif number:
            socket.inet_aton(host)
    except (ValueError, OSError):
        raise ValueError(NO_HOST) from None
    if ":" not in host and not re.fullmatch(r"\w[\w.-]{0,252}", host, re.ASCII):
        raise ValueError(NO_HOST)
    return host


parse_port = checked("[0-9]{1,5}", "is not a port: give a number from 1 to 65535", int, 1, 65535)


def parse_place(text: str) -> str:
    """The text, whose port, where it ends with one, is one."""
    found = re.search("(?:^|:)([0-9]+)$", text)
    if found:
        parse_port(found[1])
    return text


parse_ssh_host = checked(SSH_HOST_PATTERN, "is not a host that ssh can go to: give"
                         " [user@]host[:port], as in me@gateway.example.com", parse_place)
parse_ssh_gateway = checked(f"{HOST_PATTERN}:[0-9]+", "is not a host with its port: give"
                            " host:port, as in localhost:31994", parse_place)
parse_ssh_reverse = checked(f"({HOST_PATTERN}:)?[0-9]+", "is not a port, with an address or"
                            " without: give one such as 6443 or 10.0.0.7:6443", parse_place)
SSH_OPTION_PATTERN = (
    rf"ProxyJump={SSH_HOST_PATTERN}(,{SSH_HOST_PATTERN})*|(HostKeyAlias|UserKnownHostsFile"
    "|GlobalKnownHostsFile|CertificateFile|Ciphers|KexAlgorithms|MACs|AddressFamily|BindAddress)"
    r"=[\w@.,:+^~/\[\]-]+")
parse_ssh_options = checked(
    rf"({SSH_OPTION_PATTERN})(\n({SSH_OPTION_PATTERN}))*", "is not passed on to ssh: give one such"
    " as ProxyJump=HOST, without blanks, and any other in ssh's own configuration", str.splitlines)


def parse_k3s_url(text: str) -> str:
    """An address of https, as without it anybody could ask for the token."""
    import urllib.parse
    url: str = parse_k3s_place(text).rstrip("/")
    try:
        urllib.parse.urlsplit(url).port
    except ValueError:
        raise ValueError(NO_K3S_URL) from None
    return url


def parse_ca_file(path: str) -> str:
    """A PEM file of root certificates."""
    import ssl
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (OSError, ValueError):
        raise ValueError("is not a file of root certificates: give one in PEM format") from None
    return path


class Option(NamedTuple):
    """One setting: all there is to say about its option, its variable and its key in the file."""

    group: str
    name: str
    metavar: str            # "" for a switch
    parse: Callable[[str], Any]
    help: str
    default: str | None = None
    key: str = ""           # in the file, where it is not the name
    many: bool = False      # given again and again, a list in the file, one a line in a Setting

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable; an action has none, nor has a list."""
        return "" if self.group == "actions" or self.many else "BETA9_" + self.name.upper()

    @property
    def file_key(self) -> str:
        """The key in the file; an action has none."""
        return "" if self.group == "actions" or self.name == "config" else self.key or self.name


OPTIONS = [
    Option("actions", "once", "", parse_switch, "register, keep alive once, exit"),
    Option("actions", "dry_run", "", parse_switch,
           "show the settings and what would be sent, without the network"),
    Option("actions", "dev", "", parse_switch,
           "try it with a stand-in gateway in this process; needs no token"),
    Option("actions", "check", "", parse_switch,
           "find out whether this machine will work, without changing anything"),
    Option("actions", "status", "", parse_switch, "show how the agent of this machine is doing;"
           " exits with 0 ready, 1 not ready, 3 not running"),
    Option("actions", "json", "", parse_switch, "with --check or --status: print JSON"),
    Option("actions", "watch", "", parse_switch, "with --status: show it again every 2 s"),
    Option("actions", "print_install", "", parse_switch,
           "print a script that installs this file as a service with these settings"),
    Option("actions", "fetch_from", "URL", parse_url, "with --print-install: fetch the file from"
           " there instead of carrying it; its SHA-256 is checked"),
    Option("actions", "k3s", "WAY", checked("use|install", "is no way to get k3s: give use for one"
           " that is there, or install"), "with --print-install: have this machine's k3s make its"
           " own tokens; `install` brings k3s where it is missing"),
    Option("actions", "k3s_version", "VERSION", checked(
        r"v[0-9.]+\+k3s[0-9]+", "is not a version of k3s: give one such as v1.34.3+k3s1"),
        "with --k3s install: else its stable channel"),
    Option("actions", "k3s_installer_sha256", "HEX", checked(
        "[0-9a-f]{64}", "is not a SHA-256: give its 64 hex digits"),
        "with --k3s install: the only k3s installer to run"),
    Option("actions", "print_file", "NAME", parse_name,
           "print a file that this script installs, such as unit"),
    Option("actions", "print_uninstall", "", parse_switch, "print a script that uninstalls it"),
    Option("actions", "version", "", parse_switch, "show the version and SHA-256 of this file"),
    Option("actions", "help", "", parse_switch, "show this; -h for short"),
    Option("identity", "token", "TOKEN", parse_token,
           "machine token from `beta9 machine create`; others can see it in `ps`"),
    Option("identity", "token_file", "FILE", parse_name,
           "file with the machine token, - for standard input"),
    Option("identity", "machine_id", "ID", checked(
        "[0-9a-fA-F]{8}", "is not a machine id: give 8 hex characters", str.lower),
        "8 hex characters, else made at the first start and kept"),
    Option("identity", "pool_name", "NAME", parse_name, "worker pool", "external"),
    Option("identity", "provider_name", "NAME", parse_name, "provider of the pool", "generic"),
    Option("identity", "hostname", "HOST", parse_host,
           "host or IP by which the gateway reaches this machine's k3s"),
    # First, as the files below are judged by it.
    Option("k3s", "k3s_wait", "", parse_switch,
           "take files that are missing below for a k3s that is not there yet", "no"),
    Option("k3s", "k3s_token", "TOKEN", parse_token,
           "token of this machine's k3s, for the gateway"),
    Option("k3s", "k3s_token_file", "FILE", parse_name,
           "file with that token, - for standard input"),
    Option("k3s", "k3s_url", "URL", parse_k3s_url, "where k3s listens", "https://127.0.0.1:6443"),
    Option("k3s", "k3s_ca_file", "FILE", parse_ca_file, "PEM file of k3s's own root certificate;"
           " without it no token is sent there, and its workers stay unknown"),
    Option("k3s", "k3s_node_token_file", "FILE", parse_name,
           "file with a token that may read the node"),
    Option("gateway", "gateway_host", "HOST", parse_host, "host or IP", "localhost",
           "gateway.host"),
    Option("gateway", "gateway_port", "PORT", parse_port, "port", "1994", "gateway.port"),
    Option("gateway", "tls", "", parse_switch, "https, verified", "no", "gateway.tls"),
    Option("gateway", "ca_file", "FILE", parse_ca_file,
           "PEM file of the only root certificates to trust", key="gateway.ca_file"),
    Option("gateway", "allow_cleartext", "", parse_switch,
           "send the tokens in cleartext to public addresses too", "no", "gateway.allow_cleartext"),
    Option("tunnel", "ssh", "HOST", parse_ssh_host,
           "go to the gateway through ssh to there, [user@]host[:port]", key="ssh.host"),
    Option("tunnel", "ssh_gateway", "HOST:PORT", parse_ssh_gateway,
           "where the gateway is, seen from there", "localhost:31994", "ssh.gateway"),
    Option("tunnel", "ssh_identity", "FILE", parse_name,
           "private key without passphrase, else as ssh's configuration says", key="ssh.identity"),
    Option("tunnel", "ssh_reverse", "PORT", parse_ssh_reverse, "[address:]port there that leads to"
           " port 6443 here, this machine's k3s", key="ssh.reverse"),
    Option("tunnel", "ssh_option", "OPTION", parse_ssh_options,
           "option of ssh, such as ProxyJump=HOST; may be repeated", key="ssh.options", many=True),
    Option("this machine", "private_ip", "IP", parse_ip, "private address, found if not given"),
    Option("this machine", "max_cpu", "CORES", checked(
        DECIMAL, "is not a number of cores above 0: give one such as 6.5",
        lambda text: round(float(text) * 1000), 1), "offer no more cores"),
    Option("this machine", "max_memory", "SIZE", checked(
        "[0-9]{1,9}[MG]i", "is not an amount of memory: give one such as 48Gi or 49152Mi",
        parse_memory, 1), "offer no more memory, such as 48Gi or 49152Mi"),
    Option("this machine", "max_gpus", "COUNT", checked(
        "[0-9]{1,5}", "is not a number of GPUs: give one such as 4", int), "offer no more GPUs"),
    Option("this machine", "offer_always", "", parse_switch,
           "offer all of it, even while no worker can run in its k3s", "no"),
    Option("this machine", "state_dir", "DIR", parse_name,
           "folder for machine id, lock and status; /var/lib/beta9-agent for root"),
    Option("behaviour", "keepalive_interval", "SECONDS", checked(
        DECIMAL, "is not an interval: give seconds from 0.1 to 240", float, 0.1, 240),
        "time between keepalives, 0.1 to 240", "60"),
    Option("behaviour", "startup_timeout", "SECONDS", checked(
        DECIMAL, "is not a number of seconds: give one such as 600", float),
        "how long to try at the start, for ever if not given; 0 tries once"),
    Option("behaviour", "debug", "", parse_switch, "log requests and answers", "no"),
    Option("behaviour", "config", "FILE", parse_name, "YAML or JSON file of these settings"),
]
SECRETS = ("token", "k3s_token", "k3s_node_token")
K3S_FILES = ("k3s_token_file", "k3s_ca_file", "k3s_node_token_file")
SECTIONS = ("gateway", "ssh")   # of the file
# What `beta9 machine create` prints for the agent that needs a VPN.
UNUSED_FLAGS = ("--tailscale-url", "--tailscale-auth", "--flux-upstream", "--flux-branch",
                "--flux-github-token")
# Beta9 sets them in its containers, for its own client.
FOREIGN_VARIABLES = ("BETA9_GATEWAY_HOST_HTTP", "BETA9_GATEWAY_PORT_HTTP")


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A question with the known word that was meant; "" where none is near."""
    import difflib
    cores = [each[len(prefix):] for each in known]
    near = difflib.get_close_matches(word[len(prefix):], cores, 1, 0.6)
    return f", did you mean {prefix}{near[0]}?" if near else ""


def format_word(word: str) -> str:
    """A word that was not understood; its length alone, where a token may be in it."""
    rest = re.sub("^-*(k3s[-_])?token", "", word)
    harmless = re.fullmatch("[a-z._-]{1,40}", word.replace("k3s", "")) or len(word) < 8
    shown = harmless and word.isprintable() and (rest == word or len(rest) < 8)
    return word if shown else f"of {len(word)} characters"


def format_path(path: str) -> str:
    """A path that leads nowhere; its length alone, where it may be the token itself."""
    known_place = os.path.isdir(os.path.dirname(path)) or len(path) < 8
    return printable(path) if known_place else f"named by {len(path)} characters (a token?)"


class CommandLine(argparse.ArgumentParser):
    """argparse with messages that show no value, as it may be a token."""

    def read(self, argv: list[str]) -> argparse.Namespace:
        """The given options. Raises AgentError."""
        try:
            given, unknown = self.parse_known_args(argv)
        except argparse.ArgumentError as error:
            switches = [option.flag for option in OPTIONS if not option.metavar]
            fault = "takes no value" if error.argument_name in switches else "needs a value"
            raise AgentError(f"{error.argument_name} {fault}. See --help") from None
        for word in unknown[:1]:
            option = next((each for each in unknown if each.startswith("-")), "")
            name = option.partition("=")[0]
            near = nearest(name or f"--{word}", [each.flag for each in OPTIONS], "--")
            what = f"option {format_word(name)}" if name else f"word {format_word(word)}"
            raise AgentError(f"unknown {what}{near or '.'} See --help")
        return given


DESCRIPTION = """Registers this machine with a Beta9 gateway and keeps it ready for work.

try it:  beta9_agent.py --dev --once
join:    beta9_agent.py --token-file token --pool-name gpu --gateway-host HOST"""
EPILOG = """The command line wins over the environment, that over the file, that over the default.

Exit codes: 0 stopped as asked, 1 unexpected error, 2 bad setting, 69 gateway out of reach,
75 already running, 77 token refused, 78 machine refused."""


def build_command_line() -> CommandLine:
    """The command line that OPTIONS describe."""
    parser = CommandLine("beta9_agent.py", "beta9_agent.py [options]", DESCRIPTION, EPILOG,
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         exit_on_error=False, add_help=False)
    groups: dict[str, Any] = {}
    for option in OPTIONS:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        notes = [option.variable, f"default {option.default}" if option.default else ""]
        shown = ", ".join(note for note in notes if note)
        text = f"{option.help} [{shown}]" if shown else option.help
        if option.metavar:
            groups[option.group].add_argument(option.flag, metavar=option.metavar, help=text,
                                              action="append" if option.many else "store")
        else:
            groups[option.group].add_argument(option.flag, action="store_const", const="yes",
                                              help=text)
    parser.add_argument("-h", dest="help", action="store_const", const="yes",
                        help=argparse.SUPPRESS)
    for flag in UNUSED_FLAGS:
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument_group("accepted and not used", ", ".join(UNUSED_FLAGS))
    return parser


def read_file(path: str) -> str:
    """The text of a small file, `-` being standard input. Raises AgentError with the reason."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            data = file.read(FILE_LIMIT + 1)
        if len(data) > FILE_LIMIT:
            raise ValueError
        return data.decode()
    except OSError as error:
        raise AgentError(f"{error.strerror}: check the path and its permissions") from None
    except ValueError:
        raise AgentError("it is not text, or over 64 KiB: is it the right file?") from None


def parse_tree(text: str) -> dict[str, Any]:
    """A YAML or JSON mapping, sections flattened to "section.key". Raises ValueError."""
    if text.lstrip().startswith("{"):
        tree = json.loads(text, parse_int=str, parse_float=str)
    else:
        import yaml
        try:
            tree = yaml.load(text, yaml.BaseLoader) or {}
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
    flat: dict[str, Any] = {}
    for key, value in dict(tree).items():
        if key in SECTIONS and value in (None, "", "null", "~"):
            continue
        inner = value.items() if key in SECTIONS and isinstance(value, dict) else ()
        flat.update({f"{key}.{name}": each for name, each in inner} or {str(key): value})
    return flat


def read_config_file(path: str) -> dict[str, str]:
    """The settings in a file, by their keys. Raises AgentError, which quotes nothing of it."""
    where = f"--config {printable(path)}"
    try:
        tree = parse_tree(read_file(path))
    except AgentError as error:
        raise AgentError(f"{where} cannot be read, {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        lines = re.findall("line [0-9]+", str(error))
        place = f" at {lines[-1]}" if lines else ""
        raise AgentError(f"{where} is not a YAML or JSON mapping{place}: correct it") from None
    known = {option.file_key: option for option in OPTIONS if option.file_key}
    for key, value in tree.items():
        if key not in known:
            raise AgentError(f"{where} has an unknown key {format_word(key)}{nearest(key, known)}")
        if known[key].many and isinstance(value, list):
            tree[key] = value = "\n".join(str(each) for each in value)
        if isinstance(value, (dict, list)):
            raise AgentError(f"{where} has more than one value for {key}: give one")
    return {key: "" if value in (None, "null", "~") else str(value) for key, value in tree.items()}


class Setting(NamedTuple):
    """A setting's text, its source for people, and the rank of that source: the highest wins."""

    text: str
    source: str
    rank: int


def read_settings(argv: list[str], environ: Any) -> dict[str, Setting]:
    """All that was said. Our variables leave the environment: no child may inherit a token."""
    given = build_command_line().read(argv)
    known = [option.variable for option in OPTIONS if option.variable]
    variables = {name: environ.pop(name) for name in known if name in environ}
    path = given.config or variables.get("BETA9_CONFIG")
    file = read_config_file(path) if path and not (given.version or given.help) else {}
    settings = {}
    for option in OPTIONS:
        sources = ((option.default, "default"), (file.get(option.file_key), printable(path)),
                   (variables.get(option.variable), option.variable),
                   (getattr(given, option.name), option.flag))
        for rank, (text, source) in enumerate(sources):     # a later one wins
            if text or (text is not None and source == option.flag):    # elsewhere "" is unset
                text = "\n".join(text) if isinstance(text, list) else str(text)
                settings[option.name] = Setting(text, source, rank)
    unused = [flag for flag in UNUSED_FLAGS if getattr(given, flag[2:].replace("-", "_"))]
    if unused:
        LOG.info("accepted, but not needed by this agent: %s", ", ".join(unused))
    for name in environ:
        if name.startswith("BETA9_") and name not in FOREIGN_VARIABLES:
            LOG.warning("the variable %s is unknown and ignored%s", printable(name),
                        nearest(name, known, "BETA9_"))
    return settings


def choose_token_sources(settings: dict[str, Setting]) -> list[str]:
    """Leaves, of a token and its file, the one whose source wins; what is wrong with them."""
    problems = []
    for name in SECRETS:
        token, file = settings.get(name), settings.get(f"{name}_file")
        if token is None or file is None:
            continue
        if token.rank == file.rank:
            problems.append(f"{name} and {name}_file are both given, from {token.source} and"
                            f" {file.source}: give one of them")
        if token.rank >= file.rank:     # of equals both go: it is not known which one is meant
            del settings[f"{name}_file"]
        if token.rank <= file.rank:
            del settings[name]
    return problems


def parse_setting(option: Option, setting: Setting) -> Any:
    """The value of a setting. Raises AgentError with the option, the source and the remedy."""
    try:
        return option.parse(setting.text)
    except ValueError as error:
        shown = f"'{printable(setting.text, 60)}'"
        if option.name in SECRETS:
            shown = f"of {len(setting.text)} characters"
        source = "" if setting.source == option.flag else f" from {setting.source}"
        raise AgentError(f"{option.flag}: the value {shown}{source} {error}") from None


def read_token_file(option: Option, setting: Setting) -> Setting:
    """The token in the file that a setting names. Raises AgentError."""
    try:
        text = read_file(setting.text).rstrip("\r\n")
    except AgentError as error:
        raise AgentError(f"{option.flag}: the file {format_path(setting.text)} from"
                         f" {setting.source} cannot be read, {error}") from None
    if not text:
        raise AgentError(f"{option.flag}: the file {printable(setting.text)} is empty: write the"
                         " token into it")
    return Setting(text, printable(setting.text), setting.rank)


def set_option(config: Config, option: Option, setting: Setting) -> None:
    """Puts a checked setting into the configuration, and the token of a token file."""
    value = parse_setting(option, setting)
    setattr(config, option.name, value)
    config.sources[option.name] = setting.source
    if option.name in SECRETS:
        config.redactor.remember(option.name, value)
    name = option.name.removesuffix("_file")
    if name in SECRETS and name != option.name:
        token_option = option._replace(name=name, parse=parse_token)
        set_option(config, token_option, read_token_file(option, setting))
        if os.path.isfile(value):       # and not a pipe: it is read again later
            config.token_files[name] = value


def lead_through_ssh(config: Config, settings: Mapping[str, Setting]) -> None:
    """Has the gateway be the one that --ssh-gateway names; it cannot be named twice."""
    for name in ("gateway_host", "gateway_port"):
        setting = settings[name]
        if setting.rank > 0:
            config.problems.append(f"{name} from {setting.source} does not go with --ssh: leave it"
                                   " out, and give --ssh-gateway, the gateway as seen from there")
        config.sources[name] = "--ssh-gateway"
    _, config.gateway_host, port = split_place(config.ssh_gateway)
    config.gateway_port, config.gateway_socket = int(port), os.devnull      # until ssh is up


def wait_for_file(config: Config, option: Option, setting: Setting) -> None:
    """Has the agent look for a file of k3s's that is not there yet, or not good."""
    setattr(config, option.name, setting.text)
    config.sources[option.name] = setting.source
    name = option.name.removesuffix("_file")
    if name in SECRETS:
        config.token_files[name] = setting.text


def build_config(given: Mapping[str, Setting], redactor: Redactor) -> Config:
    """The checked settings; `problems` has a line for each that will not do.

    --status needs no token and reads no token file.
    """
    tokens = {f"{name}{end}" for name in SECRETS for end in ("", "_file")}
    needs_token = not {"status", "print_install"} & set(given)
    skipped = tokens if "status" in given else set()
    settings = {name: setting for name, setting in given.items() if name not in skipped}
    config = Config(sources={}, token_files={}, problems=choose_token_sources(settings),
                    redactor=redactor, gateway_socket="", k3s_node_token=None,
                    **{option.name: None for option in OPTIONS})
    for option in OPTIONS:
        try:
            if option.name in settings:
                set_option(config, option, settings[option.name])
        except AgentError as error:
            if config.k3s_wait and option.name in K3S_FILES:
                wait_for_file(config, option, settings[option.name])
            else:
                config.problems.append(str(error))
    if config.dev:
        config.ssh = None
    if config.ssh and config.ssh_gateway:
        lead_through_ssh(config, settings)
    if config.dev and config.token is None:
        config.token = Secret(os.urandom(16).hex())
    if config.token is None and needs_token and not config.problems:
        config.problems.append("the machine token is missing: give --token-file or BETA9_TOKEN. "
                               + NEW_TOKEN.format(config=config))
    return config


# ---- 6 Machine facts
def read_clock() -> float:
    """Seconds, of a clock that nobody sets, with suspended time (on macOS without)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def read_process_start(pid: int) -> str:
    """When a process started, to recognise a reused pid; "" where this cannot be found out.

    In ticks since the boot. The boot's own id would be another for a service in a container than
    for whoever asks there (systemd-nspawn).
    """
    with contextlib.suppress(OSError, IndexError):
        with open(f"/proc/{pid}/stat") as process:
            fields = process.read().rpartition(")")[2].split()
        return "ended" if fields[0] == "Z" else fields[19]      # a zombie runs no more
    with contextlib.suppress(Exception):    # on macOS, where psutil is there
        import psutil
        return str(psutil.Process(pid).create_time())
    return ""


def how_to_install(*packages: str) -> str:
    """The command that brings Python packages to this interpreter."""
    import shutil
    import sysconfig
    marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")     # PEP 668
    if sys.prefix != sys.base_prefix or not os.path.exists(marker):
        return f"`{sys.executable} -m pip install {' '.join(packages)}`"
    ways = [f"`python3 -m venv .venv` and `.venv/bin/pip install {' '.join(packages)}`"]
    if shutil.which("uv"):
        ways.insert(0, f"`uv run {sys.argv[0]}`")
    if shutil.which("apt-get"):
        debian = {"nvidia-ml-py": "python3-pynvml", "pyyaml": "python3-yaml"}
        names = " ".join(debian.get(package, f"python3-{package}") for package in packages)
        ways.insert(0, f"`apt-get install {names}`")
    return ", or ".join(ways)


class BackgroundQuery:
    """Asks one thing that can hang for ever, as a driver or a name server, in a daemon thread.

    What is stuck in the kernel can only be left aside: one thread of each query at most.
    """

    def __init__(self) -> None:
        self.done = threading.Event()
        self.done.set()
        self.answers: list[Any] = []    # one that nobody has taken yet, or none
        self.was_late = False

    def start(self, question: Callable[[], Any]) -> None:
        """Asks, unless a question is open or an answer waits to be taken."""
        if self.answers or not self.done.is_set():
            return
        done = threading.Event()

        def run() -> None:
            try:
                self.answers = [question()]
            except Exception as error:
                self.answers = [error]
            done.set()

        threading.Thread(target=run, daemon=True).start()
        self.done = done

    def ask(self, question: Callable[[], Any], seconds: float,
            given_up: Callable[[], bool] = lambda: False) -> Any:
        """The answer, or the late one to the question before, where nobody has taken that.

        Raises what the question raised, and TimeoutError after `seconds` or once `given_up`
        says so.
        """
        self.start(question)
        end = read_clock() + seconds
        while not self.done.wait(max(0.0, min(0.05, end - read_clock()))):
            if given_up() or read_clock() >= end:
                self.was_late = True
                raise TimeoutError
        answer = self.answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer


def load_nvml() -> Any:
    """The binding of the driver's library; None without a driver. Raises ImportError."""
    import ctypes
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    import pynvml
    return pynvml


def list_gpus() -> list[Gpu]:
    """The cards. Raises NVML's error where there is a driver that cannot say.

    NVML is closed each time, so that the driver can be upgraded meanwhile.
    """
    try:
        nvml = load_nvml()
    except ImportError:
        nvml = None
    if nvml is None:
        return []

    def read_gpu(index: int) -> Gpu:
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = printable(nvml.nvmlDeviceGetName(handle), 60)
        except nvml.NVMLError:
            return Gpu(None, False)
        try:
            return Gpu(name, not nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        except nvml.NVMLError as error:     # some cards and users may not ask
            lost = error.value == nvml.NVML_ERROR_GPU_IS_LOST
            return Gpu(None if lost else name, False)

    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
            return []
        raise
    try:
        return [read_gpu(index) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


class Card(NamedTuple):
    """A GPU for people; `sleeps` is persistence mode off, which makes each first use slow."""

    line: str
    lost: bool
    sleeps: bool


def describe_gpus() -> list[Card]:
    """Each card with what its driver tells. Raises as list_gpus, and ImportError."""
    nvml = load_nvml()
    if nvml is None:
        return []

    def describe(index: int) -> Card:
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name, memory = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetMemoryInfo(handle)
            line = f"{index}: {printable(name)}, {memory.total >> 20} MiB, driver {driver}"
            return Card(line, lost=False, sleeps=not nvml.nvmlDeviceGetPersistenceMode(handle))
        except nvml.NVMLError as error:
            return Card(f"{index}: lost, {error}", lost=True, sleeps=False)

    nvml.nvmlInit()
    try:
        driver = printable(nvml.nvmlSystemGetDriverVersion())
        return [describe(index) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def is_listening(port: int) -> bool:
    """Whether some process has taken a TCP port of this machine."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
            return False
        except OSError:
            return True


def find_private_ip() -> str:
    """This machine's address on the default route, else on any interface, else "". Asks nobody."""
    import psutil
    found = []
    # Addresses of documentation (RFC 5737, RFC 3849): connecting UDP sends nothing.
    for family, anywhere in ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as udp:
            udp.connect((anywhere, 9))
            found.append(udp.getsockname()[0])
    with contextlib.suppress(OSError):
        for name, entries in psutil.net_if_addrs().items():
            if not re.match("docker|cni|flannel|veth", name):
                found += [entry.address for entry in entries if entry.family != psutil.AF_LINK]
    return next((ip for ip in found if not re.match(r"127\.|::1$|169\.254\.|fe80:", ip)), "")


class Host:
    """Looks at the machine. What hangs or fails is unknown, with a warning when that begins."""

    def __init__(self, deadline: float = HOST_DEADLINE) -> None:
        self.deadline = deadline        # seconds
        self.driver, self.disk = BackgroundQuery(), BackgroundQuery()
        self.unknown: set[str] = set()
        self.budget = LineBudget(6 * QUIET)

    def ask(self, what: str, question: Callable[[], Any]) -> Any:
        """The answer; None where there is none, for whatever reason."""
        try:
            answer = question()
            self.unknown.discard(what)
            return answer
        except Exception as error:
            if what not in self.unknown and self.budget.allows(read_clock()):
                reason = "hangs" if isinstance(error, TimeoutError) else printable(repr(error))
                LOG.warning("%s cannot be read, %s: it is unknown until it answers, and keepalives"
                            " go on; look at `dmesg`", what, reason)
                self.unknown.add(what)
            return None

    def ask_aside(self, query: BackgroundQuery, what: str, question: Callable[[], Any],
                  seconds: float) -> Any:
        """As `ask`, for what can hang.

        After the first time-out nothing waits for it: each sample then has the answer to the
        question of the sample before.
        """
        patience = 0.0 if query.was_late else seconds
        answer = self.ask(what, lambda: query.ask(question, patience))
        if query.was_late:
            with contextlib.suppress(RuntimeError):     # no thread to be had
                query.start(question)
        return answer

    def sample(self) -> tuple[Metrics, list[Gpu] | None]:
        """Metrics and cards, within the deadline. Load is the average since the last sample."""
        import psutil
        end = read_clock() + self.deadline
        cores = self.ask("the number of CPUs", psutil.cpu_count)
        load = self.ask("the CPU's load", psutil.cpu_percent)
        memory = self.ask("the memory", psutil.virtual_memory)
        with contextlib.suppress(RuntimeError):     # both at once, for one deadline
            self.driver.start(list_gpus)
        disk = self.ask_aside(self.disk, "the disk", lambda: psutil.disk_usage("/"), self.deadline)
        gpus = self.ask_aside(self.driver, "the NVIDIA driver", list_gpus, end - read_clock())
        return Metrics(
            cpu_utilization_pct=load,
            memory_utilization_pct=getattr(memory, "percent", None),
            total_cpu_available=None if cores is None else cores * 1000,
            total_memory_available=None if memory is None else memory.total >> 20,
            total_disk_space_bytes=getattr(disk, "total", None),
            total_disk_free_bytes=getattr(disk, "free", None),
            free_gpu_count=sum(gpu.free for gpu in gpus or ())), gpus


# ---- 7 Gateway and k3s client
class OutgoingRequest:
    """One HTTP request under one deadline, from the name look-up to the last byte.

    When its time is up its connection is hung up: a blocked read returns at once, and the library
    reports that in an ordinary place. Nothing raises from a signal handler, where an exception
    could land inside a library's lock.
    """

    def __init__(self, seconds: float, connection: socket.socket | None) -> None:
        self.ends_at = read_clock() + seconds
        self.connection = connection    # a kept one, or none yet
        self.timed_out = False

    def seconds_left(self) -> float:
        """Never 0, which would be "for ever" to a socket."""
        return max(self.ends_at - read_clock(), 0.001)

    def hold(self, sock: socket.socket) -> None:
        """Remembers the connection, as a duplicate: TLS detaches the original."""
        self.let_go()
        self.connection = sock.dup()
        if self.timed_out:
            self.hang_up()

    def let_go(self) -> None:
        """Forgets the connection."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    def hang_up(self) -> None:
        """Ends the request, from a signal handler or another thread."""
        self.timed_out = True
        connection = self.connection    # which the request's own thread may let go meanwhile
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Alarm:
    """Hangs up the main thread's request when its time is up. The one owner of the timer."""

    def __init__(self) -> None:
        self.request: OutgoingRequest | None = None
        self.limit = math.inf       # once a stop was asked for: when any request ends

    def install(self) -> None:
        """Takes SIGALRM, even where the parent ignored or blocked it."""
        signal.signal(signal.SIGALRM, self.ring)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])

    def ring(self, number: int, frame: Any) -> None:
        """The signal's handler."""
        if self.request is not None:
            self.request.hang_up()

    def set_timer(self, moment: float) -> None:
        """Rings then, and every 0.1 s until reset: the request may not have a connection yet."""
        signal.setitimer(signal.ITIMER_REAL, max(moment - read_clock(), 0.001), 0.1)

    def end_requests_by(self, moment: float) -> None:
        """Cuts the request in flight, and those to come. Called by a signal handler too."""
        self.limit = moment
        if self.request is not None and moment < self.request.ends_at:
            self.set_timer(moment)

    @contextlib.contextmanager
    def guarding(self, request: OutgoingRequest) -> Iterator[None]:
        """Hangs the request up if it is not over by its deadline."""
        self.request = request
        try:
            self.set_timer(request.ends_at)
            if self.limit < request.ends_at:    # in this order: a stop may come in between
                self.set_timer(self.limit)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.request = None


class Answer(NamedTuple):
    """What an HTTP server said."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class AnswerTooLarge(Exception):
    """The answer is over its limit, which is the text."""


class NameServerSlow(Exception):
    """The name look-up took longer than the request had; its late answer serves the next one."""


def look_up(host: str, port: int, flags: int = 0) -> list[Any]:
    """The addresses for a TCP connection. Raises OSError or UnicodeError."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)


def look_up_digits(host: str) -> list[Any]:
    """The addresses of a host in digits, in any notation; none for a name. Asks no name server."""
    try:
        return look_up(host, 0, socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return []


def require_private(host: str, addresses: list[Any]) -> None:
    """Raises UnsafeAddress where tokens in cleartext would go to a public address."""
    for ip in (address[4][0] for address in addresses):
        if not is_private(ip):
            place = host if ip == host else f"{host} leads to {ip}, which"
            raise UnsafeAddress(f"{place} is a public address: without TLS others could read the"
                                " tokens on their way", by_name=not look_up_digits(host))


class GuardedConnection:
    """Has urllib3 connect through the client, which judges the address and keeps the deadline.

    `_new_conn` is where urllib3's own SOCKS support steps in too.
    """

    client: "HttpClient"
    host: str
    port: int

    def _new_conn(self) -> socket.socket:
        return self.client.connect(getattr(self, "_dns_host", self.host), self.port)


def build_adapter(client: "HttpClient") -> Any:
    """An adapter of `requests` whose connections the client makes, one of which is kept.

    Without a session, which follows redirects, keeps cookies and obeys ~/.netrc.
    """
    import requests.adapters
    import urllib3
    if not hasattr(urllib3.connection.HTTPConnection, "_new_conn"):     # no address would be judged
        raise AgentError("this version of urllib3 is not known here: install urllib3 2", 1)

    class Http(GuardedConnection, urllib3.connection.HTTPConnection):
        pass

    class Https(GuardedConnection, urllib3.connection.HTTPSConnection):
        pass

    class HttpPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Http

    class HttpsPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Https

    class Adapter(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *args: Any, **named: Any) -> None:
            super().init_poolmanager(*args, **named)
            self.poolmanager.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}

        def proxy_manager_for(self, *args: Any, **named: Any) -> Any:
            manager = super().proxy_manager_for(*args, **named)
            manager.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}
            return manager

    Http.client = Https.client = client
    return Adapter(pool_connections=1, pool_maxsize=1)


class HttpClient:
    """One HTTP server, one kept connection. Every request of this program leaves here."""

    def __init__(self, url: str, alarm: Alarm | None, proxy: str = "", ca_file: str | None = None,
                 cleartext_anywhere: bool = False, socket_path: str = "") -> None:
        self.url, self.proxy, self.ca_file = url, proxy, ca_file
        self.socket_path = socket_path      # to connect to, in place of the host in the URL
        self.alarm = alarm      # None in a helper thread, which is hung up by whoever waits for it
        self.any_address = cleartext_anywhere or url.startswith("https:") or socket_path != ""
        self.request = OutgoingRequest(0, None)
        self.resolver = BackgroundQuery()
        self.adapter: Any = None

    def resolve(self, host: str) -> list[Any]:
        """The addresses, each of them judged. Raises UnsafeAddress, NameServerSlow, OSError."""
        request = self.request
        if self.socket_path:
            return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", self.socket_path)]
        addresses = look_up_digits(host)
        try:
            if not addresses:
                addresses = self.resolver.ask(lambda: look_up(host, 0), request.seconds_left(),
                                              lambda: request.timed_out)
        except TimeoutError:
            raise NameServerSlow from None
        if not self.any_address:
            require_private(host, addresses)
        return addresses

    def connect(self, host: str, port: int) -> socket.socket:
        """A connection to the first address that takes it; each has its share of the time."""
        addresses = self.resolve(host)
        failure = OSError("no address")
        for number, (family, kind, protocol, _, address) in enumerate(addresses):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self.request.seconds_left() / (len(addresses) - number))
                self.request.hold(sock)
                if family == socket.AF_UNIX:
                    sock.connect(address)
                else:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    sock.connect((address[0], port, *address[2:]))
                sock.settimeout(self.request.seconds_left())    # for TLS
                return sock
            except OSError as error:
                sock.close()
                failure = error
        raise failure

    def exchange(self, method: str, path: str, headers: Mapping[str, str], body: str | None,
                 seconds: float, limit: int) -> Answer:
        """A request and its answer of at most `limit` bytes, within `seconds`.

        Raises TimeoutError, AnswerTooLarge, and whatever the libraries do.
        """
        import requests
        self.adapter = self.adapter or build_adapter(self)
        self.request = request = OutgoingRequest(seconds, self.request.connection)
        prepared = requests.Request(method, self.url + path, dict(headers), data=body).prepare()
        proxies = {"http": self.proxy, "https": self.proxy} if self.proxy else {}
        try:
            with self.alarm.guarding(request) if self.alarm else contextlib.nullcontext():
                response = self.adapter.send(
                    prepared, stream=True, timeout=request.seconds_left(),
                    verify=self.ca_file or True, proxies=proxies)
                data = response.raw.read(limit + 1, decode_content=False)
                response.raw.release_conn()
            if len(data) > limit:
                raise AnswerTooLarge(f"{limit >> 10} KiB")
        except Exception as error:
            self.close()
            if not request.timed_out or isinstance(error, NameServerSlow):
                raise
        if request.timed_out:       # whatever came: it may have been cut
            self.close()
            raise TimeoutError
        return Answer(response.status_code, response.headers, data)

    def close(self) -> None:
        """Closes the kept connection."""
        self.request.let_go()
        if self.adapter is not None:
            self.adapter.close()


def find_proxy(config: Config) -> str:
    """The URL of the proxy that the environment names for the gateway; "" for none, as with --ssh.

    Raises AgentError for one that cannot be used, which is not shown: it may hold a password.
    """
    import requests.utils
    import urllib3.util
    named = requests.utils.get_environ_proxies(config.gateway)
    proxy = requests.utils.select_proxy(config.gateway, named) or ""
    if not proxy or config.ssh or is_loopback(config.gateway_host):
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    with contextlib.suppress(ValueError):
        parsed = urllib3.util.parse_url(proxy)
        if parsed.host and parsed.scheme in ("http", "https"):
            return proxy
    raise AgentError(f"the proxy that the environment names for {config.gateway} is not an HTTP"
                     " proxy, the only kind that this program can use: correct http_proxy,"
                     " https_proxy or all_proxy, or name the gateway in no_proxy")


def split_proxy(proxy: str) -> tuple[str, int]:
    """Host and port of a proxy, without its user and password."""
    import urllib3.util
    parsed = urllib3.util.parse_url(proxy)
    return (parsed.host or "").strip("[]"), parsed.port or (443 if parsed.scheme == "https" else 80)


def format_peer(config: Config, proxy: str) -> str:
    """Whom the agent connects to, for people."""
    if config.ssh:
        return f"{config.ssh_gateway} through ssh to {config.ssh}"
    if not proxy:
        return f"{format_host(config.gateway_host)}:{config.gateway_port}"
    host, port = split_proxy(proxy)
    return f"the proxy {format_host(host)}:{port}"


def causes_of(error: BaseException) -> list[BaseException]:
    """The error and those it was made from, the innermost last: urllib3 nests them deeply."""
    chain: list[BaseException] = []
    waiting = [error]
    while waiting and len(chain) < 20:
        each = waiting.pop(0)
        chain.append(each)
        inner = (getattr(each, "reason", None), each.__cause__, each.__context__, *each.args)
        waiting += [cause for cause in inner if isinstance(cause, BaseException)]
    return chain


def explain_failure(error: BaseException, peer: str, config: Config) -> tuple[str, str]:
    """What went wrong on the way to an answer, and the remedy."""
    import ssl
    chain = causes_of(error)
    text = " ".join(printable(each) for each in chain)
    try_health = TRY_HEALTH.format(config=config)

    def among(kind: Any) -> Any:
        return next((each for each in reversed(chain) if isinstance(each, kind)), None)

    if among(AnswerTooLarge):
        return f"the answer is larger than {error}", "Is this the gateway? " + try_health
    if among(NameServerSlow):
        return (f"name server slow: no address of {peer} yet", "A late answer is used for the next"
                " attempt. Check the name servers in /etc/resolv.conf")
    if among((socket.gaierror, UnicodeError)):
        return f"no address is known of {peer}", "Check the name, and /etc/resolv.conf"
    if among(TimeoutError):
        return f"no complete answer in time from {peer}", try_health
    if among(ConnectionRefusedError):
        return f"connection refused by {peer}", f"Is the gateway or its tunnel up? {try_health}"
    # OpenSSL's codes, see openssl-verification-options(1); urllib3 1.26 judges names itself.
    code = getattr(among(ssl.SSLCertVerificationError), "verify_code", None)
    if code in (9, 10):
        return (f"the certificate of {peer} is not valid now",
                "Renew it, or correct this machine's clock")
    if code in (62, 64) or "doesn't match" in text:
        return (f"the certificate of {peer} is not for {config.gateway_host}",
                f"Give {'--ssh-gateway' if config.ssh else '--gateway-host'} a name that is in the"
                " certificate")
    if code is not None:
        return (f"the certificate of {peer} has an unknown issuer",
                "Give the issuer's root certificate with --ca-file")
    if "TLS CA certificate bundle" in text:
        return "the file of --ca-file is gone", "Put the root certificates back there"
    if among(ssl.SSLError):
        return f"no TLS 1.2 or newer at {peer}", f"Is it the port of https? {try_health}"
    inner = among(OSError) or chain[-1]
    return f"the connection to {peer} broke, {type(inner).__name__}: {printable(inner)}", try_health


class GatewayClient:
    """Registers and keeps alive. Whatever happens is an Outcome."""

    def __init__(self, config: Config, alarm: Alarm | None) -> None:
        self.config, self.proxy = config, find_proxy(config)
        self.peer = format_peer(config, self.proxy)
        self.http = HttpClient(config.gateway, alarm, self.proxy, config.ca_file,
                               config.allow_cleartext, config.gateway_socket)

    def outcome_of_failure(self, error: Exception) -> Outcome:
        """What a request without an answer means."""
        for each in causes_of(error):
            if isinstance(each, UnsafeAddress):
                kind = Kind.UNSAFE_NAME if each.by_name else Kind.UNSAFE
                return Outcome(kind, each.fault, each.remedy)
        text, remedy = explain_failure(error, self.peer, self.config)
        if self.proxy:
            remedy = f"The environment names this proxy (no_proxy leaves it out). {remedy}"
        return Outcome(Kind.TROUBLE, text, remedy)

    def ask(self, method: str, path: str, body: str | None, seconds: float, limit: int) -> Answer:
        """A request to the machine API with the token. Raises as `HttpClient.exchange`."""
        # Without Content-Type the gateway says 400.
        headers = {"Authorization": f"Bearer {self.config.token.reveal()}",
                   "Content-Type": "application/json", "Accept-Encoding": "identity"}
        return self.http.exchange(method, f"/api/v1{path}", headers, body, seconds, limit)

    def send(self, call: str, payload: dict[str, Any], seconds: float) -> Outcome:
        """Sends a register or keepalive, within `seconds`."""
        text = json.dumps(payload, separators=(",", ":"), default=Secret.reveal)
        LOG.debug("> POST %s/api/v1/machine/%s %s", self.http.url, call, printable(text, 1000))
        start, limit = read_clock(), CONFIG_LIMIT if call == REGISTER else ANSWER_LIMIT
        try:
            answer = self.ask("POST", f"/machine/{call}", text, seconds, limit)
        except Exception as error:  # of any kind: a stranger's bytes went through the libraries
            LOG.debug("< no answer", exc_info=True)
            return self.outcome_of_failure(error)
        if LOG.isEnabledFor(logging.DEBUG):
            LOG.debug("< %d in %.1f ms %s %s", answer.status, (read_clock() - start) * 1000,
                      printable(answer.headers, 1000), describe_body(answer.body))
        return classify(call, answer.status, answer.headers, answer.body, payload["machine_id"],
                        self.config)


def probe_tcp(host: str, port: int, seconds: float) -> None:
    """Connects, sends nothing, closes. Raises OSError."""
    socket.create_connection((host, port), seconds).close()


def probe_tls(host: str, port: int, seconds: float) -> bytes:
    """The certificate that a TLS server shows, which is not verified. Raises OSError."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    end = read_clock() + seconds
    with socket.create_connection((host, port), seconds) as plain:
        plain.settimeout(max(end - read_clock(), 0.001))    # of the handshake as a whole
        with context.wrap_socket(plain, server_hostname=host) as tls:
            return tls.getpeercert(binary_form=True) or b""


class K3sClient:
    """Looks at this machine's k3s with the tokens that the gateway and the operator gave it."""

    TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"      # no objects, so no secrets

    def __init__(self, config: Config, machine_id: str) -> None:
        import urllib.parse
        self.config = config
        url = urllib.parse.urlsplit(config.k3s_url)
        self.host, self.port = url.hostname or "", url.port or 443
        self.place = f"{format_host(self.host)}:{self.port}"
        self.http = HttpClient(config.k3s_url, None, ca_file=config.k3s_ca_file)
        self.workers = "/api/v1/namespaces/default/pods?" + urllib.parse.urlencode({
            "includeObject": "None",
            "fieldSelector": "status.phase!=Succeeded,status.phase!=Failed",
            "labelSelector": f"run.beam.cloud/role=worker,run.beam.cloud/machine-id={machine_id}"})
        self.query, self.is_looking, self.due, self.late_at = BackgroundQuery(), False, 0.0, 0.0

    def ask(self, method: str, path: str, token: Secret, body: str | None = None,
            accept: str = "application/json") -> Answer:
        """A request to the API, only where its CA is known. Raises as `HttpClient.exchange`."""
        if not (self.config.k3s_ca_file and os.path.isfile(self.config.k3s_ca_file)):
            raise AgentError(f"the root certificate of k3s is not at {self.config.k3s_ca_file}")
        headers = {"Authorization": f"Bearer {token.reveal()}", "Accept": accept,
                   "Content-Type": "application/json", "Accept-Encoding": "identity"}
        return self.http.exchange(method, path, headers, body, HOST_DEADLINE, CONFIG_LIMIT)

    def explain(self, error: Exception) -> str:
        """Why no worker can run, by what went wrong on the way to an answer; with the remedy."""
        here = Config(gateway_host=self.host, gateway_port=self.port, tls=True, ssh=None)
        text = explain_failure(error, self.place, here)[0]
        if isinstance(error, AgentError):
            text = str(error)
        return f"k3s cannot be used, {text}, {NO_CPU}: {TRY_K3S}"

    def explain_token(self) -> str:
        """Why the gateway cannot use its token; "" where it can. Raises as `ask`."""
        answer = self.ask("POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
                          self.config.k3s_token, json.dumps({
                              "apiVersion": "authorization.k8s.io/v1",
                              "kind": "SelfSubjectRulesReview", "spec": {"namespace": "default"}}))
        return explain_rules(answer.status, answer.body)

    def read_node(self) -> dict[str, Any]:
        """This machine's node; {} without a token that may read it. Raises as `ask`."""
        token = self.config.k3s_node_token
        if token is None:
            return {}
        answer = self.ask("GET", "/api/v1/nodes?limit=20", token)
        return find_node(answer.body, socket.gethostname())

    def look(self) -> K3sView:
        """What is there. Whatever goes wrong is a fault."""
        try:
            if not self.config.k3s_ca_file:
                probe_tls(self.host, self.port, HOST_DEADLINE)
                return K3sView()
            fault = self.explain_token()
            if fault:
                return K3sView(fault)
            table = self.ask("GET", self.workers, self.config.k3s_token, accept=self.TABLE)
            workers = parse_workers(table.body, read_clock())
            return K3sView("", workers, count_node_gpus(self.read_node()))
        except Exception as error:  # of any kind: a stranger's bytes went through the libraries
            LOG.debug("no answer from k3s", exc_info=True)
            return K3sView(self.explain(error))

    def poll(self, period: float, seconds: float = 0.0) -> K3sView | None:
        """What a look found that has ended, waited for at most `seconds`; else None. Begins one
        each `period`, and hangs up on one that takes too long.
        """
        now = read_clock()
        if not self.is_looking and now >= self.due:
            self.is_looking, self.due, self.late_at = True, now + period, now + HOST_DEADLINE
        if not self.is_looking:
            return None
        try:
            found: K3sView = self.query.ask(self.look, seconds)
        except (TimeoutError, RuntimeError):    # not yet; or no thread to be had
            if now >= self.late_at:
                self.http.request.hang_up()
            return None
        self.is_looking = False
        return found

    def close(self) -> None:
        """Ends a look that is under way, and the kept connection."""
        self.http.request.hang_up()
        if not self.is_looking:
            self.http.close()


# ---- 8 State on disk
def find_state_dir(config: Config) -> str:
    """The folder for machine id and lock. Raises AgentError where none is known."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    home = "/var/lib" if os.geteuid() == 0 else home
    folder = config.state_dir or os.environ.get("STATE_DIRECTORY") or f"{home}/beta9-agent"
    folder = os.path.expanduser(folder)
    if folder.startswith("~"):
        raise AgentError("this user has no home folder to keep the machine id in: give --state-dir")
    return folder


def write_atomically(path: str, text: str, mode: int = 0o600) -> None:
    """Replaces a file by one with this mode, whatever the umask, or leaves it as it was."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with open(os.open(f"{path}.new", flags, mode), "w") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)
        file.flush()
        if mode == 0o600:       # what the next start needs: it survives a power cut
            os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


def read_fingerprint() -> str:
    """A hash of /etc/machine-id, which differs on machines with a copy of one disk."""
    try:
        return hashlib.sha256(b"beta9-agent" + read_file("/etc/machine-id").encode()).hexdigest()
    except AgentError:
        return "-"


def read_machine_id(folder: str) -> str | None:
    """The kept id; None for none, a damaged one or another machine's."""
    with contextlib.suppress(AgentError):
        text = read_file(f"{folder}/machine-id")
        kept = re.fullmatch(f"([0-9a-f]{{8}}) {read_fingerprint()}\n", text)
        return kept[1] if kept else None
    return None


def take_lock(file: Any) -> bool:
    """Whether this process has the file's lock now. Raises OSError where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def make_machine_id(folder: str) -> str:
    """A new id, kept; of processes that start together all get the same. Raises OSError."""
    path = f"{folder}/machine-id"
    lock = os.open(folder, os.O_RDONLY)
    try:
        end = read_clock() + HOST_DEADLINE
        with contextlib.suppress(OSError):      # no locks here: it is kept all the same
            while not take_lock(lock) and read_clock() < end:
                time.sleep(0.02)
        machine_id = read_machine_id(folder)
        if machine_id is None:
            machine_id = os.urandom(4).hex()
            if os.path.lexists(path):
                LOG.warning("%s is unreadable, damaged or another machine's: this machine gets the"
                            " new id %s; give the old one with --machine-id", path, machine_id)
            write_atomically(path, f"{machine_id} {read_fingerprint()}\n")
        return machine_id
    finally:
        os.close(lock)


def lock_machine(path: str) -> Any:
    """The lock file with our pid, held until we end.

    Raises AgentError where another process holds it, and OSError.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    file = open(os.open(path, flags, 0o600), "ab", buffering=0)
    try:
        if not take_lock(file):
            pid = printable(read_file(path).strip())
            raise AgentError(f"process {pid} already runs for this machine: stop it, or give"
                             " another --machine-id", 75)
    except OSError as error:
        LOG.warning("%s cannot be locked, %s: see that no second agent runs with this machine id",
                    path, error.strerror)
    file.truncate(0)
    file.write(b"%d\n" % os.getpid())
    return file


class State(NamedTuple):
    """The machine id, where this machine's files are, and its lock; "" and None for nowhere."""

    machine_id: str
    path: str = ""          # of its files, without their endings
    lock: Any = None


def format_user(uid: int) -> str:
    """The user's name."""
    import pwd
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def open_state(config: Config) -> State:
    """The machine id and its lock. Where the disk cannot keep them, a warning."""
    folder = find_state_dir(config)
    machine_id = config.machine_id or read_machine_id(folder)
    owner = os.stat(folder).st_uid if os.path.isdir(folder) else 0
    if os.geteuid() == 0 and owner != 0:    # root's files there would shut that user out
        raise AgentError(f"{folder} belongs to user {format_user(owner)}: start this with"
                         f" `runuser -u {format_user(owner)} --`, or give another --state-dir")
    try:
        os.makedirs(folder, exist_ok=True)
        machine_id = machine_id or make_machine_id(folder)
        path = f"{folder}/{machine_id}"
        return State(machine_id, path, lock_machine(f"{path}.lock"))
    except OSError as error:
        LOG.warning("%s cannot keep the machine id and its lock, %s: this start goes on"
                    " without, and an id that is not kept there is new next time; give --state-dir",
                    folder, error.strerror)
        return State(machine_id or os.urandom(4).hex())


def read_promise(state: State) -> int:
    """How many GPUs were registered when this machine last took work; 0 where nobody knows."""
    with contextlib.suppress(AgentError):
        if state.path:
            kept = as_mapping(parse_json(read_file(f"{state.path}.offer").encode()))
            count = kept.get("gpu_count")
            return count if isinstance(count, int) else 0
    return 0


def write_promise(state: State, offer: Offer) -> None:
    """Keeps an offer with CPU for the next start."""
    try:
        if state.path:
            write_atomically(f"{state.path}.offer", json.dumps(offer._asdict()) + "\n")
    except OSError as error:
        LOG.warning("%s.offer cannot be written, %s: a start with fewer GPUs will not be noticed;"
                    " free space there, or let this user write", state.path, error.strerror)


# ---- 9 Children
def start_child(words: list[str]) -> Any:
    """Starts a program in a session of its own; all that it says comes through one pipe.

    Our tokens are not in the environment. Linux ends it with the thread that started it, so call
    this in the main one. Raises OSError.
    """
    import shutil
    import subprocess
    setpriv = shutil.which("setpriv") or ""
    if setpriv and "busybox" not in os.path.realpath(setpriv):      # which cannot do this
        words = [setpriv, "--pdeathsig", "TERM", *words]
    environ = {name: text for name, text in os.environ.items() if not name.startswith("BETA9_")}
    environ["SHELL"] = "/bin/sh"    # for ProxyJump; a service's may be nologin
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True, env=environ)


def can_hold_socket(path: str) -> bool:
    """Whether ssh can listen there, as it reads signs such as : and % in another way, and no other
    user could put something else there.
    """
    if not re.fullmatch(r"/[\w./+-]{1,99}", path, re.ASCII):
        return False
    folder = os.stat(os.path.dirname(path))
    return folder.st_uid == os.geteuid() and not folder.st_mode & 0o022


class Tunnel:
    """The system's ssh, with a Unix socket as its near end; a dead or stuck one is replaced."""

    def __init__(self, config: Config, state: State, deadline: float = TUNNEL_DEADLINE) -> None:
        import shutil
        import tempfile
        self.program = shutil.which("ssh") or ""
        if not self.program:
            raise AgentError("ssh is missing: install it, `apt-get install openssh-client` or"
                             " `dnf install openssh-clients`, then start again")
        self.config, self.deadline, self.folder = config, deadline, ""
        self.path = os.path.abspath(f"{state.path}.ssh")
        if not state.path or not can_hold_socket(self.path):
            self.folder = tempfile.mkdtemp(prefix="beta9-agent-", dir="/tmp")    # 0700
            self.path = f"{self.folder}/ssh"
        self.process: Any = None
        self.said = ""              # by ssh, as far as nobody was told
        self.start_at = self.carry_by = -math.inf
        self.up_since: float | None = None
        self.starts = self.failures = self.timeouts = 0     # the latter two in a row

    def carries(self) -> bool:
        """Whether ssh is there and has taken a connection."""
        return self.up_since is not None and self.process.poll() is None

    def accepts(self) -> bool:
        """Whether ssh takes a connection: it listens when it is let in, not before."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(TICK)
            probe.connect(self.path)
            return True
        return False

    def listen(self) -> None:
        """Takes over what ssh has said, the end of it where that is much."""
        with contextlib.suppress(OSError):
            data = os.read(self.process.stdout.fileno(), select.PIPE_BUF * 16)
            self.said = (self.said + data.decode(errors="replace"))[-4000:]

    def start(self, now: float) -> None:
        """Starts ssh. Raises OSError."""
        self.starts += 1
        self.said, self.timeouts, self.carry_by = "", 0, now + self.deadline
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.process = start_child([self.program, *ssh_arguments(self.config, self.path)])
        os.set_blocking(self.process.stdout.fileno(), False)

    def stop(self) -> None:
        """Ends ssh, also one that hangs, and what it has started."""
        import subprocess
        if self.process is not None:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)
            self.process.stdout.close()
        self.process = self.up_since = None

    def fail(self, why: str, now: float) -> Outcome:
        """Ends ssh until its next start; ssh's own words are better than `why`."""
        self.stop()
        self.failures += 1
        self.start_at = now + tunnel_pause(self.failures, random.uniform)
        line, remedy = explain_ssh(self.said, self.config)
        said = f"says: {line}" if line else why
        return Outcome(Kind.TROUBLE, f"ssh to {self.config.ssh} {said}", remedy)

    def tend(self, now: float) -> Outcome | None:
        """Starts ssh when it is time. OK once it carries, TROUBLE where it failed, else None."""
        if self.process is None:
            try:
                if now >= self.start_at:
                    self.start(now)
                return None
            except OSError as error:
                return self.fail(f"cannot be started, {explain_error(error)}", now)
        self.listen()
        if self.process.poll() is not None:
            self.listen()
            return self.fail(f"ended with {self.process.returncode}", now)
        if self.up_since is not None:
            return None
        if self.accepts():
            self.up_since = now
            return Outcome(Kind.OK)
        late = now > self.carry_by
        return self.fail(f"was not let in within {self.deadline:g} s", now) if late else None

    def judge(self, outcome: Outcome, timed_out: bool, now: float) -> Outcome:
        """What a request through ssh came to, by what became of ssh meanwhile."""
        import subprocess
        self.listen()
        if outcome.kind is not Kind.TROUBLE:
            self.said, self.timeouts, self.failures = "", 0, 0
            return outcome
        self.timeouts = self.timeouts + 1 if timed_out else 0
        if self.timeouts >= 2:
            return self.fail("is stuck, as two requests in a row got no answer", now)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.1)      # it may be about to end
        failure = self.tend(now)
        if failure is None and "open failed" in self.said:
            line, remedy = explain_ssh(self.said, self.config)
            self.said = ""
            return outcome._replace(text=f"ssh to {self.config.ssh} says: {line}", remedy=remedy)
        return failure or outcome

    def record(self) -> dict[str, Any]:
        """Its part of the status record."""
        return {"tunnel": self.config.ssh, "tunnel_up_since": self.up_since,
                "tunnel_replaced": max(self.starts - 1, 0)}

    def close(self) -> None:
        """Ends ssh for good, and takes the socket away."""
        self.stop()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)       # which may be none


# ---- 10 Loop
def notify_systemd(state: str) -> None:
    """Tells systemd, where it started us. Source: sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        address = "\0" + path[1:] if path.startswith("@") else path
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.sendto(state.encode(), socket.MSG_DONTWAIT, address)


class LogLines(logging.Handler):
    """Writes lines to standard error and systemd, without tokens, and never waits for a reader."""

    PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3}     # sd-daemon(3)

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self.redactor, self.stderr = redactor, 2
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_APPEND
        with contextlib.suppress(OSError):
            mode = os.fstat(2).st_mode
            if os.isatty(2):
                self.stderr = os.open(os.ttyname(2), flags)
            elif stat.S_ISFIFO(mode):
                self.stderr = os.open("/dev/fd/2", flags)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record; what nobody takes is lost."""
        lines = [printable(self.redactor.redact(printable(line, 4000)), 4000)
                 for line in self.format(record).split("\n")]
        notify_systemd("STATUS=" + lines[0].encode(errors="replace").decode())
        prefix = f"{logging.Formatter().formatTime(record)} {record.levelname} "
        with contextlib.suppress(OSError):
            status = os.fstat(2)
            if os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
                prefix = f"<{self.PRIORITIES[record.levelname]}>"
            data = (prefix + "\n".join(lines) + "\n").encode(errors="backslashreplace")
            for at in range(0, len(data), select.PIPE_BUF):     # so much never blocks
                if select.select([], [self.stderr], [], 0)[1]:
                    os.write(self.stderr, data[at:at + select.PIPE_BUF])


class StopFlag:
    """Set by the first SIGTERM, SIGINT or SIGHUP; the second ends the program on the spot."""

    def __init__(self, alarm: Alarm) -> None:
        self.alarm, self.at = alarm, math.inf   # when the signal came
        self.signals = [number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
                        if signal.getsignal(number) != signal.SIG_IGN]  # nohup's stay ignored

    def install(self) -> None:
        """Takes the signals, even where the parent blocked them."""
        for number in self.signals:
            signal.signal(number, self.handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)

    def handle(self, number: int, frame: Any) -> None:
        """The signals' handler."""
        self.at = read_clock()
        for each in self.signals:
            signal.signal(each, signal.SIG_DFL)
        self.alarm.end_requests_by(self.at + STOP_DEADLINE)

    def is_set(self) -> bool:
        """Whether to stop."""
        return self.at < math.inf

    def wait_until(self, moment: float) -> None:
        """Sleeps until then or until the flag is set, and feeds systemd's watchdog."""
        while not self.is_set() and read_clock() < moment:
            notify_systemd("WATCHDOG=1")
            time.sleep(max(0.0, min(moment - read_clock(), TICK)))


class Agent:
    """One machine's life at its gateway: registers, keeps alive, reports, leaves."""

    def __init__(self, config: Config, state: State, client: GatewayClient,
                 tunnel: Tunnel | None = None) -> None:
        self.config, self.state, self.client, self.host = config, state, client, Host()
        self.tunnel = tunnel
        self.started_at = self.told_at = read_clock()
        self.lease, self.ready = Lease(self.started_at), False
        self.trouble, self.token_lines, self.ttl_lines = (
            Trouble(), LineBudget(), LineBudget(6 * QUIET))
        self.registration_lines = LineBudget(2 * QUIET, free=10)
        self.cause = ""         # of the next registration
        self.placement = ""     # why no work comes, as it was told last
        self.kept_offer: Offer | None = None
        self.metrics, self.gpus = self.host.sample()
        sample = offer_of(self.metrics, self.gpus, config)
        self.k3s_client = K3sClient(config, state.machine_id)
        unseen = K3sView(f"k3s was not seen yet at {config.k3s_url}, {NO_CPU}: {TRY_K3S}")
        self.k3s = K3sState(unseen, since=self.started_at)
        self.plan = first_offer(sample, read_promise(state), self.k3s_view(), self.started_at)
        self.files_due, self.file_marks = 0.0, self.read_file_marks()
        self.offer_lines, self.worker_lines = LineBudget(6 * QUIET, free=10), LineQuota()
        self.told_workers: Mapping[str, Worker] = {}
        # For --status.
        self.process_start = read_process_start(os.getpid())
        self.counts = {"kept_alive": 0, "failed": 0, "registered": 0}
        self.history: collections.deque[Any] = collections.deque(maxlen=60)
        self.ready_since: float | None = None
        self.kept_at: float | None = None
        self.failure = ""
        self.status_lines = LineBudget(6 * QUIET)

    def k3s_view(self) -> K3sView:
        """What the offer goes by."""
        config, view = self.config, self.k3s.view
        if config.dev:
            return K3sView()
        if config.offer_always:
            return view._replace(fault="")
        if config.k3s_token:
            return view
        remedy, path = "give --k3s-token-file", config.token_files.get("k3s_token")
        if path:
            remedy = f"it is looked for in {printable(path)}, so look at `systemctl status k3s`"
        return K3sView(f"the k3s token is missing, {NO_CPU}: {remedy}")

    def register_again(self, cause: str) -> None:
        """Registers at once; where the gateway is away, with the next attempt."""
        due = read_clock() if self.lease.failing_since is None else self.lease.due
        self.cause = cause
        self.lease = self.lease._replace(registered=False, due=due)

    def plan_again(self, sample: Offer | None) -> None:
        """Plans what to offer, after a sample of the machine or without; another offer is
        registered.
        """
        before, now = self.plan, read_clock()
        self.plan = plan_offer(before, sample, self.k3s_view(), now)
        if self.plan.reason not in ("", before.reason) and self.offer_lines.allows(now):
            LOG.error("%s", self.plan.reason)
        if self.plan.offer != before.offer and self.lease.registered:
            self.register_again(f"the offer was {format_offer(before.offer)} and is"
                                f" {format_offer(self.plan.offer)}")

    def read_file_marks(self) -> dict[str, tuple[int, ...]]:
        """Tells the files with tokens and with the root certificate of k3s from later ones."""
        marks: dict[str, tuple[int, ...]] = {}
        for path in {*self.config.token_files.values(), self.config.k3s_ca_file or ""}:
            with contextlib.suppress(OSError):
                found = os.stat(path)
                marks[path] = (found.st_ino, found.st_size, found.st_mtime_ns)
        return marks

    def look_at_files(self) -> None:
        """Has new tokens and a new root certificate used at once."""
        now, before = read_clock(), self.file_marks
        if now < self.files_due:
            return
        self.files_due, self.file_marks = now + FILES_PERIOD, self.read_file_marks()
        if self.file_marks != before:
            self.read_rotated_tokens()
            self.k3s_client.close()
            self.k3s_client = K3sClient(self.config, self.state.machine_id)
            self.k3s = self.k3s._replace(last=None)

    def look_at_k3s(self, seconds: float = 0.0) -> bool:
        """Whether a look at k3s has ended, waited for at most `seconds`; begins the next one.

        Without a use for it there is none: where all is offered anyway, a handshake tells nothing.
        """
        config = self.config
        useful = config.k3s_ca_file or not config.offer_always
        if config.dev or not config.k3s_token or not useful:
            return False
        look = self.k3s_client.poll(min(K3S_PERIOD, config.keepalive_interval), seconds)
        if look is not None:
            self.k3s = believe(self.k3s, look, read_clock())
        return look is not None

    def report_workers(self) -> None:
        """Writes a line about each worker that came or went."""
        workers, before = self.k3s.view.workers, self.told_workers
        if workers is None:
            return
        self.told_workers = workers
        quota, now = self.worker_lines, read_clock()
        if quota.left_out and quota.allows(now):
            LOG.info("%d more workers came or went meanwhile", quota.left_out)
            quota.left_out = 0
        for verb, some, others in (("is there", workers, before), ("has ended", before, workers)):
            for name in sorted(set(some) - set(others)):
                if quota.allows(now):
                    LOG.info("worker %s %s, %s", name, verb, some[name].status)
                else:
                    quota.left_out += 1

    def look_around(self) -> None:
        """Looks at the files and at k3s, between two attempts."""
        self.look_at_files()
        before = self.k3s.view
        if self.look_at_k3s():
            self.plan_again(None)
            self.report_workers()
        if self.k3s.view != before:
            self.write_status("running")

    def describe_k3s(self) -> dict[str, Any]:
        """What --status shows of k3s."""
        token, view = self.config.k3s_token, self.k3s.view
        words = "unusable" if view.fault else "usable"
        if self.k3s.last is None:
            words = "not looked at"
        return {"fault": self.config.redactor.redact(view.fault),
                "state": words, "since": self.k3s.since,
                "token_valid_until": parse_expiry(token.reveal()) if token else None,
                "gpu_count": view.gpu_count,
                "worker_count": None if view.workers is None else len(view.workers),
                "workers": [{"name": name, **worker._asdict()}
                            for name, worker in list((view.workers or {}).items())[:100]]}

    def write_status(self, state: str) -> None:
        """Writes the record that --status shows, where the disk has room for it."""
        config, lease, now = self.config, self.lease, read_clock()
        ends = None if lease.confirmed_at is None else lease.confirmed_at + lease.ttl
        redact = config.redactor.redact
        record = {
            "format": STATUS_FORMAT, "agent_version": VERSION, "state": state,
            "machine_id": self.state.machine_id, "pool_name": config.pool_name,
            "provider_name": config.provider_name, "gateway": config.gateway,
            "proxy": self.client.peer if self.client.proxy else "",
            **(self.tunnel.record() if self.tunnel else {}), "pid": os.getpid(),
            "process_start": self.process_start, "wall_clock": time.time(),
            "clock": now, "started_at": self.started_at, "ready_since": self.ready_since,
            "failing_since": lease.failing_since, "failure": redact(self.failure),
            "last_keepalive_at": self.kept_at,
            "next_attempt_at": lease.due, "lease_ends_at": ends, **self.counts,
            "offer": self.plan.offer._asdict(),
            "warning": redact(self.plan.reason or self.placement), "k3s": self.describe_k3s(),
            "metrics": self.metrics._asdict(), "gpus": [gpu._asdict() for gpu in self.gpus or ()],
            "history": list(self.history)}
        try:
            if self.state.path:
                text = json.dumps(record)
                write_atomically(f"{self.state.path}.status.json", text + "\n", 0o644)
        except OSError as error:
            if self.status_lines.allows(now):
                LOG.warning("%s.status.json cannot be written, %s: --status shows an old state;"
                            " free space there, or let this user write", self.state.path,
                            error.strerror)

    def announce(self) -> None:
        """Says what begins, and warns of what will not work."""
        config = self.config
        through = f" through {self.client.peer}" if self.client.proxy else ""
        through = f" through ssh to {config.ssh}" if config.ssh else through
        cards = "".join(f", {gpu.name or 'a lost GPU'}" for gpu in self.gpus or ())
        LOG.info("beta9-agent %s: machine %s, pool %s, gateway %s%s, offers %s%s", VERSION,
                 self.state.machine_id, config.pool_name, config.gateway, through,
                 format_offer(self.plan.offer), cards)
        if self.plan.reason:
            LOG.warning("%s", self.plan.reason)
        if not (config.hostname or config.dev):
            LOG.warning("the gateway will look for this machine's k3s at machine-%s: give"
                        " --hostname, if that is not its name", self.state.machine_id)
        for name, found, unit in zip(("max_cpu", "max_memory", "max_gpus"), self.plan.found,
                                     (1000, 1, 1)):
            cap = getattr(config, name)
            if cap is not None and cap > (found or 0):
                LOG.warning("%s is %g, but there is only %g, and no more can be offered: lower it",
                            name, cap / unit, (found or 0) / unit)
        for name in SECRETS:
            source = config.sources.get(name, "")
            with contextlib.suppress(OSError):
                if source.startswith("--"):
                    LOG.warning("%s shows in `ps`: use %s-file", source, source)
                elif os.path.isfile(source) and os.stat(source).st_mode & 0o027:
                    LOG.warning("others can read or replace the token: `chmod g-w,o= %s`", source)
        try:
            load_nvml()
        except ImportError:
            LOG.warning("an NVIDIA driver is here, but 0 GPUs are offered, as its Python binding is"
                        " missing: %s, then start again", how_to_install("nvidia-ml-py"))

    def read_rotated_tokens(self) -> None:
        """Reads the token files again; a new k3s token is registered at once."""
        for name, path in self.config.token_files.items():
            try:
                if not os.path.isfile(path):
                    raise AgentError("the file is gone: put it back")
                token = parse_token(read_file(path).rstrip("\r\n"))
            except (AgentError, ValueError) as error:
                known = getattr(self.config, name) is not None      # else k3s is not there yet
                if known and self.token_lines.allows(read_clock()):
                    LOG.warning("no token in %s, so the last good one is used: %s",
                                printable(path), error)
                continue
            if token != getattr(self.config, name):
                self.config.redactor.remember(name, token)
                setattr(self.config, name, token)
                if name == "k3s_token":
                    self.register_again("the k3s token has changed")

    def look_at_host(self) -> None:
        """Takes a sample; another offer is registered."""
        self.metrics, self.gpus = self.host.sample()
        self.plan_again(offer_of(self.metrics, self.gpus, self.config))

    def payload_of(self, call: str) -> dict[str, Any]:
        """What is sent."""
        if call == KEEPALIVE:
            metrics = self.metrics._replace(worker_count=count_running(self.k3s.view.workers))
            return keepalive_payload(self.config, self.state.machine_id, metrics)
        return register_payload(self.config, self.state.machine_id, self.plan.offer,
                                self.config.private_ip or find_private_ip())

    def attempt(self, stop: StopFlag) -> Outcome:
        """One call, and what follows from it. Raises AgentError before the first ready only."""
        self.read_rotated_tokens()
        if self.lease.registered:
            self.look_at_host()
        before = self.lease
        call = next_call(before, read_clock())
        if call == REGISTER:
            self.prepare_registration()
        payload, start = self.payload_of(call), read_clock()
        outcome = self.client.send(call, payload, deadline_of(call, before, self.config))
        now = read_clock()
        if self.tunnel is not None:
            outcome = self.tunnel.judge(outcome, self.client.http.request.timed_out, now)
        self.count(call, outcome, start, now)
        self.lease = lease_after(before, call, outcome, now, self.config, random.uniform)
        if outcome.kind is Kind.OK:
            self.report_success(call, outcome, before, now)
            return outcome
        if outcome.kind is Kind.FORGOTTEN:
            self.cause = f"the gateway did not know this machine any more ({outcome.text})"
        self.fail(call, outcome, now, stop)
        return outcome

    def fail(self, call: str, outcome: Outcome, now: float, stop: StopFlag) -> None:
        """What follows from a failure. Raises AgentError before the first ready only."""
        waited = now - self.started_at
        code = exit_code_after(outcome, self.lease, waited, now, self.config)
        if code is not None and not self.ready and not stop.is_set():
            raise AgentError(f"giving up after {waited:.1f} s: {call} failed, {outcome.text}."
                             f" {outcome.remedy}", code)
        if self.tunnel is not None and not self.tunnel.carries():
            self.lease = self.lease._replace(due=self.tunnel.start_at)
            self.tunnel.start_at = self.next_wake()     # sooner, where patience ends before it
        self.report_failure(call, outcome, now)

    def tend_tunnel(self, stop: StopFlag) -> None:
        """Looks after ssh. Raises AgentError before the first ready only."""
        now = read_clock()
        outcome = self.tunnel.tend(now) if self.tunnel else None
        if outcome is None:
            return
        if outcome.kind is not Kind.OK:
            self.count("tunnel", outcome, now, now)
            self.lease = lease_after(self.lease, "tunnel", outcome, now, self.config,
                                     random.uniform)
            self.fail("tunnel", outcome, now, stop)
        self.write_status("running")

    def wait_for_turn(self, stop: StopFlag) -> None:
        """Waits for the next attempt; with --ssh also until the tunnel carries.

        Looks at the files and at k3s, and after the tunnel, meanwhile. Raises AgentError before the
        first ready only.
        """
        while not stop.is_set():
            self.tend_tunnel(stop)
            now, carries = read_clock(), self.tunnel is None or self.tunnel.carries()
            if carries and now >= self.next_wake():
                return
            busy = self.tunnel is not None or self.k3s_client.is_looking
            pause = TICK if busy else FILES_PERIOD
            stop.wait_until(min(now + pause, self.next_wake()) if carries else now + TICK / 5)
            self.look_around()

    def count(self, call: str, outcome: Outcome, start: float, now: float) -> None:
        """Notes a call for --status."""
        if outcome.kind is not Kind.OK:
            self.counts["failed"] += 1
            self.failure = printable(f"{call} failed: {outcome.text}. {outcome.remedy}", 500)
            return
        self.counts["registered" if call == REGISTER else "kept_alive"] += 1
        if call == KEEPALIVE:
            self.failure = ""
            self.kept_at = now
            self.history.append({"ms": round((now - start) * 1000, 1),
                                 "cpu": self.metrics.cpu_utilization_pct,
                                 "memory": self.metrics.memory_utilization_pct})

    def prepare_registration(self) -> None:
        """Keeps the offer before any worker can get it, and notes why this registration is made."""
        offer = self.plan.offer
        if (offer.cpu or 0) > 0 and offer != self.kept_offer:
            write_promise(self.state, offer)
            self.kept_offer = offer
        if self.lease.registered:
            self.cause = f"no keepalive was confirmed for its TTL of {self.lease.ttl:g} s"

    def report_failure(self, call: str, outcome: Outcome, now: float) -> None:
        """Writes a line about a failure, unless there were many."""
        if outcome.kind is Kind.FORGOTTEN and self.ready:
            return      # the registration that follows at once says so
        if self.trouble.failed(now):
            count, since = self.trouble.count, self.lease.failing_since or now
            times = f" {count} times in {now - since:.1f} s" if count > 1 else ""
            say = LOG.warning if outcome.kind in (Kind.TROUBLE, Kind.FORGOTTEN) else LOG.error
            say("%s failed%s: %s; trying again in %.1f s. %s", call, times, outcome.text,
                max(0.0, self.lease.due - now), outcome.remedy)

    def report_success(self, call: str, outcome: Outcome, before: Lease, now: float) -> None:
        """Writes a line about what changed, else one in QUIET seconds."""
        interval = interval_of(self.lease, self.config)
        if (before.ttl != self.lease.ttl and interval < self.config.keepalive_interval
                and self.ttl_lines.allows(now)):
            LOG.info("the gateway forgets a machine after %g s, so a keepalive goes every %g s",
                     self.lease.ttl, interval)
        if call == REGISTER:
            if not self.cause or self.registration_lines.allows(now):
                LOG.info("registered%s", f" again: {self.cause}" if self.cause else "")
                self.told_at = now
            if outcome.placement not in ("", self.placement) and not self.config.dev:
                LOG.warning("no work will come: %s", outcome.placement)
            self.placement = outcome.placement
            return
        told = self.trouble.recovered()
        if before.failing_since is not None or self.ready_since is None:
            self.ready_since = now
        if not self.ready:
            LOG.info("ready after %.2f s", now - self.started_at)
            notify_systemd("READY=1")
        elif told and before.failing_since is not None:
            LOG.info("ready again after %.1f s", now - before.failing_since)
        elif now - self.told_at > QUIET:
            LOG.info("ready, offers %s", format_offer(self.plan.offer))
        else:
            return
        self.ready, self.told_at = True, now

    def next_wake(self) -> float:
        """When to act: at the next attempt, or where patience ends before it."""
        if self.ready:
            return self.lease.due
        denied = math.inf if self.lease.denied_since is None else self.lease.denied_since
        timeout = self.config.startup_timeout
        return min(self.lease.due, denied + DENIED_PATIENCE,
                   math.inf if timeout is None else self.started_at + timeout)

    def leave(self, stop: StopFlag) -> None:
        """Registers once more: a machine that is only registered gets no work."""
        self.read_rotated_tokens()
        end = stop.at + LEAVE_DEADLINE
        stop.alarm.end_requests_by(end)
        self.client.send(REGISTER, self.payload_of(REGISTER), end - read_clock())

    def run(self, stop: StopFlag) -> int:
        """Lives until the flag is set; the exit code."""
        self.look_at_k3s(K3S_PATIENCE)
        self.plan = plan_offer(self.plan, None, self.k3s_view(), read_clock())
        self.announce()
        self.write_status("starting")
        confirmed = False
        try:
            self.wait_for_turn(stop)
            while not stop.is_set():
                confirmed = self.attempt(stop).kind is Kind.OK
                self.write_status("running")
                if self.ready and self.config.once:
                    return 0
                self.wait_for_turn(stop)
            notify_systemd("STOPPING=1")
            LOG.info("stopping")
            reachable = self.tunnel is None or self.tunnel.carries()
            if self.ready and confirmed and reachable:      # a stop must not wait for anybody
                self.leave(stop)
            return 0
        finally:
            if self.tunnel is not None:
                self.tunnel.close()
            self.write_status("stopped")


# ---- 11 Stand-in gateway
class StandIn:
    """The gateway of --dev: the machine API as the real one answers it. Source: gateway-api."""

    TTL = 300.0     # seconds
    STRINGS = ("token", "machine_id", "provider_name", "pool_name", "hostname", "private_ip", "cpu",
               "memory", "gpu_count")
    FORMATS = (("cpu", "[0-9]+m?", "Invalid machine cpu value"),
               ("memory", "[0-9]+([KMG]i)?", "Invalid machine memory value"),
               ("gpu_count", "[0-9]+", "Invalid gpu count"))

    def __init__(self, token: str, pool_name: str) -> None:
        self.token, self.pool_name = token, pool_name
        self.machines: dict[tuple[str, ...], dict[str, Any]] = {}

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        route = path.partition("?")[0].removeprefix("/api/v1")
        routes = {"/health": "GET", "/machine/list": "GET", "/machine/config": "GET",
                  "/machine/register": "POST", "/machine/keepalive": "POST"}
        if route not in routes:
            return 404, {"message": "Not Found"}
        if routes[route] != method:
            return 405, {"message": "Method Not Allowed"}
        if route == "/health":
            return 200, {"status": "ok"}
        given = headers.get("Authorization")
        if given is None:
            return 500, {"message": "Internal Server Error"}    # a panic
        if given != f"Bearer {self.token}":
            return 401, {"message": "Unauthorized"}
        if method == "GET":
            return 200, self.list_ready() if route == "/machine/list" else self.configuration()
        said = parse_json(body)
        if not isinstance(said, dict) or headers.get("Content-Type") != "application/json":
            return 400, {"message": "Invalid payload"}
        return self.register(said) if route.endswith(REGISTER) else self.keep_alive(said)

    def configuration(self) -> dict[str, Any]:
        """As much of it as the agent looks at."""
        return {"config": {"worker": {"pools": {self.pool_name: {"mode": "external"}}}}}

    def list_ready(self) -> list[Any]:
        """The machines that are ready."""
        return [{"state": machine["state"], "metrics": machine["metrics"]}
                for machine in self.machines.values() if machine["state"]["status"] == "ready"]

    def register(self, said: dict[str, Any]) -> tuple[int, Any]:
        """POST /machine/register."""
        fields = {name: said.get(name, "") for name in self.STRINGS}
        if not all(isinstance(value, str) for value in fields.values()):
            return 400, {"message": "Invalid payload"}
        if fields["pool_name"] != self.pool_name:
            return 500, {"message": "Invalid pool name"}
        for name, pattern, message in self.FORMATS:
            if not re.fullmatch(pattern, fields[name]):
                return 500, {"message": message}
        state = {"machine_id": fields["machine_id"], "status": "registered",
                 "pool_name": self.pool_name, "ttl_seconds": self.TTL}
        key = (fields["provider_name"], self.pool_name, fields["machine_id"])
        self.machines[key] = {"state": state, "metrics": {}, "until": read_clock() + self.TTL}
        LOG.info("gateway: %s registered, %s CPU, %s memory, %s GPUs", printable(key[2]),
                 fields["cpu"], fields["memory"], fields["gpu_count"])
        return 200, {**self.configuration(), "machine_state": state}

    def keep_alive(self, said: dict[str, Any]) -> tuple[int, Any]:
        """POST /machine/keepalive."""
        metrics = said.pop("metrics", None)
        sane = all(isinstance(value, str) for value in said.values())
        sane = sane and (metrics is None or isinstance(metrics, dict))
        for name, value in as_mapping(metrics).items():
            kinds = (int, float) if name.endswith("_pct") else (int,)
            sane = sane and type(value) in kinds and abs(value) < 2 ** 63
        if not sane:
            return 400, {"message": "Invalid payload"}
        pool_name, machine_id = said.get("pool_name"), said.get("machine_id")
        if not pool_name or not machine_id:
            return 400, {"message": "machine_id and pool_name are required"}
        provider = said.get("provider_name") or "generic"
        machine = self.machines.get((provider, pool_name, machine_id))
        if machine is None or machine["until"] <= read_clock():
            key = f"provider:machine:{provider}:{pool_name}:{machine_id}"
            return 500, {"message": "Failed to update keepalive: failed to get machine state"
                         f" <{key}>: machine not found"}
        if machine["state"]["status"] != "ready":
            LOG.info("gateway: %s ready", printable(machine_id))
        machine["state"] = {**machine["state"], "status": "ready"}
        if metrics is None:
            return 500, {"message": "Internal Server Error"}    # a panic, before the TTL is renewed
        machine["metrics"], machine["until"] = metrics, read_clock() + self.TTL
        return 200, {"status": "ok", "machine_state": {
            **machine["state"], "last_keepalive": f"{time.time():.0f}",
            "agent_version": said.get("agent_version", "")}}


def start_stand_in(stand_in: StandIn) -> int:
    """Has it listen on loopback; the port."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1       # headers and body in one packet

        def answer(self) -> None:
            size = self.headers.get("Content-Length", "0")
            body = self.rfile.read(min(int(size), ANSWER_LIMIT) if size.isdigit() else 0)
            status, answer = stand_in.answer(self.command, self.path, self.headers, body)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, format: str, *args: Any) -> None:
            LOG.debug("gateway: %s", printable(format % args))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


# ---- 12 Check and status
def is_utf8() -> bool:
    """Whether whoever reads the answer can show all signs."""
    return "utf" in (sys.stdout.encoding or "").lower()


def format_seconds(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    minutes = int(seconds // 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 2880 else f"{minutes // 1440} days"


class Status:
    """A status record. It may be cut off, damaged or of another version, so all is optional."""

    def __init__(self, record: object, now: float) -> None:
        self.record, self.now = as_mapping(record), now

    def text(self, name: str) -> str:
        """A value in it, for people."""
        return printable(self.record.get(name, "?"), 500)

    def ago(self, name: str) -> float | None:
        """Seconds since a moment in it, negative for one to come."""
        moment = number_in(self.record, name)
        return None if moment is None else self.now - moment

    def is_running(self) -> bool:
        """Whether the process that wrote it is still there."""
        pid, start = number_in(self.record, "pid"), self.record.get("process_start")
        written_before_boot = (self.ago("clock") or 0.0) < 0
        if written_before_boot or self.record.get("state") == "stopped":
            return False
        if pid is None or not 0 < pid < 2 ** 31:
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except PermissionError:     # another user's
            pass
        found = read_process_start(int(pid))
        return found == start or not found or not start

    def has_lease(self, machine_id: str | None) -> bool:
        """Whether the gateway may take this machine for ready by what an agent here did."""
        ended, same = self.ago("lease_ends_at"), self.record.get("machine_id") == machine_id
        return same and (self.is_running() or (ended is not None and ended < 0))

    def judge(self) -> tuple[int, str]:
        """The exit code, and the state in words."""
        reason = f": {self.text('failure')}" if self.record.get("failure") else ""
        overdue, failing = self.ago("next_attempt_at"), self.ago("failing_since")
        since, ended = self.ago("ready_since"), self.ago("lease_ends_at")
        if not self.record:
            return 3, ("not running, as far as is known: no record can be read. Start the agent, or"
                       " give the --state-dir (or be the user) that it runs with")
        if not self.is_running() and self.record.get("state") == "stopped":
            return 3, f"not running: stopped {format_seconds(self.ago('clock'))} ago{reason}"
        if not self.is_running():
            return 3, f"not running, though nobody stopped it: see its log, start it again{reason}"
        if overdue is not None and overdue > 30:
            return 1, (f"no sign of life for {format_seconds(overdue)}: it hangs, or cannot write"
                       " its state folder; see its log, or restart it")
        if ended is not None and ended > 0:
            return 1, f"its lease ran out {format_seconds(ended)} ago{reason}"
        if failing is not None or since is None:
            return 1, f"not ready for {format_seconds(failing)}{reason}" if reason else "starting"
        if not number_in(as_mapping(self.record.get("offer")), "cpu"):
            return 1, f"ready, takes no work: {self.text('warning')}"
        return 0, f"ready for {format_seconds(since)}"


def read_status(config: Config) -> Status:
    """The record of the machine id, else the newest one in the state folder."""
    import glob
    record, folders = None, [find_state_dir(config)]
    if not config.state_dir:
        folders.append("/var/lib/beta9-agent")      # the service's, for other users too
    with contextlib.suppress(AgentError, OSError, ValueError):
        found = [glob.glob(f"{glob.escape(folder)}/{config.machine_id or '*'}.status.json")
                 for folder in folders]
        newest = max(found[0] or found[-1], key=os.path.getmtime)
        record = parse_json(read_file(newest).encode())
    return Status(record, read_clock())


def draw_bar(name: str, share: float, text: str, signs: str) -> str:
    """A line with a bar for a share from 0 to 1."""
    full = round(min(max(share, 0.0), 1.0) * 30)
    return f"{name:<11}{signs[-1] * full}{signs[1] * (30 - full)} {text}"


def draw_sparkline(name: str, values: list[float], highest: float, text: str, signs: str) -> str:
    """A line with a sign for each value from 0 to the highest."""
    steps = [math.ceil(min(max(value / highest, 0.0), 1.0) * (len(signs) - 1)) for value in values]
    return f"{name:<11}{''.join(signs[step] for step in steps):<60} {text}"


# What `kubectl` calls it -> words for people.
WORKER_WORDS = {
    "Pending": "waits for room", "ContainerCreating": "is being made", "Terminating": "is ending",
    "ErrImagePull": "image cannot be pulled", "ImagePullBackOff": "image cannot be pulled",
    "CrashLoopBackOff": "ends again and again"}


def format_date(seconds: float | None) -> str:
    """The day of a moment, in seconds since 1970, for people; "" for none."""
    import datetime
    with contextlib.suppress(TypeError, ValueError, OverflowError, OSError):
        moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)  # type: ignore
        return moment.strftime("%Y-%m-%d")
    return ""


def draw_k3s(status: Status, room: int) -> list[str]:
    """What is known of k3s and its workers, in at most `room` lines."""
    k3s = Status(status.record.get("k3s"), status.now)
    expiry = format_date(number_in(k3s.record, "token_valid_until"))
    count = number_in(k3s.record, "worker_count")
    workers = [Status(entry, status.now) for entry in as_list(k3s.record.get("workers"))]
    known = "unknown" if count is None else f"{count:.0f}"
    until = f", token valid until {expiry}" if expiry else ""
    lines = [f"k3s        {k3s.text('state')} for {format_seconds(k3s.ago('since'))}, workers:"
             f" {known}{until}"]
    for worker in workers:
        phase = worker.text("status")
        lines.append(f"  {worker.text('name')[:40]:<40} {format_seconds(worker.ago('since')):>9}"
                     f"  {WORKER_WORDS.get(phase, phase)}")
    if len(lines) > room:
        more = (count or len(workers)) - (room - 2)
        lines[room - 1:] = [f"  and {more:.0f} more: `kubectl get pods`"]
    return lines


def draw_use(status: Status, signs: str) -> list[str]:
    """The machine's use: bars of now, and sparklines of the last 60 keepalives."""
    metrics = as_mapping(status.record.get("metrics"))
    cpu, memory, size, free = (number_in(metrics, name) or 0.0 for name in (
        "cpu_utilization_pct", "memory_utilization_pct", "total_disk_space_bytes",
        "total_disk_free_bytes"))
    gpus, history = status.record.get("gpus"), status.record.get("history")
    cards = [as_mapping(card) for card in gpus] if isinstance(gpus, list) else []
    busy = sum(not card.get("free") for card in cards)
    entries = [as_mapping(entry) for entry in history] if isinstance(history, list) else []
    trips, loads, fills = ([number_in(entry, name) or 0.0 for entry in entries[-60:]]
                           for name in ("ms", "cpu", "memory"))
    return [
        draw_bar("CPU", cpu / 100, f"{cpu:.0f} %", signs),
        draw_bar("memory", memory / 100, f"{memory:.0f} %", signs),
        draw_bar("disk", 1 - free / size if size else 0, f"{free / 2 ** 30:.0f} GiB free", signs),
        draw_bar("GPUs", busy / max(len(cards), 1), f"{busy} of {len(cards)} in use", signs),
        "",
        draw_sparkline("round trip", trips, max([*trips, 1.0]), f"{sum(trips[-1:]):.0f} ms", signs),
        draw_sparkline("CPU", loads, 100, "", signs),
        draw_sparkline("memory", fills, 100, "", signs)]


def draw_status(status: Status, headline: str, signs: str) -> list[str]:
    """The status on a screen of 80 columns and 24 lines."""
    def until(name: str) -> str:
        ago = status.ago(name)
        return format_seconds(None if ago is None else -ago)

    import textwrap
    if not status.is_running():     # as it was when that was written
        status = Status(status.record, number_in(status.record, "clock") or status.now)
    text, offer = status.text, as_mapping(status.record.get("offer"))
    warning = status.record.get("warning")
    lines = textwrap.wrap(headline, 79)
    if warning and text("warning") not in headline:
        lines += textwrap.wrap(text("warning"), 79)
    if not status.record:
        return lines
    through = f" through {text('proxy')}" if status.record.get("proxy") else ""
    tunnel, up = [], status.ago("tunnel_up_since")
    if status.record.get("tunnel"):
        state = "is down" if up is None else f"is up for {format_seconds(up)}"
        tunnel = [f"tunnel     {state}, replaced {text('tunnel_replaced')} times, ssh to"
                  f" {text('tunnel')}"]
    lines = lines[:6 - len(tunnel)]
    room = 7 - len(lines) - len(tunnel)     # that the other lines leave
    return [line[:79] for line in [
        *lines, "",
        f"machine    {text('machine_id')}, pool {text('pool_name')}, provider"
        f" {text('provider_name')}",
        f"gateway    {text('gateway')}{through}", *tunnel,
        f"agent      {text('agent_version')}, pid {text('pid')}, up"
        f" {format_seconds(status.ago('started_at'))}",
        f"keepalive  last {format_seconds(status.ago('last_keepalive_at'))} ago, next in"
        f" {until('next_attempt_at')}, lease ends in {until('lease_ends_at')}",
        f"counts     {text('kept_alive')} kept alive, {text('failed')} failed,"
        f" {text('registered')} registered",
        f"offers     {(number_in(offer, 'cpu') or 0) / 1000:g} CPUs, {offer.get('memory')} MiB"
        f" memory, {offer.get('gpu_count')} GPUs",
        *draw_k3s(status, room), "", *draw_use(status, signs)]]


def show_status(config: Config, as_json: bool, watch: bool) -> int:
    """Prints the status, with `watch` again and again; the exit code."""
    flag = StopFlag(Alarm())
    signs = " ▁▂▃▄▅▆▇█" if is_utf8() else " .:-=+*#"
    screen = watch and not as_json and sys.stdout.isatty()
    if watch:
        flag.install()
    print("\x1b[?1049h\x1b[?25l" if screen else "", end="")     # another screen, no cursor
    try:
        while True:
            status = read_status(config)
            code, headline = status.judge()
            if as_json:
                print(json.dumps({**status.record, "exit_code": code, "summary": headline,
                                  "now": status.now}))
            else:
                clear = "\x1b[H\x1b[J" if screen else ""
                print(clear + "\n".join(draw_status(status, headline, signs)))
            sys.stdout.flush()
            if not watch:
                return code
            flag.wait_until(read_clock() + 2)
            if flag.is_set():
                return code
    finally:
        print("\x1b[?25h\x1b[?1049l" if screen else "", end="")


class Finding(NamedTuple):
    """What a check found: `ok`, `warn` or `fail`, and words for people."""

    mark: str
    text: str


def good(text: str) -> Finding:
    """Nothing to do."""
    return Finding("ok", text)


def warn(text: str) -> Finding:
    """It works, or will later; with the remedy."""
    return Finding("warn", text)


def fail(text: str) -> Finding:
    """No work can run before this is mended; with the remedy."""
    return Finding("fail", text)


Checks = Mapping[str, Callable[[], list[Finding]]]


def run_checks(checks: Checks, seconds: float) -> list[tuple[str, list[Finding]]]:
    """What each found, by its name. All run at once, as most wait for a network."""
    queries, end, results = {name: BackgroundQuery() for name in checks}, read_clock() + seconds, []
    for name, query in queries.items():
        query.start(checks[name])
    for name, query in queries.items():
        try:
            found = query.ask(checks[name], max(end - read_clock(), 0.0))
        except TimeoutError:
            found = [fail(f"no end within {seconds:.0f} s: the lines above may say what hangs")]
        except AgentError as error:
            found = [fail(str(error))]
        except ModuleNotFoundError as error:
            found = [fail(f"not checked, as {error.name} is missing: see settings above")]
        except Exception as error:
            found = [fail(f"cannot be checked, {printable(repr(error))}")]
        results.append((name, found))
    return results


def check_settings(config: Config) -> list[Finding]:
    """Python, its packages, all settings at once, and the proxy."""
    import importlib.util
    found = [good(f"Python {sys.version.split()[0]}, {sys.executable}")]
    for module, package in (("requests", "requests"), ("psutil", "psutil"), ("yaml", "pyyaml")):
        if not importlib.util.find_spec(module):
            finding = warn if package == "pyyaml" else fail
            found.append(finding(f"{package} is not installed: {how_to_install(package)}"))
    found += [fail(problem) for problem in config.problems]
    if not config.problems and importlib.util.find_spec("requests"):
        proxy = find_proxy(config)
        found.append(good(f"connects to {format_peer(config, proxy)}"))
    return found


def ask_for_check(config: Config, method: str, path: str, body: str | None = None) -> Answer:
    """The gateway's answer. Raises AgentError with what is wrong and the remedy."""
    client = GatewayClient(config, None)
    try:
        return client.ask(method, path, body, CHECK_DEADLINE / 2, CONFIG_LIMIT)
    except Exception as error:
        outcome = client.outcome_of_failure(error)
        raise AgentError(f"{outcome.text}. {outcome.remedy}") from None


def explain_check(config: Config, what: str, answer: Answer) -> list[Finding]:
    """What is wrong with an answer, and the remedy."""
    outcome = explain_answer(what, answer.status, answer.headers, answer.body, config)
    return [fail(f"{outcome.text}. {outcome.remedy}")]


def open_tunnel(config: Config, tunnels: contextlib.ExitStack) -> list[Finding]:
    """What becomes of an ssh that is left in `tunnels` to be closed.

    Not for a thread, with which Linux would end ssh.
    """
    try:
        tunnel = Tunnel(config, State(""), CHECK_DEADLINE / 2)
    except AgentError as error:
        return [fail(str(error))]
    tunnels.callback(tunnel.close)
    config.gateway_socket, outcome = tunnel.path, None
    while outcome is None:
        time.sleep(TICK / 10)
        outcome = tunnel.tend(read_clock())
    found = [good(f"ssh is {tunnel.program}")]
    if outcome.kind is Kind.OK:
        found.append(good(f"{config.ssh} accepts the key"))
        client = GatewayClient(config, None)
        try:
            client.ask("GET", "/health", None, CHECK_DEADLINE / 4, ANSWER_LIMIT)
            return [*found, good(f"it carries to {config.ssh_gateway}, seen from there")]
        except Exception as error:
            outcome = tunnel.judge(client.outcome_of_failure(error), timed_out=False,
                                   now=read_clock())
    return [*found, fail(f"{outcome.text}. {outcome.remedy}")]


def check_gateway(config: Config) -> list[Finding]:
    """Its name, TCP, TLS, GET /health, and the two clocks."""
    import email.utils
    start = read_clock()
    answer = ask_for_check(config, "GET", "/health")
    took = (read_clock() - start) * 1000
    if answer.status != 200 or as_mapping(parse_json(answer.body)).get("status") != "ok":
        return explain_check(config, "health", answer)
    found = [good(f"{config.gateway} answers in {took:.0f} ms")]
    with contextlib.suppress(TypeError, ValueError):
        sent = email.utils.parsedate_to_datetime(answer.headers.get("Date", ""))
        apart = abs(sent.timestamp() - time.time())
        if apart > 30:
            found.append(warn(f"its clock and this one are {format_seconds(apart)} apart:"
                              " `timedatectl set-ntp true`"))
    return found


def check_token(config: Config, machine_id: str | None, status: Status) -> list[Finding]:
    """The machine token, by the list of ready machines, of which nothing is shown."""
    import urllib.parse
    query = urllib.parse.urlencode({"pool_name": config.pool_name,
                                    "provider_name": config.provider_name})
    answer = ask_for_check(config, "GET", f"/machine/list?{query}")
    machines = parse_json(answer.body)
    if answer.status != 200 or not isinstance(machines, list):
        return explain_check(config, "list", answer)
    ids = [as_mapping(as_mapping(machine).get("state")).get("machine_id") for machine in machines]
    if machine_id in ids and not status.has_lease(machine_id):
        return [fail(f"machine {machine_id} is ready already, kept by an agent elsewhere: stop that"
                     " one, or give another --machine-id")]
    return [good(f"the gateway accepts it; ready machines of this pool: {len(ids)}")]


def check_keepalive(config: Config) -> list[Finding]:
    """Whether there is a keepalive route, by a request that it refuses."""
    answer = ask_for_check(config, "POST", "/machine/keepalive", "{}")
    if answer.status == 400:
        return [good("the gateway has the route")]
    return explain_check(config, KEEPALIVE, answer)


def addresses_of(settings: dict[str, Any]) -> list[tuple[str, str, int]]:
    """What workers must reach by the gateway's configuration: the setting, host and port."""
    import urllib.parse

    def setting(path: str) -> Any:
        value: Any = settings
        for key in path.split("."):
            value = as_mapping(value).get(key)
        return value

    grpc, redis = "gateway_service.grpc.external_host", setting("database.redis.addrs")
    named = [("database.redis.addrs", f"//{address}", 6379)
             for address in (redis if isinstance(redis, list) else [redis])[:8]]
    named += [(grpc, f"//{setting(grpc)}:{setting(grpc.replace('host', 'port'))}", 0)]
    named += [(name, str(setting(name)), port) for name, port in (
        ("storage.juicefs.redis_uri", 6379), ("storage.juicefs.aws_s3_bucket", 443))]
    named += [("worker.image_registry", f"//{setting('worker.image_registry')}", 443)]
    found = []
    for name, url, port in named:
        with contextlib.suppress(ValueError):
            parsed = urllib.parse.urlsplit(url)
            if parsed.hostname not in (None, "none"):
                default = 80 if parsed.scheme == "http" else port
                found.append((name, str(parsed.hostname), parsed.port or default))
    return found


def check_reach(setting: str, host: str, port: int) -> list[Finding]:
    """One TCP connection to what workers need."""
    place = printable(f"{format_host(host)}:{port}")
    try:
        probe_tcp(host, port, CHECK_DEADLINE / 4)
        return [good(f"{place} can be reached ({setting})")]
    except (OSError, UnicodeError) as error:
        return [fail(f"{place} cannot be reached from here, {explain_error(error)}, so workers"
                     f" would end: correct {setting} on the gateway, or the network")]


def check_named(config: Config, kind: str, name: str) -> list[Finding]:
    """Whether k3s has what the gateway's configuration names, where the node's token may look."""
    path = {"secret": "/api/v1/namespaces/default/secrets",
            "runtimeclass": "/apis/node.k8s.io/v1/runtimeclasses"}[kind]
    status, k3s = 0, K3sClient(config, "")
    if config.k3s_node_token and config.k3s_ca_file:
        status = k3s.ask("GET", f"{path}/{name}?includeObject=None", config.k3s_node_token,
                         accept=k3s.TABLE).status
    if status == 200:
        return [good(f"k3s has the {kind} {name}")]
    if status == 404:
        return [fail(f"k3s has no {kind} {name}, which the gateway's configuration names: make it"
                     " there, in namespace default")]
    return [warn(f"the {kind} {name} may not be looked at: `kubectl get {kind} {name}`")]


def check_pool(config: Config, offer: Offer) -> list[Finding]:
    """The pool in the gateway's configuration, and each address there that workers need."""
    answer = ask_for_check(config, "GET", "/machine/config")
    fields = as_mapping(parse_json(answer.body))
    if b"Unable to create remote config" in answer.body:
        fields = {"config": None}
    elif answer.status != 200:
        return explain_check(config, "config", answer)
    settings = as_mapping(fields.get("config"))
    worker = as_mapping(settings.get("worker"))
    pools = as_mapping(worker.get("pools"))
    pool = as_mapping(pools.get(config.pool_name))
    sizing = as_mapping(pool.get("pool_sizing"))
    cpu, memory = sizing.get("default_worker_cpu"), sizing.get("default_worker_memory")
    fault = explain_placement(fields, config)
    if not fault and config.pool_name not in pools:
        fault = f"the gateway has no pool {config.pool_name}: check --pool-name"
    elif not fault and (parse_quantity(cpu) > (offer.cpu or 0)
                        or parse_quantity(memory) > (offer.memory or 0)):
        fault = (f"a worker of this pool needs {printable(cpu, 20)} CPU and {printable(memory, 20)}"
                 " memory, more than is offered here: raise --max-cpu or --max-memory, or lower the"
                 " pool's pool_sizing on the gateway")
    needs = {str(place): functools.partial(check_reach, *place) for place in addresses_of(settings)}
    named = [("runtimeclass", str(pool.get("runtime")))]
    named += [("secret", str(name)) for name in as_list(worker.get("image_pull_secrets"))[:8]]
    needs.update({f"{kind} {name}": functools.partial(check_named, config, kind, name)
                  for kind, name in named if re.fullmatch("[a-z0-9][a-z0-9.-]{1,250}", name)})
    reached = run_checks(needs, CHECK_DEADLINE / 3)
    first = fail(fault) if fault else good(f"{config.pool_name} takes machines such as this one")
    return [first] + [finding for _, found in reached for finding in found]


def check_k3s(config: Config) -> list[Finding]:
    """This machine's k3s: whether it listens, its token's end, and the gateway's way to it."""
    found = [warn(f"{flag} is missing: no worker can run here without it")
             for flag, value in (("--k3s-token-file", config.k3s_token),
                                 ("--hostname", config.hostname)) if value is None]
    expiry = parse_expiry(config.k3s_token.reveal()) if config.k3s_token else None
    left = math.inf if expiry is None else expiry - time.time()
    if left <= 0:
        found.append(fail(f"the k3s token has expired: {NEW_K3S_TOKEN}"))
    elif left < 30 * 86400:
        found.append(warn(f"the k3s token expires in {format_seconds(left)}: {NEW_K3S_TOKEN}"))
    k3s = K3sClient(config, "")
    try:
        here = probe_tls(k3s.host, k3s.port, CHECK_DEADLINE / 4)
    except OSError as error:
        return [*found, fail(f"k3s is not at {k3s.place}, {explain_error(error)}: install or start"
                             " it, `systemctl status k3s`")]
    found.append(good(f"{k3s.place} speaks TLS"))
    if not config.hostname:
        return found
    place = f"{format_host(config.hostname)}:6443"
    try:
        same = probe_tls(config.hostname, 6443, CHECK_DEADLINE / 4) == here
        found.append(good(f"{place} leads here") if same else warn(
            f"{place} shows another certificate, so it may be another machine: correct --hostname"))
    except (OSError, UnicodeError) as error:
        found.append(warn(f"{place}, where the gateway looks for k3s, cannot be reached from here,"
                          f" {explain_error(error)}: check --hostname"))
    return found


# A worker's job, as far as an admission can mind it.
JOB = json.dumps({
    "apiVersion": "batch/v1", "kind": "Job", "metadata": {"generateName": "beta9-agent-check-"},
    "spec": {"template": {"spec": {
        "restartPolicy": "Never", "hostNetwork": True, "containers": [
            {"name": "check", "image": "none", "securityContext": {"privileged": True}}]}}}})


def check_account(k3s: K3sClient) -> list[Finding]:
    """The gateway's token, with a job that is not made. Raises as `K3sClient.ask`."""
    token = k3s.config.k3s_token
    fault = k3s.explain_token()
    if fault:
        return [fail(fault)]
    expiry = format_date(parse_expiry(token.reveal())) or "revoked"
    found = [good(f"k3s accepts the gateway's token for all that it does there, until {expiry}")]
    answer = k3s.ask("POST", "/apis/batch/v1/namespaces/default/jobs?dryRun=All", token, JOB)
    message = as_mapping(parse_json(answer.body)).get("message")
    objection: object = answer.headers.get("Warning") or message or answer.status
    if objection == 201:
        return [*found, good("a privileged job would be accepted")]
    return [*found, fail(f"a worker would be refused, {printable(objection)}: take Pod Security off"
                         " namespace default")]


BAD_CONDITIONS = (("Ready", "False"), ("Ready", "Unknown"), ("MemoryPressure", "True"),
                  ("DiskPressure", "True"), ("PIDPressure", "True"))


def check_node(node: Mapping[str, Any], gpu_count: int | None) -> list[Finding]:
    """What keeps workers off the node."""
    spec, status = as_mapping(node.get("spec")), as_mapping(node.get("status"))
    name = printable(as_mapping(node.get("metadata")).get("name"), 60)
    taints = [as_mapping(taint) for taint in as_list(spec.get("taints"))]
    conditions = [as_mapping(condition) for condition in as_list(status.get("conditions"))]
    faults = [f"the taint {printable(taint.get('key'), 100)}" for taint in taints
              if taint.get("effect") != "PreferNoSchedule"]
    faults += [f"{each['type']} {each['status']}" for each in conditions
               if (each.get("type"), each.get("status")) in BAD_CONDITIONS]
    found = [fail(f"node {name} has {fault}: `kubectl describe node {name}` says why, `kubectl"
                  f" uncordon {name}` ends a cordon") for fault in faults]
    gpus = count_node_gpus(node)
    if (gpus or 0) < (gpu_count or 0):
        found.append(fail(f"k3s has {gpus} of {gpu_count} GPUs for workers: {TRY_PLUGIN}"))
    return found or [good(f"node {name} takes workers, with {gpus} GPUs")]


def check_workers(config: Config, gpu_count: int | None) -> list[Finding]:
    """What k3s itself says about workers, where it is known to be k3s."""
    if not (config.k3s_ca_file and config.k3s_token):
        return [warn("not looked at: give --k3s-ca-file, so that the token goes to k3s alone")]
    k3s = K3sClient(config, "")
    try:
        found, node = check_account(k3s), k3s.read_node()
    except Exception as error:
        return [fail(k3s.explain(error))]
    if not node:
        return [*found, warn("the node is not looked at: give --k3s-node-token-file")]
    return found + check_node(node, gpu_count)


def check_gpus() -> list[Finding]:
    """The cards, and what workers need to use them."""
    try:
        cards = describe_gpus()
    except ImportError:
        return [fail("a driver is here, but 0 GPUs are offered, as its Python binding is missing:"
                     f" {how_to_install('nvidia-ml-py')}")]
    except Exception as error:
        return [fail(f"the driver does not answer, {explain_error(error)}: look at `nvidia-smi`")]
    found = []
    for line, lost, sleeps in cards:
        if lost:
            found.append(fail(f"{line}: look at `nvidia-smi` and `dmesg`"))
        else:
            found.append(warn(f"{line}; persistence mode is off: `nvidia-smi -pm 1`") if sleeps
                         else good(line))
    runtime = "/usr/bin/nvidia-container-runtime"
    if cards and not os.path.exists(runtime):
        found.append(warn(f"{runtime} is missing: install the NVIDIA container toolkit, then"
                          " restart k3s"))
    return found or [good("none")]


def check_machine(config: Config, offer: Offer, status: Status) -> list[Finding]:
    """What is offered, and what else workers and this program need."""
    folder = parent = find_state_dir(config)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent) or "."
    disk = os.statvfs("/")
    free = disk.f_bavail * disk.f_frsize / 1000 ** 3
    found = [good(f"{format_offer(offer)}, private IP"
                  f" {config.private_ip or find_private_ip() or 'unknown: give --private-ip'}")]
    if not os.path.exists("/dev/fuse"):
        found.append(fail("/dev/fuse is missing, which workers need: `modprobe fuse`"))
    if free < 30:
        found.append(warn(f"{free:.0f} GB are free on /, and images need 30: make room"))
    if not os.access(parent, os.W_OK):
        found.append(fail(f"{folder} cannot be written: give --state-dir"))
    if is_listening(9090):
        found.append(warn("port 9090 is taken, which a worker needs: if no worker runs, stop what"
                          " listens there"))
    if status.is_running():
        found.append(good(f"an agent runs here: {status.judge()[1]}"))
    return found


def find_all(config: Config, tunnels: contextlib.ExitStack) -> list[tuple[str, list[Finding]]]:
    """What each check finds, by its name; ssh, where there is one, is left in `tunnels`."""
    status, end = read_status(config), read_clock() + CHECK_DEADLINE
    machine_id = config.machine_id or read_machine_id(find_state_dir(config))
    offer = Offer(None, None, None)
    with contextlib.suppress(ModuleNotFoundError):      # said below
        offer = offer_of(*Host().sample(), config)
    checks: dict[str, Callable[[], list[Finding]]] = {
        "settings": lambda: check_settings(config),
        "tunnel": lambda: [],
        "gateway": lambda: check_gateway(config),
        "token": lambda: check_token(config, machine_id, status),
        "keepalive": lambda: check_keepalive(config),
        "pool": lambda: check_pool(config, offer),
        "k3s": lambda: check_k3s(config),
        "workers": lambda: check_workers(config, offer.gpu_count), "GPUs": check_gpus,
        "machine": lambda: check_machine(config, offer, status)}
    fault = "correct the settings above first" if config.problems else ""
    if config.ssh and not fault:
        if status.is_running():     # which has that port there
            config.ssh_reverse = None
        found = open_tunnel(config, tunnels)
        checks["tunnel"] = lambda: found
        if found[-1].mark == "fail":
            fault = "mend the tunnel above first"
    if fault:
        skipped = [fail(f"not checked: {fault}")]
        checks.update(dict.fromkeys(("gateway", "token", "keepalive", "pool"), lambda: skipped))
    return run_checks(checks, end - read_clock())


def show_check(config: Config, as_json: bool) -> int:
    """Prints what all checks find, which change nothing; the exit code."""
    with contextlib.ExitStack() as tunnels:
        results = find_all(config, tunnels)
    findings = [{"check": name, "result": mark, "text": config.redactor.redact(text)}
                for name, found in results for mark, text in found]
    failed = any(finding["result"] == "fail" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": findings}))
        return int(failed)
    signs = {"ok": "✓", "warn": "!", "fail": "✗"} if is_utf8() else {"fail": "FAIL"}
    colours = {"ok": 32, "warn": 33, "fail": 31}
    plain = "NO_COLOR" in os.environ or not sys.stdout.isatty()
    for finding in findings:
        result = finding["result"]
        sign = signs.get(result, result)
        shown = f"{sign:4}" if not is_utf8() else sign
        if not plain:
            shown = f"\x1b[{colours[result]}m{shown}\x1b[0m"
        print(f"{shown} {finding['check']:<9} {finding['text']}")
    return int(failed)


def show_dry_run(config: Config) -> None:
    """Prints the settings and what would be sent, without the network. Raises UnsafeAddress."""
    client = GatewayClient(config, None)
    first_hop = split_proxy(client.proxy)[0] if client.proxy else config.gateway_host
    if not client.http.any_address:
        require_private(first_hop, look_up_digits(first_hop))
    machine_id = config.machine_id or read_machine_id(find_state_dir(config))
    config.machine_id = machine_id or "new at the first start"
    for option in OPTIONS:
        value = getattr(config, option.name)
        if option.group != "actions":
            shown = "not set" if value is None else printable(value)
            source = config.sources.get(option.name)
            print(f"{option.name}: {shown}" + (f"  ({source})" if source else ""))
    print("proxy:", client.peer if client.proxy else "none")
    if config.ssh:
        import shlex
        path = f"{find_state_dir(config)}/{machine_id or 'ID'}.ssh"
        print("starts:", printable(shlex.join(["ssh", *ssh_arguments(config, path)]), 2000))
    agent = Agent(config, State(config.machine_id), client)
    if agent.plan.reason:
        print("offers no CPU yet:", agent.plan.reason)
    for call in (REGISTER, KEEPALIVE):
        text = json.dumps(agent.payload_of(call), indent=2, default=str)
        print(f"POST {config.gateway}/api/v1/machine/{call} {text}")


def format_version() -> str:
    """The version, and the first digits of this file's SHA-256 as `sha256sum` prints it."""
    try:
        with open(__file__, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()[:12]
    except OSError:
        digest = "from no file"
    return f"beta9-agent {VERSION} ({digest})"


# ---- 13 Install
UNIT = """[Unit]
Description=beta9-agent, keeps this machine ready for its Beta9 gateway
Wants=network-online.target nvidia-persistenced.service
After=network-online.target nvidia-persistenced.service
# The boot is over without the gateway.
After=multi-user.target
StartLimitIntervalSec=0

[Service]
Type=notify
TimeoutStartSec=infinity
WatchdogSec=120
Restart=always
RestartSec=30
RestartPreventExitStatus=2
KillMode=mixed
TimeoutStopSec=10
ExecStart=/opt/beta9-agent/venv/bin/python -I /opt/beta9-agent/beta9_agent.py \
--config /etc/beta9-agent/agent.yaml
User=beta9-agent
StateDirectory=beta9-agent
UMask=0077
RemoveIPC=yes
PrivateMounts=yes
LimitCORE=0
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""

WRAPPER = """#!/bin/sh
exec /opt/beta9-agent/venv/bin/python -I /opt/beta9-agent/beta9_agent.py \\
    --config /etc/beta9-agent/agent.yaml "$@"
"""

# What the gateway does in k3s, and no more; and what the agent looks at there besides.
K3S_ACCOUNTS = """apiVersion: v1
kind: ServiceAccount
metadata: {name: beta9-gateway, namespace: default}
automountServiceAccountToken: false
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: beta9-gateway, namespace: default}
rules:
  - {apiGroups: [batch], resources: [jobs], verbs: [list, create, delete]}
  - {apiGroups: [""], resources: [pods], verbs: [list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: beta9-gateway, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: beta9-gateway}
subjects: [{kind: ServiceAccount, name: beta9-gateway, namespace: default}]
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: beta9-agent, namespace: default}
automountServiceAccountToken: false
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: beta9-agent}
rules:
  - {apiGroups: [""], resources: [nodes], verbs: [get, list]}
  - {apiGroups: [node.k8s.io], resources: [runtimeclasses], verbs: [get, list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: beta9-agent}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: beta9-agent}
subjects: [{kind: ServiceAccount, name: beta9-agent, namespace: default}]
"""

K3S_TOKEN = r"""#!/bin/sh
# Keeps this machine's k3s tokens and k3s's CA in /run/beta9-k3s, for beta9-agent. A token is made
# anew when there is none, when k3s refuses it, and when a third of its life is left. What fails
# leaves what is there. Run as root, by beta9-k3s-token.timer.
main() {
set -eu
umask 077
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
dir=/run/beta9-k3s
warn() { printf '<4>%s\n' "$1" >&2; } # a warning, by sd-daemon(3)
trap 'rm -f "$dir"/*.new' EXIT
place() { # name, text: the file is replaced in one step
    { printf '%s\n' "$2" >"$dir/$1.new"; } 2>/dev/null || {
        warn "$dir/$1 cannot be written, and stays as it is: make room in /run"
        exit 1
    }
    chgrp beta9-agent "$dir/$1.new"
    chmod 640 "$dir/$1.new"
    mv "$dir/$1.new" "$dir/$1"
}
admin() { k3s kubectl --request-timeout=8s "$@" 2>/dev/null; }
accepted() { # name: tried through a file, as others can see a command's words
    cat >"$dir/try.new" <<END
apiVersion: v1
kind: Config
current-context: x
contexts: [{name: x, context: {cluster: x, user: x}}]
clusters: [{name: x, cluster: {server: "$server", certificate-authority: $dir/ca.crt}}]
users: [{name: x, user: {tokenFile: $dir/$1}}]
END
    admin --kubeconfig "$dir/try.new" get --raw /version >/dev/null
}
renew() { # file, account
    answer='{.status.token} {.status.expirationTimestamp}'
    minted=$(admin create token "$2" -n default --duration=2160h -o "jsonpath=$answer") || {
        admin get --raw /readyz >/dev/null || exit 0 # it is not up: the agent says so
        warn "k3s makes no token for $2; trying again each minute: is it in 'k3s kubectl get sa'?"
        return 0
    }
    until=$(date -d "${minted#* }" +%s)
    place "$1" "${minted% *}"
    place "$1.renewal" "$((now + (until - now) * 2 / 3))"
}

command -v k3s >/dev/null || exit 0
cluster=$(admin config view --minify --raw -o \
    'jsonpath={.clusters[0].cluster.server} {.clusters[0].cluster.certificate-authority-data}') || :
server=${cluster% *} ca=$(printf %s "${cluster##* }" | base64 -d)
[ -n "$ca" ] || exit 0 # it was never up: the agent says so
[ "$ca" = "$(cat "$dir/ca.crt" 2>/dev/null)" ] || place ca.crt "$ca"
now=$(date +%s)
for name in gateway agent; do
    renewal=$(cat "$dir/$name-token.renewal" 2>/dev/null) || renewal=0
    if [ "$now" -ge "$renewal" ] || ! accepted "$name-token"; then
        renew "$name-token" "beta9-$name"
    fi
done
}
main
"""

K3S_TOKEN_SERVICE = """[Unit]
Description=Has k3s make the tokens that beta9-agent needs

[Service]
Type=oneshot
ExecStart=/opt/beta9-agent/k3s-token
Group=beta9-agent
RuntimeDirectory=beta9-k3s
RuntimeDirectoryMode=0750
RuntimeDirectoryPreserve=yes
TimeoutStartSec=50
LogLevelMax=warning
NoNewPrivileges=yes
ProtectSystem=full
ProtectHome=yes
PrivateTmp=yes
"""

K3S_TOKEN_TIMER = """[Unit]
Description=Looks every minute after the k3s tokens of beta9-agent

[Timer]
OnBootSec=5s
# k3s looks at its manifests every 15 s, so the accounts are there by then.
OnActiveSec=20s
OnUnitActiveSec=1min
AccuracySec=1s

[Install]
WantedBy=timers.target
"""

# Tells k3s how many cards there are. Source: NVIDIA's k8s-device-plugin.
K3S_DEVICE_PLUGIN = """apiVersion: apps/v1
kind: DaemonSet
metadata: {name: nvidia-device-plugin, namespace: kube-system}
spec:
  selector: {matchLabels: {name: nvidia-device-plugin}}
  template:
    metadata: {labels: {name: nvidia-device-plugin}}
    spec:
      priorityClassName: system-node-critical
      containers:
        - name: plugin
          image: nvcr.io/nvidia/k8s-device-plugin:v0.17.1
          securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
          volumeMounts: [{name: plugins, mountPath: /var/lib/kubelet/device-plugins}]
      volumes: [{name: plugins, hostPath: {path: /var/lib/kubelet/device-plugins}}]
"""

FILES = {"unit": UNIT, "wrapper": WRAPPER, "k3s-accounts": K3S_ACCOUNTS, "k3s-token": K3S_TOKEN,
         "k3s-token-service": K3S_TOKEN_SERVICE, "k3s-token-timer": K3S_TOKEN_TIMER,
         "k3s-device-plugin": K3S_DEVICE_PLUGIN}    # which the script has the agent itself print

K3S_FOLDER = r"""
manifests=/var/lib/rancher/k3s/server/manifests # k3s itself applies what is in there
unset KUBECONFIG # of another cluster, perhaps
mkdir -p /var/lib/rancher/k3s
( umask 077; mkdir -p "$manifests" )
"""

K3S_INSTALL = r"""fetch() { # an address into a file, over TLS
    "$base" -I -c {fetch} "$1" >"$2" || fail "$1 cannot be fetched: see the line above"
}
has_card() { [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null; }
has_plugin() { # by this script, by a chart, or by NVIDIA's operator
    [ -e "$plugin" ] ||
        k3s kubectl get daemonsets -A -o name 2>/dev/null | grep -q nvidia-device-plugin
}
runtime=/usr/bin/nvidia-container-runtime nvidia=https://nvidia.github.io/libnvidia-container
plugin=$manifests/nvidia-device-plugin.yaml
if ! command -v k3s >/dev/null; then
    if has_card && [ ! -e $runtime ]; then # before k3s, which looks for it when it starts
        step 'installing the NVIDIA container toolkit'
        if command -v apt-get >/dev/null; then
            key=/etc/apt/keyrings/nvidia-container-toolkit.asc
            mkdir -p "${key%/*}"
            fetch $nvidia/gpgkey $key
            echo "deb [signed-by=$key] $nvidia/stable/deb/\$(ARCH) /" \
                >/etc/apt/sources.list.d/nvidia-container-toolkit.list
            apt-get -qq update
            DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 install \
                nvidia-container-toolkit >/dev/null
        elif command -v dnf >/dev/null; then
            fetch $nvidia/stable/rpm/nvidia-container-toolkit.repo \
                /etc/yum.repos.d/nvidia-container-toolkit.repo
            dnf -q -y install nvidia-container-toolkit
        fi
        [ -e $runtime ] || fail 'the NVIDIA container toolkit is missing: install it'
    fi
    step 'installing k3s by its own installer'
    fetch https://get.k3s.io "$opt/k3s-installer"
    got=$(sha256sum <"$opt/k3s-installer" | cut -d ' ' -f 1) wanted={k3s_installer_sha256}
    [ "$got" = "${wanted:-$got}" ] || fail "the installer's SHA-256 is $got, not the one asked for"
    step "running the installer with SHA-256 $got"
    server='server --disable traefik --disable servicelb'
    [ -z "$hostname" ] || server="$server --tls-san $hostname"
    [ ! -e $runtime ] || server="$server --default-runtime nvidia"
    env -u K3S_URL -u K3S_TOKEN INSTALL_K3S_CHANNEL=stable INSTALL_K3S_VERSION={k3s_version} \
        INSTALL_K3S_EXEC="$server" sh "$opt/k3s-installer"
else
    step 'k3s is here already, and stays as it is'
fi
if has_card && ! has_plugin; then
    step "giving k3s NVIDIA's device plugin"
    files="$files $plugin"
    "$python" -I "$program.new" --print-file k3s-device-plugin >"$plugin.new"
fi
"""

K3S_USE = r"""step 'having k3s make the tokens of the gateway and the agent'
files="$files $manifests/beta9-agent.yaml $opt/k3s-token $unit_dir/beta9-k3s-token.service"
files="$files $unit_dir/beta9-k3s-token.timer" units="$units beta9-k3s-token.timer"
"$python" -I "$program.new" --print-file k3s-accounts >"$manifests/beta9-agent.yaml.new"
# Else k3s, which keeps a checksum, would not make the accounts again after an uninstall.
printf '# %s\n' "$(date)" >>"$manifests/beta9-agent.yaml.new"
"$python" -I "$program.new" --print-file k3s-token >"$opt/k3s-token.new"
chmod 755 "$opt/k3s-token.new"
for name in service timer; do
    "$python" -I "$program.new" --print-file "k3s-token-$name" \
        >"$unit_dir/beta9-k3s-token.$name.new"
done
"""
K3S_SETTINGS = ['k3s_wait: "yes"', 'k3s_token_file: "/run/beta9-k3s/gateway-token"',
                'k3s_node_token_file: "/run/beta9-k3s/agent-token"',
                'k3s_ca_file: "/run/beta9-k3s/ca.crt"']

# Of the script, {words} in braces are replaced. All of it is one function that the last line calls,
# in one pair of braces: a pipe that breaks off anywhere runs nothing, not even half a word. Python
# runs with -I, so that nothing in the caller's folder or variables is run as root.
INSTALL = r"""#!/bin/sh
# Installs {version} as a systemd service, or upgrades it.
# Read it, then run it as root.
# The machine token is in here, or comes from BETA9_TOKEN_FILE (a path) or BETA9_TOKEN, or is there
# from before; the k3s token likewise. BETA9_HOSTNAME and BETA9_MACHINE_ID win over what is in here.
# Exit codes: 0 ready, 1 a step failed (what ran before still runs), 3 installed, but not ready yet.
# shellcheck disable=SC2086  # words are meant to be split, of $packages and $units alone
{ main() {
set -eu +a
exec </dev/null
umask 022
unset token k3s_token value
token=${BETA9_TOKEN:-} k3s_token=${BETA9_K3S_TOKEN:-}
unset BETA9_TOKEN BETA9_K3S_TOKEN
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
opt=/opt/beta9-agent etc=/etc/beta9-agent state=/var/lib/beta9-agent user=beta9-agent
unit_dir=/etc/systemd/system unit=$unit_dir/beta9-agent.service wrapper=/usr/local/bin/beta9-agent
program=$opt/beta9_agent.py units=beta9-agent.service
files="$program $etc/agent.yaml $etc/token $etc/k3s-token $unit $wrapper"
hostname=${BETA9_HOSTNAME:-{hostname}} machine_id=${BETA9_MACHINE_ID:-{machine_id}}
doing='looking around'

step() { doing=$1; printf 'beta9-agent: %s\n' "$1"; }
fail() { printf 'beta9-agent: %s\n' "$1" >&2; exit 1; }
# shellcheck disable=SC2317  # it runs at the end
clean() {
    code=$?
    rm -rf "$opt/venv.new" "$opt/k3s-installer" "$etc/token.old" "$etc/k3s-token.old"
    for file in $files; do rm -f "$file.new"; done
    [ "$code" != 0 ] && [ -n "$doing" ] || return 0
    printf 'beta9-agent: failed while %s; the lines above say why. Mend that and run this again\n' \
        "$doing" >&2
    exit 1 # whatever the child's code was
}
trap clean EXIT
catch_signals() { trap 'fail "stopped by a signal"' HUP INT PIPE TERM; }
catch_signals
back() { # to what was there before, after the agent refused what is new
    for name in $units; do
        [ -e "$unit_dir/$name.old" ] || systemctl -q disable --now "$name"
    done
    for file in $files; do
        rm -f "$file"
        [ ! -e "$file.old" ] || mv "$file.old" "$file"
    done
    [ ! -e "$opt/venv.old" ] || { rm -rf "$opt/venv"; mv "$opt/venv.old" "$opt/venv"; }
    systemctl daemon-reload
    [ ! -e "$unit" ] || systemctl restart --no-block beta9-agent
}
find_python() {
    for base in /usr/bin/python3 /usr/bin/python3.1[0-9] /usr/local/bin/python3; do
        "$base" -I -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' \
            2>/dev/null && return
    done
    return 1
}
read_token() { # the first line of a file, into $value
    [ -r "$1" ] || fail "the token file $1 cannot be read: check its path"
    IFS= read -r value <"$1" || : # without a line end
    [ -n "$value" ] || fail "the token file $1 is empty: write the token into it"
}
write_token() { # name, token
    [ -n "$2" ] || return 0
    ( umask 077; printf '%s\n' "$2" >"$etc/$1.new" )
    chown "root:$user" "$etc/$1.new"
    chmod 640 "$etc/$1.new"
}

[ "$(id -u)" = 0 ] || fail 'this must run as root: pipe it into sudo sh, or ssh root@... sh'
[ -d /run/systemd/system ] || fail 'systemd does not run here: start the agent by hand instead'
[ -z "${BETA9_TOKEN_FILE:-}" ] || { read_token "$BETA9_TOKEN_FILE"; token=$value; }
[ -z "${BETA9_K3S_TOKEN_FILE:-}" ] || { read_token "$BETA9_K3S_TOKEN_FILE"; k3s_token=$value; }
unset BETA9_TOKEN_FILE BETA9_K3S_TOKEN_FILE BETA9_HOSTNAME BETA9_MACHINE_ID
[ -n "$token" ] || token={token}
[ -n "$k3s_token" ] || k3s_token={k3s_token}
[ "$token" != '{hidden}' ] || token=
[ "$k3s_token" != '{hidden}' ] || k3s_token=
[ -n "$token" ] || [ -s "$etc/token" ] ||
    fail 'the machine token is missing: run this by sudo BETA9_TOKEN_FILE=token sh'
case $hostname$machine_id in *[!A-Za-z0-9._:-]*)
    fail 'BETA9_HOSTNAME is not a host or IP, or BETA9_MACHINE_ID not 8 hex characters: mend it' ;;
esac

if ! find_python; then
    step 'installing Python'
    if command -v apt-get >/dev/null; then
        apt-get -qq update || : # another one may hold its lock, at a first boot
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 install \
            python3-venv ca-certificates >/dev/null
    elif command -v dnf >/dev/null; then
        dnf -q -y install python3.11
    fi
    find_python || fail 'Python 3.10 or newer with its venv module is missing: install it'
fi

step "making user $user and its folders"
id "$user" >/dev/null 2>&1 || useradd --system --user-group --home-dir "$state" \
    --shell /usr/sbin/nologin "$user"
mkdir -p "$opt" "$etc" "${wrapper%/*}"
chown root:root "$opt" "$etc"
chmod 755 "$opt" "$etc"
{tunnel}
step 'unpacking the agent'
{payload}
[ "$(sha256sum <"$program.new" | cut -d ' ' -f 1)" = {sha256} ] ||
    fail 'the file is not the one whose SHA-256 is in this script: print the script anew'

python=$opt/venv/bin/python
packages='{packages}'
if [ "$(cat "$opt/venv/packages" 2>/dev/null)" != "$base $packages" ] ||
        ! "$python" -I -c 'import psutil, pynvml, requests, yaml' 2>/dev/null; then
    step 'installing its Python packages'
    python=$opt/venv.new/bin/python
    rm -rf "$opt/venv.new"
    "$base" -I -m venv "$opt/venv.new"
    "$python" -I -m pip install -q --no-cache-dir --disable-pip-version-check --retries 10 $packages
    printf '%s\n' "$base $packages" >"$opt/venv.new/packages"
fi
chown -R root:root "$opt"
chmod -R go-w,a+rX "$opt"
case $("$python" -I "$program.new" --version) in
*'({hash})') ;;
*) fail 'the agent does not start: see the line above' ;;
esac

step 'writing settings and tokens'
cat >"$etc/agent.yaml.new" <<'BETA9_END'
{settings}
BETA9_END
[ -z "$hostname" ] || printf 'hostname: "%s"\n' "$hostname" >>"$etc/agent.yaml.new"
[ -z "$machine_id" ] || printf 'machine_id: "%s"\n' "$machine_id" >>"$etc/agent.yaml.new"
write_token token "$token"
write_token k3s-token "$k3s_token"
[ ! -e "$etc/k3s-token" ] && [ ! -e "$etc/k3s-token.new" ] ||
    grep -q '^k3s_token_file:' "$etc/agent.yaml.new" ||
    printf 'k3s_token_file: "%s"\n' "$etc/k3s-token" >>"$etc/agent.yaml.new"
set -- --dry-run --config "$etc/agent.yaml.new"
[ ! -e "$etc/token.new" ] || set -- "$@" --token-file "$etc/token.new"
[ ! -e "$etc/k3s-token.new" ] || set -- "$@" --k3s-token-file "$etc/k3s-token.new"
runuser -u "$user" -- env -i "$python" -I "$program.new" "$@" >/dev/null ||
    fail 'the agent refuses these settings: see the line above, then print the script anew'
"$python" -I "$program.new" --print-file unit >"$unit.new"
"$python" -I "$program.new" --print-file wrapper >"$wrapper.new"
chmod 755 "$wrapper.new"
{k3s}
step 'putting it in place and starting it'
rm -rf "$opt/venv.old"
for file in $files; do
    rm -f "$file.old"
    [ ! -e "$file" ] || ln "$file" "$file.old"
done
trap '' HUP INT PIPE TERM # all or nothing
if [ -e "$opt/venv.new" ]; then
    [ ! -e "$opt/venv" ] || mv "$opt/venv" "$opt/venv.old"
    mv "$opt/venv.new" "$opt/venv"
fi
for file in $files; do
    [ ! -e "$file.new" ] || mv "$file.new" "$file"
done
catch_signals
systemctl daemon-reload
systemctl -q enable $units
systemctl restart --no-block $units
{authorize}
case $0 in /var/lib/cloud/*) step 'started: beta9-agent --status tells more'; exit 0 ;; esac

step 'waiting until it is ready, for about a minute'
tries=0
while [ "$tries" -lt 60 ]; do
    sleep 1
    tries=$((tries + 1))
    code=0
    shown=$("$wrapper" --status) || code=$?
    active=$(systemctl is-active beta9-agent) || : # activating, until the new one is ready
    [ "$code $active" != '0 active' ] || break
    if [ "$active" = failed ]; then # by its exit code 2 alone: after others it is started again
        journalctl -q -n 5 -o cat -u beta9-agent >&2
        back
        fail 'the agent refuses these settings, so what was before is back: see the lines above'
    fi
done
printf '%s\n' "$shown"
[ "$code $active" = '0 active' ] || {
    [ "$code" != 3 ] || journalctl -q -n 5 -o cat -u beta9-agent
    step 'installed but not ready, see above; it goes on trying'
    doing=
    exit 3
}
}
main; exit; }
"""

# Put into it with --ssh: before the agent is unpacked, and after it is started.
INSTALL_TUNNEL = r"""
step 'looking after ssh and its key'
ssh=$state/.ssh known_hosts={known_hosts} new_key=
install -d -m 755 -o "$user" -g "$user" "$state"
runuser -u "$user" -- mkdir -p -m 700 "$ssh"
[ -n "$known_hosts" ] || [ -s "$ssh/known_hosts" ] || fail {unknown_host}
command -v ssh-keygen >/dev/null ||
    dnf -q -y install openssh-clients 2>/dev/null || {
    apt-get -qq -o DPkg::Lock::Timeout=300 update
    apt-get -qq -y -o DPkg::Lock::Timeout=300 install openssh-client >/dev/null
}
[ -e "$ssh/id_ed25519" ] || new_key=1
# shellcheck disable=SC2016  # for that shell
runuser -u "$user" -- sh -euc 'umask 077; cd "$1"; chmod 700 .
    [ -e id_ed25519 ] || ssh-keygen -q -t ed25519 -N "" -C beta9-agent -f id_ed25519
    [ -z "$2" ] || grep -qxF "$2" known_hosts 2>/dev/null || printf "%s\n" "$2" >>known_hosts
    ' sh "$ssh" "$known_hosts"
"""
INSTALL_AUTHORIZE = r"""if [ -n "$new_key" ]; then
    step {append_there}
    printf '%s %s\n' {rights} "$(cat "$ssh/id_ed25519.pub")"
    doing=
    case $0 in /var/lib/cloud/*) exit 0 ;; esac
    exit 3
fi
"""

UNINSTALL = r"""#!/bin/sh
# Takes beta9-agent away: service, program, settings, tokens, state, user. Run it as root.
# k3s and the workers in it stay.
{ main() {
set -eu
exec </dev/null
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
unset KUBECONFIG # of another cluster, perhaps
fail() { printf 'beta9-agent: %s\n' "$1" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail 'this must run as root: pipe it into sudo sh'
unit=/etc/systemd/system/beta9-agent.service timer=beta9-k3s-token.timer code=0
manifest=/var/lib/rancher/k3s/server/manifests/beta9-agent.yaml
[ ! -e "$unit" ] || systemctl -q disable --now beta9-agent ||
    fail 'the service does not stop, so all is left as it is: see the line above'
if [ -e "$manifest" ]; then
    rm -f "$manifest" "$manifest.old" # first: k3s would bring back what is in it
    set -- serviceaccount/beta9-gateway serviceaccount/beta9-agent role/beta9-gateway \
        rolebinding/beta9-gateway clusterrole/beta9-agent clusterrolebinding/beta9-agent
    ! command -v k3s >/dev/null || # it never came, so there is nothing of ours in it
        k3s kubectl delete -n default --ignore-not-found --request-timeout=10s "$@" || {
        code=1
        printf 'beta9-agent: %s\n' 'k3s does not answer, so its tokens stay valid; revoke them by' \
            "k3s kubectl delete -n default --ignore-not-found $*" >&2
    }
fi
[ ! -e "${unit%/*}/$timer" ] || systemctl -q disable --now "$timer"
rm -rf "${unit%/*}"/beta9-k3s-token.* /run/beta9-k3s
rm -rf "$unit" "$unit.old" "$unit.d" /usr/local/bin/beta9-agent /usr/local/bin/beta9-agent.old \
    /opt/beta9-agent /etc/beta9-agent /var/lib/beta9-agent
systemctl daemon-reload
! id beta9-agent >/dev/null 2>&1 || userdel beta9-agent
echo 'beta9-agent: gone; the gateway forgets this machine 5 minutes after its last keepalive'
return "$code"
}
main; exit; }
"""

PACKAGES = ("requests", "urllib3", "certifi", "idna", "charset-normalizer", "psutil",
            "nvidia-ml-py", "pyyaml")


def pin_packages() -> str:
    """The packages in the versions that this interpreter runs with: what was tried is installed."""
    import importlib.metadata
    pinned = []
    for name in PACKAGES:
        try:
            pinned.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            LOG.warning("%s is not installed here, so its version is left open: %s", name,
                        how_to_install(name))
            pinned.append(name)
    return " ".join(pinned)


def fill_in(text: str, words: Mapping[str, str]) -> str:
    """The text with the {words} in it replaced; other braces stay."""
    return re.sub(r"\{([a-z0-9_]+)\}", lambda found: words.get(found[1], found[0]), text)


def format_settings(settings: Mapping[str, Setting]) -> str:
    """The settings that were given, as YAML in ASCII, without secrets and what the script adds."""
    left_out = ("hostname", "machine_id", "state_dir", "token", "token_file", "k3s_token",
                "k3s_token_file", "ssh_identity")
    lines = ['state_dir: "/var/lib/beta9-agent"', 'token_file: "/etc/beta9-agent/token"']
    lines += K3S_SETTINGS if "k3s" in settings else []
    for option in OPTIONS:
        setting = settings.get(option.name)
        given = setting is not None and setting.rank > 0
        if setting is not None and given and option.file_key and option.name not in left_out:
            is_path = option.name == "ca_file" or option.name in K3S_FILES
            text = os.path.abspath(setting.text) if is_path else setting.text
            value = text.split("\n") if option.many else text
            lines.append(f"{option.file_key}: {json.dumps(value, ensure_ascii=False)}")
    # Python's escapes are YAML's; JSON's are not, beyond 16 bits.
    return "\n".join(lines).encode("ascii", "backslashreplace").decode()


# A program for Python that fetches its argument.
FETCH = ("import sys, urllib.request as u; sys.tracebacklimit = 0;"
         " sys.stdout.buffer.write(u.urlopen(sys.argv[1], timeout=60).read(1 << 20))")


def format_k3s_steps(config: Config) -> str:
    """The commands that bring k3s and its tokens; "" without --k3s. Raises AgentError."""
    import shlex
    if config.k3s != "install" and (config.k3s_version or config.k3s_installer_sha256):
        raise AgentError("--k3s-version and --k3s-installer-sha256 go with --k3s install: add that")
    if not config.k3s:
        return ""
    if config.k3s_token or config.k3s_ca_file or config.k3s_node_token:
        raise AgentError("--k3s has k3s make its tokens and tell its root certificate: leave out"
                         " --k3s-token, --k3s-ca-file and --k3s-node-token-file")
    words = {"fetch": shlex.quote(FETCH), "k3s_version": config.k3s_version or "''",
             "k3s_installer_sha256": config.k3s_installer_sha256 or "''"}
    steps = fill_in(K3S_INSTALL, words) if config.k3s == "install" else ""
    return f"{K3S_FOLDER}{steps}{K3S_USE}"


def format_payload(program: bytes, url: str) -> str:
    """The commands that bring the agent: from within the script, or from an address."""
    import base64
    import bz2
    import shlex
    if url:
        return f'"$base" -I -c {shlex.quote(FETCH)} {shlex.quote(url)} >"$program.new"'
    # bzip2 and base85, by Python's own modules: gzip and base64 would take user-data over its
    # common limit of 64 KiB.
    code = ("import base64, bz2, sys; text = ''.join(sys.stdin.read().split());"
            " sys.stdout.buffer.write(bz2.decompress(base64.b85decode(text)))")
    packed = base64.b85encode(bz2.compress(program)).decode()
    lines = [packed[at:at + 200] for at in range(0, len(packed), 200)]
    return "\n".join([f'"$base" -I -c {shlex.quote(code)} >"$program.new" <<\'BETA9_END\'', *lines,
                      "BETA9_END"])


def find_known_hosts(config: Config) -> str:
    """What this user's known_hosts says of the host of --ssh; "" for nothing."""
    _, host, port = split_place(config.ssh)
    name = host if port in ("", "22") else f"[{host}]:{port}"
    said = ""
    with contextlib.suppress(OSError):
        child = start_child(["ssh-keygen", "-F", name])
        said = child.communicate(timeout=HOST_DEADLINE)[0].decode(errors="replace")
    known = re.findall(r"^(?!#)\S+ (?:ssh|ecdsa|sk)-\S+ .*$", said, re.MULTILINE)
    if not known:
        LOG.warning("%s is not in known_hosts here, so it must be in that of the machine: use"
                    " `ssh %s` once, compare fingerprints, then print this again", name,
                    f"-p {port or 22} {host}")
    return "\n".join(known)


def format_tunnel(config: Config) -> dict[str, str]:
    """The two pieces of the script for --ssh, both "" without."""
    import shlex
    if not config.ssh:
        return {"tunnel": "", "authorize": ""}
    if config.ssh_identity:
        LOG.warning("--ssh-identity is not in this script: each machine gets a key of its own")
    user, host, _ = split_place(config.ssh)
    remedy = explain_ssh("Host key verification failed", config)[1]
    words = {
        "known_hosts": find_known_hosts(config),
        "unknown_host": remedy.replace("~", "/var/lib/beta9-agent").replace("`", '"'),
        "append_there": f"installed; append this line to authorized_keys of"
                        f" {user or 'beta9-agent'} on {host}, and it will be ready:",
        # Without a permitlisten any port there could be listened on; nobody wants port 1.
        "rights": f'restrict,port-forwarding,permitopen="{config.ssh_gateway}",permitlisten='
                  f'"{config.ssh_reverse or "localhost:1"}",command="/bin/false"'}
    quoted = {name: shlex.quote(text) for name, text in words.items()}
    return {"tunnel": fill_in(INSTALL_TUNNEL, quoted),
            "authorize": fill_in(INSTALL_AUTHORIZE, quoted)}


def warn_of_script(config: Config) -> None:
    """Warns of what the script holds, and of what it does not."""
    if config.machine_id:
        LOG.warning("--machine-id is in this script: run it on one machine only, or set"
                    " BETA9_MACHINE_ID there")
    if config.state_dir:
        LOG.warning("--state-dir is left out: the service's is /var/lib/beta9-agent")
    if config.ca_file:
        LOG.warning("%s must be on the machine too, where its service can read it: not under /home,"
                    " /root or /tmp", os.path.abspath(config.ca_file))
    if not (config.k3s or config.k3s_token):
        LOG.warning("no work will come without a k3s token: give --k3s use or --k3s install, or"
                    " --k3s-token-file, unless the machine has one from before")
    if config.token or config.k3s_token:
        LOG.warning("on a terminal tokens are not shown: print this into a file or a pipe"
                    if sys.stdout.isatty() else
                    "what is printed holds the tokens: keep it as secret as they are")


def print_install(config: Config, settings: Mapping[str, Setting]) -> None:
    """Prints the script that installs this very file with these settings. Needs no network.

    Raises AgentError where there is no file.
    """
    import shlex
    hidden = "…"
    try:
        with open(__file__, "rb") as file:
            program = file.read()
    except OSError:
        raise AgentError("this program is in no file that the script could carry: save it as one,"
                         " then run that") from None
    digest = hashlib.sha256(program).hexdigest()

    def quoted(secret: Secret | None) -> str:
        if secret is None:
            return "''"
        return shlex.quote(hidden if sys.stdout.isatty() else secret.reveal())

    words = {"version": format_version(), "hostname": config.hostname or "",
             "machine_id": config.machine_id or "", "token": quoted(config.token),
             "k3s_token": quoted(config.k3s_token), "hidden": hidden, "sha256": digest,
             "hash": digest[:12], "packages": pin_packages(), "settings": format_settings(settings),
             "payload": format_payload(program, config.fetch_from or ""),
             "k3s": format_k3s_steps(config), **format_tunnel(config)}
    warn_of_script(config)
    script = fill_in(INSTALL, words)
    if len(script.encode()) >= USER_DATA_LIMIT:
        LOG.info("for user-data, which may have %d bytes, print this through `gzip`, which"
                 " cloud-init undoes, or give --fetch-from", USER_DATA_LIMIT)
    print(script, end="")


# ---- 14 Entry
def run_agent(config: Config) -> int:
    """Keeps this machine; the exit code."""
    notify_systemd("WATCHDOG=1")    # from now on systemd ends a driver's library that hangs
    alarm = Alarm()
    stop = StopFlag(alarm)
    alarm.install()
    stop.install()
    tunnel = None
    if config.dev:
        port = start_stand_in(StandIn(config.token.reveal(), config.pool_name))
        config.gateway_host, config.gateway_port, config.tls = "127.0.0.1", port, False
        state = State(config.machine_id or os.urandom(4).hex())
    else:
        state = open_state(config)
    if config.ssh:
        tunnel = Tunnel(config, state)
        config.gateway_socket = tunnel.path
    return Agent(config, state, GatewayClient(config, alarm), tunnel).run(stop)


# One of them, or none to keep the machine; and what goes with which.
ACTIONS = ("dry_run", "check", "status", "print_install", "print_file", "print_uninstall",
           "version", "help")
MODIFIERS = {"json": ("check", "status"), "watch": ("status",), "fetch_from": ("print_install",),
             "k3s": ("print_install",), "k3s_version": ("print_install",),
             "k3s_installer_sha256": ("print_install",)}


def choose_action(settings: Mapping[str, Setting]) -> str:
    """The action that is asked for, "" to keep the machine. Raises AgentError."""
    given = [f"--{name.replace('_', '-')}" for name in ACTIONS if name in settings]
    if given and ("once" in settings or "dev" in settings):
        given.append("--once" if "once" in settings else "--dev")
    if len(given) > 1:
        raise AgentError(f"{' and '.join(given)} are different actions: give one of them")
    action = given[0][2:].replace("-", "_") if given else ""
    for name, actions in MODIFIERS.items():
        if name in settings and action not in actions:
            flags = " or ".join(f"--{each.replace('_', '-')}" for each in actions)
            raise AgentError(f"--{name.replace('_', '-')} goes with {flags}: add that")
    return action


def run_action(argv: list[str], redactor: Redactor) -> int:
    """Does what the settings ask for; the exit code."""
    settings = read_settings(argv, os.environ)
    action = "help" if "help" in settings else choose_action(settings)
    if action in ("help", "version"):
        print(build_command_line().format_help() if action == "help" else format_version())
        return 0
    if action == "print_uninstall":
        print(UNINSTALL, end="")
        return 0
    if action == "print_file":
        name = settings[action].text
        if name not in FILES:
            raise AgentError(f"--print-file: the script needs no file '{printable(name, 60)}': give"
                             f" one of {', '.join(FILES)}")
        print(FILES[name], end="")
        return 0
    config = build_config(settings, redactor)
    if action == "check":
        return show_check(config, bool(config.json))
    for problem in config.problems:
        LOG.error("%s", problem)
    if config.problems:
        return 2
    if config.debug:
        LOG.setLevel(logging.DEBUG)
    if action == "status":
        return show_status(config, bool(config.json), bool(config.watch))
    if action == "dry_run":
        show_dry_run(config)
    elif action == "print_install":
        print_install(config, settings)
    else:
        return run_agent(config)
    return 0


def main(argv: list[str]) -> int:
    """Runs the program; the exit code."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # without a traceback
    while os.open(os.devnull, os.O_RDWR) < 3:   # a closed one would be the next file that is opened
        pass
    os.environ.pop("SSLKEYLOGFILE", None)       # ssl would write its keys there
    redactor = Redactor()
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace")    # type: ignore[union-attr]
    LOG.handlers = [LogLines(redactor)]
    LOG.setLevel(logging.INFO)
    code = 1
    try:
        code = run_action(argv, redactor)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        LOG.error("the Python package %s is missing: %s, then start again", error.name,
                  how_to_install("requests", "psutil", "nvidia-ml-py", "pyyaml"))
    except AgentError as error:
        LOG.error("%s", error)
        code = error.exit_code
    except BrokenPipeError:     # whoever read the answer has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        LOG.error("%s", error)
    except Exception as error:
        LOG.error("unexpected %s: report it with what --debug prints", type(error).__name__)
        LOG.debug("where", exc_info=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
