"""Diffusers' config files, of a transformer and of a scheduler, and the published models.

It knows JSON and no weights.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sana_cli.choices import PredictionType
from sana_cli.config.keys import Architecture, SampleConfig
from sana_cli.errors import SanaError
from sana_cli.runtime import files
from sana_cli.weights import strangers

WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_VERSION = "0.42.1"  # the version whose format is written
PUBLISHED_PREDICTION: PredictionType = "flow_prediction"  # of every published model
ORIGIN = "_sana_origin"  # in a merged model's config.json: "official"; diffusers passes such keys over
LATENT_CHANNELS = 32  # of the published models' DC-AE


def diffusers_config(
    model: Architecture, prediction_type: PredictionType = PUBLISHED_PREDICTION
) -> dict[str, Any]:
    """`transformer/config.json`: every field of diffusers' `SanaTransformer2DModel`.

    diffusers has no field for what a transformer predicts. It is added only if it differs from
    what the published models predict.
    """
    header = {"_class_name": "SanaTransformer2DModel", "_diffusers_version": DIFFUSERS_VERSION}
    fields = model.model_dump(mode="json")
    positions = fields.pop("interpolation_scale")
    own = {} if prediction_type == PUBLISHED_PREDICTION else {"prediction_type": prediction_type}
    derived = {
        "out_channels": model.in_channels,
        "cross_attention_dim": model.inner_dim,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    return header | fields | own | {"interpolation_scale": positions} | derived


def model_config(content: Mapping[str, Any], where: Path) -> tuple[Architecture, PredictionType]:
    """The architecture in a diffusers `config.json`, and what the transformer predicts.

    Raises:
        SanaError: it is of another class, or a field is impossible or asks for something that
            is not implemented.
    """
    kinds = content.get("architectures")  # the class, in configs of the transformers library
    theirs = kinds[0] if isinstance(kinds, list) and kinds else content.get("model_type")
    kind = content.get("_class_name") or theirs
    if kind not in (None, "SanaTransformer2DModel"):
        raise SanaError(f"{where}: is a {kind}, not a SanaTransformer2DModel", strangers.SANAS)
    if content.get("quantization_config"):
        raise SanaError(f"{where}: its weights are quantised, which are not read", strangers.PLAIN_COPY)
    given = {key: value for key, value in content.items() if not key.startswith("_")}
    defaults = {  # diffusers' own, for fields that a config omits
        "in_channels": 32, "num_attention_heads": 70, "num_layers": 20, "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112, "caption_channels": 2304, "sample_size": 32, "patch_size": 1,
    }  # fmt: skip
    known = {key: given[key] for key in Architecture.model_fields if given.get(key) is not None}
    model = validated(defaults | known, where)
    predicted: PredictionType = "sample" if given.get("prediction_type") == "sample" else PUBLISHED_PREDICTION
    supported = {"prediction_type": predicted} | diffusers_config(model, predicted)
    for key, value in given.items():
        expected = supported.get(key)
        if value != expected and value is not None:
            raise SanaError(
                f"{where}: {key} = {value!r} is not supported; this sana has {key} = {expected!r}"
            )
    return model, predicted


def read_model_config(folder: Path) -> tuple[Architecture, PredictionType]:
    """`model_config` of the `config.json` in a transformer's folder.

    If it does not record what the transformer predicts, the pipeline's scheduler config does.
    """
    path, scheduler = folder / "config.json", folder.absolute().parent / "scheduler" / "scheduler_config.json"
    content = strangers.read_json(path)
    if folder.absolute().name == "transformer" and "prediction_type" not in content and scheduler.is_file():
        with suppress(SanaError):  # a damaged one is reported when its solver is read
            if files.read_json(scheduler).get("prediction_type") == "sample":
                content = {**content, "prediction_type": "sample"}
    return model_config(content, path)


def validated(fields: Mapping[str, Any], where: Path) -> Architecture:
    """A model config of these fields.

    Raises:
        SanaError: names a field that is wrong.
    """
    try:
        config = Architecture.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise SanaError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for problem in config.problems():
        raise SanaError(f"{where}: {problem}")
    return config


def scheduler_config(
    sample: SampleConfig, prediction_type: PredictionType = PUBLISHED_PREDICTION
) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`: the diffusers scheduler that equals our solver.

    For a transformer that predicts x_0 it is DPM-Solver++, since diffusers' other flow solvers have no such
    setting; or SCM if it was distilled, which says "sample", and which diffusers refuses to run.
    """
    common = {"_diffusers_version": DIFFUSERS_VERSION, "num_train_timesteps": 1000}
    if prediction_type == "sample" and sample.solver != "scm":
        sample = sample.model_copy(update={"solver": "dpm++"})
    if sample.solver == "euler":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", **common, "shift": sample.flow_shift}
    if sample.solver == "heun":
        return {"_class_name": "FlowMatchHeunDiscreteScheduler", **common, "shift": sample.flow_shift}
    if sample.solver == "scm":
        predicts = "sample" if prediction_type == "sample" else "trigflow"
        return {"_class_name": "SCMScheduler", **common, "prediction_type": predicts, "sigma_data": 0.5}
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        **common,
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "flow_shift": sample.flow_shift,
        "prediction_type": prediction_type,
        "solver_order": 2,
        "solver_type": "midpoint",
        "use_flow_sigmas": True,
    }


# diffusers' defaults for settings that a scheduler config omits, if they differ from ours
_SCHEDULER_DEFAULTS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {
        "flow_shift": 1.0,
        "prediction_type": "epsilon",
        "use_flow_sigmas": False,
    },
    "FlowMatchEulerDiscreteScheduler": {"shift": 1.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 1.0},
    "SCMScheduler": {},
}
_UNSUPPORTED = (  # settings that change the noise levels or the step, all off by default
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "use_dynamic_shifting", "invert_sigmas", "shift_terminal", "stochastic_sampling", "thresholding",
)  # fmt: skip


def solver_of(content: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """`solver` and `flow_shift` of a diffusers scheduler config; inverts `scheduler_config`.

    Raises:
        SanaError: names a scheduler or a setting that none of our solvers has.
    """
    name = content.get("_class_name")
    solvers = {"DPMSolverMultistepScheduler": "dpm++", "FlowMatchEulerDiscreteScheduler": "euler"}
    solvers |= {"FlowMatchHeunDiscreteScheduler": "heun", "SCMScheduler": "scm"}
    if not isinstance(name, str) or name not in solvers:
        raise SanaError(
            f"{where}: the scheduler {name} is not supported",
            f"choose another: `solver` {' or '.join(solvers.values())}",
        )
    own = {key: value for key, value in content.items() if not key.startswith("_")}
    given = _SCHEDULER_DEFAULTS[name] | own
    shift = given.get("flow_shift", given.get("shift", 1.0))
    try:
        sample = SampleConfig.model_validate({"solver": solvers[name], "flow_shift": shift})
    except ValidationError as error:
        raise SanaError(f"{where}: shift {shift!r} is not a positive number") from error
    predicted: PredictionType = "sample" if given.get("prediction_type") == "sample" else PUBLISHED_PREDICTION
    for key, expected in (scheduler_config(sample, predicted) | dict.fromkeys(_UNSUPPORTED, False)).items():
        value = given.get(key, expected)
        if not key.startswith("_") and value != expected and not (expected is False and not value):
            raise SanaError(f"{where}: {key} = {value!r} is not supported; this sana has {expected!r}")
    return {"solver": sample.solver, "flow_shift": sample.flow_shift}


_PUBLISHED = {  # layers, width, norm of queries and keys, guidance embedded
    (28, 1152, False, False): "Sana 0.6B",
    (20, 2240, False, False): "Sana 1.6B",
    (20, 2240, True, False): "Sana 1.5 1.6B",
    (60, 2240, True, False): "Sana 1.5 4.8B",
    (28, 1152, True, True): "Sana-Sprint 0.6B",
    (20, 2240, True, True): "Sana-Sprint 1.6B",
}


def family(model: Architecture) -> str | None:
    """The published model with this architecture, such as `Sana 1.5 4.8B`, if there is one."""
    if model.in_channels != LATENT_CHANNELS or model.patch_size != 1:
        return None
    return _PUBLISHED.get(
        (model.num_layers, model.inner_dim, model.qk_norm is not None, model.guidance_embeds)
    )
