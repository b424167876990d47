"""What serve_load.py sets mmray beside, each in a process of its own:

    python benchmarks/_servers.py predictor BUNDLE BODIES
    python benchmarks/_servers.py fastapi|litserve|rayserve BUNDLE PORT
    RAY_ADDRESS=... python benchmarks/_servers.py update BUNDLE PORT

``predictor``: no server: bare processes, one a core, each with a Predictor and batches of 16, of
all the pairs that servers are sent. To every line of its input, a number of seconds, it prints
their rate in those, or, to ``alone``, what one pair takes by itself, and its decoding of that.
``fastapi``: what one writes first: a handler that decodes and scores one request.
``litserve``: LitServe, batches of 16, a worker a core, with mmray's own Predictor in it.
``rayserve``: Ray Serve as its documentation batches, 16 rows, a replica a core, that Predictor:
https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html. ``update``: no server: puts
BUNDLE in the place of what mmray serves.
"""

import itertools
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import uvicorn
from _arms import CORES, Model, decode_pillow
from _load import BOUNDARY, read_bodies
from fastapi import FastAPI, Form, Request, UploadFile

from mmray.archive.rows import Sample

try:
    import litserve
except ModuleNotFoundError:  # that arm is left out
    litserve = None

BATCH = 16
FORM = f"multipart/form-data; boundary={BOUNDARY}"
ALONE, PAUSE_S = 30, 0.2  # pairs that are timed by themselves


def samples_of(path: str) -> list[Sample]:
    from mmray.serving.bodies import One
    from mmray.serving.settings import Limits

    found = []
    for body in read_bodies(Path(path)):
        read = One(FORM, Limits())
        read.take(body)
        found.append(read.sample())
    return found


def _score(bundle: str, bodies: str, asked: Any) -> None:
    predictor = _predictor(bundle)
    all_of = samples_of(bodies)
    batches = [(all_of * 2)[i : i + BATCH] for i in range(0, len(all_of), BATCH)]
    for batch in batches * 2:
        predictor.score_table(batch)
    turns = itertools.cycle(batches)
    while seconds := asked.recv():
        began, rows = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            batch = next(turns)
            predictor.score_table(batch)
            rows += len(batch)
        asked.send(rows / (time.perf_counter() - began))


def _predictor(bundle: str) -> Any:
    import torch

    from mmray.bundle import load
    from mmray.predict import Predictor

    torch.set_num_threads(1)
    return Predictor(load(bundle), "cpu", batch_size=BATCH)


def predictor(bundle: str, bodies: str) -> None:
    context, pipes = multiprocessing.get_context("spawn"), []
    for _ in range(CORES):
        ours, theirs = context.Pipe()
        context.Process(target=_score, args=(bundle, bodies, theirs), daemon=True).start()
        pipes.append(ours)
    for line in map(str.strip, sys.stdin):
        if line == "alone":
            print(json.dumps(alone(bundle, bodies)), flush=True)
            continue
        for pipe in pipes:
            pipe.send(float(line))
        print(sum(pipe.recv() for pipe in pipes), flush=True)
    for pipe in pipes:
        pipe.send(0.0)


def alone(bundle: str, bodies: str) -> dict[str, float]:
    """What a pair takes in a Predictor, and its decoding of that; medians, in ms."""
    scorer, decoding, times = _predictor(bundle), [], []
    for sample in itertools.islice(itertools.cycle(samples_of(bodies)), ALONE):
        time.sleep(PAUSE_S)  # as between requests that come one at a time
        began = time.perf_counter()
        _, prepared = scorer.preprocessor.prepare_all([sample])
        decoding.append(time.perf_counter() - began)
        scorer.score([sample], prepared)
        times.append(time.perf_counter() - began)
    decode_ms, alone_ms = (statistics.median(each) * 1e3 for each in (decoding, times))
    return {"decode_ms": decode_ms, "alone_ms": alone_ms}


def fastapi(bundle: str, port: int) -> None:
    app, model = FastAPI(), Model(bundle, CORES)

    @app.post("/v1/score")
    def score(image: UploadFile, caption: Annotated[str, Form()]) -> dict[str, Any]:
        pixels = decode_pillow(image.file.read(), model.size)
        return {"scores": model.score(np.stack([pixels]), [caption])[0].tolist()}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


class Api(litserve.LitAPI if litserve else object):  # type: ignore[misc]
    def __init__(self, bundle: str) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=0.005, api_path="/v1/score")
        self.bundle = bundle

    def setup(self, device: str) -> None:
        self.predictor = _predictor(self.bundle)

    def decode_request(self, request: Request) -> Any:  # it reads the annotation
        image, caption = request["image"].file.read(), request["caption"]
        sample = Sample("request", 0, "0", image, caption)
        return sample, self.predictor.prepare(sample)

    def batch(self, inputs: list[Any]) -> Any:
        return inputs

    def predict(self, inputs: list[Any]) -> list[Any]:
        samples, prepared = map(list, zip(*inputs, strict=True))
        return self.predictor.score(samples, prepared).table.to_pylist()

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in output.items() if name.startswith("p_")}


def lit(bundle: str, port: int) -> None:
    server = litserve.LitServer(
        Api(bundle), accelerator="cpu", workers_per_device=CORES, timeout=120
    )
    server.run(
        host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False,
        log_level="warning", pretty_logs=False,
    )  # fmt: skip


def rayserve(bundle: str, port: int) -> None:
    import ray
    from ray import serve
    from ray.serve.handle import DeploymentHandle

    app = FastAPI()

    @serve.deployment(num_replicas=CORES, max_ongoing_requests=2 * BATCH)
    class Scores:
        def __init__(self) -> None:
            self.predictor = _predictor(bundle)

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.005)
        async def __call__(self, samples: list[Sample]) -> list[dict[str, Any]]:
            rows: list[dict[str, Any]] = self.predictor.score_table(samples).to_pylist()
            return rows

    @serve.deployment(max_ongoing_requests=4 * BATCH)
    @serve.ingress(app)
    class Http:
        def __init__(self, scores: DeploymentHandle) -> None:
            self.scores = scores

        @app.post("/v1/score")
        async def score(self, image: UploadFile, caption: Annotated[str, Form()]) -> dict[str, Any]:
            sample = Sample("request", 0, "0", await image.read(), caption)
            row = await self.scores.remote(sample)
            return {name: value for name, value in row.items() if name.startswith("p_")}

    ray.init(num_cpus=CORES + 1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Http.bind(Scores.bind()), blocking=True)


def update(bundle: str, port: int) -> None:
    from mmray import config
    from mmray.engine import cluster, serve
    from mmray.serving.settings import ServeConfig

    score = {"min_replicas": CORES, "max_replicas": CORES}
    cfg = config.validate(ServeConfig, {"port": port, "score": score}, "update")
    cluster.connect()
    serve.deploy(bundle, cfg)


if __name__ == "__main__":
    arm, uri, *rest = sys.argv[1:]
    if arm == "predictor":
        predictor(uri, rest[0])
    else:
        servers = {"fastapi": fastapi, "litserve": lit, "rayserve": rayserve, "update": update}
        servers[arm](uri, int(rest[0]))
