#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests", "psutil", "nvidia-ml-py", "pyyaml"]
# ///
"""Registers this machine with a Beta9 gateway and keeps it ready for work until told to stop.

Read this file before you run it: the tokens that you give it let the gateway run anything on this
machine. Rooms 1 to 9 are the agent, whose heart is `keep`, at the end of room 9; rooms 10 to 13 are
what a person calls by hand. Functions and classes call only what stands above them.

A machine that is only registered gets no work: its first keepalive makes it ready. The lease holds
the registration that the gateway has confirmed. Each turn of the loop works out the registration
that the gateway should have, and acts on the difference:

    settings -> facts (host, k3s, token files) -> offer -> wanted registration
                                                               |
    wait <- lease <- outcome <- register, where the lease holds another one, or none;
                                else keepalive, when it is due

Connects to  the gateway you name, or the proxy that the environment names for it: POST
             /api/v1/machine/register (with the k3s token) and /api/v1/machine/keepalive; your
             DNS, for its name; with --ssh the gateway through ssh alone.
             This machine's k3s, at --k3s-url and through no proxy: with --k3s-ca-file for the
             worker pods and the node; else for a TLS handshake, without any token.
             --check asks both for more, and also connects to --hostname, and to the addresses that
             the gateway names for workers
Listens      nowhere (--dev: on 127.0.0.1)
Reads        the files you name, its state folder, /etc/machine-id, the hardware through psutil
             and NVML; ssh reads its own configuration and keys
Writes       its state folder, log lines to standard error and systemd, answers to standard output
Starts       no other program; with --ssh the system's ssh, which does what its own configuration
             says besides
"""
# ---- 1 What this program does, sends, writes and runs
import argparse
import base64
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
import sys
import time
import urllib.parse
from _thread import allocate_lock, start_new_thread
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple

if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed: install one, or use `uv run`, which brings its own")

# ---- 2 Vocabulary
VERSION = "0.3.0"
REGISTER, KEEPALIVE = "register", "keepalive"
FILE_LIMIT = 64 * 1024          # bytes: of a token, of settings, of a state file
ANSWER_LIMIT = 64 * 1024        # bytes
CONFIG_LIMIT = 4 * 1024 * 1024  # bytes, with the gateway's configuration: 117 kB were seen
REQUEST_DEADLINE = 10.0         # seconds, for a whole request from the name look-up on
SSH_DEADLINE = 25.0             # seconds, for the first request through a new ssh
ADDRESS_DEADLINE = 2.5          # seconds, to connect to one address while there are others
HOST_DEADLINE = 5.0             # seconds, for one question to driver, disk or k3s
K3S_PATIENCE = 1.0              # seconds that the loop waits for k3s and the token files
LOOK_PERIOD = 5.0               # seconds between two looks at them
STOP_DEADLINE = 1.0             # seconds that a stop leaves to what is under way
LEAVE_DEADLINE = 1.8            # seconds from the stop to the end of the last request
DENIED_PATIENCE = 60.0          # seconds: a 401 can be trouble of the gateway's database
WORKER_PATIENCE = 600.0         # seconds: the gateway counts a worker for as long as that
PENDING_PATIENCE = 120.0        # seconds that a worker may be Pending
QUIET = 600.0                   # seconds between lines about the same thing
TICK = 0.5                      # seconds between two looks at the stop flag
LOG = logging.getLogger("beta9-agent")


class AgentError(Exception):
    def __init__(self, text: str, exit_code: int = 2) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Secret:
    """A token. It shows its length; the text leaves through `reveal` alone."""

    def __init__(self, text: str) -> None:
        self.__text = text

    def __repr__(self) -> str:
        return f"set ({len(self.__text)} characters)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.__text == self.__text

    def reveal(self) -> str:
        return self.__text


class Kind(enum.Enum):
    """What a call to the gateway came to."""

    OK = enum.auto()
    TROUBLE = enum.auto()       # passing, as far as anybody can tell
    FORGOTTEN = enum.auto()     # the gateway does not know this machine any more
    UNSAFE = enum.auto()        # its name leads to a public address, in cleartext
    DENIED = enum.auto()        # 401
    FORBIDDEN = enum.auto()     # 403
    REFUSED = enum.auto()       # the gateway cannot use a machine that is configured so


EXIT_CODES = {Kind.DENIED: 77, Kind.FORBIDDEN: 77, Kind.REFUSED: 78}     # any other failure: 69


class Outcome(NamedTuple):
    kind: Kind
    text: str = ""
    remedy: str = ""
    ttl: float | None = None        # seconds
    retry_after: float = 0.0        # seconds, 0 for none
    placement: str = ""             # why no work will come, as far as a registration's answer tells


class Offer(NamedTuple):
    """A capacity: millicores, MiB, GPUs."""

    cpu: int
    memory: int
    gpu_count: int


class Registration(NamedTuple):
    """What can change in a registration; all else in it comes from the settings."""

    offer: Offer
    k3s_token: Secret | None
    private_ip: str


class Lease(NamedTuple):
    """What the gateway knows of this machine, and when the next call is due, in seconds."""

    due: float
    ttl: float = 299.0                          # a guess, until the gateway tells
    registered: Registration | None = None      # as the gateway has confirmed it
    unanswered: Offer | None = None             # sent since then: the most that may be registered
    confirmed_at: float = -math.inf             # by the last answer that renewed the TTL
    kept_at: float | None = None                # by the last keepalive
    register_failed: bool = False               # the last call was a registration, and it failed
    failing_since: float | None = None          # until a keepalive while no registration is owed
    denied_since: float | None = None           # by 401, or by a name that is public for now


class Promise(NamedTuple):
    """How many GPUs workers may hold, and since when no worker has been seen.

    Lowering `gpu_count` below what workers hold, with CPU on offer, makes a counter of the gateway
    wrap around, which then starts workers without end and cordons the whole pool (measured).
    """

    gpu_count: int                      # that were offered with CPU last
    quiet_since: float | None = None    # no CPU is offered, the gateway knows it, no worker is seen
    from_before: bool = False           # read from disk: of the process before this one


class Gpu(NamedTuple):
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


class Worker(NamedTuple):
    """A worker's pod: its status as `kubectl get pods` shows it, and since when it has that."""

    status: str
    since: float


class K3sView(NamedTuple):
    """What a look at k3s found. None is unknown."""

    fault: str = ""                                 # why no worker can run, with the remedy
    workers: Mapping[str, Worker] | None = None     # by the names of the pods
    node: Offer | None = None                       # what its node can give to workers
    notice: str = ""                                # what a person should know besides
    token_refused: bool = False


class Steady:
    """Something that is looked at again and again: a change counts once two looks agree."""

    def __init__(self) -> None:
        self.value: Any = None      # what is believed; None before the first look
        self.last: Any = None

    def observe(self, new: Any) -> Any:
        if self.value is None or new == self.last:
            self.value = new
        self.last = new
        return self.value


def format_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Config(argparse.Namespace):
    """The checked settings by their names in OPTIONS, and where each came from."""

    @property
    def gateway(self) -> str:
        place = f"{format_host(self.gateway_host)}:{self.gateway_port}"
        return f"https://{place}" if self.tls else f"http://{place}"


# ---- 3 Decisions
Draw = Callable[[float, float], float]      # a random number between two others


def printable(value: object, limit: int = 200) -> str:
    """One line of at most `limit` characters, control characters spelled out."""
    text = str(value)[:limit]
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)[:limit]


def explain_error(error: BaseException) -> str:
    """What went wrong, without the system's number for it."""
    return printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def parse_json(body: bytes | str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def as_mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def number_in(mapping: Mapping[str, Any], name: str) -> float | None:
    value: Any = mapping.get(name)      # True is no number, though Python has it be one
    return value if type(value) in (int, float) and abs(value) < 2 ** 63 else None


# Loopback, RFC 1918, shared addresses (Tailscale's), link-local, and the same in IPv6.
PRIVATE_NETWORKS = [ipaddress.ip_network(network) for network in (
    "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10",
    "169.254.0.0/16", "::1/128", "fc00::/7", "fe80::/10")]


def is_private(address: str) -> bool:
    return any(ipaddress.ip_address(address) in network for network in PRIVATE_NETWORKS)


def is_loopback(host: str) -> bool:
    return re.fullmatch(r"(?i)localhost\.?|127\.[0-9.]+|[0:]+1", host) is not None


def describe_body(body: bytes) -> str:
    """An answer for the log; not one with the gateway's configuration, which holds its secrets."""
    return "not shown" if b"config" in body else printable(body.decode(errors="replace"), 300)


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


NEW_TOKEN = ("Get a new one from the gateway's operator, who makes it with `beta9 machine create"
             " --pool {config.pool_name}`")
TRY_HEALTH = ("Check --gateway-host and --gateway-port;"
              " `curl {config.gateway}/api/v1/health` should answer")

# The meaning of answers that confirm nothing, by the first pattern that matches a line such as
# "keepalive 500 machine not found": the gateway says 500 for a bad pool name, for a machine that it
# forgot and for real trouble alike. What says nothing is no gateway.
ANSWERS = (
    ("keepalive .*(machine_expired|machine.not.found)", Kind.FORGOTTEN,
     "The gateway does not know this machine any more, as after a restart of its Redis"),
    (".*invalid.pool", Kind.REFUSED,
     "The gateway has no pool {config.pool_name}: check --pool-name"),
    (".*(invalid (machine|gpu|payload)|are required)", Kind.REFUSED,
     "Look at what is sent with --dry-run"),
    (".*unable to create remote config|keepalive 404 not found", Kind.REFUSED,
     "This is an upstream gateway, without keepalive route: the Beta9 fork is needed"),
    (r"\S+ 401 \S|.*invalid_token", Kind.DENIED,
     "The token is unknown or disabled, or the gateway's database is away. " + NEW_TOKEN),
    (r"\S+ 403 \S", Kind.FORBIDDEN,
     "This is a token of another kind, not a machine's. " + NEW_TOKEN),
    (r"\S+ 40[137]", Kind.TROUBLE,
     "That is no answer of the gateway, but of something in between. " + TRY_HEALTH),
    (r"\S+ 3", Kind.TROUBLE, "Redirects are never followed: give the address that it leads to,"
     " and --tls for https"),
    (r"\S+ (5|429)", Kind.TROUBLE, "The gateway, its Redis or database has trouble. " + TRY_HEALTH),
    ("", Kind.TROUBLE, "Is this the gateway? " + TRY_HEALTH),
)


def explain_answer(call: str, answer: Answer, config: Config) -> Outcome:
    fields, headers = as_mapping(parse_json(answer.body)), answer.headers
    said = " ".join(str(fields[key]) for key in ("error_code", "message", "suggestion")
                    if fields.get(key))
    line = f"{call} {answer.status} {said}".lower()
    kind, remedy = next(row[1:] for row in ANSWERS if re.match(row[0], line, re.DOTALL))
    if 300 <= answer.status < 400:
        said = f"a redirect to {headers.get('Location')}"
    said = said or f"{headers.get('Content-Type')}: {describe_body(answer.body) or 'empty'}"
    wait = headers.get("Retry-After", "") if answer.status in (429, 503) else ""
    return Outcome(kind, f"the answer was {answer.status}, {printable(said, 300)}",
                   remedy.format(config=config),
                   retry_after=float(wait) if re.fullmatch("[0-9]{1,9}", wait, re.ASCII) else 0.0)


def explain_placement(fields: Mapping[str, Any], config: Config) -> str:
    """Why no work will come, with the remedy, by the configuration that a registration's answer
    holds; "" where that says nothing against it.
    """
    if "config" in fields and fields["config"] is None:
        return ("the gateway cannot place workers anywhere: set tailscale.directRedisHost in its"
                " configuration, or let it log in to a tailnet")
    pools = as_mapping(as_mapping(as_mapping(fields.get("config")).get("worker")).get("pools"))
    pool = as_mapping(pools.get(config.pool_name))
    for name, own, remedy in (
            ("mode", "external", "give a pool of mode external"),
            ("provider", config.provider_name, "give its provider as --provider-name")):
        value = pool.get(name) or own
        if value != own:
            return (f"pool {config.pool_name} is of {name} {printable(value, 60)}, so the gateway"
                    f" never looks at this machine: {remedy}")
    return ""


def classify(call: str, answer: Answer, config: Config, machine_id: str) -> Outcome:
    """What the gateway's answer to a register or keepalive means. Source: gateway-api."""
    said = parse_json(answer.body)
    fields = as_mapping(said)
    state = as_mapping(fields.get("machine_state"))
    confirmed = (answer.status == 200 and isinstance(said, dict) and not fields.get("error_code")
                 and (call == REGISTER or fields.get("status") == "ok")
                 and state.get("machine_id", machine_id) == machine_id)
    if not confirmed:
        return explain_answer(call, answer, config)
    ttl = number_in(state, "ttl_seconds")
    sane = ttl is not None and 1 <= ttl <= 86400
    return Outcome(Kind.OK, ttl=ttl if sane else None, placement=explain_placement(fields, config))


def backoff(failing_for: float, cap: float, draw: Draw) -> float:
    """Seconds to the next try: full jitter, whose ceiling grows with the outage. Drawn after the
    cap, so that a fleet stays spread when all have reached it.
    """
    ceiling = min(max(4.0, min(failing_for, 60.0)), cap)
    return draw(min(1.0, ceiling / 4), ceiling)


def interval_of(lease: Lease, config: Config) -> float:
    return min(float(config.keepalive_interval), lease.ttl / 3)


def deadline_of(call: str, lease: Lease, config: Config) -> float:
    """Seconds that a call may take. The gateway can need 5 for any registration."""
    if call == REGISTER:
        return REQUEST_DEADLINE
    return max(2.0, min(REQUEST_DEADLINE, interval_of(lease, config)))


def most_of(offer: Offer, other: Offer | None) -> Offer:
    return offer if other is None else Offer(*map(max, offer, other))


def next_call(lease: Lease, wanted: Registration, now: float) -> str:
    """Keepalive where the gateway knows the wanted registration within its TTL, else register.

    After a registration that failed comes a keepalive, so that a known machine stays ready; but not
    where the gateway would place more here than there is room for.
    """
    if lease.registered is None or now - lease.confirmed_at > lease.ttl:
        return REGISTER         # the gateway does not know this machine
    if lease.registered == wanted and lease.unanswered is None:
        return KEEPALIVE        # it knows all
    most = most_of(lease.registered.offer, lease.unanswered)
    too_large = most.cpu > wanted.offer.cpu or most.gpu_count > wanted.offer.gpu_count
    return KEEPALIVE if lease.register_failed and not too_large else REGISTER


def next_due(lease: Lease, call: str, lost_ssh: bool, now: float) -> float:
    """When the next call is due. What the gateway does not know yet is told at once, and a lost ssh
    is replaced soon, as the gateway's way to k3s can go through it; in an outage all waits.
    """
    if lease.failing_since is not None:
        return lease.due
    if call == REGISTER:
        return now
    return min(lease.due, lease.confirmed_at + LOOK_PERIOD) if lost_ssh else lease.due


def lease_after_failure(lease: Lease, call: str, wanted: Registration, outcome: Outcome,
                        now: float, config: Config, draw: Draw) -> Lease:
    """The lease after a call that failed."""
    since = now if lease.failing_since is None else lease.failing_since
    denied_since = None
    if outcome.kind in (Kind.DENIED, Kind.UNSAFE):
        denied_since = now if lease.denied_since is None else lease.denied_since
    forgotten = outcome.kind is Kind.FORGOTTEN
    pause = backoff(now - since, interval_of(lease, config) * 1.1, draw)
    if outcome.retry_after > 0:
        pause = min(outcome.retry_after, 75.0, lease.ttl / 4) + draw(0.0, min(25.0, lease.ttl / 12))
    elif forgotten and lease.failing_since is None:
        pause = 0.0     # registers at once; with pauses where it is forgotten again and again
    if forgotten:
        lease = lease._replace(registered=None, unanswered=None)
    if call == REGISTER:
        lease = lease._replace(unanswered=most_of(wanted.offer, lease.unanswered))
    return lease._replace(
        due=now + pause, register_failed=call == REGISTER, failing_since=since,
        denied_since=denied_since)


def lease_after(lease: Lease, call: str, wanted: Registration, outcome: Outcome, now: float,
                config: Config, draw: Draw) -> Lease:
    """What a call that ended so at `now` makes of the lease: the whole schedule.

    All well: register, keepalive at once, then one each interval. While a registration fails: a
    keepalive, register again, ..., with pauses; `failing_since` stays until one is taken.
    """
    lease = lease._replace(ttl=outcome.ttl or lease.ttl)
    if outcome.kind is not Kind.OK:
        return lease_after_failure(lease, call, wanted, outcome, now, config, draw)
    interval = interval_of(lease, config)
    lease = lease._replace(confirmed_at=now, denied_since=None, register_failed=False)
    if call == REGISTER:    # and kept alive at once
        return lease._replace(due=now, registered=wanted, unanswered=None)
    owed = lease.registered != wanted or lease.unanswered is not None
    if owed and lease.failing_since is not None:
        # Kept alive, but the registration that failed is still owed: on with the backoff.
        pause = backoff(now - lease.failing_since, interval * 1.1, draw)
        return lease._replace(due=now + pause, kept_at=now)
    # The first pause is random, so that machines started together spread out.
    pause = interval * (draw(0.1, 1.0) if lease.kept_at is None else draw(0.9, 1.1))
    due = min(lease.due, now) + pause       # from when it was due, or was early, with a new ssh
    if due <= now:                          # after a suspend: what was missed is not made up
        due = now + pause
    return lease._replace(due=due, kept_at=now, failing_since=None)


def patience_ends(lease: Lease, started_at: float, config: Config) -> float:
    """When to give up; never after the first ready."""
    if lease.kept_at is not None:
        return math.inf
    timeout = math.inf if config.startup_timeout is None else config.startup_timeout
    denied = math.inf if lease.denied_since is None else lease.denied_since + DENIED_PATIENCE
    return min(started_at + timeout, denied)


def exit_code_after(outcome: Outcome, lease: Lease, started_at: float, now: float,
                    config: Config) -> int | None:
    """The exit code of a failure; None: go on, as always after the first ready."""
    hopeless = config.once or outcome.kind in (Kind.FORBIDDEN, Kind.REFUSED)
    over = hopeless or now >= patience_ends(lease, started_at, config)
    failed = outcome.kind is not Kind.OK and lease.kept_at is None
    return EXIT_CODES.get(outcome.kind, 69) if failed and over else None


def offer_of(metrics: Metrics, gpus: list[Gpu] | None, before: Offer, config: Config) -> Offer:
    """What is there, under the operator's caps; a lost GPU is not. What is unknown, and what
    changed by less than 1 %, is as before. So is CPU while the GPUs are unknown: other work would
    fill the machine.
    """
    cpu = None if gpus is None else metrics.total_cpu_available
    count = None if gpus is None else sum(gpu.name is not None for gpu in gpus)
    values = []
    for found, old, cap in (
            (cpu, before.cpu, config.max_cpu),
            (metrics.total_memory_available, before.memory, config.max_memory),
            (count, before.gpu_count, config.max_gpus)):
        value = min(old if found is None else found, math.inf if cap is None else cap)
        values.append(old if abs(value - old) < old / 100 else int(value))
    return Offer(*values)


NO_CPU = "no worker can run here and no CPU is offered"
TRY_PLUGIN = ("is NVIDIA's device plugin in `kubectl get pods -A`, with MIG_STRATEGY=single where"
              " MIG is on, and was nvidia-container-runtime there before k3s started?")


def fit_to_node(found: Offer, view: K3sView) -> tuple[Offer, str]:
    """No more than k3s's node can give, as an offer above it makes pods that stay Pending; and why,
    where that is fewer GPUs.
    """
    offer = found if view.node is None else Offer(*map(min, found, view.node))
    if offer.gpu_count == found.gpu_count:
        return offer, ""
    return offer, (f"k3s has {offer.gpu_count} of {found.gpu_count} GPUs for workers, and no more"
                   f" are offered: {TRY_PLUGIN}")


def explain_shortage(promise: Promise, view: K3sView) -> str:
    """Why no CPU is offered while workers may hold more GPUs than there are."""
    until = "for 10 minutes" if promise.from_before else "until a restart"
    if view.workers is not None:
        until = "until 10 minutes after the last one has ended"
    return (f"Workers may hold the others, so no work is taken {until}; drain this machine with"
            " `beta9 machine drain`")


def plan_offer(found: Offer, promise: Promise, view: K3sView, registered: Offer | None,
               now: float) -> tuple[Offer, Promise, str]:
    """What to register, what workers may hold then, and why it is not all that is there.

    k3s has a fault                     no CPU, so that the gateway places nothing
    as many GPUs as promised, or more   all of it
    fewer                               no CPU, until workers that may hold the others are gone

    `registered` is what the gateway has confirmed last.
    """
    offer, reason = fit_to_node(found, view)
    if view.fault:      # the gateway would try once a second, for ever (measured)
        return offer._replace(cpu=0), promise._replace(quiet_since=None), view.fault
    if offer.gpu_count >= promise.gpu_count:
        return offer, Promise(offer.gpu_count), reason

    # Workers may hold more GPUs than there are, until none has been seen for WORKER_PATIENCE since
    # the gateway confirmed that no CPU is offered.
    quiet_since = None
    if (registered is not None and registered.cpu == 0
            and registered.gpu_count == offer.gpu_count and not view.workers):
        quiet_since = now if promise.quiet_since is None else promise.quiet_since
    # Those that cannot be seen may be at work; those of the process before are taken to be idle.
    trusted = view.workers is not None or promise.from_before
    if trusted and quiet_since is not None and now - quiet_since >= WORKER_PATIENCE:
        return offer, Promise(offer.gpu_count), reason
    reason = reason or (f"{offer.gpu_count} GPUs are here where {promise.gpu_count} were offered:"
                        " look at `nvidia-smi`, unless --max-gpus was lowered")
    return (offer._replace(cpu=0), promise._replace(quiet_since=quiet_since),
            f"{reason}. {explain_shortage(promise, view)}")


TRY_K3S = "look at `systemctl status k3s`, and check --k3s-url and --k3s-ca-file"
TRY_ACCOUNT = "apply what --print k3s-account prints"
UNITS = {"": 1.0, "m": 0.001, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
         "Ki": 2.0 ** 10, "Mi": 2.0 ** 20, "Gi": 2.0 ** 30, "Ti": 2.0 ** 40}


def parse_quantity(text: object) -> float | None:
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([a-zA-Z]{0,2})", str(text))
    return float(found[1]) * UNITS[found[2]] if found and found[2] in UNITS else None


def find_node(body: bytes, hostname: str) -> dict[str, Any] | None:
    """This machine's node in a NodeList: the only one, or the one of its name; {} where there is no
    node at all, None where it is not known which one it is.
    """
    answer = as_mapping(parse_json(body))
    if answer.get("kind") != "NodeList":
        return None
    nodes = [as_mapping(node) for node in as_list(answer.get("items"))] or [{}]
    named = [node for node in nodes
             if as_mapping(node.get("metadata")).get("name") == hostname.lower()]
    return nodes[0] if len(nodes) == 1 else named[0] if named else None


def explain_node(node: Mapping[str, Any]) -> str:
    if not node:
        return "k3s has no node: see `kubectl get nodes` and `journalctl -u k3s`"
    spec = as_mapping(node.get("spec"))
    node_name = printable(as_mapping(node.get("metadata")).get("name"), 60)
    name = f"node {node_name}"
    if spec.get("unschedulable") is True:
        return f"{name} is cordoned: `kubectl uncordon {node_name}` ends that"
    conditions = {str(each.get("type")): each for each in map(
        as_mapping, as_list(as_mapping(node.get("status")).get("conditions")))}
    ready = conditions.get("Ready", {})
    if ready.get("status") != "True":
        state = "Unknown" if ready.get("status") == "Unknown" else "NotReady"
        why = printable(ready.get("message") or ready.get("reason") or "no reason is given", 160)
        return f"{name} is {state}, {why}: see `journalctl -u k3s`"
    for pressure in ("MemoryPressure", "DiskPressure", "PIDPressure"):
        if conditions.get(pressure, {}).get("status") == "True":
            return f"{name} has {pressure}: free some, see `kubectl describe {name}`"
    for taint in map(as_mapping, as_list(spec.get("taints"))):
        if taint.get("effect") in ("NoSchedule", "NoExecute"):
            text = printable(f"{taint.get('key')}:{taint['effect']}", 100)
            return f"{name} has the taint {text}: `kubectl taint {name} {text}-` ends that"
    return ""


def parse_allocatable(node: Mapping[str, Any]) -> Offer | None:
    given = as_mapping(as_mapping(node.get("status")).get("allocatable"))
    cpu, memory = parse_quantity(given.get("cpu")), parse_quantity(given.get("memory"))
    gpus = parse_quantity(given.get("nvidia.com/gpu", "0"))
    if cpu is None or memory is None or gpus is None:
        return None
    return Offer(int(cpu * 1000), int(memory / 2 ** 20), int(gpus))


AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "y": 365 * 86400}


def parse_workers(body: bytes, before: Mapping[str, Worker],
                  now: float) -> dict[str, Worker] | None:
    """The pods in a Table of the Kubernetes API, each with the time when it entered its present
    state, as far as is known; None where it is no Table.
    """
    table = as_mapping(parse_json(body))
    if table.get("kind") != "Table":
        return None
    columns = [str(as_mapping(column).get("name"))
               for column in as_list(table.get("columnDefinitions"))]
    workers = {}
    for row in as_list(table.get("rows"))[:1000]:
        cells = dict(zip(columns, as_list(as_mapping(row).get("cells"))))
        name, status = printable(cells.get("Name"), 100), printable(cells.get("Status"), 60)
        old = before.get(name)
        if old is None:
            age = sum(int(count) * AGE_UNITS[unit] for count, unit in re.findall(
                "([0-9]{1,9})([smhdy])", str(cells.get("Age"))))
            workers[name] = Worker(status, now - age)
        else:
            workers[name] = old if old.status == status else Worker(status, now)
    return workers


def is_stuck(worker: Worker, now: float) -> bool:
    return worker.status == "Pending" and now - worker.since > PENDING_PATIENCE


def explain_workers(workers: Mapping[str, Worker], now: float) -> str:
    for name, worker in workers.items():
        if is_stuck(worker, now) or re.search("BackOff|Err|Invalid", worker.status):
            return f"worker {name} cannot run, {worker.status}: see `kubectl describe pod {name}`"
    return ""


def count_running(workers: Mapping[str, Worker] | None) -> int | None:
    return None if workers is None else [each.status for each in workers.values()].count("Running")


def explain_k3s_answer(answer: Answer) -> str:
    said = printable(as_mapping(parse_json(answer.body)).get("message") or "no Kubernetes API", 160)
    if answer.status == 401:
        return (f"k3s refuses the token, which expired or whose account was deleted, so {NO_CPU}:"
                " `systemctl start beta9-k3s-token` makes a new one where the install script set it"
                " up, else `kubectl create token`")
    if answer.status == 403:
        return (f"the k3s token is forbidden what the gateway does ({said}), so {NO_CPU}:"
                f" {TRY_ACCOUNT}")
    return f"k3s answers {answer.status}, {said}, so {NO_CPU}: {TRY_K3S}"


def judge_k3s(workers: Mapping[str, Worker], node: Mapping[str, Any] | None,
              now: float) -> K3sView:
    """The view of workers and of this machine's node, None where it is not known."""
    trouble = explain_workers(workers, now)
    if node is not None:
        fault = explain_node(node)
        return K3sView(f"{fault}; so {NO_CPU}" if fault else "", workers, parse_allocatable(node),
                       trouble)
    stuck = bool(workers) and all(is_stuck(each, now) for each in workers.values())
    return K3sView(f"{trouble}; so {NO_CPU}" if stuck else "", workers, None, trouble or (
        "this machine's node is not known, as the token may not read it, or several are there and"
        f" none of this name: {TRY_ACCOUNT}"))


def parse_expiry(token: Secret | None) -> float | None:
    """When a JWT expires, in seconds since 1970; None for one without end, and for no JWT."""
    part = f"{token.reveal() if token else ''}..".split(".")[1]
    with contextlib.suppress(ValueError):
        claims = parse_json(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        return number_in(as_mapping(claims), "exp")
    return None


# ---- 4 Texts
def format_offer(offer: Offer) -> str:
    return f"{offer.cpu / 1000:g} CPUs, {offer.memory} MiB memory, {offer.gpu_count} GPUs"


def format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def register_payload(config: Config, machine_id: str, wanted: Registration) -> dict[str, Any]:
    """The body of a registration: all strings, `token` being that of k3s. Source: gateway-api."""
    offer = wanted.offer
    return {"token": wanted.k3s_token or "", "machine_id": machine_id,
            "provider_name": config.provider_name, "pool_name": config.pool_name,
            "hostname": config.hostname or f"machine-{machine_id}", "private_ip": wanted.private_ip,
            "cpu": f"{offer.cpu}m", "memory": f"{offer.memory}Mi",
            "gpu_count": f"{offer.gpu_count}"}


def keepalive_payload(config: Config, machine_id: str, metrics: Metrics) -> dict[str, Any]:
    known = {key: value for key, value in metrics._asdict().items() if value is not None}
    return {"machine_id": machine_id, "provider_name": config.provider_name,
            "pool_name": config.pool_name, "agent_version": f"{VERSION}-python", "metrics": known}


def judge(record: Mapping[str, Any], running: bool, now: float) -> tuple[int, str]:
    """The exit code of --status, and the headline that a person must know, by a status record:
    0 work can run, 1 it cannot, 3 no agent runs.
    """
    def ago(name: str) -> float | None:
        moment = number_in(record, name)
        return None if moment is None else now - moment

    def text(name: str) -> str:
        return printable(record.get(name) or "", 500)

    failure = f": {text('failure')}" if text("failure") else ""
    overdue, failing_for = ago("next_attempt_at"), ago("failing_since")
    since_keepalive = ago("last_keepalive_at")
    if not running:
        return 3, "not running"
    if overdue is not None and overdue > 60:
        return 1, f"no sign of life for {format_seconds(overdue)}: see its log, or restart it"
    if since_keepalive is None:
        return 1, f"not ready yet{failure}" if failing_for is not None else "starting"
    if failing_for is not None and since_keepalive > failing_for:
        return 1, f"not ready for {format_seconds(failing_for)}{failure}"
    if (ago("lease_ends_at") or 0) > 0:
        return 1, "not ready, as its lease ran out: it registers again with its next call"
    if record.get("gpus") is None:
        return 1, "ready, but the NVIDIA driver does not answer: look at `nvidia-smi` and `dmesg`"
    if text("placement"):
        return 1, (f"ready, but no work will come: {text('placement')}; once that is mended,"
                   " restart the agent")
    if not number_in(as_mapping(record.get("offer")), "cpu"):
        return 1, f"ready, but takes no work: {text('warning')}"
    if failing_for is not None:
        return 1, f"ready, but a change could not be registered{failure}"
    return 0, f"ready for {format_seconds(ago('ready_since'))}"


class Redactor:
    """Takes tokens out of what is printed or kept: of each name the current one and the one before,
    as they are, URL-encoded, and in base64.
    """

    def __init__(self) -> None:
        self.known: dict[str, list[str]] = {}       # the two tokens of each name
        self.forms: list[str] = []                  # all that is taken out, the longest first

    def remember(self, name: str, secret: Secret) -> None:
        text = secret.reveal()
        self.known[name] = [text, *(old for old in self.known.get(name, ()) if old != text)][:2]
        forms = set()
        for each in (token for tokens in self.known.values() for token in tokens):
            in_base64 = base64.b64encode(each.encode()).decode().rstrip("=")
            forms |= {each, urllib.parse.quote(each, ""), in_base64}
        self.forms = sorted(forms, key=len, reverse=True)

    def redact(self, text: str) -> str:
        for form in self.forms:
            text = text.replace(form, "[redacted]")
        return text


# ---- 5 Configuration
def checked(pattern: str, fault: str,
            convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """A parser of an option's text. It raises ValueError with what would be right."""
    def parse(text: str) -> Any:
        try:
            if re.fullmatch(pattern, text, re.ASCII):
                return convert(text)
        except (ValueError, OSError):
            pass
        raise ValueError(fault)
    return parse


def within(low: float, high: float, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if not low <= convert(text) <= high:
            raise ValueError
        return convert(text)
    return parse


def parse_host(text: str) -> str:
    """A host name or an IP address, without the brackets of IPv6. Raises ValueError, OSError."""
    host = text.strip("[]")
    if ":" in host:
        return str(ipaddress.IPv6Address(host))
    if host.rpartition(".")[2].isdigit():       # no top-level domain is one
        socket.inet_aton(host)
    return host


def parse_url(text: str) -> str:
    if urllib.parse.urlsplit(text).port == 0:
        raise ValueError
    return text.rstrip("/")


def parse_ssh_host(text: str) -> str:
    parse_url(f"ssh://{text}")      # is its port one?
    return text


def parse_ca_file(path: str) -> str:
    import ssl
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    return path


DECIMAL = r"[0-9]{1,9}(\.[0-9]{1,9})?"
a_name = checked(r"(?! )[^\x00-\x1f\x7f]+(?<! )",
                 "is empty, or has control characters or blanks around it: give printable text")
a_token = checked(r"[!#-\[\]-~]{8,}", "is not a token: give 8 or more characters, without blanks,"
                  " quotes, backslashes and line ends", Secret)
a_host = checked(r"[\w.-]{1,253}|\[?[0-9A-Fa-f:.]+\]?", "is not a host or IP: leave out scheme,"
                 " port and path, as in gateway.example.com", parse_host)
a_port = checked("[0-9]{1,5}", "is not a port: give a number from 1 to 65535",
                 within(1, 65535, int))
an_id = checked("[0-9a-fA-F]{8}", "is not a machine id: give 8 hex characters", str.lower)
a_url = checked(r"https://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?/?", "is not an address"
                " of k3s: give https and its host, as in https://127.0.0.1:6443", parse_url)
a_ca_file = checked(".+", "is not a file of root certificates: give one in PEM format",
                    parse_ca_file)
# Nothing that fits can be an option of ssh, or a command in the shell that it runs for ProxyJump.
an_ssh_host = checked(r"(\w[\w.-]*@)?\w[\w.-]*(:[0-9]{1,5})?",
                      "is not a host that ssh can go to: give [user@]host[:port], as in"
                      " me@gateway.example.com", parse_ssh_host)
a_switch = checked("(?i)1|true|yes|on|0|false|no|off",
                   "is neither yes nor no: give 1, true, yes, on, or 0, false, no, off",
                   lambda text: text.lower() in ("1", "true", "yes", "on"))
cores = checked(DECIMAL, "is not a number of cores above 0: give one such as 6.5",
                within(1, 1e9, lambda text: round(float(text) * 1000)))
a_size = checked("[0-9]{1,9}[MG]i", "is not an amount of memory: give one such as 48Gi or 49152Mi",
                 within(1, 1e9, lambda text: int(text[:-2]) * (1024 if text[-2] == "G" else 1)))
a_count = checked("[0-9]{1,5}", "is not a number of GPUs: give one such as 4", int)
an_interval = checked(DECIMAL, "is not an interval: give seconds from 0.1 to 240",
                      within(0.1, 240, float))
a_duration = checked(DECIMAL, "is not a number of seconds: give one such as 600", float)


class Option(NamedTuple):
    """One setting. Its variable and its key in the file follow from its name."""

    group: str
    flag: str
    metavar: str            # "" for a switch
    parse: Callable[[str], Any]
    help: str
    default: Any = None

    @property
    def name(self) -> str:
        return self.flag[2:].replace("-", "_")

    @property
    def variable(self) -> str:
        return f"BETA9_{self.name.upper()}"

    @property
    def key(self) -> str:
        in_section = self.group == "gateway"
        return f"gateway.{self.name.removeprefix('gateway_')}" if in_section else self.name


WHAT, HERE, BEHAVIOUR = "what to do", "this machine", "behaviour"
OPTIONS = [
    Option(WHAT, "--dev", "", a_switch,
           "try it with a stand-in gateway; needs no token"),
    Option(WHAT, "--once", "", a_switch, "register, keep alive once, exit"),
    Option(WHAT, "--dry-run", "", a_switch,
           "show the settings and what would be sent, without the network"),
    Option(WHAT, "--check", "", a_switch,
           "find out whether this machine will work; changes nothing"),
    Option(WHAT, "--status", "", a_switch, "how is this machine's agent?"),
    Option(WHAT, "--json", "", a_switch, "with --check or --status: print JSON"),
    Option(WHAT, "--prometheus", "", a_switch,
           "with --status: print it for node_exporter"),
    Option(WHAT, "--print-install", "", a_switch,
           "print a script that installs this as a service"),
    Option(WHAT, "--install-k3s", "", a_switch,
           "with --print-install: bring k3s too, where it is missing"),
    Option(WHAT, "--print", "NAME", a_name, "print a file of the service: unit, uninstall, ..."),
    Option(WHAT, "--version", "", a_switch, "show the version and SHA-256 of this file"),
    Option(WHAT, "--help", "", a_switch, "show this"),
    Option("identity", "--token", "TOKEN", a_token,
           "machine token from `beta9 machine create`; others can see it in `ps`"),
    Option("identity", "--token-file", "FILE", a_name,
           "file with the machine token, - for standard input"),
    Option("identity", "--machine-id", "ID", an_id,
           "8 hex characters, else made at the first start and kept"),
    Option("identity", "--pool-name", "NAME", a_name, "worker pool", "external"),
    Option("identity", "--provider-name", "NAME", a_name, "provider of the pool", "generic"),
    Option("identity", "--hostname", "HOST", a_host,
           "host or IP by which the gateway reaches this machine's k3s"),
    Option("k3s", "--k3s-token", "TOKEN", a_token, "token of this machine's k3s, for the gateway"),
    Option("k3s", "--k3s-token-file", "FILE", a_name, "file with that token; it may come later"),
    Option("k3s", "--k3s-url", "URL", a_url, "where k3s listens", "https://127.0.0.1:6443"),
    Option("k3s", "--k3s-ca-file", "FILE", a_name, "PEM file of k3s's own root certificate, which"
           " may come later; without it no token is sent there"),
    Option("k3s", "--offer-always", "", a_switch, "offer CPU even while no worker can run", False),
    Option("gateway", "--gateway-host", "HOST", a_host, "host or IP; with --ssh as seen from there",
           "localhost"),
    Option("gateway", "--gateway-port", "PORT", a_port, "port; with --ssh as seen from there",
           1994),
    Option("gateway", "--tls", "", a_switch, "https, verified", False),
    Option("gateway", "--ca-file", "FILE", a_ca_file,
           "PEM file of the only root certificates to trust"),
    Option("gateway", "--allow-cleartext", "", a_switch,
           "send the tokens in cleartext to public addresses too", False),
    Option("gateway", "--ssh", "HOST", an_ssh_host, "go to the gateway through ssh to"
           " [user@]host[:port]; all else is in ssh's configuration"),
    Option(HERE, "--max-cpu", "CORES", cores, "offer no more cores, such as 6.5"),
    Option(HERE, "--max-memory", "SIZE", a_size, "offer no more memory, such as 48Gi or 49152Mi"),
    Option(HERE, "--max-gpus", "COUNT", a_count, "offer no more GPUs"),
    Option(HERE, "--state-dir", "DIR", a_name,
           "folder for machine id, lock and status"),
    Option(BEHAVIOUR, "--keepalive-interval", "SECONDS", an_interval,
           "time between keepalives, 0.1 to 240, at most a third of the gateway's TTL", 60.0),
    Option(BEHAVIOUR, "--startup-timeout", "SECONDS", a_duration,
           "how long to try at the start, else for ever"),
    Option(BEHAVIOUR, "--debug", "", a_switch, "log requests and answers", False),
    Option(BEHAVIOUR, "--config", "FILE", a_name, "YAML or JSON file of these settings"),
]
SETTINGS = [option for option in OPTIONS if option.group != WHAT]
VARIABLES = {option.variable: option.name for option in SETTINGS}
SECRETS = ("token", "k3s_token")
# What `beta9 machine create` prints for the agent that needs a VPN.
UNUSED_FLAGS = ("--tailscale-url", "--tailscale-auth", "--flux-upstream", "--flux-branch",
                "--flux-github-token")
# Of Beta9's own client, and of Kubernetes for a service that is called beta9-gateway. So is
# BETA9_GATEWAY_PORT where it begins with tcp://.
FOREIGN_VARIABLES = "BETA9_GATEWAY_[A-Z]+_.+"
DESCRIPTION = """Registers this machine with a Beta9 gateway and keeps it ready for work.

try it:  beta9_agent.py --dev --once
join:    beta9_agent.py --token-file token --pool-name gpu --gateway-host HOST"""
EPILOG = f"""A setting is also a variable, BETA9_POOL_NAME for --pool-name, and a key of the file,
pool_name; those of the gateway are in its section gateway. The command line wins over the
environment, that over the file. --no-tls and the like turn a switch off.
Accepted and not used: {", ".join(UNUSED_FLAGS)}.

Exit codes: 0 stopped as asked, 1 unexpected error, 2 bad setting, 69 gateway out of reach,
75 already running, 77 token refused, 78 machine refused."""


def nearest(word: str, known: Iterable[str]) -> str:
    import difflib
    near = difflib.get_close_matches(word, known, 1, 0.75)
    return f", did you mean {near[0]}?" if near else ""


def is_like_token(text: str) -> bool:
    """Whether a word that was not understood may be a token, and must not be shown."""
    plain = re.fullmatch("(--)?(k3s|[a-z_.-]){0,40}", text)
    is_path = text.startswith(("/", "./", "../")) and "/" in text[1:]
    return len(text) >= 8 and not is_path and not plain


def format_word(word: str) -> str:
    return f"of {len(word)} characters" if is_like_token(word) else f"'{printable(word)}'"


class CommandLine(argparse.ArgumentParser):
    """argparse whose errors are AgentErrors and show no value, as that may be a token."""

    def error(self, message: str) -> Any:
        message = re.sub("(?s)ignored explicit argument.*", "takes no value", message)
        raise AgentError(f"{message.removeprefix('argument ')}. See --help")


def build_command_line() -> CommandLine:
    """The parser of words, which leaves each value as it is written; a switch is "yes" or "no"."""
    parser = CommandLine("beta9_agent.py", "beta9_agent.py [options]", DESCRIPTION, EPILOG,
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         add_help=False, argument_default=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    for option in OPTIONS:
        group = groups.get(option.group) or parser.add_argument_group(option.group)
        groups[option.group] = group
        text = f"{option.help} [{option.default}]" if option.default else option.help
        if option.metavar:
            group.add_argument(option.flag, metavar=option.metavar, help=text)
        else:
            short = ["-h"] if option.name == "help" else []
            group.add_argument(*short, option.flag, action="store_const", const="yes", help=text)
            parser.add_argument(f"--no-{option.flag[2:]}", dest=option.name, action="store_const",
                                const="no", help=argparse.SUPPRESS)
    for flag in UNUSED_FLAGS:
        parser.add_argument(flag, help=argparse.SUPPRESS)
    return parser


def parse_words(argv: list[str]) -> dict[str, str]:
    """The settings on the command line. Raises AgentError for a word that is none of it."""
    given, unknown = build_command_line().parse_known_args(argv)
    if unknown:
        option = next((each for each in unknown if each.startswith("-")), "").partition("=")[0]
        what = f"option {format_word(option)}" if option else f"word {format_word(unknown[0])}"
        near = nearest(option or f"--{unknown[0]}", [each.flag for each in OPTIONS])
        raise AgentError(f"unknown {what}{near or '.'} See --help")
    return vars(given)


def read_file(path: str) -> str:
    """The text of a small file, `-` being standard input. Raises AgentError with the reason."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            data = file.read(FILE_LIMIT + 1)
        if len(data) <= FILE_LIMIT:
            return data.decode()
    except OSError as error:
        raise AgentError(f"{error.strerror} for user #{os.geteuid()}: check the path, its owner and"
                         " permissions") from None
    except ValueError:
        pass
    raise AgentError("it is not text, or over 64 KiB: is it the right file?")


def read_token(path: str) -> Secret:
    try:
        token: Secret = a_token(read_file(path).rstrip("\r\n"))
        return token
    except ValueError as error:
        raise AgentError(f"what is in it {error}") from None


def parse_settings(text: str) -> dict[str, Any]:
    """A YAML or JSON mapping, its section flattened to "gateway.host". Raises whatever they do."""
    if text.lstrip().startswith("{"):
        tree = json.loads(text, parse_int=str, parse_float=str)
    else:
        import yaml
        tree = yaml.load(text, yaml.BaseLoader) or {}
    section = tree.pop("gateway", None) or {}
    return {**tree, **{f"gateway.{name}": value for name, value in section.items()}}


def read_config_file(path: str) -> dict[str, str]:
    """The settings in a file by their names, without empty ones. Raises AgentError, which quotes
    nothing of the file.
    """
    where = f"--config {printable(path)}"
    try:
        tree = parse_settings(read_file(path))
    except AgentError as error:
        raise AgentError(f"{where} cannot be read, {error}") from None
    except ModuleNotFoundError:
        raise
    except Exception as error:      # of YAML's or JSON's, which quotes the file
        lines = re.findall("line [0-9]+", str(error))
        place = f" at {lines[-1]}" if lines else ""
        raise AgentError(f"{where} is not a YAML or JSON mapping{place}: correct it") from None
    names = {option.key: option.name for option in SETTINGS if option.name != "config"}
    for key, value in tree.items():
        if key not in names:
            raise AgentError(f"{where} has an unknown key {format_word(str(key))}"
                             f"{nearest(str(key), names) or ', see --help'}")
        if isinstance(value, (dict, list)):
            raise AgentError(f"{where} has more than one value for {key}: give one")
    return {names[key]: str(value) for key, value in tree.items()
            if value not in (None, "", "null", "~")}


def take_variables(environ: Any) -> dict[str, str]:
    """Our settings in the environment, without empty and foreign ones. Every BETA9_ variable is
    removed there: no child may inherit a token.
    """
    found = {name: environ.pop(name) for name in list(environ) if name.startswith("BETA9_")}
    for name in found:
        if name not in VARIABLES and not re.fullmatch(FOREIGN_VARIABLES, name):
            LOG.warning("the variable %s is unknown and ignored%s", printable(name),
                        nearest(name, VARIABLES))
    return {VARIABLES[name]: text for name, text in found.items()
            if name in VARIABLES and text and not text.startswith("tcp://")}


def hide_token(redactor: Redactor, path: str) -> None:
    """Redacts a token that was typed where the name of its file belongs."""
    if is_like_token(path) and not os.path.exists(path):
        for shown in (path, path[:200]):        # the second one as `printable` cuts it
            redactor.remember(shown, Secret(shown))


def take_settings(config: Config, settings: Mapping[str, str], source: str) -> None:
    """Has the settings of one source win over those before. A token and its file are one setting:
    of the two, the one of the later source holds. The environment is the source "".
    """
    for name in SECRETS:
        both = {name, f"{name}_file"}
        if both <= set(settings):
            config.problems.append(f"{name} and {name}_file are both given by"
                                   f" {source or 'the environment'}: give one")
        if both & set(settings):
            vars(config).update({name: None, f"{name}_file": None})
    for option in OPTIONS:
        text = settings.get(option.name)
        if text is None:
            continue
        if option.metavar == "FILE":
            hide_token(config.redactor, text)
        try:
            setattr(config, option.name, option.parse(text))
            config.sources[option.name] = source or option.variable
        except ValueError as error:
            shown = (f"of {len(text)} characters" if option.name in SECRETS else
                     f"'{printable(config.redactor.redact(text))}'")
            config.problems.append(f"{option.flag}: the value {shown} from"
                                   f" {source or option.variable} {error}")


def read_tokens(config: Config) -> None:
    """Puts the tokens of token files into the settings. The one of k3s may come later."""
    for name in SECRETS:
        path, flag = getattr(config, f"{name}_file"), f"--{name.replace('_', '-')}-file"
        try:
            if path:
                setattr(config, name, read_token(path))
                config.sources[name] = printable(path)
        except AgentError as error:
            if name == "token":     # that of k3s is waited for
                config.problems.append(
                    f"{flag}: no token can be read from '{printable(path)}', {error}")
        if getattr(config, name):
            config.redactor.remember(name, getattr(config, name))


def read_config(argv: list[str], environ: Any, redactor: Redactor) -> Config:
    """The settings; `problems` has a line for each that will not do. Raises AgentError for what
    cannot be read at all. --status needs no token, and reads no token file.
    """
    config = Config(sources={}, problems=[], redactor=redactor)
    vars(config).update({option.name: option.default for option in OPTIONS})
    variables, given = take_variables(environ), parse_words(argv)
    path = given.get("config") or variables.get("config")
    if path and not {"help", "version"} & set(given):
        hide_token(redactor, path)
        take_settings(config, read_config_file(path), printable(path))
    take_settings(config, variables, "")
    take_settings(config, given, "the command line")
    unused = [flag for flag in UNUSED_FLAGS if flag[2:].replace("-", "_") in given]
    if unused:
        LOG.info("accepted, but not needed by this agent: %s", ", ".join(unused))
    if not config.status:
        read_tokens(config)
    if config.dev:
        config.ssh, config.token = None, config.token or Secret(os.urandom(16).hex())
    tokenless = config.token_file or config.status or config.print_install or config.problems
    if not (config.token or tokenless):
        config.problems.append("the machine token is missing: give --token-file or BETA9_TOKEN. "
                               + NEW_TOKEN.format(config=config))
    return config


# ---- 6 Machine facts
def read_clock() -> float:
    """Seconds, of a clock that nobody sets, with suspended time (on macOS without)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def notify_systemd(state: str) -> None:
    """Source: sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        address = "\0" + path[1:] if path.startswith("@") else path
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.sendto(state.encode(errors="replace"), socket.MSG_DONTWAIT, address)


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGHUP. Another one ends the program on the spot, unless it follows
    at once, as from `timeout` or `uv run`.
    """

    def __init__(self) -> None:
        self.at = math.inf              # when the signal came
        self.patience = STOP_DEADLINE   # seconds from then on, for what is under way

    def install(self) -> None:
        """Takes the signals, even where the parent blocked them; nohup's stay ignored."""
        signals = [number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
                   if signal.getsignal(number) != signal.SIG_IGN]
        for number in signals:
            signal.signal(number, self.handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def handle(self, number: int, frame: Any) -> None:
        now = read_clock()
        if now - self.at > TICK:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.at = min(self.at, now)

    def is_set(self) -> bool:
        return self.at < math.inf

    def wait_until(self, moment: float, woken: Callable[[], bool]) -> None:
        """Sleeps until then, until the flag is set or `woken` says so."""
        while not self.is_set() and read_clock() < moment and not woken():
            notify_systemd("WATCHDOG=1")
            time.sleep(max(0.0, min(moment - read_clock(), TICK)))


STOP = StopFlag()


class Question:
    """Asks what can hang for ever (a driver, a name server, a disk, a server) in a daemon thread,
    and waits for the answer with a deadline, which a stop brings forward. A late answer is for
    whoever asks next.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.answer: Any = None             # or what the function raised
        self.answered = allocate_lock()     # locked until the last thread has answered
        self.under_way = False              # from the start until the answer is taken
        self.begun = False                  # the last thread has come to life
        self.asked_at = self.took = 0.0     # took: seconds, of the last answer

    def _run(self, answered: Any) -> None:
        if answered is not self.answered:   # another thread was started in this one's place
            return
        self.begun = True
        try:
            self.answer = self.function()
        except BaseException as error:
            self.answer = error
        self.took = read_clock() - self.asked_at
        answered.release()

    def start(self) -> None:
        """Asks, unless it is asked already. Raises RuntimeError where no thread can be had.

        Not by `threading`, which waits for ever for a thread that dies while it starts. One that
        has not begun for long has died so, and another takes its place.
        """
        late = read_clock() > self.asked_at + HOST_DEADLINE
        dead = self.under_way and not self.begun and late
        if dead or not self.under_way:
            self.under_way, self.begun = False, False
            self.answered, self.asked_at = allocate_lock(), read_clock()
            self.answered.acquire()
            start_new_thread(self._run, (self.answered,))
            self.under_way = True

    def ask(self, until: float) -> Any:
        """The answer, waited for until then, also a late one to the question before. Raises
        TimeoutError, RuntimeError, and what the function raised.
        """
        self.start()
        while not self.answered.acquire(timeout=min(0.1, max(until - read_clock(), 0))):
            if read_clock() >= min(until, STOP.at + STOP.patience):
                raise TimeoutError
        self.under_way = False
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def poll(self, seconds: float) -> Any:
        """As `ask`, for what is asked again and again: waits until `seconds` after the question was
        put, so that a hang costs them once. A slow one is put again at once, for the next poll.
        """
        self.start()
        answer = self.ask(self.asked_at + seconds)
        if self.took > seconds:
            with contextlib.suppress(RuntimeError):
                self.start()
        return answer


TOLD: set[str] = set()


def warn_once(text: str) -> None:
    """Logs what is not going to change while this process runs."""
    if text not in TOLD:
        TOLD.add(text)
        LOG.warning(text)


def how_to_install() -> str:
    """The command that brings the packages to this interpreter, tried on Debian 12 and 13."""
    packages = "requests psutil nvidia-ml-py pyyaml"
    if sys.prefix != sys.base_prefix:
        return f"`{sys.executable} -m pip install {packages}`"
    return ("as root `apt-get update && apt-get install -y python3-venv`, then `python3 -m venv"
            f" .venv && .venv/bin/pip install {packages}`, and start it with .venv/bin/python")


def load_nvml() -> Any:
    """The binding of the driver's library; None without a driver. Raises ImportError."""
    import ctypes
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    import pynvml
    return pynvml


def read_gpu(nvml: Any, index: int) -> Gpu:
    """A card. Where it is unknown what runs on it, it is not lost."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name = nvml.nvmlDeviceGetName(handle)
    except nvml.NVMLError:
        return Gpu(None, False)
    # Bindings before 11.5 give bytes.
    name = printable(name.decode(errors="replace") if isinstance(name, bytes) else name, 60)
    try:
        return Gpu(name, not nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except Exception as error:      # of any kind: bindings and drivers of all ages meet here
        if getattr(error, "value", None) in (
                nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED,
                nvml.NVML_ERROR_UNKNOWN):
            return Gpu(None, False)
        warn_once(f"the driver does not tell what runs on its cards, {printable(error, 80)}: they"
                  " count as not free")
        return Gpu(name, False)


def list_gpus() -> list[Gpu]:
    """The cards. Raises NVML's error where there is a driver that cannot say.

    NVML is closed each time, so that the kernel module can be unloaded meanwhile.
    """
    try:
        nvml = load_nvml()
    except ImportError:
        warn_once("a driver is here, but 0 GPUs are offered, as its Python binding is missing:"
                  f" {how_to_install()}, and restart the agent")
        return []
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
            warn_once("NVIDIA's library is here, but 0 GPUs are offered, as its kernel module is"
                      " not loaded: `modprobe nvidia`, and see `dmesg`")
            return []
        raise
    try:
        return [read_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def find_private_ip() -> str:
    """This machine's IPv4 address on the default route, "" for none. Asks nobody."""
    # An address of documentation (RFC 5737): connecting UDP sends nothing.
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect(("198.51.100.1", 9))
        return str(udp.getsockname()[0])
    return ""


class Host:
    """Looks at the machine. What hangs or fails is unknown, with a warning."""

    def __init__(self, config: Config) -> None:
        import psutil
        self.config, self.capacity = config, Steady()
        self.driver = Question((lambda: []) if config.max_gpus == 0 else list_gpus)
        self.disk = Question(lambda: psutil.disk_usage("/"))
        self.metrics = Metrics(None, None, None, None, None, None, 0)
        self.gpus: list[Gpu] | None = None

    def read(self, what: str, question: Callable[[], Any]) -> Any:
        """The answer; None where there is none, for whatever reason."""
        try:
            return question()
        except Exception as error:
            reason = "hangs" if isinstance(error, TimeoutError) else printable(repr(error))
            LOG.warning(what + " cannot be read, %s: it is unknown until it answers, and"
                        " keepalives go on; look at `dmesg`", reason)
            return None

    def sample(self) -> None:
        """Measures it. Load is the average since the last sample."""
        import psutil
        cpus = self.read("the number of CPUs", psutil.cpu_count)
        memory = self.read("the memory", psutil.virtual_memory)
        with contextlib.suppress(RuntimeError):     # both at once, for one deadline
            self.driver.start()
        disk = self.read("the disk", lambda: self.disk.poll(HOST_DEADLINE))
        self.gpus = self.read("the NVIDIA driver", lambda: self.driver.poll(HOST_DEADLINE))
        self.metrics = Metrics(
            cpu_utilization_pct=self.read("the CPU's load", psutil.cpu_percent),
            memory_utilization_pct=getattr(memory, "percent", None),
            total_cpu_available=None if cpus is None else cpus * 1000,
            total_memory_available=None if memory is None else memory.total >> 20,
            total_disk_space_bytes=getattr(disk, "total", None),
            total_disk_free_bytes=getattr(disk, "free", None),
            free_gpu_count=sum(gpu.free for gpu in self.gpus or ()))
        before = self.capacity.value or Offer(0, 0, 0)
        self.capacity.observe(offer_of(self.metrics, self.gpus, before, self.config))


# ---- 7 Clients
class PublicAddress(Exception):
    """Tokens in cleartext would go there."""


CLEARTEXT = "without TLS others could read the tokens on their way"
TRY_TLS = "Give --tls, or --ssh for a tunnel, or accept it with --allow-cleartext"

# `-W` opens no session, so there is no terminal, and nothing of an agent or X11 is forwarded.
SSH_OPTIONS = ("BatchMode=yes", "ExitOnForwardFailure=yes", "ServerAliveInterval=15",
               "ServerAliveCountMax=3", "ControlPath=none", "LogLevel=ERROR")


class Ssh:
    """The system's ssh as a connection: `ssh -W` on one end of a socket pair. Nothing listens, and
    ssh ends when our end is closed, even by a `kill -9` of this program.
    """

    def __init__(self, config: Config) -> None:
        import shutil
        program = shutil.which("ssh")
        if program is None:
            raise AgentError("ssh is missing: `apt-get install openssh-client`, and start again", 1)
        # `-W` implies this, which would undo a RemoteForward of the user's own configuration; the
        # one of --check would be in the way of the agent's.
        clear = f"ClearAllForwardings={'yes' if config.check else 'no'}"
        self.words = [program, *(f"-o{option}" for option in (*SSH_OPTIONS, clear)),
                      "-W", f"{format_host(config.gateway_host)}:{config.gateway_port}",
                      f"ssh://{config.ssh}"]
        self.process: Any = None
        self.said = ""          # by the ssh before, the end of it

    def close(self) -> None:
        """Ends ssh and what it has started, and keeps its last words."""
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            self.said = os.read(self.process.stderr.fileno(), 65536).decode(errors="replace")
        # It is not reaped yet, so no other process has its number.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(Exception):    # it may be stuck in the kernel
            self.process.wait(0.2)
        self.process.stderr.close()
        self.process = None

    def drain(self) -> None:
        """Forgets what ssh says while all is well: a full pipe would stop it."""
        with contextlib.suppress(OSError):      # it says nothing
            os.read(self.process.stderr.fileno(), 65536)

    def open(self) -> socket.socket:
        """A new ssh, and our end of it. Raises OSError."""
        import subprocess
        self.close()
        self.said = ""
        # SHELL is for ProxyJump; a service's may be nologin.
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                self.words, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.PIPE,
                start_new_session=True, env={**os.environ, "SHELL": "/bin/sh"})
        os.set_blocking(self.process.stderr.fileno(), False)
        return ours


class Connection:
    """One kept connection to judged addresses, or through ssh. Thrown away after any failure, so
    that a request which is still under way in its thread can touch nothing that is used later.
    """

    def __init__(self, client: "HttpClient", addresses: list[str]) -> None:
        self.client, self.addresses = client, addresses
        self.until = 0.0                # by the clock, of the request that is under way
        self.is_closed = False
        self.sock: Any = None           # once it is connected, by TLS where that is used
        self.is_answering = False       # the first byte of an answer is there
        self.adapter = self.build_adapter()

    def seconds_left(self) -> float:
        """Never 0, which would be "for ever" to a socket."""
        return max(self.until - read_clock(), 0.001)

    def open_socket(self) -> socket.socket:
        """One to the first address that takes it, or to ssh. Raises OSError."""
        if self.is_closed:      # by whoever waited for this request
            raise TimeoutError
        if self.client.ssh is not None:
            return self.client.ssh.open()
        failure: OSError = TimeoutError()
        for number, address in enumerate(self.addresses, 1):
            share = ADDRESS_DEADLINE if number < len(self.addresses) else math.inf
            try:
                sock = socket.create_connection(
                    (address, self.client.port), min(share, self.seconds_left()))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(self.seconds_left())
                self.client.good_address = address
                return sock
            except OSError as error:
                failure = error
        raise failure

    def derive_pool(self, pool: Any) -> Any:
        """A class of urllib3's pools that connects by `open_socket`. Raises AgentError."""
        import http.client
        connection = self
        if not hasattr(pool.ConnectionCls, "_new_conn"):    # no address would be judged
            raise AgentError("this version of urllib3 is not known here: install urllib3 2", 1)

        class FinalResponse(http.client.HTTPResponse):
            """Skips 102, 103 and the like, as RFC 9110, 15.2, asks; the library skips 100 alone."""

            def begin(self) -> None:
                connection.is_answering = bool(self.fp.peek(1))
                super().begin()
                while 100 < self.status < 200 and self.status != 101:
                    self.headers = self.msg = None      # type: ignore[assignment]
                    super().begin()

        class Judged(pool.ConnectionCls):       # type: ignore[misc]
            response_class = FinalResponse

            def _new_conn(self) -> Any:     # the one place where urllib3 makes a socket
                return connection.open_socket()

            def connect(self) -> None:      # by that, and then a proxy's CONNECT, and TLS
                super().connect()
                connection.sock = self.sock
                if connection.is_closed:    # too late to send anything
                    raise TimeoutError

        return type("Pool", (pool,), {"ConnectionCls": Judged})

    def build_adapter(self) -> Any:
        """An adapter with such pools. A session follows redirects and obeys ~/.netrc."""
        import requests.adapters
        import urllib3
        pools = {"http": self.derive_pool(urllib3.HTTPConnectionPool),
                 "https": self.derive_pool(urllib3.HTTPSConnectionPool)}
        adapter = requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=1)
        adapter.poolmanager.pool_classes_by_scheme = pools
        if self.client.proxy:
            adapter.proxy_manager_for(self.client.proxy).pool_classes_by_scheme = pools
        return adapter

    def send(self, prepared: Any, limit: int) -> Answer:
        """One request and its whole answer. Raises AgentError, and what the libraries do."""
        proxy, self.is_answering = self.client.proxy, False
        response = self.adapter.send(
            prepared, stream=True, timeout=self.seconds_left(), verify=self.client.ca_file or True,
            proxies={"http": proxy, "https": proxy} if proxy else {})
        body = response.raw.read(limit + 1, decode_content=False)
        if len(body) > limit:
            raise AgentError(f"the answer is larger than {limit >> 10} KiB")
        response.raw.release_conn()
        return Answer(response.status_code, response.headers, body)

    def close(self) -> None:
        """Hangs up, which ends a request that is still under way."""
        self.is_closed = True
        with contextlib.suppress(Exception):    # there is none, or it is closed
            # TLS's own would let a thread that is sending go on in cleartext.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
        self.adapter.close()
        if self.client.ssh is not None:
            self.client.ssh.close()


class HttpClient:
    """One HTTP server. Every request of this program leaves here."""

    def __init__(self, url: str, host: str, port: int, redactor: Redactor,
                 ca_file: str | None = None, proxy: str = "", private_only: bool = False,
                 ssh: Ssh | None = None) -> None:
        import encodings.idna  # noqa: F401  # before threads do, which look names up with it
        self.url, self.host, self.port, self.redactor = url, host, port, redactor
        self.ca_file, self.proxy, self.private_only, self.ssh = ca_file, proxy, private_only, ssh
        self.look_up = Question(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        self.good_address = ""          # that took the last connection
        self.connection: Connection | None = None

    def find_addresses(self, until: float) -> list[str]:
        """Those of the server, or of the proxy to it, each of them judged, the last good one first.
        Raises PublicAddress, AgentError, OSError, UnicodeError.
        """
        try:
            found = self.look_up.ask(until)
        except TimeoutError:
            raise AgentError(f"the name server is slow: no address is known of {self.host} yet;"
                             " see /etc/resolv.conf") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if self.private_only and not is_private(address.partition("%")[0]):
                raise PublicAddress(f"{self.host} leads to {address}, a public address, and"
                                    f" {CLEARTEXT}")
        return sorted(addresses, key=lambda each: each != self.good_address)

    def close(self) -> None:
        """Hangs up; the next request looks up and connects anew."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    def is_connected(self) -> bool:
        """Whether a connection is kept that has not ended: an idle one has nothing to read."""
        sock = None if self.connection is None else self.connection.sock
        return sock is not None and sock.fileno() >= 0 and not select.select([sock], [], [], 0)[0]

    def try_once(self, prepared: Any, until: float, limit: int) -> Answer:
        """Sends it, through the connection that is kept, where one is. The answer is without tokens
        that it echoes, before any text of it is cut.
        """
        try:
            if self.connection is None:
                self.connection = Connection(self, [] if self.ssh else self.find_addresses(until))
            connection, redact = self.connection, self.redactor.redact
            connection.until = until
            answer = Question(lambda: connection.send(prepared, limit)).ask(until)
            headers = {name.title(): redact(value) for name, value in answer.headers.items()}
            body = redact(answer.body.decode(errors="replace")).encode()
            if not self.is_connected():     # the server closes after each answer
                self.close()
            return Answer(answer.status, headers, body)
        except Exception:
            self.close()
            raise

    def request(self, path: str, token: Secret, body: str | None, until: float,
                limit: int = CONFIG_LIMIT, accept: str = "application/json") -> Answer:
        """A GET, or with a body a POST, and its answer of at most `limit` bytes. Raises whatever
        goes wrong. A kept connection that breaks before the first byte of its answer is replaced
        once, as load balancers close idle ones.
        """
        import requests
        kept = self.connection if self.is_connected() else None
        # Without Content-Type the gateway says 400.
        headers = {"Authorization": f"Bearer {token.reveal()}", "Accept": accept,
                   "Content-Type": "application/json", "Accept-Encoding": "identity"}
        method = "GET" if body is None else "POST"
        prepared = requests.Request(method, self.url + path, headers, data=body).prepare()
        if kept is None:
            self.close()
        try:
            return self.try_once(prepared, until, limit)
        except OSError:
            if kept is None or kept.is_answering or STOP.is_set() or read_clock() >= until:
                raise
        return self.try_once(prepared, until, limit)


def find_way(config: Config) -> tuple[str, str, int]:
    """The URL of the proxy that the environment names for the gateway, its host, and its port;
    without a proxy, as with --ssh: "", the gateway's host, and its port.

    Raises AgentError for one that cannot be used, which is not shown: it may hold a password.
    """
    import requests.utils
    import urllib3.util
    direct = "", config.gateway_host, config.gateway_port
    if config.ssh or is_loopback(config.gateway_host):
        return direct
    named = requests.utils.get_environ_proxies(config.gateway)
    proxy = requests.utils.select_proxy(config.gateway, named)
    if not proxy:
        return direct
    with contextlib.suppress(ValueError):
        parsed = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
        usual_port = {"http": 80, "https": 443}.get(parsed.scheme or "")
        if parsed.host and usual_port:
            # The URL as `requests` will write it.
            return parsed.url, parsed.host.strip("[]"), parsed.port or usual_port
    raise AgentError(f"the proxy that the environment names for {config.gateway} is not an HTTP"
                     " proxy: correct http_proxy, https_proxy or all_proxy, or set no_proxy")


# What to do about a certificate, by OpenSSL's code, see openssl-verification-options(1).
CERTIFICATE_REMEDIES = (
    ((9, 10), "Renew it, or correct this machine's clock"),
    ((18, 19, 20, 21), "Give its issuer's root certificate with --ca-file"),
    ((62, 64), "Give a name that is in it with --gateway-host"),
    ((26,), "Have it made for servers (extendedKeyUsage serverAuth)"))


def explain_failure(error: BaseException, peer: str, try_next: str,
                    redactor: Redactor) -> tuple[str, str]:
    """What went wrong on the way to an answer, and the remedy."""
    import ssl
    if isinstance(error, AgentError):       # of ours, which says it
        return str(error), try_next
    chain = [error]     # and those in whose handling it was raised, the innermost last
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)

    def among(kind: Any) -> Any:
        return next((each for each in reversed(chain) if isinstance(each, kind)), None)

    refused = among(ssl.SSLCertVerificationError)
    if refused is not None:
        remedy = next((remedy for codes, remedy in CERTIFICATE_REMEDIES
                       if refused.verify_code in codes), "Have it made anew")
        reason = printable(refused.verify_message.rstrip("."))
        return f"the certificate of {peer} is refused, {reason}", remedy
    failed = among(ssl.SSLError)
    if failed is not None:
        return (f"no TLS with {peer}, {printable(failed.reason or failed)}",
                "Is it the port of https, and of TLS 1.2 or newer?")
    for kind, text, remedy in (
            ((socket.gaierror, UnicodeError), f"no address is known of {peer}",
             "Check the name, and /etc/resolv.conf"),
            (TimeoutError, f"no complete answer in time from {peer}", try_next),
            (ConnectionRefusedError, f"connection refused by {peer}", f"Is it up? {try_next}"),
            (MemoryError, "there is no memory left", "Free some, see `free -m`")):
        if among(kind):
            return text, remedy
    # Where urllib3 is old, a TypeError of its own is the innermost.
    inner = next((each for each in reversed(chain) if not isinstance(each, TypeError)), error)
    # It can echo a token, which is taken out before the text is cut.
    said = printable(redactor.redact(str(inner)))
    return f"the connection to {peer} broke, {type(inner).__name__}: {said}", try_next


def parse_address(host: str) -> str:
    """The IP address that a host is; "" for a name."""
    with contextlib.suppress(OSError):
        return host if ":" in host else socket.inet_ntoa(socket.inet_aton(host))
    return ""


class GatewayClient:
    """Registers and keeps alive. Whatever happens is an Outcome."""

    def __init__(self, config: Config) -> None:
        self.config, self.ssh = config, Ssh(config) if config.ssh else None
        self.proxy, host, port = find_way(config)
        self.peer = f"{format_host(host)}:{port}"
        if self.proxy:
            self.peer = f"the proxy {self.peer}"
        elif config.ssh:
            self.peer += f" through ssh to {config.ssh}"
        cleartext = not (config.tls or config.allow_cleartext or config.ssh)
        for each in (config.gateway_host, host) if cleartext else ():
            address = parse_address(each)       # a name is judged when it is looked up
            if address and not is_private(address):
                raise AgentError(f"{each} is a public address, and {CLEARTEXT}. {TRY_TLS}")
        if cleartext and self.proxy and not parse_address(config.gateway_host):
            raise AgentError(f"{config.gateway_host}, looked up by {self.peer}, may be public, and"
                             f" {CLEARTEXT}. {TRY_TLS}, or name it in no_proxy")
        if not (config.tls or config.ssh or is_loopback(config.gateway_host)):
            LOG.warning("no TLS to %s: give --tls or --ssh, unless the network encrypts, as a VPN"
                        " does", config.gateway_host)
        self.http = HttpClient(config.gateway, host, port, config.redactor, config.ca_file,
                               self.proxy, cleartext, self.ssh)

    def explain(self, error: Exception) -> Outcome:
        """What a request without an answer means. ssh's own last line tells most."""
        if isinstance(error, PublicAddress):
            return Outcome(Kind.UNSAFE, str(error), TRY_TLS)
        text, remedy = explain_failure(error, self.peer, TRY_HEALTH.format(config=self.config),
                                       self.config.redactor)
        said = self.config.redactor.redact(self.ssh.said).strip() if self.ssh else ""
        if said:
            text += f"; ssh says: {printable('; '.join(said.splitlines()[-2:]))}"
            remedy = (f"As this user `ssh ssh://{self.config.ssh}` must work without a question,"
                      " and the gateway be reached from there")
        return Outcome(Kind.TROUBLE, text, remedy)

    def request(self, path: str, body: str | None, until: float,
                limit: int = CONFIG_LIMIT) -> Answer:
        """A request to the machine API with the token. Raises as `HttpClient.request`."""
        return self.http.request(f"/api/v1{path}", self.config.token, body, until, limit)

    def send(self, call: str, payload: Mapping[str, Any], seconds: float) -> Outcome:
        """Sends a register or keepalive, within `seconds`; a new ssh is given time of its own."""
        text = json.dumps(payload, separators=(",", ":"), default=Secret.reveal)
        LOG.debug("> POST %s/api/v1/machine/%s %s", self.config.gateway, call, text)
        start, limit = read_clock(), CONFIG_LIMIT if call == REGISTER else ANSWER_LIMIT
        if self.ssh is not None and not self.http.is_connected():
            seconds = max(seconds, SSH_DEADLINE)
        try:
            answer = self.request(f"/machine/{call}", text, start + seconds, limit)
            LOG.debug("< %d in %.1f ms %s %s", answer.status, (read_clock() - start) * 1000,
                      printable(answer.headers, 1000), describe_body(answer.body))
            outcome = classify(call, answer, self.config, str(payload["machine_id"]))
        except Exception as error:  # of any kind: a stranger's bytes went through the libraries
            LOG.debug("< no answer", exc_info=True)
            outcome = self.explain(error)
        if self.proxy and outcome.kind is Kind.TROUBLE:
            return outcome._replace(remedy=f"The environment names {self.peer}; no_proxy leaves it"
                                    f" out. {outcome.remedy}")
        return outcome

    def has_lost_ssh(self) -> bool:
        """Whether the kept connection has ended, and with it its ssh."""
        if self.ssh is None or self.http.connection is None:
            return False
        self.ssh.drain()
        return not self.http.is_connected()


class K3sWatch:
    """Looks at this machine's k3s with the token that the gateway uses there."""

    TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"      # no objects, so no secrets

    def __init__(self, config: Config, machine_id: str) -> None:
        self.config, url = config, urllib.parse.urlsplit(config.k3s_url)
        self.host, self.port = url.hostname or "", url.port or 443
        self.http = HttpClient(
            config.k3s_url, self.host, self.port, config.redactor, config.k3s_ca_file)
        self.pods = "/api/v1/namespaces/default/pods?" + urllib.parse.urlencode({
            "includeObject": "None",
            "fieldSelector": "status.phase!=Succeeded,status.phase!=Failed",
            "labelSelector": f"run.beam.cloud/role=worker,run.beam.cloud/machine-id={machine_id}"})
        self.question = Question(self.look_now)
        self.token: Secret | None = None        # that the looks so far were made with
        self.token_worked = False               # a look with that token was good
        self.steady, self.due = Steady(), -math.inf
        self.view = K3sView()
        self.believe(K3sView(f"k3s was not seen yet at {config.k3s_url}, so {NO_CPU}: {TRY_K3S}"))

    def request(self, path: str, body: str | None, until: float,
                accept: str = "application/json") -> Answer:
        """A request to the API, only where its CA is known. Raises as `HttpClient.request`."""
        if not os.path.isfile(self.config.k3s_ca_file or ""):
            raise AgentError(f"its root certificate is not at {self.config.k3s_ca_file}")
        return self.http.request(path, self.config.k3s_token, body, until, accept=accept)

    def look_now(self) -> K3sView:
        """What is there, within HOST_DEADLINE. Whatever goes wrong is a fault."""
        import ssl
        config, until = self.config, read_clock() + HOST_DEADLINE
        if config.k3s_token is None:
            path, remedy = config.k3s_token_file, "give --k3s-token-file, or install the service"
            if path:
                remedy = (f"is k3s installed? The token is looked for in {printable(path)};"
                          " `--print-install --install-k3s` brings k3s")
            return K3sView(f"the k3s token is missing, so {NO_CPU}: {remedy}")
        try:
            if not config.k3s_ca_file:      # no token is sent: anybody could listen there
                ssl.get_server_certificate((self.host, self.port), timeout=HOST_DEADLINE)
                return K3sView(notice="k3s was not asked whether workers can run: give"
                               " --k3s-ca-file, so that the token goes to k3s alone")
            pods = self.request(self.pods, None, until, self.TABLE)
            workers = parse_workers(pods.body, self.view.workers or {}, read_clock())
            if pods.status != 200 or workers is None:
                return K3sView(explain_k3s_answer(pods), token_refused=pods.status in (401, 403))
            nodes = self.request("/api/v1/nodes?limit=500", None, until)
            if nodes.status not in (200, 403):
                return K3sView(explain_k3s_answer(nodes))
            view = judge_k3s(workers, find_node(nodes.body, socket.gethostname()), read_clock())
            return view if config.hostname or view.notice else view._replace(notice=(
                "--hostname is missing: give the host or IP by which the gateway reaches k3s here"))
        except Exception as error:  # of any kind: a stranger's bytes went through the libraries
            LOG.debug("no answer from k3s", exc_info=True)
            text, _ = explain_failure(error, f"{format_host(self.host)}:{self.port}", "",
                                      config.redactor)
            return K3sView(f"k3s cannot be used, {text}, so {NO_CPU}: {TRY_K3S}")

    def look(self) -> K3sView:
        """What is believed of k3s; a look at most each LOOK_PERIOD. Whether it is usable, and what
        its node can give, changes once two looks agree, as k3s and its plugins restart; a refused
        token and the first good look with a token count at once.
        """
        config, now = self.config, read_clock()
        if config.dev:
            return K3sView()
        if config.k3s_token != self.token:
            self.token, self.token_worked, self.due = config.k3s_token, False, now
        if now < self.due:
            return self.view
        try:
            found: K3sView = self.question.poll(K3S_PATIENCE)
        except (TimeoutError, RuntimeError):    # the late answer is there at the next look
            return self.view
        self.due = now + LOOK_PERIOD
        usable = not found.fault
        if found.token_refused or usable and not self.token_worked:
            self.steady = Steady()      # which believes what it is told first
        self.token_worked = self.token_worked or usable
        believed_usable, node = self.steady.observe((usable, found.node if usable else None))
        if believed_usable == usable:   # else the view stays, until another look finds the same
            self.believe(found._replace(node=node))
        return self.view

    def believe(self, view: K3sView) -> None:
        """Takes a view; with --offer-always a fault in it is no more than a notice."""
        if self.config.offer_always:
            notice = view.fault.replace(" and no CPU is offered", "") or view.notice
            view = view._replace(fault="", notice=notice, node=view.node or self.view.node)
        self.view = view


# ---- 8 State on disk
def find_state_dir(config: Config) -> str:
    """The folder for machine id, lock and status. Raises AgentError where none is known."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    home = "/var/lib" if os.geteuid() == 0 else home
    folder = os.path.expanduser(config.state_dir or os.environ.get("STATE_DIRECTORY")
                                or f"{home}/beta9-agent")
    if folder.startswith("~"):
        raise AgentError("this user has no home folder to keep the machine id in: give --state-dir")
    return folder


def write_atomically(path: str, text: str, mode: int) -> None:
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
    """A hash of /etc/machine-id, which a copy of a disk makes anew, if it was emptied before."""
    try:
        return hashlib.sha256(b"beta9-agent" + read_file("/etc/machine-id").encode()).hexdigest()
    except AgentError:
        return "-"


def read_machine_id(folder: str) -> str | None:
    """The kept id; None for none, a damaged one or another machine's."""
    with contextlib.suppress(AgentError):
        kept = re.fullmatch("([0-9a-f]{8}) ([0-9a-f]{64}|-)\n", read_file(f"{folder}/machine-id"))
        # Where this machine's cannot be read the id is believed.
        return kept[1] if kept and read_fingerprint() in (kept[2], "-") else None
    return None


def is_locked(folder: str) -> bool:
    """Whether an agent runs with this state folder."""
    with contextlib.suppress(OSError), open(f"{folder}/lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def take_lock(folder: str) -> Any:
    """The lock file with our pid, held until we end. Raises AgentError where another process holds
    it, and OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    file = open(os.open(f"{folder}/lock", flags, 0o644), "r+b", buffering=0)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:     # by --status, perhaps, for a moment
            time.sleep(TICK)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = printable(file.read(20).decode(errors="replace").strip())
        raise AgentError(f"process {pid} already runs as this machine: stop it, or give another"
                         " --state-dir", 75) from None
    except OSError as error:
        LOG.warning("%s/lock cannot be locked, %s: see that no second agent runs as this machine",
                    folder, error.strerror)
    with contextlib.suppress(OSError):      # a full disk: the lock holds all the same
        os.fchmod(file.fileno(), 0o644)     # whatever the umask: other users' --status asks it
        file.truncate(0)
        file.write(b"%d\n" % os.getpid())
    return file


class State:
    """This machine's id and lock, and what must outlive the process."""

    def __init__(self, machine_id: str, folder: str = "", lock: Any = None,
                 hung: Question | None = None) -> None:
        self.machine_id, self.folder, self.lock = machine_id, folder, lock
        self.hung = hung        # the folder that hung at the start
        self.promised = 0       # GPUs, that were offered with CPU last
        if folder:
            with contextlib.suppress(AgentError):
                kept = as_mapping(parse_json(read_file(f"{folder}/{machine_id}.offer")))
                self.promised = int(number_in(kept, "gpu_count") or 0)
        self.waiting: dict[str, tuple[str, int]] = {}       # text and mode, by the file's ending
        self.writer = Question(self.write_waiting)

    def write_waiting(self) -> None:
        for ending, (text, mode) in list(self.waiting.items()):
            write_atomically(f"{self.folder}/{self.machine_id}{ending}", text, mode)
            if self.waiting.get(ending) == (text, mode):    # and no newer one by now
                del self.waiting[ending]

    def write(self, ending: str, record: Mapping[str, Any], mode: int) -> None:
        """Writes a file of this machine, aside, as a disk can hang. What the disk does not take is
        written with the next record.
        """
        self.waiting[ending] = (json.dumps(record) + "\n", mode)
        if self.hung is not None:
            with contextlib.suppress(TimeoutError, RuntimeError, OSError):
                found = self.hung.ask(read_clock())
                self.hung, self.folder, self.lock = None, found.folder, found.lock
        if not self.folder:
            return
        try:
            while self.waiting:     # the first answer may be to the question before
                self.writer.poll(TICK)
        except Exception as error:
            why = "the disk hangs" if isinstance(error, TimeoutError) else explain_error(error)
            LOG.warning("%s cannot be written, %s: keepalives go on, and it is tried again; see"
                        " `df`, and whether this user may write there", self.folder, why)

    def keep_promise(self, offer: Offer) -> None:
        """Keeps for the next start how many GPUs workers may hold, before any can hold them."""
        if offer.cpu > 0 and offer.gpu_count != self.promised:
            self.promised = offer.gpu_count
            self.write(".offer", offer._asdict(), 0o600)
            with contextlib.suppress(Exception):
                if self.folder and self.waiting:
                    self.writer.ask(read_clock() + HOST_DEADLINE)


def make_state(config: Config, folder: str) -> State:
    """The machine id and its lock in that folder. Where the disk cannot keep them, a warning."""
    owner = os.stat(folder).st_uid if os.path.isdir(folder) else 0
    if os.geteuid() == 0 and owner != 0:    # root's files there would shut that user out
        raise AgentError(f"{folder} belongs to user #{owner}, as the installed service's does: use"
                         f" its command beta9-agent, `sudo -u '#{owner}'`, or another --state-dir")
    machine_id = config.machine_id or read_machine_id(folder)
    path, lock = f"{folder}/machine-id", None
    try:
        with contextlib.suppress(FileExistsError):
            os.makedirs(folder)
            os.chmod(folder, 0o755)     # whatever the umask: other users' --status reads there
        lock = take_lock(folder)
        machine_id = machine_id or read_machine_id(folder)      # by another start, meanwhile
        if machine_id is None:
            machine_id = os.urandom(4).hex()
            if os.path.lexists(path):
                LOG.warning("%s is damaged or another machine's: this machine gets the new id %s;"
                            " give the old one with --machine-id", path, machine_id)
            write_atomically(path, f"{machine_id} {read_fingerprint()}\n", 0o600)
    except OSError as error:
        if lock is None and is_locked(folder):
            raise AgentError(f"another user's agent runs with {folder}: stop it, or give another"
                             " --state-dir", 75) from None
        LOG.warning("%s cannot keep the machine id or its lock, %s: this start goes on without,"
                    " and the id may be new next time; give --state-dir", folder,
                    explain_error(error))
    return State(machine_id or os.urandom(4).hex(), folder if lock else "", lock)


def open_state(config: Config) -> State:
    """This machine's state, locked. Raises AgentError where another agent has it."""
    folder = find_state_dir(config)
    question = Question(lambda: make_state(config, folder))
    try:
        state: State = question.ask(read_clock() + HOST_DEADLINE)
        return state
    except TimeoutError:
        LOG.warning("%s hangs: until it answers this goes on without it, with a new machine id"
                    " where none is given; give --state-dir", folder)
        return State(config.machine_id or os.urandom(4).hex(), hung=question)


# ---- 9 Loop
class Repeats(logging.Filter):
    """Of lines whose format is the same, but for numbers, the 1st, 2nd, 4th, 8th, then one in QUIET
    seconds is written; anew after as many seconds without any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[int, float, float]] = {}     # count, last, last that was written

    def filter(self, record: logging.LogRecord) -> bool:
        now, key = read_clock(), re.sub("[0-9]+", "#", f"{record.levelname} {record.msg}")
        if len(self.seen) > 500:    # of texts from outside
            self.seen.clear()
        count, last, written = self.seen.get(key, (0, -math.inf, -math.inf))
        count = 1 if now - last > QUIET else count + 1
        due = count in (1, 2, 4, 8) or now - written >= QUIET or record.levelno < logging.INFO
        self.seen[key] = (count, now, now if due else written)
        return due


class LogLines(logging.Handler):
    """Writes lines to standard error, without tokens; a line that nobody takes is lost."""

    PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3}     # sd-daemon(3)

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self.redactor = redactor

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{logging.Formatter().formatTime(record)} {record.levelname} "
        with contextlib.suppress(OSError):
            status = os.fstat(2)
            if os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
                prefix = f"<{self.PRIORITIES[record.levelname]}>"
            lines = self.redactor.redact(self.format(record)).split("\n")
            text = prefix + "\n".join(printable(line, 4000) for line in lines) + "\n"
            data = text.encode(errors="backslashreplace")
            for at in range(0, len(data), select.PIPE_BUF):     # so much never blocks
                if select.select([], [2], [], 0)[1]:
                    os.write(2, data[at:at + select.PIPE_BUF])


class TokenFiles:
    """The tokens, read from their files again and again, as they are rotated."""

    def __init__(self, config: Config) -> None:
        self.config, self.question, self.paths = config, Question(self.read), {}
        for name in SECRETS:
            path = getattr(config, f"{name}_file")
            if path and path != "-" and (os.path.isfile(path) or not os.path.exists(path)):
                self.paths[name] = path         # and not a pipe, which is read once
                with contextlib.suppress(OSError):
                    if os.stat(path).st_mode & 0o004:
                        LOG.warning("any user of this machine can read %s: `chmod 600` it",
                                    printable(path))

    def read(self) -> dict[str, Secret | AgentError]:
        """The token of each name, or what is wrong with its file."""
        found: dict[str, Secret | AgentError] = {}
        for name, path in self.paths.items():
            try:
                if not os.path.isfile(path):    # as a pipe would never end
                    raise AgentError("there is no such file")
                found[name] = read_token(path)
            except AgentError as error:
                found[name] = error
        return found

    def read_again(self) -> None:
        """Uses a new token from now on; while a file is not good, the old one."""
        try:
            found = self.question.poll(K3S_PATIENCE) if self.paths else {}
        except (TimeoutError, RuntimeError):
            return
        for name, token in found.items():
            if isinstance(token, AgentError):
                until_then = "the last one is used" if getattr(self.config, name) else "waiting"
                LOG.warning(f"--{name.replace('_', '-')}-file: no token can be read from"
                            f" {printable(self.paths[name])}, {token}; {until_then} until then")
            elif token != getattr(self.config, name):
                self.config.redactor.remember(name, token)
                setattr(self.config, name, token)
                LOG.info("there is a new token in %s", printable(self.paths[name]))


class Report:
    """What people are told of this machine: log lines, systemd's status, and the status record."""

    def __init__(self, config: Config, state: State, proxy: str) -> None:
        LOG.filters = [Repeats()]
        self.config, self.state, self.proxy = config, state, proxy
        way = proxy or config.ssh
        self.started_at = self.told_at = read_clock()
        self.counts = {"kept_alive": 0, "failed": 0, "registered": 0}
        self.history: collections.deque[Any] = collections.deque(maxlen=60)
        self.ready_since: float | None = None
        self.failure = self.placement = self.reason = self.notice = self.stopped_why = ""
        LOG.info("machine %s, pool %s, gateway %s%s", state.machine_id, config.pool_name,
                 config.gateway, f" through {way}" if way else "")
        self.workers: set[str] = set()              # that the log has told of
        self.written: tuple[Any, ...] = ()          # what the record told last

    def call_failed(self, call: str, outcome: Outcome, lease: Lease, now: float) -> None:
        if STOP.is_set():       # it was cut short
            return
        self.counts["failed"] += 1
        self.failure = f"{call} failed, {outcome.text}. {outcome.remedy}"
        for_long = ""
        if lease.failing_since is not None and now - lease.failing_since >= 1:
            for_long = f" for {format_seconds(now - lease.failing_since)}"
        passing = outcome.kind in (Kind.TROUBLE, Kind.FORGOTTEN)
        cause = outcome.text.replace("%", "%%")     # in the format: another one is told at once
        LOG.log(logging.WARNING if passing else logging.ERROR, f"{call} failed%s, {cause}; trying"
                " again in %.1f s. %s", for_long, max(lease.due - now, 0.0), outcome.remedy)

    def kept_alive(self, before: Lease, lease: Lease, offer: Offer, now: float) -> None:
        """Tells of a keepalive where that changes something, else once in QUIET seconds."""
        failing = before.failing_since
        if lease.failing_since is None:
            self.failure = ""
        if before.kept_at is None:
            LOG.info("ready after %.2f s", now - self.started_at)
            notify_systemd("READY=1")
        elif failing is not None and before.kept_at < failing:      # and not only a change is owed
            LOG.info("ready again after %s", format_seconds(now - failing))
        elif now - self.told_at > QUIET:
            self.told_at = now
            LOG.info("ready, offers %s", format_offer(offer))
            return
        else:
            return
        self.told_at = self.ready_since = now

    def call_ended(self, call: str, outcome: Outcome, before: Lease, lease: Lease, offer: Offer,
                   metrics: Metrics, began: float) -> None:
        now = read_clock()
        if outcome.kind is not Kind.OK:
            self.call_failed(call, outcome, lease, now)
        elif call == REGISTER:
            self.counts["registered"] += 1
            again = "" if before.kept_at is None else " again"
            LOG.info("registered%s, %s", again, format_offer(offer))
            if outcome.placement not in ("", self.placement):
                LOG.warning("no work will come: %s", outcome.placement)
            self.placement = outcome.placement
        else:
            self.counts["kept_alive"] += 1
            self.history.append({"ms": round((now - began) * 1000, 1),
                                 "cpu": metrics.cpu_utilization_pct,
                                 "memory": metrics.memory_utilization_pct})
            self.kept_alive(before, lease, offer, now)

    def looked(self, view: K3sView, reason: str) -> None:
        """Tells what has changed in k3s, and why not all is offered."""
        if reason not in ("", self.reason):
            LOG.error(reason)
        elif self.reason and not reason:
            LOG.info("all that is here is offered again")
        self.reason = reason
        if view.notice not in ("", self.notice):
            LOG.warning(view.notice)
        self.notice = view.notice
        if view.workers is not None and set(view.workers) != self.workers:
            came, ended = (", ".join(sorted(names)[:5]) or "none" for names in (
                set(view.workers) - self.workers, self.workers - set(view.workers)))
            LOG.info("workers: %d; came: %s; ended: %s", len(view.workers), came, ended)
            self.workers = set(view.workers)

    def describe_k3s(self, view: K3sView) -> dict[str, Any]:
        workers = list((view.workers or {}).items())
        asked = self.config.k3s_ca_file and not self.config.dev
        return {"state": "unusable" if view.fault else "usable" if asked else "not asked",
                "fault": view.fault, "notice": view.notice,
                "node": view.node._asdict() if view.node else None,
                "token_valid_until": parse_expiry(self.config.k3s_token),
                "worker_count": None if view.workers is None else len(workers),
                "workers": [{"name": name, **each._asdict()} for name, each in workers[:50]]}

    def write(self, state: str, lease: Lease, offer: Offer, host: Host, view: K3sView) -> None:
        """Writes the status record, and has systemd show its headline, where they changed."""
        config, now, mark = self.config, read_clock(), (state, lease, offer, view, self.reason)
        if mark == self.written:
            return
        self.written = mark
        gpus = None if host.gpus is None else [gpu._asdict() for gpu in host.gpus if gpu.name]
        record = {
            "format": 2, "agent_version": VERSION, "state": state, "stopped_why": self.stopped_why,
            "machine_id": self.state.machine_id, "pool_name": config.pool_name,
            "provider_name": config.provider_name, "gateway": config.gateway, "proxy": self.proxy,
            "ssh": config.ssh, "pid": os.getpid(), "wall_clock": time.time(), "clock": now,
            "started_at": self.started_at, "ready_since": self.ready_since,
            "failing_since": lease.failing_since, "failure": self.failure,
            "last_keepalive_at": lease.kept_at, "next_attempt_at": lease.due, "ttl": lease.ttl,
            "lease_ends_at": lease.confirmed_at + lease.ttl if lease.registered else None,
            **self.counts, "offer": offer._asdict(), "warning": self.reason,
            "placement": self.placement, "metrics": host.metrics._asdict(),
            "gpus": gpus, "lost_gpus": len(host.gpus or ()) - len(gpus or ()),
            "k3s": self.describe_k3s(view), "history": list(self.history)}
        clean = as_mapping(parse_json(config.redactor.redact(json.dumps(record))))
        notify_systemd(f"STATUS={judge(clean, state == 'running', now)[1]}")
        self.state.write(".status.json", clean, 0o644)


def leave(gateway: GatewayClient, config: Config, machine_id: str, lease: Lease) -> None:
    """Registers one last time: a machine that is only registered gets no more work. Not where the
    last call failed, as a stop must not wait for anybody.
    """
    notify_systemd("STOPPING=1")
    LOG.info("stopping")
    if lease.kept_at is None:       # it was never ready
        return
    told = False
    if lease.registered and lease.failing_since is None:
        last = lease.registered._replace(k3s_token=config.k3s_token)
        STOP.patience = LEAVE_DEADLINE      # from the signal on
        payload = register_payload(config, machine_id, last)
        told = gateway.send(REGISTER, payload, LEAVE_DEADLINE).kind is Kind.OK
    if not told:
        LOG.warning("the gateway was not told: work may come for up to %s, until you drain this"
                    " machine with `beta9 machine drain`", format_seconds(lease.ttl))


def keep(config: Config, state: State) -> int:
    """Registers this machine and keeps it ready until told to stop; the exit code."""
    gateway, host, tokens = GatewayClient(config), Host(config), TokenFiles(config)
    k3s = K3sWatch(config, state.machine_id)
    report = Report(config, state, gateway.peer if gateway.proxy else "")
    lease, private_ip = Lease(due=report.started_at), find_private_ip()
    offer, promise = Offer(0, 0, 0), Promise(state.promised, from_before=True)
    try:
        while not STOP.is_set():
            # What is here?
            tokens.read_again()
            view = k3s.look()
            if read_clock() >= lease.due:
                host.sample()
                private_ip = find_private_ip() or private_ip

            # What should the gateway know of it?
            now = read_clock()
            known = None        # what is registered, unless a registration was not answered
            if lease.registered is not None and lease.unanswered is None:
                known = lease.registered.offer
            offer, promise, reason = plan_offer(host.capacity.value, promise, view, known, now)
            wanted = Registration(offer, config.k3s_token, private_ip)
            report.looked(view, reason)

            # Tell it, if it is time.
            call, lost_ssh = next_call(lease, wanted, now), gateway.has_lost_ssh()
            due = min(next_due(lease, call, lost_ssh, now),     # or a last call, as patience ends
                      patience_ends(lease, report.started_at, config))
            if now >= due:
                if call == REGISTER:
                    state.keep_promise(offer)
                metrics = host.metrics._replace(worker_count=count_running(view.workers))
                payload = (register_payload(config, state.machine_id, wanted) if call == REGISTER
                           else keepalive_payload(config, state.machine_id, metrics))
                outcome = gateway.send(call, payload, deadline_of(call, lease, config))
                before, ended = lease, read_clock()
                lease = lease_after(before, call, wanted, outcome, ended, config, random.uniform)
                code = exit_code_after(outcome, lease, report.started_at, ended, config)
                if code is not None and not STOP.is_set():
                    raise AgentError(f"giving up after {ended - report.started_at:.1f} s: {call}"
                                     f" failed, {outcome.text}. {outcome.remedy}", code)
                report.call_ended(call, outcome, before, lease, offer, metrics, now)
                if config.once and lease.kept_at is not None:
                    return 0
            report.write("running", lease, offer, host, view)

            # Wait for the next call, or the next look; after a call the next turn waits.
            if now < due:
                STOP.wait_until(min(due, now + LOOK_PERIOD),
                                lambda: not lost_ssh and gateway.has_lost_ssh())
        tokens.read_again()
        leave(gateway, config, state.machine_id, lease)
        return 0
    except Exception as error:
        report.stopped_why = printable(error if isinstance(error, AgentError) else repr(error), 500)
        raise
    finally:
        gateway.http.close()
        report.write("stopped", lease, offer, host, k3s.view)


# ---- 10 Stand-in gateway
def start_stand_in() -> int:
    """A gateway for --dev, on loopback, that takes any machine; its port."""
    import http.server
    confirmation = b'{"status": "ok", "machine_state": {"ttl_seconds": 300}}'

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(confirmation)

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    start_new_thread(server.serve_forever, ())
    return server.server_port


# ---- 11 Check and status
def read_program() -> bytes:
    """This very file. Raises AgentError where there is none."""
    try:
        with open(__file__, "rb") as file:
            return file.read()
    except OSError:
        raise AgentError("this program is in no file that a script could carry: save it as one,"
                         " then run that") from None


def format_version() -> str:
    """The version, and the first digits of this file's SHA-256."""
    digest = "from no file"
    with contextlib.suppress(AgentError):
        digest = hashlib.sha256(read_program()).hexdigest()[:12]
    return f"beta9-agent {VERSION} ({digest})"


def find_in(tree: object, *keys: str) -> Any:
    """What stands below these keys; None for nothing."""
    for key in keys:
        tree = as_mapping(tree).get(key)
    return tree


def find_record(config: Config) -> tuple[bool, float, dict[str, Any]]:
    """The status record of the agent that runs, else the newest one, wherever it may be kept, {}
    for none; before it whether that agent runs, and when the record was written.
    """
    import glob
    found: list[tuple[bool, float, dict[str, Any]]] = []
    folders = {config.state_dir or "/var/lib/beta9-agent"}      # the service's, for other users too
    with contextlib.suppress(AgentError):       # of a user without a home
        folders.add(find_state_dir(config))
    for folder in folders:
        found.append((is_locked(folder), 0.0, {}))      # it may have written no record yet
        for path in glob.glob(f"{glob.escape(folder)}/{config.machine_id or '*'}.status.json"):
            with contextlib.suppress(AgentError):
                record = as_mapping(parse_json(read_file(path)))
                if record.get("format") == 2:       # else it is damaged, or of another version
                    owners = "", str(record["pid"])     # "" by a full disk
                    running = is_locked(folder) and read_file(f"{folder}/lock").strip() in owners
                    found.append((running, record["wall_clock"], record))
    return max(found, key=lambda row: row[:2])


def read_status(config: Config) -> dict[str, Any]:
    """What --json prints: the record, with the verdict and the time. Raises AgentError."""
    try:
        running, _, record = Question(lambda: find_record(config)).ask(
            read_clock() + HOST_DEADLINE)
    except TimeoutError:
        raise AgentError("the state folder hangs: is its server away? See `df`", 1) from None
    now = read_clock()
    code, headline = judge(record, running, now)
    return {**record, "exit_code": code, "summary": headline, "now": now}


def format_span(begin: float | None, end: float | None) -> str:
    return "?" if begin is None or end is None else format_seconds(end - begin)


def draw_history(status: Mapping[str, Any], title: str, name: str, unit: str, top: float) -> str:
    """A sign for each of the last 60 keepalives, from 0 to `top` or more; the last as a number."""
    values = [entry[name] for entry in status["history"]] or [None]
    top = max(top, *(value or 0.0 for value in values))
    signs = "".join(" " if value is None else "▁▂▃▄▅▆▇█"[round(value / top * 7)]
                    for value in values)
    return f"{title:<11}{signs:<60} " + ("?" if values[-1] is None else f"{values[-1]:.0f} {unit}")


def draw_running(status: Mapping[str, Any], room: int) -> list[str]:
    """What is known of an agent that runs, in at most `room` lines."""
    now, k3s = status["now"], status["k3s"]
    busy = [gpu["free"] for gpu in status["gpus"] or ()].count(False)
    count = "?" if k3s["worker_count"] is None else k3s["worker_count"]
    lines = [
        f"agent      {status['agent_version']}, pid {status['pid']}, started"
        f" {format_span(status['started_at'], now)} ago",
        f"keepalive  last {format_span(status['last_keepalive_at'], now)} ago, next in"
        f" {format_span(now, status['next_attempt_at'])}, lease ends in"
        f" {format_span(now, status['lease_ends_at'])}",
        f"offers     {format_offer(Offer(**status['offer']))}, {busy} in use,"
        f" {status['lost_gpus']} lost",
        f"k3s        {k3s['state']}, workers: {count}"]
    lines += [f"  {worker['name']:<45.45} {format_span(worker['since'], now):>8}"
              f"  {worker['status']}" for worker in k3s["workers"]]
    if len(lines) > room - 4:
        lines[room - 5:] = ["  more: `kubectl get pods`"]
    return [*lines, "", draw_history(status, "CPU", "cpu", "%", 100.0),
            draw_history(status, "memory", "memory", "%", 100.0),
            draw_history(status, "round trip", "ms", "ms", 1.0)]


def draw_status(status: Mapping[str, Any]) -> list[str]:
    """The status on a screen of 80 columns and 24 lines."""
    import textwrap
    headline, running = status["summary"], status["exit_code"] != 3
    if "format" not in status:
        return [headline, "No record can be read: start an agent, or give its --state-dir"]
    notes = [f"! {note}" for note in (status["warning"], status["k3s"]["notice"])
             if running and note not in headline]
    lines = [line for each in [headline, *notes] for line in textwrap.wrap(each, 79)][:6]
    way = status["proxy"] or status["ssh"]
    lines += ["", f"machine    {status['machine_id']}, pool {status['pool_name']}, provider"
              f" {status['provider_name']}",
              f"gateway    {status['gateway']}" + (f" through {way}" if way else "")]
    if running:
        lines += draw_running(status, 23 - len(lines))
    else:
        why = status["stopped_why"] or "as asked; for a start since then see its log"
        if status["state"] != "stopped":
            why = "without a word: see its log"
        lines += textwrap.wrap(f"stopped    {format_span(status['wall_clock'], time.time())} ago,"
                               f" {why}", 79)
    return [printable(line, 79) for line in lines]


def label(name: str, value: str) -> str:
    """A label for Prometheus, which quotes printable text as JSON does."""
    return f"{name}={json.dumps(printable(value), ensure_ascii=False)}"


def measure(status: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics; a mapping holds a value for each label; None is unknown. Of an agent that does
    not run only that is told.
    """
    code, now = status["exit_code"], status["now"]
    metrics = {"up": code != 3, "ready": False, "takes_work": code == 0}
    if code == 3 or "format" not in status:
        return metrics
    kept, end, k3s = status["last_keepalive_at"], status["lease_ends_at"], status["k3s"]
    states = [worker["status"] for worker in k3s["workers"]]
    workers = {label("state", state): states.count(state) for state in ["Running", *states]}
    return {
        **metrics, "ready": kept is not None and end is not None and end > now,
        "info": {label("version", status["agent_version"]): 1},
        "last_keepalive_seconds": None if kept is None else now - kept,
        "lease_left_seconds": None if end is None else end - now,
        "round_trip_seconds": status["history"][-1]["ms"] / 1000 if status["history"] else None,
        "keepalives_total": status["kept_alive"], "failures_total": status["failed"],
        "registrations_total": status["registered"], "lost_gpus": status["lost_gpus"],
        "offered_cpu_cores": status["offer"]["cpu"] / 1000,
        "offered_memory_mebibytes": status["offer"]["memory"],
        "offered_gpus": status["offer"]["gpu_count"],
        "free_gpus": status["metrics"]["free_gpu_count"],
        "workers": None if k3s["worker_count"] is None else workers,
        "k3s_usable": {"usable": 1, "unusable": 0}.get(k3s["state"]),
        "k3s_token_expiry_timestamp_seconds": k3s["token_valid_until"]}


def format_prometheus(status: Mapping[str, Any]) -> str:
    """The status in Prometheus' text format. Source: its page "exposition formats"."""
    lines = []
    machine = [label("machine_id", status.get("machine_id", "?")),
               label("pool", status.get("pool_name", "?"))]
    for name, found in measure(status).items():
        if found is None:
            continue
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP beta9_agent_{name} {name.replace('_', ' ')}",
                  f"# TYPE beta9_agent_{name} {kind}"]
        for own, value in found.items() if isinstance(found, dict) else [("", found)]:
            labels = ",".join([*machine, own] if own else machine)
            lines.append(f"beta9_agent_{name}{{{labels}}} {float(value):.15g}")
    return "\n".join(lines)


def show_status(config: Config) -> int:
    try:
        status = read_status(config)
        text = (json.dumps(status) if config.json else format_prometheus(status)
                if config.prometheus else "\n".join(draw_status(status)))
    except (LookupError, TypeError, ValueError):
        raise AgentError("the status record is damaged: restart the agent", 1) from None
    print(text)
    return int(status["exit_code"])


OK, WARN, FAIL = "ok", "warn", "fail"
Findings = Iterator[tuple[str, str]]    # a mark of these, and words for people with the remedy


def explain_exception(error: Exception) -> str:
    """What ends the program, or a check, with the remedy."""
    if isinstance(error, AgentError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {error.name} is missing: {how_to_install()}, then start again"
    if isinstance(error, TimeoutError):
        return "no end in time: see what hangs here, by `dmesg` and `df`"
    if isinstance(error, OSError):
        return f"{explain_error(error)}: mend that, and start it again"
    return f"unexpected {type(error).__name__}: report it with its traceback"


class Bench:
    """What the checks look at."""

    def __init__(self, config: Config) -> None:
        self.config, self.until = config, read_clock() + 9.0     # for the check under way

    def look(self) -> None:
        """Looks at the machine and its k3s. Raises AgentError, ModuleNotFoundError."""
        self.status = read_status(self.config)
        self.client, self.host = GatewayClient(self.config), Host(self.config)
        self.k3s = K3sWatch(self.config, self.config.machine_id
                            or self.status.get("machine_id", ""))
        self.k3s.question.start()       # at once with the machine, where both can hang
        self.host.sample()
        self.view = self.k3s.question.ask(self.until)
        self.offer, self.shortage = fit_to_node(self.host.capacity.value, self.view)

    def request(self, path: str, status: int = 200, body: str | None = None) -> Any:
        """The JSON that the gateway answers. Raises AgentError for another status."""
        call = KEEPALIVE if body else path
        try:
            answer = self.client.request(path, body, self.until)
            said = parse_json(answer.body)
            if answer.status == status and isinstance(said, (dict, list)):
                return said
            if as_mapping(said).get("message") == "Unable to create remote config":
                return {"config": None}
            outcome = explain_answer(call, answer, self.config)
        except Exception as error:  # of any kind: a stranger's bytes went through the libraries
            outcome = self.client.explain(error)
        raise AgentError(f"{outcome.text}. {outcome.remedy}")


def check_settings(bench: Bench) -> Findings:
    yield OK, f"Python {sys.version.split()[0]}, {sys.executable}"
    for problem in bench.config.problems:
        yield FAIL, problem
    if not bench.config.problems:
        bench.look()


def check_gateway(bench: Bench) -> Findings:
    start = read_clock()
    bench.request("/health")
    yield OK, f"{bench.client.peer} answers in {(read_clock() - start) * 1000:.0f} ms"
    query = urllib.parse.urlencode({"pool_name": bench.config.pool_name,
                                    "provider_name": bench.config.provider_name})
    machines = as_list(bench.request(f"/machine/list?{query}"))
    yield OK, f"the token is accepted; ready machines of this pool: {len(machines)}"
    # The gateway refuses a keepalive of no machine with 400, and changes nothing.
    bench.request("/machine/keepalive", 400, "{}")
    yield OK, "it has a keepalive route"


# What workers must reach, by the gateway's configuration, and the port where none is given.
PLACES = (("database.redis.addrs", 6379), ("gateway_service.grpc.external_host", 0),
          ("storage.juicefs.redis_uri", 6379), ("storage.juicefs.aws_s3_bucket", 443),
          ("worker.image_registry", 443))


def check_places(settings: object, until: float) -> Findings:
    """Connects to each place that workers need, all at once, and says nothing there."""
    questions = {}
    for setting, usual_port in PLACES:
        value = find_in(settings, *setting.split("."))
        for each in as_list(value)[:8] or [value]:
            with contextlib.suppress(ValueError):
                url = urllib.parse.urlsplit(str(each) if "://" in str(each) else f"//{each}")
                port = url.port or (80 if url.scheme == "http" else usual_port)
                port = port or find_in(settings, "gateway_service", "grpc", "external_port")
                if url.hostname not in (None, "none"):
                    question = Question(functools.partial(
                        socket.create_connection, (url.hostname, port), 3.0))
                    question.start()
                    questions[setting, printable(f"{url.hostname}:{port}")] = question
    for (setting, place), question in questions.items():
        try:
            question.ask(until).close()
            yield OK, f"{place} can be reached ({setting})"
        except (OSError, UnicodeError) as error:
            yield FAIL, (f"{place} cannot be reached, {explain_error(error)}: correct {setting} on"
                         " the gateway, or the network")


def check_pool(bench: Bench) -> Findings:
    """The pool in the gateway's configuration, and each address there that workers need."""
    config, offer = bench.config, bench.offer
    fields, name = as_mapping(bench.request("/machine/config")), config.pool_name
    settings = fields.setdefault("config", None)
    pool = find_in(settings, "worker", "pools", name)
    cpu, memory = (find_in(pool, "pool_sizing", f"default_worker_{each}")
                   for each in ("cpu", "memory"))
    fault = explain_placement(fields, config)
    if fault:
        yield FAIL, fault
    elif pool is None:
        yield FAIL, f"the gateway has no pool {name}: check --pool-name"
    elif ((parse_quantity(cpu) or 0) * 1000 > offer.cpu
          or (parse_quantity(memory) or 0) > offer.memory * 2 ** 20):
        yield FAIL, (
            f"a worker of this pool needs {printable(cpu, 20)} CPU and {printable(memory, 20)}"
            f" memory, and {format_offer(offer)} are offered here: raise --max-cpu or --max-memory,"
            " or lower the pool's pool_sizing on the gateway")
    else:
        yield OK, f"{name} takes machines such as this one"
    yield from check_places(settings, bench.until)


def check_rules(bench: Bench) -> Findings:
    """Whether the k3s token may do with jobs what the gateway does. It has listed the pods."""
    answer = bench.k3s.request(
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", json.dumps({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": "default"}}), bench.until)
    if answer.status != 201:
        raise AgentError(explain_k3s_answer(answer))
    allowed = {verb for rule in as_list(find_in(parse_json(answer.body), "status", "resourceRules"))
               if {"jobs", "*"} & set(as_list(find_in(rule, "resources")))
               for verb in as_list(find_in(rule, "verbs"))}
    missing = [f"{verb} jobs" for verb in ("list", "create", "delete")
               if not {verb, "*"} & allowed]
    yield (FAIL, f"the k3s token may not {', '.join(missing)}: {TRY_ACCOUNT}") if missing else (
        OK, "the token may do all that the gateway does there")


def check_hostname(bench: Bench) -> Findings:
    """Whether the gateway's way to k3s leads to this machine, by the certificate there."""
    import ssl
    config, k3s = bench.config, bench.k3s
    place = f"{format_host(config.hostname)}:6443"
    try:
        here, there = (
            Question(functools.partial(ssl.get_server_certificate, each, timeout=2.0)).ask(
                bench.until) for each in ((k3s.host, k3s.port), (config.hostname, 6443)))
        yield (OK, f"{place} leads here") if here == there else (
            FAIL, f"{place} shows another certificate than {config.k3s_url}, so another machine"
            " would get the k3s token: correct --hostname")
    except (OSError, UnicodeError) as error:
        yield WARN, f"{place} cannot be reached, {explain_error(error)}: check --hostname"


def check_k3s(bench: Bench) -> Findings:
    """This machine's k3s, as the agent looks at it, and as the gateway would use it."""
    config, view = bench.config, bench.view
    if not config.hostname:
        yield FAIL, "--hostname is missing: give the host or IP by which the gateway reaches k3s"
    if view.fault:
        raise AgentError(view.fault)
    if config.k3s_ca_file:
        expiry = parse_expiry(config.k3s_token)
        left = math.inf if expiry is None else expiry - time.time()
        text = "accepts the token" + ("" if expiry is None else f" for {format_seconds(left)}")
        yield (OK, text) if left > 86400 else (
            WARN, f"{text}: `systemctl start beta9-k3s-token` or `kubectl create token` makes one")
        yield from check_rules(bench)
    if view.notice:
        yield WARN, view.notice
    if view.node is not None:
        yield OK, f"its node takes pods, and has {format_offer(view.node)} for them"
    if bench.shortage:
        yield (WARN if view.node is not None and view.node.gpu_count else FAIL), bench.shortage
    if config.hostname:
        yield from check_hostname(bench)


def check_gpus(bench: Bench) -> Findings:
    gpus, runtime = bench.host.gpus, "/usr/bin/nvidia-container-runtime"
    if gpus is None:
        raise AgentError("the NVIDIA driver does not answer: look at `nvidia-smi` and `dmesg`")
    for index, gpu in enumerate(gpus):
        if gpu.name is None:
            yield FAIL, f"{index}: lost: look at `nvidia-smi` and `dmesg`"
        else:
            yield OK, f"{index}: {gpu.name}, {'free' if gpu.free else 'in use'}"
    if gpus and not os.path.exists(runtime):
        yield WARN, f"{runtime} is missing: install NVIDIA's container toolkit, and restart k3s"
    for text in TOLD:       # when the driver was asked
        yield (WARN if gpus else FAIL), text
    if not gpus and not TOLD:
        yield OK, "none"


def find_parent(path: str) -> str:
    """The nearest folder above a path that is there."""
    while not os.path.exists(path):
        path = os.path.dirname(path) or "."
    return path


def check_machine(bench: Bench) -> Findings:
    private_ip, images = find_private_ip(), "/var/lib/rancher/k3s"
    yield OK, format_offer(bench.offer) + (f", private IP {private_ip}" if private_ip else "")
    if not os.path.exists("/dev/fuse"):
        yield FAIL, "/dev/fuse is missing, which workers need: `modprobe fuse`"
    if "." not in private_ip:
        yield FAIL, "there is no IPv4 default route, without which workers end: see `ip route`"
    disk = os.statvfs(find_parent(images))
    free = disk.f_bavail * disk.f_frsize / 1000 ** 3
    if free < 30:
        yield WARN, f"{free:.0f} GB are free for {images}, and images need 30: make room"
    try:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", 9090))
    except OSError:
        yield WARN, "port 9090, which a worker needs, is taken: if by no worker, stop what has it"
    folder, status = find_state_dir(bench.config), bench.status
    if not os.access(find_parent(folder), os.W_OK):
        yield FAIL, f"this user cannot write {folder}: let it, or give another --state-dir"
    if status["exit_code"] != 3:
        yield WARN if status["exit_code"] else OK, f"an agent runs here: {status['summary']}"


# Each check, and the one that must have gone well before.
CHECKS: list[tuple[str, str, Callable[[Bench], Findings]]] = [
    ("settings", "", check_settings), ("gateway", "settings", check_gateway),
    ("pool", "gateway", check_pool), ("k3s", "settings", check_k3s),
    ("GPUs", "settings", check_gpus), ("machine", "settings", check_machine)]


def find_all(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """What all checks find, one after another, each until something ends it, or hangs."""
    failed = set()      # and what was not checked: a check that is skipped only warns
    for name, needed, check in CHECKS:
        skipped = iter([(WARN, f"not checked: mend {needed} first")])
        findings = skipped if needed in failed else check(bench)
        question = Question(functools.partial(next, findings, None))
        try:
            found = question.ask(bench.until + 0.5)
            while found is not None:
                yield (name, *found)
                if found[0] != OK:
                    failed.add(name)
                found = question.ask(bench.until + 0.5)
        except Exception as error:      # of any kind: the other checks go on
            LOG.debug("where", exc_info=True)
            failed.add(name)
            yield name, FAIL, explain_exception(error)
        bench.until += 1.0
    with contextlib.suppress(Exception):    # it may not be there, or be under way
        bench.client.http.close()


def show_check(config: Config) -> int:
    import textwrap
    STOP.install()
    STOP.patience = 0.0
    if not config.debug:
        logging.disable(logging.WARNING)        # what is wrong stands in the findings
    found = [{"check": name, "result": mark, "text": config.redactor.redact(text)}
             for name, mark, text in find_all(Bench(config))]
    if STOP.is_set():
        raise AgentError("interrupted: nothing was changed", 1)
    faults = [each["result"] for each in found].count(FAIL)
    if config.json:
        print(json.dumps({"ok": not faults, "findings": found}))
    else:
        signs = {OK: "✓", WARN: "!", FAIL: "✗"}
        for each in found:
            line = f"{signs[each['result']]} {each['check']:<9} {each['text']}"
            print(textwrap.fill(line, 79, subsequent_indent=" " * 12, break_long_words=False,
                                break_on_hyphens=False))
        print("\n" + (f"{faults} to mend before work" if faults else "work") + " can run here")
    return 1 if faults else 0


def show_dry_run(config: Config) -> None:
    """Prints the settings and what would be sent, without the network."""
    client, host, redact = GatewayClient(config), Host(config), config.redactor.redact
    for option in SETTINGS:
        value, source = getattr(config, option.name), config.sources.get(option.name)
        shown = "not set" if value is None else printable(value)
        print(redact(f"{option.name}: {shown}  ({source or 'default'})"))
    host.sample()
    machine_id = (config.machine_id or read_machine_id(find_state_dir(config))
                  or "new at the first start")
    wanted = Registration(host.capacity.value, config.k3s_token, find_private_ip())
    print(f"\nsends this to {client.peer}, where k3s gives no reason to offer less:")
    for call, payload in ((REGISTER, register_payload(config, machine_id, wanted)),
                          (KEEPALIVE, keepalive_payload(config, machine_id, host.metrics))):
        text = json.dumps(payload, indent=2, default=repr)
        print(f"POST {config.gateway}/api/v1/machine/{call} {redact(text)}")


# ---- 12 Install
# Of both scripts, each one function in braces that its last line calls: a pipe that breaks off
# anywhere runs nothing.
BEGIN = r"""# shellcheck disable=SC2034,SC2086,SC2317,SC2329  # split words; traps
{ main() {
set -eu
umask 022
unset KUBECONFIG K3S_URL K3S_TOKEN # another cluster's?
export LC_ALL=C PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
opt=/opt/beta9-agent etc=/etc/beta9-agent state=/var/lib/beta9-agent user=beta9-agent
wrapper=/usr/local/bin/beta9-agent units=/etc/systemd/system k3s=/run/beta9-k3s
manifest=/var/lib/rancher/k3s/server/manifests/beta9-agent.yaml # k3s itself applies it
log=/run/beta9-agent-install.log failure=1 outcome=''
say() { printf 'beta9-agent: %s\n' "$1" >&3 || :; }
fail() { doing=''; trap '' PIPE; printf 'beta9-agent: %s\n' "$1$outcome" >&4 || :; exit $failure; }
exec 3>&1 4>&2 </dev/null
[ "$(id -u)" = 0 ] || fail 'this must run as root: pipe it into sudo sh'
[ -d /run/systemd/system ] || fail 'systemd does not run here: start the agent by hand'
exec 9>/run/beta9-agent.lock
flock -n 9 || fail 'another run is under way: wait until it ends'
"""

FILES = {"unit": """[Unit]
Description=beta9-agent, keeps this machine ready for its Beta9 gateway
Wants=network-online.target nvidia-persistenced.service
# After the boot, which is over without the gateway.
After=network-online.target nvidia-persistenced.service multi-user.target

[Service]
Type=notify
TimeoutStartSec=infinity
WatchdogSec=120
Restart=always
RestartSec=30
KillMode=mixed
TimeoutStopSec=10
ExecStart=/opt/beta9-agent/venv/bin/python -I -m beta9_agent --config /etc/beta9-agent/agent.yaml
User=beta9-agent
StateDirectory=beta9-agent
UMask=0077
LimitCORE=0
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
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
""", "wrapper": """#!/bin/sh
# The agent with the settings of the service, and by root as its user, whose files and ssh it uses.
if [ "$(id -u)" = 0 ]; then
    exec setpriv --reuid=beta9-agent --regid=beta9-agent --init-groups --reset-env "$0" "$@"
fi
exec /opt/beta9-agent/venv/bin/python -I -m beta9_agent --config /etc/beta9-agent/agent.yaml "$@"
""", "uninstall": r"""#!/bin/sh
# Takes beta9-agent away: service, k3s tokens, program, settings, state, user. Run it as root; what
# is left of a run that was cut off goes with the next. k3s, its workers, NVIDIA's packages stay.
""" + BEGIN + r"""
for unit in beta9-agent.service beta9-k3s-token.timer beta9-k3s-token.service; do
    systemctl -q disable --now $unit 2>/dev/null || : # it is not there
done
! systemctl -q is-active beta9-agent || fail 'the service does not stop: see its log'
[ ! -e $manifest ] || mv $manifest $manifest.old # k3s would bring back what is in it
if [ -s $manifest.old ] && command -v k3s >/dev/null; then
    k3s kubectl delete --ignore-not-found --request-timeout=10s -f $manifest.old ||
        fail 'k3s does not answer, so its tokens stay valid: start or remove it, and run this again'
fi
rm -rf $units/beta9-agent.service $units/beta9-agent.service.old $units/beta9-k3s-token.* $k3s \
    $manifest.* $wrapper $wrapper.old $opt $opt.old $opt.new $etc $etc.new $state $log \
    /run/beta9-agent.lock
rmdir -p ${manifest%/*} 2>/dev/null || : # where k3s never was
systemctl daemon-reload
systemctl reset-failed beta9-agent.service beta9-k3s-token.service 2>/dev/null || :
! id $user >/dev/null 2>&1 || userdel $user
say 'gone; the gateway forgets this machine 5 minutes after its last keepalive'
}
main; exit; }
""", "k3s-account": """# For what the gateway does in k3s, and the agent's look at the node.
apiVersion: v1
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
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: beta9-gateway}
rules:
  - {apiGroups: [""], resources: [nodes], verbs: [get, list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: beta9-gateway}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: beta9-gateway}
subjects: [{kind: ServiceAccount, name: beta9-gateway, namespace: default}]
""", "k3s-token": """#!/bin/sh
# Has k3s make the gateway's token, good for two days. Run by beta9-k3s-token.service.
set -eu
cd /run/beta9-k3s
ask() { k3s kubectl --request-timeout=8s -n default "$@"; }
ask config view --minify --raw -o 'jsonpath={.clusters[0].cluster.certificate-authority-data}' |
    base64 -d >ca.crt.new
ask create token beta9-gateway --duration=48h >token.new
for name in ca.crt token; do
    [ -s $name.new ]
    mv $name.new $name
done
""", "k3s-token-service": """[Unit]
Description=Has k3s make the gateway's token, for beta9-agent
After=k3s.service

[Service]
Type=oneshot
ExecCondition=/bin/sh -c 'command -v k3s'
ExecStart=/bin/sh /opt/beta9-agent/k3s-token
TimeoutStartSec=60
Restart=on-failure
RestartSec=15
Group=beta9-agent
UMask=0027
RuntimeDirectory=beta9-k3s
RuntimeDirectoryPreserve=yes
NoNewPrivileges=yes
ProtectSystem=full
ProtectHome=yes
PrivateTmp=yes

[Install]
WantedBy=k3s.service
""", "k3s-token-timer": """[Unit]
Description=Has k3s make a new token for beta9-agent twice a day

[Timer]
OnActiveSec=0
OnUnitActiveSec=12h

[Install]
WantedBy=timers.target
""", "k3s-device-plugin": """# Tells k3s its cards. Source: NVIDIA's k8s-device-plugin.
apiVersion: apps/v1
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
"""}

INSTALL_K3S = r"""
fetch() { curl -fsSL --proto =https -m 120 "$1" -o "$2"; }
# Where k3s is missing, its own installer is run, and with a card NVIDIA's toolkit comes before.
has_card() { [ -e /dev/nvidiactl ] || command -v nvidia-smi; }
if ! systemctl cat k3s.service && ! systemctl cat k3s-agent.service; then
    runtime=/usr/bin/nvidia-container-runtime nvidia=https://nvidia.github.io/libnvidia-container
    command -v curl || { step 'installing curl'; packages curl ca-certificates; }
    if has_card && [ ! -e $runtime ]; then # before k3s, which looks for it when it starts
        step "installing NVIDIA's container toolkit"
        key=/etc/apt/keyrings/nvidia-container-toolkit.asc
        grep -qrs $nvidia /etc/apt/sources.list* || { # apt takes it once only
            install -d ${key%/*}
            fetch $nvidia/gpgkey $key
            echo "deb [signed-by=$key] $nvidia/stable/deb/\$(ARCH) /" \
                >/etc/apt/sources.list.d/nvidia-container-toolkit.list
        }
        packages nvidia-container-toolkit
    fi
    step "fetching k3s's installer"
    fetch https://get.k3s.io $opt.new/k3s-installer
    step "running k3s's installer, SHA-256 $(sha256sum <$opt.new/k3s-installer | cut -d ' ' -f 1)"
    set -- --disable traefik --disable servicelb
    [ ! -e $runtime ] || set -- "$@" --default-runtime nvidia
    sh $opt.new/k3s-installer "$@" # its own variables hold, such as INSTALL_K3S_VERSION
fi
plugin=${manifest%/*}/nvidia-device-plugin.yaml
if has_card && [ ! -s $plugin ] &&
        there=$(k3s kubectl --request-timeout=20s get daemonsets -A -o name) &&
        ! echo "$there" | grep -q nvidia-device-plugin; then
    step "giving k3s NVIDIA's device plugin"
    install -d -m 700 ${plugin%/*}
    agent --print k3s-device-plugin >$plugin.new
    mv $plugin.new $plugin
fi
"""
# Put in with --ssh: before the settings are tried, and before the service is waited for.
INSTALL_SSH = r"""
command -v ssh || { step 'installing ssh'; packages openssh-client; }
"""
INSTALL_SSH_KEY = r"""
[ -n "$(ls $state/.ssh)" ] ||
    end 3 "installed; ssh needs a key there, and to know the host:
    sudo runuser -u $user -- ssh-keygen -t ed25519 -N '' -f $state/.ssh/id_ed25519
    append $state/.ssh/id_ed25519.pub to authorized_keys there
    sudo runuser -u $user -- ssh ssh://{ssh} exit"
"""

# Of the script, {words} in braces are replaced. Python runs with -I, so that nothing in the
# caller's folder is run as root; pip's variables hold.
INSTALL = r"""#!/bin/sh
# Installs {version} as a service, or upgrades it. Read it, then run it as root.
# New files are made beside the old, tried in the service's own sandbox, then moved into place: a
# step that fails before leaves what was there, running.
# The machine token is in here, or in BETA9_TOKEN_FILE (a path) or BETA9_TOKEN, or from before; so
# may a k3s token be, BETA9_K3S_TOKEN_FILE, else this machine's k3s makes one.
# BETA9_HOSTNAME and BETA9_MACHINE_ID win over what is in here. What is missing comes by apt-get.
# Exits: 0 ready, or joined and waiting for k3s or the end of the boot; 1 the agent is as it was;
# 3 in place, not ready yet.
""" + BEGIN + r"""
exec >>$log 2>&1
try=/run/systemd/system/beta9-agent-try.service
outcome='; nothing of the agent was changed; correct that, and run this again'

step() { doing=$1; say "$1"; : >$log; }
end() { doing=''; say "$2"; exit "$1"; }
clean() {
    rm -rf $opt.new $etc.new $try
    [ -z "$doing" ] || fail "failed while $doing: $(grep . $log | tail -n 1) (more in $log)"
}
agent() { $opt.new/venv/bin/python -I $opt.new/beta9_agent.py "$@"; }
packages() {
    for _ in $(seq 60); do # five minutes for apt's and dpkg's locks
        : >$log
        apt-get -qq update || :
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-remove install "$@" && return
        grep -q 'get lock' $log || return 1
        sleep 5
    done
    return 1
}
find_python() {
    for base in /usr/bin/python3 /usr/bin/python3.1[0-9] /usr/local/bin/python3; do
        $base -I -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' && return
    done
}
write_token() { # name, token, file with it
    if [ -n "$3" ]; then
        install -m 640 -g $user "$3" $etc.new/$1
    elif [ -n "$2" ]; then
        install -m 640 -g $user /dev/stdin $etc.new/$1 <<END
$2
END
    fi
}

step 'writing the settings'
trap clean EXIT
trap 'fail "stopped by a signal"' HUP INT PIPE TERM
id $user || useradd --system --user-group --home-dir $state --shell /usr/sbin/nologin $user
[ -e $opt ] || [ ! -e $opt.old ] || mv $opt.old $opt # a run was cut off
rm -rf $opt.old $opt.new $etc.new
mkdir -p $opt $opt.new $etc
cp -a $etc/. $etc.new
set -- {token} {k3s_token}
write_token token "${BETA9_TOKEN:-$1}" "${BETA9_TOKEN_FILE:-}"
write_token k3s-token "${BETA9_K3S_TOKEN:-$2}" "${BETA9_K3S_TOKEN_FILE:-}"
unset BETA9_TOKEN BETA9_TOKEN_FILE BETA9_K3S_TOKEN BETA9_K3S_TOKEN_FILE
[ -e $etc.new/token ] ||
    fail 'the machine token is missing: run this by sudo BETA9_TOKEN_FILE=token sh'
[ -e $etc.new/k3s-token ] || ! systemctl cat k3s-agent.service ||
    fail 'a k3s agent node makes no token: give one by BETA9_K3S_TOKEN_FILE'
{
    cat <<'END'
{settings}
END
    hostname=${BETA9_HOSTNAME:-{hostname}} machine_id=${BETA9_MACHINE_ID:-{machine_id}}
    [ -z "$hostname" ] || echo "hostname: \"$hostname\""
    [ -z "$machine_id" ] || echo "machine_id: \"$machine_id\""
    if [ -e $etc.new/k3s-token ]; then
        say "uses the k3s token in $etc/k3s-token"
        echo "k3s_token_file: $etc/k3s-token"
    else
        printf '%s\n' "k3s_token_file: $k3s/token" "k3s_ca_file: $k3s/ca.crt"
    fi
} >$etc.new/agent.yaml

find_python || {
    step 'installing Python'
    packages python3-venv || :
    find_python || fail "Python 3.10 or newer with venv is missing: install it (see $log)"
}
step 'unpacking the agent'
$base -I -c 'import base64, bz2, sys
packed = "".join(sys.stdin.read().split())
sys.stdout.buffer.write(bz2.decompress(base64.b85decode(packed)))' \
    >$opt.new/beta9_agent.py <<'END'
{payload}
END
echo "{sha256}  $opt.new/beta9_agent.py" | sha256sum -c --quiet

step 'installing Python packages by pip'
$base -I -m venv $opt.new/venv
$opt.new/venv/bin/python -I -m pip install -q --no-cache-dir --disable-pip-version-check \
    {packages}
echo $opt >"$(echo $opt.new/venv/lib/python3*/site-packages)/beta9.pth"
# Once: at each start it would take memory and time.
$opt.new/venv/bin/python -I -m compileall -q -s $opt.new -p $opt --invalidation-mode checked-hash \
    $opt.new/beta9_agent.py
for name in unit wrapper k3s-account k3s-token k3s-token-service k3s-token-timer; do
    agent --print $name >$opt.new/$name
done
{install_ssh}
step "trying the settings in the service's sandbox"
# The unit once, with the new files in place of the old.
cat $opt.new/unit - >$try <<END
[Unit]
CollectMode=inactive-or-failed
[Service]
Type=oneshot
Restart=no
TimeoutStartSec=60
StandardOutput=null
StandardError=append:$log
BindReadOnlyPaths=$opt.new:$opt $etc.new:$etc
ExecStart=
ExecStart=$opt/venv/bin/python -I -m beta9_agent --config $etc/agent.yaml --dry-run
END
systemctl daemon-reload
systemctl -q start --job-mode=ignore-dependencies beta9-agent-try || {
    cat $log >&4
    fail 'the agent refuses these settings (see above, and journalctl -u beta9-agent-try)'
}
{install_k3s}
step 'putting it in place'
trap '' HUP INT PIPE TERM # now it is all or nothing
failure=3 outcome='; it is in place, if only in part: run this again'
mv $etc.new/agent.yaml $etc.new/*token $etc
mv $opt $opt.old
mv $opt.new $opt
rm -rf $opt.old
install -m 755 $opt/wrapper $wrapper
install -m 644 $opt/unit $units/beta9-agent.service
if [ -e $etc/k3s-token ]; then
    systemctl -q disable --now beta9-k3s-token.timer beta9-k3s-token.service || :
    rm -rf $units/beta9-k3s-token.* $k3s
    [ ! -e $manifest ] || : >$manifest # k3s then deletes the account, and so revokes its tokens
else
    install -m 644 $opt/k3s-token-service $units/beta9-k3s-token.service
    install -m 644 $opt/k3s-token-timer $units/beta9-k3s-token.timer
    install -d -m 700 ${manifest%/*}
    # With the date, as k3s applies nothing twice, not even after an uninstall.
    { cat $opt/k3s-account; date '+# %c'; } >$manifest.new
    mv $manifest.new $manifest
fi
# Version 0.2's.
rm -f $etc/agent.yaml.old $units/beta9-*.old $wrapper.old $manifest.old $k3s/*-token*
trap 'fail "stopped by a signal"' HUP INT PIPE TERM
systemctl -q enable beta9-agent
[ -e $etc/k3s-token ] || {
    step 'having k3s make its token'
    timeout 20 systemctl -q enable --now beta9-k3s-token.service beta9-k3s-token.timer || :
}
systemctl restart --no-block beta9-agent
{ssh_key}
[ "$(systemctl is-active cloud-final)" != activating ] || # the boot waits for us
    end 0 'installed; it starts after the boot'
step 'waiting a minute until it is ready'
tries=15 # for two looks at k3s
[ -e $etc/k3s-token ] || command -v k3s || tries=0 # no wait brings it
timeout 60 systemctl start beta9-agent || tries=0
until shown=$($wrapper --status) || [ $tries = 0 ]; do
    sleep 1
    tries=$((tries - 1))
done
printf '%s\n' "$shown" >&3 || :
case $shown in
'ready for '*) end 0 'installed, and ready for work' ;;
*'takes no work'*)
    end 0 'installed and joined; it takes work once k3s can run it, see above' ;;
esac
journalctl -q -n 5 -o cat -u beta9-agent >&3
end 3 'installed but not ready, see above; it goes on trying'
}
main; exit; }
"""
PACKAGES = ("requests", "urllib3", "certifi", "idna", "charset-normalizer", "psutil",
            "nvidia-ml-py", "pyyaml")


def format_packages() -> str:
    """The packages in the versions that run here: what was tried is what gets installed."""
    import importlib.metadata
    found = {each.metadata["Name"].lower().replace("_", "-"): each.version
             for each in importlib.metadata.distributions()}
    return " ".join(f"{name}=={found[name]}" if name in found else name for name in PACKAGES)


def format_settings(config: Config) -> str:
    """The settings that were given, as YAML, without secrets and what the script adds."""
    lines = ["state_dir: /var/lib/beta9-agent", "token_file: /etc/beta9-agent/token"]
    left_out = ("hostname", "machine_id", "state_dir", "config", *SECRETS, "token_file",
                "k3s_token_file", *([] if config.k3s_token else ["k3s_ca_file"]))
    for option in sorted(SETTINGS, key=lambda each: each.group == "gateway"):
        value = getattr(config, option.name)
        if option.name not in config.sources or option.name in left_out:
            continue
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif option.name == "max_cpu":
            value = value / 1000
        elif option.name == "max_memory":
            value = f"{value}Mi"
        elif option.metavar == "FILE":
            value = os.path.abspath(value)
        if option.group == "gateway" and "gateway:" not in lines:
            lines.append("gateway:")
        key = option.key.replace("gateway.", "  ")
        lines.append(f"{key}: {json.dumps(str(value), ensure_ascii=False)}")
    # Python's escapes are YAML's; JSON's are not, beyond 16 bits.
    return "\n".join(lines).encode("ascii", "backslashreplace").decode()


def warn_of_script(config: Config) -> None:
    """Says what the script holds, and what it does not."""
    if config.machine_id:
        LOG.warning("--machine-id is in this script: run it on one machine only, or set"
                    " BETA9_MACHINE_ID there")
    if config.state_dir not in (None, "/var/lib/beta9-agent"):
        LOG.warning("--state-dir is left out: the service's is /var/lib/beta9-agent")
    own_path = config.k3s_token_file or config.k3s_ca_file or ""
    if not config.k3s_token and own_path and not own_path.startswith("/run/beta9-k3s/"):
        LOG.warning("--k3s-token-file and --k3s-ca-file are left out, as no token is there: k3s"
                    " makes one")
    for path in filter(None, (config.ca_file, config.k3s_token and config.k3s_ca_file)):
        LOG.warning("%s must be on the machine too, where its service can read it: not under /home,"
                    " /root or /tmp", os.path.abspath(path))
    if config.install_k3s:
        LOG.warning("the script runs as root what https://get.k3s.io has, and where a card is"
                    " NVIDIA's packages from https://nvidia.github.io")
    if config.token or config.k3s_token:
        LOG.warning("what is printed holds the tokens: keep it as secret as they are")


def print_install(config: Config) -> None:
    """Prints the script that installs this very file with these settings. Needs no network.

    Raises AgentError where there is no file, or a terminal would show tokens.
    """
    import bz2
    import shlex
    program = read_program()
    if (config.token or config.k3s_token) and sys.stdout.isatty():
        raise AgentError("the script holds the tokens, which a terminal would show: print it into a"
                         " file or a pipe")
    if config.install_k3s and config.k3s_token:
        raise AgentError("--install-k3s has k3s make its token: leave out the one that is given")
    if (config.k3s_token_file or "").startswith("/run/beta9-k3s/"):
        config.k3s_token = None     # the service's own, which k3s makes anew
    warn_of_script(config)
    packed = base64.b85encode(bz2.compress(program, 9)).decode()
    words = {"version": format_version(), "hostname": config.hostname or "",
             "machine_id": config.machine_id or "", "packages": format_packages(),
             "sha256": hashlib.sha256(program).hexdigest(), "settings": format_settings(config),
             "payload": "\n".join(re.findall(".{1,2000}", packed)),
             "install_k3s": INSTALL_K3S if config.install_k3s else "",
             "install_ssh": INSTALL_SSH if config.ssh else "",
             "ssh_key": INSTALL_SSH_KEY.replace("{ssh}", config.ssh) if config.ssh else ""}
    for name in SECRETS:
        token = getattr(config, name)
        words[name] = shlex.quote(token.reveal()) if token else "''"
    print(re.sub(r"\{([a-z0-9_]+)\}", lambda found: words.get(found[1], found[0]), INSTALL), end="")


# ---- 13 Entry
def run_agent(config: Config) -> int:
    """Keeps this machine; the exit code."""
    STOP.install()
    if not config.dev:
        return keep(config, open_state(config))
    config.gateway_host, config.gateway_port, config.tls = "127.0.0.1", start_stand_in(), False
    return keep(config, State(config.machine_id or os.urandom(4).hex()))


# What goes with which action alone.
COMPANIONS = {"--json": ("--check", "--status"), "--prometheus": ("--status",),
              "--install-k3s": ("--print-install",)}


def refuse_odd_actions(config: Config) -> None:
    """Raises AgentError where what is asked for does not go together."""
    given = [option.flag for option in OPTIONS if option.group == WHAT
             and getattr(config, option.name)]
    for flag, allowed in COMPANIONS.items():
        if flag in given and not set(allowed) & set(given):
            raise AgentError(f"{flag} goes with {' or '.join(allowed)}: add that")
    actions = [flag for flag in given if flag not in COMPANIONS]
    if len(actions) > 1 and actions != ["--dev", "--once"]:
        raise AgentError(f"{' and '.join(actions)} are different actions: give one of them")


def run_action(argv: list[str], redactor: Redactor) -> int:
    """Does what is asked for; the exit code."""
    config = read_config(argv, os.environ, redactor)
    refuse_odd_actions(config)
    if config.debug:
        LOG.setLevel(logging.DEBUG)
    if config.help:
        print(build_command_line().format_help())
    elif config.version:
        print(format_version())
    elif config.print:
        if config.print not in FILES:
            raise AgentError(f"--print: there is no '{printable(config.print, 60)}' to print: give"
                             f" one of {', '.join(FILES)}")
        print(FILES[config.print], end="")
    elif config.status:
        return show_status(config)
    elif config.check:
        return show_check(config)
    elif config.problems:
        for problem in config.problems:
            LOG.error("%s", problem)
        return 2
    elif config.dry_run:
        show_dry_run(config)
    elif config.print_install:
        print_install(config)
    else:
        return run_agent(config)
    return 0


def main(argv: list[str]) -> int:
    """Runs the program; the exit code."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # without a traceback
    # A closed one would be the next file that is opened. What is written there fails.
    while os.open(os.devnull, os.O_RDONLY) < 3:
        pass
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)
    os.environ.pop("SSLKEYLOGFILE", None)       # ssl would write its keys there
    redactor = Redactor()
    LOG.handlers = [LogLines(redactor)]
    LOG.setLevel(logging.INFO)
    try:
        code = run_action(argv, redactor)
        sys.stdout.flush()
        return code
    except AgentError as error:
        LOG.error("%s", error)
        return error.exit_code
    except BrokenPipeError:     # whoever read the answer has read enough
        pass
    except Exception as error:
        unexpected = not isinstance(error, (OSError, ModuleNotFoundError))
        LOG.error("%s", explain_exception(error), exc_info=unexpected)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # for what could not be written
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
