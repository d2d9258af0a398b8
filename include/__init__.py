"""Code that the DAG files import; the folder lies on every Airflow component's PYTHONPATH."""
