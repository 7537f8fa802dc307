"""A stand-in for the hub on this machine, which the hub's own client talks to, and for a server of plain files."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

TOKEN = "hf_a_token_that_is_none"


class Hub:
    """Repositories by name, plain files by path, and what was asked for; `refuse` gives statuses to paths."""

    def __init__(self):
        self.repositories, self.files, self.stored = {}, {}, {}
        self.asked, self.refuse, self.redirect = [], {}, {}
        self.etags = True
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def add(self, name, files, *, private=False):
        self.repositories[name] = {"files": dict(files), "private": private, "commits": [_commit(files)]}

    def sizes_asked(self):
        """Paths whose bytes were sent."""
        return [path for method, path in self.asked if method == "GET" and "/api/" not in path]


def _commit(files):
    whole = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in files.items()}, sort_keys=True)
    return hashlib.sha1(whole.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.0"  # a connection that is kept would outlive the server

    def log_message(self, *_):
        pass

    def answer(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def tell(self, values, status=200, **headers):
        self.answer(status, json.dumps(values).encode(), Content_Type="application/json", **headers)

    def any(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        status = next((code for part, code in self.hub.refuse.items() if part in path), None)
        if status is not None:
            code = {404: "RepoNotFound"}.get(status)
            return self.tell({"error": "no"}, status, **({"X_Error_Code": code} if code else {}))
        for pattern, method, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return action(self, *match.groups())
        return self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = any  # noqa: N815

    def repository(self, name):
        found = self.hub.repositories.get(name)
        hidden = found and found["private"] and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if found is None or hidden:
            self.tell({"error": "not found"}, 401, X_Error_Code="RepoNotFound")
            return None
        return found

    # -- the hub, downloading ----------------------------------------------------------------------------

    def model(self, name, revision=None):
        if (found := self.repository(name)) is None:
            return
        if revision not in (None, "main", found["commits"][-1]):
            self.tell({"error": "no"}, 404, X_Error_Code="RevisionNotFound")
            return
        siblings = [{"rfilename": each, "size": len(data)} for each, data in found["files"].items()]
        about = {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": found["commits"][-1],
            "private": found["private"],
        }
        self.tell({**about, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, name, _):
        if (found := self.repository(name)) is not None:
            self.tell([
                {"type": "file", "path": each, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for each, data in found["files"].items()
            ])  # fmt: skip

    def resolve(self, name, _, file):
        if (found := self.repository(name)) is None:
            return
        if file not in found["files"]:
            self.tell({"error": "no"}, 404, X_Error_Code="EntryNotFound")
            return
        data = found["files"][file]
        self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=found["commits"][-1])

    # -- the hub, uploading ------------------------------------------------------------------------------

    def allowed(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.tell({"error": "no"}, 401)
        return False

    def create(self):
        if not self.allowed():
            return
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self.tell({"error": "there already", "url": f"{self.hub.address}/{name}"}, 409)
            return
        self.hub.add(
            name,
            {".gitattributes": b""},
            private=wanted.get("visibility") == "private" or wanted.get("private"),
        )
        self.tell({"url": f"{self.hub.address}/{name}"})

    def validate(self):
        content = json.loads(self.body)["content"]
        bad = "license: nonsense" in content
        errors = [{"message": '"license" must be one of the known ones'}] if bad else []
        self.tell({"errors": errors, "warnings": []}, 400 if bad else 200)

    def preupload(self, _):
        modes = [
            {"path": each["path"], "shouldIgnore": False, "oid": None,
             "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
            for each in json.loads(self.body)["files"]
        ]  # fmt: skip
        self.tell({"files": modes, "commitOid": "0" * 40})

    def batch(self, _):
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self.tell({"transfer": "basic", "objects": objects})

    def store(self, oid):
        self.hub.stored[oid] = self.body
        self.answer(200)

    def commit(self, name):
        if not self.allowed() or (found := self.repository(name)) is None:
            return
        files = dict(found["files"])
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        found["files"] = files
        found["commits"].append(_commit(files))
        oid = found["commits"][-1]
        self.tell({"commitUrl": f"{self.hub.address}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    # -- plain files -------------------------------------------------------------------------------------

    def file(self, name):
        if name in self.hub.redirect:
            self.answer(302, Location=self.hub.redirect[name])
            return
        if name not in self.hub.files:
            self.answer(404)
            return
        data = self.hub.files[name]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        if self.headers.get("If-None-Match") == etag:
            self.answer(304)
            return
        self.answer(200, data, **({"ETag": etag} if self.hub.etags else {}))


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/files/(.+)", ("GET",), Handler.file),
    (rf"/api/models/{NAME}", ("GET",), Handler.model),
    (rf"/api/models/{NAME}/revision/([^/]+)", ("GET",), Handler.model),
    (rf"/api/models/{NAME}/tree/([^/]+)", ("GET",), Handler.tree),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", ("GET", "HEAD"), Handler.resolve),
    (r"/api/repos/create", ("POST",), Handler.create),
    (r"/api/validate-yaml", ("POST",), Handler.validate),
    (rf"/api/models/{NAME}/preupload/main", ("POST",), Handler.preupload),
    (rf"/{NAME}\.git/info/lfs/objects/batch", ("POST",), Handler.batch),
    (r"/lfs/(\w+)", ("PUT",), Handler.store),
    (rf"/api/models/{NAME}/commit/main", ("POST",), Handler.commit),
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Run the stand-in, which the hub's client and caches of this test belong to."""
    stand_in = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        stand_in.address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.utils.disable_progress_bars()
    yield stand_in
    stand_in.stop()
    huggingface_hub.close_session()


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN


@pytest.fixture
def adapter(make_adapter):
    return make_adapter("lite")


@pytest.fixture
def data(adapter, tmp_path):
    """Bytes of an adapter's file."""
    return adapter.save(tmp_path / "made" / "square.safetensors").read_bytes()
