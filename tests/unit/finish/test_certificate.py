"""A certificate is good only unchanged, and with the key that a person keeps."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.finish.certificate import (
    Claim,
    Evidence,
    public_key_of,
    read_private_key,
    sign,
    verify,
)
from include.juicefs_storage.verify_certificate import main

AT = datetime(2026, 11, 29, 3, 0, tzinfo=UTC)
EVIDENCE = Evidence(
    volume="myjfs", uuid="u", bucket="https://new:9000/data", left="http://old:9000/data", moved_at=AT,
    backup_id="myjfs.manual__1", run_id="manual__9", at=AT, claims=(Claim(what="blocks", seen="all 8 blocks"),),
)  # fmt: skip
KEY, OTHER = (read_private_key(base64.b64encode(bytes([number]) * 32).decode()) for number in (1, 2))


def test_what_was_signed_is_read_again() -> None:
    assert verify(sign(EVIDENCE, KEY), public_key_of(KEY)) == EVIDENCE


@pytest.mark.parametrize(
    ("certificate", "key", "words"),
    [
        (sign(EVIDENCE, KEY).replace("all 8 blocks", "all 9 blocks"), public_key_of(KEY), "does not fit"),
        (sign(EVIDENCE, OTHER), public_key_of(KEY), "does not fit"),
        ("{}", public_key_of(KEY), "no certificate"),
        ("not JSON", public_key_of(KEY), "no certificate"),
        (sign(EVIDENCE, KEY), "short", "public key"),
    ],
    ids=["changed", "another key", "empty", "no JSON", "no key"],
)
def test_what_is_not_good(certificate: str, key: str, words: str) -> None:
    with pytest.raises(PermanentError, match=words):
        verify(certificate, key)


def test_the_key_inside_of_a_forged_certificate_proves_nothing() -> None:
    forged = json.loads(sign(EVIDENCE, OTHER))
    assert forged["key"] == public_key_of(OTHER)
    with pytest.raises(PermanentError, match="does not fit"):
        verify(json.dumps(forged | {"key": public_key_of(KEY)}), public_key_of(KEY))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "certificate.json"
    file.write_text(sign(EVIDENCE, KEY))
    assert main([str(file), public_key_of(KEY)]) == 0
    assert "- blocks: all 8 blocks" in capsys.readouterr().out
    assert main([str(file), public_key_of(OTHER)]) == 1
    assert "does not fit" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), public_key_of(KEY)]) == 1
