"""A small W&B server on 127.0.0.1 for the real SDK: it notes what was asked, used, made and sent."""

import gzip
import hashlib
import json
import re
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"


class WandbServer(ThreadingHTTPServer):
    """Keeps file contents by MD5, as W&B does, so that known content is not asked for again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.contents: dict[str, bytes] = {}  # by hexadecimal MD5
        self.sent: list[str] = []  # names of artifact files, as uploaded
        self.artifacts: list[dict[str, Any]] = []
        self.used: list[tuple[str, str]] = []  # (run, artifact), as in a lineage graph
        self.made: list[tuple[str, str]] = []
        self.asked: list[str] = []
        self.downloads_left = -1  # downloads to serve before they stall; -1: all
        self.stalled = threading.Event()
        self.refuses = ""  # operation to answer with an error
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hang up: the SDK's service does at its end."""

    def name(self, artifact: dict[str, Any]) -> str:
        return f"{artifact['name']}:v{artifact['version']}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _reply(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        content, (_, kind, subject) = self._body(), self.path.split("/", 2)
        with self.server.lock:
            if kind == "file":
                digest = hashlib.md5(content).hexdigest()
                self.server.contents[digest] = content
                self.server.sent.append(subject.partition("/")[2])
            elif kind == "manifest":
                self.server.artifacts[int(subject)]["manifest"] = json.loads(content)
        self._reply(b"{}")

    def do_GET(self) -> None:
        _, kind, subject = self.path.split("/", 2)
        if kind == "manifest":
            return self._reply(json.dumps(self.server.artifacts[int(subject)]["manifest"]).encode())
        with self.server.lock:
            stalls = self.server.downloads_left == 0
            self.server.downloads_left -= self.server.downloads_left > 0
        if stalls:
            self.server.stalled.set()
            while self.server.downloads_left == 0:
                time.sleep(0.01)
        content = self.server.contents.get(subject)
        self._reply(content or b"", 404 if content is None else 200)

    def do_POST(self) -> None:
        body = self._body()
        if not self.path.endswith("/graphql"):  # metrics and console lines
            return self._reply(b"{}")
        request = json.loads(body)
        found = re.match(r"\s*(?:query|mutation)\s+(\w+)", request["query"])
        operation, variables = found[1] if found else "", request.get("variables") or {}
        variables |= variables.pop("input", {})
        with self.server.lock:
            self.server.asked.append(operation)
            if operation == self.server.refuses:
                return self._reply(b'{"errors": [{"message": "refused by the test"}]}', 400)
            answer = getattr(self, f"answer_{operation}", lambda _: {})(variables)
        return self._reply(json.dumps({"data": answer}).encode())

    # --- one method per operation of wandb 0.31 ---

    def answer_Viewer(self, _: dict) -> dict:
        viewer = {"id": "V", "entity": ENTITY, "username": "me", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def answer_GetDefaultEntity(self, _: dict) -> dict:
        return {"viewer": {"id": "V", "entity": ENTITY}}

    def answer_ServerFeaturesQuery(self, _: dict) -> dict:
        return {"serverInfo": {"features": []}}

    def answer_RunResumeStatus(self, _: dict) -> dict:
        return {"model": None}

    def answer_ArtifactType(self, _: dict) -> dict:
        return {"project": None}

    def answer_UpsertBucket(self, given: dict) -> dict:
        project = {"id": "P", "name": given.get("project") or "uncategorized"}
        bucket = {"id": "B", "name": given["name"], "displayName": "a run", "config": "{}"}
        bucket |= {"description": None, "sweepName": None, "historyLineCount": 0}
        bucket["project"] = {**project, "entity": {"id": "E", "name": ENTITY}}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def answer_CreateRunFiles(self, given: dict) -> dict:
        files = [{"name": name, "uploadUrl": f"{self.server.url}/run/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}

    def answer_CreateArtifact(self, given: dict) -> dict:
        name, artifacts = given["artifactCollectionName"], self.server.artifacts
        versions = [a for a in artifacts if a["name"] == name]
        artifact = next((a for a in versions if a["digest"] == given["digest"]), None)
        if artifact is None:
            artifact = {"id": len(artifacts), "name": name, "version": len(versions), "state": "PENDING"}
            artifact |= {"digest": given["digest"], "type": given["artifactTypeName"]}
            artifact |= {"project": given["projectName"], "metadata": given.get("metadata")}
            artifacts.append(artifact)
        artifact["aliases"] = sorted(alias["alias"] for alias in given.get("aliases") or [])
        if given.get("runName"):
            self.server.made.append((given["runName"], self.server.name(artifact)))
        latest = (
            {"id": str(versions[-1]["id"]), "versionIndex": versions[-1]["version"]} if versions else None
        )
        known = {"id": str(artifact["id"]), "state": artifact["state"]}
        known["artifactSequence"] = {"id": name, "latestArtifact": latest}
        return {"createArtifact": {"artifact": known}}

    def answer_CreateArtifactManifest(self, given: dict) -> dict:
        url = f"{self.server.url}/manifest/{given['artifactID']}"
        file = {"id": "F", "name": given["name"], "displayName": given["name"]}
        file |= {"uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": file}}}

    def answer_CreateArtifactFiles(self, given: dict) -> dict:
        def node(file: dict) -> dict:
            digest = b64decode(file["md5"]).hex()
            url = (
                None if digest in self.server.contents else f"{self.server.url}/file/{digest}/{file['name']}"
            )
            answer = {"id": "F", "name": file["name"], "displayName": file["name"], "storagePath": digest}
            answer |= {"uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            return {"node": {**answer, "artifact": {"id": file["artifactID"]}}}

        return {"createArtifactFiles": {"files": {"edges": [node(file) for file in given["artifactFiles"]]}}}

    def answer_CommitArtifact(self, given: dict) -> dict:
        artifact = self.server.artifacts[int(given["artifactID"])]
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": artifact["digest"]}}}

    def answer_UseArtifact(self, given: dict) -> dict:
        artifact = self.server.artifacts[int(given["artifactID"])]
        self.server.used.append((given["runName"], self.server.name(artifact)))
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    # --- reading ---

    def _fragment(self, artifact: dict) -> dict:
        project = {"id": "P", "internalId": "P", "name": artifact["project"], "entity": {"name": ENTITY}}
        collection = {"__typename": "ArtifactSequence", "name": artifact["name"], "project": project}
        files = artifact["manifest"]["contents"]
        return {
            "__typename": "Artifact",
            "id": str(artifact["id"]),
            "artifactSequence": collection,
            "versionIndex": artifact["version"],
            "artifactType": {"name": artifact["type"]},
            "description": None,
            "metadata": artifact["metadata"],
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": artifact["state"],
            "size": sum(file["size"] for file in files.values()),
            "digest": artifact["digest"],
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": "0",
            "fileCount": len(files),
            "createdAt": "2026-01-01T00:00:00",
            "updatedAt": None,
            "aliases": [],
        }

    def answer_ArtifactByID(self, given: dict) -> dict:
        return {"artifact": self._fragment(self.server.artifacts[int(given["id"])])}

    def answer_ArtifactMembershipByName(self, given: dict) -> dict:
        name, _, alias = given["name"].partition(":")
        versions = [a for a in self.server.artifacts if a["name"] == name]
        found = [a for a in versions if alias in (f"v{a['version']}", *a["aliases"])]
        if not found:
            return {"project": {"artifactCollectionMembership": None}}
        artifact = self._fragment(found[-1])
        membership = {"__typename": "ArtifactCollectionMembership", "id": "C", "aliases": []}
        membership |= {"versionIndex": artifact["versionIndex"], "createdAt": artifact["createdAt"]}
        membership |= {"artifactCollection": artifact["artifactSequence"], "artifact": artifact}
        return {"project": {"artifactCollectionMembership": membership}}

    def answer_FetchArtifactManifest(self, given: dict) -> dict:
        url = f"{self.server.url}/manifest/{given['id']}"
        return {"artifact": {"currentManifest": {"id": "M", "file": {"directUrl": url}}}}

    def answer_GetArtifactMembershipFileUrls(self, given: dict) -> dict:
        versions = [a for a in self.server.artifacts if a["name"] == given["collection"]]
        (artifact,) = [a for a in versions if given["alias"] in (f"v{a['version']}", *a["aliases"])]

        def node(name: str, digest: str) -> dict:
            return {
                "node": {"name": name, "directUrl": f"{self.server.url}/content/{b64decode(digest).hex()}"}
            }

        edges = [node(name, file["digest"]) for name, file in artifact["manifest"]["contents"].items()]
        files = {"pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": edges}
        collection = {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
        return {"project": {"artifactCollection": collection}}


@contextmanager
def serve() -> Iterator[WandbServer]:
    """Run the server in a thread."""
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


if __name__ == "__main__":
    with serve() as running:
        print(running.url)
        input()
