"""An object store in memory, at gs://: for etils.epath by fsspec; for TensorStore and ArrayRecord
by HTTP.

Like a real one it has no folders (a folder exists while an object lies in it), a file appears
when it is closed, and nothing can be appended to it.
"""

import contextlib
import http.server
import io
import json
import sys
import threading
import types
import urllib.parse

import fsspec
from etils import epath
from etils.epath import backend
from fsspec.spec import AbstractFileSystem

OBJECTS: dict[str, bytes] = {}  # "bucket/path/of/object": content
GENERATION: dict[str, int] = {}  # how often each was written, which TensorStore asks for
FORBIDDEN = ""  # objects with this in their name are refused by HTTP; "": none


def put(name, content):
    OBJECTS[name] = bytes(content)
    GENERATION[name] = GENERATION.get(name, 0) + 1


class Bucket(AbstractFileSystem):
    """What gcsfs is for Google's store."""

    protocol = ("gs", "gcs")
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path)
        for scheme in ("gs://", "gcs://"):
            path = path.removeprefix(scheme)
        return path.strip("/")

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if path in OBJECTS:
            found = {path: "file"}
        else:
            inside = [name for name in OBJECTS if name.startswith(f"{path}/")]
            found = {}
            for name in inside:
                child, _, below = name.removeprefix(f"{path}/").partition("/")
                found[f"{path}/{child}"] = "directory" if below else "file"
            if not found:
                raise FileNotFoundError(path)
        entries = [
            {"name": name, "type": kind, "size": len(OBJECTS.get(name, b""))}
            for name, kind in sorted(found.items())
        ]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path, **_):
        path = self._strip_protocol(path)
        if path in OBJECTS:
            return {"name": path, "type": "file", "size": len(OBJECTS[path])}
        self.ls(path)
        return {"name": path, "type": "directory", "size": 0}

    def _open(self, path, mode="rb", **_):
        path = self._strip_protocol(path)
        if mode == "rb":
            if path not in OBJECTS:
                raise FileNotFoundError(path)
            return io.BytesIO(OBJECTS[path])
        assert mode == "wb", f"an object store cannot open {path} with mode {mode}"
        return _Upload(path)

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def rm(self, path, recursive=False, **_):
        path = self._strip_protocol(path)
        names = [name for name in OBJECTS if name == path or name.startswith(f"{path}/")]
        if not names:
            raise FileNotFoundError(path)
        assert recursive or names == [path], f"{path} is a folder"
        for name in names:
            del OBJECTS[name]

    def mv(self, path1, path2, **_):
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        for name in [n for n in OBJECTS if n == source or n.startswith(f"{source}/")]:
            put(target + name.removeprefix(source), OBJECTS.pop(name))

    def cp_file(self, path1, path2, **_):
        source = self._strip_protocol(path1)
        if source not in OBJECTS:  # a folder, for one
            raise FileNotFoundError(path1)
        put(self._strip_protocol(path2), OBJECTS[source])


class _Upload(io.BytesIO):
    def __init__(self, path):
        super().__init__()
        self._path = path

    def close(self):
        if not self.closed:
            put(self._path, self.getvalue())
        super().close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """The part of Google's JSON API that TensorStore uses."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _reply(self, status, body=b"", headers=()):
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _parse(self):
        """Bucket, object and query of the request."""
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        parts = url.path.partition("/b/")[2].split("/")
        name = urllib.parse.unquote(query.get("name") or "/".join(parts[2:]))
        return parts[0], f"{parts[0]}/{name}" if name else "", query

    def _matches(self, name, query):
        """Whether the conditions of the request hold; replies where they do not."""
        generation = GENERATION[name] if name in OBJECTS else 0
        wanted = query.get("ifGenerationMatch")
        unwanted = query.get("ifGenerationNotMatch")
        if wanted is not None and int(wanted) != generation:
            self._reply(412)
        elif unwanted is not None and int(unwanted) == generation:
            self._reply(304)
        else:
            return True
        return False

    def _describe(self, name):
        return {
            "name": name.partition("/")[2],
            "bucket": name.partition("/")[0],
            "generation": str(GENERATION[name]),
            "size": str(len(OBJECTS[name])),
            "timeCreated": "2026-01-01T00:00:00Z",
            "updated": "2026-01-01T00:00:00Z",
        }

    def do_GET(self):
        bucket, name, query = self._parse()
        if not name:
            prefix = f"{bucket}/{query.get('prefix', '')}"
            names = sorted(other for other in OBJECTS if other.startswith(prefix))
            self._reply(200, {"items": [self._describe(name) for name in names]})
        elif FORBIDDEN and FORBIDDEN in name:
            self._reply(403)
        elif name not in OBJECTS:
            self._reply(404)
        elif self._matches(name, query):
            content = OBJECTS[name]
            headers = [("x-goog-generation", str(GENERATION[name]))]
            if query.get("alt") != "media":
                return self._reply(200, self._describe(name))
            span = self.headers.get("Range")
            if span:
                start, _, end = span.removeprefix("bytes=").partition("-")
                first = int(start) if start else max(len(content) - int(end), 0)
                last = int(end) if end and start else len(content) - 1
                last = min(last, len(content) - 1)
                headers.append(("Content-Range", f"bytes {first}-{last}/{len(content)}"))
                return self._reply(206, content[first : last + 1], headers)
            self._reply(200, content, headers)

    def do_POST(self):
        _, name, query = self._parse()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._matches(name, query):
            put(name, content)
            self._reply(200, self._describe(name))

    def do_DELETE(self):
        _, name, query = self._parse()
        if name not in OBJECTS:
            self._reply(404)
        elif self._matches(name, query):
            del OBJECTS[name]
            self._reply(204)


def upload(folder, target):
    """Copies a local folder with all that is in it."""
    for path in folder.rglob("*"):
        if path.is_file():
            put(f"{target}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@contextlib.contextmanager
def serve(monkeypatch):
    """Lets gs:// mean this store in the block; yields epath.Path("gs://bucket")."""
    OBJECTS.clear()
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    # epath keeps the file system that it found first, of another test for one.
    forget = backend.fsspec_backend._get_filesystem.cache_clear
    forget()
    # Orbax asks Google's client for the kind of bucket; this is one of the usual kind.
    client = types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace())
    storage = types.SimpleNamespace(Client=lambda: client)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
    google_cloud = types.ModuleType("google.cloud")
    google_cloud.storage = storage
    monkeypatch.setitem(sys.modules, "google.cloud", google_cloud)

    with http.server.ThreadingHTTPServer(("localhost", 0), _Handler) as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{server.server_port}")
        address = f"http://localhost:{server.server_port}"
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield epath.Path("gs://bucket")
        finally:
            server.shutdown()
            thread.join()
            forget()
