"""The two kinds of replicas of a server: one speaks HTTP and decodes, one holds the model.

Between them go uint8 pixels, on one machine through memory that both see, and token ids. Each loads
the bundle and checks its golden pairs before it takes a request. During a change of bundles a
replica of one may meet a replica of the other: pixels made for another bundle are never scored, the
pair itself is sent then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from mmray import golden
from mmray import serving as serving_room
from mmray.archive.rows import Sample
from mmray.bundle import Bundle, load, read_manifest
from mmray.engine.decoders import Decoders
from mmray.engine.meters import Meters, ModelMeters
from mmray.engine.turns import wait_for_turns
from mmray.errors import BadRow, BundleError, MmrayError, RunError
from mmray.memory import settle
from mmray.preprocess import Prepared
from mmray.serving import answers, app, card
from mmray.serving.answers import Busy, Outcome, Result, outcomes
from mmray.serving.headers import Door
from mmray.serving.lane import Lane
from mmray.serving.settings import ServeConfig, token_of
from mmray.serving.shared import Elsewhere, Receiver, Sender, Where

ATTEMPTS = 3  # to score what a replica was given that died; scoring twice changes nothing


def loaded(uri: str, fingerprint: str) -> Bundle:
    """The bundle that was asked for, and no other that has taken its place."""
    found = load(uri)
    if found.fingerprint != fingerprint:
        raise BundleError(
            f"{uri}: holds {found.fingerprint[:12]} now, this server was started with "
            f"{fingerprint[:12]}; deploy it again"
        )
    return found


class Scorer:
    """Holds one Predictor; batches what comes in; does not start when golden pairs score wrong."""

    def __init__(self, uri: str, fingerprint: str, cfg: ServeConfig) -> None:
        import torch

        from mmray.predict import Predictor

        wait_for_turns()
        score = cfg.score
        torch.set_num_threads(score.threads or max(1, int(score.cpus)))
        bundle = loaded(uri, fingerprint)
        self._predictor = Predictor(bundle, batch_size=score.batch_rows)
        self._difference = self._predictor.check_golden()
        self._predictor.build_exact()
        self._predictor.preprocessor = card.preprocessor_of(bundle, cfg)
        self._pulse = self._pulse_of(bundle)
        # The model is one thread's; the event loop stays free to answer health checks.
        self._thread = ThreadPoolExecutor(1)
        # Not serve.batch, which cuts its batches before one of them can start.
        self._lane = Lane(self._scored, score.batch_rows, score.concurrent_batches)
        self._meters, self._receiver = ModelMeters(), Receiver()
        settle()

    async def score(
        self, fingerprint: str, prepared: Sequence[Prepared], where: Where | None = None
    ) -> list[Outcome] | Elsewhere | None:
        """What the model makes of rows prepared for the bundle ``fingerprint``, at most
        ``batch_rows`` of them; None when this replica holds another bundle. ``where`` their pixels
        are; None: with them."""
        if fingerprint != self._predictor.fingerprint:
            return None
        seen = prepared if where is None else self._receiver.rows(prepared, where)
        return Elsewhere() if seen is None else await self._lane.results(seen)

    async def score_samples(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Pairs as they came, prepared here: for a sender that knows another bundle."""
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._scores, samples)
        return await work

    async def golden(self) -> dict[str, Any]:
        assert self._predictor.golden is not None
        return {
            "fingerprint": self._predictor.fingerprint,
            "golden_pairs": self._predictor.golden.num_rows,
            "golden_difference": self._difference,
        }

    async def check_health(self) -> None:
        """A golden pair through the model; a replica that fails is replaced."""
        if self._pulse is None:
            return
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, self._beat)
        if not found <= self._tolerance:
            raise RuntimeError(f"a golden pair is off by {found:.3f} from what it gave at first")

    # --- in the model's thread -------------------------------------------------------------------

    async def _scored(self, prepared: list[Prepared]) -> list[Outcome]:
        began, loop = time.perf_counter(), asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, self._forward, prepared)
        self._meters.scored(len(prepared), time.perf_counter() - began)
        return found

    def _forward(self, prepared: Sequence[Prepared]) -> list[Outcome]:
        samples = [Sample("request", i, "") for i in range(len(prepared))]
        return self._scores(samples, prepared)

    def _scores(
        self, samples: Sequence[Sample], prepared: Sequence[Prepared] | None = None
    ) -> list[Outcome]:
        scored = self._predictor.score(samples, prepared)
        return outcomes(scored.table, self._predictor.fingerprint, scored.seconds_predict)

    def _pulse_of(self, bundle: Bundle) -> tuple[Prepared, Any] | None:
        """A golden pair and its scores; None where all of them are to be set aside."""
        assert bundle.golden is not None
        self._tolerance = golden.tolerance(bundle.golden)
        _, prepared = self._predictor.preprocessor.prepare_all(golden.inputs(bundle.golden))
        first = next((row for row in prepared if row is not None), None)
        return None if first is None else (first, self._predictor.forward([first]).probabilities)

    def _beat(self) -> float:
        assert self._pulse is not None
        row, expected = self._pulse
        return float(abs(self._predictor.forward([row]).probabilities - expected).max())


class Ingress:
    """Speaks HTTP, decodes, asks a Scorer; the backend of its own application."""

    def __init__(
        self, uri: str, fingerprint: str, cfg: ServeConfig, scorer: DeploymentHandle[Scorer]
    ) -> None:
        from mmray.predict import Predictor

        wait_for_turns()
        # Serve's own handlers write to the replica's log file.
        requests = logging.getLogger(serving_room.__name__)
        requests.parent = logging.getLogger("ray.serve")
        requests.setLevel(logging.INFO)
        self._token = token_of(cfg)
        bundle = loaded(uri, fingerprint)
        with ThreadPoolExecutor(1) as meanwhile:  # its children take seconds to start
            decoders = meanwhile.submit(Decoders, bundle, cfg)
            # A bundle that fails here never replaces one that does not, even as the one to
            # prepare for.
            Predictor(bundle, "cpu").check_golden()
        self._decoders, self._meters = decoders.result(), Meters()
        self._cfg, self._fingerprint = cfg, fingerprint
        # What goes between the two is of modules that both have: no need of cloudpickle's search.
        self._scorer: DeploymentHandle[Scorer] = scorer.options(
            request_serialization="pickle", response_serialization="pickle"
        )
        score = cfg.score
        self._sender = Sender(bundle.preprocess.image.size, score.groups * score.batch_rows)
        self._lane = Lane(
            self._asked, score.batch_rows, score.groups, self._meters.waited,
            hold_s=score.batch_wait_s, coming=lambda: self._decoders.busy,
        )  # fmt: skip
        self.card: Mapping[str, Any] = card.card(
            bundle, card.preprocessor_of(bundle, cfg), read_manifest(uri).task, cfg
        )
        self.examples = card.examples(bundle, cfg.examples)
        settle()

    def __serve_build_asgi_app__(self) -> FastAPI:
        made = app.build(self, self._cfg, self._token, self._meters.answered)
        Door.application = made
        return made

    async def score(self, samples: Sequence[Sample]) -> list[Outcome]:
        began = time.perf_counter()
        decoded = await self._decoders.prepare(samples)
        self._meters.decoded(time.perf_counter() - began)
        pairs = zip(samples, decoded, strict=True)
        sound = [(sample, row) for sample, (row, _) in pairs if not isinstance(row, BadRow)]
        found = await self._lane.results(sound)
        if len({row.fingerprint for row in found if isinstance(row, Result)}) > 1:
            # Bundles change just now; one answer is of one model.
            found = await self._whole([sample for sample, _ in sound])
        scored = iter(found)
        return [
            row if isinstance(row, BadRow) else answers.timed(next(scored), seconds)
            for row, seconds in decoded
        ]

    async def check(self) -> Mapping[str, Any]:
        try:
            found: dict[str, Any] = await self._scorer.golden.remote()
        except (RayError, BackPressureError, DeploymentUnavailableError) as error:
            raise MmrayError("no replica that holds the model answers") from error
        return found

    async def check_health(self) -> None:
        """A golden pair through a decoder; a replica that fails is replaced."""
        await self._decoders.check()

    async def _asked(self, pairs: Sequence[tuple[Sample, Prepared]]) -> list[Outcome]:
        """A group's outcomes."""
        samples, prepared = map(list, zip(*pairs, strict=True))
        found = await self._sender.ask(prepared, self._prepared)
        return await self._whole(samples) if found is None else found

    async def _prepared(
        self, prepared: Sequence[Prepared], where: Where | None
    ) -> list[Outcome] | Elsewhere | None:
        found: list[Outcome] | Elsewhere | None = await self._answer(
            self._scorer.score, self._fingerprint, prepared, where
        )
        return found

    async def _whole(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Pairs as they came, all by one replica, whatever bundle it holds."""
        found: list[Outcome] = await self._answer(self._scorer.score_samples, samples)
        return found

    async def _answer(self, method: Any, *args: Any) -> Any:
        """What a replica says; asked again where the replica died that had it. Raises Busy and
        RunError."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await method.remote(*args)
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise Busy(str(error)) from None
            except RayActorError as error:
                if attempt == ATTEMPTS:
                    raise Busy("replicas die while they score") from error
            except Exception as error:  # the model's, or of Ray's transport, which has its own
                raise RunError(f"scoring failed: {error}") from error
        raise AssertionError("returned or raised")
