#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests", "psutil", "nvidia-ml-py", "pyyaml"]
# ///
"""Registers this machine with a Beta9 gateway and keeps it ready for work until told to stop.

Please read it before you run it: it is handed a token that may run anything on this machine.

Sends   POST /api/v1/machine/register and /keepalive to the one gateway you name.
Reads   the files you name, /etc/machine-id, and through psutil and NVML CPU, memory, disk, GPUs.
Writes  machine id and lock in its state folder, logs to standard error, answers to standard output.
Exits   0 stopped as asked | 1 unexpected error, missing package | 2 bad option, variable or file
        69 gateway out of reach | 75 already running | 77 token refused | 78 machine refused as configured
"""
# ---- 1 What this program does
from __future__ import annotations

import argparse
import contextlib
import enum
import fcntl
import hashlib
import ipaddress
import json
import logging
import os
import random
import re
import select
import signal
import socket
import sys
import threading
import time
from typing import Any, Callable, Mapping, NamedTuple

if sys.version_info < (3, 10):
    sys.exit("beta9-agent needs Python 3.10 or newer: get one, or start it with `uv run`")

# ---- 2 Vocabulary
VERSION = "0.1.0"
REGISTER, KEEPALIVE = "register", "keepalive"
SIZE_LIMIT = 64 * 1024      # bytes
REQUEST_DEADLINE, HOST_DEADLINE = 10.0, 5.0
DENIED_PATIENCE = 60.0      # the gateway says 401 for database trouble too
QUIET = 600.0
LOG = logging.getLogger("beta9-agent")
Draw = Callable[[float, float], float]
Offer = dict[str, str]      # as registered


class AgentError(Exception):
    def __init__(self, text: str, code: int = 2) -> None:
        super().__init__(text)
        self.code = code


class Secret:
    """Shows its length only; revealed where a request is built."""

    def __init__(self, value: str) -> None:
        self.__value = value

    def __repr__(self) -> str:
        return f"set ({len(self.__value)} characters)"

    def reveal(self) -> str:
        return self.__value

    def scrub(self, text: str) -> str:
        text = text.replace(self.__value, "[redacted]")
        for at in range(len(self.__value) - 7):
            text = text.replace(self.__value[at:at + 8], "[redacted]")
        return text


Kind = enum.Enum("Kind", "OK TROUBLE FORGOTTEN DENIED FORBIDDEN REFUSED")
EXIT_CODES = {Kind.DENIED: 77, Kind.FORBIDDEN: 77, Kind.REFUSED: 78}


class Outcome(NamedTuple):
    kind: Kind
    text: str = ""
    ttl: float | None = None
    retry_after: float = 0.0


class Lease(NamedTuple):
    due: float
    ttl: float = 300.0
    registered: bool = False
    kept: bool = False                  # alive since registered
    confirmed: float = 0.0
    failing_since: float | None = None
    denied_since: float | None = None
    reregistered: float | None = None


class Gpu(NamedTuple):
    name: str   # empty: lost
    free: bool


class Metrics(NamedTuple):
    """The gateway's own keys, memory in MiB; None is unknown and not sent."""

    cpu_utilization_pct: float | None
    memory_utilization_pct: float | None
    total_cpu_available: int | None
    total_memory_available: int | None
    total_disk_space_bytes: int | None
    total_disk_free_bytes: int | None
    free_gpu_count: int


class Config(argparse.Namespace):
    @property
    def gateway(self) -> str:
        host = f"[{self.gateway_host}]" if ":" in self.gateway_host else self.gateway_host
        return f"http://{host}:{self.gateway_port}"


# ---- 3 Decisions
def visible(text: object, limit: int = 200) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[:limit])[:limit]


def parse_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def parse_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, 0 for none; a date counts from the answer's own `Date`."""
    import email.utils  # slow
    value = headers.get("Retry-After", "")
    try:
        if value.isdigit():
            return float(value)
        until, sent = map(email.utils.parsedate_to_datetime, (value, headers.get("Date", "")))
        return max(0.0, (until - sent).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def format_body(body: bytes) -> str:
    """Of `config`, which holds secrets, the keys alone."""
    value = parse_json(body)
    if not isinstance(value, dict):
        return "not shown" if b"config" in body else visible(body.decode(errors="replace"), 1000)
    if value.get("config") is not None:
        value["config"] = list(value["config"]) if isinstance(value["config"], dict) else "not shown"
    return visible(json.dumps(value), 1000)


# Patterns on "call status text", of which the first holds. Source: gateway-api, where 500 can mean anything.
NEW_TOKEN = "get a new one with `beta9 machine create --pool {pool_name}`"
TRY_HEALTH = "check --gateway-host and --gateway-port, try `curl {gateway}/api/v1/health`"
ANSWERS = (
    ("keepalive .*(machine_expired|machine.not.found)", Kind.FORGOTTEN, "registering again"),
    (".*invalid.pool", Kind.REFUSED, "the gateway has no pool {pool_name}, check --pool-name"),
    (".*(invalid (machine|gpu|payload)|are required)", Kind.REFUSED, "see what is sent with --dry-run"),
    (".*unable to create remote config|keepalive 404 not found", Kind.REFUSED,
     "an upstream gateway, which has no keepalive route; the Beta9 fork is needed"),
    (r"\S+ 401|.*invalid_token", Kind.DENIED, "wrong or inactive token, or database trouble: " + NEW_TOKEN),
    (r"\S+ 403", Kind.FORBIDDEN, "no machine token, or expired: " + NEW_TOKEN),
    (r"\S+ 3", Kind.TROUBLE, "redirects are never followed, " + TRY_HEALTH),
    (r"\S+ (5|429)", Kind.TROUBLE, "trouble on the gateway or its Redis, " + TRY_HEALTH),
    ("", Kind.TROUBLE, "is this the gateway? " + TRY_HEALTH),
)


def classify(call: str, status: int, headers: Mapping[str, str], body: bytes, machine_id: str,
             config: Config) -> Outcome:
    answer = parse_json(body)
    fields = answer if isinstance(answer, dict) else {}
    state = fields["machine_state"] if isinstance(fields.get("machine_state"), dict) else {}
    good = fields is answer and status == 200 and (call == REGISTER or fields.get("status") == "ok")
    if good and not fields.get("error_code") and state.get("machine_id", machine_id) == machine_id:
        ttl: Any = state.get("ttl_seconds")
        keys = fields.get("config")
        return Outcome(Kind.OK, visible(", ".join(keys)) if isinstance(keys, dict) else "",
                       ttl if type(ttl) in (int, float) and 1 <= ttl <= 86400 else None)
    said = " ".join(str(fields[key]) for key in ("error_code", "message", "suggestion") if fields.get(key))
    line = f"{call} {status} {said}".lower()
    kind, remedy = next(row[1:] for row in ANSWERS if re.match(row[0], line, re.S))
    if status // 100 == 3:
        said = f"redirect to {headers.get('Location')}"
    came = visible(said or f"{headers.get('Content-Type')} {format_body(body) or 'empty'}")
    remedy = remedy.format(**vars(config), gateway=config.gateway)
    return Outcome(kind, f"{status} {came}: {remedy}", None,
                   parse_retry_after(headers) if status in (429, 503) else 0.0)


def backoff(failing_for: float, cap: float, draw: Draw) -> float:
    """Seconds: full jitter under a ceiling that grows, drawn after the cap."""
    ceiling = min(max(4.0, min(failing_for, 60.0)), cap)
    return draw(min(1.0, ceiling / 4), ceiling)


def beat_of(interval: float, ttl: float) -> float:
    return min(interval, ttl / 3)


def next_call(lease: Lease, now: float) -> str:
    return KEEPALIVE if lease.registered and now - lease.confirmed <= lease.ttl else REGISTER


def lease_after(lease: Lease, call: str, outcome: Outcome, now: float, interval: float, draw: Draw) -> Lease:
    """What a `call` that ended so at `now` makes of the lease."""
    ttl = outcome.ttl or lease.ttl
    beat = beat_of(interval, ttl)
    if outcome.kind is Kind.OK and call == REGISTER:  # kept alive at once, as it gets no work before
        return lease._replace(due=now, ttl=ttl, registered=True, kept=False, confirmed=now, denied_since=None,
                              reregistered=now if lease.confirmed else None)
    if outcome.kind is Kind.OK:  # the overdue is sent once
        pause = beat * (draw(0.9, 1.1) if lease.kept else draw(0.1, 1.0))
        return Lease(lease.due + pause if lease.due + pause > now else now + pause, ttl, True, True, now,
                     reregistered=lease.reregistered)
    since = now if lease.failing_since is None else lease.failing_since
    if outcome.kind is Kind.FORGOTTEN:  # at once, then once in an interval
        again = now if lease.reregistered is None else max(now, lease.reregistered + beat)
        return lease._replace(due=again, registered=False, failing_since=since, denied_since=None)
    denied = outcome.kind in (Kind.DENIED, Kind.FORBIDDEN)
    pause = backoff(60.0 if denied and lease.confirmed else now - since, beat * 1.1, draw)
    if outcome.retry_after:
        pause = min(outcome.retry_after, 120.0, ttl / 4) + draw(0.0, ttl / 12)
    return lease._replace(due=now + pause, failing_since=since,
                          denied_since=(lease.denied_since or now) if denied else None)


def exit_code_of(outcome: Outcome, lease: Lease, waited: float, now: float, config: Config) -> int | None:
    """Of a failure before the first ready, `waited` seconds after the start; None: try again."""
    limit = float("inf") if config.startup_timeout is None else config.startup_timeout
    denied = now - (lease.denied_since or now) >= DENIED_PATIENCE
    final = config.once or denied or waited >= limit or outcome.kind in (Kind.FORBIDDEN, Kind.REFUSED)
    return EXIT_CODES.get(outcome.kind, 69) if final else None


def offer_of(metrics: Metrics, gpus: list[Gpu] | None, config: Config) -> Offer:
    count = None if gpus is None else sum(gpu.name != "" for gpu in gpus)
    found = (("cpu", metrics.total_cpu_available, config.max_cpu, "m"),
             ("memory", metrics.total_memory_available, config.max_memory, "Mi"),
             ("gpu_count", count, config.max_gpus, ""))
    return {key: f"{there if cap is None else min(there, cap)}{unit}"
            for key, there, cap, unit in found if there is not None}


class Trouble:
    """Which lines are written: the 1st, 2nd, 4th, ..., then one in QUIET seconds, recoveries too."""

    def __init__(self) -> None:
        self.last, self.told = float("-inf"), False

    def fault(self, now: float) -> bool:
        if now - self.last > QUIET:
            self.count, self.since, self.allowed = 0, now, now
        self.count, self.last = self.count + 1, now
        told = self.count & (self.count - 1) == 0 or now >= self.allowed
        if told:
            self.allowed, self.told = max(self.allowed, now) + QUIET, True
        return told

    def recovery(self) -> bool:
        told, self.told = self.told, False
        self.allowed += 2 * QUIET * told
        return told


# ---- 4 Wire shapes and texts
def register_payload(config: Config, machine_id: str, offer: Offer, private_ip: str) -> dict[str, Any]:
    """Every value a string; `token` is that of k3s. Source: gateway-api."""
    return {"token": config.k3s_token or "", "machine_id": machine_id, "provider_name": config.provider_name,
            "pool_name": config.pool_name, "hostname": config.hostname or f"machine-{machine_id}",
            "private_ip": private_ip, **offer}


def keepalive_payload(config: Config, machine_id: str, metrics: Metrics) -> dict[str, Any]:
    known = {key: value for key, value in metrics._asdict().items() if value is not None}
    return {"machine_id": machine_id, "provider_name": config.provider_name, "pool_name": config.pool_name,
            "agent_version": f"{VERSION}-python", "metrics": known}


def format_offer(offer: Offer) -> str:
    return "{cpu} CPU, {memory} memory, {gpu_count} GPUs".format(**offer)


# ---- 5 Configuration
def rule(pattern: str, convert: Callable[[str], Any] = str, low: float = 0, high: float = 1e9) -> Any:
    """A parser that raises ValueError; the option's help says what is right."""
    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text, re.ASCII) or pattern == NUMBER and not low <= float(text) <= high:
            raise ValueError
        return convert(text)
    return parse


NUMBER = r"[0-9]{1,9}(\.[0-9]{1,9})?"
TEXT = rule(r"[^\x00-\x20\x7f][^\x00-\x1f\x7f]*")
TOKEN = rule(r"[!#-\[\]-~]+", Secret)
HOST = rule(r"\w[\w.-]{0,252}|\[?[0-9A-Fa-f.:]*:[0-9A-Fa-f.]*:[0-9A-Fa-f.]*\]?", lambda it: it.strip("[]"))
SWITCH = rule("(?i:1|true|yes|on|0|false|no|off)", lambda text: text.lower() in ("1", "true", "yes", "on"))
IDENTITY, GATEWAY, MACHINE, BEHAVIOUR = "identity", "gateway", "this machine", "behaviour"


class Option(NamedTuple):
    name: str
    group: str
    parse: Callable[[str], Any]
    default: str | None
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "" if self.name in ("once", "dry_run", "dev", "version") else "BETA9_" + self.name.upper()

    @property
    def key(self) -> str:
        return self.name.replace("gateway_", "gateway.") if self.variable and self.name != "config" else ""


OPTIONS = [Option(*row) for row in (
    ("token", IDENTITY, TOKEN, None, "required: from `beta9 machine create`, without blanks or line ends"),
    ("token_file", IDENTITY, TEXT, None, "file with that token, - for standard input"),
    ("machine_id", IDENTITY, rule("[0-9A-Fa-f]{8}", str.lower), None, "8 hex characters, else generated"),
    ("pool_name", IDENTITY, TEXT, "external", "worker pool, not empty"),
    ("provider_name", IDENTITY, TEXT, "generic", "provider of the pool, not empty"),
    ("hostname", IDENTITY, HOST, None, "host or IP of this machine for the gateway, without scheme or port"),
    ("k3s_token", IDENTITY, TOKEN, None, "token for this machine's k3s, without blanks or line ends"),
    ("k3s_token_file", IDENTITY, TEXT, None, "file with that token, - for standard input"),
    ("gateway_host", GATEWAY, HOST, "localhost", "host or IP of the gateway, without scheme or port"),
    ("gateway_port", GATEWAY, rule(NUMBER, int, 1, 65535), "1994", "its HTTP port, 1 to 65535"),
    ("private_ip", MACHINE, rule(".+", lambda text: str(ipaddress.ip_address(text))), None,
     "IP address of this machine, else found"),
    ("max_cpu", MACHINE, rule(NUMBER, lambda text: int(float(text) * 1000)), None, "cores to offer, 6.5 say"),
    ("max_memory", MACHINE, rule("[0-9]{1,9}[MG]i", lambda text: int(text[:-2]) << 10 * ("G" in text)), None,
     "memory to offer, 48Gi or 49152Mi say"),
    ("max_gpus", MACHINE, rule("[0-9]{1,5}", int), None, "count of GPUs to offer"),
    ("state_dir", MACHINE, TEXT, None, "folder for machine id and lock, /var/lib/beta9-agent for root"),
    ("keepalive_interval", BEHAVIOUR, rule(NUMBER, float, 0.1, 240), "60",
     "seconds between keepalives, 0.1 to 240"),
    ("startup_timeout", BEHAVIOUR, rule(NUMBER, float), None,
     "seconds to try a gateway that does not answer, 0 for one try"),
    ("debug", BEHAVIOUR, SWITCH, "false", "log requests, answers, tracebacks; 1 true yes on, 0 false no off"),
    ("config", BEHAVIOUR, TEXT, None, "YAML or JSON file of these settings"),
    ("once", BEHAVIOUR, SWITCH, "false", "register, keep alive once, exit"),
    ("dry_run", BEHAVIOUR, SWITCH, "false", "show settings and what would be sent"),
    ("dev", BEHAVIOUR, SWITCH, "false", "try it with a stand-in gateway, without a token"),
    ("version", BEHAVIOUR, SWITCH, "false", "version and SHA-256 of this file"),
)]
SECRETS = ("token", "k3s_token")
UNUSED = ["--tailscale-url", "--tailscale-auth", "--flux-upstream", "--flux-branch", "--flux-github-token"]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise AgentError(message.split("'")[0] + ": see --help")


def build_parser() -> Parser:
    parser = Parser("beta9_agent.py", "beta9_agent.py [options]", __doc__.split("\n")[0], allow_abbrev=False)
    groups = {name: parser.add_argument_group(name) for name in (IDENTITY, GATEWAY, MACHINE, BEHAVIOUR)}
    for option in OPTIONS:
        kind: dict[str, Any] = {"action": "store_const", "const": "true"} if option.parse is SWITCH else {}
        notes = "".join(f" [{note}]" for note in (option.variable, option.default) if note)
        groups[option.group].add_argument(option.flag, help=option.help + notes, **kind)
    for flag in UNUSED:
        groups[BEHAVIOUR].add_argument(flag, help="taken, not used")
    return parser


def read_file(path: str) -> str:
    """The text of a small file, `-` is standard input. Raises AgentError."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            data = file.read(SIZE_LIMIT + 1)
        if len(data) <= SIZE_LIMIT and b"\0" not in data:
            return data.decode()
        reason = "binary or over 64 KiB"
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "no text")
    raise AgentError(f"{visible(path)} cannot be read, {reason}: check path and permissions")


def read_config_file(path: str) -> dict[str, str]:
    text = read_file(path)
    try:
        if text.lstrip()[:1] == "{":
            tree = json.loads(text, parse_int=str, parse_float=str)
        else:
            import yaml
            tree = yaml.load(text, yaml.BaseLoader) or {}
        inner = tree.pop("gateway", None) or {}
        found = tree | {f"gateway.{key}": value for key, value in inner.items()}
        if any(isinstance(value, (dict, list)) for value in found.values()):
            raise ValueError
    except ModuleNotFoundError:
        raise AgentError("--config: YAML needs `apt-get install python3-yaml` or `pip install pyyaml`;"
                         " JSON needs neither", 1) from None
    except Exception as error:  # its text may quote a token
        line = getattr(getattr(error, "problem_mark", None), "line", getattr(error, "lineno", 0) - 1) + 1
        raise AgentError(f"--config: {visible(path)} line {line}: no YAML or JSON mapping, mend it") from None
    known = [option.key for option in OPTIONS]
    for key in found:
        if not key or key not in known:
            import difflib
            near = difflib.get_close_matches(key, known, 1, 0)[0]
            raise AgentError(f"--config: {visible(path)}: unknown key {visible(key)}, did you mean {near}?")
    return {key: "" if value in (None, "null", "~") else str(value) for key, value in found.items()}


def read_settings(argv: list[str], environ: Any) -> dict[str, tuple[str, str]]:
    parsed, rest = build_parser().parse_known_args(argv)
    if rest:  # perhaps a token
        word = visible(rest[0].split("=")[0]) if rest[0][:2] == "--" else "a word"
        raise AgentError(f"{word} is unknown; see --help")
    path = not parsed.version and (parsed.config or environ.get("BETA9_CONFIG"))
    file = read_config_file(path) if path else {}
    settings: dict[str, tuple[str, str]] = {}
    for option in OPTIONS:
        take = environ.pop if option.name in SECRETS else environ.get
        given = getattr(parsed, option.name)
        for text, source in ((option.default, "default"), (file.get(option.key), visible(path)),
                             (take(option.variable, ""), option.variable), (given, option.flag)):
            if text or text is given == "":
                settings[option.name] = str(text), source
    if unused := [flag for flag in UNUSED if getattr(parsed, flag[2:].replace("-", "_"))]:
        LOG.info("%s: not used, neither Tailscale nor Flux is needed", ", ".join(unused))
    return settings


def build_config(settings: Mapping[str, tuple[str, str]]) -> tuple[Config, list[str]]:
    config, problems = Config(sources={name: source for name, (_, source) in settings.items()}), []
    for option in OPTIONS:
        text, source = settings.get(option.name, (None, ""))
        setattr(config, option.name, None)
        try:
            setattr(config, option.name, text if text is None else option.parse(text))
        except ValueError:
            shown = "" if option.name in SECRETS else f" {visible(text, 60)}"
            problems.append(f"{option.flag}: the value{shown} from {source} will not do, give: {option.help}")
    for name in SECRETS:
        path = getattr(config, name + "_file")
        if path and name in settings:
            both = f"{name} from {settings[name][1]}, {name}_file from {settings[name + '_file'][1]}"
            problems.append(f"{both}: give one of them")
        elif path:
            try:
                setattr(config, name, TOKEN(read_file(path).rstrip("\r\n")))
                config.sources[name] = visible(path)
            except (AgentError, ValueError) as error:
                problems.append(f"{name}_file: {str(error) or visible(path) + ' must hold the token alone'}")
    if config.dev and not config.token:
        config.token = Secret(os.urandom(16).hex())
    elif not config.token and not problems:
        problems.append("--token is missing: give --token-file or BETA9_TOKEN, from"
                        f" `beta9 machine create --pool {config.pool_name}`")
    return config, problems


# ---- 6 Machine facts
def read_clock() -> float:
    """Seconds, suspended time too; on macOS CLOCK_MONOTONIC."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class DeadlinePassed(BaseException):
    """Of the alarm; no Exception, which a library would catch."""


def ring(number: int, frame: Any) -> None:
    raise DeadlinePassed


def cut_call(seconds: float) -> None:
    if signal.getitimer(signal.ITIMER_REAL)[0] > seconds:
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)


def call_within(seconds: float, call: Callable[[], Any]) -> Any:
    """One deadline for all of `call`. Raises TimeoutError."""
    signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 0.5)
            return call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except DeadlinePassed:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise TimeoutError from None


class Aside:
    """Asks what no alarm interrupts in a daemon thread; one at most is stuck."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.done.set()

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer, or an Exception."""
        def run() -> None:
            try:
                self.answer = question()
            except Exception as error:
                self.answer = error
            done.set()

        if not self.done.is_set():
            return TimeoutError()
        done = threading.Event()
        threading.Thread(target=run, daemon=True).start()
        self.done = done
        done.wait()  # join would be wrong: interrupted, it takes the thread for dead
        return self.answer


def load_nvml() -> Any:
    """None without a driver, as importing it is slow. Raises ImportError."""
    if "pynvml" not in sys.modules:
        import ctypes
        try:
            ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
    import pynvml
    return pynvml


def read_gpu(nvml: Any, index: int) -> Gpu:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name = nvml.nvmlDeviceGetName(handle)
        return Gpu(visible(name.decode() if isinstance(name, bytes) else name, 60),
                   not nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except nvml.NVMLError:
        return Gpu("", False)


def list_gpus() -> list[Gpu] | None:
    """None where a driver cannot say. NVML is closed, so that the driver can be upgraded."""
    try:
        nvml = load_nvml()
    except ImportError:
        return []
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
        try:
            return [read_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        return [] if error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED else None


def find_private_ip(config: Config) -> str:
    """Towards the gateway, else towards the default route, else the first that fits."""
    import psutil
    found = []
    with contextlib.suppress(OSError):
        found = [(name, entry.address) for name, entries in psutil.net_if_addrs().items()
                 for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
    for target in ("198.51.100.1", config.gateway_host):  # RFC 5737; nothing is sent
        if not config.dry_run or re.fullmatch(r"[0-9.]+|.*:.*", target):
            with contextlib.suppress(OSError), socket.socket(
                    socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM) as udp:
                udp.connect((target, 9))
                found.insert(0, ("", udp.getsockname()[0]))
    fits = (ip for name, ip in found if not re.match(r"127\.|::1$|169\.254\.|fe80:", ip)
            and not name.startswith(("docker", "cni", "flannel", "veth")))
    return config.private_ip or next(fits, "")


class Host:
    """Samples this machine; load is the average since the last sample."""

    def __init__(self) -> None:
        self.driver, self.disk = Aside(), Aside()

    def ask(self, aside: Aside, what: str, question: Callable[[], Any], seconds: float) -> Any:
        try:
            answer = call_within(seconds, lambda: aside.ask(question))
            return None if isinstance(answer, Exception) else answer
        except (TimeoutError, RuntimeError):  # no thread to be had
            LOG.warning("%s hangs, its part is unknown until it answers: see `dmesg`", what)

    def sample(self) -> tuple[Metrics, list[Gpu] | None]:
        import psutil
        start, cores, memory = read_clock(), psutil.cpu_count(), psutil.virtual_memory()
        disk = self.ask(self.disk, "the disk", lambda: psutil.disk_usage("/"), HOST_DEADLINE)
        gpus = self.ask(self.driver, "the NVIDIA driver", list_gpus, HOST_DEADLINE - (read_clock() - start))
        return Metrics(psutil.cpu_percent(), memory.percent, cores and cores * 1000, memory.total >> 20,
                       disk and disk.total, disk and disk.free, sum(gpu.free for gpu in gpus or ())), gpus


# ---- 7 Wire
FAILURES = (
    (ConnectionRefusedError, "connection refused: is the gateway running, or the SSH tunnel up?"
     " `ssh -L {gateway_port}:localhost:31994 your-gateway-host`, "),
    ((TimeoutError, DeadlinePassed), "no whole answer in time: "),
    (socket.gaierror, "no address for {gateway_host}: check the DNS, "),
    (BaseException, "the connection broke, {error!r}: is the SSH tunnel up? "),
)


def describe_failure(error: BaseException, config: Config) -> str:
    chain = [error]
    while inner := chain[-1].__context__:
        chain.append(inner)
    text = next(text for kind, text in FAILURES for each in chain if isinstance(each, kind))
    return visible((text + TRY_HEALTH).format(**vars(config), gateway=config.gateway, error=error), 400)


class Wire:
    """The one way out, over one kept connection."""

    def __init__(self, config: Config) -> None:
        import requests
        self.config, self.resolver, self.adapter = config, Aside(), requests.adapters.HTTPAdapter(1, 1)

    def exchange(self, request: Any, seconds: float) -> tuple[int, Mapping[str, str], bytes]:
        """Without requests' session, which follows redirects and obeys ~/.netrc."""
        import requests
        proxies = {}
        if not re.match(r"http://(localhost|127\.|\[::1)", request.url):
            proxies = requests.utils.get_environ_proxies(request.url)
            found = proxies or self.resolver.ask(lambda: socket.getaddrinfo(self.config.gateway_host, 0))
            if isinstance(found, Exception):
                raise found
        answer = self.adapter.send(request, True, seconds, proxies=proxies)
        body = answer.raw.read(SIZE_LIMIT + 1, decode_content=False)
        answer.raw.release_conn()
        return answer.status_code, answer.headers, body

    def send(self, call: str, payload: dict[str, Any], seconds: float) -> Outcome:
        import requests
        headers = {"Authorization": f"Bearer {self.config.token.reveal()}", "Accept-Encoding": "identity",
                   "Content-Type": "application/json", "User-Agent": f"beta9-agent/{VERSION}"}
        text = json.dumps(payload, separators=(",", ":"), default=Secret.reveal)
        request = requests.Request("POST", f"{self.config.gateway}/api/v1/machine/{call}", headers, data=text)
        LOG.debug("> POST %s %s %s", request.url, headers, visible(text, 1000))
        start = read_clock()
        try:
            status, fields, body = call_within(seconds, lambda: self.exchange(request.prepare(), seconds))
            LOG.debug("< %d in %.1f ms %s %s", status, (read_clock() - start) * 1000, visible(fields, 1000),
                      format_body(body))
            if len(body) > SIZE_LIMIT:
                raise OverflowError("over 64 KiB")
            return classify(call, status, fields, body, payload["machine_id"], self.config)
        except Exception as error:  # of any kind, from hostile bytes
            LOG.debug("< nothing", exc_info=True)
            self.adapter.close()
            return Outcome(Kind.TROUBLE, describe_failure(error, self.config))


# ---- 8 Disk
def find_state_dir(config: Config) -> str:
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    folder = f"{'/var/lib' if os.geteuid() == 0 else home}/beta9-agent"
    return config.state_dir or os.environ.get("STATE_DIRECTORY") or folder


def read_fingerprint() -> str:
    try:
        return hashlib.sha256(b"beta9-agent" + read_file("/etc/machine-id").encode()).hexdigest()
    except AgentError:
        return "-"


def read_machine_id(folder: str) -> str | None:
    path = f"{folder}/machine-id"
    if os.path.exists(path):
        with contextlib.suppress(AgentError):
            if kept := re.fullmatch(f"([0-9a-f]{{8}}) {read_fingerprint()}\n", read_file(path)):
                return kept[1]
        LOG.warning("%s is damaged or another machine's: this machine gets a new id", path)
    return None


def write_machine_id(folder: str, machine_id: str) -> None:
    path = f"{folder}/machine-id"
    with open(path + ".new", "w") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(f"{machine_id} {read_fingerprint()}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)


def take_lock(folder: str, machine_id: str) -> Any:
    os.makedirs(folder, exist_ok=True)
    file = open(f"{folder}/{machine_id}.lock", "a+", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise AgentError(f"pid {visible(file.read(20).strip())} keeps machine {machine_id}: stop it, or give"
                         " another --machine-id", 75) from None
    file.truncate(0)
    os.write(file.fileno(), b"%d\n" % os.getpid())
    return file


# ---- 10 Loop
class Stop:
    """Set by a signal; a second one meets the default action."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.signals = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: leave it so
            self.signals.pop()
        for each in self.signals:
            signal.signal(each, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        self.at = read_clock()
        for each in self.signals:
            signal.signal(each, signal.SIG_DFL)
        cut_call(1.0)

    def wait_until(self, due: float) -> None:
        while self.at is None and (left := due - read_clock()) > 0:
            time.sleep(min(left, 0.25))


class Agent:
    def __init__(self, config: Config, machine_id: str) -> None:
        self.config, self.machine_id, self.host, self.wire = config, machine_id, Host(), Wire(config)
        self.started = self.told = read_clock()
        self.lease, self.trouble, self.ready = Lease(self.started), Trouble(), False
        self.metrics, self.gpus = self.host.sample()
        self.offer = self.seen = {"cpu": "0m", "gpu_count": "0"} | offer_of(self.metrics, self.gpus, config)

    def announce(self) -> None:
        config = self.config
        LOG.info("beta9-agent %s: machine %s, pool %s, gateway %s, offers %s%s", VERSION, self.machine_id,
                 config.pool_name, config.gateway, format_offer(self.offer),
                 "".join(f", {gpu.name or 'a lost one'}" for gpu in self.gpus or ()))
        if not (config.hostname and config.k3s_token):
            LOG.warning("no worker can be deployed here without --hostname and --k3s-token: give both")
        for name, key in (("max_cpu", "cpu"), ("max_memory", "memory"), ("max_gpus", "gpu_count")):
            if (getattr(config, name) or 0) > int(self.offer[key].rstrip("mMi")):
                LOG.warning("%s is above what is there, %s: lower it", name, self.offer[key])
        try:
            load_nvml()
        except ImportError:
            LOG.warning("an NVIDIA driver but 0 GPUs: `pip install nvidia-ml-py`, start again")

    def payload(self, call: str) -> dict[str, Any]:
        if call == KEEPALIVE:
            return keepalive_payload(self.config, self.machine_id, self.metrics)
        ip = self.host.ask(self.wire.resolver, "DNS", lambda: find_private_ip(self.config), HOST_DEADLINE)
        return register_payload(self.config, self.machine_id, self.offer, ip or "")

    def look(self) -> None:
        with contextlib.suppress(OSError):  # no files left: what is known has to do
            self.metrics, self.gpus = self.host.sample()
        offer = self.offer | offer_of(self.metrics, self.gpus, self.config)
        if offer == self.seen != self.offer:
            LOG.warning("had %s, has %s: registering again; see `nvidia-smi`",
                        format_offer(self.offer), format_offer(offer))
            self.offer, self.lease = offer, self.lease._replace(registered=False)
        self.seen = offer

    def report(self, call: str, outcome: Outcome, failing_since: float | None) -> None:
        now = read_clock()
        if outcome.kind is not Kind.OK:
            if self.trouble.fault(now):
                say = LOG.error if outcome.kind in EXIT_CODES else LOG.warning
                say("%s: failure %d in %.1f s, %s; next try in %.1f s", call, self.trouble.count,
                    now - self.trouble.since, outcome.text, max(0, self.lease.due - now))
        elif call == REGISTER:
            LOG.info("registered, config keys: %s", outcome.text or "none")
        elif not self.ready:
            LOG.info("ready after %.2f s", now - self.started)
            self.ready, self.told = True, now
        elif failing_since and self.trouble.recovery():
            LOG.info("ready again after %.1f s", now - failing_since)
            self.told = now
        elif now - self.told > QUIET:
            LOG.info("ready, %s", format_offer(self.offer))
            self.told = now

    def step(self, stop: Stop) -> Outcome:
        interval = self.config.keepalive_interval
        if self.lease.registered:
            self.look()
        before, now = self.lease, read_clock()
        call = next_call(before, now)
        seconds = max(2.0, min(REQUEST_DEADLINE, beat_of(interval, before.ttl)))
        if stop.at:
            seconds = stop.at + 1 - now
        outcome = self.wire.send(call, self.payload(call), seconds)
        self.lease = lease_after(before, call, outcome, read_clock(), interval, random.uniform)
        if before.ttl != self.lease.ttl < 3 * interval:
            LOG.info("a keepalive every %g s, a third of the gateway's TTL", self.lease.ttl / 3)
        self.report(call, outcome, before.failing_since)
        return outcome

    def run(self, stop: Stop) -> int:
        self.announce()
        while stop.at is None:
            outcome, now = self.step(stop), read_clock()
            if self.ready and self.config.once:
                return 0
            if not (self.ready or stop.at or outcome.kind is Kind.OK) and (
                    code := exit_code_of(outcome, self.lease, now - self.started, now, self.config)):
                raise AgentError(f"giving up: {outcome.text}", code)
            stop.wait_until(self.lease.due if self.ready else min(
                self.lease.due, (self.lease.denied_since or 1e9) + DENIED_PATIENCE,
                self.started + (self.config.startup_timeout or 1e9)))
        LOG.info("stopping")
        if self.ready and outcome.kind is Kind.OK:  # leaves ready
            self.wire.send(REGISTER, self.payload(REGISTER), stop.at + 1.8 - read_clock())
        return 0


# ---- 11 Stand-in gateway
class StandIn:
    """The gateway of --dev, after gateway-api."""

    def __init__(self, token: str, pool: str, ttl: int = 300) -> None:
        self.token, self.pool, self.ttl = token, pool, ttl
        self.known: dict[str, tuple[float, str]] = {}   # until when, what is news

    def answer(self, path: str, bearer: str, body: bytes, now: float) -> tuple[int, dict[str, Any]]:
        if bearer == "Bearer workspace-token":
            return 403, {"message": "Invalid token"}
        if bearer != f"Bearer {self.token}":
            return 401, {"message": "Unauthorized"}
        said, call = parse_json(body), path.removeprefix("/api/v1/machine/")
        if call not in (REGISTER, KEEPALIVE):
            return 404, {"message": "Not Found"}
        metrics = said.pop("metrics", {}) if isinstance(said, dict) else None
        if not isinstance(metrics, dict) or any(type(value) is not str for value in said.values()) or any(
                type(value) is not int for name, value in metrics.items() if not name.endswith("_pct")):
            return 400, {"message": "Invalid payload"}
        key = "{provider_name}:{pool_name}:{machine_id}".format(**said)
        state = {"machine_id": said["machine_id"], "pool_name": said["pool_name"], "ttl_seconds": self.ttl}
        if call == REGISTER:
            for name, right, wrong in (
                    ("cpu", r"\d+m?", "machine cpu value"), ("gpu_count", r"\d+", "gpu count"),
                    ("memory", r"\d+([KMG]i)?", "machine memory value"),
                    ("pool_name", re.escape(self.pool), "pool name")):
                if not re.fullmatch(right, said[name]):
                    return 500, {"message": f"Invalid {wrong}"}
            self.known[key] = now + self.ttl, format_offer(said)
            return 200, {"config": None, "machine_state": state | {"status": "registered"}}
        if "" in state.values():
            return 400, {"message": "machine_id and pool_name are required"}
        until, news = self.known.get(key, (now, ""))
        if until <= now:
            return 500, {"message": "Failed to update keepalive: failed to get machine state"
                         f" <provider:machine:{key}>: machine not found"}
        if news:
            LOG.info("gateway: %s registered → ready, %s", said["machine_id"], news)
        self.known[key] = now + self.ttl, ""
        return 200, {"status": "ok", "machine_state": state | {"status": "ready"}}


def start_stand_in(gateway: StandIn) -> int:
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, answer = gateway.answer(self.path, self.headers["Authorization"], body, read_clock())
            data = json.dumps(answer).encode()
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


# ---- 12 Commands
def dry_run(config: Config, machine_id: str) -> int:
    for option in OPTIONS:
        value = getattr(config, option.name)
        source = config.sources.get(option.name, "not given")
        print(f"{option.name}: {'missing' if value is None else visible(value)}  ({source})")
    agent = Agent(config, machine_id)
    for call in (REGISTER, KEEPALIVE):
        body = json.dumps(agent.payload(call), indent=2, default=str)
        print(f"POST {config.gateway}/api/v1/machine/{call} {body}")
    return 0


def run(config: Config) -> int:
    stop, folder = Stop(), find_state_dir(config)
    kept = config.machine_id or not config.dev and read_machine_id(folder)
    machine_id = kept or os.urandom(4).hex()
    if config.dry_run:
        return dry_run(config, machine_id)
    if config.dev:
        gateway = StandIn(config.token.reveal(), config.pool_name)
        config.gateway_host, config.gateway_port = "127.0.0.1", start_stand_in(gateway)
    else:
        try:
            config.lock = take_lock(folder, machine_id)  # kept open
            if not kept:
                write_machine_id(folder, machine_id)
        except OSError as error:
            LOG.warning("no machine id and lock kept in %r, %s: give --state-dir", folder, error.strerror)
    return Agent(config, machine_id).run(stop)


# ---- 13 Entry
class Lines(logging.Handler):
    """Scrubbed; standard error may be full, closed or stuck."""

    secrets: list[Secret] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        for secret in self.secrets:
            line = secret.scrub(line)
        with contextlib.suppress(OSError):
            if select.select([], [2], [], 0)[1]:
                os.write(2, line.encode(errors="backslashreplace") + b"\n")


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while os.open(os.devnull, os.O_RDWR) < 3:  # else a socket becomes one
        pass
    handler = Lines()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.handlers = [handler]
    LOG.setLevel(logging.INFO)
    try:
        settings = read_settings(argv, os.environ)
        if settings["version"][0] == "true":
            print(f"beta9-agent {VERSION} ({hashlib.sha256(read_file(__file__).encode()).hexdigest()[:12]})")
            return 0
        config, problems = build_config(settings)
        handler.secrets[:] = filter(None, (config.token, config.k3s_token))
        if problems:
            raise AgentError(problems[0])
        if config.debug:
            LOG.setLevel(logging.DEBUG)
        return run(config)
    except ModuleNotFoundError as error:
        LOG.error("%s is missing: `apt-get install python3-requests python3-psutil`, or `pip install requests"
                  " psutil nvidia-ml-py`, or `uv run beta9_agent.py`", error.name)
    except AgentError as error:
        LOG.error(error)
        return error.code
    except Exception as error:
        LOG.error("unexpected %s: report it, with what --debug shows", type(error).__name__)
        LOG.debug("where", exc_info=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
