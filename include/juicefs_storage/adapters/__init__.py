"""The outside world: MySQL, Kubernetes, object stores, the juicefs CLI and the backup vault."""
