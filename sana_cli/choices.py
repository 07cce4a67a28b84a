"""Options with a fixed set of values, named once: for the config, the commands, `--help` and the shell's completion."""

from typing import Literal

Solver = Literal["dpm++", "euler", "heun", "scm"]
Precision = Literal["auto", "bf16", "fp32"]
Weights = Literal["ema", "raw"]
Offload = Literal["auto", "model", "none"]
