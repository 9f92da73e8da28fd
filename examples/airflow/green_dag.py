"""An Airflow DAG whose training starts in the low-carbon window that green-torch found; it holds no worker's slot until then.

``green-torch when --format iso`` prints one line, a time, which :class:`BashOperator` hands on; where the grid can't be asked that is now. The
sensor waits in Airflow's triggerer. Tried with Airflow 3.3.2 (``dag.test()``, a trace for the grid), and not under a scheduler.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.sensors.date_time import DateTimeSensorAsync
from airflow.sdk import DAG

HOURS, WITHIN_H = 8, 24

with DAG("green_training", schedule="@daily", start_date=datetime(2026, 1, 1), catchup=False) as dag:  # noqa: DTZ001 - UTC, to Airflow
    when = BashOperator(
        task_id="when",
        bash_command=f"green-torch when --region DE --hours {HOURS} --within {WITHIN_H}h --format iso",
    )
    window = DateTimeSensorAsync(
        task_id="window",
        target_time="{{ ti.xcom_pull(task_ids='when') }}",
        timeout=timedelta(hours=WITHIN_H).total_seconds(),
    )
    train = BashOperator(task_id="train", bash_command="python /opt/train/train.py ")
    when >> window >> train
