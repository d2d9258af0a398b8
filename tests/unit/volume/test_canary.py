"""What a client's log says of its last reload."""

from __future__ import annotations

from include.juicefs_storage.volume.canary import reload_warning

FAILED = """\
2026/01/31 09:00:00 juicefs[7] <INFO>: found new configuration: storage="minio" bucket="https://new:9000/data2"
2026/01/31 09:00:00 juicefs[7] <WARNING>: object storage: failed to load config: unknown RetryMode [mount.go:483]
"""
RECOVERED = f"{FAILED}{FAILED.splitlines()[0]}\n"


def test_the_last_reload_counts() -> None:
    assert reload_warning(FAILED) == "failed to load config: unknown RetryMode [mount.go:483]"
    assert reload_warning(RECOVERED) == ""
    assert reload_warning("<WARNING>: object storage: of the start, or of a log that was cut") == ""
