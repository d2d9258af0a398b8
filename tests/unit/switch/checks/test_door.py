"""The way back to the old store: open, ajar or closed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.switch.checks import check_door, check_old_key
from include.juicefs_storage.volume.carriers import Carrier
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import NEW, OLD

AT_RESTART = replace(OLD, secret_key=NEW.secret_key)
POD = Carrier("mount pod", "juicefs", "juicefs-node-1-pvc-1-abcdef", "names the old bucket", AT_RESTART)
HARMLESS = replace(POD, writes=None)


def takes(*taken: StorageConfig) -> Callable[[StorageConfig], str | None]:
    return lambda config: "" if config in taken else "SignatureDoesNotMatch"


def unreachable(config: StorageConfig) -> str | None:
    raise TransientError("No ready pod.")


@pytest.mark.parametrize(
    ("carriers", "try_storage", "level", "words"),
    [
        ([], takes(OLD), "ok", "nothing carries"),
        ([POD], takes(OLD, AT_RESTART), "warning", "Restarted, 1 pod made"),
        ([POD], takes(OLD), "warning", "takes the old key"),
        ([POD], takes(), "ok", "takes neither"),
        ([HARMLESS], takes(OLD, AT_RESTART), "warning", "takes the old key"),
        ([POD], unreachable, "warning", "Restarted, 1 pod made"),
        ([POD], lambda config: None, "warning", "Restarted, 1 pod made"),
    ],
    ids=["nothing", "open", "ajar", "closed", "no update", "cannot be asked", "cannot be tried"],
)
def test_what_a_restart_would_do(
    carriers: list[Carrier], try_storage: Callable[[StorageConfig], str | None], level: str, words: str
) -> None:
    (found,) = check_door(carriers, OLD, try_storage)
    assert found.level == level
    assert words in found.message
    assert not carriers or POD.name in found.message
    (required,) = check_door(carriers, OLD, try_storage, required=True)
    assert required.level == ("refusal" if level == "warning" else "ok")


def test_a_fence_that_stays_up_closes_it() -> None:
    (found,) = check_door([POD], OLD, takes(OLD, AT_RESTART), fenced=True, required=True)
    assert found.level == "ok"


def test_what_many_pods_would_write_is_tried_once() -> None:
    asked: list[StorageConfig] = []

    def refuses(config: StorageConfig) -> str:
        asked.append(config)
        return "AccessDenied"

    check_door([POD, replace(POD, name="another"), HARMLESS], OLD, refuses)
    assert asked == [AT_RESTART, OLD]


def test_a_key_whose_writes_the_old_store_refuses_is_as_good_as_withdrawn() -> None:
    assert check_old_key(OLD, takes(OLD)).level == "warning"
    found = check_old_key(OLD, takes(OLD), closed=True)
    assert (found.level, found.message) == ("ok", f"the store behind {OLD.bucket} refuses its writes")
