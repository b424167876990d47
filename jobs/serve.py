"""Serve a bundle as a job on a Ray cluster; the arguments are those of `mmray serve`.

    ray job submit --no-wait --working-dir . -- \
        python jobs/serve.py s3://bucket/bundle --host 0.0.0.0 --token-file /run/secrets/token

It serves until the job is stopped. What serves without a job: `mmray serve --emit-config`, and
`serve deploy` of what that prints.
"""

import sys

from mmray.cli import run

if __name__ == "__main__":
    raise SystemExit(run(["serve", *sys.argv[1:]]))
