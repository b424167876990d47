"""What Ray prints on its own, and mmray's users can do nothing with.

Of actors that begin with references to objects, or to other actors, Ray says in every run, as an
error, that they may not begin again (ray#53727). Those of mmray begin with values, and with
acquaintances (``witness``).
"""

from __future__ import annotations

import logging
from typing import Any

from ray._private import worker  # not to be had in public
from ray.data import DataContext
from ray.data._internal.execution import streaming_executor_state  # not to be had in public
from ray.data._internal.execution.operators import actor_pool_map_operator

_print = worker.print_to_stdstream


def errors() -> None:
    """Ray tells of a lost worker on stdout, among what was asked for; on stderr from now on."""
    worker.print_to_stdstream = _to_stderr


def _to_stderr(data: dict[str, Any], ignore_prefix: bool) -> None:
    _print(data | {"is_err": True}, ignore_prefix)


def datasets() -> None:
    """Ray Data tells of every dataset, draws bars and, where pictures are large, advises options
    that mmray's users do not have; mmray says what is done.

    Its warnings are still shown, and its log file in Ray's session directory keeps all. What a
    lost worker raised is said without its traceback, which is Ray's own, and which would keep the
    pool's actors, and their CPUs, for as long as a log handler keeps the record.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "bars disabled"
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    logging.getLogger(streaming_executor_state.__name__).addFilter(_without_traceback)
    actor_pool_map_operator.ActorPoolMapOperator = _ByValue  # type: ignore[misc]


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and record.exc_info[1] is not None:
        reason = " ".join(str(record.exc_info[1]).split())
        record.msg = f"{record.getMessage()} {reason}"
        record.args, record.exc_info = (), None
    return True


class _ByValue(actor_pool_map_operator.ActorPoolMapOperator):
    """Its actors begin with values of their own, not with references to what it has."""

    def _start_actor(self, *args: Any) -> Any:
        # Under the names of the cached properties that make the references.
        values = {
            "_map_transformer_ref": self._map_transformer,
            "_data_context_ref": self.data_context,
        }
        made = {name: self.__dict__.pop(name) for name in values if name in self.__dict__}
        self.__dict__.update(values)
        try:
            return super()._start_actor(*args)
        finally:
            for name in values:
                del self.__dict__[name]
            self.__dict__.update(made)
