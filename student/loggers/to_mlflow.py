"""MLflow: at MLFLOW_TRACKING_URI, or in `mlflow.db` of the run. A run of ours is one run there, by an id that is kept.

The store is asked which steps it has, value by value, because it keeps whatever it is sent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import ClassVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from ..config import as_overrides
from ..errors import ConfigError, StudentError
from .follow import Ended, Kept, RunToLog
from .rows import Row

EXPERIMENT = "teacher-cache"
"""Where a run goes, unless MLFLOW_EXPERIMENT_NAME says otherwise."""
MOST_METRICS, MOST_PARAMS = 1000, 100
"""In one call, by MLflow's own limits."""
LONGEST_PARAM = 500
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class ToMLflow:
    """Of each value the steps behind the last one that the store has are sent."""

    name: ClassVar[str] = "mlflow"

    def __init__(self, run: RunToLog):
        self._run = run
        self._kept = Kept(run.folder, self.name)
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run.folder / 'mlflow.db').resolve()}"
        self._client: MlflowClient | None = None
        self._id = ""
        self._has: dict[str, int] = {}

    @staticmethod
    def require() -> None:
        """The import has shown that it is there."""

    def open(self) -> int:
        try:
            self._client = MlflowClient(self._uri)
            self._id = self._kept.read().get("run_id") or self._begun()
            names = self._client.get_run(self._id).data.metrics
            self._client.update_run(self._id, status="RUNNING")
            self._has = {name: max(one.step for one in self._client.get_metric_history(self._id, name)) for name in names}
        except StudentError:  # of what is kept in the run
            raise
        except Exception as error:  # noqa: BLE001  (of its service, of the network, of its database)
            raise ConfigError(
                f"MLflow cannot be logged to at {self._uri} ({type(error).__name__}: {error}). Mend that (MLFLOW_TRACKING_URI), "
                "or leave mlflow out."
            ) from error
        return min(self._has.values(), default=-1)

    def _begun(self) -> str:
        """The id of a new run there, kept."""
        client, name = self._client, os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        experiment = client.get_experiment_by_name(name)
        artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else (self._run.folder / "mlartifacts").resolve().as_uri()
        number = experiment.experiment_id if experiment else client.create_experiment(name, artifacts)
        tags = {"preset": self._run.config.preset, "crops_id": str(self._run.identity.get("crops_id"))}
        run_id = client.create_run(number, run_name=self._run.folder.resolve().name, tags=tags).info.run_id
        self._kept.write({"run_id": run_id, "tracking_uri": self._uri})
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in as_overrides(self._run.config).items()]
        for start in range(0, len(params), MOST_PARAMS):
            client.log_batch(run_id, params=params[start : start + MOST_PARAMS])
        return run_id

    def add(self, rows: Sequence[Row]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, row.step)
            for row in rows
            for name, value in {"epoch": row.epoch, **row.values}.items()
            if row.step > self._has.get(name, -1)
        ]
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MOST_METRICS])

    def close(self, ended: Ended) -> None:
        self._client.set_terminated(self._id, STATUS[ended])

    def where(self) -> str:
        return f"mlflow ui --backend-store-uri {self._uri}" if self._uri.startswith("sqlite") else f"{self._uri}, run {self._id}"
