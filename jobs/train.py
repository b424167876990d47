"""Train a model as a job on a Ray cluster; the arguments are those of `mmray train`.

    ray job submit --working-dir . -- \
        python jobs/train.py jobs/configs/sentiment.yaml \
        --set data.archive=s3://bucket/archive --set out=s3://bucket/bundle

The exit code is that of `mmray train`. Submitted again, it goes on from the last checkpoint.
"""

import sys

from mmray.cli import run

if __name__ == "__main__":
    raise SystemExit(run(["train", *sys.argv[1:]]))
