#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests", "psutil", "nvidia-ml-py", "pyyaml"]
# ///
"""Registers this machine with a Beta9 gateway and keeps it ready for work until told to stop.

Read it before you run it: its token may run anything on this machine.

Sends   POST /api/v1/machine/register and /keepalive to the gateway you name
Reads   the files you name, /etc/machine-id, hardware by psutil and NVML
Writes  its state folder, logs to standard error and systemd, answers to standard output
Exits   0 stopped as asked, 1 unexpected error, 2 bad setting, 69 gateway out of reach,
        75 already running, 77 token refused, 78 machine refused
"""
# ---- 1 What this program does
import argparse
import contextlib
import enum
import fcntl
import functools
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
from socket import getaddrinfo
from typing import Any, Callable, Mapping, NamedTuple

if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed: get one, or use `uv run`")

# ---- 2 Vocabulary
VERSION = "0.1.0"
REGISTER, KEEPALIVE = "register", "keepalive"
SIZE_LIMIT = 65536          # bytes
REQUEST_DEADLINE, HOST_DEADLINE = 10.0, 5.0
DENIED_PATIENCE = 60.0      # 401 may be database trouble
QUIET = 600.0
LOG = logging.getLogger("beta9-agent")


class AgentError(Exception):
    def __init__(self, text: str, code: int = 2) -> None:
        super().__init__(text)
        self.code = code


class Secret:
    """Shows its length; revealed where a request is built."""

    __seen: set[str] = set()

    def __init__(self, value: str) -> None:
        self.__value = value
        self.__seen.add(value)

    def __repr__(self) -> str:
        return f"set ({len(self.__value)} characters)"

    def reveal(self) -> str:
        return self.__value

    @classmethod
    def scrub(cls, text: str) -> str:
        """Masks secrets: whole, pieces of 8, URL-encoded, base64 at any shift."""
        import base64
        import urllib.parse
        for value in cls.__seen:
            forms = [value] + [base64.b64encode(bytes(shift) + value.encode(), signs).decode()
                               for shift in range(3) for signs in (b"+/", b"-_")]
            pieces = [value] + [form[at:at + 8] for form in forms for at in range(len(form) - 7)]
            for piece in pieces:
                text = text.replace(piece, "[redacted]")
            plain = urllib.parse.unquote(text)
            if plain != text and any(piece in plain for piece in pieces):
                text = cls.scrub(plain)
        return text


Kind = enum.Enum("Kind", "OK TROUBLE FORGOTTEN DENIED FORBIDDEN REFUSED UNSAFE")
EXIT_CODES = {Kind.DENIED: 77, Kind.FORBIDDEN: 77, Kind.REFUSED: 78, Kind.UNSAFE: 2}


class Outcome(NamedTuple):
    kind: Kind
    text: str = ""
    ttl: float | None = None
    retry_after: float = 0.0


class Lease(NamedTuple):
    due: float
    ttl: float = 299.0                  # a guess
    registered: bool = False
    kept: bool = False                  # alive since registered
    confirmed: float = 0.0
    failing_since: float | None = None
    denied_since: float | None = None
    reregistered: float = float("-inf")


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


def format_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Config(argparse.Namespace):
    @property
    def gateway(self) -> str:
        return f"http{'s' * self.tls}://{format_host(self.gateway_host)}:{self.gateway_port}"


# ---- 3 Decisions
def visible(text: object, limit: int = 200) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[:limit])[:limit]


def parse_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def is_private(address: str) -> bool:
    return any(ipaddress.ip_address(address) in ipaddress.ip_network(network) for network in (
        "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16",
        "::1", "fc00::/7", "fe80::/10"))


def mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def parse_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, 0 for none; a date counts from the answer's own `Date`."""
    import email.utils  # slow
    value = headers.get("Retry-After", "")
    try:
        if value.isdigit():
            return float(value)
        until, sent = map(email.utils.parsedate_to_datetime, (value, headers.get("Date", "")))
        return max(0.0, (until - sent).total_seconds())
    except Exception:  # of any kind, from hostile bytes
        return 0.0


def format_body(body: bytes) -> str:
    """Of `config`, which holds secrets, the keys alone."""
    fields = mapping(parse_json(body))
    if fields.get("config"):
        fields["config"] = list(mapping(fields["config"]))
    elif not fields and b"config" in body:
        return "not shown"
    return visible(json.dumps(fields) if fields else body.decode(errors="replace"), 1000)


# The first that matches "call status text" holds. Source: gateway-api, where 500 can mean anything.
NEW_TOKEN = "get a new one with `beta9 machine create --pool {config.pool_name}`"
TRY_HEALTH = "check --gateway-host and --gateway-port, try `curl {config.gateway}/api/v1/health`"
ANSWERS = (
    ("keepalive .*(machine_expired|machine.not.found)", Kind.FORGOTTEN, "registering again"),
    (".*invalid.pool", Kind.REFUSED, "the gateway has no pool {config.pool_name}, check --pool-name"),
    (".*(invalid (machine|gpu|payload)|are required)", Kind.REFUSED, "look with --dry-run"),
    (".*unable to create remote config|keepalive 404 not found", Kind.REFUSED,
     "an upstream gateway, without keepalive route: the Beta9 fork is needed"),
    (r"\S+ 401|.*invalid_token", Kind.DENIED, "wrong token or database trouble, " + NEW_TOKEN),
    (r"\S+ 403", Kind.FORBIDDEN, "no machine token, or expired, " + NEW_TOKEN),
    (r"\S+ 3", Kind.TROUBLE, "redirects are never followed, " + TRY_HEALTH),
    (r"\S+ (5|429)", Kind.TROUBLE, "trouble on the gateway, " + TRY_HEALTH),
    ("", Kind.TROUBLE, "is this the gateway? " + TRY_HEALTH),
)


def classify(call: str, status: int, headers: Mapping[str, str], body: bytes, machine_id: str,
             config: Config) -> Outcome:
    answer = parse_json(body)
    fields = mapping(answer)
    state = mapping(fields.get("machine_state"))
    good = answer is fields and status == 200 and (call == REGISTER or fields.get("status") == "ok")
    if good and not fields.get("error_code") and state.get("machine_id", machine_id) == machine_id:
        ttl: Any = state.get("ttl_seconds")
        return Outcome(Kind.OK, visible(", ".join(mapping(fields.get("config")))),
                       ttl if type(ttl) in (int, float) and 1 <= ttl <= 86400 else None)
    said = " ".join(str(text) for text in map(fields.get, ("error_code", "message", "suggestion")) if text)
    line = f"{call} {status} {said}".lower()
    kind, remedy = next(row[1:] for row in ANSWERS if re.match(row[0], line, re.S))
    if status // 100 == 3:
        said = f"redirect to {headers.get('Location')}"
        same_host = f"(?i)redirect to https://{re.escape(format_host(config.gateway_host))}(:[0-9]+)?(/|$)"
        if not config.tls and re.match(same_host, said):
            remedy = "never followed: give --tls and its port"
    came = visible(said or f"{headers.get('Content-Type')} {format_body(body) or 'empty'}")
    return Outcome(kind, f"{status} {came}: {remedy.format(config=config)}", None,
                   parse_retry_after(headers) if status in (429, 503) else 0.0)


def backoff(failing_for: float, cap: float, draw: Callable[[float, float], float]) -> float:
    """Seconds: full jitter under a ceiling that grows, drawn after the cap."""
    ceiling = min(max(4.0, min(failing_for, 60.0)), cap)
    return draw(min(1.0, ceiling / 4), ceiling)


def next_call(lease: Lease, now: float) -> str:
    return KEEPALIVE if lease.registered and now - lease.confirmed <= lease.ttl else REGISTER


def lease_after(lease: Lease, call: str, outcome: Outcome, now: float, interval: float,
                draw: Callable[[float, float], float]) -> Lease:
    """What a `call` that ended so at `now` makes of the lease."""
    ttl = outcome.ttl or lease.ttl
    beat = min(interval, ttl / 3)
    since = lease.failing_since or now
    denied = outcome.kind in (Kind.DENIED, Kind.FORBIDDEN)
    lease = lease._replace(ttl=ttl, denied_since=(lease.denied_since or now) if denied else None)
    if outcome.kind is Kind.OK and call == REGISTER:  # kept alive at once: no work before
        return lease._replace(due=now, registered=True, kept=False, confirmed=now,
                              reregistered=now if lease.confirmed else lease.reregistered)
    if outcome.kind is Kind.OK:  # the overdue is sent once
        pause = beat * (draw(0.9, 1.1) if lease.kept else draw(0.1, 1.0))
        return lease._replace(due=pause + (lease.due if lease.due + pause > now else now), kept=True,
                              confirmed=now, failing_since=None)
    if outcome.kind is Kind.FORGOTTEN:  # at once, then once in an interval
        return lease._replace(due=max(now, lease.reregistered + beat), registered=False, failing_since=since)
    pause = backoff(60.0 if denied and lease.confirmed else now - since, beat * 1.1, draw)
    if outcome.retry_after:
        pause = min(outcome.retry_after, 120.0, ttl / 4) + draw(0.0, ttl / 12)
    return lease._replace(due=now + pause, failing_since=since)


def exit_code_of(outcome: Outcome, lease: Lease, waited: float, now: float, config: Config) -> int | None:
    """Of a failure before the first ready; None to try again."""
    late = config.startup_timeout is not None and waited >= config.startup_timeout
    denied = now - (lease.denied_since or now) >= DENIED_PATIENCE
    final = config.once or late or denied or outcome.kind in (
        Kind.FORBIDDEN, Kind.REFUSED, Kind.UNSAFE)
    return EXIT_CODES.get(outcome.kind, 69) if final else None


def offer_of(metrics: Metrics, gpus: list[Gpu] | None, config: Config) -> dict[str, str]:
    count = None if gpus is None else sum(gpu.name != "" for gpu in gpus)
    found = (("cpu", metrics.total_cpu_available, config.max_cpu, "m"),
             ("memory", metrics.total_memory_available, config.max_memory, "Mi"),
             ("gpu_count", count, config.max_gpus, ""))
    return {key: f"{there if cap is None else min(there, cap)}{unit}"
            for key, there, cap, unit in found if there is not None}


class Trouble:
    """Writes the 1st, 2nd, 4th, ... line, then one in QUIET seconds, recoveries too."""

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
def register_payload(config: Config, machine_id: str, offer: dict[str, str],
                     private_ip: str) -> dict[str, Any]:
    """All strings; `token` is that of k3s. Source: gateway-api."""
    return {"token": config.k3s_token or "", "machine_id": machine_id, "provider_name": config.provider_name,
            "pool_name": config.pool_name, "hostname": config.hostname or f"machine-{machine_id}",
            "private_ip": private_ip, **offer}


def keepalive_payload(config: Config, machine_id: str, metrics: Metrics) -> dict[str, Any]:
    known = {key: value for key, value in metrics._asdict().items() if value is not None}
    return {"machine_id": machine_id, "provider_name": config.provider_name, "pool_name": config.pool_name,
            "agent_version": f"{VERSION}-python", "metrics": known}


def format_offer(offer: dict[str, str]) -> str:
    return "{cpu} CPU, {memory} memory, {gpu_count} GPUs".format(**offer)


# ---- 5 Configuration
def rule(pattern: str, convert: Callable[[str], Any] = str, low: float = 0, high: float = 0) -> Any:
    """A parser that raises ValueError; help says what is right."""
    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text, re.ASCII) or high and not low <= float(text) <= high:
            raise ValueError
        return convert(text)
    return parse


NUMBER = r"[0-9]{1,9}(\.[0-9]{1,9})?"
TEXT = rule(r"(?! )[^\x00-\x1f\x7f]+")
TOKEN = functools.cache(rule(r"[!#-\[\]-~]+", Secret))  # the same for the same text
HOST = rule(r"(?i)\w[\w.-]{0,252}|\[?([0-9a-f.]*:){2,}[0-9a-f.]*\]?", lambda text: text.strip("[]"))
SWITCH = rule("(?i)1|true|yes|on|0|false|no|off", lambda text: text.lower() in "1 true yes on")


def read_ca_file(path: str) -> str:
    import ssl
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    return path


class Option(NamedTuple):
    group: str
    name: str
    parse: Callable[[str], Any]
    help: str
    default: str | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "" if self.name in "once dry_run dev version" else "BETA9_" + self.name.upper()

    @property
    def key(self) -> str:
        section = "gateway." if self.group == "gateway" else ""
        return section + self.name.removeprefix("gateway_") if self.variable and self.name != "config" else ""


OPTIONS = [Option(group, *row) for group, rows in {
    "identity": (
        ("token", TOKEN, "from `beta9 machine create`, without blanks or line ends"),
        ("token_file", TEXT, "file with that token, - for standard input"),
        ("machine_id", rule("(?i)[0-9a-f]{8}", str.lower), "8 hex characters, else generated"),
        ("pool_name", TEXT, "worker pool, not empty", "external"),
        ("provider_name", TEXT, "provider of the pool, not empty", "generic"),
        ("hostname", HOST, "host or IP of this machine for the gateway, without scheme or port"),
        ("k3s_token", TOKEN, "token for this machine's k3s, without blanks or line ends"),
        ("k3s_token_file", TEXT, "file with that token, - for standard input"),
    ),
    "gateway": (
        ("gateway_host", HOST, "host or IP of the gateway, without scheme or port", "localhost"),
        ("gateway_port", rule(NUMBER, int, 1, 65535), "its port, 1 to 65535", "1994"),
        ("tls", SWITCH, "https, verified", "false"),
        ("ca_file", read_ca_file, "PEM file of the roots to trust instead"),
        ("allow_cleartext", SWITCH, "http to public addresses too", "false"),
    ),
    "this machine": (
        ("private_ip", lambda text: str(ipaddress.ip_address(text)), "of this machine, else found"),
        ("max_cpu", rule(NUMBER, lambda text: round(float(text) * 1000)), "cores to offer, 6.5 say"),
        ("max_memory", rule("[0-9]{1,9}[MG]i", lambda text: int(text[:-2]) << 10 * ("G" in text)),
         "memory to offer, 48Gi or 49152Mi say"),
        ("max_gpus", rule("[0-9]{1,5}", int), "count of GPUs to offer"),
        ("state_dir", TEXT, "for machine id and lock, /var/lib/beta9-agent for root"),
    ),
    "behaviour": (
        ("keepalive_interval", rule(NUMBER, float, 0.1, 240), "seconds from beat to beat, 0.1 to 240", "60"),
        ("startup_timeout", rule(NUMBER, float), "seconds to try a gateway that is away, 0 for one try"),
        ("debug", SWITCH, "log requests and answers; 1 true yes on, 0 false no off", "false"),
        ("config", TEXT, "YAML or JSON file of settings"),
        ("once", SWITCH, "register, keep alive once, exit", "false"),
        ("dry_run", SWITCH, "show settings and what would be sent", "false"),
        ("dev", SWITCH, "try it with a stand-in gateway, without a token", "false"),
        ("version", SWITCH, "version and SHA-256 of this file", "false"),
    ),
}.items() for row in rows]
SECRETS = ("token", "k3s_token")
UNUSED = ["--tailscale-url", "--tailscale-auth", "--flux-upstream", "--flux-branch", "--flux-github-token"]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        shown = re.sub(r"(?s)['\"].*|(arguments(: --[\w-]{,12})?).*", r"\1", message)  # no token
        raise AgentError(f"{shown}: see --help")


def build_parser() -> Parser:
    title = str(__doc__).split("\n")[0]
    parser = Parser("beta9_agent.py", "beta9_agent.py [options]", title, allow_abbrev=False)
    group_named = functools.cache(parser.add_argument_group)
    for option in OPTIONS:
        action = "store_true" if option.parse is SWITCH else "store"
        notes = ", ".join(filter(None, (option.variable, option.default)))
        group_named(option.group).add_argument(option.flag, action=action, help=f"{option.help} [{notes}]")
    group_named("behaviour").add_argument(*UNUSED, dest="unused", help="taken, not used")
    return parser


def read_file(path: str) -> str:
    """The text of a small file, `-` is standard input. Raises AgentError."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            data = file.read(SIZE_LIMIT + 1)
        if len(data) > SIZE_LIMIT:
            raise ValueError
        return data.decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", "no text, or over 64 KiB")
        raise AgentError(f"{visible(path)} cannot be read, {reason}: check path and permissions") from None


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
        raise
    except Exception as error:  # its text may quote a token
        lines = ", ".join(re.findall("line [0-9]+", str(error)))
        raise AgentError(f"--config: {visible(path)} {lines}: no YAML or JSON mapping, mend it") from None
    known = [option.key for option in OPTIONS if option.key]
    for key in found.keys() - known:
        import difflib
        near = difflib.get_close_matches(key, known, 1, 0)[0]
        raise AgentError(f"--config: {visible(path)}: unknown key {visible(key, 12)}, did you mean {near}?")
    return {key: "" if value in (None, "null", "~") else str(value) for key, value in found.items()}


def read_settings(argv: list[str], environ: Any) -> dict[str, tuple[str, str]]:
    parsed = build_parser().parse_args(argv)
    path = not parsed.version and (parsed.config or environ.get("BETA9_CONFIG"))
    file = read_config_file(path) if path else {}
    settings = {}
    for option in OPTIONS:
        given = getattr(parsed, option.name)
        for text, source in ((option.default, "default"), (file.get(option.key), visible(path)),
                             (environ.pop(option.variable, ""), option.variable), (given, option.flag)):
            if text or text is given == "":
                settings[option.name] = str(text), source
    if parsed.unused:
        LOG.info("not used: %s", ", ".join(UNUSED))
    return settings


def build_config(given: Mapping[str, tuple[str, str]]) -> Config:
    settings, config = dict(given), Config(sources={}, files={})
    for name in SECRETS:
        path, source = settings.get(name + "_file", ("", ""))
        if path and name in settings:
            raise AgentError(f"{name} from {settings[name][1]}, {name}_file from {source}: give one of them")
        if path:
            try:
                settings[name] = read_file(path).rstrip("\r\n"), visible(path)
            except AgentError as error:
                raise AgentError(f"{name}_file: {error}") from None
            if os.path.isfile(path):
                config.files[name] = path
    for option in OPTIONS:
        setattr(config, option.name, None)
        if option.name in settings:
            text, source = settings[option.name]
            config.sources[option.name] = source
            try:
                setattr(config, option.name, option.parse(text))
            except (ValueError, OSError):
                shown = " the value" if option.name in SECRETS else f" {visible(text, 60)}"
                raise AgentError(
                    f"{option.flag}:{shown} from {source} will not do, give: {option.help}") from None
    if not config.token:
        if not config.dev:
            raise AgentError("--token is missing: give --token-file, or " + NEW_TOKEN.format(config=config))
        config.token = Secret(os.urandom(16).hex())
    return config


# ---- 6 Machine facts
def read_clock() -> float:
    """Seconds, suspended time too; on macOS CLOCK_MONOTONIC."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class DeadlinePassed(BaseException):
    """Of the alarm; no Exception, which a library would catch."""


def ring(number: int, frame: Any) -> None:
    raise DeadlinePassed


def call_within(seconds: float, call: Callable[[], Any]) -> Any:
    """One deadline for the whole call. Raises TimeoutError."""
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
    """A daemon thread for what no alarm interrupts. Once late, it gives the answer before at once."""

    answer: Any = None
    late = False

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
        answer, done = self.answer, threading.Event()
        threading.Thread(target=run, daemon=True).start()
        self.done = done
        if not self.late:
            self.late = True
            done.wait()  # an interrupted join takes it for dead
            self.late, answer = False, self.answer
        return answer


def load_nvml() -> Any:
    """None without a driver. Raises ImportError."""
    import ctypes
    with contextlib.suppress(OSError):
        ctypes.CDLL("libnvidia-ml.so.1")
        import pynvml
        return pynvml


def read_gpu(nvml: Any, index: int) -> Gpu:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name = nvml.nvmlDeviceGetName(handle)
        return Gpu(visible(name, 60), not nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except nvml.NVMLError:
        return Gpu("", False)


def list_gpus() -> list[Gpu] | None:
    """None where a driver cannot say. NVML is closed for driver upgrades."""
    try:
        nvml = load_nvml()
    except ImportError:
        nvml = None
    if not nvml:
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
    """Towards the gateway, else the default route, else the first that fits."""
    import psutil
    found = []
    for target in (config.gateway_host, "198.51.100.1"):  # RFC 5737; nothing is sent
        with contextlib.suppress(OSError):
            first = getaddrinfo(
                target, 9, type=socket.SOCK_DGRAM, flags=config.dry_run * socket.AI_NUMERICHOST)[0]
            with socket.socket(*first[:2]) as udp:
                udp.connect(first[4])
                found.append(udp.getsockname()[0])
    with contextlib.suppress(OSError):
        found += [entry.address for name, entries in psutil.net_if_addrs().items() for entry in entries
                  if entry.family != psutil.AF_LINK and not re.match("docker|cni|flannel|veth", name)]
    fits = (ip for ip in found if not re.match(r"127\.|::1$|169\.254\.|fe80:", ip))
    return config.private_ip or next(fits, "")


class Host:
    """Load is the average since the last sample."""

    def __init__(self) -> None:
        self.driver, self.disk, self.address = Aside(), Aside(), Aside()

    def ask(self, aside: Aside, what: str, question: Callable[[], Any], seconds: float) -> Any:
        try:
            answer = call_within(seconds, lambda: aside.ask(question))
            return None if isinstance(answer, Exception) else answer
        except (TimeoutError, RuntimeError):  # no thread to be had
            LOG.warning("%s hangs and is unknown until it answers: see the system log", what)

    def sample(self) -> tuple[Metrics, list[Gpu] | None]:
        import psutil
        start, cores, memory = read_clock(), psutil.cpu_count(), psutil.virtual_memory()
        disk = self.ask(self.disk, "the disk", lambda: psutil.disk_usage("/"), HOST_DEADLINE)
        gpus = self.ask(self.driver, "the NVIDIA driver", list_gpus, HOST_DEADLINE - (read_clock() - start))
        return Metrics(psutil.cpu_percent(), memory.percent, cores and cores * 1000, memory.total >> 20,
                       disk and disk.total, disk and disk.free, sum(gpu.free for gpu in gpus or ())), gpus


# ---- 7 Wire
# The first that matches the error holds.
FAILURES = (
    ("connection ?refused", "connection refused: is the gateway running, or the SSH tunnel up? "),
    ("Timeout", "no whole answer in time: "),
    ("resolve|Errno -", "no address for {config.gateway_host}: check the DNS, "),
    ("has expired|not yet", "its certificate is not valid now: renew it, check this clock, "),
    ("mismatch|'t match", "its certificate is not for {config.gateway_host}: give its name, "),
    ("VERIFY_FAILED", "its certificate's issuer is unknown: give --ca-file, "),
    ("SSL", "no TLS 1.2 there: cleartext port? "),
    ("", "the connection broke, {error}: is the SSH tunnel up? "),
)


def describe_failure(error: BaseException, config: Config) -> Outcome:
    if isinstance(error, AgentError):
        return Outcome(Kind.UNSAFE, str(error))
    said = re.split("[)>]: ", repr(error))[-1]  # without the host
    text = next(text for pattern, text in FAILURES if re.search(pattern, said, re.I))
    return Outcome(Kind.TROUBLE, (text + TRY_HEALTH).format(config=config, error=visible(said)))


class Wire:
    """The one way out, over one kept connection."""

    def __init__(self, config: Config) -> None:
        import requests
        self.config, self.resolver, self.adapter = config, Aside(), requests.adapters.HTTPAdapter(1, 1)
        socket.getaddrinfo = self.look_up

    def look_up(self, host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        """Every connection begins here, a proxy's too. Raises AgentError."""
        config = self.config
        self.resolver.late = False  # another host
        found = self.resolver.ask(lambda: getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=config.dry_run * socket.AI_NUMERICHOST))
        if isinstance(found, Exception):
            raise found
        for *_, address in found:
            if not (config.tls or config.allow_cleartext or is_private(address[0])):
                raise AgentError(f"{host} is at {address[0]}, where others could read the tokens:"
                                 " give --tls, --allow-cleartext or an SSH tunnel")
        if config.dry_run:
            raise OSError
        return found

    def exchange(self, call: str, payload: dict[str, Any], seconds: float) -> tuple[int, Any, bytes]:
        """No session, which follows redirects and obeys ~/.netrc."""
        import requests
        config = self.config
        local = re.fullmatch(r"(?i)localhost\.?|127\.[0-9.]+|[0:]+1", config.gateway_host)
        proxies = {} if local else requests.utils.get_environ_proxies(config.gateway)
        headers = {"Authorization": f"Bearer {config.token.reveal()}", "Accept-Encoding": "identity",
                   "Content-Type": "application/json"}
        text = json.dumps(payload, separators=(",", ":"), default=Secret.reveal)
        request = requests.Request(
            "POST", f"{config.gateway}/api/v1/machine/{call}", headers, data=text).prepare()
        LOG.debug("> POST %s %s %s", request.url, headers, visible(text, 1000))
        answer = self.adapter.send(request, True, seconds, config.ca_file or True, proxies=proxies)
        body = answer.raw.read(SIZE_LIMIT + 1, decode_content=False)
        answer.raw.release_conn()
        return answer.status_code, answer.headers, body

    def send(self, call: str, payload: dict[str, Any], seconds: float) -> Outcome:
        start = read_clock()
        try:
            status, fields, body = call_within(seconds, lambda: self.exchange(call, payload, seconds))
            LOG.debug("< %d in %.1f ms %s %s", status, (read_clock() - start) * 1000, visible(fields, 1000),
                      format_body(body))
            if len(body) > SIZE_LIMIT:
                raise OverflowError("over 64 KiB")
            return classify(call, status, fields, body, payload["machine_id"], self.config)
        except Exception as error:  # of any kind, from hostile bytes
            LOG.debug("<", exc_info=True)
            self.adapter.close()
            return describe_failure(error, self.config)


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
        LOG.warning("%s is unreadable, damaged or another machine's: this machine gets a new id", path)
    return None


def write_machine_id(folder: str, machine_id: str) -> None:
    path = f"{folder}/machine-id"
    with open(path + ".new", "w") as file:
        os.fchmod(file.fileno(), 0o600)
        print(machine_id, read_fingerprint(), file=file, flush=True)
        os.fsync(file.fileno())
    os.replace(path + ".new", path)


def take_lock(path: str) -> Any:
    """Its time is the last confirmed keepalive."""
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AgentError(f"pid {visible(read_file(path).strip())} keeps this machine: stop it, or give"
                         " another --machine-id", 75) from None
    file.truncate(0)
    os.write(file.fileno(), b"%d\n" % os.getpid())
    os.utime(path, (0, 0))
    return file


# ---- 10 Loop
def notify(state: str) -> None:
    """Tells systemd. Source: sd_notify(3)."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.sendto(state.encode(), socket.MSG_DONTWAIT, re.sub("^@", "\0", path))


class Stop:
    """Set by a signal; a second one ends at once."""

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
        if signal.getitimer(signal.ITIMER_REAL)[0] > 1:  # cuts the call in flight
            signal.setitimer(signal.ITIMER_REAL, 1, 0.5)

    def wait_until(self, due: float) -> None:
        while self.at is None and (left := due - read_clock()) > 0:
            notify("WATCHDOG=1")
            time.sleep(min(left, 0.25))


class Agent:
    def __init__(self, config: Config, machine_id: str) -> None:
        self.config, self.machine_id, self.host, self.wire = config, machine_id, Host(), Wire(config)
        self.started = self.told = read_clock()
        self.lease, self.ready, self.trouble, self.stale = Lease(self.started), False, Trouble(), Trouble()
        self.private_ip: str | None = None
        self.metrics, self.gpus = self.host.sample()
        self.offer = self.seen = {"cpu": "0m", "gpu_count": "0"} | offer_of(self.metrics, self.gpus, config)

    def announce(self) -> None:
        config = self.config
        LOG.info("beta9-agent %s: machine %s, pool %s, gateway %s, offers %s%s", VERSION, self.machine_id,
                 config.pool_name, config.gateway, format_offer(self.offer),
                 "".join(f", {gpu.name or 'lost'}" for gpu in self.gpus or ()))
        if not (config.hostname and config.k3s_token):
            LOG.warning("no worker can run here: give --hostname and --k3s-token")
        for name, key in (("max_cpu", "cpu"), ("max_memory", "memory"), ("max_gpus", "gpu_count")):
            if (getattr(config, name) or 0) > int(self.offer[key].rstrip("mMi")):
                LOG.warning("%s is above what is there, %s: lower it", name, self.offer[key])
        for name in SECRETS:
            source = config.sources.get(name, "")
            if source[:2] == "--":
                LOG.warning("%s shows in `ps`: use %s-file", source, source)
            elif os.path.isfile(source) and os.stat(source).st_mode & 0o77:
                LOG.warning("others can read the token: `chmod 600 %s`", source)
        try:
            load_nvml()
        except ImportError:
            LOG.warning("an NVIDIA driver, 0 GPUs: `pip install nvidia-ml-py`, start again")

    def refresh(self) -> None:
        """Tokens may have been rotated."""
        for name, path in self.config.files.items():
            try:
                if not os.path.isfile(path):
                    raise ValueError
                token = TOKEN(read_file(path).rstrip("\r\n"))
                if name == "k3s_token" and token is not self.config.k3s_token:
                    self.lease = self.lease._replace(registered=False)
                setattr(self.config, name, token)
            except (AgentError, ValueError):
                if self.stale.fault(read_clock()):
                    LOG.warning("%s: no token there, the last one serves", visible(path))

    def payload(self, call: str) -> dict[str, Any]:
        if call == KEEPALIVE:
            return keepalive_payload(self.config, self.machine_id, self.metrics)
        if self.private_ip is None:  # once: the last act is short
            self.private_ip = self.host.ask(
                self.host.address, "DNS", lambda: find_private_ip(self.config), HOST_DEADLINE)
        return register_payload(self.config, self.machine_id, self.offer, self.private_ip or "")

    def look(self) -> None:
        with contextlib.suppress(OSError):  # no files left
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
        else:
            with contextlib.suppress(OSError):
                os.utime(self.config.lock_path)
            if not self.ready:
                LOG.info("ready after %.2f s", now - self.started)
                notify("READY=1")
            elif failing_since and self.trouble.recovery():
                LOG.info("ready again after %.1f s", now - failing_since)
            elif now - self.told > QUIET:
                LOG.info("ready, %s", format_offer(self.offer))
            else:
                return
            self.ready, self.told = True, now

    def step(self, stop: Stop) -> Outcome:
        interval = self.config.keepalive_interval
        self.refresh()
        if self.lease.registered:
            self.look()
        before, now = self.lease, read_clock()
        call = next_call(before, now)
        payload = self.payload(call)
        seconds = max(2.0, min(REQUEST_DEADLINE, interval, before.ttl / 3))
        if stop.at:
            seconds = stop.at + 1 - read_clock()
        outcome = self.wire.send(call, payload, seconds)
        self.lease = lease_after(before, call, outcome, read_clock(), interval, random.uniform)
        if before.ttl != self.lease.ttl < 3 * interval:
            LOG.info("a keepalive every %g s, a third of the TTL", self.lease.ttl / 3)
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
        notify("STOPPING=1")
        LOG.info("stopping")
        self.refresh()
        if self.ready and outcome.kind is Kind.OK:  # leaves ready
            self.wire.send(REGISTER, self.payload(REGISTER), stop.at + 1.8 - read_clock())
        return 0


# ---- 11 Stand-in gateway
def start_stand_in() -> int:
    """The gateway of --dev, trusting its client. Returns the port."""
    import http.server
    offers: dict[str, str] = {}     # until ready

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state = {key: said[key] for key in ("machine_id", "pool_name")} | {"ttl_seconds": 300}
            if self.path.endswith(REGISTER):
                offers[said["machine_id"]] = format_offer(said)
                text = json.dumps({"config": None, "machine_state": state | {"status": "registered"}})
            else:
                if offer := offers.pop(said["machine_id"], None):
                    LOG.info("gateway: %s registered → ready, %s", said["machine_id"], offer)
                text = json.dumps({"status": "ok", "machine_state": state | {"status": "ready"}})
            self.send_response_only(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

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
        payload = agent.payload(call)
        with contextlib.suppress(OSError, ValueError):  # ends before it connects
            agent.wire.exchange(call, payload, 1)
        print(f"POST {config.gateway}/api/v1/machine/{call} {json.dumps(payload, indent=2, default=str)}")
    return 0


def run(config: Config) -> int:
    stop, folder = Stop(), find_state_dir(config)
    kept = config.machine_id or not config.dev and read_machine_id(folder)
    machine_id = kept or os.urandom(4).hex()
    config.lock_path = "" if config.dev else f"{folder}/{machine_id}.lock"
    if config.dry_run:
        return dry_run(config, machine_id)
    if config.dev:
        config.gateway_host, config.gateway_port, config.tls = "127.0.0.1", start_stand_in(), False
    else:
        try:
            os.makedirs(folder, exist_ok=True)
            config.lock = take_lock(config.lock_path)
            if not kept:
                write_machine_id(folder, machine_id)
        except OSError as error:
            LOG.warning("no machine id and lock in %r, %s: give --state-dir", folder, error.strerror)
    return Agent(config, machine_id).run(stop)


# ---- 13 Entry
class Lines(logging.Handler):
    """Standard error may be full, closed or stuck."""

    def emit(self, record: Any) -> None:
        text = "\n".join(visible(Secret.scrub(visible(line, 4000)), 4000)
                         for line in self.format(record).split("\n"))
        notify("STATUS=" + text.split("\n")[0])
        before = f"{logging.Formatter().formatTime(record)} {record.levelname} "
        with contextlib.suppress(OSError):
            if os.environ.get("JOURNAL_STREAM") == "{0.st_dev}:{0.st_ino}".format(os.fstat(2)):
                before = f"<{' 7643'[record.levelno // 10]}>"
            if select.select([], [2], [], 0)[1]:
                os.write(2, f"{before}{text}\n".encode(errors="backslashreplace"))


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while os.open(os.devnull, os.O_RDWR) < 3:  # a closed one
        pass
    LOG.handlers = [Lines()]
    LOG.setLevel(logging.INFO)
    try:
        settings = read_settings(argv, os.environ)
        if settings["version"][0] == "True":
            print(f"beta9-agent {VERSION} ({hashlib.sha256(read_file(__file__).encode()).hexdigest()[:12]})")
            return 0
        config = build_config(settings)
        if config.debug:
            LOG.setLevel(logging.DEBUG)
        return run(config)
    except ModuleNotFoundError as error:
        LOG.error("%s is missing: `apt-get install python3-requests python3-psutil python3-yaml`, or `pip"
                  " install requests psutil nvidia-ml-py pyyaml`, or `uv run beta9_agent.py`", error.name)
    except AgentError as error:
        LOG.error(error)
        return error.code
    except Exception as error:
        LOG.error("unexpected %s: report it with --debug", type(error).__name__)
        LOG.debug("where", exc_info=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
