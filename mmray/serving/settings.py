"""What a server is asked to be: limits, deadlines, replicas; contradictions refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from mmray.config import Frozen, Positive
from mmray.errors import ConfigError

Seconds = Annotated[float, Field(gt=0)]
MiB = 1 << 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Limits(Frozen):
    """What one request may hold; more is refused, unread where its head says so."""

    body_bytes: Positive = 16 * MiB  # of a request with one pair
    batch_bytes: Positive = 64 * MiB  # of a request with several
    batch_items: Positive = 64
    held_bytes: Positive = 512 * MiB  # of all bodies that a replica has in work; more must wait
    header_bytes: Positive = 32 * 1024  # of all headers together
    caption_chars: Positive = 20_000
    pixels: Positive = (
        50_000_000  # of a picture, as declared in its header; or the bundle's, if less
    )

    @model_validator(mode="after")
    def _check(self) -> Limits:
        if self.batch_bytes < self.body_bytes:
            raise ValueError(
                f"batch_bytes: got {self.batch_bytes}; must be at least body_bytes "
                f"({self.body_bytes}): a batch of one is a request with one pair"
            )
        if self.held_bytes < self.batch_bytes:
            raise ValueError(
                f"held_bytes: got {self.held_bytes}; must be at least batch_bytes "
                f"({self.batch_bytes}), or the largest body is never taken"
            )
        return self


class Deadlines(Frozen):
    body_s: Seconds = 10.0  # until a request's body is there; a slower sender is cut off
    request_s: Seconds = 30.0  # until its answer, body included
    decode_s: Seconds = 5.0  # a picture that takes longer is refused; others wait meanwhile
    retry_after_s: Positive = 1  # what a caller is told who comes when queues are full

    @model_validator(mode="after")
    def _check(self) -> Deadlines:
        for name in ("body_s", "decode_s"):
            if getattr(self, name) >= self.request_s:
                raise ValueError(
                    f"{name}: got {getattr(self, name):g}; must be less than request_s "
                    f"({self.request_s:g}), which would always end first"
                )
        return self


class Replicas(Frozen):
    """How many processes of a kind, and when more or fewer are started."""

    min_replicas: Positive = 1
    max_replicas: Positive = 1
    target_ongoing: Positive = 16  # requests a replica has, on average, when their number is right
    max_ongoing: Positive = 64  # requests a replica takes; further ones wait
    max_queued: Annotated[int, Field(ge=0)] = 128  # that wait; further ones are refused
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120.0
    cpus: Annotated[float, Field(gt=0)] = 1.0  # of the cluster, reserved for each

    @model_validator(mode="after")
    def _check_replicas(self) -> Replicas:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: got {self.max_replicas}; must be at least min_replicas "
                f"({self.min_replicas})"
            )
        if self.target_ongoing >= self.max_ongoing:
            raise ValueError(
                f"target_ongoing: got {self.target_ongoing}; must be less than max_ongoing "
                f"({self.max_ongoing}), or no replica is ever busy enough to start another"
            )
        return self


class Decode(Replicas):
    """The replicas that speak HTTP and decode pictures."""

    #: That wait in Serve's proxy; behind HAProxy, none do.
    max_queued: Annotated[int, Field(ge=0)] = 128
    processes: Positive = 2  # that decode, in each replica: one is the bottleneck of large pictures


class Score(Replicas):
    """The replicas that hold the model. A request to one is a group of up to ``batch_rows`` pairs:
    those that came while ``groups`` others were in work."""

    target_ongoing: Positive = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0  # of the cluster, reserved for each
    threads: Positive | None = None  # of torch; null: one a CPU reserved
    batch_rows: Positive = 16  # pairs scored together, at most
    #: That decoded pairs wait for those that are being decoded; a pair that comes alone never does.
    batch_wait_s: Annotated[float, Field(ge=0, le=10)] = 0.05
    concurrent_batches: Positive = 1  # in work at once in a replica, taking turns at the model

    @property
    def groups(self) -> int:
        """That a decoding replica has out at once, for every replica there may be: those in work,
        and one at hand for a GPU, which would have to wait for it. Further pairs fill the next
        group meanwhile: full ones take less of a CPU, and its cores have pictures to decode."""
        at_hand = 1 if self.gpus else 0
        return (self.concurrent_batches + at_hand) * self.max_replicas

    @model_validator(mode="after")
    def _check(self) -> Score:
        most = self.batch_rows * self.concurrent_batches
        if self.max_ongoing < most:
            raise ValueError(
                f"max_ongoing: got {self.max_ongoing}; must be at least batch_rows x "
                f"concurrent_batches ({self.batch_rows} x {self.concurrent_batches} = {most}), or "
                "no batch is ever full"
            )
        return self


class ServeConfig(Frozen):
    host: str = "127.0.0.1"  # 0.0.0.0: every network this machine is on
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    token_env: str | None = None  # environment variable of the replicas with the bearer token
    token_file: str | None = None  # or a file that they can read; both null: nobody is asked
    examples: Annotated[int, Field(ge=0, le=16)] = 4  # golden pairs shown on the page; 0: none
    limits: Limits = Limits()
    deadlines: Deadlines = Deadlines()
    decode: Decode = Decode()
    score: Score = Score()

    @property
    def on_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def asks_for_token(self) -> bool:
        return self.token_env is not None or self.token_file is not None

    @model_validator(mode="after")
    def _check(self) -> ServeConfig:
        if self.token_env is not None and self.token_file is not None:
            raise ValueError("token_file: got a file, and token_env a variable; give one of them")
        if self.deadlines.request_s <= self.score.batch_wait_s:
            raise ValueError(
                f"deadlines.request_s: got {self.deadlines.request_s:g}; must be more than "
                f"score.batch_wait_s ({self.score.batch_wait_s:g}), or every request ends waiting"
            )
        ongoing = self.decode.max_ongoing * self.decode.max_replicas
        if ongoing * self.limits.batch_items < self.score.batch_rows:
            raise ValueError(
                f"decode.max_ongoing: got {self.decode.max_ongoing}; {self.decode.max_replicas} "
                f"replicas never hold the score.batch_rows ({self.score.batch_rows}) of one batch"
            )
        score, most = self.score, self.score.groups * self.decode.max_replicas
        room = score.max_ongoing * score.min_replicas + score.max_queued * self.decode.max_replicas
        if most > room:
            raise ValueError(
                f"score.max_queued: got {score.max_queued}; the decoding replicas may have {most} "
                f"groups out, and score.max_ongoing and max_queued hold {room}"
            )
        scales = score.max_replicas > score.min_replicas
        if scales and score.target_ongoing * score.min_replicas >= most:
            raise ValueError(
                f"score.target_ongoing: got {score.target_ongoing}, on {score.min_replicas} "
                f"replicas; must be less than the {most} groups that are ever out, or none is "
                "ever busy enough to start another"
            )
        return self


def overrides(
    host: str | None,
    port: int | None,
    replicas: str | None,
    token_env: str | None,
    token_file: str | None,
) -> list[str]:
    """What `mmray serve` is told in flags, as overrides of keys."""
    given = {"host": host, "port": port, "token_env": token_env, "token_file": token_file}
    if replicas is not None:
        least, _, most = replicas.partition("-")
        if not least.isdecimal() or not (most or least).isdecimal():
            raise ConfigError(f"--replicas: got {replicas!r}; a number, or two such as 1-4")
        given |= {"score.min_replicas": least, "score.max_replicas": most or least}
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def token_of(cfg: ServeConfig) -> bytes | None:
    """sha256 of the bearer token that callers must show; None where they need none.

    Raises ConfigError where it is asked for and not there: no server starts open by accident.
    """
    if cfg.token_env is not None:
        token, where = os.environ.get(cfg.token_env, ""), f"environment variable {cfg.token_env}"
    elif cfg.token_file is not None:
        where = cfg.token_file
        try:
            token = Path(where).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"token_file: {where}: {error}") from None
    else:
        return None
    if not token.strip():
        raise ConfigError(f"no bearer token in {where}, which must hold one on every replica")
    if not token.strip().isascii():
        raise ConfigError(
            f"bearer token in {where}: not all ASCII, so that no header can carry it (RFC 6750); "
            "make another, such as of `openssl rand -hex 32`"
        )
    return hashlib.sha256(token.strip().encode()).digest()
