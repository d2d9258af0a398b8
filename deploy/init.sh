#!/usr/bin/env bash
# What Airflow needs once before its components start: database, pool and, where AIRFLOW_ADMIN_USER is set, an administrator.
# May run again: it changes nothing that is there, so slots or passwords set by hand survive.
set -euo pipefail
airflow db migrate
# A task whose pool does not exist waits for ever without a word.
airflow pools get juicefs_storage >/dev/null 2>&1 ||
  airflow pools set juicefs_storage 8 "Copying between object stores: the slots are what the network can bear"
if [[ -n ${AIRFLOW_ADMIN_USER:-} ]]; then
  # The password goes in on stdin: an argument would show in the process list.
  printf '%s\n%s\n' "$AIRFLOW_ADMIN_PASSWORD" "$AIRFLOW_ADMIN_PASSWORD" |
    airflow users create --username "$AIRFLOW_ADMIN_USER" --role Admin --firstname Airflow --lastname Administrator \
      --email "$AIRFLOW_ADMIN_USER@localhost"
fi
