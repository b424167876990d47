"""Without these a bundle's golden pairs might all be easy ones, or too large to carry along."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest

from mmray import golden
from mmray.archive import rows
from mmray.archive.rows import Sample
from mmray.errors import BundleError

LABELS = ("no", "yes")


def samples(count: int) -> list[Sample]:
    return [Sample("a.tar", i, str(i), b"%d" % i, f"caption {i}") for i in range(count)]


def scores(of: list[Sample], yes: list[float | None]) -> pa.Table:
    """A score table; None: set aside for its picture."""
    records = [
        (s.shard, s.row, s.key, LABELS[p > 0.5], 1 - p, p, None, None)
        if p is not None
        else (s.shard, s.row, s.key, None, None, None, "image corrupt: x", "image")
        for s, p in zip(of, yes, strict=True)
    ]
    schema = rows.scores_schema(LABELS)
    columns = zip(*records, strict=True) if records else [[]] * len(schema)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def chosen(yes: list[float | None], limit: int = golden.ROWS) -> pa.Table:
    of = samples(len(yes))
    return golden.choose(of, scores(of, yes), LABELS, limit)


class TestChoice:
    def test_doubtful_pairs_of_both_labels_and_one_set_aside(self) -> None:
        yes = [0.99, 0.01, None, 0.55, 0.98, 0.45, 0.97, 0.03, None, 0.96]
        found = chosen(yes, limit=6)
        assert found.num_rows == 6
        assert {2, 3, 5} <= set(found[rows.ROW].to_pylist())
        assert found.schema.equals(golden.schema(LABELS))
        assert found[rows.ERROR].drop_null().to_pylist() == ["image corrupt: x"]

    def test_a_label_that_is_never_predicted_takes_no_place(self) -> None:
        assert chosen([0.6 + i / 1000 for i in range(100)]).num_rows == golden.ROWS

    @pytest.mark.parametrize("count", [1, 2, 7, 15, 16, 17, 100])
    def test_as_many_as_there_are_each_once(self, count: int) -> None:
        rows_found = chosen([i / count for i in range(count)])[rows.ROW].to_pylist()
        assert len(set(rows_found)) == len(rows_found) == min(count, golden.ROWS)

    def test_inputs_are_the_samples_as_they_were(self) -> None:
        of = samples(5)
        assert golden.inputs(chosen([0.1, None, 0.3, 0.4, 0.5])) == of

    def test_broken_pairs_and_further_fields_stay_out(self) -> None:
        of = [Sample("a", 0, "0", fields={"label": "x"}), Sample("a", 1, "1", error="cut")]
        assert golden.candidates(of) == [Sample("a", 0, "0")]

    def test_large_pictures_stay_out_unless_all_are_large(self) -> None:
        large = Sample("a", 0, "0", bytes(golden.IMAGE_BYTES + 1))
        small = Sample("a", 1, "1", b"small")
        assert golden.candidates([large, small]) == [small]
        assert golden.candidates([large]) == [large]

    def test_incomplete_pairs_that_are_scored_are_among_them(self) -> None:
        of = samples(40)
        for i in (31, 35):
            of[i] = replace(of[i], image=None)
        for i in (22, 33):
            of[i] = replace(of[i], caption=" ")
        found = golden.choose(of, scores(of, [i / 40 for i in range(40)]), LABELS)
        assert found.num_rows == golden.ROWS
        assert {22, 31} <= set(found[rows.ROW].to_pylist())
        assert golden.inputs(found) == [of[i] for i in found[rows.ROW].to_pylist()]

    def test_nothing_scored_says_why(self) -> None:
        with pytest.raises(BundleError, match="none of 2 samples can be scored: image corrupt"):
            chosen([None, None])
        with pytest.raises(BundleError, match="there are none"):
            chosen([])


class TestTolerance:
    @pytest.mark.parametrize(
        ("noise", "allowed"), [(0.0, golden.LEAST), (0.02, 0.06), (0.3, golden.MOST)]
    )
    def test_it_follows_what_bfloat16_does(self, noise: float, allowed: float) -> None:
        of = samples(2)
        table = golden.choose(of, scores(of, [0.4, 0.6]), LABELS)
        rough = scores(of, [0.4 + noise, 0.6])
        found = golden.with_tolerance(table, rough, LABELS)
        assert golden.tolerance(found) == pytest.approx(allowed, abs=1e-4)

    def test_the_pair_that_differs_is_named_with_both_scores(self) -> None:
        of = samples(2)
        table = golden.choose(of, scores(of, [0.4, 0.6]), LABELS)
        table = golden.with_tolerance(table, scores(of, [0.4, 0.6]), LABELS)
        assert golden.compare(table, scores(of, [0.4, 0.605]), LABELS) == pytest.approx(0.005)
        with pytest.raises(
            BundleError,
            match=r"a\.tar row 1 must give p_no 0\.400, p_yes 0\.600; it gives p_no 0\.300, "
            r"p_yes 0\.700; 1 of 2 golden pairs differ by more than 0\.01",
        ):
            golden.compare(table, scores(of, [0.4, 0.7]), LABELS)
