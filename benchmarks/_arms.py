"""The ways that score_throughput.py compares, each run in a process of its own:

    python benchmarks/_arms.py ARM BUNDLE ARCHIVE OUT

They prepare and score the same pairs with the same model in the best precision of the machine, and
print one line of JSON: ``rows``, ``first_row_s`` (since the process began) and ``rows_per_second``
in steady state. All but the first three are written as the documentation
of the tool in question writes it.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mmray.config import Precision

BEGAN = time.time()
CORES = os.cpu_count() or 1
WORKERS = int(os.environ.get("BENCH_WORKERS", CORES))
BATCH = 32
STEADY = 0.25, 0.95  # the share of rows between which a rate counts: start and tail left out


class Model:
    """A bundle's model and tokenizer with plain torch around them."""

    def __init__(self, bundle: str, threads: int, precision: Precision = "auto") -> None:
        import torch

        from mmray.bundle import load
        from mmray.learn import autocast, resolve_precision

        torch.set_num_threads(threads)
        loaded = load(bundle)
        self.size = loaded.preprocess.image.size
        self.tokenizer = loaded.build_preprocessor().tokenizer
        self.net = loaded.build_model().eval().to(memory_format=torch.channels_last)
        self._autocast = lambda: autocast(resolve_precision(precision, "cpu"), "cpu")

    def score(self, pixels: np.ndarray, captions: list[str]) -> np.ndarray:
        """uint8 [B, 3, H, W] and B captions -> probabilities [B, classes]."""
        import torch

        ids = [self.tokenizer.encode(text) for text in captions]
        width = max(map(len, ids))
        tokens = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros(len(ids), width, dtype=torch.bool)
        for i, row in enumerate(ids):
            tokens[i, : len(row)] = torch.as_tensor(row)
            mask[i, : len(row)] = True
        with torch.inference_mode(), self._autocast():
            logits, _ = self.net(torch.from_numpy(pixels), tokens, mask)
            return logits.softmax(1).numpy()


def decode_turbo(data: bytes, size: int) -> np.ndarray:
    import simplejpeg
    from PIL import Image

    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size)
    small = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def decode_pillow(data: bytes, size: int) -> np.ndarray:
    from PIL import Image

    small = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size))
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def finished(times: Iterable[tuple[float, int]]) -> dict[str, float]:
    """From (when, rows) of every batch to the figures of an arm. The rate is the slope of a line
    through all that was done in the steady part: some arms tell of hundreds of rows at once."""
    when, rows = (np.array(values) for values in zip(*sorted(times), strict=True))
    done = rows.cumsum()
    begin, end = (int(np.searchsorted(done, share * done[-1])) for share in STEADY)
    return {
        "rows": int(done[-1]),
        "first_row_s": when[0] - BEGAN,
        "rows_per_second": float(np.polyfit(when[begin:end], done[begin:end], 1)[0]),
    }


def _counted(at: np.ndarray) -> list[tuple[float, int]]:
    """When every row was finished -> (when, rows) of every batch."""
    when, rows = np.unique(at, return_counts=True)
    return list(zip(when.tolist(), rows.tolist(), strict=True))


# --- the arms ------------------------------------------------------------------------------------


def limit(bundle: str, archive: str, out: str) -> dict[str, float]:
    """Bare processes, one a core: scaled JPEG decode and the model as plain torch runs it."""
    return _processes(_limit_worker, bundle, archive, out)


def lowered(bundle: str, archive: str, out: str) -> dict[str, float]:
    """Bare processes, one a core, with mmray's Predictor and nothing around it."""
    from mmray.memory import HEAP

    os.environ.update(HEAP)  # they hold their memory as mmray's do
    return _processes(_lowered_worker, bundle, archive, out)


Worker = Callable[[str, list[str], str], list[tuple[float, int]]]


def _processes(worker: Worker, bundle: str, archive: str, out: str) -> dict[str, float]:
    shards = sorted(Path(archive).glob("*.tar"))
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        jobs = [
            (bundle, [str(s) for s in shards[i::WORKERS]], f"{out}-{i}") for i in range(WORKERS)
        ]
        parts = pool.starmap(worker, jobs)
    return finished([time for part in parts for time in part])


def _limit_worker(bundle: str, shards: list[str], out: str) -> list[tuple[float, int]]:
    model = Model(bundle, threads=1)
    times, kept = [], []
    for pairs in _batches(_pairs(shards), BATCH):
        pixels = np.stack([decode_turbo(image, model.size) for image, _ in pairs])
        kept.append(model.score(pixels, [text for _, text in pairs]))
        times.append((time.time(), len(pairs)))
    np.save(out, np.concatenate(kept))
    return times


def _lowered_worker(bundle: str, shards: list[str], out: str) -> list[tuple[float, int]]:
    from mmray.archive.rows import Sample
    from mmray.bundle import load
    from mmray.predict import Predictor

    predictor = Predictor(load(bundle), threads=1)
    times, kept = [], []
    for pairs in _batches(_pairs(shards), predictor.batch_size):
        ready = [
            predictor.prepare(Sample("", i, "", image, text))
            for i, (image, text) in enumerate(pairs)
        ]
        kept.append(predictor.forward(ready).probabilities)
        times.append((time.time(), len(pairs)))
    np.save(out, np.concatenate(kept))
    return times


def _pairs(shards: Iterable[str]) -> Iterator[tuple[bytes, str]]:
    for shard in shards:
        with tarfile.open(shard) as tar:
            found: dict[str, bytes] = {}
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                found[member.name.rpartition(".")[2]] = stream.read()
                if len(found) == 2:
                    yield found["jpg"], found["txt"].decode()
                    found = {}


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    held: list[Any] = []
    for item in items:
        held.append(item)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def mmray(bundle: str, archive: str, out: str) -> dict[str, float]:
    """`mmray score`, timed by what its progress line is told."""
    from mmray import cli
    from mmray.report.progress import Meter

    times: list[tuple[float, int]] = []
    take = Meter.take

    def timed(meter: Meter, rows: int, set_aside: int, size: int) -> None:
        times.append((time.time(), rows))
        take(meter, rows, set_aside, size)

    Meter.take = timed  # type: ignore[method-assign]
    embeddings = ["--embeddings"] if out.endswith("+") else []
    actors = ["--actors", str(WORKERS)] if "BENCH_WORKERS" in os.environ else []
    code = cli.run(["score", bundle, archive, "--out", out, *actors, *embeddings])
    assert code == 0, f"mmray ended with {code}"
    return finished(times)


def mmray_embeddings(bundle: str, archive: str, out: str) -> dict[str, float]:
    """The same with `--embeddings`."""
    return mmray(bundle, archive, f"{out}+")


class _RayModel:
    def __init__(self, bundle: str) -> None:
        self.model = Model(bundle, threads=1)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        scores = self.model.score(batch["pixels"], [str(text) for text in batch["caption"]])
        return {"p": scores, "at": np.full(len(scores), time.time())}


def ray_docs(bundle: str, archive: str, out: str) -> dict[str, float]:
    """`read_webdataset` -> `map` -> `map_batches` -> `write_parquet`."""
    import pyarrow.parquet as pq
    import ray
    from PIL import Image

    from mmray.bundle import load

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    size = load(bundle).preprocess.image.size

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        small = Image.fromarray(row["jpg"]).convert("RGB").resize((size, size))
        pixels = np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))
        return {"pixels": pixels, "caption": row["txt"]}

    paths = sorted(str(path) for path in Path(archive).glob("*.tar"))
    (
        ray.data.read_webdataset(paths)
        .map(prepare)
        .map_batches(
            _RayModel,
            fn_constructor_args=(bundle,),
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=max(1, WORKERS // 2)),
        )
        .write_parquet(out)
    )
    at = pq.read_table(out, columns=["at"])["at"].to_numpy()
    return finished(_counted(at))


def dataloader(bundle: str, archive: str, out: str) -> dict[str, float]:
    """webdataset and torch's DataLoader, one decoding process a core."""
    import torch
    import webdataset

    model = Model(bundle, threads=WORKERS)
    size = model.size
    paths = sorted(str(path) for path in Path(archive).glob("*.tar"))

    def prepare(row: tuple[bytes, bytes]) -> tuple[np.ndarray, str]:
        return decode_pillow(row[0], size), row[1].decode()

    pairs = webdataset.WebDataset(paths, shardshuffle=False).to_tuple("jpg", "txt").map(prepare)
    loader = torch.utils.data.DataLoader(
        pairs, batch_size=BATCH, num_workers=WORKERS, collate_fn=_stack
    )
    times, kept = [], []
    for pixels, captions in loader:
        kept.append(model.score(pixels, captions))
        times.append((time.time(), len(captions)))
    np.save(out, np.concatenate(kept))
    return finished(times)


def _stack(rows: list[tuple[np.ndarray, str]]) -> tuple[np.ndarray, list[str]]:
    return np.stack([pixels for pixels, _ in rows]), [caption for _, caption in rows]


def daft(bundle: str, archive: str, out: str) -> dict[str, float]:
    """Daft on the same pairs in Parquet, decode and model in one class, one process a core."""
    import daft as library
    from daft import DataType

    returned = DataType.struct({"p": DataType.list(DataType.float32()), "at": DataType.float64()})

    @library.cls(max_concurrency=WORKERS, use_process=True)
    class Score:
        def __init__(self) -> None:
            self.model = Model(bundle, threads=1)

        @library.method.batch(return_dtype=returned, batch_size=BATCH)
        def __call__(self, image: Any, caption: Any) -> list[dict[str, Any]]:
            pixels = np.stack([decode_turbo(b, self.model.size) for b in image.to_pylist()])
            scores = self.model.score(pixels, caption.to_pylist())
            now = time.time()
            return [{"p": row.tolist(), "at": now} for row in scores]

    frame = library.read_parquet(str(Path(archive) / "*.parquet"))
    scored = frame.select(Score()(library.col("image"), library.col("caption")).alias("s"))
    scored.write_parquet(out)
    kept = library.read_parquet(f"{out}/*.parquet").to_pydict()["s"]
    return finished(_counted(np.array([row["at"] for row in kept])))


ALL = limit, lowered, mmray, mmray_embeddings, ray_docs, dataloader, daft
ARMS = {arm.__name__: arm for arm in ALL}


def main() -> None:
    name, bundle, archive = sys.argv[1:4]
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(ARMS[name](bundle, archive, f"{scratch}/out")))


if __name__ == "__main__":
    main()
