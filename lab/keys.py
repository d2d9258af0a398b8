"""Secrets as real ones are: with every character that a client may have to quote, escape or encode."""

import secrets

#: Leads a secret. No white space: the driver's mount command expands keys without quotes, as the real driver's does.
_AWKWARD = "+/\"'\\$%41&@:#?~!"


def new_secret() -> str:
    """A secret whose middle is random letters and digits, between characters that break where quoting is wrong.

    It ends with `=`, as base64 does: whoever splits at `=` or strips padding loses a character.
    """
    return f"{_AWKWARD}{secrets.token_hex(12)}="


def random_part(secret: str) -> str:
    """The random middle: what a leak shows, whether quoted as JSON, XML, a URL or for a shell."""
    return secret.removeprefix(_AWKWARD).removesuffix("=")
