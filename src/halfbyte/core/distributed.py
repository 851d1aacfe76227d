"""Several processes that share one search: each does its part, and all of them know every result.

Every process runs the same program and makes the same decisions; only the work is divided, and only the first process
writes what a search leaves. W4 codes are prepared together: calibration text and rows of weights are shared, second
moments summed. Where all see the work folder, each encodes its share of the blocks as ggml types; otherwise the first
does, and the others get its files. Refining and tuning are the first one's. Objects and files travel through gloo;
tensors through whatever suits their device (NCCL between GPUs). ``torchrun`` starts the processes, and the environment
says who is who.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from halfbyte.core.errors import HalfbyteError

T = TypeVar("T")

PATIENCE = timedelta(hours=24)  # the others wait while the first refines; gloo notices a dead process at once
CHUNK_BYTES = 64 * 2**20


class Group:
    """One process alone."""

    rank, size, local_rank = 0, 1, 0

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of ``items``: every ``size``-th."""
        return items[self.rank :: self.size]

    def merge(self, results: Sequence[T]) -> list[T]:
        """All results in the order of the items, from each process's results for its :meth:`share`."""
        return list(results)

    def merge_rows(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """:meth:`merge` for tensors, which stay on their device; every process has some."""
        return list(parts)

    def first_rows(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The first process's tensors, of shapes that every process has, on their device."""
        return list(parts)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up the tensors of all processes, in place, to the same bits everywhere."""
        return tensor

    def from_first(self, value: T) -> T:
        """The first process's value, in every process."""
        return value

    def same(self, value: T) -> T:
        """``value``, after making sure that every process has the same.

        Raises:
            HalfbyteError: they differ.
        """
        return value

    def send_file(self, path: Path) -> None:
        """Give every process the first one's file at ``path``, if they do not see it already."""


ALONE = Group()
_joined: list[Group] = [ALONE]


def processes() -> Group:
    """The processes that run this program together: those that :func:`joined` has brought together, else this one."""
    return _joined[-1]


class _TorchGroup(Group):
    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))

    def _gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        _talk(lambda: dist.all_gather_object(found, value))
        return found

    def merge(self, results: Sequence[T]) -> list[T]:
        return self._in_order(self._gather(list(results)))

    def _in_order(self, parts: Sequence[Sequence[T]]) -> list[T]:
        """From what each process has of the items."""
        return [parts[index % self.size][index // self.size] for index in range(sum(map(len, parts)))]

    def merge_rows(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        shapes = self._gather([part.shape for part in parts])
        own = torch.cat([part.flatten() for part in parts])
        sizes = [sum(shape.numel() for shape in shapes_of) for shapes_of in shapes]
        sent, got = own.new_zeros(max(sizes)), [own.new_empty(max(sizes)) for _ in sizes]
        sent[: len(own)] = own
        _talk(lambda: dist.all_gather(got, sent))
        split = [
            [part.view(shape) for part, shape in zip(flat[:size].split([s.numel() for s in of]), of, strict=True)]
            for flat, size, of in zip(got, sizes, shapes, strict=True)
        ]
        return self._in_order(split)

    def first_rows(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        own = [part.contiguous() for part in parts]
        for part in own:
            _talk(lambda part=part: dist.broadcast(part, src=0))
        return own

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        _talk(lambda: dist.all_reduce(tensor))
        return tensor

    def from_first(self, value: T) -> T:
        box = [value]
        _talk(lambda: dist.broadcast_object_list(box, src=0))
        return box[0]

    def same(self, value: T) -> T:
        if any(other != value for other in self._gather(value)):
            raise HalfbyteError(
                "search: processes disagree, expected the same state in every process",
                fix="use the same software and files on every machine",
            )
        return value

    def send_file(self, path: Path) -> None:
        size = self.from_first(path.stat().st_size if self.first else 0)  # when it is written, the others look
        receiver = not path.exists() or path.stat().st_size != size
        if not any(self._gather(receiver)):
            return
        partial = path.with_name(f"{path.name}.{self.rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:
            source = files.enter_context(open(path, "rb")) if self.first else None
            target = files.enter_context(open(partial, "wb")) if receiver else None
            for start in range(0, size, CHUNK_BYTES):
                count = min(CHUNK_BYTES, size - start)
                data = bytearray(source.read(count)) if source else bytearray(count)
                buffer = torch.frombuffer(data, dtype=torch.uint8)
                _talk(lambda buffer=buffer: dist.broadcast(buffer, src=0))
                if target:
                    target.write(data)
        if receiver:
            partial.replace(path)


def _talk(exchange: Callable[[], object]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        raise HalfbyteError(
            f"process {dist.get_rank()} of {dist.get_world_size()}: another process of the group has stopped",
            fix="see its output; then start all of them again with --resume",
        ) from error


@contextmanager
def joined() -> Iterator[Group]:
    """Inside, :func:`processes` are those that ``torchrun`` started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not dist.is_available():
        yield ALONE
        return
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
    _joined.append(_TorchGroup())
    try:
        yield processes()
    finally:
        _joined.pop()
        dist.destroy_process_group()
