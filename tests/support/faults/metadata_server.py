"""The part of the metadata servers of EC2 and Compute Engine that announces the termination of spot machines."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a-token"


class MetadataServer:
    """A server on 127.0.0.1 that answers as those of EC2 and Compute Engine do."""

    def __init__(self) -> None:
        self.announced = False
        state = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                self.answer(200 if asked else 404, TOKEN)

            def do_GET(self) -> None:
                if self.path == "/latest/meta-data/spot/instance-action":
                    if self.headers["X-aws-ec2-metadata-token"] != TOKEN:
                        self.answer(401)
                    elif state.announced:
                        self.answer(200, '{"action": "terminate", "time": "2026-11-25T08:22:00Z"}')
                    else:
                        self.answer(404)
                elif self.path == "/computeMetadata/v1/instance/preempted":
                    known = self.headers["Metadata-Flavor"] == "Google"
                    self.answer(200 if known else 403, str(state.announced).upper())
                else:
                    self.answer(404)

            def answer(self, status: int, body: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> "MetadataServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """The URL of the server."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def announce_termination(self) -> None:
        """Announce from now on that the machine will be terminated."""
        self.announced = True
