"""diffusers' scheduler configs: supported ones are written and read, others refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.sanas import (
    diffusers,
)

from sana_cli.config.keys import SampleConfig
from sana_cli.errors import SanaError
from sana_cli.weights import configs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"_class_name": ["x"]}, "is not supported"),
        ({"_class_name": "DDIMScheduler"}, "the scheduler DDIMScheduler is not supported"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "prediction_type = 'epsilon' is not supported"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True},
            "use_karras_sigmas = True is not supported",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "x"},
            "shift 'x' is not a positive number",
        ),
        ({"_class_name": "SCMScheduler", "sigma_data": 1.0}, "sigma_data = 1.0 is not supported"),
    ],
)
def test_other_schedulers_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(SanaError, match=message):
        configs.solver_of(content, Path("scheduler_config.json"))


@pytest.mark.parametrize("solver", ["dpm++", "euler", "heun", "scm"])
def test_scheduler_configs_go_out_and_come_back(solver: str, tmp_path: Path) -> None:
    """By way of diffusers, which fills in every default."""
    chosen = SampleConfig.model_validate({"solver": solver, "flow_shift": 1.0 if solver == "scm" else 2.5})
    content = configs.scheduler_config(chosen)
    scheduler = getattr(diffusers, content["_class_name"]).from_config(content)
    scheduler.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert configs.solver_of(written, tmp_path) == {"solver": solver, "flow_shift": chosen.flow_shift}
    predicting = configs.scheduler_config(chosen, "sample")
    kind = "SCMScheduler" if solver == "scm" else "DPMSolverMultistepScheduler"  # of a student
    assert (predicting["_class_name"], predicting["prediction_type"]) == (kind, "sample")
    expected = solver if solver == "scm" else "dpm++"
    assert configs.solver_of(predicting, tmp_path) == {"solver": expected, "flow_shift": chosen.flow_shift}
