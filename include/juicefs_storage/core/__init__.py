"""Plan, decide and verify: no Airflow and no network client; the outside world comes in through `ports`."""
