"""Photos for training: prepared ones from the cache, augmented the same way for the same seed.

A batch is the batch of all processes together. Each trains on its share of every batch, and looks at whole batches of
val: the same photos make the same batches, however many processes there are, and none is seen twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2

from stocktake.data.array_cache import ArrayCache
from stocktake.data.manifest import Manifest

Augment = Literal["none", "flip", "full"]


def augmentation(policy: Augment, size: int) -> v2.Transform | None:
    """The whole augmentation policy: photos (3, size, size) uint8 to the same."""
    if policy == "none":
        return None
    flip = v2.RandomHorizontalFlip()
    if policy == "flip":
        return flip
    return v2.Compose(
        [
            flip,
            # a count changes when items are cropped away: mild crops only
            v2.RandomResizedCrop(size, scale=(0.75, 1.0), ratio=(0.9, 1.1), antialias=True),
            v2.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.2),
        ]
    )


class PhotoDataset(Dataset[tuple[Tensor, int]]):
    """(photo (size, size, 3) uint8, class index) of (epoch, row).

    The epoch is part of the index: augmentation is drawn from (seed, epoch, row), so that it does not depend on the
    number of workers or processes, nor on where a run was resumed.
    """

    def __init__(
        self, photos: ArrayCache, bins: pd.DataFrame, labels: tuple[int, ...], augment: Augment, seed: int
    ) -> None:
        self._photos = photos
        self._hashes = bins["hash"].tolist()
        self._targets = np.searchsorted(labels, bins["quantity"].to_numpy())
        self._transform = augmentation(augment, photos.shape[0])
        self._seed = seed

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, row = index
        photo = torch.from_numpy(self._photos[self._hashes[row]])
        if self._transform is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.SeedSequence((self._seed, epoch, row)).generate_state(1)[0]))
                photo = self._transform(photo.permute(2, 0, 1)).permute(1, 2, 0).contiguous()
        return photo, int(self._targets[row])


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, row) over all rows; shuffled by (seed, epoch). Lightning tells it the epoch."""

    def __init__(self, rows: int, seed: int, shuffle: bool, epoch: int = 0) -> None:
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self._rows)
        if self._shuffle:
            order = np.random.default_rng((self._seed, self.epoch)).permutation(self._rows)
        return ((self.epoch, int(row)) for row in order)


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """The batches of one of `size` processes, cut from the order of all rows.

    With `shared`, each batch is shared out: this process has every `size`-th row of every batch. Otherwise whole
    batches are dealt out in turn, and a process whose turn is missing at the end gets an empty one: all have the same
    number of batches, since they take each step together.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        batch_size: int,
        *,
        drop_last: bool,
        shared: bool,
        begun: tuple[int, int] = (0, 0),
        rank: int = 0,
        size: int = 1,
    ) -> None:
        """Cut the order of `sampler` into batches of `batch_size` rows, over all processes; rank: whose share.

        begun: an epoch, and how many of its batches are not given: a training that goes on has learnt from them.
        """
        self.sampler = sampler
        """Lightning tells it the epoch."""
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._shared = shared
        self._begun = begun
        self._rank = rank
        self._size = size

    def __len__(self) -> int:
        """Batches of an epoch, those of a begun one that are done included."""
        whole, rest = divmod(len(self.sampler), self._batch_size)
        batches = whole + (rest > 0 and not self._drop_last)
        return batches if self._shared else -(-batches // self._size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rows = list(self.sampler)
        batches = [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]
        if self._drop_last and batches and len(batches[-1]) < self._batch_size:
            batches.pop()
        epoch, done = self._begun
        for step in range(done if self.sampler.epoch == epoch else 0, len(self)):
            if self._shared:
                yield batches[step][self._rank :: self._size]
            else:
                turn = step * self._size + self._rank
                yield batches[turn] if turn < len(batches) else []


def collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """(photos (n, size, size, 3) uint8, class indices (n,)); of no rows, n is 0 and so is the size."""
    if not rows:
        return torch.zeros((0, 0, 0, 3), dtype=torch.uint8), torch.zeros(0, dtype=torch.long)
    photos, targets = default_collate(rows)
    return photos, targets


class BinsDataModule(LightningDataModule):
    """The train and val splits of a manifest, for one of `size` processes."""

    def __init__(
        self,
        manifest: Manifest,
        photos: ArrayCache,
        *,
        batch_size: int,
        augment: Augment,
        workers: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        super().__init__()
        self._train = PhotoDataset(photos, manifest.split("train"), manifest.labels, augment, seed)
        self._val = PhotoDataset(photos, manifest.split("val"), manifest.labels, "none", seed)
        self._batch_size = batch_size
        self._workers = workers
        self._seed = seed
        self._rank = rank
        self._size = size
        self._begun = (0, 0)
        """The epoch, from 0, and how many of its batches are done."""

    def state_dict(self) -> dict[str, int]:
        """Which batch is next: `epoch`, from 0, and how many `batches` of it are done."""
        loop = cast("Trainer", self.trainer).fit_loop
        epochs: Any = loop.epoch_progress.current
        is_amid = epochs.started > epochs.processed
        return {"epoch": epochs.processed, "batches": loop.batch_idx + 1 if is_amid else 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on with that batch."""
        self._begun = state_dict["epoch"], state_dict["batches"]

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled; the last short batch of a larger split is dropped, as batch normalisation dislikes it."""
        # workers fetch from a resumed epoch before Lightning tells the sampler which one it is
        rows = EpochSampler(len(self._train), self._seed, shuffle=True, epoch=self._begun[0])
        drop_last = len(self._train) > self._batch_size
        batches = BatchSampler(
            rows,
            self._batch_size,
            drop_last=drop_last,
            shared=True,
            begun=self._begun,
            rank=self._rank,
            size=self._size,
        )
        return self._loader(self._train, batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order, complete."""
        rows = EpochSampler(len(self._val), self._seed, shuffle=False)
        return self._loader(
            self._val,
            BatchSampler(rows, self._batch_size, drop_last=False, shared=False, rank=self._rank, size=self._size),
        )

    def _loader(self, dataset: PhotoDataset, batches: BatchSampler) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
