"""Serves the page on this machine, to whoever holds its secret address, and keeps what is edited in a file.

Only 127.0.0.1 listens. The address holds a random token; without it everything is 404. A request must name this server
as its host (a page elsewhere cannot point its own name here) and, to save, come from the page itself. No part of an
address ever becomes a path: the page, the edited state and the evidence of a feature by its owner and two numbers are
all there is.
"""

import hmac
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fasttc.report.evidence import FeatureFolder, find_evidence
from fasttc.report.page import page_html, policy
from fasttc.report.state import State, origin, read_state, write_state

MAX_BODY = 4_000_000  # bytes of edited state
_FEATURE = re.compile(r"features/(transcoder|adapter)/([0-9]{1,6})/([0-9]{1,9})")
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class PageServer(ThreadingHTTPServer):
    """The page of one graph at a secret address of this machine.

    Args:
        data: from ``page_data``.
        state_file: where edited state is read from, if it is there, and saved to.
        state: where it starts if there is no such file yet; empty by default.
        features: where feature evidence comes from; the first folder that has some of a feature is taken.
        port: 0 takes a free one.

    Attributes:
        url: the address to open.

    Raises:
        ValueError: a state file that is not one.
        OSError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = False

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        state_file: str | Path,
        state: State | None = None,
        features: Sequence[FeatureFolder] = (),
        port: int = 0,
    ) -> None:
        self.state_file = Path(state_file)
        self.initial = state
        self.features = features
        self.data = {**data, "has_evidence": bool(features), "state_file": self.state_file.name}
        self.saving = threading.Lock()
        self.state()
        super().__init__(("127.0.0.1", port), _Handler)
        self.token = secrets.token_urlsafe(24)
        self.url = f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def state(self) -> State | None:
        """The edited state as saved, else where it starts."""
        return read_state(self.state_file) if self.state_file.exists() else self.initial


class _Handler(BaseHTTPRequestHandler):
    server: PageServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version = "fasttc"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        place = self._place()
        if place is None:
            return
        feature = _FEATURE.fullmatch(place)
        if place == "":
            self._answer(self._page)
        elif feature is not None:
            self._answer(lambda: self._evidence(feature[1], int(feature[2]), int(feature[3])))
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        place = self._place()
        if place is None:
            return
        if wrong := self._wrong_post(place):
            self._refuse(wrong)
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(lambda: self._save(body))

    def _wrong_post(self, place: str) -> HTTPStatus | None:
        """Why nothing is saved, before anything is read."""
        length = self.headers.get("Content-Length", "")
        if place != "state":
            return HTTPStatus.NOT_FOUND
        if self.headers.get("Origin") != f"http://{self.headers['Host']}":
            return HTTPStatus.FORBIDDEN
        if self.headers.get_content_type() != "application/json":
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        if not length.isdecimal():
            return HTTPStatus.LENGTH_REQUIRED
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE if int(length) > MAX_BODY else None

    def _place(self) -> str | None:
        """What is asked for, below the secret part of the address; None once refused."""
        port = self.server.server_port
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._refuse(HTTPStatus.FORBIDDEN)
            return None
        secret, slash, place = self.path.removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(secret.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        return place

    def _page(self) -> tuple[bytes, str]:
        return page_html(
            self.server.data, self.server.state(), served=True
        ).encode(), "text/html; charset=utf-8"

    def _evidence(self, owner: Any, layer: int, index: int) -> tuple[bytes, str]:
        found = find_evidence(self.server.features, owner, layer, index)
        return json.dumps(found).encode(), "application/json"

    def _save(self, body: bytes) -> tuple[bytes, str]:
        try:
            content = json.loads(body)
        except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"state: expected JSON, got {error}") from error
        with self.server.saving:
            write_state(self.server.state_file, content, origin(self.server.initial))
        return b"{}", "application/json"

    def _answer(self, make: Callable[[], tuple[bytes, str]]) -> None:
        """Sends what ``make`` returns; wrong input and unreadable files are the client's to see, in one line."""
        try:
            body, kind = make()
        except (ValueError, TypeError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, " ".join(str(error).split()))
        except OSError as error:
            self._refuse(HTTPStatus.INSUFFICIENT_STORAGE, " ".join(str(error).split()))
        else:
            self._send(HTTPStatus.OK, body, kind)

    def _refuse(self, status: HTTPStatus, reason: str = "") -> None:
        self.close_connection = True
        self._send(status, f"{reason or status.phrase}\n".encode(), "text/plain; charset=utf-8")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}
        if kind.startswith("text/html"):
            headers["Content-Security-Policy"] = f"{policy(served=True)}; frame-ancestors 'none'"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log would hold the secret."""
