"""The signed evidence that a move is finished, and how it is verified: Ed25519 over the bytes of its JSON.

A certificate is JSON with three texts: `evidence`, itself JSON, whose very bytes are signed; `signature`; `key`, the
public half of the key, both in base64. It says what was looked at and what was found; it allows nothing by itself.
"""

from __future__ import annotations

import base64
import json
from datetime import datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.records import Record

_KEY_BYTES = 32


class Claim(Record):
    """One thing that was proven: what, and what was seen."""

    what: str
    seen: str


class Evidence(Record):
    """What a certificate says. No key of a store is in it.

    Attributes:
        volume: The volume's name.
        uuid: Its UUID.
        bucket: Where it is, as the setting names it.
        left: The bucket that it has left.
        moved_at: When the run that moved it had ended (UTC).
        backup_id: The backup of that run.
        run_id: The run that certifies.
        at: When (UTC).
        claims: What was proven.
    """

    volume: str
    uuid: str
    bucket: str
    left: str
    moved_at: datetime
    backup_id: str
    run_id: str
    at: datetime
    claims: tuple[Claim, ...]


def read_private_key(text: str) -> Ed25519PrivateKey:
    """Read a key: base64 of 32 bytes.

    Raises:
        PermanentError: It is none.
    """
    return Ed25519PrivateKey.from_private_bytes(_decoded(text, "the private key"))


def public_key_of(key: Ed25519PrivateKey) -> str:
    """Return the public half of a key, which a person keeps to verify with."""
    return base64.b64encode(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def sign(evidence: Evidence, key: Ed25519PrivateKey) -> str:
    """Make a certificate."""
    text = evidence.model_dump_json()
    signature = base64.b64encode(key.sign(text.encode())).decode()
    return json.dumps({"evidence": text, "signature": signature, "key": public_key_of(key)}, indent=1)


def verify(certificate: str, public_key: str) -> Evidence:
    """Verify a certificate with a public key that is known from elsewhere: the one in it proves nothing.

    Args:
        certificate: What `sign` made.
        public_key: Base64 of 32 bytes.

    Raises:
        PermanentError: It is no certificate, was changed, or was signed with another key.
    """
    try:
        found = json.loads(certificate)
        text, signature = str(found["evidence"]), base64.b64decode(found["signature"], validate=True)
    except (ValueError, KeyError, TypeError):
        raise PermanentError(
            "This is no certificate: expected JSON with evidence, signature and key.",
            next_step="take XCom `certificate` of the task certify as it is",
        ) from None
    try:
        Ed25519PublicKey.from_public_bytes(_decoded(public_key, "the public key")).verify(signature, text.encode())
    except InvalidSignature:
        raise PermanentError(
            "The signature does not fit: the certificate was changed, or signed with another key.",
            state=f"it says that it was signed with {found.get('key')}",
            next_step="compare that key with the one that you keep",
        ) from None
    return Evidence.model_validate_json(text)


def _decoded(text: str, what: str) -> bytes:
    try:
        found = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        found = b""
    if len(found) != _KEY_BYTES:
        raise PermanentError(
            f"Expected {what} as base64 of {_KEY_BYTES} bytes, found {len(text.strip())} characters that are none.",
            next_step="openssl rand -base64 32 makes a private key",
        )
    return found
