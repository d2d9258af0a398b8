"""Secrets as real ones are: with every character that a client may have to quote, escape or encode."""

import secrets

#: Leads a secret. No white space: the driver's mount command expands keys without quotes. No colon: MinIO's client
#: cannot read one from its environment.
_AWKWARD = "+/\"'\\$%41&@#?~!"


def new_secret() -> str:
    """Make a secret: a random middle between characters that break where quoting is wrong.

    It ends with `=`, as base64 does: code that splits at `=` or strips padding loses a character.
    """
    return f"{_AWKWARD}{secrets.token_hex(12)}="


def random_part(secret: str) -> str:
    """Return the random middle: a leak shows it, whether quoted as JSON, XML, a URL or for a shell."""
    return secret.removeprefix(_AWKWARD).removesuffix("=")
