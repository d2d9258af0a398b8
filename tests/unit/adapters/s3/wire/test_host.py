"""Where connections go."""

from __future__ import annotations

import pytest

from include.juicefs_storage.adapters.s3.wire.host import Host


@pytest.mark.parametrize(
    ("url", "header", "port"),
    [
        ("http://h", "h", 80),
        ("https://h:443", "h", 443),
        ("http://h:443", "h:443", 443),
        ("http://[::1]:9", "[::1]:9", 9),
    ],
)
def test_the_host_header_is_what_s3_clients_sign(url: str, header: str, port: int) -> None:
    host = Host(url)
    assert (host.header, host.port) == (header, port)
