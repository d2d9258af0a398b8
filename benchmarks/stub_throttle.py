"""When the stub store asks its clients to slow down, as a busy store does: 503 SlowDown."""

from __future__ import annotations

import time


class Throttle:
    """Refuses requests beyond so many at once, or beyond so many a second.

    Args:
        at_once: Requests that may be under way; 0: any number.
        per_second: Requests a second, with bursts of a tenth of that; 0: any number.
    """

    def __init__(self, at_once: int = 0, per_second: float = 0) -> None:
        self._at_once, self._per_second = at_once, per_second
        self._burst = max(1.0, per_second / 10)
        self._tokens, self._since = self._burst, time.monotonic()
        #: Requests that were taken and are not answered yet.
        self.under_way = 0

    def refuses(self) -> bool:
        """Take a request, or refuse it."""
        if self._at_once and self.under_way >= self._at_once:
            return True
        if self._per_second:
            now = time.monotonic()
            self._tokens = min(self._burst, self._tokens + (now - self._since) * self._per_second)
            self._since = now
            if self._tokens < 1:
                return True
            self._tokens -= 1
        self.under_way += 1
        return False
