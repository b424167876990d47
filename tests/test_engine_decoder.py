"""Without these a pair decoded beside the scoring actors would score otherwise than in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import tiny

from mmray import bundle as bundles
from mmray.archive import rows
from mmray.archive.rows import Sample
from mmray.engine import ingest
from mmray.engine.decoder import PREPARED, Decoder, prepared_rows


def test_a_chunk_comes_out_as_the_preprocessor_prepares_it(tmp_path: object) -> None:
    """Pictures, tokens, what is missing and what is broken."""
    uri = tiny.bundle(str(tmp_path), missing=True)
    pair = Sample("a.tar", 0, "0", tiny.jpeg(1), tiny.caption(1))
    samples = [
        pair,
        replace(pair, row=1, image=None),
        replace(pair, row=2, caption=" "),
        replace(pair, row=3, image=b"junk"),
        replace(pair, row=4, image=None, caption=None),
    ]
    struct = pa.struct(list(rows.CHUNK_SCHEMA))
    chunk = {"shard": "a.tar", "index": 0, "start": 0, "stop": 5, "bytes": 9, "read_s": 0.0}
    columns = {f.name: pa.array([chunk.get(f.name)], f.type) for f in ingest.CHUNKS_SCHEMA}
    columns["samples"] = ingest.one_list(rows.to_table(samples).to_struct_array().combine_chunks())
    assert columns["samples"].type.value_type == struct
    decoded = Decoder(uri, limits=(60, 0))(pa.table(columns, schema=ingest.CHUNKS_SCHEMA))
    assert PREPARED in decoded.column_names
    ((found, _),) = prepared_rows(decoded)
    left, expected = bundles.load(uri).build_preprocessor().prepare_all(samples)
    assert found is not None
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            for a, b in ((got.pixels, want.pixels), (got.tokens, want.tokens)):
                assert (a is None) == (b is None)
                assert a is None or b is None or np.array_equal(a, b)
    ((_, described),) = ingest.chunks_of(decoded)
    assert described == [replace(sample, image=None) for sample in left]
