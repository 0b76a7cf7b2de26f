"""A stand-in for the Hugging Face hub: what huggingface_hub asks to fetch and upload models."""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

_MODEL = re.compile(r"/api/models/([^/]+/[^/]+)(/(revision|tree)/([^/]+))?(/.*)?")


class Hub:
    """Models in memory: repository -> revision -> file -> bytes; `requests` are those that came."""

    def __init__(self, port):
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._file()

    def do_GET(self):
        self.hub.requests.append(self.path)
        if found := _MODEL.fullmatch(self.path.split("?")[0]):
            files = self._files(found[1], urllib.parse.unquote(found[4] or "main"))
            if files is None:
                return
            if found[3] == "tree":
                self._json([
                    {"type": "file", "path": n, "size": len(d), "oid": _sha(d)}
                    for n, d in files.items()
                ])  # fmt: skip
            else:
                siblings = [{"rfilename": name} for name in files]
                self._json({"id": found[1], "sha": _sha(files), "siblings": siblings})
        else:
            self._file()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append(self.path)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path)
        if self.path == "/api/repos/create":
            about = json.loads(body)
            repo = f"{about.get('organization') or 'me'}/{about['name']}"
            self.hub.models.setdefault(repo, {"main": {}})
            self._json({"url": f"{self.hub.address}/{repo}", "name": repo})
        elif found and found[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [
                {"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names
            ]})  # fmt: skip
        elif found:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "deletedFile":
                    del self.hub.models[found[1]]["main"][line["value"]["path"]]
                if line["key"] == "file":
                    data = base64.b64decode(line["value"]["content"])
                    self.hub.models[found[1]]["main"][line["value"]["path"]] = data
            oid = _sha(self.hub.models[found[1]]["main"])
            url = f"{self.hub.address}/{found[1]}/commit/{oid}"
            self._json({"success": True, "commitOid": oid, "commitUrl": url})
        else:
            self._json({"errors": [], "warnings": []})

    def _files(self, repo, revision):
        revisions = self.hub.models.get(repo)
        known = revisions and {**revisions, **{_sha(f): f for f in revisions.values()}}
        if not known or revision not in known:
            self._error("RevisionNotFound" if known else "RepoNotFound")
            return None
        return known[revision]

    def _file(self):
        path = self.path.split("?")[0]
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        if not found:
            return self._error("EntryNotFound")
        _, revision, name = map(urllib.parse.unquote, found.groups())
        files = self._files(found[1], revision)
        if files is None:
            return None
        if name not in files:
            return self._error("EntryNotFound", _sha(files))
        data = files[name]
        self.send_response(200)
        self.send_header("ETag", f'"{_sha(data)}"')
        self.send_header("X-Repo-Commit", _sha(files))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None

    def _json(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _error(self, code, commit=""):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _sha(value):
    data = value if isinstance(value, bytes) else repr(sorted(value.items())).encode()
    return hashlib.sha1(data).hexdigest()
