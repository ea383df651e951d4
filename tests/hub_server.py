"""A Hub on loopback: enough of the Hub's HTTP API for the real `huggingface_hub` client, 0.34 to 2.x.

Unusual: no client is patched. `huggingface_hub` reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE once, when it
is imported, so each client is a child process that starts with them set (tests/hub_client.py).
Xet is disabled there (HF_HUB_DISABLE_XET=1): its compiled client speaks to a chunk store of its own, outside
the Hub's API. Large files travel by Git LFS, as they do wherever hf_xet is not installed.
Left out: datasets, spaces, pull requests, multi-part LFS, paging, and the redirect of large files to a CDN.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

from tests.hub_client import Client

USER, TOKEN = "tester", "hf_the_token_of_tester"
LFS_NAME = re.compile(r".*\.(safetensors|bin|pt|pth)")  # what a new repository's .gitattributes sends by LFS
LFS_BYTES = 1 << 20  # larger files go by LFS whatever their name; the Hub's own limit is 10 MB
DATE = "2025-01-01T00:00:00.000Z"


class File(NamedTuple):
    data: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        """What names the content: git's blob id, or SHA-256 under LFS."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def facts(self) -> dict:
        """The row of a tree listing, but for the path."""
        facts = {"size": len(self.data), "oid": self.etag}
        return facts | ({"lfs": {**facts, "pointerSize": 130}} if self.lfs else {})


class Commit(NamedTuple):
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    name: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)  # the newest commit last

    def at(self, revision: str) -> Commit:
        """The head of a branch, or the commit of a full id."""
        for branch, commits in self.branches.items():
            for commit in reversed(commits):
                if revision in (branch, commit.oid):
                    return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, branch: str, files: dict[str, File], title: str) -> Commit:
        """Make `files` the whole content of `branch`, which starts at main if it is new."""
        commits = self.branches.setdefault(branch, list(self.branches.get("main", [])))
        listing = sorted((path, file.etag) for path, file in files.items())
        oid = hashlib.sha1(repr((self.name, branch, len(commits), title, listing)).encode()).hexdigest()
        commits.append(Commit(oid, title, files))
        return commits[-1]


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


class Refused(Exception):
    """An answer other than success; `code` is the header from which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **fields: Any):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = Reply(status, json.dumps({"error": message, **fields}).encode(), headers)


class Request(NamedTuple):
    """A line of the log: the path without its query, and the status answered."""

    method: str
    path: str
    status: int


class HubServer(ThreadingHTTPServer):
    """Repositories in memory behind `url`; `requests` is the log; `home` holds the caches of its clients.

    `after` is called with each request before it is answered: a test can commit between two of them.
    """

    daemon_threads = True

    def __init__(self, home: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.home = f"http://127.0.0.1:{self.server_port}", home
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.after: Callable[[Request], None] = lambda request: None
        self.lock = threading.Lock()  # one request at a time reads or changes the repositories
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main", private: bool = False) -> str:
        """Commit `files` on top of a branch of a repository, either new or not; returns the commit's id."""
        with self.lock:
            kept = self.repos.setdefault(repo, Repo(repo, private))
            branch = kept.branches.get(revision) or kept.branches.get("main")
            before = branch[-1].files if branch else {}
            added = {path: File(data, goes_by_lfs(path, len(data))) for path, data in files.items()}
            return kept.commit(revision, before | added, "add").oid

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """{path: content} of a branch or a commit."""
        return {path: file.data for path, file in self.repos[repo].at(revision).files.items()}

    def environment(self, home="home", *, offline: bool = False, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a process whose Hub this is; `home` names its cache, empty at first."""
        ours = re.compile(r"HF_|HUGGING|TRANSFORMERS_|\w+_proxy$", re.IGNORECASE)
        made = {name: value for name, value in os.environ.items() if not ours.match(name)}
        made |= {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home / home), "HF_HUB_DISABLE_XET": "1"}
        made |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return made | ({"HF_HUB_OFFLINE": "1"} if offline else {}) | ({"HF_TOKEN": token} if token else {})

    def client(self, *arguments: Any, **options: Any) -> Client:
        """A process whose Hub this is; takes what `environment` takes."""
        return Client(self.environment(*arguments, **options))


def goes_by_lfs(path: str, size: int) -> bool:
    # an empty file has no LFS object: the client sends it as a regular one
    return size > LFS_BYTES or (size > 0 and LFS_NAME.fullmatch(path) is not None)


ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(methods: str, path: str) -> Callable:
    """Serve a path in which {repo} is owner/name, {rest} any path, and other fields are one segment."""
    patterns = {"repo": r"(?P<repo>[^/]+/[^/]+?)", "rest": r"(?P<rest>.+)"}
    pattern = re.compile(re.sub(r"{(\w+)}", lambda m: patterns.get(m[1], f"(?P<{m[1]}>[^/]+)"), path))
    return lambda function: ROUTES.append((methods, pattern, function)) or function


class Handler(BaseHTTPRequestHandler):
    """One request: reads the whole body, finds the endpoint, logs, answers."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body of each answer waits 40 ms for its headers' receipt

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query, self.body = parse_qs(url.query), self.read_body()
        try:
            reply = self.find(url.path)
        except Refused as refused:
            reply = refused.reply
        except Exception as error:  # a fault of this server, or a request no client should have made
            reply = Refused(500, f"tests/hub_server.py: {error!r}").reply
        self.server.requests.append(Request(self.command, unquote(url.path), reply.status))
        self.server.after(self.server.requests[-1])
        self.send_response(reply.status)
        for name, value in {"Content-Length": len(reply.body), **reply.headers}.items():
            self.send_header(name, " ".join(str(value).split()))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def find(self, path: str) -> Reply:
        for methods, pattern, function in ROUTES:
            found = pattern.fullmatch(path)
            if found and self.command in methods.split():
                parts = {name: unquote(part) for name, part in found.groupdict().items()}
                with self.server.lock:
                    result = function(self, **parts)
                return result if isinstance(result, Reply) else Reply(200, json.dumps(result).encode(), {})
        raise Refused(404, f"{self.command} {path}: not spoken by this server")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def json(self) -> Any:
        return json.loads(self.body)

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr: the log is `HubServer.requests`."""

    def signed_in(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Refused(401, "Invalid credentials in Authorization header")
        return given is not None

    def may_write(self, namespace: str) -> None:
        if not self.signed_in():
            raise Refused(401, "Invalid username or password.")
        if namespace != USER:
            raise Refused(403, f"You don't have the rights to write under the namespace {namespace}")

    def repo(self, name: str, write: bool = False) -> Repo:
        """The repository, if the caller may see it: a private one looks like one that does not exist."""
        known, found = self.signed_in(), self.server.repos.get(name)
        if found is None or (found.private and not known):
            message = "Repository not found" if known else "Invalid username or password."
            raise Refused(404 if known else 401, message, "RepoNotFound")
        if write:
            self.may_write(name.split("/")[0])
        return found

    # The endpoints, in the order in which a download and then an upload meet them.

    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{revision}")
    def model_info(self, repo: str, revision: str = "main") -> dict:
        found = self.repo(repo)
        commit = found.at(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        about = {"id": repo, "sha": commit.oid, "private": found.private, "siblings": siblings, "tags": []}
        return about | {"gated": False, "createdAt": DATE, "lastModified": DATE}

    @route("GET", "/api/models/{repo}/tree/{revision}")
    def tree(self, repo: str, revision: str) -> list[dict]:
        files = self.repo(repo).at(revision).files
        if self.query.get("recursive", [""])[0].lower() != "true":
            raise Refused(400, "this server lists whole trees only: recursive=True")
        return [{"type": "file", "path": path, **file.facts()} for path, file in files.items()]

    @route("HEAD GET", "/{repo}/resolve/{revision}/{rest}")
    def resolve(self, repo: str, revision: str, rest: str) -> Reply:
        commit = self.repo(repo).at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if rest not in commit.files:
            refused = Refused(404, "Entry not found", "EntryNotFound").reply
            return refused._replace(headers=refused.headers | headers)
        file = commit.files[rest]
        size = len(file.data)
        headers |= {"ETag": f'"{file.etag}"', "X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return Reply(200, file.data, headers)
        first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        if first > last:
            return Reply(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Reply(206, file.data[first : last + 1], headers)

    @route("POST", "/api/repos/create")
    def create_repo(self) -> dict:
        asked = self.json()
        namespace = asked.get("organization") or USER
        self.may_write(namespace)
        name = f"{namespace}/{asked['name']}"
        answer = {"name": name, "url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            raise Refused(409, "You already created this model repo", **answer)
        private = asked.get("private") or asked.get("visibility") == "private"  # 0.34, and 2.x
        repo = self.server.repos[name] = Repo(name, bool(private))
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return answer

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> dict:
        """The front matter of a model card is a YAML mapping; without any, the Hub warns."""
        front = re.match(r"---\r?\n(.*?)^---", self.json()["content"], re.DOTALL | re.MULTILINE)
        warnings = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
        try:
            if front and not isinstance(yaml.safe_load(front[1]), dict):
                raise yaml.YAMLError("the metadata is not a mapping")
        except yaml.YAMLError as error:
            raise Refused(400, "invalid metadata", errors=[{"message": str(error)}]) from error
        return {"errors": [], "warnings": warnings}

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, repo: str, revision: str) -> dict:
        """Which way each file has to go, and what the branch holds under its name now."""
        present = self.repo(repo, write=True).at(revision).files
        rows = self.json()["files"]
        for row in rows:
            row["uploadMode"] = "lfs" if goes_by_lfs(row["path"], row.pop("size")) else "regular"
            row["oid"] = present[row["path"]].etag if row["path"] in present else None
            row["shouldIgnore"] = False
        return {"files": rows}

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> dict:
        self.repo(repo, write=True)
        rows = self.json()["objects"]
        for row in rows:
            if row["oid"] not in self.server.lfs:  # a row without actions: that object is here already
                at = f"{self.server.url}/lfs/{row['oid']}"
                row["actions"] = {"upload": {"href": at}, "verify": {"href": f"{at}/verify"}}
        return {"transfer": "basic", "objects": rows}

    @route("PUT", "/lfs/{oid}")
    def lfs_put(self, oid: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, f"the {len(self.body)} bytes received do not have the SHA-256 {oid}")
        self.server.lfs[oid] = self.body
        return {}

    @route("POST", "/lfs/{oid}/verify")
    def lfs_verify(self, oid: str) -> dict:
        if oid not in self.server.lfs or len(self.server.lfs[oid]) != self.json()["size"]:
            raise Refused(404, f"LFS object {oid} was not uploaded in full")
        return {}

    @route("POST", "/api/models/{repo}/commit/{branch}")
    def commit(self, repo: str, branch: str) -> dict:
        found = self.repo(repo, write=True)
        head = found.at(branch)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", head.oid) != head.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for kind, value in [(operation["key"], operation["value"]) for operation in operations]:
            path = value["path"]
            if kind == "file":
                files[path] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile" and value["oid"] in self.server.lfs:
                files[path] = File(self.server.lfs[value["oid"]], True)
            elif kind == "deletedFile" and path in files:
                del files[path]
            else:
                raise Refused(400, f"cannot commit {kind} {path}: unknown operation, LFS object or file")
        made = found.commit(branch, files, header["value"]["summary"])
        return {"commitOid": made.oid, "commitUrl": f"{self.server.url}/{repo}/commit/{made.oid}"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub without repositories for the tests of a module; each of them adds repositories of its own."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server
