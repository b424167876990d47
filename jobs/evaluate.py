"""Evaluate a bundle as a job on a Ray cluster; the arguments are those of `mmray evaluate`.

    ray job submit --working-dir . -- \
        python jobs/evaluate.py s3://bucket/bundle s3://bucket/archive --out s3://bucket/metrics

The exit code is that of `mmray evaluate`.
"""

import sys

from mmray.cli import run

if __name__ == "__main__":
    raise SystemExit(run(["evaluate", *sys.argv[1:]]))
