"""What a copy works with: keys and ranges of keys, pages of a listing, engines, and what became of each object.

Keys are relative to the prefix of their bucket, and ordered as S3 orders them: by UTF-8 bytes, which is how Python
orders `str`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import takewhile
from os.path import commonprefix
from typing import Literal, NamedTuple, Protocol, TypeAlias

Compare = Literal["size", "etag", "content"]

#: Key, size in bytes, ETag without quotes: one object as a listing shows it.
Listed: TypeAlias = tuple[str, int, str]


#: Parts of a key that mean something else in a path.
_NO_PART = frozenset({"", ".", ".."})


class ObjectOutcome(StrEnum):
    """What became of one object."""

    SAME = "same"  # it was there already, equal by the comparison named beside it
    COPIED = "copied"
    OVERWRITTEN = "overwritten"  # it was different; only with overwrite=true
    MISSING = "missing"
    DIFFERENT = "different"  # never overwritten unless overwrite=true
    EXTRA = "extra"  # the target alone has it; never deleted
    VANISHED = "vanished"  # the source lost it between the listing and the copy
    CHANGED = "changed"  # the source replaced it between the listing and the copy
    FAILED = "failed"
    SKIPPED = "skipped"  # only with plan=metadata, as the one below: no file refers to this block; left alone
    LOST = "lost"  # a file refers to it, and neither side has it
    DAMAGED = "damaged"  # what the source has is not what was written there; never copied


class Comparison(StrEnum):
    """How an object was really compared, which may be more than was asked for."""

    NONE = ""
    SIZE = "size"
    ETAG = "etag"
    CONTENT = "content"


@dataclass(frozen=True, slots=True)
class KeyRange:
    """The keys with `after` < key <= `until`; None: no bound on that side."""

    after: str | None = None
    until: str | None = None

    @property
    def folder(self) -> str:
        """The deepest folder that holds the whole range, with its `/`; empty: none does.

        Who may use a part of a bucket may list only below that part.
        """
        return plain_folder(commonprefix([self.after or "", self.until or ""]))  # noqa: RUF071  (of keys, no paths)


def plain_folder(key: str) -> str:
    """Return the deepest folder of a key whose parts are all names, with its `/`; empty: there is none.

    Below it a key may mean another one (`a//b`, `a/../b`) to a store that keeps objects as files.
    """
    return "".join(f"{part}/" for part in takewhile(lambda part: part not in _NO_PART, key.split("/")[:-1]))


def below(prefix: str) -> KeyRange:
    """Select the keys below a prefix that ends with `/`, without the key that is the prefix itself."""
    return KeyRange(after=prefix, until=f"{prefix}\U0010ffff")


class Page(NamedTuple):
    """A stretch of a listing, ordered by key: three lists of one length. ETags are without quotes."""

    keys: list[str]
    sizes: list[int]
    etags: list[str]


class Copied(NamedTuple):
    """What an engine did with one object.

    Attributes:
        outcome: COPIED, OVERWRITTEN, VANISHED, CHANGED, DAMAGED or FAILED; SAME or DIFFERENT, by CONTENT, where the
            object appeared on the target meanwhile.
        target_etag: What the target's PUT answered.
        comparison: How the copy was checked end to end: ETAG, where the target's ETag is the source's, else CONTENT.
        checksum: xxh3-64 in hex, where the content was hashed; else empty.
        detail: Why it failed, or what is wrong with its content; without secrets.
    """

    outcome: ObjectOutcome
    target_etag: str = ""
    comparison: Comparison = Comparison.NONE
    checksum: str = ""
    detail: str = ""


class Compared(NamedTuple):
    """Two contents: SAME, DAMAGED (on both sides), DIFFERENT, MISSING (target), VANISHED (source) or FAILED."""

    outcome: ObjectOutcome
    checksum: str = ""
    detail: str = ""


class Engine(Protocol):
    """Moves objects from one side to the other, several at once. Never deletes, leaves no half object and no other key.

    One object that cannot be treated is an outcome, not an exception; what concerns all of them (keys refused,
    bucket gone, store down for longer than the retries last) raises PermanentError or TransientError.
    """

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        """Copy the source's objects with their metadata, and check each at once, end to end.

        Args:
            objects: As the source's listing showed them.
            overwrite: The target has other content under these keys, and it is to be replaced.

        Returns:
            In the order of `objects`.
        """

    def compare(self, objects: Sequence[Listed]) -> list[Compared]:
        """Read both sides in full and compare xxh3-64, in the order of `objects`."""


@dataclass(frozen=True, slots=True)
class Mirrored:
    """What a tool says that it did with a partition; counts of objects.

    Attributes:
        command: The command line, which holds no secret.
        copied: Of these, under compare=content, some may have been repaired: the tool does not tell them apart.
        lost: The source's listing had them and a GET did not find them.
    """

    command: str
    found: int = 0
    copied: int = 0
    copied_bytes: int = 0
    skipped: int = 0
    checked: int = 0
    failed: int = 0
    lost: int = 0

    @property
    def sentence(self) -> str:
        """What the tool says, for the report."""
        counts = {name: value for name, value in asdict(self).items() if name != "command" and value}
        return f"`{self.command}` says: {', '.join(f'{name} {value:,}' for name, value in counts.items())}"


def misread(key: str) -> bool:
    """Return whether a layer that takes keys for paths may read this one as another: `x/`, `a//b`, `./a`, `e` + accent.

    `mc mirror` merges listings by the Unicode normal form of the keys, and overwrites objects where one has none.
    """
    return not _NO_PART.isdisjoint(key.split("/")) or not unicodedata.is_normalized("NFC", key)


class MirrorTool(Protocol):
    """A program that copies a whole partition in its own way: `juicefs sync`, `mc mirror`. Never deletes."""

    @property
    def name(self) -> str:
        """Its command, for messages."""
        ...

    def mirror(self, keys: KeyRange, *, compare: Compare, overwrite: bool) -> Mirrored:
        """Copy what the target lacks within a range; with `overwrite` also what differs.

        Args:
            keys: The range.
            compare: How both sides are compared.
            overwrite: Replace objects that differ.

        Raises:
            TransientError: Some object was not copied, was lost, or the program failed; its last lines, masked.
            PermanentError: The program is not there, or cannot do what is asked.
        """
