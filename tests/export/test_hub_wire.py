"""The real client, over the wire, to a hub on this machine: which test_hub.py replaces by a folder."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from stages.hub import repository as repository_module
from stages.hub.repository import Repository, fetch_newest_checkpoint
from stages.hub.snapshot import Staging
from stages.hub.uploader import HubConfig, Uploader
from stages.system.refusal import Refused
from stages.train.checkpoint_store import CheckpointMeta, fault_of

# The client's own way to send a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "/api/models/org/name"
LFS = (".safetensors", ".pt")


class WireHub(ThreadingHTTPServer):
    """One repository; large files go through the LFS protocol, small ones inside the commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RequestHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tree: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits = 0
        self.failures: dict[str, list[str]] = {}
        self.patience = threading.Event()

    def listed(self, path: str) -> dict[str, object]:
        content = self.blobs[self.tree[path]]
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": blob}
        if path.endswith(LFS):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 127}
        return entry


class RequestHandler(BaseHTTPRequestHandler):
    """The response to one request."""

    protocol_version = "HTTP/1.1"
    server: WireHub

    def answer(self) -> None:
        address = urlsplit(self.path)
        sent = self.sent()
        route = f"{self.command} {unquote(address.path)}"
        for part, failures in self.server.failures.items():
            if part in route and failures:
                return self.fail(failures.pop(0))
        return self.say(*self.reply(route, sent))

    def sent(self) -> bytes:
        """The body of the request; the client sends files in chunks, each after its length."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815

    def fail(self, kind: str) -> None:
        if kind == "silence":
            self.server.patience.wait(20)
        if kind == "forbidden":
            return self.say(403, b"{}", {})
        self.close_connection = True
        return None

    def say(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply(self, route: str, sent: bytes) -> tuple[int, bytes, dict[str, str]]:
        hub = self.server
        body: object = {}
        if route == "POST /api/repos/create":
            body = {"url": f"{hub.url}/org/name"}
        elif route == f"GET {REPO}":
            body = {"_id": "1", "id": "org/name", "private": True, "sha": "0" * 40, "siblings": [], "tags": []}
        elif route == "POST /api/validate-yaml":
            body = {"errors": [], "warnings": []}
        elif route == f"POST {REPO}/preupload/main":
            body = {"files": [self.mode(file["path"]) for file in json.loads(sent)["files"]]}
        elif route.endswith("/info/lfs/objects/batch"):
            body = {"transfer": "basic", "objects": [self.actions(wanted) for wanted in json.loads(sent)["objects"]]}
        elif route.startswith("PUT /lfs/"):
            hub.blobs[route.rpartition("/")[2]] = sent
        elif route == f"POST {REPO}/commit/main":
            body = self.commit([json.loads(line) for line in sent.splitlines()])
        elif route.startswith(f"POST {REPO}/paths-info/"):
            body = [hub.listed(path) for path in parse_qs(sent.decode())["paths"] if path in hub.tree]
        elif route == f"GET {REPO}/tree/main":
            body = [hub.listed(path) for path in hub.tree]
        elif route == f"GET {REPO}/refs":
            body = {"branches": [{"name": "main", "ref": "r", "targetCommit": "c"}], "converts": [], "tags": []}
        elif route == f"GET {REPO}/lfs-files":
            body = [self.lfs_file(oid) for oid in hub.blobs if len(oid) == 64]
        elif route == f"POST {REPO}/lfs-files/batch":
            for oid in json.loads(sent)["deletions"]["sha"]:
                del hub.blobs[oid]
        elif "/resolve/main/" in route:
            return self.file(route.partition("/resolve/main/")[2])
        elif route != f"GET {REPO}/auth-check/write":
            return 404, b"{}", {}
        return 200, json.dumps(body).encode(), {"Content-Type": "application/json"}

    def mode(self, path: str) -> dict[str, object]:
        return {"path": path, "uploadMode": "lfs" if path.endswith(LFS) else "regular", "shouldIgnore": False}

    def actions(self, wanted: dict[str, object]) -> dict[str, object]:
        there = wanted["oid"] in self.server.blobs
        upload = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}}
        return {**wanted, **({} if there else {"actions": upload})}

    def commit(self, lines: list[dict[str, dict[str, str]]]) -> dict[str, object]:
        hub = self.server
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    content = base64.b64decode(value["content"])
                    oid = hashlib.sha1(content).hexdigest()
                    hub.blobs[oid] = content
                    hub.tree[value["path"]] = oid
                case "lfsFile":
                    hub.tree[value["path"]] = value["oid"]
                case "deletedFolder":
                    hub.tree = {p: oid for p, oid in hub.tree.items() if not p.startswith(value["path"])}
        hub.commits += 1
        oid = f"{hub.commits:040d}"
        return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/org/name/commit/{oid}"}

    def lfs_file(self, oid: str) -> dict[str, object]:
        names = [path for path, held in self.server.tree.items() if held == oid]
        facts = {"fileOid": oid, "oid": oid, "size": 1, "pushedAt": "2026-01-01T00:00:00.000Z"}
        return {**facts, "filename": names[0] if names else "checkpoints/000000008/optimizer.pt"}

    def file(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        content = self.server.blobs[self.server.tree[path]]
        etag = hashlib.sha256(content).hexdigest()
        return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40}

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WireHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # its protocol is internal to a library
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client's own pauses
    huggingface_hub.utils.disable_progress_bars()
    server = WireHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.patience.set()
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture
def repository(hub: WireHub) -> Repository:
    return Repository("org/name", True, HfApi(endpoint=hub.url, token="a token"))


def checkpoint(run: Path, samples: int) -> Path:
    folder = run / "checkpoints" / f"{samples:09d}"
    folder.mkdir(parents=True)
    files = {name: f"{name} {samples}".encode() * 999 for name in ("student.safetensors", "optimizer.pt")}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    CheckpointMeta(samples, None, {}, hashes).write(folder)
    return folder


def send(repository: Repository, run: Path, *samples: int) -> list[float]:
    """Send checkpoints one after the other; returns the pauses after failures."""
    pauses: list[float] = []
    for n in samples:
        config = HubConfig(wait_minutes=0.1)
        with Uploader(config, run, repository, lambda _wake, seconds: pauses.append(seconds)) as uploader:
            uploader.send_checkpoint(checkpoint(run, n))
        assert uploader.warning() is None
    return pauses


def test_a_checkpoint_goes_there_and_back_by_the_real_client(hub, repository, tmp_path):
    assert send(repository, tmp_path / "here", 8) == []
    assert len(hub.tree) == 3
    fetched = fetch_newest_checkpoint(repository, tmp_path / "there" / "checkpoints")
    assert fetched == tmp_path / "there" / "checkpoints" / "000000008"
    assert fault_of(fetched) is None
    assert [path.name for path in fetched.parent.iterdir()] == ["000000008"]


def test_superseded_checkpoints_leave_the_tree_and_the_storage(hub, repository, tmp_path):
    send(repository, tmp_path, 8, 16, 24)
    assert {path.split("/")[1] for path in hub.tree} == {"000000016", "000000024"}
    assert sum(len(oid) == 64 for oid in hub.blobs) == 4


@pytest.mark.parametrize("route", ["PUT /lfs/", "/commit/main"])
def test_a_connection_cut_on_the_wire_is_retried(hub, repository, tmp_path, route):
    hub.failures = {route: ["cut"] * 8}  # more than the client repairs by itself
    assert send(repository, tmp_path, 8)
    assert not hub.failures[route]
    assert len(hub.tree) == 3


def test_a_silent_connection_is_given_up(hub, repository, tmp_path, monkeypatch):
    monkeypatch.setattr(repository_module, "STALL_SECONDS", 0.3)
    hub.failures = {"/commit/main": ["silence"]}
    assert send(repository, tmp_path, 8) == [15]
    assert len(hub.tree) == 3


def test_a_wrong_byte_on_the_wire_is_noticed(hub, repository, tmp_path):
    send(repository, tmp_path, 8)
    stored = hub.tree["checkpoints/000000008/optimizer.pt"]
    hub.blobs[stored] = b"?"
    with pytest.raises(RuntimeError, match=r"optimizer\.pt has the hash"):
        repository.upload(Staging(tmp_path).snapshot_checkpoint(tmp_path / "checkpoints" / "000000008"))


def test_a_token_without_rights_is_refused_at_once(hub, repository):
    hub.failures = {"/auth-check/write": ["forbidden"]}
    with pytest.raises(Refused, match="may not write there"):
        repository.open()
