"""Ports for the servers of tests."""

from __future__ import annotations

import contextlib
import secrets
import socket

#: Above those of Ray's workers, and below those that the kernel gives to connections: one of the
#: kernel's may be gone between its choice and its use.
FIRST, LAST = 20000, 29999


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody has now."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # somebody has it
                listener.bind(("127.0.0.1", secrets.choice(range(FIRST, LAST + 1))))
                found.append(listener.getsockname()[1])
        return found


def free_port() -> int:
    return free_ports(1)[0]
