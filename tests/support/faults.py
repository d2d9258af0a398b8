"""Faults that several tests order: effects by their adapters' methods, and tasks that fail for good."""

from __future__ import annotations

from tests.support.worker import Fault, Point

#: `juicefs config`.
CONFIG = "include.juicefs_storage.adapters.juicefs_command:JuiceFSCommand.write_storage"
ORDERED = "ordered to fail"
#: What begins a rollback: a proof that fails after all clients have moved.
BROKEN = Fault("prove_blocks", "after", error=ORDERED, tries=2)


def fails(task: str, point: Point = "after") -> Fault:
    """Fail a task at every try."""
    return Fault(task, point, error=ORDERED, tries=9)
