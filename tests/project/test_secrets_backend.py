"""A secrets backend of Airflow hands the connections over: nothing of them is in Airflow's database or environment."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

OPEN = """
from include.juicefs_storage.adapters.vault import FileVault
from include.juicefs_storage.names import BACKUP_CONN_ID
masked = []
vault = FileVault.from_connection(BACKUP_CONN_ID, masked.append)
vault.save("myjfs.1", b"content")
assert vault.load("myjfs.1") == b"content"
assert len(vault.keys) == 2 and len(masked) == 2
print("opened", vault.folder)
"""


def test_the_backup_connection_comes_from_a_secrets_backend(tmp_path: Path) -> None:
    key, old = (base64.b64encode(bytes([value]) * 32).decode() for value in (1, 2))
    folder = (tmp_path / "backups").as_uri()
    connection = {"conn_type": "generic", "password": key, "extra": {"path": folder, "old_keys": [old]}}
    (tmp_path / "connections.json").write_text(json.dumps({"juicefs_backup": connection}))
    given = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    environment = given | {
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__SECRETS__BACKEND": "airflow.secrets.local_filesystem.LocalFilesystemBackend",
        "AIRFLOW__SECRETS__BACKEND_KWARGS": json.dumps({"connections_file_path": str(tmp_path / "connections.json")}),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", OPEN], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"opened {folder}"
