"""The switch of a volume, one module a step of the runbook. Pure: the outside comes in through `ports`."""
