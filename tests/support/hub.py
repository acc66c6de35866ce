"""A server on loopback in the layouts of the two hubs: data sets of Hugging Face, and of ModelScope."""

import contextlib
import hashlib
import http.server
import json
import threading
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


def layout(repositories):
    """A handler that serves {"owner/name": {file: bytes}}."""

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def reply(self, content, status=200, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def reply_json(self, value, status=200, **headers):
            self.reply(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            for name, files in repositories.items():
                if path.startswith(f"/datasets/{name}/resolve/"):
                    return self.reply_file(files, path.split("/", 6)[6])
                if path.startswith(f"/api/datasets/{name}"):
                    return self.reply_json(self.on_hugging_face(name, files, path))
                if path == f"/api/v1/datasets/{name}":
                    return self.reply_json({"Data": {"Id": 7}})
                if path == "/api/v1/datasets/7/repo/tree":
                    assert parse_qs(urlsplit(self.path).query)["Recursive"] == ["True"]
                    listed = [{"Path": file, "Type": "blob", "Size": len(files[file])} for file in files]
                    return self.reply_json({"Data": {"Files": listed}})
            self.reply_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self):
            wanted = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            path = unquote(urlsplit(self.path).path)
            for name, files in repositories.items():
                if path.startswith(f"/api/datasets/{name}/paths-info"):
                    found = [file for file in files if file in wanted.get("paths", [])]
                    return self.reply_json([self.entry(files, file) for file in found])
            self.reply_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

        def reply_file(self, files, file):
            if file not in files:
                return self.reply_json(
                    {"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA
                )
            tag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
            self.reply(files[file], ETag=tag, X_Repo_Commit=SHA, Accept_Ranges="none")

        def entry(self, files, file):
            return {
                "type": "file",
                "path": file,
                "size": len(files[file]),
                "oid": hashlib.sha1(files[file]).hexdigest(),
            }

        def on_hugging_face(self, name, files, path):
            if "/tree/" in path:
                return [self.entry(files, file) for file in files]
            siblings = [{"rfilename": file} for file in files]
            return {"id": name, "sha": SHA, "siblings": siblings, "private": False, "gated": False, "tags": []}

    return Hub


@contextlib.contextmanager
def served(repositories):
    """The address of a hub with these repositories."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), layout(repositories)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
