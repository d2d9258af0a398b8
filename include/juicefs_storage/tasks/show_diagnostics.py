"""Print the diagnostics of a failed run: `python -m include.juicefs_storage.tasks.show_diagnostics ID`.

Run it where Airflow's own commands run: the connection `juicefs_backup` is read as the scheduler reads it.
"""

from __future__ import annotations

import os
import sys

from include.juicefs_storage.errors import StorageSwitchError

_SUFFIX = ".diagnostics"


def main(arguments: list[str]) -> int:
    """Write the masked text to standard output; exit code 1 where there is none, 2 for other arguments."""
    if len(arguments) != 1 or not arguments[0].endswith(_SUFFIX):
        # Backups lie beside them and hold keys: this prints diagnostics and nothing else.
        print(f"usage: show_diagnostics <backup id>{_SUFFIX}", file=sys.stderr)
        return 2
    # Outside of a task Airflow reads connections from its database only with this set.
    os.environ.setdefault("_AIRFLOW_PROCESS_CONTEXT", "server")
    from include.juicefs_storage.adapters.connections import missing_connections_explained
    from include.juicefs_storage.tasks.runtime import open_vault

    try:
        with missing_connections_explained():
            found = open_vault().load(arguments[0])
    except StorageSwitchError as error:
        print(error, file=sys.stderr)
        return 1
    if found is None:
        print(f"There is nothing under {arguments[0]!r} in the folder of the backups.", file=sys.stderr)
        return 1
    sys.stdout.write(found.decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
