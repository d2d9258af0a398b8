"""The tasks of `juicefs_storage_finish`: find what carries other values, replace mount pods, certify, report."""
