"""The part of the metadata server of EC2 that gives a machine the credentials of its role."""

import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROLES = "/latest/meta-data/iam/security-credentials/"


class CredentialServer(ThreadingHTTPServer):
    """A server on 127.0.0.1 that answers the next `refusals` requests with 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refusals = 0
        self.refused = 0

    def __enter__(self) -> "CredentialServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make this the only source of credentials."""
        url = f"http://127.0.0.1:{self.server_address[1]}"
        no_file = {"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_CONFIG_FILE": "/dev/null"}
        return no_file | {"AWS_EC2_METADATA_SERVICE_ENDPOINT": url, "AWS_EC2_METADATA_DISABLED": "false"}


class Handler(BaseHTTPRequestHandler):
    """The answers."""

    def do_PUT(self) -> None:
        self.answer("token")

    def do_GET(self) -> None:
        if self.path == ROLES:
            self.answer("role")
            return
        expiration = (datetime.now(UTC) + timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M:%SZ")
        keys = {"Code": "Success", "AccessKeyId": "key", "SecretAccessKey": "secret", "Token": "session"}
        self.answer(json.dumps(keys | {"Expiration": expiration}))

    def answer(self, text: str) -> None:
        assert isinstance(self.server, CredentialServer)
        refused = self.server.refusals > 0
        self.server.refusals -= refused
        self.server.refused += refused
        self.send_response(503 if refused else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass
