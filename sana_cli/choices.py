"""Options with a fixed set of values, named once for config, commands, `--help` and completion."""

from typing import Literal

Solver = Literal["dpm++", "euler", "heun", "scm"]
Precision = Literal["auto", "bf16", "fp32"]
Weights = Literal["ema", "raw"]
PredictionType = Literal["flow_prediction", "sample"]
Offload = Literal["auto", "model", "none"]
JudgedBy = Literal["auto", "attributes", "captions"]
