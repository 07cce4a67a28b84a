"""Which of several processes this is, from the environment of torchrun or a similar launcher.

A job system may set `RANK` or `LOCAL_RANK` for its own purposes, and a shell inside a
distributed job inherits them. So they count only for `sana embed` and `sana train`, and only if
a launcher has set all variables that processes need to connect. It imports no torch and
connects nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sana_cli.errors import SanaError

TORCHRUN = "TORCHELASTIC_RUN_ID"
RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torch.distributed's env:// needs


@dataclass(frozen=True)
class Launch:
    """Process `rank` of `size`, and `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    by_torchrun: bool = False
    says_local_rank: bool = True  # whether the launcher said which process of its machine this is

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints."""
        return self.rank == 0


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read the environment. One process unless torchrun or all of `RENDEZVOUS` are in it.

    Raises:
        SanaError: a variable is not a number, or the rank is not below the size.
    """
    by_torchrun = TORCHRUN in environment
    if not by_torchrun and any(name not in environment for name in RENDEZVOUS):
        return Launch()
    numbers = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        value = environment.get(name, default)
        if not value.isdecimal():
            what = f"{name} is {value!r} in the environment, not a number"
            raise SanaError(what, f"unset {name}, or start with torchrun")
        numbers[name] = int(value)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if size < 1 or rank >= size:
        what = f"RANK is {rank} and WORLD_SIZE {size} in the environment"
        raise SanaError(what, "unset both, or start with torchrun")
    return Launch(rank, size, numbers["LOCAL_RANK"], by_torchrun, "LOCAL_RANK" in environment)


def launch() -> Launch:
    """Read the environment of this process."""
    return read_launch(os.environ)
