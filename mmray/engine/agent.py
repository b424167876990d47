"""A program: stands in for the dashboard agent of a raylet, in whose environment it is started.

    python agent.py SESSION_DIRECTORY

A raylet does not run without one, and waits for the ports at which it can be asked; this one says,
as Ray's own does where Ray is installed without its dashboard, that it is asked nothing. It ends
with the raylet.
"""

import os
import sys
import time

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
NONE = "-1"
LOOK_S = 1.0


def main(session: str) -> None:
    node, raylet = os.environ["RAY_NODE_ID"], os.getppid()
    for name in PORTS:
        path = os.path.join(session, f"{name}_{node}")
        with open(f"{path}.tmp", "w", encoding="ascii") as file:
            file.write(NONE)
        os.replace(f"{path}.tmp", path)  # whoever waits for it never sees half of it
    while os.getppid() == raylet:
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main(sys.argv[1])
