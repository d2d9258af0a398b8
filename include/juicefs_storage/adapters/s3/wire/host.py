"""Where connections go: names, addresses, TLS."""

from __future__ import annotations

import os
import socket
import time
from functools import lru_cache
from typing import TYPE_CHECKING

from include.juicefs_storage.adapters.s3.wire.connection import IN, OUT, Connection, TlsConnection
from include.juicefs_storage.errors import PermanentError

if TYPE_CHECKING:
    import ssl

    from include.juicefs_storage.adapters.s3.wire.limits import Limits, Steps


class Host:
    """Where connections go: `http(s)://host[:port]`.

    Args:
        url: Without a path.
        verify: Whether a certificate is checked, or the file of the authorities to trust.
    """

    def __init__(self, url: str, *, verify: bool | str = True) -> None:
        from urllib.parse import urlsplit

        parts = urlsplit(url)
        self.tls = parts.scheme == "https"
        self.name = parts.hostname or ""
        self.port = parts.port or (443 if self.tls else 80)
        #: The Host header: without the port where that is the scheme's own, as S3 clients sign it.
        self.header = parts.netloc if parts.port != (443 if self.tls else 80) else parts.netloc.rpartition(":")[0]
        self._verify = verify

    @property
    def proxy_note(self) -> str:
        """That the environment names a proxy, which is not used; empty where it names none for this host."""
        from urllib.request import getproxies, proxy_bypass

        scheme = "https" if self.tls else "http"
        if not getproxies().get(scheme) or proxy_bypass(self.name):
            return ""
        return f". {scheme.upper()}_PROXY is set on this worker and not used: it must reach {self.name} directly"

    def connect(self, limits: Limits) -> Steps[Connection]:
        """Open a connection to the first address that takes one.

        Raises:
            OSError: None does; a certificate that is not trusted is an `ssl.SSLCertVerificationError`.
        """
        problem: Exception = OSError(f"{self.name} has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(self.name, self.port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(sock)
                connection.deadline = time.monotonic() + limits.connect_s
                if sock.connect_ex(address):
                    connection.wants = OUT
                    yield connection
                    connection.wants = IN
                    if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                        raise OSError(number, os.strerror(number))
                if self.tls:
                    secured = _context(self._verify).wrap_socket(
                        sock, server_hostname=self.name, do_handshake_on_connect=False
                    )
                    tls = TlsConnection(secured)
                    tls.deadline, tls.mask = connection.deadline, connection.mask
                    sock, connection = secured, tls
                    yield from tls.shake_hands()
            except OSError as error:
                sock.close()
                problem = error
            except BaseException:
                sock.close()
                raise
            else:
                return connection
        raise problem


@lru_cache(maxsize=8)
def _context(verify: bool | str) -> ssl.SSLContext:
    """Make the TLS settings once: reading the trusted authorities takes a while."""
    import ssl

    folder = isinstance(verify, str) and os.path.isdir(verify)  # noqa: PTH112 - as it was given
    path = verify if isinstance(verify, str) else None
    try:
        context = ssl.create_default_context(cafile=None if folder else path, capath=path if folder else None)
    except OSError as error:  # ssl.SSLError is one
        raise PermanentError(
            f"Expected certificates of authorities in {verify}, found none that can be read ({type(error).__name__}).",
            next_step="correct extra.verify of the connection",
        ) from None
    if verify is False:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
