"""An embedded S3 endpoint for the demo: a `moto` server in a process of its own, on loopback.

It lives exactly as long as the process that started it: the child serves until its standard input
ends, which the operating system sees to even when the parent is killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping

from mmray.errors import ConfigError, StorageError

STOP_S = 10.0  # seconds the server gets to end by itself


@contextlib.contextmanager
def s3_endpoint(bucket: str) -> Iterator[str]:
    """Serve S3 on a free loopback port with one empty ``bucket``; yields the endpoint's URL.

    Inside, this process and its children find the endpoint and throw-away credentials in their
    environment; afterwards the environment is as it was. Raises ConfigError when moto is missing.
    """
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        raise ConfigError(
            "the demo needs moto for its S3 endpoint; pip install 'mmray[demo]' brings it"
        )
    server = subprocess.Popen(
        [sys.executable, "-m", "mmray.demo.endpoint"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        port = server.stdout.readline().strip()
        if not port:
            raise StorageError(f"embedded S3 endpoint did not start (exit code {server.wait()})")
        url = f"http://127.0.0.1:{port}"
        with environment(_client_environment(url)):
            _make_bucket(bucket)
            yield url
    finally:
        server.stdin.close()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()


def _client_environment(url: str) -> dict[str, str | None]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ENDPOINT_URL_S3": None,
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_SESSION_TOKEN": None,
        "AWS_PROFILE": None,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@contextlib.contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables (None: unset) for this process and its children, then restore."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _make_bucket(bucket: str) -> None:
    from mmray import storage

    storage.client().create_bucket(Bucket=bucket)


def main() -> None:
    """The child: print the port, serve until standard input ends."""
    from moto.server import ThreadedMotoServer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    print(port, flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
