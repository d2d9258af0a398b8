"""Signature Version 4 for S3, with what stays the same from request to request computed once.

After "Authenticating Requests: Using the Authorization Header" of the S3 API reference. Payloads are not hashed
(UNSIGNED-PAYLOAD): SHA-256 would cost more than the copy, and each object is compared end to end anyway.
"""

from __future__ import annotations

import hmac
import time
from functools import lru_cache
from hashlib import sha256
from typing import TypeAlias

#: Extra headers: names in lower case, values as they go over the wire (Latin-1).
Headers: TypeAlias = tuple[tuple[str, str], ...]
#: SHA-256 of the body in hex; among the extra headers of a request it takes the place of UNSIGNED-PAYLOAD.
PAYLOAD_HEADER = "x-amz-content-sha256"
_PAYLOAD = "UNSIGNED-PAYLOAD"


class Signer:
    """Makes the heads of requests to one host with one pair of keys."""

    def __init__(self, host: str, region: str, access_key: str, secret_key: str, session_token: str = "") -> None:
        self._host, self._region, self._access_key, self._secret_key = host, region, access_key, secret_key
        self._token = session_token
        #: How far the store's clock is ahead of ours, in seconds.
        self.skew_s = 0.0
        self._second = 0
        self._date = self._scope = self._day = ""
        self._inner = self._outer = sha256()
        # A whole copy knows a handful of combinations of content type and other metadata.
        self._block = lru_cache(maxsize=256)(self._make_block)

    def __repr__(self) -> str:
        return f"Signer(host={self._host!r})"

    def head(self, method: str, path: str, query: str = "", headers: Headers = (), length: int | None = None) -> bytes:
        """Return the request's head, signed now.

        Args:
            method: GET, PUT, …
            path: Percent-encoded, as it goes over the wire.
            query: Percent-encoded, parameters sorted by name, each with a `=`.
            headers: Extra ones, all signed.
            length: Of the body; None: there is none.
        """
        second = int(time.time() + self.skew_s)
        if second != self._second:
            self._tick(second)
        before, after, names, wire, payload = self._block(headers)
        request = f"{method}\n{path}\n{query}\n{before}{self._date}{after}\n\n{names}\n{payload}"
        digest = sha256(request.encode("latin-1")).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{self._date}\n{self._scope}\n{digest}"
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(text.encode())
        outer.update(inner.digest())
        signature = outer.hexdigest()
        target = f"{path}?{query}" if query else path
        size = "" if length is None else f"content-length: {length}\r\n"
        return (
            f"{method} {target} HTTP/1.1\r\n{wire}{size}x-amz-date: {self._date}\r\n"
            f"authorization: AWS4-HMAC-SHA256 Credential={self._access_key}/{self._scope}, "
            f"SignedHeaders={names}, Signature={signature}\r\n\r\n"
        ).encode("latin-1")

    def _tick(self, second: int) -> None:
        self._second = second
        self._date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))
        if self._date[:8] != self._day:
            self._day = self._date[:8]
            self._scope = f"{self._day}/{self._region}/s3/aws4_request"
            key = f"AWS4{self._secret_key}".encode()
            for part in self._scope.split("/"):
                key = hmac.digest(key, part.encode(), "sha256")
            # HMAC (RFC 2104) with the key's two blocks hashed once: a third of the cost of doing it each time.
            block = key.ljust(sha256().block_size, b"\0")
            self._inner, self._outer = (sha256(bytes(byte ^ pad for byte in block)) for pad in (0x36, 0x5C))

    def _make_block(self, headers: Headers) -> tuple[str, str, str, str, str]:
        """Return the canonical headers around the date, the signed names, the constant part, the payload's hash."""
        payload = dict(headers).get(PAYLOAD_HEADER, _PAYLOAD)
        constant = [("host", self._host), (PAYLOAD_HEADER, payload)]
        constant += [header for header in headers if header[0] != PAYLOAD_HEADER]
        if self._token:
            constant.append(("x-amz-security-token", self._token))
        wire = "".join(f"{name}: {value}\r\n" for name, value in constant)
        signed = sorted(
            [*((name, " ".join(filter(None, value.split(" ")))) for name, value in constant), ("x-amz-date", "")]
        )
        lines = "\n".join(f"{name}:{value}" for name, value in signed)
        before, _, after = lines.partition("x-amz-date:")
        return f"{before}x-amz-date:", after, ";".join(name for name, _ in signed), wire, payload
