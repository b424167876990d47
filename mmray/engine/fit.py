"""Ray Train around ``loop``: the workers' group, what it does when one is lost, how it ends."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import ray
import ray.train
from ray._raylet import PlacementGroupID
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from mmray.engine import rundir
from mmray.engine.board import Board
from mmray.engine.one_machine import is_own
from mmray.engine.workers import Workers
from mmray.errors import MmrayError, RunError, one_line

if TYPE_CHECKING:
    from mmray.engine.loop import Job

KEEP_CHECKPOINTS = 2
RESIZE_SECONDS = 60.0  # between looks for more or fewer machines, where their number may change
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
WORKER_FAILURES = 2  # in one sitting; each goes on from the last checkpoint


def fit(job: Job, workers: Workers, board: Board) -> dict[str, Any]:
    """Run the training workers to the end; what ``loop.train_loop`` gives.

    Raises RunError when training fails, KeyboardInterrupt when it was stopped.
    """
    from mmray.engine import loop

    rundir.drop_torn_snapshot(job.run)
    gpu, fixed = {"GPU": 1} if workers.gpu else {}, workers.least == workers.count
    api: Any = ray.train  # its annotations are those of the API before V2
    trainer: Any = _trainer_type()(
        cast(Any, loop.train_loop),
        train_loop_config={"job": ray.put(job)},
        scaling_config=api.ScalingConfig(
            num_workers=workers.count if fixed else (workers.least, workers.count),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus, **gpu},
        ),
        run_config=api.RunConfig(
            name=rundir.CHECKPOINTS,
            storage_path=job.run,
            checkpoint_config=api.CheckpointConfig(num_to_keep=KEEP_CHECKPOINTS),
            # Machines that are taken away count apart, and as often as it happens.
            failure_config=api.FailureConfig(
                max_failures=WORKER_FAILURES, max_preemption_failures=-1
            ),
            logging_config=api.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        result = board.attend(
            trainer.fit, on_stop="stopping after this step, with a checkpoint (again: at once)"
        )
    except ray.train.WorkerGroupError as error:
        raise _cause(error) from error
    except ray.exceptions.RayActorError as error:
        why = str(error).rpartition("Worker exit detail:")[2]  # all of it, where there is none
        raise RunError(
            f"the process that drives the training workers died ({one_line(why)}); the same "
            "command goes on from the last checkpoint"
        ) from error
    done: dict[str, Any] = result.return_value
    if done["outcome"] == loop.STOPPED:
        raise KeyboardInterrupt
    if done["outcome"] == loop.FAILED:
        best = done["best"] and done["best"]["epoch"]
        where = rundir.give_up(job.run, best)  # going on would only fail again
        raise RunError(
            f"the loss is not finite in epoch {done['epoch'] + 1}, step {done['step'] + 1}; "
            f"a lower train.lr (now {job.cfg.train.lr:g}) or train.grad_clip may help"
            + (f"; its best weights are kept: {where}" if where else "")
        )
    return done


def _trainer_type() -> Any:
    """A TorchTrainer less the processes that it would start for nothing: one for datasets of Ray's,
    which it gets none of; and where Ray ends with this process, those that look out for a machine
    to be taken away, share machines with others and, by way of a dashboard that is not there, look
    out for its controller to die."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback  # not public

    own = is_own()
    spared: tuple[type, ...] = (datasets.DatasetsCallback,)
    if own:
        spared += (placement_group_callback.PlacementGroupCleanerCallback,)

    class Lean(TorchTrainer):
        def _initialize_and_run_controller(self, **given: Any) -> Any:
            given["callbacks"] = [each for each in given["callbacks"] if type(each) not in spared]
            if not own:
                return super()._initialize_and_run_controller(**given)  # type: ignore[misc]
            if type(given["scaling_policy"]) is FixedScalingPolicy:
                given["scaling_policy"] = _Settled(given["scaling_policy"].scaling_config)
            before, asked = placement_group_table(), os.environ.get(WATCHER)
            os.environ[WATCHER] = asked or "0"  # its controller hears of that
            try:
                return super()._initialize_and_run_controller(**given)  # type: ignore[misc]
            except ray.exceptions.RayActorError:
                _give_back(placement_group_table().keys() - before.keys())
                raise
            finally:
                if asked is None:
                    del os.environ[WATCHER]

    return Lean


class _Settled(FixedScalingPolicy):
    """Asks nobody for the workers that the machine has."""

    def after_controller_start(self, _: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


def _give_back(groups: Iterable[str]) -> None:
    """What a controller that died had reserved for its workers, who died with it."""
    for group in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def _cause(error: ray.train.WorkerGroupError) -> Exception:
    """The failure behind a worker group's: ours, a lost worker, or a bug (as it is)."""
    failures = list(error.worker_failures.values())
    for failure in failures:
        if isinstance(failure, MmrayError):
            return failure
    for failure in failures:
        if isinstance(failure, ray.exceptions.RayError):
            return RunError(
                f"a training worker was lost more than {WORKER_FAILURES} times "
                f"({one_line(failure)}); the same command goes on from the last checkpoint"
            )
    return error
