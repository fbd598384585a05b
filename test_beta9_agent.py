"""Tests of beta9_agent.py: first what is shared, then the program as others see it, then its functions, room by room.

The first kind starts the program as a process and looks at its sockets, signals, files, output and exit codes alone.
BETA9_TEST_PROGRAM names another file to test than the one beside this.
"""
from __future__ import annotations

import base64
import collections
import contextlib
import datetime
import gzip
import http.client
import json
import os
import pathlib
import pwd
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.parse

import psutil
import pytest


# ---- What is shared: the program as a process
HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = os.path.abspath(os.environ.get("BETA9_TEST_PROGRAM") or HERE / "beta9_agent.py")
PROGRAM_FOLDER = os.path.dirname(PROGRAM)
TOKEN, K3S_TOKEN, SECRET = "Mt0123456789+bcd/fghi", "Ks9876543210zyxwvuts", "Cs5432109876mnopqrst"
ID = "1165a9b6"
REGISTER, KEEPALIVE = "register", "keepalive"
SILENT, NOBODY = "silent", "nobody"


@pytest.fixture(scope="session", autouse=True)
def hangup_is_not_ignored():
    """Else the processes started here inherit it from a nohup around pytest."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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


def leaks(text, *secrets):
    """The secrets that stand in a text: as they are, URL-encoded or in base64."""
    forms = [form for secret in secrets for form in (
        secret, urllib.parse.quote(secret, ""), base64.b64encode(secret.encode()).decode())]
    return [form for form in forms if form in text]


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

    def stop(self, number=signal.SIGTERM):
        """The exit code after a signal."""
        self.send_signal(number)
        return self.wait(60)

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
        """The program with a short interval; `server` is its gateway, a port, or None where options name it.

        A variable that is None is not set.
        """
        host, port = (server.host, server.port) if isinstance(server, Server) else ("127.0.0.1", server)
        there = ["--gateway-host", host, "--gateway-port", port] if port else []
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


@pytest.fixture
def another_box(tmp_path_factory):
    with contextlib.closing(Box(tmp_path_factory.mktemp("another"))) as one:
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


def follows(data):
    """A fault: these bytes, then the answer."""
    def fault(link):
        link.sock.sendall(data + link.answer())
        return True
    return fault


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

    def registered(self, key, after=0):
        """A field of all registrations, from the request of that number on."""
        return [link.json[key] for link in self.seen[after:] if link.call == REGISTER]

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
        """For the agent."""
        return ["--k3s-token", K3S_TOKEN, "--k3s-url", f"https://{self.host}:{self.port}", "--hostname", "box",
                "--k3s-ca-file", self.certificates.path(), *more]

    def looks(self):
        """How often it was asked for the worker pods."""
        return len(self.calls("pods"))

    def looked(self, count=1):
        """Waits for so many more looks."""
        end = self.looks() + count
        wait(lambda: self.looks() >= end, lambda: [(link.method, link.target) for link in self.seen[-9:]])

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
        name = link.path.removeprefix("/api/v1/nodes/")
        found = [node for node in self.nodes if node["metadata"]["name"] == name]
        return (200, found[0]) if found else status_of_k3s(404, f'"{name}" not found')

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
   whether it does; GPUS has a letter for each card, or is - for none: . free, b busy, x lost, l lost after its handle,
   ? processes not supported, m MIG with two free devices, M with a busy one, s without persistence mode,
   u neither memory nor persistence mode supported, r needs a reset, e unknown error from all but the name. */
static __thread int init_code, hang; static __thread char gpus[65];
static void look(void) {
    FILE *file = fopen(getenv("NVML_STUB"), "r");
    init_code = hang = 0; gpus[0] = 0;
    if (file) { if (fscanf(file, "%d %d %64[.bxl?mMsure]", &init_code, &hang, gpus) < 3) gpus[0] = 0; fclose(file); }
}
static char kind(void *device) {
    look();
    return gpus[((long)device - 1) % 1000];
}
static int fault(void *device) {        /* of any call on this card */
    char c = kind(device);
    return c == 'l' ? 15 : c == 'r' ? 16 : c == 'e' ? 999 : 0;
}
static int is_mig_device(void *device) { return (long)device >= 1000; }
int nvmlInitWithFlags(unsigned flags) { do look(); while (hang && !usleep(20000)); return init_code; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "stub error"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "550.1", size); return 0; }
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
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned size) {
    snprintf(uuid, size, "GPU-%ld", (long)device - 1);
    return fault(device);
}
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
    memory[0] = 80ULL << 30;
    memory[1] = memory[0];
    memory[2] = 0;
    return kind(device) == 'u' ? 3 : fault(device);
}
int nvmlDeviceGetPersistenceMode(void *device, unsigned *mode) {
    char c = kind(device);
    *mode = c != 's';
    return c == 'u' ? 3 : fault(device);
}
int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    char c = kind(device);
    *current = *pending = c == 'm' || c == 'M';
    return fault(device);
}
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) { *count = 7; return fault(device); }
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **mig) {
    *mig = (void *)((long)device + 1000 * (index + 1));
    return index < 2 ? 0 : 6;
}
static int processes_of(void *device, unsigned *count, void *processes) {
    char c = kind(device);
    int busy = c == 'b' || (c == 'M' && (long)device >= 2000);
    if (c == '?') return 3;
    if ((c == 'm' || c == 'M') && !is_mig_device(device)) return 4;
    if (fault(device)) return fault(device);
    if (!busy) { *count = 0; return 0; }
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
        return self.box.start(None, *self.options(*more), **{**self.environ, **environ})

    def ready(self, *more, **environ):
        after, agent = len(self.gateway.seen), self.start(*more, **environ)
        wait(lambda: self.gateway.ready(after) or agent.poll() is not None, agent.log)
        assert agent.poll() is None, agent.log()
        return agent

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


def test_life_without_options_uses_names_of_its_own_and_offers_no_cpu(box, gateway):
    box.ready(gateway)
    said = gateway.seen[0].json
    assert re.fullmatch("[0-9a-f]{8}", said["machine_id"]) and said["hostname"] == f"machine-{said['machine_id']}"
    assert (said["token"], said["cpu"]) == ("", "0m") and re.fullmatch(r"\d+Mi", said["memory"])


def test_life_gateway_on_ipv6_is_ready(box):
    with Gateway(host="::1") as gateway:
        agent = box.ready(gateway)
        assert agent.stop() == 0 and gateway.seen[0].headers["Host"] == f"[::1]:{gateway.port}"


@pytest.mark.parametrize("others, ready", [(3500, True), (4000, False)], ids=["3.8-MB", "4.3-MB"])
def test_registration_answer_of_up_to_4_mebibytes_is_read(box, gateway, others, ready):
    gateway.config = configuration(others=others)
    agent = box.start(gateway, "--once")
    assert agent.wait(60) == (0 if ready else 69) and (ready or "larger than 4096 KiB" in agent.log()), agent.log()


@pytest.mark.slow
def test_memory_is_back_after_large_configurations(box, gateway):
    agent = box.ready(gateway)
    gateway.ready_again()
    before = agent.facts("VmRSS")
    gateway.config = configuration(others=3000)
    for _ in range(4):
        gateway.forget()
        gateway.ready_again()
    assert agent.facts("VmRSS") < before + 8192, "KiB"


@pytest.mark.parametrize("config, words", [
    (None, "directRedisHost"), (configuration(mode="local"), "local"), (configuration(provider="ec2"), "ec2")],
    ids=["null", "mode", "provider"])
def test_registration_that_says_no_work_will_come_is_told_once(box, gateway, config, words):
    gateway.config = config
    agent = box.ready(gateway)
    gateway.forget()
    wait(lambda: len(gateway.calls(REGISTER)) == 2, agent.log)
    gateway.ready_again()
    said, = agent.lines("no work will come")
    assert words in said and " WARNING " in said and SECRET not in agent.log()


@pytest.mark.slow
def test_registration_that_takes_longer_than_a_keepalive_may_is_waited_for(box, gateway):
    gateway.registration_takes = 5.0
    agent = box.ready(gateway)
    assert len(gateway.calls(REGISTER)) == 1 and not agent.lines("failed")


# ---- Seen from outside: what an answer means
NEVER, ONCE = [], ["--once"]
NO_POOL, BAD_PAYLOAD = says(500, {"message": "Invalid pool name"}), says(400, {"message": "Invalid payload"})
NO_ROUTE, GONE = says(404, {"message": "Not Found"}), says(500, {"message": NOT_FOUND})
STARTS = {  # exit code (None: goes on), words of the log, options, faults for register and keepalive
    "ok": (0, "ready after", ONCE, None, None),
    "401": (77, "beta9 machine create", ONCE, DENIED, None),
    "401-for-long": (77, "beta9 machine create", ["--startup-timeout", "0.4"], DENIED, None),
    "401-at-first": (None, "401|Unauthorized|refuse", [], DENIED, None),
    "403": (77, "beta9 machine create", [], FORBIDDEN, None),
    "403-keepalive": (77, "beta9 machine create", [], None, FORBIDDEN),
    "no-pool": (78, "--pool-name", [], NO_POOL, None),
    "bad-cpu": (78, "cpu", [], says(500, {"message": "Invalid machine cpu value"}), None),
    "bad-payload": (78, "Invalid payload", [], BAD_PAYLOAD, None),
    "upstream": (78, "upstream", [], None, NO_ROUTE),
    "structured-pool": (78, "--pool-name", [], says(400, {"error_code": "invalid_pool", "message": "m"}), None),
    "structured-token": (77, "beta9 machine create", ONCE, says(401, {"error_code": "invalid_token"}), None),
    "500": (69, "health", ONCE, says(500, {"message": "Failed to register machine"}), None),
    "500-for-long": (69, "500", ["--startup-timeout", "0.4"], says(500), None),
    "500-one-try": (69, "500", ["--startup-timeout", "0"], says(500), None),
    "500-for-ever": (None, "500", [], says(500), None),
    "502-html": (69, "502", ONCE, html(502), None),
    "portal": (69, "Hotel", ONCE, html(200), None),
    "redirect": (69, "/login", ONCE, says(302, b"", "Location: /login"), None),
    "closed": (69, "127.0.0.1", ONCE, breaks(), None),
    "forgotten": (69, "does not know this machine", ONCE, None, GONE),
    "not-ok": (69, "keepalive", ONCE, None, says(200, {"status": "ready"})),
}


@pytest.mark.parametrize("name", rows(
    STARTS, "ok", "401", "401-for-long", "401-at-first", "403", "403-keepalive", "no-pool", "upstream", "500",
    "500-for-ever", "portal", "redirect", "forgotten", "not-ok"))
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


def test_start_nobody_there_ends_with_69_after_startup_timeout(box, gateway):
    gateway.stop()
    agent = box.start(gateway, "--startup-timeout", "0.3")
    assert agent.wait(60) == 69 and "refused" in agent.log()


def test_start_gateway_that_comes_late_is_ready(box, gateway):
    gateway.stop()
    agent = box.start(gateway)
    agent.says("refused")
    gateway.start()
    wait(gateway.ready, agent.log)
    assert agent.poll() is None


JSON_TEXT = "Content-Type: application/json"
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
    "html": html(200), "empty": says(200), "list": says(200, []), "null": says(200, b"null"),
    "number": says(200, b"1" * 5000), "binary": says(200, bytes(range(256))), "deep": says(200, b"[" * 60000),
    "big": says(200, b'{"status": "ok", "a": "' + b"x" * (5 << 20) + b'"}'),
    "not-ok": says(200, {"status": ["ok"], "machine_state": 5, "config": []}),
    "204": says(204), "302-big": says(302, b"x" * (5 << 20), "Location: /login"),
    "302-bad-location": says(302, b"", "Location: http://[::1"), "308-no-location": says(308),
    "400": BAD_PAYLOAD, "401": DENIED, "403": FORBIDDEN, "404": NO_ROUTE, "no-pool": NO_POOL,
    "429": says(429, {"message": "slow down"}),
    "429-absurd": says(429, b"", "Retry-After: -1e99"), "429-odd": says(429, b"", "Retry-After: Wed, 99 Foo 2026"),
    "500": says(500, {"message": "Failed to update keepalive: failed to set machine state x"}), "500-empty": says(500),
    "502": html(502), "504": html(504), "lost": lost,
}
FORGETFUL = {   # answers that say that the machine is not known
    "today": GONE, "structured": says(404, {"error_code": "machine_not_found", "message": "m", "suggestion": "s"}),
    "expired": says(410, {"error_code": "machine_expired", "message": "m"}),
    "in-a-200": says(200, {"error_code": "machine_not_found"}),
}
BAD_REGISTRATIONS = {**{name: ODD[name] for name in (
    "closed", "truncated", "html", "null", "400", "401", "403", "404", "no-pool", "429", "500-empty", "502", "lost")},
    "no-config": says(500, {"message": "Unable to create remote config"})}


@pytest.fixture(scope="module")
def survivor(tmp_path_factory):
    """A ready agent that many faults happen to, one after another, with its gateway and box."""
    with Gateway(ttl=6) as gateway, contextlib.closing(Box(tmp_path_factory.mktemp("survivor"))) as box:
        yield gateway, box.ready(gateway, "--machine-id", ID), box


@pytest.fixture
def ready_again(survivor):
    """Says what was asked from the fault on until the machine is ready again."""
    gateway, agent, _ = survivor
    assert agent.poll() is None, agent.log()

    def calls_after(fault, call):
        start = len(gateway.seen)
        gateway.faults[call].append(fault)
        if call == REGISTER:
            gateway.forget()
        wait(lambda: not gateway.faults[call] or agent.poll() is not None, agent.log)
        gateway.ready_again()
        assert agent.poll() is None, agent.log()
        seen = gateway.seen[start:]
        first = next(index for index, link in enumerate(seen) if link.faulty)
        return [link.call for link in seen[first:]]

    return calls_after


@pytest.mark.parametrize("name", ODD)
def test_life_odd_answer_to_a_keepalive_is_a_failure_and_kept_alive_again(survivor, ready_again, name):
    """But for a kept connection that ends without a byte, which may count as none."""
    box = survivor[2]
    before = box.record()["failed"]
    assert set(ready_again(ODD[name], KEEPALIVE)) == {KEEPALIVE}
    if name not in ("closed", "reset", "lost"):
        wait(lambda: box.record()["failed"] > before, lambda: box.record())


@pytest.mark.parametrize("name", FORGETFUL)
def test_life_answer_that_says_forgotten_is_followed_by_a_registration_and_a_keepalive(ready_again, name):
    assert ready_again(FORGETFUL[name], KEEPALIVE)[:3] == [KEEPALIVE, REGISTER, KEEPALIVE]


@pytest.mark.parametrize("name", BAD_REGISTRATIONS)
def test_life_registration_that_fails_is_tried_again_whatever_is_answered(ready_again, name):
    calls = ready_again(BAD_REGISTRATIONS[name], REGISTER)
    assert calls[0] == REGISTER and REGISTER in calls[1:] and calls[-1] == KEEPALIVE


HANGING = {     # none of these answers ever ends: that there is a next request shows that it was cut
    "silent": silent, "dripping-status-line": drips(b"HTTP", b"/"), "dripping-headers": drips(HEAD, b"X-More: x\r\n"),
    "dripping-header": drips(HEAD + b"X: ", b"x"),
    "dripping-body": drips(HEAD + b'Content-Length: 5000\r\n\r\n{"', b"x"),
    "dripping-chunks": drips(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "dripping-redirect": drips(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 5000\r\n\r\n", b"x"),
    "1xx-for-ever": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("name", rows(HANGING, "dripping-body"))
def test_life_answer_that_never_ends_is_cut_and_kept_alive_again(survivor, ready_again, name):
    """A keepalive has 2 s, and a late thread must be gone: the box has one for each request at most."""
    gateway, agent, _ = survivor
    assert set(ready_again(HANGING[name], KEEPALIVE)) == {KEEPALIVE}
    wait(lambda: agent.facts("Threads") <= 2, agent.log)
    pauses = [two.time - one.time for one, two in zip(gateway.seen, gateway.seen[1:]) if one.faulty]
    assert 1.5 < pauses[-1] < 8, "it is cut after 2 s"


def test_life_trouble_for_long_is_told_in_few_lines(box, gateway):
    agent = box.ready(gateway)
    gateway.always = says(500, {"message": "Internal Server Error"})
    after = len(gateway.seen)
    wait(lambda: len(gateway.seen) > after + 20, agent.log)
    gateway.always = None
    gateway.ready_again()
    agent.says("ready again")
    assert 3 < len(agent.lines(" failed")) < 9 and "/health" in agent.log()


# ---- Seen from outside: the schedule
def pauses_of(links):
    return [two.time - one.time for one, two in zip(links, links[1:])]


def test_schedule_keepalive_follows_each_registration_at_once_and_forgotten_is_registered_at_once(box, gateway):
    """With an interval of 60 s: a first ordinary pause takes 6 s at least, one after a failure 1 s."""
    gateway.faults[KEEPALIVE].append(GONE)
    agent = box.ready(gateway, "--keepalive-interval", "60")
    assert [link.call for link in gateway.seen] == [REGISTER, KEEPALIVE] * 2
    assert max(pauses_of(gateway.seen)) < 0.9, agent.log()


def test_schedule_interval_is_kept_with_jitter_around_it(box, gateway):
    agent = box.ready(gateway, "--keepalive-interval", "0.2")
    wait(lambda: len(gateway.calls(KEEPALIVE)) > 8, agent.log)
    pauses = sorted(pauses_of(gateway.calls(KEEPALIVE)[1:]))
    assert 0.15 < pauses[len(pauses) // 2] < 0.5 and pauses[-1] - pauses[0] > 0.005, pauses


def test_schedule_short_ttl_is_kept_by_thirds(box):
    with Gateway(ttl=1) as gateway:
        agent = box.ready(gateway, "--keepalive-interval", "60")
        wait(lambda: len(gateway.calls(KEEPALIVE)) > 4, agent.log)
        assert len(gateway.calls(REGISTER)) == 1


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


def test_schedule_gateway_back_after_the_ttl_is_registered_at_without_asking(box):
    with Gateway(ttl=1) as gateway:
        agent = box.ready(gateway)
        gateway.stop()
        time.sleep(1.3)
        after = len(gateway.seen)
        gateway.start()
        gateway.ready_again()
        assert [link.call for link in gateway.seen[after:]][:2] == [REGISTER, KEEPALIVE] and agent.poll() is None


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


def test_schedule_retry_after_is_obeyed_within_a_quarter_of_the_ttl(box):
    """With an interval of 0.1 s another try would come after 0.11 s at most."""
    with Gateway(ttl=4) as gateway:
        agent = box.ready(gateway)
        for status, value in ((429, "0.6"), (503, "1"), (503, "99999")):
            gateway.faults[KEEPALIVE].append(says(status, b"", f"Retry-After: {value}"))
            wait(lambda: not gateway.faults[KEEPALIVE], agent.log)
            gateway.ready_again()
        odd, one, most = [pause for link, pause in zip(gateway.seen, pauses_of(gateway.seen)) if link.faulty]
        assert odd < 0.95 <= one and 0.95 <= most < 4, "a fraction is no Retry-After"
        assert len(gateway.calls(REGISTER)) == 1


@pytest.mark.slow
def test_schedule_failures_are_tried_again_with_growing_random_pauses(box, gateway):
    gateway.always = says(500)
    agent = box.start(gateway, "--keepalive-interval", "60")
    wait(lambda: len(gateway.seen) > 6, agent.log, limit=120)
    pauses = pauses_of(gateway.seen)
    assert min(pauses) > 0.95 and max(pauses[:3]) < 10 and len({round(pause, 2) for pause in pauses}) > 3, pauses


# ---- Seen from outside: offers and k3s
UNUSABLE = {     # what k3s answers, and words of the log
    "closed-port": (NOBODY, "k3s"), "redirect": (says(302, b"", "Location: https://127.0.0.1:9/"), "302"),
    "html": (html(200), "200"), "401": (says(*status_of_k3s(401, "Unauthorized")), "refuse"),
    "403": (says(*status_of_k3s(403, "no")), "403|may not|forbid"),
    "500": (says(500, {"message": f"your token is {K3S_TOKEN}"}), "your token is"),
    "endless": (drips(HEAD + b"\r\n", b" " * 90000, 0), "larger"), "closed": (breaks(), "k3s"),
}


@pytest.mark.parametrize("name", rows(UNUSABLE, "closed-port", "401", "403", "500"))
def test_k3s_that_answers_so_at_the_start_is_offered_no_cpu_and_hears_the_token_alone(box, gateway, k3s, name):
    fault, words = UNUSABLE[name]
    k3s.stop() if fault == NOBODY else None
    k3s.always = fault if fault != NOBODY else None
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        agent = box.ready(gateway, *k3s.options(), https_proxy=f"http://127.0.0.1:{proxy.getsockname()[1]}")
        wait(lambda: re.search(words, agent.log()), agent.log)
        wait(lambda: len(gateway.calls(KEEPALIVE)) > 2, agent.log)
        assert set(gateway.registered("cpu")) == {"0m"} and gateway.registered("token")[0] == K3S_TOKEN
        assert {link.bearer for link in k3s.seen} <= {K3S_TOKEN} and TOKEN not in str(k3s.seen)
        assert leaks(agent.log(), K3S_TOKEN, TOKEN) == []
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_k3s_that_is_usable_has_all_offered_and_its_running_workers_counted(box, gateway, k3s):
    k3s.pods = [("w-1", "Running", "5m2s"), ("w-2", "Pending", "10s"), ("w-3", "Running", "2d3h"),
                ("w-4", "Completed", "9m")]
    agent = box.ready(gateway, *k3s.options())
    wait(lambda: gateway.registered("cpu")[-1] != "0m", agent.log)
    wait(lambda: gateway.ready_again().json["metrics"].get("worker_count") == 2, agent.log)
    pods = k3s.calls("pods")[0]
    assert pods.bearer == K3S_TOKEN and pods.path == "/api/v1/namespaces/default/pods"
    query = dict(urllib.parse.parse_qsl(pods.query))
    assert query["includeObject"] == "None", "else each pod's settings would come along"
    machine_id = gateway.seen[0].json["machine_id"]
    assert query["labelSelector"] == f"run.beam.cloud/role=worker,run.beam.cloud/machine-id={machine_id}"
    agent.says("w-1")


def test_k3s_with_a_foreign_certificate_gets_no_byte_of_the_token(box, gateway, certificates):
    with K3s(certificates, "others") as k3s:
        agent = box.ready(gateway, *k3s.options())
        wait(lambda: k3s.heard and agent.lines("issuer", "self-signed", "self signed"), agent.log)
        assert gateway.registered("cpu") == ["0m"] and k3s.seen == []
        assert not any(K3S_TOKEN.encode() in data for data in k3s.heard)


def test_k3s_without_a_ca_gets_a_handshake_and_no_token_and_counts_as_usable(box, gateway, certificates):
    with K3s(certificates, "others") as k3s:
        options = [word for word in k3s.options() if word not in ("--k3s-ca-file", certificates.path())]
        agent = box.ready(gateway, *options)
        wait(lambda: gateway.registered("cpu")[-1] != "0m", agent.log)
        assert k3s.seen == [] and k3s.heard and not any(K3S_TOKEN.encode() in data for data in k3s.heard)
        assert "worker_count" not in gateway.ready_again().json["metrics"]


def test_k3s_that_is_unusable_is_offered_all_the_same_with_offer_always(box, gateway, k3s):
    k3s.stop()
    box.ready(gateway, *k3s.options("--offer-always"))
    assert gateway.registered("cpu")[0] != "0m"


def test_k3s_that_hangs_holds_no_keepalive_up(box, gateway, certificates):
    """It may delay the first by 1 s; nothing here waits for its own deadline of 5 s."""
    with K3s(certificates, greet=SILENT) as k3s:
        agent = box.ready(gateway, *k3s.options())
        wait(lambda: len(gateway.calls(KEEPALIVE)) > 5, agent.log)
        assert gateway.registered("cpu") == ["0m"] and max(pauses_of(gateway.seen)) < 4
        start = time.monotonic()
        assert agent.stop() == 0 and time.monotonic() - start < 4


@pytest.mark.slow
@pytest.mark.parametrize("greet, with_ca", [(SILENT, True), (SILENT, False), (None, True)],
                         ids=["handshake", "handshake-without-ca", "answer"])
def test_k3s_that_hangs_is_told_after_its_deadline_of_5_s(box, gateway, certificates, greet, with_ca):
    with K3s(certificates, greet=greet) as k3s:
        k3s.always = drips(HEAD, b"X: y\r\n")
        start = time.monotonic()
        agent = box.ready(gateway, *(k3s.options() if with_ca else k3s.options()[:-2]))
        wait(lambda: agent.lines("in time"), agent.log)
        assert time.monotonic() - start < 20 and gateway.registered("cpu") == ["0m"]


LATER = {       # what happens to a k3s that was usable: believed at once, or after two looks that agree
    "401": (True, lambda k3s: k3s.tokens.clear(), lambda k3s: k3s.tokens.add(K3S_TOKEN)),
    "403": (True, lambda k3s: k3s.forbidden.update(("pods", "selfsubjectrulesreviews")),
            lambda k3s: k3s.forbidden.clear()),
    "500": (False, lambda k3s: setattr(k3s, "always", says(500)), lambda k3s: setattr(k3s, "always", None)),
    "away": (False, lambda k3s: k3s.stop(), lambda k3s: k3s.start()),
    "hangs": (False, lambda k3s: setattr(k3s, "always", silent), lambda k3s: setattr(k3s, "always", None)),
}


class Scene:
    """One agent with a gateway and a k3s of its own, beside others of its kind."""

    def __init__(self, stack, folder, certificates, *options, **environ):
        self.gateway, self.k3s = (stack.enter_context(one) for one in (Gateway(), K3s(certificates)))
        self.box = stack.enter_context(contextlib.closing(Box(folder)))
        self.agent = self.box.start(self.gateway, *self.k3s.options(*options), **environ)

    def offers_cpu(self):
        return self.gateway.registered("cpu")[-1:] not in ([], ["0m"])

    def wait_for(self, name, cpu):
        wait(lambda: self.offers_cpu() is cpu, lambda: f"{name}: CPU {cpu}\n{self.agent.log()}")
        self.gateway.ready_again()


def scenes(stack, folders, certificates, rows):
    """A scene for each row, all begun and with CPU on offer."""
    made = {name: Scene(stack, folders.mktemp("scene"), certificates) for name in rows}
    for name, scene in made.items():
        scene.wait_for(name, True)
    return made


@pytest.mark.slow
def test_k3s_that_fails_later_is_offered_no_cpu_and_all_again_when_it_is_back(tmp_path_factory, certificates):
    with contextlib.ExitStack() as stack:
        made = scenes(stack, tmp_path_factory, certificates, LATER)
        for name, (_, breaks_down, _) in LATER.items():
            breaks_down(made[name].k3s)
        for name, scene in made.items():
            scene.wait_for(name, False)
        for name, (_, _, recovers) in LATER.items():
            recovers(made[name].k3s)
        for name, scene in made.items():
            scene.wait_for(name, True)
            assert scene.agent.poll() is None and leaks(scene.agent.log(), K3S_TOKEN) == []


@pytest.mark.slow
def test_k3s_that_fails_in_one_look_alone_changes_nothing(box, gateway, k3s):
    agent = box.ready(gateway, *k3s.options())
    wait(lambda: gateway.registered("cpu")[-1] != "0m", agent.log)
    registered = len(gateway.calls(REGISTER))
    for call in ("selfsubjectrulesreviews", "pods"):
        k3s.faults[call].append(says(500))
    wait(lambda: k3s.seen[-1].faulty, agent.log)
    k3s.faults.clear()
    k3s.looked(2)
    assert len(gateway.calls(REGISTER)) == registered, agent.log()


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


def test_token_file_spoilt_later_leaves_the_last_token_in_use_with_few_warnings(box, gateway):
    path = box.folder / "token"
    replace(path, TOKEN)
    agent = box.ready(gateway, "--token-file", path, BETA9_TOKEN=None)
    for content in (b"", b"two words", b"\xff\0", b"x" * 70000, None):
        path.unlink() if content is None else replace(path, content)
        gateway.ready_again()
        gateway.ready_again()
    path.with_suffix(".fifo").unlink(True)
    os.mkfifo(path)
    gateway.ready_again()
    gateway.ready_again()
    assert {link.bearer for link in gateway.seen} == {TOKEN} and agent.poll() is None
    assert 1 <= len(agent.lines(f"WARNING no token in {path}", f"token file '{path}'", f"{path}")) < 9
    path.unlink()
    gateway.token = "new-" + TOKEN
    replace(path, "new-" + TOKEN)
    wait(lambda: gateway.seen[-1].bearer == "new-" + TOKEN, agent.log)


@pytest.mark.slow
def test_k3s_token_file_rotated_is_registered_within_seconds_also_with_a_long_interval(box, gateway):
    path = box.folder / "k3s"
    replace(path, K3S_TOKEN)
    agent = box.ready(gateway, "--k3s-token-file", path, "--keepalive-interval", "240")
    replace(path, SECRET)
    start = time.monotonic()
    wait(lambda: gateway.registered("token")[-1] == SECRET, agent.log)
    wait(lambda: gateway.seen[-1].state == "ready", agent.log)
    assert time.monotonic() - start < 15, "a first keepalive may be due after 24 s at the soonest"


# ---- Seen from outside: no token where people look
def forms(*secrets):
    return " ".join(form for secret in secrets for form in (
        secret, urllib.parse.quote(secret, ""), base64.b64encode(secret.encode()).decode()))


def test_tokens_and_configuration_are_in_no_log_line_record_or_status(box, gateway):
    """Whatever is echoed, at debug level, and also a token that was replaced."""
    token = box.folder / "token"
    replace(token, TOKEN)
    echo = forms(TOKEN, K3S_TOKEN)

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
        gateway.faults[KEEPALIVE].append(says(500, {"message": forms(new, TOKEN)}))
        gateway.forget()
        wait(lambda: not gateway.faults[KEEPALIVE], agent.log)
        gateway.ready_again()
        said = agent.log() + box.run("--status", "--json").stdout + "".join(systemd.heard())
    assert "POST" in said and "redacted" in said and "bad token" in said
    assert leaks(said, TOKEN, new, K3S_TOKEN, SECRET) == []


def test_tokens_are_not_in_dry_run_or_the_environment_of_a_child(box):
    done = box.run("--dry-run", "--debug", "--k3s-token", K3S_TOKEN, "--pool-name", TOKEN[:20])
    assert done.returncode in (0, 2) and leaks(done.stdout + done.stderr, TOKEN, K3S_TOKEN) == []
    assert "Traceback" not in done.stderr


def test_words_of_the_gateway_are_printed_visibly_and_short(box, gateway):
    gateway.always = says(500, {"message": "\x1b[2J\x1b]0;x\x07\r\n\u202e" + "A" * 3000})
    agent = box.start(gateway, "--debug")
    wait(lambda: len(gateway.seen) > 2, agent.log)
    gateway.always = None
    wait(gateway.ready, agent.log)
    assert [line for line in agent.log().splitlines() if not line.isprintable()] == [] and r"\x1b[2J" in agent.log()
    told = "\n".join(agent.lines(" WARNING ", " ERROR "))
    assert max(map(len, re.findall("A+", told))) <= 500


# ---- Seen from outside: signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_stop_while_idle_registers_once_more_and_ends_with_0(box, gateway, number):
    agent = box.ready(gateway, "--keepalive-interval", "60")
    agent.says("ready after")
    start = time.monotonic()
    assert agent.stop(number) == 0 and time.monotonic() - start < 3
    assert [link.state for link in gateway.seen] == ["registered", "ready", "registered"]
    assert gateway.connections == 1 and "stopping" in agent.log() and "Traceback" not in agent.log()


@pytest.mark.parametrize("calls, options", [([REGISTER], ["--once"]), ([REGISTER, KEEPALIVE], [])],
                         ids=["registering-once", "keeping"])
def test_stop_while_a_request_hangs_cuts_it_and_is_no_failure(box, gateway, calls, options):
    gateway.faults[calls[-1]].append(silent)
    agent = box.start(gateway, "--keepalive-interval", "60", *options)
    wait(lambda: len(gateway.seen) == len(calls), agent.log)
    start = time.monotonic()
    assert agent.stop() == 0 and time.monotonic() - start < 6, "it would hang for 10 s"
    assert [link.call for link in gateway.seen] == calls and "giving up" not in agent.log(), "it never was ready"


def test_stop_while_a_keepalive_of_a_ready_machine_hangs_sends_nothing_more(box, gateway):
    agent = box.ready(gateway)
    gateway.always = silent
    wait(lambda: gateway.seen[-1].faulty, agent.log)
    assert agent.stop() == 0 and {link.call for link in gateway.seen if link.faulty} == {KEEPALIVE}


def test_stop_while_connecting_ends(box):
    with full_port() as port:
        agent = box.start(port, "--keepalive-interval", "60", "--debug")
        agent.says("POST")
        time.sleep(0.3)
        start = time.monotonic()
        assert agent.stop() == 0 and time.monotonic() - start < 6, agent.log()


@contextlib.contextmanager
def full_port(host="127.0.0.1", port=0):
    """A port that swallows packets: its queue is full, so further connections hang."""
    with socket.create_server((host, port), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield full.getsockname()[1]


def test_stop_after_a_failed_request_sends_nothing_more(box, gateway):
    agent = box.ready(gateway)
    gateway.always = says(500)
    wait(lambda: gateway.seen[-2].faulty, agent.log)
    assert agent.stop() == 0 and {link.call for link in gateway.seen if link.faulty} == {KEEPALIVE}


def test_stop_last_registration_that_is_refused_is_silent(box, gateway):
    agent = box.ready(gateway, "--keepalive-interval", "60")
    gateway.faults[REGISTER].append(NO_POOL)
    assert agent.stop() == 0 and "Invalid" not in agent.log() and gateway.seen[-1].faulty


@pytest.mark.slow
def test_stop_last_registration_that_is_answered_late_is_not_waited_for(box, gateway):
    agent = box.ready(gateway, "--keepalive-interval", "60")
    gateway.registration_takes = 4.0
    start = time.monotonic()
    assert agent.stop() == 0 and time.monotonic() - start < 3.9 and gateway.seen[-1].call == REGISTER


def test_stop_twice_ends_at_once(box, gateway):
    gateway.always = silent
    agent = box.start(gateway, "--keepalive-interval", "60")
    wait(lambda: gateway.seen, agent.log)
    agent.send_signal(signal.SIGTERM)
    wait(lambda: not agent.facts("SigCgt") & 1 << signal.SIGTERM - 1, agent.log)
    assert agent.stop() == -signal.SIGTERM


def test_signals_that_the_parent_blocked_stop_it_all_the_same(box, gateway):
    before = ["env", "--block-signal=TERM,INT,HUP,ALRM"]
    if subprocess.run([*before, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this env knows no signals")
    assert box.ready(gateway, before=before).stop() == 0


@pytest.mark.parametrize("number, before", [
    (signal.SIGHUP, ["nohup"]), (signal.SIGINT, ["sh", "-c", 'trap "" INT; exec "$@"', "sh"])], ids=["nohup", "trap"])
def test_signals_that_the_parent_ignored_stay_ignored(box, gateway, number, before):
    agent = box.ready(gateway, before=before)
    agent.send_signal(number)
    for _ in range(3):
        gateway.ready_again()
    assert agent.poll() is None and agent.stop() == 0


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


def test_connection_in_cleartext_to_a_public_address_ends_with_2_or_69(box, gateway, names):
    for host in ("203.0.113.7", "2001:db8::7"):
        done = box.run("--gateway-host", host)
        assert done.returncode == 2 and "--allow-cleartext" in done.stderr and "Traceback" not in done.stderr
    names.tell(gw=["203.0.113.7"])
    done = box.run("--gateway-host", "gw", "--startup-timeout", "0.2", **names.environ)
    assert done.returncode == 69 and "--tls" in done.stderr and gateway.connections == 0


@pytest.mark.slow
def test_name_server_that_is_late_is_named_and_its_late_answer_used(box, gateway, names):
    names.tell(gw=["127.0.0.1"])
    agent = box.ready(gateway, "--gateway-host", "gw", **names.environ)
    names.tell(2.3, gw=["127.0.0.1"])       # a keepalive has 2 s
    gateway.stop()
    agent.says("refused")
    gateway.start()
    agent.says("name server")
    gateway.ready_again()
    names.tell(3600, gw=["127.0.0.1"])
    start = time.monotonic()
    assert agent.stop() == 0 and time.monotonic() - start < 5 and gateway.seen[-1].call == REGISTER


def test_name_server_that_hangs_at_the_start_does_not_hold_a_stop(box, gateway, names):
    names.tell(3600, gw=["127.0.0.1"])
    agent = box.start(gateway, "--gateway-host", "gw", "--debug", **names.environ)
    agent.says("POST")
    start = time.monotonic()
    assert agent.stop() == 0 and time.monotonic() - start < 6, agent.log()


def tls_options(certificates, root="ca", host="127.0.0.1"):
    return ["--tls", "--gateway-host", host, *(["--ca-file", certificates.path(root)] if root else [])]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_tls_verified_against_the_given_root_is_ready_on_one_connection(box, certificates, host):
    with Gateway(greet=certificates.server()) as gateway:
        agent = box.ready(gateway, *tls_options(certificates, host=host))
        assert agent.stop() == 0 and gateway.seen[-1].call == REGISTER and gateway.connections == 1
        assert gateway.seen[0].headers["Host"] == f"{host}:{gateway.port}" and b"POST" not in gateway.heard[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", HANGING)
def test_tls_answer_that_never_ends_is_cut_and_kept_alive_again(box, certificates, name):
    with Gateway(greet=certificates.server(), ttl=60) as gateway:
        agent = box.ready(gateway, *tls_options(certificates))
        gateway.faults[KEEPALIVE].append(HANGING[name])
        wait(lambda: not gateway.faults[KEEPALIVE], agent.log)
        gateway.ready_again()
        assert gateway.connections == 2 and len(gateway.calls(REGISTER)) == 1 and agent.facts("Threads") <= 2


TLS_FAULTS = {      # the certificate or greeting, the root that is given, words of the message
    "expired": ("expired", "ca", "(?i)expired|not valid now"), "future": ("future", "ca", "(?i)not (yet )?valid"),
    "wrong-name": ("wrong-name", "ca", "(?i)is not for|mismatch|not match|not valid for"),
    "unknown-issuer": ("good", "others", "(?i)issuer.*--ca-file"),
    "unknown-to-requests": ("good", None, "(?i)issuer.*--ca-file"),
    "self-signed": ("others", "ca", "(?i)(issuer|self.signed).*--ca-file"),
    "cleartext": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "ca", "TLS"), "closes": (NOBODY, "ca", "TLS|connection"),
}


@pytest.mark.parametrize("name", rows(TLS_FAULTS, "expired", "wrong-name", "unknown-to-requests", "cleartext"))
def test_tls_fault_ends_once_with_69_and_a_remedy_and_sends_nothing(box, certificates, name):
    shown, root, words = TLS_FAULTS[name]
    greet = certificates.server(shown) if shown in ("expired", "future", "wrong-name", "good", "others") else shown
    with Gateway(greet=greet) as gateway:
        agent = box.start(gateway, *tls_options(certificates, root), "--once",
                          REQUESTS_CA_BUNDLE=certificates.path(), SSL_CERT_FILE=certificates.path())
        assert agent.wait(60) == 69, "roots of the environment count for nothing"
        last = agent.log().splitlines()[-1]
        assert re.search(words, last) and f"127.0.0.1:{gateway.port}" in last, last
        assert gateway.heard and gateway.seen == []
        assert not re.search(b"POST|Bearer|" + re.escape(TOKEN).encode(), b"".join(gateway.heard))


@pytest.mark.slow
def test_tls_handshake_that_never_ends_is_cut(box, certificates):
    with Gateway(greet=SILENT) as gateway:
        agent = box.start(gateway, *tls_options(certificates), "--once")
        assert agent.wait(60) == 69 and "time" in agent.log().splitlines()[-1]


def test_proxy_netrc_and_redirect_traps_are_not_taken_on_loopback(box, gateway):
    (box.folder / ".netrc").write_text("machine 127.0.0.1 login x password y\n")
    (box.folder / ".netrc").chmod(0o600)
    with Gateway() as trap:
        there = f"http://127.0.0.1:{trap.port}"
        gateway.faults[KEEPALIVE].append(says(307, b"", f"Location: {there}/api/v1/machine/keepalive"))
        box.ready(gateway, http_proxy=there, HTTP_PROXY=there, ALL_PROXY=there)
        assert {link.bearer for link in gateway.seen} == {TOKEN} and trap.connections == 0


def test_proxy_is_asked_for_what_lies_beyond_loopback_by_the_name_given(box, gateway):
    for host in ("gw.example", "10.1.2.3", "203.0.113.7"):
        seen = len(gateway.seen)
        agent = box.start(None, "--gateway-host", host, "--gateway-port", "1994", "--once",
                          http_proxy=f"http://user:pass-word-1@127.0.0.1:{gateway.port}")
        assert agent.wait(60) == 0 and "pass-word" not in agent.log(), agent.log()
        assert gateway.seen[seen].target == f"http://{host}:1994/api/v1/machine/register"
        assert gateway.seen[seen].headers["Host"] == f"{host}:1994"


@pytest.mark.parametrize("no_proxy, reached", [("2130706433", True), ("10.0.0.0/8", False)])
def test_proxy_is_left_out_for_hosts_of_no_proxy(box, gateway, no_proxy, reached):
    """2130706433 is one way to write 127.0.0.1."""
    agent = box.start(None, "--gateway-host", "2130706433", "--gateway-port", gateway.port, "--startup-timeout", "0",
                      http_proxy="http://127.0.0.1:9", no_proxy=no_proxy)
    if reached:
        wait(gateway.ready, agent.log)
    else:
        assert agent.wait(60) == 69 and gateway.connections == 0


@pytest.mark.parametrize("fault, words", [(NOBODY, "refused"), (breaks(), "proxy")], ids=["refused", "broken"])
def test_proxy_that_fails_is_named_without_its_password(box, gateway, fault, words):
    gateway.stop() if fault == NOBODY else None
    gateway.always = fault if fault != NOBODY else None
    proxy = f"http://user:pass-word-1@127.0.0.1:{gateway.port}"
    done = box.run("--gateway-host", "10.1.2.3", "--once", http_proxy=proxy)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 69 and f"proxy 127.0.0.1:{gateway.port}" in last and words in last
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


def test_notify_words_of_the_gateway_stay_in_the_status(box, gateway):
    gateway.always = says(500, {"message": f"no\nMAINPID=1\nSTOPPING=1\x1b[31m {TOKEN}"})
    with Notify(box.folder / "notify") as systemd:
        agent = box.start(gateway, NOTIFY_SOCKET=systemd.path)
        wait(lambda: len(gateway.seen) > 4 and systemd.status(), agent.log)
        agent.stop(signal.SIGKILL)
        heard = systemd.heard()
        assert not [said for said in heard if said.startswith(("MAINPID", "STOPPING")) or not said.isprintable()]
        assert leaks("".join(heard), TOKEN) == []


def test_notify_socket_that_nobody_reads_does_not_hold_the_agent(box, gateway):
    with Notify(box.folder / "notify") as systemd:
        agent = box.ready(gateway, NOTIFY_SOCKET=systemd.path)
        for _ in range(int(pathlib.Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) // 4 + 5):
            gateway.ready_again()
    os.unlink(systemd.path)
    gateway.ready_again()
    assert agent.stop() == 0 and "Traceback" not in agent.log()


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
