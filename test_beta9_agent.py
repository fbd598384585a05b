"""Tests of beta9_agent.py, in the order of its rooms; the figures that some print stand in the README."""
from __future__ import annotations

import ast
import atexit
import base64
import bz2
import collections
import concurrent.futures
import contextlib
import ctypes
import email.utils
import errno
import fcntl
import gc
import gzip
import hashlib
import heapq
import http.client
import importlib.metadata
import inspect
import ipaddress
import itertools
import json
import logging
import math
import os
import pathlib
import plistlib
import pty
import pwd
import queue
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.parse
import zipfile

import certifi
import psutil
import pytest
import responses

import beta9_agent as b9


SOURCE = pathlib.Path(b9.__file__)
TEXT = SOURCE.read_text()
TREE = ast.parse(TEXT)
MACHINE_TOKEN = "mt-0123456789abcdefGHIJ"
K3S_TOKEN = "k3s-zyxwvutsrqponmlk98765"
TOKEN_LIKE = "Qz0123456789abcdefghijk"
ROOT = tempfile.mkdtemp(prefix="beta9-tests-")
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
ID = "1165a9b6"


def settings_of(*argv, env=None):
    """What command line and environment come to: the settings, checked, and what is wrong with them."""
    given = b9.read_settings(list(argv), {} if env is None else env)
    config = b9.build_config(given, b9.Redactor())
    return (None if config.problems else config), config.problems


def config_of(*argv, env=None):
    config, problems = settings_of("--token", MACHINE_TOKEN, *argv, env=env)
    assert problems == []
    return config


def replace_look_up(monkeypatch, other):
    """Has this thread alone look names up in another way: tests run beside this one."""
    real, here = socket.getaddrinfo, threading.get_ident()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **more: (
        other if threading.get_ident() == here else real)(*asked, **more))


@pytest.fixture
def log_lines():
    """The log lines that a test causes in this process."""
    lines = []

    class Collect(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler, level = Collect(), b9.LOG.level
    b9.LOG.addHandler(handler)
    b9.LOG.setLevel(logging.DEBUG)
    yield lines
    b9.LOG.removeHandler(handler)
    b9.LOG.setLevel(level)


# ---- What many tests share: two cores are kept busy
PROVIDED = {}      # name -> makes it, from an ExitStack and the resources of the test that are made already


def provided(make):
    """What a test that runs `beside` may ask for by this name."""
    PROVIDED[make.__name__] = make
    return make


def beside(test):
    """Runs this test in a pool, beside the others, from the session's start on: it waits for processes
    and sockets of its own most of the time. In its turn only its result is waited for.
    """
    named = inspect.signature(test).parameters.values()

    def run(values):
        with contextlib.ExitStack() as stack:
            made = {}
            for name in (each.name for each in named if each.name in PROVIDED):
                made[name] = PROVIDED[name](stack, made)
            return test(**made, **values)

    def wait_for_it(request, pool, **values):
        pool[request.node.nodeid].result()

    rest = [inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY) for each in named
            if each.name not in PROVIDED]
    fixtures = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("request", "pool")]
    wait_for_it.__signature__ = inspect.Signature(fixtures + rest)
    wait_for_it.__name__, wait_for_it.__doc__ = test.__name__, test.__doc__
    wait_for_it.run = run
    return wait_for_it


@pytest.fixture(scope="session")
def pool(request):
    """The results to come of all selected tests that run `beside`."""
    with concurrent.futures.ThreadPoolExecutor(5) as executor:
        running = {}
        for item in request.session.items:
            if hasattr(item.function, "run"):
                values = getattr(item, "callspec", None)
                running[item.nodeid] = executor.submit(item.function.run, values.params if values else {})
        yield running
        executor.shutdown(cancel_futures=True)


# ---- 0 Layout
EFFECTS = {"time", "random", "open", "os", "socket", "subprocess", "requests", "psutil", "pynvml", "print",
           "threading"}


def rooms():
    """Number -> first and last line."""
    starts = [(int(found[1]), line) for line, text in enumerate(TEXT.splitlines(), 1)
              if (found := re.match(r"# ---- (\d+) \w", text))]
    ends = [line - 1 for _, line in starts[1:]] + [TEXT.count("\n")]
    return {number: (line, end) for (number, line), end in zip(starts, ends)}


def functions():
    return [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_layout_rooms_are_numbered_in_order():
    assert list(rooms()) == sorted(rooms()) and {1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 14} <= set(rooms())


def test_layout_functions_are_no_longer_than_40_lines():
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions()}
    assert {name: length for name, length in lengths.items() if length > 40} == {}


def test_layout_lines_are_no_wider_than_100_columns():
    assert [line for line, text in enumerate(TEXT.splitlines(), 1) if len(text) > 100] == []


@pytest.mark.parametrize("version", [(3, 7), (3, 10)], ids=["3.7", "3.10"])
def test_layout_old_pythons_can_parse_the_file_and_get_a_sentence(version):
    ast.parse(TEXT, feature_version=version)
    assert "from __future__" not in TEXT


def test_layout_one_clock_is_read_and_nobody_sets_it():
    """So that a wall clock set back or forth changes nothing."""
    used = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "time"}
    assert used == {"clock_gettime", "CLOCK_MONOTONIC", "sleep", "time"} and "datetime.now" not in TEXT
    desk = TEXT.index("# ---- 11 ")
    assert TEXT[:desk].count("time.time()") == 1, "in the status record, for people"


def test_law_1_functions_call_only_what_stands_above():
    defined = {node.name: node.lineno for node in TREE.body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {name.id: node.lineno for node in TREE.body if isinstance(node, (ast.Assign, ast.AnnAssign))
                for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    below = [f"{function.name}: {call.func.id}" for function in functions() for call in ast.walk(function)
             if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
             and defined.get(call.func.id, 0) > function.lineno]
    assert below == []


def test_law_2_rooms_2_to_4_have_no_effects():
    first, last = rooms()[2][0], rooms()[4][1]
    assert rooms()[5][0] == last + 1
    names = [(node.lineno, getattr(node, "id", getattr(node, "attr", None))) for node in ast.walk(TREE)
             if isinstance(node, (ast.Name, ast.Attribute)) and first <= node.lineno <= last]
    assert [pair for pair in names if pair[1] in EFFECTS] == []


def test_law_6_and_8_public_faces_have_docstrings():
    """Those of classes, and of functions that another room uses or that are a class's public methods."""
    lines = {number: range(first, last + 1) for number, (first, last) in rooms().items()}
    room_of = lambda line: next((number for number, span in lines.items() if line in span), 1)  # noqa: E731
    used = collections.defaultdict(set)
    for node in ast.walk(TREE):
        if isinstance(node, ast.Name):
            used[node.id].add(room_of(node.lineno))
    missing = [node.name for node in TREE.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))
               and not ast.get_docstring(node)
               and (isinstance(node, ast.ClassDef) or used[node.name] - {room_of(node.lineno)})]
    missing += [f"{owner.name}.{node.name}" for owner in TREE.body if isinstance(owner, ast.ClassDef)
                for node in owner.body if isinstance(node, ast.FunctionDef)
                and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert missing == []


def is_comparison(node):
    return isinstance(node, ast.Compare) or isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def test_law_9_nothing_clever():
    found = []
    for node in ast.walk(TREE):
        if isinstance(node, ast.BinOp) and (is_comparison(node.left) or is_comparison(node.right)):
            found.append(("arithmetic with a truth value", node.lineno))
        if isinstance(node, ast.Compare) and len({type(op) for op in node.ops}) > 1 and not all(
                isinstance(op, (ast.Lt, ast.LtE)) for op in node.ops):
            found.append(("a chain of mixed comparisons", node.lineno))
        if isinstance(node, ast.Call) and any(
                isinstance(each, ast.Constant) and each.value is True for each in node.args):
            found.append(("a bare True", node.lineno))
        if isinstance(node, ast.Constant) and isinstance(node.value, float) and 1e6 < node.value < math.inf:
            found.append(("a large number for never", node.lineno))
        if isinstance(node, ast.NamedExpr):
            found.append(("an assignment in an expression", node.lineno))
        if isinstance(node, ast.Global):
            found.append(("a global", node.lineno))
    assert found == []
    assert "socket.getaddrinfo =" not in TEXT


@pytest.mark.parametrize("minor", [6, 7, 8, 9])
def test_old_python_says_which_one_is_needed(minor):
    python = next(pathlib.Path(os.path.expanduser("~/.pyenv/versions")).glob(f"3.{minor}.*/bin/python"), None)
    if python is None:
        pytest.skip(f"no Python 3.{minor} here")
    done = subprocess.run([python, PROGRAM, "--help"], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Python 3.10 or newer is needed: ")


# ---- 2 Vocabulary
@pytest.mark.parametrize("show", [repr, str, format, "{!r:>40}".format, "%s".__mod__, ascii,
                                  lambda secret: json.dumps({"token": secret}, default=str),
                                  lambda secret: repr([secret]),
                                  lambda secret: repr(b9.Config(token=secret))],
                         ids=["repr", "str", "format", "padded", "percent", "ascii", "json", "list",
                              "config"])
def test_secret_shown_in_any_way_is_redacted(show):
    shown = show(b9.Secret(MACHINE_TOKEN))
    assert "set" in shown and f"{len(MACHINE_TOKEN)} char" in shown
    assert not any(MACHINE_TOKEN[at:at + 4] in shown for at in range(len(MACHINE_TOKEN) - 3))


def test_secret_reveal_gives_the_token():
    assert b9.Secret(MACHINE_TOKEN).reveal() == MACHINE_TOKEN


def redactor_of(*tokens):
    """One that masks these."""
    redactor = b9.Redactor()
    for number, token in enumerate(tokens):
        redactor.remember(f"token{number}", b9.Secret(token))
    return redactor


def test_redact_masks_every_piece_of_8_or_more():
    redactor, size = redactor_of(MACHINE_TOKEN), len(MACHINE_TOKEN)
    for start in range(size - 7):
        for end in range(start + 8, size + 1):
            line = redactor.redact(f"before {MACHINE_TOKEN[start:end]} after {MACHINE_TOKEN[start:end]}")
            assert not any(MACHINE_TOKEN[at:at + 8] in line for at in range(size - 7)), (start, end)
            assert line.startswith("before [redacted]") and " after [redacted]" in line


@pytest.mark.parametrize("token", ["12345678", "a+b/c==d\\e\"f", ".*(x[y]z", "k" * 1500],
                         ids=["eight", "odd", "pattern", "long"])
def test_redact_any_token_is_masked(token):
    assert redactor_of(token).redact(f"GET /{token}?") == "GET /[redacted]?"


def test_redact_of_the_word_it_writes_comes_to_an_end():
    masked = redactor_of("redacted").redact("a redacted %41 %zz %72edacted &amp;#114;edacted")
    assert masked.count("[redacted]") > 2


def test_redact_other_text_stays():
    assert redactor_of(MACHINE_TOKEN).redact("nothing to hide") == "nothing to hide"


def test_secret_as_json_is_refused():
    with pytest.raises(TypeError):
        json.dumps({"token": b9.Secret(MACHINE_TOKEN)})


def test_redactor_knows_the_current_token_and_the_one_before_for_ever():
    redactor = b9.Redactor()
    tokens = [f"rotated-{number}-{number * 7919:020d}" for number in range(200)]
    for token in tokens:
        redactor.remember("token", b9.Secret(token))
        redactor.remember("k3s_token", b9.Secret(K3S_TOKEN))
    masked = redactor.redact(" ".join([*tokens[-2:], K3S_TOKEN]))
    assert masked == "[redacted] [redacted] [redacted]"
    assert len(redactor.pieces) == 3


@pytest.mark.parametrize("text", ["%" + "25" * 3000, "&amp;" + "amp;" * 3000, "%26amp;" * 1000])
def test_redact_of_what_is_encoded_without_end_ends(text):
    assert len(redactor_of(MACHINE_TOKEN).redact(text)) <= len(text)


def in_base64(shift, encode=base64.b64encode):
    return lambda text: encode(b"\xfb\xff"[:shift] + text.encode() + b"\xfb\xff").decode()


ODD_TOKEN = "K10>>>?~a+b/c=&d%e?>~server:f9"   # its base64 has + and /, its URL-encoding has escapes
ENCODED = {
    "raw": str, "quoted": lambda text: urllib.parse.quote(text, ""), "quoted-path": urllib.parse.quote,
    "form": urllib.parse.quote_plus,
    "quoted-whole": lambda text: "".join(f"%{ord(letter):02x}" for letter in text),
    "quoted-as-go-does": lambda text: urllib.parse.quote(text, "$&+=:@"),
    "quoted-small": lambda text: re.sub("%..", lambda it: it[0].lower(), urllib.parse.quote(text, "")),
    **{f"base64-{shift}": in_base64(shift) for shift in range(3)},
    **{f"base64-url-safe-{shift}": in_base64(shift, base64.urlsafe_b64encode) for shift in range(3)},
    "base64-alone": lambda text: base64.b64encode(text.encode()).decode(),
    "base64-not-padded": lambda text: base64.b64encode(text.encode()).decode().rstrip("=")}


def leaks(text, *secrets):
    """The pieces of 8 characters that can be read in it, as it is or with URL-encoding or base64 undone."""
    texts = [text, urllib.parse.unquote(text)]
    for run in set(re.findall("[0-9A-Za-z+/_-]{11,}", text)):
        for start in range(4):
            part = run[start:].replace("-", "+").replace("_", "/")
            texts.append(base64.b64decode(part[:len(part) // 4 * 4]).decode("latin-1"))
    whole = "\n".join(texts)
    pieces = {secret[at:at + 8] for secret in secrets for at in range(len(secret) - 7)}
    return sorted(piece for piece in pieces if piece in whole)


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("token", [MACHINE_TOKEN, ODD_TOKEN], ids=["plain", "odd"])
def test_redact_encoded_token_inside_other_text_is_masked(token, name):
    redactor = redactor_of(token)
    line = f'said "{ENCODED[name](token)}" and /?{ENCODED[name](token)}&x {ENCODED[name](token[5:17])}.'
    assert leaks(line, token), "this test sees nothing"
    scrubbed = redactor.redact(line)
    assert leaks(scrubbed, token) == [] and scrubbed.startswith('said "') and scrubbed.endswith(".")
    assert scrubbed.count("[redacted]") >= 3


@pytest.mark.parametrize("name", [it for it in ENCODED if re.match("raw|quoted|.*[0-2]", it)])
@pytest.mark.parametrize("token", [MACHINE_TOKEN, ODD_TOKEN], ids=["plain", "odd"])
def test_redact_any_8_characters_of_an_encoded_token_are_masked(token, name):
    redactor = redactor_of(token)
    form = ENCODED[name](token)
    pieces = [ENCODED[name](token[at:at + 8]) for at in range(len(token) - 7)]
    if "base64" in name:  # without the characters that hold bits of what stands around it
        shift = int(name[-1])
        form = form[-(-8 * shift // 6):8 * (shift + len(token)) // 6]
        pieces = [form[at:at + 8] for at in range(len(form) - 7)]
    for piece in pieces:
        assert piece not in redactor.redact(piece) and "[redacted]" in redactor.redact(piece)


@pytest.mark.parametrize("name", ENCODED)
def test_redact_encoded_text_without_secrets_stays(name):
    line = ENCODED[name]("gateway.example:1994/api/v1 + 100 % of what is no token?") + MACHINE_TOKEN[:7]
    assert redactor_of(MACHINE_TOKEN).redact(line) == line


@pytest.mark.parametrize("kind", list(b9.Kind), ids=lambda kind: kind.name.lower())
def test_exit_codes_of_refusals_are_those_of_the_help(kind):
    codes = {b9.Kind.DENIED: 77, b9.Kind.FORBIDDEN: 77, b9.Kind.REFUSED: 78, b9.Kind.UNSAFE: 2}
    assert b9.EXIT_CODES.get(kind, 69) == codes.get(kind, 69)


# ---- 3 Decisions
OK, TROUBLE, FORGOTTEN = b9.Kind.OK, b9.Kind.TROUBLE, b9.Kind.FORGOTTEN
DENIED, FORBIDDEN, REFUSED = b9.Kind.DENIED, b9.Kind.FORBIDDEN, b9.Kind.REFUSED
REGISTER, KEEPALIVE = b9.REGISTER, b9.KEEPALIVE
BOTH = (REGISTER, KEEPALIVE)
LOST = ("Failed to update keepalive: failed to get machine state"
        f" <provider:machine:generic:gpu:{ID}>: machine not found")
REGISTERED = {"machine_id": ID, "status": "registered", "pool_name": "gpu", "ttl_seconds": 300}
READY = REGISTERED | {"status": "ready", "last_keepalive": "1767804357", "agent_version": "0.1.0-python"}
HTML = b"<html><head><title>502 Bad Gateway</title></head></html>"
DEEP = b"[" * 20000 + b"]" * 20000
NEW, CHECK, HEALTH = "beta9 machine create --pool gpu", "--gateway-host", "/api/v1/health"
RETRY = ["Fri, 31 Dec 1999 23:59:59 GMT", "Sat, 01 Jan 2000 00:00:29 GMT"]


def reply(what, call, status, body, kind, *words, headers=None):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return pytest.param(call, status, headers or {}, body, kind, words, id=f"{call}-{status}-{what}")


REPLIES = [
    # POST /machine/register
    reply("whole", REGISTER, 200, {"config": None, "machine_state": REGISTERED}, OK),
    reply("upstream", REGISTER, 200, {"config": None}, OK),
    reply("bare-object", REGISTER, 200, {}, OK),
    reply("invalid-payload", REGISTER, 400, {"message": "Invalid payload"}, REFUSED, "--dry-run"),
    reply("unauthorized", REGISTER, 401, {"message": "Unauthorized"}, DENIED, "Unauthorized", NEW,
          "database", "expired"),
    reply("wrong-token", REGISTER, 403, {"message": "Invalid token"}, FORBIDDEN, "Invalid token", "another kind", NEW),
    reply("pool", REGISTER, 500, {"message": "Invalid pool name"}, REFUSED, "pool gpu", "--pool-name"),
    reply("cpu", REGISTER, 500, {"message": "Invalid machine cpu value"}, REFUSED, "cpu value", "--dry-run"),
    reply("memory", REGISTER, 500, {"message": "Invalid machine memory value"}, REFUSED, "--dry-run"),
    reply("gpus", REGISTER, 500, {"message": "Invalid gpu count"}, REFUSED, "gpu count"),
    reply("redis", REGISTER, 500, {"message": "Failed to register machine"}, TROUBLE, HEALTH),
    reply("no-tailscale", REGISTER, 500, {"message": "Unable to create remote config"}, REFUSED, "upstream",
          "fork"),
    reply("internal", REGISTER, 500, {"message": "Internal Server Error"}, TROUBLE, HEALTH),
    reply("not-found", REGISTER, 404, {"message": "Not Found"}, TROUBLE, CHECK),
    # POST /machine/keepalive
    reply("whole", KEEPALIVE, 200, {"status": "ok", "machine_state": READY}, OK),
    reply("no-state", KEEPALIVE, 200, {"status": "ok"}, OK),
    reply("null-state", KEEPALIVE, 200, {"status": "ok", "machine_state": None}, OK),
    reply("expired", KEEPALIVE, 500, {"message": LOST}, FORGOTTEN, "does not know"),
    reply("redis", KEEPALIVE, 500, {"message": "Failed to update keepalive: failed to set machine state x"},
          TROUBLE),
    reply("internal", KEEPALIVE, 500, {"message": "Internal Server Error"}, TROUBLE, HEALTH),
    reply("required", KEEPALIVE, 400, {"message": "machine_id and pool_name are required"}, REFUSED),
    reply("invalid-payload", KEEPALIVE, 400, {"message": "Invalid payload"}, REFUSED, "--dry-run"),
    reply("unauthorized", KEEPALIVE, 401, {"message": "Unauthorized"}, DENIED, NEW),
    reply("wrong-token", KEEPALIVE, 403, {"message": "Invalid token"}, FORBIDDEN, NEW),
    reply("no-route", KEEPALIVE, 404, {"message": "Not Found"}, REFUSED, "upstream", "keepalive route",
          "fork"),
    reply("html", KEEPALIVE, 404, HTML, TROUBLE, CHECK),
    # The structured errors, whatever the status
    *(reply(code, KEEPALIVE, status, {"error_code": code, "message": "m", "suggestion": "s"}, kind)
      for status in (200, 404, 410, 500) for code, kind in (
          ("machine_not_found", FORGOTTEN), ("machine_expired", FORGOTTEN), ("invalid_token", DENIED),
          ("invalid_pool", REFUSED))),
    *(reply(code, REGISTER, status, {"error_code": code, "message": "m"}, kind)
      for status in (200, 400, 500) for code, kind in (("invalid_token", DENIED), ("invalid_pool", REFUSED))),
    reply("unknown-code", KEEPALIVE, 500, {"error_code": "brand_new", "message": "m", "suggestion": "do it"},
          TROUBLE, "brand_new m do it"),
    reply("ok-and-error", KEEPALIVE, 200, {"status": "ok", "error_code": "machine_expired"}, FORGOTTEN),
    # What is no answer of a gateway
    *(reply(what, call, 200, body, TROUBLE, CHECK) for call in BOTH for what, body in (
        ("html", HTML), ("list", []), ("null", None), ("text", "ok"), ("number", 1), ("empty", b""),
        ("deep", DEEP),
        ("bytes", bytes(range(256))), ("cut-short", b'{"status": "ok"'), ("other-machine", {
            "status": "ok", "config": None, "machine_state": REGISTERED | {"machine_id": "00000000"}}))),
    *(reply(what, KEEPALIVE, 200, body, TROUBLE, CHECK) for what, body in (
        ("no-status", {}), ("not-ok", {"status": "not ok"}), ("true", {"status": True}),
        ("list", {"status": ["ok"]}),
        ("health", {"status": "not ok", "error": "redis"}))),
    *(reply("empty", call, 204, b"", TROUBLE) for call in BOTH),
    *(reply("ok", call, 201, {"status": "ok"}, TROUBLE) for call in BOTH),
    *(reply("redirect", call, status, b"", TROUBLE, "https://login.example/", "redirect", CHECK,
            headers={"Location": "https://login.example/"})
      for call in BOTH for status in (301, 302, 307, 308)),
    *(reply("no-location", call, 302, b"", TROUBLE, CHECK) for call in BOTH),
    *(reply("proxy", call, status, HTML, TROUBLE, HEALTH)
      for call in BOTH for status in (429, 502, 503, 504)),
    *(reply("odd-message", call, 500, {"message": odd}, TROUBLE) for call in BOTH for odd in ({}, 1, ["x"])),
]


@pytest.fixture(scope="module")
def gpu_config():
    return config_of("--pool-name", "gpu", "--gateway-host", "gw.example")


@pytest.mark.parametrize("call, status, headers, body, kind, words", REPLIES)
def test_classify_answer_means_kind_and_says_what_to_do(call, status, headers, body, kind, words, gpu_config):
    outcome = b9.classify(call, status, headers, body, ID, gpu_config)
    said = f"{outcome.text}. {outcome.remedy}"
    assert outcome.kind is kind
    assert kind is OK or str(status) in outcome.text and outcome.remedy
    assert all(word in said for word in words), said
    assert said.isprintable() and not re.search("{(pool_name|gateway|config)", said)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("headers, seconds", [
    ({}, 0), ({"Retry-After": "7"}, 7), ({"Retry-After": "0"}, 0), ({"Retry-After": "86400"}, 86400),
    ({"Retry-After": RETRY[1], "Date": RETRY[0]}, 30), ({"Retry-After": RETRY[0], "Date": RETRY[1]}, 0),
    ({"Retry-After": RETRY[1]}, 0), ({"Retry-After": RETRY[1], "Date": "yesterday"}, 0),
    ({"Retry-After": RETRY[1].replace("GMT", "-0000"), "Date": RETRY[0]}, 0),
    ({"Retry-After": "-7"}, 0), ({"Retry-After": "7.5"}, 0), ({"Retry-After": "soon"}, 0),
    ({"Retry-After": ""}, 0),
    ({"Retry-After": "Sat, 01 Jan 99999 00:00:00 GMT", "Date": RETRY[0]}, 0)],
    ids=["none", "seconds", "zero", "a-day", "date", "date-passed", "no-date", "bad-date", "zone-unknown",
         "negative",
         "fraction", "garbage", "empty", "year-99999"])
def test_classify_retry_after_is_seconds_or_nothing(status, headers, seconds, gpu_config):
    outcome = b9.classify(KEEPALIVE, status, headers, HTML, ID, gpu_config)
    assert (outcome.kind, outcome.retry_after) == (TROUBLE, seconds)


@pytest.mark.parametrize("value", ["9" * 9, "9" * 400, "٣", "²", RETRY[1]],
                         ids=["large", "huge", "arabic", "two", "date"])
def test_classify_retry_after_however_large_is_waited_for_within_reason(value, gpu_config):
    outcome = b9.classify(KEEPALIVE, 503, {"Retry-After": value, "Date": RETRY[0]}, HTML, ID, gpu_config)
    assert 1060 < b9.lease_after(KEPT, KEEPALIVE, outcome, 1060.0, every(60), high).due <= 1060 + 100


@pytest.mark.parametrize("status", [200, 500, 502, 301, 404])
def test_classify_retry_after_of_other_answers_is_ignored(status, gpu_config):
    assert b9.classify(KEEPALIVE, status, {"Retry-After": "7"}, b"{}", ID, gpu_config).retry_after == 0


@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize("body, ttl", [
    ("300", 300), ("6", 6), ("4.5", 4.5), ("86400", 86400), (None, None), ("0", None), ("-1", None),
    ("true", None),
    ("1e9", None), ('"300"', None), ("null", None), ("NaN", None), ("Infinity", None), ("[300]", None),
    ("0.5", None), ("1" * 500, None)],
    ids=["today", "short", "fraction", "day", "missing", "zero", "negative", "true", "huge", "text", "null",
         "nan",
         "infinity", "list", "below-1", "long-integer"])
def test_classify_ttl_seconds_is_believed_only_where_sane(call, body, ttl, gpu_config):
    state = "{}" if body is None else '{"ttl_seconds": %s}' % body
    outcome = b9.classify(call, 200, {}, b'{"status": "ok", "machine_state": %s}' % state.encode(), ID,
                          gpu_config)
    assert (outcome.kind, outcome.ttl) == (OK, ttl)


@pytest.mark.parametrize("call, status, body", [
    (REGISTER, 500, json.dumps({"message": "\x1b[2J\x1b]0;x\x07\nroot: \r\u202e" + "A" * 9000})),
    (KEEPALIVE, 200, "\x1b[31m\n<html>" + "A" * 9000),
    (KEEPALIVE, 500, json.dumps({"error_code": "\x00", "suggestion": "\x9b2J" * 5000}))],
    ids=["message", "html", "suggestion"])
def test_classify_hostile_text_is_visible_and_short(call, status, body, gpu_config):
    plain = b9.classify(call, status, {}, b"{}" if status == 500 else b"", ID, gpu_config).text
    text = b9.classify(call, status, {}, body.encode(), ID, gpu_config).text
    assert text.isprintable() and len(text) < len(plain) + 4 * 200
    assert r"\x" in text


def test_classify_hostile_location_is_visible_and_short(gpu_config):
    text = b9.classify(KEEPALIVE, 302, {"Location": "http://x/\x1b[2J" + "y" * 9000}, b"", ID,
                       gpu_config).text
    assert text.isprintable() and r"\x1b[2J" in text and len(text) < 400


@pytest.mark.parametrize("status, more", [(200, {}), (200, {"machine_state": {"machine_id": "00000000"}}),
                                          (500, {}),
                                          (404, {"message": ""}), (500, {"message": "Invalid pool name"})],
                         ids=["good", "other-machine", "no-message", "empty-message", "refused"])
def test_classify_config_in_answer_shows_nothing_of_it(status, more, gpu_config):
    body = {"config": {"postgres": {"password": "hunter22"}, "s3\x1b": "hunter22"}} | more
    outcome = b9.classify(REGISTER, status, {}, json.dumps(body).encode(), ID, gpu_config)
    shown = repr(outcome) + b9.describe_body(json.dumps(body).encode())
    assert "hunter22" not in shown and "password" not in shown and "postgres" not in shown


@pytest.mark.parametrize("body", [
    '{"config": {"a": "hunter22"}}', '[{"config": {"a": "hunter22"}}]', '{"config": {"a": "hunter22"}',
    '{"config": {"a": "hunter22"}} trailing'], ids=["object", "list", "cut-short", "trailing"])
def test_describe_body_config_values_are_never_shown(body):
    assert "hunter22" not in b9.describe_body(body.encode())


@pytest.mark.parametrize("text, shown", [
    ("plain", "plain"), ("a\nb\r\t", r"a\nb\r\t"), ("\x1b[2J", r"\x1b[2J"), ("\u202egpj", r"\u202egpj"),
    (7, "7"),
    ("grün €", "grün €"), ("\ud800", r"\ud800"), (None, "None")])
def test_printable_control_characters_are_spelled_out(text, shown):
    assert b9.printable(text) == shown


@pytest.mark.parametrize("size", [0, 1, 199, 200, 201, 10 ** 6])
@pytest.mark.parametrize("letter", ["x", "\x1b"], ids=["plain", "escape"])
def test_printable_long_text_is_cut_at_its_limit(size, letter):
    shown = b9.printable(letter * size)
    assert shown.isprintable() and len(shown) <= 200 * len(b9.printable(letter))


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", DEEP, b"1" * 5000, b"nul"],
                         ids=["empty", "cut", "bytes", "deep", "long-integer", "word"])
def test_parse_json_of_no_json_is_none(body):
    assert b9.parse_json(body) is None


@pytest.mark.parametrize("network", [
    "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16",
    "::1/128", "fc00::/7", "fe80::/10"])
def test_is_private_from_first_to_last_address_of_a_network(network):
    first, last = ipaddress.ip_network(network)[0], ipaddress.ip_network(network)[-1]
    assert b9.is_private(str(first)) and b9.is_private(str(last))
    assert not b9.is_private(str(first - 1)) and not b9.is_private(str(last + 1))


@pytest.mark.parametrize("address, private", [
    ("fe80::1%eth0", True), ("fd7a:115c:a1e0::1", True), ("8.8.8.8", False), ("203.0.113.7", False),
    ("192.0.2.1", False), ("0.0.0.0", False), ("255.255.255.255", False), ("224.0.0.1", False), ("::", False),
    ("2001:db8::7", False), ("2606:4700::1111", False), ("ff02::1", False), ("::ffff:203.0.113.7", False),
    ("::203.0.113.7", False), ("64:ff9b::10.0.0.1", False), ("2002:a00:1::", False)])
def test_is_private_of_an_address_anybody_may_have_is_false(address, private):
    assert b9.is_private(address) is private


@pytest.mark.parametrize("argv, location, mentioned", [
    ([], "https://gw.example/", True), ([], "https://gw.example:8443/api/v1/x", True),
    ([], "https://gw.example", True), ([], "HTTPS://GW.example/", True),
    (["--gateway-host", "fd7a::1"], "https://[fd7a::1]/", True),
    ([], "https://gw.example.test/", False), ([], "https://gw.example@login.test/", False),
    ([], "https://gw.example:x@login.test/", False),
    ([], "https://login.test/?to=https://gw.example/", False), ([], "http://gw.example/", False),
    ([], "/login", False), ([], "https://gw.examples/", False),
    (["--gateway-host", "10.0.0.1"], "https://10.0.0.10/", False),
    (["--tls"], "https://gw.example/login", False)],
    ids=["same", "port", "bare", "capitals", "ipv6",
         "longer-name", "user", "password", "query", "http", "path",
         "longer-word", "longer-address", "tls-already"])
def test_classify_redirect_names_its_target_and_tls_for_the_same_host_alone(argv, location, mentioned):
    outcome = b9.classify(KEEPALIVE, 307, {"Location": location}, b"", ID,
                          config_of("--gateway-host", "gw.example", *argv))
    assert outcome.kind is TROUBLE and f"redirect to {location}" in outcome.text
    assert "never followed" in outcome.remedy and ("--tls" in outcome.remedy) is mentioned


def low(least, most):
    return least


def high(least, most):
    return most


@pytest.mark.parametrize("cap", [0.5, 3, 11, 66, 264])
@pytest.mark.parametrize("failing_for", [0, 1, 4, 30, 60, 3600, 10 ** 6])
def test_backoff_stays_between_floor_and_ceiling(failing_for, cap):
    floor, ceiling = b9.backoff(failing_for, cap, low), b9.backoff(failing_for, cap, high)
    assert ceiling == min(max(4, min(failing_for, 60)), cap)
    assert 0 < floor == min(1, ceiling / 4)


def test_backoff_at_its_cap_stays_jittered():
    chance = random.Random(7)
    draws = [b9.backoff(10 ** 6, 66, chance.uniform) for _ in range(2000)]
    assert min(draws) < 5 and max(draws) > 56 and 28 < sum(draws) / len(draws) < 33
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("interval, ttl, beat", [(60, 300, 60), (60, 180, 60), (60, 6, 2), (240, 300, 100),
                                                 (5, 300, 5)])
def test_lease_beat_is_never_over_a_third_of_the_ttl(interval, ttl, beat):
    kept = b9.Lease(0, 300, registered=True, kept=True)
    outcome = b9.Outcome(b9.Kind.OK, ttl=ttl)
    assert b9.lease_after(kept, KEEPALIVE, outcome, 0, every(interval), lambda low, high: 1.0).due == beat


@pytest.mark.parametrize("registered, confirmed, ttl, call", [
    (False, 0, 300, REGISTER), (False, 990, 300, REGISTER), (True, 990, 300, KEEPALIVE),
    (True, 700, 300, KEEPALIVE),
    (True, 699, 300, REGISTER), (True, 990, 6, REGISTER)],
    ids=["new", "forgotten", "kept", "at-the-ttl", "over-the-ttl", "over-a-short-ttl"])
def test_next_call_registers_where_the_gateway_does_not_know_us(registered, confirmed, ttl, call):
    lease = b9.Lease(0, ttl=ttl, registered=registered, confirmed_at=confirmed)
    assert b9.next_call(lease, 1000) == call


def every(interval):
    return b9.Config(keepalive_interval=interval)


def after(lease, call, kind, now, draw=low, interval=60, **more):
    return b9.lease_after(lease, call, b9.Outcome(kind, **more), now, every(interval), draw)


NEW_LEASE = b9.Lease(1000.0)
JUST_REGISTERED = b9.Lease(1001.0, registered=True, confirmed_at=1001.0)
KEPT = b9.Lease(1060.0, registered=True, kept=True, confirmed_at=1001.0)


def test_lease_after_first_registration_is_kept_alive_at_once():
    lease = after(NEW_LEASE, REGISTER, OK, 1001.0)
    assert lease == JUST_REGISTERED and b9.next_call(lease, 1001.0) == KEEPALIVE


@pytest.mark.parametrize("draw, due", [(low, 1007), (high, 1061)])
def test_lease_after_first_keepalive_takes_any_phase(draw, due):
    lease = after(JUST_REGISTERED, KEEPALIVE, OK, 1001.1, draw)
    assert lease.due == pytest.approx(due) and lease.kept and lease.confirmed_at == 1001.1


@pytest.mark.parametrize("draw, due", [(low, 1114), (high, 1126)])
def test_lease_after_keepalive_goes_from_schedule_to_schedule(draw, due):
    assert after(KEPT, KEEPALIVE, OK, 1069.0, draw).due == pytest.approx(due)


@pytest.mark.parametrize("draw, due", [(low, 5054), (high, 5066)])
def test_lease_after_long_sleep_sends_what_is_overdue_once(draw, due):
    assert after(KEPT, KEEPALIVE, OK, 5000.0, draw).due == pytest.approx(due)


@pytest.mark.parametrize("call", BOTH)
def test_lease_after_ttl_of_the_answer_is_taken_over(call):
    lease = after(KEPT, call, OK, 1060.0, high, ttl=6.0)
    assert lease.ttl == 6 and lease.due <= 1060 + 2.2
    assert after(lease, KEEPALIVE, OK, 1062.0).ttl == 6


@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize("failing_for, draw, pause", [
    (None, low, 1), (None, high, 4), (10, high, 10), (50, low, 1), (50, high, 50), (9999, low, 1),
    (9999, high, 60)])
def test_lease_after_trouble_backs_off_with_the_outage(call, failing_for, draw, pause):
    since = None if failing_for is None else 2000.0 - failing_for
    lease = after(KEPT._replace(failing_since=since), call, TROUBLE, 2000.0, draw)
    assert lease.due == pytest.approx(2000 + pause)
    assert lease.failing_since == (2000 if since is None else since)
    assert (lease.registered, lease.confirmed_at) == (KEPT.registered, KEPT.confirmed_at)


def test_lease_after_trouble_never_sleeps_over_the_interval():
    lease = b9.Lease(1060.0, 6.0, True, True, 1050.0, failing_since=100.0)
    assert after(lease, KEEPALIVE, TROUBLE, 1060.0, high).due == pytest.approx(1060 + 2.2)


def test_lease_after_recovery_has_forgotten_the_trouble():
    lease = after(KEPT._replace(failing_since=1030.0, denied_since=1040.0), KEEPALIVE, OK, 1070.0)
    assert lease.failing_since is None and lease.denied_since is None


def test_lease_after_registration_goes_on_failing_until_kept_alive():
    failing = NEW_LEASE._replace(failing_since=990.0)
    assert after(failing, REGISTER, OK, 1001.0).failing_since == 990


def test_lease_after_forgotten_registers_at_once():
    lease = after(KEPT, KEEPALIVE, FORGOTTEN, 1061.0, high)
    assert lease.due == 1061 and b9.next_call(lease, 1061.0) == REGISTER
    again = after(lease, REGISTER, OK, 1061.5)
    assert again.due == 1061.5 and b9.next_call(again, 1061.5) == KEEPALIVE


def test_lease_after_forgotten_again_waits_one_interval():
    lease = after(KEPT, KEEPALIVE, FORGOTTEN, 1061.0)
    lease = after(lease, REGISTER, OK, 1062.0)
    lease = after(lease, KEEPALIVE, FORGOTTEN, 1063.0)
    assert lease.due == 1122 and b9.next_call(lease, 1122.0) == REGISTER


@pytest.mark.parametrize("interval", [10, 60])
def test_lease_with_gateway_that_always_forgets_registers_once_an_interval(interval):
    lease, now, registrations, draw = b9.Lease(1000.0), 1000.0, [], random.Random(1).uniform
    while now < 4600:
        call = b9.next_call(lease, now)
        registrations += [now] * (call == REGISTER)
        lease = after(lease, call, OK if call == REGISTER else FORGOTTEN, now + 0.01, draw, interval)
        now = max(now + 0.01, lease.due)
    pauses = [later - sooner for sooner, later in zip(registrations[1:], registrations[2:])]
    assert min(pauses) >= interval and len(registrations) <= 3600 / interval + 2


@pytest.mark.parametrize("kind", [DENIED, FORBIDDEN], ids=lambda kind: kind.name.lower())
def test_lease_after_denied_waits_up_to_the_cap_from_the_first(kind):
    lease = after(KEPT, KEEPALIVE, kind, 1061.0, high)
    assert lease.due == 1121 and lease.denied_since == 1061 and lease.registered
    assert after(KEPT, KEEPALIVE, kind, 1061.0, low).due == 1062
    lease = after(lease, KEEPALIVE, kind, 1100.0)
    assert lease.denied_since == lease.failing_since == 1061
    lease = after(lease, KEEPALIVE, TROUBLE, 1101.0)
    assert lease.denied_since is None and lease.failing_since == 1061


@pytest.mark.parametrize("kind", [DENIED, FORBIDDEN, b9.Kind.UNSAFE_NAME], ids=lambda kind: kind.name.lower())
def test_lease_after_denied_before_the_first_registration_backs_off_as_after_any_failure(kind):
    assert after(NEW_LEASE, REGISTER, kind, 1000.0, high).due == 1004


def test_deadline_of_a_keepalive_is_the_interval_within_2_and_10_s_and_of_a_registration_10_s():
    for ttl, interval, deadline in ((300, 60, 10), (300, 5, 5), (300, 0.1, 2), (12, 60, 4), (3, 60, 2)):
        assert b9.deadline_of(KEEPALIVE, KEPT._replace(ttl=ttl), every(interval)) == deadline
        assert b9.deadline_of(REGISTER, KEPT._replace(ttl=ttl), every(interval)) == 10


@pytest.mark.parametrize("value, ttl, least, most", [
    (5, 300, 5, 30), (75, 300, 75, 100), (9999, 300, 75, 100), (9999, 86400, 75, 100), (9999, 6, 1.5, 2)],
    ids=["short", "quarter", "too-long", "long-ttl", "short-ttl"])
def test_lease_after_retry_after_is_obeyed_within_reason_and_jittered(value, ttl, least, most):
    lease = KEPT._replace(ttl=ttl)
    dues = [after(lease, KEEPALIVE, TROUBLE, 1061.0, draw, retry_after=value).due for draw in (low, high)]
    assert dues == [pytest.approx(1061 + least), pytest.approx(1061 + most)]


@pytest.mark.parametrize("timeout, once, kind, waited, denied_for, code", [
    (None, False, TROUBLE, 10 ** 6, None, None), (30, False, TROUBLE, 29, None, None),
    (30, False, TROUBLE, 30, None, 69), (0, False, TROUBLE, 0, None, 69), (None, True, TROUBLE, 0, None, 69),
    (None, False, FORGOTTEN, 10, None, None), (None, True, FORGOTTEN, 0, None, 69),
    (None, False, FORBIDDEN, 0, 0, 77), (None, True, FORBIDDEN, 0, 0, 77),
    (None, False, REFUSED, 0, None, 78),
    (None, True, REFUSED, 0, None, 78), (None, False, DENIED, 0, 0, None),
    (None, False, DENIED, 900, 59, None),
    (None, False, DENIED, 60, 60, 77), (None, True, DENIED, 0, 0, 77), (0, False, DENIED, 0, 0, 77),
    (30, False, DENIED, 29, 29, None), (30, False, DENIED, 900, 29, 77),
    (30, False, DENIED, 30, 30, 77), (900, False, DENIED, 60, 60, 77)],
    ids=lambda value: getattr(value, "name", str(value)).lower())
def test_exit_code_of_failure_before_first_ready(timeout, once, kind, waited, denied_for, code):
    config = config_of(*["--once"] * once, *([] if timeout is None else ["--startup-timeout", str(timeout)]))
    lease = b9.Lease(0, denied_since=None if denied_for is None else 5000.0 - denied_for)
    assert b9.exit_code_after(b9.Outcome(kind), lease, waited, 5000.0, config) == code


GPUS = [b9.Gpu("A100", True), b9.Gpu("A100", False), b9.Gpu(None, False)]
METRICS = b9.Metrics(15.5, 42.3, 8000, 32094, 500_000_000_000, 300_000_000_000, 1)
UNKNOWN = b9.Metrics(None, None, None, None, None, None, 0)


@pytest.mark.parametrize("metrics, gpus, argv, offer", [
    (METRICS, GPUS, [], (8000, 32094, 2)),
    (METRICS, GPUS, ["--max-cpu", "6.5", "--max-memory", "16Gi", "--max-gpus", "1"],
     (6500, 16384, 1)),
    (METRICS, GPUS, ["--max-cpu", "64", "--max-memory", "999Gi", "--max-gpus", "8"],
     (8000, 32094, 2)),
    (METRICS, GPUS, ["--max-cpu", "0.001", "--max-memory", "1Mi", "--max-gpus", "0"], (1, 1, 0)),
    (METRICS, [], [], (8000, 32094, 0)),
    (METRICS, None, ["--max-gpus", "4"], (8000, 32094, None)),
    (UNKNOWN, None, ["--max-cpu", "2", "--max-memory", "1Gi"], (None, None, None))],
    ids=["all", "capped", "caps-above", "nothing", "no-gpus", "gpus-unknown", "unknown"])
def test_offer_of_known_capacity_under_its_caps(metrics, gpus, argv, offer):
    assert b9.offer_of(metrics, gpus, config_of(*argv)) == offer


# What is offered when; each row is a sample of the machine's GPUs, and what is registered then
FULL = (8000, 32000)


def offers(plan, *samples):
    """`gpu_count` and whether CPU is offered, after each (minute, GPUs or all three, k3s fault)."""
    seen = []
    for minute, sample, *fault in samples:
        sample = sample if isinstance(sample, tuple) else (*FULL, sample)
        plan = b9.plan_offer(plan, b9.Offer(*sample), b9.K3sView(*fault), 60.0 * minute)
        seen.append((plan.offer.gpu_count, (plan.offer.cpu or 0) > 0))
    return seen, plan


def first(gpus, promised=0, fault=""):
    return b9.first_offer(b9.Offer(*FULL, gpus), promised, b9.K3sView(fault), 0.0)


@pytest.mark.parametrize("gpus, promised, fault, offer", [
    (4, 0, "", (4, True)), (4, 4, "", (4, True)), (4, 2, "", (4, True)), (3, 4, "", (3, False)),
    (0, 4, "", (0, False)), (None, 4, "", (0, False)), (None, 0, "", (0, True)), (4, 0, "no k3s", (4, False)),
    (3, 4, "no k3s", (3, False))])
def test_first_offer_takes_no_work_where_gpus_are_fewer_or_no_worker_can_run(gpus, promised, fault, offer):
    plan = first(gpus, promised, fault)
    assert (plan.offer.gpu_count, plan.offer.cpu > 0) == offer and plan.offer.memory == FULL[1]
    assert (plan.reason == "") is offer[1]
    assert not fault or plan.reason == fault


@pytest.mark.parametrize("gpus, promised, samples, expected", [
    (4, 0, [(1, 3), (2, 3), (60, 3)], [(4, True)] * 3),
    (4, 0, [(1, 3), (2, 3), (3, 4), (4, 4)], [(4, True)] * 4),
    (4, 0, [(1, 5), (2, 5), (3, 4), (4, 4)], [(4, True), (5, True), (5, True), (5, True)]),
    (4, 0, [(1, None), (2, None)], [(4, True)] * 2),
    (0, 0, [(1, 4), (2, 4)], [(0, True), (4, True)]),
    (3, 4, [(1, 3), (9, 3), (10, 3), (11, 3)], [(3, False), (3, False), (3, True), (3, True)]),
    (3, 4, [(1, 4), (2, 4)], [(3, False), (4, True)]),
    (2, 4, [(1, 3), (2, 3), (10, 3)], [(2, False), (3, False), (3, True)]),
    (3, 4, [(8, 2), (9, 2), (10, 2), (18.9, 2), (19, 2)], [(3, False), (2, False), (2, False), (2, False),
                                                           (2, True)]),
    (3, 4, [(10, 3), (11, 2), (12, 2)], [(3, True), (3, True), (3, True)]),
    (None, 4, [(1, None), (2, 4), (3, 4)], [(0, False), (0, False), (4, True)]),
    (None, 4, [(9, None), (18, None), (27, None), (28, 3), (29, 3), (37, 3)],
     [(0, False)] * 4 + [(3, False), (3, True)]),
    (4, 0, [(1, 4, "k3s"), (2, 4, "")], [(4, False), (4, True)]),
    (4, 0, [(1, 4, "k3s"), (2, 3, "k3s"), (3, 3, "k3s"), (4, 3)], [(4, False)] * 3 + [(4, True)]),
    (3, 4, [(9, 3, "k3s"), (10, 3, "k3s"), (11, 3, "k3s"), (12, 3)], [(3, False)] * 3 + [(3, True)])],
    ids=["lost-stays-registered", "lost-and-back", "more-and-fewer", "unknown", "hung-at-the-start",
         "fewer-at-the-start", "back-while-waiting", "one-back-while-waiting", "one-more-lost-while-waiting",
         "lost-after-waiting", "unknown-then-all", "unknown-for-long",
         "k3s-away", "lost-while-k3s-is-away", "waited-while-k3s-is-away"])
def test_plan_offer_over_time(gpus, promised, samples, expected):
    assert offers(first(gpus, promised), *samples)[0] == expected


def test_plan_offer_of_other_cpu_or_memory_counts_after_two_samples():
    seen, plan = offers(first(4), (1, (4000, 32000, 4)), (2, (4000, 16000, 4)))
    assert plan.offer == b9.Offer(8000, 32000, 4)
    assert offers(plan, (3, (4000, 16000, 4)))[1].offer == b9.Offer(4000, 16000, 4)
    assert offers(plan, (3, (None, None, None)))[1].offer == b9.Offer(4000, 16000, 4)


def test_plan_offer_promises_what_workers_may_hold_and_lowers_it_only_when_they_had_time():
    for samples, promised in (([(1, 3), (2, 3)], 4), ([(1, 5), (2, 5)], 5), ([(1, 5), (2, 5, "k3s")], 4)):
        assert offers(first(4), *samples)[1].promised == promised
    assert first(3, 4).promised == offers(first(3, 4), (9, 3))[1].promised == 4
    assert offers(first(3, 4), (10, 3))[1].promised == 3
    plan = first(4)
    for now, promised in ((60.0, 4), (89.9, 4), (90.1, 3)):
        plan = b9.plan_offer(plan, None, b9.K3sView("k3s", {}, 3), now)
        assert plan.promised == promised, "no worker is left, and none can be on its way any more"


def test_plan_offer_reasons_have_their_remedy():
    lost = offers(first(4), (1, 3), (2, 3))[1].reason
    assert all(words in lost for words in ("1 of 4 GPUs", "nvidia-smi", "beta9 machine drain", "restart"))
    assert "10 minutes" in first(3, 4).reason


# What is believed of k3s, look by look, and what is offered then
def looks(*signs):
    """Looks from signs: + usable, a letter for a fault, and with a number the GPUs of the node."""
    return [b9.K3sView("" if sign[0] == "+" else sign[0], {} if sign[0] == "+" else None,
                       int(sign[1:]) if sign[1:] else None) for sign in signs]


def believed(*signs, view=b9.K3sView("unseen")):
    """Fault and GPUs that are believed after each look."""
    state, seen = b9.K3sState(view), []
    for number, look in enumerate(looks(*signs)):
        state = b9.believe(state, look, 10.0 * number)
        seen.append((state.view.fault, state.view.gpu_count))
    return seen


@pytest.mark.parametrize("signs, faults", [
    ("+", [""]), ("a+", ["a", ""]), ("ab+", ["a", "b", ""]), ("+a", ["", ""]), ("+a+", ["", "", ""]),
    ("+aa", ["", "", "a"]), ("+ab", ["", "", "b"]), ("+aab", ["", "", "a", "b"]), ("+aa+", ["", "", "a", "a"]),
    ("+aa++", ["", "", "a", "a", ""]), ("+aa+a+", ["", "", "a", "a", "a", "a"]), ("+a+a+a", [""] * 6)],
    ids=lambda value: value if isinstance(value, str) else "")
def test_gate_opens_at_the_first_good_look_and_then_changes_after_two_that_agree(signs, faults):
    assert [fault for fault, _ in believed(*signs)] == faults


@pytest.mark.parametrize("signs, gpus", [
    (["+4"], [4]), (["+4", "+0"], [4, 4]), (["+4", "+0", "+0"], [4, 4, 0]), (["+4", "+0", "+4"], [4, 4, 4]),
    (["+0", "+4", "+4"], [0, 0, 4]), (["+4", "+", "+"], [4, 4, 4]), (["+", "+4"], [None, 4]),
    (["+4", "+0", "a", "+0", "+0"], [4, 4, 4, 4, 0])],
    ids=["first", "one-fall", "fallen", "restarted", "risen", "unknown", "known-later", "unknown-between"])
def test_gpus_of_the_node_change_after_two_looks_that_agree(signs, gpus):
    assert [count for _, count in believed(*signs)] == gpus


def test_belief_keeps_since_when_it_holds_and_the_age_of_each_worker():
    state = b9.believe(b9.K3sState(b9.K3sView("unseen"), since=5.0), b9.K3sView("", {"a": b9.Worker("x", 7.0)}), 10.0)
    assert state.since == 10.0
    state = b9.believe(state, b9.K3sView("", {"a": b9.Worker("y", 8.0), "b": b9.Worker("x", 9.0)}), 20.0)
    assert state.since == 10.0 and state.view.workers == {"a": b9.Worker("y", 7.0), "b": b9.Worker("x", 9.0)}
    state = b9.believe(state, b9.K3sView("gone"), 30.0)
    assert state.view == b9.K3sView("") and state.since == 10.0
    assert b9.believe(state, b9.K3sView("gone"), 40.0).since == 40.0


def crew(names):
    return None if names is None else {name: b9.Worker("Running", 0.0) for name in names}


@pytest.mark.parametrize("gpus, promised, views, expected", [
    (4, 0, [("abcd", 4), ("abcd", 3), ("abc", 3), ("", 3)], [(4, True), (3, False), (3, False), (3, True)]),
    (4, 0, [("ab", 4), ("ab", 3), ("abx", 3), ("x", 3), ("", 3)], [(4, True)] + [(3, False)] * 3 + [(3, True)]),
    (4, 0, [("ab", 4), ("ab", 3), (None, 3), ("", 3)], [(4, True), (3, False), (3, False), (3, True)]),
    (4, 0, [("ab", 4), ("ab", 3), ("ab", 4)], [(4, True), (3, False), (4, True)]),
    (4, 0, [("ab", 4), ("ab", 3), ("ab", 4), (None, 3)], [(4, True), (3, False), (4, True), (4, True)]),
    (4, 0, [("ab", 4), ("ab", 3), ("b", 2), ("", 2)], [(4, True), (3, False), (2, False), (2, True)]),
    (4, 0, [("ab", 4), ("ab", 3), ("abx", 2), ("x", 2), ("", 2)],
     [(4, True), (3, False), (2, False), (2, False), (2, True)]),
    (4, 0, [("", 4), ("", 3), ("", 3)], [(4, True), (3, False), (3, True)]),
    (4, 0, [("", 4), ("", 3), ("a", 3), ("", 3)], [(4, True), (3, False), (3, False), (3, True)]),
    (4, 0, [(None, 4), (None, 3), ("ab", 3), ("", 3)], [(4, True), (4, True), (3, False), (3, True)]),
    (3, 4, [(None, None), ("ab", None), ("b", None), ("", None)], [(3, False)] * 3 + [(3, True)]),
    (3, 4, [("", None), ("", None)], [(3, False), (3, True)]), (4, 0, [("a", 8)], [(4, True)])],
    ids=["four-of-them", "a-new-one-may-hold-one", "unknown-meanwhile", "back", "back-and-lost-again", "one-more-lost",
         "one-more-lost-that-a-new-one-may-hold", "no-worker", "one-placed-meanwhile",
         "known-later", "fewer-at-the-start", "none-at-the-start", "more-than-nvml"])
def test_plan_offer_after_a_loss_waits_for_the_workers_that_ran_then(gpus, promised, views, expected):
    plan, seen = first(gpus, promised), []
    for step, (names, count) in enumerate(views):
        plan = b9.plan_offer(plan, None, b9.K3sView("", crew(names), count), 60.0 + 40 * step)
        seen.append((plan.offer.gpu_count, plan.offer.cpu > 0))
        assert seen[-1][1] is ("no work is taken" not in plan.reason)
    assert seen == expected


def test_plan_offer_waits_for_known_workers_beyond_the_ten_minutes_of_unknown_ones():
    plan = first(3, 4)
    for minute, names, cpu in ((1, "ab", 0), (11, "ab", 0), (60, "b", 0), (61, "", FULL[0])):
        plan = b9.plan_offer(plan, None, b9.K3sView("", crew(names)), 60.0 * minute)
        assert plan.offer == b9.Offer(cpu, FULL[1], 3)


def test_plan_offer_says_what_is_missing_where_k3s_has_fewer_gpus_than_nvml():
    plan = first(4)
    for now in (60.0, 91.0):
        plan = b9.plan_offer(plan, None, b9.K3sView("", {}, 0), now)
    assert plan.offer == b9.Offer(*FULL, 0) and plan.reason.startswith("k3s has 0 of 4 GPUs for workers")
    assert "device plugin" in plan.reason and "nvidia-container-runtime" in plan.reason
    assert b9.plan_offer(first(4), None, b9.K3sView("", {}, 4), 60.0).reason == ""
    plan = b9.plan_offer(first(4), None, b9.K3sView("", crew("ab"), 3), 60.0)
    assert "1 of 4 GPUs are lost: no work is taken until the workers" in plan.reason and "k3s has 3" in plan.reason


def test_plan_offer_without_a_sample_is_no_second_one():
    plan = b9.plan_offer(first(4), b9.Offer(*FULL, 3), b9.K3sView(), 60.0)
    for _ in range(3):
        plan = b9.plan_offer(plan, None, b9.K3sView("", {}), 61.0)
    assert plan.offer.gpu_count == 4
    assert b9.plan_offer(plan, b9.Offer(*FULL, 3), b9.K3sView("", {}), 62.0).offer.gpu_count == 3


RULES = [{"verbs": ["list", "create", "delete"], "apiGroups": ["batch"], "resources": ["jobs"]},
         {"verbs": ["list"], "apiGroups": [""], "resources": ["pods"]}]


def ruled(rules):
    return 201, {"kind": "SelfSubjectRulesReview", "status": {"resourceRules": rules, "incomplete": False}}


@pytest.mark.parametrize("answer, words", [
    (ruled(RULES), ""), (ruled([{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]), ""),
    (ruled([*RULES[:1], {"verbs": ["get", "list"], "apiGroups": [""], "resources": ["nodes", "pods"]}]), ""),
    (ruled(RULES[1:]), "may not list jobs, create jobs, delete jobs in"), (ruled(RULES[:1]), "may not list pods in"),
    (ruled([{**RULES[0], "apiGroups": [""]}, RULES[1]]), "may not list jobs"),
    (ruled([{**RULES[0], "verbs": ["list", "create"]}, RULES[1]]), "may not delete jobs in"),
    (ruled([{**RULES[0], "resourceNames": ["one"]}, RULES[1]]), "may not list jobs"), (ruled([]), "may not list jobs"),
    (ruled([None, 7, {"verbs": 5, "apiGroups": {}, "resources": "jobs"}]), "may not list jobs"),
    (ruled(None), "k3s answers 201, no Kubernetes API"), ((401, {"message": "Unauthorized"}), "kubectl create token"),
    ((403, {"message": "forbidden: x"}), "k3s answers 403, forbidden: x"), ((503, "starting"), "k3s answers 503"),
    ((302, {}), "k3s answers 302"), ((200, {"status": {"resourceRules": RULES}}), "k3s answers 200"),
    ((500, {"message": "\x1b[2J" + "x" * 9000}), r"\x1b[2J")],
    ids=["role", "admin", "more", "no-jobs", "no-pods", "other-group", "no-delete", "named", "none", "odd", "no-rules",
         "401", "403", "503", "redirect", "200", "hostile"])
def test_explain_rules_says_why_the_gateway_cannot_use_k3s(answer, words):
    said = b9.explain_rules(answer[0], json.dumps(answer[1]).encode())
    assert words in said and (said == "") is (words == "") and said.isprintable() and len(said) < 500
    assert said == "" or "no CPU is offered: " in said


def table(*rows):
    """A Table as Kubernetes 1.34 answers it."""
    names = ["Name", "Ready", "Status", "Restarts", "Age", "IP", "Node", "Nominated Node", "Readiness Gates"]
    return {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": "263"},
            "columnDefinitions": [{"name": name, "type": "string", "priority": 0} for name in names],
            "rows": [{"cells": [name, "0/1", status, "0", age, *["<none>"] * 4], "object": None}
                     for name, status, age in rows]}


def test_parse_workers_of_a_table():
    workers = b9.parse_workers(json.dumps(table(
        ("w-1", "Running", "2s"), ("w-2", "ImagePullBackOff", "5m12s"), ("w-3", "Pending", "2d3h"),
        ("w-4", "Running", "1y"), ("w-5", "\x1b[2J", "<unknown>"))).encode(), 1e6)
    assert {name: (worker.status, 1e6 - worker.since) for name, worker in workers.items()} == {
        "w-1": ("Running", 2), "w-2": ("ImagePullBackOff", 312), "w-3": ("Pending", 183600),
        "w-4": ("Running", 365 * 86400), "w-5": (r"\x1b[2J", 0)}
    assert b9.count_running(workers) == 2 and b9.count_running({}) == 0 and b9.count_running(None) is None
    assert b9.parse_workers(json.dumps(table()).encode(), 0.0) == {}


@pytest.mark.parametrize("body", [
    b"", b"<html>", b"[]", DEEP, b'{"kind": "Status"}', b'{"kind": "PodList", "items": []}'])
def test_parse_workers_of_no_table_is_unknown(body):
    assert b9.parse_workers(body, 0.0) is None


def test_parse_workers_of_odd_tables_is_what_can_be_read():
    for odd in ODD_VALUES:
        for change in ({"rows": odd}, {"columnDefinitions": odd}, {"rows": [odd]}, {"rows": [{"cells": odd}]},
                       {"rows": [{"cells": [odd] * 9}]}, {"columnDefinitions": [{"name": odd}] * 9}):
            workers = b9.parse_workers(json.dumps({**table(("w", "Running", "1s")), **change}).encode(), 0.0)
            assert all(name.isprintable() and worker.status.isprintable() for name, worker in workers.items())


def node(name="box1", **status):
    return {"metadata": {"name": name}, "spec": {}, "status": status}


@pytest.mark.parametrize("nodes, name", [
    ([node()], "box1"), ([node("other")], "other"), ([node("other"), node("box1")], "box1"),
    ([node("a"), node("b")], None), ([], None), (None, None), ([7], None)],
    ids=["one", "one-of-another-name", "two", "none-of-two", "none", "no-list", "odd"])
def test_find_node_is_the_only_one_or_the_one_of_this_name(nodes, name):
    found = b9.find_node(json.dumps({"items": nodes}).encode(), "BOX1")
    assert found.get("metadata", {}).get("name") == name


@pytest.mark.parametrize("found, count", [
    (node(allocatable={"nvidia.com/gpu": "4"}), 4), (node(allocatable={"cpu": "8"}), 0), (node(), 0), ({}, None),
    (node(allocatable={"nvidia.com/gpu": "x"}), None), (node(allocatable={"nvidia.com/gpu": 2}), 2),
    (node(allocatable=[]), 0), (node(allocatable={"nvidia.com/gpu": "-1"}), None)],
    ids=["four", "no-plugin", "nothing", "no-node", "odd", "number", "list", "negative"])
def test_count_node_gpus(found, count):
    assert b9.count_node_gpus(found) == count


def test_line_quota_allows_20_in_ten_minutes():
    quota = b9.LineQuota()
    allowed = [quota.allows(now) for now in range(0, 30)]
    assert allowed == [True] * 20 + [False] * 10
    assert [quota.allows(now) for now in (599, 600, 600, 601, 602)] == [False, True, False, True, True]
    for start in range(0, 7200, 7):
        assert quota.allows(1e4 + start) or len([now for now in quota.times if now > 1e4 + start - 600]) == 20


@pytest.mark.parametrize("config, words", [
    (None, "set tailscale.directRedisHost in its configuration"), (..., ""), ({}, ""), ("text", ""), ([], ""),
    ({"worker": {"pools": {"gpu": {"mode": "external", "provider": "generic"}}}}, ""),
    ({"worker": {"pools": {"gpu": {"mode": "local", "provider": "generic"}}}}, "pool gpu is of mode local"),
    ({"worker": {"pools": {"gpu": {"mode": "external", "provider": "ec2"}}}}, "give --provider-name ec2"),
    ({"worker": {"pools": {"gpu": {"mode": "external", "provider": ""}}}}, ""),
    ({"worker": {"pools": {"other": {"mode": "local"}}}}, ""),
    ({"worker": {"pools": {"gpu": {"mode": "\x1b[2J" * 99}}}}, r"\x1b[2J")],
    ids=["null", "missing", "empty", "text", "list", "good", "local", "other-provider", "no-provider",
         "other-pool", "hostile"])
def test_classify_configuration_says_why_no_work_will_come(config, words, gpu_config):
    body = json.dumps({"machine_state": REGISTERED} | ({} if config is ... else {"config": config})).encode()
    outcome = b9.classify(REGISTER, 200, {}, body, ID, gpu_config)
    assert outcome.kind is OK and words in outcome.placement and (words == "") is (outcome.placement == "")
    assert outcome.placement.isprintable() and len(outcome.placement) < 300


# Trouble: which lines are written
def lines_of_a_day(fails):
    """Lines about trouble and recovery in 24 h, attempt by attempt as the loop would write them."""
    lease, trouble, chance, lines, now = KEPT, b9.Trouble(), random.Random(3), 0, KEPT.due
    for attempt in range(10 ** 6):
        if now > KEPT.due + 86400:
            break
        before, kind = lease, TROUBLE if fails(attempt) else OK
        lease = b9.lease_after(lease, KEEPALIVE, b9.Outcome(kind), now, every(60), chance.uniform)
        if kind is TROUBLE:
            lines += trouble.failed(now)
        elif before.failing_since is not None:
            lines += trouble.recovered()
        now = lease.due
    return lines


def test_trouble_in_a_day_writes_few_lines():
    outage, flapping = lines_of_a_day(lambda attempt: True), lines_of_a_day(lambda attempt: attempt % 2)
    print(f"\nlines in 24 h: outage {outage}, every second attempt fails {flapping}")
    assert 100 < outage < 200
    assert 10 < flapping <= outage


@pytest.mark.parametrize("period", [2, 3, 5])
def test_trouble_every_nth_attempt_writes_no_more_than_an_outage(period):
    assert lines_of_a_day(lambda attempt: attempt % period == 0) <= lines_of_a_day(lambda attempt: True)


def test_trouble_writes_1st_2nd_4th_8th_then_every_ten_minutes():
    trouble = b9.Trouble()
    assert [n for n in range(1, 20) if trouble.failed(n)] == [1, 2, 4, 8, 16]
    told = [now for now in range(20, 36000, 20) if trouble.failed(now)]
    assert 36000 / b9.QUIET - 10 < len(told) < 36000 / b9.QUIET + 10
    late = [now for now in told if now > 18000]
    assert all(later - sooner <= 2 * b9.QUIET for sooner, later in zip(late, late[1:]))


def test_trouble_after_ten_quiet_minutes_is_new():
    trouble = b9.Trouble()
    for now in (1000.0, 1001.0, 1002.0):
        trouble.failed(now)
    assert trouble.recovered() and not trouble.recovered()
    assert trouble.failed(1002.0 + b9.QUIET + 1) and trouble.count == 1 and trouble.recovered()


def test_trouble_recovery_of_what_was_not_told_is_not_told():
    trouble = b9.Trouble()
    assert trouble.failed(1000.0) and trouble.recovered()
    assert trouble.failed(1010.0) and trouble.recovered()
    assert not trouble.failed(1020.0) and not trouble.recovered()


# What ssh says, the line that is shown of it, and the remedy
@pytest.mark.parametrize("said, line, remedy", [
    ("banner\r\nno words\r\nHost key verification failed.\r\n", "Host key verification failed",
     "`ssh-keyscan -p 2222 gw >> ~/.ssh/known_hosts`"),
    ("@@@@\n@  WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!  @\n@@@@\nHost key verification failed.\n",
     "WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!", "then correct known_hosts"),
    ("me@gw: Permission denied (publickey).", "me@gw: Permission denied (publickey)",
     "The public half of ~/key must be in authorized_keys of me"),
    ("Warning: remote port forwarding failed for listen port 6443\nx", "Warning: remote port forwarding failed for"
     " listen port 6443", "Port 7443 there is taken"),
    ("channel 1: open failed: administratively prohibited: open failed", "channel 1: open failed: administratively"
     " prohibited: open failed", "permitopen in authorized_keys there must say localhost:31994"),
    ("kex_exchange: read\nConnection reset", "Connection reset", "`ssh -v` says more"), ("", "", "Check --ssh"),
    ("\x1b[2J{config.token} {keyscan}", "\\x1b[2J{config.token} {keyscan}", "Check --ssh")],
    ids=["unknown", "changed", "denied", "reverse", "permitopen", "other", "nothing", "hostile"])
def test_explain_ssh_finds_the_line_that_matters_and_its_remedy(said, line, remedy):
    config = config_of("--ssh", "me@gw:2222", "--ssh-reverse", "7443", "--ssh-identity", "~/key")
    shown, advice = b9.explain_ssh(said, config)
    assert shown == line and remedy in advice and advice.isprintable()


@pytest.mark.parametrize("failures, least, most", [(1, 1, 2), (2, 2, 4), (3, 4, 8), (4, 8, 16), (5, 15, 30),
                                                   (10 ** 6, 15, 30)])
def test_tunnel_pause_grows_from_1_s_to_30_s(failures, least, most):
    assert (b9.tunnel_pause(failures, low), b9.tunnel_pause(failures, high)) == (least, most)


# The promises of design/reliability, simulated on the functions of this room
def confirmations(seed, outage, burn=10.0):
    """Gaps between confirmed keepalives with one outage that begins somewhere in the schedule; s."""
    chance = random.Random(seed)
    lease = after(after(b9.Lease(1000.0), REGISTER, OK, 1000.0), KEEPALIVE, OK, 1000.0, chance.uniform)
    away, confirmed, gaps, now = 1300 + chance.uniform(0, 66), 1000.0, [], lease.due
    while now < away + outage + 150:
        assert b9.next_call(lease, now) == KEEPALIVE, "the registration was lost"
        fails = away <= now < away + outage
        lease = after(lease, KEEPALIVE, TROUBLE if fails else OK, now + burn * fails, chance.uniform)
        if not fails:
            gaps.append(now - confirmed)
            confirmed = now
        now = max(now + burn * fails, lease.due)
    return gaps


def test_outage_of_160_s_wherever_it_falls_keeps_the_registration():
    worst = max(max(confirmations(seed, 160)) for seed in range(1000))
    print(f"\nlongest time between two confirmed keepalives with an outage of 160 s: {worst:.0f} s")
    assert 160 < worst < 300


@pytest.mark.parametrize("draw", [high, None], ids=["worst", "random"])
def test_outage_that_burns_10_s_an_attempt_leaves_4_attempts_in_the_ttl(draw):
    for seed in range(1 if draw else 1000):
        chance = draw or random.Random(seed).uniform
        lease, starts = after(KEPT, KEEPALIVE, OK, KEPT.due, high), []
        while lease.due < lease.confirmed_at + 300:
            starts.append(lease.due - lease.confirmed_at)
            lease = after(lease, KEEPALIVE, TROUBLE, lease.due + 10, chance)
        assert len(starts) >= 4, starts


class Fleet:
    """10,000 agents on next_call and lease_after; the gateway answers at once."""

    def __init__(self, seed, starts):
        self.draw, self.bins, self.ready = random.Random(seed).uniform, {}, {}
        self.leases = [b9.Lease(start) for start in starts]
        self.heap = [(start, number) for number, start in enumerate(starts)]
        self.known, self.age = [-1] * len(starts), 0  # who is known, in which age of the gateway
        heapq.heapify(self.heap)

    def run(self, until, away=False):
        """Counts requests in bins of 1 s, and when each agent is ready for the first time in this age."""
        heap, leases, bins = self.heap, self.leases, self.bins
        outcomes = {kind: b9.Outcome(kind) for kind in b9.Kind}
        while heap[0][0] < until:
            now, number = heap[0]
            lease = leases[number]
            call, kind = b9.next_call(lease, now), OK
            bins[int(now)] = bins.get(int(now), 0) + 1
            if away:
                kind = TROUBLE
            elif call == REGISTER:
                self.known[number] = self.age
            elif self.known[number] != self.age:
                kind = FORGOTTEN
            else:
                self.ready.setdefault(number, now)
            leases[number] = b9.lease_after(lease, call, outcomes[kind], now, every(60), self.draw)
            heapq.heapreplace(heap, (leases[number].due, number))

    def peak(self, start, end):
        return max(self.bins.get(second, 0) for second in range(int(start), int(end)))


def simulate_fleets():
    """Prints the figures of three fleets of 10,000, as JSON."""
    fleet, figures = Fleet(1, [1000.0] * 10_000), {}
    fleet.run(1120)
    figures["start"] = fleet.peak(1060, 1120), len(fleet.ready)
    for name, spread, warm_up in (("evenly", 60, 150), ("together", 0, 600)):
        starts = random.Random(2)
        fleet = Fleet(3, [1000 + starts.uniform(0, spread) for _ in range(10_000)])
        away, back = 1000.0 + warm_up, 1600.0 + warm_up
        fleet.run(away)
        fleet.run(back, away=True)
        fleet.age, fleet.ready = 1, {}
        fleet.run(back + 75)
        figures[name] = fleet.peak(back, back + 75), sorted(fleet.ready.values())[9899] - back
    print(json.dumps(figures))


@pytest.fixture(scope="module")
def fleets():
    """The simulations in a process of their own, beside the other tests."""
    with subprocess.Popen([sys.executable, "-c", "import test_beta9_agent as t; t.simulate_fleets()"], text=True,
                          stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(SOURCE.parent)}) as process:
        result = []

        def figures():
            result[:] = result or [json.loads(process.communicate()[0])]
            return result[0]

        yield figures


@pytest.mark.slow
def test_fleet_started_together_is_spread_in_the_second_minute(fleets):
    peak, ready = fleets()["start"]
    print(f"\n10,000 started together: peak in the second minute {peak} requests/s, steady are 167")
    assert ready == 10_000 and peak < 2.5 * 167


@pytest.mark.slow
@pytest.mark.parametrize("started", ["evenly", "together"])
def test_fleet_forgotten_in_an_outage_of_600_s_returns_without_a_stampede(fleets, started):
    peak, ready = fleets()[started]
    print(f"\n10,000 started {started}, gateway away 600 s: peak {peak} requests/s,"
          f" 99 % ready after {ready:.0f} s")
    assert peak < 750 and ready <= 60


# ---- 4 Wire shapes and texts
# JSON keys and types, transcribed from gateway-api.md; ? marks what may be missing
NUMBER, INTEGER, STRING = (int, float), (int,), (str,)
REGISTER_FIELDS = dict.fromkeys(("token", "machine_id", "hostname", "provider_name", "pool_name", "cpu",
                                 "memory",
                                 "gpu_count", "private_ip"), STRING)
METRIC_FIELDS = {"cpu_utilization_pct?": NUMBER, "memory_utilization_pct?": NUMBER,
                 "total_cpu_available?": INTEGER,
                 "total_memory_available?": INTEGER, "total_disk_space_bytes?": INTEGER,
                 "total_disk_free_bytes?": INTEGER, "free_gpu_count": INTEGER, "worker_count?": INTEGER}
KEEPALIVE_FIELDS = {"machine_id": STRING, "provider_name": STRING, "pool_name": STRING,
                    "agent_version": STRING,
                    "metrics": METRIC_FIELDS}
STATE_FIELDS = {"machine_id": STRING, "status": STRING, "pool_name": STRING, "ttl_seconds": NUMBER}
REGISTERED_FIELDS = {"config": (type(None), dict), "machine_state": STATE_FIELDS}
READY_FIELDS = {"status": STRING, "machine_state": STATE_FIELDS | {
    "last_keepalive?": STRING, "last_worker_seen?": STRING, "agent_version?": STRING}}
ERROR_FIELDS = {"message": STRING}


def check_shape(value, fields):
    assert type(value) is dict and set(value) <= {key.rstrip("?") for key in fields}
    for key, types in fields.items():
        if key.endswith("?") and key[:-1] not in value:
            continue
        found = value[key.rstrip("?")]
        if isinstance(types, dict):
            check_shape(found, types)
        else:
            assert type(found) in types, (key, found)


def sent(payload):
    """As it leaves the machine."""
    return json.loads(json.dumps(payload, default=b9.Secret.reveal))


@pytest.mark.parametrize("argv, hostname, token", [
    ([], f"machine-{ID}", ""), (["--hostname", "100.100.74.117", "--k3s-token", K3S_TOKEN], "100.100.74.117",
                                K3S_TOKEN)],
    ids=["bare", "with-k3s"])
def test_register_payload_is_what_the_gateway_reads(argv, hostname, token):
    config = config_of("--pool-name", "gpu", *argv)
    payload = sent(b9.register_payload(config, ID, b9.offer_of(METRICS, GPUS, config), "10.0.0.7"))
    check_shape(payload, REGISTER_FIELDS)
    assert payload == {"token": token, "machine_id": ID, "hostname": hostname, "provider_name": "generic",
                       "pool_name": "gpu", "cpu": "8000m", "memory": "32094Mi", "gpu_count": "2",
                       "private_ip": "10.0.0.7"}


@pytest.mark.parametrize("metrics", [METRICS, UNKNOWN], ids=["known", "unknown"])
def test_keepalive_payload_is_what_the_gateway_reads(metrics):
    payload = sent(b9.keepalive_payload(config_of("--pool-name", "gpu", "--provider-name", "aws"), ID,
                                        metrics))
    check_shape(payload, KEEPALIVE_FIELDS)
    assert payload["agent_version"] == f"{b9.VERSION}-python"
    assert (payload["machine_id"], payload["pool_name"], payload["provider_name"]) == (ID, "gpu", "aws")
    assert None not in payload["metrics"].values() and "free_gpu_count" in payload["metrics"]


def test_keepalive_payload_unknown_metrics_are_left_out():
    assert b9.keepalive_payload(config_of(), ID, UNKNOWN)["metrics"] == {"free_gpu_count": 0}


def test_payloads_hold_no_machine_token():
    config = config_of("--k3s-token", K3S_TOKEN)
    for payload in (b9.register_payload(config, ID, b9.Offer(1, 2, 3), ""), b9.keepalive_payload(config, ID, METRICS)):
        assert MACHINE_TOKEN not in json.dumps(sent(payload))
        assert K3S_TOKEN not in json.dumps(payload, default=str)


def test_format_offer_names_all_three():
    text = b9.format_offer(b9.Offer(6500, 32094, 2))
    assert "6.5 CPU" in text and "32094 MiB" in text and "2 GPU" in text


# ---- 5 Configuration
OPTIONS = {option.name: option for option in b9.OPTIONS}
FLAGS_ONLY = {option.name for option in b9.OPTIONS if option.group == "actions"}
GOOD = {  # a text and its value
    "token": (MACHINE_TOKEN, MACHINE_TOKEN), "machine_id": ("ABCDEF01", "abcdef01"),
    "pool_name": ("my gpus", "my gpus"),
    "provider_name": ("aws", "aws"), "hostname": ("box-1.tail.net", "box-1.tail.net"),
    "k3s_token": (K3S_TOKEN, K3S_TOKEN), "k3s_wait": ("yes", True),
    "k3s_url": ("https://[::1]:16443/", "https://[::1]:16443"), "k3s_ca_file": (certifi.where(), certifi.where()),
    "gateway_host": ("gw.example.com", "gw.example.com"), "gateway_port": ("31994", 31994),
    "private_ip": ("10.1.2.3", "10.1.2.3"), "max_cpu": ("6.5", 6500), "max_memory": ("48Gi", 49152),
    "max_gpus": ("2", 2), "state_dir": ("/x/y", "/x/y"), "keepalive_interval": ("0.5", 0.5),
    "startup_timeout": ("0", 0.0), "debug": ("yes", True), "tls": ("on", True),
    "ssh": ("me@gw-1.example.com:2222", "me@gw-1.example.com:2222"), "ssh_gateway": ("[::1]:80", "[::1]:80"),
    "ssh_identity": ("~/.ssh/id", "~/.ssh/id"), "ssh_reverse": ("10.0.0.7:6443", "10.0.0.7:6443"),
    "allow_cleartext": ("1", True), "offer_always": ("TRUE", True), "ca_file": (certifi.where(), certifi.where())}
SWITCHES = [name for name in GOOD if OPTIONS[name].parse is b9.parse_switch]
VALUED = [name for name in GOOD if name not in SWITCHES]
FROM_FILES = {"token_file", "k3s_token_file", "k3s_node_token_file", "config"}  # these name files, see below
LISTS = {"ssh_option"}
BAD = {
    "token": ["two words", "new\nline", "\x1b[2J", "tökén", " lead", "seven77", "qu\"oted-token"],
    "k3s_token": ["two words", "a\r\n", "é"], "k3s_wait": ["2", "later"],
    "k3s_url": ["http://127.0.0.1:6443", "127.0.0.1:6443", "https://", "https://u:p@host", "https://h/path",
                "https://h:99999", "https://h:x", "https://h ", "https://h?x", "https://[::1"],
    "k3s_ca_file": ["/nowhere/ca.pem", "/", os.devnull],
    "machine_id": ["1165a9b", "1165a9b60", "1165a9bg", "0x1165a9", "1165a9b6\n", "١٢٣٤٥٦٧٨"],
    "pool_name": [" ", "a\nb", "\x1b[2J"], "provider_name": [" x", "a\tb"],
    "hostname": ["300.1.1.1", "1.2.3.4.5", "http://x", "x:6443", "x/y", "a b", "-x", "x" * 300, "fe80::1%eth0"],
    "gateway_host": ["300.1.1.1", "https://gw", "gw:1994", "gw/api", "user@gw", "gw\n", "[::1]:1994"],
    "gateway_port": ["0", "65536", "-1", "19.5", "http", "1e3", "99999999999", "١٩٩٤"],
    "private_ip": ["10.0.0.300", "box", "10.0.0.0/8", "1"],
    "max_cpu": ["0", "0.0001", "-1", "six", "1e3", "nan", "8000m"],
    "max_memory": ["0Gi", "48", "48G", "1.5Gi", "48gb", "-1Gi", "Gi"], "max_gpus": ["-1", "1.5", "all"],
    "state_dir": [" ", "a\nb"], "keepalive_interval": ["0", "0.05", "241", "-1", "nan", "inf", "1e2", "60s"],
    "startup_timeout": ["-1", "soon", "inf", "10m"], "debug": ["2", "maybe", "yess"],
    "ssh": ["-oProxyCommand=date", "me@-oProxyCommand=date", "-lme@gw", "me@$(date)", "gw;date", "gw`date`", "gw date",
            "gw|x", "@gw", "a@b@gw", "gw:", "gw:0x16", "gw:22:23", "[gw", "::1", "gw\n", "ssh://gw", "%h", "gw/x"],
    "ssh_gateway": ["gw", "31994", "me@gw:80", "-R:80", "gw:80:90", "/run/socket:80", ":80", "gw:x", "$X:80"],
    "ssh_identity": [" ", "a\nb"],
    "ssh_reverse": ["6443:localhost:22", "*:6443", "me@gw:6443", "-1", "x", "/run/x:6443", "gw:"],
    "tls": ["2", "https", "tru"], "allow_cleartext": ["-1", "please", "y"], "offer_always": ["never"],
    "ca_file": ["/nowhere/ca.pem", "/", str(SOURCE), sys.executable, os.devnull, "a\nb"]}


def value_of(config, name):
    value = getattr(config, name)
    return value.reveal() if isinstance(value, b9.Secret) else value


def write_json(path, name, text):
    head, _, tail = OPTIONS[name].file_key.partition(".")
    path.write_text(json.dumps({head: {tail: text} if tail else text}))
    return str(path)


def test_options_good_and_bad_values_cover_the_table():
    named = set(OPTIONS) - FLAGS_ONLY - FROM_FILES - LISTS
    assert named == set(GOOD) == set(BAD)


@pytest.mark.parametrize("source", ["flag", "variable", "file"])
@pytest.mark.parametrize("name", VALUED)
def test_option_is_read_from_each_source(name, source, tmp_path):
    option, (text, value) = OPTIONS[name], GOOD[name]
    path = write_json(tmp_path / "c.json", name, text)
    argv, env = {"flag": ([option.flag, text], {}), "variable": ([], {option.variable: text}),
                 "file": (["--config", path], {})}[source]
    env |= {} if name == "token" else {"BETA9_TOKEN": MACHINE_TOKEN}
    config, problems = settings_of(*argv, env=env)
    assert problems == [] and value_of(config, name) == value
    assert config.sources[name] == {"flag": option.flag, "variable": option.variable, "file": path}[source]


@pytest.mark.parametrize("name", VALUED)
def test_option_precedence_is_flag_variable_file_default(name, tmp_path):
    option, (text, value) = OPTIONS[name], GOOD[name]
    other = {"machine_id": "00000001", "private_ip": "10.9.9.9", "max_memory": "1Gi"}.get(name, "7")
    base = {} if name == "token" else {"BETA9_TOKEN": MACHINE_TOKEN}
    right, wrong = write_json(tmp_path / "right", name, text), write_json(tmp_path / "wrong", name, other)
    default = config_of() if name == "token" else b9.build_config(b9.read_settings([], dict(base)), b9.Redactor())
    if option.default is None:
        assert name not in default.sources or name == "token" and not base
    else:
        assert default.sources[name] == "default" and value_of(default, name) != value
    over = [(["--config", right], {}), (["--config", wrong], {option.variable: text}),
            (["--config", wrong, option.flag, text], {option.variable: other}),
            ([option.flag, text], {option.variable: other, "BETA9_CONFIG": wrong})]
    for argv, env in over:
        config, problems = settings_of(*argv, env=base | env)
        assert problems == [] and value_of(config, name) == value, (argv, env)


@pytest.mark.parametrize("text, value", [("1", True), ("true", True), ("YES", True), ("On", True),
                                         ("0", False),
                                         ("false", False), ("No", False), ("off", False), ("", False)])
@pytest.mark.parametrize("name", SWITCHES)
def test_switch_variable_means_what_it_says(name, text, value):
    option = OPTIONS[name]
    assert value_of(config_of(env={option.variable: text}), name) is value
    assert value_of(config_of(option.flag, env={option.variable: text}), name) is True


@pytest.mark.parametrize("written, value", [("true", True), ("false", False), ("1", True), ('"off"', False)])
@pytest.mark.parametrize("key, name", [("debug", "debug"), ("gateway.tls", "tls"),
                                       ("gateway.allow_cleartext", "allow_cleartext")])
def test_switch_in_json_means_what_it_says(key, name, written, value, tmp_path):
    (tmp_path / "c.json").write_text('{"%s": %s}' % (key, written))
    assert value_of(config_of("--config", str(tmp_path / "c.json")), name) is value


def test_trust_settings_in_a_gateway_section_are_read(tmp_path):
    (tmp_path / "c").write_text(f"gateway:\n  host: gw\n  tls: yes\n  ca_file: {certifi.where()}\n"
                                "  allow_cleartext: no\n")
    config = config_of("--config", str(tmp_path / "c"))
    assert (config.gateway, config.ca_file) == ("https://gw:1994", certifi.where())
    assert config.tls is True and config.allow_cleartext is False


@pytest.mark.parametrize("name", sorted(FLAGS_ONLY))
def test_one_time_switches_have_no_variable(name):
    assert OPTIONS[name].variable == OPTIONS[name].file_key == "" and not getattr(config_of(), name)
    text = {"fetch_from": "https://x/y", "print_file": "unit", "k3s": "use", "k3s_version": "v1.34.3+k3s1",
            "k3s_installer_sha256": "0" * 64}.get(name)
    value = getattr(config_of(OPTIONS[name].flag, *([text] if text else [])), name)
    assert value == (text or True)


@pytest.mark.parametrize("name", [name for name in GOOD if name != "token"])
def test_option_empty_variable_is_unset(name):
    assert value_of(config_of(env={OPTIONS[name].variable: ""}), name) == value_of(config_of(), name)


@pytest.mark.parametrize("name", VALUED)
def test_option_empty_flag_is_a_problem(name):
    config, problems = settings_of(OPTIONS[name].flag, "", env={OPTIONS[name].variable: GOOD[name][0]})
    assert any(OPTIONS[name].flag in problem for problem in problems)


@pytest.mark.parametrize("name, text", [(name, text) for name, texts in BAD.items() for text in texts],
                         ids=lambda value: ascii(value)[1:-1][:20])
def test_option_bad_value_names_option_and_source(name, text):
    option = OPTIONS[name]
    env = {"BETA9_TOKEN": MACHINE_TOKEN} | {option.variable: text}
    for argv in [[], [option.flag + "=" + text]][:1 if name in SWITCHES else 2]:
        _, problems = settings_of(*argv, env=dict(env))
        assert len(problems) == 1 and problems[0].startswith(f"{option.flag}: the value ")
        assert f" from {option.variable} " in problems[0] or argv
        assert re.search(" is (no |not |neither |empty).*: (give|leave out) ", problems[0]), problems[0]
        assert problems[0].isprintable()
        assert (repr(text)[1:-1][:30] in problems[0]) == (name not in b9.SECRETS) or not text.isprintable()
        assert f"of {len(text)} characters" in problems[0] or name not in b9.SECRETS


@pytest.mark.parametrize("text", ["0", "65536", "99999"])
@pytest.mark.parametrize("name, before", [("ssh", "gw:"), ("ssh_gateway", "gw:"), ("ssh_reverse", ""),
                                          ("ssh_reverse", "gw:")])
def test_ssh_port_out_of_range_is_a_problem(name, before, text):
    _, problems = settings_of("--token", MACHINE_TOKEN, OPTIONS[name].flag, before + text)
    assert len(problems) == 1 and "is not a port: give a number from 1 to 65535" in problems[0]


SSH_PASSED = ["ProxyJump=me@jump:2222,[::1]:22", "HostKeyAlias=gw", "UserKnownHostsFile=/etc/x", "Ciphers=+a,b@c",
              "GlobalKnownHostsFile=/dev/null", "CertificateFile=~/c", "KexAlgorithms=^x", "MACs=-m",
              "AddressFamily=inet", "BindAddress=10.0.0.1"]


def test_ssh_options_come_from_the_command_line_again_and_again_or_from_a_list(tmp_path):
    argv = [word for option in SSH_PASSED for word in ("--ssh-option", option)]
    assert config_of(*argv).ssh_option == SSH_PASSED
    (tmp_path / "c").write_text(f"ssh:\n  host: gw\n  options: {json.dumps(SSH_PASSED)}\n")
    config = config_of("--config", str(tmp_path / "c"))
    assert (config.ssh, config.ssh_option) == ("gw", SSH_PASSED) and config.sources["ssh_option"] == f"{tmp_path}/c"
    assert config_of("--config", str(tmp_path / "c"), "--ssh-option", "MACs=x").ssh_option == ["MACs=x"]
    words = b9.ssh_arguments(config, "/run/x")
    assert [words.index(option) for option in SSH_PASSED] == sorted(words.index(option) for option in SSH_PASSED)
    assert words.index("LogLevel=INFO") < words.index(SSH_PASSED[0]), "the agent's own win, as they come first"
    assert "IdentitiesOnly=yes" not in words and words[-2:] == ["--", "gw"]
    words = b9.ssh_arguments(config_of("--ssh", "gw", "--ssh-identity", "/k"), "/run/x")
    assert words[words.index("-i") + 1] == "/k" and words[words.index("IdentitiesOnly=yes") - 1] == "-o"


@pytest.mark.parametrize("text", [
    "ProxyCommand=date", "LocalCommand=date", "StrictHostKeyChecking=no", "KnownHostsCommand=date", "proxycommand=x",
    "ProxyJump=-oProxyCommand=date", "ProxyJump=$(date)", "ProxyJump=x;date", "ProxyJump=", "ProxyJump", "Ciphers=a b",
    "MACs=x\nProxyCommand=date", "UserKnownHostsFile=/x/$HOME", "HostKeyAlias=`date`", "-oProxyCommand=date", "",
    "BatchMode=no", "ControlPath=/x", "Include=/x", "ProxyJump x", "ProxyJump=a,,b"])
def test_ssh_option_that_is_not_passed_on_is_a_problem(text):
    config, problems = settings_of("--token", MACHINE_TOKEN, f"--ssh-option={text}", "--ssh-option", "MACs=x")
    assert config is None and len(problems) == 1 and "is not passed on to ssh: give one such as" in problems[0]
    assert problems[0].isprintable()


@pytest.mark.parametrize("source", ["--gateway-host", "--gateway-port", "BETA9_GATEWAY_HOST", "BETA9_GATEWAY_PORT",
                                    "file"])
@pytest.mark.parametrize("ssh", ["flag", "variable"])
def test_ssh_together_with_another_place_of_the_gateway_is_a_problem(tmp_path, source, ssh):
    (tmp_path / "c").write_text("gateway: {host: 10.0.0.1}\n")
    argv = {"file": ["--config", str(tmp_path / "c")]}.get(source, [source, "1994"] if source[0] == "-" else [])
    env = {source: "1994"} if source.startswith("BETA9") else {}
    argv, env = (argv + ["--ssh", "gw"], env) if ssh == "flag" else (argv, env | {"BETA9_SSH": "gw"})
    config, problems = settings_of("--token", MACHINE_TOKEN, *argv, env=env)
    assert config is None and len(problems) == 1 and "does not go with --ssh: leave it out" in problems[0]
    assert (str(tmp_path) if source == "file" else source) in problems[0]


@pytest.mark.parametrize("argv, url", [
    ([], "http://localhost:31994"), (["--tls", "--ssh-gateway", "gw.example.com:443"], "https://gw.example.com:443"),
    (["--ssh-gateway", "[::1]:80"], "http://[::1]:80")], ids=["default", "tls", "ipv6"])
def test_ssh_gateway_is_the_place_in_the_url(argv, url):
    config = config_of("--ssh", "me@gw", *argv)
    assert config.gateway == url and "--ssh-gateway" in b9.TRY_HEALTH.format(config=config)


@pytest.mark.parametrize("host", ["198.51.100.7", "localhost"])
def test_ssh_without_its_socket_connects_nowhere(host):
    outcome = b9.GatewayClient(config_of("--ssh", "gw", "--ssh-gateway", f"{host}:80"), None).send(
        KEEPALIVE, {"machine_id": ID}, 5.0)
    assert outcome.kind is b9.Kind.TROUBLE and "through ssh to gw" in outcome.text


def test_ssh_with_dev_is_left_out():
    assert config_of("--ssh", "gw", "--dev").ssh is None


def test_token_missing_says_how_to_get_one():
    _, problems = settings_of("--pool-name", "gpu")
    assert len(problems) == 1 and "--token" in problems[0]
    assert "beta9 machine create --pool gpu" in problems[0]


def test_token_for_dev_is_made_up():
    config, problems = settings_of("--dev")
    assert problems == [] and len(config.token.reveal()) >= 16


@pytest.mark.parametrize("argv", [
    ["--token", "SECRETXY two"], ["--k3s-token", "SECRETXY\nx"], ["--tokn", "SECRETXY"], ["--tokn=SECRETXY"],
    ["SECRETXY"], ["--debug=SECRETXY"], ["--once=SECRETXY"], ["--token", "good", "SECRETXY"], ["--token"],
    ["--tok", "SECRETXY"], ["--token", "--SECRETXY"], ["--pool-name", "gpu", "SECRETXY", "--once"],
    ["--once=SEC'SECRETXY"], ["--tokn", "a\nSECRETXY"], ["--tokenpiece8-SECRETXY"]],
    ids=["token", "k3s", "typo", "typo-equals", "word", "switch", "once", "second-word", "no-value",
         "abbreviated", "dashes", "word-between", "quote", "second-line", "run-together"])
def test_bad_command_line_never_shows_a_value(argv):
    try:
        _, problems = settings_of(*argv)
    except b9.AgentError as error:
        problems = [str(error)]
        assert error.exit_code == 2 and "--help" in str(error)
    assert problems and "SECRET" not in " ".join(problems)


def test_settings_leave_the_environment():
    env = {"BETA9_TOKEN": "from-the-variable", "BETA9_K3S_TOKEN": K3S_TOKEN, "BETA9_POOL_NAME": "gpu",
           "PATH": "/bin"}
    b9.read_settings(["--token", MACHINE_TOKEN], env)
    assert env == {"PATH": "/bin"}


def test_tokens_are_not_in_the_environment_of_a_child():
    said = run_python("import subprocess\nb9.main(['--version'])\nsubprocess.run(['env'])", os.environ | {
        "PYTHONPATH": str(SOURCE.parent), "BETA9_TOKEN": MACHINE_TOKEN, "BETA9_K3S_TOKEN": K3S_TOKEN})
    assert "PYTHONPATH" in said and "BETA9_" not in said and leaks(said, MACHINE_TOKEN, K3S_TOKEN) == []


@pytest.mark.parametrize("written", [
    "machine_id: 00000001\ngateway:\n  host: gw\n  port: 1995\nkeepalive_interval: 30\ndebug: on\n",
    "---\nmachine_id: 00000001\ngateway.host: gw\ngateway.port: 1995\nkeepalive_interval: 30\ndebug: yes\n",
    '{"machine_id": "00000001", "gateway": {"host": "gw", "port": 1995},\n'
    '"keepalive_interval": 30, "debug": true}'],
    ids=["yaml", "yaml-dotted", "json"])
def test_config_file_values_stay_as_written(written, tmp_path):
    (tmp_path / "agent.yaml").write_text(written)
    config = config_of(env={"BETA9_CONFIG": str(tmp_path / "agent.yaml")})
    assert (config.machine_id, config.gateway,
            config.keepalive_interval) == ("00000001", "http://gw:1995", 30)
    assert config.debug is True and config.sources["gateway_port"] == str(tmp_path / "agent.yaml")


@pytest.mark.parametrize("written", ["", "# nothing\n", "{}", "gateway:\n", "pool_name:\n",
                                     "gateway: null\n", "gateway: ~", '{"gateway": null}'])
def test_config_file_with_nothing_in_it_changes_nothing(written, tmp_path):
    (tmp_path / "c").write_text(written)
    assert config_of("--config", str(tmp_path / "c")).pool_name == "external"


@pytest.mark.parametrize("written, key, meant", [
    ("pool: gpu", "pool", "pool_name"), ("gateway:\n  prot: 1", "gateway.prot", "gateway.port"),
    ("gateway_host: x", "gateway_host", "gateway.host"), ('{"machine-id": "00000001"}', "machine-id",
                                                          "machine_id"),
    ("config: other.yaml", "config", ""), ("dev: true", "dev", "")])
def test_config_file_unknown_key_suggests_the_nearest(written, key, meant, tmp_path):
    (tmp_path / "c").write_text(written)
    with pytest.raises(b9.AgentError, match=rf"unknown key {re.escape(key)}.*{re.escape(meant)}") as raised:
        config_of("--config", str(tmp_path / "c"))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("written", [f"#\n{{token:{MACHINE_TOKEN}}}", f"token {MACHINE_TOKEN}:",
                                     f"k3s_token{MACHINE_TOKEN}:", f"k3s_token{MACHINE_TOKEN.lower()}:",
                                     "tokenabcdefghijklm:"],
                         ids=["no-blank", "blank", "nothing", "small", "letters"])
def test_config_file_key_that_swallowed_a_token_shows_none_of_it(written, tmp_path):
    (tmp_path / "c").write_text(written)
    with pytest.raises(b9.AgentError, match="unknown key of [0-9]+ characters") as raised:
        config_of("--config", str(tmp_path / "c"))
    shown = str(raised.value)
    assert not any(MACHINE_TOKEN[at:at + 8].lower() in shown for at in range(len(MACHINE_TOKEN) - 7))
    assert "abcdefgh" not in shown


# Words that nobody understands: what is shown of them, and what is suggested
@pytest.mark.parametrize("argv, words", [
    (["--gateway-hostname", "gw"], "unknown option --gateway-hostname, did you mean --gateway-host?"),
    (["--poolname=gpu"], "unknown option --poolname, did you mean --pool-name?"),
    (["--k3s-token-fiel=x"], "unknown option --k3s-token-fiel, did you mean --k3s-token-file?"),
    (["--zzz"], "unknown option --zzz. See --help"), (["-x"], "unknown option -x. See"),
    (["gpu"], "unknown word gpu. See --help"), (["dry-run"], "unknown word dry-run, did you mean --dry-run?"),
    (["--once", "please"], "unknown word please. See"), ([TOKEN_LIKE], "unknown word of 23 characters. See"),
    ([f"--tokn={TOKEN_LIKE}"], "unknown option --tokn, did you mean --token?"),
    ([f"--token{TOKEN_LIKE}"], "unknown option of 30 characters"),
    (["--tokenabcdefghijkl"], "unknown option of 19 characters"),
    (["--debug", "1"], "unknown word 1. See --help"), (["--tls=yes"], "--tls takes no value. See --help"),
    (["--gateway-port"], "--gateway-port needs a value. See --help")],
    ids=lambda value: value[0][:20] if isinstance(value, list) else "")
def test_command_line_not_understood_names_the_word_and_the_nearest(argv, words):
    with pytest.raises(b9.AgentError) as raised:
        settings_of(*argv)
    assert str(raised.value).startswith(words) and TOKEN_LIKE not in str(raised.value)


@pytest.mark.parametrize("name, words", [
    ("BETA9_POOLNAME", ", did you mean BETA9_POOL_NAME?"), ("BETA9_ZZZ", ""),
    ("BETA9_GATEWAY_HOST_HTTP", None), ("BETA9_GATEWAY_PORT_HTTP", None), ("BETA", None)])
def test_variable_that_is_unknown_is_warned_of_with_the_nearest(log_lines, name, words):
    config_of(env={name: MACHINE_TOKEN, "BETA9_POOL_NAME": "gpu"})
    said = [] if words is None else [f"the variable {name} is unknown and ignored{words}"]
    assert log_lines == said


@pytest.mark.parametrize("written, line", [
    ("token: SECRET\npool_name: [gpu\n", 3), ("token: SECRET\n\tpool: x\n", 2),
    ('{"token": "SECRET",\n "pool"}', 2),
    ("token: !!python/object:os.system SECRET: x", 1), ("SECRET", None), ("- SECRET", None),
    ("gateway: SECRET", None),
    ('{"gateway": ["SECRET"]}', None), ("a: &SECRET [*SECRET, *OTHER]", 1)],
    ids=["yaml", "yaml-tab", "json", "yaml-colon", "text", "list", "gateway-text", "gateway-list", "alias"])
def test_config_file_broken_gives_the_line_and_no_content(written, line, tmp_path):
    (tmp_path / "c").write_text(written)
    with pytest.raises(b9.AgentError) as raised:
        config_of("--config", str(tmp_path / "c"))
    assert raised.value.exit_code == 2 and "SECRET" not in str(raised.value) and str(tmp_path) in str(raised.value)
    assert line is None or f"line {line}" in str(raised.value)


@pytest.mark.parametrize("written", ["pool_name: [SECRET]", "pool_name:\n  SECRET: x", "token:\n- SECRET",
                                     '{"token": ["SECRET"]}', '{"pool_name": {"a": 1}}',
                                     "".join(f"k{n}: &k{n} [" + f"*k{n - 1}, " * 9 * (n > 0) + "x]\n"
                                             for n in range(7))])
def test_config_file_list_where_a_text_belongs_is_refused(written, tmp_path):
    (tmp_path / "c").write_text(written)
    try:
        _, problems = settings_of("--config", str(tmp_path / "c"), env={"BETA9_K3S_TOKEN": "x"})
    except b9.AgentError as error:
        problems = [str(error)]
    problems = [problem for problem in problems if "is missing" not in problem]
    assert problems and "SECRET" not in " ".join(problems)


def test_config_file_json_needs_no_yaml(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "c").write_text(' \n{"pool_name": "gpu"}')
    assert config_of("--config", str(tmp_path / "c")).pool_name == "gpu"
    (tmp_path / "c").write_text("pool_name: gpu")
    with pytest.raises(ModuleNotFoundError) as raised:  # which main answers, see test_entry_package_missing
        config_of("--config", str(tmp_path / "c"))
    assert raised.value.name == "yaml"


@pytest.mark.parametrize("name", b9.SECRETS)
@pytest.mark.parametrize("data", [b"%s", b"%s\n", b"%s\r\n", b"%s\n\n"],
                         ids=["bare", "line", "crlf", "lines"])
def test_token_file_line_end_is_dropped(name, data, tmp_path):
    (tmp_path / "t").write_bytes(data % K3S_TOKEN.encode())
    env = {} if name == "token" else {"BETA9_TOKEN": MACHINE_TOKEN}
    for argv, more in (([OPTIONS[name + "_file"].flag, str(tmp_path / "t")], {}),
                       ([], {OPTIONS[name + "_file"].variable: str(tmp_path / "t")})):
        config, problems = settings_of(*argv, env=env | more)
        assert problems == [] and value_of(config, name) == K3S_TOKEN


@pytest.mark.parametrize("data", [b"", b"\n", b"SECRET\0", b"\xff\xfeSECRET", b"SECRET" * 20000,
                                  b"SECRET\nSECRET",
                                  b" SECRET", None, ...],
                         ids=["empty", "blank", "nul", "no-utf8", "large", "two-lines", "space", "missing",
                              "folder"])
def test_token_file_that_will_not_do_is_named(data, tmp_path):
    path = tmp_path / "the-file"
    if data is ...:
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    _, problems = settings_of("--token-file", str(path))
    assert len(problems) == 1 and "token" in problems[0] and str(path) in problems[0]
    assert "SECRET" not in problems[0]


def test_token_file_unreadable_is_named(tmp_path):
    _, problems = settings_of("--token-file", str(tmp_path))  # a folder: root too cannot read it
    assert len(problems) == 1 and "directory" in problems[0].lower()


def test_token_file_dash_is_standard_input():
    code = ("import beta9_agent as b9\n"
            "print(b9.build_config(b9.read_settings(['--token-file', '-'], {}), b9.Redactor()).token.reveal())")
    done = subprocess.run([sys.executable, "-c", code], input=MACHINE_TOKEN + "\n", capture_output=True,
                          text=True,
                          env=os.environ | {"PYTHONPATH": str(SOURCE.parent)}, timeout=60)
    assert done.stdout == f"{MACHINE_TOKEN}\n", done.stderr


@pytest.mark.parametrize("name", [name for name in b9.SECRETS if name in OPTIONS])
@pytest.mark.parametrize("token_from, file_from", list(itertools.product(["flag", "variable", "file"], repeat=2)))
def test_token_and_its_file_obey_the_precedence(name, token_from, file_from, tmp_path):
    other = "another-" + K3S_TOKEN
    (tmp_path / "t").write_text(other)
    argv, env, tree = [], {}, {}
    for option, source, text in ((OPTIONS[name], token_from, K3S_TOKEN),
                                 (OPTIONS[name + "_file"], file_from, str(tmp_path / "t"))):
        argv += [option.flag, text] if source == "flag" else []
        env |= {option.variable: text} if source == "variable" else {}
        tree |= {option.file_key: text} if source == "file" else {}
    (tmp_path / "c").write_text(json.dumps(tree))
    env |= {} if name == "token" else {"BETA9_TOKEN": MACHINE_TOKEN}
    config, problems = settings_of("--config", str(tmp_path / "c"), *argv, env=env)
    if token_from == file_from:
        assert len(problems) == 1 and "give one of them" in problems[0] and K3S_TOKEN not in problems[0]
        return
    order = ["flag", "variable", "file"]
    wins = order.index(token_from) < order.index(file_from)
    assert problems == [] and value_of(config, name) == (K3S_TOKEN if wins else other)
    assert (name in config.token_files) is not wins


@pytest.mark.parametrize("text, shown", [
    (TOKEN_LIKE, False), ("a" * 8, False), ("nowhere/" + TOKEN_LIKE, False), ("/nowhere/" + TOKEN_LIKE, False),
    ("/etc/no-such-file", True), ("tokne", True)])
def test_token_file_that_is_the_token_itself_is_not_shown(text, shown):
    _, problems = settings_of("--token-file", text)
    assert (text in problems[0]) is shown and "--token-file" in problems[0]
    assert shown or f"{len(text)} characters" in problems[0]


def test_tailscale_and_flux_options_are_taken_with_a_notice_without_values(log_lines):
    argv = [part for flag in b9.UNUSED_FLAGS for part in (flag, "SECRET")]
    config = config_of("--machine-id", ID, "--pool-name", "gpu", "--provider-name", "generic", *argv)
    assert config.machine_id == ID and len(b9.UNUSED_FLAGS) == 5
    assert all(flag in " ".join(log_lines) for flag in b9.UNUSED_FLAGS) and "SECRET" not in " ".join(log_lines)


@pytest.mark.parametrize("host, url", [("gw", "http://gw:1994"), ("fd7a::1", "http://[fd7a::1]:1994"),
                                       ("[fd7a::1]", "http://[fd7a::1]:1994"), ("::1", "http://[::1]:1994"),
                                       ("::ffff:10.0.0.1", "http://[::ffff:10.0.0.1]:1994")])
def test_gateway_url_of_any_host_is_whole(host, url):
    assert config_of("--gateway-host", host).gateway == url


def test_help_shows_groups_flags_variables_defaults_and_exit_codes():
    text = b9.build_command_line().format_help()
    assert all(f"{group}:" in text for group in ("actions", "identity", "gateway", "this machine", "behaviour"))
    flags = [option.flag for option in b9.OPTIONS] + list(b9.UNUSED_FLAGS)
    assert [flag for flag in flags if not re.search(rf"{flag}[ ,\n]", text)] == []
    assert [option.name for option in b9.OPTIONS if option.variable and not re.search(
        rf"\b{option.variable}\b", text)] == []
    flat = " ".join(text.split())
    assert [option.name for option in b9.OPTIONS
            if option.default and f"default {option.default}" not in flat] == []
    assert all(f"{code} " in flat for code in (0, 1, 2, 69, 75, 77, 78))
    assert "beta9_agent.py --dev --once" in text.split("actions:")[0]
    actions = text.split("actions:")[1].split("\n\n")[0]
    assert all(option.flag in actions for option in b9.OPTIONS if option.group == "actions")


# ---- 6 Machine facts (stub NVML)
NVML_C = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* Says what the file named by NVML_STUB says at each call: "INIT HANG GPUS", GPUS being a letter for
   each GPU (. free, b busy, x lost, ? no answer about its processes) or - for none. */
static __thread int init_code, hang; static __thread char gpus[65];
static void look(void) {
    FILE *file = fopen(getenv("NVML_STUB"), "r");
    init_code = hang = 0; gpus[0] = 0;
    if (file) { if (fscanf(file, "%d %d %64[.bxls?]", &init_code, &hang, gpus) < 3) gpus[0] = 0; fclose(file); }
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
    return 0;
}
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "550.1", size); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) { memory[0] = 80ULL << 30; return 0; }
int nvmlDeviceGetPersistenceMode(void *device, unsigned *mode) {
    look();
    *mode = gpus[(long)device - 1] != 's';
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, void *processes) {
    look();
    if (gpus[(long)device - 1] == '?') return 3;
    if (gpus[(long)device - 1] == 'l') return 15;
    if (gpus[(long)device - 1] != 'b') { *count = 0; return 0; }
    if (!processes) { *count = 1; return 7; }
    memset(processes, 0, 24); *count = 1; return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *count, void *processes) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, processes);
}
"""


@pytest.fixture(scope="session")
def nvml_stub(tmp_path_factory):
    """A folder with a libnvidia-ml.so.1 for LD_LIBRARY_PATH; see write_gpus."""
    if not shutil.which("cc"):
        pytest.skip("no cc to compile the stub with")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "stub.c").write_text(NVML_C)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", folder / "libnvidia-ml.so.1", folder / "stub.c"],
                   check=True)
    return folder


def write_gpus(control, gpus="", init=0, hang=False):
    """What the stub says from now on, in processes that run too."""
    new = control.with_suffix(".new")
    new.write_text(f"{init} {int(hang)} {gpus or '-'}\n")
    os.replace(new, control)


def stub_environment(nvml_stub, control):
    return os.environ | {"LD_LIBRARY_PATH": str(nvml_stub), "NVML_STUB": str(control),
                         "PYTHONPATH": str(SOURCE.parent)}


def run_python(code, env=None, **more):
    done = subprocess.run([sys.executable, "-c", "import beta9_agent as b9\n" + code], capture_output=True,
                          text=True,
                          env=env or os.environ | {"PYTHONPATH": str(SOURCE.parent)}, timeout=60, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def has_driver():
    try:
        return bool(ctypes.CDLL("libnvidia-ml.so.1"))
    except OSError:
        return False


@pytest.mark.parametrize("gpus, init, listed", [
    ("", 0, []), (".b", 0, [("NVIDIA Stub 0", True), ("NVIDIA Stub 1", False)]),
    (".x.", 0, [("NVIDIA Stub 0", True), (None, False), ("NVIDIA Stub 2", True)]),
    ("?", 0, [("NVIDIA Stub 0", False)]), ("l", 0, [(None, False)]),
    ("..", 9, []), ("..", 999, "Unknown Error"), ("..", 18, "RM has detected an NVML/RM version mismatch."),
    ("..", 4, "Insufficient Permissions")],
    ids=["none", "one-busy", "one-lost", "one-that-may-not-be-asked", "one-lost-later", "driver-not-loaded",
         "unknown-error", "version-mismatch", "no-permission"])
def test_list_gpus_of_a_driver_says_what_it_knows(gpus, init, listed, nvml_stub, tmp_path):
    write_gpus(tmp_path / "control", gpus, init)
    code = ("try:\n    print([tuple(gpu) for gpu in b9.list_gpus()])\n"
            "except Exception as error:\n    print(repr(str(error)))")
    assert ast.literal_eval(run_python(code, stub_environment(nvml_stub, tmp_path / "control"))) == listed


def test_list_gpus_asked_again_sees_what_changed(nvml_stub, tmp_path):
    control = tmp_path / "control"
    write_gpus(control, "..")
    code = ("import os\nprint(len(b9.list_gpus()))\nopen(os.environ['NVML_STUB'], 'w').write('0 0 .')\n"
            "print(len(b9.list_gpus()))\nopen(os.environ['NVML_STUB'], 'w').write('18 0 .')\n"
            "print(b9.Host().sample()[1])")
    assert run_python(code, stub_environment(nvml_stub, control)).split() == ["2", "1", "None"]


def test_sample_with_lost_gpu_offers_the_others_and_counts_free_ones(nvml_stub, tmp_path):
    write_gpus(tmp_path / "control", ".bx")
    code = ("metrics, gpus = b9.Host().sample()\n"
            "config = b9.build_config(b9.read_settings(['--token', 'x' * 8], {}), b9.Redactor())\n"
            "print(metrics.free_gpu_count, b9.offer_of(metrics, gpus, config).gpu_count)")
    assert run_python(code, stub_environment(nvml_stub, tmp_path / "control")) == "1 2"


SLOW_DRIVER = """
import logging, os, time
warnings, handler = [], logging.Handler()
handler.emit = warnings.append
b9.LOG.addHandler(handler)
def driver(hangs):
    open(os.environ["NVML_STUB"], "w").write(f"0 {hangs:d} ..")
def answered():
    while len(os.listdir("/proc/self/task")) > 1:
        time.sleep(0.02)
def gpus():
    found = host.sample()[1]
    return found and len(found)
driver(hangs=True)
host = b9.Host(0.5)
print([gpus() for _ in range(3)], len(warnings))
for _ in range(250):
    if len(os.listdir("/proc/self/task")) > 2:
        time.sleep(0.02)
print(len(os.listdir("/proc/self/task")))
for _ in range(2):
    driver(hangs=False)
    answered()
    print(gpus())
    answered()
    driver(hangs=True)
    print(gpus(), gpus())
print(len(warnings))
"""


@pytest.fixture(scope="module")
def slow_driver(nvml_stub, tmp_path_factory):
    """SLOW_DRIVER at work: its deadline takes 5 s."""
    control = tmp_path_factory.mktemp("slow") / "control"
    with subprocess.Popen([sys.executable, "-c", "import beta9_agent as b9" + SLOW_DRIVER], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=stub_environment(nvml_stub, control)) as process:
        yield process
        process.kill()


def test_sample_with_driver_that_hangs_is_unknown_until_it_answers_and_waited_for_once(slow_driver):
    """Two threads: no stuck questions pile up. A slow driver's answer is that to the question before."""
    said, errors = slow_driver.communicate(timeout=60)
    assert said.split("\n") == ["[None, None, None] 1", "2", "2", "2 None", "2", "2 None", "2", ""], errors


@pytest.mark.skipif(has_driver(), reason="this machine has a driver")
def test_list_gpus_without_a_driver_is_empty_and_imports_no_binding():
    assert run_python("import sys\nprint(b9.list_gpus(), 'pynvml' in sys.modules)") == "[] False"


@pytest.mark.gpu
@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no NVIDIA GPU")
def test_list_gpus_of_real_cards_is_what_nvidia_smi_says():
    said = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                          text=True,
                          check=True, timeout=60).stdout.split("\n")
    names = [name.strip() for name in said if name.strip()]
    assert names and ast.literal_eval(run_python("print([gpu.name for gpu in b9.list_gpus()])")) == names


def test_sample_of_this_host_is_sane():
    host = b9.Host()
    host.sample()
    metrics, gpus = host.sample()
    assert 0 <= metrics.cpu_utilization_pct <= 100 and 0 < metrics.memory_utilization_pct <= 100
    assert metrics.total_cpu_available == psutil.cpu_count() * 1000
    assert metrics.total_memory_available == psutil.virtual_memory().total // 2 ** 20
    assert metrics.total_disk_space_bytes == psutil.disk_usage("/").total
    assert 0 < metrics.total_disk_free_bytes <= metrics.total_disk_space_bytes
    assert 0 <= metrics.free_gpu_count <= len(gpus or ())


def test_sample_of_this_host_has_the_types_the_gateway_wants():
    payload = b9.keepalive_payload(config_of(), ID, b9.Host().sample()[0])
    check_shape(sent(payload), KEEPALIVE_FIELDS)
    assert set(payload["metrics"]) == {key.rstrip("?") for key in METRIC_FIELDS} - {"worker_count"}


def test_sample_driver_after_a_slow_disk_gets_only_what_is_left_of_the_deadline(monkeypatch, log_lines):
    class Watched(b9.Host):
        def ask_aside(self, query, what, question, seconds):
            asked.append((what, seconds))
            return super().ask_aside(query, what, question, seconds)

    release, asked = threading.Event(), []
    monkeypatch.setattr(psutil, "disk_usage", lambda path: release.wait())
    metrics, gpus = Watched(0.4).sample()
    assert metrics.total_disk_free_bytes is None
    release.set()
    (_, disk), (_, driver) = asked
    assert disk == 0.4 and driver < 0.1 and [line for line in log_lines if "the disk" in line]
    assert gpus is not None, "the driver was asked meanwhile"


@pytest.mark.parametrize("name, fields", [
    ("virtual_memory", ("total_memory_available", "memory_utilization_pct")),
    ("cpu_count", ("total_cpu_available",)), ("cpu_percent", ("cpu_utilization_pct",)),
    ("disk_usage", ("total_disk_space_bytes", "total_disk_free_bytes"))])
@pytest.mark.parametrize("error", [KeyError("MemTotal"), OSError(5, "I/O error"), IndexError()],
                         ids=lambda error: type(error).__name__)
def test_sample_what_psutil_cannot_read_is_unknown_with_one_warning(monkeypatch, log_lines, name, fields, error):
    def fail(*args):
        raise error

    host = b9.Host()
    monkeypatch.setattr(psutil, name, fail)
    for _ in range(3):
        metrics = host.sample()[0]
        assert [getattr(metrics, field) for field in fields] == [None] * len(fields)
    assert len([line for line in log_lines if "cannot be read" in line]) == 1
    others = set(b9.Metrics._fields) - set(fields) - {"worker_count"}
    assert None not in [getattr(metrics, field) for field in others]


def test_find_private_ip_asks_no_name_server(monkeypatch):
    replace_look_up(monkeypatch, lambda *args, **more: pytest.fail("a name was looked up"))
    b9.find_private_ip()


def test_private_ip_given_is_registered(gateway):
    agent = agent_of(gateway.port, "--private-ip", "10.1.2.3")
    assert agent.payload_of(REGISTER)["private_ip"] == "10.1.2.3"


def test_read_clock_goes_forward():
    first, second = b9.read_clock(), b9.read_clock()
    assert 0 < first <= second


def test_find_private_ip_is_an_address_others_can_reach_or_nothing():
    found = b9.find_private_ip()
    mine = {entry.address.split("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    assert found == "" or found in mine
    address = ipaddress.ip_address(found or "10.0.0.1")
    assert not address.is_loopback and not address.is_link_local


def test_background_query_answers_one_question_after_the_other():
    query = b9.BackgroundQuery()
    assert [query.ask(lambda number=number: number, 30) for number in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("error", [OSError("no disk"), UnicodeError("label too long"), ValueError("odd")],
                         ids=lambda error: type(error).__name__)
def test_background_query_that_fails_raises_the_error_and_not_the_last_answer(error):
    def fail():
        raise error

    query, hook, seen = b9.BackgroundQuery(), threading.excepthook, []
    assert query.ask(lambda: 7, 30) == 7
    threading.excepthook = seen.append
    try:
        with pytest.raises(type(error)) as raised:
            query.ask(fail, 30)
    finally:
        threading.excepthook = hook
    assert raised.value is error and not seen, "a stack trace on standard error"


def test_background_query_stuck_one_thread_and_its_late_answer_serves_the_next_ask():
    def asked():
        return sum("(run)" in thread.name for thread in threading.enumerate())

    query, release, before = b9.BackgroundQuery(), threading.Event(), asked()
    with pytest.raises(TimeoutError):
        query.ask(release.wait, 0.1)
    for _ in range(50):
        with pytest.raises(TimeoutError):
            query.ask(lambda: 7, 0)
    assert asked() == before + 1 and query.was_late
    release.set()
    assert query.ask(lambda: 7, 30) is True, "the late answer"
    assert query.ask(lambda: 8, 30) == 8


def test_background_query_given_up_ends_the_wait():
    query, release = b9.BackgroundQuery(), threading.Event()
    with pytest.raises(TimeoutError):
        query.ask(release.wait, 1000, lambda: True)
    release.set()


# ---- Real processes and sockets: what the rooms below share
PROGRAM = b9.__file__
TOKEN, K3S, SECRET = "Mt0123456789abcdefghi", "Ks9876543210zyxwvuts", "Cs5432109876mnopqrst"


class Count:
    """How many tests passed; a run in which none did has failed."""

    passed = 0

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed


@pytest.fixture(scope="session", autouse=True)
def some_test_passes(request):
    count = Count()
    request.config.pluginmanager.register(count)
    yield
    request.session.testsfailed += not count.passed


@pytest.fixture(scope="session", autouse=True)
def hangup_is_not_ignored():
    """Else the processes started here inherit it from a nohup around pytest."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def wait(condition, what="", limit=30.0):
    """What `condition` returns once it is true."""
    end = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain {what() if callable(what) else what}"
        time.sleep(0.01)
    return found


class Link:
    """A request at the gateway, and the socket to answer it on."""

    def __init__(self, gateway, sock, line, headers, body, connection):
        self.gateway, self.sock, self.headers, self.body = gateway, sock, headers, body
        self.method, self.target = (line.decode(errors="replace").split() + ["", ""])[:2]
        self.call = self.target.partition("?")[0].rpartition("/")[2]
        self.connection, self.time, self.state, self.faulty = connection, time.monotonic(), "", False

    @property
    def json(self):
        return json.loads(self.body)

    def answer(self):
        """What the contract says, as bytes."""
        contract = self.gateway.contract
        if self.call == REGISTER:
            time.sleep(contract.registration_takes)
        status, answer = contract.answer(self.method, self.target, self.headers, self.body, time.monotonic())
        state = answer.get("machine_state", {}) if isinstance(answer, dict) else {}
        self.state = state.get("status", "refused")
        return http_answer(status, answer, chunked=len(str(answer)) > 4096)


def configuration(pool, mode="external", provider="generic", others=100):
    """A gateway's configuration, secrets and all: 120 kB with a hundred other pools."""
    pools = {f"pool-{number}": {"mode": "local", "provider": None, "userData": "#!/bin/sh\n" + "x" * 1000}
             for number in range(others)}
    pools[pool] = {"mode": mode, "provider": provider, "gpu_type": "", "runtime": "nvidia",
                   "pool_sizing": {"default_worker_cpu": "1000m", "default_worker_memory": "1Gi"}}
    return {"database": {"postgres": {"password": CONFIG_SECRET}, "redis": {"addrs": ["127.0.0.1:9"]}},
            "tailscale": {"auth_key": CONFIG_SECRET}, "worker": {"pools": pools}}


CONFIG_SECRET = "pw-5432109876mnopqrstuv"


class Contract:
    """The machine API of gateway-api's page, by someone who trusts no agent."""

    def __init__(self, token, pool, ttl=300):
        self.token, self.pool, self.ttl = token, pool, ttl
        self.config, self.registration_takes = configuration(pool), 0
        self.known = {}     # provider, pool and id -> until when
        self.list = []      # what /machine/list says
        self.health = 200, {"status": "ok"}

    ROUTES = {"/health": "GET", "/machine/list": "GET", "/machine/config": "GET", "/machine/register": "POST",
              "/machine/keepalive": "POST"}
    INTEGERS = {"total_cpu_available", "total_memory_available", "total_disk_space_bytes",
                "total_disk_free_bytes", "free_gpu_count", "worker_count", "container_count"}
    NUMBERS = {"cpu_utilization_pct", "memory_utilization_pct"}

    def answer(self, method, target, headers, body, now):
        route = re.sub("^http://[^/]*", "", target).partition("?")[0].removeprefix("/api/v1")
        if self.ROUTES.get(route, method) != method:
            return 405, {"message": "Method Not Allowed"}
        if route not in self.ROUTES:
            return 404, {"message": "Not Found"}
        if route == "/health":
            return self.health
        bearer = headers.get("Authorization")
        if bearer is None:
            return 500, {"message": "Internal Server Error"}
        if bearer == "Bearer workspace-token":
            return 403, {"message": "Invalid token"}
        if bearer != f"Bearer {self.token}":
            return 401, {"message": "Unauthorized"}
        if route == "/machine/list":
            return 200, self.list
        if route == "/machine/config":
            return (200, {"config": self.config}) if self.config else (
                500, {"message": "Unable to create remote config"})
        try:
            said = json.loads(body, parse_constant=lambda name: pytest.fail("NaN is no JSON"))
        except (ValueError, pytest.fail.Exception):
            said = None
        if headers.get("Content-Type") != "application/json" or not self.fits(said):
            return 400, {"message": "Invalid payload"}
        return self.register(said, now) if route.endswith(REGISTER) else self.keep_alive(said, now)

    def fits(self, said):
        """Whether Go would read it: strings, int64 and float64, each where it belongs."""
        if not isinstance(said, dict):
            return False
        metrics = said.get("metrics", {})
        if not isinstance(metrics, dict):
            return False
        if any(type(value) is not str for name, value in said.items() if name != "metrics"):
            return False
        return all(
            type(value) is int and -2 ** 63 <= value < 2 ** 63 if name in self.INTEGERS else
            type(value) in (int, float) and abs(value) < 1.8e308 if name in self.NUMBERS else True
            for name, value in metrics.items())

    def register(self, said, now):
        for name, right, wrong in (
                ("pool_name", re.escape(self.pool), "pool name"), ("cpu", r"\d+m?", "machine cpu value"),
                ("memory", r"\d+([KMG]i)?", "machine memory value"), ("gpu_count", r"\d+", "gpu count")):
            if not re.fullmatch(right, said.get(name, ""), re.ASCII):
                return 500, {"message": f"Invalid {wrong}"}
        self.known[said.get("provider_name", ""), self.pool, said.get("machine_id", "")] = now + self.ttl
        return 200, {"config": self.config, "machine_state": {
            "machine_id": said.get("machine_id", ""), "status": "registered", "pool_name": self.pool,
            "ttl_seconds": self.ttl}}

    def keep_alive(self, said, now):
        pool, machine_id = said.get("pool_name", ""), said.get("machine_id", "")
        if "" in (pool, machine_id):
            return 400, {"message": "machine_id and pool_name are required"}
        key = said.get("provider_name") or "generic", pool, machine_id
        if self.known.get(key, now) <= now:
            return 500, {"message": "Failed to update keepalive: failed to get machine state"
                         f" <provider:machine:{':'.join(key)}>: machine not found"}
        if "metrics" not in said:
            return 500, {"message": "Internal Server Error"}
        self.known[key] = now + self.ttl
        return 200, {"status": "ok", "machine_state": {
            "machine_id": machine_id, "status": "ready", "pool_name": pool, "ttl_seconds": self.ttl,
            "last_keepalive": "1767804357", "agent_version": said.get("agent_version", "")}}


class Gateway:
    """A gateway on a loopback socket: the stand-in's answers, save where a fault is due.

    A fault is called with the Link; the connection is closed after it, unless it returns True.
    """

    def __init__(self, ttl=300.0, host="127.0.0.1", pool="external", port=0):
        self.contract, self.host, self.port = Contract(TOKEN, pool, ttl), host, port
        self.seen, self.connections, self.open = [], 0, set()
        self.faults, self.always = collections.defaultdict(collections.deque), None
        self.start()

    def start(self):
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self.listener = socket.create_server((self.host, self.port), family=family)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def stop(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.drop()

    def drop(self):
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def forget(self):
        self.contract.known.clear()

    def accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                sock = listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections += 1
                threading.Thread(target=self.serve, args=(sock, self.connections), daemon=True).start()

    def serve(self, sock, connection):
        self.open.add(sock)
        with contextlib.suppress(OSError), sock.makefile("rb") as file:
            while line := file.readline():
                headers = http.client.parse_headers(file)
                body = file.read(int(headers.get("Content-Length", 0)))
                link = Link(self, sock, line, headers, body, connection)
                due = self.faults[link.call]
                fault = due.popleft() if due else self.always
                link.faulty = fault is not None
                self.seen.append(link)
                if not (fault(link) if fault else sock.sendall(link.answer()) is None):
                    break
        self.open.discard(sock)
        sock.close()

    def calls(self, call):
        return [link for link in self.seen if link.call == call]

    def ready(self, after=0):
        """The first keepalive that was taken, from the request of that number on."""
        return next((link for link in self.seen[after:] if link.state == "ready"), None)

    def ready_again(self):
        """Ready by a request that is still to come."""
        after = len(self.seen)
        return wait(lambda: self.ready(after), lambda: [(each.call, each.state) for each in self.seen[-9:]])


def http_answer(status, body=b"", *headers, chunked=False):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    if chunked:
        parts = [body[at:at + 4000] for at in range(0, len(body), 4000)] + [b""]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    json_type = ["Content-Type: application/json"] if not any("Content-Type" in line for line in headers) else []
    lines = f"HTTP/1.1 {status} Whatever", *json_type, *headers, size, "", ""
    return "\r\n".join(lines).encode() + body


def says(status, body=b"", *headers):
    def fault(link):
        link.sock.sendall(http_answer(status, body, *headers))
        return True
    return fault


def breaks(data, reset=False):
    """Sends so much and closes, with a reset or without."""
    def fault(link):
        link.sock.sendall(data)
        if reset:
            time.sleep(0.05)
            link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return fault


def drips(head, drop, pause=0.1):
    """Goes on for ever: until the other end hangs up."""
    def fault(link):
        link.sock.sendall(head)
        while True:
            link.sock.sendall(drop)
            time.sleep(pause)
    return fault


def silent(link):
    link.sock.recv(1)


def late(seconds):
    def fault(link):
        time.sleep(seconds)
        link.sock.sendall(link.answer())
        return True
    return fault


def lost(link):
    link.answer()


class Box:
    """Runs the agent as its users do, with state and home in `folder`; ends what is left."""

    def __init__(self, folder):
        self.folder, self.started = folder, []
        self.environ = {name: value for name, value in os.environ.items()
                        if not name.startswith(("BETA9_", "STATE_DIRECTORY")) and "proxy" not in name.lower()}
        self.environ |= {"HOME": str(folder), "XDG_STATE_HOME": str(folder / "xdg"),
                         "BETA9_STATE_DIR": str(folder / "state"), "BETA9_TOKEN": TOKEN,
                         "BETA9_K3S_URL": "https://127.0.0.1:9"}    # whatever this machine has on 6443

    def start(self, port, *options, before=(), python=(), stderr=None, **environ):
        """The process; `port` is a Gateway's, or None for options that say so. Its log is in `process.log()`."""
        port, host = (port.port, port.host) if isinstance(port, Gateway) else (port, "127.0.0.1")
        log = self.folder / f"log{len(self.started)}"
        there = ["--gateway-host", host, "--gateway-port", str(port)] if port else []
        words = [*before, sys.executable, *python, PROGRAM, *there, "--keepalive-interval", "0.1", *options]
        with open(log, "wb") as file:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=stderr or file,
                                       env={**self.environ, **environ})
        process.log = lambda: log.read_text(errors="replace")
        self.started.append(process)
        return process

    def ready(self, gateway, *options, **more):
        """A process that the gateway has seen ready."""
        after, process = len(gateway.seen), self.start(gateway, *options, **more)
        wait(lambda: gateway.ready(after) or process.poll() is not None, process.log)
        assert process.poll() is None, process.log()
        return process

    def run(self, *options, python=(), input="", **environ):
        """What a run that ends by itself printed, and its exit code."""
        return subprocess.run([sys.executable, *python, PROGRAM, *options], input=input, capture_output=True,
                              text=True, timeout=50, env={**self.environ, **environ})

    def close(self):
        for process in self.started:
            process.kill() if process.poll() is None else None
            process.wait()


@provided
def box(stack, made):
    return stack.enter_context(contextlib.closing(Box(pathlib.Path(tempfile.mkdtemp(dir=ROOT)))))


@provided
def gateway(stack, made):
    return stack.enter_context(contextlib.closing(Gateway()))


@provided
def names(stack, made):
    return NameServer(made["box"].folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Boxes that several tests share."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(Box(tmp_path_factory.mktemp("box"))))


@pytest.fixture(scope="module", autouse=True)
def early(request):
    """What takes long begins first, beside the other tests."""
    for name in ("fleets", "slow_driver", "overcoming", "driver", "ending", "hostile", "reading", "pool"):
        if any(name in item.fixturenames for item in request.session.items):
            request.getfixturevalue(name)


def selected(request, fixture):
    """The rows, by name, of the tests that will ask for this fixture."""
    return [item.callspec.params["name"] for item in request.session.items if fixture in item.fixturenames]


@pytest.fixture(name="box")
def box_here():
    """For tests in this thread."""
    with contextlib.ExitStack() as stack:
        yield box(stack, {})


@pytest.fixture(name="gateway")
def gateway_here():
    """For tests in this thread."""
    with contextlib.closing(Gateway()) as gateway:
        yield gateway


Gateway.close = Gateway.stop


class TlsGateway(Gateway):
    """Behind what `greet` makes of a connection; `heard` are the first bytes that came on each."""

    def __init__(self, greet, **more):
        self.greet, self.heard = greet, []
        super().__init__(**more)

    def serve(self, sock, connection):
        try:
            self.heard.append(sock.recv(65536, socket.MSG_PEEK))
            sock = self.greet(sock)
        except OSError:
            return sock.close()
        super().serve(sock, connection)


def make_certificates():
    """A folder: the root ca.pem, the root of others, what it signed: good, expired, future, wrong-name."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=ROOT))

    def openssl(words):
        subprocess.run(["openssl", *words.split(), "-subj", "/CN=Test"], cwd=folder, check=True,
                       capture_output=True)

    new_key = "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for name in ("ca", "others"):
        openssl(f"{new_key} -x509 -days 2 -keyout {name}.key -out {name}.pem"
                " -addext keyUsage=critical,keyCertSign,cRLSign")
    right = "DNS:localhost,IP:127.0.0.1,DNS:get.k3s.io,DNS:nvidia.github.io"
    for name, days, names in (("good", 2, right), ("expired", -1, right), ("wrong-name", 2, "DNS:x.example")):
        openssl(f"{new_key} -keyout {name}.key -out {name}.csr")
        (folder / "names").write_text(f"subjectAltName={names}\nauthorityKeyIdentifier=keyid\n")
        subprocess.run(["openssl", "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                        "-CAcreateserial", "-days", str(days), "-extfile", "names", "-out", f"{name}.pem"],
                       cwd=folder, check=True, capture_output=True)
    openssl(f"{new_key} -keyout future.key -out future.csr")
    (folder / "names").write_text(f"subjectAltName={right}\nauthorityKeyIdentifier=keyid\n")
    (folder / "index.txt").touch()
    (folder / "serial").write_text("0f\n")
    (folder / "ca.conf").write_text("[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nserial=serial\n"
                                    "new_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
                                    "[p]\ncommonName=supplied\n")
    subprocess.run(["openssl", "ca", "-batch", "-config", "ca.conf", "-in", "future.csr", "-cert", "ca.pem",
                    "-keyfile", "ca.key", "-extfile", "names", "-startdate", "20480101000000Z", "-enddate",
                    "20490101000000Z", "-out", "future.pem"], cwd=folder, check=True, capture_output=True)
    return folder


@provided
def certificates(stack, made):
    with CERTIFICATES_LOCK:
        CERTIFICATES[:] = CERTIFICATES or [make_certificates()]
    return CERTIFICATES[0]


CERTIFICATES, CERTIFICATES_LOCK = [], threading.Lock()


@pytest.fixture(scope="session", name="certificates")
def certificates_here():
    return certificates(None, {})


def tls_with(folder, name, newest=ssl.TLSVersion.MAXIMUM_SUPPORTED):
    """Greets with this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    if newest is ssl.TLSVersion.TLSv1_1:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = newest
    return lambda sock: context.wrap_socket(sock, server_side=True)


def stopped(process, number=signal.SIGTERM, limit=20):
    """The exit code after a signal."""
    process.send_signal(number)
    return process.wait(limit)


def agent_of(port, *options):
    config = config_of("--token", TOKEN, "--gateway-port", str(port), "--gateway-host", "127.0.0.1", *options)
    alarm = b9.Alarm()
    alarm.install()
    return b9.Agent(config, b9.State("1165a9b6"), b9.GatewayClient(config, alarm))


def send(agent, call, seconds=5.0):
    return agent.client.send(call, agent.payload_of(call), seconds)


SHELL = ["sh", "-c"]
NOT_FOUND = "failed to get machine state <provider:machine:generic:external:1165a9b6>: machine not found"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
PAGE = b"<html><body>502 Bad Gateway" + b" " * 300 + b"</body></html>"


# ---- 7 Wire
WIRE_REPLIES = {
    "kept": (b9.KEEPALIVE, 200, '{"status": "ok", "machine_state": {"ttl_seconds": 30}}', b9.Kind.OK, ""),
    "registered": (b9.REGISTER, 200, '{"config": {"k3s": 1}}', b9.Kind.OK, ""),
    "html": (b9.KEEPALIVE, 200, "<html>Log in", b9.Kind.TROUBLE, "Log in"),
    "forgotten": (b9.KEEPALIVE, 500, '{"message": "x: machine not found"}', b9.Kind.FORGOTTEN, "does not know"),
    "denied": (b9.REGISTER, 401, '{"message": "Unauthorized"}', b9.Kind.DENIED, "beta9 machine create"),
    "forbidden": (b9.REGISTER, 403, '{"message": "Invalid token"}', b9.Kind.FORBIDDEN, "machine create"),
    "no-pool": (b9.REGISTER, 500, '{"message": "Invalid pool name"}', b9.Kind.REFUSED, "--pool-name"),
    "upstream": (b9.KEEPALIVE, 404, '{"message": "Not Found"}', b9.Kind.REFUSED, "upstream"),
    "redirect": (b9.KEEPALIVE, 301, "", b9.Kind.TROUBLE, "http://elsewhere/"),
    "too-big": (b9.KEEPALIVE, 200, '{"status": "ok"}' + " " * 70000, b9.Kind.TROUBLE, "64 KiB"),
}


@pytest.mark.parametrize("call, status, body, kind, words", WIRE_REPLIES.values(), ids=WIRE_REPLIES)
def test_call_answered_so_means_this_outcome(call, status, body, kind, words):
    agent = agent_of(1994, "--k3s-token", K3S)
    with responses.RequestsMock() as mock:
        mock.post(f"http://127.0.0.1:1994/api/v1/machine/{call}", body, status=status,
                  headers={"Location": "http://elsewhere/"})
        outcome = send(agent, call)
        sent, = [each.request for each in mock.calls]
    assert outcome.kind is kind and words in f"{outcome.text}. {outcome.remedy}"
    assert sent.headers["Authorization"] == f"Bearer {TOKEN}"
    said = json.loads(sent.body)
    assert said["machine_id"] == "1165a9b6" and said.get("token") == (K3S if call == b9.REGISTER else None)


@pytest.mark.parametrize("fault, words", [
    (breaks(b""), "broke"), (breaks(b"", True), "reset"), (breaks(b"nonsense\r\n\r\n"), "broke"),
    (drips(HEAD + b"\r\n", b" " * 90000, 0), "4096 KiB"),
], ids=["closed", "reset", "nonsense", "endless"])
def test_call_fault_is_trouble_and_the_next_one_works(gateway, fault, words):
    agent = agent_of(gateway.port)
    gateway.faults[b9.REGISTER].append(fault)
    outcome = send(agent, b9.REGISTER)
    assert outcome.kind is b9.Kind.TROUBLE and words in outcome.text
    assert send(agent, b9.REGISTER).kind is b9.Kind.OK
    agent.client.http.close()


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
NEVER_ENDING = {
    "silent": silent, "status-line": drips(b"", b"H"), "header": drips(HEAD + b"X: ", b"x"),
    "headers": drips(HEAD, b"X: y\r\n"), "body": drips(HEAD + b"Content-Length: 5000\r\n\r\n{", b" "),
    "chunks": drips(CHUNKED, b"1\r\n \r\n"), "chunk": drips(CHUNKED + b"ffff\r\n", b" "),
    "until-closed": drips(HEAD + b'\r\n{"status": "ok"}', b" "),
    "redirect": drips(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 5000\r\n\r\n", b"x")}


@pytest.mark.parametrize("name", NEVER_ENDING)
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_call_that_never_ends_is_cut_and_the_next_one_works(certificates, tls, name):
    """None of these answers ends by itself: that there is an outcome shows that it was cut."""
    made = TlsGateway(tls_with(certificates, "good")) if tls else Gateway()
    with contextlib.closing(made) as gateway:
        agent = agent_of(gateway.port, *(tls_options(certificates, "ca", "127.0.0.1") if tls else []))
        assert send(agent, REGISTER).kind is OK
        gateway.faults[KEEPALIVE].append(NEVER_ENDING[name])
        outcome = send(agent, KEEPALIVE, 0.15)
        assert outcome.kind is TROUBLE and "no complete answer in time" in outcome.text
        assert send(agent, KEEPALIVE).kind is OK and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        agent.client.http.close()


def never_greets(data):
    """A TLS server that sends so much and then nothing, until the other end hangs up."""
    def greet(sock):
        sock.sendall(data)
        while sock.recv(65536):
            pass
        raise ConnectionError
    return greet


@pytest.mark.parametrize("greet", [never_greets(b""), never_greets(b"\x16")], ids=["silent", "one-byte"])
def test_call_whose_tls_handshake_never_ends_is_cut(certificates, greet):
    with contextlib.closing(TlsGateway(greet)) as gateway:
        agent = agent_of(gateway.port, *tls_options(certificates, "ca", "127.0.0.1"))
        start = time.monotonic()
        outcome = send(agent, REGISTER, 0.15)
        assert outcome.kind is TROUBLE and "in time" in outcome.text and time.monotonic() - start < 5
        gateway.greet = tls_with(certificates, "good")
        assert send(agent, REGISTER).kind is OK
        agent.client.http.close()


def race(count):
    """Requests whose answers come within a millisecond or so of their deadline; how many had one."""
    chance, answered = random.Random(6), 0
    with contextlib.closing(Gateway()) as gateway:
        agent, gateway.contract.config = agent_of(gateway.port), None

        def answer(link):
            time.sleep(chance.uniform(0.015, 0.021))
            link.sock.sendall(link.answer())
            return True

        gateway.always = answer
        for _ in range(count):
            answered += send(agent, REGISTER, 0.02).kind is OK
        gateway.always = None
        assert send(agent, REGISTER).kind is OK and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        agent.client.http.close()
    return answered


def test_call_racing_its_deadline_ends_one_way_or_the_other():
    print(f"\nanswered in time: {race(100)} of 100")


@pytest.mark.slow
def test_call_racing_its_deadline_5000_times_never_hangs():
    answered = race(5000)
    print(f"\nanswered in time: {answered} of 5000")
    assert 0 < answered < 5000


def test_call_that_timed_out_is_a_failure_whatever_came(gateway):
    """Answered, but the alarm rang before that was noticed."""
    agent = agent_of(gateway.port)

    def rings_then_answers(link):
        agent.client.http.request.timed_out = True
        return late(0)(link)

    gateway.always = rings_then_answers
    outcome = send(agent, REGISTER)
    assert outcome.kind is TROUBLE and "in time" in outcome.text


def test_call_from_a_helper_thread_is_hung_up_by_whoever_waits_for_it(gateway):
    client = b9.HttpClient(f"http://127.0.0.1:{gateway.port}", None)
    gateway.always, query = silent, b9.BackgroundQuery()
    question = lambda: client.exchange("GET", "/", {}, None, 60, 1000)  # noqa: E731
    with pytest.raises(TimeoutError):
        query.ask(question, 0.3)
    client.request.hang_up()
    with pytest.raises(TimeoutError):
        query.ask(question, 30)
    assert client.request.timed_out and client.request.connection is None


def test_call_that_failed_leaves_no_connection_behind(gateway):
    agent = agent_of(gateway.port)
    gateway.faults[REGISTER].append(breaks(CHUNKED + b"zz\r\n"))
    gateway.faults[KEEPALIVE].append(silent)
    for call in (REGISTER, KEEPALIVE):
        assert send(agent, call, 0.3).kind is TROUBLE
        wait(lambda: not gateway.open)
        assert agent.client.http.request.connection is None


def test_call_answered_with_gzip_is_never_unpacked(gateway):
    agent = agent_of(gateway.port)
    gateway.faults[KEEPALIVE].append(says(200, gzip.compress(b'{"status": "ok"}'), "Content-Encoding: gzip"))
    assert send(agent, KEEPALIVE).kind is TROUBLE
    agent.client.http.close()


class RecordingRequest(b9.OutgoingRequest):
    """Counts how often it is hung up."""

    hung_up = 0

    def hang_up(self):
        self.hung_up += 1
        super().hang_up()


@pytest.fixture
def alarm():
    before = signal.getsignal(signal.SIGALRM)
    alarm = b9.Alarm()
    alarm.install()
    yield alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_alarm_rings_again_and_again_and_not_after_the_request(alarm):
    request = RecordingRequest(0.01, None)
    with alarm.guarding(request):
        wait(lambda: request.hung_up > 2)
    rung = request.hung_up
    time.sleep(0.25)
    assert request.hung_up == rung and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_alarm_hangs_up_a_connection_that_came_after_it_rang(alarm):
    one, two = socket.socketpair()
    with one, two:      # kept open: its end would be an end of its own
        request = b9.OutgoingRequest(10, None)
        request.hang_up()
        request.hold(one)
        one.settimeout(10)
        assert one.recv(1) == b""
        request.let_go()


@pytest.mark.parametrize("left, cut", [(10, True), (2.5, True), (1.5, True), (0.5, False)])
def test_alarm_cut_by_a_stop_ends_a_request_within_a_second(alarm, left, cut):
    request = b9.OutgoingRequest(left, None)
    with alarm.guarding(request):
        alarm.end_requests_by(b9.read_clock() + b9.STOP_DEADLINE)
        timer = signal.getitimer(signal.ITIMER_REAL)[0]
        assert timer <= 1 if cut else 0.3 < timer <= 0.5
    with alarm.guarding(b9.OutgoingRequest(10, None)):  # and those to come
        assert signal.getitimer(signal.ITIMER_REAL)[0] <= 1
    alarm.end_requests_by(b9.read_clock() + 0.5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0), "no request is left that it could cut"


def test_stop_deadlines_add_up_to_less_than_2_s():
    assert b9.STOP_DEADLINE <= 1 < b9.LEAVE_DEADLINE < 2 and b9.TICK < 1


def test_resolver_slower_than_the_deadline_serves_the_next_request(gateway, monkeypatch):
    looked_up, release = [], threading.Event()
    real = socket.getaddrinfo

    def slow(host, port, *rest, **more):
        if host != "slow.example" or more["flags"]:     # other tests look up names beside this one
            return real(host, port, *rest, **more)
        looked_up.append(host)
        release.wait()
        return real("127.0.0.1", port, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    agent = agent_of(gateway.port, "--gateway-host", "slow.example")
    for _ in range(2):
        outcome = send(agent, REGISTER, 0.2)
        assert "name server slow" in outcome.text and outcome.kind is TROUBLE
    release.set()
    assert send(agent, REGISTER).kind is OK and looked_up == ["slow.example"]
    agent.client.http.close()


def test_connect_goes_on_to_the_next_address_with_a_share_of_the_time(gateway, monkeypatch):
    real = socket.getaddrinfo
    with socket.create_server(("127.0.0.2", gateway.port), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(4):  # the queue is full: further connections hang
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        replace_look_up(monkeypatch, lambda host, port, **more: [
            found for address in ("127.0.0.2", "127.0.0.1") for found in real(address, port, **more)])
        agent = agent_of(gateway.port)
        assert send(agent, REGISTER, 2).kind is OK
        agent.client.http.close()


def test_connect_to_the_first_of_several_addresses_leaves_tls_all_the_time(gateway, monkeypatch):
    real = socket.getaddrinfo
    replace_look_up(monkeypatch, lambda *asked, **more: real(*asked, **more) * 2)
    client = b9.HttpClient(f"http://127.0.0.1:{gateway.port}", None)
    client.request = b9.OutgoingRequest(60, None)
    with client.connect("127.0.0.1", gateway.port) as sock:
        assert 30 < sock.gettimeout() <= 60
    client.close()


def test_ca_file_that_vanished_is_named(certificates, tmp_path):
    shutil.copy(certificates / "ca.pem", tmp_path)
    with contextlib.closing(TlsGateway(tls_with(certificates, "good"))) as gateway:
        agent = agent_of(gateway.port, "--tls", "--ca-file", str(tmp_path / "ca.pem"))
        (tmp_path / "ca.pem").unlink()
        outcome = send(agent, REGISTER)
    assert outcome.kind is TROUBLE and "--ca-file is gone" in outcome.text


@beside
def test_tls_session_keys_are_not_written_for_others(box, certificates):
    keys = box.folder / "keys"
    with contextlib.closing(TlsGateway(tls_with(certificates, "good"))) as gateway:
        box.ready(gateway, *tls_options(certificates, "ca", "localhost"), SSLKEYLOGFILE=str(keys))
    assert not keys.exists()


def test_call_refused_or_without_address_says_so():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    agent = agent_of(port)
    outcome = send(agent, b9.REGISTER)
    assert outcome.text == f"connection refused by 127.0.0.1:{port}" and "tunnel" in outcome.remedy


# A child in which only some names are found, without a packet to any name server.
NAMES = """
import socket, sys, types
known, tried = {names}, []
def look_up(host, port, *rest, flags=0, **more):
    if host not in known or flags:
        raise socket.gaierror(-2, "Name or service not known")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]]
def connect(sock, address):
    tried.append(address[0])
    raise {error}
socket.getaddrinfo, socket.socket.connect = look_up, connect
import beta9_agent as b9
config = b9.build_config(b9.read_settings(["--token", "t" * 9, "--gateway-host", {host!r}], {{}}),
                         b9.Redactor())
outcome = b9.GatewayClient(config, None).send("register", {{"machine_id": "1165a9b6"}}, 5)
print(outcome.kind.name, f"{{outcome.text}}. {{outcome.remedy}}", *tried, sep="\\n")
"""


def call_to_a_name(host, names, error="ConnectionRefusedError(111, 'Connection refused')"):
    """Kind and text of what came of it, and the addresses that were tried."""
    environ = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    code = NAMES.format(names=names, host=host, error=error)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env=environ | {"PYTHONPATH": str(SOURCE.parent)})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("names, kind, words, tried", [
    ({}, "TROUBLE", "no address is known of gw.example:1994. Check the name", []),
    ({"gw.example": ["10.0.0.1", "10.0.0.2"]}, "TROUBLE", "refused", ["10.0.0.1", "10.0.0.2"]),
    ({"gw.example": ["10.0.0.1", "203.0.113.7"]}, "UNSAFE_NAME", "gw.example leads to 203.0.113.7", []),
    ({"gw.example": ["203.0.113.7"]}, "UNSAFE_NAME", "gw.example leads to 203.0.113.7", []),
], ids=["not-found", "private", "mixed", "public"])
def test_call_to_a_name_goes_to_what_it_was_judged_by(names, kind, words, tried):
    lines = call_to_a_name("gw.example", names)
    assert lines[0] == kind and words in lines[1] and lines[2:] == tried, lines


@pytest.mark.parametrize("name", ["gateway", "ssl-gw", "resolver.corp", "timeout.corp", "connection-refused"])
def test_call_that_fails_is_told_by_its_error_whatever_the_host_is_called(name):
    lines = call_to_a_name(name, {name: ["10.0.0.1"]}, "OSError(101, 'Network is unreachable')")
    assert re.search("the connection to .* broke, OSError: .{,99}Network is unreachable", lines[1]), lines


def test_call_with_endless_words_of_an_error_keeps_its_remedy(gateway):
    agent = agent_of(gateway.port)
    gateway.faults[REGISTER].append(breaks(b"HTTP/1.1 200" + b"x" * 60000 + b"\r\n\r\n"))
    outcome = send(agent, REGISTER)
    assert len(outcome.text) < 300 and "/api/v1/health`" in outcome.remedy, outcome


@pytest.mark.parametrize("host", ["LOCALHOST", "localhost.", "0:0:0:0:0:0:0:1", "::0001"])
def test_proxy_is_not_asked_for_loopback_however_it_is_written(environ, tried, host):
    environ(dict.fromkeys(("http_proxy", "ALL_PROXY"), "http://127.0.0.7:9"))
    b9.GatewayClient(config_of("--gateway-host", host), None).send(REGISTER, {"machine_id": ID}, 5.0)
    assert ("127.0.0.7", 9) not in tried


@beside
def test_wire_netrc_proxy_and_redirect_traps_not_taken(box, gateway):
    (box.folder / ".netrc").write_text("machine 127.0.0.1\nlogin me\npassword wrong\n")
    (box.folder / ".netrc").chmod(0o600)
    dead = "http://127.0.0.1:9"
    with contextlib.closing(Gateway()) as elsewhere:
        gateway.faults[b9.KEEPALIVE].append(
            says(307, b"", f"Location: http://127.0.0.1:{elsewhere.port}/api/v1/machine/keepalive"))
        process = box.ready(gateway, HTTP_PROXY=dead, http_proxy=dead, ALL_PROXY=dead, all_proxy=dead)
        assert {link.headers["Authorization"] for link in gateway.seen} == {f"Bearer {TOKEN}"}
        assert elsewhere.connections == 0 and str(elsewhere.port) in process.log()


@beside
def test_wire_proxy_used_beyond_loopback(box, gateway):
    gateway.always = says(502, b"this is the proxy")
    process = box.start(gateway, "--gateway-host", "192.0.2.1", "--startup-timeout", "0",
                        http_proxy=f"http://127.0.0.1:{gateway.port}")
    assert process.wait(30) == 69 and "this is the proxy" in process.log()
    assert gateway.seen[0].headers["Host"] == f"192.0.2.1:{gateway.port}"


def no_tls(sock):
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    raise ConnectionError


def nobody(sock):
    raise ConnectionError


LOOPBACKS = ["localhost", "127.0.0.1"]
TLS_FAULTS = {  # what the server does with a connection, the root that is given, and words of the message
    "expired": (lambda it: tls_with(it, "expired"), "ca", "not valid now.* Renew it.* clock"),
    "clock-behind": (lambda it: tls_with(it, "future"), "ca", "not valid now.* Renew it.* clock"),
    "wrong-name": (lambda it: tls_with(it, "wrong-name"), "ca", "is not for "),
    "unknown-issuer": (lambda it: tls_with(it, "good"), "others", "unknown issuer.* --ca-file"),
    "unknown-to-requests": (lambda it: tls_with(it, "good"), None, "unknown issuer.* --ca-file"),
    "self-signed": (lambda it: tls_with(it, "others"), "ca", "unknown issuer.* --ca-file"),
    "tls-1.1": (lambda it: tls_with(it, "good", ssl.TLSVersion.TLSv1_1), "ca", "no TLS 1.2 or newer"),
    "cleartext": (lambda it: no_tls, "ca", "no TLS 1.2 or newer.* port of https"),
    "closes": (lambda it: nobody, "ca", "TLS|connection to .* broke"),
}


def tls_options(folder, root, host):
    return ["--tls", "--gateway-host", host, *(["--ca-file", f"{folder}/{root}.pem"] if root else [])]


@pytest.mark.parametrize("host", LOOPBACKS)
@beside
def test_tls_verified_against_the_given_root_is_ready(box, certificates, host):
    environ = {"BETA9_TLS": "yes", "BETA9_CA_FILE": f"{certificates}/ca.pem"} if host == "localhost" else {}
    options = [] if environ else tls_options(certificates, "ca", host)
    with contextlib.closing(TlsGateway(tls_with(certificates, "good"))) as gateway:
        process = box.ready(gateway, *options, "--gateway-host", host, **environ)
        assert gateway.seen[0].headers["Host"] == f"{host}:{gateway.port}" and gateway.connections == 1
        assert f"https://{host}:{gateway.port}" in process.log() and b"POST" not in gateway.heard[0]
        assert stopped(process) == 0 and gateway.seen[-1].state == "registered"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@pytest.mark.parametrize("host", LOOPBACKS)
@pytest.mark.parametrize("name", TLS_FAULTS)
def test_tls_fault_says_what_to_do_and_sends_nothing(certificates, name, host):
    greet, root, words = TLS_FAULTS[name]
    with contextlib.closing(TlsGateway(greet(certificates))) as gateway:
        if name == "tls-1.1":
            client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
            client.set_ciphers("DEFAULT:@SECLEVEL=0")
            client.minimum_version = ssl.TLSVersion.TLSv1
            try:
                client.wrap_socket(socket.create_connection((gateway.host, gateway.port), 5)).close()
            except ssl.SSLError:
                pytest.skip("OpenSSL offers no TLS 1.1 here")
        outcome = send(agent_of(gateway.port, *tls_options(certificates, root, host)), REGISTER)
        said = f"{outcome.text}. {outcome.remedy}"
        assert outcome.kind is TROUBLE and re.search(words, said) and f"{host}:{gateway.port}" in said, said
        assert gateway.heard and gateway.seen == [] and not re.search(
            b"POST|Bearer|" + TOKEN.encode(), b"".join(gateway.heard))


@pytest.mark.parametrize("name", ["expired", "wrong-name", "unknown-issuer", "cleartext"])
@beside
def test_tls_fault_once_ends_with_69_and_otherwise_is_tried_again(box, certificates, name):
    greet, root, words = TLS_FAULTS[name]
    with contextlib.closing(TlsGateway(greet(certificates))) as gateway:
        process = box.start(gateway, *tls_options(certificates, root, "localhost"), "--once")
        assert process.wait(30) == 69 and re.search(words, process.log()) and gateway.seen == []
        assert "Traceback" not in process.log()
        process = box.start(gateway, *tls_options(certificates, root, "localhost"))
        wait(lambda: "failed 2 times" in process.log(), process.log)
        gateway.greet = tls_with(certificates, "good")
        if root == "ca":
            wait(gateway.ready, process.log)
        assert process.poll() is None


ROOT_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


@pytest.mark.parametrize("given, named, code", [(None, "ca", 69), ("others", "ca", 69), ("ca", "others", 0)],
                         ids=["default-roots", "another-root", "this-root"])
@beside
def test_tls_roots_are_not_those_of_the_environment(box, certificates, given, named, code):
    environ = dict.fromkeys(ROOT_VARIABLES, f"{certificates}/{named}.pem")
    with contextlib.closing(TlsGateway(tls_with(certificates, "good"))) as gateway:
        process = box.start(gateway, *tls_options(certificates, given, "localhost"), "--once",
                            SSL_CERT_DIR=str(certificates), **environ)
        assert process.wait(30) == code, process.log()
        assert bool(gateway.seen) is (code == 0) and ("--ca-file" in process.log()) is (code != 0)


# Cleartext. Nothing here connects to an address that is not loopback: `tried` stands in the way
PROXIES = [f"{name}_proxy" for name in ("http", "https", "all", "no")]


@pytest.fixture
def environ(monkeypatch):
    """Sets variables of this process, which has none about proxies."""
    for name in PROXIES:
        monkeypatch.delenv(name, False)
        monkeypatch.delenv(name.upper(), False)
    return lambda values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def judged(stop, *argv):
    """Exit code and words of a --dry-run of these."""
    try:
        return b9.show_dry_run(config_of("--dry-run", "--machine-id", ID, *argv)) or 0, ""
    except b9.AgentError as error:
        return error.exit_code, str(error)


PUBLIC_PROXY = "http://203.0.113.9:3128"
UNSAFE = {  # the gateway, variables, and the address that is named
    "ipv4": ("203.0.113.7", {}, "203.0.113.7"), "ipv6": ("2001:db8::7", {}, "2001:db8::7"),
    "brackets": ("[2001:db8::7]", {}, "2001:db8::7"), "mapped": ("::ffff:203.0.113.7", {}, "203.0.113.7"),
    "one-number": ("3405803783", {}, "203.0.113.7"), "like-loopback": ("::1:203", {}, "::1:203"),
    "proxy": ("10.1.2.3", {"http_proxy": PUBLIC_PROXY}, "203.0.113.9"),
    "proxy-capitals": ("10.1.2.3", {"ALL_PROXY": PUBLIC_PROXY}, "203.0.113.9"),
    "proxy-bare": ("10.1.2.3", {"http_proxy": "203.0.113.9:3128"}, "203.0.113.9"),
    "proxy-user": ("10.1.2.3", {"http_proxy": "http://10.0.0.1:x@203.0.113.9:3128"}, "203.0.113.9"),
    "proxy-ipv6": ("10.1.2.3", {"http_proxy": "http://[2001:db8::9]:3128"}, "2001:db8::9"),
    "proxy-for-a-name": ("gw.example", {"http_proxy": PUBLIC_PROXY}, "203.0.113.9"),
    "proxy-for-a-name-like-localhost": ("localhost.example", {"http_proxy": PUBLIC_PROXY}, "203.0.113.9"),
    "proxy-for-a-name-like-loopback": ("127.0.0.1.example", {"http_proxy": PUBLIC_PROXY}, "203.0.113.9"),
}


@pytest.fixture
def tried(monkeypatch):
    """The addresses that connections went to; each of them was refused."""
    addresses = []

    def connect(sock, address):
        addresses.append(address[:2])
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return addresses


@pytest.mark.parametrize("name", UNSAFE)
def test_cleartext_to_a_public_address_is_unsafe_and_names_the_ways_out(environ, tried, name):
    host, values, address = UNSAFE[name]
    environ(values)
    outcome = b9.GatewayClient(config_of("--gateway-host", host), None).send(REGISTER, {"machine_id": ID}, 5.0)
    assert outcome.kind is b9.Kind.UNSAFE and address in outcome.text and tried == []
    assert b9.exit_code_after(outcome, b9.Lease(0.0), 0.0, 0.0, config_of()) == 2
    assert all(words in outcome.remedy for words in ("--tls", "--ssh", "--allow-cleartext"))


@pytest.mark.parametrize("name", UNSAFE)
def test_cleartext_dry_run_of_a_public_address_ends_with_2_and_others_do_not(environ, stop, name):
    host, values, address = UNSAFE[name]
    environ(values)
    code, said = judged(stop, "--gateway-host", host)
    assert code == 2 and address in said and "--tls" in said and "--allow-cleartext" in said
    assert judged(stop, "--gateway-host", host, "--allow-cleartext")[0] == 0
    assert judged(stop, "--gateway-host", host, "--tls")[0] == 0


@pytest.mark.parametrize("host, values, address", [
    *((host, {}, host) for host in ("10.1.2.3", "172.16.0.1", "192.168.255.1", "100.64.0.1", "169.254.1.1",
                                    "fd7a::1", "fe80::1")), ("2130706433", {}, "127.0.0.1"),
    ("10.1.2.3", {"http_proxy": PUBLIC_PROXY, "no_proxy": "10.1.2.3"}, "10.1.2.3"),
    ("10.1.2.3", {"http_proxy": PUBLIC_PROXY, "no_proxy": "10.0.0.0/8"}, "10.1.2.3"),
    ("10.1.2.3", {"https_proxy": PUBLIC_PROXY}, "10.1.2.3"),
    ("203.0.113.7", {"http_proxy": "http://127.0.0.1:1994"}, "127.0.0.1"),
    *((host, {"http_proxy": PUBLIC_PROXY, "ALL_PROXY": PUBLIC_PROXY}, address)
      for host, address in (("localhost", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"),
                            ("127.9.9.9", "127.9.9.9"), ("[::1]", "::1")))])
def test_cleartext_to_a_private_address_goes_there(environ, stop, tried, host, values, address):
    environ(values)
    outcome = b9.GatewayClient(config_of("--gateway-host", host), None).send(REGISTER, {"machine_id": ID}, 5.0)
    assert tried[-1] == (address, 1994) and outcome.kind is TROUBLE
    assert {number for number, _ in tried} <= {address, "::1"}
    assert judged(stop, "--gateway-host", host)[0] == 0


@pytest.mark.parametrize("argv", [["--tls"], ["--allow-cleartext"]], ids=["tls", "allow-cleartext"])
def test_cleartext_rule_lifted_goes_to_a_public_address(environ, tried, argv):
    environ({})
    config = config_of("--gateway-host", "203.0.113.7", *argv)
    outcome = b9.GatewayClient(config, None).send(REGISTER, {"machine_id": ID}, 5.0)
    assert outcome.kind is TROUBLE and tried == [("203.0.113.7", 1994)]


def test_cleartext_dry_run_judges_no_name(environ, stop):
    environ({})
    assert judged(stop, "--gateway-host", "gw.example") == (0, "")


@pytest.mark.parametrize("argv", [["--once"], ["--dry-run"], []], ids=["once", "dry-run", "for-ever"])
@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7"])
@beside
def test_start_in_cleartext_to_a_public_address_ends_with_2(box, host, argv):
    done = box.run("--gateway-host", host, *argv)
    assert done.returncode == 2 and "--allow-cleartext" in done.stderr and "Traceback" not in done.stderr


BAD_PROXIES = ["http://user:pass-word-1@[bad", "socks5://user:pass-word-1@127.0.0.1:1080", "ftp://x:pass-word-1@h"]


@pytest.mark.parametrize("url", BAD_PROXIES, ids=["malformed", "socks", "ftp"])
@pytest.mark.parametrize("options", [["--once"], ["--dry-run"]], ids=["once", "dry-run"])
@beside
def test_proxy_that_cannot_be_used_ends_with_2_and_is_not_shown(box, url, options):
    done = box.run("--gateway-host", "10.1.2.3", *options, http_proxy=url)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "http_proxy" in done.stderr and "pass-word" not in done.stderr + done.stdout


@pytest.mark.parametrize("fault, words", [(None, "connection refused by"), (breaks(b""), "the connection to")],
                         ids=["refused", "broken"])
@beside
def test_proxy_is_named_without_its_password_wherever_it_matters(box, gateway, fault, words):
    proxy = f"http://user:pass-word-1@127.0.0.1:{gateway.port}"
    if fault is None:
        gateway.stop()
    gateway.always = fault
    process = box.start(gateway, "--gateway-host", "10.1.2.3", "--startup-timeout", "0", http_proxy=proxy)
    assert process.wait(30) == 69
    start, *_, last = process.log().splitlines()
    named = f"the proxy 127.0.0.1:{gateway.port}"
    assert f"through {named}" in start and f"{words} {named}" in last and "no_proxy" in last
    shown = box.run("--dry-run", "--gateway-host", "10.1.2.3", http_proxy=proxy).stdout
    assert f"proxy: {named}\n" in shown and "pass-word" not in shown + process.log()


@pytest.mark.parametrize("host", ["gw.example", "10.1.2.3", "203.0.113.7", "[2001:db8::7]"])
def test_proxy_on_loopback_is_asked_for_any_gateway_by_the_name_given(gateway, environ, host):
    environ({"http_proxy": f"http://127.0.0.1:{gateway.port}"})
    agent = agent_of(1994, "--gateway-host", host)
    for number in range(2):
        outcome = agent.client.send(REGISTER, b9.register_payload(agent.config, ID, agent.plan.offer, ""), 5.0)
        assert outcome.kind is OK and gateway.connections == 1
    assert [link.target for link in gateway.seen] == [f"http://{host}:1994/api/v1/machine/register"] * 2
    assert gateway.seen[0].headers["Host"] == f"{host}:1994"
    agent.client.http.close()


@pytest.mark.parametrize("values", [{}, {"http_proxy": "http://127.0.0.1:9", "no_proxy": "2130706433"}],
                         ids=["no-proxy-given", "no_proxy"])
def test_name_of_a_private_address_is_asked_directly_with_its_own_name(gateway, environ, values):
    environ(values)
    agent = agent_of(gateway.port, "--gateway-host", "2130706433")  # one way to write 127.0.0.1
    assert send(agent, REGISTER).kind is OK and gateway.seen[0].target == "/api/v1/machine/register"
    assert gateway.seen[0].headers["Host"] == f"2130706433:{gateway.port}"
    agent.client.http.close()


# k3s, by what listens in its place; the tests with the marker k3s have a real Kubernetes API
def k3s_options(port, *more):
    return ["--k3s-token", K3S, "--k3s-url", f"https://127.0.0.1:{port}", "--hostname", "box", *more]


def cpu_offered(gateway):
    """The CPU of the last registration."""
    return gateway.calls(REGISTER)[-1].json["cpu"]


@beside
def test_k3s_without_its_ca_is_usable_while_a_handshake_ends_and_gets_no_token(box, gateway, certificates):
    with contextlib.closing(TlsGateway(tls_with(certificates, "others"))) as k3s:
        process = box.ready(gateway, *k3s_options(k3s.port))
        assert cpu_offered(gateway) != "0m", "the first look was waited for"
        k3s.stop()
        wait(lambda: cpu_offered(gateway) == "0m", process.log)
        assert " ERROR k3s cannot be used, connection refused by 127.0.0.1:" in process.log()
        gateway.ready_again()
        k3s.start()
        wait(lambda: cpu_offered(gateway) != "0m", process.log)
        assert k3s.seen == [] and not any(K3S.encode() in data for data in k3s.heard) and len(k3s.heard) > 2
        assert process.poll() is None and "worker_count" not in gateway.ready_again().json["metrics"]


@pytest.mark.parametrize("options", [[], ["--k3s-wait", "--k3s-ca-file", "/nowhere/ca.crt"]], ids=["none", "missing"])
def test_k3s_client_without_a_root_certificate_asks_nothing(certificates, options):
    with contextlib.closing(TlsGateway(tls_with(certificates, "good"))) as k3s:
        client = b9.K3sClient(config_of(*k3s_options(k3s.port, *options)), ID)
        with pytest.raises(b9.AgentError, match="root certificate of k3s is not at"):
            client.ask("GET", "/", b9.Secret(K3S))
        assert k3s.heard == []
        assert options == [] or client.look().fault.startswith(
            "k3s cannot be used, the root certificate of k3s is not at /nowhere/ca.crt, so no worker can run here")


@pytest.fixture
def k3s(certificates):
    """A k3s whose gateway token may do all that it has to, with one worker; its node has two GPUs."""
    there = {"selfsubjectrulesreviews": ruled(RULES), "pods": (200, table(("w", "Running", "1s"))),
             "nodes": (200, {"items": [node("other"), node(socket.gethostname().lower(), allocatable={
                 "nvidia.com/gpu": "2"})]})}
    with contextlib.closing(TlsGateway(tls_with(certificates, "good"))) as k3s:
        k3s.always = lambda link: says(*there[link.call])(link)
        k3s.options = k3s_options(k3s.port, "--k3s-ca-file", str(certificates / "ca.pem"))
        yield k3s


def test_k3s_client_asks_for_the_node_with_the_token_for_it_alone(k3s, tmp_path):
    (tmp_path / "node-token").write_text("Nd0123456789abcdefghi")
    client = b9.K3sClient(config_of(*k3s.options, "--k3s-node-token-file", str(tmp_path / "node-token")), ID)
    view = client.look()
    assert (view.fault, list(view.workers), view.gpu_count) == ("", ["w"], 2)
    assert [(link.call, bearer(link)) for link in k3s.seen] == [
        ("selfsubjectrulesreviews", K3S), ("pods", K3S), ("nodes", "Nd0123456789abcdefghi")]
    client.close()
    client = b9.K3sClient(config_of(*k3s.options), ID)
    assert client.look().gpu_count is None and len(k3s.calls("nodes")) == 1, "nor with another one"
    client.close()


def test_k3s_client_looks_once_in_a_period(k3s):
    client = b9.K3sClient(config_of(*k3s.options), ID)
    assert wait(lambda: client.poll(3600, 0.1)).fault == ""
    asked = len(k3s.seen)
    assert client.poll(3600, 0.3) is None and len(k3s.seen) == asked
    client.due = 0.0        # an hour later
    assert wait(lambda: client.poll(3600, 0.1)).fault == "" and len(k3s.seen) == 2 * asked
    client.close()


@pytest.mark.parametrize("ended", ["late", "closed"])
def test_k3s_client_hangs_up_on_a_look_that_is_late_or_of_no_use_any_more(k3s, ended):
    """The answer never ends by itself: that there is a view shows that it was cut."""
    client = b9.K3sClient(config_of(*k3s.options), ID)
    k3s.always = drips(HEAD, b"X: y\r\n")
    assert client.poll(3600, 0.1) is None
    wait(lambda: k3s.seen)
    client.late_at = math.inf if ended == "closed" else 0.0
    if ended == "closed":
        client.close()
    assert "no complete answer in time" in wait(lambda: client.poll(3600, 0.1)).fault


def test_k3s_files_that_change_have_it_looked_at_anew_and_nothing_before_counts(k3s, tmp_path):
    token = tmp_path / "k3s-token"
    token.write_text(K3S)
    agent = agent_of(1994, *k3s.options[2:], "--k3s-token-file", str(token))
    agent.state = b9.State(ID, str(tmp_path / ID))
    wait(lambda: agent.look_around() or agent.k3s.last)
    assert json.loads((tmp_path / f"{ID}.status.json").read_text())["k3s"]["state"] == "usable"
    agent.k3s = b9.believe(agent.k3s, b9.K3sView("the old token is refused"), b9.read_clock())
    token.write_text("another-" + K3S)
    agent.files_due, agent.k3s_client.due = 0.0, math.inf       # a look is not due by time
    agent.look_at_files()
    assert b9.believe(agent.k3s, b9.K3sView("k3s restarts"), 0.0).view.fault == "", "the first of two"
    assert wait(lambda: agent.look_at_k3s(0.1)) and bearer(k3s.seen[-1]) == "another-" + K3S
    agent.k3s_client.close()


def test_k3s_offer_always_turns_the_gate_off_and_nothing_else(gateway):
    agent = agent_of(gateway.port, "--k3s-token", K3S, "--offer-always", "--k3s-ca-file", certifi.where())
    agent.k3s = b9.K3sState(b9.K3sView("down", {"w": b9.Worker("Running", 0.0)}, 3))
    assert agent.k3s_view() == b9.K3sView("", {"w": b9.Worker("Running", 0.0)}, 3)


@beside
def test_k3s_with_a_foreign_certificate_gets_no_byte_of_the_token(box, gateway, certificates):
    with contextlib.closing(TlsGateway(tls_with(certificates, "others"))) as k3s:
        process = box.ready(gateway, *k3s_options(k3s.port, "--k3s-ca-file", str(certificates / "ca.pem")))
        wait(lambda: len(k3s.heard) > 2, process.log)
        assert cpu_offered(gateway) == "0m" and "has an unknown issuer, so no worker can run here" in process.log()
        assert k3s.seen == [] and not any(K3S.encode() in data for data in k3s.heard)


@pytest.mark.parametrize("name, fault, words", [
    ("redirect", says(302, b"", "Location: https://127.0.0.1:9/"), "k3s answers 302"),
    ("html", says(200, b"<html>"), "k3s answers 200, no Kubernetes API"),
    ("unauthorized", says(401, {"kind": "Status", "message": "Unauthorized"}), "k3s refuses the token"),
    ("echo", says(500, {"message": f"your token is {K3S}"}), "your token is [redacted]"),
    ("endless", drips(HEAD + b"\r\n", b" " * 90000, 0), "larger than 4096 KiB"),
    ("closed", breaks(b""), "k3s cannot be used, the connection")],
    ids=lambda value: value if isinstance(value, str) else "")
@beside
def test_k3s_that_answers_so_is_unusable_and_hears_the_token_alone(box, gateway, certificates, name, fault, words):
    with contextlib.closing(TlsGateway(tls_with(certificates, "good"))) as k3s, socket.create_server(
            ("127.0.0.1", 0)) as proxy:
        k3s.always = fault
        process = box.ready(gateway, *k3s_options(k3s.port, "--k3s-ca-file", str(certificates / "ca.pem")),
                            HTTPS_PROXY=f"http://127.0.0.1:{proxy.getsockname()[1]}")
        wait(lambda: words in process.log(), process.log)
        assert cpu_offered(gateway) == "0m" and process.poll() is None
        assert {bearer(link) for link in k3s.seen} == {K3S} and leaks(process.log(), K3S) == []
        assert {link.call for link in k3s.seen} == {"selfsubjectrulesreviews"}, "nothing more is asked"
        proxy.settimeout(0)
        assert pytest.raises(BlockingIOError, proxy.accept)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["silent", "silent-tls", "drip"])
@beside
def test_k3s_that_never_answers_is_unusable_and_in_the_way_of_nothing(box, gateway, certificates, name):
    greet = {"silent": never_greets(b""), "silent-tls": never_greets(b"\x16\x03")}.get(
        name, tls_with(certificates, "good"))
    with contextlib.closing(TlsGateway(greet)) as k3s:
        k3s.always = drips(HEAD, b"X: y\r\n")
        options = ["--k3s-ca-file", str(certificates / "ca.pem")] if name == "drip" else []
        process = box.ready(gateway, *k3s_options(k3s.port, *options))
        wait(lambda: "k3s cannot be used, no complete answer in time" in process.log(), process.log)
        kept = [link.time for link in gateway.calls(KEEPALIVE)]
        assert cpu_offered(gateway) == "0m" and len(kept) > 20
        assert stopped(process) == 0


def put(path, text):
    """Writes a file in one step, as what rotates tokens does."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


@beside
def test_k3s_files_that_come_later_are_waited_for_and_used_at_once(box, gateway, certificates):
    """With a keepalive a minute: what comes and changes is at the gateway within seconds."""
    token, ca = box.folder / "k3s-token", box.folder / "ca.crt"
    with contextlib.closing(TlsGateway(tls_with(certificates, "good"))) as k3s:
        rules = answers("selfsubjectrulesreviews", *ruled(RULES))
        k3s.always = lambda link: rules(link) if link.call != "pods" else says(200, table(("w", "Running", "1s")))(link)
        options = ["--k3s-url", f"https://127.0.0.1:{k3s.port}", "--hostname", "box", "--k3s-token-file", str(token),
                   "--k3s-ca-file", str(ca), "--keepalive-interval", "60"]
        process = box.ready(gateway, *options, "--k3s-wait")
        assert cpu_offered(gateway) == "0m" and gateway.calls(REGISTER)[0].json["token"] == ""
        assert f"it is looked for in {token}, so look at `systemctl status k3s`" in process.log()
        put(token, "short")
        time.sleep(2.5)
        put(token, K3S)
        start = time.monotonic()
        wait(lambda: gateway.calls(REGISTER)[-1].json["token"] == K3S, process.log)
        assert cpu_offered(gateway) == "0m" and k3s.heard == []
        put(ca, (certificates / "ca.pem").read_text())
        wait(lambda: cpu_offered(gateway) != "0m", process.log)
        put(token, "another-" + K3S)
        wait(lambda: gateway.calls(REGISTER)[-1].json["token"] == "another-" + K3S, process.log)
        assert time.monotonic() - start < 40, "at its next keepalive each would have taken a minute"
        wait(lambda: gateway.calls(KEEPALIVE)[-1].json["metrics"].get("worker_count") == 1, process.log)
        assert "INFO worker w is there, Running" in process.log()
        assert leaks(process.log(), K3S) == [] and "no token in" not in process.log()
        stopped(process)
        token.unlink()
        assert box.run("--dry-run", *options).returncode == 2


def test_k3s_workers_that_come_and_go_are_told_in_20_lines_and_one_more(gateway, log_lines):
    agent = agent_of(gateway.port)
    for number in range(30):
        agent.k3s = b9.K3sState(b9.K3sView("", {f"w{number}": b9.Worker("Running", 0.0)}))
        agent.report_workers()
    assert log_lines[1:3] == ["worker w1 is there, Running", "worker w0 has ended, Running"]
    assert len(log_lines) == 20
    agent.worker_lines.times = collections.deque([-math.inf] * 20, 20)      # ten minutes later
    for _ in range(3):
        agent.report_workers()
    assert log_lines[20:] == ["39 more workers came or went meanwhile"]


@beside
def test_k3s_file_that_is_missing_is_a_problem_unless_it_is_waited_for(box):
    for flag in ("--k3s-token-file", "--k3s-ca-file", "--k3s-node-token-file"):
        path = str(box.folder / "nowhere")
        done = box.run("--dry-run", flag, path)
        assert done.returncode == 2 and flag in done.stderr and len(done.stderr.splitlines()) == 1
        assert box.run("--dry-run", flag, path, "--k3s-wait").returncode == 0
        assert box.run("--dry-run", flag, path, BETA9_K3S_WAIT="1").returncode == 0


# ---- 8 Disk
def machine_of(gateway):
    return gateway.seen[-1].json["machine_id"]


@beside
def test_identity_killed_and_started_again_the_same(box, gateway):
    stopped(box.ready(gateway), signal.SIGKILL)
    first = machine_of(gateway)
    assert stopped(box.ready(gateway)) == 0 and machine_of(gateway) == first
    assert (box.folder / "state/machine-id").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content, words", [
    (b"", "damaged"), (b"\xff\0\x1b", "damaged"), (b"1165a9b6", "damaged"),
    (b"1165a9b6 " + b"f" * 64 + b"\n", "another"), (None, "damaged"),
], ids=["empty", "binary", "cut-off", "copied-disk", "a-folder"])
@beside
def test_identity_file_damaged_or_copied_new_one_kept(box, gateway, content, words):
    path = box.folder / "state/machine-id"
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_bytes(content)
    process = box.ready(gateway)
    first = machine_of(gateway)
    assert words in process.log() and first != "1165a9b6" and stopped(process) == 0
    if content is not None:
        box.ready(gateway)
        assert machine_of(gateway) == first


@beside
def test_identity_folder_that_cannot_be_written_one_warning(box, gateway):
    (box.folder / "file").write_text("")
    process = box.ready(gateway, "--state-dir", str(box.folder / "file/below"))
    assert process.log().count("--state-dir") == 1 and stopped(process) == 0


@beside
def test_identity_on_a_full_disk_one_warning(box, gateway):
    done = subprocess.run(  # no file may grow, pipes may
        [*SHELL, 'ulimit -f 0; exec "$@"', "sh", sys.executable, PROGRAM, "--once",
         "--gateway-host", "127.0.0.1", "--gateway-port", str(gateway.port)],
        env=box.environ, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0 and done.stderr.count("--state-dir") == 1, done.stderr
    assert not os.path.exists(box.folder / "state/machine-id")


@beside
def test_two_agents_with_one_id_second_ends_with_75(box, gateway):
    first = box.ready(gateway)
    second = box.start(gateway)
    assert second.wait(30) == 75 and str(first.pid) in second.log()
    assert box.ready(gateway, "--machine-id", "1165a9b6").poll() is None
    assert first.poll() is None


@beside
def test_lock_left_by_a_dead_process_does_not_block(box, gateway):
    stopped(box.ready(gateway, "--machine-id", "1165a9b6"), signal.SIGKILL)
    assert (box.folder / "state/1165a9b6.lock").exists()
    box.ready(gateway, "--machine-id", "1165a9b6")


@beside
def test_lock_folder_removed_under_the_agent_stays_ready(box, gateway):
    process = box.ready(gateway)
    while (box.folder / "state").exists():      # the agent may write there meanwhile
        shutil.rmtree(box.folder / "state", ignore_errors=True)
    gateway.ready_again()
    assert not (box.folder / "state").exists() and "Traceback" not in process.log() and stopped(process) == 0


@beside
def test_identity_of_several_first_starts_at_once_is_one(box, gateway):
    started = [box.start(gateway) for _ in range(5)]
    wait(lambda: gateway.ready() and sum(process.poll() is None for process in started) == 1)
    assert sorted(process.poll() for process in started if process.poll() is not None) == [75] * 4
    kept = (box.folder / "state/machine-id").read_text().split()[0]
    assert {link.json["machine_id"] for link in gateway.seen} == {kept}
    assert len([path for path in (box.folder / "state").iterdir() if path.suffix == ".lock"]) == 1


NO_LOCKS = "#include <errno.h>\nint flock(int file, int how) { errno = ENOLCK; return -1; }\n"


@beside
def test_identity_where_there_are_no_locks_is_kept_with_one_warning(box, gateway):
    if not shutil.which("cc"):
        pytest.skip("no cc")
    (box.folder / "no-locks.c").write_text(NO_LOCKS)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "no-locks.so", "no-locks.c"], cwd=box.folder, check=True)
    ids = set()
    for _ in range(2):
        process = box.ready(gateway, LD_PRELOAD=str(box.folder / "no-locks.so"))
        ids.add(machine_of(gateway))
        assert process.log().count("cannot be locked") == 1 and stopped(process) == 0
    assert len(ids) == 1


def test_state_dir_of_a_user_without_a_home_is_a_bad_setting(monkeypatch):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_STATE_HOME", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, False)
    with pytest.raises(b9.AgentError, match="give --state-dir") as raised:
        b9.find_state_dir(config_of())
    assert raised.value.exit_code == 2
    assert b9.find_state_dir(config_of("--state-dir", "/x")) == "/x"


@beside
def test_lock_file_holds_our_pid_alone(box, gateway):
    (box.folder / "state").mkdir()
    lock = box.folder / "state/1165a9b6.lock"
    lock.write_text("123456789\nand more of a longer file\n")
    process = box.ready(gateway, "--machine-id", "1165a9b6")
    assert lock.read_text() == f"{process.pid}\n"


# ---- 9 Children
SSHD = "/usr/sbin/sshd"


def free_ports():
    """Of those that the system does not hand out by itself."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            yield port


def connected(port, host="127.0.0.1"):
    """A connection, where somebody listens."""
    with contextlib.suppress(ConnectionError):
        return socket.create_connection((host, port), 30)


class SshHost:
    """The gateway's host with its sshd, made as README says; the `ssh` of the agent reads this folder's files
    and none of the user's own.
    """

    def __init__(self, box, gateway):
        self.box, self.gateway, self.folder = box, gateway, pathlib.Path(tempfile.mkdtemp(dir=ROOT))
        ports = free_ports()
        self.port, self.remote, self.other = (next(ports) for _ in range(3))
        self.user, self.keys = pwd.getpwuid(os.getuid()).pw_name, self.folder / "keys"
        self.known = self.folder / "known_hosts"
        for name in ("host", "id", "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        self.known.write_text(f"[127.0.0.1]:{self.port} {(self.folder / 'host.pub').read_text()}")
        line = block("file: ~USER/.ssh/authorized_keys").replace("31994", str(gateway.port))
        public = (self.folder / "id.pub").read_text().strip()
        self.keys.write_text(line.replace("6443", str(self.remote)).replace("PUBLIC-KEY", public))
        # What a user may have there, and the agent overrules
        (self.folder / "ssh.conf").write_text(f"""Host *
            IdentityFile {self.folder}/id
            IdentitiesOnly yes
            IdentityAgent none
            UserKnownHostsFile {self.known}
            GlobalKnownHostsFile /dev/null
            BatchMode no
            ExitOnForwardFailure no
            ServerAliveInterval 0
            ControlMaster auto
            ControlPath {self.folder}/master
            ForwardAgent yes
            ForwardX11 yes
            LogLevel QUIET\n""")
        stub(self.folder / "bin/ssh", f'exec {shutil.which("ssh")} -F {self.folder}/ssh.conf "$@"')
        self.environ = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}"}
        match = block("file: /etc/ssh/sshd_config.d/beta9-tunnel.conf").replace("User USER", f"User {self.user}")
        self.conf = self.folder / "sshd.conf"
        self.conf.write_text(f"""ListenAddress 127.0.0.1
            Port {self.port}
            HostKey {self.folder}/host
            AuthorizedKeysFile {self.keys}
            PidFile none
            StrictModes no
            UsePAM no
            PermitRootLogin prohibit-password
            Subsystem sftp internal-sftp\n{match}""")
        if os.getuid() == 0:
            os.makedirs("/run/sshd", 0o755, exist_ok=True)
        # OpenSSH 9.8 and later shut out for a while those whose sessions were killed
        self.command, patient = [SSHD, "-f", self.conf], ["-o", "PerSourcePenalties=no"]
        if subprocess.run([*self.command, *patient, "-t"], capture_output=True).returncode == 0:
            self.command += patient
        self.listen()

    def listen(self):
        with open(self.folder / "log", "ab") as log:
            self.sshd = psutil.Popen([*self.command, "-D", "-e"], stdin=subprocess.DEVNULL, stderr=log)
        wait(lambda: connected(self.port) or self.sshd.poll() is not None, self.log).close()

    def log(self):
        """What sshd said."""
        return (self.folder / "log").read_text(errors="replace")

    def sessions(self):
        """The server's processes of all connections."""
        return self.sshd.children(recursive=True)

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
        return ["--ssh", f"{self.user}@127.0.0.1:{self.port}", "--ssh-gateway", f"localhost:{self.gateway.port}",
                *more]

    def start(self, *more, **environ):
        """An agent that has no other way to the gateway."""
        return self.box.start(None, *self.options(*more), **self.environ, **environ)

    def ready(self, *more, **environ):
        after, process = len(self.gateway.seen), self.start(*more, **environ)
        wait(lambda: self.gateway.ready(after) or process.poll() is not None, process.log)
        assert process.poll() is None, process.log()
        return process

    def run(self, *more, **environ):
        return self.box.run(*self.options(*more), **self.environ, **environ)

    def clients(self):
        """The processes of ssh that run for it, and for no other test."""
        found = []
        for process in psutil.process_iter(["name", "cmdline"]):
            if process.info["name"] == "ssh" and f"{self.folder}/ssh.conf" in (process.info["cmdline"] or ()):
                found.append(process)
        return found

    def change(self, path, old, new):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def close(self):
        self.box.close()
        self.stop() if self.sshd.is_running() else None
        self.kill(self.clients())


@provided
def ssh_host(stack, made):
    if not os.access(SSHD, os.X_OK) or not shutil.which("ssh"):
        pytest.skip("no sshd or no ssh here")
    return stack.enter_context(contextlib.closing(SshHost(made["box"], made["gateway"])))


needs_setpriv = pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv here: ssh outlives kill -9")


@beside
def test_ssh_keepalives_come_through_a_socket_that_nobody_else_can_take(box, gateway, ssh_host):
    process = ssh_host.ready("--machine-id", ID, "--keepalive-interval", "0.2")
    wait(lambda: len(gateway.calls(KEEPALIVE)) > 3, process.log)
    path = box.folder / f"state/{ID}.ssh"
    assert mode_of(path) == 0o600 and path.is_socket()
    assert mode_of(path.parent) & 0o022 == 0 and path.parent.stat().st_uid == os.getuid()
    assert {link.headers["Host"] for link in gateway.seen} == {f"localhost:{gateway.port}"}
    client, = ssh_host.clients()
    assert TOKEN not in str(client.cmdline()) + str(client.environ()) and "BETA9_TOKEN" not in client.environ()
    assert os.getsid(client.pid) == client.pid, "Ctrl-C reaches the agent alone"
    assert stopped(process) == 0 and not path.exists() and ssh_host.clients() == []
    assert gateway.seen[-1].call == REGISTER, "it left through the tunnel"


@pytest.mark.parametrize("lost", ["session", "server", "ssh"])
@beside
def test_ssh_lost_comes_back_and_the_same_agent_is_ready_again(box, gateway, ssh_host, lost):
    process = ssh_host.ready()
    before = ssh_host.clients()
    if lost == "session":
        ssh_host.kill(ssh_host.sessions())
    elif lost == "ssh":
        ssh_host.kill(before)
    else:
        ssh_host.stop()
        wait(lambda: "tunnel failed" in process.log() or "keepalive failed" in process.log(), process.log)
        after = gateway.connections
        time.sleep(0.3)
        assert gateway.connections == after, "nothing is sent while ssh is down"
        ssh_host.listen()
    gateway.ready_again()
    wait(lambda: "ready again after" in process.log(), process.log)
    assert process.poll() is None and not set(before) & set(ssh_host.clients())
    assert record_of(box)["tunnel_replaced"] >= 1 and len(gateway.calls(REGISTER)) == 1


@pytest.mark.parametrize("stuck", ["server", "ssh"])
@beside
def test_ssh_stuck_is_replaced_after_two_requests_without_answer(box, gateway, ssh_host, stuck):
    process = ssh_host.ready()
    before = ssh_host.clients()
    hung = before if stuck == "ssh" else ssh_host.sessions()
    for each in hung:
        each.suspend()
    wait(lambda: "is stuck, as two requests in a row got no answer" in process.log(), process.log)
    gateway.ready_again()
    assert process.poll() is None and not set(before) & set(ssh_host.clients())
    ssh_host.kill(hung)


@pytest.mark.slow
@beside
def test_ssh_with_a_silent_server_is_ended_by_its_own_keepalives(box, gateway, ssh_host):
    """While no request is due: without an agent."""
    tunnel = b9.Tunnel(config_of(*ssh_host.options()), b9.State(""))
    tunnel.program = str(ssh_host.folder / "bin/ssh")
    with contextlib.closing(tunnel):
        assert wait(lambda: tunnel.tend(b9.read_clock()), ssh_host.log).kind is b9.Kind.OK
        for each in ssh_host.sessions():
            each.suspend()
        outcome = wait(lambda: tunnel.tend(b9.read_clock()), ssh_host.log, limit=75)
        assert outcome.kind is b9.Kind.TROUBLE and "not responding" in outcome.text
        assert wait(lambda: tunnel.tend(b9.read_clock()), ssh_host.log).kind is b9.Kind.OK


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda it: it.name)
@beside
def test_ssh_that_hangs_ends_with_its_agent_within_2_s(box, gateway, ssh_host, number):
    process = ssh_host.ready("--keepalive-interval", "60")
    for each in ssh_host.clients():
        each.suspend()
    start = time.monotonic()
    assert stopped(process, number) == 0 and ssh_host.clients() == []
    assert time.monotonic() - start < 4, "2 s, and as much again on a busy machine"


@needs_setpriv
@beside
def test_ssh_ends_when_its_agent_is_killed(box, gateway, ssh_host):
    process = ssh_host.ready()
    assert len(ssh_host.clients()) == 1
    stopped(process, signal.SIGKILL)
    wait(lambda: ssh_host.clients() == [])


@pytest.mark.slow
@beside
def test_ssh_agent_started_again_after_kill_takes_the_old_socket_over(box, gateway, ssh_host):
    stopped(ssh_host.ready("--machine-id", ID), signal.SIGKILL)
    assert (box.folder / f"state/{ID}.ssh").exists()
    ssh_host.ready("--machine-id", ID)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["x" * 100, "others-may-write", "a:b%c"], ids=["long", "open", "odd"])
@beside
def test_ssh_socket_has_a_folder_of_its_own_where_the_state_folder_is_no_place_for_it(box, gateway, ssh_host, state):
    folder = box.folder / state
    folder.mkdir()
    folder.chmod(0o777 if state == "others-may-write" else 0o755)
    process = ssh_host.ready(BETA9_STATE_DIR=str(folder))
    words = ssh_host.clients()[0].cmdline()
    path = pathlib.Path(words[words.index("-L") + 1].partition(":")[0])
    assert path.parent.parent == pathlib.Path("/tmp") and mode_of(path.parent) == 0o700 and mode_of(path) == 0o600
    assert stopped(process) == 0 and not path.parent.exists()


def listens_in_silence(it):
    """On the port of ssh is somebody who never answers."""
    it.stop()
    it.listener = socket.create_server(("127.0.0.1", it.port))


# What is wrong -> how the test makes it so, more options, ssh's words and those of the remedy
SSH_TROUBLE = {
    "host key unknown": (lambda it: it.known.write_text(""), [], "Host key verification failed", "ssh-keyscan -p"),
    "host key of another": (
        lambda it: it.change(it.known, (it.folder / "host.pub").read_text().split()[1],
                             (it.folder / "stranger.pub").read_text().split()[1]), [],
        "REMOTE HOST IDENTIFICATION HAS CHANGED", "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub"),
    "key not let in": (lambda it: it.keys.write_text(""), [], "Permission denied", "must be in authorized_keys of"),
    "key with a passphrase": (
        lambda it: subprocess.run(["ssh-keygen", "-p", "-N", "passphrase", "-f", it.folder / "id"], check=True,
                                  capture_output=True), [], "Permission denied", "must have no passphrase"),
    "key not there": (lambda it: it.change(it.folder / "ssh.conf", f"{it.folder}/id", "none"),
                      ["--ssh-identity", "/nowhere/key"], "/nowhere/key not accessible", "Check --ssh-identity"),
    "port there not permitted": (lambda it: it.change(it.keys, f'listen="{it.remote}', 'listen="1'),
                                 ["--ssh-reverse", "REMOTE"], "remote port forwarding failed", "permitlisten"),
    "gateway not permitted": (lambda it: it.change(it.keys, 'open="localhost', 'open="127.0.0.1'), [],
                              "administratively prohibited", "permitopen in authorized_keys"),
    "gateway not there": (lambda it: it.gateway.stop(), [], "open failed: connect failed", "--ssh-gateway"),
    "nothing listens": (lambda it: it.stop(), [], "Connection refused", "Check --ssh, and that sshd is up"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SSH_TROUBLE)
@beside
def test_ssh_trouble_from_the_start_is_said_with_its_remedy_and_nobody_is_asked(box, gateway, ssh_host, name):
    """Whom ssh would ask for a yes or a passphrase here is `askpass`, who gives both."""
    stub(ssh_host.folder / "askpass", f'echo >{ssh_host.folder}/asked; case $1 in *phrase*) echo passphrase;;'
         ' *) echo yes; esac')
    make, more, words, remedy = SSH_TROUBLE[name]
    make(ssh_host)
    known = ssh_host.known.read_text()
    more = [word.replace("REMOTE", str(ssh_host.remote)) for word in more]
    done = ssh_host.run("--once", *more, SSH_ASKPASS=f"{ssh_host.folder}/askpass", SSH_ASKPASS_REQUIRE="force",
                        DISPLAY=":9")
    assert done.returncode == 69 and ssh_host.clients() == [], done.stderr
    last = done.stderr.splitlines()[-1]
    assert "giving up after" in last and words in last and remedy in last, last
    assert gateway.seen == [] and not (ssh_host.folder / "asked").exists() and ssh_host.known.read_text() == known


@pytest.mark.slow
@beside
def test_ssh_port_there_that_another_machine_has_is_refused(box, gateway, ssh_host):
    ssh_host.ready("--ssh-reverse", str(ssh_host.remote))
    done = ssh_host.run("--once", "--ssh-reverse", str(ssh_host.remote), BETA9_STATE_DIR=str(box.folder / "second"))
    assert done.returncode == 69 and f"Port {ssh_host.remote} there is taken" in done.stderr


@beside
def test_ssh_wrong_from_the_start_ends_after_startup_timeout(box, gateway, ssh_host):
    ssh_host.keys.write_text("")
    start = time.monotonic()
    process = ssh_host.start("--startup-timeout", "2.5")
    assert process.wait(30) == 69 and time.monotonic() - start >= 2.5 and gateway.seen == []
    assert "tunnel failed" in process.log() and "giving up after" in process.log()


@pytest.mark.slow
@beside
def test_ssh_wrong_from_the_start_is_tried_until_it_is_mended(box, gateway, ssh_host):
    keys = ssh_host.keys.read_text()
    ssh_host.keys.write_text("")
    process = ssh_host.start()
    wait(lambda: "tunnel failed" in process.log(), process.log)
    ssh_host.keys.write_text(keys)
    wait(gateway.ready, process.log)
    assert stopped(process) == 0


@pytest.mark.slow
@beside
def test_ssh_to_a_listener_that_never_answers_is_given_up(box, gateway, ssh_host):
    listens_in_silence(ssh_host)
    done = ssh_host.run("--once")
    assert done.returncode == 69 and "timed out" in done.stderr, done.stderr
    ssh_host.listener.close()


@pytest.mark.parametrize("action", [["--once"], ["--check"]], ids=["once", "check"])
@beside
def test_ssh_missing_names_the_package(box, action):
    done = box.run("--ssh", "gateway-host", *action, PATH=str(box.folder))
    assert done.returncode == (2 if action == ["--once"] else 1)
    assert "ssh is missing: install it, `apt-get install openssh-client`" in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("address", ["", "127.0.0.2:"], ids=["loopback", "an-address"])
@beside
def test_ssh_reverse_leads_to_this_machine(box, gateway, ssh_host, address):
    """To port 6443 here: in a network of its own, where that is free."""
    if address:
        ssh_host.change(ssh_host.keys, 'listen="', f'listen="{address}')
        ssh_host.stop()
        with open(ssh_host.conf, "a") as file:
            file.write("    GatewayPorts clientspecified\n")
        ssh_host.listen()
    # The one port here that a test cannot choose: the stub has ssh go to another one
    here = socket.create_server(("127.0.0.1", 0))
    here.settimeout(30)
    stub(ssh_host.folder / "bin/ssh", f'for word; do shift; set -- "$@" "$(printf %s "$word" | sed'
         f' s/localhost:6443/localhost:{here.getsockname()[1]}/)"; done\n'
         f'exec {shutil.which("ssh")} -F {ssh_host.folder}/ssh.conf "$@"')
    ssh_host.ready("--ssh-reverse", f"{address}{ssh_host.remote}")
    with connected(ssh_host.remote, address.rstrip(":") or "127.0.0.1") as there, here, here.accept()[0] as sock:
        for one, two in ((there, sock), (sock, there)):
            one.sendall(b"hello")
            assert two.recv(5, socket.MSG_WAITALL) == b"hello"


@pytest.mark.slow
@pytest.mark.parametrize("name, words", [("good", None), ("wrong-name", "is not for localhost")])
@beside
def test_ssh_with_tls_checks_the_name_of_ssh_gateway(box, gateway, ssh_host, certificates, name, words):
    behind = TlsGateway(tls_with(certificates, name))
    ssh_host.change(ssh_host.keys, str(gateway.port), str(behind.port))
    done = ssh_host.run("--once", "--tls", "--ca-file", str(certificates / "ca.pem"), "--ssh-gateway",
                        f"localhost:{behind.port}")
    assert done.returncode == (69 if words else 0) and (words or "ready after") in done.stderr, done.stderr
    assert words is None or "Give --ssh-gateway a name that is in the certificate" in done.stderr
    behind.stop()


@pytest.mark.slow
@beside
def test_ssh_gateway_that_is_away_behind_it_is_waited_for(box, gateway, ssh_host):
    process = ssh_host.ready()
    before = ssh_host.clients()
    gateway.stop()
    wait(lambda: "says: channel" in process.log(), process.log)
    gateway.start()
    gateway.ready_again()
    assert ssh_host.clients() == before, "this is no trouble of ssh"


def test_ssh_goes_past_the_proxy_of_the_environment(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert b9.find_proxy(config_of("--gateway-host", "gw.example.com")) == "http://127.0.0.1:9"
    assert b9.find_proxy(config_of("--ssh", "gw", "--ssh-gateway", "gw.example.com:80")) == ""


def test_ssh_that_fails_is_started_again_no_later_than_startup_timeout(tmp_path, stop):
    config = config_of("--ssh", "gw", "--startup-timeout", "5")
    with contextlib.closing(b9.Tunnel(config, b9.State(ID, str(tmp_path / ID)))) as tunnel:
        agent = b9.Agent(config, b9.State(ID), b9.GatewayClient(config, None), tunnel)
        tunnel.failures, now = 9, agent.started_at + 1
        agent.fail("tunnel", tunnel.fail("is stuck", now), now, stop)
        assert tunnel.start_at == agent.started_at + 5 and agent.lease.due >= now + 15


@pytest.fixture
def tunnel(tmp_path):
    """One whose ssh is a program that says two lines, has a child, and does nothing else."""
    stub(tmp_path / "ssh", f"echo one; sleep 300 & echo $! >{tmp_path}/child; echo two; wait")
    tunnel = b9.Tunnel(config_of("--ssh", "gw"), b9.State(ID, str(tmp_path / ID)))
    tunnel.program = str(tmp_path / "ssh")
    yield tunnel
    tunnel.close()


LATE = b9.Outcome(TROUBLE, "no complete answer")


def test_tunnel_is_stuck_after_two_time_outs_in_a_row_and_no_sooner(tunnel):
    for _ in range(2):      # the second ssh begins at none
        tunnel.start(1000.0)
        tunnel.up_since = 1000.0
        for outcome, timed_out in ((LATE, True), (b9.Outcome(OK), False), (LATE, True), (LATE, False), (LATE, True)):
            assert tunnel.judge(outcome, timed_out, 1001.0) == outcome and tunnel.carries()
        assert "is stuck, as two requests in a row" in tunnel.judge(LATE, True, 1001.0).text and not tunnel.process


def test_tunnel_pauses_longer_after_each_failure_until_a_request_came_through(tunnel):
    for least, most in ((1, 2), (2, 4), (4, 8)):
        tunnel.fail("ended", 1000.0)
        assert least <= tunnel.start_at - 1000.0 <= most
    assert tunnel.tend(tunnel.start_at - 0.01) is None and tunnel.process is None
    assert tunnel.tend(tunnel.start_at) is None and tunnel.process.poll() is None
    assert tunnel.judge(b9.Outcome(OK), False, 1010.0).kind is OK
    tunnel.fail("ended", 1010.0)
    assert 1 <= tunnel.start_at - 1010.0 <= 2


def test_tunnel_that_is_not_let_in_is_given_up_after_its_deadline(tunnel):
    tunnel.start(1000.0)
    assert tunnel.tend(1000.0 + tunnel.deadline) is None
    outcome = tunnel.tend(1000.1 + tunnel.deadline)
    assert outcome.kind is TROUBLE and not tunnel.carries() and tunnel.process is None


def test_tunnel_keeps_what_ssh_said_within_reason_and_ends_it_with_its_children(tunnel, tmp_path):
    tunnel.start(1000.0)
    wait(lambda: tunnel.listen() or tunnel.said == "one\ntwo\n")
    child = psutil.Process(int((tmp_path / "child").read_text()))
    tunnel.stop()
    wait(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    tunnel.program = str(tmp_path / "talks")
    stub(tmp_path / "talks", "yes | head -c 60000; echo the end")
    tunnel.start(1000.0)
    wait(lambda: tunnel.listen() or tunnel.said.endswith("the end\n"))
    assert len(tunnel.said) <= 4000


@pytest.mark.parametrize("mode, good", [(0o700, True), (0o755, True), (0o775, False), (0o757, False)])
def test_tunnel_socket_is_put_where_nobody_else_may_write(tmp_path, mode, good):
    tmp_path.chmod(mode)
    assert b9.can_hold_socket(f"{tmp_path}/ssh") is good


@pytest.mark.parametrize("running", [False, True], ids=["alone", "beside-the-agent"])
@beside
def test_ssh_check_has_lines_for_it_and_leaves_no_ssh(box, gateway, ssh_host, running):
    reverse = ["--machine-id", ID, "--ssh-reverse", str(ssh_host.remote)]
    if running:
        ssh_host.ready(*reverse)
        wait(lambda: record_of(box)["ready_since"])
    before = ssh_host.clients()
    found = json.loads(ssh_host.run("--check", "--json", *reverse).stdout)["findings"]
    lines = [(each["result"], each["text"]) for each in found if each["check"] == "tunnel"]
    assert [result for result, _ in lines] == ["ok"] * 3, lines
    assert all(words in text for (_, text), words in zip(lines, ["ssh is /", "accepts the key", "it carries to"]))
    assert any(each["check"] == "gateway" and "answers in" in each["text"] for each in found)
    assert ssh_host.clients() == before


@pytest.mark.parametrize("name", ["key not let in", "gateway not permitted", "host key unknown"])
@beside
def test_ssh_check_finds(box, gateway, ssh_host, name):
    make, _, words, remedy = SSH_TROUBLE[name]
    make(ssh_host)
    done = ssh_host.run("--check", "--json")
    found = {each["check"]: (each["result"], each["text"]) for each in json.loads(done.stdout)["findings"]}
    assert found["tunnel"][0] == "fail" and words in found["tunnel"][1] and remedy in found["tunnel"][1]
    assert found["token"] == ("fail", "not checked: mend the tunnel above first") and done.returncode == 1
    assert ssh_host.clients() == [] and not (box.folder / "state").exists()


@beside
def test_ssh_status_shows_whether_it_is_up_and_how_often_it_was_replaced(box, gateway, ssh_host):
    process = ssh_host.ready()

    def told(words):
        def look():
            return words in box.run("--status").stdout
        wait(look, lambda: box.run("--status").stdout + process.log())

    told(f", replaced 0 times, ssh to {ssh_host.user}@127.0.0.1:{ssh_host.port}")
    told("tunnel     is up for")
    ssh_host.stop()
    told("tunnel     is down, replaced ")
    ssh_host.listen()
    told("tunnel     is up for")
    assert record_of(box)["tunnel_replaced"] > 0


@beside
def test_ssh_dry_run_shows_what_would_be_started_and_starts_nothing(box, gateway, ssh_host):
    done = ssh_host.run("--dry-run", "--machine-id", ID, "--ssh-option", "AddressFamily=inet")
    line = next(line for line in done.stdout.splitlines() if line.startswith("starts: "))
    assert line.startswith(f"starts: ssh -N -T -L {box.folder}/state/{ID}.ssh:localhost:{gateway.port} -o BatchMode")
    assert line.endswith(f"-o AddressFamily=inet -l {ssh_host.user} -p {ssh_host.port} -- 127.0.0.1")
    assert f"gateway_port: {gateway.port}  (--ssh-gateway)" in done.stdout and done.returncode == 0
    assert "Accepted" not in ssh_host.log() and not (box.folder / "state").exists()


@pytest.mark.slow
@beside
def test_ssh_options_rule_over_the_configuration_of_the_user(box, gateway, ssh_host):
    config = config_of(*ssh_host.options())
    words = ["ssh", "-F", str(ssh_host.folder / "ssh.conf"), "-G", *b9.ssh_arguments(config, "/run/x")]
    found = subprocess.check_output(words, text=True).lower().splitlines()
    assert {"batchmode yes", "exitonforwardfailure yes", "serveraliveinterval 15", "serveralivecountmax 3",
            "controlmaster false", "forwardagent no", "forwardx11 no", "sessiontype none", "connecttimeout 10",
            "requesttty false", "streamlocalbindmask 0177", "streamlocalbindunlink yes",
            "loglevel info"} <= set(found)
    assert not any(str(ssh_host.folder / "master").lower() in line for line in found)


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["HOST"], ["HOST", "echo let in"], ["-tt", "HOST"], ["-s", "HOST", "sftp"], ["-W", "localhost:6443", "HOST"],
    ["-W", "127.0.0.1:GATEWAY", "HOST"], ["-N", "-R", "OTHER:localhost:6443", "HOST"],
    ["-N", "-R", "FOLDER/socket:localhost:6443", "HOST"]],
    ids=["shell", "command", "terminal", "sftp", "port", "name", "listen", "listen-on-a-socket"])
@beside
def test_ssh_key_with_the_line_of_readme_opens_nothing_else(box, gateway, ssh_host, words):
    names = {"GATEWAY": gateway.port, "OTHER": ssh_host.other, "FOLDER": ssh_host.folder, "HOST": "127.0.0.1"}
    words = [re.sub("|".join(names), lambda found: str(names[found[0]]), word) for word in words]
    hello = "\0\0\0\5\1\0\0\0\3" if "sftp" in words else "echo let in\n"
    done = subprocess.run([ssh_host.folder / "bin/ssh", "-o", "BatchMode=yes", "-o", "ControlPath=none", "-o",
                           "ExitOnForwardFailure=yes", "-p", str(ssh_host.port), *words], input=hello, text=True,
                          capture_output=True, timeout=50)
    assert done.returncode != 0 and done.stdout == "" and "Accepted publickey" in ssh_host.log()
    assert gateway.connections == 0


# The pieces of the printed script, run as this user
INSTALLED = """set -eu
step() { printf '%s\\n' "$1"; }
fail() { printf '%s\\n' "$1" >&2; exit 1; }
state=$1 user=$(id -un)
"""


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [True, False], ids=["both-ports", "one-port"])
@beside
def test_ssh_install_makes_a_key_and_prints_the_line_that_lets_it_in(box, gateway, ssh_host, reverse):
    stub(ssh_host.folder / "bin/ssh-keygen", f'case $1 in -F) set -- "$@" -f {ssh_host.known};; esac\n'
         f'exec {shutil.which("ssh-keygen")} "$@"')
    stub(ssh_host.folder / "bin/runuser", 'shift 3; exec "$@"')
    more = ["--ssh-reverse", str(ssh_host.remote)] if reverse else []
    script = ssh_host.run("--print-install", *more).stdout
    pieces = re.search(r"\nssh=\$state.*?\n\nstep 'unpacking", script, re.S)[0], re.search(
        r'\nif \[ -n "\$new_key" \].*?\nfi\n', script, re.S)[0]
    (box.folder / "piece.sh").write_text(INSTALLED + pieces[0].rpartition("step")[0] + pieces[1] + "echo waits\n")
    install = ["sh", str(box.folder / "piece.sh"), str(box.folder / "var")]
    done = subprocess.run(install, capture_output=True, text=True, env=os.environ | ssh_host.environ, timeout=50)
    folder, line = box.folder / "var/.ssh", done.stdout.splitlines()[-1]
    assert done.returncode == 3 and "waits" not in done.stdout, done
    assert (mode_of(folder), mode_of(folder / "id_ed25519"), mode_of(folder / "known_hosts")) == (0o700, 0o600, 0o600)
    assert line.endswith((folder / "id_ed25519.pub").read_text().strip())
    assert (f'permitlisten="{ssh_host.remote}"' in line) == reverse
    assert line.startswith(f'restrict,port-forwarding,permitopen="localhost:{gateway.port}",permitlisten="')
    ssh_host.keys.write_text(line)
    ssh_host.change(ssh_host.folder / "ssh.conf", f"{ssh_host.folder}/id", str(folder / "id_ed25519"))
    ssh_host.change(ssh_host.folder / "ssh.conf", str(ssh_host.known), str(folder / "known_hosts"))
    ssh_host.ready(*more)
    again = subprocess.run(install, capture_output=True, text=True, env=os.environ | ssh_host.environ, timeout=50)
    assert again.returncode == 0 and again.stdout.endswith("waits\n"), "a key that was there is kept"
    assert (folder / "known_hosts").read_text() == ssh_host.known.read_text()
    done = ssh_host.run("--once", "--ssh-reverse", str(ssh_host.other), BETA9_STATE_DIR=str(box.folder / "second"))
    assert done.returncode == 69 and "remote port forwarding failed" in done.stderr


@pytest.mark.slow
@beside
def test_ssh_install_without_a_known_host_key_stops_and_says_how_to_compare(box, gateway, ssh_host):
    stub(ssh_host.folder / "bin/ssh-keygen", "exit 1")
    stub(ssh_host.folder / "bin/runuser", 'shift 3; exec "$@"')
    done = ssh_host.run("--print-install")
    assert "is not in known_hosts here" in done.stderr
    piece = re.search(r"\nssh=\$state.*? \|\| fail '[^\n]*\n", done.stdout, re.S)[0]
    (box.folder / "piece.sh").write_text(INSTALLED + piece + "echo goes on\n")
    done = subprocess.run(["sh", str(box.folder / "piece.sh"), str(box.folder)], capture_output=True, text=True,
                          env=os.environ | ssh_host.environ, timeout=50)
    assert done.returncode == 1 and done.stdout == "" and list((box.folder / ".ssh").iterdir()) == []
    assert "ssh-keygen -lf" in done.stderr and f"ssh-keyscan -p {ssh_host.port} 127.0.0.1" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tail", [[], ["--fetch-from", "https://x/y"]], ids=["carried", "fetched"])
@beside
def test_ssh_install_script_is_small_enough_and_has_no_key_of_the_printing_machine(box, gateway, ssh_host, tail):
    done = ssh_host.run("--print-install", "--ssh-identity", f"{ssh_host.folder}/id", "--ssh-option",
                        "AddressFamily=inet", "--ssh-option", "Ciphers=aes128-ctr", *tail)
    assert len(done.stdout.encode()) < (16384 if tail else 82_000) and str(ssh_host.folder) not in done.stdout
    assert 'ssh.options: ["AddressFamily=inet", "Ciphers=aes128-ctr"]' in done.stdout
    assert "each machine gets a key of its own" in done.stderr
    assert subprocess.run(["sh", "-n"], input=done.stdout, text=True).returncode == 0
    plain = box.run("--print-install", *tail).stdout
    assert "ssh-keygen" not in plain.replace("ssh-keygen -lf", "") and "new_key" not in plain


def test_start_child_gives_it_no_terminal_and_no_token(monkeypatch):
    monkeypatch.setenv("BETA9_ODD", "x")
    child = b9.start_child(["sh", "-c", "cat; echo said $SHELL; echo wrong >&2"])
    assert child.communicate(timeout=30)[0] == b"said /bin/sh\nwrong\n"


def test_layout_children_are_started_by_one_function():
    names = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Attribute)
             and node.attr in ("Popen", "run", "check_output", "system", "fork", "posix_spawn")
             and isinstance(node.value, ast.Name) and node.value.id in ("subprocess", "os")]
    assert len(names) == 1 and rooms()[9][0] < names[0] < rooms()[9][1]


# ---- 10 Loop
def bearer(link):
    return link.headers["Authorization"].removeprefix("Bearer ")


@beside
def test_token_file_rotated_is_followed_without_a_restart(box, gateway):
    path, k3s = box.folder / "token", box.folder / "k3s"
    path.write_text(TOKEN + "\n")
    k3s.write_text(K3S + "\n")
    process = box.ready(gateway, "--token-file", str(path), "--k3s-token-file", str(k3s), BETA9_TOKEN="")
    assert bearer(gateway.seen[0]) == TOKEN and gateway.seen[0].json["token"] == K3S
    path.write_text(SECRET + "\n")
    k3s.write_text("another-" + K3S)
    gateway.contract.token = SECRET
    gateway.forget()
    gateway.ready_again()
    assert bearer(gateway.seen[-1]) == SECRET
    assert gateway.calls(REGISTER)[-1].json["token"] == "another-" + K3S
    assert process.poll() is None and leaks(process.log(), TOKEN, SECRET, K3S, "another-" + K3S) == []


@beside
def test_token_file_of_k3s_rotated_registers_again_at_once(box, gateway):
    path, k3s = box.folder / "token", box.folder / "k3s"
    path.write_text(TOKEN)
    k3s.write_text(K3S)
    box.ready(gateway, "--token-file", str(path), "--k3s-token-file", str(k3s), BETA9_TOKEN="")
    path.write_text(TOKEN + "\n")
    gateway.ready_again()
    gateway.ready_again()
    assert len(gateway.calls(REGISTER)) == 1, "another file with the same token is no news"
    k3s.write_text("another-" + K3S + "\n")
    wait(lambda: len(gateway.calls(REGISTER)) == 2)
    gateway.ready_again()
    gateway.ready_again()
    assert [link.json["token"] for link in gateway.calls(REGISTER)] == [K3S, "another-" + K3S]


@pytest.mark.parametrize("content", [None, b"", b"two words", b"\xff\0", b"x" * 70000, ...],
                         ids=["removed", "empty", "two-words", "binary", "large", "fifo"])
@beside
def test_token_file_spoilt_later_the_last_token_serves_with_few_warnings(box, gateway, content):
    path = box.folder / "token"
    path.write_text(TOKEN + "\n")
    process = box.ready(gateway, "--token-file", str(path), BETA9_TOKEN="")
    if content in (None, ...):
        path.unlink()
        content is None or os.mkfifo(path)
    else:
        path.write_bytes(content)
    for _ in range(6):
        gateway.ready_again()
    assert {bearer(link) for link in gateway.seen} == {TOKEN}
    warnings = [line for line in process.log().splitlines() if "the last good one" in line]
    assert 1 < len(warnings) < 6 and all(f"WARNING no token in {path}, " in line for line in warnings)
    path.unlink(True)
    path.write_text("new-" + TOKEN)
    gateway.contract.token = "new-" + TOKEN
    wait(lambda: bearer(gateway.seen[-1]) == "new-" + TOKEN, process.log)


@beside
def test_token_file_rotated_before_the_stop_is_that_of_the_last_act(box, gateway):
    path = box.folder / "token"
    path.write_text(TOKEN)
    process = box.ready(gateway, "--token-file", str(path), "--keepalive-interval", "60", BETA9_TOKEN="")
    time.sleep(1)       # it has looked at the file by now, and does so every 2 s
    path.write_text(SECRET)
    gateway.contract.token = SECRET
    assert stopped(process) == 0 and [bearer(link) for link in gateway.calls(REGISTER)] == [TOKEN, SECRET]


@pytest.mark.parametrize("mode, warned", [(0o600, False), (0o400, False), (0o640, False), (0o660, True), (0o604, True)])
@pytest.mark.parametrize("flag", ["--token-file", "--k3s-token-file"])
@beside
def test_token_file_that_others_can_read_is_warned_of_with_its_chmod(box, flag, mode, warned):
    path = box.folder / "token-file"
    path.write_text(K3S)
    path.chmod(mode)
    variables = {"BETA9_TOKEN": ""} if flag == "--token-file" else {}
    done = box.run("--dev", "--once", flag, str(path), **variables)
    assert done.returncode == 0 and (f"`chmod g-w,o= {path}`" in done.stderr) is warned, done.stderr


@pytest.mark.parametrize("flag", ["--token", "--k3s-token"])
@beside
def test_token_on_the_command_line_is_warned_of_once(box, flag):
    done = box.run("--dev", "--once", flag, SECRET)
    assert done.stderr.count(f"{flag} shows in `ps`: use {flag}-file") == 1 and done.stderr.count("`ps`") == 1
    assert SECRET not in done.stderr
    variable = "BETA9_" + flag.strip("-").upper().replace("-", "_")
    assert "`ps`" not in box.run("--dev", "--once", **{variable: SECRET}).stderr


class Systemd:
    """A notify socket, and all that it heard."""

    def __init__(self, path):
        self.sock, self.heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), []
        self.sock.bind(path.replace("@", "\0", 1))

    def listen(self):
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard.append(self.sock.recv(9999).decode())
        return self.heard

    def close(self):
        self.sock.close()

    def status(self):
        return [said.removeprefix("STATUS=") for said in self.listen() if said.startswith("STATUS=")]


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
@beside
def test_notify_tells_ready_status_watchdog_and_stopping(box, gateway, abstract):
    name = f"@beta9-agent-{os.getpid()}" if abstract else str(box.folder / "notify")
    with contextlib.closing(Systemd(name)) as systemd:
        gateway.always = says(503)
        process = box.start(gateway, NOTIFY_SOCKET=name)
        wait(lambda: " failed: " in "".join(systemd.status()[-1:]), process.log)
        assert systemd.heard[0] == "WATCHDOG=1", "armed before anything can hang"
        before = systemd.heard.count("WATCHDOG=1")
        wait(lambda: systemd.listen().count("WATCHDOG=1") > before, process.log)  # waiting is no hang
        assert "READY=1" not in systemd.heard
        gateway.always = None
        wait(lambda: "READY=1" in systemd.listen(), process.log)
        gateway.ready_again()
        assert stopped(process) == 0
        heard = systemd.listen()
        assert heard.count("READY=1") == heard.count("STOPPING=1") == 1
        assert heard.index("READY=1") < heard.index("STOPPING=1")
        assert {said.partition("=")[0] for said in heard} == {"READY", "STATUS", "WATCHDOG", "STOPPING"}
        assert systemd.status()[-2].startswith("ready after") and systemd.status()[-1] == "stopping"


@beside
def test_notify_words_of_the_gateway_stay_in_the_status_and_show_no_token(box, gateway):
    name = str(box.folder / "notify")
    gateway.always = says(500, {"message": f"no\nMAINPID=1\nSTOPPING=1\x1b[31m {TOKEN}"})
    with contextlib.closing(Systemd(name)) as systemd:
        process = box.start(gateway, "--debug", NOTIFY_SOCKET=name)
        wait(lambda: any("MAINPID" in said for said in systemd.status()), process.log)
        stopped(process, signal.SIGKILL)
        assert all(said.isprintable() for said in systemd.listen())
        assert leaks("".join(systemd.heard), TOKEN) == []


@beside
def test_notify_socket_that_nobody_reads_or_has_does_not_hold_the_agent(box, gateway):
    name = str(box.folder / "notify")
    with contextlib.closing(Systemd(name)):
        process = box.ready(gateway, "--debug", NOTIFY_SOCKET=name)
        waiting = int(pathlib.Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
        for _ in range(waiting // 4 + 5):  # a line and a sign of life each, and more: more than it holds
            gateway.ready_again()
    os.unlink(name)
    gateway.ready_again()
    assert stopped(process) == 0 and "Traceback" not in process.log()


def journal_of(log, right=True):
    """JOURNAL_STREAM as systemd sets it for this file as standard error, or for another one."""
    return f"{log.stat().st_dev}:{log.stat().st_ino + (not right)}"


@pytest.mark.parametrize("right", [True, False], ids=["journal", "a-file-of-a-service"])
@beside
def test_log_to_the_journal_has_its_priority_and_no_time(box, gateway, right):
    log = box.folder / "journal"
    log.touch()
    gateway.faults[REGISTER].extend([says(500), says(401, {"message": "Unauthorized"})])
    with open(log, "wb") as file:
        process = box.start(gateway, "--debug", stderr=file, JOURNAL_STREAM=journal_of(log, right))
    wait(lambda: "ready after" in log.read_text(), log.read_text)
    stopped(process)
    lines = [line for line in log.read_text().splitlines() if re.search("> POST| failed|ready after", line)]
    assert len(lines) > 4
    for line in lines:
        number, level = (("7", "DEBUG") if "> POST" in line else ("6", "INFO") if "ready after" in line else
                         ("4", "WARNING") if " 500 " in line else ("3", "ERROR"))
        assert re.match(f"<{number}>[a-z>]" if right else rf"\d{{4}}-.*,\d{{3}} {level} ", line), line


@beside
def test_life_registration_that_takes_longer_than_the_interval_is_ready(box, gateway):
    gateway.contract.registration_takes = 2.5
    process = box.ready(gateway, "--keepalive-interval", "0.1")
    assert process.log().count("failed") == 0 and len(gateway.calls(REGISTER)) == 1


@beside
def test_stop_last_registration_that_the_gateway_is_slow_to_answer_counts_all_the_same(box, gateway):
    process = box.ready(gateway, "--keepalive-interval", "60")
    gateway.contract.registration_takes = 2.5
    assert stopped(process) == 0
    wait(lambda: gateway.seen[-1].state == "registered")
    assert [link.call for link in gateway.seen] == [REGISTER, KEEPALIVE, REGISTER]


@pytest.mark.parametrize("size, ready", [(3_900_000, True), (4_300_000, False)], ids=["3.9-MB", "4.3-MB"])
@beside
def test_life_configuration_of_the_gateway_may_be_4_mebibytes(box, gateway, size, ready):
    gateway.contract.config = configuration("external", others=size // 1090)
    process = box.start(gateway)
    if ready:
        return wait(gateway.ready, process.log)
    wait(lambda: "the answer is larger than 4096 KiB" in process.log(), process.log)
    gateway.contract.config = configuration("external")
    wait(gateway.ready, process.log)


def memory_of(process):
    """Resident, MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", status_of(process))[1]) / 1024


@beside
def test_life_memory_is_back_after_large_configurations(box, gateway):
    process = box.ready(gateway)
    gateway.ready_again()
    before = memory_of(process)
    gateway.contract.config = configuration("external", others=3000)
    for _ in range(4):
        gateway.forget()
        after = len(gateway.seen)
        wait(lambda: gateway.ready(after), process.log)
    gateway.ready_again()
    print(f"\nMiB before and after four configurations of 3 MB: {before:.1f} {memory_of(process):.1f}")
    assert memory_of(process) < before + 8


@pytest.mark.parametrize("config, words", [
    (None, "set tailscale.directRedisHost"), (configuration("external", "local"), "of mode local"),
    (configuration("external", provider="ec2"), "give --provider-name ec2")], ids=["null", "local", "provider"])
@beside
def test_life_ready_without_work_to_come_says_why_once(box, gateway, config, words):
    gateway.contract.config = config
    process = box.ready(gateway)
    gateway.forget()
    wait(lambda: len(gateway.calls(REGISTER)) == 2)
    gateway.ready_again()
    said = [line for line in process.log().splitlines() if "no work will come: " in line]
    assert len(said) == 1 and words in said[0] and " WARNING " in said[0] and CONFIG_SECRET not in process.log()


@beside
def test_life_each_new_registration_says_its_cause(box, gateway):
    k3s = box.folder / "k3s"
    k3s.write_text(K3S)
    process = box.ready(gateway, "--k3s-token-file", str(k3s))
    for cause, happens in (
            ("the gateway did not know this machine any more (500 Failed to update", gateway.forget),
            ("the k3s token has changed", lambda: k3s.write_text("another-" + K3S))):
        happens()
        wait(lambda: f" INFO registered again: {cause}" in process.log(), process.log)
    assert " INFO registered\n" in process.log() and process.log().count(" registered") == 3


def test_registration_after_the_ttl_says_its_cause(gateway, stop, log_lines):
    agent = agent_of(gateway.port)
    for _ in range(2):
        agent.attempt(stop)
    agent.lease = agent.lease._replace(confirmed_at=b9.read_clock() - 301)
    agent.attempt(stop)
    assert log_lines[-1] == "registered again: no keepalive was confirmed for its TTL of 300 s"
    agent.client.http.close()


def test_register_again_is_at_once_and_while_the_gateway_is_away_with_the_next_attempt(gateway):
    agent = agent_of(gateway.port)
    for failing_since, at_once in ((None, True), (agent.started_at, False)):
        lease = agent.lease = b9.Lease(agent.started_at + 3600, registered=True, failing_since=failing_since)
        agent.register_again("the k3s token has changed")
        assert not agent.lease.registered and agent.cause == "the k3s token has changed"
        assert (agent.lease.due <= b9.read_clock()) is at_once and (agent.lease.due == lease.due) is not at_once


def test_offer_that_changes_is_registered_again_where_the_machine_is_known_and_its_reason_told_once(gateway, log_lines):
    agent = agent_of(gateway.port, "--k3s-token", K3S)
    lease, before = agent.lease, agent.plan.offer
    agent.k3s = b9.K3sState(b9.K3sView())
    agent.plan_again(None)
    assert agent.plan.offer != before and (agent.lease, agent.cause) == (lease, ""), "the first one is still to come"
    agent.lease = lease._replace(registered=True)
    agent.k3s = b9.K3sState(b9.K3sView("k3s is down: start it"))
    for _ in range(3):
        agent.plan_again(None)
    assert not agent.lease.registered and agent.cause.startswith("the offer was ")
    assert agent.cause.endswith(b9.format_offer(before)) and log_lines.count("k3s is down: start it") == 1


def test_promise_is_kept_of_an_offer_with_cpu_alone(gateway, tmp_path):
    agent = agent_of(gateway.port)
    agent.state = b9.State(ID, str(tmp_path / ID))
    for cpu, promised in ((0, 0), (8000, 3), (0, 3)):
        agent.plan = agent.plan._replace(offer=b9.Offer(cpu, 1024, 3 if cpu else 2))
        agent.prepare_registration()
        assert b9.read_promise(agent.state) == promised


def test_trouble_counts_those_of_the_present_outage():
    trouble = b9.Trouble()
    for now in (0, 10, 20):
        trouble.failed(now)
    assert trouble.count == 3 and trouble.recovered()
    trouble.failed(100)
    assert trouble.count == 1


def test_registrations_of_a_gateway_that_always_forgets_write_few_lines(gateway, log_lines):
    agent = agent_of(gateway.port)
    agent.ready, now = True, agent.started_at
    for _ in range(1440):
        now += 60
        agent.cause = "the gateway did not know this machine any more"
        agent.report_failure(KEEPALIVE, b9.Outcome(FORGOTTEN), now)
        agent.report_success(REGISTER, b9.Outcome(OK), agent.lease, now)
        agent.report_success(KEEPALIVE, b9.Outcome(OK), agent.lease, now)
    print(f"\nlines in 24 h of a gateway that always forgets: {len(log_lines)}")
    assert 30 < len([line for line in log_lines if "registered again" in line]) and len(log_lines) < 200


FAULTS = {
    "closed-before-headers": breaks(b""),
    "closed-in-headers": breaks(HEAD[:30]),
    "closed-after-headers": breaks(HEAD + b"Content-Length: 15\r\n\r\n"),
    "reset-before-headers": breaks(b"", True),
    "reset-in-headers": breaks(HEAD[:30], True),
    "reset-after-headers": breaks(HEAD + b"Content-Length: 15\r\n\r\n", True),
    "truncated-body": breaks(HEAD + b'Content-Length: 150\r\n\r\n{"status": "ok"}'),
    "endless-body": drips(HEAD + b"\r\n{", b"x" * 65536, 0),
    "endless-chunks": drips(HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
                            b"10000\r\n" + b"x" * 65536 + b"\r\n", 0),
    "bad-chunks": breaks(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
    "no-http": breaks(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
    "bad-content-length": breaks(HEAD + b"Content-Length: -5\r\n\r\n{}"),
    "endless-headers": drips(HEAD, b"X-More: " + b"x" * 60000 + b"\r\n", 0),
    "100-continue-then-close": breaks(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "gzip-bomb": says(200, gzip.compress(bytes(50 << 20)), "Content-Encoding: gzip"),
    "gzip-small": says(200, gzip.compress(b'{"status": "ok"}' + bytes(5000)), "Content-Encoding: gzip"),
    "deflate-broken": says(200, b"\xff\xfe", "Content-Encoding: deflate"),
    "200-html": says(200, PAGE, "Content-Type: text/html"),
    "200-empty": says(200),
    "200-list": says(200, []),
    "200-null": says(200, b"null"),
    "200-text": says(200, b'"ok"'),
    "200-number": says(200, b"1" * 5000),
    "200-binary": says(200, bytes(range(256))),
    "200-deep": says(200, b"[" * 60000),
    "200-big": says(200, b'{"a": "' + b"x" * (5 << 20) + b'"}'),
    "200-other-machine": says(200, {"status": "ok", "machine_state": {"machine_id": "ffffffff"}}),
    "200-odd-state": says(200, {"status": ["ok"], "machine_state": 5, "config": []}),
    "200-error-code": says(200, {"error_code": "internal", "message": 5, "suggestion": None}),
    "204": says(204),
    "301-elsewhere": says(301, b"", "Location: http://127.0.0.1:9/api/v1/machine/keepalive"),
    "302-big": says(302, b"x" * (5 << 20), "Location: /login"),
    "302-bad-location": says(302, b"", "Location: http://[::1"),
    "308-no-location": says(308),
    "400": says(400, {"message": "Invalid payload"}),
    "400-required": says(400, {"message": "machine_id and pool_name are required"}),
    "401": says(401, {"message": "Unauthorized"}),
    "403": says(403, {"message": "Invalid token"}),
    "404": says(404, {"message": "Not Found"}),
    "429": says(429, {"message": "slow down"}),
    "429-retry-after": says(429, b"", "Retry-After: 1"),
    "429-retry-after-absurd": says(429, b"", "Retry-After: -1e99"),
    "429-retry-after-odd": says(429, b"", "Retry-After: Wed, 99 Foo 2026", "Date: x"),
    "429-retry-after-date": says(429, b"", "Retry-After: Wed, 21 Oct 2026 07:28:01 GMT",
                                 "Date: Wed, 21 Oct 2026 07:28:00 GMT"),
    **{f"500-{text.lower().replace(' ', '-')[:30]}": says(500, {"message": text}) for text in (
        "Invalid pool name", "Invalid machine cpu value", "Invalid machine memory value", "Invalid gpu count",
        "Failed to register machine", "Unable to create remote config", "Internal Server Error",
        "Failed to update keepalive: failed to set machine state x",
        f"Failed to update keepalive: {NOT_FOUND}")},
    **{f"structured-{code}": says(status, {"error_code": code, "message": "m", "suggestion": "s"})
       for code, status in (("machine_not_found", 404), ("machine_expired", 410), ("invalid_token", 401),
                            ("invalid_pool", 400), ("internal", 500))},
    "502-html": says(502, PAGE, "Content-Type: text/html"),
    "503-retry-after": says(503, PAGE, "Retry-After: 1"),
    "504-html": says(504, PAGE, "Content-Type: text/html"),
    "answer-lost": lost,
    "answer-1-s-late": late(1),
}
HANGING = {
    "silent": silent,
    "dripping-body": drips(HEAD + b'Content-Length: 5000\r\n\r\n{"', b"x"),
    "dripping-headers": drips(HEAD, b"X-More: x\r\n"),
    "dripping-header": drips(HEAD + b"X: ", b"x"),
    "dripping-redirect": drips(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 5000\r\n\r\n", b"x"),
    "answer-8-s-late": late(8),
}


def overcome(spare, fault):
    """The fault on a keepalive, then on a registration: ready again after each. The pauses after it."""
    gateway, process = spare.get()
    try:
        wait(gateway.ready, process.log)
        pauses = []
        for call in (b9.KEEPALIVE, b9.REGISTER):
            start = len(gateway.seen)
            gateway.faults[call].append(fault)
            if call == b9.REGISTER:
                gateway.forget()
            wait(lambda: not gateway.faults[call] or process.poll() is not None, process.log)
            gateway.ready_again()
            assert process.poll() is None, process.log()
            seen = gateway.seen[start:]
            pauses.append(max(two.time - one.time for one, two in zip(seen, seen[1:]) if one.faulty))
        return pauses
    finally:
        gateway.faults.clear()
        spare.put((gateway, process))


@pytest.fixture(scope="module")
def overcoming(folders, request):
    """The selected faults, in turn among a few agents with a TTL of 3 s."""
    names, faults, spare = selected(request, "overcoming"), HANGING | FAULTS, queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        for gateway in [stack.enter_context(contextlib.closing(Gateway(ttl=3))) for _ in names[:6]]:
            spare.put((gateway, folders().start(gateway)))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(6))
        yield {name: pool.submit(overcome, spare, faults[name]) for name in faults if name in names}


@pytest.mark.parametrize("name", FAULTS)
def test_life_fault_ready_again_the_same_process(overcoming, name):
    assert overcoming[name].result()


@pytest.mark.parametrize("name", HANGING)
def test_life_hanging_answer_cut_at_the_deadline(overcoming, name):
    assert overcoming[name].result()  # none of these answers ever ends: a next request shows that it was cut


@beside
def test_life_gateway_restarts_and_remembers_ready_again_without_registering(box, gateway):
    process = box.ready(gateway)
    wait(lambda: "ready after" in process.log(), process.log)
    gateway.stop()
    time.sleep(0.5)
    after = len(gateway.seen)
    gateway.start()
    gateway.ready_again()
    assert {link.call for link in gateway.seen[after:]} == {b9.KEEPALIVE}
    wait(lambda: "ready again" in process.log(), process.log)
    assert process.poll() is None and "refused" in process.log()


@beside
def test_life_gateway_restarts_and_forgets_registered_and_ready_again(box, gateway):
    process = box.ready(gateway)
    gateway.stop()
    gateway.forget()
    after = len(gateway.seen)
    gateway.start()
    gateway.ready_again()
    assert [link.call for link in gateway.seen[after:]][:3] == [b9.KEEPALIVE, b9.REGISTER, b9.KEEPALIVE]
    assert process.poll() is None


@beside
def test_life_gateway_forgets_each_time_one_registration_in_an_interval(box, gateway):
    def forgetful(link):
        link.sock.sendall(link.answer())
        if link.call == b9.KEEPALIVE:
            gateway.forget()
        return True
    gateway.always = forgetful
    process = box.start(gateway, "--keepalive-interval", "0.3")
    wait(lambda: len(gateway.calls(b9.REGISTER)) > 6, process.log)
    times = [link.time for link in gateway.calls(b9.REGISTER)][1:]
    assert min(two - one for one, two in zip(times, times[1:])) > 0.2
    gateway.always = None
    gateway.ready_again()
    assert process.poll() is None


@beside
def test_life_outage_longer_than_the_ttl_registers_without_asking(box):
    with contextlib.closing(Gateway(ttl=1)) as gateway:
        process = box.ready(gateway)
        gateway.stop()
        time.sleep(1.5)
        after = len(gateway.seen)
        gateway.start()
        gateway.ready_again()
        assert [link.call for link in gateway.seen[after:]][:2] == [b9.REGISTER, b9.KEEPALIVE]
        assert process.poll() is None


@beside
def test_life_half_of_all_answers_lost_stays_ready(box):
    with contextlib.closing(Gateway(ttl=3)) as gateway:
        process, draw = box.ready(gateway), random.Random(1).random
        gateway.always = lambda link: lost(link) if draw() < 0.5 else late(0)(link)
        gone = len(gateway.seen)
        wait(lambda: len(gateway.seen) > gone + 20)
        gateway.always = None
        gateway.ready_again()
        assert len(gateway.calls(b9.REGISTER)) == 1  # it never was forgotten
        assert process.poll() is None and process.log().count(" failed") < 20


@beside
def test_life_stopped_for_longer_than_the_ttl_sends_what_is_overdue_once(box):
    with contextlib.closing(Gateway(ttl=1)) as gateway:
        process = box.ready(gateway)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        after = len(gateway.seen)
        process.send_signal(signal.SIGCONT)
        gateway.ready_again()
        time.sleep(0.5)
        calls = [link.call for link in gateway.seen[after:]]
        assert b9.REGISTER in calls[:2] and calls.count(b9.REGISTER) == 1 and len(calls) < 15
        assert process.poll() is None


@beside
def test_life_short_ttl_keeps_a_third_of_it(box):
    with contextlib.closing(Gateway(ttl=1)) as gateway:
        process = box.ready(gateway, "--keepalive-interval", "60")
        wait(lambda: len(gateway.calls(b9.KEEPALIVE)) > 4)
        assert len(gateway.calls(b9.REGISTER)) == 1 and "forgets a machine after 1 s" in process.log()


@beside
def test_life_one_connection_and_the_contract_headers(box, gateway):
    gateway.always = lambda link: (link.sock.sendall(link.answer().replace(
        b"\r\n", b"\r\nSet-Cookie: id=%d\r\n" % len(gateway.seen), 1)), True)[1]
    box.ready(gateway, "--k3s-token", K3S, "--offer-always", "--hostname", "box.example", "--max-cpu", "0.5",
              "--max-memory", "1Gi")
    wait(lambda: len(gateway.seen) > 9)
    assert gateway.connections == 1 == len({link.connection for link in gateway.seen})
    for link in gateway.seen:
        assert link.headers["Authorization"] == f"Bearer {TOKEN}"
        assert link.headers["Content-Type"] == "application/json"
        assert not link.headers["Cookie"] and "gzip" not in link.headers.get("Accept-Encoding", "")
    said = gateway.seen[0].json
    assert [link.call for link in gateway.seen[:2]] == [b9.REGISTER, b9.KEEPALIVE]
    assert said["token"] == K3S and said["hostname"] == "box.example" and said["private_ip"][:4] != "127."
    assert (said["cpu"], said["memory"]) == ("500m", "1024Mi") and {*map(type, said.values())} == {str}
    kept = gateway.seen[-1].json
    assert kept["machine_id"] == said["machine_id"] and kept["metrics"]["total_memory_available"] > 1024
    assert len(gateway.seen[-1].body) < 450


@beside
def test_life_gateway_on_ipv6_ready(box):
    with contextlib.closing(Gateway(host="::1")) as gateway:
        process = box.ready(gateway)
        assert stopped(process) == 0 and gateway.seen[0].headers["Host"] == f"[::1]:{gateway.port}"


# Python starts with this beside it: names are looked up in a file, without any name server
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
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found]
socket.getaddrinfo = look_up
"""


class NameServer:
    """What names are told in processes of this environment: addresses, after so many seconds."""

    def __init__(self, folder):
        (folder / "names").mkdir()
        (folder / "names/sitecustomize.py").write_text(NAME_SERVER)
        self.file = folder / "names/names"
        self.environ = {"PYTHONPATH": str(folder / "names"), "NAMES": str(self.file)}
        self.tell()

    def tell(self, seconds=0, **names):
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({name: (addresses, seconds) for name, addresses in names.items()}))
        new.replace(self.file)


@beside
def test_life_gateway_that_moves_to_a_public_address_is_waited_for(box, gateway, names):
    names.tell(gw=["127.0.0.1"])
    process = box.ready(gateway, "--gateway-host", "gw", "--startup-timeout", "0", **names.environ)
    wait(lambda: "ready after" in process.log(), process.log)
    names.tell(gw=["203.0.113.7"])
    gateway.drop()
    wait(lambda: "gw leads to 203.0.113.7, which is a public address" in process.log(), process.log)
    assert "--allow-cleartext" in process.log() and "giving up" not in process.log()
    names.tell(gw=["127.0.0.1"])
    gateway.ready_again()
    assert process.poll() is None and stopped(process) == 0


@beside
def test_start_name_that_leads_to_a_public_address_at_first_is_waited_for(box, gateway, names):
    names.tell(gw=["203.0.113.7"])
    process = box.start(gateway, "--gateway-host", "gw", **names.environ)
    wait(lambda: "failed 2 times" in process.log(), process.log)
    names.tell(gw=["127.0.0.1"])
    wait(gateway.ready, process.log)
    assert process.poll() is None


@beside
def test_start_name_that_leads_to_a_public_address_ends_with_69(box, gateway, names):
    names.tell(gw=["203.0.113.7"])
    process = box.start(gateway, "--gateway-host", "gw", "--startup-timeout", "1", **names.environ)
    assert process.wait(30) == 69 and "giving up" in process.log() and "--tls" in process.log()
    assert gateway.connections == 0


@beside
def test_life_name_server_slower_than_the_deadline_is_named_and_its_late_answer_used(box, gateway, names):
    names.tell(gw=["127.0.0.1"])
    process = box.ready(gateway, "--gateway-host", "gw", **names.environ)
    names.tell(2.5, gw=["127.0.0.1"])  # a keepalive has 2 s
    gateway.drop()
    wait(lambda: "name server slow" in process.log(), process.log)
    gateway.ready_again()
    assert process.poll() is None


@pytest.mark.parametrize("options, lease, wake", [
    ([], {"due": 1060}, 1060), ([], {"due": 1060, "denied_since": 990}, 1050),
    (["--startup-timeout", "20"], {"due": 1060}, 1020), (["--startup-timeout", "90"], {"due": 1060}, 1060)],
    ids=["due", "patience-over", "timeout", "long-timeout"])
def test_next_wake_is_where_patience_ends_until_the_first_ready(gateway, options, lease, wake):
    agent = agent_of(gateway.port, *options)
    agent.started_at, agent.lease = 1000, b9.Lease(**lease)
    assert agent.next_wake() == wake
    agent.ready = True
    assert agent.next_wake() == 1060


@beside
def test_stop_while_sleeping_registers_once_more(box, gateway):
    process = box.ready(gateway, "--keepalive-interval", "60")
    time.sleep(0.3)
    assert stopped(process) == 0
    assert [link.state for link in gateway.seen] == ["registered", "ready", "registered"]
    assert gateway.connections == 1 and "stopping" in process.log()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@beside
def test_stop_by_another_signal_the_same(box, gateway, number):
    process = box.ready(gateway, "--keepalive-interval", "60")
    assert stopped(process, number) == 0 and "Traceback" not in process.log()


@pytest.mark.parametrize("before", [
    ["env", "--block-signal=ALRM,TERM,INT,HUP"], ["env", "--ignore-signal=ALRM"]], ids=["blocked", "ignored"])
@beside
def test_signals_that_the_parent_blocked_or_alarm_ignored_work_all_the_same(box, gateway, before):
    if subprocess.run([*before, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this env knows no signals")
    process = box.ready(gateway, before=before)
    gateway.faults[KEEPALIVE].append(silent)
    wait(lambda: not gateway.faults[KEEPALIVE])
    gateway.ready_again()
    assert "no complete answer in time" in process.log() and stopped(process) == 0


@beside
def test_interrupt_that_the_parent_ignored_stays_ignored(box, gateway):
    """As for `nohup agent & tail -f log` in a script, and Ctrl-C."""
    process = box.ready(gateway, before=[*SHELL, 'trap "" INT; exec "$@"', "sh"])
    process.send_signal(signal.SIGINT)
    for _ in range(3):
        gateway.ready_again()
    assert process.poll() is None and stopped(process) == 0


@beside
def test_wait_wakes_up_rarely(box, gateway):
    """The switches of an idle agent: it slept 4 times a second once."""
    process = box.ready(gateway, "--keepalive-interval", "240")
    wait(lambda: "ready after" in process.log())

    def switches():
        return int(re.search(r"\nvoluntary_ctxt_switches:\s*(\d+)", status_of(process))[1])

    before = switches()
    time.sleep(3)
    assert 0 < switches() - before < 10


@beside
def test_hangup_under_nohup_ignored(box, gateway):
    process = box.ready(gateway, before=["nohup"])
    process.send_signal(signal.SIGHUP)
    for _ in range(3):
        gateway.ready_again()
    assert process.poll() is None and stopped(process) == 0


@pytest.mark.parametrize("calls", [[b9.REGISTER], [b9.REGISTER, b9.KEEPALIVE]],
                         ids=["registering", "keeping"])
@beside
def test_stop_while_a_request_hangs_cuts_it(box, gateway, calls):
    gateway.faults[calls[-1]].append(silent)
    process = box.start(gateway, "--keepalive-interval", "60")
    wait(lambda: len(gateway.seen) == len(calls), process.log)
    start = time.monotonic()
    assert stopped(process) == 0 and time.monotonic() - start < 7  # it would hang for 10 s
    assert [link.call for link in gateway.seen] == calls  # it never was ready


@beside
def test_stop_while_a_request_hangs_is_no_failure_of_it(box, gateway):
    gateway.always = silent
    process = box.start(gateway, "--once")
    wait(lambda: gateway.seen, process.log)
    assert stopped(process) == 0 and "giving up" not in process.log()


@beside
def test_stop_while_ready_and_a_keepalive_hangs_no_last_act(box, gateway):
    process = box.ready(gateway)
    gateway.always = silent
    wait(lambda: gateway.seen[-1].faulty)
    assert stopped(process) == 0 and {link.call for link in gateway.seen if link.faulty} == {b9.KEEPALIVE}


@beside
def test_stop_while_connecting_ends(box):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(4):  # the queue is full: further connections hang
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        process = box.start(full.getsockname()[1], "--keepalive-interval", "60", "--debug")
        wait(lambda: "POST" in process.log(), process.log)
        time.sleep(0.3)
        start = time.monotonic()
        assert stopped(process) == 0 and time.monotonic() - start < 7, process.log()


@beside
def test_stop_while_the_name_server_is_away_leaves_ready_all_the_same(box, gateway, names):
    names.tell(gw=["127.0.0.1"])
    process = box.ready(gateway, "--gateway-host", "gw", **names.environ)
    names.tell(3600, gw=["127.0.0.1"])
    assert stopped(process) == 0 and len(gateway.calls(REGISTER)) == 2 and gateway.connections == 1


@beside
def test_stop_while_the_name_server_hangs_ends(box, gateway, names):
    names.tell(3600, gw=["127.0.0.1"])
    process = box.start(gateway, "--gateway-host", "gw", "--keepalive-interval", "60", "--debug",
                        **names.environ)
    wait(lambda: "POST" in process.log(), process.log)
    time.sleep(0.2)
    start = time.monotonic()
    assert stopped(process) == 0 and time.monotonic() - start < 7, process.log()  # the deadline is 10 s


@beside
def test_stop_twice_ends_at_once(box, gateway):
    gateway.always = silent
    process = box.start(gateway, "--keepalive-interval", "60")
    wait(lambda: gateway.seen, process.log)
    process.send_signal(signal.SIGTERM)
    wait(lambda: "SigCgt" in status_of(process) and not int(re.search(
        r"SigCgt:\s*(\w+)", status_of(process))[1], 16) & 1 << signal.SIGTERM - 1)
    assert stopped(process) == -signal.SIGTERM


def status_of(process):
    with open(f"/proc/{process.pid}/status") as file:
        return file.read()


@beside
def test_stop_after_a_failed_request_no_last_act(box, gateway):
    process = box.ready(gateway)
    gateway.always = says(500, {"message": "Internal Server Error"})
    wait(lambda: gateway.seen[-2].faulty)
    assert stopped(process) == 0 and {link.call for link in gateway.seen if link.faulty} == {b9.KEEPALIVE}


@beside
def test_stop_last_act_refused_silent(box, gateway):
    process = box.ready(gateway, "--keepalive-interval", "60")
    gateway.faults[b9.REGISTER].append(says(500, {"message": "Invalid pool name"}))
    assert stopped(process) == 0 and "Invalid" not in process.log()


@beside
def test_life_files_run_out_for_longer_than_the_ttl_ready_again(box):
    with contextlib.closing(Gateway(ttl=1)) as gateway:
        process = box.ready(gateway)
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        gateway.drop()
        time.sleep(1.5)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
        assert process.poll() is None, process.log()
        gateway.ready_again()
        assert process.poll() is None


OUTPUTS = {
    "closed": [*SHELL, 'exec "$@" <&- >&- 2>&-', "sh"],
    "stderr-closed": [*SHELL, 'exec "$@" 2>&-', "sh"],
    "full": [*SHELL, 'exec "$@" >/dev/full 2>&1', "sh"],
}


@pytest.mark.parametrize("state", [[], ["--state-dir", "/dev/null/below"]], ids=["lock", "no-lock"])
@pytest.mark.parametrize("before", OUTPUTS.values(), ids=OUTPUTS)
@beside
def test_life_output_gone_stays_ready_and_writes_nowhere_else(box, gateway, before, state):
    process = box.ready(gateway, "--debug", *state, before=before)
    gateway.faults[b9.KEEPALIVE].extend([breaks(b""), says(500), breaks(b"", True)])
    wait(lambda: not gateway.faults[b9.KEEPALIVE])
    gateway.ready_again()
    assert {link.call for link in gateway.seen} == {b9.REGISTER, b9.KEEPALIVE}  # no log line among them
    locks = [path.read_text() for path in box.folder.glob("state/*.lock")]
    assert locks == [f"{process.pid}\n"] * (not state)
    assert stopped(process) == 0


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize("read", [True, False], ids=["broken", "nobody-reads"])
@beside
def test_life_output_pipe_or_terminal_stays_ready(box, gateway, kind, read):
    there, here = os.pipe() if kind == "pipe" else pty.openpty()
    if kind == "pipe":
        fcntl.fcntl(here, fcntl.F_SETPIPE_SZ, 4096)
    process = box.ready(gateway, "--debug", stderr=here)
    os.close(here)
    if read:
        os.close(there)
    letters = random.Random(8)

    def long_and_longer(link):  # lines of any length, that end anywhere in what is left
        return says(200, "é".encode() * letters.randrange(10, 1000))(link)

    gateway.always = long_and_longer
    after = len(gateway.seen)
    wait(lambda: len(gateway.seen) > after + 40)  # more than pipe and terminal hold
    gateway.always = None
    gateway.ready_again()
    assert stopped(process) == 0
    if not read:
        os.close(there)


@beside
def test_life_log_of_many_failures_stays_short(box, gateway):
    process = box.ready(gateway)
    gateway.always = says(500, {"message": "Internal Server Error"})
    after = len(gateway.seen)
    wait(lambda: len(gateway.seen) > after + 20)
    gateway.always = None
    gateway.ready_again()
    lines = [line for line in process.log().splitlines() if " failed" in line]
    assert 3 < len(lines) < 9 and "failed 4 times in" in lines[2] and "/api/v1/health" in lines[0]


def test_ttl_that_alternates_writes_few_lines(gateway, log_lines):
    agent = agent_of(gateway.port)
    agent.ready, now = True, agent.started_at
    for number in range(1440):
        before, now = agent.lease, now + 60
        agent.lease = before._replace(ttl=100.0 + number % 2)
        agent.report_success(KEEPALIVE, b9.Outcome(OK), before, now)
    said = [line for line in log_lines if "forgets a machine after" in line]
    print(f"\nlines in 24 h of alternating TTLs: {len(log_lines)}")
    assert 1 < len(said) < 50 and len(log_lines) < 200


@beside
def test_debug_output_holds_no_token_and_no_config(box, gateway):
    config = {"k3s": {"secret": SECRET}, "a": SECRET}
    gateway.contract.config = config

    def with_echo(link):
        answer = json.loads(link.answer().partition(b"\r\n\r\n")[2])
        return says(200, answer, f"X-Echo: {TOKEN}", f"Set-Cookie: {K3S}")(link)
    gateway.always = with_echo
    process = box.ready(gateway, "--debug", "--k3s-token", K3S)
    echoes = [says(500, {"message": f"bad token {TOKEN[3:]} {K3S}"}), says(200, f"<html>{TOKEN}{K3S}"),
              says(302, b"", f"Location: /{TOKEN}"), breaks(f"HTTP/1.1 {TOKEN}\r\n\r\n".encode()),
              breaks(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + TOKEN.encode() + b"\r\n"),
              says(200, [{"config": SECRET}]), says(500, {"config": config}),
              says(401, {"error_code": TOKEN})]
    gateway.faults[b9.KEEPALIVE].extend(echoes)
    gateway.forget()
    wait(lambda: not gateway.faults[b9.KEEPALIVE], process.log)
    gateway.ready_again()
    log = process.log()
    assert "POST" in log and '"config": "not shown"' in log and "redacted" in log
    for secret in (TOKEN, K3S, SECRET):
        for at in range(len(secret) - 7):
            assert secret[at:at + 8] not in log


@pytest.mark.parametrize("config", [SECRET, [SECRET], [{"a": SECRET}]], ids=["text", "list", "mappings"])
@beside
def test_debug_odd_config_not_shown(box, gateway, config):
    gateway.faults[b9.REGISTER].append(says(500, {"message": "no", "config": config}))
    process = box.ready(gateway, "--debug")
    assert SECRET not in process.log()


# Hostile answers: random ones, cut anywhere, and both tokens echoed in every encoding
NASTY = ["\x1b[2J\x1b]0;x\x07", "\n", "\r\n\t", "\u202e", "\x9b31m", "\0", "{pool_name}{0}%s%(x)d", "config",
         "é" * 9, "machine not found", "Invalid pool name", "Unauthorized", "<html>", "A" * 3000, '"', "\\"]
ODD_VALUES = [None, True, 0, -1, 1.5, 300, 1e308, 10 ** 30, float("nan"), "ok", ID, [], {}]


def random_text(chance):
    """Of anything, mostly with a token in it, or a piece of one."""
    secret = chance.choice([TOKEN, ODD_TOKEN])
    start, size = chance.choice([0, 0, chance.randrange(len(secret) - 7)]), chance.choice([8, 12, 99, 99])
    parts = [chance.choice([*ENCODED.values()])(secret[start:start + size]), chr(chance.randrange(0x3000)),
             *chance.choices(NASTY, k=chance.randrange(3))]
    chance.shuffle(parts)
    return "".join(parts[:chance.randrange(1, 9)])


def random_value(chance, depth=0):
    kind = chance.randrange(9 - depth)
    if kind < 5:
        return random_text(chance) if kind else chance.choice(ODD_VALUES)
    return [random_value(chance, depth + 1)] if kind == 5 else {
        chance.choice([random_text(chance), "ttl_seconds", "machine_id"]): random_value(chance, depth + 1)}


def random_answer(chance):
    """Status, headers and body."""
    said = {name: random_value(chance) for name in chance.sample(
        ["message", "error_code", "suggestion", "machine_state", "config", random_text(chance)],
        chance.randrange(6))} | chance.choice([{}, {"status": "ok"}])
    body = chance.choice([json.dumps(said), json.dumps(said), json.dumps(said, ensure_ascii=False), "",
                          json.dumps([said]), random_text(chance), "<p>" + random_text(chance), "[" * 5000])
    names = ["Location", "Content-Type", "Set-Cookie", "Date", "Content-Encoding", "X-Echo"]
    headers = {name: random_text(chance) for name in chance.sample(names, chance.randrange(5))}
    headers["Retry-After"] = chance.choice(["0", "-1", "soon", "\u0663", random_text(chance)])
    status = chance.choice([200] * 9 + [301, 302, 307, 400, 401, 403, 404, 410, 429, 500, 502, 503,
                                        chance.randrange(200, 1000)])
    data = body.encode(chance.choice(["utf-8", "utf-8", "utf-16"]), "replace")
    return status, headers, data[:chance.choice([None, None, chance.randrange(len(data) + 1)])]


def random_bytes(chance):
    """An answer as it comes over a socket."""
    status, headers, body = random_answer(chance)
    ends = {} if chance.random() < 0.2 else {10: None, 13: None}
    lines = [f"{name}: {text.translate(ends)}".encode() for name, text in headers.items()]
    size = b"Content-Length: %d" % (len(body) + chance.choice([0, 0, 0, 5, -1]))
    data = b"\r\n".join([b"HTTP/1.1 %d Whatever" % status, *lines, size, b"", body])
    return data[:chance.choice([None, None, chance.randrange(len(data) + 1)])]


def feed_random_answers(count):
    """Through all that reads an answer, and to the log as it would be written."""
    chance, now, lease = random.Random(4), 1000.0, KEPT
    config = config_of("--token", TOKEN, "--k3s-token", ODD_TOKEN)
    b9.LOG.handlers, b9.LOG.propagate = [b9.LogLines(config.redactor)], False
    for call in chance.choices(BOTH, k=count):
        status, headers, body = random_answer(chance)
        outcome = b9.classify(call, status, headers, body, ID, config)
        b9.LOG.warning("%s %s %s", outcome.text, b9.printable(headers, 1000), b9.describe_body(body))
        lease = b9.lease_after(lease, call, outcome, now, every(60), chance.uniform)
        assert outcome.text.isprintable() and len(outcome.text) < 5 * 200 and now <= lease.due <= now + 220
        now = lease.due


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """10,000 random answers in a process of its own, which masks no secrets of other tests."""
    log = tmp_path_factory.mktemp("reading") / "log"
    with open(log, "wb") as file, subprocess.Popen(
            ["nice", sys.executable, "-c", "import test_beta9_agent as t; t.feed_random_answers(10000)"],
            stderr=file, env=os.environ | {"PYTHONPATH": str(SOURCE.parent)}) as process:
        yield process, log


def test_answers_10000_random_ones_come_to_an_outcome_and_show_no_secret(reading):
    process, path = reading
    code, log = process.wait(120), path.read_text()
    assert code == 0, log[-2000:]
    assert log.count("\n") == 10000 and log.replace("\n", "").isprintable()
    assert log.count("[redacted]") > 5000 and leaks(log, TOKEN, ODD_TOKEN) == []


ECHOES = {
    "message": lambda text: says(500, {"message": text}),
    "suggestion": lambda text: says(200, {"error_code": "x", "suggestion": text}),
    "header": lambda text: says(302, text.encode(), f"Location: http://x/{text}", f"Set-Cookie: {text}"),
    "type": lambda text: says(502, b"", f"Content-Type: {text}"),
    "page": lambda text: says(200, f"<html>{text}".encode()),
    "list": lambda text: says(200, [text]),
    "cut-json": lambda text: says(200, b'{"message": "' + text.encode()),
    "status-line": lambda text: breaks(f"{text}\r\n\r\n".encode()),
    "chunk": lambda text: breaks(HEAD + f"Transfer-Encoding: chunked\r\n\r\n{text}\r\n".encode()),
    "length": lambda text: breaks(HEAD + f"Content-Length: {text}\r\n\r\n".encode()),
}


@pytest.fixture(scope="module")
def hostile(folders, request):
    """Two agents that show all they know, and what their gateways answer until they are good again."""
    chance = random.Random(5)
    answers = {
        "random": [breaks(random_bytes(chance)) for _ in range(300)],
        "echo": [place(f"{encode(TOKEN)} {encode(ODD_TOKEN)}") for place in ECHOES.values()
                 for encode in ENCODED.values()]}
    with contextlib.ExitStack() as stack:
        started = {}
        for name in selected(request, "hostile"):
            gateway = stack.enter_context(contextlib.closing(Gateway()))
            left = collections.deque(answers[name])
            process = folders().ready(gateway, "--debug", "--k3s-token", ODD_TOKEN)
            gateway.always = lambda link, left=left: (left.popleft() if left else late(0))(link)
            started[name] = gateway, process, left
        yield started


@pytest.mark.parametrize("name", ["random", "echo"])
def test_life_hostile_answers_end_alive_and_show_no_secret(hostile, name):
    gateway, process, left = hostile[name]
    wait(lambda: not left or process.poll() is not None, process.log, 120)
    gateway.ready_again()
    log = process.log()
    assert process.poll() is None and log.count("[redacted]") > 300
    assert leaks(log, TOKEN, ODD_TOKEN) == []


@pytest.mark.parametrize("options", [[], ["--debug"]], ids=["info", "debug"])
@beside
def test_life_escapes_of_the_gateway_are_visible_short_lines(box, gateway, options):
    escape, long = b"\x1b[2J\x9b\x07", b"A" * 3000
    process = box.ready(gateway, *options)
    gateway.faults[KEEPALIVE].extend([
        says(500, {"message": "".join(NASTY)}), says(302, b"", "Location: /\x1b[2J" + "A" * 3000),
        breaks(escape + long + b"\r\n\r\n"), breaks(HEAD + escape + b"\r\n\r\n"),
        breaks(HEAD + b"Content-Length: " + escape + b"\r\n\r\n"),
        breaks(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + escape + long + b"\r\n")])
    wait(lambda: not gateway.faults[KEEPALIVE], process.log)
    gateway.ready_again()
    lines = process.log().splitlines()
    assert r"\x1b[2J" in process.log() and [line for line in lines if not line.isprintable()] == []
    told = "\n".join(line for line in lines if re.search(" (WARNING|ERROR) ", line))
    assert max(map(len, re.findall("A+", told))) <= 200


# GPUs: the real binding over a stub of the driver's library, which reads NVML_STUB at each start
STUB = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int stuck, count, lost;
int nvmlInitWithFlags(unsigned flags) {
    do {
        FILE *file = fopen(getenv("NVML_STUB"), "r");
        if (!file || fscanf(file, "%d %d %d", &stuck, &count, &lost) != 3) abort();
        fclose(file);
        if (stuck) usleep(50000);
    } while (stuck);
    return 0;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = count; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(long)(index + 1);
    return (int)index == lost ? 15 : 0;
}
int nvmlDeviceGetName(void *handle, char *name, unsigned size) {
    strncpy(name, "NVIDIA Stub", size);
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) { memory[0] = 80ULL << 30; return 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *n, void *infos) { *n = 0; return 0; }
const char *nvmlErrorString(int error) { return "an error"; }
"""


@pytest.fixture(scope="module")
def driver(folders):
    """Starts agents beside stub GPUs; `say` what the driver does: stuck, how many, which is lost."""
    box = folders()
    (box.folder / "stub.c").write_text(STUB)
    if not shutil.which("cc"):
        pytest.skip("no cc")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "stub.c"],
                   cwd=box.folder, check=True)

    class Driver:
        def __init__(self, said, *options):
            self.control, self.box = box.folder / f"control{next(numbers)}", folders()
            self.gateway = Gateway()
            self.say(said)
            self.start(*options)

        def start(self, *options):
            self.process = self.box.start(self.gateway, *options, NVML_STUB=str(self.control),
                                          LD_LIBRARY_PATH=str(box.folder), BETA9_K3S_TOKEN=K3S,
                                          BETA9_OFFER_ALWAYS="yes")

        def say(self, said):
            self.control.with_suffix(".new").write_text(said)
            self.control.with_suffix(".new").rename(self.control)

        def registered(self, after=0):
            return [link.json["gpu_count"] for link in self.gateway.seen[after:] if link.call == b9.REGISTER]

        def free(self):
            return [link.json["metrics"]["free_gpu_count"] for link in self.gateway.calls(b9.KEEPALIVE)]

    numbers = itertools.count()
    started = [Driver(said) for said in ("1 2 -1", "0 2 -1")]
    wait(lambda: started[1].free()[2:], started[1].process.log)
    started[1].say("1 2 -1")
    yield Driver, started
    for each in started:
        each.gateway.stop()


def test_driver_that_hangs_at_the_start_counts_as_0_until_it_returns(driver):
    sick = driver[1][0]
    wait(lambda: sick.free()[3:], sick.process.log)
    assert sick.registered() == ["0"] and {*sick.free()} == {0} and "driver" in sick.process.log()
    sick.say("0 2 -1")
    wait(lambda: sick.registered()[1:] and sick.gateway.ready_again())
    assert sick.registered() == ["0", "2"] and sick.free()[-1] == 2 and sick.process.poll() is None


def test_driver_that_hangs_later_delays_once_and_stays_registered(driver):
    sick = driver[1][1]
    wait(lambda: sick.free()[-1] == 0 and sick.free()[-4] == 0, sick.process.log)
    times = [link.time for link in sick.gateway.seen]
    pauses = sorted(two - one for one, two in zip(times, times[1:]))
    assert 4 < pauses[-1] < 9 and pauses[-2] < 3
    wait(lambda: psutil.Process(sick.process.pid).num_threads() == 2)       # the main one, and the stuck one
    sick.say("0 2 -1")
    wait(lambda: sick.free()[-1] == 2)
    assert sick.registered() == ["2"] and sick.process.poll() is None
    assert sick.process.log().count("NVIDIA driver") == 1


def test_gpu_lost_stays_registered_but_is_not_free_and_more_of_them_are_registered(driver):
    sick = driver[0]("0 2 -1")
    with contextlib.closing(sick.gateway):
        wait(lambda: sick.free()[2:], sick.process.log)
        sick.say("0 2 1")
        wait(lambda: sick.free()[-3:] == [1, 1, 1], sick.process.log)
        assert sick.registered() == ["2"] and sick.process.log().count("beta9 machine drain") == 1
        assert " ERROR 1 of 2 GPUs are lost, but stay registered" in sick.process.log()
        sick.say("0 3 -1")
        wait(lambda: len(sick.registered()) == 2, sick.process.log)
        sick.gateway.ready_again()
        assert sick.registered() == ["2", "3"] and sick.free()[-1] == 3
        wait(lambda: "registered again: the offer was " in sick.process.log())
        assert stopped(sick.process) == 0


def test_gpus_fewer_at_a_restart_take_no_work_at_first(driver):
    one = driver[0]("0 3 -1", "--machine-id", ID)
    with contextlib.closing(one.gateway):
        wait(lambda: one.free()[1:], one.process.log)
        kept = one.box.folder / f"state/{ID}.offer"
        assert json.loads(kept.read_text())["gpu_count"] == 3 and mode_of(kept) == 0o600
        assert one.gateway.calls(REGISTER)[0].json["cpu"] != "0m"
        for number, options, cpu in ((3, ["--max-gpus", "2"], "0m"), (2, [], "0m"), (3, [], None)):
            stopped(one.process, signal.SIGKILL)
            one.say(f"0 {number} -1")
            after = len(one.gateway.seen)
            one.start("--machine-id", ID, *options)
            wait(lambda: one.gateway.ready(after), one.process.log)
            said = next(link.json for link in one.gateway.seen[after:] if link.call == REGISTER)
            assert said["gpu_count"] == ("3" if cpu is None else "2")
            assert (said["cpu"] == "0m") is (cpu == "0m")
            assert ("no work is taken for 10 minutes" in one.process.log()) is (cpu == "0m")
            assert json.loads(kept.read_text())["gpu_count"] == 3


def test_announce_with_a_token_file_gone_by_then_goes_on(gateway, tmp_path, log_lines):
    path = tmp_path / "token"
    path.write_text(TOKEN)
    config, problems = settings_of("--token-file", str(path), "--gateway-port", str(gateway.port))
    path.unlink()
    b9.Agent(config, b9.State(ID), b9.GatewayClient(config, None)).announce()
    assert problems == [] and any("beta9-agent" in line for line in log_lines)


@pytest.mark.parametrize("mode, warned", [(0o600, False), (0o644, True)])
@beside
def test_config_file_with_a_token_that_others_can_read_is_warned_of(box, mode, warned):
    path = box.folder / "agent.json"
    path.write_text(json.dumps({"token": TOKEN}))
    path.chmod(mode)
    done = box.run("--dev", "--once", "--config", str(path), BETA9_TOKEN="")
    assert done.returncode == 0 and (f"`chmod g-w,o= {path}`" in done.stderr) is warned, done.stderr


ABOVE = ("--max-cpu", "9999", "--max-memory", "9999Gi", "--max-gpus", "99")


def test_announce_caps_above_what_is_there_say_so_and_offer_all(gateway, log_lines):
    agent = agent_of(gateway.port, *ABOVE)
    agent.announce()
    assert sorted(line.split()[0] for line in log_lines if "lower it" in line) == [
        "max_cpu", "max_gpus", "max_memory"]
    assert agent.plan.found == b9.offer_of(agent.metrics, agent.gpus, config_of())


@pytest.mark.parametrize("options, warnings", [
    ([], ["k3s token is missing", "give --hostname"]), (["--hostname", "box"], ["k3s token is missing"]),
    (["--k3s-token", K3S], ["k3s was not seen yet", "shows in `ps`", f"machine-{ID}"]),
    (["--k3s-token", K3S, "--offer-always"], ["shows in `ps`", f"machine-{ID}"]),
    (["--offer-always"], [f"machine-{ID}"]),
    (["--offer-always", "--hostname", "box"], []), (["--dev"], [])],
    ids=["neither", "no-token", "not-seen", "no-hostname", "always", "always-with-hostname", "dev"])
def test_announce_warns_of_what_workers_will_lack(gateway, log_lines, options, warnings):
    agent = agent_of(gateway.port, *options)
    agent.config.sources.pop("token")
    agent.announce()
    _, *said = log_lines
    assert len(said) == len(warnings) and all(words in " ".join(said) for words in warnings)
    closed = {"k3s token is missing", "k3s was not seen yet"} & set(warnings)
    assert (agent.plan.offer.cpu == 0) is bool(closed)
    assert agent.payload_of(REGISTER)["cpu"] == ("0m" if agent.plan.offer.cpu == 0 else f"{psutil.cpu_count()}000m")


def test_announce_driver_without_binding_says_how_to_get_it(nvml_stub, tmp_path):
    write_gpus(tmp_path / "control", "..")
    code = ("import logging, sys\nsys.modules['pynvml'] = None\nlogging.basicConfig(stream=sys.stdout)\n"
            "config = b9.build_config(b9.read_settings(['--token', 'x' * 8], {}), b9.Redactor())\n"
            "b9.Agent(config, b9.State('1165a9b6'), b9.GatewayClient(config, None)).announce()")
    said = run_python(code, stub_environment(nvml_stub, tmp_path / "control"))
    assert "pip install nvidia-ml-py" in said and "Traceback" not in said


def test_report_unchanging_machine_writes_one_summary_in_ten_minutes(gateway, log_lines):
    agent = agent_of(gateway.port)
    agent.ready, good = True, b9.Outcome(b9.Kind.OK)
    for elapsed, lines in ((0, 0), (b9.QUIET + 1, 1), (b9.QUIET + 2, 1)):
        agent.report_success(b9.KEEPALIVE, good, agent.lease, agent.started_at + elapsed)
        assert len(log_lines) == lines
    assert b9.format_offer(agent.plan.offer) in log_lines[0]


# ---- 11 Stand-in gateway, and the contract that all sides keep
GOOD_REGISTER = {"token": K3S_TOKEN, "machine_id": ID, "hostname": "box", "provider_name": "generic",
                 "pool_name": "gpu", "cpu": "8000m", "memory": "32094Mi", "gpu_count": "2",
                 "private_ip": "10.0.0.7"}
GOOD_METRICS = {"cpu_utilization_pct": 15.5, "memory_utilization_pct": 42.3, "total_cpu_available": 8000,
                "total_memory_available": 32094, "total_disk_space_bytes": 500000000000,
                "total_disk_free_bytes": 300000000000, "free_gpu_count": 8, "worker_count": 2}
GOOD_KEEPALIVE = {"machine_id": ID, "provider_name": "generic", "pool_name": "gpu",
                  "agent_version": "0.1.0-python", "metrics": GOOD_METRICS}
LOST_STATE = "Failed to update keepalive: failed to get machine state <provider:machine:{}>: machine not found"
PAYLOAD, REQUIRED = "Invalid payload", "machine_id and pool_name are required"


def register_row(name, change, status, message=None, **more):
    asked = {"path": "/machine/register", "json": {**GOOD_REGISTER, **change}, **more}
    return f"register-{name}", asked, status, message


def keepalive_row(name, change, status, message=None, metrics=None, **more):
    said = {**GOOD_KEEPALIVE, "metrics": {**GOOD_METRICS, **(metrics or {})}, **change}
    said = {key: value for key, value in said.items() if value is not ...}
    return f"keepalive-{name}", {"path": "/machine/keepalive", "json": said, "known": True, **more}, status, message


# Transcribed from gateway-api.md: what is asked, the status, and its message or what the answer holds
CONFORMANCE = [
    register_row("whole", {}, 200, {"status": "registered", "machine_id": ID, "pool_name": "gpu",
                                    "ttl_seconds": 300}),
    register_row("without-k3s-token", {"token": ""}, 200), register_row("again", {}, 200, known=True),
    register_row("unknown-provider", {"provider_name": "nobody's"}, 200),
    register_row("cpu-without-m", {"cpu": "8"}, 200), register_row("no-cpu", {"cpu": "0m"}, 200),
    *(register_row(f"memory-{text}", {"memory": text}, 200) for text in ("32094", "32Gi", "32094000Ki")),
    register_row("no-gpu", {"gpu_count": "0"}, 200), register_row("more-fields", {"extra": "x"}, 200),
    *(register_row(f"cpu-{text or 'empty'}", {"cpu": text}, 500, "Invalid machine cpu value")
      for text in ("7.5", "7.5m", "eight", "8000mm", "-1m", "")),
    *(register_row(f"memory-{text or 'empty'}", {"memory": text}, 500, "Invalid machine memory value")
      for text in ("31.3Gi", "32GB", "")),
    *(register_row(f"gpus-{text or 'empty'}", {"gpu_count": text}, 500, "Invalid gpu count")
      for text in ("-1", "two", "1.0", "")),
    *(register_row(f"pool-{text or 'empty'}", {"pool_name": text}, 500, "Invalid pool name") for text in ("gpus", "")),
    *(register_row(f"number-as-{name}", {name: 2}, 400, PAYLOAD) for name in ("gpu_count", "cpu", "machine_id")),
    *(register_row(name, {}, 400, PAYLOAD, body=body) for name, body in (
        ("no-json", b"no json"), ("list", b"[]"), ("empty", b""), ("cut", b'{"token": "'))),
    register_row("no-content-type", {}, 400, PAYLOAD, headers={"Content-Type": None}),
    register_row("form", {}, 400, PAYLOAD, headers={"Content-Type": "application/x-www-form-urlencoded"}),
    register_row("wrong-token", {}, 401, "Unauthorized", headers={"Authorization": "Bearer other"}),
    register_row("no-authorization", {}, 500, "Internal Server Error", headers={"Authorization": None}),
    register_row("get", {}, 405, "Method Not Allowed", method="GET"),

    keepalive_row("whole", {}, 200, {"status": "ready", "machine_id": ID, "pool_name": "gpu", "ttl_seconds": 300,
                                     "agent_version": "0.1.0-python"}),
    keepalive_row("few-metrics", {"metrics": {"free_gpu_count": 0}}, 200),
    keepalive_row("no-version", {"agent_version": ...}, 200),
    keepalive_row("no-provider-is-generic", {"provider_name": ""}, 200),
    keepalive_row("whole-percentage", {}, 200, metrics={"cpu_utilization_pct": 15}),
    keepalive_row("unknown-metric", {}, 200, metrics={"cache_size": 5}),
    keepalive_row("no-metrics", {"metrics": ...}, 500, "Internal Server Error"),
    *(keepalive_row(f"{name}-{value}", {}, 400, PAYLOAD, metrics={name: value}) for name, value in (
        ("total_cpu_available", 8000.0), ("total_memory_available", 31.5), ("free_gpu_count", "1"),
        ("total_disk_free_bytes", 2 ** 63), ("worker_count", True), ("cpu_utilization_pct", "15"),
        ("cpu_utilization_pct", float("nan")), ("memory_utilization_pct", float("inf")))),
    keepalive_row("1e400", {}, 400, PAYLOAD, body=b'{"machine_id": "%s", "pool_name": "gpu", "metrics":'
                  b' {"cpu_utilization_pct": 1e400}}' % ID.encode()),
    keepalive_row("metrics-list", {"metrics": []}, 400, PAYLOAD),
    keepalive_row("number-as-id", {"machine_id": 7}, 400, PAYLOAD),
    keepalive_row("nothing", {}, 400, REQUIRED, body=b"{}"),
    keepalive_row("no-machine", {"machine_id": ""}, 400, REQUIRED),
    keepalive_row("no-pool", {"pool_name": ""}, 400, REQUIRED),
    keepalive_row("not-registered", {"machine_id": "00000001"}, 500, LOST_STATE.format("generic:gpu:00000001")),
    keepalive_row("other-provider", {"provider_name": "aws"}, 500, LOST_STATE.format(f"aws:gpu:{ID}")),
    keepalive_row("other-pool", {"pool_name": "external"}, 500, LOST_STATE.format(f"generic:external:{ID}")),
    keepalive_row("no-json", {}, 400, PAYLOAD, body=b"<html>"),
    keepalive_row("no-content-type", {}, 400, PAYLOAD, headers={"Content-Type": None}),
    keepalive_row("wrong-token", {}, 401, "Unauthorized", headers={"Authorization": f"Bearer x{MACHINE_TOKEN}"}),
    keepalive_row("no-authorization", {}, 500, "Internal Server Error", headers={"Authorization": None}),
    keepalive_row("put", {}, 405, "Method Not Allowed", method="PUT"),

    ("health", {"method": "GET", "path": "/health", "headers": {"Authorization": None, "Content-Type": None}},
     200, {"status": "ok"}),
    ("health-post", {"path": "/health", "json": {}}, 405, "Method Not Allowed"),
    ("config", {"method": "GET", "path": "/machine/config"}, 200, {"config": dict}),
    ("config-wrong-token", {"method": "GET", "path": "/machine/config", "headers": {"Authorization": "Bearer x"}},
     401, "Unauthorized"),
    ("list", {"method": "GET", "path": "/machine/list?pool_name=gpu&provider_name=generic"}, 200, list),
    ("list-wrong-token", {"method": "GET", "path": "/machine/list", "headers": {"Authorization": "Bearer x"}},
     401, "Unauthorized"),
    ("deregister", {"path": "/machine/deregister", "json": {}}, 404, "Not Found"),
    ("root", {"method": "GET", "path": "/"}, 404, "Not Found"),
]


def ask_over_http(port, path, method="POST", headers=None, json=None, body=None, known=False):
    """Status, headers and parsed body of one request with the right headers, save for those given."""
    if known:
        assert ask_over_http(port, "/machine/register", json=GOOD_REGISTER)[0] == 200
    sent_headers = {"Authorization": f"Bearer {MACHINE_TOKEN}", "Content-Type": "application/json"} | (headers or {})
    data = body if body is not None else sys.modules["json"].dumps(json).encode() if json is not None else b""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.putrequest(method, f"/api/v1{path}")
        for name, value in {**sent_headers, "Content-Length": str(len(data))}.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(data)
        answer = connection.getresponse()
        return answer.status, answer.headers, sys.modules["json"].loads(answer.read())


@pytest.fixture(scope="module")
def stand_ins():
    """Ports of the gateway of --dev, and of the one that these tests use."""
    with contextlib.closing(Gateway(pool="gpu")) as gateway:
        gateway.contract.token = MACHINE_TOKEN
        yield {"dev": b9.start_stand_in(b9.StandIn(MACHINE_TOKEN, "gpu")), "tests": gateway.port}


@pytest.mark.parametrize("name, asked, status, expected", CONFORMANCE, ids=[row[0] for row in CONFORMANCE])
@pytest.mark.parametrize("which", ["dev", "tests"])
def test_stand_in_answers_as_the_gateway_does(stand_ins, which, name, asked, status, expected):
    code, headers, answer = ask_over_http(stand_ins[which], **asked)
    assert code == status and headers["Content-Type"].startswith("application/json"), answer
    if isinstance(expected, str):
        assert answer == {"message": expected}
    elif isinstance(expected, type):
        assert isinstance(answer, expected)
    elif expected:
        holder = answer.get("machine_state", answer)
        assert all(isinstance(holder[key], value) if isinstance(value, type) else holder[key] == value
                   for key, value in expected.items())
    if code == 200 and name.startswith("keepalive"):
        check_shape(answer, READY_FIELDS)
    if code == 200 and name.startswith("register"):
        check_shape(answer, REGISTERED_FIELDS)


def test_conformance_table_has_as_many_rows_as_the_page_has_facts():
    assert len(CONFORMANCE) >= 60 and len({row[0] for row in CONFORMANCE}) == len(CONFORMANCE)


@pytest.mark.parametrize("name, asked, status, expected", [row for row in CONFORMANCE if "json" in row[1]],
                         ids=[row[0] for row in CONFORMANCE if "json" in row[1]])
def test_answer_of_a_stand_in_means_what_the_page_says(stand_ins, name, asked, status, expected, gpu_config):
    call = asked["path"].rpartition("/")[2]
    code, headers, answer = ask_over_http(stand_ins["tests"], **asked)
    kind = b9.classify(call, code, headers, json.dumps(answer).encode(), ID, gpu_config).kind
    meaning = {"Unauthorized": DENIED, "Internal Server Error": TROUBLE, "Not Found": TROUBLE,
               "Method Not Allowed": TROUBLE}
    if status == 200:
        assert kind is OK
    elif "machine not found" in expected:
        assert kind is FORGOTTEN
    else:
        assert kind is meaning.get(expected, REFUSED)


@pytest.mark.parametrize("payload, fields", [("register", REGISTER_FIELDS), ("keepalive", KEEPALIVE_FIELDS)])
def test_agent_says_what_the_page_asks_for(payload, fields):
    config = config_of("--pool-name", "gpu")
    made = {"register": b9.register_payload(config, ID, b9.Offer(8000, 32094, 2), "10.0.0.7"),
            "keepalive": b9.keepalive_payload(config, ID, METRICS)}
    check_shape(sent(made[payload]), fields)


def test_contract_forgets_by_its_ttl_and_each_call_renews_it():
    contract = Contract(MACHINE_TOKEN, "gpu", 6)
    headers = {"Authorization": f"Bearer {MACHINE_TOKEN}", "Content-Type": "application/json"}

    def ask(call, said, now):
        return contract.answer("POST", f"/api/v1/machine/{call}", headers, json.dumps(said).encode(), now)[0]

    assert ask(KEEPALIVE, GOOD_KEEPALIVE, 1000) == 500 and ask(REGISTER, GOOD_REGISTER, 1000) == 200
    assert [ask(KEEPALIVE, GOOD_KEEPALIVE, now) for now in (1005, 1010, 1017, 1018)] == [200, 200, 500, 500]
    assert ask(REGISTER, GOOD_REGISTER, 1020) == 200
    assert [ask(KEEPALIVE, GOOD_KEEPALIVE, now) for now in (1021, 1026.9)] == [200, 200]


def test_stand_in_of_dev_forgets_after_300_s_and_lists_what_is_ready():
    stand_in = b9.StandIn(MACHINE_TOKEN, "gpu")
    port = b9.start_stand_in(stand_in)

    def listed():
        return [each["state"]["machine_id"] for each in ask_over_http(port, "/machine/list", "GET")[2]]

    assert ask_over_http(port, "/machine/register", json=GOOD_REGISTER)[0] == 200 and listed() == []
    status, _, answer = ask_over_http(port, "/machine/keepalive", json=GOOD_KEEPALIVE)
    assert status == 200 and abs(int(answer["machine_state"]["last_keepalive"]) - time.time()) < 60
    assert listed() == [ID]
    machine, = stand_in.machines.values()
    assert 290 < machine["until"] - b9.read_clock() <= 300
    machine["until"] -= 300
    assert ask_over_http(port, "/machine/keepalive", json=GOOD_KEEPALIVE)[0] == 500


def test_stand_in_of_dev_survives_bodies_that_lie_about_their_size():
    port = b9.start_stand_in(b9.StandIn(MACHINE_TOKEN, "gpu"))
    for size in (b"-5", b"soon", b"99999999999", b""):
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.sendall(b"POST /api/v1/machine/keepalive HTTP/1.1\r\nContent-Length: " + size + b"\r\n\r\n")
            sock.shutdown(socket.SHUT_WR)
            assert b"HTTP/1.1 500 " in sock.recv(65536)
    assert ask_over_http(port, "/health", "GET")[0] == 200


# ---- 12 Check and status
def record_of(box, machine_id="*"):
    """The newest status record."""
    paths = sorted((box.folder / "state").glob(f"{machine_id}.status.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(paths[-1].read_text()) if paths else None


GOOD_RECORD = {
    "format": 1, "agent_version": "0.2.0", "state": "running", "machine_id": ID, "pool_name": "gpu",
    "provider_name": "generic", "gateway": "http://gw:1994", "proxy": "", "pid": os.getpid(),
    "process_start": b9.read_process_start(os.getpid()), "wall_clock": 1.7e9, "clock": 5000.0, "started_at": 1000.0,
    "ready_since": 1001.0, "failing_since": None, "failure": "", "last_keepalive_at": 4990.0,
    "next_attempt_at": 5050.0, "lease_ends_at": 5290.0, "kept_alive": 66, "failed": 0, "registered": 1,
    "offer": {"cpu": 8000, "memory": 32094, "gpu_count": 2}, "warning": "",
    "metrics": {"cpu_utilization_pct": 15.5, "memory_utilization_pct": 42.3, "total_disk_space_bytes": 5e11,
                "total_disk_free_bytes": 3e11}, "gpus": [{"name": "A100", "free": True}, {"name": None, "free": False}],
    "history": [{"ms": 3.5 + number, "cpu": number * 1.5, "memory": 42} for number in range(60)]}


@pytest.mark.parametrize("change, now, code, words", [
    ({}, 5001, 0, "ready for 66 min"), ({}, 5080, 0, "ready for"), ({}, 5081, 1, "no sign of life for 31 s: it hangs"),
    ({"next_attempt_at": 6000.0}, 5291, 1, "its lease ran out 1 s ago"),
    ({"failing_since": 4900.0, "failure": "keepalive failed: x"}, 5001, 1,
     "not ready for 1 min: keepalive failed: x"),
    ({"ready_since": None, "lease_ends_at": None}, 5001, 1, "starting"),
    ({"offer": {"cpu": 0}, "warning": "no k3s"}, 5001, 1, "ready, takes no work: no k3s"),
    ({"warning": "a GPU is lost"}, 5001, 0, "ready for"),
    ({"state": "stopped"}, 5001, 3, "not running: stopped 1 s ago"),
    ({"pid": 2 ** 22 + 1}, 5001, 3, "not running, though nobody stopped it: see its log, start it again"),
    ({"process_start": "of another process"}, 5001, 3, "not running"), ({"process_start": ""}, 5001, 0, "ready"),
    ({"pid": 1, "process_start": b9.read_process_start(1)}, 5001, 0, "ready"),
    ({}, 4999, 3, "not running"),       # of before the boot, and the process number is taken again
    ({"pid": "x"}, 5001, 3, "not running"), ({"pid": -1}, 5001, 3, "not running")],
    ids=["ready", "29-s-late", "stuck", "lease-over", "failing", "starting", "no-work", "warning", "stopped",
         "no-process", "other-process", "start-unknown", "another-user's", "before-boot", "odd-pid", "negative-pid"])
def test_status_judges_a_record(change, now, code, words):
    found, said = b9.Status({**GOOD_RECORD, **change}, now).judge()
    assert found == code and words in said


K3S_RECORD = {"state": "usable", "since": 4700.0, "token_valid_until": 1803205800,
              "gpu_count": 2, "fault": "", "worker_count": 3, "workers": [
                  {"name": f"worker-external-{number}", "status": status, "since": 4000.0}
                  for number, status in enumerate(("Running", "ImagePullBackOff", "Odd" * 99))]}


def test_status_shows_k3s_and_its_workers_in_words():
    status = b9.Status({**GOOD_RECORD, "k3s": K3S_RECORD}, 5000.0)
    lines = b9.draw_status(status, status.judge()[1], " .#")
    at = lines.index("k3s        usable for 5 min, workers: 3, token valid until 2027-02-21")
    assert [" ".join(line.split()) for line in lines[at + 1:at + 3]] == [
        "worker-external-0 16 min Running", "worker-external-1 16 min image cannot be pulled"]
    crowd = {**K3S_RECORD, "worker_count": 27, "workers": K3S_RECORD["workers"] * 9}
    lines = b9.draw_status(b9.Status({**GOOD_RECORD, "k3s": crowd}, 5000.0), "ready", " .#")
    assert len(lines) == 23 and "  and 23 more: `kubectl get pods`" in lines
    unknown = {**K3S_RECORD, "worker_count": None, "workers": [], "token_valid_until": None, "state": "unusable"}
    lines = b9.draw_status(b9.Status({**GOOD_RECORD, "k3s": unknown}, 5000.0), "ready", " .#")
    assert "k3s        unusable for 5 min, workers: unknown" in lines


@pytest.mark.parametrize("signs", [" ▁▂▃▄▅▆▇█", " .:-=+*#"], ids=["utf-8", "ascii"])
@pytest.mark.parametrize("change", [{}, {"k3s": K3S_RECORD}, {"k3s": K3S_RECORD, "warning": "y " * 900},
                                    {"k3s": {**K3S_RECORD, "state": "x" * 500, "workers": [{"name": "w"}] * 50}},
                                    {"failure": "x" * 900, "failing_since": 1.0}, {"warning": "y " * 900},
                                    {"pool_name": "p" * 500, "proxy": "q" * 500},
                                    {"tunnel": "t" * 500, "tunnel_up_since": 4000.0, "k3s": K3S_RECORD,
                                     "warning": "y " * 900}])
def test_status_drawn_fits_80_columns_and_24_lines(change, signs):
    status = b9.Status({**GOOD_RECORD, **change}, 5001.0)
    lines = b9.draw_status(status, status.judge()[1], signs)
    assert len(lines) < 24 and max(map(len, lines)) < 80 and all(line.isprintable() for line in lines)
    assert signs != " .:-=+*#" or "".join(lines).isascii()
    text = "\n".join(lines)
    assert ID in text and ("66 kept alive, 0 failed, 1 registered" in text) and "2 GPUs" in text
    assert "1 of 2 in use" in text and "280 GiB free" in text.replace("279", "280")


def test_status_of_records_with_anything_in_them_is_drawn_all_the_same():
    chance = random.Random(9)
    for _ in range(600):
        record = dict(GOOD_RECORD)
        for name in chance.sample(sorted(record), 4):
            record["k3s"] = {**K3S_RECORD, chance.choice(sorted(K3S_RECORD)): chance.choice(ODD_VALUES)}
            record[name] = chance.choice([*ODD_VALUES, "\x1b[2J\n", [1, "x", None], {"cpu": "x"}, [{"ms": "x"}], [[]]])
        record = json.loads(json.dumps(record))
        status = b9.Status(record, 5001.0)
        code, headline = status.judge()
        lines = b9.draw_status(status, headline, " .#")
        assert code in (0, 1, 3) and len(lines) < 24 and all(line.isprintable() and len(line) < 80 for line in lines)


@pytest.mark.parametrize("written", [None, b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"pid": 1', b"[" * 60000, ...],
                         ids=["none", "empty", "cut", "list", "null", "binary", "cut-later", "deep", "folder"])
@beside
def test_status_of_a_damaged_record_is_not_running(box, written):
    (box.folder / "state").mkdir()
    path = box.folder / f"state/{ID}.status.json"
    if written is ...:
        path.mkdir()
    elif written is not None:
        path.write_bytes(written)
    done = box.run("--status", BETA9_TOKEN="")
    assert (done.returncode, done.stderr) == (3, "") and done.stdout.startswith("not running"), done
    done = box.run("--status", "--json", BETA9_TOKEN="")
    assert done.returncode == 3 and json.loads(done.stdout)["exit_code"] == 3


@beside
def test_status_through_a_life(box, gateway):
    """Ready, in an outage, killed, started again, stopped; with nothing but Python, by anybody."""
    def status(code, words, *options):
        def told():
            done = box.run("--status", *options, python=["-S"], BETA9_TOKEN="", LC_ALL="C", PYTHONUTF8="0",
                           BETA9_TOKEN_FILE="/nowhere/token", PYTHONCOERCECLOCALE="0")
            assert done.stderr == "" and done.stdout.isascii()
            return done if done.returncode == code and words in done.stdout else None
        return wait(told, lambda: process.log())

    options = ["--k3s-token", K3S, "--offer-always", "--hostname", "box", "--machine-id", ID]
    process = box.ready(gateway, *options)
    wait(lambda: record_of(box)["kept_alive"] > 3)
    status(0, "ready for")
    record = json.loads(status(0, "", "--json").stdout)
    assert (record["machine_id"], record["pid"], record["exit_code"]) == (ID, process.pid, 0)
    assert record["offer"]["cpu"] > 0 and 3 < len(record["history"]) <= 60 and record["history"][-1]["ms"] > 0
    assert mode_of(box.folder / f"state/{ID}.status.json") == 0o644
    gateway.stop()
    status(1, "not ready for")
    gateway.start()
    status(0, "ready for")
    stopped(process, signal.SIGKILL)
    status(3, "not running")
    process = box.ready(gateway, *options)
    status(0, "ready for")
    assert stopped(process) == 0
    status(3, "not running", "--machine-id", ID)
    assert record_of(box)["state"] == "stopped"
    status(3, "no record", "--machine-id", "00000000")


@beside
def test_status_of_a_machine_that_takes_no_work_is_1(box, gateway):
    box.ready(gateway)
    done = wait(lambda: (done := box.run("--status", BETA9_TOKEN="")) and "ready, takes" in done.stdout and done)
    assert done.returncode == 1 and "k3s token is missing" in done.stdout


@beside
def test_status_shows_the_newest_machine_and_the_one_that_is_asked_for(box, gateway):
    for machine_id in ("00000001", "00000002"):
        stopped(box.ready(gateway, "--machine-id", machine_id))
    assert json.loads(box.run("--status", "--json").stdout)["machine_id"] == "00000002"
    assert json.loads(box.run("--status", "--json", "--machine-id", "00000001").stdout)["machine_id"] == "00000001"


@beside
def test_status_record_shows_no_token_that_a_gateway_echoes(box, gateway):
    process = box.ready(gateway, "--k3s-token", K3S)
    gateway.always = says(500, {"message": f"bad {TOKEN} {urllib.parse.quote(K3S)}"})
    wait(lambda: "bad [redacted]" in record_of(box)["failure"], process.log)
    assert leaks(json.dumps(record_of(box)), TOKEN, K3S) == []
    record = record_of(box)
    assert record["failed"] > 0 and record["failing_since"] is not None and "trouble" in record["failure"]


@beside
def test_status_watch_draws_in_place_and_leaves_the_terminal_as_it_was(box, gateway):
    box.ready(gateway, "--k3s-token", K3S, "--offer-always")
    there, here = pty.openpty()
    fcntl.ioctl(here, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(here)
    process = subprocess.Popen([sys.executable, PROGRAM, "--status", "--watch"], stdin=here, stdout=here, stderr=here,
                               env=box.environ | {"PYTHONIOENCODING": "utf-8"}, start_new_session=True)
    box.started.append(process)
    shown = b""
    while shown.count(b"ready for") < 2:
        assert select.select([there], [], [], 30)[0]
        shown += os.read(there, 65536)
    assert stopped(process, signal.SIGINT) == 0
    while select.select([there], [], [], 0.3)[0]:
        shown += os.read(there, 65536)
    assert shown.startswith(b"\x1b[?1049h\x1b[?25l") and shown.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")
    assert termios.tcgetattr(here) == before
    for screen in shown.split(b"\x1b[H\x1b[J")[1:]:
        lines = re.sub(r"\x1b\[[?\d]*[a-zA-Z]", "", screen.decode()).split("\r\n")
        assert len(lines) <= 24 and max(map(len, lines)) <= 80
    os.close(there), os.close(here)


# --check
def check(box, gateway, *options, python=(), **environ):
    """Exit code, and what each check found."""
    done = box.run("--check", "--json", "--gateway-host", gateway.host, "--gateway-port", str(gateway.port), *options,
                   python=python, **environ)
    assert done.stderr == "", done.stderr
    found = collections.defaultdict(list)
    for finding in json.loads(done.stdout)["findings"]:
        found[finding["check"]].append((finding["result"], finding["text"]))
    return done.returncode, found


def listed(machine_id, status="ready"):
    return {"state": {"machine_id": machine_id, "status": status, "token": CONFIG_SECRET}, "metrics": {}}


def clock(seconds):
    """Answers with the clock of this machine, and so many seconds more."""
    return lambda link: says(200, {"status": "ok"}, "Date: " + email.utils.formatdate(
        time.time() + seconds, usegmt=True))(link) if link.call == "health" else late(0)(link)


def answers(call, *answer):
    return lambda link: says(*answer)(link) if link.call == call else late(0)(link)


def with_config(**change):
    """What the gateway's configuration is instead."""
    def change_it(gateway):
        gateway.contract.config = {**configuration("external"), **change} if change != {"config": None} else None
    return change_it


def pool_with(**fields):
    config = configuration("external")
    config["worker"]["pools"]["external"].update(fields)
    return lambda gateway: setattr(gateway.contract, "config", config)


def always(fault):
    return lambda gateway: setattr(gateway, "always", fault)


CHECKS = {  # what is done to the gateway, options, the check, its result and words
    "good-gateway": (always(None), [], "gateway", "ok", "answers in"),
    "gateway-away": (Gateway.stop, [], "gateway", "fail", "connection refused"),
    "gateway-unhealthy": (lambda it: setattr(it.contract, "health", (500, {"status": "not ok", "error": "redis"})), [],
                          "gateway", "fail", "Redis or database has trouble"),
    "gateway-html": (always(says(200, b"<html>")), [], "gateway", "fail", "Is this the gateway?"),
    "clock-good": (always(clock(20)), [], "gateway", "ok", "answers"),
    "clock-ahead": (always(clock(45)), [], "gateway", "warn", "timedatectl set-ntp true"),
    "clock-behind": (always(clock(-5000)), [], "gateway", "warn", "83 min apart"),
    "clock-garbage": (always(answers("health", 200, {"status": "ok"}, "Date: yesterday")), [], "gateway", "ok",
                      "answers"),
    "name": (always(None), ["--gateway-host", "a..b"], "gateway", "fail", "no address is known"),
    "public": (always(None), ["--gateway-host", "203.0.113.7"], "gateway", "fail", "--allow-cleartext"),
    "good-token": (always(None), [], "token", "ok", "ready machines of this pool: 0"),
    "token-401": (always(None), ["--token", "another-token"], "token", "fail", "unknown, expired or disabled"),
    "token-403": (always(None), ["--token", "workspace-token"], "token", "fail", "another kind"),
    "same-id": (lambda it: it.contract.list.append(listed(ID)), ["--machine-id", ID], "token", "fail",
                f"machine {ID} is ready already"),
    "other-id": (lambda it: it.contract.list.append(listed("00000001")), ["--machine-id", ID], "token", "ok",
                 "of this pool: 1"),
    "list-of-3-MB": (lambda it: it.contract.list.extend(listed("00000001") for _ in range(30_000)), [], "token", "ok",
                     "of this pool: 30000"),
    "list-too-large": (lambda it: it.contract.list.extend([listed("x" * 99)] * 30_000), [], "token", "fail",
                       "larger than 4096 KiB"),
    "good-keepalive": (always(None), [], "keepalive", "ok", "has the route"),
    "upstream": (always(answers("keepalive", 404, {"message": "Not Found"})), [], "keepalive", "fail",
                 "upstream gateway"),
    "good-pool": (always(None), [], "pool", "ok", "external takes"),
    "no-pool": (always(None), ["--pool-name", "gpus"], "pool", "fail", "no pool gpus: check --pool-name"),
    "local-pool": (pool_with(mode="local"), [], "pool", "fail", "of mode local"),
    "other-provider": (pool_with(provider="ec2"), [], "pool", "fail", "--provider-name ec2"),
    "large-cpu": (pool_with(pool_sizing={"default_worker_cpu": "999000m", "default_worker_memory": "1Gi"}), [], "pool",
                  "fail", "needs 999000m CPU"),
    "large-memory": (pool_with(pool_sizing={"default_worker_memory": "9999Gi"}), [], "pool", "fail", "9999Gi memory"),
    "capped": (always(None), ["--max-cpu", "0.5"], "pool", "fail", "raise --max-cpu"),
    "no-config": (with_config(config=None), [], "pool", "fail", "tailscale.directRedisHost"),
    "redis-away": (with_config(database={"redis": {"addrs": ["127.0.0.1:9"]}}), [], "pool", "fail",
                   "correct database.redis.addrs"),
    "setting": (always(None), ["--max-cpu", "x"], "settings", "fail", "--max-cpu: the value 'x'"),
    "settings": (always(None), ["--max-gpus", "x"], "gateway", "fail", "correct the settings above first"),
    "k3s-token": (always(None), [], "k3s", "warn", "--k3s-token-file is missing"),
    "hostname": (always(None), [], "k3s", "warn", "--hostname is missing"),
    "k3s-ca": (always(None), [], "workers", "warn", "give --k3s-ca-file"),
    "runtime": (always(None), [], "pool", "warn", "`kubectl get runtimeclass nvidia`"),
    "odd-runtime": (pool_with(runtime="../x y"), [], "pool", "ok", "external takes"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
@beside
def test_check_finds(box, gateway, name):
    change, options, which, result, words = CHECKS[name]
    change(gateway)
    code, found = check(box, gateway, *options)
    assert any(mark == result and words in text for mark, text in found[which]), found
    assert code == int(any(mark == "fail" for each in found.values() for mark, _ in each))
    assert all(text.isprintable() and CONFIG_SECRET not in text for each in found.values() for _, text in each)
    assert all(re.search("[a-z]: |[.;] |`", text) for each in found.values() for mark, text in each if mark != "ok")
    assert not (box.folder / "state").exists(), "nothing is changed"


@beside
def test_check_reaches_what_workers_need_without_a_word(box, gateway):
    heard, lock = [], threading.Lock()

    def listen():
        listener = socket.create_server(("127.0.0.1", 0))

        def accept():
            with listener.accept()[0] as sock, lock:
                heard.append(sock.recv(100))
        threading.Thread(target=accept, daemon=True).start()
        return listener.getsockname()[1]

    redis, grpc, juice, bucket, registry = (listen() for _ in range(5))
    gateway.contract.config = {
        **configuration("external"), "database": {"redis": {"addrs": [f"127.0.0.1:{redis}"]}},
        "gateway_service": {"grpc": {"external_host": "localhost", "external_port": grpc}},
        "storage": {"juicefs": {"redis_uri": f"redis://:{CONFIG_SECRET}@127.0.0.1:{juice}/0",
                                "aws_s3_bucket": f"http://127.0.0.1:{bucket}/juicefs"}}}
    gateway.contract.config["worker"]["image_registry"] = f"127.0.0.1:{registry}/beta9"
    _, found = check(box, gateway)
    reached = [text for mark, text in found["pool"] if mark == "ok" and "can be reached" in text]
    assert len(reached) == 5 and heard == [b""] * 5, found
    for setting in ("database.redis.addrs", "gateway_service.grpc.external_host", "storage.juicefs.redis_uri",
                    "storage.juicefs.aws_s3_bucket", "worker.image_registry"):
        assert setting in " ".join(reached)
    assert CONFIG_SECRET not in str(found)


@pytest.mark.parametrize("config", [
    {}, {"database": 5, "gateway_service": [], "storage": "x", "worker": {"image_registry": None}},
    {"database": {"redis": {"addrs": "redis:99999"}}}, {"database": {"redis": {"addrs": ["[::1", None, 7, "\x1b"]}}},
    {"storage": {"juicefs": {"redis_uri": "redis://u:p@h:x/"}}}], ids=["empty", "odd", "port", "garbage", "uri"])
def test_check_addresses_of_odd_configurations_are_what_can_be_read(config):
    for setting, host, port in b9.addresses_of(config):
        assert isinstance(host, str) and 0 <= port < 65536


@beside
def test_check_where_this_boxs_own_agent_runs_is_good(box, gateway):
    process = box.ready(gateway, "--machine-id", ID)
    gateway.contract.list.append(listed(ID))
    wait(lambda: record_of(box)["ready_since"])
    _, found = check(box, gateway, "--machine-id", ID)
    assert found["token"] == [("ok", "the gateway accepts it; ready machines of this pool: 1")]
    assert any("an agent runs here: ready" in text for _, text in found["machine"])
    stopped(process, signal.SIGKILL)
    assert check(box, gateway, "--machine-id", ID)[1]["token"][0][0] == "ok", "until its lease is over"
    record = box.folder / f"state/{ID}.status.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"lease_ends_at": 1.0}))
    assert check(box, gateway, "--machine-id", ID)[1]["token"][0][0] == "fail"


def jwt(seconds):
    claims = base64.urlsafe_b64encode(json.dumps({"exp": int(time.time() + seconds)}).encode()).decode().rstrip("=")
    return f"eyJhbGciOiJub25lIn0.{claims}.c2lnbmF0dXJl"


@pytest.mark.parametrize("token, result, words", [
    (jwt(-5), "fail", "has expired"), (jwt(86400 * 29), "warn", "expires in 28 days"), (jwt(86400 * 31), None, ""),
    ("no-jwt-at-all", None, ""), ("a.b.c-and-more", None, ""), ("eyJ.W10.eyJ-more", None, "")],
    ids=["expired", "soon", "later", "no-jwt", "dots", "list"])
@beside
def test_check_k3s_token_tells_its_end(box, gateway, token, result, words):
    _, found = check(box, gateway, BETA9_K3S_TOKEN=token)
    about = [(mark, text) for mark, text in found["k3s"] if "the k3s token" in text]
    assert len(about) == (result is not None) and token not in str(found)
    assert result is None or about[0][0] == result and words in about[0][1] and "kubectl create token" in about[0][1]


@beside
def test_check_gateway_that_hangs_takes_15_s_at_most(box, gateway):
    gateway.always = drips(HEAD, b"X: y\r\n")
    start = time.monotonic()
    code, found = check(box, gateway)
    assert code == 1 and time.monotonic() - start < 20, "more than 15 only where this machine is busy"
    for name in ("gateway", "token", "keepalive", "pool"):
        assert found[name][0][0] == "fail"
    assert found["machine"][0][0] == "ok"


@beside
def test_check_without_packages_says_how_to_get_them(box, gateway):
    code, found = check(box, gateway, python=["-S"])
    assert code == 1 and [text for mark, text in found["settings"] if "requests is not installed: " in text]
    assert found["gateway"][0][0] == "fail" and found["machine"]


@pytest.mark.parametrize("environ, signs, coloured", [
    ({}, "✓!✗", True), ({"NO_COLOR": "1"}, "✓!✗", False), ({"PYTHONIOENCODING": "ascii"}, "ok warn FAIL", True)],
    ids=["colours", "no-color", "ascii"])
@beside
def test_check_on_a_terminal_has_signs_and_colours(box, gateway, environ, signs, coloured):
    there, here = pty.openpty()
    done = subprocess.run([sys.executable, PROGRAM, "--check", "--gateway-port", "9", "--gateway-host", "127.0.0.1"],
                          env=box.environ | {"PYTHONIOENCODING": "utf-8"} | environ, stdin=here, stdout=here,
                          stderr=here, timeout=50)
    text = os.read(there, 65536).decode()
    assert done.returncode == 1 and all(sign in text for sign in (signs.split() if " " in signs else signs))
    assert ("\x1b[" in text) is coloured and ("\x1b[31m" in text) is coloured
    os.close(there), os.close(here)


@pytest.mark.slow
def test_check_gpus_tells_each_card(nvml_stub, tmp_path):
    write_gpus(tmp_path / "control", ".sx")
    code = "print([tuple(each) for each in b9.check_gpus()])"
    found = ast.literal_eval(run_python(code, stub_environment(nvml_stub, tmp_path / "control")))
    assert [mark for mark, _ in found[:3]] == ["ok", "warn", "fail"]
    assert "0: NVIDIA Stub 0, 81920 MiB, driver 550.1" in found[0][1] and "nvidia-smi -pm 1" in found[1][1]
    assert found[2][1].startswith("2: lost") and "nvidia-container-runtime" in found[3][1]
    code = "import sys\nsys.modules['pynvml'] = None\n" + code
    found = ast.literal_eval(run_python(code, stub_environment(nvml_stub, tmp_path / "control")))
    assert found[0][0] == "fail" and "nvidia-ml-py" in found[0][1]


PORT_6443 = threading.Lock()


@beside
def test_check_k3s_compares_the_certificates_of_loopback_and_hostname(box, gateway, certificates):
    with PORT_6443:
        for name, good in (("good", True), ("others", False)):
            with contextlib.closing(TlsGateway(tls_with(certificates, "good"), port=6443)), contextlib.closing(
                    TlsGateway(tls_with(certificates, name), host="127.0.0.2", port=6443)):
                _, found = check(box, gateway, "--hostname", "127.0.0.2", "--k3s-token", K3S, BETA9_K3S_URL="")
            assert ("ok", "127.0.0.1:6443 speaks TLS") in found["k3s"]
            assert found["k3s"][-1][0] == ("ok" if good else "warn"), found["k3s"]
        _, found = check(box, gateway, "--hostname", "127.0.0.2", "--k3s-token", K3S, BETA9_K3S_URL="")
        assert found["k3s"][-1][0] == "fail" and "systemctl status k3s" in found["k3s"][-1][1]


@pytest.mark.parametrize("argv, words", [
    (["--status", "--check"], "--check and --status are different actions"),
    (["--once", "--dry-run"], "--dry-run and --once are different actions"),
    (["--json"], "--json goes with --check or --status"), (["--watch", "--check"], "--watch goes with --status"),
    (["--fetch-from", "https://x/y"], "--fetch-from goes with --print-install"),
    (["--print-install", "--fetch-from", "http://x/y"], "--fetch-from: the value 'http://x/y' is not an address"),
    (["--print-install", "--fetch-from", "https://u:pass@x/y"], "--fetch-from: the value"),
    (["--print-file", "motd"], "--print-file: the script needs no file 'motd': give one of unit, ")],
    ids=lambda value: "-".join(value)[:30] if isinstance(value, list) else "")
@beside
def test_action_that_does_not_fit_ends_with_2(box, argv, words):
    done = box.run(*argv)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@beside
def test_root_in_another_users_state_folder_is_told_how_to_be_that_user(box, gateway):
    if os.getuid() != 0:
        pytest.skip("not root")
    (box.folder / "state").mkdir()
    os.chown(box.folder / "state", 1, 1)
    process = box.start(gateway)
    assert process.wait(30) == 2 and f"`runuser -u {pwd.getpwuid(1).pw_name} --`" in process.log()
    assert os.listdir(box.folder / "state") == []
    assert box.run("--status").returncode == 3 and check(box, gateway)[1]["machine"]
    assert os.listdir(box.folder / "state") == []


# ---- 12 Commands
@beside
def test_dev_once_ready_without_token(box):
    done = box.run("--dev", "--once", BETA9_TOKEN="")
    assert done.returncode == 0, done.stderr
    for words in ("gateway:", "registered", "ready after"):
        assert words in done.stderr
    assert not (box.folder / "state").exists() and done.stdout == ""


@beside
def test_dev_leaves_the_lock_of_the_real_agent_as_it_is(box):
    lock = box.folder / "state/abcdef01.lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    done = box.run("--dev", "--once", "--machine-id", "abcdef01")
    assert done.returncode == 0 and lock.stat().st_mtime == 0, done.stderr


@beside
def test_dev_with_a_long_interval_says_which_is_in_use(box):
    assert "the gateway forgets a machine after 300 s, so a keepalive goes every 100 s" in box.run(
        "--dev", "--once", "--keepalive-interval", "240").stderr


@beside
def test_dev_is_in_cleartext_whatever_the_gateway_needs(box):
    done = box.run("--dev", "--once", BETA9_TOKEN="", BETA9_TLS="1")
    assert done.returncode == 0, done.stderr


@beside
def test_dry_run_shows_settings_and_bodies_without_network(box, gateway):
    done = box.run("--dry-run", "--k3s-token", K3S, "--gateway-host", "127.0.0.1", BETA9_POOL_NAME="gpu",
                   BETA9_GATEWAY_PORT=str(gateway.port))
    assert done.returncode == 0 and gateway.connections == 0
    for line in ("pool_name: gpu  (BETA9_POOL_NAME)", f"token: set ({len(TOKEN)} characters)  (BETA9_TOKEN)",
                 f"k3s_token: set ({len(K3S)} characters)  (--k3s-token)",
                 "provider_name: generic  (default)", f"gateway_port: {gateway.port}  (BETA9_GATEWAY_PORT)"):
        assert line in done.stdout
    for words in ("machine/register", "machine/keepalive", '"free_gpu_count"'):
        assert words in done.stdout
    assert TOKEN not in done.stdout + done.stderr and K3S not in done.stdout + done.stderr
    assert not (box.folder / "state").exists()
    assert box.run("--dry-run", BETA9_TOKEN="").returncode == 2


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".b"], ids=["empty-label", "long-label"])
@beside
def test_dry_run_of_a_name_that_no_dns_can_hold_shows_the_bodies(box, host):
    done = box.run("--dry-run", "--gateway-host", host)
    assert (done.returncode, done.stdout.count(f"POST http://{host}:1994/")) == (0, 2), done.stderr


ENDS = {  # exit code, the calls that were made, words, options, and faults for register and keepalive
    "ok": (0, 2, "ready after", ["--once"], None, None),
    "401": (77, 1, "beta9 machine create", ["--once"], says(401, {"message": "Unauthorized"}), None),
    "401-for-a-while": (77, 0, "beta9 machine create", ["--startup-timeout", "2"],
                        says(401, {"message": "Unauthorized"}), None),
    "403": (77, 1, "beta9 machine create", [], says(403, {"message": "Invalid token"}), None),
    "keepalive-403": (77, 2, "beta9 machine create", [], None, says(403, {"message": "Invalid token"})),
    "no-pool": (78, 1, "--pool-name", [], says(500, {"message": "Invalid pool name"}), None),
    "bad-payload": (78, 1, "--dry-run", [], says(400, {"message": "Invalid payload"}), None),
    "upstream": (78, 2, "upstream", [], None, says(404, {"message": "Not Found"})),
    "500": (69, 1, "health", ["--once"], says(500, {"message": "Failed to register machine"}), None),
    "html": (69, 1, "Hotel", ["--once"], says(200, "<html>Hotel WiFi".encode()), None),
    "redirect": (69, 1, "/login", ["--once"], says(302, b"", "Location: /login"), None),
    "closed": (69, 1, "broke", ["--once"], breaks(b""), None),
    "forgotten-once": (69, 2, "does not know this machine", ["--once"], None, says(500, {"message": NOT_FOUND})),
    "500-for-a-while": (69, 0, "health", ["--startup-timeout", "2"], says(500), None),
    "500-one-try": (69, 1, "health", ["--startup-timeout", "0"], says(500), None),
}


@pytest.fixture(scope="module")
def ending(folders, request):
    """The selected rows of ENDS and BAD_STARTS, two at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(end, folders(), *ENDS[name]) if name in ENDS else
               pool.submit(folders().run, *BAD_STARTS[name][0], **BAD_STARTS[name][1])
               for name in selected(request, "ending")}


def end(box, code, calls, words, options, register, keepalive):
    """Exit code, log and number of requests of an agent that is answered so."""
    with contextlib.closing(Gateway()) as gateway:
        faults = {b9.REGISTER: register, b9.KEEPALIVE: keepalive}
        gateway.always = lambda link: (faults[link.call] or late(0))(link)
        process = box.start(gateway, *options)
        return process.wait(30), process.log(), len(gateway.seen)


@pytest.mark.parametrize("name", ENDS)
def test_start_answered_so_ends_with_this_exit_code(ending, name):
    code, calls, words = ENDS[name][:3]
    got, log, seen = ending[name].result()
    assert got == code and words in log and "Traceback" not in log, log
    assert seen == calls if calls else seen > 1


@beside
def test_start_gateway_that_comes_late_ready(box, gateway):
    gateway.stop()
    process = box.start(gateway)
    wait(lambda: "refused" in process.log(), process.log)
    gateway.start()
    wait(gateway.ready, process.log)
    assert process.poll() is None and "Is the gateway or its tunnel up?" in process.log()


@beside
def test_start_nobody_there_ends_with_69(box, gateway):
    gateway.stop()
    process = box.start(gateway, "--startup-timeout", "0.3")
    assert process.wait(30) == 69 and "giving up" in process.log()


@beside
def test_start_denied_ends_with_77_when_its_timeout_is_over(box, gateway):
    gateway.always = says(401, b'{"message": "Unauthorized"}')
    process = box.start(gateway, "--startup-timeout", "1", "--keepalive-interval", "60")
    assert process.wait(30) == 77 and "machine create" in process.log()


@beside
def test_start_interrupted_while_it_waits_for_its_token_leaves_no_traceback(box):
    process = subprocess.Popen(
        [sys.executable, PROGRAM, "--token-file", "-"], env=box.environ | {"BETA9_TOKEN": ""}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def begun():  # main opens /dev/null first
        with contextlib.suppress(FileNotFoundError):  # one closed while we look
            return "/dev/null" in [os.readlink(entry.path) for entry in os.scandir(f"/proc/{process.pid}/fd")]

    wait(begun)
    assert stopped(process, signal.SIGINT) == -signal.SIGINT and process.communicate() == ("", "")


# ---- 13 Entry
BAD_STARTS = {
    "port": (["--gateway-port", "99999"], {}, ["--gateway-port", "65535"]),
    "variable": ([], {"BETA9_MACHINE_ID": "xyz"}, ["--machine-id", "BETA9_MACHINE_ID", "8 hex"]),
    "host-with-scheme": (["--gateway-host", "http://gateway"], {}, ["--gateway-host", "scheme"]),
    "unknown-option": (["--gatway-host=x"], {}, ["--gatway-host"]),
    "word": ([TOKEN], {}, []),
    "unknown-option-with-token": ([f"--tokn={TOKEN}"], {}, ["--tokn"]),
    "no-token": ([], {"BETA9_TOKEN": ""}, ["--token", "beta9 machine create"]),
    "token-with-newline": ([], {"BETA9_TOKEN": f"{TOKEN}\nX: y"}, ["BETA9_TOKEN"]),
    "token-with-control-character": (["--token", f"{TOKEN}\x07"], {}, ["--token"]),
    "token-not-ascii": (["--token", f"{TOKEN}\u20ac"], {}, ["--token"]),
    "token-file-missing": (["--token-file", "/etc/no-token"], {"BETA9_TOKEN": ""}, ["/etc/no-token"]),
    "token-twice": (["--token-file", "-", "--token", TOKEN], {}, ["--token-file", "--token"]),
    "config-missing": (["--config", "/nowhere/config"], {}, ["/nowhere/config"]),
    "token-with-quote": (["--token", 'abcd"efgh'], {}, ["--token"]),
    "token-with-backslash": (["--token", "abcd\\efgh"], {}, ["--token"]),
    "token-file-binary": (["--token-file", sys.executable], {"BETA9_TOKEN": ""}, [sys.executable]),
}


@pytest.mark.parametrize("name", BAD_STARTS)
def test_entry_bad_setting_ends_with_2_and_one_line(ending, name):
    done, words = ending[name].result(), BAD_STARTS[name][2]
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert TOKEN not in done.stderr


@pytest.mark.parametrize("where", ["file", "stdin", "yaml", "json"])
@beside
def test_entry_token_from_elsewhere_is_sent(box, gateway, where):
    path = box.folder / where
    path.write_text({"file": f"{TOKEN}\r\n", "yaml": f"token: {TOKEN}\ngateway:\n  port: {gateway.port}\n",
                     "json": json.dumps({"token": TOKEN, "gateway": {"port": gateway.port}})}.get(where, ""))
    options = ["--config", str(path)] if where in ("yaml", "json") else [
        "--gateway-port", str(gateway.port), "--token-file", "-" if where == "stdin" else str(path)]
    done = box.run(*options, "--once", "--gateway-host", "127.0.0.1", input=f"{TOKEN}\n", BETA9_TOKEN="")
    assert done.returncode == 0, done.stderr
    assert gateway.seen[-1].headers["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("text, millicores", [("32.3", 32300), ("2.01", 2010), ("0.1", 100), ("8", 8000)])
def test_option_max_cpu_is_exact(text, millicores):
    assert config_of("--max-cpu", text).max_cpu == millicores


@pytest.mark.parametrize("option", ["--version", "--help", "--dry-run"])
@beside
def test_entry_under_python_without_docstrings_the_same(box, option):
    assert box.run(option, python=["-OO"]).returncode == 0


@beside
def test_entry_version_needs_no_settings(box):
    done = box.run("--version", BETA9_CONFIG="/nonexistent", BETA9_TOKEN="")
    digest = subprocess.check_output(["sha256sum", PROGRAM], text=True)[:12]
    assert done.returncode == 0 and done.stdout == f"beta9-agent {b9.VERSION} ({digest})\n"


@pytest.mark.parametrize("text", ["k3s_token: null\n", "k3s_token: ~\n", '{"k3s_token": null}'],
                         ids=["null", "tilde", "json"])
def test_config_file_null_is_unset(tmp_path, text):
    (tmp_path / "c").write_text(text)
    assert config_of("--config", str(tmp_path / "c")).k3s_token is None


def test_config_file_empty_key_is_unknown(tmp_path):
    (tmp_path / "c").write_text('{"": "true"}')
    with pytest.raises(b9.AgentError, match="unknown key"):
        settings_of("--config", str(tmp_path / "c"))


def test_token_file_is_named_as_the_source(tmp_path):
    (tmp_path / "t").write_text(MACHINE_TOKEN)
    config, _ = settings_of("--token-file", str(tmp_path / "t"))
    assert config.sources["token"] == str(tmp_path / "t")


@beside
def test_entry_command_of_machine_create_pasted_whole_works(box):
    with contextlib.closing(Gateway(pool="gpu")) as gateway:
        process = box.start(
            gateway, "--token", TOKEN, "--machine-id", "1165A9B6", "--tailscale-url", "http://ts-url",
            "--tailscale-auth", "ts-auth-key", "--pool-name", "gpu", "--provider-name", "generic",
            "--flux-upstream", "fl-up", "--flux-branch", "fl-br", "--flux-github-token", "fl-tok", "--once")
        assert process.wait(30) == 0 and machine_of(gateway) == "1165a9b6"
        line = next(line for line in process.log().splitlines() if "--tailscale-auth" in line)
        assert "--flux-github-token" in line
        assert not re.search("ts-url|ts-auth-key|fl-up|fl-br|fl-tok", process.log())


@beside
def test_entry_package_missing_in_a_venv_names_its_own_pip(box):
    done = box.run("--dev", "--once", python=["-S"])
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "the Python package requests is missing" in done.stderr
    assert f"`{sys.executable} -m pip install requests psutil nvidia-ml-py pyyaml`" in done.stderr


@beside
def test_entry_package_missing_where_pip_refuses_names_what_this_machine_has(box):
    """As on Debian 12, whose pip installs nothing into the system's own Python (PEP 668)."""
    system = pathlib.Path("/usr/bin/python3")
    marked = list(pathlib.Path("/usr/lib").glob("python3.*/EXTERNALLY-MANAGED"))
    if not system.exists() or not marked:
        pytest.skip("this system's own Python takes packages from pip")
    for name in ("uv", "apt-get"):
        stub(box.folder / "tools" / name)
    for tools, words in ((box.folder / "tools", ["apt-get install python3-requests", "uv run"]),
                         (box.folder, [".venv/bin/pip install requests"])):
        done = subprocess.run([system, "-S", PROGRAM, "--dev"], capture_output=True, text=True, timeout=50,
                              env=box.environ | {"PATH": str(tools)})
        assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr
        assert "python3 -m pip" not in done.stderr


@pytest.mark.parametrize("option", ["--help", "--version"])
@beside
def test_entry_answers_without_packages(box, option):
    done = box.run(option, python=["-S"], BETA9_TOKEN="")
    assert done.returncode == 0 and done.stderr == ""
    assert re.match("usage: |beta9-agent [0-9.]+ .[0-9a-f]{12}", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("path, code, passed", [("/nowhere", 1, 0), (None, 0, 1)], ids=["no-cc", "cc"])
def test_suite_without_a_compiler_skips_what_needs_it_and_fails_where_nothing_passed(path, code, passed):
    """One test that needs the stub of the driver's library, then others."""
    environ = os.environ if path is None else os.environ | {"PATH": path}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "test_list_gpus_asked_again"], text=True,
                          cwd=SOURCE.parent, env=environ, capture_output=True, timeout=100)
    assert done.returncode == code and f"{passed or 'no'} passed" in done.stdout.replace("1 skipped", "no passed")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "list_gpus or test_backoff"], text=True,
                          cwd=SOURCE.parent, env=environ, capture_output=True, timeout=100)
    assert done.returncode == 0 and int(re.search(r"(\d+) passed", done.stdout)[1]) >= 35


@pytest.mark.parametrize("option", ["--dry-run", "--help"])
@beside
def test_entry_answer_into_a_closed_pipe_is_quiet(box, option):
    done = subprocess.run([*SHELL, 'exec 3>&1; "$@" 2>&3 | true', "sh", sys.executable, PROGRAM, option],
                          env=box.environ, capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("option", ["--dry-run", "--help", "--version"])
@beside
def test_entry_answer_onto_a_full_disk_says_so(box, option):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, PROGRAM, option], env=box.environ, stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=50)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "No space left on device" in done.stderr


@beside
def test_entry_version_of_what_came_through_a_pipe(box):
    done = subprocess.run([sys.executable, "-", "--version"], input=TEXT, env=box.environ,
                          capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"beta9-agent {b9.VERSION} (")


@beside
def test_dry_run_without_a_kept_id_says_so_and_with_one_shows_it(box, gateway):
    shown = box.run("--dry-run").stdout
    assert shown.count("new at the first start") > 1 and "hostname: not set\n" in shown
    assert "missing" not in shown.replace("offers no CPU yet: the k3s token is missing", "")
    stopped(box.ready(gateway))
    shown = box.run("--dry-run").stdout
    assert f"machine_id: {machine_of(gateway)}\n" in shown and "new at" not in shown


@beside
def test_start_that_gives_up_says_so_in_one_line_without_a_next_try(box, gateway):
    gateway.always = says(500, {"message": "Failed to register machine"})
    process = box.start(gateway, "--startup-timeout", "0")
    assert process.wait(30) == 69
    about = [line for line in process.log().splitlines() if " 500 " in line]
    assert len(about) == 1 and "giving up" in about[0] and "again" not in about[0]


def test_announce_cap_above_what_is_there_is_told_in_cores(gateway, log_lines):
    agent_of(gateway.port, "--max-cpu", "9999").announce()
    said, = [line for line in log_lines if "max_cpu" in line]
    assert said.startswith(f"max_cpu is 9999, but there is only {psutil.cpu_count()}, ")


def test_unused_options_are_named_alone(log_lines):
    config_of("--flux-branch", "main")
    assert log_lines == ["accepted, but not needed by this agent: --flux-branch"]


@beside
def test_entry_unexpected_error_ends_with_1_and_one_line(box):
    done = subprocess.run([*SHELL, 'exec "$@" --dry-run >/dev/full', "sh", sys.executable, PROGRAM],
                          env=box.environ, stderr=subprocess.PIPE, text=True, timeout=50)
    assert done.returncode != 0 and "Traceback" not in done.stderr


# ---- README's services
README = SOURCE.with_name("README.md").read_text()


def block(mark):
    """The fenced block that follows `<!-- mark -->` in README.md."""
    return re.search(rf"^<!-- {re.escape(mark)} -->\n```\w+\n(.*?)^```$", README, re.S | re.M)[1]


needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")


def analyze(*argv):
    return subprocess.run(["systemd-analyze", "--no-pager", *argv], capture_output=True, text=True,
                          timeout=50)


def shell(command, folder, **env):
    return subprocess.run(["sh", "-c", command], cwd=folder, env=os.environ | env, capture_output=True,
                          text=True, timeout=50)


def mode_of(path):
    return path.stat().st_mode & 0o777


def stub(path, text="exit 0"):
    """A program. Another process writes it: were it open here, a child that another thread forks then would hold
    it open, and it could not be run ("Text file busy").
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tee", path], input=f"#!/bin/sh\n{text}\n".encode(), stdout=subprocess.DEVNULL, check=True)
    path.chmod(0o755)


# ---- 13 Install
ODD_NAMES = {"quotes": "it's \"x\" $(y)", "shell": "a\\b `c` ${d} !e; f & g | h > i # j *",
             "words": "{token} {payload}", "end": "BETA9_END", "yaml": "- x: [y, {z}] # %TAG & * ! yes 1e3",
             "latin": "\u00e9\u00df", "far": "\u20ac\U0001f600\u2028"}
WELL = ("--gateway-host", "127.0.0.1", "--hostname", "box", "--offer-always", "--k3s-token", K3S)
needs_shellcheck = pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
SYSTEM_PYTHON = "/usr/bin/python3"
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare") or subprocess.call(
        ["sh", "-c", f"{SYSTEM_PYTHON} -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>&-"]) != 0,
    reason="needs root, unshare, and Python 3.10 with venv in /usr/bin")


def prints(*options, program=PROGRAM, python=(), action="--print-install", **environ):
    """What the program prints, into a pipe."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BETA9_")}
    return subprocess.run([sys.executable, *python, program, action, *options], capture_output=True, text=True,
                          timeout=50, env=kept | environ)


def printed(*options, **more):
    """The script."""
    done = prints(*options, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def heredoc(script, of):
    """What stands in the script for a command that begins so."""
    return re.search(rf"^{re.escape(of)}[^\n]*<<'BETA9_END'\n(.*?)^BETA9_END$", script, re.S | re.M)[1]


FORMS = {"carried": ["--token", TOKEN, *WELL], "fetched": ["--fetch-from", "https://x.example/agent.py?a=b&c='d'"],
         "odd": ["--pool-name", ODD_NAMES["shell"], "--provider-name", ODD_NAMES["quotes"]],
         "k3s-use": ["--fetch-from", "https://x.example/agent.py", "--k3s", "use"],
         "k3s-install": ["--fetch-from", "https://x.example/agent.py", "--k3s", "install", "--k3s-version",
                         "v1.34.3+k3s1", "--k3s-installer-sha256", "0" * 64]}


@pytest.mark.slow
@needs_shellcheck
@pytest.mark.parametrize("form", [*FORMS, "uninstall"])
@beside
def test_print_install_script_is_sh_in_which_shellcheck_finds_nothing(form):
    script = prints(action="--print-uninstall").stdout if form == "uninstall" else printed(*FORMS[form])
    for words in (["sh", "-n"], ["bash", "--posix", "-n"], ["shellcheck", "--shell=sh", "-"]):
        done = subprocess.run(words, input=script, capture_output=True, text=True, timeout=50)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), words


@pytest.mark.parametrize("more", [[], ["--k3s", "use"], ["--k3s", "install"]], ids=["plain", "k3s-use", "k3s-install"])
@beside
def test_print_install_script_fits_into_user_data(more):
    """As it is with --fetch-from, into that of EC2 too; else after gzip, which cloud-init undoes."""
    options = FORMS["carried"][:-2] + more
    done, fetched = prints(*options), prints(*options, *FORMS["fetched"])
    size, packed = len(done.stdout.encode()), len(gzip.compress(done.stdout.encode()))
    print(f"the script has {size} bytes, {packed} after gzip, {len(fetched.stdout)} with --fetch-from")
    assert packed < 65536 and size < 82_000 and 0 < len(fetched.stdout.encode()) < 16384
    assert ("print this through `gzip`" in done.stderr) is (size >= 65536) and "gzip" not in fetched.stderr


CLOUD_INIT = """
import sys
from cloudinit import helpers, user_data, util
message = user_data.UserDataProcessor(helpers.Paths({})).process(sys.stdin.buffer.read())
part, = [part for part in message.walk() if part.get_content_maintype() != "multipart"]
print(part.get_content_type(), util.fully_decoded_payload(part), sep="\\n", end="")
"""


@pytest.mark.skipif(not shutil.which("cloud-init"), reason="no cloud-init here")
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@beside
def test_print_install_script_is_a_script_to_cloud_init(pack):
    script = printed(*FORMS["carried"])
    done = subprocess.run([SYSTEM_PYTHON, "-c", CLOUD_INIT], input=pack(script.encode()), capture_output=True,
                          timeout=50)
    assert done.stdout.decode() == f"text/x-shellscript\n{script}", done.stderr


@beside
def test_print_install_script_carries_this_very_file():
    text = heredoc(printed(), '"$base" -I -c')
    assert bz2.decompress(base64.b85decode(text.replace("\n", ""))) == SOURCE.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD_NAMES)
@beside
def test_print_install_odd_name_reaches_the_agent_as_it_was_typed(name):
    """Through the shell, with a program whose output is ASCII."""
    script = printed("--pool-name", ODD_NAMES[name], "--provider-name", "p", PYTHONIOENCODING="ascii")
    text = subprocess.run(["sh"], input=f"cat <<'BETA9_END'\n{heredoc(script, 'cat')}BETA9_END\n", text=True,
                          capture_output=True, timeout=50).stdout
    settings = b9.parse_tree(text)
    assert settings["pool_name"] == ODD_NAMES[name] and settings["provider_name"] == "p"
    assert settings["token_file"] == "/etc/beta9-agent/token"


@beside
def test_print_install_settings_are_those_that_were_given(box):
    (box.folder / "c").write_text("gateway:\n  port: 1234\nmax_cpu: 2\nstate_dir: /elsewhere\n")
    script = printed("--config", str(box.folder / "c"), "--tls", "--token", TOKEN, "--hostname", "h",
                     BETA9_MAX_GPUS="3")
    assert b9.parse_tree(heredoc(script, "cat")) == {
        "state_dir": "/var/lib/beta9-agent", "token_file": "/etc/beta9-agent/token", "gateway.port": "1234",
        "gateway.tls": "yes", "max_cpu": "2", "max_gpus": "3"}
    assert "${BETA9_HOSTNAME:-h}" in script
    assert "--state-dir is left out" in prints("--state-dir", "/elsewhere").stderr


@beside
def test_print_install_root_certificates_keep_their_place(certificates):
    path = os.path.relpath(certificates / "ca.pem")
    done = prints("--ca-file", path)
    assert b9.parse_tree(heredoc(done.stdout, "cat"))["gateway.ca_file"] == str(certificates / "ca.pem")
    assert f"{certificates / 'ca.pem'} must be on the machine too" in done.stderr


@beside
def test_print_install_tokens_go_into_a_pipe_with_a_warning():
    done = prints("--token", TOKEN, "--k3s-token", K3S)
    assert f"token={TOKEN}\n" in done.stdout and f"k3s_token={K3S}\n" in done.stdout
    line, note = done.stderr.splitlines()
    assert "what is printed holds the tokens" in line and "INFO for user-data" in note and TOKEN not in done.stderr


@beside
def test_print_install_tokens_do_not_show_on_a_terminal():
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, PROGRAM, "--print-install", "--token", TOKEN, "--k3s-token", K3S])
    shown = b""
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 65536):
            shown += data
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = shown.decode()
    assert text.count("\u2026") == 4 and "on a terminal tokens are not shown" in text
    assert leaks(text, TOKEN, K3S) == []


@beside
def test_print_install_without_token_warns_of_nothing():
    assert prints("--fetch-from", "https://x.example/y", "--k3s", "use").stderr == ""
    assert "no work will come without a k3s token: give --k3s use" in prints().stderr


@beside
def test_print_install_machine_id_warns_of_more_machines():
    done = prints("--machine-id", "1165A9B6")
    assert "${BETA9_MACHINE_ID:-1165a9b6}" in done.stdout and "one machine only" in done.stderr


@beside
def test_print_install_packages_are_those_of_this_interpreter():
    line = re.search("^packages='(.*)'$", printed(), re.M)[1]
    assert line.split() == [f"{name}=={importlib.metadata.version(name)}" for name in b9.PACKAGES]


@beside
def test_print_install_packages_that_are_missing_stay_open_with_a_warning():
    done = prints(python=["-S"])
    assert f"\npackages='{' '.join(b9.PACKAGES)}'\n" in done.stdout
    assert done.stderr.count("is not installed here, so its version is left open") == len(b9.PACKAGES)


@beside
def test_print_install_of_what_came_through_a_pipe_says_to_save_it():
    done = subprocess.run([sys.executable, "-", "--print-install"], input=TEXT, capture_output=True, text=True,
                          timeout=50)
    assert (done.returncode, done.stdout) == (2, "") and "save it" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@beside
def test_print_install_bad_setting_prints_no_script():
    done = prints("--pool-name", "a\nb")
    assert (done.returncode, done.stdout) == (2, "") and "--pool-name" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("form", ["carried", "fetched", "uninstall"])
@beside
def test_print_install_script_that_is_cut_off_runs_nothing(box, form):
    """As a user who may not install anything, where all that its words could mean is a program that says so."""
    script = prints(action="--print-uninstall").stdout if form == "uninstall" else printed(*FORMS[form])
    os.chmod(ROOT, 0o755)
    os.chmod(box.folder, 0o755)
    for word in [*("main"[:size] for size in range(1, 5)), *("exit"[:size] for size in range(1, 4))]:
        stub(box.folder / word, "echo started")
    (box.folder / "script").write_text(script)
    start, end = script.index("{ main() {"), len(script.encode()) - 1
    some = random.Random(1).sample(range(start), 40) + random.Random(2).sample(range(start, end), 40)
    cuts = [*some, *range(start, start + 30), *range(end - 30, end)]
    loop = 'for cut; do echo $cut; head -c $cut script | env -i PATH=. /bin/sh; done 2>&1'
    done = subprocess.run([*SHELL, loop, "sh", *map(str, cuts)], cwd=box.folder, capture_output=True, text=True,
                          timeout=50, user="nobody" if os.geteuid() == 0 else None)
    assert done.stdout.startswith(f"{cuts[0]}\n") and f"\n{cuts[-1]}\n" in done.stdout
    assert "started" not in done.stdout and "beta9-agent:" not in done.stdout
    if os.geteuid() == 0:   # else it would begin
        done = subprocess.run(["/bin/sh"], input=script, capture_output=True, text=True, timeout=50, user="nobody")
        assert done.returncode == 1 and "beta9-agent: this must run as root" in done.stderr


UNIT_LINES = [line for line in b9.UNIT.splitlines() if "=" in line]


@pytest.fixture
def unit(tmp_path):
    """The unit as a file, with a program that is there."""
    path = tmp_path / "beta9-agent.service"
    path.write_text(re.sub("^ExecStart=.*", f"ExecStart={sys.executable} {SOURCE}", b9.UNIT, flags=re.M))
    return str(path)


@needs_systemd
def test_unit_verified_by_systemd_is_silent(unit):
    done = analyze("verify", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_unit_exposure_is_at_most_2_5(unit):
    if "--offline" not in analyze("--help").stdout:
        pytest.skip("systemd before 250 rates no file")
    done = analyze("security", "--offline=true", unit)
    found = float(re.search(r"exposure level for beta9-agent.service: ([0-9.]+)", done.stdout)[1])
    print(f"`systemd-analyze security` says {found} of 10")
    assert found <= 2.5


@pytest.mark.parametrize("line", [
    "Type=notify", "TimeoutStartSec=infinity", "WatchdogSec=120", "Restart=always", "RestartSec=30",
    "StartLimitIntervalSec=0", "RestartPreventExitStatus=2", "KillMode=mixed", "User=beta9-agent",
    "StateDirectory=beta9-agent", "NoNewPrivileges=yes", "LimitCORE=0", "After=multi-user.target",
    "WantedBy=multi-user.target", "ExecStart=/opt/beta9-agent/venv/bin/python -I /opt/beta9-agent/beta9_agent.py"
    " --config /etc/beta9-agent/agent.yaml"])
def test_unit_directive_is_there_once(line):
    assert UNIT_LINES.count(line) == 1


def test_unit_what_would_hide_gpus_or_proc_is_not_there():
    names = {line.split("=")[0] for line in UNIT_LINES}
    assert names.isdisjoint({"PrivateDevices", "DeviceAllow", "DevicePolicy", "ProtectClock", "ProcSubset",
                             "PrivateNetwork", "PrivateUsers", "MemoryDenyWriteExecute", "RootDirectory"})
    families = next(line for line in UNIT_LINES if line.startswith("RestrictAddressFamilies="))
    assert {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"} <= set(families.split("=")[1].split())


def test_unit_holds_no_secret_and_no_setting():
    assert not any(line.startswith(("Environment", "PassEnvironment=")) for line in UNIT_LINES)
    assert "token" not in b9.UNIT.lower() and "BETA9_" not in b9.UNIT


class Network:
    """A network namespace with nothing but loopback in it."""

    def __init__(self):
        self.file = None

    def do(self, make):
        """What `make` returns in there; threads that it starts stay."""
        def inside():
            if self.file is None:
                assert libc.unshare(0x40000000) == 0, os.strerror(ctypes.get_errno())    # CLONE_NEWNET
                with socket.socket() as sock:
                    up = struct.pack("16sh14x", b"lo", 1)                 # IFF_UP
                    fcntl.ioctl(sock, 0x8914, up)                         # SIOCSIFFLAGS
                self.file = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            else:
                assert libc.setns(self.file, 0) == 0, os.strerror(ctypes.get_errno())
            return make()

        libc = ctypes.CDLL(None, use_errno=True)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:    # it ends in there
            return thread.submit(inside).result()


# Process 1 of a root: as much of systemd as the script uses, and the service as its unit says.
MANAGER = r'''
import json, os, re, select, signal, socket, subprocess, time
UNIT = "/etc/systemd/system/beta9-agent.service"
WANTED = "/etc/systemd/system/multi-user.target.wants/beta9-agent.service"
commands, notes = (socket.socket(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM))
notes.bind("/run/notify")
os.chmod("/run/notify", 0o666)
commands.bind("/run/systemctl")
commands.listen()
state, pid, due, loaded, processes, seen = "inactive", 0, None, "", [], []

def load():
    return open(UNIT).read() if os.path.exists(UNIT) else ""

def start():
    unit = dict(re.findall("^([A-Za-z]+)=(.*)$", loaded, re.M))
    user, folder = unit["User"], "/var/lib/" + unit["StateDirectory"]
    os.makedirs(folder, exist_ok=True)
    subprocess.run(["chown", f"{user}:{user}", folder], check=True)
    hide = "mount -t tmpfs none /home && mount -t tmpfs none /root" if unit["ProtectHome"] == "yes" else ":"
    words = ["unshare", "--mount", "--propagation=unchanged", "sh", "-c",
             f'{hide} && exec setpriv --reuid {user} --regid {user} --clear-groups "$@"',
             "sh", *unit["ExecStart"].split()]
    with open("/var/log/agent", "ab") as log:
        process = subprocess.Popen(words, env={"NOTIFY_SOCKET": "/run/notify", "PATH": "/usr/sbin:/usr/bin"},
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log, umask=int(unit["UMask"], 8))
    processes.append(process)
    return process.pid

def answer_timer(verb, name):
    """Its service runs once, when it is started."""
    path, link = "/etc/systemd/system/" + name, "/etc/systemd/system/timers.target.wants/" + name
    if verb == "enable":
        os.makedirs(os.path.dirname(link), exist_ok=True)
        if not os.path.islink(link):
            os.symlink(path, link)
    elif verb == "disable":
        os.unlink(link)
        os.rmdir(os.path.dirname(link))
    elif verb == "restart":
        service = dict(re.findall("^([A-Za-z]+)=(.*)$", open(path.replace(".timer", ".service")).read(), re.M))
        subprocess.run(["install", "-d", "-m", service["RuntimeDirectoryMode"], "-g", service["Group"],
                        "/run/" + service["RuntimeDirectory"]], check=True)
        with open("/var/log/timer", "ab") as log:
            processes.append(subprocess.Popen(service["ExecStart"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                              env={"PATH": "/usr/sbin:/usr/bin"}))

def answer(words):
    global state, pid, due, loaded
    verb, *names = [word for word in words if not word.startswith("-")]
    for name in names:
        if name.endswith(".timer"):
            answer_timer(verb, name)
    if names and all(name.endswith(".timer") for name in names):
        return 0, ""
    if verb in ("enable", "disable") and not os.path.exists(UNIT):
        return 1, ""
    if verb == "daemon-reload":
        loaded = load()
    elif verb == "enable":
        os.makedirs(os.path.dirname(WANTED), exist_ok=True)
        if not os.path.islink(WANTED):
            os.symlink(UNIT, WANTED)
    elif verb == "disable":
        if os.path.islink(WANTED):
            os.unlink(WANTED)
            os.rmdir(os.path.dirname(WANTED))
        if "--now" in words and pid:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
            state, pid, due = "inactive", 0, None
    elif verb == "restart":
        due = time.monotonic()
        if pid:
            state = "deactivating"
            os.kill(pid, signal.SIGTERM)
    elif verb == "is-active":
        return (0 if state == "active" else 3), state + "\n"
    elif verb == "state":
        return 0, json.dumps({"state": state, "pid": pid, "seen": seen, "enabled": os.path.islink(WANTED)})
    else:
        return 1, ""
    return 0, ""

loaded = load()
if os.path.islink(WANTED):
    due = 0
print("up", flush=True)
while True:
    ready = select.select([commands, notes], [], [], 0.05)[0]
    if notes in ready and b"READY=1" in notes.recv(4096) and state == "activating":
        state = "active"
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if not child:
            break
        if child == pid:
            pid, code = 0, os.waitstatus_to_exitcode(status)
            if state == "deactivating":
                state = "inactive"
            elif code == 2:
                state = "failed"
            else:
                state, due = "activating", time.monotonic() + 1
    if due is not None and not pid and time.monotonic() >= due:
        pid, state, due = start(), "activating", None
    if commands in ready:
        with commands.accept()[0] as sock, sock.makefile("rw") as file:
            words, environ = json.loads(file.readline())
            seen.append([words, environ])
            file.write(json.dumps(answer(words)))
'''
SYSTEMCTL = """#!/usr/bin/python3 -I
import json, os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect("/run/systemctl")
file = sock.makefile("rw")
file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
file.flush()
code, text = json.loads(file.readline())
print(text, end="")
sys.exit(code)
"""
BOOT = r"""
set -e
cd "$1"
mount --rbind /usr usr
mount -o remount,bind,ro usr
mount --bind local usr/local
mount --rbind /dev dev
mount -t proc proc proc
mount -t tmpfs tmpfs run
mkdir -p run/systemd/system
eval "$2"
exec chroot . /usr/bin/python3 -I /manager.py
"""
OF_ETC = ("passwd", "group", "shadow", "gshadow", "login.defs", "nsswitch.conf", "ld.so.cache", "ld.so.conf",
          "ld.so.conf.d", "pam.d", "security", "alternatives", "default", "hosts")


class Root:
    """A root of its own, in which all but systemd is real; packages come from a folder, the network is loopback."""

    def __init__(self, before="", template=None):
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=ROOT))
        for name in ("usr", "dev", "proc", "run", "tmp", "home", "root", "opt", "var/lib", "var/log", "local/bin",
                     "etc/systemd/system", "etc/ssl/certs"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "tmp").chmod(0o1777)
        for name in ("bin", "sbin", "lib", "lib32", "lib64"):
            if os.path.islink(f"/{name}"):
                os.symlink(os.readlink(f"/{name}"), self.folder / name)
        sources = [f"/etc/{name}" for name in OF_ETC if os.path.exists(f"/etc/{name}")]
        subprocess.run(["cp", "-a", *sources, self.folder / "etc"], check=True)
        (self.folder / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        shutil.copytree(wheels(), self.folder / "wheels")
        (self.folder / "manager.py").write_text(MANAGER)
        self.program("systemctl", SYSTEMCTL)
        self.program("journalctl", "#!/bin/sh\nexec tail -n 5 /var/log/agent\n")
        if template:
            kept = [template.folder / name for name in ("etc", "opt", "var")]
            subprocess.run(["cp", "-a", *kept, self.folder], check=True)
            shutil.copy(template.folder / "local/bin/beta9-agent", self.folder / "local/bin")
        self.network = Network()
        self.gateway = self.network.do(lambda: Gateway(port=1994))
        self.holder = subprocess.Popen(
            ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.network.file}", "unshare", "--mount", "--pid", "--fork",
             "--kill-child", "sh", "-c", BOOT, "sh", self.folder, before], stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout.readline() == "up\n"
        self.pid = psutil.Process(self.holder.pid).children()[0].pid

    def program(self, name, text):
        """Puts a program where it is found before others of its name."""
        path = self.folder / "local/sbin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *words, cwd="/", **environ):
        return subprocess.Popen(
            ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--root", "--wd", "env", "-i", "-C", cwd,
             "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
             *(f"{name}={value}" for name, value in environ.items()), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def run(self, *words, input="", **more):
        """What a program in here printed, and its exit code."""
        process = self.start(*words, **more)
        output, errors = process.communicate(input, timeout=100)
        return subprocess.CompletedProcess(words, process.returncode, output, errors)

    def install(self, script, code=0, shell="sh", **more):
        done = self.run(shell, input=script, **more)
        assert done.returncode == code, done
        return done

    def state(self):
        return json.loads(self.run("systemctl", "state").stdout)

    def pid_of_ready(self):
        """The process of the service, once it is ready."""
        wait(lambda: self.state()["state"] == "active", self.log)
        return self.state()["pid"]

    def log(self):
        path = self.folder / "var/log/agent"
        return path.read_text() if path.exists() else ""

    def etc(self, name):
        return (self.folder / "etc/beta9-agent" / name).read_text()

    def tree(self):
        """Path -> owner, mode and content of all that can change, the packages' content left out."""
        found = {}
        for top in ("etc", "opt", "var/lib", "local", "home", "root", "tmp"):
            for path in sorted((self.folder / top).rglob("*")):
                status, name = path.lstat(), str(path.relative_to(self.folder))
                content = path.read_bytes() if path.is_file() and "/venv/" not in name else b""
                if not re.fullmatch(r"etc/(passwd|shadow|group|gshadow|subuid|subgid)-|etc/\.pwd\.lock", name):
                    found[name] = status.st_uid, status.st_gid, oct(status.st_mode), content
        return found

    def close(self):
        self.holder.kill()      # and with it process 1, and so all
        self.holder.wait()
        self.holder.stdout.close()
        self.gateway.stop()
        os.close(self.network.file)


def once(make):
    """What is made once, by whoever comes first."""
    lock, made = threading.Lock(), []

    def get():
        with lock:
            made[:] = made or [make()]
        return made[0]
    return get


@once
def wheels():
    """A folder of the packages that are installed here, packed again, without what fits one Python alone."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=ROOT))
    for name in b9.PACKAGES:
        package = importlib.metadata.distribution(name)
        files = {str(path): path.locate() for path in package.files if ".." not in path.parts
                 and "__pycache__" not in path.parts and (path.suffix != ".so" or ".abi3." in path.name)}
        info = next(path.split("/")[0] for path in files if path.endswith(".dist-info/WHEEL"))
        binary = any(path.endswith(".so") for path in files)
        tags = re.findall("^Tag: (.*)", package.read_text("WHEEL"), re.M) if binary else ["py3-none-any"]
        with zipfile.ZipFile(folder / f"{info.removesuffix('.dist-info')}-{tags[-1]}.whl", "w") as wheel:
            for path, source in files.items():
                if path not in (f"{info}/RECORD", f"{info}/WHEEL"):
                    wheel.write(source, path)
            wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: {str(not binary).lower()}\n"
                           + "".join(f"Tag: {tag}\n" for tag in tags))
            wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in files))
    return folder


@once
def template():
    """A root in which the agent is installed."""
    with contextlib.closing(Root()) as root:
        root.install(printed("--token", TOKEN, *WELL))
    return root


@provided
def root(stack, made):
    """A bare one."""
    return stack.enter_context(contextlib.closing(Root()))


@provided
def installed(stack, made):
    """One in which the agent was installed, and runs since it was booted."""
    root = stack.enter_context(contextlib.closing(Root(template=template())))
    root.pid_of_ready()
    return root


@provided
def another(stack, made):
    """Another version of the program."""
    path = pathlib.Path(tempfile.mkdtemp(dir=ROOT)) / "beta9_agent.py"
    path.write_text(TEXT + "# another\n")
    return path


OPT, ETC = "opt/beta9-agent", "etc/beta9-agent"


@needs_root
@pytest.mark.slow
@beside
def test_install_upgrade_uninstall_in_a_bare_root(root, another):
    """From a folder in which somebody left modules for root to run."""
    for name in ("venv", "pip", "bz2", "base64", "ensurepip", "requests", "yaml"):
        (root.folder / f"tmp/{name}.py").write_text("open('/tmp/was-run', 'w')\n")
    before = root.tree()
    done = root.install(printed("--token", TOKEN, *WELL, "--pool-name", "external"), cwd="/tmp")
    assert done.stderr == "" and "\nready for " in done.stdout, done
    assert root.gateway.ready() and root.state()["enabled"]
    tree = root.tree()
    assert tree[f"{OPT}/beta9_agent.py"] == (0, 0, "0o100644", SOURCE.read_bytes())
    user = next(line.split(":") for line in (root.folder / "etc/passwd").read_text().splitlines() if "beta9" in line)
    assert user[0] == "beta9-agent" and user[6] == "/usr/sbin/nologin"
    for name, token in (("token", TOKEN), ("k3s-token", K3S)):
        assert tree[f"{ETC}/{name}"] == (0, int(user[3]), "0o100640", f"{token}\n".encode())
    new = {path: status for path, status in tree.items() if path not in before}
    loose = {path for path, (uid, gid, mode, content) in new.items() if "var/lib" not in path
             and (uid or int(mode, 8) & 0o022 and not mode.startswith("0o12") or gid and "token" not in path)}
    assert loose == set() and not any(path.endswith((".old", ".new")) for path in new)
    assert tree["local/bin/beta9-agent"][2] == "0o100755" and tree[f"{ETC}/agent.yaml"][2] == "0o100644"
    assert tree["etc/systemd/system/beta9-agent.service"] == (0, 0, "0o100644", b9.UNIT.encode())
    assert TOKEN not in json.dumps(root.state()["seen"]) + done.stdout + root.log()
    shown = root.run("setpriv", "--reuid=nobody", "--clear-groups", "beta9-agent", "--status")
    assert shown.returncode == 0 and "ready for" in shown.stdout, shown
    refused = root.run("beta9-agent", "--once")
    assert refused.returncode == 2 and "`runuser -u beta9-agent --`" in refused.stderr
    checked = json.loads(root.run("beta9-agent", "--check", "--json").stdout)
    assert any("an agent runs here: ready for" in finding["text"] for finding in checked["findings"]), checked
    assert "other users can read" not in root.log()

    pid, after = root.pid_of_ready(), len(root.gateway.seen)
    done = root.install(printed(*WELL, "--max-cpu", "1", program=another), shell="bash")
    assert done.stderr == "" and "Python packages" not in done.stdout
    assert root.pid_of_ready() != pid and root.gateway.ready(after)
    assert (root.folder / OPT / "beta9_agent.py").read_bytes() == another.read_bytes()
    assert (root.folder / OPT / "beta9_agent.py.old").read_bytes() == SOURCE.read_bytes()
    assert 'max_cpu: "1"' in root.etc("agent.yaml") and "max_cpu" not in root.etc("agent.yaml.old")
    assert root.etc("token") == f"{TOKEN}\n" and not (root.folder / ETC / "token.old").exists()

    done = root.install(prints(action="--print-uninstall").stdout)
    assert done.stderr == "" and done.stdout.startswith("beta9-agent: gone")
    assert root.tree() == before and root.state()["pid"] == 0
    assert root.install(prints(action="--print-uninstall").stdout).stderr == "", "again"


def as_it_was(root, pid, tree):
    """Whether what ran before still runs, and every file is as it was."""
    left_out = ("var/lib/beta9-agent/", "local/sbin", "tmp")
    now = {path: status for path, status in root.tree().items() if not path.startswith(left_out)}
    changed = {path for path, status in tree.items() if not path.startswith(left_out) and now.pop(path, None) != status}
    assert (changed, list(now), root.pid_of_ready()) == (set(), [], pid)


@needs_root
@pytest.mark.slow
@beside
def test_install_as_another_user_says_what_to_do(root):
    before = root.tree()
    done = root.run("setpriv", "--reuid=nobody", "--clear-groups", "sh", input=printed("--token", TOKEN))
    assert (done.returncode, done.stdout) == (1, "") and root.tree() == before
    assert done.stderr.startswith("beta9-agent: this must run as root: pipe it into sudo sh, or ssh root@... sh\n")


@needs_root
@pytest.mark.slow
@beside
def test_install_without_systemd_or_token_changes_nothing(root):
    before = root.tree()
    done = root.install(printed(*WELL), 1)
    assert "the machine token is missing: run this by sudo BETA9_TOKEN_FILE=token sh" in done.stderr
    root.run("rmdir", "/run/systemd/system")
    done = root.install(printed("--token", TOKEN), 1)
    assert "systemd does not run here" in done.stderr and root.tree() == before


DIGEST = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
BROKEN = {
    "hash": (lambda script: script.replace(DIGEST, "0" * 64), "print the script anew"),
    "bytes": (lambda script: re.sub("(\n[^\n ]{100})[^\n ]{9}", r"\g<1>000000000", script), "Error"),
    "version": (lambda script: script.replace(f"*'({DIGEST[:12]})'", "*'(0)'"), "the agent does not start")}


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
@beside
def test_install_of_another_file_than_was_printed_leaves_all_as_it_was(installed, name):
    pid, before, (change, words) = installed.pid_of_ready(), installed.tree(), BROKEN[name]
    script = printed("--token", TOKEN, *WELL)
    assert change(script) != script
    assert words in installed.install(change(script), 1).stderr
    as_it_was(installed, pid, before)


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("number, group", [(signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGINT, True)],
                         ids=["term", "hup", "ctrl-c"])
@beside
def test_install_interrupted_half_way_leaves_all_as_it_was(installed, another, number, group):
    (installed.folder / OPT / "venv/packages").unlink()     # so that they are installed again
    pid, before = installed.pid_of_ready(), installed.tree()
    process = installed.start("sh")
    process.stdin.write(printed("--token", TOKEN + "2", *WELL, program=another))
    process.stdin.close()
    while "installing its Python packages" not in process.stdout.readline():
        pass
    wait((installed.folder / OPT / "venv.new/bin").exists)
    for each in psutil.Process(process.pid).children(recursive=group):    # the shell, and with a terminal all
        each.send_signal(number)
    errors = process.stderr.read()
    assert process.wait(60) == 1 and "stopped by a signal" in errors, errors
    assert "failed while installing its Python packages" in errors
    as_it_was(installed, pid, before)


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("place", ["opt", "etc"])
@beside
def test_install_on_a_full_disk_leaves_all_as_it_was(another, place):
    folder = {"opt": OPT, "etc": ETC}[place]
    fill = (f"mv {folder} seed; mkdir {folder}; mount -t tmpfs -o mode=755 tmpfs {folder}; cp -a seed/. {folder};"
            f"rm -r seed; size=$(du -sk {folder} | cut -f 1); mount -o remount,size=$((size + 8))k {folder};"
            f"dd if=/dev/zero of={folder}/ballast status=none 2>&- || :; truncate -s -4k {folder}/ballast")
    with contextlib.closing(Root(fill, template())) as root:
        pid, seen = root.pid_of_ready(), root.run("sh", "-c", f"cd /{OPT}; sha256sum *.py /{ETC}/*")
        done = root.install(printed("--token", TOKEN + "2", *WELL, "--max-cpu", "1", program=another), 1)
        assert re.search("No space left on device|I/O error", done.stderr), done     # the latter is dash's
        assert "beta9-agent: failed while" in done.stderr
        assert root.run("sh", "-c", f"cd /{OPT}; sha256sum *.py /{ETC}/*").stdout == seen.stdout
        assert root.pid_of_ready() == pid


@needs_root
@pytest.mark.slow
@beside
def test_install_setting_that_is_refused_before_the_start_leaves_all_as_it_was(installed, another):
    pid, before = installed.pid_of_ready(), installed.tree()
    done = installed.install(printed("--token", TOKEN + "2", *WELL, program=another), 1, BETA9_MACHINE_ID="nothex")
    assert "8 hex characters" in done.stderr and "the agent refuses these settings" in done.stderr
    done = installed.install(printed("--token", TOKEN + "2"), 1, BETA9_HOSTNAME="x\"; touch /tmp/y")
    assert "BETA9_HOSTNAME is not a host or IP" in done.stderr
    as_it_was(installed, pid, before)


def refused_at_the_start(root, certificates, **more):
    """A script whose setting the service alone cannot use: it sees nothing of /home."""
    shutil.copy(certificates / "ca.pem", root.folder / "home/ca.pem")
    script = printed("--token", TOKEN + "2", *WELL, "--ca-file", str(certificates / "ca.pem"), **more)
    return root.install(script.replace(str(certificates / "ca.pem"), "/home/ca.pem"), 1)


@needs_root
@pytest.mark.slow
@beside
def test_install_setting_that_the_service_refuses_brings_back_what_was_before(installed, another, certificates):
    (installed.folder / OPT / "venv/packages").write_text("other ones\n")
    before = installed.tree()
    done = refused_at_the_start(installed, certificates, program=another)
    assert "--ca-file: the value '/home/ca.pem'" in done.stderr and "what was before is back" in done.stderr
    before["home/ca.pem"] = installed.tree()["home/ca.pem"]
    as_it_was(installed, installed.pid_of_ready(), before)
    assert (installed.folder / OPT / "venv/packages").read_text() == "other ones\n"


@needs_root
@pytest.mark.slow
@beside
def test_install_first_setting_that_the_service_refuses_leaves_no_service(root, certificates):
    done = refused_at_the_start(root, certificates)
    assert "what was before is back" in done.stderr
    state = root.state()
    assert (state["pid"], state["enabled"]) == (0, False)
    assert [path for path in root.tree() if path.endswith((".service", "bin/beta9-agent", "agent.yaml", "token"))] == []
    assert root.install(printed("--token", TOKEN, *WELL)).stderr == "", "once more, and right"


@needs_root
@pytest.mark.slow
@beside
def test_install_that_is_not_ready_says_why_and_stays(installed, another):
    """The one that was ready before is not taken for the new one."""
    installed.program("sleep", "#!/bin/sh\nexit 0\n")
    installed.gateway.always = says(500, b'{"message": "Failed to register machine"}')
    done = installed.install(printed("--token", TOKEN, *WELL, program=another), 3)
    assert "Failed to register machine" in done.stdout and "failed while" not in done.stderr
    assert done.stdout.splitlines()[-1] == "beta9-agent: installed but not ready, see above; it goes on trying"
    installed.gateway.always = None
    installed.pid_of_ready()


@needs_root
@pytest.mark.slow
@beside
def test_install_as_user_data_does_not_wait(installed):
    installed.gateway.always = silent
    path = installed.folder / "var/lib/cloud/instance/scripts/part-001"
    path.parent.mkdir(parents=True)
    path.write_text(printed("--token", TOKEN, *WELL))
    path.chmod(0o700)
    done = installed.run("/var/lib/cloud/instance/scripts/part-001")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.splitlines()[-1] == "beta9-agent: started: beta9-agent --status tells more"


def trust(root, ca):
    """Puts a root certificate among those of the system."""
    digest = subprocess.check_output(["openssl", "x509", "-noout", "-hash", "-in", ca], text=True).strip()
    for name in (f"{digest}.0", "ca-certificates.crt"):
        shutil.copy(ca, root.folder / "etc/ssl/certs" / name)


@needs_root
@pytest.mark.slow
@beside
def test_install_fetched_file_is_used_if_it_is_the_right_one(installed, another, certificates):
    trust(installed, certificates / "ca.pem")
    with contextlib.closing(installed.network.do(lambda: TlsGateway(tls_with(certificates, "good"),
                                                                    port=8443))) as site:
        script = printed("--token", TOKEN, *WELL, "--fetch-from", "https://localhost:8443/a?b=c&d", program=another)
        pid, before = installed.pid_of_ready(), installed.tree()
        for answer, words in ((says(200, b"x"), "print the script anew"), (says(404), "HTTP Error 404")):
            site.always = answer
            done = installed.install(script, 1)
            assert words in done.stderr and "Traceback" not in done.stderr, done
        as_it_was(installed, pid, before)
        site.always = says(200, another.read_bytes())
        installed.install(script)
    assert {link.target for link in site.seen} == {"/a?b=c&d"}
    assert (installed.folder / OPT / "beta9_agent.py").read_bytes() == another.read_bytes()


@needs_root
@pytest.mark.slow
@beside
def test_install_settings_from_the_environment_win(installed):
    script, seen = printed(*WELL), installed.gateway.seen
    (installed.folder / "root/token").write_text(f"{TOKEN}3")   # without line end
    (installed.folder / "root/empty").touch()
    for name in ("nothing", "empty"):
        done = installed.install(script, 1, BETA9_TOKEN_FILE=f"/root/{name}")
        assert f"/root/{name}" in done.stderr and "parameter" not in done.stderr
    for number, environ in ((3, {"BETA9_TOKEN_FILE": "token", "cwd": "/root"}), (4, {"BETA9_TOKEN": f"{TOKEN}4"})):
        installed.gateway.contract.token = f"{TOKEN}{number}"
        installed.install(script, BETA9_HOSTNAME=f"host{number}", BETA9_MACHINE_ID=f"0000000{number}", value="x",
                          **environ)
        assert installed.etc("token") == f"{TOKEN}{number}\n"
        offered = next(link for link in reversed(seen) if link.call == REGISTER).json
        assert (offered["hostname"], offered["machine_id"]) == (f"host{number}", f"0000000{number}")
    assert leaks(json.dumps(installed.state()["seen"]), TOKEN, K3S) == []
    installed.install(printed("--gateway-host", "127.0.0.1", "--offer-always"))
    assert (installed.etc("token"), installed.etc("k3s-token")) == (f"{TOKEN}4\n", f"{K3S}\n")
    assert 'k3s_token_file: "/etc/beta9-agent/k3s-token"' in installed.etc("agent.yaml")


@needs_root
@pytest.mark.slow
@beside
def test_install_without_venv_module_asks_the_package_manager(root):
    """Whose stand-in brings ensurepip back, if it is asked for the right package."""
    place = subprocess.check_output([SYSTEM_PYTHON, "-c", "import ensurepip; print(ensurepip.__path__[0])"],
                                    text=True).strip()
    root.program("dnf", "#!/bin/sh\nexit 1\n")
    root.program("apt-get", f'#!/bin/sh\necho "$*" >>/var/log/apt\ncase $* in *python3-venv*) umount {place} ;; esac\n')
    hide = "mount -t tmpfs none $0; echo 'raise ImportError' >$0/__init__.py"
    root.run("sh", "-c", hide, place)
    done = root.install(printed("--token", TOKEN, *WELL))
    assert "beta9-agent: installing Python\n" in done.stdout
    assert (root.folder / "var/log/apt").read_text().startswith("-qq update\n-qq -y -o DPkg::Lock::Timeout=300 install")
    root.install(prints(action="--print-uninstall").stdout)
    root.run("sh", "-c", hide, place)
    for code, words in ((0, "Python 3.10 or newer with its venv module is missing"),
                        (3, "failed while installing Python")):
        root.program("apt-get", f"#!/bin/sh\nexit {code}\n")
        assert words in root.install(printed("--token", TOKEN), 1).stderr


# ---- 13 Install: --k3s, without k3s
TIMER_UNIT = "beta9-k3s-token.timer"
MANIFESTS = "var/lib/rancher/k3s/server/manifests"


@pytest.mark.slow
@needs_shellcheck
def test_k3s_token_script_is_sh_in_which_shellcheck_finds_nothing():
    for words in (["sh", "-n"], ["bash", "--posix", "-n"], ["shellcheck", "--shell=sh", "-"]):
        done = subprocess.run(words, input=b9.K3S_TOKEN, capture_output=True, text=True, timeout=50)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), words


@needs_systemd
def test_k3s_token_units_verified_by_systemd_are_silent(tmp_path):
    service = re.sub("^ExecStart=.*", "ExecStart=/bin/true", b9.K3S_TOKEN_SERVICE, flags=re.M)
    for ending, text in (("service", service), ("timer", b9.K3S_TOKEN_TIMER)):
        (tmp_path / f"beta9-k3s-token.{ending}").write_text(text)
    done = analyze("verify", str(tmp_path / TIMER_UNIT), str(tmp_path / "beta9-k3s-token.service"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("text, line", [
    *((b9.K3S_TOKEN_SERVICE, line) for line in (
        "Type=oneshot", "ExecStart=/opt/beta9-agent/k3s-token", "LogLevelMax=warning", "RuntimeDirectory=beta9-k3s",
        "RuntimeDirectoryMode=0750", "RuntimeDirectoryPreserve=yes", "Group=beta9-agent")),
    *((b9.K3S_TOKEN_TIMER, line) for line in (
        "OnBootSec=5s", "OnActiveSec=20s", "OnUnitActiveSec=1min", "WantedBy=timers.target"))],
    ids=lambda value: value if "\n" not in value else "")
def test_k3s_token_units_directive_is_there_once(text, line):
    assert text.splitlines().count(line) == 1 and "User=" not in text


def test_k3s_accounts_manifest_holds_these_rules_and_no_more():
    accounts = list(pytest.importorskip("yaml").safe_load_all(b9.K3S_ACCOUNTS))
    assert [(each["kind"], each["metadata"]) for each in accounts] == [
        (kind, {"name": name} | ({} if kind.startswith("Cluster") else {"namespace": "default"}))
        for name, kinds in (("beta9-gateway", ("ServiceAccount", "Role", "RoleBinding")),
                            ("beta9-agent", ("ServiceAccount", "ClusterRole", "ClusterRoleBinding")))
        for kind in kinds]
    gateway, role, binding, agent, cluster_role, cluster_binding = accounts
    assert gateway["automountServiceAccountToken"] is agent["automountServiceAccountToken"] is False
    assert role["rules"] == [  # as gateway-api has it
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list", "create", "delete"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    assert cluster_role["rules"] == [
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list"]},
        {"apiGroups": ["node.k8s.io"], "resources": ["runtimeclasses"], "verbs": ["get", "list"]}]
    for each, kind in ((binding, "Role"), (cluster_binding, "ClusterRole")):
        name = each["metadata"]["name"]
        assert each["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}
        assert each["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": "default"}]


def test_k3s_device_plugin_manifest_is_of_a_pinned_version():
    plugin = pytest.importorskip("yaml").safe_load(b9.K3S_DEVICE_PLUGIN)
    spec = plugin["spec"]["template"]["spec"]
    assert (plugin["kind"], plugin["metadata"]["namespace"]) == ("DaemonSet", "kube-system")
    assert re.fullmatch(r"nvcr\.io/nvidia/k8s-device-plugin:v\d+\.\d+\.\d+", spec["containers"][0]["image"])
    assert spec["volumes"][0]["hostPath"]["path"] == spec["containers"][0]["volumeMounts"][0]["mountPath"]
    assert plugin["spec"]["selector"]["matchLabels"] == plugin["spec"]["template"]["metadata"]["labels"]


@pytest.mark.slow
@pytest.mark.parametrize("options, words", [
    (["--k3s", "use", "--k3s-token", K3S], "--k3s has k3s make its tokens"),
    (["--k3s", "install", "--k3s-token-file", "TOKEN"], "leave out --k3s-token, --k3s-ca-file"),
    (["--k3s", "use", "--k3s-node-token-file", "TOKEN"], "--k3s has k3s make its tokens"),
    (["--k3s", "use", "--k3s-ca-file", certifi.where()], "--k3s has k3s make its tokens"),
    (["--k3s-version", "v1.34.3+k3s1"], "go with --k3s install: add that"),
    (["--k3s", "use", "--k3s-version", "v1.34.3+k3s1"], "go with --k3s install: add that"),
    (["--k3s", "use", "--k3s-installer-sha256", "0" * 64], "go with --k3s install: add that"),
    (["--k3s", "instal"], "--k3s: the value 'instal' is no way to get k3s: give use"),
    (["--k3s", ""], "--k3s: the value ''"),
    (["--k3s", "install", "--k3s-version", "1.34"], "is not a version of k3s: give one such as v1.34.3+k3s1"),
    (["--k3s", "install", "--k3s-version", "v1.34.3+k3s1;x"], "is not a version of k3s"),
    (["--k3s", "install", "--k3s-installer-sha256", "0" * 63], "is not a SHA-256: give its 64 hex digits"),
    (["--k3s", "install", "--k3s-installer-sha256", "$(x)" + "0" * 60], "is not a SHA-256")],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "")
@beside
def test_k3s_option_that_will_not_do_is_exit_2_and_prints_no_script(box, options, words):
    (box.folder / "token").write_text(K3S)
    options = [str(box.folder / "token") if word == "TOKEN" else word for word in options]
    done = prints(*options)
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and K3S not in done.stderr


@pytest.mark.parametrize("option", ["--k3s=use", "--k3s-version=v1.34.3+k3s1", f"--k3s-installer-sha256={'0' * 64}"],
                         ids=lambda option: option.partition("=")[0])
@beside
def test_k3s_option_without_print_install_is_exit_2(box, option):
    done = box.run(option)
    assert done.returncode == 2 and " goes with --print-install: add that" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("way", ["use", "install"])
@beside
def test_k3s_settings_point_at_the_files_of_the_timer_and_wait_for_them(way):
    script = printed("--k3s", way, "--pool-name", "gpu")
    settings = b9.parse_tree(heredoc(script, "cat"))
    assert settings == {
        "state_dir": "/var/lib/beta9-agent", "token_file": "/etc/beta9-agent/token", "pool_name": "gpu",
        "k3s_wait": "yes", "k3s_token_file": "/run/beta9-k3s/gateway-token",
        "k3s_node_token_file": "/run/beta9-k3s/agent-token", "k3s_ca_file": "/run/beta9-k3s/ca.crt"}
    assert ("get.k3s.io" in script) is (way == "install") and "cluster-admin" not in script + TEXT


@beside
def test_k3s_files_given_by_hand_keep_their_place(certificates):
    path = os.path.relpath(certificates / "ca.pem")
    settings = b9.parse_tree(heredoc(printed("--k3s-ca-file", path), "cat"))
    assert settings["k3s_ca_file"] == str(certificates / "ca.pem") and "k3s_wait" not in settings


# k3s itself is not run: its installer is a stand-in that records how it was called, and what it installs as `k3s`
# records its arguments, answers as the script needs it, and is away where somebody says so. The rest is real.
K3S_WELL = ("--token", TOKEN, "--gateway-host", "127.0.0.1", "--hostname", "box")
MINTED = "Jwt.0123456789abcdefghijklmnop.QRSTUVWXYZ"
STANDIN_INSTALLER = """#!/bin/sh
{ echo "arguments: $*"; env; } >>/var/log/k3s-installer
cp /k3s /usr/local/bin/k3s
"""
STANDIN_K3S = f"""#!/bin/sh
manifests=$(echo /{MANIFESTS}/*.yaml) timers=$(echo /etc/systemd/system/timers.target.wants/*)
echo "$KUBECONFIG|$*|$manifests|$timers" >>/var/log/k3s
[ ! -e /var/log/k3s-away ] || exit 1
case $* in
*" config view "*) echo "https://127.0.0.1:6443 $(base64 -w 0 /ca.pem)" ;;
*" create token beta9-gateway "*) echo "{MINTED} 2099-01-01T00:00:00Z" ;;
*" create token beta9-agent "*) echo "node-{MINTED} 2099-01-01T00:00:00Z" ;;
*" get daemonsets "*) cat /var/log/daemonsets 2>/dev/null || : ;;
esac
"""
# A card, and a /usr/bin that can be written.
CARD = """umount -l dev; mount -t tmpfs -o mode=755 none dev; touch dev/nvidiactl; ln -s /proc/self/fd dev/fd
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom dev
mkdir run/upper run/work; mount -t overlay -o lowerdir=usr/bin,upperdir=run/upper,workdir=run/work none usr/bin"""
APT = """#!/bin/sh
echo "$*" >>/var/log/apt
case $* in *' install nvidia-container-toolkit') cp /bin/true /usr/bin/nvidia-container-runtime ;; esac
"""


@contextlib.contextmanager
def k3s_world(root, certificates):
    """What the script reaches from this root by the names of get.k3s.io and nvidia.github.io, and k3s's API; the
    requests to the two.
    """
    trust(root, certificates / "ca.pem")
    shutil.copy(certificates / "ca.pem", root.folder)
    with open(root.folder / "etc/hosts", "a") as file:
        file.write("127.0.0.1 get.k3s.io nvidia.github.io\n")
    stub(root.folder / "k3s", STANDIN_K3S.partition("\n")[2])
    for name in (MANIFESTS, "etc/apt/sources.list.d"):
        (root.folder / name).mkdir(parents=True)
    pages = {"get.k3s.io/": STANDIN_INSTALLER, "nvidia.github.io/libnvidia-container/gpgkey": "KEY"}
    rules = answers("selfsubjectrulesreviews", *ruled(RULES))
    greet = tls_with(certificates, "good")
    with contextlib.ExitStack() as stack:
        site, api = (stack.enter_context(contextlib.closing(root.network.do(lambda: TlsGateway(greet, port=port))))
                     for port in (443, 6443))
        site.always = lambda link: says(200, pages[link.headers["Host"] + link.target].encode())(link)
        api.always = lambda link: rules(link) if link.call != "pods" else says(200, table())(link)
        yield site.seen


def logged(root, name):
    path = root.folder / "var/log" / name
    return path.read_text() if path.exists() else ""


def told_in_order(output, *steps):
    """Whether the script told these steps, and in this order."""
    places = [output.find(f"beta9-agent: {step}\n") for step in steps]
    assert -1 not in places and places == sorted(places), output


@needs_root
@pytest.mark.slow
@beside
def test_install_k3s_use_where_k3s_is_still_to_come_waits_for_it(root):
    """k3s itself was not run."""
    root.program("sleep", "#!/bin/sh\nexit 0\n")
    before = root.tree()
    done = root.install(printed(*K3S_WELL, "--k3s", "use"), 3)
    assert done.stderr == "" and "takes no work: the k3s token is missing" in done.stdout, done
    told_in_order(done.stdout, "having k3s make the tokens of the gateway and the agent",
                  "putting it in place and starting it", "installed but not ready, see above; it goes on trying")
    assert root.gateway.ready() and cpu_offered(root.gateway) == "0m"
    tree = root.tree()
    *status, manifest = tree[f"{MANIFESTS}/beta9-agent.yaml"]
    assert status == [0, 0, "0o100644"] and tree[MANIFESTS][2] == "0o40700"
    assert re.fullmatch(re.escape(b9.K3S_ACCOUNTS) + "# [^\n]+\n", manifest.decode())
    assert tree[f"{OPT}/k3s-token"] == (0, 0, "0o100755", b9.K3S_TOKEN.encode())
    for ending, text in (("service", b9.K3S_TOKEN_SERVICE), ("timer", b9.K3S_TOKEN_TIMER)):
        assert tree[f"etc/systemd/system/beta9-k3s-token.{ending}"] == (0, 0, "0o100644", text.encode())
    assert (root.folder / "etc/systemd/system/timers.target.wants" / TIMER_UNIT).is_symlink()
    assert root.run("stat", "-c", "%a %U:%G", "/run/beta9-k3s").stdout == "750 root:beta9-agent\n"
    assert logged(root, "timer") == "", "without k3s it says nothing"
    assert not any(path.endswith((".old", ".new")) for path in tree)
    done = root.install(prints(action="--print-uninstall").stdout)
    assert done.stderr == "" and done.stdout.startswith("beta9-agent: gone")
    assert {path for path in root.tree() if path not in before} == {
        MANIFESTS.rsplit("/", depth)[0] for depth in range(4)}, "folders alone"
    assert root.run("ls", "/run/beta9-k3s").returncode != 0


@needs_root
@pytest.mark.slow
@beside
def test_install_k3s_from_its_installer_to_a_full_offer_and_away_again(installed, certificates):
    """k3s itself was not run."""
    digest = hashlib.sha256(STANDIN_INSTALLER.encode()).hexdigest()
    options = [*K3S_WELL, "--k3s", "install", "--k3s-version", "v1.34.3+k3s1"]
    foreign = {"KUBECONFIG": "/elsewhere", "K3S_URL": "https://elsewhere", "K3S_TOKEN": "x"}
    with k3s_world(installed, certificates) as seen:
        pid, before = installed.pid_of_ready(), installed.tree()
        done = installed.install(printed(*options, "--k3s-installer-sha256", "0" * 64), 1)
        assert f"the installer's SHA-256 is {digest}, not the one asked for" in done.stderr
        assert logged(installed, "k3s-installer") == ""
        as_it_was(installed, pid, before)

        done = installed.install(printed(*options, "--k3s-installer-sha256", digest), **foreign)
        assert done.stderr == "" and "\nready for " in done.stdout, done
        told_in_order(done.stdout, "installing k3s by its own installer",
                      f"running the installer with SHA-256 {digest}",
                      "having k3s make the tokens of the gateway and the agent", "putting it in place and starting it")
        called = logged(installed, "k3s-installer").splitlines()
        assert called[0] == "arguments: " and {line for line in called if "K3S" in line} == {
            "INSTALL_K3S_CHANNEL=stable", "INSTALL_K3S_VERSION=v1.34.3+k3s1",
            "INSTALL_K3S_EXEC=server --disable traefik --disable servicelb --tls-san box"}
        assert leaks("\n".join(called), TOKEN, K3S) == []
        said = installed.gateway.calls(REGISTER)[-1].json
        assert said["token"] == MINTED and said["cpu"] != "0m"
        listed = installed.run("sh", "-c", "cd /run/beta9-k3s; stat -c '%n %a %U:%G' *; cat agent-token").stdout
        names = "agent-token", "agent-token.renewal", "ca.crt", "gateway-token", "gateway-token.renewal"
        assert listed == "".join(f"{name} 640 root:beta9-agent\n" for name in names) + f"node-{MINTED}\n"
        assert logged(installed, "timer") == "" and not (installed.folder / OPT / "k3s-installer").exists()

        done = installed.install(printed(*options, "--k3s-installer-sha256", digest))
        assert done.stderr == "" and "beta9-agent: k3s is here already, and stays as it is\n" in done.stdout
        assert logged(installed, "k3s-installer").splitlines() == called and [link.target for link in seen] == ["/"] * 2

        foreign["PATH"] = "/usr/sbin:/usr/bin"      # as some sudo has it
        done = installed.install(prints(action="--print-uninstall").stdout, shell="/bin/sh", **foreign)
        assert done.stderr == "" and done.stdout.endswith("after its last keepalive\n")
    kubeconfig, words, manifests, timers = logged(installed, "k3s").splitlines()[-1].split("|")
    assert words == ("kubectl delete -n default --ignore-not-found --request-timeout=10s serviceaccount/beta9-gateway"
                     " serviceaccount/beta9-agent role/beta9-gateway rolebinding/beta9-gateway clusterrole/beta9-agent"
                     " clusterrolebinding/beta9-agent")
    assert kubeconfig == "" and manifests.endswith("*.yaml"), "the file was gone by then, else it would bring all back"
    assert timers.endswith(TIMER_UNIT) and leaks(logged(installed, "k3s"), MINTED, K3S, TOKEN) == []
    left = [path for path in installed.tree() if "beta9" in path]
    assert left == [] and (installed.folder / "local/bin/k3s").exists(), "k3s itself stays"


@needs_root
@pytest.mark.slow
@beside
def test_install_k3s_with_a_card_has_nvidias_runtime_before_k3s_and_its_plugin_once(certificates):
    """k3s itself was not run."""
    digest = hashlib.sha256(STANDIN_INSTALLER.encode()).hexdigest()
    with contextlib.closing(Root(CARD, template())) as root, k3s_world(root, certificates) as seen:
        script = printed(*K3S_WELL, "--k3s", "install")
        plugin = root.folder / MANIFESTS / "nvidia-device-plugin.yaml"
        root.program("apt-get", "#!/bin/sh\nexit 0\n")
        pid = root.pid_of_ready()
        done = root.install(script, 1)
        assert "beta9-agent: the NVIDIA container toolkit is missing: install it\n" in done.stderr
        assert root.pid_of_ready() == pid and logged(root, "k3s-installer") == "" and not plugin.exists()

        root.program("apt-get", APT)
        done = root.install(script, KUBECONFIG="/elsewhere")
        assert done.stderr == "" and re.search("^[|]kubectl get daemonsets ", logged(root, "k3s"), re.M), done
        told_in_order(done.stdout, "installing the NVIDIA container toolkit", "installing k3s by its own installer",
                      f"running the installer with SHA-256 {digest}", "giving k3s NVIDIA's device plugin",
                      "having k3s make the tokens of the gateway and the agent")
        assert logged(root, "apt").splitlines() == [
            "-qq update", "-qq -y -o DPkg::Lock::Timeout=300 install nvidia-container-toolkit"]
        key = "/etc/apt/keyrings/nvidia-container-toolkit.asc"
        assert (root.folder / key[1:]).read_text() == "KEY"
        assert (root.folder / "etc/apt/sources.list.d/nvidia-container-toolkit.list").read_text() == (
            f"deb [signed-by={key}] https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH) /\n")
        called = logged(root, "k3s-installer").splitlines()
        assert ("INSTALL_K3S_EXEC=server --disable traefik --disable servicelb --tls-san box --default-runtime nvidia"
                in called and "INSTALL_K3S_VERSION=" in called)
        assert plugin.read_text() == b9.K3S_DEVICE_PLUGIN and mode_of(plugin) == 0o644

        asked = len(seen)
        for by_chart in (False, True):
            if by_chart:
                plugin.unlink()
                (root.folder / "var/log/daemonsets").write_text("daemonset.apps/nvdp-nvidia-device-plugin\n")
            done = root.install(script)
            assert done.stderr == "" and "NVIDIA" not in done.stdout and plugin.exists() is not by_chart
        assert len(seen) == asked and logged(root, "k3s-installer").splitlines() == called


@needs_root
@pytest.mark.slow
@beside
def test_install_k3s_uninstall_with_the_api_away_names_what_revokes_and_goes_on(root, certificates):
    """k3s itself was not run."""
    with k3s_world(root, certificates):
        root.run("cp", "/k3s", "/usr/local/bin/k3s")
        assert root.install(printed(*K3S_WELL, "--k3s", "use")).stderr == ""
    (root.folder / "var/log/k3s-away").touch()
    done = root.install(prints(action="--print-uninstall").stdout, 1)
    words = logged(root, "k3s").splitlines()[-1].split("|")[1].replace("--request-timeout=10s ", "")
    assert words.startswith("kubectl delete ") and done.stderr == (
        f"beta9-agent: k3s does not answer, so its tokens stay valid; revoke them by\nbeta9-agent: k3s {words}\n")
    assert done.stdout.startswith("beta9-agent: gone")
    assert [path for path in root.tree() if "beta9" in path] == [] and root.state()["pid"] == 0
    assert root.run("ls", "/run/beta9-k3s").returncode != 0
    assert root.install(prints(action="--print-uninstall").stdout).stderr == "", "again"


@needs_root
@pytest.mark.slow
@beside
def test_install_k3s_setting_that_the_service_refuses_takes_the_timer_out_again(installed, certificates):
    before = installed.tree()
    shutil.copy(certificates / "ca.pem", installed.folder / "home/ca.pem")     # of which the service sees nothing
    script = printed(*K3S_WELL, "--k3s", "use", "--ca-file", str(certificates / "ca.pem"))
    done = installed.install(script.replace(str(certificates / "ca.pem"), "/home/ca.pem"), 1)
    assert "what was before is back" in done.stderr
    tree = installed.tree()
    assert {path for path in set(tree) - set(before) if "rancher" not in path} == {"home/ca.pem"}
    assert not (installed.folder / MANIFESTS / "beta9-agent.yaml").exists()
    assert ["-q", "disable", "--now", TIMER_UNIT] in [words for words, _ in installed.state()["seen"]]
    assert installed.state()["enabled"] and installed.pid_of_ready()


# The timer's script, and what its tokens may do, with a real Kubernetes API; k3s itself is not run
class Account:
    """What the API answers to the owner of a token."""

    def __init__(self, kube, token):
        url = urllib.parse.urlsplit(kube.url)
        context = ssl.create_default_context(cafile=kube.pki / "server-ca.crt")
        self.api, self.token = http.client.HTTPSConnection(url.hostname, url.port, context=context), token

    def ask(self, method, path, body=None):
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        self.api.request(method, path, body and json.dumps(body), headers)
        with self.api.getresponse() as answer:
            return answer.status, json.load(answer)

    def may(self, verb, group, resource, namespace):
        resource, _, part = resource.partition("/")
        asked = {"verb": verb, "group": group, "resource": resource, "subresource": part, "namespace": namespace}
        status, answer = self.ask("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", {
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked}})
        assert status == 201
        return answer["status"]["allowed"]


class TokenTimer:
    """Runs the script as it is, in a mount namespace where `k3s kubectl` is kubectl with an administrator's file."""

    NAMES = {"ca.crt", "gateway-token", "gateway-token.renewal", "agent-token", "agent-token.renewal"}
    SETUP = """
        mount -t tmpfs -o mode=755 none /run
        { cat /etc/group; echo beta9-agent:x:4242:; } >/run/group
        mount --bind /run/group /etc/group
        mkdir /run/beta9-k3s
        mount -t tmpfs -o mode=750,gid=4242,size=64k none /run/beta9-k3s
        mount -t tmpfs -o mode=755 none /usr/local/sbin
        printf '#!/bin/sh\\nshift\\nsleep ${PAUSE:-0}\\nKUBECONFIG=%s exec %s "$@"\\n' "$1" "$2" \\
            >/usr/local/sbin/k3s
        chmod 755 /usr/local/sbin/k3s
        echo up
        exec sleep infinity"""

    def __init__(self, kube, folder):
        self.kube, self.config, self.script = kube, folder / "k3s.yaml", folder / "k3s-token"
        self.script.write_text(b9.K3S_TOKEN)
        self.script.chmod(0o755)
        self.be_administrator_of(kube.url)
        words = ["unshare", "--mount", "sh", "-euc", self.SETUP, "sh", self.config, kube.home / "bin/kubectl"]
        self.holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout.readline() == "up\n"
        self.folder = pathlib.Path(f"/proc/{self.holder.pid}/root/run/beta9-k3s")
        kube.kubectl("apply -f -", b9.K3S_ACCOUNTS)

    def be_administrator_of(self, url, **more):
        config = json.loads(json.dumps(self.kube.config))
        config["clusters"][0]["cluster"] |= {"server": url, **more}
        self.config.write_text(json.dumps(config))

    def start(self, *variables):
        words = ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", "env", "-i", "-C", "/", "PATH=/usr/bin:/bin",
                 *variables, self.script]
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, start_new_session=True)

    def run(self, code=0, said=""):
        """Runs it; the seconds that it took."""
        start, process = time.monotonic(), self.start()
        output, errors = process.communicate(timeout=100)
        assert (process.returncode, output) == (code, "") and re.fullmatch(said, errors), errors
        return time.monotonic() - start

    def files(self):
        """Name -> what stands in the file, and which one it is."""
        return {path.name: (path.read_text(), path.stat().st_ino) for path in self.folder.iterdir()}

    def token(self, name="gateway-token"):
        return (self.folder / name).read_text().strip()

    def make_due(self):
        for name in ("gateway", "agent"):
            (self.folder / f"{name}-token.renewal").write_text("5\n")

    def revoke(self):
        """Has the gateway's account made anew; waits until the API takes its old token no more."""
        old = Account(self.kube, self.token())
        self.kube.kubectl("delete serviceaccount beta9-gateway")
        self.kube.kubectl("apply -f -", b9.K3S_ACCOUNTS)
        wait(lambda: old.ask("GET", "/version")[0] == 401)

    def close(self):
        self.holder.kill()
        self.holder.wait()
        self.holder.stdout.close()


def is_whole(token):
    """Whether this is all of a signed token."""
    head, claims, signature = (base64.urlsafe_b64decode(part + "==") for part in token.split("."))
    return json.loads(head)["alg"] == "RS256" and len(signature) == 256 and json.loads(claims)["exp"] > time.time()


@pytest.fixture
def timer(kube, tmp_path):
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and unshare")
    kube.clean()
    with contextlib.closing(TokenTimer(kube, tmp_path)) as timer:
        yield timer


VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection", "impersonate", "bind",
         "escalate", "*")
RESOURCES = [("", name) for name in (
    "pods", "pods/log", "pods/exec", "pods/attach", "pods/portforward", "pods/ephemeralcontainers", "pods/eviction",
    "secrets", "configmaps", "services", "services/proxy", "endpoints", "events", "nodes", "nodes/proxy",
    "nodes/status", "namespaces", "serviceaccounts", "serviceaccounts/token", "persistentvolumes",
    "persistentvolumeclaims", "replicationcontrollers", "users", "groups", "*")] + [
    ("batch", name) for name in ("jobs", "jobs/status", "cronjobs", "*")] + [
    ("rbac.authorization.k8s.io", name) for name in ("roles", "rolebindings", "clusterroles",
                                                     "clusterrolebindings")] + [
    ("apps", "deployments"), ("apps", "daemonsets"),
    ("node.k8s.io", "runtimeclasses"), ("certificates.k8s.io", "certificatesigningrequests"),
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations"), ("coordination.k8s.io", "leases"),
    ("discovery.k8s.io", "endpointslices"), ("*", "*")]


@pytest.mark.k3s
def test_kube_accounts_apply_twice_and_their_tokens_may_do_this_and_no_more(kube, timer):
    again = kube.kubectl("apply -f -", b9.K3S_ACCOUNTS).splitlines()
    assert len(again) == 6 and all(line.endswith(" unchanged") for line in again)
    timer.run()
    places = "default", "kube-system", ""       # the last is all of them
    for name, allowed in (
            ("gateway-token", {(verb, "batch", "jobs", "default") for verb in ("list", "create", "delete")}
             | {("list", "", "pods", "default")}),
            ("agent-token", {(verb, group, resource, place) for verb in ("get", "list") for place in places
                             for group, resource in (("", "nodes"), ("node.k8s.io", "runtimeclasses"))})):
        account = Account(kube, timer.token(name))
        found = {(verb, group, resource, place) for verb in VERBS for group, resource in RESOURCES for place in places
                 if account.may(verb, group, resource, place)}
        assert found == allowed, name
    print(f"\n{len(VERBS) * len(RESOURCES) * len(places)} questions for each token")


@pytest.mark.k3s
def test_kube_tokens_do_the_calls_of_the_gateway_and_the_agent(kube, timer):
    timer.run()
    gateway, agent = (Account(kube, timer.token(name)) for name in ("gateway-token", "agent-token"))
    jobs, pods = "/apis/batch/v1/namespaces/default/jobs", "/api/v1/namespaces/default/pods"
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "w1"}, "spec": {"template": {"spec": {
        "restartPolicy": "OnFailure", "hostNetwork": True, "containers": [
            {"name": "worker", "image": "x", "securityContext": {"privileged": True}}]}}}}
    calls = [(gateway, "POST", jobs, 201), (gateway, "GET", jobs, 200), (gateway, "GET", pods, 200),
             (gateway, "GET", f"{jobs}/w1", 403), (gateway, "PUT", f"{jobs}/w1", 403),
             (gateway, "POST", jobs.replace("default", "kube-system"), 403), (gateway, "GET", "/api/v1/pods", 403),
             (gateway, "GET", "/api/v1/namespaces/default/secrets", 403), (gateway, "GET", "/api/v1/nodes", 403),
             (gateway, "POST", "/api/v1/namespaces/default/serviceaccounts/beta9-agent/token", 403),
             (agent, "GET", "/api/v1/nodes?limit=20", 200), (agent, "GET", f"/api/v1/nodes/{kube.box}", 200),
             (agent, "GET", "/apis/node.k8s.io/v1/runtimeclasses/nvidia", 404), (agent, "POST", jobs, 403),
             (agent, "DELETE", f"/api/v1/nodes/{kube.box}", 403), (agent, "GET", pods, 403), (agent, "GET", jobs, 403),
             (gateway, "DELETE", f"{jobs}/w1?propagationPolicy=Background", 200)]
    for account, method, path, status in calls:
        assert account.ask(method, path, job if method in ("POST", "PUT") else None)[0] == status, (method, path)


@pytest.mark.k3s
def test_kube_uninstall_deletes_all_of_the_manifest_and_so_revokes_its_tokens(kube, timer):
    """By the words of the script; the rest of it runs in a root of its own."""
    timer.run()
    accounts = [Account(kube, timer.token(name)) for name in ("gateway-token", "agent-token")]
    words = re.search("    set -- (.*?)\n    !", b9.UNINSTALL, re.S)[1].replace("\\\n", "")
    assert [account.ask("GET", "/version")[0] for account in accounts] == [200, 200]
    for again in range(2):
        kube.kubectl(f"delete -n default --ignore-not-found --request-timeout=10s {words}")
    assert kube.kubectl(f"get --ignore-not-found -o name {words}") == ""
    named = re.findall(r"^kind: (\w+)\nmetadata: {name: ([\w-]+)", b9.K3S_ACCOUNTS, re.M)
    assert len(named) == 6 and set(words.split()) == {f"{kind.lower()}/{name}" for kind, name in named}
    wait(lambda: [account.ask("GET", "/version")[0] for account in accounts] == [401, 401])


@pytest.mark.k3s
def test_kube_timer_makes_tokens_once_and_anew_when_refused_or_due(timer):
    timer.run()
    first, made = timer.files(), time.time()
    assert set(first) == timer.NAMES and first["ca.crt"][0] == (timer.kube.pki / "server-ca.crt").read_text()
    for path in timer.folder.iterdir():
        status = path.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 4242, 0o640), path
    for name, account in (("gateway-token", "beta9-gateway"), ("agent-token", "beta9-agent")):
        claims = json.loads(base64.urlsafe_b64decode(first[name][0].split(".")[1] + "=="))
        assert claims["sub"] == f"system:serviceaccount:default:{account}"
        assert claims["exp"] - claims["iat"] == 2160 * 3600
        assert abs(int(first[f"{name}.renewal"][0]) - made - 1440 * 3600) < 60, "a third of its life is left then"
    before, cpu = timer.run(), resource.getrusage(resource.RUSAGE_CHILDREN)
    took, used = timer.run(), resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\na run that finds all in order: {took:.2f} s, {before:.2f} s the time before,"
          f" {used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime:.2f} s of CPU")
    assert timer.files() == first, "again"
    timer.revoke()
    timer.run()
    second = timer.files()
    assert {name for name in second if second[name] != first[name]} == {"gateway-token", "gateway-token.renewal"}
    (timer.folder / "agent-token.renewal").write_text(f"{int(time.time()) + 5}\n")
    timer.run()
    assert timer.files()["agent-token"] == second["agent-token"], "not yet due"
    wait(lambda: time.time() > int(timer.token("agent-token.renewal")))
    timer.run()
    third = timer.files()
    assert {name for name in third if third[name] != second[name]} == {"agent-token", "agent-token.renewal"}
    (timer.folder / "gateway-token").unlink()
    (timer.folder / "ca.crt").write_text("another\n")
    timer.run()
    assert timer.files()["ca.crt"][0] == first["ca.crt"][0] and set(timer.files()) == timer.NAMES
    assert is_whole(timer.token())


@pytest.mark.k3s
def test_kube_timer_leaves_everything_while_k3s_is_away(timer):
    (timer.config).rename(f"{timer.config}.away")
    timer.run()
    assert timer.files() == {}, "k3s was never up"
    timer.be_administrator_of("https://127.0.0.1:9")
    timer.run()
    assert set(timer.files()) == {"ca.crt"}
    timer.be_administrator_of(timer.kube.url)
    timer.run()
    before = timer.files()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        took = []
        for url in ("https://127.0.0.1:9", f"https://127.0.0.1:{listener.getsockname()[1]}"):
            timer.be_administrator_of(url)
            took.append(timer.run())
            assert timer.files() == before
    print(f"\nAPI away: {took[0]:.2f} s, and {took[1]:.1f} s where it never answers, of 50 that systemd grants")
    assert took[1] < 40
    timer.be_administrator_of(timer.kube.url, **{"certificate-authority-data": ""})
    timer.run()
    timer.config.unlink()
    timer.run()
    assert timer.files() == before
    inside = ["nsenter", f"--mount=/proc/{timer.holder.pid}/ns/mnt"]
    subprocess.run([*inside, "umount", "/usr/local/sbin"], check=True)
    timer.run()
    assert timer.files() == before, "k3s itself is gone"


@pytest.mark.k3s
def test_kube_timer_says_so_once_where_k3s_has_no_such_account_yet(timer):
    timer.kube.kubectl("delete serviceaccount beta9-gateway")
    timer.run(said=re.escape("<4>k3s makes no token for beta9-gateway; trying again each minute:"
                             " is it in 'k3s kubectl get sa'?\n"))
    assert set(timer.files()) == timer.NAMES - {"gateway-token", "gateway-token.renewal"}


@pytest.mark.k3s
def test_kube_timer_on_a_full_disk_leaves_what_is_there_and_says_so_in_a_line(timer):
    timer.run()
    timer.make_due()
    before = timer.files()
    ballast = timer.folder / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    warning = "<4>/run/beta9-k3s/gateway-token cannot be written, and stays as it is: make room in /run\n"
    timer.run(1, said=re.escape(warning))
    ballast_gone = {name: each for name, each in timer.files().items() if name != "ballast"}
    assert ballast_gone == before
    for name, (text, _) in before.items():
        if name.endswith(".renewal"):
            (timer.folder / name).write_text(f"{int(time.time()) + 9999}\n")
    timer.run(1, said=f"[^<]*{re.escape(warning)}")     # they cannot be tried either
    ballast.unlink()
    timer.make_due()
    timer.run()
    assert all(timer.token(name) != before[name][0].strip() for name in ("gateway-token", "agent-token"))


@pytest.mark.k3s
def test_kube_timer_killed_at_any_moment_leaves_whole_tokens_and_the_next_run_mends(timer):
    timer.run()
    timer.make_due()
    whole = timer.run()
    seen = set()
    for number in range(60):
        if number % 3:      # else they are tried, and in order
            timer.make_due()
        process = timer.start()
        time.sleep(whole * number / 30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        files = timer.files()
        seen.add((process.returncode, *sorted(name for name in files if name.endswith(".new"))))
        for name in ("gateway-token", "agent-token"):
            assert is_whole(files[name][0].strip()) and (timer.folder / name).stat().st_mode & 0o7777 == 0o640
        assert files["ca.crt"][0] == (timer.kube.pki / "server-ca.crt").read_text()
    print(f"\nkilled within {whole:.2f} s: {sorted(seen)}")
    assert {code for code, *_ in seen} == {0, -9}
    timer.run()
    assert set(timer.files()) == timer.NAMES
    for name in ("gateway-token", "agent-token"):
        assert Account(timer.kube, timer.token(name)).ask("GET", "/version")[0] == 200


@pytest.mark.k3s
def test_kube_timer_shows_no_token_in_any_process(timer):
    """With tokens that are in order, that are made, and that are refused."""
    timer.run()
    tokens, shown = [], set()
    for prepare in (lambda: None, timer.make_due, timer.revoke):
        tokens += [timer.token("gateway-token"), timer.token("agent-token")]
        prepare()
        process = timer.start("PAUSE=0.5")      # each call of k3s lasts long enough to be seen
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                parent = psutil.Process(process.pid)
                for each in [parent, *parent.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        shown.add(f"{' '.join(each.cmdline())} {each.environ()}")
        assert process.returncode == 0 and process.communicate() == ("", "")
    tokens += [timer.token("gateway-token"), timer.token("agent-token")]
    text = "\n".join(shown)
    assert " create token beta9-gateway " in text and "/try.new get --raw /version" in text, text
    assert leaks(text, *tokens) == [] and len(set(tokens)) == 5


@pytest.mark.k3s
def test_kube_timer_takes_the_agent_to_a_full_offer_and_back_and_again(box, gateway, kube, timer):
    """With the looks of every day, and the files of the script's settings."""
    options = ["--k3s-wait", "--k3s-url", kube.url, "--machine-id", ID, "--hostname", "127.0.0.1",
               "--k3s-token-file", str(timer.folder / "gateway-token"), "--k3s-ca-file", str(timer.folder / "ca.crt"),
               "--k3s-node-token-file", str(timer.folder / "agent-token"), "--keepalive-interval", "60"]
    process = box.ready(gateway, *options)
    assert cpu_offered(gateway) == "0m"

    def offered(cpu, token):
        start = time.monotonic()
        wait(lambda: (said := gateway.calls(REGISTER)[-1].json)["token"] == token and (said["cpu"] != "0m") is cpu,
             process.log, limit=60)
        return time.monotonic() - start

    timer.run()
    first = timer.token()
    opened = offered(True, first)
    timer.kube.kubectl("delete serviceaccount beta9-gateway")
    closed = offered(False, first)
    timer.kube.kubectl("apply -f -", b9.K3S_ACCOUNTS)
    made = timer.run()
    again = offered(True, timer.token())
    print(f"\nall on offer {opened:.1f} s after the script's first run; 0m {closed:.1f} s after the account was"
          f" deleted; the script {made:.2f} s, all on offer {again:.1f} s later")
    assert timer.token() != first and leaks(process.log(), first, timer.token()) == []
    assert stopped(process) == 0


# ---- README's words on trust
def test_readme_options_table_is_that_of_the_program():
    rows = re.findall(r"^\| `(--[\w-]+)` \| (?:`(\w+)`)? ?\| (?:`([\w.]+)`)? ?\|", README, re.M)
    assert sorted(rows) == sorted((option.flag, option.variable, option.file_key) for option in b9.OPTIONS)


def test_readme_is_a_path_of_at_most_450_lines_in_order():
    titles = re.findall("^## (.*)$", README, re.M)
    assert README.count("\n") <= 450 and titles == [
        "Get the file", "Check", "Join", "As a service", "Troubleshooting", "What you trust it with", "Options",
        "Errors and exit codes", "Reliability", "Platforms"]


def test_readme_hash_and_commands_to_compare_it_are_those_of_the_file():
    commands = re.search(r"```bash\ncurl .*\n(sha256sum .*)\n(python3 .*--version)\n```", README)
    shown = subprocess.check_output(["sh", "-c", commands[1]], text=True, cwd=SOURCE.parent)
    words = [sys.executable, *commands[2].split()[1:]]
    assert shown.strip() in subprocess.check_output(words, text=True, cwd=SOURCE.parent) and len(shown) == 13
    assert hashlib.sha256(SOURCE.read_bytes()).hexdigest() in README


def test_readme_links_lead_to_its_titles():
    titles = [re.sub("[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
              for title in re.findall("^#+ (.*)$", README, re.M)]
    assert set(re.findall(r"\]\(#([^)]*)\)", README)) <= set(titles)


def test_readme_launchd_file_names_the_program_and_no_secret():
    plist = plistlib.loads(block("file: /Library/LaunchDaemons/beta9-agent.plist").encode())
    assert plist["KeepAlive"] is plist["RunAtLoad"] is True and "token" not in str(plist).lower()
    python, program, *options = plist["ProgramArguments"]
    assert (python, program) == (".venv/bin/python", SOURCE.name)
    assert b9.build_command_line().read(options).config == "agent.yaml"


# ---- A real Kubernetes API, started by ../shared/tools/kube.sh
ACCOUNTS = """
{apiVersion: v1, kind: ServiceAccount, metadata: {name: beta9-gateway}, automountServiceAccountToken: false}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: Role, metadata: {name: beta9-gateway}, rules: [
  {apiGroups: [batch], resources: [jobs], verbs: [list, create, delete]},
  {apiGroups: [""], resources: [pods], verbs: [list]}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: beta9-gateway},
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: beta9-gateway},
 subjects: [{kind: ServiceAccount, name: beta9-gateway}]}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: beta9-agent}, automountServiceAccountToken: false}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: beta9-agent}, rules: [
  {apiGroups: [""], resources: [nodes], verbs: [get, list]},
  {apiGroups: [node.k8s.io], resources: [runtimeclasses], verbs: [get]}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: beta9-agent},
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: beta9-agent},
 subjects: [{kind: ServiceAccount, name: beta9-agent, namespace: default}]}
"""


class Kube:
    """The API that BETA9_TEST_KUBE_HOME names, with the two accounts, one node and no pods."""

    def __init__(self, home):
        self.home, self.pki = pathlib.Path(home), pathlib.Path(home) / "pki"
        self.config = json.loads((self.home / "k3s.yaml").read_text())
        self.url = self.config["clusters"][0]["cluster"]["server"]
        self.clean()

    def kubectl(self, words, text=""):
        """What kubectl prints."""
        words = [self.home / "bin/kubectl", "--kubeconfig", self.home / "k3s.yaml", "-n", "default", *words.split()]
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def clean(self):
        self.kubectl("delete --ignore-not-found --force --grace-period=0 jobs,pods --all")
        self.kubectl("apply -f -", ACCOUNTS)
        self.node()

    def node(self, gpus=None, **spec):
        """One node, Ready, with so many GPUs for workers, under a new name: without a kubelet one grows old."""
        self.kubectl("delete --ignore-not-found nodes --all")
        self.box = f"box-{time.monotonic_ns()}"
        self.kubectl("apply -f -", json.dumps({"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.box},
                                               "spec": spec}))
        self.patch(f"node {self.box}", conditions=[{"type": "Ready", "status": "True"}])
        if gpus is not None:
            self.gpus(gpus)

    def gpus(self, count):
        self.patch(f"node {self.box}", **{key: {"nvidia.com/gpu": str(count)} for key in ("capacity", "allocatable")})

    def patch(self, what, **status):
        words = [self.home / "bin/kubectl", "--kubeconfig", self.home / "k3s.yaml", "-n", "default", "patch",
                 *what.split(), "--subresource=status", "--type=merge", "-p", json.dumps({"status": status})]
        subprocess.run(words, check=True, capture_output=True, timeout=60)

    def worker(self, name, phase="Running", **container):
        """A job as the gateway makes it; its pod's name."""
        labels = {"run.beam.cloud/role": "worker", "run.beam.cloud/machine-id": ID, "run.beam.cloud/worker-id": name}
        self.kubectl("apply -f -", json.dumps({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "labels": labels},
            "spec": {"template": {"metadata": {"labels": labels}, "spec": {
                "restartPolicy": "OnFailure", "hostNetwork": True, "containers": [
                    {"name": "worker", "image": "x", "env": [{"name": "SECRET", "value": CONFIG_SECRET}],
                     "securityContext": {"privileged": True}}]}}}}))
        pod = wait(lambda: self.kubectl(f"get pods -l run.beam.cloud/worker-id={name} -o name")).strip()
        state = {"name": "worker", "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": container}
        self.patch(pod, phase=phase, containerStatuses=[state] if container else [])
        return pod.removeprefix("pod/")

    def token(self, account="beta9-gateway"):
        return self.kubectl(f"create token {account} --duration=2160h").strip()

    def forged(self, seconds):
        """A token as the API mints them, by its own key, that expires so many seconds from now."""
        encode = lambda data: base64.urlsafe_b64encode(data).decode().rstrip("=")  # noqa: E731
        claims = json.loads(base64.urlsafe_b64decode(self.token().split(".")[1] + "=="))
        claims |= {"exp": int(time.time() + seconds), "iat": int(time.time() - 3600), "nbf": int(time.time() - 3600)}
        signed = ".".join(encode(json.dumps(each).encode()) for each in ({"alg": "RS256"}, claims))
        signature = subprocess.run(["openssl", "dgst", "-sha256", "-sign", self.pki / "sa.key"], check=True,
                                   input=signed.encode(), capture_output=True).stdout
        return f"{signed}.{encode(signature)}"

    def find(self):
        """The API's process."""
        return next(process for process in psutil.process_iter(["cmdline"])
                    if f"--tls-cert-file={self.pki}/serving.crt" in (process.info["cmdline"] or []))

    def stop(self):
        """Ends the API; what it was started with."""
        process = self.find()
        words = process.cmdline()
        process.terminate()
        for slow in psutil.wait_procs([process], timeout=5)[1]:     # it waits a minute for open requests
            slow.kill()
            psutil.wait_procs([slow], timeout=5)
        return words

    def start(self, words):
        with open(self.home / "run/apiserver.log", "ab") as log, open(self.home / "run/pids", "a") as pids:
            pids.write(f"{subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True).pid}\n")
        wait(self.is_up, limit=60)

    def is_up(self):
        with contextlib.suppress(AssertionError):
            return self.kubectl("get --raw /readyz") == "ok"

    def requests(self):
        """What the audit log has of the two accounts: account, verb and path of each request."""
        lines = map(json.loads, (self.home / "run/audit.log").read_text().splitlines())
        return [(line["user"]["username"].rpartition(":")[2], line["verb"], line["requestURI"]) for line in lines
                if "system:serviceaccount:default:" in line["user"].get("username", "")]


@pytest.fixture(scope="module")
def kube():
    home = os.environ.get("BETA9_TEST_KUBE_HOME")
    assert home, "start an API with ../shared/tools/kube.sh up, and name its KUBE_HOME in BETA9_TEST_KUBE_HOME"
    return Kube(home)


class Looking:
    """An agent that looks at the real API, with files of its own."""

    def __init__(self, box, gateway, kube, *options, interval=1, **environ):
        kube.clean()
        self.box, self.gateway, self.kube = box, gateway, kube
        self.token, self.node, self.ca = (box.folder / name for name in ("k3s-token", "node-token", "ca.crt"))
        self.token.write_text(kube.token())
        self.node.write_text(kube.token("beta9-agent"))
        shutil.copy(kube.pki / "server-ca.crt", self.ca)
        self.options = ["--k3s-url", kube.url, "--k3s-token-file", str(self.token), "--k3s-ca-file", str(self.ca),
                        "--k3s-node-token-file", str(self.node), "--machine-id", ID, "--hostname", "127.0.0.1"]
        self.process = box.ready(gateway, *self.options, "--keepalive-interval", str(interval), *options, **environ)

    def offers(self, cpu, gpus=None, limit=60.0):
        """Waits until CPU is offered or not; the seconds that it took."""
        def is_so():
            link = self.gateway.calls(REGISTER)[-1]
            fits = (link.json["cpu"] != "0m") is cpu and gpus in (None, link.json["gpu_count"])
            return fits and self.gateway.ready(self.gateway.seen.index(link))
        start = time.monotonic()
        wait(is_so, self.process.log, limit)
        return time.monotonic() - start

    def says(self, words):
        wait(lambda: words in self.process.log(), self.process.log)


@pytest.mark.k3s
def test_kube_account_deleted_and_made_again_takes_the_offer_back_and_gives_it_again(box, gateway, kube):
    """With the looks of every day, each 10 s; the API itself takes a token for up to 10 s more."""
    looking = Looking(box, gateway, kube, interval=60)
    assert cpu_offered(gateway) != "0m", "the first look was waited for"
    kube.kubectl("delete serviceaccount beta9-gateway")
    closed = looking.offers(cpu=False)
    looking.says(" ERROR k3s refuses the token, which expired or whose account was deleted, so no worker can run here")
    kube.kubectl("apply -f -", ACCOUNTS)
    token = kube.token()
    looking.token.write_text(token)
    start = time.monotonic()
    wait(lambda: gateway.calls(REGISTER)[-1].json["token"] == token)
    rotated = time.monotonic() - start
    opened = looking.offers(cpu=True)
    print(f"\n0m {closed:.1f} s after the account was deleted; a new token at the gateway after {rotated:.1f} s,"
          f" all on offer {opened:.1f} s later")
    assert closed < 35 and rotated < 5 and opened < 25
    assert stopped(looking.process) == 0 and leaks(looking.process.log(), token) == []


@pytest.mark.k3s
def test_kube_role_binding_deleted_is_told_by_its_rules(box, gateway, kube):
    looking = Looking(box, gateway, kube)
    looking.offers(cpu=True)
    kube.kubectl("delete rolebinding beta9-gateway")
    looking.offers(cpu=False)
    looking.says("the k3s token may not list jobs, create jobs, delete jobs, list pods in namespace default")
    assert "worker_count" not in gateway.calls(KEEPALIVE)[-1].json["metrics"]
    kube.kubectl("apply -f -", ACCOUNTS)
    looking.offers(cpu=True)
    assert gateway.calls(KEEPALIVE)[-1].json["metrics"]["worker_count"] == 0


@pytest.mark.k3s
def test_kube_stopped_and_started_and_with_another_root_certificate(box, gateway, kube):
    looking = Looking(box, gateway, kube)
    looking.offers(cpu=True)
    words = kube.stop()
    looking.offers(cpu=False)
    looking.says("k3s cannot be used, connection refused by 127.0.0.1:")
    wait(lambda: "k3s cannot be used" in box.run("--status").stdout)
    files = {name: (kube.pki / name).read_bytes() for name in ("serving.crt", "serving.key")}
    try:
        certificates = make_certificates()
        for name, ending in (("serving.crt", "pem"), ("serving.key", "key")):
            shutil.copy(certificates / f"good.{ending}", kube.pki / name)
        start = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        looking.says("has an unknown issuer, so no worker can run here")
        assert cpu_offered(gateway) == "0m"
        shutil.copy(certificates / "ca.pem", looking.ca)
        looking.offers(cpu=True)
        start.kill()
        start.wait()
        looking.offers(cpu=False)
    finally:
        for name, data in files.items():
            (kube.pki / name).write_bytes(data)
        kube.start(words)
    shutil.copy(kube.pki / "server-ca.crt", looking.ca)
    looking.offers(cpu=True)
    gaps = [after.time - before.time for before, after in itertools.pairwise(gateway.calls(KEEPALIVE))]
    print(f"\nlongest pause between keepalives, due each second: {max(gaps):.1f} s")
    assert max(gaps) < 5 and looking.process.poll() is None


@pytest.mark.k3s
def test_kube_suspended_takes_connections_and_never_answers_and_is_unusable(box, gateway, kube):
    looking = Looking(box, gateway, kube)
    looking.offers(cpu=True)
    api = kube.find()
    api.suspend()
    try:
        looking.offers(cpu=False)
        looking.says("k3s cannot be used, no complete answer in time from 127.0.0.1:")
    finally:
        api.resume()
    looking.offers(cpu=True)


@pytest.mark.k3s
def test_kube_token_that_expires_takes_the_offer_back(box, gateway, kube):
    """The API gives a minute of grace, and takes what it has just accepted for 10 s more."""
    looking = Looking(box, gateway, kube)
    looking.token.write_text(kube.forged(-40))
    wait(lambda: gateway.calls(REGISTER)[-1].json["token"] == looking.token.read_text(), looking.process.log)
    looking.offers(cpu=True)
    looking.offers(cpu=False)
    looking.says("k3s refuses the token")
    _, found = check(box, gateway, *looking.options)
    assert found["workers"][0][0] == "fail" and "k3s refuses the token" in found["workers"][0][1]
    looking.token.write_text(kube.token())
    looking.offers(cpu=True)


@pytest.mark.k3s
def test_kube_workers_are_counted_told_and_shown_without_their_secrets(box, gateway, kube):
    looking = Looking(box, gateway, kube)
    before = len(kube.requests())
    count = lambda: gateway.calls(KEEPALIVE)[-1].json["metrics"].get("worker_count")  # noqa: E731
    pods = [kube.worker("w1"), kube.worker("w2", "Pending", waiting={"reason": "ImagePullBackOff"}),
            kube.worker("w3"), kube.worker("w4", "Succeeded")]
    wait(lambda: count() == 2, looking.process.log)
    for pod in pods[:3]:
        looking.says(f" INFO worker {pod} is there, ")
    shown = wait(lambda: (text := box.run("--status").stdout).count("Running") == 2 and text)
    assert re.search(rf"  {pods[1]} +\d+ s  image cannot be pulled\n", shown)
    assert ", workers: 3, token valid until 20" in shown
    kube.kubectl("delete job w1 --cascade=foreground --wait=false")
    kube.kubectl(f"delete pod {pods[0]} --ignore-not-found --force --grace-period=0")
    wait(lambda: count() == 1, looking.process.log)
    looking.says(f" INFO worker {pods[0]} has ended, Running")
    assert pods[3] not in looking.process.log() and CONFIG_SECRET not in looking.process.log() + shown
    asked = kube.requests()[before:]
    assert {(account, verb) for account, verb, _ in asked} == {
        ("beta9-gateway", "create"), ("beta9-gateway", "list"), ("beta9-agent", "list")}
    for account, verb, path in asked:
        assert path.startswith({
            ("beta9-gateway", "create"): "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
            ("beta9-gateway", "list"): "/api/v1/namespaces/default/pods?includeObject=None&",
            ("beta9-agent", "list"): "/api/v1/nodes?limit="}[account, verb])


@pytest.mark.k3s
def test_kube_gpus_of_the_node_fall_below_nvml_and_no_work_is_taken_until_workers_have_ended(
        box, gateway, kube, nvml_stub, tmp_path):
    write_gpus(tmp_path / "control", "....")
    looking = Looking(box, gateway, kube, LD_LIBRARY_PATH=str(nvml_stub), NVML_STUB=str(tmp_path / "control"))
    looking.offers(cpu=True, gpus="0")
    looking.says("k3s has 0 of 4 GPUs for workers, and no more are offered: is NVIDIA's device plugin")
    kube.gpus(4)
    looking.offers(cpu=True, gpus="4")
    pods = [kube.worker(f"w{number}") for number in range(2)]
    for pod in pods:
        looking.says(f"worker {pod} is there")
    kube.gpus(3)
    looking.offers(cpu=False, gpus="3")
    looking.says("1 of 4 GPUs are lost: no work is taken until the workers that may hold them have ended (now: 2)")
    kube.kubectl("delete --force --grace-period=0 jobs,pods --all")
    looking.offers(cpu=True, gpus="3")
    registered = [(link.json["gpu_count"], link.json["cpu"] != "0m") for link in gateway.calls(REGISTER)]
    assert registered == [("0", True), ("4", True), ("3", False), ("3", True)]


@pytest.mark.k3s
def test_kube_check_tells_what_keeps_workers_away(box, gateway, kube):
    looking = Looking(box, gateway, kube)
    gateway.contract.config["worker"]["image_pull_secrets"] = ["registry"]

    def told(check_name="workers"):
        start = time.monotonic()
        code, found = check(box, gateway, *looking.options)
        assert time.monotonic() - start < 20 and looking.token.read_text() not in str(found)
        return found[check_name]

    # The API takes a moment to let a new account in and to take its taint off a new node.
    good = wait(lambda: (found := told()) and [mark for mark, _ in found] == ["ok"] * 3 and found)
    assert "until 20" in good[0][1]
    assert f"node {kube.box} takes workers" in good[2][1]
    assert good[1] == ("ok", "a privileged job would be accepted") and kube.kubectl("get jobs -o name") == ""
    pool = told("pool")
    assert ("warn", "the secret registry may not be looked at: `kubectl get secret registry`") in pool
    assert any(mark == "fail" and "k3s has no runtimeclass nvidia" in text for mark, text in pool)
    kube.kubectl("apply -f -", '{"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "handler": "nvidia",'
                               ' "metadata": {"name": "nvidia"}}')
    kube.kubectl("label namespace default pod-security.kubernetes.io/enforce=baseline")
    kube.node(unschedulable=True, taints=[{"key": "example.com/only", "effect": "NoSchedule"}])
    kube.patch(f"node {kube.box}", conditions=[{"type": kind, "status": "True"} for kind in ("Ready", "DiskPressure")])
    try:
        assert ("ok", "k3s has the runtimeclass nvidia") in told("pool")
        bad = wait(lambda: len(found := told()) > 4 and found)
        said = "\n".join(text for mark, text in bad if mark == "fail")
        assert "a worker would be refused" in said and "PodSecurity" in said and "DiskPressure True" in said
        assert "the taint example.com/only" in said and "the taint node.kubernetes.io/unschedulable" in said
    finally:
        kube.kubectl("label namespace default pod-security.kubernetes.io/enforce-")
        kube.kubectl("delete runtimeclass nvidia")


# ---- soak
@pytest.fixture
def stop():
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM
    before = [signal.getsignal(number) for number in numbers]
    yield b9.StopFlag(b9.Alarm())
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.soak
def test_soak_10000_keepalives_half_failing_end_where_they_began(gateway, stop, capsys):
    faults = itertools.cycle([None, says(500, {"message": "Internal Server Error"}), None, breaks(b"")])

    def fault(link):
        del gateway.seen[:]
        this = next(faults)
        return this(link) if this else late(0)(link)
    gateway.always = fault
    agent, start, figures, kinds = agent_of(gateway.port), time.monotonic(), [], []
    process = psutil.Process()
    logging.disable(logging.CRITICAL)
    for number in range(10_001):
        agent.lease = agent.lease._replace(due=b9.read_clock())
        kinds.append(agent.attempt(stop).kind is b9.Kind.OK)
        if number in (1000, 10_000):
            gc.collect()
            figures.append((process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()))
    logging.disable(logging.NOTSET)
    with capsys.disabled():
        print(f"\nsoak: {time.monotonic() - start:.0f} s, {kinds.count(False)} failures, connections"
              f" {gateway.connections}, MiB/files/threads {figures}")
    (mib, files, threads), after = figures
    assert kinds.count(False) > 4900 and abs(after[0] - mib) < 1
    assert abs(after[1] - files) <= 2 and abs(after[2] - threads) <= 2  # both ends
    agent.client.http.close()
