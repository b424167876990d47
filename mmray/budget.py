"""How much of a run may be set aside: ``--max-errors``, counted over all commands of the run."""

from __future__ import annotations

from dataclasses import dataclass

from mmray.errors import RunError

LEAST_ROWS = 100  # fewer say nothing of the rest yet


@dataclass(slots=True)
class Budget:
    """What is known so far of the rows and of the ``shards`` of OUT.

    At most the ``share`` of either may be lost (None: any): rows that are set aside, and shards of
    which no row can be read, nobody knowing how many those would be.
    """

    out: str
    share: float | None
    shards: int
    rows: int = 0
    set_aside: int = 0
    unreadable: int = 0

    def take(self, rows: int = 0, set_aside: int = 0, unreadable: int = 0) -> None:
        """Count these too, and raise RunError when it is clear that they are too many."""
        self.rows += rows
        self.set_aside += set_aside
        self.unreadable += unreadable
        self.check(LEAST_ROWS)

    def check(self, least_rows: int = 0) -> None:
        """Raise RunError when too much is lost of at least so many rows, or of the shards."""
        if self.share is None:
            return
        if self.rows >= least_rows and self.set_aside > self.share * self.rows:
            self._refuse(f"{self.set_aside:,} of {self.rows:,} rows set aside")
        if self.unreadable > self.share * self.shards:
            self._refuse(f"{self.unreadable:,} of {self.shards:,} shards cannot be read")

    def _refuse(self, what: str) -> None:
        raise RunError(
            f"{self.out}: {what}, more than --max-errors {self.share:.3%} allows; what is finished "
            "is kept, the same command with a larger budget goes on"
        )
