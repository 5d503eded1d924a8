"""A Hub on this machine: enough of the API for huggingface_hub to create, upload, list and download repos."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, USER = "hf_of_me", "me"
DATE = "2026-01-01T00:00:00.000Z"
LARGE = (".safetensors", ".onnx", ".png", ".parquet")  # what the Hub keeps as large files
RELATIONS = ("adapter", "merge", "quantized", "finetune")


@dataclass
class Repo:
    """Commits are trees, path to content; the first holds `.gitattributes` alone."""

    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit's hash and tree, by branch or by hash."""
        trees = [tree for branch in self.branches.values() for tree in branch]
        found = self.branches.get(revision, [t for t in trees if commit_hash(t) == revision])
        return (commit_hash(found[-1]), found[-1]) if found else None


@dataclass
class Hub:
    """What the server holds and saw.

    Attributes:
        repos: By kind ("models", "datasets") and id.
        large: Contents of large files by SHA-256.
        seen: "METHOD path" of every request.
        hang_up: Requests whose path contains this lose their connection without an answer.
        broken: Requests whose path contains this are answered with status 500.
        halved: Files whose path contains this are cut off in the middle, after the whole length was announced.
    """

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    hang_up: str = ""
    broken: str = ""
    halved: str = ""

    def create(self, kind: str, name: str, *, private: bool = False) -> Repo:
        repo = self.repos[kind, name] = Repo(private, {"main": [{".gitattributes": b"*.safetensors filter=lfs\n"}]})
        return repo

    def serve_folder(self, kind: str, name: str, folder: Path) -> None:
        """A public repo with the files of a folder."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.create(kind, name).branches["main"].append(files)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos["models", name].branches[revision][-1]

    def count(self, request: str) -> int:
        return sum(seen.startswith(request) for seen in self.seen)

    def environment(self, home: Path) -> dict[str, str]:
        """For a process that knows this Hub alone and starts with an empty cache."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip


def commit_hash(tree: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(name.encode() + b"\0" + tree[name] for name in sorted(tree))).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def blob_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `hub` is set on the subclass that `loopback_hub` makes."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client went away
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.answer_request()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer_request(self) -> None:
        url = urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self.chunks())
        self.hub.seen.append(f"{self.command} {path}")
        if self.hub.hang_up and self.hub.hang_up in path:
            self.close_connection = True
            self.connection.close()
            return
        if self.hub.broken and self.hub.broken in path:
            return self.fail(500, "", "Internal Server Error")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            return self.fail(401, "", "Invalid credentials in Authorization header")
        parts = unquote(path).strip("/").split("/")
        if path == "/":
            self.send(b"")
        elif parts[0] == "large":
            self.hub.large[parts[1]] = body
            ok = hashlib.sha256(body).hexdigest() == parts[1]
            self.send(b"") if ok else self.fail(400, "", "the content does not have this sha256")
        elif parts[:2] == ["api", "whoami-v2"]:
            self.send_json({"type": "user", "name": USER}) if token else self.fail(401, "", "no token")
        elif parts[:2] == ["api", "validate-yaml"]:
            errors = check_card(json.loads(body)["content"])
            self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif parts[:3] == ["api", "repos", "create"]:
            self.create(json.loads(body), token)
        elif parts[0] == "api" and parts[1] in ("models", "datasets"):
            self.repo_api(parts[1], "/".join(parts[2:4]), parts[4:], query, body, token)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif "resolve" in parts:
            self.resolve(parts, token)
        else:
            self.fail(404, "", f"this Hub does not know {path}")

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def create(self, asked: dict, token: str) -> None:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        kind = f"{asked.get('type') or 'model'}s"
        if not token or not name.startswith(f"{USER}/"):
            return self.fail(403 if token else 401, "", f"you have no rights to create {name}")
        if (kind, name) in self.hub.repos:
            return self.send_json({"error": "You already created this repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.create(kind, name, private=asked.get("visibility") == "private" or asked.get("private") is True)
        self.send_json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def visible(self, kind: str, name: str, token: str) -> Repo | None:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not token):
            self.fail(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def repo_api(self, kind: str, name: str, rest: list[str], query: dict, body: bytes, token: str) -> None:
        repo = self.visible(kind, name, token)
        if repo is None:
            return
        verb = rest[0] if rest else "revision"
        revision = rest[1] if len(rest) > 1 else "main"
        if verb == "branch":
            start = json.loads(body or b"{}").get("startingPoint", "main")
            if revision in repo.branches:
                return self.fail(409, "", "Reference already exists")
            found = repo.find(start)
            repo.branches[revision] = [found[1]]
            return self.send_json({})
        found = repo.find(revision)
        if found is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, tree = found
        if verb == "revision":
            files = [{"rfilename": path} for path in tree]
            about = {
                "id": name,
                "sha": sha,
                "private": repo.private,
                "siblings": files,
                "tags": [],
                "lastModified": DATE,
            }
            self.send_json(about | {"_id": "0", "gated": False, "disabled": False, "downloads": 0, "likes": 0})
        elif verb == "tree":
            below = "/".join(rest[2:])
            self.send_json(entries(tree, below, query.get("recursive", ["false"])[0].lower() in ("true", "1")))
        elif verb == "paths-info":
            asked = parse_qs(body.decode())["paths"] if b"paths=" in body else json.loads(body)["paths"]
            self.send_json([e for e in entries(tree, "", True) if e["path"] in asked])
        elif verb == "commits":
            trees = repo.branches[revision]
            titles = ["initial commit", *(repo.titles or ["upload"] * len(trees))]
            self.send_json(
                [{"id": commit_hash(t), "title": title, "message": "", "authors": [{"user": USER}], "date": DATE}
                 for t, title in zip(reversed(trees), reversed(titles[: len(trees)]))]
            )  # fmt: skip
        elif verb == "preupload":
            files = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if is_large(f["path"]) else "regular" for f in files}
            oids = {path: object_id(path, tree[path]) for path in modes if path in tree}
            self.send_json(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": oids.get(p)}
                           for p, m in modes.items()]}
            )  # fmt: skip
        elif verb == "commit":
            self.commit(repo, name, revision, dict(tree), [json.loads(line) for line in body.splitlines()])
        else:
            self.fail(404, "", f"this Hub does not know {self.path}")

    def commit(self, repo: Repo, name: str, revision: str, tree: dict[str, bytes], lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.titles.append(value["summary"])
            elif line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.large[value["oid"]]
            else:
                tree.pop(value["path"])
        repo.branches[revision].append(tree)
        sha = commit_hash(tree)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def batch(self, asked: dict) -> None:
        objects = []
        for wanted in asked["objects"]:
            if wanted["oid"] not in self.hub.large:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}", "header": {}}}
            objects.append(wanted)
        self.send_json({"transfer": "basic", "objects": objects})

    def resolve(self, parts: list[str], token: str) -> None:
        kind = "datasets" if parts[0] == "datasets" else "models"
        at = parts.index("resolve")
        repo = self.visible(kind, "/".join(parts[at - 2 : at]), token)
        if repo is None:
            return
        found = repo.find(parts[at + 1])
        if found is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {parts[at + 1]}")
        sha, tree = found
        name = "/".join(parts[at + 2 :])
        if name not in tree:
            return self.fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        etag = f'"{object_id(name, tree[name])}"'
        content, status, more = tree[name], 200, {}
        if (span := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = span.removeprefix("bytes=").partition("-")
            end = min(int(last or len(content)), len(content) - 1)
            more = {"Content-Range": f"bytes {first}-{end}/{len(content)}"}
            content, status = content[int(first) : end + 1], 206
        self.send(content, status, {"ETag": etag, "X-Repo-Commit": sha, "Accept-Ranges": "bytes"} | more)

    def send_json(self, value: object, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def fail(self, status: int, code: str, message: str, more: dict | None = None) -> None:
        headers = ({"X-Error-Code": code} if code else {}) | {"X-Error-Message": message} | (more or {})
        self.send(json.dumps({"error": message}).encode(), status, headers | {"Content-Type": "application/json"})

    def send(self, content: bytes, status: int = 200, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.hub.halved and self.hub.halved in self.path:
            content, self.close_connection = content[: len(content) // 2], True
        if self.command != "HEAD":
            self.wfile.write(content)


def object_id(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_large(path) else blob_hash(content)


def entries(tree: dict[str, bytes], below: str, recursive: bool) -> list[dict]:
    """Files and folders under a path, as the Hub lists them."""
    found, folders = [], set()
    for path, content in sorted(tree.items()):
        if below and not path.startswith(f"{below}/"):
            continue
        inner = path[len(below) + 1 if below else 0 :].split("/")
        folders |= {"/".join(([below] if below else []) + inner[:i]) for i in range(1, len(inner) if recursive else 2)}
        if recursive or len(inner) == 1:
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_hash(content)}
            if is_large(path):
                entry["lfs"] = {"oid": object_id(path, content), "size": len(content), "pointerSize": 130}
            found.append(entry)
    folders -= set(tree)
    return found + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]


def check_card(content: str) -> list[dict[str, str]]:
    """What the real Hub would refuse of a card's metadata, as far as these tests need it."""
    if not content.startswith("---\n"):
        return []
    try:
        data = yaml.safe_load(content.split("\n---\n")[0].removeprefix("---\n")) or {}
    except yaml.YAMLError as error:
        return [{"message": str(error)}]
    wrong = [key for key in ("tags", "metrics", "datasets") if not isinstance(data.get(key, []), list)]
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        wrong.append("base_model_relation")
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                wrong.append("model-index")
    return [{"message": f'"{key}" is not valid'} for key in wrong]


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """A Hub that listens on a free port of this machine until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
