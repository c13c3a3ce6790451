"""An S3 server in a process of its own on loopback, and a proxy before it that fails a share of the requests."""

import http.client
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

START_SECONDS = 30
HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "server", "date"}
KINDS = ("error before", "error after", "reset", "truncated", "slow")
SLOW_SECONDS = 0.3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's server; yields its address, and ends the process by its id in any case."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "moto's server ended"
                assert time.monotonic() < deadline, "moto's server does not answer"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on, and fails `share` of them in one of `KINDS`, by a seed; `faults` counts them by kind."""

    daemon_threads = True

    def __init__(self, target: str, share: float, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.share = target.removeprefix("http://"), share
        self.faults: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.bytes_sent = 0
        self.seconds_per_mebibyte = 0.0
        """of every answer's body: a slow link"""
        self.kinds = KINDS
        self.on_request: Callable[[str, str], bool] = lambda _method, _path: True
        """Called with each request when all of its body is here; False drops it, without an answer."""
        self._random, self._lock = random.Random(seed), threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, method: str) -> str | None:
        with self._lock:
            self.requests[method] += 1
            if self._random.random() >= self.share:
                return None
            kind = self._random.choice(self.kinds)
            self.faults[kind] += 1
            return kind

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.server.on_request(self.command, self.path):
            self.close_connection = True
            return None
        kind = self.server.fault(self.command)
        if kind == "error before":
            return self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
        if kind is not None and kind.startswith("status "):
            return self._answer(int(kind.split()[1]), {}, b"<Error><Code>AccessDenied</Code></Error>")
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return None
        upstream = http.client.HTTPConnection(self.server.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if kind == "error after":
            return self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
        named = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_HEADERS}
        length = int(answer.getheader("Content-Length") or len(content))
        return self._answer(answer.status, named, content, length, kind)

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, length: int | None = None, kind: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "slow":
            time.sleep(SLOW_SECONDS)
        if kind == "truncated" and content:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if pause := self.server.seconds_per_mebibyte * len(content) / 2**20:
            time.sleep(pause)
        self.server.bytes_sent += len(content)
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815 - names of http.server

    def log_message(self, *_: object) -> None:
        """Not logged."""


@contextmanager
def faulty_proxy(target: str, share: float, seed: int = 0) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target, share, seed)
    thread = threading.Thread(target=proxy.serve_forever, args=[0.05], daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
