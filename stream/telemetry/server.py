"""The scrape endpoint: `GET /metrics` on 127.0.0.1, or anywhere else behind a bearer token.

One daemon thread accepts, one answers each scrape; nothing here touches the service's state beyond reading
the registry, which locks per series.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from stream.records.errors import ConfigurationError, ResourceError

_StartResponse = Callable[[str, list[tuple[str, str]]], Any]
_Application = Callable[[dict[str, Any], _StartResponse], Iterable[bytes]]


class MetricsServer:
    """A running endpoint.

    Parameters
    ----------
    registry
        What to show.
    host
        Address to listen on.
    port
        TCP port; 0 picks a free one, see `port` afterwards.
    token
        Bearer token that a scrape has to bring; required when `host` is not a loopback address.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int, token: str | None = None) -> None:
        if token is not None and not token.strip():
            raise ConfigurationError("metrics token", "a token has at least one visible character")
        if token is None and not is_loopback(host):
            raise ConfigurationError("metrics host", "an address other than loopback needs a token", host)
        application = _require_token(make_wsgi_app(registry), token)
        server_class = _ServerV6 if ":" in host else ThreadingWSGIServer
        try:
            self._server = make_server(host, port, application, server_class, handler_class=_QuietHandler)
        except OSError as error:
            raise ResourceError(f"{host}:{port}", "the metrics port can be listened on", error) from error
        self.host = host
        self.port = int(self._server.server_address[1])
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where to scrape."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop listening; safe to call twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_token(application: Any, token: str | None) -> _Application:  # noqa: ANN401 - untyped upstream
    expected = None if token is None else f"Bearer {token}".encode()

    def guarded(environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        given = str(environ.get("HTTP_AUTHORIZATION", "")).encode("latin-1", "replace")
        if expected is not None and not hmac.compare_digest(given, expected):
            start_response("401 Unauthorized", [("WWW-Authenticate", 'Bearer realm="icestream"')])
            return [b"a bearer token is needed\n"]
        if environ.get("PATH_INFO") != "/metrics":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"see /metrics\n"]
        body: Iterable[bytes] = application(environ, start_response)
        return body

    return guarded


class _ServerV6(ThreadingWSGIServer):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    """A scrape every few seconds is no news."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""
