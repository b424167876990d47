"""Curves of a run: if these fail, TensorBoard or MLflow show another one than there was."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import Endpoint

from mmray import storage
from mmray.config import TrainConfig, validate
from mmray.errors import ConfigError
from mmray.report import journal


def config(**train: Any) -> TrainConfig:
    tree = {"data": {"archive": "a"}, "out": "/place/out", "train": train}
    return validate(TrainConfig, tree, "test")


def test_event_files_of_a_run_on_s3_are_put_there(s3_endpoint: Endpoint) -> None:
    folder = f"{s3_endpoint.bucket()}/run/logs"
    book = journal.Journal(folder, None, first_step=0, say=print)
    book.log(0, {"train/loss": 1.0})
    book.flush()
    (first,) = storage.list_objects(folder)
    book.log(1, {"train/loss": 0.5})
    book.close()
    (last,) = storage.list_objects(folder)
    assert last.path == first.path and last.size > first.size > 0
    assert b"train/loss" in storage.read_bytes(storage.join(folder, last.path))


# --- MLflow, played ------------------------------------------------------------------------------


class Lost(Exception):
    pass


class Server:
    """What MLflow's client does of its API's contract, in memory."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, str] = {}
        self.down = False

    def get_experiment_by_name(self, name: str) -> Any:
        if self.down:
            raise Lost("connection refused")
        found = self.experiments.get(name)
        return found and SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment: str, *, tags: dict[str, str], run_name: str) -> Any:
        made = f"run{len(self.runs)}"
        self.runs[made] = {"tags": tags, "name": run_name, "params": {}, "metrics": []}
        return SimpleNamespace(info=SimpleNamespace(run_id=made))

    def search_runs(self, experiments: list[str], query: str, max_results: int) -> list[Any]:
        return [
            SimpleNamespace(info=SimpleNamespace(run_id=name))
            for name, run in self.runs.items()
            if f"'{run['tags'][journal.TAG]}'" in query
        ][:max_results]

    def log_batch(self, run: str, *, metrics: Any = (), params: Any = ()) -> None:
        if self.down:
            raise Lost("connection refused")
        self.runs[run]["metrics"] += [(m.key, m.value, m.step) for m in metrics]
        self.runs[run]["params"] |= {p.key: p.value for p in params}

    def update_run(self, run: str, *, status: str) -> None:
        self.runs[run]["status"] = status

    def set_terminated(self, run: str, status: str) -> None:
        if self.down:
            raise Lost("connection refused")
        self.runs[run]["status"] = status


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    package, entities, exceptions = map(
        ModuleType, ("mlflow", "mlflow.entities", "mlflow.exceptions")
    )
    package.MlflowClient = lambda tracking_uri: made  # type: ignore[attr-defined]
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(  # type: ignore[attr-defined]
        key=key, value=value, step=step
    )
    entities.Param = lambda key, value: SimpleNamespace(  # type: ignore[attr-defined]
        key=key, value=value
    )
    exceptions.MlflowException = Lost  # type: ignore[attr-defined]
    for module in (package, entities, exceptions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def test_mlflow_gets_config_and_curves_and_a_resumed_run_goes_on_in_its_own(
    server: Server,
) -> None:
    cfg = config(mlflow="http://there", lr=0.5)
    tracked = journal.open_tracking(cfg, "/place/out.run", resumed=False)
    assert tracked == ("http://there", "run0")
    assert server.runs["run0"]["params"]["train.lr"] == "0.5"
    book = journal.Journal(None, tracked, first_step=0, say=print)
    book.log(3, {"dev/loss": 0.25})
    book.close()
    assert server.runs["run0"]["metrics"] == [("dev/loss", 0.25, 3)]
    assert journal.open_tracking(cfg, "/place/out.run", resumed=True) == tracked
    assert journal.open_tracking(cfg, "/place/other.run", resumed=True) == (tracked[0], "run1")


def test_a_tracking_server_that_goes_away_costs_its_curves_only(server: Server) -> None:
    cfg = config(mlflow="http://there")
    tracked = journal.open_tracking(cfg, "/place/out.run", resumed=False)
    said: list[str] = []
    book = journal.Journal(None, tracked, first_step=0, say=said.append)
    server.down = True
    for step in range(3):
        book.log(step, {"train/loss": 1.0})
    (line,) = said
    assert "MLflow gets no more of this run: connection refused" in line
    with pytest.raises(ConfigError, match=r"train\.mlflow: http://there: connection refused"):
        journal.open_tracking(cfg, "/place/out.run", resumed=False)


def test_a_tracked_run_ends_as_its_training_does_and_goes_on_with_it(server: Server) -> None:
    """A run that seems to go on for ever, or to have ended well, misleads who compares runs."""
    cfg, said = config(mlflow="http://there"), []

    def run(ends: BaseException | None, *, resumed: bool = False) -> None:
        with journal.tracking(cfg, "/place", resumed=resumed, say=said.append) as tracked:
            assert tracked is not None
            assert server.runs[tracked[1]].get("status", "RUNNING") == "RUNNING"
            if ends is not None:
                raise ends

    with pytest.raises(KeyboardInterrupt):
        run(KeyboardInterrupt())
    assert server.runs["run0"]["status"] == "KILLED"
    with pytest.raises(ConfigError):
        run(ConfigError("a"), resumed=True)
    assert server.runs["run0"]["status"] == "FAILED"
    run(None, resumed=True)
    assert server.runs["run0"]["status"] == "FINISHED" and not said


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt()])
def test_a_tracking_server_lost_at_the_end_does_not_fail_a_finished_training(
    ends: BaseException | None, server: Server
) -> None:
    """Hours of training would be reported as failed; or a stop as something else."""
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        if ends is not None:
            stack.enter_context(pytest.raises(type(ends)))
        tracking = journal.tracking(
            config(mlflow="http://there"), "/place", resumed=False, say=said.append
        )
        with tracking:
            server.down = True
            if ends is not None:
                raise ends
    (line,) = said
    assert "MLflow was not told that this run is" in line and "connection refused" in line


def test_mlflow_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal.importlib.util, "find_spec", lambda name: None)
    journal.check_mlflow(config())
    with pytest.raises(ConfigError, match=r"train\.mlflow: got 'here'.*not installed"):
        journal.check_mlflow(config(mlflow="here"))
    assert journal.open_tracking(config(), str(Path("x")), resumed=False) is None
