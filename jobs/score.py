"""Score an archive as a job on a Ray cluster; the arguments are those of `mmray score`.

    ray job submit --working-dir . -- \
        python jobs/score.py s3://bucket/bundle s3://bucket/archive --out s3://bucket/scores

The exit code is that of `mmray score`. Submitted again, after whatever end, it goes on.
"""

import sys

from mmray.cli import run

if __name__ == "__main__":
    raise SystemExit(run(["score", *sys.argv[1:]]))
