"""The tasks of `juicefs_storage_fleet`."""
