"""Photos for training: prepared ones from the cache, augmented the same way for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from stocktake.bins.array_cache import ArrayCache
from stocktake.bins.manifest import Manifest

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

    def __init__(self, rows: int, seed: int, shuffle: bool) -> None:
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self.epoch = 0

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


class BinsDataModule(LightningDataModule):
    """The train and val splits of a manifest."""

    def __init__(
        self, manifest: Manifest, photos: ArrayCache, *, batch_size: int, augment: Augment, workers: int, seed: int
    ) -> None:
        super().__init__()
        self._train = PhotoDataset(photos, manifest.split("train"), manifest.labels, augment, seed)
        self._val = PhotoDataset(photos, manifest.split("val"), manifest.labels, "none", seed)
        self._batch_size = batch_size
        self._workers = workers
        self._seed = seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled; the last short batch of a larger split is dropped, as batch normalisation dislikes it."""
        return self._loader(self._train, shuffle=True, drop_last=len(self._train) > self._batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order, complete."""
        return self._loader(self._val, shuffle=False, drop_last=False)

    def _loader(self, dataset: PhotoDataset, *, shuffle: bool, drop_last: bool) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self._batch_size,
            sampler=EpochSampler(len(dataset), self._seed, shuffle),
            drop_last=drop_last,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
