"""The registry of volumes: what the form leaves open."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from include.juicefs_storage.errors import PermanentError

#: The registry of volumes; the environment may name another file, outside of the image.
REGISTRY = Path(os.environ.get("JUICEFS_STORAGE_VOLUMES") or Path(__file__).parents[2] / "volumes.yaml")


def read_registry() -> dict[str, dict[str, Any]]:
    """Read the registry: volume name -> the params that it fills in.

    Raises:
        PermanentError: The file is not there, or is not of that form.
    """
    import yaml

    try:
        registry: dict[str, dict[str, Any]] = yaml.safe_load(REGISTRY.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise PermanentError(
            f"The registry of volumes {REGISTRY} cannot be read ({type(error).__name__}).", next_step="correct the file"
        ) from None
    if not isinstance(registry, dict) or not all(isinstance(entry, dict) for entry in registry.values()):
        raise PermanentError(
            f"The registry of volumes {REGISTRY}: expected a volume's name and below it its params.",
            next_step="correct the file; include/volumes.yaml has an example",
        )
    return registry
