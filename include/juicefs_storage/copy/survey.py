"""List a whole source with several listers at once, whatever its layout.

An idle lister splits a busy lister's remaining range: a LIST of one key behind the middle shows whether anything is
there. No layout has to be known beforehand. A source that is too much for one process is shared among several.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from include.juicefs_storage.copy.midpoint import LAST_CHARACTER, find_cut, shared_length
from include.juicefs_storage.copy.segments import Ruler, Segment
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.merge import cut_page, filtered
from include.juicefs_storage.objects.model import KeyRange, Page

LISTERS = 16
#: One survey lists alone for so many requests, of 1,000 keys each: what sharing out costs takes about as long.
ALONE_CALLS = 4_000
#: Of several surveys each is given so many ranges, some of them large and some small, whatever the layout is.
_RANGES_EACH = 32
#: A lister whose range has lasted so many pages has more left than looking for its middle costs.
_PAGES_ALONE = 8


@dataclass(eq=False)
class _Range:
    """What one lister has left: keys after `at` up to `until`, which another lister may bring nearer."""

    at: str | None
    until: str | None
    track: list[Segment]
    pages: int = 0
    split: bool = False  # another lister looks for its middle, or found too little to share

    def width(self) -> tuple[int, int]:
        """Sort the widest range first: by the characters that its ends share, then by the distance of what follows."""
        shared = shared_length(self.at or "", self.until) if self.until is not None else 0
        low, high = (self.at or "")[shared : shared + 1], (self.until or "")[shared : shared + 1]
        return shared, -((ord(high) if high else LAST_CHARACTER) - (ord(low) if low else 0))


@dataclass
class Survey:
    """Lists ranges of a source, and keeps places to cut at.

    Memory is bounded by MAX_SEGMENTS and one page a lister.

    Attributes:
        source: Only listed.
        keep: Which keys count; None: all.
        listers: How many LIST requests are in flight at most.
        most_calls: It ends after so many LIST requests; None: when everything is listed.
        told: Called with the objects and bytes found so far, after each page.
        await_resumed: Called before each request; blocks in a pause.
        ruler: Keeps the places.
        left: What was not listed, in order, where it ended before.
        calls: LIST requests so far.
        objects: Objects found so far.
        bytes: Of these objects.
    """

    source: Bucket
    keep: Callable[[str], object] | None = None
    listers: int = LISTERS
    most_calls: int | None = None
    told: Callable[[int, int], None] = lambda *_: None
    await_resumed: Callable[[], None] = lambda: None
    ruler: Ruler = field(default_factory=Ruler)
    left: list[KeyRange] = field(default_factory=list)
    calls: int = 0
    objects: int = 0
    bytes: int = 0
    _busy: list[_Range] = field(default_factory=list)
    _todo: list[_Range] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _error: BaseException | None = None

    def run(self, *ranges: KeyRange) -> list[Segment]:
        """List ranges that do not overlap, and return their segments in order.

        Raises:
            PermanentError: The store refuses the listing.
            TransientError: The store does not answer.
        """
        self._todo = [_Range(keys.after, keys.until, self.ruler.track()) for keys in ranges]
        with ThreadPoolExecutor(self.listers) as pool:
            for done in [pool.submit(self._work) for _ in range(self.listers)]:
                done.result()
        rest = sorted((*self._busy, *self._todo), key=lambda each: each.at or "")
        self.left = [
            KeyRange(each.at, each.until) for each in rest if each.until is None or (each.at or "") < each.until
        ]
        return self.ruler.segments()

    def _ends(self) -> bool:
        return self._error is not None or (self.most_calls is not None and self.calls >= self.most_calls)

    def _work(self) -> None:
        try:
            while given := self._next():
                self._list(given)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
            raise

    def _next(self) -> _Range | None:
        """Take a range that waits, else half of a busy lister's; None when all is listed, or enough."""
        while True:
            with self._changed:
                while not self._todo or self._ends():
                    if self._ends() or not self._busy:
                        self._changed.notify_all()
                        return None
                    ready = [busy for busy in self._busy if not busy.split and busy.pages >= _PAGES_ALONE]
                    if ready:
                        widest = min(ready, key=_Range.width)
                        widest.split = True
                        break
                    self._changed.wait()
                else:
                    given = self._todo.pop()
                    self._busy.append(given)
                    return given
            self._share(widest)

    def _share(self, busy: _Range) -> None:
        """Cut off the upper half of what a busy lister has left."""

        def first_after(key: str) -> str | None:
            with self._changed:
                if busy not in self._busy:
                    return None  # it is listed: the answer is not used
                self.calls += 1
            self.await_resumed()
            return self.source.first_after(key)

        middle, until = find_cut(first_after, busy.at or "", busy.until)
        with self._changed:
            if middle is not None and busy in self._busy:
                busy.until = until
                # The lister may have passed the middle meanwhile; where not, it lists up to there.
                if (busy.at or "") < middle:
                    self._todo.append(_Range(middle, busy.until, self.ruler.track()))
                    busy.until = middle
                busy.split, busy.pages = False, 0
            self._changed.notify_all()

    def _list(self, given: _Range) -> None:
        self.await_resumed()
        for page in self.source.pages(KeyRange(given.at, given.until)):
            with self._changed:
                if self._error:
                    return
                self.calls += 1
                if not page.keys:
                    continue
                until = given.until
                beyond = until is not None and page.keys[-1] > until
                self._add(given, page if until is None else cut_page(page, until)[0])
                given.at = page.keys[-1]
                given.pages += 1
                self._changed.notify_all()
                if self._ends() and not beyond:
                    return  # what this range has left is left
            if beyond:
                break
            self.await_resumed()
        with self._changed:
            self._busy.remove(given)
            self._changed.notify_all()

    def _add(self, given: _Range, page: Page) -> None:
        for kept in filtered(iter((page,)), self.keep):
            if kept.keys:
                self.objects += len(kept.keys)
                self.bytes += sum(kept.sizes)
                self.ruler.add_page(given.track, kept)
        self.told(self.objects, self.bytes)


def share_out(
    source: Bucket, ranges: Sequence[KeyRange], shares: int, await_resumed: Callable[[], None] = lambda: None
) -> list[list[KeyRange]]:
    """Cut ranges into many more than there are shares, and deal them out one by one.

    A half is half of the names that keys may have, not of the keys that there are. So a share is made of ranges that
    lie far apart: each share has its part of where the keys are dense.

    Args:
        source: Only listed: LISTs of one key, 16 at once.
        ranges: In order, without overlap.
        shares: How many at most; fewer where there are too few keys.
        await_resumed: Called before each range is cut; blocks in a pause.

    Raises:
        PermanentError: The store refuses the listing.
        TransientError: The store does not answer.
    """

    def halves(keys: KeyRange) -> tuple[KeyRange, ...]:
        await_resumed()
        first = source.first_after(keys.after or "")
        if first is None or (keys.until is not None and first >= keys.until):
            return (keys,)
        middle, until = find_cut(source.first_after, first, keys.until)
        return (keys,) if middle is None else (KeyRange(keys.after, middle), KeyRange(middle, until))

    found, before = list(ranges), 0
    with ThreadPoolExecutor(LISTERS) as pool:
        while before < len(found) < shares * _RANGES_EACH and shares > 1:
            before, found = len(found), [half for pair in pool.map(halves, found) for half in pair]
    dealt: list[list[KeyRange]] = [[] for _ in range(min(shares, len(found)))]
    for place, keys in enumerate(found):
        # Each round begins with another share: halves of halves come in a rhythm, which no share may fall in with.
        dealt[(place + place // len(dealt)) % len(dealt)].append(keys)
    return dealt
