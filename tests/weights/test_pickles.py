"""Pickles: only tensors and plain values are read, and nothing in them runs."""

import argparse
import collections
import datetime
import pathlib
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sanas import (
    AVERAGE,
    PIXELS,
    RAW,
    Payload,
    hollow,
    lesson_file,
    official,
    published,
    random_states,
    reference,
    refused,
    same,
    trainer_file,
    value,
)

from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.commands.sample import SampleOptions, sample
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.weights import checkpoint, pickles
from sana_cli.weights.reader import read_weights


@pytest.mark.parametrize("new_format", [True, False])
def test_a_malicious_file_is_refused_and_not_run(tmp_path: Path, new_format: bool) -> None:
    proof, path = tmp_path / "it-ran", tmp_path / "model.pth"
    state = hollow(official(build(published("Sana 0.6B"), seed=None).state_dict(), sprint=False))
    torch.save(
        {"state_dict": state, "extra": Payload(proof)}, path, _use_new_zipfile_serialization=new_format
    )
    for act in (
        lambda: checkpoint.load_transformer(path),
        lambda: inspect(InspectOptions(str(path))),
        lambda: list(sample(SampleOptions(("a",), path, device="cpu"))),
    ):
        with pytest.raises(
            SanaError, match=r"is refused: beside weights it holds posix\.system.*none of it was run"
        ):
            act()
    assert not proof.exists()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(proof)))
    with pytest.raises(SanaError, match="refused|neither safetensors nor"):
        checkpoint.load_transformer(tmp_path / "plain.pth")
    assert not proof.exists()


def test_only_plain_numbers_are_weights(tmp_path: Path) -> None:
    state = reference(PIXELS).state_dict()
    name = "proj_out.weight"
    for odd in (
        state[name].to(torch.int8), state[name].to(torch.complex64), state[name] > 0, state[name].to_sparse(),
        state[name].to("meta"), state[name].to(torch.float8_e4m3fn),
    ):  # fmt: skip
        torch.save(state | {name: odd}, tmp_path / "x.pth")
        lesson = lesson_file(tmp_path / "diffusion-1.pt", reference(PIXELS))
        content = torch.load(lesson, weights_only=True)
        content["model_state_dict"]["_score_network." + name] = odd
        torch.save(content, lesson)
        for path in (tmp_path / "x.pth", lesson):
            with pytest.raises(SanaError, match="proj_out.weight is a tensor of .*; weights are float32"):
                checkpoint.load_transformer(path)


def test_a_pickle_in_a_folder_is_not_opened_unasked(tmp_path: Path) -> None:
    theirs = reference(PIXELS)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(SanaError, match="has pickled weights only.*not opened unasked\nname that file"):
        checkpoint.load_transformer(tmp_path)
    assert same(checkpoint.load_transformer(tmp_path / "diffusion_pytorch_model.bin"), theirs) < 1e-5


# --- what may come with weights -----------------------------------------------------------------------------


def test_settings_paths_and_times_beside_weights_are_passed_over(tmp_path: Path) -> None:
    beside = [
        argparse.Namespace(lr=1.0, out=pathlib.Path("x")), pathlib.PurePosixPath("a/b"),
        datetime.datetime(2025, 1, 1),
        datetime.timedelta(1), datetime.UTC, collections.defaultdict(list, {"loss": [1.0]}),
        collections.deque([1], maxlen=3),
        collections.OrderedDict(a=1), collections.Counter("aa"), np.float32(1), np.bool_(True), np.arange(3),
        np.array(["a"]),
        np.array([1, "a"], dtype=object), np.dtype("f4"), np.float32, np.random.RandomState(0),
        np.random.default_rng(0),
        random.Random(0), torch.Generator(), torch.__version__, torch.float16, torch.device("cpu"),
        torch.Size([1]), range(3),
        frozenset([1]), slice(1), b"\xff", b"", bytearray(b"a"), 2**70, None, complex(1, 2), float, ...,
    ]  # fmt: skip
    for old in (False, True):
        torch.save(
            {"state_dict": RAW, "args": beside}, tmp_path / "x.pth", _use_new_zipfile_serialization=not old
        )
        assert value(read_weights(tmp_path / "x.pth")) == 1.0


def pickled(path: Path, name: str) -> Path:
    """Write {"x": name()} with a state by hand, in PyTorch's old checkpoint format."""
    module, _, function = name.rpartition(".")
    call = b"\x80\x02}X\x01\x00\x00\x00xc" + f"{module}\n{function}\n".encode() + b")R}bs."
    start = [
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
    ]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in start) + call + pickle.dumps([], 2))
    return path


def test_each_stand_in_stands_in(tmp_path: Path) -> None:
    """Each name gives an empty object or dictionary, and its package is not used."""
    for stand_in, name in pickles._STAND_INS:
        if stand_in is pickles._AsList:
            continue
        made = pickles.read_pickle(pickled(tmp_path / "x.pth", name))["x"]
        assert type(made) is (pickles._Unread if stand_in is pickles._Unread else collections.OrderedDict), (
            name
        )
        assert not getattr(made, "__dict__", {}), name


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "builtins.getattr",
        "builtins.__import__",
        "builtins.open", "importlib.import_module", "functools.partial", "operator.attrgetter",
        "runpy.run_path", "torch.load",
        "torch.hub.load", "torch.nn.Linear", "numpy.load", "numpy.fromfile", "numpy.ctypeslib.load_library",
        "pathlib.os.system",
        "shutil.rmtree", "webbrowser.open", "copyreg.__newobj__", "types.FunctionType", "types.CodeType",
        "collections.namedtuple",
        "random.SystemRandom", "datetime.sys", "numpy.core.multiarray.fromfile", "numpy.ndarray.tofile",
        "argparse.FileType",
    ],
)  # fmt: skip
def test_all_other_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        SanaError, match=rf"is refused: .* holds {name.removeprefix('builtins.')}.*none of it was run"
    ):
        read_weights(pickled(tmp_path / "x.pth", name))


def test_a_pickle_called_safetensors_is_a_pickle(tmp_path: Path) -> None:
    """PyTorch decides by the suffix of a path."""
    path = trainer_file(tmp_path / "x.safetensors", state_dict_ema=AVERAGE)
    assert value(read_weights(path)) == 2.0
    refused(
        trainer_file(path, more=Payload(tmp_path / "it-ran")),
        "is refused: beside weights it holds posix.system",
    )
    assert not (tmp_path / "it-ran").exists()


def test_a_payload_among_random_states_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    states = random_states() | {"more": collections.defaultdict(list, {"a": [Payload(proof)]})}
    for old in (False, True):
        path = trainer_file(tmp_path / "x.pth", old, state_dict_ema=AVERAGE, rng_state=states)
        refused(path, "is refused: beside weights it holds posix.system", "none of it was run")
    array = np.empty(1, dtype=object)
    array[0] = Payload(proof)
    refused(
        trainer_file(tmp_path / "x.pth", rng_state=array), "is refused: beside weights it holds posix.system"
    )
    assert not proof.exists()


class Ordered:
    """Pickled as an ordered dictionary with attributes that hide its methods."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        attributes = dict.fromkeys(("items", "get", "keys", "values", "__iter__", "__len__"), "not a method")
        return collections.OrderedDict, (), attributes, None, iter(self.content.items())


def test_attributes_that_a_file_sets_are_not_used(tmp_path: Path) -> None:
    torch.save(Ordered({"state_dict": Ordered(RAW), "epoch": 1}), tmp_path / "x.pth")
    assert torch.load(tmp_path / "x.pth", weights_only=True).items == "not a method"
    assert value(read_weights(tmp_path / "x.pth")) == 1.0


def test_a_dictionary_that_holds_itself_ends(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"x": torch.zeros(1)}
    inner["self"] = inner
    torch.save({"model": {str(i): inner for i in range(300)}, "all": [inner] * 300}, tmp_path / "x.pth")
    with pytest.raises(SanaError, match="holds no SANA"):
        read_weights(tmp_path / "x.pth")
