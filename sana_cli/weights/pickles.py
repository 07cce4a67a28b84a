"""Pickles that others made, read for tensors and plain values alone: what else they hold is passed over or refused, never run."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sana_cli.errors import SanaError
from sana_cli.weights import strangers


def items(content: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """A dictionary's items, whatever a file has written into the attributes of an ordered one."""
    return dict.items(content) if isinstance(content, dict) else content.items()


class _Unread:
    """Stands for what a pickle holds beside weights. It takes anything, keeps nothing and does nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        """Take the state of whatever it stands for."""


class _AsDict:
    """Stands for other people's kinds of dictionary; makes a plain one, which may have attributes."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _AsList:
    """Stands for other people's kinds of list; makes a plain one."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return []


def _named(module: str, names: str) -> list[str]:
    return [f"{module}.{name}" for name in names.split()]


# What trainers save beside weights: random state, settings, paths, times. All of it is data, and none of it is looked at, so that
# nothing of these packages is imported or called. A name that is not here is refused.
_UNREAD = [
    *_named("numpy.core.multiarray", "_reconstruct scalar _frombuffer"),  # numpy 1
    *_named("numpy._core.multiarray", "_reconstruct scalar _frombuffer"),  # numpy 2
    *_named("numpy.core.numeric", "_frombuffer"),
    *_named("numpy._core.numeric", "_frombuffer"),
    *_named("numpy", "ndarray dtype bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"),
    *_named("numpy", "longlong ulonglong complex64 complex128 str_ bytes_ object_ void datetime64 timedelta64"),
    *_named("numpy.dtypes", "BoolDType StrDType BytesDType ObjectDType VoidDType DateTime64DType TimeDelta64DType"),
    *_named("numpy.dtypes", "Int8DType Int16DType Int32DType Int64DType UInt8DType UInt16DType UInt32DType UInt64DType"),
    *_named("numpy.dtypes", "Float16DType Float32DType Float64DType Complex64DType Complex128DType"),
    *_named("numpy.random._pickle", "__randomstate_ctor __generator_ctor __bit_generator_ctor"),
    *_named("numpy.random.bit_generator", "SeedSequence __pyx_unpickle_SeedSequence"),
    *_named("numpy.random", "_mt19937.MT19937 _pcg64.PCG64 _pcg64.PCG64DXSM _philox.Philox _sfc64.SFC64"),
    *_named("numpy.random", "mtrand.RandomState _generator.Generator"),
    *_named("random", "Random"),
    *_named("torch", "_C.Generator torch_version.TorchVersion"),
    *_named("argparse", "Namespace"),
    *_named("types", "SimpleNamespace"),
    *_named("pathlib", "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"),
    *_named("pathlib._local", "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"),  # Python 3.13
    *_named("datetime", "datetime date time timedelta timezone"),
    *_named("builtins", "bool int float str bytes list dict tuple frozenset range slice object Ellipsis"),
    *_named("typing", "Any"),
    *_named("omegaconf", "dictconfig.DictConfig listconfig.ListConfig base.ContainerMetadata base.Metadata"),
    *_named("omegaconf.nodes", "AnyNode StringNode IntegerNode FloatNode BooleanNode PathNode BytesNode"),
    *_named("deepspeed.runtime.fp16.loss_scaler", "LossScaler DynamicLossScaler"),
    *_named("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    *_named("deepspeed.utils.tensor_fragment", "fragment_address"),
]
_DICTS = [
    *_named("collections", "defaultdict"),
    *_named("easydict", "EasyDict"),
    *_named("addict.addict", "Dict"),
    *_named("mmcv.utils.config", "ConfigDict"),
    *_named("mmengine.config.config", "ConfigDict"),
    *_named("ml_collections.config_dict.config_dict", "ConfigDict"),
    *_named("pytorch_lightning.utilities.parsing", "AttributeDict"),
    *_named("lightning.pytorch.utilities.parsing", "AttributeDict"),
    *_named("lightning_fabric.utilities.data", "AttributeDict"),
    *_named("lightning.fabric.utilities.data", "AttributeDict"),
]
_LISTS = _named("collections", "deque")
_STAND_INS = [(_Unread, name) for name in _UNREAD] + [(_AsDict, name) for name in _DICTS] + [(_AsList, name) for name in _LISTS]


def read_pickle(path: Path) -> dict[Any, Any]:
    """A pickled dictionary of tensors and plain values; what else it may hold is passed over or refused, and never run.

    Raises:
        SanaError: it is missing, damaged, or would run code.
    """
    beginning = strangers.read_beginning(path)
    zipped = beginning.startswith(b"PK")
    by_name = path.suffix == ".safetensors"  # which PyTorch would go by, where it is given a path; a mapping needs one
    stand_ins: list[Any] = _STAND_INS
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of other protocols, most of which are read all the same
            source: Any = file if by_name else path
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped and not by_name)
    except Exception as error:  # whatever a broken or hostile file makes of the unpickler
        asked = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        if asked:
            raise SanaError(
                f"{path} is refused: beside weights it holds {asked[1]}, which can run code when it is loaded; "
                "none of it was run",
                "ask whoever made it for safetensors, or for its weights alone: torch.save(model.state_dict(), FILE)",
            ) from error
        if "DTensor" in str(error) or "torch.distributed" in str(error):
            raise SanaError(
                f"{path} holds one process's pieces of tensors (DTensor), not whole weights",
                "gather them where it was made, with torch.distributed.checkpoint.state_dict.get_model_state_dict and "
                "full_state_dict",
            ) from error
        if "Unsupported operand" in str(error) and beginning.startswith((b"PK", b"\x80")):
            raise SanaError(
                f"{path} is neither safetensors nor a checkpoint of PyTorch's: its pickle has parts that are not read",
                "save its weights again with torch.save, as it is by default (pickle_protocol=2)",
            ) from error
        if zipped or beginning.startswith(strangers.OLD_TORCH):
            raise SanaError(
                f"{path} is damaged or cut short: it begins as a checkpoint of PyTorch's, and cannot be read to its end",
                "download or copy it again",
            ) from error
        raise SanaError(
            f"{path} is neither safetensors nor a checkpoint of PyTorch's that holds weights alone",
            "give safetensors, or what torch.save made of a model's state_dict()",
        ) from error
    if not isinstance(content, dict):
        raise SanaError(f"{path} holds no dictionary of weights", "give safetensors, or a file of a model's state_dict()")
    return dict(items(content))
