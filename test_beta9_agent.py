"""Tests of beta9_agent.py: first what is shared, then the program as others see it, then its functions, room by room.

The first kind starts the program as a process and looks at its sockets, signals, files, output and exit codes alone.
BETA9_TEST_PROGRAM names another file to test than the one beside this.
"""
from __future__ import annotations

import ast
import base64
import collections
import contextlib
import ctypes
import datetime
import fcntl
import glob
import gzip
import hashlib
import heapq
import http.client
import itertools
import json
import logging
import math
import os
import pathlib
import pty
import pwd
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.parse

import psutil
import pytest
import yaml

import beta9_agent as b9


# ---- What is shared: the program as a process
HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = os.path.abspath(os.environ.get("BETA9_TEST_PROGRAM") or HERE / "beta9_agent.py")
PROGRAM_FOLDER = os.path.dirname(PROGRAM)
TOKEN, K3S_TOKEN, SECRET = "Mt0123456789+bcd/fghi", "Ks9876543210zyxwvuts", "Cs5432109876mnopqrst"
ID = "1165a9b6"
REGISTER, KEEPALIVE = "register", "keepalive"
SILENT, NOBODY = "silent", "nobody"


@pytest.fixture(scope="session", autouse=True)
def signals_are_not_ignored():
    """Else the processes started here inherit it from a nohup, or a shell's `&`, around pytest."""
    before = {number: signal.signal(number, handler) for number, handler in (
        (signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler))}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait(condition, what="", limit=60.0):
    """What `condition` returns once it is true. `what` is for the message if it never is; a function may say it."""
    end = time.monotonic() + limit
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited in vain: {what() if callable(what) else what}")
        time.sleep(0.01)
    return found


def rows(table, *quick):
    """The names of a table as parameters. Where some are named the others are slow: more of the same."""
    slow = pytest.mark.slow
    return [name if name in quick or not quick else pytest.param(name, marks=slow) for name in table]


def replace(path, text):
    """Writes a file in one step, as what rotates tokens does."""
    new = path.with_name(path.name + ".new")
    new.write_text(text) if isinstance(text, str) else new.write_bytes(text)
    os.replace(new, path)


def forms(*secrets):
    """Secrets as they are, URL-encoded and in base64."""
    return [form for secret in secrets for form in (
        secret, urllib.parse.quote(secret, ""), base64.b64encode(secret.encode()).decode())]


def leaks(text, *secrets):
    """The secrets that stand in a text, in any of these forms."""
    return [form for form in forms(*secrets) if form in text]


class Agent(subprocess.Popen):
    """The program, running. Its log is standard error and output together."""

    log_file: pathlib.Path

    def log(self):
        return self.log_file.read_text(errors="replace")

    def lines(self, *words):
        """The lines of the log that hold one of these words."""
        return [line for line in self.log().splitlines() if any(word in line for word in words)]

    def says(self, *words):
        """Waits until each of these stands in the log."""
        wait(lambda: all(word in self.log() for word in words) or self.poll() is not None,
             lambda: f"{words} in\n{self.log()}")
        assert all(word in self.log() for word in words), f"ended with {self.poll()}:\n{self.log()}"

    def stop(self, number=signal.SIGTERM, within=60):
        """The exit code after a signal, which must come within so many seconds."""
        self.send_signal(number)
        return self.wait(within)

    def facts(self, name):
        """A line of /proc/PID/status, as a number."""
        text = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"^{name}:\s*(\w+)", text, re.M)[1], 16 if name.startswith("Sig") else 10)


class Box:
    """A machine to run the program on: a home and a state folder, and nothing else of whoever runs the tests."""

    def __init__(self, folder):
        self.folder, self.state, self.started = folder, folder / "state", []
        self.environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(folder),
                        "PYTHONPATH": PROGRAM_FOLDER, "BETA9_STATE_DIR": str(self.state),
                        "BETA9_TOKEN": TOKEN,
                        "BETA9_K3S_URL": "https://127.0.0.1:9"}     # whatever this machine has on 6443
        self.environ |= {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}

    def words(self, *options, python=()):
        """The command, with kept bytecode as the service has it; the file itself where Python gets options.

        To be run in PROGRAM_FOLDER: Python looks there first for the module.
        """
        program = [PROGRAM] if python else ["-m", pathlib.Path(PROGRAM).stem]
        return [sys.executable, *python, *program, *map(str, options)]

    def start(self, server, *options, before=(), python=(), stdin=subprocess.DEVNULL, stderr=None, **environ):
        """The program with a short interval; `server` is its gateway, or None where options name it.

        A variable that is None is not set.
        """
        there = ["--gateway-host", server.host, "--gateway-port", server.port] if server else []
        log_file = self.folder / f"log{len(self.started)}"
        with open(log_file, "wb") as log:
            agent = Agent([*before, *self.words(*there, "--keepalive-interval", "0.1", *options, python=python)],
                          stdin=stdin, stdout=log, stderr=stderr or log, env=self.with_variables(environ),
                          cwd=PROGRAM_FOLDER)
        agent.log_file = log_file
        self.started.append(agent)
        return agent

    def with_variables(self, more):
        return {name: str(value) for name, value in {**self.environ, **more}.items() if value is not None}

    def ready(self, gateway, *options, **more):
        """The program, when its gateway has seen it ready."""
        after, agent = len(gateway.seen), self.start(gateway, *options, **more)
        wait(lambda: gateway.ready(after) or agent.poll() is not None, agent.log)
        assert agent.poll() is None, agent.log()
        return agent

    def offering(self, gateway, *options, **more):
        """The program, when it has found its k3s usable and offers CPU."""
        agent = self.ready(gateway, *options, **more)
        wait(gateway.is_offered_cpu, agent.log)
        return agent

    def config(self, text):
        """A file with these settings."""
        path = self.folder / "settings"
        path.write_text(text)
        return path

    def run(self, *options, python=(), input="", stdout=subprocess.PIPE, limit=60, **environ):
        """What a run that ends by itself printed, and its exit code."""
        return subprocess.run(self.words(*options, python=python), input=input, stdout=stdout, text=True,
                              stderr=subprocess.PIPE, timeout=limit, env=self.with_variables(environ),
                              cwd=PROGRAM_FOLDER)

    def record(self):
        """The status record that this box's agent wrote last."""
        paths = sorted(self.state.glob("*status.json"), key=os.path.getmtime)
        return json.loads(paths[-1].read_text()) if paths else {}

    def close(self):
        for agent in self.started:
            agent.kill() if agent.poll() is None else None
            agent.wait()


@pytest.fixture
def box(tmp_path):
    with contextlib.closing(Box(tmp_path)) as one:
        yield one


# ---- What is shared: servers on loopback
class Link:
    """A request, and the socket to answer it on."""

    def __init__(self, server, sock, line, headers, body, connection):
        self.server, self.sock, self.headers, self.body, self.line = server, sock, headers, body, line
        self.method, self.target = (line.decode(errors="replace").split() + ["", ""])[:2]
        self.path, _, self.query = re.sub("^http://[^/]*", "", self.target).partition("?")
        self.call = server.call_of(self.path)
        self.connection, self.time, self.state, self.faulty = connection, time.monotonic(), "", False

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def bearer(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def size(self):
        """Bytes of the whole request."""
        return len(self.line) + len(str(self.headers).replace("\r", "").replace("\n", "\r\n")) + len(self.body)

    def answer(self):
        """What this server says by its contract, as bytes."""
        status, answer = self.server.answer(self)
        return http_answer(status, answer, chunked=len(str(answer)) > 4096)


class Server:
    """An HTTP server on a loopback socket, which answers by its contract, save where a fault is due.

    A fault is a function of the Link, once for each entry of `faults[call]`, or `always`. The connection is closed
    after it, unless it returns True. `greet` makes TLS of a socket, or SILENT or NOBODY of whoever connects; then
    `heard` has the first bytes of each connection.
    """

    def __init__(self, host="127.0.0.1", port=0, greet=None):
        self.host, self.port, self.greet = host, port, greet
        self.seen, self.connections, self.open, self.heard = [], 0, set(), []
        self.faults, self.always = collections.defaultdict(collections.deque), None
        self.start()

    def start(self):
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self.listener = socket.create_server((self.host, self.port), family=family)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def stop(self):
        """Nothing listens there any more; `start` has it back at the same port."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.drop()

    def drop(self):
        """Breaks all connections."""
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()

    def accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                sock = listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections += 1
                threading.Thread(target=self.serve, args=(sock, self.connections), daemon=True).start()

    def serve(self, sock, connection):
        self.open.add(sock)
        with contextlib.suppress(OSError), contextlib.closing(sock):
            if self.greet is not None:
                sock = self.welcome(sock)
            with sock, sock.makefile("rb") as file:
                while (line := file.readline()) and self.serve_one(sock, file, line, connection):
                    pass
        self.open.discard(sock)

    def welcome(self, sock):
        """The socket behind the greeting. Raises OSError where there is none."""
        self.open.add(sock)
        self.heard.append(sock.recv(65536, socket.MSG_PEEK))
        if self.greet == SILENT:
            while sock.recv(65536):
                pass
        if isinstance(self.greet, str):
            raise ConnectionError
        if isinstance(self.greet, bytes):
            sock.sendall(self.greet)
            raise ConnectionError
        sock = self.greet(sock)
        self.open.add(sock)
        return sock

    def serve_one(self, sock, file, line, connection):
        """Whether the connection goes on."""
        headers = http.client.parse_headers(file)
        body = file.read(int(headers.get("Content-Length", 0)))
        link = Link(self, sock, line, headers, body, connection)
        due = self.faults[link.call]
        fault = due.popleft() if due else self.always
        link.faulty = fault is not None
        self.seen.append(link)
        return fault(link) if fault else sock.sendall(link.answer()) is None

    def call_of(self, path):
        return path.rpartition("/")[2]

    def calls(self, call):
        return [link for link in self.seen if link.call == call]

    def answer(self, link):
        """Status and body."""
        raise NotImplementedError


def http_answer(status, body=b"", *headers, chunked=False):
    body = body.encode() if isinstance(body, str) else body
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    if chunked:
        parts = [body[at:at + 4000] for at in range(0, len(body), 4000)] + [b""]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    json_type = ["Content-Type: application/json"] if not any("Content-Type" in line for line in headers) else []
    return "\r\n".join([f"HTTP/1.1 {status} Whatever", *json_type, *headers, size, "", ""]).encode() + body


def says(status, body=b"", *headers):
    """A fault: this answer."""
    def fault(link):
        link.sock.sendall(http_answer(status, body, *headers))
        return True
    return fault


def html(status, *headers):
    return says(status, "<html><body>Log in to the Hotel" + " " * 300 + "</body></html>", "Content-Type: text/html",
                *headers)


def breaks(data=b"", reset=False):
    """A fault: so much and no more, with a reset or without."""
    def fault(link):
        link.sock.sendall(data)
        if reset:
            time.sleep(0.05)
            link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return fault


def drips(head, drop, pause=0.1):
    """A fault: this, and so on for ever, until the other end hangs up."""
    def fault(link):
        link.sock.sendall(head)
        while True:
            link.sock.sendall(drop)
            time.sleep(pause)
    return fault


def silent(link):
    """A fault: no answer, until the other end hangs up."""
    with contextlib.suppress(OSError):
        link.sock.recv(1)


def late(seconds):
    """A fault: the answer, so much later."""
    def fault(link):
        time.sleep(seconds)
        link.sock.sendall(link.answer())
        return True
    return fault


def lost(link):
    """A fault: it is done, and the answer lost."""
    link.answer()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
NOT_FOUND = ("Failed to update keepalive: failed to get machine state"
             f" <provider:machine:generic:external:{ID}>: machine not found")
DENIED, FORBIDDEN = says(401, {"message": "Unauthorized"}), says(403, {"message": "Invalid token"})


# ---- What is shared: the gateway
def configuration(pool="external", mode="external", provider="generic", others=100):
    """A gateway's configuration, secrets and all: 120 kB with a hundred other pools."""
    pools = {f"pool-{number}": {"mode": "local", "provider": None, "userData": "#!/bin/sh\n" + "x" * 1000}
             for number in range(others)}
    pools[pool] = {"mode": mode, "provider": provider, "gpu_type": "", "runtime": "nvidia",
                   "pool_sizing": {"default_worker_cpu": "1000m", "default_worker_memory": "1Gi"}}
    return {"database": {"postgres": {"password": SECRET}, "redis": {"addrs": ["127.0.0.1:9"]}},
            "tailscale": {"auth_key": SECRET}, "worker": {"pools": pools}}


class Gateway(Server):
    """The machine API of gateway-api.md, by someone who trusts no agent."""

    ROUTES = {"/health": "GET", "/machine/list": "GET", "/machine/config": "GET", "/machine/register": "POST",
              "/machine/keepalive": "POST"}
    INTEGERS = {"total_cpu_available", "total_memory_available", "total_disk_space_bytes",
                "total_disk_free_bytes", "free_gpu_count", "worker_count", "container_count"}
    NUMBERS = {"cpu_utilization_pct", "memory_utilization_pct"}

    def __init__(self, ttl=300.0, pool="external", **more):
        self.token, self.ttl, self.pool, self.config = TOKEN, ttl, pool, configuration(pool)
        self.known = {}                         # provider, pool and id -> until when
        self.machines = []                      # what /machine/list says
        self.health = 200, {"status": "ok"}
        self.registration_takes = 0.0           # seconds
        super().__init__(**more)

    def forget(self):
        self.known.clear()

    def ready(self, after=0):
        """The first keepalive that was taken, from the request of that number on."""
        return next((link for link in self.seen[after:] if link.state == "ready"), None)

    def ready_again(self):
        """Ready by a request that is still to come."""
        after = len(self.seen)
        return wait(lambda: self.ready(after), lambda: [(link.call, link.state) for link in self.seen[-9:]])

    def fail(self, *faults, call=KEEPALIVE):
        """Has these happen, one after another, and waits until the machine is ready again."""
        self.faults[call].extend(faults)
        if call == REGISTER:
            self.forget()
        wait(lambda: not self.faults[call], lambda: [(link.call, link.state) for link in self.seen[-9:]])
        return self.ready_again()

    def registered(self, key):
        """A field of all registrations."""
        return [link.json[key] for link in self.calls(REGISTER)]

    def is_offered_cpu(self):
        """By the last registration."""
        return self.registered("cpu")[-1:] not in ([], ["0m"])

    def answer(self, link):
        if link.call == REGISTER:
            time.sleep(self.registration_takes)
        status, answer = self.decide(link)
        state = answer.get("machine_state", {}) if isinstance(answer, dict) else {}
        link.state = state.get("status", "refused")
        return status, answer

    def decide(self, link):
        route = link.path.removeprefix("/api/v1")
        if route not in self.ROUTES or self.ROUTES[route] != link.method:
            return (405, {"message": "Method Not Allowed"}) if route in self.ROUTES else (404, {"message": "Not Found"})
        if route == "/health":
            return self.health
        bearer = link.headers.get("Authorization")
        if bearer is None:
            return 500, {"message": "Internal Server Error"}
        if bearer != f"Bearer {self.token}":
            return (403, {"message": "Invalid token"}) if "workspace" in bearer else (401, {"message": "Unauthorized"})
        if route == "/machine/list":
            return 200, self.machines
        if route == "/machine/config":
            return (200, {"config": self.config}) if self.config else (
                500, {"message": "Unable to create remote config"})
        said = self.read(link)
        if said is None:
            return 400, {"message": "Invalid payload"}
        return self.register(said) if link.call == REGISTER else self.keep_alive(said)

    def read(self, link):
        """The payload, if Go would read it: strings, int64 and float64, each where it belongs."""
        def no_json(name):
            raise ValueError(name)

        try:
            said = json.loads(link.body, parse_constant=no_json)
        except ValueError:
            return None
        metrics = said.get("metrics", {}) if isinstance(said, dict) else None
        if not isinstance(metrics, dict) or link.headers.get("Content-Type") != "application/json":
            return None
        strings = [value for name, value in said.items() if name != "metrics"]
        integers = [metrics[name] for name in self.INTEGERS & set(metrics)]
        numbers = [metrics[name] for name in self.NUMBERS & set(metrics)]
        fits = (all(type(value) is str for value in strings)
                and all(type(value) is int and -2 ** 63 <= value < 2 ** 63 for value in integers)
                and all(type(value) in (int, float) and abs(value) < 1.8e308 for value in numbers))
        return said if fits else None

    def register(self, said):
        for name, right, wrong in (
                ("pool_name", re.escape(self.pool), "pool name"), ("cpu", r"\d+m?", "machine cpu value"),
                ("memory", r"\d+([KMG]i)?", "machine memory value"), ("gpu_count", r"\d+", "gpu count")):
            if not re.fullmatch(right, said.get(name, ""), re.ASCII):
                return 500, {"message": f"Invalid {wrong}"}
        key = said.get("provider_name", ""), self.pool, said.get("machine_id", "")
        self.known[key] = time.monotonic() + self.ttl
        return 200, {"config": self.config, "machine_state": {
            "machine_id": key[2], "status": "registered", "pool_name": self.pool, "ttl_seconds": self.ttl}}

    def keep_alive(self, said):
        pool, machine_id = said.get("pool_name", ""), said.get("machine_id", "")
        if "" in (pool, machine_id):
            return 400, {"message": "machine_id and pool_name are required"}
        key = said.get("provider_name") or "generic", pool, machine_id
        if self.known.get(key, 0) <= time.monotonic():
            return 500, {"message": "Failed to update keepalive: failed to get machine state"
                         f" <provider:machine:{':'.join(key)}>: machine not found"}
        if "metrics" not in said:
            return 500, {"message": "Internal Server Error"}
        self.known[key] = time.monotonic() + self.ttl
        return 200, {"status": "ok", "machine_state": {
            "machine_id": machine_id, "status": "ready", "pool_name": pool, "ttl_seconds": self.ttl,
            "last_keepalive": "1767804357", "agent_version": said.get("agent_version", "")}}


@pytest.fixture
def gateway():
    with Gateway() as one:
        yield one


# ---- What is shared: certificates
class Certificates:
    """Certificates in a folder, made with `openssl` (1.1 to 3.5), and contexts that show them.

    `ca.pem` is the root of all but `others.pem`, a root of strangers.
    """

    NAMES = "DNS:localhost,IP:127.0.0.1,IP:::1"
    CONF = """[req]\ndistinguished_name = name\nprompt = no\n[name]\nCN = Test
[root]\nbasicConstraints = critical,CA:true\nkeyUsage = critical,keyCertSign,cRLSign\nsubjectKeyIdentifier = hash
[ca]\ndefault_ca = here\n[here]\ndatabase = index\nserial = serial\nnew_certs_dir = .\ndefault_md = sha256
policy = any\nunique_subject = no\n[any]\ncommonName = supplied\n"""

    def __init__(self, folder):
        self.folder = folder
        (folder / "conf").write_text(self.CONF)
        (folder / "index").touch()
        (folder / "serial").write_text("1000\n")
        new = "req -config conf -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        for name in ("ca", "others"):
            self.openssl(f"{new} -x509 -extensions root -days 9 -keyout {name}.key -out {name}.pem")
        self.openssl(f"{new} -keyout leaf.key -out leaf.csr")
        (folder / "others.key").replace(folder / "others-root.key")
        for name, more in {
                "good": {}, "expired": {"start": "20200101000000Z", "end": "20210101000000Z"},
                "future": {"start": "20480101000000Z", "end": "20490101000000Z"},
                "wrong-name": {"names": "DNS:x.example"}, "clients-only": {"extra": "extendedKeyUsage=clientAuth\n"},
                "no-key-id": {"extra": ""}}.items():
            self.make(name, **more)

    def openssl(self, words):
        subprocess.run(["openssl", *words.split()], cwd=self.folder, check=True, capture_output=True)

    def make(self, name, start="20250101000000Z", end=None, names=NAMES, extra=None):
        """A certificate for a server, signed by the root; `end` may be seconds from now."""
        if not isinstance(end, str):
            moment = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=end or 2 * 86400)
            end = moment.strftime("%Y%m%d%H%M%SZ")
        key_id = "authorityKeyIdentifier=keyid\n"
        (self.folder / "ext").write_text(f"subjectAltName={names}\n" + (
            key_id if extra is None else key_id + extra if extra else extra))
        self.openssl(f"ca -batch -notext -config conf -in leaf.csr -cert ca.pem -keyfile ca.key -extfile ext"
                     f" -startdate {start} -enddate {end} -out {name}.pem")

    def path(self, name="ca"):
        return str(self.folder / f"{name}.pem")

    def server(self, name="good", newest=ssl.TLSVersion.MAXIMUM_SUPPORTED):
        """A greeting for a Server: TLS with this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        key = "others-root" if name == "others" else "leaf"
        context.load_cert_chain(self.folder / f"{name}.pem", self.folder / f"{key}.key")
        if newest is ssl.TLSVersion.TLSv1_1:
            context.set_ciphers("DEFAULT:@SECLEVEL=0")
            context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = newest
        return lambda sock: context.wrap_socket(sock, server_side=True)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    return Certificates(tmp_path_factory.mktemp("certificates"))


# ---- What is shared: k3s
def status_of_k3s(code, message):
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


class K3s(Server):
    """The part of the Kubernetes API that is asked by the agent, behind TLS.

    `pods` are rows of name, status and age; `nodes` are made by `node`; `forbidden` are calls that get 403.
    """

    RULES = [{"verbs": ["list", "create", "delete"], "apiGroups": ["batch"], "resources": ["jobs"]},
             {"verbs": ["list"], "apiGroups": [""], "resources": ["pods"]},
             {"verbs": ["get", "list"], "apiGroups": [""], "resources": ["nodes"]}]
    COLUMNS = ["Name", "Ready", "Status", "Restarts", "Age", "IP", "Node", "Nominated Node", "Readiness Gates"]

    def __init__(self, certificates, name="good", **more):
        self.certificates, self.tokens = certificates, {K3S_TOKEN}
        self.pods, self.nodes, self.forbidden = [], [self.node()], set()
        super().__init__(greet=more.pop("greet", None) or certificates.server(name), **more)

    @staticmethod
    def node(name=None, ready="True", unschedulable=False, taints=(), pressure=(), **allocatable):
        """A node; `ready` may be None for no condition, `gpu` is `nvidia.com/gpu`, `taints` are effects."""
        conditions = [{"type": kind, "status": "True" if kind in pressure else "False", "reason": "Stub"}
                      for kind in ("MemoryPressure", "DiskPressure", "PIDPressure")]
        if ready is not None:
            conditions.append({"type": "Ready", "status": ready, "reason": "Stub", "message": "kubelet says so"})
        fits = {"cpu": "1000", "memory": "4000Gi", "pods": "110", **allocatable}
        fits = {"nvidia.com/gpu" if key == "gpu" else key: value for key, value in fits.items()}
        spec = {"unschedulable": True} if unschedulable else {}
        if taints:
            spec["taints"] = [{"key": "stub.example/reason", "effect": effect} for effect in taints]
        return {"kind": "Node", "metadata": {"name": name or socket.gethostname().lower()}, "spec": spec,
                "status": {"allocatable": fits, "capacity": fits, "conditions": conditions}}

    def options(self, *more):
        """For the agent: the token first, the CA last."""
        return ["--k3s-token", K3S_TOKEN, "--k3s-url", f"https://{self.host}:{self.port}", "--hostname", "box",
                "--k3s-ca-file", self.certificates.path(), *more]

    def looked(self, count):
        """Waits until it was asked for the worker pods so many more times."""
        end = len(self.calls("pods")) + count
        wait(lambda: len(self.calls("pods")) >= end, lambda: [(link.method, link.target) for link in self.seen[-9:]])

    def call_of(self, path):
        return next((name for name in ("selfsubjectrulesreviews", "pods", "nodes") if f"/{name}" in path),
                    super().call_of(path))

    def answer(self, link):
        if link.bearer not in self.tokens:
            return status_of_k3s(401, "Unauthorized")
        if link.call in self.forbidden:
            return status_of_k3s(403, f'{link.call} is forbidden: User "x" cannot list resource')
        if link.call == "selfsubjectrulesreviews" and link.method == "POST":
            return 201, {"kind": "SelfSubjectRulesReview",
                         "status": {"resourceRules": self.RULES, "incomplete": False}}
        if link.path == "/api/v1/namespaces/default/pods" and link.method == "GET":
            return self.list_pods(link)
        if link.path == "/api/v1/nodes":
            return 200, {"kind": "NodeList", "apiVersion": "v1", "items": self.nodes}
        return status_of_k3s(404, "the server could not find the requested resource")

    def list_pods(self, link):
        """As Kubernetes 1.34 answers: a Table where one is asked for, with whole objects unless told otherwise."""
        query = dict(urllib.parse.parse_qsl(link.query))
        rows = [row for row in self.pods if "status.phase!=Succeeded" not in query.get("fieldSelector", "")
                or row[1] not in ("Completed", "Error")]
        if "as=Table" not in link.headers.get("Accept", ""):
            return 200, {"kind": "PodList", "apiVersion": "v1", "items": []}
        whole = None if query.get("includeObject") == "None" else {"spec": {"env": SECRET}}
        return 200, {
            "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": "263"},
            "columnDefinitions": [{"name": name, "type": "string", "priority": 0} for name in self.COLUMNS],
            "rows": [{"cells": [name, "0/1", status, "0", age, *["<none>"] * 4], "object": whole}
                     for name, status, age in rows]}


@pytest.fixture
def k3s(certificates):
    with K3s(certificates) as one:
        yield one


# ---- What is shared: a driver
NVML_C = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* Says what the file named by NVML_STUB says at each call: "INIT HANG GPUS". INIT is what nvmlInit returns, HANG
   whether it does; GPUS has a letter for each card, or is - for none: b busy, x lost, l lost after its handle,
   ? processes not supported, M processes not permitted, as of a card that MIG splits, r needs a reset, e unknown error
   from all but the name; any other is free. */
static __thread int init_code, hang; static __thread char gpus[65];
static void look(void) {
    FILE *file = fopen(getenv("NVML_STUB"), "r");
    init_code = hang = 0; gpus[0] = 0;
    if (file) { if (fscanf(file, "%d %d %64[^-\n]", &init_code, &hang, gpus) < 3) gpus[0] = 0; fclose(file); }
}
static char kind(void *device) {
    look();
    return gpus[(long)device - 1];
}
static int fault(void *device) {        /* of any call on this card */
    char c = kind(device);
    return c == 'l' ? 15 : c == 'r' ? 16 : c == 'e' ? 999 : 0;
}
int nvmlInitWithFlags(unsigned flags) { do look(); while (hang && !usleep(20000)); return init_code; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "stub error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { look(); *count = strlen(gpus); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    look();
    if (index >= strlen(gpus)) return 2;
    *device = (void *)(long)(index + 1);
    return gpus[index] == 'x' ? 15 : 0;
}
int nvmlDeviceGetName(void *device, char *name, unsigned size) {
    snprintf(name, size, "NVIDIA Stub %ld", (long)device - 1);
    return kind(device) == 'l' ? 15 : 0;
}
static int processes_of(void *device, unsigned *count, void *processes) {
    char c = kind(device);
    if (c == '?') return 3;
    if (c == 'M') return 4;
    if (fault(device)) return fault(device);
    if (c != 'b') { *count = 0; return 0; }
    if (!processes || !*count) { *count = 1; return 7; }
    memset(processes, 0, 24); *count = 1; return 0;
}
#ifndef OLD
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, void *processes) {
    return processes_of(device, count, processes);
}
#endif
#ifndef ANCIENT
int nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *count, void *processes) {
    return processes_of(device, count, processes);
}
#endif
"""


class Driver:
    """A stub of the driver's library, under the real binding; see NVML_C. Give `environ` to the program."""

    def __init__(self, library, control):
        self.control = control
        self.environ = {"LD_LIBRARY_PATH": str(library), "NVML_STUB": str(control)}
        self.say("")

    def say(self, gpus="", init=0, hang=False):
        """What it says from now on, in processes that run too."""
        replace(self.control, f"{init} {hang:d} {gpus or '-'}\n")


@pytest.fixture(scope="session")
def nvml_libraries(tmp_path_factory):
    """Makes a folder with a libnvidia-ml.so.1: today's, OLD (without `…_v3`) or ANCIENT (nor `…_v2`)."""
    made = {}

    def library(age=""):
        if not shutil.which("cc"):
            pytest.skip("no cc to compile the stub of the driver with")
        if age not in made:
            made[age] = folder = tmp_path_factory.mktemp("nvml")
            (folder / "stub.c").write_text(NVML_C)
            lacks = {"": [], "OLD": ["-DOLD"], "ANCIENT": ["-DOLD", "-DANCIENT"]}[age]
            subprocess.run(["cc", "-shared", "-fPIC", "-w", *lacks, "-o", folder / "libnvidia-ml.so.1",
                            folder / "stub.c"], check=True)
        return made[age]

    return library


@pytest.fixture
def driver(nvml_libraries, tmp_path):
    return Driver(nvml_libraries(), tmp_path / "driver")


# ---- What is shared: ssh
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ["PATH"])


def free_ports():
    """Of those that the system does not hand out by itself."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            yield port


class SshHost:
    """The gateway's host with its sshd. The `ssh` of the agent reads this folder's files and none of the user's own.

    `keys` is authorized_keys, `known` is known_hosts, `conf` the client's configuration, `sshd_conf` the server's.
    """

    def __init__(self, box, gateway, folder):
        self.box, self.gateway, self.folder = box, gateway, folder
        self.ports = free_ports()
        self.port, self.user = next(self.ports), pwd.getpwuid(os.getuid()).pw_name
        self.keys, self.known, self.conf = folder / "keys", folder / "known_hosts", folder / "ssh.conf"
        for name in ("host", "id", "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        self.known.write_text(f"[127.0.0.1]:{self.port} {(folder / 'host.pub').read_text()}")
        self.public_key = (folder / "id.pub").read_text().strip()
        self.keys.write_text(f'restrict,port-forwarding,permitopen="localhost:{gateway.port}" {self.public_key}\n')
        self.conf.write_text(f"Host *\nIdentityFile {folder}/id\nIdentitiesOnly yes\nIdentityAgent none\n"
                             f"UserKnownHostsFile {self.known}\nGlobalKnownHostsFile /dev/null\n")
        self.program = folder / "bin/ssh"
        self.program.parent.mkdir()
        self.program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.conf} "$@"\n')
        self.program.chmod(0o755)
        self.environ = {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
        self.sshd_conf = folder / "sshd.conf"
        self.sshd_conf.write_text(f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {folder}/host\n"
                                  f"AuthorizedKeysFile {self.keys}\nPidFile none\nStrictModes no\nUsePAM no\n"
                                  "PermitRootLogin prohibit-password\n")
        if os.getuid() == 0:
            os.makedirs("/run/sshd", 0o755, exist_ok=True)
        # OpenSSH 9.8 and later shut out for a while those whose sessions were killed
        self.command, patient = [SSHD, "-f", self.sshd_conf], ["-o", "PerSourcePenalties=no"]
        if subprocess.run([*self.command, *patient, "-t"], capture_output=True).returncode == 0:
            self.command += patient
        self.listen()

    def listen(self):
        with open(self.folder / "log", "ab") as log:
            self.sshd = psutil.Popen([*self.command, "-D", "-e"], stdin=subprocess.DEVNULL, stderr=log)
        wait(lambda: self.is_up() or self.sshd.poll() is not None, self.log)
        assert self.sshd.poll() is None, self.log()

    def is_up(self):
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", self.port), 30):
            return True

    def log(self):
        """What sshd said."""
        return (self.folder / "log").read_text(errors="replace")

    def sessions(self):
        """The server's processes of all connections."""
        return self.sshd.children(recursive=True)

    def clients(self):
        """The processes of ssh that run for this test."""
        found = []
        for process in psutil.process_iter(["name", "cmdline"]):
            if process.info["name"] == "ssh" and str(self.conf) in (process.info["cmdline"] or ()):
                found.append(process)
        return found

    def kill(self, processes):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def stop(self):
        """The server is gone, without a word."""
        self.sshd.suspend()
        sessions = self.sessions()
        self.sshd.kill()
        self.sshd.wait()
        self.kill(sessions)

    def options(self, *more):
        """For an agent that has no other way to the gateway."""
        return ["--ssh", f"{self.user}@127.0.0.1:{self.port}", "--gateway-host", "localhost",
                "--gateway-port", self.gateway.port, *more]

    def start(self, *more, **environ):
        return self.box.start(self.gateway, *self.options(*more), **{**self.environ, **environ})

    def ready(self, *more, **environ):
        return self.box.ready(self.gateway, *self.options(*more), **{**self.environ, **environ})

    def run(self, *more, **environ):
        return self.box.run(*self.options(*more), **{**self.environ, **environ})

    def close(self):
        self.box.close()
        self.stop() if self.sshd.is_running() else None
        self.kill(self.clients())


@pytest.fixture
def ssh_host(box, gateway, tmp_path_factory):
    if not SSHD or not shutil.which("ssh"):
        pytest.skip("no sshd or no ssh here")
    with contextlib.closing(SshHost(box, gateway, tmp_path_factory.mktemp("ssh"))) as one:
        yield one


# ---- Seen from outside: registering and keeping alive
REGISTRATION_FIELDS = {"token", "machine_id", "hostname", "provider_name", "pool_name", "cpu", "memory", "gpu_count",
                       "private_ip"}
METRICS = {"cpu_utilization_pct", "memory_utilization_pct", "total_cpu_available", "total_memory_available",
           "total_disk_space_bytes", "total_disk_free_bytes", "free_gpu_count"}


def test_life_says_what_the_gateway_reads_on_one_kept_connection(box, gateway):
    gateway.always = lambda link: (link.sock.sendall(link.answer().replace(
        b"\r\n", b"\r\nSet-Cookie: id=%d\r\n" % len(gateway.seen), 1)), True)[1]
    agent = box.ready(gateway, "--k3s-token", K3S_TOKEN, "--offer-always", "--hostname", "box.example",
                      "--max-cpu", "0.5", "--max-memory", "1Gi", "--max-gpus", "0", "--machine-id", ID)
    wait(lambda: len(gateway.seen) > 5, agent.log)
    assert [link.call for link in gateway.seen[:3]] == [REGISTER, KEEPALIVE, KEEPALIVE]
    assert gateway.connections == 1 and {link.path for link in gateway.seen} == {
        "/api/v1/machine/register", "/api/v1/machine/keepalive"}
    for link in gateway.seen:
        assert link.method == "POST" and link.bearer == TOKEN and not link.query and link.size <= 600
        assert link.headers["Content-Type"] == "application/json" and link.headers["Cookie"] is None
        assert not re.search("gzip|deflate|br", link.headers.get("Accept-Encoding", ""))
        assert (link.json["machine_id"], link.json["pool_name"], link.json["provider_name"]) == (
            ID, "external", "generic")
    said, kept = gateway.seen[0].json, gateway.seen[-1].json
    assert set(said) == REGISTRATION_FIELDS and {*map(type, said.values())} == {str}
    assert (said["token"], said["hostname"], said["gpu_count"]) == (K3S_TOKEN, "box.example", "0")
    assert (said["cpu"], said["memory"]) == ("500m", "1024Mi") and not said["private_ip"].startswith("127.")
    assert set(kept) == {"machine_id", "provider_name", "pool_name", "agent_version", "metrics"}
    assert set(kept["metrics"]) == METRICS, "what nobody measured is left out"
    assert kept["metrics"]["total_memory_available"] > 1024 and kept["agent_version"].endswith("-python")
    assert 0 <= kept["metrics"]["cpu_utilization_pct"] <= 100 and TOKEN not in str(said) + str(kept)
    assert agent.facts("Threads") <= 2 and agent.poll() is None


def test_life_without_options_on_ipv6_uses_names_of_its_own_and_offers_no_cpu(box):
    with Gateway(host="::1") as gateway:
        agent = box.ready(gateway)
        assert agent.stop() == 0 and gateway.seen[0].headers["Host"] == f"[::1]:{gateway.port}"
        said = gateway.seen[0].json
    assert re.fullmatch("[0-9a-f]{8}", said["machine_id"]) and said["hostname"] == f"machine-{said['machine_id']}"
    assert (said["token"], said["cpu"]) == ("", "0m") and re.fullmatch(r"\d+Mi", said["memory"])


@pytest.mark.parametrize("others, ready", [(3500, True), (4000, False)], ids=["3.8-MB", "4.3-MB"])
def test_registration_answer_of_up_to_4_mebibytes_is_read(box, gateway, others, ready):
    gateway.config = configuration(others=others)
    agent = box.start(gateway, "--once")
    assert agent.wait(60) == (0 if ready else 69) and (ready or "larger than 4096 KiB" in agent.log()), agent.log()


@pytest.mark.parametrize("config, words", [
    (None, "directRedisHost"), (configuration(mode="local"), "local"), (configuration(provider="ec2"), "ec2")],
    ids=["null", "mode", "provider"])
def test_registration_that_says_no_work_will_come_is_told_once_and_status_is_1(box, gateway, k3s, config, words):
    gateway.config = config
    agent = box.offering(gateway, *k3s.options())
    registered = len(gateway.calls(REGISTER))
    gateway.forget()
    wait(lambda: len(gateway.calls(REGISTER)) > registered, agent.log)
    gateway.ready_again()
    said, = agent.lines("no work will come")
    assert words in said and " WARNING " in said and SECRET not in agent.log()
    assert box.run("--status").returncode == 1


# ---- Seen from outside: what an answer means
ONCE = ["--once"]
NO_POOL, TROUBLE = says(500, {"message": "Invalid pool name"}), says(500, {"message": "Failed to register machine"})
NO_ROUTE, GONE = says(404, {"message": "Not Found"}), says(500, {"message": NOT_FOUND})
STARTS = {  # exit code (None: goes on), words of the log, options, faults for register and keepalive
    "ok": (0, "ready after", ONCE, None, None),
    "401": (77, "beta9 machine create", ONCE, DENIED, None),
    "401-for-long": (77, "beta9 machine create", ["--startup-timeout", "0.4"], DENIED, None),
    "401-at-first": (None, "401|Unauthorized|refuse", [], DENIED, None),
    "401-html": (69, "in between", ONCE, html(401), None),
    "403": (77, "beta9 machine create", [], FORBIDDEN, None),
    "403-keepalive": (77, "beta9 machine create", [], None, FORBIDDEN),
    "no-pool": (78, "--pool-name", [], NO_POOL, None),
    "upstream": (78, "upstream", [], None, NO_ROUTE),
    "500": (69, "health", ONCE, TROUBLE, None),
    "500-for-long": (69, "500", ["--startup-timeout", "0.4"], says(500), None),
    "500-one-try": (69, "500", ["--startup-timeout", "0"], says(500), None),
    "500-for-ever": (None, "500", [], says(500), None),
    "portal": (69, "Hotel", ONCE, html(200), None),
    "redirect": (69, "/login", ONCE, says(302, b"", "Location: /login"), None),
    "closed": (69, "127.0.0.1", ONCE, breaks(), None),
    "forgotten": (69, "does not know this machine", ONCE, None, GONE),
    "not-ok": (69, "keepalive", ONCE, None, says(200, {"status": "ready"})),
}


@pytest.mark.parametrize("name", STARTS)
def test_start_answered_so_ends_with_this_exit_code_or_goes_on(box, gateway, name):
    code, words, options, register, keepalive = STARTS[name]
    faults = {REGISTER: register, KEEPALIVE: keepalive}
    gateway.always = lambda link: (faults[link.call] or late(0))(link)
    agent = box.start(gateway, *options)
    if code is None:
        wait(lambda: len(gateway.seen) > 4, agent.log)
        assert agent.poll() is None and agent.stop() == 0
    else:
        assert agent.wait(60) == code, agent.log()
        assert code == 0 or len(agent.lines("giving up", "ERROR")) >= 1
    assert re.search(words, agent.log()) and "Traceback" not in agent.log(), agent.log()
    if options == ONCE or "403" in name or code == 78:
        assert len(gateway.seen) == (1 if faults[REGISTER] else 2), "nothing is tried again"


def test_start_gateway_that_comes_late_is_ready(box, gateway):
    gateway.stop()
    agent = box.start(gateway)
    agent.says("refused")
    gateway.start()
    wait(gateway.ready, agent.log)
    assert agent.poll() is None


@pytest.mark.parametrize("before, code", [
    (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", 0), (b"HTTP/1.1 102 Processing\r\n\r\n" * 3, 0),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 199 Odd\r\nX: y\r\n\r\n", 0),
    (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 69)], ids=["103", "102", "100-199", "101"])
def test_answers_before_the_answer_are_skipped(box, gateway, before, code):
    gateway.always = lambda link: link.sock.sendall(before + link.answer()) is None
    agent = box.start(gateway, *ONCE)
    assert agent.wait(60) == code, agent.log()
    assert code or [link.state for link in gateway.seen] == ["registered", "ready"]


def test_life_answers_that_say_forgotten_are_each_followed_by_a_registration_and_a_keepalive(box, gateway):
    box.ready(gateway)
    for fault in (GONE, says(404, {"error_code": "machine_not_found", "message": "m", "suggestion": "s"}),
                  says(410, {"error_code": "machine_expired"}), says(200, {"error_code": "machine_not_found"})):
        before = len(gateway.seen)
        gateway.fail(fault)
        calls = [link.call for link in gateway.seen[before:]]
        assert calls.count(REGISTER) == 1 and calls[calls.index(REGISTER) + 1] == KEEPALIVE


def test_failure_after_the_first_ready_never_ends_the_agent_and_all_is_tried_again(box, gateway):
    agent = box.ready(gateway, "--startup-timeout", "0")
    for fault in (DENIED, FORBIDDEN, NO_POOL, NO_ROUTE, html(200), lost):
        for call in (KEEPALIVE, REGISTER):
            gateway.fail(fault, fault, call=call)
    assert agent.poll() is None and agent.stop() == 0


ODD = {     # answers to a keepalive of a ready machine; what follows is a keepalive
    "closed": breaks(), "reset": breaks(b"", reset=True),
    "closed-in-status-line": breaks(b"HTTP/1.1 20"),
    "closed-in-headers": breaks(HEAD[:30]),
    "closed-after-headers": breaks(HEAD + b"Content-Length: 15\r\n\r\n"),
    "reset-in-body": breaks(HEAD + b'Content-Length: 150\r\n\r\n{"status"', reset=True),
    "truncated": breaks(HEAD + b'Content-Length: 150\r\n\r\n{"status": "ok"'),
    "close-delimited-html": breaks(b"HTTP/1.1 200 OK\r\n\r\n<html>"),
    "bad-chunks": breaks(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
    "no-http": breaks(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
    "http-0.9": breaks(b'{"status": "ok"}'),
    "bad-content-length": breaks(HEAD + b"Content-Length: -5\r\n\r\n{}"),
    "endless-body": drips(HEAD + b"\r\n{", b"x" * 65536, 0),
    "endless-headers": drips(HEAD, b"X-More: " + b"x" * 60000 + b"\r\n", 0),
    "100-then-closed": breaks(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "gzip-bomb": says(200, gzip.compress(bytes(50 << 20)), "Content-Encoding: gzip"),
    "deflate-broken": says(200, b"\xff\xfe", "Content-Encoding: deflate"),
    "number": says(200, b"1" * 5000), "big": says(200, b'{"status": "ok", "a": "' + b"x" * (5 << 20) + b'"}'),
    "204": says(204), "302-big": says(302, b"x" * (5 << 20), "Location: /login"),
    "302-bad-location": says(302, b"", "Location: http://[::1"), "308-no-location": says(308),
    "502": html(502), "lost": lost,
}
HANGING = {     # none of these answers ever ends: that there is a next request shows that it was cut
    "silent": silent, "dripping-status-line": drips(b"HTTP", b"/"), "dripping-headers": drips(HEAD, b"X-More: x\r\n"),
    "dripping-header": drips(HEAD + b"X: ", b"x"),
    "dripping-body": drips(HEAD + b'Content-Length: 5000\r\n\r\n{"', b"x"),
    "dripping-until-closed": drips(HEAD + b"\r\n{", b" "),
    "dripping-chunks": drips(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "dripping-redirect": drips(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 5000\r\n\r\n", b"x"),
    "1xx-for-ever": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.slow
def test_life_odd_answers_to_keepalives_are_failures_and_it_is_kept_alive_again(box):
    """But for a kept connection that ends without a byte, which may count as none."""
    with Gateway(ttl=6) as gateway:
        agent = box.ready(gateway)
        for name, fault in ODD.items():
            failed = wait(box.record)["failed"]
            gateway.fail(fault)
            assert agent.poll() is None and len(gateway.calls(REGISTER)) == 1, f"{name}\n{agent.log()}"
            wait(lambda: box.record()["failed"] > failed or name in ("closed", "reset", "lost"), name)
        assert agent.facts("VmHWM") < 128 * 1024, "KiB: none was read on and on"


@pytest.mark.parametrize("names, tls", [
    (["dripping-body"], False), pytest.param(HANGING, False, marks=pytest.mark.slow),
    pytest.param(HANGING, True, marks=pytest.mark.slow)], ids=["one", "all", "all-by-tls"])
def test_life_answers_that_never_end_are_cut_and_it_is_kept_alive_again(box, certificates, names, tls):
    """A keepalive has 2 s, and the thread that was late must be gone: between requests there is one alone."""
    with Gateway(ttl=60, greet=certificates.server() if tls else None) as gateway:
        agent = box.ready(gateway, *(tls_options(certificates) if tls else ()))
        for name in names:
            gateway.fail(HANGING[name])
            wait(lambda: agent.facts("Threads") == 1, name)
            pause = [pause for link, pause in zip(gateway.seen, pauses_of(gateway.seen)) if link.faulty][-1]
            assert 1.5 < pause < 8, f"{name}: it is cut after 2 s"
        assert gateway.connections == 1 + len(names) and len(gateway.calls(REGISTER)) == 1


# ---- Seen from outside: the schedule
def pauses_of(links):
    return [two.time - one.time for one, two in zip(links, links[1:])]


def test_schedule_keepalive_follows_each_registration_at_once_and_forgotten_is_registered_at_once(box, gateway):
    """With an interval of 60 s: a first ordinary pause takes 6 s at least, one after a failure 1 s."""
    gateway.faults[KEEPALIVE].append(GONE)
    agent = box.ready(gateway, "--keepalive-interval", "60")
    assert [link.call for link in gateway.seen] == [REGISTER, KEEPALIVE] * 2
    assert max(pauses_of(gateway.seen)) < 0.9, agent.log()


def test_schedule_gateway_back_within_the_ttl_is_only_kept_alive(box, gateway):
    agent = box.ready(gateway)
    agent.says("ready after")
    gateway.stop()
    agent.says("refused")
    after = len(gateway.seen)
    gateway.start()
    gateway.ready_again()
    agent.says("ready again")
    assert {link.call for link in gateway.seen[after:]} == {KEEPALIVE} and agent.poll() is None


@pytest.mark.slow
def test_schedule_process_stopped_for_longer_than_the_ttl_sends_what_is_overdue_once(box):
    with Gateway(ttl=1) as gateway:
        agent = box.ready(gateway, "--keepalive-interval", "0.3")
        agent.send_signal(signal.SIGSTOP)
        time.sleep(1.3)
        after = len(gateway.seen)
        agent.send_signal(signal.SIGCONT)
        gateway.ready_again()
        gateway.ready_again()
        calls = [link.call for link in gateway.seen[after:]]
        assert REGISTER in calls[:2] and calls.count(REGISTER) == 1 and len(calls) < 6, calls


def test_schedule_half_of_all_answers_lost_stays_registered(box):
    with Gateway(ttl=6) as gateway:
        agent, draw = box.ready(gateway), random.Random(1).random
        gateway.always = lambda link: lost(link) if draw() < 0.5 else late(0)(link)
        gone = len(gateway.seen)
        wait(lambda: len(gateway.seen) > gone + 12, agent.log)
        gateway.always = None
        gateway.ready_again()
        assert len(gateway.calls(REGISTER)) == 1 and agent.poll() is None and len(agent.lines(" failed")) < 12


def test_registration_that_fails_never_starves_the_lease(box):
    """A new token while the register route fails, for longer than the TTL."""
    with Gateway(ttl=2) as gateway:
        path = box.folder / "k3s"
        replace(path, K3S_TOKEN)
        agent = box.ready(gateway, "--k3s-token-file", path)
        gateway.always = lambda link: (says(500) if link.call == REGISTER else late(0))(link)
        after = len(gateway.seen)
        replace(path, SECRET)
        end = time.monotonic() + 2.5
        wait(lambda: time.monotonic() > end and len(gateway.seen) > after + 10)
        calls = [link.call for link in gateway.seen[after:]]
        assert REGISTER in calls and not any(one == two == REGISTER for one, two in zip(calls, calls[1:])), calls
        kept = [link for link in gateway.seen if link.call == KEEPALIVE]
        assert {link.state for link in kept} == {"ready"}, "it was never forgotten"
        gateway.always = None
        wait(lambda: gateway.registered("token")[-1] == SECRET and gateway.seen[-1].state == "ready", agent.log)


# ---- Seen from outside: offers and k3s
def answers(fault):
    return lambda k3s: setattr(k3s, "always", fault)


def has(*nodes):
    return lambda k3s: setattr(k3s, "nodes", nodes)


K3S_TROUBLE = {     # how it is made, and words of the log
    "closed-port": (K3s.stop, "k3s"), "closed": (answers(breaks()), "k3s"), "hangs": (answers(silent), "in time"),
    "401": (lambda k3s: k3s.tokens.clear(), "refuse"), "403": (lambda k3s: k3s.forbidden.add("pods"), "forbid"),
    "500": (answers(says(500, {"message": f"your token is {K3S_TOKEN}"})), "your token is"),
    "redirect": (answers(says(302, b"", "Location: https://127.0.0.1:9/")), "302"),
    "html": (answers(html(200)), "200"), "endless": (answers(drips(HEAD + b"\r\n", b" " * 90000, 0)), "larger"),
    "no-node": (has(), "no node"), "not-ready": (has(K3s.node(ready="False")), "NotReady"),
    "unknown": (has(K3s.node(ready="Unknown")), "Unknown"), "no-condition": (has(K3s.node(ready=None)), "NotReady"),
    "cordoned": (has(K3s.node(unschedulable=True)), "kubectl uncordon"),
    "no-schedule": (has(K3s.node(taints=["NoSchedule"])), "has the taint stub.example/reason:NoSchedule"),
    "no-execute": (has(K3s.node(taints=["PreferNoSchedule", "NoExecute"])), "kubectl taint node"),
    "memory": (has(K3s.node(pressure=["MemoryPressure"])), "MemoryPressure"),
    "disk": (has(K3s.node(pressure=["DiskPressure"])), "DiskPressure"),
    "pids": (has(K3s.node(pressure=["PIDPressure"])), "PIDPressure"),
    "this-of-several": (has(K3s.node("other"), K3s.node(ready="False")), "NotReady"),
}


@pytest.mark.parametrize("name", rows(
    K3S_TROUBLE, "closed-port", "401", "403", "500", "no-node", "not-ready", "cordoned", "no-execute", "disk"))
def test_k3s_in_trouble_is_offered_no_cpu_with_its_reason_and_hears_its_own_token_alone(box, gateway, k3s, name):
    make, words = K3S_TROUBLE[name]
    make(k3s)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        agent = box.ready(gateway, *k3s.options(), https_proxy=f"http://127.0.0.1:{proxy.getsockname()[1]}")
        wait(lambda: words in agent.log(), agent.log)
        gateway.ready_again()
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert set(gateway.registered("cpu")) == {"0m"} and gateway.registered("token")[0] == K3S_TOKEN
    assert {link.bearer for link in k3s.seen} <= {K3S_TOKEN} and leaks(agent.log(), K3S_TOKEN, TOKEN) == []
    done = box.run("--status")
    assert done.returncode == 1 and words in " ".join(done.stdout.split()), done.stdout


def test_k3s_that_is_usable_but_has_no_hostname_for_the_gateway_is_told(box, gateway, k3s):
    words = k3s.options()
    at_word = words.index("--hostname")
    agent = box.ready(gateway, *words[:at_word], *words[at_word + 2:])
    agent.says("--hostname is missing")


def test_k3s_one_bad_look_with_a_new_token_is_not_believed(k3s):
    watch = b9.K3sWatch(config_of(*k3s.options()), ID)
    wait(lambda: watch.look().fault == "", "k3s is usable")
    k3s.always, watch.config.k3s_token = html(503), b9.Secret("another-token-1")
    assert watch.look().fault == ""

    def look_again():
        watch.due = -math.inf
        return watch.look().fault

    wait(look_again, "a second bad look is believed")
    watch.http.close()


def test_k3s_faults_that_alternate_are_believed(k3s):
    watch = b9.K3sWatch(config_of(*k3s.options()), ID)
    wait(lambda: watch.look().fault == "", "k3s is usable")
    k3s.nodes, faults = [k3s.node(ready="False")], itertools.cycle([html(503), None])

    def look_again():
        k3s.always, watch.due = next(faults), -math.inf
        return watch.look().fault

    wait(look_again, "a second bad look is believed, whatever the node says")
    watch.http.close()


def test_k3s_not_seen_yet_is_no_fault_with_offer_always():
    assert "not seen yet" in b9.K3sWatch(CONFIG, ID).view.fault
    view = b9.K3sWatch(config_of("--offer-always"), ID).view
    assert view.fault == "" and "not seen yet" in view.notice


def test_k3s_that_is_usable_has_all_offered_its_running_workers_counted_and_a_stuck_one_told(box, gateway, k3s):
    k3s.pods = [("w-1", "Running", "5m2s"), ("w-2", "Pending", "10s"), ("w-3", "Running", "2d3h"),
                ("w-4", "Completed", "9m"), ("w-5", "ImagePullBackOff", "3m")]
    agent = box.offering(gateway, *k3s.options())
    wait(lambda: gateway.ready_again().json["metrics"].get("worker_count") == 2, agent.log)
    pods = k3s.calls("pods")[0]
    assert pods.bearer == K3S_TOKEN and pods.path == "/api/v1/namespaces/default/pods"
    query = dict(urllib.parse.parse_qsl(pods.query))
    assert query["includeObject"] == "None", "else each pod's settings would come along"
    machine_id = gateway.seen[0].json["machine_id"]
    assert query["labelSelector"] == f"run.beam.cloud/role=worker,run.beam.cloud/machine-id={machine_id}"
    agent.says("w-1", "WARNING worker w-5 cannot run, ImagePullBackOff")
    assert "w-4" not in agent.log(), "it has ended"
    done = box.run("--status")
    assert done.returncode == 0 and "worker w-5 cannot run, ImagePullBackOff" in done.stdout, done.stdout


@pytest.mark.parametrize("nodes, forbidden", [
    ([K3s.node("other")], set()), ([K3s.node("a", ready="False"), K3s.node("b")], set()), ([], {"nodes"}),
    ([K3s.node(taints=["PreferNoSchedule"])], set())], ids=["only-one", "several-others", "forbidden", "prefer"])
def test_node_that_takes_pods_or_may_not_be_read_is_offered_all(box, gateway, k3s, nodes, forbidden):
    k3s.nodes, k3s.forbidden = nodes, forbidden
    agent = box.offering(gateway, *k3s.options())
    assert {link.call for link in k3s.seen} == {"pods", "nodes"}, "two requests are all that is asked"
    done = box.run("--status")
    assert done.returncode == 0 and (not forbidden or "may not read it" in agent.log())


def test_node_of_less_than_is_here_caps_the_offer(box, gateway, k3s, driver):
    driver.say("...")
    k3s.nodes = [K3s.node(cpu="500m", memory="716800Ki", gpu="2")]
    box.offering(gateway, *k3s.options(), **driver.environ)
    said = gateway.calls(REGISTER)[-1].json
    assert (said["cpu"], said["memory"], said["gpu_count"]) == ("500m", "700Mi", "2")


def test_k3s_with_a_foreign_certificate_gets_no_byte_of_the_token(box, gateway, certificates):
    with K3s(certificates, "others") as k3s:
        agent = box.ready(gateway, *k3s.options())
        wait(lambda: k3s.heard and agent.lines("issuer", "self-signed", "self signed"), agent.log)
        assert gateway.registered("cpu") == ["0m"] and k3s.seen == []
        assert not any(K3S_TOKEN.encode() in data for data in k3s.heard)


def test_k3s_without_a_ca_gets_a_handshake_and_no_token_and_counts_as_usable(box, gateway, certificates):
    with K3s(certificates, "others") as k3s:
        box.offering(gateway, *k3s.options()[:-2])
        assert k3s.seen == [] and k3s.heard and not any(K3S_TOKEN.encode() in data for data in k3s.heard)
        assert "worker_count" not in gateway.ready_again().json["metrics"]
        assert "k3s        not asked" in box.run("--status").stdout


@pytest.mark.slow
def test_k3s_files_that_come_late_or_anew_are_used_within_seconds_whatever_the_interval(box, k3s):
    token, ca, old = box.folder / "k3s-token", box.folder / "ca.crt", "old-" + K3S_TOKEN
    k3s.tokens = {old}
    with Gateway(ttl=86400) as gateway:
        agent = box.ready(gateway, *k3s.options()[2:-2], "--k3s-token-file", token, "--k3s-ca-file", ca,
                          "--keepalive-interval", "240")
        assert (gateway.registered("token"), gateway.registered("cpu")) == ([""], ["0m"])
        agent.says(str(token))
        replace(token, old)
        wait(lambda: gateway.registered("token")[-1] == old, agent.log)
        assert k3s.seen == [] and not k3s.heard, "no CA: not a byte"
        replace(ca, pathlib.Path(k3s.certificates.path()).read_text())
        wait(gateway.is_offered_cpu, agent.log)
        k3s.tokens = {K3S_TOKEN}
        wait(lambda: not gateway.is_offered_cpu(), agent.log)
        replace(token, K3S_TOKEN)
        start = time.monotonic()
        wait(lambda: gateway.registered("token")[-1] == K3S_TOKEN and gateway.is_offered_cpu(), agent.log)
        wait(lambda: gateway.seen[-1].state == "ready", agent.log)
        assert time.monotonic() - start < 22, "a keepalive alone may be due after 24 s at the soonest"
        offered_at = gateway.calls(REGISTER)[-1].time
        looks = [link for link in k3s.calls("pods") if link.bearer == K3S_TOKEN and link.time < offered_at]
        assert len(looks) == 1, "the first good one with a new token counts"
        assert agent.poll() is None and leaks(agent.log(), K3S_TOKEN) == []


def test_k3s_that_is_unusable_is_offered_all_the_same_with_offer_always(box, gateway, k3s):
    k3s.stop()
    box.ready(gateway, *k3s.options("--offer-always"))
    assert gateway.registered("cpu")[0] != "0m"


@pytest.mark.slow
@pytest.mark.parametrize("with_ca", [True, False], ids=["with-ca", "without-ca"])
def test_k3s_that_hangs_in_its_handshake_holds_nothing_up_and_is_told_after_5_s(box, gateway, certificates, with_ca):
    """It may delay the first keepalive by 1 s; nothing else waits for it."""
    with K3s(certificates, greet=SILENT) as k3s:
        agent = box.ready(gateway, *(k3s.options() if with_ca else k3s.options()[:-2]))
        wait(lambda: len(gateway.calls(KEEPALIVE)) > 5, agent.log)
        assert max(pauses_of(gateway.seen)) < 4
        wait(lambda: agent.lines("in time"), agent.log)
        assert gateway.registered("cpu") == ["0m"] and agent.stop(within=4) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name, call, at_once", [
    ("closed-port", None, False), ("hangs", None, False), ("401", "pods", True), ("403", "pods", True),
    ("cordoned", "nodes", False)])
def test_k3s_in_trouble_later_counts_after_two_looks_or_at_once_and_not_when_it_is_mended(
        box, gateway, k3s, name, call, at_once):
    """`call` is the request that shows it, where it can be counted."""
    agent = box.offering(gateway, *k3s.options())
    before = len(k3s.seen)
    K3S_TROUBLE[name][0](k3s)
    wait(lambda: not gateway.is_offered_cpu(), agent.log)
    looks = [link.call for link in k3s.seen[before:] if link.time < gateway.calls(REGISTER)[-1].time].count(call)
    assert call is None or (looks == 1 if at_once else looks >= 2), f"it was believed after {looks}"
    gateway.ready_again()
    k3s.tokens, k3s.nodes, k3s.forbidden, k3s.always = {K3S_TOKEN}, [K3s.node()], set(), None
    if name == "closed-port":
        k3s.start()
    wait(gateway.is_offered_cpu, agent.log)
    gateway.ready_again()


@pytest.mark.slow
@pytest.mark.parametrize("call, fault", [("pods", says(500)), ("nodes", says(200, {
    "kind": "NodeList", "apiVersion": "v1", "items": [K3s.node(ready="False")]}))], ids=["pods", "nodes"])
def test_k3s_in_trouble_in_one_look_alone_changes_nothing(box, gateway, k3s, call, fault):
    agent = box.offering(gateway, *k3s.options())
    registered = len(gateway.calls(REGISTER))
    k3s.faults[call].append(fault)
    wait(lambda: not k3s.faults[call], agent.log)
    k3s.looked(2)
    gateway.ready_again()
    assert len(gateway.calls(REGISTER)) == registered, agent.log()


def test_pods_that_are_many_with_hostile_names_are_redacted_printable_and_bounded(box, gateway, k3s):
    odd = "\x1b[2J\x07\x9b" + K3S_TOKEN + "é" * 200
    k3s.pods = [(f"w-{number}-{odd}", f"Running{odd}", "1s") for number in range(110)] + [(TOKEN, "Running", "1s")]
    agent = box.ready(gateway, *k3s.options("--max-cpu", "1"))
    agent.says("w-1")
    wait(lambda: gateway.ready_again().json["metrics"].get("worker_count") is not None, agent.log)
    record = box.record()
    assert len(record["k3s"]["workers"]) == 50 and record["k3s"]["worker_count"] == 111
    path, = box.state.glob("*status.json")
    assert path.stat().st_size < 65536
    shown = agent.log() + json.dumps(record, ensure_ascii=False) + "".join(
        box.run("--status", *form).stdout for form in ([], ["--json"]))
    assert leaks(shown, TOKEN, K3S_TOKEN) == []
    assert [line for line in shown.splitlines() if not line.isprintable()] == []
    assert len(agent.lines("w-1")) == 1 and max(map(len, agent.log().splitlines())) < 4200, "one line for all"


def test_gpu_lost_lowers_the_count_without_cpu_and_more_of_them_are_registered(box, gateway, k3s, driver):
    driver.say("..")
    k3s.pods = [("w-1", "Running", "1m")]
    k3s.nodes = [K3s.node(gpu="4")]
    agent = box.offering(gateway, *k3s.options(), **driver.environ)
    driver.say(".b")
    wait(lambda: free_counts(gateway)[-1] == 1, agent.log)
    driver.say(".x")
    wait(lambda: gateway.registered("gpu_count")[-1] == "1", agent.log)
    gateway.ready_again()
    counts, cpus = gateway.registered("gpu_count"), gateway.registered("cpu")
    assert counts[-2:] == ["2", "1"] and cpus[-2] != "0m" and cpus[-1] == "0m"
    assert box.run("--status").returncode == 1 and "nvidia-smi" in agent.log()
    driver.say("...")
    wait(lambda: gateway.registered("gpu_count")[-1] == "3" and free_counts(gateway)[-1] == 3, agent.log)
    assert gateway.is_offered_cpu()


def free_counts(gateway):
    return [link.json["metrics"]["free_gpu_count"] for link in gateway.calls(KEEPALIVE)]


def test_gpu_lost_while_the_register_route_fails_sends_no_keepalive_until_it_is_confirmed(box, gateway, k3s, driver):
    """A machine that must take no work rather lapses."""
    driver.say("..")
    k3s.nodes = [K3s.node(gpu="2")]
    agent = box.offering(gateway, *k3s.options(), **driver.environ)
    gateway.ready_again()
    gateway.faults[REGISTER].extend([says(500)] * 6)
    driver.say(".x")
    wait(lambda: not gateway.faults[REGISTER], agent.log)
    gateway.ready_again()
    failed = [index for index, link in enumerate(gateway.seen) if link.faulty]
    assert {link.call for link in gateway.seen[failed[0]:failed[-1] + 1]} == {REGISTER}
    assert gateway.registered("gpu_count")[-1] == "1" and gateway.registered("cpu")[-1] == "0m"


# ---- Seen from outside: token files
def test_token_files_rotated_are_followed_at_once(box, gateway):
    token, k3s = box.folder / "token", box.folder / "k3s"
    replace(token, TOKEN + "\n")
    replace(k3s, K3S_TOKEN + "\n")
    agent = box.ready(gateway, "--token-file", token, "--k3s-token-file", k3s, BETA9_TOKEN=None)
    assert (gateway.seen[0].bearer, gateway.registered("token")) == (TOKEN, [K3S_TOKEN])
    replace(k3s, K3S_TOKEN)
    gateway.ready_again()
    gateway.ready_again()
    assert len(gateway.calls(REGISTER)) == 1, "another file with the same token is no news"
    replace(k3s, "another-" + K3S_TOKEN)
    wait(lambda: gateway.registered("token") == [K3S_TOKEN, "another-" + K3S_TOKEN], agent.log)
    gateway.ready_again()
    gateway.token = SECRET
    replace(token, SECRET + "\n")
    assert gateway.ready_again().bearer == SECRET
    replace(token, TOKEN)
    gateway.token = TOKEN
    assert agent.stop() == 0 and gateway.seen[-1].bearer == TOKEN, "also in the last registration"
    assert leaks(agent.log(), TOKEN, SECRET, K3S_TOKEN, "another-" + K3S_TOKEN) == []


@pytest.mark.slow
def test_token_file_spoilt_later_leaves_the_last_token_in_use_with_few_warnings(box, gateway):
    path = box.folder / "token"
    replace(path, TOKEN)
    agent = box.ready(gateway, "--token-file", path, BETA9_TOKEN=None)
    for content in (b"", b"two words", b"\xff\0", b"x" * 70000, None):
        path.unlink() if content is None else replace(path, content)
        gateway.ready_again()
        gateway.ready_again()
    os.mkfifo(path)
    gateway.ready_again()
    gateway.ready_again()
    assert {link.bearer for link in gateway.seen} == {TOKEN} and agent.poll() is None
    assert 1 <= len(agent.lines(str(path))) <= 1 + 3 * 4, "four of each of three reasons, and who can read it"
    path.unlink()
    gateway.token = "new-" + TOKEN
    replace(path, "new-" + TOKEN)
    wait(lambda: gateway.seen[-1].bearer == "new-" + TOKEN, agent.log)


# ---- Seen from outside: no token where people look
def test_tokens_and_configuration_are_in_no_log_line_record_or_status(box, gateway):
    """Whatever is echoed, at debug level, and also a token that was replaced."""
    token = box.folder / "token"
    replace(token, TOKEN)
    echo = " ".join(forms(TOKEN, K3S_TOKEN))

    def with_echo(link):
        answer = json.loads(link.answer().partition(b"\r\n\r\n")[2])
        return says(200, {**answer, "echo": echo}, f"X-Echo: {TOKEN}", f"Set-Cookie: {K3S_TOKEN}")(link)

    gateway.always = with_echo
    gateway.config = {"k3s": {"secret": SECRET}, "a": SECRET}
    with Notify(box.folder / "notify") as systemd:
        agent = box.ready(gateway, "--debug", "--token-file", token, "--k3s-token", K3S_TOKEN,
                          BETA9_TOKEN=None, NOTIFY_SOCKET=systemd.path)
        echoes = [says(500, {"message": f"bad token {echo}"}), says(200, f"<html>{echo}"),
                  says(302, b"", f"Location: /{TOKEN}"), breaks(f"HTTP/1.1 {TOKEN}\r\n\r\n".encode()),
                  breaks(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + TOKEN.encode() + b"\r\n"),
                  says(200, [{"config": SECRET}]), says(500, {"config": gateway.config}),
                  says(401, {"error_code": TOKEN}), says(500, {"message": "no", "config": [{"a": SECRET}]})]
        new = "another+" + TOKEN
        for fault in echoes:
            gateway.faults[KEEPALIVE].append(fault)
            wait(lambda: not gateway.faults[KEEPALIVE], agent.log)
            assert leaks(json.dumps(box.record()), TOKEN, K3S_TOKEN, SECRET) == []
        gateway.token = new
        replace(token, new)
        wait(lambda: gateway.seen[-1].bearer == new, agent.log)
        gateway.faults[KEEPALIVE].append(says(500, {"message": " ".join(forms(new, TOKEN))}))
        gateway.forget()
        wait(lambda: not gateway.faults[KEEPALIVE], agent.log)
        gateway.ready_again()
        said = agent.log() + box.run("--status", "--json").stdout + "".join(systemd.heard())
    assert "POST" in said and "redacted" in said and "bad token" in said
    assert leaks(said, TOKEN, new, K3S_TOKEN, SECRET) == []


def test_token_that_an_answer_echoes_where_it_is_cut_is_not_shown_in_part(box, gateway):
    page = "x" * 268 + TOKEN + "x" * 280
    gateway.faults[REGISTER].append(lambda link: link.sock.sendall(http_answer(502, page)))
    done = box.start(gateway, "--once")
    assert done.wait(60) == 69 and "xxx" in done.log() and TOKEN[:6] not in done.log(), done.log()


def test_token_that_a_broken_answer_echoes_where_it_is_cut_is_not_shown_in_part(box, gateway):
    gateway.faults[REGISTER].append(breaks(b"x" * 180 + TOKEN.encode() + b"x" * 280 + b"\r\n\r\n"))
    done = box.start(gateway, "--once")
    assert done.wait(60) == 69 and "xxx" in done.log() and TOKEN[:6] not in done.log(), done.log()


def test_failure_of_another_cause_is_told_at_once(box, gateway):
    agent = box.ready(gateway)
    gateway.always = says(500, {"message": "100% full"})
    wait(lambda: len(gateway.seen) > 6, agent.log)
    gateway.always = says(500, {"message": "no disk"})
    agent.says("failed", "100% full", "no disk")


def test_words_of_the_gateway_are_printed_visibly_and_short_and_stay_in_the_status_of_systemd(box, gateway):
    gateway.always = says(500, {"message": f"no\nMAINPID=1\nSTOPPING=1\x1b[2J\x07\r\n\u202e{TOKEN}" + "A" * 3000})
    with Notify(box.folder / "notify") as systemd:
        agent = box.start(gateway, "--debug", NOTIFY_SOCKET=systemd.path)
        wait(lambda: len(gateway.seen) > 4 and systemd.status(), agent.log)
        agent.stop(signal.SIGKILL)
        heard = systemd.heard()
    lines = agent.log().splitlines() + heard
    assert [line for line in lines if line.startswith(("MAINPID", "STOPPING")) or not line.isprintable()] == []
    assert r"\x1b[2J" in agent.log() and leaks("".join(lines), TOKEN) == []
    assert max(len(line) for line in lines if " DEBUG " not in line) <= 700


# ---- Seen from outside: signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_stop_while_idle_registers_once_more_and_ends_with_0(box, gateway, number):
    agent = box.ready(gateway, "--keepalive-interval", "60")
    agent.says("ready after")
    assert agent.stop(number, within=3) == 0
    assert [link.state for link in gateway.seen] == ["registered", "ready", "registered"]
    assert gateway.connections == 1 and "stopping" in agent.log() and "not told" not in agent.log()


@pytest.mark.parametrize("calls, options", [([REGISTER], ["--once"]), ([REGISTER, KEEPALIVE], [])],
                         ids=["registering-once", "keeping"])
def test_stop_while_a_request_hangs_cuts_it_and_is_no_failure(box, gateway, calls, options):
    gateway.faults[calls[-1]].append(silent)
    agent = box.start(gateway, "--keepalive-interval", "60", *options)
    wait(lambda: len(gateway.seen) == len(calls), agent.log)
    assert agent.stop(within=6) == 0, "it would hang for 10 s"
    assert [link.call for link in gateway.seen] == calls and "giving up" not in agent.log(), "it never was ready"


@pytest.mark.parametrize("fault", [says(500), silent], ids=["failed", "hangs"])
def test_stop_after_a_keepalive_that_failed_or_while_it_hangs_sends_nothing_more(box, gateway, fault):
    agent = box.ready(gateway)
    gateway.always = fault
    wait(lambda: gateway.seen[-1 if fault is silent else -2].faulty, agent.log)
    assert agent.stop() == 0 and {link.call for link in gateway.seen if link.faulty} == {KEEPALIVE}
    assert "was not told" in agent.log()


@pytest.mark.parametrize("answer", [NO_POOL, pytest.param(late(4), marks=pytest.mark.slow)], ids=["refused", "late"])
def test_stop_whose_registration_is_refused_or_answered_late_says_so_and_does_not_wait(box, gateway, answer):
    agent = box.ready(gateway, "--keepalive-interval", "60")
    gateway.faults[REGISTER].append(answer)
    assert agent.stop(within=3.9) == 0 and "was not told" in agent.log() and gateway.seen[-1].faulty


TWICE = """import os, signal, beta9_agent as b9
b9.STOP.install()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
print("stopping", b9.STOP.is_set(), flush=True)
b9.STOP.at -= 1
os.kill(os.getpid(), signal.SIGTERM)
print("goes on")
"""


def test_stop_a_second_later_ends_it_on_the_spot_but_not_the_repeat_of_a_wrapper():
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=SOURCE.parent, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "stopping True\n"), done


def test_signals_that_the_parent_blocked_stop_it_all_the_same(box, gateway):
    before = ["env", "--block-signal=TERM,INT,HUP,ALRM"]
    if subprocess.run([*before, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this env knows no signals")
    assert box.ready(gateway, before=before).stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("number, before", [
    (signal.SIGHUP, ["nohup"]), (signal.SIGINT, ["sh", "-c", 'trap "" INT; exec "$@"', "sh"])], ids=["nohup", "trap"])
def test_signals_that_the_parent_ignored_stay_ignored(box, gateway, number, before):
    agent = box.ready(gateway, before=before)
    agent.send_signal(number)
    for _ in range(3):
        gateway.ready_again()
    assert agent.poll() is None and agent.stop() == 0


@pytest.mark.slow
def test_wait_wakes_up_rarely(box, gateway):
    agent = box.ready(gateway, "--keepalive-interval", "240")
    agent.says("ready after")
    before = agent.facts("voluntary_ctxt_switches")
    time.sleep(1.6)
    assert agent.facts("voluntary_ctxt_switches") - before < 12


# ---- Seen from outside: connections, names, TLS, proxies
NAME_SERVER = """
import json, os, socket, time
real = socket.getaddrinfo
def look_up(host, port, *rest, flags=0, **more):
    try:
        return real(host, port, *rest, flags=flags | socket.AI_NUMERICHOST, **more)
    except socket.gaierror:
        if flags & socket.AI_NUMERICHOST:
            raise
    found, seconds = json.load(open(os.environ["NAMES"])).get(host, (None, 0))
    time.sleep(seconds)
    if found is None:
        raise socket.gaierror(-2, "Name or service not known")
    return [(socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
            for each in found]
socket.getaddrinfo = look_up
"""


class NameServer:
    """Python starts with this beside it: names are looked up in a file, after so many seconds."""

    def __init__(self, folder):
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(NAME_SERVER)
        self.file = folder / "names"
        self.environ = {"PYTHONPATH": f"{folder}:{PROGRAM_FOLDER}", "NAMES": self.file}
        self.tell()

    def tell(self, seconds=0, **names):
        replace(self.file, json.dumps({name: (addresses, seconds) for name, addresses in names.items()}))


@pytest.fixture
def names(tmp_path):
    return NameServer(tmp_path / "names")


def test_connection_to_localhost_goes_on_to_ipv4_where_ipv6_is_closed(box, gateway, names):
    names.tell(localhost=["::1", "127.0.0.1"])
    agent = box.start(None, "--gateway-host", "localhost", "--gateway-port", gateway.port, "--once", **names.environ)
    assert agent.wait(60) == 0 and not agent.lines("failed"), agent.log()
    assert gateway.seen[0].headers["Host"] == f"localhost:{gateway.port}"


def test_connection_to_a_name_that_turns_public_is_refused_until_it_is_private_again(box, gateway, names):
    names.tell(gw=["203.0.113.7"])
    agent = box.start(gateway, "--gateway-host", "gw", **names.environ)
    agent.says("203.0.113.7", "--tls", "--allow-cleartext")
    names.tell(gw=["127.0.0.1"])
    wait(gateway.ready, agent.log)
    gateway.stop()
    agent.says("refused")
    names.tell(gw=["127.0.0.1", "203.0.113.7"])
    seen = len(gateway.seen)
    gateway.start()
    time.sleep(0.5)
    assert len(gateway.seen) == seen, "one address of it is public"
    names.tell(gw=["127.0.0.1"])
    gateway.ready_again()
    assert agent.poll() is None and "giving up" not in agent.log()


@contextlib.contextmanager
def full_port(host="127.0.0.1", port=0):
    """A port that swallows packets: its queue is full, so further connections hang."""
    with socket.create_server((host, port), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield full.getsockname()[1]


@pytest.mark.slow
def test_connection_whose_first_address_swallows_packets_takes_2_5_s_and_no_time_later(box, gateway, names):
    """Nor does a registration fail that takes the gateway 5 s."""
    names.tell(gw=["127.0.0.2", "127.0.0.1"])
    gateway.registration_takes = 5.0
    with full_port("127.0.0.2", gateway.port):
        start = time.monotonic()
        agent = box.ready(gateway, "--gateway-host", "gw", **names.environ)
        assert time.monotonic() - start < 15 and len(gateway.calls(REGISTER)) == 1 and not agent.lines("failed")
        gateway.drop()
        start = time.monotonic()
        gateway.ready_again()
        assert time.monotonic() - start < 2, "the address that worked comes first"


@pytest.mark.slow
def test_name_server_that_is_late_is_named_and_its_late_answer_used(box, gateway, names):
    names.tell(gw=["127.0.0.1"])
    agent = box.ready(gateway, "--gateway-host", "gw", **names.environ)
    names.tell(2.3, gw=["127.0.0.1"])       # a keepalive has 2 s
    gateway.drop()
    agent.says("name server")
    gateway.ready_again()
    names.tell(3600, gw=["127.0.0.1"])
    assert agent.stop(within=5) == 0 and gateway.seen[-1].call == REGISTER


@pytest.mark.slow
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_kept_connection_that_ends_every_second_time_counts_no_failure(box, gateway, reset):
    def every_second(link):
        kept = [other for other in gateway.seen if other.connection == link.connection]
        return breaks(b"", reset)(link) if len(kept) == 2 else late(0)(link)

    gateway.always = every_second
    agent = box.ready(gateway)
    wait(lambda: len(gateway.seen) > 20, agent.log)
    gateway.always = None
    gateway.ready_again()
    assert gateway.connections > 5 and not agent.lines("failed", "ready again"), agent.log()
    assert len(gateway.calls(REGISTER)) == 1 and json.loads(box.run("--status", "--json").stdout)["failed"] == 0


@pytest.mark.parametrize("faults", [[breaks(b"HTTP/1.1 20")], [breaks(), breaks()]], ids=["within-an-answer", "twice"])
def test_kept_connection_that_ends_within_an_answer_or_twice_is_a_failure(box, gateway, faults):
    agent = box.ready(gateway)
    gateway.faults[KEEPALIVE].extend(faults)
    agent.says("failed", "ready again")
    assert len([link for link in gateway.seen if link.faulty]) == len(faults), "it is tried once more and no oftener"


def tls_options(certificates, root="ca", host="127.0.0.1"):
    return ["--tls", "--gateway-host", host, *(["--ca-file", certificates.path(root)] if root else [])]


@pytest.mark.parametrize("host, certificate", [("localhost", "good"), ("127.0.0.1", "good"),
                                               ("127.0.0.1", "no-key-id")])
def test_tls_verified_against_the_given_root_is_ready_on_one_connection(box, certificates, host, certificate):
    """Also without a key identifier, which Python 3.13's own defaults refuse."""
    with Gateway(greet=certificates.server(certificate)) as gateway:
        agent = box.ready(gateway, *tls_options(certificates, host=host))
        assert agent.stop() == 0 and gateway.seen[-1].call == REGISTER and gateway.connections == 1
        assert gateway.seen[0].headers["Host"] == f"{host}:{gateway.port}" and b"POST" not in gateway.heard[0]


TLS_FAULTS = {      # the certificate or greeting, the root that is given, OpenSSL's words and the remedy, a wrong one
    "expired": ("expired", "ca", "certificate has expired.*Renew", "--ca-file"),
    "future": ("future", "ca", "certificate is not yet valid.*clock", "--ca-file"),
    "wrong-name": ("wrong-name", "ca", "(not valid for|mismatch).*--gateway-host", "--ca-file"),
    "clients-only": ("clients-only", "ca", "uns(uitable|upported) certificate purpose.*server", "--ca-file"),
    "unknown-issuer": ("good", "others", "issuer.*--ca-file", "clock"),
    "unknown-to-requests": ("good", None, "issuer.*--ca-file", "clock"),
    "self-signed": ("others", "ca", "(self.signed|issuer).*--ca-file", "clock"),
    "cleartext": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "ca", "TLS", "--ca-file"),
    "closes": (NOBODY, "ca", "TLS|connection", "--ca-file"), "silent": (SILENT, "ca", "in time", "--ca-file"),
}


@pytest.mark.parametrize("name", rows(TLS_FAULTS, "expired", "wrong-name", "unknown-to-requests", "cleartext"))
def test_tls_fault_ends_once_with_69_and_the_remedy_that_fits_and_sends_nothing(box, certificates, name):
    shown, root, words, wrong = TLS_FAULTS[name]
    greet = shown if shown in (NOBODY, SILENT) or isinstance(shown, bytes) else certificates.server(shown)
    with Gateway(greet=greet) as gateway:
        agent = box.start(gateway, *tls_options(certificates, root), "--once",
                          REQUESTS_CA_BUNDLE=certificates.path(), SSL_CERT_FILE=certificates.path())
        assert agent.wait(60) == 69, "roots of the environment count for nothing"
        last = agent.log().splitlines()[-1]
        assert re.search(words, last) and wrong not in last and f"127.0.0.1:{gateway.port}" in last, last
        assert gateway.heard and gateway.seen == []
        assert not re.search(b"POST|Bearer|" + re.escape(TOKEN).encode(), b"".join(gateway.heard))


@pytest.mark.parametrize("words, told", [(["10.1.2.3"], True), (["10.1.2.3", "--tls"], False), (["127.0.0.1"], False)])
def test_cleartext_beyond_loopback_is_warned_of(box, words, told):
    done = box.run("--dry-run", "--gateway-host", *words)
    assert done.returncode == 0 and ("no TLS to 10.1.2.3" in done.stderr) == told, done.stderr


def test_proxy_netrc_and_redirect_traps_are_not_taken_on_loopback(box, gateway):
    (box.folder / ".netrc").write_text("machine 127.0.0.1 login x password y\n")
    (box.folder / ".netrc").chmod(0o600)
    with Gateway() as trap:
        there = f"http://127.0.0.1:{trap.port}"
        gateway.faults[KEEPALIVE].append(says(307, b"", f"Location: {there}/api/v1/machine/keepalive"))
        box.ready(gateway, http_proxy=there, HTTP_PROXY=there, ALL_PROXY=there)
        assert {link.bearer for link in gateway.seen} == {TOKEN} and trap.connections == 0


def test_proxy_is_asked_for_what_lies_beyond_loopback_by_the_name_given(box, gateway):
    """But what may be a public address is not sent tokens in cleartext, also by a proxy that is none."""
    for host, *words in (("gw.example", "--allow-cleartext"), ("10.1.2.3",), ("203.0.113.7", "--allow-cleartext")):
        seen = len(gateway.seen)
        options = "--gateway-host", host, "--gateway-port", "1994", "--once"
        proxy = f"http://user:pass-word-1@127.0.0.1:{gateway.port}"
        if words:
            done = box.run(*options, http_proxy=proxy)
            assert done.returncode == 2 and "public" in done.stderr and len(gateway.seen) == seen, done.stderr
        agent = box.start(None, *options, *words, http_proxy=proxy)
        assert agent.wait(60) == 0 and "pass-word" not in agent.log(), agent.log()
        assert gateway.seen[seen].target == f"http://{host}:1994/api/v1/machine/register"
        assert gateway.seen[seen].headers["Host"] == f"{host}:1994"


@pytest.mark.parametrize("host, no_proxy, proxied", [
    ("fd00::5", "fd00::5", False), ("10.1.2.3", "10.0.0.0/8", False), ("gw.lan.example", ".lan.example", False),
    ("gw.lan.example", "lan.example", False), ("gw.lan.example", "*", False), ("10.1.2.3", "192.168.0.0/16", True),
    ("gw.lan.example", "an.example", True)])
def test_proxy_is_left_out_for_hosts_of_no_proxy_as_curl_documents_it(box, host, no_proxy, proxied):
    done = box.run("--dry-run", "--allow-cleartext", "--gateway-host", host, http_proxy="http://127.0.0.1:9",
                   no_proxy=no_proxy)
    assert done.returncode == 0 and ("proxy 127.0.0.1:9" in done.stdout) == proxied, done.stderr


@pytest.mark.parametrize("fault, words", [
    (NOBODY, "refused"), (breaks(), "proxy"), (html(403), "403"), (html(407), "407"), (html(502), "502")],
    ids=["nobody", "closed", "403", "407", "502"])
def test_proxy_that_fails_or_refuses_is_trouble_and_named_without_its_password(box, gateway, fault, words):
    if fault == NOBODY:
        gateway.stop()
    gateway.always = fault
    done = box.run("--gateway-host", "10.1.2.3", "--once",
                   http_proxy=f"http://user:pass-word-1@127.0.0.1:{gateway.port}")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 69 and f"proxy 127.0.0.1:{gateway.port}" in last and words in last, last
    assert "pass-word" not in done.stderr


@pytest.mark.parametrize("url", ["http://user:pass-word-1@[bad", "socks5://user:pass-word-1@127.0.0.1:1080",
                                 "ftp://x:pass-word-1@h"], ids=["malformed", "socks", "ftp"])
def test_proxy_that_cannot_be_used_ends_with_2_and_is_not_shown(box, url):
    done = box.run("--gateway-host", "10.1.2.3", "--once", http_proxy=url)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "http_proxy" in done.stderr and "pass-word" not in done.stderr + done.stdout


# ---- Seen from outside: systemd
class Notify:
    """A notify socket, and all that it heard."""

    def __init__(self, path):
        self.path, self.messages = str(path), []

    def __enter__(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.path.replace("@", "\0", 1))
        self.sock.setblocking(False)
        return self

    def __exit__(self, *error):
        self.sock.close()

    def heard(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                self.messages += self.sock.recv(9999).decode().splitlines()
        return self.messages

    def status(self):
        return [said.removeprefix("STATUS=") for said in self.heard() if said.startswith("STATUS=")]


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_notify_tells_ready_status_watchdog_and_stopping(box, gateway, kind):
    with Notify(box.folder / "notify" if kind == "path" else f"@beta9-agent-{os.getpid()}") as systemd:
        gateway.always = says(503)
        agent = box.start(gateway, NOTIFY_SOCKET=systemd.path)
        wait(lambda: len(gateway.seen) > 3 and systemd.status(), agent.log)
        wait(lambda: systemd.heard().count("WATCHDOG=1") > 1, agent.log)
        assert "READY=1" not in systemd.heard(), "it waits, which is no hang, and is not ready"
        gateway.always = None
        wait(lambda: "READY=1" in systemd.heard(), agent.log)
        gateway.forget()
        gateway.ready_again()
        assert agent.stop() == 0
        heard = systemd.heard()
        assert heard.count("READY=1") == heard.count("STOPPING=1") == 1
        assert heard.index("READY=1") < heard.index("STOPPING=1")
        assert {said.partition("=")[0] for said in heard} == {"READY", "STATUS", "WATCHDOG", "STOPPING"}


@pytest.mark.slow
def test_notify_socket_that_nobody_reads_does_not_hold_the_agent(box, gateway):
    with Notify(box.folder / "notify") as systemd:
        agent = box.ready(gateway, NOTIFY_SOCKET=systemd.path)
        for _ in range(int(pathlib.Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) // 4 + 5):
            gateway.ready_again()
    os.unlink(systemd.path)
    gateway.ready_again()
    assert agent.stop() == 0 and "Traceback" not in agent.log()


def test_notify_status_is_the_headline_of_status_and_never_ready_where_no_work_is_taken(box, gateway, k3s):
    with Notify(box.folder / "notify") as systemd:
        def agree():
            """The headline, where systemd and --status, which wraps it, show the same."""
            headline = systemd.status()[-1:]
            shown = "".join(box.run("--status").stdout.split())
            return headline and "".join(headline[0].split()) in shown and headline[0]

        k3s.forbidden.add("pods")
        box.ready(gateway, *k3s.options(), NOTIFY_SOCKET=systemd.path)
        assert "takes no work" in wait(agree, systemd.status)
        k3s.forbidden.clear()
        wait(lambda: (agree() or "").startswith("ready for"), systemd.status)


@pytest.mark.parametrize("right", [True, False], ids=["journal", "a-file-of-a-service"])
def test_log_to_the_journal_has_its_priority_and_no_time(box, gateway, right):
    log = box.folder / "journal"
    log.touch()
    gateway.faults[REGISTER].extend([says(500), DENIED])
    with open(log, "wb") as file:
        stream = f"{log.stat().st_dev}:{log.stat().st_ino + (not right)}"
        agent = box.start(gateway, "--debug", stderr=file, JOURNAL_STREAM=stream)
    wait(lambda: "ready after" in log.read_text(), log.read_text)
    assert agent.stop() == 0
    for words, number, level in (("POST", 7, "DEBUG"), ("ready after", 6, "INFO"),
                                 ("register.*failed.* 500", 4, "WARNING"), ("register.*failed.* 401", 3, "ERROR")):
        line = next(line for line in log.read_text().splitlines() if re.search(words, line))
        assert re.match(f"<{number}>[a-z>]" if right else rf"\d{{4}}-.*[,.]\d{{3}} {level} ", line), line


# ---- Settings: what is read from where
OTHER_TOKEN, LONG_TOKEN = "Ot3456789012", "Lt567890123456789012345678901234567890"


def give(box, given):
    """Options and variables that give settings, each by name, key in the file, text, and where it is given."""
    tree, environ, words = {}, {}, []
    for name, key, text, where in given:
        flag = name.replace("_", "-")
        if where == "file":
            section = tree.setdefault("gateway", {}) if "." in key else tree
            section[key.rpartition(".")[2]] = str(text)
        elif where == "variable":
            environ[f"BETA9_{name.upper()}"] = text
        elif text in ("yes", "no"):
            words.append(f"--{flag}" if text == "yes" else f"--no-{flag}")
        else:
            words.append(f"--{flag}={text}")
    return ["--config", box.config(json.dumps(tree)), *words], environ


def settings_shown(done):
    """What --dry-run printed: each setting's value and source in one text."""
    assert done.returncode == 0, done.stderr
    return {name.replace("-", "_"): text for name, text in re.findall(r"^([a-z0-9_-]+): (.*)$", done.stdout, re.M)}


def body_field(done, name):
    """A field of the bodies that --dry-run printed."""
    return re.search(rf'"{name}": "?([^",\n]*)', done.stdout)[1]


def one_line(done, code=2):
    """The only line of a run that ended with this code and had no answer."""
    assert (done.returncode, done.stdout) == (code, ""), done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


PEM = {"ca_file", "k3s_ca_file"}
# Option, key in the file, and what is given there, in the environment and on the command line
SETTINGS = [
    ("token", "token", (OTHER_TOKEN, TOKEN, LONG_TOKEN)), ("machine_id", "machine_id", ("00000001", "00000002", ID)),
    ("pool_name", "pool_name", ("of-file", "of-variable", "of-option")),
    ("provider_name", "provider_name", ("file-p", "variable-p", "option-p")),
    ("hostname", "hostname", ("box-file", "box-variable", "100.64.0.9")),
    ("k3s_token", "k3s_token", (OTHER_TOKEN, TOKEN, LONG_TOKEN)),
    ("k3s_url", "k3s_url", ("https://127.0.0.1:1", "https://127.0.0.1:2", "https://127.0.0.1:3")),
    ("k3s_ca_file", "k3s_ca_file", ("1.pem", "2.pem", "3.pem")),
    ("offer_always", "offer_always", ("no", "no", "yes")),
    ("gateway_host", "gateway.host", ("gw-file", "gw-variable", "gw-option")),
    ("gateway_port", "gateway.port", ("1001", "1002", "1003")), ("tls", "gateway.tls", ("no", "yes", "yes")),
    ("ca_file", "gateway.ca_file", ("1.pem", "2.pem", "3.pem")),
    ("allow_cleartext", "gateway.allow_cleartext", ("yes", "no", "yes")),
    ("ssh", "gateway.ssh", ("me@host-1", "host-2", "me@host-3:22")),
    ("max_cpu", "max_cpu", ("0.1", "0.2", "0.3")), ("max_memory", "max_memory", ("101Mi", "102Mi", "103Mi")),
    ("max_gpus", "max_gpus", ("1", "2", "3")), ("state_dir", "state_dir", ("/nowhere/1", "/nowhere/2", "/nowhere/3")),
    ("keepalive_interval", "keepalive_interval", ("21", "22", "23")),
    ("startup_timeout", "startup_timeout", ("31", "32", "33")), ("debug", "debug", ("no", "no", "no"))]


@pytest.mark.parametrize("level", [0, 1, 2], ids=["file", "variable-over-file", "option-over-variable"])
def test_settings_all_at_once_come_from_the_last_source(box, certificates, level):
    for number in (1, 2, 3):
        shutil.copy(certificates.path(), box.folder / f"{number}.pem")
    words, environ = give(box, [
        (name, key, box.folder / text if name in PEM else text, where) for name, key, texts in SETTINGS
        for text, where in list(zip(texts, ("file", "variable", "option")))[:level + 1]])
    unset = {"BETA9_STATE_DIR": None, "BETA9_TOKEN": None, "BETA9_K3S_URL": None}
    shown = settings_shown(done := box.run("--dry-run", *words, **{**unset, **environ}))
    source = (re.escape(str(words[1])), "BETA9_", "command line")[level]
    for name, key, values in SETTINGS:
        value = values[level]
        if name in ("token", "k3s_token"):
            assert str(len(value)) in shown[name] and value not in done.stdout + done.stderr
        elif value in ("yes", "no"):
            assert re.match("(?i)yes|true|on|1" if value == "yes" else "(?i)no|false|off|0", shown[name]), shown[name]
        elif name == "max_memory":
            assert body_field(done, "memory") == value
        elif name != "max_cpu":
            assert value in shown[name], name
        assert re.search(source, shown[name]), (name, shown[name])
    assert level < 2 or body_field(done, "cpu") == "300m", "offered always"


@pytest.mark.slow
@pytest.mark.parametrize("text, value", [*[(text, True) for text in ("1", "true", "YES", "on")],
                                         *[(text, False) for text in ("0", "False", "no", "off", "")]])
def test_switch_in_a_variable_means_what_it_says(box, text, value):
    done = box.run("--dry-run", "--gateway-host", "192.0.2.1", BETA9_ALLOW_CLEARTEXT=text)
    assert done.returncode == (0 if value else 2), done.stderr


def test_switch_is_turned_off_by_a_later_source(box):
    words = ["--dry-run", "--gateway-host", "192.0.2.1", "--config",
             box.config('{"gateway": {"allow_cleartext": true}}')]
    assert box.run(*words).returncode == 0
    assert box.run(*words, BETA9_ALLOW_CLEARTEXT="no").returncode == 2
    assert box.run(*words, "--no-allow-cleartext").returncode == 2


@pytest.mark.parametrize("form", [
    "machine_id: 00000001\npool_name: on\ngateway:\n  host: gw\n  port: 1995\nkeepalive_interval: 30\n",
    '{"machine_id": "00000001", "pool_name": "on", "gateway": {"host": "gw", "port": 1995}, "keepalive_interval": 30}',
], ids=["yaml", "json"])
def test_config_file_values_stay_as_they_are_written(box, form):
    done = box.run("--dry-run", BETA9_CONFIG=box.config(form))
    assert done.returncode == 0, done.stderr
    assert (body_field(done, "machine_id"), body_field(done, "pool_name")) == ("00000001", "on")
    assert "gw:1995" in done.stdout


@pytest.mark.parametrize("form, pool", [('{"pool_name": "of-file"}', "of-file"), *(
    pytest.param(form, "external", marks=pytest.mark.slow) for form in (
        "", "# nothing\n", "{}", "pool_name:\n", "pool_name: ''\n", "pool_name: null\n", "pool_name: ~\n", "gateway:\n",
        '{"pool_name": null, "gateway": null}'))])
def test_value_that_is_empty_counts_as_unset(box, form, pool):
    done = box.run("--dry-run", "--config", box.config(form), BETA9_POOL_NAME="", BETA9_GATEWAY_PORT="")
    assert done.returncode == 0 and body_field(done, "pool_name") == pool and ":1994/" in done.stdout, done.stderr


# Bad values, and a word of what would be right; the first one is tried by the default run
BAD_VALUES = {
    "token": ("characters", ["two words of it", "new\nline-of-it", "\x1b[2Jtoken", "tökénökén", "seven77", '"quoted"']),
    "k3s_token": ("characters", ["two words of it", "é-and-more-of-it"]),
    "machine_id": ("8 hex", ["1165a9b", "1165a9b60", "1165a9bg", "0x1165a9", "١٢٣٤٥٦٧٨"]),
    "pool_name": ("printable|text|name", ["a\nb", "\x1b[2J", " lead"]), "provider_name": ("", ["a\tb"]),
    "hostname": ("scheme|host", ["http://x", "300.1.1.1", "x:6443", "x/y", "a b", "x" * 300]),
    "k3s_url": ("https://", ["http://127.0.0.1:6443", "127.0.0.1:6443", "https://", "https://h:99999", "https://h x",
                             "https://user:password@h"]),
    "gateway_host": ("scheme|host", ["https://gw", "gw:1994", "gw/api", "user@gw", "300.1.1.1", "[::1]:1994"]),
    "gateway_port": ("65535", ["99999", "0", "-1", "19.5", "http", "1e3", "١٩٩٤"]),
    "ca_file": ("PEM|certificate|path", ["/nowhere/ca.pem", "/", sys.executable]),
    "ssh": (r"\[user@\]host", ["-oProxyCommand=date", "me@-lx", "me@$(date)", "gw;date", "gw date", "@gw", "gw:x",
                               "gw:99999", "ssh://gw", "gw/x"]),
    "max_cpu": ("cores|6.5", ["0", "-1", "six", "1e3", "nan", "8000m"]),
    "max_memory": ("48Gi", ["48", "48G", "1.5Gi", "-1Gi", "0Gi"]), "max_gpus": ("number|4", ["-1", "1.5", "all"]),
    "keepalive_interval": ("240", ["241", "0", "0.05", "nan", "inf", "60s"]),
    "startup_timeout": ("seconds", ["soon", "-1", "inf", "10m"])}
BAD_ROWS = [pytest.param(name, right, text, id=f"{name}-{number}", marks=[pytest.mark.slow] * (number > 0))
            for name, (right, texts) in BAD_VALUES.items() for number, text in enumerate(texts)]


def names_value(line, name, text):
    """Whether a line names an option and its value: of a token the length."""
    value = str(len(text)) if "token" in name else text[:40].encode("unicode_escape").decode().split("\\")[0]
    return f"--{name.replace('_', '-')}" in line and (value in line or text[:40] in line)


@pytest.mark.parametrize("name, right, text", BAD_ROWS)
def test_bad_value_ends_with_2_and_one_line(box, name, right, text):
    more = ["--tls"] if name == "ca_file" else []
    environ = {"BETA9_TOKEN": None} if name == "token" else {}
    line = one_line(box.run("--dry-run", f"--{name.replace('_', '-')}={text}", *more, **environ))
    assert names_value(line, name, text) and re.search(right, line), line
    assert "token" not in name or text not in line


@pytest.mark.parametrize("where", ["variable", "file"])
@pytest.mark.parametrize("name, text", [("gateway_port", "99999"), ("machine_id", "xyz"), ("token", "two words of it"),
                                        ("tls", "maybe"), ("max_memory", "48")])
def test_bad_value_of_a_variable_or_file_names_its_source(box, name, text, where):
    key = f"gateway.{name.removeprefix('gateway_')}" if name in ("gateway_port", "tls") else name
    words, environ = give(box, [(name, key, text, where)])
    unset = {"BETA9_TOKEN": None} if name == "token" else {}
    line = one_line(box.run("--dry-run", *words, **{**unset, **environ}))
    assert names_value(line, name, text), line
    assert (str(words[1]) if where == "file" else f"BETA9_{name.upper()}") in line, line


def test_bad_values_at_once_end_with_2_and_a_line_each(box):
    done = box.run("--dry-run", "--gateway-port", "99999", "--machine-id", "xyz", BETA9_MAX_CPU="six",
                   BETA9_TOKEN="two words here")
    named = re.findall("ERROR --(gateway-port|machine-id|max-cpu|token): ", done.stderr)
    assert done.returncode == 2 and sorted(named) == ["gateway-port", "machine-id", "max-cpu", "token"], done.stderr
    assert len(done.stderr.splitlines()) == 4 and "two words" not in done.stderr


@pytest.mark.parametrize("words, said", [
    (["--gatway-host=x"], "--gatway-host.*--gateway-host"), (["--poolname", "gpu"], "--poolname.*--pool-name"),
    (["--k3s-token-fiel=x"], "--k3s-token-file"), ([f"--tokn={TOKEN}"], "--tokn.*--token"), (["--zzz"], "--zzz"),
    (["--private-ip", "10.0.0.1"], "--private-ip"), (["dry-run"], "--dry-run"), ([TOKEN], "characters"),
    (["--once", "please"], "please"), (["--gateway-port"], "--gateway-port"), ([f"--tls={TOKEN}"], "--tls"),
    ([f"--token{TOKEN}"], "option"), (["--tok", TOKEN], "--tok")])
def test_word_that_is_not_known_is_named_with_the_nearest_one(box, words, said):
    line = one_line(box.run(*words))
    assert re.search(said, line) and not leaks(line, TOKEN) and TOKEN[:12] not in line, line


@pytest.mark.parametrize("text, said", [
    ("poolname: gpu", "poolname.*pool_name"), ("gateway:\n  prot: 1", "prot.*gateway.port"), ("zzz: 1", "zzz"),
    ('{"gatway": {"host": "x"}}', "gatway"), (f"token{TOKEN}:", "key"), ("dev: true", "dev")])
def test_key_that_is_not_known_is_named_with_the_nearest_one(box, text, said):
    line = one_line(box.run("--config", path := box.config(text)))
    assert re.search(said, line) and str(path) in line and TOKEN not in line, line


@pytest.mark.parametrize("name, said", [("BETA9_POOLNAME", "BETA9_POOL_NAME"), ("BETA9_ZZZ", "BETA9_ZZZ")])
def test_variable_that_is_not_known_is_warned_of_with_the_nearest_one(box, name, said):
    done = box.run("--dry-run", **{name: SECRET})
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1, done.stderr
    assert name in done.stderr and said in done.stderr and SECRET not in done.stderr


def test_variables_of_a_kubernetes_service_are_ignored_and_the_default_holds(box):
    place, port = "tcp://10.43.0.1:1994", "BETA9_GATEWAY_PORT"
    done = box.run("--dry-run", **{
        port: place, f"{port}_1994_TCP": place, f"{port}_1994_TCP_PROTO": "tcp", f"{port}_1994_TCP_PORT": "1994",
        f"{port}_1994_TCP_ADDR": "10.43.0.1", "BETA9_GATEWAY_SERVICE_HOST": "10.43.0.1",
        "BETA9_GATEWAY_SERVICE_PORT": "1994", "BETA9_GATEWAY_SERVICE_PORT_HTTP": "1994"})
    assert done.returncode == 0 and "//localhost:1994/" in done.stdout, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("text, line", [
    ("token: SECRETS\npool_name: [gpu\n", 3), ('{"token": "SECRETS",\n "pool"}', 2), ("SECRETS", None),
    ("- SECRETS", None), ("gateway: SECRETS", None), ("token:\n- SECRETS", None), ("pool_name:\n  SECRETS: x", None),
    ("token: !!python/object:os.system SECRETS: x", 1)])
def test_config_file_that_is_broken_is_named_without_its_content(box, text, line):
    said = one_line(box.run("--config", path := box.config(text), BETA9_TOKEN=None))
    assert str(path) in said and "SECRETS" not in said and (line is None or f"line {line}" in said), said


@pytest.mark.parametrize("option", ["--config", "--token-file"])
@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "large", "empty"])
def test_file_that_cannot_be_read_is_named(box, option, kind):
    path = box.folder / "the-file"
    contents = {"binary": b"\xff\xfe\0SECRET", "large": b"SECRET#\n" * 20000, "empty": b""}
    path.mkdir() if kind == "folder" else path.write_bytes(contents[kind]) if kind in contents else None
    done = box.run("--dry-run", option, path, BETA9_TOKEN=None)
    assert done.returncode == 2 and "SECRET" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr or (option, kind) == ("--config", "empty"), done.stderr


# ---- Settings: tokens
@pytest.mark.parametrize("token_from, file_from", list(itertools.product(("file", "variable", "option"), repeat=2)))
def test_token_and_its_file_are_one_setting_of_which_the_later_source_holds(box, token_from, file_from):
    (box.folder / "t").write_text(f"{LONG_TOKEN}\r\n")
    words, environ = give(box, [("token", "token", TOKEN, token_from),
                                ("token_file", "token_file", box.folder / "t", file_from)])
    done = box.run("--dry-run", *words, **{"BETA9_TOKEN": None, **environ})
    if token_from == file_from:
        assert "token and token_file are both given" in one_line(done)
        return
    order = ["file", "variable", "option"]
    winner = TOKEN if order.index(token_from) > order.index(file_from) else LONG_TOKEN
    assert str(len(winner)) in settings_shown(done)["token"]
    assert not leaks(done.stdout + done.stderr, TOKEN, LONG_TOKEN)


@pytest.mark.parametrize("where", ["file", "stdin", "yaml", "json"])
def test_token_from_a_file_or_standard_input_is_sent(box, gateway, where):
    path = box.folder / where
    path.write_text({"yaml": f"token: {TOKEN}\n", "json": json.dumps({"token": TOKEN})}.get(where, f"{TOKEN}\r\n"))
    option = "--config" if where in ("yaml", "json") else "--token-file"
    done = box.run("--once", option, "-" if where == "stdin" else path, "--gateway-host", "127.0.0.1",
                   "--gateway-port", gateway.port, input=f"{TOKEN}\n", BETA9_TOKEN=None)
    assert done.returncode == 0 and [link.bearer for link in gateway.seen] == [TOKEN] * 2, done.stderr


def test_token_that_is_missing_says_how_to_get_one(box):
    line = one_line(box.run("--pool-name", "gpu", BETA9_TOKEN=None))
    assert "--token-file" in line and "beta9 machine create --pool gpu" in line


@pytest.mark.parametrize("token", [K3S_TOKEN, *(pytest.param(text, marks=pytest.mark.slow) for text in (
    TOKEN, "K10abcdef0123456789::server:0123456789abcdef", "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJrdWJlIn0.c2lnbmF0dXJl-x"))])
@pytest.mark.parametrize("option", ["--token-file", "--k3s-token-file", "--k3s-ca-file", "--ca-file", "--config"])
def test_token_typed_where_a_file_belongs_is_never_shown(box, option, token):
    words = [option, token, "--gateway-host", "127.0.0.1", "--gateway-port", "9"]
    words += ["--tls"] if option == "--ca-file" else []
    more = {"BETA9_TOKEN": None} if option == "--token-file" else {}
    if option == "--k3s-ca-file":
        more["BETA9_K3S_TOKEN"] = K3S_TOKEN
    texts = []
    for action in ("--dry-run", "--once"):
        done = box.run(action, *words, **more)
        assert option in done.stderr or action == "--dry-run", "it is warned of"
        texts += [done.stdout, done.stderr, json.dumps(box.record())]
        assert done.returncode in ((0, 69) if "k3s" in option else (2,)), done.stderr
    assert not leaks("\n".join(texts), token) and token[:16] not in "\n".join(texts)


# ---- Answers: --help, --version, --dry-run, and actions that do not fit
@pytest.mark.parametrize("python", [[], ["-OO"], ["-S", "-E"]], ids=["plain", "no-docstrings", "no-packages"])
def test_answer_of_help_and_version_needs_no_settings_and_no_packages(box, python):
    for option in ("--help", "-h", "--version"):
        done = box.run(option, python=python, BETA9_TOKEN=None, BETA9_CONFIG="/nowhere/file")
        assert (done.returncode, done.stderr) == (0, "")
        assert re.match(r"usage: |beta9-agent \d+\.\d+\.\d+ \([0-9a-f]{12}\)", done.stdout)


def test_answer_of_help_names_every_option(box):
    text = box.run("--help").stdout
    options = [f"--{name.replace('_', '-')}" for name, *_ in SETTINGS] + [
        "--dev", "--once", "--dry-run", "--check", "--status", "--json", "--prometheus", "--print-install",
        "--install-k3s", "--print", "--version", "--help", "--token-file", "--k3s-token-file", "--config"]
    assert len(options) == 37 and [option for option in options if not re.search(rf"{option}[ ,\n]", text)] == []
    assert "BETA9_" in text


def test_answer_of_version_is_the_files_own_hash(box):
    digest = subprocess.check_output(["sha256sum", PROGRAM], text=True)[:12]
    assert digest in box.run("--version").stdout
    with open(PROGRAM, encoding="utf-8") as file:
        done = subprocess.run([sys.executable, "-", "--version"], stdin=file, capture_output=True, text=True,
                              env=box.environ)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("beta9-agent ")


ANSWERS = {"help": ["--help"], "version": ["--version"], "dry-run": ["--dry-run"], "status": ["--status"],
           "status-json": ["--status", "--json"], "print": ["--print", "unit"], "install": ["--print-install"],
           "check": ["--check", "--gateway-host", "127.0.0.1", "--gateway-port", "9"]}


@pytest.mark.parametrize("unbuffered", [pytest.param(None, id="buffered"),
                                        pytest.param("1", id="unbuffered", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ANSWERS)
def test_answer_onto_a_full_disk_ends_with_1_and_one_line(box, name, unbuffered):
    with open("/dev/full", "w") as full:
        done = box.run(*ANSWERS[name], stdout=full, PYTHONUNBUFFERED=unbuffered)
    lines = [line for line in done.stderr.splitlines() if "WARNING" not in line]
    assert done.returncode == 1 and len(lines) == 1 and "No space left on device" in lines[0], done.stderr


@pytest.mark.parametrize("name", ["help", "version", "dry-run", "status-json"])
def test_answer_into_a_closed_pipe_is_quiet(box, name):
    there, here = os.pipe()
    os.close(there)
    done = box.run(*ANSWERS[name], stdout=here)
    os.close(here)
    assert done.stderr == ""


@pytest.mark.parametrize("words, said", [
    (["--check", "--status"], "--check|--status"), (["--dry-run", "--once"], "--dry-run|--once"),
    (["--dry-run", "--check"], "--dry-run|--check"), (["--print-install", "--dev"], "--print-install|--dev"),
    (["--json"], "--json"), (["--prometheus"], "--prometheus"), (["--prometheus", "--check"], "--prometheus"),
    (["--install-k3s"], "--print-install"), (["--print", "units"], "unit")])
def test_action_that_does_not_fit_ends_with_2(box, words, said):
    assert re.search(said, one_line(box.run(*words)))


def test_dry_run_shows_settings_with_sources_and_both_bodies_and_sends_nothing(box, gateway):
    done = box.run("--dry-run", "--k3s-token", K3S_TOKEN, "--hostname", "box", "--gateway-host", "127.0.0.1",
                   BETA9_GATEWAY_PORT=gateway.port, BETA9_POOL_NAME="gpu")
    shown = settings_shown(done)
    assert "BETA9_POOL_NAME" in shown["pool_name"] or "environment" in shown["pool_name"]
    assert "default" in shown["provider_name"] and str(len(TOKEN)) in shown["token"]
    for words in (f"127.0.0.1:{gateway.port}", "machine/register", "machine/keepalive", "free_gpu_count", '"hostname"'):
        assert words in done.stdout
    assert not leaks(done.stdout + done.stderr, TOKEN, K3S_TOKEN)
    assert gateway.connections == 0 and not box.state.exists()


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1", "172.32.0.1", "100.128.0.1",
                                  "3221225985"])
def test_gateway_at_a_public_address_in_cleartext_is_refused(box, host):
    line = one_line(box.run("--dry-run", "--gateway-host", host))
    assert all(word in line for word in ("--tls", "--ssh", "--allow-cleartext")), line


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["10.1.2.3"], ["100.127.255.255"], ["172.31.0.1"], ["fd7a::1"], ["[::1]"], ["192.0.2.1", "--tls"],
    ["192.0.2.1", "--allow-cleartext"], ["192.0.2.1", "--ssh", "gw"]], ids=" ".join)
def test_gateway_at_a_private_address_or_encrypted_is_not(box, words):
    done = box.run("--dry-run", "--gateway-host", *words)
    assert done.returncode == 0, done.stderr


def test_command_of_machine_create_is_taken_whole_with_one_notice(box, gateway):
    unused = {"--tailscale-url": "ts-url", "--tailscale-auth": "ts-auth", "--flux-upstream": "fl-up",
              "--flux-branch": "fl-br", "--flux-github-token": "fl-token"}
    agent = box.start(gateway, "--token", TOKEN, "--machine-id", ID.upper(), "--pool-name", "external",
                      *itertools.chain(*unused.items()), "--provider-name", "generic", "--once", BETA9_TOKEN=None)
    assert agent.wait(60) == 0 and gateway.seen[0].json["machine_id"] == ID
    notice, = agent.lines("--tailscale-url")
    assert all(flag in notice for flag in unused)
    assert not any(value in agent.log() for value in unused.values())


# ---- Packages and Pythons that are missing
def stand_in_package(folder, name, text):
    """A folder for PYTHONPATH with a module of this name."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    return str(folder)


def missing(name):
    return f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"


@pytest.mark.parametrize("module, package", [("requests", "requests"), ("psutil", "psutil"), ("yaml", "pyyaml")])
def test_package_that_is_missing_ends_with_1_and_its_remedy(box, module, package):
    path = stand_in_package(box.folder / "path", module, missing(module))
    done = box.run("--dev", "--once", "--config", box.config("pool_name: gpu\n"), PYTHONPATH=path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and package in done.stderr.lower(), done.stderr
    assert "install" in done.stderr and "python3-pynvml" not in done.stderr


def test_package_yaml_is_not_needed_by_json(box):
    path = stand_in_package(box.folder / "path", "yaml", missing("yaml"))
    done = box.run("--dry-run", "--config", box.config(' \n{"pool_name": "gpu"}'), PYTHONPATH=path)
    assert body_field(done, "pool_name") == "gpu"


@pytest.mark.parametrize("minor", [6, 7, 8, 9])
def test_python_that_is_too_old_says_which_one_is_needed(box, minor):
    names = [f"python3.{minor}", *glob.glob(os.path.expanduser(f"~/.pyenv/versions/3.{minor}.*/bin/python"))]
    found = [name for name in names if shutil.which(name) and not subprocess.run(
        [name, "-c", ""], capture_output=True).returncode]
    if not found:
        pytest.skip(f"no Python 3.{minor} here")
    done = subprocess.run([found[0], PROGRAM, "--version"], capture_output=True, text=True, env=box.environ)
    assert done.returncode == 1 and "3.10" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


# ---- State folder
STUBS_C = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
/* STUB_HANG: while this file is there, files under STUB_FOLDER hang. STUB_NO_LOCKS: no locks, as on some network disks.
   STUB_NO_THREADS: while this file is there, no thread can be started.
   STUB_FASTER: the clocks go so much faster, and sleep is shorter. */
static void touch(const char *path) {
    const char *folder = getenv("STUB_FOLDER"), *flag = getenv("STUB_HANG");
    int (*here)(const char *, int) = dlsym(RTLD_NEXT, "access");
    if (folder && flag && path && !strncmp(path, folder, strlen(folder)))
        while (here(flag, F_OK) == 0) usleep(20000);
}
int pthread_create(void *thread, const void *how, void *(*run)(void *), void *with) {
    const char *flag = getenv("STUB_NO_THREADS");
    if (flag && access(flag, F_OK) == 0) return EAGAIN;
    return ((int (*)(void *, const void *, void *, void *))dlsym(RTLD_NEXT, "pthread_create"))(thread, how, run, with);
}
#define OPENS(name) int name(const char *path, int flags, ...) { \
    va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list); touch(path); \
    return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode); }
OPENS(open) OPENS(open64)
int rename(const char *old, const char *new) {
    touch(old);
    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(old, new);
}
int flock(int file, int how) {
    if (getenv("STUB_NO_LOCKS")) { errno = ENOLCK; return -1; }
    return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(file, how);
}
static long long base, faster = -1;
static long long nanoseconds(const struct timespec *t) { return t->tv_sec * 1000000000LL + t->tv_nsec; }
static struct timespec real_time(const struct timespec *t) {
    long long real = base + (nanoseconds(t) - base) / faster;
    return (struct timespec){real / 1000000000, real % 1000000000};
}
int clock_gettime(clockid_t clock, struct timespec *t) {
    int code = ((int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime"))(clock, t);
    if (faster < 0) { faster = getenv("STUB_FASTER") ? atoi(getenv("STUB_FASTER")) : 1; base = nanoseconds(t); }
    if (faster == 1 || (clock != CLOCK_MONOTONIC && clock != CLOCK_BOOTTIME)) return code;
    long long far = base + (nanoseconds(t) - base) * faster;
    *t = (struct timespec){far / 1000000000, far % 1000000000};
    return code;
}
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    struct timespec real = faster > 1 && flags ? real_time(until) : *until;
    return ((int (*)(clockid_t, int, const struct timespec *, void *))dlsym(RTLD_NEXT, "clock_nanosleep"))(
        clock, flags, &real, left);
}
int poll(void *files, unsigned long count, int timeout) {
    int real = faster > 1 && timeout > 0 ? (timeout + faster - 1) / faster : timeout;
    return ((int (*)(void *, unsigned long, int))dlsym(RTLD_NEXT, "poll"))(files, count, real);
}
int sem_clockwait(void *lock, clockid_t clock, const struct timespec *until) {
    struct timespec real = faster > 1 ? real_time(until) : *until;
    return ((int (*)(void *, clockid_t, const struct timespec *))dlsym(RTLD_NEXT, "sem_clockwait"))(lock, clock, &real);
}
"""


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory):
    """A library for LD_PRELOAD; see STUBS_C."""
    if not shutil.which("cc"):
        pytest.skip("no cc to compile stubs with")
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "stubs.c").write_text(STUBS_C)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", folder / "stubs.so", folder / "stubs.c", "-ldl"], check=True)
    return str(folder / "stubs.so")


def in_namespace(*script):
    """A command that runs the program with mounts of its own: `script` with its words, of which $@ is the rest."""
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*words, "mount -t tmpfs none /mnt"], capture_output=True).returncode:
        pytest.skip("no mounts of its own for a process here")
    return [*words, script[0] + ' && exec "$@"', "sh", *script[1:]]


def mode_of(path):
    return path.stat().st_mode & 0o777


def test_second_agent_of_one_folder_ends_with_75_and_names_the_first(box, gateway):
    first = box.ready(gateway)
    second = box.start(gateway)
    assert second.wait(60) == 75 and str(first.pid) in second.log() and first.poll() is None
    first.stop(signal.SIGKILL)
    assert box.ready(gateway).stop() == 0


def test_state_id_outlives_kill_9_and_is_new_on_another_machines_copy_of_the_disk(box, gateway):
    box.ready(gateway).stop(signal.SIGKILL)
    assert box.ready(gateway).stop() == 0
    first, = {link.json["machine_id"] for link in gateway.seen}
    (box.folder / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    after, other = len(gateway.seen), in_namespace("mount --bind $1 /etc/machine-id && shift",
                                                   box.folder / "machine-id")
    agent = box.ready(gateway, before=other)
    assert gateway.seen[after].json["machine_id"] != first and "--machine-id" in agent.log()
    agent.stop()


def test_state_id_of_0_2_is_kept(box, gateway):
    box.state.mkdir()
    machine = pathlib.Path("/etc/machine-id")
    text = b"beta9-agent" + machine.read_bytes() if machine.exists() else None
    (box.state / "machine-id").write_text(f"{ID} {hashlib.sha256(text).hexdigest() if text else '-'}\n")
    box.ready(gateway)
    assert gateway.seen[0].json["machine_id"] == ID


def test_state_of_several_first_starts_at_once_is_one_agent(box, gateway):
    started = [box.start(gateway) for _ in range(4)]
    wait(lambda: gateway.ready() and sum(agent.poll() is None for agent in started) == 1)
    assert sorted(agent.poll() for agent in started if agent.poll() is not None) == [75] * 3
    assert len({link.json["machine_id"] for link in gateway.seen}) == 1


def test_state_of_first_starts_in_the_same_instant_is_locked_by_one_of_them(tmp_path):
    config = config_of("--pool-name", "gpu")
    for turn in range(10):      # the folder is made by whoever comes first
        folder, line, found = str(tmp_path / f"new-{turn}"), threading.Barrier(8), []

        def start():
            line.wait()
            try:
                found.append(b9.make_state(config, folder))
            except b9.AgentError as error:
                found.append(error)

        starts = [threading.Thread(target=start) for _ in range(8)]
        for thread in starts:
            thread.start()
        for thread in starts:
            thread.join()
        states = [each for each in found if isinstance(each, b9.State)]
        assert len(found) == 8 and len(states) == 1 and states[0].lock, found
        states[0].lock.close()


@pytest.mark.parametrize("umask", ["000", "077"])
def test_state_is_readable_by_others_as_it_should_be_whatever_the_umask(box, gateway, umask):
    agent = box.ready(gateway, before=["sh", "-c", f'umask {umask}; exec "$@"', "sh"])
    wait(lambda: box.record(), agent.log)
    assert mode_of(box.state) == 0o755
    modes = {path.name: mode_of(path) for path in box.state.iterdir() if path.is_file()}
    readable = {name for name, mode in modes.items() if mode == 0o644}
    assert {mode for mode in modes.values()} == {0o600, 0o644}, modes
    assert {"lock" in name or "status" in name for name in readable} == {True} and len(readable) == 2, modes


def other_users_python():
    """A Python that user 65534 may start. /root is closed to others, so it may not be ours."""
    if os.getuid() != 0:
        pytest.skip("needs root: another user is tried")
    as_other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            if not subprocess.run([*as_other, python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"],
                                  capture_output=True).returncode:
                return [*as_other, python]
    pytest.skip("no Python here that another user may start")


def test_status_by_another_user_works_whatever_the_umask(gateway):
    words = other_users_python()
    with tempfile.TemporaryDirectory() as place, contextlib.closing(Box(pathlib.Path(place))) as box:
        box.folder.chmod(0o755)
        agent = box.ready(gateway, "--offer-always", before=["sh", "-c", 'umask 077; exec "$@"', "sh"])

        def status():
            return subprocess.run([*words, PROGRAM, "--status", "--state-dir", box.state], capture_output=True,
                                  text=True, env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"})

        wait(lambda: status().returncode == 0, status)
        assert agent.stop() == 0 and status().returncode == 3, status()


def test_state_folder_of_another_users_agent_is_left_alone(gateway):
    words = other_users_python()
    with tempfile.TemporaryDirectory() as place, contextlib.closing(Box(pathlib.Path(place))) as box:
        box.folder.chmod(0o755)
        box.ready(gateway)
        done = subprocess.run([*words, PROGRAM, "--gateway-port", str(gateway.port), "--state-dir", box.state],
                              capture_output=True, text=True, timeout=60,
                              env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "BETA9_TOKEN": TOKEN})
        assert done.returncode == 75 and "another user's agent" in done.stderr, done


def planted(box, gateway, plant):
    """Files of a first run, each replaced by something else; an agent that starts then, and is ready."""
    box.ready(gateway).stop()
    names = [path.name for path in box.state.iterdir() if path.is_file()]
    for name in names:
        (box.state / name).unlink()
        plant(box.state / name)
    agent = box.ready(gateway)
    assert "Traceback" not in agent.log()
    return names, agent


def test_state_files_that_are_links_lead_nowhere(box, gateway):
    victims = {}

    def plant(path):
        victims[path.name] = box.folder / f"victim-{path.name}"
        victims[path.name].write_text("untouched")
        path.symlink_to(victims[path.name])

    names, agent = planted(box, gateway, plant)
    assert agent.stop() == 0
    assert {victims[name].read_text() for name in names} == {"untouched"} and len(names) >= 3
    assert {mode_of(victims[name]) for name in names} == {0o666 & ~os.umask(os.umask(0o22))}


DAMAGE = {"empty": b"", "binary": b"\xff\0\x1b", "list": b"[]\n", "large": b"{" * 10 ** 6, "deep": b"[" * 50000,
          "text": b'{"machine_id": "../../etc", "gpu_count": -1e999}', "folder": pathlib.Path.mkdir, "pipe": os.mkfifo}


@pytest.mark.parametrize("name", rows(DAMAGE, "binary", "folder"))
def test_state_files_that_are_damaged_are_made_anew_with_a_warning(box, gateway, name):
    damage = DAMAGE[name]
    replaceable = isinstance(damage, bytes)

    def plant(path):
        path.write_bytes(damage) if replaceable else damage(path)

    agent = planted(box, gateway, plant)[1]
    assert "WARNING" in agent.log() and agent.stop() == 0
    second = gateway.seen[-1].json["machine_id"]
    assert re.fullmatch("[0-9a-f]{8}", second)
    if replaceable:
        box.ready(gateway).stop()
        assert gateway.seen[-1].json["machine_id"] == second, "the new id is kept"


def test_state_folder_below_a_file_costs_a_warning(box, gateway):
    (box.folder / "file").write_text("")
    agent = box.ready(gateway, "--state-dir", box.folder / "file/below")
    assert len(agent.lines("--state-dir")) == 1 and agent.stop() == 0


def test_state_folder_that_is_read_only_costs_a_warning_and_no_keepalive(box, gateway):
    box.state.mkdir()
    agent = box.ready(gateway, before=in_namespace("mount -t tmpfs -o ro,size=64k none $1 && shift", box.state))
    wait(lambda: len(gateway.calls(KEEPALIVE)) > 3)
    assert "Read-only file system" in agent.log() and len(agent.lines("WARNING")) < 8 and agent.stop() == 0


@pytest.mark.slow
def test_state_on_a_disk_that_is_full_has_its_lock_and_its_record_when_there_is_room(box, gateway):
    box.state.mkdir()
    inside = in_namespace("mount -t tmpfs -o size=64k none $1 && "
                          "{ head -c 70000 /dev/zero >$1/fill || :; } 2>/dev/null && shift", box.state)
    agent = box.ready(gateway, before=inside)
    folder = pathlib.Path(f"/proc/{agent.pid}/root{box.state}")
    lock, = (path for path in folder.iterdir() if "lock" in path.name)
    with open(lock, "rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert "No space left on device" in agent.log()
    (folder / "fill").unlink()
    record = wait(lambda: [path for path in folder.glob("*status.json") if path.stat().st_size], agent.log)[0]
    assert json.loads(record.read_text())["state"] == "running"
    assert box.run("--status", "--state-dir", folder).stdout.startswith("ready")
    assert agent.poll() is None and len(agent.lines("WARNING")) < 8 and agent.stop() == 0


def test_token_files_that_turn_bad_are_each_told_at_once(box, gateway):
    token = box.folder / "token"
    token.write_text(TOKEN)
    agent = box.ready(gateway, "--token-file", token, "--k3s-token-file", box.folder / "k3s-token", BETA9_TOKEN=None)
    agent.says("--k3s-token-file: no token can be read from", "waiting until then")
    wait(lambda: len(agent.lines("--k3s-token-file: no token")) == 4, agent.log)     # the 8th, and then no more
    for text, words in ("", "is not a token"), ("x" * 70000, "over 64 KiB"):
        replace(token, text)
        wait(lambda: [line for line in agent.lines("--token-file: no token") if words in line], agent.log)
    assert "the last one is used until then" in agent.log() and agent.stop() == 0


def test_state_folder_removed_under_the_agent_costs_no_keepalive(box, gateway):
    agent = box.ready(gateway)
    while box.state.exists():
        shutil.rmtree(box.state, ignore_errors=True)
    gateway.ready_again()
    assert "Traceback" not in agent.log() and agent.stop() == 0


def test_state_folder_without_locks_is_used_with_one_warning(box, gateway, preloaded):
    for _ in range(2):
        agent = box.ready(gateway, LD_PRELOAD=preloaded, STUB_NO_LOCKS="1")
        assert len(agent.lines("lock")) == 1 and agent.stop() == 0
    assert len({link.json["machine_id"] for link in gateway.seen}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at-the-start", "later"])
def test_state_folder_that_hangs_costs_no_keepalive_no_promise_and_no_stop(box, gateway, preloaded, driver, when):
    flag = box.folder / "hangs"
    box.state.mkdir()
    if when == "at-the-start":
        flag.touch()
    driver.say("..")
    agent = box.ready(gateway, "--offer-always", LD_PRELOAD=preloaded, STUB_FOLDER=box.state, STUB_HANG=flag,
                      **driver.environ)
    flag.touch()
    for _ in range(40):
        gateway.ready_again()
    threads = agent.facts("Threads")
    flag.unlink()
    wait(lambda: box.record().get("state") == "running", agent.log)
    wait(lambda: list(box.state.glob("*.offer")), "what workers may hold is kept for the next start")
    flag.touch()
    time.sleep(1)
    assert agent.stop(within=5) == 0, "2 s, and room for a busy machine"
    assert threads < 6


# ---- ssh
def listeners(*processes):
    """Sockets that somebody could connect to, of any kind."""
    found = []
    for process in map(psutil.Process, processes):
        sockets = getattr(process, "net_connections", process.connections)("all")
        found += [each for each in sockets if each.status == psutil.CONN_LISTEN
                  or each.family == socket.AF_UNIX and each.laddr]
    return found


def test_ssh_carries_without_a_listening_socket_and_ends_with_the_agent(box, gateway, ssh_host):
    agent = ssh_host.ready("--keepalive-interval", "0.2", BETA9_NOBODY_KNOWS_THIS="1")
    wait(lambda: len(gateway.calls(KEEPALIVE)) > 3, agent.log)
    client, = ssh_host.clients()
    assert {link.headers["Host"] for link in gateway.seen} == {f"localhost:{gateway.port}"}
    assert listeners(agent.pid, client.pid) == [] and gateway.connections == 1
    assert not [name for name in client.environ() if name.startswith("BETA9_")]
    assert not leaks(str(client.cmdline()) + str(client.environ()), TOKEN)
    assert os.getsid(client.pid) != os.getsid(agent.pid), "Ctrl-C reaches the agent alone"
    assert agent.stop() == 0 and ssh_host.clients() == []
    assert gateway.seen[-1].call == REGISTER, "it left through ssh"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_ssh_ends_with_the_agent_and_by_a_stop_its_children_too(box, gateway, ssh_host, number):
    """A ProxyCommand is a child of ssh; this one is stubborn, and would outlive it."""
    child = """sh -c 'trap "" HUP INT TERM; sleep 600' <&- >&- 2>&- &\n"""
    change(ssh_host.program, "exec", child + "exec")
    agent = ssh_host.ready()
    started = psutil.Process(agent.pid).children(recursive=True)
    assert len(started) >= 2, "ssh, and what it started"
    try:
        agent.stop(number)
        wait(lambda: ssh_host.clients() == [])
        wait(lambda: number == signal.SIGKILL or not any(map(alive, started)), lambda: started)
    finally:
        ssh_host.kill(started)


def alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("lost_one", ["ssh", "session", pytest.param("server", marks=pytest.mark.slow),
                                      pytest.param("server-hangs", marks=pytest.mark.slow)])
def test_ssh_that_is_lost_comes_back_and_the_lease_with_it(box, gateway, ssh_host, lost_one):
    agent = ssh_host.ready()
    before, sessions = ssh_host.clients(), ssh_host.sessions()
    if lost_one == "server":
        ssh_host.stop()
        agent.says("failed")
        ssh_host.listen()
    elif lost_one == "server-hangs":
        for process in sessions:
            process.suspend()
    else:
        ssh_host.kill(before if lost_one == "ssh" else sessions)
    gateway.ready_again()
    ssh_host.kill(sessions)
    assert agent.poll() is None and not set(before) & set(ssh_host.clients())
    assert len(gateway.calls(REGISTER)) == 1, "no lease was lost"


@pytest.mark.slow
def test_ssh_that_is_killed_while_idle_is_replaced_long_before_the_next_keepalive(box, gateway, ssh_host):
    """With this TTL that is due after 24 s at the soonest."""
    gateway.ttl = 86400
    agent = ssh_host.ready("--keepalive-interval", "240")
    start = time.monotonic()
    ssh_host.kill(ssh_host.clients())
    gateway.ready_again()
    assert time.monotonic() - start < 20 and len(gateway.calls(REGISTER)) == 1 and not agent.lines("failed")


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


SSH_TROUBLE = {     # how it is made, and ssh's own words
    "key-not-let-in": (lambda it: it.keys.write_text(""), "Permission denied"),
    "host-key-unknown": (lambda it: it.known.write_text(""), "Host key verification failed"),
    "host-key-of-another": (lambda it: change(it.known, (it.folder / "host.pub").read_text().split()[1],
                                              (it.folder / "stranger.pub").read_text().split()[1]),
                            "Host key verification failed|HOST IDENTIFICATION HAS CHANGED"),
    "nothing-listens": (lambda it: it.stop(), "Connection refused"),
    "gateway-not-permitted": (lambda it: change(it.keys, 'open="localhost', 'open="127.0.0.1'),
                              "administratively prohibited|forwarding failed"),
    "gateway-not-there": (lambda it: it.gateway.stop(), "connect failed|forwarding failed"),
    "passphrase": (lambda it: subprocess.run(["ssh-keygen", "-p", "-N", "passphrase", "-f", it.folder / "id"],
                                             check=True, capture_output=True), "Permission denied")}


@pytest.mark.parametrize("name", rows(
    SSH_TROUBLE, "key-not-let-in", "host-key-unknown", "nothing-listens", "gateway-not-there"))
def test_ssh_that_fails_has_its_own_last_line_in_the_log_and_nobody_is_asked(box, gateway, ssh_host, name):
    """Whom ssh would ask for a yes or a passphrase here is `askpass`."""
    make, words = SSH_TROUBLE[name]
    make(ssh_host)
    asked = ssh_host.folder / "askpass"
    asked.write_text(f"#!/bin/sh\necho >{ssh_host.folder}/asked; echo yes\n")
    asked.chmod(0o755)
    before = len(gateway.seen)      # an agent of the test before may have knocked, where the port is the same
    done = ssh_host.run("--once", SSH_ASKPASS=asked, SSH_ASKPASS_REQUIRE="force", DISPLAY=":9")
    assert done.returncode == 69 and re.search(words, done.stderr.splitlines()[-1]), done.stderr
    assert len(gateway.seen) == before and ssh_host.clients() == [] and not (ssh_host.folder / "asked").exists()
    assert not leaks(done.stderr, TOKEN) and "Traceback" not in done.stderr


def test_ssh_with_a_banner_is_no_fault_and_its_words_are_not_the_reason(box, gateway, ssh_host):
    (ssh_host.folder / "banner").write_text("Authorized use only! Everything failed.\n")
    ssh_host.sshd_conf.write_text(ssh_host.sshd_conf.read_text() + f"Banner {ssh_host.folder}/banner\n")
    ssh_host.stop()
    ssh_host.listen()
    agent = ssh_host.ready()
    gateway.fail(TROUBLE, breaks(b"HTTP/1.1 20"))
    agent.says("500")
    assert agent.lines("Authorized") == [] and agent.stop() == 0


def test_ssh_that_is_missing_names_the_package(box):
    done = box.run("--ssh", "127.0.0.1:9", "--once", PATH=box.folder)
    assert done.returncode != 0 and "openssh-client" in done.stderr and len(done.stderr.splitlines()) < 5


def test_ssh_runs_a_remote_forward_of_the_users_own_configuration(box, gateway, ssh_host):
    remote, here = next(ssh_host.ports), socket.create_server(("127.0.0.1", 0))
    ssh_host.conf.write_text(ssh_host.conf.read_text() + f"RemoteForward {remote} 127.0.0.1:{here.getsockname()[1]}\n")
    change(ssh_host.keys, "port-forwarding,", f'port-forwarding,permitlisten="localhost:{remote}",')
    agent = ssh_host.ready()
    here.settimeout(60)

    def connected():
        with contextlib.suppress(ConnectionError):
            return socket.create_connection(("127.0.0.1", remote), 30)

    with wait(connected, agent.log) as there, here, here.accept()[0] as sock:
        for one, two in ((there, sock), (sock, there)):
            one.sendall(b"hello")
            assert two.recv(5, socket.MSG_WAITALL) == b"hello"
    assert agent.stop() == 0


@pytest.mark.slow
def test_ssh_that_is_slow_to_begin_has_time_for_its_first_request(box, gateway, ssh_host):
    """15 s: more than the deadline of a request, less than the allowance of a new ssh."""
    change(ssh_host.program, "exec ", "sleep 15; exec ")
    agent = ssh_host.ready("--startup-timeout", "0")
    assert "failed" not in agent.log() and agent.stop() == 0, agent.log()


@pytest.mark.slow
@pytest.mark.parametrize("hung", ["clients", "sessions"])
def test_ssh_that_hangs_ends_with_the_agent(box, gateway, ssh_host, hung):
    agent = ssh_host.ready("--keepalive-interval", "0.5")
    stuck = getattr(ssh_host, hung)()
    for process in stuck:
        process.suspend()
    time.sleep(1)
    assert agent.stop(within=5) == 0, "2 s, and room for a busy machine"
    wait(lambda: ssh_host.clients() == [])
    ssh_host.kill(stuck)


@pytest.mark.slow
def test_ssh_with_tls_checks_the_gateways_name(box, ssh_host, certificates):
    for name, words in (("good", None), ("wrong-name", "certificate")):
        with Gateway(greet=certificates.server(name)) as behind:
            ssh_host.keys.write_text(ssh_host.public_key + "\n")
            done = ssh_host.run("--once", "--tls", "--ca-file", certificates.path(), "--gateway-port", behind.port)
            assert done.returncode == (69 if words else 0) and (words or "ready") in done.stderr, done.stderr


# ---- Cards
@pytest.mark.parametrize("gpus, count, free", [
    ("..b", "3", 2), (".x.", "2", 2), ("l.", "1", 1), ("r.e", "1", 1), ("?.", "2", 1), (".M", "2", 1)],
    ids=["busy", "lost", "lost-after-its-handle", "reset-and-unknown-error", "not-supported", "mig"])
def test_cards_are_counted_with_what_each_can_tell(box, gateway, driver, gpus, count, free):
    driver.say(gpus)
    agent = box.ready(gateway, **driver.environ)
    assert (gateway.registered("gpu_count"), free_counts(gateway)[0]) == ([count], free), agent.log()
    assert "Traceback" not in agent.log() and agent.stop() == 0


@pytest.mark.parametrize("age", ["OLD", "ANCIENT"])
def test_cards_of_a_driver_that_knows_no_processes_are_counted_and_it_is_said_once(box, gateway, nvml_libraries, age):
    driver = Driver(nvml_libraries(age), box.folder / "driver")
    driver.say("..")
    agent = box.ready(gateway, **driver.environ)
    wait(lambda: len(gateway.calls(KEEPALIVE)) > 3)
    assert gateway.registered("gpu_count") == ["2"] and "Traceback" not in agent.log() and agent.stop() == 0
    assert len([line for line in agent.lines("WARNING") if re.search("driver|process|GPU", line)]) == 1, agent.log()


@pytest.mark.parametrize("init", [9, 18, 999], ids=["kernel-module-not-loaded", "version-mismatch", "unknown-error"])
def test_cards_of_a_driver_that_does_not_start_are_none_with_a_warning(box, gateway, driver, init):
    driver.say("..", init=init)
    agent = box.ready(gateway, **driver.environ)
    assert gateway.registered("gpu_count") == ["0"] and free_counts(gateway)[0] == 0
    wait(lambda: agent.lines("driver", "NVIDIA", "GPU"), agent.log)
    assert [line for line in agent.lines("WARNING", "ERROR") if re.search("driver|NVIDIA|NVML", line)], agent.log()
    assert agent.stop() == 0


def test_cards_without_the_binding_are_warned_of_with_the_package(box, gateway, driver):
    driver.say("..")
    path = stand_in_package(box.folder / "path", "pynvml", missing("pynvml"))
    agent = box.ready(gateway, PYTHONPATH=path, **driver.environ)
    line = [line for line in agent.lines("WARNING") if "nvidia-ml-py" in line][0]
    assert "install" in line and "python3-pynvml" not in line and gateway.registered("gpu_count") == ["0"]
    assert agent.stop() == 0


def test_cards_none_without_a_driver_and_not_a_word(box, gateway):
    if subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL('libnvidia-ml.so.1')"],
                      capture_output=True).returncode == 0:
        pytest.skip("this machine has a driver")
    agent = box.ready(gateway)
    assert gateway.registered("gpu_count") == ["0"] and "NVIDIA" not in agent.log() and agent.stop() == 0


def test_cards_whose_names_are_bytes_are_named_as_text(box, gateway, driver):
    """Bindings before 11.5 answer bytes."""
    import pynvml
    driver.say("..")
    text = pathlib.Path(pynvml.__file__).read_text() + textwrap.dedent("""
        name_as_text = nvmlDeviceGetName
        def nvmlDeviceGetName(device):
            name = name_as_text(device)
            return name if isinstance(name, bytes) else name.encode()
        """)
    path = stand_in_package(box.folder / "path", "pynvml", text)
    agent = box.ready(gateway, PYTHONPATH=path, **driver.environ)
    names = [card["name"] for card in wait(lambda: box.record().get("gpus"), agent.log)]
    assert names == ["NVIDIA Stub 0", "NVIDIA Stub 1"]


@pytest.mark.slow
def test_driver_that_hangs_at_the_start_offers_nothing_until_it_returns(box, gateway, driver):
    """With CPU on offer other work would fill the machine."""
    driver.say("..", hang=True)
    agent = box.ready(gateway, "--offer-always", **driver.environ)
    wait(lambda: len(gateway.calls(KEEPALIVE)) > 5, agent.log)
    assert gateway.registered("gpu_count") == ["0"] and set(free_counts(gateway)) == {0}
    assert agent.lines("WARNING") and "driver" in agent.log() and not gateway.is_offered_cpu()
    done = box.run("--status")
    assert done.returncode == 1 and "driver does not answer" in done.stdout, done.stdout
    driver.say("..")
    wait(lambda: gateway.registered("gpu_count")[-1] == "2" and free_counts(gateway)[-1] == 2, agent.log)
    assert gateway.is_offered_cpu() and agent.stop() == 0


def test_driver_that_hangs_is_not_asked_where_no_gpu_is_offered(box, gateway, driver):
    driver.say("..", hang=True)
    box.ready(gateway, "--max-gpus", "0", "--offer-always", **driver.environ)
    assert gateway.is_offered_cpu() and gateway.registered("gpu_count") == ["0"]


@pytest.mark.slow
def test_driver_that_hangs_later_delays_once_and_loses_no_card(box, gateway, driver):
    driver.say("..")
    agent = box.ready(gateway, **driver.environ)
    wait(lambda: len(gateway.calls(KEEPALIVE)) > 3)
    driver.say("..", hang=True)
    wait(lambda: free_counts(gateway)[-20:] == [0] * 20, agent.log)
    threads = agent.facts("Threads")
    pauses = sorted(pauses_of(gateway.seen))
    assert pauses[-1] < 30 and pauses[-2] < 4, "5 s, once"
    driver.say("..")
    wait(lambda: free_counts(gateway)[-1] == 2, agent.log)
    assert gateway.registered("gpu_count") == ["2"] and threads <= 3
    assert len([line for line in agent.lines("WARNING", "ERROR") if "driver" in line]) < 8 and agent.stop() == 0


@pytest.mark.slow
def test_driver_that_hangs_is_not_waited_for_by_a_stop(box, gateway, driver):
    driver.say("..", hang=True)
    agent = box.start(gateway, **driver.environ)
    maps = pathlib.Path(f"/proc/{agent.pid}/maps")
    wait(lambda: "libnvidia-ml" in maps.read_text(), agent.log)
    assert agent.stop(within=4) == 0, "2 s, and the driver is waited for 5 s"


# ---- Faults of the machine
def limited(agent, kind, value, seconds):
    """A limit of a running process, for a while."""
    before = resource.prlimit(agent.pid, kind)
    resource.prlimit(agent.pid, kind, (value, before[1]))
    time.sleep(seconds)
    resource.prlimit(agent.pid, kind, before)


@pytest.mark.slow
@pytest.mark.parametrize("run", range(3))
def test_memory_that_is_short_for_3_s_is_overcome_and_the_agent_can_be_stopped(box, gateway, run):
    agent = box.ready(gateway)
    wait(lambda: len(gateway.calls(KEEPALIVE)) > 20)
    gateway.drop()
    limited(agent, resource.RLIMIT_AS, agent.facts("VmSize") * 1024 + 4096 * (run + 1), 3)
    gateway.ready_again()
    assert agent.stop(within=5) == 0, agent.log()


@pytest.mark.slow
def test_threads_that_cannot_be_started_are_a_failure_that_passes(box, gateway, preloaded):
    flag = box.folder / "no-threads"
    agent = box.ready(gateway, LD_PRELOAD=preloaded, STUB_NO_THREADS=flag)
    for _ in range(3):
        flag.touch()
        time.sleep(0.3)
        flag.unlink()
        gateway.ready_again()
    flag.touch()
    assert agent.stop(within=5) == 0 and "Traceback" not in agent.log(), agent.log()


@pytest.mark.slow
def test_files_that_run_out_for_longer_than_the_ttl_are_overcome(box):
    with Gateway(ttl=1) as gateway:
        agent = box.ready(gateway)
        gateway.drop()
        limited(agent, resource.RLIMIT_NOFILE, 3, 2)
        gateway.ready_again()
        assert agent.stop() == 0 and "Traceback" not in agent.log()


OUTPUTS = {"all-closed": 'exec "$@" <&- >&- 2>&-', "stderr-closed": 'exec "$@" 2>&-',
           "full": 'exec "$@" >/dev/full 2>&1'}


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
def test_output_that_is_gone_costs_lines_alone_and_they_go_nowhere_else(box, gateway, name):
    agent = box.ready(gateway, "--debug", before=["sh", "-c", OUTPUTS[name], "sh"])
    gateway.fail(breaks(), TROUBLE, breaks(reset=True))
    assert {link.call for link in gateway.seen} == {REGISTER, KEEPALIVE}, "no log line among the requests"
    assert agent.stop() == 0
    assert not [path for path in box.state.iterdir() if "DEBUG" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("read", [True, False], ids=["nobody-reads", "broken"])
def test_output_into_a_pipe_that_nobody_reads_costs_lines_alone(box, gateway, read):
    there, here = os.pipe()
    fcntl.fcntl(here, fcntl.F_SETPIPE_SZ, 4096)
    agent = box.ready(gateway, "--debug", stderr=here)
    os.close(here)
    if not read:
        os.close(there)
    gateway.fail(*(says(200, "é" * (300 + 7 * number)) for number in range(12)))
    assert agent.stop() == 0
    if read:
        os.close(there)


# ---- Soak: with a clock that goes 20 times faster
def footprint(agent):
    """MiB of memory, open files, threads."""
    process = psutil.Process(agent.pid)
    return process.memory_info().rss / 2 ** 20, process.num_fds(), process.num_threads()


class Treadmill:
    """A fault for `always`: answers in turn, which are counted. What the gateway has seen is forgotten."""

    def __init__(self, gateway, answers):
        self.gateway, self.answers, self.turns = gateway, itertools.cycle(answers), 0

    def __call__(self, link):
        self.turns += 1
        if len(self.gateway.seen) > 500:
            del self.gateway.seen[:400]
        return (next(self.answers) or late(0))(link)


MODES = {   # the answers in turn, and how many turns: but for the soak, about half a minute
    "soak": ([None, None, TROUBLE, None, breaks(), None, breaks(reset=True), lost], 10_000),
    "reset": ([breaks(reset=True)], 300), "closed": ([breaks()], 3000), "500": ([TROUBLE], 4000),
    "forgotten": ([GONE, None], 3000), "half-an-answer": ([breaks(b"HTTP/1.1 200 OK\r\nContent-Le")], 3000),
    "hang": ([silent], 150), "refused": ([None], 400), "k3s-away": ([None], 3000), "k3s-hangs": ([None], 3000)}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.soak if name == "soak" else pytest.mark.slow) for name in MODES])
def test_footprint_in_one_failure_mode_grows_no_more_after_a_quarter_of_the_turns(
        box, gateway, preloaded, certificates, capsys, name):
    answers, count = MODES[name]
    mill, clock = Treadmill(gateway, answers), time.monotonic
    with Server(greet=SILENT) as hanging:
        port = hanging.port if name == "k3s-hangs" else 9
        options = ["--k3s-token", K3S_TOKEN, "--k3s-url", f"https://127.0.0.1:{port}", "--k3s-ca-file",
                   certificates.path()] if "k3s" in name else []
        agent = box.ready(gateway, *options, LD_PRELOAD=preloaded, STUB_FASTER=20, PYTHONUNBUFFERED=1)
        gateway.always = mill
        if name == "refused":
            gateway.stop()
        start, figures = clock(), []
        for turns in (count // 4, count):
            wait(lambda: (mill.turns if name != "refused" else (clock() - start) * 20) > turns
                 or agent.poll() is not None, agent.log, limit=600)
            figures.append(footprint(agent))
        gateway.always = None
        if name == "refused":
            gateway.start()
        gateway.ready_again()
        assert agent.stop() == 0 and len(agent.log()) < 10 ** 6
    with capsys.disabled():
        print(f"\n{name}: MiB, files, threads {figures}, connections {gateway.connections}")
    assert all(now <= then + more for then, now, more in zip(*figures, (2, 3, 2))), figures


# ---- How the file is laid out
SOURCE = pathlib.Path(b9.__file__)
LINES = SOURCE.read_text().splitlines()
TREE = ast.parse(SOURCE.read_text())
ROOMS = {int(found[1]): number for number, line in enumerate(LINES, 1)
         if (found := re.match(r"# ---- (\d+) \S", line))}


def nodes(kind, tree=TREE):
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


FUNCTIONS = nodes(ast.FunctionDef)


def in_rooms(first, last):
    """The statements of the module that stand in these rooms."""
    return [node for node in TREE.body if ROOMS[first] < node.lineno < ROOMS[last + 1]]


def bound_by(node):
    """The names that a statement of the module binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(each.asname or each.name).partition(".")[0] for each in node.names]
    return [name.id for name in nodes(ast.Name, node) if isinstance(name.ctx, ast.Store)]


def test_layout_functions_use_only_what_stands_above_them():
    """Law 1: names of the module, and other classes' methods as far as names tell. A function may call itself."""
    defined, methods = {}, {}
    for node in TREE.body:
        for name in bound_by(node):
            defined.setdefault(name, node.lineno)
        for method in getattr(node, "body", ()) if isinstance(node, ast.ClassDef) else ():
            methods.setdefault(getattr(method, "name", ""), node.lineno)
    for name in ("read", "write", "connect", "begin"):      # of files, sockets and responses too
        methods.pop(name, None)
    below = []
    for node in TREE.body:
        own = {arg.arg for arg in nodes(ast.arg, node)} | {
            name.id for name in nodes(ast.Name, node) if isinstance(name.ctx, ast.Store)}
        below += [f"line {name.lineno}: {name.id}" for name in nodes(ast.Name, node)
                  if name.id not in own and defined.get(name.id, 0) > node.lineno]
        below += [f"line {call.lineno}: {ast.unparse(call.func)}" for call in nodes(ast.Call, node)
                  if isinstance(call.func, ast.Attribute) and methods.get(call.func.attr, 0) > node.lineno]
    assert not below


def test_layout_rooms_2_to_4_reach_nothing_outside_the_process():
    """Law 2: modules that compute, no built-in that reads or prints, no log line."""
    assert list(ROOMS) == list(range(1, 14))
    imported = {name for node in TREE.body if isinstance(node, (ast.Import, ast.ImportFrom)) for name in bound_by(node)}
    pure = {"argparse", "base64", "enum", "math", "re", "json", "ipaddress", "urllib", "contextlib", "logging",
            "Any", "Callable", "Iterable", "Iterator", "Mapping", "NamedTuple", "collections", "functools"}
    effects = {"open", "print", "input", "exec", "eval", "__import__", "compile", "globals", "breakpoint"}
    found = []
    for node in in_rooms(2, 4):
        found += [ast.unparse(each) for each in nodes((ast.Import, ast.ImportFrom), node)]
        found += [f"line {name.lineno}: {name.id}" for name in nodes(ast.Name, node)
                  if name.id in effects or name.id in imported - pure]
        found += [f"line {each.lineno}: {ast.unparse(each)}" for each in nodes(ast.Attribute, node)
                  if ast.unparse(each) in ("logging.info", "logging.warning", "urllib.request", "ipaddress.open")
                  or isinstance(each.value, ast.Name) and each.value.id == "LOG"]
    assert not found and len(in_rooms(2, 4)) > 50


def test_layout_functions_and_lines_are_short():
    """Law 9."""
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in FUNCTIONS}
    assert sizes.pop("keep") <= 60
    assert {name: size for name, size in sizes.items() if size >= 40} == {}
    assert [number for number, line in enumerate(LINES, 1) if len(line) > 100] == []


def test_layout_no_private_names_of_libraries_are_used():
    """Law 10: but for the public methods of NamedTuple that look private."""
    names = {each.attr for each in nodes(ast.Attribute)} | {
        each.name for node in nodes(ast.ImportFrom) for each in node.names}
    private = {name for name in names if re.match("_[a-z]", name)} - {node.name for node in FUNCTIONS}
    assert private <= {"_replace", "_asdict", "_fields"}


# ---- What the decisions are made of
def config_of(*words):
    config = b9.read_config([*words], {"BETA9_TOKEN": TOKEN}, b9.Redactor())
    assert not config.problems
    return config


CONFIG = config_of("--pool-name", "external")


def middle(least, most):
    return (least + most) / 2


FULL = b9.Offer(8000, 32000, 4)
WANTED = b9.Registration(FULL, b9.Secret(K3S_TOKEN), "10.0.0.2")
NEW_KEY = WANTED._replace(k3s_token=b9.Secret("another-token"))
STARTING = b9.Lease(1000.0)
KEPT = b9.Lease(due=1060.0, ttl=300.0, registered=WANTED, confirmed_at=1000.0, kept_at=1000.0)
FAILING = KEPT._replace(failing_since=1060.0, due=1064.0)


def wanted(**offer):
    return WANTED._replace(offer=FULL._replace(**offer))


def outcome(kind, **more):
    return b9.Outcome(b9.Kind[kind], **more)


def after(lease, call, kind, now, draw=middle, config=CONFIG, want=WANTED, **more):
    return b9.lease_after(lease, call, want, outcome(kind, **more), now, config, draw)


def answer(status, body=b"", **headers):
    body = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return b9.Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


def message(text, **more):
    return {"message": text, **more}


def state(status="ready", **more):
    return {"machine_id": ID, "status": status, "pool_name": "external", "ttl_seconds": 300, **more}


# ---- What an answer means
HTML, BETWEEN = "<html><body>Log in to the Hotel</body></html>", "in between"
MEANINGS = [
    # Of gateway-api.md
    ("registered", REGISTER, 200, {"config": None, "machine_state": state("registered")}, "OK", ""),
    ("registered-config", REGISTER, 200, {"config": configuration(), "machine_state": state()}, "OK", ""),
    ("registered-upstream", REGISTER, 200, {"config": configuration()}, "OK", ""),
    ("payload", REGISTER, 400, message("Invalid payload"), "REFUSED", "--dry-run"),
    ("token", REGISTER, 401, message("Unauthorized"), "DENIED", "beta9 machine create --pool external"),
    ("kind", REGISTER, 403, message("Invalid token"), "FORBIDDEN", "token of another kind"),
    ("pool", REGISTER, 500, message("Invalid pool name"), "REFUSED", "check --pool-name"),
    ("cpu", REGISTER, 500, message("Invalid machine cpu value"), "REFUSED", "--dry-run"),
    ("gpus", REGISTER, 500, message("Invalid gpu count"), "REFUSED", "--dry-run"),
    ("redis", REGISTER, 500, message("Failed to register machine"), "TROUBLE", "Redis"),
    ("remote", REGISTER, 500, message("Unable to create remote config"), "REFUSED", "upstream"),
    ("kept", KEEPALIVE, 200, {"status": "ok", "machine_state": state()}, "OK", ""),
    ("kept-stateless", KEEPALIVE, 200, {"status": "ok", "error_code": None}, "OK", ""),
    ("expired", KEEPALIVE, 500, message(NOT_FOUND), "FORGOTTEN", "machine"),
    ("error-token", KEEPALIVE, 400, message("x", error_code="invalid_token"), "DENIED", "Get a new one"),
    ("error-pool", KEEPALIVE, 404, message("x", error_code="invalid_pool"), "REFUSED", "no pool external"),
    ("error-other", KEEPALIVE, 418, message("x", error_code="whatever"), "TROUBLE", "Is this the gateway?"),
    ("ids", KEEPALIVE, 400, message("machine_id and pool_name are required"), "REFUSED", "--dry-run"),
    ("upstream", KEEPALIVE, 404, message("Not Found"), "REFUSED", "Beta9 fork is needed"),
    ("busy", KEEPALIVE, 429, HTML, "TROUBLE", "trouble"),
    ("redirect", KEEPALIVE, 301, "", "TROUBLE", "never followed"),
    ("portal", KEEPALIVE, 200, HTML, "TROUBLE", "Is this the gateway?"),
    # Of others, and hostile ones
    ("401-empty", REGISTER, 401, "", "TROUBLE", BETWEEN), ("403-html", REGISTER, 403, HTML, "TROUBLE", BETWEEN),
    ("403-json", REGISTER, 403, {"x": "y"}, "TROUBLE", BETWEEN), ("407", REGISTER, 407, HTML, "TROUBLE", BETWEEN),
    ("404-html", KEEPALIVE, 404, HTML, "TROUBLE", "Is this the gateway?"),
    ("register-not-found", REGISTER, 500, message("machine not found"), "TROUBLE", ""),
    ("register-404", REGISTER, 404, message("Not Found"), "TROUBLE", "Is this the gateway?"),
    ("list", REGISTER, 200, [], "TROUBLE", ""), ("not-ok", KEEPALIVE, 200, {"status": "not ok"}, "TROUBLE", ""),
    ("created", KEEPALIVE, 201, {"status": "ok"}, "TROUBLE", ""), ("deep", KEEPALIVE, 200, "[" * 60000, "TROUBLE", ""),
    ("another-machine", KEEPALIVE, 200, {"status": "ok", "machine_state": state(machine_id="0badc0de")}, "TROUBLE", ""),
    ("no-text", KEEPALIVE, 200, b"\xff\x00\x1b[2J" * 99, "TROUBLE", ""),
    ("message-list", KEEPALIVE, 500, message(["machine", {"not": "found"}]), "TROUBLE", ""),
    ("message-template", KEEPALIVE, 500, message("{config.token} {0} %s \x1b[2J\n\u202e" + "x" * 9999), "TROUBLE", ""),
]


@pytest.mark.parametrize("call, status, body, kind, words", [row[1:] for row in MEANINGS], ids=[r[0] for r in MEANINGS])
def test_classify_answer_means_and_what_of_it_is_shown(call, status, body, kind, words):
    found = b9.classify(call, answer(status, body), CONFIG, ID)
    assert found.kind.name == kind and words in found.remedy and "{" not in found.remedy
    assert found.text.isprintable() and len(found.text) < 1100
    assert (found.text == "") == (kind == "OK") and not leaks(f"{found}", TOKEN, SECRET)
    text = b9.describe_body(answer(status, body).body)
    assert text.isprintable() and len(text) <= 1000 and SECRET not in text


@pytest.mark.parametrize("value, ttl", [
    (1, 1), (86400, 86400), (0.9, None), (-300, None), (86401, None), (math.nan, None), ("300", None), (True, None),
    ([300], None)], ids=repr)
def test_classify_ttl_is_taken_where_it_is_sane(value, ttl):
    body = {"status": "ok", "machine_state": state(ttl_seconds=value)}
    assert b9.classify(KEEPALIVE, answer(200, body), CONFIG, ID) == outcome("OK", ttl=ttl)


@pytest.mark.parametrize("status, value, seconds", [
    (429, "7", 7), (503, "120", 120), (500, "7", 0), (429, "-1", 0), (429, "1.5", 0), (429, "9999999999", 0),
    (429, "\u0667", 0), (503, "Wed, 21 Oct 2026 07:28:00 GMT", 0)], ids=repr)
def test_classify_retry_after_is_whole_seconds_of_429_and_503(status, value, seconds):
    found = b9.classify(KEEPALIVE, answer(status, HTML, Retry_After=value), CONFIG, ID)
    assert found.retry_after == seconds


@pytest.mark.parametrize("fields, words", [
    ({"config": configuration(provider="\x1b[2J")}, r"of provider \\x1b\[2J, .*--provider-name"),
    ({"config": configuration()}, "^$"), ({"config": configuration(pool="another")}, "^$"),
    ({"config": configuration(mode="", provider=None)}, "^$"), ({}, "^$"),
    ({"config": {"worker": {"pools": {"external": "x"}}}}, "^$")],
    ids="hostile good other-pool untold none odd".split())
def test_classify_placement_says_why_no_work_will_come(fields, words):
    text = b9.classify(REGISTER, answer(200, fields), CONFIG, ID).placement
    assert re.search(words, text) and text.isprintable()


# ---- The schedule
@pytest.mark.parametrize("failing_for, cap, floor, ceiling", [
    (0, 66, 1, 4), (10, 66, 1, 10), (86400, 66, 1, 60), (86400, 22, 1, 22), (0, 2, 0.5, 2)])
def test_backoff_is_drawn_between_a_floor_and_a_ceiling_that_grows(failing_for, cap, floor, ceiling):
    assert b9.backoff(failing_for, cap, min) == pytest.approx(floor)
    assert b9.backoff(failing_for, cap, max) == pytest.approx(ceiling)


@pytest.mark.parametrize("interval, ttl, expected, keepalive", [("60", 300, 60, 10), ("240", 300, 100, 10),
                                                                ("0.1", 300, 0.1, 2), ("60", 9, 3, 3)])
def test_interval_is_at_most_a_third_of_the_ttl_and_deadlines_follow_for_keepalives_alone(
        interval, ttl, expected, keepalive):
    config, lease = config_of("--keepalive-interval", interval), KEPT._replace(ttl=ttl)
    assert b9.interval_of(lease, config) == pytest.approx(expected)
    assert b9.deadline_of(KEEPALIVE, lease, config) == pytest.approx(keepalive)
    assert b9.deadline_of(REGISTER, lease, config) == 10


OWED = FAILING._replace(register_failed=True)


@pytest.mark.parametrize("lease, want, now, call", [
    (STARTING, WANTED, 1000, REGISTER), (KEPT, WANTED, 1300, KEEPALIVE), (KEPT, WANTED, 1301, REGISTER),
    (KEPT._replace(ttl=30.0), WANTED, 1031, REGISTER), (KEPT._replace(registered=None), WANTED, 1010, REGISTER),
    (KEPT, NEW_KEY, 1010, REGISTER), (KEPT, WANTED._replace(private_ip="10.0.0.3"), 1010, REGISTER),
    (KEPT, wanted(memory=1), 1010, REGISTER), (FAILING, WANTED, 1064, KEEPALIVE), (FAILING, NEW_KEY, 1064, REGISTER),
    (OWED, NEW_KEY, 1064, KEEPALIVE), (OWED, wanted(cpu=9000), 1064, KEEPALIVE),
    (OWED, wanted(gpu_count=5), 1064, KEEPALIVE), (OWED, wanted(cpu=0), 1064, REGISTER),
    (OWED, wanted(cpu=9000, gpu_count=3), 1064, REGISTER), (OWED, NEW_KEY, 1301, REGISTER)],
    ids="""start at-the-ttl past-the-ttl past-a-short-ttl forgotten new-token new-address new-memory failing
        failing-and-new-token owed-token owed-more-cpu owed-more-gpus larger-cpu-known larger-in-part
        owed-past-the-ttl""".split())
def test_next_call_is_a_keepalive_where_the_gateway_knows_what_is_wanted(lease, want, now, call):
    assert b9.next_call(lease, want, now) == call


@pytest.mark.parametrize("lease, call, lost_ssh, due", [
    (KEPT, KEEPALIVE, False, 1060), (KEPT, REGISTER, False, 1010), (KEPT, KEEPALIVE, True, 1005),
    (KEPT._replace(due=1003.0), KEEPALIVE, True, 1003), (FAILING, REGISTER, False, 1064),
    (FAILING, KEEPALIVE, True, 1064)],
    ids="keepalive register-at-once lost-ssh lost-ssh-later failing-register failing-lost-ssh".split())
def test_next_due_is_at_once_for_a_registration_and_waits_in_an_outage(lease, call, lost_ssh, due):
    assert b9.next_due(lease, call, lost_ssh, 1010) == due


REGISTERED = b9.Lease(1000.0, registered=WANTED, confirmed_at=1000.0)
SHORT, BUSY = KEPT._replace(ttl=30.0), {"retry_after": 999999999.0}


@pytest.mark.parametrize("lease, call, kind, now, least, most, more", [
    (STARTING, REGISTER, "OK", 1002, 0, 0, {}), (REGISTERED, KEEPALIVE, "OK", 1000, 6, 60, {}),
    (KEPT, KEEPALIVE, "OK", 1061, 53, 65, {}), (KEPT, KEEPALIVE, "OK", 1005, 54, 66, {}),
    (KEPT, KEEPALIVE, "OK", 1250, 54, 66, {}), (KEPT, KEEPALIVE, "OK", 1060, 9, 11, {"ttl": 30.0}),
    (KEPT, KEEPALIVE, "TROUBLE", 1060, 1, 4, {}), (FAILING, KEEPALIVE, "TROUBLE", 1090, 1, 30, {}),
    (FAILING, REGISTER, "DENIED", 9999, 1, 60, {}), (FAILING, REGISTER, "OK", 1090, 0, 0, {}),
    (KEPT, KEEPALIVE, "FORGOTTEN", 1060, 0, 0, {}),
    (FAILING, KEEPALIVE, "FORGOTTEN", 1060, 1, 4, {}), (KEPT, KEEPALIVE, "TROUBLE", 1060, 5, 30, {"retry_after": 5.0}),
    (KEPT, KEEPALIVE, "TROUBLE", 1060, 75, 100, BUSY), (SHORT, KEEPALIVE, "TROUBLE", 1060, 7.5, 10, BUSY)],
    ids="""registered first-keepalive keepalive early-keepalive after-a-suspend shorter-ttl trouble longer-trouble
        long-trouble registered-again forgotten forgotten-again retry-after retry-much-later
        retry-with-a-short-ttl""".split())
def test_lease_after_a_call_is_due_after_a_pause_between(lease, call, kind, now, least, most, more):
    for draw, pause in ((min, least), (max, most)):
        assert after(lease, call, kind, float(now), draw, **more).due - now == pytest.approx(pause)


@pytest.mark.parametrize("kind", ["DENIED", "UNSAFE"])
def test_lease_after_denials_knows_since_when_and_a_keepalive_alone_ends_the_outage(kind):
    denied = after(after(KEPT, KEEPALIVE, kind, 1060.0), KEEPALIVE, kind, 1070.0)
    assert (denied.failing_since, denied.denied_since, denied.registered) == (1060, 1060, WANTED)
    assert after(denied, KEEPALIVE, "TROUBLE", 1080.0).denied_since is None
    again = after(denied, REGISTER, "OK", 1090.0)
    assert (again.failing_since, again.denied_since) == (1060, None)
    ended = after(again, KEEPALIVE, "OK", 1091.0)
    assert ended.failing_since is None


def test_lease_after_a_registration_that_fails_is_kept_alive_by_turns_with_pauses():
    lease, calls = KEPT, []
    for _ in range(6):
        calls.append(b9.next_call(lease, NEW_KEY, lease.due))
        lease = after(lease, calls[-1], "OK" if calls[-1] == KEEPALIVE else "TROUBLE", lease.due, max, want=NEW_KEY)
    assert calls == [REGISTER, KEEPALIVE] * 3 and lease.failing_since == 1060 and lease.due - lease.kept_at == 60


@pytest.mark.parametrize("known, tried", [(WANTED, wanted(cpu=0)), (wanted(cpu=0), WANTED)], ids=["opened", "closed"])
def test_lease_after_a_registration_whose_answer_was_lost_is_not_taken_for_what_was_confirmed_before(known, tried):
    """The gateway may hold either: what is wanted again, as k3s has changed back, is registered again."""
    lease, calls = after(KEPT._replace(registered=known), REGISTER, "TROUBLE", 1010.0, want=tried), []
    for _ in range(4):
        calls.append(b9.next_call(lease, known, lease.due))
        lease = after(lease, calls[-1], "OK", lease.due, want=known)
    assert REGISTER in calls and calls[-1] == KEEPALIVE and lease.failing_since is None


AT_ONCE, AT_MOST_30, JUST_ONCE = ["--startup-timeout", "0"], ["--startup-timeout", "30"], ["--once"]
LONG_DENIED = STARTING._replace(denied_since=1000.0)


@pytest.mark.parametrize("kind, lease, words, now, code", [
    ("OK", STARTING, JUST_ONCE, 1000, None), ("TROUBLE", STARTING, [], 9999, None),
    ("TROUBLE", STARTING, JUST_ONCE, 1000, 69), ("TROUBLE", STARTING, AT_MOST_30, 1029, None),
    ("TROUBLE", STARTING, AT_MOST_30, 1030, 69), ("DENIED", LONG_DENIED, [], 1059, None),
    ("DENIED", LONG_DENIED, [], 1060, 77), ("DENIED", LONG_DENIED, AT_MOST_30, 1030, 77),
    ("UNSAFE", LONG_DENIED, [], 1060, 69), ("FORBIDDEN", STARTING, [], 1000, 77), ("REFUSED", STARTING, [], 1000, 78),
    ("FORGOTTEN", STARTING, [], 1000, None), ("FORGOTTEN", STARTING, JUST_ONCE, 1000, 69),
    *((kind.name, KEPT, AT_ONCE, 9999, None) for kind in b9.Kind)])
def test_exit_code_after_a_failure_before_the_first_ready_and_never_later(kind, lease, words, now, code):
    config = config_of(*words)
    assert b9.exit_code_after(outcome(kind), lease, 1000.0, now, config) == code
    assert lease is not KEPT or b9.patience_ends(lease, 1000.0, config) == math.inf


# ---- The budget of reliability.md, by simulation
class Life:
    """One agent's schedule as `keep` has it: a turn at least each 5 s, and no socket. `reply` says of a call, at its
    start, its outcome and the seconds it takes.
    """

    def __init__(self, draw, lease=STARTING, config=CONFIG):
        self.draw, self.lease, self.config, self.now = draw, lease, config, lease.due
        self.calls = []     # (start, call, kind)

    def next(self, want):
        """The next call, and when it is due."""
        call = b9.next_call(self.lease, want, self.now)
        return call, b9.next_due(self.lease, call, False, self.now)

    def turn(self, want, reply):
        """Whether there was a call; if not, time goes on."""
        call, due = self.next(want)
        if self.now < due:
            self.now = min(due, self.now + 5)
            return False
        start, (found, seconds) = self.now, reply(call, self.now)
        self.now += seconds
        self.lease = b9.lease_after(self.lease, call, want, found, self.now, self.config, self.draw)
        self.calls.append((start, call, found.kind.name))
        return True

    def run(self, until, reply):
        while self.now < until:
            self.turn(WANTED, reply)
        return self

    def of(self, call):
        """When each call began that went well."""
        return [start for start, each, result in self.calls if each == call and result == "OK"]


def answered(call, now):
    return outcome("OK", ttl=300.0), 0.01


def test_budget_outage_that_burns_each_deadline_leaves_five_attempts_in_the_ttl():
    life = Life(max, KEPT._replace(due=1066.0))
    life.run(1300, lambda call, now: (outcome("TROUBLE"), b9.deadline_of(call, life.lease, CONFIG)))
    starts = [start - 1000 for start, _, _ in life.calls]
    print(f"\nattempts in the worst case at {[round(start) for start in starts]} s")
    assert len(starts) >= 5 and starts[-1] <= 266 + 30 and {call for _, call, _ in life.calls} == {KEEPALIVE}


@pytest.mark.parametrize("burn", [10.0, 0.01], ids=["hangs", "refuses"])
@pytest.mark.parametrize("draw", [max, None], ids=["worst", "random"])
def test_budget_outage_of_160_s_never_loses_the_registration_wherever_it_falls(draw, burn):
    worst = 0.0
    for seed in range(70 if draw else 500):
        life = Life(draw or random.Random(seed).uniform)
        away = 1300 + (seed if draw else random.Random(-seed).uniform(0, 66))
        life.run(away + 400, lambda call, now: (
            outcome("TROUBLE"), burn) if away <= now < away + 160 else answered(call, now))
        kept = life.of(KEEPALIVE)
        worst = max(worst, *(later - sooner for sooner, later in zip(kept, kept[1:])))
        assert len(life.of(REGISTER)) == 1, f"seed {seed}: registered again"
    print(f"\nlongest between two keepalives with an outage of 160 s: {worst:.0f} s")
    assert 160 < worst < 300


@pytest.mark.parametrize("outage", [2, 30, 200, 3600])
def test_budget_recovery_takes_as_long_as_the_outage_or_a_minute_and_one_deadline(outage):
    for seed in range(200):
        chance = random.Random(seed)
        life, away = Life(chance.uniform), 1300 + chance.uniform(0, 66)
        life.run(away + outage, lambda call, now: (outcome("TROUBLE"), 10.0) if now >= away else answered(call, now))
        tried = any(start >= away for start, _, _ in life.calls)
        back = max(life.now - 10 * tried, away + outage)     # an attempt that is under way is lost
        life.run(away + outage + 200, answered)
        ready = min(start for start in life.of(KEEPALIVE) if start >= away + outage)
        limit = min(max(outage, 4), 60) + 10 + 0.1 if tried else 66
        assert ready - back <= limit, f"seed {seed}: {ready - back:.1f} s"


class Fleet:
    """10,000 agents, and a gateway that answers at once."""

    def __init__(self, seed, starts):
        draw = random.Random(seed).uniform
        self.lives = [Life(draw, b9.Lease(start)) for start in starts]
        self.heap = [(start, number) for number, start in enumerate(starts)]
        heapq.heapify(self.heap)
        self.bins, self.known, self.ready = collections.Counter(), set(), {}

    def answer(self, number, call, now):
        if call == REGISTER:
            self.known.add(number)
        elif number in self.known:
            self.ready.setdefault(number, now)
        return outcome("OK" if number in self.known else "FORGOTTEN"), 0.0

    def run(self, until, away=False):
        """Counts requests in bins of 1 s, and when each agent is ready for the first time."""
        while self.heap[0][0] < until:
            now, number = self.heap[0]
            life = self.lives[number]
            life.now = now
            life.turn(WANTED, lambda *call: (outcome("TROUBLE"), 0.0) if away else self.answer(number, *call))
            self.bins[int(now)] += 1
            heapq.heapreplace(self.heap, (max(now, life.next(WANTED)[1]), number))


@pytest.mark.slow
@pytest.mark.parametrize("spread, warm_up, most", [(0, 600, 723), (60, 150, 684)], ids=["together", "evenly"])
def test_budget_fleet_forgotten_in_an_outage_of_600_s_returns_without_a_stampede(spread, warm_up, most):
    starts = random.Random(2)
    fleet = Fleet(3, [1000 + starts.uniform(0, spread) for _ in range(10_000)])
    away, back = 1000 + warm_up, 1600 + warm_up
    fleet.run(away)
    second_minute = max(fleet.bins[second] for second in range(1060, 1120))
    fleet.run(back, away=True)
    fleet.known, fleet.ready = set(), {}
    fleet.run(back + 75)
    peak = max(fleet.bins[second] for second in range(back, back + 75))
    seconds = sorted(fleet.ready.values())[9899] - back
    print(f"\n10,000 agents, away for 600 s: peak {peak} requests/s, 99 % ready after {seconds:.0f} s;"
          f" in the second minute after the start {second_minute} requests/s, steady are 167")
    assert peak <= most and seconds <= 66 and second_minute < 2.5 * 167


# ---- What is offered
NODE = b9.Offer(64000, 512000, 8)
GOOD, NO_CA = b9.K3sView(workers={}, node=NODE), b9.K3sView(notice="not asked")
FAULT, WORKING = b9.K3sView("k3s is away"), GOOD._replace(workers={"w1": b9.Worker("Running", 0.0)})


def metrics(cpu=8000, memory=32000):
    return b9.Metrics(None, None, cpu, memory, None, None, 0)


def cards(here, lost=0):
    return [b9.Gpu("H100", True)] * here + [b9.Gpu(None, False)] * lost


@pytest.mark.parametrize("found, gpus, words, offer", [
    (metrics(), cards(3, 1), [], (8000, 32000, 3)), (metrics(None, None), None, [], (8000, 32000, 4)),
    (metrics(), cards(4), ["--max-cpu", "6.5", "--max-memory", "16Gi", "--max-gpus", "2"], (6500, 16384, 2)),
    (metrics(), cards(4), ["--max-cpu", "64", "--max-memory", "999Gi", "--max-gpus", "9"], (8000, 32000, 4)),
    (metrics(), None, ["--max-gpus", "0"], (8000, 32000, 0)), (metrics(8079, 31681), cards(4), [], (8000, 32000, 4)),
    (metrics(8080, 31680), cards(4), [], (8080, 31680, 4)), (metrics(), cards(0), [], (8000, 32000, 0))],
    ids="lost-card unknown capped caps-above cap-and-hang under-1-percent 1-percent no-cards".split())
def test_offer_of_is_what_is_there_under_the_caps_and_as_before_where_unknown_or_hardly_changed(
        found, gpus, words, offer):
    assert b9.offer_of(found, gpus, FULL, config_of(*words)) == offer


class Planner:
    """`plan_offer` turn by turn; what it wants is confirmed by the gateway unless that is away."""

    def __init__(self, promise):
        self.promise, self.registered, self.reason = promise, FULL, ""

    def turn(self, gpus, view, now, confirmed=True):
        offer, self.promise, self.reason = b9.plan_offer(
            FULL._replace(gpu_count=gpus), self.promise, view, self.registered, float(now))
        self.registered = offer if confirmed else self.registered
        return offer


@pytest.mark.parametrize("node, offer, words", [
    (None, FULL, ""), (NODE, FULL, ""), (b9.Offer(1500, 4096, 8), (1500, 4096, 4), ""),
    (b9.Offer(64000, 512000, 1), (8000, 32000, 1), "k3s has 1 of 4 GPUs")],
    ids="unknown larger smaller fewer-gpus".split())
def test_plan_offer_usable_k3s_is_all_that_is_there_and_no_more_than_its_node_has(node, offer, words):
    found, promise, reason = b9.plan_offer(FULL, b9.Promise(0), GOOD._replace(node=node), None, 0.0)
    assert found == offer and promise == b9.Promise(offer[2]) and words in reason and (reason == "") == (words == "")


def test_plan_offer_unusable_k3s_is_offered_no_cpu_the_rest_unchanged_and_the_promise_stays():
    patient = b9.Promise(4, quiet_since=5.0, from_before=True)
    closed = FULL._replace(cpu=0), patient._replace(quiet_since=None), FAULT.fault
    assert b9.plan_offer(FULL, patient, FAULT, FULL, 9.0) == closed
    assert b9.plan_offer(FULL, b9.Promise(2), FAULT, FULL, 9.0)[1].gpu_count == 2, "nothing was promised with CPU"


AT_A_START = b9.Promise(4, from_before=True)
NO_PLUGIN = GOOD._replace(node=NODE._replace(gpu_count=0))
AWAY = "the gateway is away"


@pytest.mark.parametrize("promise, turns, opens, words", [
    (b9.Promise(4), [(0, 3, GOOD)], 601, "3 GPUs are here where 4 were offered.*10 minutes after"),
    (b9.Promise(4), [(0, 3, GOOD, AWAY), (900, 3, GOOD, AWAY), (1000, 3, GOOD)], 601, "3 GPUs are here"),
    (b9.Promise(4), [(0, 3, GOOD), (590, 3, WORKING)], 601, "10 minutes after"),
    (b9.Promise(4), [(0, 3, GOOD), (590, 3, FAULT)], 601, "k3s is away"),
    (b9.Promise(4), [(0, 3, GOOD), (590, 2, GOOD)], 601, "2 GPUs are here where 4 were offered"),
    (b9.Promise(4), [(0, 4, NO_PLUGIN)], 601, "k3s has 0 of 4 GPUs.*10 minutes after"),
    (b9.Promise(4), [(0, 3, NO_CA)], None, "were offered.*until a restart"),
    (AT_A_START, [(0, 3, NO_CA)], 601, "were offered.*for 10 minutes"),
    (AT_A_START, [(0, 3, FAULT), (590, 3, NO_CA)], 600, "3 GPUs are here"),
    (AT_A_START, [(0, 4, NO_CA), (5, 3, NO_CA)], None, "until a restart")],
    ids="""lost lost-while-the-gateway-is-away worker-seen-later k3s-fault-between one-more-lost node-lost-them
        unknown-workers fewer-at-a-start fault-at-a-start lost-after-the-start""".split())
def test_plan_offer_fewer_gpus_than_promised_have_no_cpu_until_it_is_quiet_for_long(promise, turns, opens, words):
    planner = Planner(promise)
    for at, gpus, view, *away in turns:
        offer = planner.turn(gpus, view, at, confirmed=not away)
        assert offer.cpu == 0 or gpus == 4
    assert re.search(words, planner.reason)
    view = GOOD if view in (WORKING, FAULT) else view
    found = next((now - at for now in range(at + 1, at + 5000) if planner.turn(gpus, view, now).cpu), None)
    assert found == opens
    assert planner.promise.gpu_count == (4 if opens is None else offer.gpu_count)


def test_steady_change_counts_once_two_looks_agree_but_for_the_first():
    steady = b9.Steady()
    assert [steady.observe(each) for each in "AABABBCDDA"] == list("AAAAABBBDD")


# ---- What k3s's answers mean
def node_list(*items, kind="NodeList"):
    return json.dumps({"kind": kind, "items": list(items)}).encode()


ONE, BOX = K3s.node("one"), K3s.node("box")


@pytest.mark.parametrize("body, found", [
    (node_list(ONE), ONE), (node_list(ONE, BOX), BOX), (node_list(ONE, ONE), None), (node_list(), {}),
    (node_list(ONE, kind="Status"), None), (b"[]", None), (node_list("x", 7), None)],
    ids="only named strangers none no-list array odd".split())
def test_find_node_is_the_only_one_or_the_one_of_this_name(body, found):
    assert b9.find_node(body, "BOX") == found


@pytest.mark.parametrize("text, value", [
    ("8", 8), ("1500m", 1.5), ("0.5", 0.5), ("4Gi", 4 * 2 ** 30), ("3999880Ki", 3999880 * 1024), ("2Ti", 2 ** 41),
    ("4G", 4e9), ("100k", 1e5), (8, 8), ("", None), ("-1", None), ("1 Gi", None), ("1X", None), ("1e400", None),
    ("9" * 400, None), (None, None), (True, None), ("\u0661", None), ("1Gi\n", None)], ids=repr)
def test_parse_quantity_reads_kubernetes_quantities_alone(text, value):
    assert b9.parse_quantity(text) == (None if value is None else pytest.approx(value))


def table(*rows, columns=K3s.COLUMNS, **more):
    return json.dumps({"kind": "Table", "columnDefinitions": [{"name": name} for name in columns],
                       "rows": [{"cells": list(row)} for row in rows], **more}).encode()


def test_parse_workers_keeps_since_when_a_state_is_seen():
    first = b9.parse_workers(table(("w1", "0/1", "Pending"), ("w2", "1/1", "Running")), {}, 10.0)
    assert first == {"w1": ("Pending", 10.0), "w2": ("Running", 10.0)}
    later = b9.parse_workers(table(("w1", "1/1", "Running"), ("w2", "1/1", "Running")), first, 20.0)
    assert later == {"w1": ("Running", 20.0), "w2": ("Running", 10.0)}


@pytest.mark.parametrize("body, workers", [
    (table(columns=()), {}), (b"{}", None), (node_list(), None),
    (table(("Running", "w1"), columns=("Status", "Name")), {"w1": ("Running", 5.0)}),
    (table(("w\x1b", 7, ["x"] * 99)), {"w\\x1b": (str(["x"] * 99)[:60], 5.0)}),
    (table(("w1", "", "Pending", 0, "2d3h"), ("w2", "", "Pending", 0, "1m5s"), ("w3", "", "Pending", 0, "<unknown>")),
     {"w1": ("Pending", 5.0 - 183600), "w2": ("Pending", 5.0 - 65), "w3": ("Pending", 5.0)}),
    (table(*((f"w{at}", "", "x") for at in range(3000))), {f"w{at}": ("x", 5.0) for at in range(1000)})],
    ids="no-columns object nodes other-order hostile ages very-many".split())
def test_parse_workers_reads_a_table_of_at_most_1000_pods_by_its_columns(body, workers):
    assert b9.parse_workers(body, {}, 5.0) == workers


@pytest.mark.parametrize("status, age, told", [
    ("Running", 9999, False), ("Pending", 119, False), ("Pending", 121, True), ("ContainerCreating", 9999, False),
    ("Completed", 0, False), *((status, 0, True) for status in (
        "ErrImagePull", "InvalidImageName", "Init:CrashLoopBackOff"))], ids=str)
def test_explain_workers_tells_of_a_worker_that_cannot_run(status, age, told):
    text = b9.explain_workers({"good": b9.Worker("Running", 0.0), "w1": b9.Worker(status, 0.0)}, float(age))
    assert text == (f"worker w1 cannot run, {status}: see `kubectl describe pod w1`" if told else "")


PENDING = {"w1": b9.Worker("Pending", 0.0), "w2": b9.Worker("Pending", 0.0)}


@pytest.mark.parametrize("workers, node, now, fault, notice", [
    (PENDING, BOX, 500, "", "worker w1 cannot run, Pending"), ({}, {}, 0, "k3s has no node", ""),
    (PENDING, None, 119, "", "node is not known"), (PENDING, None, 121, "w1 cannot run, Pending", "w1 cannot run"),
    ({**PENDING, "w3": b9.Worker("Running", 0.0)}, None, 500, "", "w1 cannot run"),
    ({**PENDING, "w3": b9.Worker("Pending", 450.0)}, None, 500, "", "w1 cannot run")],
    ids="pending no-node pending-briefly all-pending one-running one-new".split())
def test_judge_k3s_node_faults_and_where_it_is_unknown_workers_that_all_pend(workers, node, now, fault, notice):
    view = b9.judge_k3s(workers, node, float(now))
    assert fault in view.fault and (view.fault == "") == (fault == "")
    assert notice in view.notice and (view.notice == "") == (notice == "")
    assert view.fault == "" or view.fault.endswith(b9.NO_CPU)


def jwt(claims):
    return "eyJh." + base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=") + ".sig"


@pytest.mark.parametrize("token, expiry", [
    (jwt({"exp": 1800000000, "iss": "\u00e4?>"}), 1800000000), (jwt({}), None), (jwt({"exp": "soon"}), None),
    (jwt([1]), None), (K3S_TOKEN, None), ("a.\u00e4!.c", None), ("...", None)],
    ids="url-safe endless text list no-jwt no-base64 dots".split())
def test_parse_expiry_is_read_from_a_jwt_alone(token, expiry):
    assert b9.parse_expiry(b9.Secret(token)) == expiry


# ---- Texts
RECORD = {"ready_since": 400.0, "last_keepalive_at": 990.0, "next_attempt_at": 1050.0, "offer": FULL._asdict(),
          "gpus": []}
FAILED = {"failing_since": 700.0, "failure": "keepalive failed, 500"}


@pytest.mark.parametrize("more, running, code, words", [
    ({}, True, 0, "ready for 10 min"), (FAILED, False, 3, "not running"),
    ({"last_keepalive_at": None}, True, 1, "starting"),
    ({**FAILED, "last_keepalive_at": None}, True, 1, "not ready yet: keepalive failed, 500"),
    ({**FAILED, "last_keepalive_at": 650.0}, True, 1, "not ready for 5 min: keepalive failed, 500"),
    (FAILED, True, 1, "ready, but a change could not be registered: keepalive failed, 500"),
    ({"next_attempt_at": 941.0}, True, 0, "ready for"), ({"next_attempt_at": 939.0}, True, 1, "no sign of life for 61"),
    ({"lease_ends_at": 1001.0}, True, 0, "ready for"), ({"lease_ends_at": 999.0}, True, 1, "lease ran out"),
    ({"placement": "set it"}, True, 1, "ready, but no work will come: set it"),
    ({"offer": {"cpu": 0}, "warning": "k3s is away"}, True, 1, "ready, but takes no work: k3s is away"),
    ({"gpus": None}, True, 1, "ready, but the NVIDIA driver does not answer"),
    ({"gpus": None, "offer": {"cpu": 0}}, True, 1, "ready, but the NVIDIA driver does not answer"),
    ({"warning": "1 of 4 GPUs"}, True, 0, "ready for"), ({"placement": "x\x1b[2J\n" * 999}, True, 1, r"x\x1b[2J\n")],
    ids="""ready stopped-failing starting not-yet lost change-owed late overdue leased lapsed placement no-cpu no-driver
        no-driver-at-the-start warned hostile""".split())
def test_judge_exit_code_and_headline_by_the_record(more, running, code, words):
    found, headline = b9.judge({**RECORD, **more}, running, 1000.0)
    assert found == code and words in headline and headline.isprintable() and len(headline) < 600


def test_redactor_takes_out_the_current_and_the_previous_token_in_three_forms():
    redactor, tokens = b9.Redactor(), [f"tok+n/{number}{'?' * (number % 3)}" for number in range(50)]
    for token in tokens:
        redactor.remember("token", b9.Secret(token))
        redactor.remember("token", b9.Secret(token))     # as read again and again
    redactor.remember("k3s_token", b9.Secret(tokens[-1] + "-longer"))
    for form in forms(*tokens[-2:], tokens[-1] + "-longer"):
        assert redactor.redact(f"<{form}>{form}").replace("=", "") == "<[redacted]>[redacted]", form
    assert redactor.redact(tokens[0]) == tokens[0] and len(redactor.forms) <= 4 * 3


def test_repeats_of_one_format_are_told_ever_more_rarely_and_all_anew_after_ten_minutes_without():
    def told(text, count=1, level=logging.WARNING):
        return [repeats.filter(logging.LogRecord("x", level, "x", 1, text, (), None)) for _ in range(count)]

    repeats = b9.Repeats()
    assert [number for number, yes in enumerate(told("failed", 200), 1) if yes] == [1, 2, 4, 8]
    assert told("another") == [True] and all(told("debug", 20, logging.DEBUG))
    key = next(iter(repeats.seen))
    count, last, written = repeats.seen[key]
    repeats.seen[key] = count, last, written - b9.QUIET                     # ten minutes of failures later
    assert told("failed", 2) == [True, False]
    repeats.seen[key] = count, last - b9.QUIET - 1, last - b9.QUIET - 1     # ten minutes without later
    assert told("failed", 4) == [True, True, False, True]
    assert [told(f"attempt {number}")[0] for number in range(4)] == [True, True, False, True], "numbers do not differ"


# ---- What can hang
@pytest.fixture
def nothing_left():
    """Fails where a thread or a descriptor is left behind."""
    def count():
        return [len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd")]

    b9.HttpClient("http://127.0.0.1:9", "127.0.0.1", 9, b9.Redactor())      # its imports
    before = count()
    yield
    wait(lambda: all(now <= then for now, then in zip(count(), before)), lambda: f"{before} threads, files: {count()}")


def soon(seconds=60.0):
    return b9.read_clock() + seconds


def test_question_late_answer_is_for_whoever_asks_next_and_is_asked_once(nothing_left):
    go, asked = threading.Event(), []
    question = b9.Question(lambda: asked.append(1) or go.wait(60) and "answer")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            question.ask(soon(0.01))
    go.set()
    assert question.ask(soon()) == "answer" and asked == [1]
    assert question.ask(soon()) == "answer" and asked == [1, 1], "then it is asked anew"


def test_question_given_up_before_its_thread_began_is_never_asked_by_two_at_once(nothing_left):
    go, asked = threading.Event(), []
    question, before = b9.Question(lambda: asked.append(1) or go.wait(60)), sys.getswitchinterval()
    sys.setswitchinterval(60)       # a new thread gets no turn while this one is busy
    try:
        with pytest.raises(TimeoutError):
            question.ask(b9.read_clock())
    finally:
        sys.setswitchinterval(before)
    with pytest.raises(TimeoutError):
        question.ask(soon(0.5))
    go.set()
    assert question.ask(soon()) is True and asked == [1]


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_question_raises_what_was_raised_and_can_be_asked_again(error, nothing_left):
    answers = [lambda: 7, lambda: (_ for _ in ()).throw(error)]
    question = b9.Question(lambda: answers.pop()())
    with pytest.raises(error):
        question.ask(soon())
    assert question.ask(soon()) == 7


def test_question_that_hangs_is_waited_for_once_and_its_late_answer_taken(nothing_left):
    gate, answers = threading.Semaphore(0), iter("ab")
    question = b9.Question(lambda: gate.acquire(timeout=60) and next(answers))
    with pytest.raises(TimeoutError):
        question.poll(0.5)
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(TimeoutError):
            question.poll(0.5)
    assert time.monotonic() - began < 5, "it is not waited for again"
    gate.release()
    wait(lambda: not question.answered.locked(), "an answer")
    assert question.poll(0.5) == "a"
    gate.release()
    assert question.poll(50.0) == "b", "it is asked anew and waited for"


def test_question_that_is_slow_each_time_answers_each_poll_but_the_first(nothing_left):
    answers = iter(range(9))
    question = b9.Question(lambda: time.sleep(0.2) or next(answers))
    with pytest.raises(TimeoutError):
        question.poll(0.01)
    for expected in range(4):
        wait(lambda: not question.answered.locked(), "an answer")
        assert question.poll(0.01) == expected


SHORT_OF_MEMORY = """
import collections, resource, beta9_agent as b9
question, ends = b9.Question(lambda: "answered"), collections.Counter()
def ask(seconds):
    try:
        ends[question.ask(b9.read_clock() + seconds)] += 1
    except (RuntimeError, MemoryError, TimeoutError) as error:
        ends[type(error).__name__] += 1
ask(60)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
for spare in range(0, 12 << 20, 32 << 10):
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, before[1]))
    ask(0.2)
    resource.setrlimit(resource.RLIMIT_AS, before)
print(dict(ends), question.ask(b9.read_clock() + 60))
"""


@pytest.mark.slow
def test_question_without_memory_for_a_thread_fails_and_never_hangs():
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], cwd=SOURCE.parent, text=True, capture_output=True,
                          timeout=240)
    print(done.stdout)
    assert "'RuntimeError': " in done.stdout and "'answered': " in done.stdout, done.stderr
    assert done.stdout.endswith(" answered\n"), "and answers when there is memory again"


def test_request_whose_answer_closes_the_connection_leaves_none_that_could_be_lost():
    with Server() as server:
        client = b9.HttpClient(f"http://127.0.0.1:{server.port}", "127.0.0.1", server.port, b9.Redactor())
        for words, kept in (["Connection: close"], False), ([], True):
            server.always = says(200, b"{}", *words)
            assert client.request("/", b9.Secret(TOKEN), None, soon()).status == 200
            assert client.is_connected() == (client.connection is not None) == kept
        client.close()


def test_request_given_up_in_the_handshake_by_a_slow_proxy_is_never_sent(certificates, nothing_left):
    """CONNECT and the handshake both end within the deadline, one after the other they do not."""
    def slow(sock):
        connect = sock.recv(65536)
        time.sleep(pause)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        time.sleep(pause)
        assert connect.startswith(b"CONNECT 127.0.0.1:9 ")
        return handshake(sock)

    handshake = certificates.server()
    with Server(greet=slow) as server:
        client = b9.HttpClient("https://127.0.0.1:9", "127.0.0.1", server.port, b9.Redactor(), certificates.path(),
                               f"http://127.0.0.1:{server.port}")
        server.always, pause = says(200, b"{}"), 0.6
        with pytest.raises(TimeoutError):
            client.request("/late", b9.Secret(TOKEN), None, soon(1.0))
        wait(lambda: server.connections == 1 and all(sock.fileno() < 0 for sock in server.open))
        assert server.seen == []
        pause = 0
        assert client.request("/", b9.Secret(TOKEN), None, soon()).status == 200
        client.close()


@pytest.mark.slow
def test_request_20000_times_racing_a_deadline_of_15_ms_never_hangs(nothing_left):
    ends, longest, last, chance = collections.Counter(), [], [], random.Random(1)

    def race(port):
        client = b9.HttpClient(f"http://127.0.0.1:{port}", "127.0.0.1", port, b9.Redactor())
        for _ in range(5000):
            began = time.monotonic()
            try:
                ends[client.request("/", b9.Secret(TOKEN), None, soon(0.015)).status] += 1
            except Exception as error:
                ends[type(error).__name__] += 1
            longest.append(time.monotonic() - began)
        last.append(client.request("/", b9.Secret(TOKEN), None, soon()).status)
        client.close()

    def answer_about_then(link):
        time.sleep(chance.uniform(0.005, 0.02))
        link.sock.sendall(http_answer(200, {}))
        return True

    with Server() as server:
        server.always = answer_about_then
        racers = [threading.Thread(target=race, args=(server.port,), daemon=True) for _ in range(4)]
        for each in racers:
            each.start()
        wait(lambda: not any(each.is_alive() for each in racers), lambda: f"one hangs: {ends}", 540)
    print(f"\n{dict(ends)}; the longest took {max(longest) * 1000:.0f} ms")
    assert last == [200] * 4 and len(longest) == 20_000 > ends[200] > 0 and max(longest) < 20


# ---- By chance
STRANGE = [None, True, 0, -1, 1e308, math.nan, -math.inf, 10 ** 30, "", "x\x1b[2J\n", "\ud800", "9" * 50, [], {}, [[]],
           {"": 0}, ["x"] * 50, {"status": "True"}, "Pending", "Unknown", "NoExecute", "machine not found"]


def spoil(chance, tree):
    """A copy with some of it changed, left out or doubled."""
    if chance.random() < 0.05:
        return chance.choice(STRANGE)
    if isinstance(tree, dict):
        return {name if chance.random() > 0.02 else str(chance.choice(STRANGE)): spoil(chance, value)
                for name, value in tree.items() if chance.random() > 0.04}
    if isinstance(tree, list):
        return [spoil(chance, value) for value in tree for _ in range(chance.choice((1, 1, 1, 1, 0, 2)))]
    return tree


def spoilt_body(chance, tree):
    data = bytearray(json.dumps(spoil(chance, tree)).encode())
    if data and chance.random() < 0.2:
        for _ in range(chance.randint(1, 5)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        del data[chance.choice((len(data), chance.randrange(len(data)))):]
    return bytes(data)


def by_chance(test):
    """Runs a test of a source of chance 5,000 times, and says which seed failed."""
    def repeated():
        first = random.SystemRandom().randrange(10 ** 9)
        print(f"\nseeds from {first} on")
        for seed in range(first, first + 5000):
            try:
                test(random.Random(seed))
            except BaseException:
                print(f"failed with random.Random({seed})")
                raise
    repeated.__name__, repeated.__doc__ = test.__name__, test.__doc__
    return pytest.mark.slow(repeated)


@by_chance
def test_fuzz_k3s_bodies_are_judged_in_short_printable_words(chance):
    some = [K3s.node(chance.choice(("box", "two")), chance.choice(("True", "True", "False", "Unknown", None)),
                     chance.random() < 0.2, chance.choice([[], ["NoSchedule"]]), chance.choice([[], ["DiskPressure"]]),
                     gpu=chance.choice(("4", "x"))) for _ in range(chance.choice((1, 1, 0, 2)))]
    node = b9.find_node(spoilt_body(chance, {"kind": "NodeList", "items": some}), "box")
    rows = [(f"w{number}", "", chance.choice(("Running", "Pending", "ErrImagePull")), 0, "3m7s") for number in range(3)]
    workers = b9.parse_workers(spoilt_body(chance, json.loads(table(*rows))), {}, 1000.0)
    view = b9.judge_k3s(workers or {}, node, 1000.0)
    for text in (view.fault, view.notice, *view.workers, *(each.status for each in view.workers.values())):
        assert text.isprintable() and len(text) < 700
    assert view.node is None or all(type(value) is int and value >= 0 for value in view.node)
    assert all(math.isfinite(each.since) and each.since <= 1000 for each in view.workers.values())
    assert json.loads(json.dumps(view))
    if node is not None and isinstance(node.get("spec"), dict) and node["spec"].get("unschedulable") is True:
        assert "cordoned" in view.fault
    for body in (spoilt_body(chance, {"kind": "Status", "message": "pods is forbidden"}), b""):
        said = b9.explain_k3s_answer(b9.Answer(chance.randrange(100, 999), {}, body))
        assert b9.NO_CPU in said and said.isprintable() and len(said) < 500


@by_chance
def test_fuzz_gateway_answers_come_to_an_outcome_without_secrets(chance):
    call, status = chance.choice((REGISTER, KEEPALIVE)), chance.choice((200, 200, 302, 401, 403, 404, 429, 500, 503))
    tree = chance.choice([row[3] for row in MEANINGS if isinstance(row[3], dict)])
    body = spoilt_body(chance, {"config": configuration(others=1), "machine_state": state(), "status": "ok", **tree})
    names = "Retry-After", "Location", "Content-Type"
    headers = {name: chance.choice(("1", "-1", "\x1b", "x" * 9999)) for name in names}
    found = b9.classify(call, b9.Answer(status, headers, body), CONFIG, ID)
    said = b9.parse_json(body)
    assert found.kind is not b9.Kind.OK or status == 200 and isinstance(said, dict) and not said.get("error_code")
    assert found.kind is not b9.Kind.FORGOTTEN or call == KEEPALIVE
    assert found.ttl is None or 1 <= found.ttl <= 86400
    assert 0 <= found.retry_after < 1e9
    for text in (found.text, found.remedy, found.placement, b9.describe_body(body)):
        assert text.isprintable() and len(text) < 1200
        assert SECRET not in text or b'"config"' not in body


class World(Life):
    """A gateway that keeps its own books, an agent's schedule and offers, and a machine where much changes.

    What each turn must keep to is checked here, by the gateway's books and not by the agent's.
    """

    MOODS = ["good", "good", "good", "trouble", "denied", "busy", "forgets", "register fails", "loses answers"]

    def __init__(self, chance):
        self.chance, self.ttl = chance, chance.choice((30.0, 300.0, 3600.0))
        super().__init__(chance.uniform, config=config_of("--keepalive-interval", chance.choice(("2", "60", "240"))))
        self.promise = b9.Promise(chance.choice((0, 2, 4)), from_before=True)
        self.gpus, self.view, self.key, self.mood = 4, GOOD, WANTED.k3s_token, "good"
        self.known, self.held, self.quiet_since = None, self.promise.gpu_count, None
        self.renewed = self.heard_of = math.inf     # by the gateway; since when it may not be silent

    def change(self):
        if self.chance.random() < 0.05:
            self.gpus = self.chance.randint(0, 4)
        if self.chance.random() < 0.05:
            self.view = self.chance.choice((GOOD, GOOD, FAULT, WORKING, NO_CA))
        if self.chance.random() < 0.03:
            self.key = b9.Secret(f"k3s-token-{self.chance.random()}")
        if self.chance.random() < 0.1:
            self.mood = self.chance.choice(self.MOODS)

    def reply(self, call, now):
        seconds = self.chance.uniform(0, min(10.0, self.ttl / 10))
        if now > self.renewed + self.ttl or self.mood == "forgets" and self.chance.random() < 0.5:
            self.known = None
        if self.mood in ("trouble", "denied", "busy") or self.mood == "register fails" and call == REGISTER:
            kind = "DENIED" if self.mood == "denied" else "TROUBLE"
            return outcome(kind, retry_after=self.chance.choice((0.0, 7.0, 9e8)) * (self.mood == "busy")), seconds
        if call == KEEPALIVE and self.known is None:
            return outcome("FORGOTTEN"), seconds
        if call == KEEPALIVE:       # it would place workers by what it knows
            assert self.known.offer.cpu <= self.want.offer.cpu, "kept ready with CPU that is not there any more"
            assert self.known.offer.gpu_count <= self.want.offer.gpu_count, "kept ready with GPUs that are lost"
        self.renewed = now
        if call == REGISTER:
            self.known = self.want
        else:
            self.heard_of = now
        lost = self.mood == "loses answers" and self.chance.random() < 0.5
        return outcome("TROUBLE" if lost else "OK", ttl=None if lost else self.ttl), seconds

    def live(self):
        """One turn."""
        sure = self.lease.registered and self.lease.unanswered is None
        registered = self.lease.registered.offer if sure else None
        offer, self.promise, reason = b9.plan_offer(
            FULL._replace(gpu_count=self.gpus), self.promise, self.view, registered, self.now)
        assert offer.cpu == 0 or not self.view.fault, "CPU on offer where no worker can run"
        assert (offer == FULL._replace(gpu_count=self.gpus)) == (reason == "")
        closed = self.known is None or self.known.offer == offer._replace(cpu=0)
        quiet = closed and not self.view.fault and not self.view.workers
        self.quiet_since = (self.now if self.quiet_since is None else self.quiet_since) if quiet else None
        if offer.cpu and offer.gpu_count < self.held:
            assert self.quiet_since is not None and self.now - self.quiet_since >= 600, "fewer GPUs with CPU too soon"
        self.held = offer.gpu_count if offer.cpu else self.held
        self.want = WANTED._replace(offer=offer, k3s_token=self.key)
        if self.turn(self.want, self.reply):
            interval = b9.interval_of(self.lease, self.config)
            assert self.now <= self.lease.due <= self.now + max(interval * 1.1, 100), self.lease
        # All, as the answer that tells the agent what the gateway holds may have been lost.
        held = [each.offer for each in (self.known, self.lease.registered) if each]
        held += [self.lease.unanswered] if self.lease.unanswered else []
        excused = (self.known is None or self.now > self.renewed + self.ttl
                   or self.mood not in ("good", "register fails")
                   or any(each.cpu > offer.cpu or each.gpu_count > offer.gpu_count for each in held))
        self.heard_of = max(self.heard_of, self.now) if excused and self.heard_of < math.inf else self.heard_of
        assert self.now - self.heard_of <= self.ttl, "silent for a TTL"


@by_chance
def test_fuzz_schedules_keep_their_promises_and_end_ready_as_wanted(chance):
    world = World(chance)
    for _ in range(150):
        world.change()
        world.live()
    world.mood, good_since = "good", world.now
    while not (world.known == world.want == world.lease.registered and world.lease.failing_since is None
               and world.heard_of > good_since):
        world.live()
        assert world.now - good_since < 2 * 264 + 100, "not ready as wanted"


# ---- A real card
@pytest.mark.gpu
def test_cards_of_a_real_driver_are_those_of_nvidia_smi():
    asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True,
                           timeout=60, check=True)
    assert [gpu.name for gpu in b9.list_gpus()] == asked.stdout.splitlines()


# ---- --status
def clock():
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def record(**change):
    """What a ready agent of this process would have written now."""
    now, offer = clock(), {"cpu": 8000, "memory": 32094, "gpu_count": 2}
    return {
        "format": 2, "agent_version": "0.3.0", "state": "running", "machine_id": ID, "pool_name": "gpu",
        "provider_name": "generic",
        "gateway": "http://gw:1994", "proxy": None, "ssh": None, "pid": os.getpid(), "wall_clock": time.time(),
        "started_at": now - 4000, "ready_since": now - 3999, "failing_since": None, "failure": "", "stopped_why": "",
        "last_keepalive_at": now - 10, "next_attempt_at": now + 50, "lease_ends_at": now + 290, "kept_alive": 66,
        "failed": 2, "registered": 1, "offer": offer, "warning": "", "placement": "", "metrics": {"free_gpu_count": 1},
        "gpus": [{"name": "A100", "free": True}, {"name": "A100", "free": False}], "lost_gpus": 0,
        "k3s": {"state": "usable", "notice": "", "worker_count": 2, "token_valid_until": time.time() + 48 * 3600,
                "workers": [{"name": "worker-1", "status": "Running", "since": now - 960},
                            {"name": "worker-2", "status": "ImagePullBackOff", "since": now - 30}]},
        "history": [{"ms": 3.5 + number, "cpu": number * 1.5 or None, "memory": 42} for number in range(60)], **change}


@contextlib.contextmanager
def held(folder, pid=None):
    """A state folder whose lock is held, as by an agent."""
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(pid or os.getpid(), file=lock, flush=True)
        yield


def put(box, content, machine_id=ID):
    box.state.mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (box.state / f"{machine_id}.status.json").write_bytes(data)


def status(box, *options, **environ):
    """Exit code and what was printed; by anybody, with nothing but Python."""
    done = box.run("--status", *options, python=["-S"], BETA9_TOKEN=None, **environ)
    assert done.stderr == "", done.stderr
    return done.returncode, done.stdout


def test_status_of_a_ready_machine_is_one_screen_that_begins_with_a_headline(box):
    with held(box.state):
        put(box, record())
        code, text = status(box)
    lines = text.splitlines()
    assert code == 0 and lines[0].startswith("ready") and len(lines) < 24 and max(map(len, lines)) < 80
    for words in (f"machine    {ID}, pool gpu, provider generic", "gateway    http://gw:1994", r"last \d\d s ago",
                  r"next in \d+ s", "lease ends in 4 min", "8 CPUs, 32094 MiB memory, 2 GPUs, 1 in use, 0 lost",
                  "k3s        usable, workers: 2", "16 min  Running", r"\d\d s  ImagePullBackOff"):
        assert re.search(words, text), text
    bars = {line[:11].strip(): line for line in lines[-3:]}
    assert bars["CPU"].endswith(" 88 %") and bars["memory"].endswith(" 42 %") and "62 ms" in bars["round trip"]
    assert bars["round trip"][11:71].startswith("▁") and bars["round trip"][70] == "█"


def test_status_of_many_workers_is_one_screen_still(box):
    workers = [{"name": f"worker-{number}", "status": "Running", "since": clock()} for number in range(50)]
    with held(box.state):
        put(box, record(k3s={**record()["k3s"], "notice": "n" * 200, "workers": workers}))
        lines = status(box)[1].splitlines()
    assert len(lines) == 23 and "  more: `kubectl get pods`" in lines and lines[-1].startswith("round trip")


def test_status_json_is_the_record_and_the_verdict(box):
    written = record()
    with held(box.state):
        put(box, written)
        code, text = status(box, "--json")
    told = json.loads(text)
    assert code == told["exit_code"] == 0 and told["summary"].startswith("ready")
    assert abs(told["now"] - clock()) < 60 and {name: told[name] for name in written} == written


def test_status_of_a_stopped_agent_tells_when_and_why_and_nothing_stale(box):
    put(box, record(state="stopped", stopped_why="a bad token", wall_clock=time.time() - 300))
    code, text = status(box)
    assert code == 3 and text.startswith("not running"), text
    assert "stopped    5 min ago, a bad token\n" in text, text
    assert "next in" not in text and "lease ends" not in text and "offers" not in text
    code, text = status(box, "--prometheus")
    found = measure(text)
    assert code == 3 and [found[f"beta9_agent_{name}"] for name in ("up", "ready", "takes_work")] == [0, 0, 0]
    assert len(text.splitlines()) == 9, text


@pytest.mark.parametrize("change, words", [
    ({"failing_since": 100.0, "failure": "keepalive failed: 500"}, "keepalive failed: 500"),
    ({"offer": {"cpu": 0, "memory": 1, "gpu_count": 0}, "warning": "node x is cordoned"}, "node x is cordoned")],
    ids=["failing", "no-cpu"])
def test_status_where_no_work_can_run_is_1_with_the_reason_once(box, change, words):
    with held(box.state):
        put(box, record(**change))
        code, text = status(box)
    assert code == 1 and text.count(words) == 1 and words in text.splitlines()[0], text


def test_status_shows_the_running_agents_record_not_the_newest(box):
    with held(box.state, pid=4711):
        put(box, record(pid=4711), "00000001")
        put(box, record(pid=1, wall_clock=time.time() + 5000), "00000002")      # the clock was ahead
        assert json.loads(status(box, "--json")[1])["machine_id"] == ID
        code, text = status(box, "--json")
        assert json.loads(text)["pid"] == 4711 and code == 0
    assert json.loads(status(box, "--json")[1])["pid"] == 1
    asked = json.loads(status(box, "--json", "--machine-id", "00000001")[1])
    assert asked["pid"] == 4711 and asked["exit_code"] == 3


def test_status_looks_into_the_users_folder_and_the_services_unless_one_is_named(monkeypatch, tmp_path):
    looked = []
    monkeypatch.setattr("glob.glob", lambda pattern: looked.append(os.path.dirname(pattern)) or [])
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    b9.read_status(b9.Config(state_dir=None, machine_id=None))
    assert sorted(looked) == sorted(["/var/lib/beta9-agent", str(tmp_path)])
    b9.read_status(b9.Config(state_dir="/nowhere", machine_id=None))
    assert looked[2:] == ["/nowhere"]


def test_status_of_an_agent_without_a_record_yet_is_not_the_old_ones(box):
    with held(box.state, pid=4711):
        put(box, record(pid=1, state="stopped"))
        code, text = status(box)
    assert code == 1 and "stopped" not in text, text


DAMAGED = {"none": None, "empty": b"", "cut": b'{"pid": 1', "list": b"[]", "binary": b"\xff\xfe", "deep": b"[" * 60000,
           "large": b"x" * 70000, "long-number": b'{"pid": ' + b"9" * 5000 + b"}", "other-format": b'{"format": 3}'}


@pytest.mark.parametrize("form", [(), ("--prometheus",)], ids=["screen", "prometheus"])
@pytest.mark.parametrize("more", [{"wall_clock": "x"}, {"history": [{}]}, {"offer": {"cpu": 1}}], ids=" ".join)
def test_status_of_a_record_of_other_types_is_one_line_with_the_remedy(box, more, form):
    put(box, record(**more))
    with held(box.state):
        done = box.run("--status", *form, "--state-dir", box.state)
    assert done.returncode == 1 and done.stdout == "", done.stdout
    assert "the status record is damaged: restart the agent" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGED)
def test_status_of_no_record_or_a_damaged_one_is_not_running_in_each_form(box, name):
    if DAMAGED[name] is not None:
        put(box, DAMAGED[name])
    code, text = status(box)
    assert code == 3 and text.startswith("not running") and len(text.splitlines()) < 9
    code, text = status(box, "--json")
    assert code == json.loads(text)["exit_code"] == 3
    code, text = status(box, "--prometheus")
    assert code == 3 and measure(text)["beta9_agent_up"] == 0


ODD_TEXTS = ["", "x" * 500, "\x1b[2J\n\"\\", "\ud800", "{}"]
OPTIONAL = ["proxy", "ready_since", "last_keepalive_at", "lease_ends_at", "worker_count", "token_valid_until"]


def odd(chance, tree):
    """A copy with other values of the same kinds, and without some that may be unknown."""
    if isinstance(tree, dict):
        return {name: None if name in OPTIONAL and chance.random() < 0.2 else
                value if name in ("format", "state", "free") else odd(chance, value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [odd(chance, value) for value in tree for _ in range(chance.choice((0, 1, 1, 1, 2)))][:60]
    if chance.random() < 0.8 or tree is None:
        return tree
    return chance.choice(ODD_TEXTS if isinstance(tree, str) else [0, 1, 0.5, 1e15])


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_status_of_records_with_odd_values_is_drawn_and_measured_all_the_same(count):
    seed = random.SystemRandom().randrange(10 ** 6)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(count):
        found, now = odd(chance, record()), clock()
        code, headline = b9.judge(found, chance.random() < 0.8, now)
        status = {**found, "exit_code": code, "summary": headline, "now": now}
        lines = b9.draw_status(status)
        assert code in (0, 1, 3) and len(lines) < 24, (seed, lines)
        assert all(line.isprintable() and len(line) < 80 for line in lines), (seed, lines)
        measure(b9.format_prometheus(status) + "\n")


# --prometheus
def measure(text):
    """The samples in a text by Prometheus' rules: {name: value}, the first of each. Fails where one is broken."""
    samples, described, seen = {}, [], set()
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            assert re.fullmatch(r"# HELP [a-z_][a-z0-9_]* [^\\]+", line), line
            described.append(line.split()[2])
        elif line.startswith("# TYPE "):
            kind = "counter" if described[-1].endswith("_total") else "gauge"
            assert line == f"# TYPE {described[-1]} {kind}"
        else:
            label = r'[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?'
            found = re.fullmatch(rf"([a-z_0-9]+){{((?:{label})*)}} (-?[0-9.]+(?:e[+-]?[0-9]+)?)", line)
            assert found and found[1] == described[-1] and found.groups()[:2] not in seen, line
            seen.add(found.groups()[:2])
            samples.setdefault(found[1], float(found[3]))
    assert len(set(described)) == len(described) == len(samples)
    return samples


def test_prometheus_of_a_ready_machine_tells_all(box):
    with held(box.state):
        put(box, record(pool_name='g"p\\u'))
        code, text = status(box, "--prometheus")
    found = measure(text)
    assert code == 0 and '{machine_id="1165a9b6",pool="g\\"p\\\\u"} 1\n' in text
    for name, value in {"up": 1, "ready": 1, "takes_work": 1, "round_trip_seconds": 0.0625, "offered_cpu_cores": 8,
                        "offered_memory_mebibytes": 32094, "offered_gpus": 2, "free_gpus": 1, "lost_gpus": 0,
                        "keepalives_total": 66, "failures_total": 2, "registrations_total": 1, "k3s_usable": 1,
                        "info": 1}.items():
        assert found[f"beta9_agent_{name}"] == value, name
    assert 9 < found["beta9_agent_last_keepalive_seconds"] < 99 and 190 < found["beta9_agent_lease_left_seconds"] < 291
    assert abs(found["beta9_agent_k3s_token_expiry_timestamp_seconds"] - time.time() - 48 * 3600) < 99
    assert 'state="Running"} 1\n' in text and 'state="ImagePullBackOff"} 1\n' in text and 'version="0.3.0"' in text


def test_prometheus_leaves_out_what_is_unknown(box):
    unknown = record(history=[], lease_ends_at=None, last_keepalive_at=None, ready_since=None, k3s={
        "state": "not asked", "notice": "", "worker_count": None, "workers": [], "token_valid_until": None})
    with held(box.state):
        put(box, unknown)
        text = status(box, "--prometheus")[1]
    found = measure(text)
    for name in ("round_trip_seconds", "lease_left_seconds", "last_keepalive_seconds", "workers", "k3s_usable",
                 "k3s_token_expiry_timestamp_seconds"):
        assert f"beta9_agent_{name}" not in found
    assert measure(text)["beta9_agent_up"] == 1 and measure(text)["beta9_agent_ready"] == 0


def test_status_through_a_life_ready_outage_back_killed_stopped(box, gateway, k3s):
    def told(code, words):
        return lambda: (found := status(box)) and found[0] == code and words in found[1] and found[1]

    agent = box.ready(gateway, *k3s.options("--machine-id", ID))
    text = wait(told(0, "ready"), agent.log)
    assert f"pid {agent.pid}" in text and "k3s        usable" in text
    assert status(box, BETA9_TOKEN_FILE="/nowhere/token")[0] == 0, "whatever the settings"
    gateway.stop()
    wait(told(1, "not ready for"), agent.log)
    gateway.start()
    wait(told(0, "ready"), agent.log)
    agent.stop(signal.SIGKILL)
    wait(told(3, "not running"), agent.log)
    agent = box.ready(gateway, *k3s.options("--machine-id", ID))
    wait(told(0, "ready"), agent.log)
    assert agent.stop() == 0
    assert "stopped    " in wait(told(3, "not running"), agent.log)


# ---- --check
def check(box, *options, **environ):
    """Exit code, and what each check found: {check: [(result, text)]}."""
    done = box.run("--check", "--json", *options, **environ)
    assert done.stderr == "" or "waiting until then" in done.stderr, done.stderr
    told, found = json.loads(done.stdout), collections.defaultdict(list)
    for finding in told["findings"]:
        assert set(finding) == {"check", "result", "text"} and finding["result"] in ("ok", "warn", "fail")
        assert finding["text"].isprintable() and SECRET not in finding["text"]
        found[finding["check"]].append((finding["result"], finding["text"]))
    assert list(found) == ["settings", "gateway", "pool", "k3s", "GPUs", "machine"]
    failed = any(mark == "fail" for each in found.values() for mark, _ in each)
    assert told["ok"] is not failed and done.returncode == int(failed)
    return found


def at(gateway):
    return ["--gateway-host", gateway.host, "--gateway-port", gateway.port]


def faults(found):
    """What is to mend, but for what this machine itself lacks."""
    return [(name, text) for name, each in found.items() if name != "machine"
            for mark, text in each if mark == "fail"]


@pytest.fixture
def well(gateway, certificates):
    """A gateway, and a k3s that answers where --hostname leads, with the options for both."""
    gateway.config["database"]["redis"]["addrs"] = [f"127.0.0.1:{gateway.port}"]
    if not os.path.exists(certificates.path("here")):
        certificates.make("here", names="IP:127.0.0.3")
    try:
        socket.create_server(("127.0.0.3", 6443)).close()
    except OSError:
        pytest.skip("port 6443, to which --hostname leads, is taken here, or macOS has no 127.0.0.3")
    with K3s(certificates, "here", host="127.0.0.3", port=6443) as k3s:
        k3s.gateway = gateway
        k3s.all = [*at(gateway), *k3s.options("--hostname", "127.0.0.3")]
        yield k3s


def test_check_of_a_machine_that_can_work_says_so(box, well):
    found = check(box, *well.all)
    assert faults(found) == [] and all(mark != "fail" for mark, _ in found["gateway"])
    for name, words in (("gateway", "answers in"), ("gateway", "token is accepted"), ("gateway", "keepalive route"),
                        ("pool", "external takes machines such as this one"), ("pool", "(database.redis.addrs)"),
                        ("k3s", "accepts the token"), ("k3s", "takes pods"), ("k3s", "127.0.0.3:6443 leads here")):
        assert any(mark == "ok" and words in text for mark, text in found[name]), (words, found[name])
    done = box.run("--check", *well.all)
    lines = done.stdout.splitlines()
    if done.returncode == 0:
        assert lines[-1].startswith("work can run here")
    else:
        assert re.fullmatch(r"\d to mend before work can run here", lines[-1]), "what this machine lacks itself"
    assert max(map(len, lines)) < 80 and all(re.match("[✓!✗] [a-zA-Z3]+ |  {11}|$", line) for line in lines[:-1]), lines
    assert sorted(path.name for path in box.folder.iterdir()) == [], "nothing is left"


def pool(**fields):
    return lambda well: well.gateway.config["worker"]["pools"]["external"].update(fields)


def node(**fields):
    return lambda well: well.nodes.__setitem__(0, K3s.node(**fields))


def once(call, *answer):
    return lambda well: well.gateway.faults[call].append(says(*answer))


def gateway_has(name, value):
    return lambda well: setattr(well.gateway, name, value)


CHECKS = {      # what is done to gateway and k3s, options, the check that has the one fault, its words
    "wrong-token": (None, ["--token", "another-token"], "gateway", "beta9 machine create"),
    "workspace-token": (None, ["--token", "workspace-token"], "gateway", "not a machine's"),
    "gateway-away": (lambda well: well.gateway.stop(), [], "gateway", "refused"),
    "gateway-unhealthy": (gateway_has("health", (500, {"status": "not ok"})), [], "gateway", "database"),
    "login-page": (gateway_has("always", html(403)), [], "gateway", "something in between"),
    "upstream": (once(KEEPALIVE, 404, {"message": "Not Found"}), [], "gateway", "upstream"),
    "public": (None, ["--gateway-host", "203.0.113.7"], "settings", "--allow-cleartext"),
    "no-pool": (lambda well: well.gateway.config["worker"]["pools"].pop("external"), [], "pool", "--pool-name"),
    "local-pool": (pool(mode="local"), [], "pool", "mode local"),
    "other-provider": (pool(provider="ec2"), [], "pool", "--provider-name"),
    "no-config": (gateway_has("config", None), [], "pool", "directRedisHost"),
    "config-refused": (once("config", 500, {"message": "Internal Server Error"}), [], "pool", "500"),
    "large-worker": (pool(pool_sizing={"default_worker_memory": "9999Gi"}), [], "pool", "9999Gi"),
    "small-cap": (None, ["--max-cpu", "0.5"], "pool", "--max-cpu"),
    "redis-away": (lambda well: well.gateway.config["database"]["redis"].update(addrs=["127.0.0.1:9"]), [], "pool",
                   "database.redis.addrs"),
    "k3s-away": (lambda well: well.stop(), [], "k3s", "systemctl status k3s"),
    "k3s-token-refused": (lambda well: well.tokens.clear(), [], "k3s", "refuses the token"),
    "cordoned": (node(unschedulable=True), [], "k3s", "kubectl uncordon"),
    "pods-forbidden": (lambda well: well.forbidden.add("pods"), [], "k3s", "k3s-account"),
    "rules": (lambda well: setattr(well, "RULES", well.RULES[1:]), [], "k3s",
              "may not list jobs, create jobs, delete jobs"),
    "bad-option": (None, ["--max-gpus", "x"], "settings", "--max-gpus"),
}


@pytest.mark.parametrize("name", rows(CHECKS, "wrong-token", "gateway-away", "local-pool", "k3s-token-refused"))
def test_check_one_cause_is_one_fault_with_its_remedy(box, well, name):
    change, options, where, words = CHECKS[name]
    if change:
        change(well)
    found = check(box, *well.all, *options)
    (place, text), = faults(found)
    assert place == where and words in text and re.search("[a-z]: |[.;] |`", text), text
    assert list(box.folder.iterdir()) == [], "nothing is left"


@pytest.mark.parametrize("options, place, words", [
    (["--hostname", "127.0.0.3", "--max-gpus", "x", "--max-cpu", "y"], "settings", ["--max-gpus", "--max-cpu"]),
    ([], "k3s", ["--hostname", "--k3s-token"]),
    (["--hostname", "127.0.0.3", "--k3s-token-file", "/nowhere/token"], "k3s", ["/nowhere/"])],
    ids=["bad-settings", "no-hostname-and-token", "token-file-missing"])
def test_check_several_causes_are_one_fault_each(box, well, options, place, words):
    found = check(box, *at(well.gateway), "--k3s-url", "https://127.0.0.3:6443", *options)
    assert [name for name, _ in faults(found)] == [place] * len(words)
    assert all(any(word in text for _, text in faults(found)) for word in words), faults(found)
    assert place == "k3s" or all("not checked" in found[name][0][1] for name in ("gateway", "pool", "k3s"))


def test_check_without_k3s_ca_file_says_what_was_not_asked_and_sends_no_token(box, well):
    options = [*at(well.gateway), "--k3s-url", "https://127.0.0.3:6443", "--hostname", "127.0.0.3",
               "--k3s-token", K3S_TOKEN]
    found = check(box, *options)
    assert faults(found) == [] and well.seen == []
    assert any(mark == "warn" and "--k3s-ca-file" in text for mark, text in found["k3s"]), found["k3s"]


def test_check_hostname_that_leads_to_another_machine_is_a_fault(box, well, certificates):
    with Server(host="127.0.0.4", port=6443, greet=certificates.server("others")):
        (place, text), = faults(check(box, *well.all, "--hostname", "127.0.0.4"))
    assert place == "k3s" and "127.0.0.4:6443 shows another certificate" in text
    found = check(box, *well.all, "--hostname", "127.0.0.5")
    assert faults(found) == [] and any("127.0.0.5:6443 cannot be reached" in text for _, text in found["k3s"])


@pytest.mark.parametrize("seconds, mark, words", [
    (3599, "warn", "for 59 min"), (47.5 * 3600, "ok", "for 47 h"), (90.5 * 86400, "ok", "for 90 days")])
def test_check_tells_how_long_the_k3s_token_is_valid(box, well, seconds, mark, words):
    token = jwt({"exp": int(time.time() + seconds)})
    well.tokens.add(token)
    found = check(box, *well.all, "--k3s-token", token)
    assert any(result == mark and words in text for result, text in found["k3s"]), found["k3s"]
    assert token not in str(found)


@pytest.mark.parametrize("change, words", [
    (lambda well: well.pods.extend([("worker-1", "Running", "5m"), ("worker-2", "ImagePullBackOff", "6m")]),
     "worker-2 cannot run, ImagePullBackOff"),
    (lambda well: well.forbidden.add("nodes"), "may not read")], ids=["stuck-worker", "node-forbidden"])
def test_check_what_stops_no_work_is_one_warning(box, well, change, words):
    change(well)
    found = check(box, *well.all)
    told, = [text for mark, text in found["k3s"] if mark == "warn"]
    assert words in told and faults(found) == []


def test_check_machine_without_a_default_route_says_so(box):
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("no network namespace to be had")
    done = subprocess.run(["unshare", "-rn", *box.words("--check", "--json", "--gateway-host", "127.0.0.1")],
                          env=box.environ, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout)["findings"]
    assert any(each["check"] == "machine" and "no IPv4 default route" in each["text"] for each in found), found


@pytest.mark.parametrize("fits, words", [
    ({"gpu": "0"}, "device plugin in"), ({"nvidia.com/mig-1g.10gb": "7"}, "MIG_STRATEGY")], ids=["no-plugin", "mig"])
def test_check_k3s_that_has_no_gpus_for_workers(box, well, driver, fits, words):
    driver.say("..")
    well.nodes[0] = K3s.node(**fits)
    (place, text), = faults(check(box, *well.all, **driver.environ))
    assert place == "k3s" and "0 of 2 GPUs" in text and words in text


def test_check_gpus_tells_each_card_by_the_offers_own_judgement(box, well, driver):
    driver.say(".sxuem")
    well.nodes[0] = K3s.node(gpu="6")
    found = check(box, *well.all, **driver.environ)
    cards = {text[0]: (mark, text) for mark, text in found["GPUs"] if text[1] == ":"}
    assert [cards[index][0] for index in "012345"] == ["ok", "ok", "fail", "ok", "fail", "ok"], cards
    assert "NVIDIA Stub 0, free" in cards["0"][1] and "nvidia-smi" in cards["2"][1]


@pytest.mark.slow
@pytest.mark.parametrize("said, words", [
    ({}, "nvidia-ml-py"), ({"init": 9}, "modprobe nvidia"), ({"hang": True}, "does not answer")],
    ids=["no-binding", "no-module", "hangs"])
def test_check_gpus_of_a_driver_that_tells_nothing_is_a_fault(box, well, driver, tmp_path_factory, said, words):
    driver.say("..", **said)
    if not said:
        driver.environ["PYTHONPATH"] = stand_in_package(tmp_path_factory.mktemp("path"), "pynvml", missing("pynvml"))
    (mark, text), *_ = check(box, *well.all, **driver.environ)["GPUs"]
    assert mark == "fail" and words in text


@pytest.mark.slow
@pytest.mark.parametrize("what", ["gateway", "gateway-through-ssh", "k3s", "pool"])
def test_check_ends_within_15_s_whatever_hangs(box, well, request, what):
    options, environ = well.all, {}
    if what.startswith("gateway"):
        well.gateway.always = drips(HEAD + b"Content-Length: 99999\r\n\r\n", b" ")
    if "ssh" in what:
        ssh_host = request.getfixturevalue("ssh_host")
        options, environ = ssh_host.options(*well.all[4:]), ssh_host.environ
    with full_port() as port, Server(host="127.0.0.4", port=6443, greet=SILENT):
        if what == "k3s":
            options = [*options, "--k3s-url", "https://127.0.0.4:6443", "--hostname", "127.0.0.4"]
        if what == "pool":
            well.gateway.config["database"]["redis"]["addrs"] = [f"127.0.0.1:{port}"] * 8
        begin = time.monotonic()
        found = check(box, *options, **environ)
        took = time.monotonic() - begin
    assert took < 20, "15, and what a busy machine takes to start Python"
    assert {name for name, _ in faults(found)} == {what.partition("-")[0]} and found["machine"][0][0] == "ok"


def test_check_with_ssh_goes_through_it_and_leaves_none(box, well, ssh_host):
    found = check(box, *ssh_host.options(*well.all[4:]), **ssh_host.environ)
    assert faults(found) == [] and any("through ssh to" in text for _, text in found["gateway"]), found
    assert ssh_host.clients() == []


@pytest.mark.slow
def test_check_interrupted_ends_at_once_and_leaves_no_ssh_nor_its_children(box, ssh_host, tmp_path_factory):
    mark = tmp_path_factory.mktemp("proxy") / "pid"
    ssh_host.conf.write_text(
        f"Host *\nProxyCommand sh -c 'echo $$ > {mark}.new && mv {mark}.new {mark}; exec sleep 300'\n")
    agent = ssh_host.start("--check")
    wait(mark.exists, agent.log)
    begin = time.monotonic()
    code = agent.stop(signal.SIGINT)
    assert code == 1 and time.monotonic() - begin < 10 and len(agent.lines("")) == 1, agent.log()
    assert "interrupted: nothing was changed" in agent.log()
    wait(lambda: not psutil.pid_exists(int(mark.read_text())) and not ssh_host.clients(), ssh_host.clients)
    assert not box.state.exists()


def test_check_without_packages_says_how_to_get_them(box, well):
    done = box.run("--check", "--json", *well.all, python=["-S"])
    found = json.loads(done.stdout)["findings"]
    assert done.returncode == 1 and done.stderr == ""
    failed = [each["text"] for each in found if each["result"] == "fail"]
    assert "is missing: " in failed[0] and "pip install requests psutil" in failed[0]
    assert {each["check"] for each in found if each["result"] == "fail"} == {"settings"}


def test_check_where_an_agent_runs_shows_its_headline(box, well):
    agent = box.ready(well.gateway, *well.options("--hostname", "127.0.0.3"))
    wait(lambda: box.record().get("ready_since"), agent.log)
    found = check(box, *well.all)
    assert any("an agent runs here: ready" in text for _, text in found["machine"]), found["machine"]


def test_check_in_json_holds_no_token(box, well):
    well.gateway.always = says(500, {"message": f"bad {TOKEN} and {K3S_TOKEN}"})
    done = box.run("--check", *well.all)
    assert leaks(done.stdout + done.stderr, TOKEN, K3S_TOKEN) == [] and "[redacted]" in done.stdout


# ---- --dev
def test_dev_is_ready_without_token_or_network(box):
    agent = box.start(None, "--dev", BETA9_TOKEN=None)
    agent.says("ready after")
    assert agent.stop() == 0 and not box.state.exists()
    done = box.run("--dev", "--once", BETA9_TOKEN=None, BETA9_TLS="1")
    assert done.returncode == 0, done.stderr


# ---- How the program begins and ends
@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_entry_agent_with_closed_streams_keeps_the_machine(box, gateway, closed):
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *box.words(*at(gateway), "--once")],
                          env=box.environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and gateway.ready(), done.stderr
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *box.words("--version")], env=box.environ,
                          capture_output=True, timeout=60)
    assert done.returncode == int(">&-" in closed.split())


OLD_COMMIT = "08895da"      # the last one of 0.2.0
ROOT = os.environ.get("BETA9_TEST_DEBIAN_ROOT", "")
OPTIONS = ["--token", TOKEN, "--machine-id", ID, "--hostname", "127.0.0.1", "--gateway-host", "127.0.0.1"]


# ---- Install: what is printed, as texts
def print_script(*options, program=PROGRAM, stdout=subprocess.PIPE, **variables):
    """A run of --print-install with these options."""
    return subprocess.run([sys.executable, program, "--print-install", *map(str, options)], stdout=stdout, text=True,
                          stderr=subprocess.PIPE, timeout=60,
                          env={"PATH": os.environ["PATH"], "HOME": "/", **variables})


def script_for(*options, **more):
    """What --print-install prints for these options."""
    done = print_script(*options, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def print_file(name):
    words = [sys.executable, PROGRAM, "--print", name]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def settings_in(script):
    """The text of agent.yaml in a script."""
    return re.search(r"cat <<'END'\n(.*?)\nEND\n", script, re.S)[1]


VARIANTS = {"bare": [], "tokens": OPTIONS, "k3s token": [*OPTIONS, "--k3s-token", K3S_TOKEN],
            "install k3s": [*OPTIONS, "--install-k3s"], "ssh": [*OPTIONS, "--ssh", "me@gateway.example.com"]}
# As long as their kinds allow, of what can be given together.
ALL = ["--token", TOKEN * 9, "--machine-id", ID, "--pool-name", "p" * 60, "--provider-name", "q" * 60, "--hostname",
       "h" * 60, "--install-k3s", "--k3s-url", "https://127.0.0.1:16443", "--k3s-ca-file", "ca.crt",
       "--offer-always", "--gateway-host", "g" * 60, "--gateway-port", "11994", "--tls", "--allow-cleartext", "--ssh",
       "me@gateway.example.com:22022", "--max-cpu", "6.5", "--max-memory", "49152Mi", "--max-gpus", "4",
       "--keepalive-interval", "30", "--startup-timeout", "600", "--debug"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
@pytest.mark.parametrize("name", [*VARIANTS, "wrapper", "uninstall", "k3s-token"])
def test_script_passes_shellcheck_and_dash(name):
    text = script_for(*VARIANTS[name]) if name in VARIANTS else print_file(name)
    done = subprocess.run(["shellcheck", "-s", "sh", "-"], input=text, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert subprocess.run(["sh", "-n"], input=text, text=True, timeout=60).returncode == 0


def test_script_with_all_options_fits_into_user_data_as_it_is():
    """Most clouds take 65,536 bytes."""
    script = script_for(*ALL).encode()
    print(f"bytes: {len(script)}")
    assert len(script) < 65_536


def test_script_carries_this_file_and_its_sha256():
    """By the words that it uses itself."""
    script, program = script_for(), pathlib.Path(PROGRAM).read_bytes()
    code, packed = re.search(r"^\$base -I -c '([^']*)'.*?<<'END'\n(.*?)\nEND\n", script,
                             re.M | re.S).groups()
    done = subprocess.run([sys.executable, "-I", "-c", code], input=packed.encode(), capture_output=True, timeout=60)
    assert done.stdout == program and hashlib.sha256(program).hexdigest() in script


def test_script_cut_off_anywhere_runs_nothing():
    """A shell refuses all of it, as its braces are not closed."""
    script = script_for(*OPTIONS)
    begin, end = script.index("{ main()") + 2, len(script) - 2      # without the brace and the line's end
    seed = random.SystemRandom().randrange(10 ** 6)
    print("seed:", seed)
    for size in [begin, *range(end - 9, end + 1), *random.Random(seed).sample(range(begin, end), 20)]:
        done = subprocess.run(["sh", "-n"], input=script[:size], text=True, capture_output=True, timeout=60)
        assert done.returncode != 0, script[max(0, size - 100):size]


def test_script_holds_each_token_once_and_no_other_output_has_one():
    done = print_script("--token", TOKEN, "--k3s-token", K3S_TOKEN)
    assert [done.stdout.count(token) for token in (TOKEN, K3S_TOKEN)] == [1, 1]
    assert not leaks(done.stderr + settings_in(done.stdout), TOKEN, K3S_TOKEN)
    assert "keep it as secret" in done.stderr
    assert "secret" not in print_script().stderr


@pytest.mark.parametrize("options, code", [([], 0), (["--token", TOKEN], 2), (["--k3s-token", K3S_TOKEN], 2)],
                         ids=["without a token", "token", "k3s token"])
def test_script_with_tokens_is_not_printed_onto_a_terminal(options, code):
    near, far = pty.openpty()
    shown = []
    reader = threading.Thread(target=lambda: [shown.append(part) for part in iter(lambda: read_all(near), b"")])
    reader.start()
    done = print_script(*options, stdout=far)
    os.close(far)
    reader.join()
    assert done.returncode == code and (b"main; exit" in b"".join(shown)) is (code == 0)
    assert code == 0 or "into a file or a pipe" in done.stderr and done.stderr.count("\n") == 1


def read_all(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:     # the other end of a terminal is closed
        return b""


ODD_TEXTS = ["ゴリラ 🦍 é", "a'b\"c\\d", "$(id) `id` ${HOME}", "{payload} {token}", "END", "a: b # c", "- yes",
             "%s\\n", "0x10", "null"]


@pytest.mark.slow
@pytest.mark.parametrize("value", ODD_TEXTS)
def test_script_keeps_a_setting_whatever_is_in_it(value):
    text = settings_in(script_for("--pool-name", value))
    assert text.isascii() and yaml.safe_load(text)["pool_name"] == value


def test_script_keeps_each_kind_of_setting_and_no_other():
    settings = yaml.load(settings_in(script_for(*ALL)), yaml.BaseLoader)
    assert settings == {
        "state_dir": "/var/lib/beta9-agent", "token_file": "/etc/beta9-agent/token", "pool_name": "p" * 60,
        "provider_name": "q" * 60, "k3s_url": "https://127.0.0.1:16443", "offer_always": "yes", "max_cpu": "6.5",
        "max_memory": "49152Mi", "max_gpus": "4", "keepalive_interval": "30.0", "startup_timeout": "600.0",
        "debug": "yes",
        "gateway": {"host": "g" * 60, "port": "11994", "tls": "yes", "allow_cleartext": "yes",
                    "ssh": "me@gateway.example.com:22022"}}
    assert yaml.safe_load(settings_in(script_for("--no-tls")))["gateway"] == {"tls": "no"}


def test_script_keeps_the_root_of_k3s_with_a_token_for_it_alone():
    """Else k3s makes the token, and its root certificate comes with that."""
    given = print_script("--k3s-token", K3S_TOKEN, "--k3s-ca-file", "ca.crt")
    left_out = print_script("--k3s-token-file", "/nothing", "--k3s-ca-file", "ca.crt")
    assert yaml.safe_load(settings_in(given.stdout))["k3s_ca_file"] == f"{os.getcwd()}/ca.crt"
    assert "ca.crt" not in settings_in(left_out.stdout) and "are left out" in left_out.stderr


def test_script_keeps_a_token_whatever_is_in_it():
    tokens = ["abcd$e`f(g)h}i{j|k&l;m<n>o*p~!?#", "#ab$(id){token}{payload}"]
    line = re.search("^set -- .*$", script_for("--token", tokens[0], "--k3s-token", tokens[1]), re.M)[0]
    done = subprocess.run(["sh", "-c", f"{line}\nprintf '%s\\n' \"$@\""], text=True,
                          capture_output=True, timeout=60)
    assert done.stdout.splitlines() == tokens


@pytest.mark.parametrize("options, code, words", [
    (["--machine-id", ID], 0, "run it on one machine only"), (["--state-dir", "/x"], 0, "--state-dir is left out"),
    (["--install-k3s"], 0, "as root what https://get.k3s.io"),
    (["--k3s-token", K3S_TOKEN, "--k3s-ca-file", "ca.crt"], 0, f"{os.getcwd()}/ca.crt must be on the machine too"),
    (["--install-k3s", "--k3s-token", K3S_TOKEN], 2, "leave out the one that is given")],
    ids=["id", "state folder", "k3s", "file", "k3s with its token"])
def test_script_is_printed_with_a_warning_of_what_it_holds_or_refused(options, code, words):
    done = print_script(*options)
    assert done.returncode == code and words in done.stderr


def test_script_is_not_printed_by_a_program_that_is_in_no_file(tmp_path):
    """As when it comes through a pipe."""
    done = subprocess.run([sys.executable, "-", "--print-install"], input=pathlib.Path(PROGRAM).read_text(),
                          cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "save it as one" in done.stderr


@pytest.mark.parametrize("name", ["install", "uninstall"])
def test_script_run_by_another_than_root_says_so_in_one_line(name):
    script = script_for() if name == "install" else print_file(name)
    user = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    done = subprocess.run([*user, "sh"], input=script, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "beta9-agent: this must run as root: pipe it into sudo sh\n"


def test_printed_name_that_is_unknown_is_answered_with_all():
    done = subprocess.run([sys.executable, PROGRAM, "--print", "nonsense"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and all(name in done.stderr for name in b9.FILES)


# ---- Install: under a booted systemd
class Machine:
    """A Debian 12 under systemd-nspawn whose network is `lo` alone. What it writes is gone with it."""

    def __init__(self, folder, wheels, user_data=None):
        self.folder, self.servers = folder, contextlib.ExitStack()
        (folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /srv/wheels\n")
        binds = [f"--bind-ro={wheels}:/srv/wheels", f"--bind-ro={folder}/pip.conf:/etc/pip.conf"]
        if user_data is not None:
            (folder / "seed").mkdir()
            (folder / "seed/meta-data").write_text("instance-id: i-1\n")
            (folder / "seed/user-data").write_text(user_data)
            binds.append(f"--bind-ro={folder}/seed:/var/lib/cloud/seed/nocloud")
        with open(folder / "console", "wb") as console:
            self.nspawn = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "systemd-nspawn", "--quiet", "--boot", f"--directory={ROOT}",
                 "--volatile=overlay", "--private-network", "--register=no", "--keep-unit", "--link-journal=no",
                 "--hostname=box", f"--machine=b9-{os.getpid()}-{time.monotonic_ns()}", *binds],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console)

    def find_init(self):
        """Whether its first process runs; then `init` is that."""
        assert self.nspawn.poll() is None, self.console()
        children = psutil.Process(self.nspawn.pid).children()
        self.init = children[0].pid if children else 0
        return children and os.path.exists(f"/proc/{self.init}/root/run/systemd/private")

    def started(self):
        wait(self.find_init, self.console)
        return self

    def booted(self):
        self.started()
        wait(lambda: self.run("systemctl is-system-running").stdout.strip() in ("running", "degraded"), self.console)
        return self

    def console(self):
        return (self.folder / "console").read_text(errors="replace")[-3000:]

    def start(self, command, *variables, **more):
        """A process of the shell in there, as root."""
        return subprocess.Popen(
            ["nsenter", f"--target={self.init}", "--all", "env", "-i", "--chdir=/", "HOME=/root", "PATH=/usr/bin:/bin:"
             "/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin", *variables, "sh", "-c", command], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)

    def run(self, command, *variables, input="", limit=300):
        """What it did, all that it said being `stdout`."""
        with self.start(command, *variables) as process:
            try:
                said = process.communicate(input, timeout=limit)[0]
            finally:
                process.kill()
        return subprocess.CompletedProcess(command, process.returncode, said)

    def says(self, command):
        done = self.run(command)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def script(self, text, *variables):
        """Runs a script from a pipe, as people do."""
        done = self.run("cat >/run/script; sh </run/script", *variables, input=text)
        print(done.stdout)
        return done

    def install(self, *options):
        done = self.script(script_for(*OPTIONS, *options))
        assert done.returncode == 0, done.stdout
        return done

    def uninstall(self):
        return self.script(print_file("uninstall"))

    def path(self, name):
        return pathlib.Path(f"/proc/{self.init}/root{name}")

    def write(self, name, text, mode=0o644):
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(text)
        self.path(name).chmod(mode)

    def serve(self, make):
        """A server in the machine's network: threads keep the network of the thread that starts them."""
        made = []

        def enter():
            with open(f"/proc/{self.init}/ns/net") as network:
                assert ctypes.CDLL(None, use_errno=True).setns(network.fileno(), 0x40000000) == 0
            made.append(make())

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return self.servers.enter_context(made[0])

    def bring_k3s(self, certificates):
        """A k3s: its API, its command, and a unit of its name. Its command's words are in /run/k3s-words."""
        self.write("/etc/ca.pem", pathlib.Path(certificates.path()).read_text())
        self.write("/run/k3s-mints", K3S_TOKEN)
        self.write("/usr/local/bin/k3s", K3S, 0o755)
        self.write("/etc/systemd/system/k3s.service",
                   "[Service]\nType=oneshot\nExecStart=true\nRemainAfterExit=yes\n")
        self.run("systemctl daemon-reload")
        k3s = self.serve(lambda: K3s(certificates, port=6443))
        k3s.nodes = [k3s.node("box")]
        return k3s

    def pid(self):
        return self.says("systemctl show -p MainPID --value beta9-agent")

    def refuses(self, words, script, *variables):
        """It ends with one line that has these words, and what ran before runs on."""
        before = self.left(), self.pid()
        done = self.script(script, *variables)
        last = done.stdout.splitlines()[-1]
        assert done.returncode == 1 and words in done.stdout and "nothing of the agent was changed" in last
        assert (self.left(), self.pid()) == before
        return last

    def status(self):
        return self.run("beta9-agent --status").returncode

    def left(self):
        """All files where the script writes, with what is in them, but for the status that the agent writes."""
        return set(self.says(
            "find /opt /etc /etc/beta9-agent /usr/local /root /run/beta9-k3s /run/systemd/system /var/lib -xdev -type f"
            " ! -name '*.status.json' -exec sha256sum {} + 2>/dev/null |"
            " grep -v ' /var/lib/systemd/\\| /etc/.*-$\\|/etc/sub[ug]id' || :"
        ).splitlines())

    def close(self):
        self.servers.close()
        for process in [*psutil.Process(self.nspawn.pid).children(), self.nspawn]:
            process.kill()
        self.nspawn.wait()


K3S = """#!/bin/sh
echo "$*" >>/run/k3s-words
[ ! -e /run/k3s-away ] || { echo 'The connection to the server 127.0.0.1:6443 was refused' >&2; exit 1; }
case "$*" in
*cluster.server*) echo "https://127.0.0.1:6443 $(base64 -w 0 /etc/ca.pem)" ;; # of 0.2.0
*expirationTimestamp*) echo "$(cat /run/k3s-mints) 2040-01-01T00:00:00Z" ;; # likewise
*'config view'*) base64 -w 0 /etc/ca.pem ;;
*'create token'*) cat /run/k3s-mints ;;
esac
"""
systemd = pytest.mark.systemd


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """A folder with the packages that the script asks for, for the machine's Python."""
    if not (ROOT and os.geteuid() == 0 and shutil.which("systemd-nspawn")):
        pytest.skip("needs root, systemd-nspawn, and BETA9_TEST_DEBIAN_ROOT")
    folder = os.environ.get("BETA9_TEST_WHEELS") or tmp_path_factory.mktemp("wheels")
    if not os.listdir(folder):
        names = re.search("^ +(requests==.*)$", script_for(), re.M)[1].split()
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                        "--python-version=3.11", "-d", folder, *names], check=True, timeout=300)
    return folder


@pytest.fixture
def machine(tmp_path, wheels):
    with contextlib.closing(Machine(tmp_path, wheels)) as one:
        yield one.booted()


@pytest.fixture
def with_k3s(machine, certificates):
    """A machine with a gateway and a k3s, before the agent is installed."""
    machine.gateway, machine.k3s = machine.serve(lambda: Gateway(port=1994)), machine.bring_k3s(certificates)
    return machine


@pytest.fixture
def joined(machine):
    """A machine where the agent is installed, and its gateway; there is no k3s."""
    machine.gateway = machine.serve(lambda: Gateway(port=1994))
    machine.install()
    return machine


@systemd
def test_systemd_fresh_machine_is_joined_by_a_service_that_is_small_confined_and_valid(machine):
    gateway = machine.serve(lambda: Gateway(port=1994))
    began = time.monotonic()
    done = machine.install()
    print(f"seconds from the script's start to its end: {time.monotonic() - began:.1f}")
    assert "takes no work" in done.stdout and "joined" in done.stdout.splitlines()[-1]
    assert gateway.calls(KEEPALIVE) and gateway.calls(REGISTER)[-1].json["cpu"] == "0m"
    assert machine.says("systemctl is-enabled beta9-agent") == "enabled"
    assert machine.says("stat -c '%a %U %G' /etc/beta9-agent/token /etc/beta9-agent /opt/beta9-agent").splitlines() == [
        "640 root beta9-agent", "755 root root", "755 root root"]
    assert not machine.run("ls /opt /etc/beta9-agent /etc/systemd/system | grep -E 'new|old|try'").stdout
    assert machine.says("/opt/beta9-agent/venv/bin/python -I -v -c 'import beta9_agent' 2>&1 |"
                        " grep 'matches /opt/beta9-agent/beta9_agent.py'"), "the kept bytecode is used"
    assert machine.says("beta9-agent --version").split()[:2] == ["beta9-agent", "0.3.0"]

    said = machine.says("systemd-analyze security beta9-agent | tail -n 1; systemd-analyze security beta9-k3s-token"
                        " | tail -n 1; systemd-analyze verify beta9-agent.service beta9-k3s-token.service"
                        " beta9-k3s-token.timer 2>&1 | grep beta9 || :")
    floor = machine.says("runuser -u beta9-agent -- /opt/beta9-agent/venv/bin/python -I -c \""
                         "import requests, psutil, pynvml, yaml, logging, argparse, ssl, ipaddress, urllib.parse;"
                         "print(open('/proc/self/smaps_rollup').read())\"")
    kept = machine.path(f"/proc/{machine.pid()}/smaps_rollup").read_text()
    size, least = (int(re.search(r"Rss:\s*(\d+)", text)[1]) for text in (kept, floor))
    print(said, f"resident: {size} kB, of an interpreter that imports the same packages: {least} kB")
    assert float(re.search("beta9-agent.service: ([0-9.]+)", said)[1]) <= 2.5
    assert len(said.splitlines()) == 2, "verify has nothing to say"
    assert size <= 1.10 * least


@systemd
def test_systemd_wrapper_run_by_root_goes_on_as_the_user_of_the_service(joined):
    joined.write("/run/who.py", "import os, pwd; print(pwd.getpwuid(os.getuid()).pw_name, os.environ['HOME'],"
                 " os.getgroups(), os.environ.get('BETA9_POOL_NAME'))")
    joined.run("sed -i 's,-m beta9_agent,/run/who.py,' /usr/local/bin/beta9-agent")
    group = joined.says("id -g beta9-agent")
    expected = f"beta9-agent /var/lib/beta9-agent [{group}] None"
    assert joined.says("BETA9_POOL_NAME=x beta9-agent --check") == expected
    assert joined.says("cd /usr/local/bin; BETA9_POOL_NAME=x sh beta9-agent") == expected


@systemd
def test_systemd_k3s_that_is_there_makes_a_token_and_work_can_run(with_k3s):
    machine, gateway, k3s = with_k3s, with_k3s.gateway, with_k3s.k3s
    began = time.monotonic()
    done = machine.install()
    print(f"seconds from the script's start until work can run: {time.monotonic() - began:.1f}")
    assert "ready for work" in done.stdout.splitlines()[-1] and gateway.calls(REGISTER)[-1].json["cpu"] != "0m"
    assert gateway.calls(REGISTER)[-1].json["token"] == K3S_TOKEN
    assert machine.says("stat -c '%a %U %G' /run/beta9-k3s/token") == "640 root beta9-agent"
    assert "-n default create token beta9-gateway --duration=48h" in machine.says("cat /run/k3s-words")
    assert "beta9-gateway" in machine.says("cat /var/lib/rancher/k3s/server/manifests/beta9-agent.yaml")

    k3s.tokens = {"Ks-another-one-0123"}
    wait(lambda: machine.status() == 1, "the token is refused")
    machine.write("/run/k3s-mints", "Ks-another-one-0123")
    machine.says("systemctl start beta9-k3s-token")
    wait(lambda: gateway.calls(REGISTER)[-1].json["token"] == "Ks-another-one-0123", "the new token is registered")
    wait(lambda: machine.status() == 0, "work can run again")


@systemd
def test_systemd_k3s_that_comes_later_is_used_by_itself(joined, certificates):
    assert joined.status() == 1
    joined.bring_k3s(certificates)
    joined.run("mv /run/k3s-mints /run/k3s-mints.later")     # its account is not applied yet
    joined.says("systemctl start k3s")
    wait(lambda: "create token" in joined.run("cat /run/k3s-words").stdout, "a token is asked for")
    joined.run("mv /run/k3s-mints.later /run/k3s-mints")
    wait(lambda: joined.status() == 0, "work can run")


@systemd
def test_systemd_upgrade_by_the_service_s_own_settings_keeps_them_and_has_k3s_make_the_token(with_k3s):
    with_k3s.install("--max-cpu", "1.5")
    settings = with_k3s.says("cat /etc/beta9-agent/agent.yaml")
    done = with_k3s.script(with_k3s.says("beta9-agent --print-install 2>/dev/null") + "\n")
    assert done.returncode == 0 and "ready for work" in done.stdout.splitlines()[-1]
    assert with_k3s.says("cat /etc/beta9-agent/agent.yaml") == settings
    assert with_k3s.says("systemctl is-active beta9-k3s-token.timer") == "active"
    assert with_k3s.says("ls /etc/beta9-agent") == "agent.yaml\ntoken"


@systemd
def test_systemd_upgrade_of_what_0_2_0_installed_leaves_nothing_of_it(with_k3s, tmp_path):
    old = subprocess.run(["git", "-C", HERE, "show", f"{OLD_COMMIT}:beta9_agent.py"], capture_output=True)
    if old.returncode:
        pytest.skip("the history has no 0.2.0")
    (tmp_path / "old.py").write_bytes(old.stdout)
    machine, gateway = with_k3s, with_k3s.gateway
    before = script_for("--token", TOKEN, "--hostname", "127.0.0.1", "--gateway-host", "127.0.0.1", "--k3s", "use",
                        "--debug", program=tmp_path / "old.py")
    machine.write("/var/lib/cloud/script", before)      # where it waits for nothing
    for _ in range(2):                                  # with its .old files
        machine.says("sh /var/lib/cloud/script")
    wait(lambda: machine.path("/run/beta9-k3s/gateway-token").exists(), "0.2.0's token")
    wait(gateway.ready, "0.2.0 is ready")
    machine_id = machine.says("cat /var/lib/beta9-agent/machine-id").split()[0]
    assert machine.run("find /etc /opt/beta9-agent -name '*.old'").stdout

    done = machine.script(script_for("--hostname", "127.0.0.1", "--gateway-host", "127.0.0.1"))
    assert done.returncode == 0 and "ready for" in done.stdout
    last = gateway.calls(REGISTER)[-1].json
    assert (last["machine_id"], last["token"]) == (machine_id, K3S_TOKEN) and last["cpu"] != "0m"
    assert not machine.run("find /etc /opt /usr/local /var/lib/rancher -name '*.old' -o -name '*.new'").stdout
    assert sorted(os.listdir(machine.path("/run/beta9-k3s"))) == ["ca.crt", "token"]
    assert sorted(os.listdir(machine.path("/etc/beta9-agent"))) == ["agent.yaml", "token"]
    assert "debug" not in machine.says("cat /etc/beta9-agent/agent.yaml")
    assert "12h" in machine.says("systemctl cat beta9-k3s-token.timer")
    assert "name: beta9-agent" not in machine.says("cat /var/lib/rancher/k3s/server/manifests/beta9-agent.yaml")


@systemd
def test_systemd_script_that_is_refused_or_fails_changes_nothing(joined, certificates):
    joined.write(certificates.path(), pathlib.Path(certificates.path()).read_text())
    plain = script_for(*OPTIONS[2:])
    hidden_file = script_for(*OPTIONS[2:], "--ca-file", certificates.path())    # by the sandbox
    no_package = script_for(*OPTIONS, "--pool-name", "other").replace("    requests==", "    six requests==", 1)
    for words, script, *variables in (
            ("--ca-file: the value", hidden_file), ("--machine-id: the value '12'", plain, "BETA9_MACHINE_ID=12"),
            ("is not a YAML", plain, "BETA9_HOSTNAME=a'$(id)\"\n"), ("--token-file", plain, "BETA9_TOKEN=short"),
            ("cannot stat '/nothing'", plain, "BETA9_TOKEN_FILE=/nothing"),
            ("by pip: ERROR", no_package, "PIP_CONFIG_FILE=/dev/null")):
        assert "short" not in joined.refuses(words, script, *variables)


@systemd
@pytest.mark.parametrize("place, size, room", [("/opt", "150m", 0), ("/opt", "150m", 32 << 20),
                                               ("/etc", "9m", 0)], ids=["opt", "opt, later", "etc"])
def test_systemd_disk_that_is_full_changes_nothing(machine, place, size, room):
    machine.gateway = machine.serve(lambda: Gateway(port=1994))
    machine.says(f"cp -a {place} /run/copy; mount -t tmpfs -o size={size},mode=755 tmpfs {place};"
                 f" cp -a /run/copy/. {place}")
    machine.install()
    machine.run(f"head -c {room} /dev/zero >{place}/room; cat /dev/zero >{place}/full; rm {place}/room")
    assert "No space left" in machine.refuses("", script_for(*OPTIONS, "--pool-name", "other"))
    machine.run(f"rm {place}/full")
    assert machine.script(script_for(*OPTIONS)).returncode == 0


@systemd
def test_systemd_gateway_that_is_away_is_told_and_joined_when_it_is_back(machine):
    """And an uninstall where k3s never was leaves no failed unit and no empty folder of k3s."""
    done = machine.script(script_for(*OPTIONS))
    assert done.returncode == 3 and "not ready yet" in done.stdout and "refused" in done.stdout
    assert "it goes on trying" in done.stdout.splitlines()[-1]
    gateway = machine.serve(lambda: Gateway(port=1994))
    wait(gateway.ready, "the machine is ready")

    assert machine.path("/var/lib/rancher").exists()
    assert machine.uninstall().returncode == 0 and not machine.path("/var/lib/rancher").exists()
    assert "beta9" not in machine.says("systemctl --failed --all --plain --no-legend")


@systemd
def test_systemd_signal_while_files_are_moved_is_ignored(joined):
    joined.write("/usr/local/sbin/mv", '#!/bin/sh\nkill -TERM $PPID\nexec /usr/bin/mv "$@"\n', 0o755)
    joined.gateway.pool = "other"
    done = joined.script(script_for(*OPTIONS, "--pool-name", "other"))
    assert "waiting a minute" in done.stdout and "signal" not in done.stdout
    assert "other" in joined.says("cat /etc/beta9-agent/agent.yaml")


@systemd
@pytest.mark.slow
def test_systemd_script_interrupted_at_any_moment_leaves_old_or_new_and_never_a_mix(joined, tmp_path):
    """Each script has a pool of its own, in its settings and in the last line of its program."""
    seed = random.SystemRandom().randrange(10 ** 6)
    print("seed:", seed)
    dice, last = random.Random(seed), "external"
    for number in range(10):
        pool, name, moment = f"pool-{number}", dice.choice(["TERM", "INT", "HUP", "KILL"]), dice.uniform(0, 2.5)
        (tmp_path / "program.py").write_text(f"{pathlib.Path(PROGRAM).read_text()}# {pool}\n")
        joined.write("/run/script", script_for(*OPTIONS, "--pool-name", pool, program=tmp_path / "program.py"))
        with joined.start("echo $$ >/run/pid; exec sh /run/script") as process:
            wait(lambda: joined.path("/run/pid").exists(), "it runs")
            time.sleep(moment)
            joined.run(f"kill -{name} $(cat /run/pid); rm /run/pid")
            said = process.communicate(timeout=120)[0]
        joined.run("flock /run/beta9-agent.lock true")      # which its children have
        print(f"{moment:.2f} s, {name}: {process.returncode}, {said.splitlines()[-1:]}")
        found = yaml.safe_load(joined.path("/etc/beta9-agent/agent.yaml").read_text()).get("pool_name", "external")
        assert found in (last, pool)
        if name != "KILL":      # which can come between two moves; then the next run mends it
            program = joined.path("/opt/beta9-agent/beta9_agent.py").read_text().splitlines()[-1]
            assert program == f"# {found}" or found == "external"
            assert process.returncode == 3 or found == last and "nothing of the agent was changed" in said
            assert not joined.run("find /opt /etc /usr/local -name '*.new' -o -name 'beta9*.old'").stdout
        last = found
        assert joined.run("systemctl is-active beta9-agent").stdout.strip() in ("active", "activating")
    joined.install()
    assert not joined.run("find /opt /etc /usr/local -name '*.new' -o -name 'beta9*.old'").stdout


@systemd
def test_systemd_uninstall_leaves_nothing_and_may_be_run_twice(with_k3s):
    machine = with_k3s
    before = machine.left()
    machine.install()
    assert machine.left() != before
    machine.write("/run/k3s-away", "")
    done = machine.run("beta9-agent --print uninstall | sudo sh")
    assert done.returncode == 1 and "its tokens stay valid" in done.stdout
    assert "beta9-gateway" in machine.says("cat /var/lib/rancher/k3s/server/manifests/beta9-agent.yaml.old")
    machine.says("rm /run/k3s-away /run/k3s-words")
    done = machine.uninstall()
    assert done.returncode == 0 and "gone" in done.stdout and machine.left() == before
    assert machine.run("id beta9-agent").returncode and not machine.path("/run/beta9-k3s").exists()
    assert "delete --ignore-not-found" in machine.says("cat /run/k3s-words")
    assert machine.uninstall().returncode == 0


@systemd
@pytest.mark.slow
def test_systemd_uninstall_interrupted_at_any_moment_is_finished_by_the_next(with_k3s):
    machine, before = with_k3s, with_k3s.left()
    seed = random.SystemRandom().randrange(10 ** 6)
    print("seed:", seed)
    for moment in [random.Random(seed + number).uniform(0, 1.5) for number in range(4)]:
        machine.install()
        machine.run("rm -f /run/k3s-words")
        machine.write("/run/script", print_file("uninstall"))
        machine.run(f"timeout -s KILL {moment:.2f} sh /run/script")
        machine.run("flock /run/beta9-agent.lock true")
        assert machine.uninstall().returncode == 0
        assert machine.left() == before and "delete" in machine.says("cat /run/k3s-words")


@systemd
def test_systemd_tokens_come_from_variables_files_or_the_last_time(machine):
    gateway = machine.serve(lambda: Gateway(port=1994))
    script = script_for(*OPTIONS[2:])
    done = machine.script(script)
    assert done.returncode == 1 and "the machine token is missing" in done.stdout.splitlines()[-1]
    machine.write("/root/token", f"{TOKEN}\r\n")
    machine.write("/root/k3s", K3S_TOKEN)
    assert machine.script(script, "BETA9_TOKEN_FILE=/root/token", "BETA9_TOKEN=not-this-one",
                          "BETA9_K3S_TOKEN_FILE=/root/k3s", "token=x", "BETA9_HOSTNAME=10.1.2.3").returncode == 0
    last = gateway.calls(REGISTER)[-1]
    assert (last.bearer, last.json["token"], last.json["hostname"]) == (TOKEN, K3S_TOKEN, "10.1.2.3")
    count = len(gateway.seen)
    done = machine.script(script)                       # both from before
    assert done.returncode == 0 and "uses the k3s token in" in done.stdout
    last = gateway.calls(REGISTER)[-1]
    assert len(gateway.seen) > count and (last.bearer, last.json["token"]) == (TOKEN, K3S_TOKEN)
    assert not machine.path("/etc/systemd/system/beta9-k3s-token.timer").exists()
    machine.says("rm /etc/beta9-agent/k3s-token")
    assert machine.script(script).returncode == 0 and gateway.calls(REGISTER)[-1].json["token"] == ""
    assert machine.path("/etc/systemd/system/beta9-k3s-token.timer").exists()


@systemd
def test_systemd_k3s_token_that_is_given_revokes_those_that_k3s_made(with_k3s):
    machine, gateway = with_k3s, with_k3s.gateway
    machine.install()
    machine.install("--k3s-token", "Ks-another-one-0123")
    assert gateway.calls(REGISTER)[-1].json["token"] == "Ks-another-one-0123"
    assert not machine.says("cat /var/lib/rancher/k3s/server/manifests/beta9-agent.yaml"), "k3s deletes the account"
    assert not machine.run("find /etc/systemd /run/beta9-k3s -name '*k3s*token*' 2>/dev/null").stdout


@systemd
def test_systemd_ssh_without_a_key_is_told_how_to_get_one(machine):
    done = machine.script(script_for(*OPTIONS, "--ssh", "me@127.0.0.1"))
    assert done.returncode == 3 and "ssh ssh://me@127.0.0.1 exit" in done.stdout
    machine.says(re.search("sudo (runuser .* ssh-keygen .*)", done.stdout)[1])
    assert machine.says("cd /var/lib/beta9-agent; stat -c '%a %U' .ssh .ssh/id_ed25519").splitlines() == [
        "700 beta9-agent", "600 beta9-agent"]


@systemd
def test_systemd_apt_whose_lock_another_holds_is_waited_for(machine):
    """apt-get is a stub: its first and fourth calls find a lock taken, then it brings what was missing."""
    machine.serve(lambda: Gateway(port=1994))
    machine.write("/usr/local/sbin/apt-get", """#!/bin/sh
echo "$*" >>/run/apt
case $(wc -l </run/apt) in
1) echo 'E: Could not get lock /var/lib/apt/lists/lock. It is held by process 9' >&2; exit 100 ;;
2) echo 'E: Unable to locate package python3-venv' >&2; exit 100 ;;
4) echo 'E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 9' >&2; exit 100 ;;
6) mv /root/ensurepip /usr/lib/python3.11 ;;
esac
""", 0o755)
    machine.says("mv /usr/lib/python3.11/ensurepip /root")
    machine.install()
    assert machine.says("cat /run/apt").splitlines() == ["-qq update", "-qq -y --no-remove install python3-venv"] * 3


@systemd
def test_systemd_install_k3s_brings_k3s_the_toolkit_and_the_plugin_once(with_k3s):
    """curl and apt-get are stubs; the installer that curl brings says what it was given, and brings the stub of k3s."""
    machine = with_k3s
    machine.says("mv /usr/local/bin/k3s /root/k3s; mv /etc/systemd/system/k3s.service /root; systemctl daemon-reload;"
                 " touch /dev/nvidiactl")
    machine.write("/root/installer", """set -eu
echo "$*" >/run/installer-words
env >/run/installer-variables
mv /root/k3s /usr/local/bin; mv /root/k3s.service /etc/systemd/system
systemctl daemon-reload; systemctl enable --now k3s
""")
    machine.write("/usr/local/sbin/curl", """#!/bin/sh
echo "$*" >>/run/curl
eval "last=\\${$#}"
cp /root/installer "$last"
""", 0o755)
    machine.write("/usr/local/sbin/apt-get", """#!/bin/sh
echo "$*" >>/run/apt
case $* in *toolkit) touch /usr/bin/nvidia-container-runtime ;; esac
""", 0o755)
    script = script_for(*OPTIONS, "--install-k3s")
    done = machine.script(script, "INSTALL_K3S_VERSION=v1.2.3", "K3S_URL=https://other", "K3S_TOKEN=other",
                          f"BETA9_TOKEN={TOKEN}", "token=x", "k3s_token=x", "value=x")
    assert done.returncode == 0 and "ready for" in done.stdout
    installer = machine.path("/root/installer").read_bytes()
    assert hashlib.sha256(installer).hexdigest() in done.stdout
    assert machine.says("cat /run/installer-words") == (
        "--disable traefik --disable servicelb --default-runtime nvidia")
    variables = machine.says("cat /run/installer-variables")
    assert "INSTALL_K3S_VERSION=v1.2.3" in variables and "other" not in variables and TOKEN not in variables
    assert all("--proto =https" in line and "https://" in line for line in machine.says("cat /run/curl").splitlines())
    assert "nvidia-container-toolkit" in machine.says("cat /run/apt")
    plugin = machine.path("/var/lib/rancher/k3s/server/manifests/nvidia-device-plugin.yaml")
    assert plugin.read_text() == print_file("k3s-device-plugin")
    count = len(machine.says("cat /run/curl /run/apt"))
    assert machine.script(script).returncode == 0
    assert len(machine.says("cat /run/curl /run/apt")) == count
    assert machine.uninstall().returncode == 0 and plugin.exists()


@systemd
def test_systemd_script_as_user_data_of_cloud_init_is_ready_when_the_boot_is_over(tmp_path, wheels):
    """It must not wait for the end of the boot, which waits for it."""
    with contextlib.closing(Machine(tmp_path, wheels, user_data=script_for(*OPTIONS))) as machine:
        gateway = machine.started().serve(lambda: Gateway(port=1994))
        machine.booted()
        said = machine.says("cloud-init status --wait --long; cat /var/log/cloud-init-output.log")
        assert "it starts after the boot" in said, said
        wait(gateway.ready, lambda: machine.run("journalctl -u beta9-agent").stdout)
        assert machine.status() == 1


# ---- Install: the account and its token, on a real Kubernetes API
@pytest.fixture
def kube_k3s(tmp_path):
    """A command k3s whose kubectl asks the API that BETA9_TEST_KUBE_HOME names; the folder where it is."""
    home = os.environ.get("BETA9_TEST_KUBE_HOME")
    assert home, "start an API with ../shared/tools/kube.sh up, and name its KUBE_HOME in BETA9_TEST_KUBE_HOME"
    (tmp_path / "k3s").write_text(f'#!/bin/sh\nshift\nexec {home}/bin/kubectl --kubeconfig {home}/k3s.yaml "$@"\n')
    (tmp_path / "k3s").chmod(0o755)
    (tmp_path / "account.yaml").write_text(print_file("k3s-account"))
    return tmp_path


def kubectl(folder, *words, code=0, input=None):
    done = subprocess.run([folder / "k3s", "kubectl", *words], input=input, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.k3s
def test_kube_token_that_the_script_makes_may_do_what_it_must_for_two_days_until_the_account_goes(kube_k3s):
    kubectl(kube_k3s, "apply", "-f", kube_k3s / "account.yaml")
    script = print_file("k3s-token").replace("/run/beta9-k3s", str(kube_k3s))
    environ = {"PATH": f"{kube_k3s}:{os.environ['PATH']}"}
    subprocess.run(["sh"], input=script, text=True, check=True, timeout=60, env=environ)
    token = (kube_k3s / "token").read_text()
    claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    assert claims["exp"] - claims["iat"] == 48 * 3600
    pki = pathlib.Path(os.environ["BETA9_TEST_KUBE_HOME"]) / "pki/server-ca.crt"
    assert (kube_k3s / "ca.crt").read_text() == pki.read_text()

    server = kubectl(kube_k3s, "config", "view", "-o", "jsonpath={.clusters[0].cluster.server}")
    as_gateway = [pki.parent.parent / "bin/kubectl", "--kubeconfig=/dev/null", f"--server={server}", f"--token={token}",
                  f"--certificate-authority={kube_k3s}/ca.crt"]

    def may(*words):
        done = subprocess.run([*as_gateway, "auth", "can-i", *words], capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    for words in ("list jobs", "create jobs", "delete jobs", "list pods", "list nodes", "get nodes/x"):
        assert may(*words.split()) == "yes", words
    for words in ("get secrets", "create pods", "list jobs -n kube-system", "delete nodes", "create tokenreviews"):
        assert may(*words.split()) == "no", words

    kubectl(kube_k3s, "delete", "--ignore-not-found", "--request-timeout=10s", "-f", kube_k3s / "account.yaml")
    wait(lambda: "Unauthorized" in subprocess.run([*as_gateway, "get", "nodes"], capture_output=True, text=True,
                                                  timeout=60).stderr, "the token is refused")
    assert subprocess.run(["sh"], input=script, text=True, timeout=60, env=environ).returncode == 1
    assert (kube_k3s / "token").read_text() == token, "what fails leaves what is there"


@pytest.mark.k3s
def test_kube_node_and_account_decide_what_is_offered(kube_k3s, box, gateway):
    """With the account and the token that the script makes; there is no kubelet, so the node is kept alive here."""
    node = socket.gethostname().lower()
    kubectl(kube_k3s, "apply", "-f", kube_k3s / "account.yaml")
    subprocess.run(["sh"], input=print_file("k3s-token").replace("/run/beta9-k3s", str(kube_k3s)), text=True,
                   check=True, timeout=60, env={"PATH": f"{kube_k3s}:{os.environ['PATH']}"})
    server = kubectl(kube_k3s, "config", "view", "-o", "jsonpath={.clusters[0].cluster.server}")
    status = {"allocatable": {"cpu": "1500m", "memory": "700Mi"}, "capacity": {"cpu": "2", "memory": "1Gi"},
              "conditions": [{"type": "Ready", "status": "True", "reason": "Stub"}]}

    def offered():
        kubectl(kube_k3s, "patch", "node", node, "--subresource=status", "-p", json.dumps({"status": status}))
        return gateway.calls(REGISTER)[-1].json["cpu"]

    kubectl(kube_k3s, "delete", "node", "--all")
    agent = box.ready(gateway, "--k3s-url", server, "--k3s-ca-file", kube_k3s / "ca.crt", "--k3s-token-file",
                      kube_k3s / "token")
    agent.says("k3s has no node")
    kubectl(kube_k3s, "create", "-f", "-", input=json.dumps(
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}))
    wait(lambda: offered() == "1500m", agent.log)
    assert gateway.calls(REGISTER)[-1].json["memory"] == "700Mi"
    kubectl(kube_k3s, "cordon", node)
    wait(lambda: offered() == "0m", agent.log)
    agent.says(f"kubectl uncordon {node}")
    kubectl(kube_k3s, "uncordon", node)
    wait(lambda: offered() == "1500m", agent.log)
    kubectl(kube_k3s, "delete", "-f", kube_k3s / "account.yaml")
    wait(lambda: offered() == "0m", agent.log)
    agent.says("k3s refuses the token")
