"""Find a place near the middle of a range of keys of which nothing is known, by asking what follows a key."""

from __future__ import annotations

from collections.abc import Callable
from os.path import commonprefix
from typing import NamedTuple

#: After so many keys that were asked for in vain, what is left is too little to share.
_PROBES = 24
_ASCII_END, LAST_CHARACTER = 0x7F, 0x10FFFF


class _Probe(NamedTuple):
    """A key to ask for.

    Attributes:
        key: Between the two ends of the range.
        final: Whether it is near enough to the middle where keys follow it.
    """

    key: str
    final: bool = True


def find_cut(first_after: Callable[[str], str | None], low: str, high: str | None) -> tuple[str | None, str | None]:
    """Find a place near the middle of a range, with keys behind it.

    Halves the characters that the first undecided place may hold. Where all keys share more than the two ends of the
    range do, the length of what they share is found by halving too.

    Args:
        first_after: Returns the first key after another (see Bucket.first_after): one LIST of one key.
        low: The range begins after this key.
        high: The range ends with it; None: no end.

    Returns:
        The place, None where too little is left to be worth one; and an end of the range that may be nearer.
    """
    cut, behind, shared = None, "", len(low)
    for _ in range(_PROBES):
        probe = _next_probe(low, high, behind, shared)
        if probe is None:
            break
        found = first_after(probe.key)
        if found is None or (high is not None and found > high):
            high = probe.key
        elif probe.final:
            return probe.key, high
        else:
            cut, behind, shared = probe.key, found, shared_length(low, found)
    return cut, high


def shared_length(one: str, other: str) -> int:
    """Count the characters that two keys begin with alike."""
    return len(commonprefix([one, other]))  # noqa: RUF071  (characters it is, not path components)


def _next_probe(low: str, high: str | None, behind: str, shared: int) -> _Probe | None:
    """Choose the key to ask for next.

    Args:
        low: The range begins after this key.
        high: The range ends with it; None: no end.
        behind: The first key behind the best place so far; empty: there is none yet.
        shared: How many characters `low` and `behind` share; the length of `low` where there is none yet.

    Returns:
        The key; None where no better place can be found.
    """
    if high is None:
        return _Probe(chr(_ASCII_END if low < chr(_ASCII_END) else LAST_CHARACTER))
    same = shared_length(low, high)
    one, other = _code(low, same), _code(high, same)
    if other - one > 1:
        probe = _Probe(low[:same] + _character((one + other) // 2))
    elif len(high) > same + 1:
        probe = _Probe(high[: same + 1])
    elif other <= 0 or (same + 1 >= shared and not behind):
        return None  # everything left begins with all of `low`
    elif behind and shared <= same:
        return None  # only the end itself is behind the cut
    else:
        probe = _deeper_probe(low, behind, same + 1, shared)
    # Where it is not below the end, everything behind `low` begins with the end itself.
    return probe if probe.key < high else None


def _deeper_probe(low: str, behind: str, known: int, shared: int) -> _Probe:
    """Choose a key among those that share more of `low` than the end of the range does.

    Args:
        low: The range begins after this key.
        behind: The first key behind the best place so far; empty: there is none yet.
        known: Everything left shares at least so many characters with `low`.
        shared: Everything left differs from `low` at this place, if not before.
    """
    place = (known + shared) // 2 if known < shared else shared
    code = _code(behind if place == shared and behind else low, place)
    end = _ASCII_END if code < _ASCII_END - 1 else LAST_CHARACTER
    return _Probe(low[:place] + _character((code + end + 1) // 2), final=place in (known, shared))


def _code(text: str, place: int) -> int:
    return ord(text[place]) if place < len(text) else -1


def _character(code: int) -> str:
    # Surrogates are no characters, and have no UTF-8.
    return chr(code if not 0xD800 <= code <= 0xDFFF else 0xE000)
