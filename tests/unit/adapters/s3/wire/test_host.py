"""Where connections go."""

from __future__ import annotations

import pytest

from include.juicefs_storage.adapters.s3.wire.host import Host


def test_a_proxy_that_is_not_used_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert "HTTPS_PROXY is set on this worker and not used" in Host("https://s3.example").proxy_note
    assert Host("https://inside.example").proxy_note == ""
    monkeypatch.delenv("https_proxy")
    assert Host("https://s3.example").proxy_note == ""


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
