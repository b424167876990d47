"""A small Ceph with its S3 gateway, in memory, for as long as the process that started it.

`python tests/ceph.py CERTIFICATE` starts one monitor, one OSD that keeps its objects in memory and
one RADOS gateway that speaks HTTPS; writes the gateway's self-signed certificate; prints its port;
and serves until standard input ends, which the operating system sees to even when the tests are
killed. All on loopback and in a temporary directory; needs neither root nor systemd.
"""

from __future__ import annotations

import base64
import http.client
import secrets
import shutil
import signal
import ssl
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import NoReturn

from ports import free_ports

#: Of Debian's packages ceph-mon, ceph-osd and radosgw, and of what they bring.
PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "openssl", "radosgw", "radosgw-admin", "setpriv")
STEP_S = 60.0  # what any step of the start may take
TAIL = 8  # lines of each log in an error
KEY = "test"  # access key and secret key of the one user

CONFIG = """
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
keyring = {folder}/keyring
run_dir = {folder}
crash_dir = {folder}
admin_socket =
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/rgw
osd_objectstore = memstore
memstore_device_bytes = 8G
osd_crush_initial_weight = 1
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_data_avail_crit = 0
paxos_propose_interval = 0.05
rgw_frontends = beast ssl_endpoint=127.0.0.1:{port} ssl_certificate={folder}/server.pem

[osd]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
"""

KEYRING = """
[mon.]
key = {key}
caps mon = "allow *"
[osd.0]
key = {key}
caps mon = "allow *"
caps osd = "allow *"
[client.admin]
key = {key}
caps mon = "allow *"
caps osd = "allow *"
"""


def missing() -> list[str]:
    """The programs that are not on the PATH."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Ceph:
    """The daemons, their files in ``folder``; leaving the ``with`` block ends them for certain."""

    def __init__(self, folder: Path) -> None:
        mon_port, self.port = free_ports(2)
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        text = CONFIG.format(fsid=uuid.uuid4(), folder=folder, mon_port=mon_port, port=self.port)
        (folder / "ceph.conf").write_text(text)
        # A CephX key: AES, its time, its length, itself.
        key = base64.b64encode(struct.pack("<HIIH", 1, 0, 0, 16) + secrets.token_bytes(16))
        (folder / "keyring").write_text(KEYRING.format(key=key.decode()))
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()

    def __enter__(self) -> Ceph:
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons.values():
            daemon.kill()  # nothing is to be kept
            daemon.wait()

    def start(self, certificate: Path) -> None:
        """Make the cluster and its user; returns when the gateway answers."""
        self._make_certificate(certificate)
        self._run("ceph-mon", "--mkfs", "--id", "a")
        self._start("ceph-mon", "--id", "a")
        osd = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd)
        self._run("ceph-osd", "--mkfs", "--id", "0", "--osd-uuid", osd)
        self._start("ceph-osd", "--id", "0")
        user = ("--uid", "test", "--display-name", "test", "--access-key", KEY, "--secret", KEY)
        self._run("radosgw-admin", "user", "create", *user)
        self._start("radosgw", "--id", "admin")
        self._await_gateway(certificate)

    def _make_certificate(self, certificate: Path) -> None:
        pem = self._folder / "server.pem"
        self._run(
            *("openssl", "req", "-x509", "-nodes", "-newkey", "ec"),
            *("-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(pem), "-out", str(pem)),
        )
        certificate.write_text(pem.read_text().partition("-----END PRIVATE KEY-----\n")[2])

    def _await_gateway(self, certificate: Path) -> None:
        trusted = ssl.create_default_context(cafile=str(certificate))
        deadline = time.monotonic() + STEP_S
        while time.monotonic() < deadline:
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    self._fail(f"{name} ended with exit code {daemon.returncode}")
            ask = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=5, context=trusted)
            try:
                ask.request("GET", "/")
                return
            except OSError:
                time.sleep(0.1)
            finally:
                ask.close()
        self._fail(f"the gateway does not answer after {STEP_S:.0f} s")

    def _line(self, *command: str) -> list[str]:
        """The command as it dies with this process."""
        conf = () if command[0] == "openssl" else ("--conf", str(self._folder / "ceph.conf"))
        return ["setpriv", "--pdeathsig", "KILL", *command, *conf]

    def _run(self, *command: str) -> None:
        with open(self._folder / "steps.log", "ab") as log:
            line = self._line(*command)
            try:
                subprocess.run(line, stdout=log, stderr=log, check=True, timeout=STEP_S)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                self._fail(str(error))

    def _start(self, *command: str) -> None:
        with open(self._folder / f"{command[0]}.log", "wb") as log:
            self._daemons[command[0]] = subprocess.Popen(
                [*self._line(*command), "-d"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _fail(self, what: str) -> NoReturn:
        said = [f"Ceph did not start: {what}"]
        for log in sorted(self._folder.glob("*.log")):
            lines = [line for line in log.read_text(errors="replace").splitlines() if line]
            said += [f"--- the last lines of {log.name}", *lines[-TAIL:]]
        sys.exit("\n".join(said))


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="ceph-") as folder, Ceph(Path(folder)) as ceph:
        ceph.start(Path(sys.argv[1]))
        print(ceph.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
