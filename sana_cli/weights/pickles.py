"""Read other people's pickles for tensors and plain values only, and run nothing in them.

Other content is skipped or refused. This module knows no names of tensors. `torch.load` is
called here and nowhere else.
"""

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
    """A dictionary's items, even if a pickled OrderedDict has an attribute named `items`."""
    return dict.items(content) if isinstance(content, dict) else content.items()


class _Unread:
    """In place of what a pickle holds beside weights: takes any arguments and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        """Ignore the state of the replaced object."""


class _AsDict:
    """In place of other libraries' dictionaries: makes one that may have attributes."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _AsList:
    """In place of other libraries' lists: makes a plain one."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return []


def _named(module: str, names: str) -> list[str]:
    return [f"{module}.{name}" for name in names.split()]


_PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"
# What trainers save beside weights: random state, settings, paths, times. None of it is used.
# So nothing of these packages is imported or called. Other names are refused.
_UNREAD = [
    *_named("numpy.core.multiarray", "_reconstruct scalar _frombuffer"),  # numpy 1
    *_named("numpy._core.multiarray", "_reconstruct scalar _frombuffer"),  # numpy 2
    *_named("numpy.core.numeric", "_frombuffer"),
    *_named("numpy._core.numeric", "_frombuffer"),
    *_named("numpy", "ndarray dtype bool bool_ str_ bytes_ object_ void datetime64 timedelta64"),
    *_named("numpy", "int8 int16 int32 int64 uint8 uint16 uint32 uint64 longlong ulonglong"),
    *_named("numpy", "float16 float32 float64 complex64 complex128"),
    *_named("numpy.dtypes", "BoolDType StrDType BytesDType ObjectDType VoidDType"),
    *_named("numpy.dtypes", "DateTime64DType TimeDelta64DType Int8DType Int16DType Int32DType Int64DType"),
    *_named("numpy.dtypes", "UInt8DType UInt16DType UInt32DType UInt64DType"),
    *_named("numpy.dtypes", "Float16DType Float32DType Float64DType Complex64DType Complex128DType"),
    *_named("numpy.random._pickle", "__randomstate_ctor __generator_ctor __bit_generator_ctor"),
    *_named("numpy.random.bit_generator", "SeedSequence __pyx_unpickle_SeedSequence"),
    *_named("numpy.random", "_mt19937.MT19937 _pcg64.PCG64 _pcg64.PCG64DXSM _philox.Philox _sfc64.SFC64"),
    *_named("numpy.random", "mtrand.RandomState _generator.Generator"),
    *_named("random", "Random"),
    *_named("torch", "_C.Generator torch_version.TorchVersion"),
    *_named("argparse", "Namespace"),
    *_named("types", "SimpleNamespace"),
    *_named("pathlib", _PATHS),
    *_named("pathlib._local", _PATHS),  # Python 3.13
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
_STAND_INS = [
    (stand_in, name)
    for stand_in, names in ((_Unread, _UNREAD), (_AsDict, _DICTS), (_AsList, _LISTS))
    for name in names
]


def read_pickle(path: Path) -> dict[Any, Any]:
    """Read a pickled dictionary of tensors and plain values.

    Raises:
        SanaError: it is missing, damaged, no dictionary, or would run code.
    """
    beginning = strangers.read_beginning(path)
    zipped = beginning.startswith(b"PK")
    by_name = path.suffix == ".safetensors"  # PyTorch decides by a path's suffix; mmap needs a path
    stand_ins: list[Any] = _STAND_INS
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickle protocols, most of which can be read
            source: Any = file if by_name else path
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped and not by_name)
    except Exception as error:  # a broken or hostile file can make the unpickler raise any
        raise _unreadable(path, beginning, str(error)) from error
    if not isinstance(content, dict):
        raise SanaError(
            f"{path} holds no dictionary of weights", "give safetensors, or a file of a model's state_dict()"
        )
    return dict(items(content))


def _unreadable(path: Path, beginning: bytes, reason: str) -> SanaError:
    """The error for a file that `torch.load` cannot read, by its beginning and the reason."""
    if refused := re.search(r"GLOBAL ([\w.]{1,100})", reason):
        return SanaError(
            f"{path} is refused: beside weights it holds {refused[1]}, which can run code when it is loaded; "
            "none of it was run",
            "ask whoever made it for safetensors, or for its weights alone: "
            "torch.save(model.state_dict(), FILE)",
        )
    if "DTensor" in reason or "torch.distributed" in reason:
        return SanaError(
            f"{path} holds one process's pieces of tensors (DTensor), not whole weights",
            "gather them where it was made, with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict",
        )
    if "Unsupported operand" in reason and beginning.startswith((b"PK", b"\x80")):
        return SanaError(
            f"{path} is neither safetensors nor a checkpoint of PyTorch's: "
            "its pickle has parts that are not read",
            "save its weights again with torch.save, as it is by default (pickle_protocol=2)",
        )
    if beginning.startswith((b"PK", strangers.OLD_TORCH)):
        return SanaError(
            f"{path} is damaged or cut short: it begins as a checkpoint of PyTorch's, "
            "and cannot be read to its end",
            "download or copy it again",
        )
    return SanaError(
        f"{path} is neither safetensors nor a checkpoint of PyTorch's that holds weights alone",
        "give safetensors, or what torch.save made of a model's state_dict()",
    )
