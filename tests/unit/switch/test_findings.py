"""How the parts of a check come together."""

from __future__ import annotations

from typing import Any

import pytest

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.switch.findings import gather, refusal


def test_parts_of_a_check_are_made_whatever_becomes_of_the_others() -> None:
    def fails(error: Exception) -> Any:
        def part() -> Any:
            raise error

        return part

    refused = refusal("x", "no", "do")
    found = gather("x", fails(TransientError("gone")), lambda: [refused], fails(PermanentError("never")))
    assert [finding.message for finding in found] == ["no", "gone", "never"]
    with pytest.raises(TransientError, match="gone"):
        gather("x", list, fails(TransientError("gone")))
