"""`mmray score` whose workers note every chunk they have scored, for chaos.py:

    python benchmarks/_chaos.py NOTES BUNDLE ARCHIVE OUT

Each appends ``shard start stop`` to a file of its own in the folder NOTES when the chunk's part is
written, so that what is scored twice can be counted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ray import cloudpickle

from mmray import cli
from mmray.archive.rows import Sample
from mmray.engine import dataflow
from mmray.engine.scorer import Scorer
from mmray.preprocess import Prepared

NOTES = Path(sys.argv[1])


class NotingScorer(Scorer):
    def _score(self, samples: list[Sample], prepared: list[Prepared | None]) -> dict[str, Any]:
        found = super()._score(samples, prepared)
        with open(NOTES / str(os.getpid()), "a", encoding="utf-8") as notes:
            notes.write(f"{samples[0].shard} {samples[0].row} {samples[-1].row + 1}\n")
        return found


if __name__ == "__main__":
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    dataflow.Scorer = NotingScorer  # type: ignore[misc]
    sys.exit(cli.run(["score", sys.argv[2], sys.argv[3], "--out", sys.argv[4]]))
