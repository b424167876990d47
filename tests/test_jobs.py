"""Jobs on a real cluster, submitted as a person does: `ray start`, its dashboard, its token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import yaml
from ports import free_ports

from mmray import ledger, storage
from mmray.bundle import read_manifest
from mmray.client import Client
from mmray.config import load
from mmray.verify import verify

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
(JOB,) = re.findall(r"^```sh\n(ray job submit .*)\n```", README, re.MULTILINE)
START_SECONDS = 120
START_ATTEMPTS = 3  # Ray gives up after 30 s, which a busy machine can take


@dataclass(frozen=True)
class Cluster:
    """A running head node: where its jobs API and metrics are, the environment of its clients."""

    dashboard: str
    metrics: str
    environment: Mapping[str, str]

    def submit(self, *command: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, following the job's logs to its end."""
        line = ["ray", "job", "submit", "--working-dir", ".", "--", *command]
        return self.run(line, token=token)

    def run(self, line: Sequence[str], *, token: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of Ray's from the project's root, by someone who has the token, or not."""
        environment = {**self.environment, "RAY_API_SERVER_ADDRESS": self.dashboard}
        if not token:
            environment = {k: v for k, v in environment.items() if not k.startswith("RAY_AUTH_")}
        return subprocess.run(
            [BIN / line[0], *line[1:]],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )


@pytest.fixture(scope="module")
def cluster(s3_endpoint: object) -> Iterator[Cluster]:
    """`ray start --head` with a token, in its own processes and directory; ended by their group.
    The S3 endpoint and its keys are in the environment of the node."""
    for attempt in range(1, START_ATTEMPTS + 1):
        folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets live below it
        head = Head(folder)
        try:
            if not head.started():
                assert attempt < START_ATTEMPTS, f"the cluster did not start:\n{head.logs()}"
                continue
            yield Cluster(head.dashboard, head.metrics, head.environment)
            assert head.process.poll() is None, f"the cluster ended by itself:\n{head.logs()}"
            return
        finally:
            head.end()
            shutil.rmtree(folder, ignore_errors=True)


class Head:
    """The processes of a head node, all below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        gcs, dashboard, client, agent, metrics = free_ports(5)
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_")
        } | {
            "HOME": str(folder),  # no token of ours is found there, and none is left there
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "NO_PROXY": "127.0.0.1",
        }
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--temp-dir={folder}/ray", f"--port={gcs}", f"--dashboard-port={dashboard}"]
        command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--metrics-export-port={metrics}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
        command += ["--object-store-memory=200000000"]
        with (folder / "start.log").open("w") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def started(self) -> bool:
        """Wait until it has announced itself on this machine and its dashboard wants a token."""
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=5)
            except urllib.error.HTTPError as error:
                assert error.code == 401, f"the dashboard answers {error.code}"
                if (self._folder / "ray" / "ray_current_cluster").exists():
                    return True
            except OSError:
                pass  # nobody listens yet
            else:
                pytest.fail("the dashboard answers without a token")
            time.sleep(0.5)
        return False

    def end(self) -> None:
        """End this cluster and no other: `ray stop` would end every Ray of this machine."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def logs(self) -> str:
        """What may say why it is not there."""
        folder = self._folder / "ray" / "session_latest" / "logs"
        found = [(self._folder / "start.log").read_text()[-3000:]]
        for name in ("raylet.out", "gcs_server.out"):
            if (folder / name).exists():
                lines = (folder / name).read_text().splitlines()
                found += [f"{name}: {line}" for line in lines if re.search(r" [WECF] \d+ ", line)]
        return "\n".join(found)


def test_without_the_token_no_job_is_taken(cluster: Cluster, tmp_path: Path) -> None:
    refused = cluster.submit("touch", str(tmp_path / "ran"), token=False)
    assert refused.returncode != 0
    assert "authentication token" in refused.stderr + refused.stdout
    assert not (tmp_path / "ran").exists()


def test_the_command_of_the_readme_is_followed_and_gives_every_row(
    cluster: Cluster, tmp_path: Path
) -> None:
    """As it stands there: from S3 to S3, where the bucket is called "bucket"."""
    storage.client().create_bucket(Bucket="bucket")
    tiny.bundle("s3://bucket/model")
    for file in sorted(tiny.write_archive(tmp_path, [7, 5]).glob("*.tar")):
        storage.write_bytes(f"s3://bucket/archive/{file.name}", file.read_bytes())

    job = cluster.run(shlex.split(JOB))
    print(job.stdout)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout + job.stderr
    assert "scored 12 of 12 rows" in job.stdout + job.stderr, "it is to be followed from here"

    verdict = verify("s3://bucket/scores")
    assert verdict.ok and verdict.rows == verdict.scored == 12
    records = [ledger.read_record(f"s3://bucket/scores/scores/{i:05d}.tar.parquet") for i in (0, 1)]
    assert [record.rows for record in records] == [7, 5]


def test_a_job_with_a_wrong_argument_fails_in_one_line(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        "python", "jobs/evaluate.py", str(tmp_path / "none"), str(tmp_path), "--out", "metrics"
    )
    assert job.returncode != 0
    # Once in the log, and again in the status that Ray prints.
    (line,) = {line for line in job.stdout.splitlines() if line.startswith("mmray: ")}
    assert str(tmp_path / "none") in line
    assert "Traceback" not in job.stdout


def test_what_emit_config_prints_is_what_serve_deploy_takes(
    cluster: Cluster, tmp_path: Path
) -> None:
    uri, (port,) = tiny.bundle(str(tmp_path / "bundle")), free_ports(1)
    sets = ["--set", "score.cpus=0.5", "--set", "decode.cpus=0.5"]
    emitted = cluster.run(["mmray", "serve", uri, "--port", str(port), *sets, "--emit-config"])
    assert emitted.returncode == 0, emitted.stderr
    (app,) = yaml.safe_load(emitted.stdout)["applications"]
    endpoint = {"AWS_ENDPOINT_URL": cluster.environment["AWS_ENDPOINT_URL"]}
    assert app["runtime_env"]["env_vars"].items() >= endpoint.items()
    (tmp_path / "serve.yaml").write_text(emitted.stdout)
    deployed = cluster.run(["serve", "deploy", "-a", cluster.dashboard, f"{tmp_path}/serve.yaml"])
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    try:
        deadline = time.monotonic() + 240
        with Client(f"http://127.0.0.1:{port}", attempts=1) as client:
            while not client.ready():
                assert time.monotonic() < deadline, cluster.run(["serve", "status"]).stdout
                time.sleep(1)
            assert client.model()["fingerprint"] == read_manifest(uri).fingerprint
            assert client.score(tiny.jpeg(1), "a sea").label in tiny.LABELS
        counted = [
            r'^ray_mmray_requests\w*\{.*path="/v1/score".*status="200"\} 1',
            r"^ray_mmray_request_seconds_bucket",
            r"^ray_mmray_decode_seconds_bucket",
            r"^ray_mmray_batch_rows_bucket",
        ]
        while missing := [p for p in counted if not re.search(p, prometheus(cluster), re.M)]:
            assert time.monotonic() < deadline, f"Prometheus is not told of {missing}"
            time.sleep(1)
    finally:
        cluster.run(["serve", "shutdown", "-y", "-a", cluster.dashboard])


def prometheus(cluster: Cluster) -> str:
    """What the node's metrics say, as Prometheus asks for them."""
    with urllib.request.urlopen(cluster.metrics, timeout=10) as answer:
        return str(answer.read().decode())


JOIN = """
import json, ray, mmray
from mmray.engine import cluster
found = cluster.connect()

@ray.remote(num_cpus=0)
def seen():
    import os, mmray
    names = "AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY", "GLIBC_TUNABLES"
    return *(os.environ[name] for name in names), mmray.__file__

most = [found.max_cpus, found.max_gpus]
print(json.dumps([found.cpus, *most, *ray.get(seen.remote())]))
"""


def test_a_command_beside_the_cluster_joins_it_with_its_code_and_endpoint_but_no_keys(
    cluster: Cluster, tmp_path: Path
) -> None:
    """On the head node of `ray up`: nothing is set, Ray's own files say all."""
    shutil.copy(ROOT / "cluster.yaml", tmp_path / "ray_bootstrap_config.yaml")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(cluster.environment["RAY_AUTH_TOKEN"])
    environment = {
        **{k: v for k, v in cluster.environment.items() if not k.startswith("RAY_AUTH_")},
        "RAY_TMPDIR": cluster.environment["HOME"],  # on a real head node, the default
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "AWS_ENDPOINT_URL": "http://storage.example",
        "AWS_SECRET_ACCESS_KEY": "of this process",
    }
    joined = subprocess.run(
        [sys.executable, "-c", JOIN], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert joined.returncode == 0, joined.stderr
    told = json.loads(joined.stdout.splitlines()[-1])
    cpus, max_cpus, max_gpus, endpoint, key, heap, code = told
    assert (cpus, endpoint, key) == (2, "http://storage.example", "test"), "the node's own key"
    assert "hugetlb" in heap, "it computes slower in small pages"
    assert (max_cpus, max_gpus) == (24 * 16, 8), "cluster.yaml may grow to this"
    assert Path(code).parent != ROOT / "mmray", "the nodes' own mmray, perhaps an older one"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs/configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_configs_load_and_name_no_path_outside_the_project(path: Path) -> None:
    load(path, ["data.archive=s3://bucket/archive", "out=s3://bucket/bundle"])
    values = list(leaves(yaml.safe_load(path.read_text(encoding="utf-8"))))
    assert not [text for text in values if text.startswith(("/", "~", "..", "file:"))]


def leaves(tree: object) -> Iterator[str]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from leaves(value)
    elif isinstance(tree, str):
        yield tree
