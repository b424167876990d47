"""What tests share: the real data beside the checkout, S3 endpoints, one local Ray."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ceph
import pytest

# Tests that run side by side never find each other's clusters, and compute on one core each: two
# processes with two threads each wait for one another most of the time.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["RAY_TMPDIR"] = f"{tempfile.gettempdir()}/ray-{os.getpid()}-{worker}"
    Path(os.environ["RAY_TMPDIR"]).mkdir(exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"

SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # ends when the tests do, however they end
"""


LONG = ("test_notebook.py", "test_readme.py")  # of minutes; begun last, they are waited for alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@dataclass(frozen=True)
class Endpoint:
    """An S3 endpoint that speaks HTTP on ``url``; every ``bucket()`` is a new, empty one."""

    url: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def bucket(self) -> str:
        """The ``s3://`` URI of a fresh bucket."""
        from mmray import storage

        name = f"bucket-{next(self._numbers)}"
        storage.client().create_bucket(Bucket=name)
        return f"s3://{name}"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of real data sets and weights; skips where it is not there."""
    if not SHARED.is_dir():
        pytest.skip("the shared data sets are not beside this checkout")
    return SHARED


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[int]:
    """The port of a server: a Python process that prints it, and ends when its input does."""
    server = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is the tests' to handle
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        port = server.stdout.readline().strip()
        assert port, "the S3 server did not start; it says why in stderr"
        yield int(port)
    finally:
        server.stdin.close()
        server.wait(timeout=10)
        server.stdout.close()


@contextlib.contextmanager
def pointed_at(url: str, **more: str) -> Iterator[None]:
    """The environment in which every S3 client speaks to ``url``, and to nobody else."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": ceph.KEY,
            "AWS_SECRET_ACCESS_KEY": ceph.KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            **more,
        }.items():
            patch.setenv(name, value)
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, ",".join(filter(None, [os.environ.get(name), "127.0.0.1"])))
        yield


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[Endpoint]:
    """A moto server in its own process; the environment points every S3 client at it."""
    with served("-c", SERVER) as port, pointed_at(url := f"http://127.0.0.1:{port}"):
        yield Endpoint(url)


@pytest.fixture(scope="session")
def ceph_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Endpoint, Path]]:
    """Ceph's S3 server over HTTPS, and its certificate; skips where Ceph is not installed."""
    if missing := ceph.missing():
        pytest.skip(f"{', '.join(missing)} not on the PATH; `make test-s3` installs Ceph")
    certificate = tmp_path_factory.mktemp("ceph") / "certificate.pem"
    with served(ceph.__file__, str(certificate)) as port:
        yield Endpoint(f"https://127.0.0.1:{port}"), certificate


@pytest.fixture
def real_s3(ceph_gateway: tuple[Endpoint, Path]) -> Iterator[Endpoint]:
    """Ceph's S3 server; during a test the environment points every S3 client at it."""
    endpoint, certificate = ceph_gateway
    with pointed_at(endpoint.url, AWS_CA_BUNDLE=str(certificate)):
        yield endpoint


@pytest.fixture(scope="session")
def ray_cluster(s3_endpoint: Endpoint) -> Iterator[None]:
    """One local Ray for all tests; its workers know the S3 endpoint."""
    from mmray.engine import cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")  # never somebody's running cluster
        cluster.prepare_to_serve()
        cluster.connect(num_cpus=2)
        yield
        cluster.disconnect()
