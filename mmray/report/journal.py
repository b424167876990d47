"""Scalars of a training run over its steps, for TensorBoard and MLflow."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmray import storage
from mmray.config import TrainConfig, flat
from mmray.errors import ConfigError

EXPERIMENT = "mmray"  # of MLflow
TAG = "mmray.run"  # its value says which run of ours, so that a resumed one is found again


class Journal:
    """``log`` adds scalars, ``flush`` puts all of them where they are kept.

    TensorBoard's event files go to ``folder``, a directory or s3:// prefix (then with every
    ``flush``, as a whole); None: none. ``tracked`` is (tracking URI, id of the MLflow run).
    ``first_step``: what an earlier sitting wrote from there on is replaced.
    """

    def __init__(
        self,
        folder: str | None,
        tracked: tuple[str, str] | None,
        *,
        first_step: int,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._say = folder, say
        self._writer: Any = None
        self._aside: tempfile.TemporaryDirectory[str] | None = None
        if folder is not None:
            from tensorboardX import SummaryWriter

            self._aside = tempfile.TemporaryDirectory() if storage.is_s3(folder) else None
            local = self._aside.name if self._aside else folder
            self._writer = SummaryWriter(local, purge_step=first_step)
        self._tracked = tracked
        self._client = _client(tracked[0]) if tracked else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """``values`` by name (``train/loss``) at a step (0-based) of the run."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._client is not None:
            self._track(step, values)

    def flush(self) -> None:
        if self._writer is None:
            return
        self._writer.flush()
        if self._aside is not None and self._folder is not None:
            for path in Path(self._aside.name).iterdir():
                storage.write_file(storage.join(self._folder, path.name), path)

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()
        if self._aside is not None:
            self._aside.cleanup()

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        """A tracking server that went away costs its curves, not the training."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        assert self._tracked is not None and self._client is not None
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        try:
            self._client.log_batch(self._tracked[1], metrics=metrics)
        except MlflowException as error:
            self._say(f"note: MLflow gets no more of this run: {' '.join(str(error).split())}")
            self._client = None


# --- MLflow's own part, on the driver ------------------------------------------------------------


def check_mlflow(cfg: TrainConfig) -> None:
    """Raise ConfigError when MLflow is asked for and not installed."""
    if cfg.train.mlflow is not None and importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            f"train.mlflow: got {cfg.train.mlflow!r}, but mlflow is not installed here; "
            "install it (on every node), or leave train.mlflow out"
        )


def open_tracking(cfg: TrainConfig, place: str, *, resumed: bool) -> tuple[str, str] | None:
    """(tracking URI, id of the run), with the config as its parameters; None when not asked for.

    A resumed run goes on in the one it began. Raises ConfigError when the server does not answer.
    """
    uri = cfg.train.mlflow
    if uri is None:
        return None
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    try:
        client = _client(uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
        if resumed:
            kept = client.search_runs([experiment], f"tags.`{TAG}` = '{place}'", max_results=1)
            if kept:
                client.update_run(kept[0].info.run_id, status="RUNNING")
                return uri, kept[0].info.run_id
        name = cfg.out.rpartition("/")[2]
        run = client.create_run(experiment, tags={TAG: place}, run_name=name).info.run_id
        tree = flat(cfg.model_dump(mode="json"))
        params = [Param(key, str(value)) for key, value in tree.items()]
        client.log_batch(run, params=params)
    except MlflowException as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"train.mlflow: {uri}: {what}") from None
    return uri, run


@contextmanager
def tracking(
    cfg: TrainConfig, place: str, *, resumed: bool, say: Callable[[str], None]
) -> Iterator[tuple[str, str] | None]:
    """``open_tracking``, and the run ended as the work within ends: FINISHED, KILLED when it was
    stopped, FAILED. A server that cannot be told costs a note, not the training."""
    tracked, status = open_tracking(cfg, place, resumed=resumed), "FAILED"
    try:
        yield tracked
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if tracked is not None:
            _end(*tracked, status, say)


def _end(uri: str, run: str, status: str, say: Callable[[str], None]) -> None:
    from mlflow.exceptions import MlflowException

    try:
        _client(uri).set_terminated(run, status)
    except MlflowException as error:
        what = " ".join(str(error).split())
        say(f"note: MLflow was not told that this run is {status.lower()}: {what}")


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)
