"""How fast the processes of a job ask S3 together, see ``throttle``.

What they share is one time: when S3 last refused one of them for asking too fast. It lies in an
actor that the first one refused creates; where nothing is refused there is none. A process asks
every second while it is limited, and now and then whether there is such an actor. One that cannot
be reached costs nothing but the sharing.
"""

from __future__ import annotations

import time
from typing import Any

import ray

from mmray.throttle import LIMITER, Unreachable

NAME = "mmray-s3-pace"
ANSWER_S = 2.0  # an actor that takes longer, to start for one, is asked again later


class LastRefusal:
    """When a request of the job was last refused."""

    def __init__(self) -> None:
        self._at: float | None = None

    def hear(self, refused: bool) -> float | None:
        """Seconds since the last refusal, this one included."""
        now = time.monotonic()
        if refused:
            self._at = now
        return None if self._at is None else now - self._at


class Shared:
    """A ``throttle.Job``: this process's way to the actor. Whoever created it keeps it alive."""

    def __init__(self) -> None:
        self._actor: Any = None

    def __call__(self, refused: bool) -> float | None:
        if not ray.is_initialized():
            return None
        try:
            if self._actor is None:
                self._actor = _created() if refused else ray.get_actor(NAME)
            ago: float | None = ray.get(self._actor.hear.remote(refused), timeout=ANSWER_S)
            return ago
        except ray.exceptions.GetTimeoutError as error:
            raise Unreachable(str(error)) from error
        except ray.exceptions.RayError as error:
            self._actor = None
            raise Unreachable(str(error)) from error
        except ValueError:  # there is no actor of that name: nothing was refused yet
            return None


def _created() -> Any:
    actor = ray.remote(num_cpus=0)(LastRefusal)
    return actor.options(name=NAME, get_if_exists=True).remote()


def share() -> None:
    """Let this process keep pace with the others of its job, from now on."""
    if not LIMITER.shared:
        LIMITER.share(Shared())
