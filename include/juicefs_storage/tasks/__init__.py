"""The Airflow tasks that the DAG files wire up."""
