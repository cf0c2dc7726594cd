"""The reference training loop, on Hugging Face Accelerate: precision and devices are its business.

The library itself needs only ``DSAPruner.step`` in a loop of the user's own.
"""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset, random_split

from dsa_hw.data import DataSplits, ImageTensors, batches
from dsa_hw.errors import UserError
from dsa_hw.runs.config import PruneConfig
from dsa_hw.runs.folder import RunFolder
from dsa_hw.runs.processes import trains_on_cpu
from dsa_hw.training.batch_norms import retake_statistics
from dsa_hw.training.batches import len_of
from dsa_hw.training.distillation import Distillation
from dsa_hw.training.precision import training_precision
from dsa_hw.training.schedule import Stage, make_optimizer

Batches = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[str, int, int], None]

WARMUP_FRACTION = 0.05
EVALUATED_AT_ONCE = 128
"""Images of an evaluation's batch. At 500 the activations of a small network leave the caches: one
forward pass of ``glyphs_resnet8`` took 1.9 ms an image, and at 64 it takes 0.5 (2-core EPYC, AVX2,
float32)."""
STATISTICS_IMAGES = 2048
"""Training images on which the batch-norms of a network that was cut are measured, at most. The
mean of a channel is then known to a fortieth of its spread or better, for a sixth of the forward
passes of the smallest epoch that is shipped."""


class Trainer:
    """Trains and evaluates classifiers as the configuration says.

    Several processes (``accelerate launch``) share each batch: the configured batch size is that
    of all of them, and a run means the same whatever their number.

    Args:
        config: optimizer, precision, batch size, seed.
        data: training and test splits.
        folder: checkpoints and log go there.
        on_progress: called with (what, steps done, steps planned).
        test_every_epoch: look at the test images after every epoch too, for the log; on a CPU a
            look at 4,000 images at float32 costs a quarter of an epoch of 12,000 at bfloat16.
    """

    def __init__(
        self,
        config: PruneConfig,
        data: DataSplits,
        folder: RunFolder,
        on_progress: Progress | None = None,
        *,
        test_every_epoch: bool = True,
    ) -> None:
        self.precision = training_precision(config)
        """That the weights' gradients are computed in: ``no`` (float32), ``bf16`` or ``fp16``."""
        _let_precision_change(self.precision)
        self._accelerator = Accelerator(
            mixed_precision=self.precision,
            cpu=trains_on_cpu(config),
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )
        self._processes = self._accelerator.num_processes
        self.device = self._accelerator.device
        self._config, self._folder = config, folder
        self._on_progress = on_progress or (lambda what, done, planned: None)
        self.before_batch: Callable[[], None] = lambda: None
        """Called before each batch, of training or of evaluation; may make it wait."""
        self._test_every_epoch = test_every_epoch
        self._test = data.test
        self._train = data.train
        generator = torch.Generator().manual_seed(config.seed)
        held_out = max(1, round(len_of(data.train) * config.validation_fraction))
        parts = random_split(
            data.train, [len_of(data.train) - held_out, held_out], generator=generator
        )
        self._search, self._validation = (_flat(part) for part in parts)
        self._check_shares()
        self.criterion = nn.CrossEntropyLoss()

    def _check_shares(self) -> None:
        """See that every process has as much of each batch as the others, and something."""
        size, count = self._config.train_batch_size, self._processes
        if size % count:
            raise UserError(
                f"train-batch-size is {size}; {count} processes share each batch, so that it has "
                f"to be a multiple of {count}"
            )
        least = min(len_of(part) for part in (self._search, self._validation))
        if least < count:
            raise UserError(f"{least} images are too few to train on or to validate with in "
                            f"{count} processes; add data or start fewer")  # fmt: skip

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch.

        The same in the search, whose split is smaller: it goes through it more than once, so
        that an epoch means as many updates of the weights everywhere.
        """
        return len_of(self._train) // self._config.train_batch_size or 1

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move to the training device, channels last."""
        return model.to(self.device, memory_format=torch.channels_last)  # pyright: ignore

    def train(
        self,
        model: nn.Module,
        stage: Stage,
        *,
        searching: bool = False,
        distillation: Distillation | None = None,
        after_step: Callable[[], None] | None = None,
        extra_state: Callable[[], dict] | None = None,
        load_extra: Callable[[dict], None] | None = None,
    ) -> nn.Module:
        """Train for the stage's epochs; goes on from the stage's checkpoint if there is one.

        Args:
            model: on ``device``; trained in place.
            searching: train on the search split (the rest is for the keep ratios).
            distillation: a teacher beside the labels.
            after_step: called after every optimizer step.
            extra_state, load_extra: more to keep in the checkpoint.
        """
        optimizer = make_optimizer(model, self._config)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _schedule((stage.first_step + step) / stage.all_steps)
        )
        # Not Accelerate's wrapper: it patches the model's forward, which surgery copies.
        prepared = DistributedDataParallel(model) if self._processes > 1 else model
        optimizer = self._accelerator.prepare_optimizer(optimizer)
        first_epoch = 0
        self._folder.begin_stage(stage.name)
        if (state := self._folder.load_checkpoint(stage.name)) is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["rng"])
            if load_extra:
                load_extra(state["extra"])
            first_epoch = state["epoch"]
            self._folder.resume_stage(stage.name, state["log_bytes"])
        for epoch in range(first_epoch, stage.epochs):
            loss = self._epoch(
                prepared, optimizer, scheduler, stage, epoch, searching, distillation, after_step
            )
            self._align(model)
            tested = self._test_every_epoch and not searching
            accuracy = self.accuracy(model) if tested else None
            self._folder.log(
                {
                    "event": "epoch", "stage": stage.name, "epoch": epoch + 1,
                    "train_loss": round(loss, 5), "accuracy": accuracy,
                }
            )  # fmt: skip
            self._folder.save_checkpoint(
                stage.name,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "rng": torch.get_rng_state(),
                    "extra": extra_state() if extra_state else {},
                    "epoch": epoch + 1,
                },
            )
        return model

    def _align(self, model: nn.Module) -> None:
        """Take the main process's running statistics for all; each has seen its own batches."""
        if self._processes > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def _epoch(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        stage: Stage,
        epoch: int,
        searching: bool,
        distillation: Distillation | None,
        after_step: Callable[[], None] | None,
    ) -> float:
        """One epoch; returns its mean training loss."""
        model.train()
        source = self._search if searching else self._train
        steps = self.steps
        order = _first_order(stage) + epoch
        stream = self._endless(source, order) if searching else self._batches(source, order)
        total = torch.zeros((), device=self.device)
        seen = time.monotonic()
        for step, (x, y) in enumerate(itertools.islice(stream, steps)):
            with self._accelerator.autocast():
                outputs = model(x)
                loss = self.criterion(outputs, y)
                if distillation is not None:
                    loss = distillation.loss(loss, outputs, x)
            self._accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            if after_step:
                after_step()
            if time.monotonic() - seen > 0.5:
                self._on_progress(stage.name, epoch * steps + step + 1, stage.epochs * steps)
                seen = time.monotonic()
        return float(self._accelerator.reduce(total, "mean")) / steps  # pyright: ignore

    def validation_loss(self, model: nn.Module) -> StreamedLoss:
        """Gives the loss of ``model`` on the next batch held out for validation."""
        return self._loss_on(model, self._validation)

    def training_loss(self, model: nn.Module) -> StreamedLoss:
        """The same on training batches: what the keep ratios would see without a split."""
        return self._loss_on(model, self._search)

    def _loss_on(self, model: nn.Module, dataset: Dataset) -> StreamedLoss:
        def loss(x: Tensor, y: Tensor) -> Tensor:
            with self._accelerator.autocast():
                return self.criterion(model(x), y)

        return StreamedLoss(loss, lambda seen: self._endless(dataset, 0, seen))

    def search_batches(self, seen: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the search split (training data less what is held out), without end.

        Args:
            seen: batches to leave out at the beginning.
        """
        return self._endless(self._search, 0, seen)

    def train_briefly(
        self,
        model: nn.Module,
        source: Iterator[tuple[Tensor, Tensor]],
        steps: int,
        at: float,
    ) -> None:
        """A few steps on the next batches of ``source``, with a fresh optimizer.

        Args:
            model: on ``device``; trained in place.
            at: place in the learning rate's schedule, in [0, 1].
        """
        optimizer = make_optimizer(model, self._config)
        for group in optimizer.param_groups:
            group["lr"] *= _schedule(at)
        model.train()
        for x, y in itertools.islice(source, steps):
            with self._accelerator.autocast():
                loss = self.criterion(model(x), y)
            self._accelerator.backward(loss)
            if (scaler := self._accelerator.scaler) is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=True)

    @property
    def loss_scale(self) -> Tensor | float:
        """What losses are multiplied by before they are differentiated: 1 but at fp16."""
        scaler = self._accelerator.scaler
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.device))

    def retake_statistics(self, model: nn.Module) -> None:
        """Measure the batch-norms of ``model`` on training images; see ``batch_norms``."""
        model.train()
        count = max(1, STATISTICS_IMAGES // self._config.train_batch_size)
        batches = itertools.islice(self._batches(self._train, 0), count)
        with self._accelerator.autocast():
            retake_statistics(model, batches, self.device)
        self._align(model)

    def accumulate_gradients(self, model: nn.Module, count: int) -> None:
        """Leave the gradients of ``count`` training batches, summed, in ``model``."""
        model.eval()
        model.zero_grad(set_to_none=True)
        for x, y in itertools.islice(self._endless(self._train, 0), count):
            with self._accelerator.autocast():
                loss = self.criterion(model(x), y)
            loss.backward()
        model.train()

    def accuracy(self, model: nn.Module) -> float:
        """Part of the test images that ``model`` gets right, in evaluation mode at float32."""
        return self._accuracy_on(self._test, model)

    def validation_accuracy(self, model: nn.Module) -> float:
        """The same on the images held out for validation, at the precision of training."""
        with self._accelerator.autocast():
            return self._accuracy_on(self._validation, model)

    @torch.no_grad()
    def _accuracy_on(self, dataset: Dataset, model: nn.Module) -> float:
        model.eval()
        right = torch.zeros((), device=self.device)
        for x, y in self._on_device(_in_order(self._own_share(dataset), EVALUATED_AT_ONCE)):
            right += (model(x).argmax(-1) == y).sum()
        model.train()
        total = self._accelerator.reduce(right, "sum")
        return float(total) / len_of(dataset)  # pyright: ignore[reportArgumentType]

    def _own_share(self, dataset: Dataset) -> Dataset:
        """What of ``dataset`` this process looks at when all look at it together, once."""
        if self._processes == 1:
            return dataset
        mine = range(self._accelerator.process_index, len_of(dataset), self._processes)
        return _flat(Subset(dataset, mine))

    def _batches(self, dataset: Dataset, order: int) -> Batches:
        """This process's part of shuffled batches of one epoch, all of them of the same size.

        The same again for the same seed and order.
        """
        seed = self._config.seed * 100_003 + order
        size = self._config.train_batch_size
        if isinstance(dataset, ImageTensors):
            part = (self._accelerator.process_index, self._processes)
            every = batches(dataset, size, shuffle=True, augment=True, seed=seed, part=part)
            return self._on_device(itertools.islice(every, max(1, len(dataset) // size)))
        loader = DataLoader(
            dataset,
            size,
            shuffle=True,
            drop_last=len_of(dataset) > size,
            num_workers=torch.get_num_threads(),
            generator=torch.Generator().manual_seed(seed),
            pin_memory=self.device.type == "cuda",
        )
        return self._on_device(self._accelerator.prepare_data_loader(loader))

    def _endless(
        self, dataset: Dataset, order: int, seen: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one pass after the other; another order for every pass.

        Args:
            seen: batches to leave out at the beginning.
        """
        turns, rest = divmod(seen, max(1, len_of(dataset) // self._config.train_batch_size))
        for turn in itertools.count(turns):
            one_pass = self._batches(dataset, order + 1009 * turn)
            yield from itertools.islice(one_pass, rest if turn == turns else 0, None)

    def _on_device(self, source: Batches) -> Batches:
        for x, y in source:
            self.before_batch()
            yield (
                unwaited(x.contiguous(memory_format=torch.channels_last), self.device),
                unwaited(y, self.device),
            )


class StreamedLoss:
    """A model's loss on the next batch of an endless stream."""

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        stream_from: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    ) -> None:
        self._loss, self._stream_from = loss, stream_from
        self.seen = 0

    @property
    def seen(self) -> int:
        """Batches so far; set it to go on from there."""
        return self._seen

    @seen.setter
    def seen(self, seen: int) -> None:
        self._seen, self._stream = seen, self._stream_from(seen)

    def __call__(self) -> Tensor:
        self._seen += 1
        return self._loss(*next(self._stream))


def unwaited(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on ``device``, by way of pinned memory: a copy from any other is waited for."""
    if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def _let_precision_change(precision: str) -> None:
    """Accelerate keeps one precision a process, and refuses a second one; runs may differ."""
    state = AcceleratorState
    if state._shared_state and state().mixed_precision != precision:
        state._reset_state()


def _first_order(stage: Stage) -> int:
    """Where a stage's orders of the images begin: no stage repeats those of another."""
    return zlib.crc32(stage.name.encode()) % 100_003


def _schedule(progress: float) -> float:
    """Learning rate factor: a short linear rise, then a cosine to zero."""
    if progress < WARMUP_FRACTION:
        return max(progress, 1e-3) / WARMUP_FRACTION
    rest = (progress - WARMUP_FRACTION) / (1 - WARMUP_FRACTION)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, rest)))


def _flat(part: Subset) -> Dataset:
    """A part of in-memory images as in-memory images."""
    if isinstance(part.dataset, ImageTensors):
        return part.dataset.subset(torch.as_tensor(list(part.indices)))
    return part


def _in_order(dataset: Dataset, size: int) -> Batches:
    if isinstance(dataset, ImageTensors):
        return batches(dataset, size)
    return DataLoader(dataset, size, num_workers=torch.get_num_threads())
