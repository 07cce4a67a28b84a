"""Which of several processes this is, as a launcher says it in the environment: torchrun, or one that sets the same variables.

A job system may set `RANK` or `LOCAL_RANK` for purposes of its own, and a shell inside a distributed job has inherited them. So
they count only for `sana embed` and `sana train`, and only where a launcher has set all that processes need to meet. It imports
no torch and connects nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sana_cli.errors import SanaError

TORCHRUN = "TORCHELASTIC_RUN_ID"
MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torch.distributed's env:// needs


@dataclass(frozen=True)
class Launch:
    """One process of `size`: number `rank` of them all, number `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    by_torchrun: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0


def read_launch(environment: Mapping[str, str]) -> Launch:
    """What the environment says. One process, unless it is torchrun's or has all of `MEETING`.

    Raises:
        SanaError: one of the variables is no number, or the rank is not below the size.
    """
    by_torchrun = TORCHRUN in environment
    if not by_torchrun and any(name not in environment for name in MEETING):
        return Launch()
    numbers = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        value = environment.get(name, default)
        if not value.isdecimal():
            raise SanaError(f"{name} is {value!r} in the environment, not a number", f"unset {name}, or start with torchrun")
        numbers[name] = int(value)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if size < 1 or rank >= size:
        raise SanaError(f"RANK is {rank} and WORLD_SIZE {size} in the environment", "unset both, or start with torchrun")
    return Launch(rank, size, numbers["LOCAL_RANK"], by_torchrun)


def launch() -> Launch:
    """`read_launch` of this process."""
    return read_launch(os.environ)
