"""A real server on a real Ray: parity with batch scoring, hostile input, changes under load."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
import served
import tiny
from PIL import Image
from ports import free_port, free_ports
from prometheus_client.parser import text_string_to_metric_families

from mmray import bundle as bundles
from mmray import config
from mmray.archive.rows import Sample
from mmray.archive.shards import list_shards, read_shard
from mmray.client import AsyncClient, Client, Pair, Problem, Score
from mmray.engine import serve as engine_serve
from mmray.errors import BundleError, ConfigError, RunError
from mmray.predict import Predictor
from mmray.serving.settings import ServeConfig
from mmray.serving.shared import NAME

TOLERANCE = 1e-4  # of a probability: float rounding, whatever else is in the batch
PAIRS = 500


@dataclass
class Server:
    bundle: str
    cfg: ServeConfig
    url: str

    def replicas(self, kind: str) -> set[int]:
        """Process ids of the replicas that serve, of this test run's Ray alone: tests beside it
        have servers, too."""
        from ray import serve

        app = serve.status().applications["mmray"]
        assert app.deployments[kind].replica_states.get("RUNNING", 0) >= 1
        found = set()
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it ends
                if " ".join(process.cmdline()).startswith(f"ray::ServeReplica:mmray:{kind}"):
                    found.add(process.pid)
        return found

    def replica(self, kind: str) -> int:
        """The process id of the only one, once those of before have ended."""
        assert until(lambda: len(self.replicas(kind)) == 1, 60)
        (pid,) = self.replicas(kind)
        return pid


@pytest.fixture(scope="module")
def server(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from ray import serve

    from mmray.engine import serve as engine

    uri = tiny.bundle(str(tmp_path_factory.mktemp("served") / "bundle"))
    small = {"cpus": 0.3, "max_queued": 64}
    tree = {"port": free_port(), "decode": small, "score": small, "deadlines": {"body_s": 3}}
    cfg = config.validate(ServeConfig, tree, "test")
    engine.deploy(uri, cfg)
    yield Server(uri, cfg, engine.url(cfg))
    serve.shutdown()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as made:
        yield made


def real_pairs(shared: Path, count: int) -> list[Sample]:
    """Pairs of real tweets, of those that hold both."""
    root = str(shared / "data" / "tweets")
    found = (
        item
        for shard in list_shards(root)
        for item in read_shard(root, shard)
        if isinstance(item, Sample) and item.image and item.caption
    )
    return list(islice(found, count))


def test_online_scores_are_those_of_the_batch_job(server: Server, shared: Path) -> None:
    pairs = real_pairs(shared, PAIRS)
    expected = Predictor(bundles.load(server.bundle)).score_table(pairs).to_pylist()

    async def ask() -> list[Score | Problem]:
        """Half of them alone, 16 at a time; half of them in batches of all sizes."""
        async with AsyncClient(server.url) as client:
            gate, half = asyncio.Semaphore(16), len(pairs) // 2

            async def alone(sample: Sample) -> Score:
                async with gate:
                    return await client.score(sample.image, sample.caption)

            found: list[Score | Problem] = []
            found += await asyncio.gather(*(alone(sample) for sample in pairs[:half]))
            start = half
            for size in (1, 3, 40, 16, 17, 64, 64, 64):
                group = [Pair(s.image, s.caption) for s in pairs[start : start + size]]
                found += await client.score_batch(group) if group else []
                start += size
            return found

    found = asyncio.run(ask())
    assert len(found) == len(pairs) == PAIRS
    for row, answer in zip(expected, found, strict=True):
        if row["error"] is not None:
            assert isinstance(answer, Problem) and str(answer) == row["error"]
            continue
        assert isinstance(answer, Score) and answer.label == row["label"]
        scores = {name: row[f"p_{name}"] for name in tiny.LABELS}
        assert answer.scores == pytest.approx(scores, abs=TOLERANCE)
    for pid in server.replicas("Scorer"):
        seen = Path(f"/proc/{pid}/maps").read_text()
        assert NAME in seen, "pixels were sent to a replica of the same machine"


def test_nothing_that_is_posted_ends_a_replica_or_gives_a_5xx(server: Server, shared: Path) -> None:
    before = server.replica("Ingress"), server.replica("Scorer")
    pictures = served.bad_images(shared)
    preprocessor = bundles.load(server.bundle).build_preprocessor()
    samples = [Sample("s", i, name, data, "a sea") for i, (name, data) in enumerate(pictures)]
    left, _ = preprocessor.prepare_all(samples)
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        for sample, original in zip(left, samples, strict=True):
            form = served.form(original.image, b"a sea")
            answer = http.post("/v1/score", content=form, headers={"content-type": served.FORM})
            why = None if sample.error is None else sample.error.partition(":")[0]
            assert answer.json().get("reason") == why, sample.key
            assert answer.status_code in ((200,) if why is None else (413, 415, 422))
        for path, kind, body in served.bodies(1, 150):
            answer = http.post(path, content=body, headers={"content-type": kind.encode()})
            assert answer.status_code < 500, (path, kind, body[:80], answer.text)
        for name in ("x-request-id", "x-session-id", "x-request-timeout-seconds", "authorization"):
            headers = {name: b"caf\xe9", "content-type": served.FORM.encode()}
            answer = http.post("/v1/score", content=form, headers=headers)
            assert (answer.status_code, answer.json()["reason"]) == (400, "header not UTF-8")
        for size, status in ((40_000, 431), (100_000, 400)):  # ours, and HAProxy's own
            answer = http.post("/v1/score", content=b"x", headers={"x-huge": "x" * size})
            assert answer.status_code == status
    for raw in (
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\ncut",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.cfg.port), timeout=20) as s:
            said = b""
            with contextlib.suppress(OSError):  # it may hang up
                s.sendall(raw)
                s.shutdown(socket.SHUT_WR)
                said = s.recv(65536)
            assert not said.startswith(b"HTTP/1.1 5")
    assert (server.replica("Ingress"), server.replica("Scorer")) == before
    with Client(server.url) as client:
        assert client.ready()


def test_a_slow_sender_is_cut_off(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.cfg.port), timeout=0.2) as s:
        began, said = time.monotonic(), b""
        s.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        while b"}" not in said and time.monotonic() - began < 20:
            with contextlib.suppress(TimeoutError):
                s.sendall(b"-")
                said += s.recv(65536)
    assert said.startswith(b"HTTP/1.1 408") and b"body too slow" in said
    assert time.monotonic() - began < server.cfg.deadlines.body_s + 5


def test_an_answer_tells_where_its_time_went(server: Server) -> None:
    form, kind = served.form(tiny.jpeg(1), b"a sea"), {"content-type": served.FORM}
    answer = httpx2.post(f"{server.url}/v1/score", content=form, headers=kind)
    timing = dict(each.split(";dur=") for each in answer.headers["server-timing"].split(", "))
    decode, model, total = (float(timing[part]) for part in ("decode", "model", "total"))
    assert decode > 0 and model > 0 and decode + model < total


def test_callers_give_serve_no_orders(server: Server) -> None:
    """Whose 408 would be text, and whose id would be another than that of the answer."""
    form = served.form(tiny.jpeg(1), b"a sea")
    orders = {"x-request-timeout-seconds": "0.0001", "x-session-id": "one"}
    for asked, given in (("mine-1", "mine-1"), ("not plain", None)):
        headers = {"content-type": served.FORM, "x-request-id": asked, **orders}
        answer = httpx2.post(f"{server.url}/v1/score", content=form, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == answer.json()["request_id"]
        assert answer.json()["request_id"] == (given or answer.json()["request_id"])


@dataclass
class Load:
    """Asks, for one pair's score by default, again and again, from a thread; every answer is
    kept."""

    url: str
    attempts: int  # 1: whatever fails is seen
    ask: Callable[[Client], Any] = lambda client: client.score(tiny.jpeg(5), tiny.caption(5))
    answers: list[Any] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with Client(self.url, attempts=self.attempts) as client:
            while not self._over.is_set():
                try:
                    self.answers.append(self.ask(client))
                except Exception as error:  # noqa: BLE001  # the test looks at all of them
                    self.answers.append(error)

    def failures(self) -> list[Exception]:
        return [answer for answer in self.answers if isinstance(answer, Exception)]

    def wrong(self, *uris: str) -> list[Score]:
        """Answers that the bundle they name would not give."""
        sample, right = Sample("s", 0, "", tiny.jpeg(5), tiny.caption(5)), {}
        for uri in uris:
            predictor = Predictor(bundles.load(uri))
            (row,) = predictor.score_table([sample]).to_pylist()
            right[predictor.fingerprint[:12]] = {name: row[f"p_{name}"] for name in tiny.LABELS}
        scored = [answer for answer in self.answers if isinstance(answer, Score)]
        assert scored
        return [a for a in scored if a.scores != pytest.approx(right[a.model], abs=TOLERANCE)]


def test_a_replica_that_is_killed_costs_no_answer(server: Server) -> None:
    for kind in ("Scorer", "Ingress"):
        pid = server.replica(kind)
        with Load(server.url, attempts=20) as load:
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 90
            while server_answers(server, pid, kind) is False and time.monotonic() < deadline:
                time.sleep(0.5)
            time.sleep(1)
        assert not load.failures(), kind
        assert not load.wrong(server.bundle)


def noise(side: int) -> bytes:
    """A JPEG that hardly compresses: 2000 px are 6 MB."""
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()


def server_answers(server: Server, dead: int, kind: str) -> bool:
    try:
        found = server.replicas(kind)
    except AssertionError:
        return False
    with Client(server.url, attempts=1) as client:
        return bool(found) and dead not in found and client.ready()


def test_a_bundle_is_replaced_without_a_failed_or_a_wrong_answer_and_a_bad_one_never_serves(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside single pairs go batches of which 16 pairs, and a lone picture, are over 4 MiB."""
    import ray
    from ray import serve

    from mmray.engine import serve as engine

    other = tiny.bundle(str(tmp_path / "other"), seed=1, size=320)
    bad = with_foreign_golden(other, server.bundle, tmp_path / "bad")
    large = [Pair(noise(2000), "large"), *(Pair(noise(300), "small") for _ in range(19))]
    single = Load(server.url, attempts=1)
    batches = Load(server.url, attempts=1, ask=lambda client: client.score_batch(large))
    with single, batches:
        with pytest.raises(BundleError, match="golden"):
            engine.deploy(bad, server.cfg)
        assert serve.status().applications["mmray"].status == "RUNNING"
        with monkeypatch.context() as patch:  # where only the replicas notice
            patch.setattr(engine, "_checked", SimpleNamespace(remote=lambda *_: ray.put(None)))
            with pytest.raises(RunError, match="golden"):
                engine.deploy(bad, server.cfg)
        assert {a.model for a in single.answers if isinstance(a, Score)} == {short(server.bundle)}
        engine.deploy(other, server.cfg)
        time.sleep(3)
    assert not single.failures() and not batches.failures()
    assert not single.wrong(server.bundle, other)
    assert single.answers[-1].model == short(other)
    models = [{answer.model for answer in batch} for batch in batches.answers]
    assert all(len(each) == 1 for each in models), "an answer of two models"
    assert models[-1] == {short(other)}
    with Client(server.url) as client:
        assert client.model()["fingerprint"].startswith(short(other))


def test_replicas_come_and_go_with_the_load_and_what_is_too_much_is_told_so(
    server: Server, tmp_path: Path
) -> None:
    """Of both kinds."""
    from mmray.engine import serve as engine

    # A group of such pairs takes long enough for this machine to keep three replicas busy.
    slow = tiny.bundle(str(tmp_path / "slow"), size=640)
    scales = {"upscale_delay_s": 0.5, "downscale_delay_s": 2}
    tree = {
        "port": server.cfg.port,
        "score": {"max_replicas": 3, "target_ongoing": 1, "cpus": 0.1, "batch_rows": 4, **scales},
        "decode": {
            "max_replicas": 2,
            "target_ongoing": 5,
            "max_ongoing": 16,
            "cpus": 0.2,
            **scales,
        },
    }
    engine.deploy(slow, config.validate(ServeConfig, tree, "test"))
    assert server.replica("Scorer") and server.replica("Ingress")
    light = Load(server.url, attempts=1)
    heavy = [Load(server.url, attempts=1) for _ in range(14)]
    with light:
        with contextlib.ExitStack() as stack:
            for load in heavy:
                stack.enter_context(load)
            assert until(lambda: len(server.replicas("Scorer")) == 3, 90)
            assert until(lambda: len(server.replicas("Ingress")) == 2, 90)
        assert until(lambda: len(server.replicas("Scorer")) == 1, 120)
        assert until(lambda: len(server.replicas("Ingress")) == 1, 120)
        time.sleep(1)
    for load in (light, *heavy):
        assert not load.failures() and not load.wrong(slow)

    form = served.form(tiny.jpeg(5), tiny.caption(5).encode())

    async def burst() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
            headers = {"content-type": served.FORM}
            asked = [http.post("/v1/score", content=form, headers=headers) for _ in range(80)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(burst())
    told = Counter(answer.status_code for answer in answers)
    assert set(told) == {200, 503} and told[200] >= 16
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["reason"] == "too busy" and answer.headers["retry-after"] == "1"


def until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.5)
    return holds()


def short(uri: str) -> str:
    return bundles.read_manifest(uri).fingerprint[:12]


def with_foreign_golden(uri: str, foreign: str, dest: Path) -> str:
    """The bundle ``uri``, sound in every byte, whose golden pairs are those of another model."""
    shutil.copytree(uri, dest)
    shutil.copy(Path(foreign) / "golden.parquet", dest / "golden.parquet")
    manifest = json.loads((dest / "bundle.json").read_text())
    theirs = json.loads((Path(foreign) / "bundle.json").read_text())
    manifest["files"]["golden.parquet"] = theirs["files"]["golden.parquet"]
    manifest["golden"] = theirs["golden"] | {"tolerance": manifest["golden"]["tolerance"]}
    (dest / "bundle.json").write_text(json.dumps(manifest))
    return str(dest)


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
(COMMAND,) = re.findall(r"^```sh\n(mmray serve .*)\n```", README, re.MULTILINE)
(PROGRAM,) = re.findall(
    r"^```python\n(from mmray.client .*?)^```", README, re.MULTILINE | re.DOTALL
)


def on_its_own() -> dict[str, str]:
    """The environment of a server that has nothing of the one in this process."""
    theirs = re.compile("RAY_SERVE_.*_PORT")
    ours = {name: value for name, value in os.environ.items() if not theirs.fullmatch(name)}
    return ours | {"RAY_ADDRESS": "local"}


def expect_figures(port: int, expected: Counter[tuple[str, ...]]) -> None:
    """Asserts that Prometheus finds ``expected``, by name or by name, path and status, before
    long: every process tells of itself in its own time."""
    ends = time.monotonic() + 120
    while True:
        text, found = "", Counter[tuple[str, ...]]()
        with contextlib.suppress(httpx2.ConnectError):  # what answers starts beside the server
            text = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removeprefix("ray_")
                found[name,] += sample.value
                found[name, sample.labels.get("path"), sample.labels.get("status")] += sample.value
        if found >= expected:
            return
        assert time.monotonic() < ends, expected - found
        time.sleep(0.5)


@pytest.fixture
def usual_ports_taken() -> Iterator[None]:
    """Another server of this machine has the ports that Serve takes by default: HAProxy's counters,
    and the proxy that is asked where no replica is up, which two would share."""
    with contextlib.ExitStack() as stack:
        for port in (9101, 8404, 8500):
            with contextlib.suppress(OSError):  # then there is one
                stack.enter_context(socket.create_server(("", port)))
        yield


@pytest.mark.usefixtures("usual_ports_taken")
def test_the_readme_serves_until_ctrl_c_and_asks_for_its_token(tmp_path: Path) -> None:
    """Its command and its program, but for the port, and with a token."""
    tiny.bundle(str(tmp_path / "tour" / "model"))
    (tmp_path / "picture.jpg").write_bytes(tiny.jpeg(1))
    port, metrics_port = free_ports(2)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = on_its_own() | {"A_TOKEN": "s3cret", "PATH": path}
    environment["PYTHONPATH"] = str(ROOT)
    with (
        subprocess.Popen(
            [
                *shlex.split(COMMAND.replace("8000", str(port))),
                *("--token-env", "A_TOKEN", "--metrics-port", str(metrics_port)),
            ],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process,
        contextlib.ExitStack() as ending,
    ):
        ending.callback(process.kill)  # where the test fails before it has ended
        assert process.stderr is not None
        url, said = f"http://127.0.0.1:{port}", ""
        for text in process.stderr:
            said += text
            if url in text:
                break
        assert url in said and "s3cret" not in said
        assert httpx2.get(f"{url}/v1/model").status_code == 401
        program = PROGRAM.replace('http://127.0.0.1:8000"', f'{url}", token="s3cret"')
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True
        )
        assert b"Score(label=" in done.stdout, done.stderr
        ours = ("request_seconds", "decode_seconds", "wait_seconds", "batch_rows", "model_seconds")
        expected = Counter((f"mmray_{name}_count",) for name in ours)
        expected["mmray_requests_total", "/v1/model", "401"] = 1
        expected["mmray_requests_total", "/v1/score", "200"] = 1
        expect_figures(metrics_port, expected)
        children = psutil.Process(process.pid).children(recursive=True)
        if hasattr(os, "SCHED_BATCH"):
            stop_others = [c for c in children if os.sched_getscheduler(c.pid) != os.SCHED_BATCH]
            assert not stop_others, "they stop the model whenever they wake"
        scripts = {Path(part).name for c in children for part in c.cmdline()}
        assert not scripts & {"log_monitor.py", "monitor.py", "dashboard.py"}, "nobody reads them"
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
        assert not psutil.wait_procs(children, timeout=60)[1], "processes were left behind"


def test_ctrl_c_ends_a_server_whichever_thread_the_kernel_tells() -> None:
    def told() -> None:
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        if not ended.wait(10):
            os.kill(os.getpid(), signal.SIGTERM)  # to the main thread: the test goes on

    ended, began = threading.Event(), time.monotonic()
    other = threading.Thread(target=told)
    other.start()
    engine_serve._wait_for_signal()
    took = time.monotonic() - began
    ended.set()
    other.join()
    assert took < 8


def test_a_server_that_is_killed_leaves_its_port(tmp_path: Path) -> None:
    uri, port = tiny.bundle(str(tmp_path / "model")), free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "mmray", "serve", uri, "--port", str(port)],
        env=on_its_own(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert any(f"at http://127.0.0.1:{port}" in line for line in process.stderr)
        process.kill()

    def free() -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) != 0

    assert until(free, 90), "HAProxy was left behind"


def test_what_a_cluster_cannot_give_is_refused(server: Server) -> None:
    from mmray.engine import serve as engine
    from mmray.engine.cluster import resources

    elsewhere = server.cfg.model_copy(update={"port": free_port()})
    with pytest.raises(ConfigError, match=f"listens at 127.0.0.1:{server.cfg.port}"):
        engine.deploy(server.bundle, elsewhere)
    for score, lacks in (({"gpus": 1}, "1 GPUs"), ({"cpus": 900}, "901 CPUs")):
        cfg = config.validate(ServeConfig, {"score": score}, "test")
        with pytest.raises(ConfigError, match=lacks):
            engine._check_room(cfg, resources())
    cfg = config.validate(ServeConfig, {"limits": {"pixels": 10}}, "test")
    with pytest.raises(ConfigError, match=r"limits\.pixels: got 10"):
        engine.application({"bundle": server.bundle, "config": {"limits": {"pixels": 10}}})


def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    uri = tiny.bundle(str(tmp_path / "model"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "mmray", "serve", uri, "--port", str(port)],
            env=on_its_own(),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"127.0.0.1:{port}: nothing can listen there: Address already in use" in done.stderr
