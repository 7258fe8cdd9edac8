"""Stands in for the Hugging Face hub: the part of its HTTP API by which a folder is uploaded, in a thread."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

TOKEN = "hf_of_the_tests"


class HubServer(ThreadingHTTPServer):
    """Keeps what is uploaded.

    Attributes:
      repos: the files of each repository by their paths.
      created: the bodies of the requests that made repositories.
      commits: how many commits were made.
      role: what the token may do.
      fails: the end of a path whose requests are refused, if any.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.commits, self.role, self.fails = 0, "write", None
        self.objects: dict[str, bytes] = {}  # of LFS, by checksum

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: object, status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_GET(self) -> None:
        if self.path != "/api/whoami-v2":
            self._answer({"error": "not found"}, 404)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        else:
            token = {"role": self.server.role}
            self._answer({"type": "user", "name": "somebody", "orgs": [], "auth": {"accessToken": token}})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        if hub.fails is not None and self.path.endswith(hub.fails):
            self._answer({"error": "no room for you"}, 403)
        elif self.path == "/api/repos/create":
            made = json.loads(body)
            hub.created.append(made)
            repo = f"{made.get('organization') or 'somebody'}/{made['name']}"
            status = 409 if repo in hub.repos else 200
            hub.repos.setdefault(repo, {})
            self._answer({"url": f"{hub.url}/{repo}"} | ({"error": "it exists"} if status == 409 else {}), status)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        else:
            _, _, _, owner, name, kind, _ = self.path.split("/")
            assert kind == "commit"
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.repos[f"{owner}/{name}"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repos[f"{owner}/{name}"][value["path"]] = hub.objects[value["oid"]]
            hub.commits += 1
            self._answer({"commitUrl": f"{hub.url}/{owner}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})


@contextlib.contextmanager
def running_hub() -> Iterator[HubServer]:
    """Runs a hub, to which uploads go until the end of the block, with a token that it knows."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # Xet has a protocol of its own.
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            yield server
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
