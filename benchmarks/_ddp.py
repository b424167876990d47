"""The plain way to train that train_throughput.py compares with, as PyTorch's tutorials write it:

    torchrun --standalone --nproc-per-node 2 benchmarks/_ddp.py CONFIG [--keep] [--loaders N]

DistributedDataParallel, DistributedSampler, DataLoader; JPEGs are decoded and resized by
torchvision in every epoch, or with --keep once, and kept as uint8. Model, precision, batch and
number of epochs are those of the mmray config. Rank 0 prints one line of JSON: rows a second and
the share of time spent waiting for rows, of every epoch.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import resize

from mmray.config import TrainConfig, load
from mmray.engine.plan import spec_of
from mmray.learn import autocast
from mmray.model import build_model
from mmray.preprocess import TextTokenizer, train_tokenizer

Row = tuple[Tensor, list[int], int]


class Pairs(Dataset[Row]):
    """The training pairs of an archive of tars, encoded bytes in memory."""

    def __init__(self, cfg: TrainConfig, *, keep: bool) -> None:
        self.size = cfg.preprocess.image.size
        found: dict[str, dict[str, bytes]] = {}
        for path in sorted(Path(cfg.data.archive).glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, extension = member.name.rpartition(".")
                    stream = tar.extractfile(member)
                    assert stream is not None
                    found.setdefault(key, {})[extension] = stream.read()
        records = [(pair, json.loads(pair["json"])) for pair in found.values()]
        chosen = [(pair, record) for pair, record in records if record["split"] == "train"]
        captions = [pair["txt"].decode() for pair, _ in chosen]
        self.tokenizer: TextTokenizer = train_tokenizer(captions, cfg.preprocess.text)
        names = sorted({record["label"] for _, record in chosen})
        self.classes = len(names)
        self.labels = [names.index(record["label"]) for _, record in chosen]
        self.tokens = [self.tokenizer.encode(caption).tolist() for caption in captions]
        self.jpegs = [pair["jpg"] for pair, _ in chosen]
        self.kept = [self._decode(data) for data in self.jpegs] if keep else None

    def _decode(self, data: bytes) -> Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB)
        return resize(pixels, [self.size, self.size], antialias=True)

    def __len__(self) -> int:
        return len(self.jpegs)

    def __getitem__(self, i: int) -> Row:
        pixels = self._decode(self.jpegs[i]) if self.kept is None else self.kept[i]
        return pixels, self.tokens[i], self.labels[i]


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uint8 [B, 3, H, W], tokens and mask [B, L], labels [B]."""
    ids = [torch.tensor(tokens) for _, tokens, _ in rows]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return torch.stack([row[0] for row in rows]), tokens, mask, torch.tensor([r[2] for r in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--keep", action="store_true", help="decode once")
    parser.add_argument("--loaders", type=int, default=0, help="DataLoader workers of each rank")
    args = parser.parse_args()
    cfg = load(args.config)
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    pairs = Pairs(cfg, keep=args.keep)
    sampler: DistributedSampler[Row] = DistributedSampler(pairs, seed=cfg.seed)
    loader = DataLoader(
        pairs,
        batch_size=cfg.train.batch_size // world,
        sampler=sampler,
        collate_fn=collate,
        num_workers=args.loaders,
        persistent_workers=args.loaders > 0,
        pin_memory=on_gpu,
    )
    plain = build_model(spec_of(cfg, pairs.classes, pairs.tokenizer)).to(device)
    model = DistributedDataParallel(plain)
    kind: Any = torch.optim.Adam if cfg.train.optimizer == "adam" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=cfg.train.lr, weight_decay=cfg.train.weight_decay)
    rates, waits = [], []
    for epoch in range(cfg.train.epochs):
        sampler.set_epoch(epoch)
        model.train()
        began, waited, seen = time.perf_counter(), 0.0, 0
        batches = iter(loader)
        for _ in range(len(loader)):
            asked = time.perf_counter()
            pixels, tokens, mask, labels = (x.to(device) for x in next(batches))
            waited += time.perf_counter() - asked
            optimizer.zero_grad()
            with autocast(cfg.train.precision, device):
                logits, _ = model(pixels, tokens, mask)
                loss = F.cross_entropy(logits, labels)
            loss.backward()
            if cfg.train.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.grad_clip)
            optimizer.step()
            loss.item()
            seen += len(labels) * world
        seconds = time.perf_counter() - began
        rates.append(round(seen / seconds, 1))
        waits.append(round(waited / seconds, 4))
    if rank == 0:
        print(json.dumps({"rows_per_s": rates, "data_wait": waits}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
