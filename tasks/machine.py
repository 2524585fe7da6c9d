"""How a machine fares while it trains a stage: MLflow's system metrics, carried with the curves."""

import time
from functools import partial

from mlflow.entities import Metric
from mlflow.environment_variables import (
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING,
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL,
)
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from tasks.console import say

INTERVAL_S = 10.0


class MachineMetrics:
    """Samples of processors, memory, disk, network and GPUs, as MLflow's pages expect them.

    MLflow's own variables turn them off (MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false) and say how
    often they are taken (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, in seconds). Its monitor is
    asked, not started: the thread that it would start ends at MLflow's first outage. What it cannot
    ask of this machine (a container may hide the network's counters) ends the samples, not the run.
    """

    def __init__(self, run_id: str, tracking_uri: str) -> None:
        self._interval_s = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or INTERVAL_S
        self._wanted = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get()
        self._open = partial(SystemMetricsMonitor, run_id, tracking_uri=tracking_uri)
        self._monitor: SystemMetricsMonitor | None = None
        self._collected()  # a processor's load is what it was since the call before
        self._next = time.monotonic() + self._interval_s

    def new(self, step: int) -> list[Metric]:
        """A sample, at the step that training has reached; nothing before it is time for one."""
        if time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + self._interval_s
        now_ms = time.time_ns() // 10**6
        sample = self._collected()
        return [Metric(f"system/{name}", value, now_ms, step) for name, value in sample.items()]

    def _collected(self) -> dict[str, float]:
        if not self._wanted:
            return {}
        try:
            self._monitor = self._monitor or self._open()
            self._monitor.collect_metrics()
        except Exception as error:  # whatever psutil or a GPU's driver raises, or lacks
            say("metrics", "system", f"this machine shows none: {error!r}", "yellow")
            self._wanted = False
            return {}
        sample = self._monitor.aggregate_metrics()
        for one in self._monitor.monitors:
            one.clear_metrics()
        return sample
