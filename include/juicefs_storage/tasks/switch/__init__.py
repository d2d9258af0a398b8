"""The tasks of `juicefs_storage_switch` and `juicefs_storage_revert`."""
