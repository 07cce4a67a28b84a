"""Several processes, as torchrun starts them: which one this is, and waiting for the others. One process needs nothing.

It reads torchrun's environment variables and knows no model.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed

from sana_cli.errors import SanaError

WAIT = timedelta(days=7)  # for one rank's share of an embedding


@dataclass(frozen=True)
class World:
    """This process among its equals."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on once all processes are here.

        Raises:
            SanaError: another one has ended.
        """
        if self.size > 1:
            try:
                torch.distributed.barrier()
            except RuntimeError as error:
                raise SanaError("another process of this run has stopped; its message says why") from error


@contextmanager
def world() -> Iterator[World]:
    """The processes of this run, connected (gloo) for as long as the block lasts; alone without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    torch.distributed.init_process_group("gloo", timeout=WAIT)
    try:
        yield World(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()
