"""What tests share: a tiny dataset, small configs, a random Gemma 2, and the command line as a process."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from sana_cli.commands.embed import EmbedOptions, EmbedSummary, embed
from sana_cli.config.file import parse_config
from sana_cli.config.keys import Config
from sana_cli.runtime import device

os.environ["HF_HUB_OFFLINE"] = "1"
# bitwise comparisons need a fixed thread count; and two workers with two threads each, on two cores, are ten times as slow as with one
torch.set_num_threads(1)
REPOSITORY = Path(__file__).parent.parent
# SANA_TESTS_BF16=yes or no runs the suite as if this processor multiplied in bf16, or did not; unset: as it is
SAID_OF_BF16 = os.environ.get("SANA_TESTS_BF16")
if SAID_OF_BF16:
    device.cpu_has_bf16 = lambda: SAID_OF_BF16 == "yes"

SMALL = """
data: {image_size: 16, held_out_split: null}
model: {patch_size: 8, num_layers: 1, num_attention_heads: 2, attention_head_dim: 8, num_cross_attention_heads: 2,
        cross_attention_head_dim: 8}
train: {steps: 4, batch_size: 4, warmup_steps: 1, save_every: 2, sample_every: 4, log_every: 1, precision: fp32}
sample: {steps: 2, prompts: ["4 two"]}
"""


def small_config(folder: Path, *overrides: str) -> Config:
    """A config whose dataset and run lie in `folder`."""
    places = (f"data.dir={folder / 'data'}", f"run.dir={folder / 'run'}", "run.device=cpu")
    return parse_config(SMALL, "small.yaml", (*places, *overrides))


def embedded(config: Config, limit: int = 40) -> EmbedSummary:
    """Embed the first images of MNIST for a config."""
    *_, summary = embed(EmbedOptions(config, limit=limit))
    assert isinstance(summary, EmbedSummary)
    return summary


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A small config with its dataset embedded."""
    made = small_config(tmp_path)
    embedded(made)
    return made


# no socket may be opened: whatever the command line does in tests, it does offline; and what tries to is on record.
# And the processor is what the suite was told that it is, see SAID_OF_BF16
NO_NETWORK = """
import importlib.abc, importlib.util, os, pathlib, socket, sys
said = os.environ.get("SANA_TESTS_BF16")
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "sana_cli.runtime.device":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module.cpu_has_bf16 = lambda: said == "yes"
        spec.loader.exec_module = exec_module
        return spec
if said:
    sys.meta_path.insert(0, Finder())
def refuse(*a, **k):
    pathlib.Path(__file__).with_name("attempts").touch()
    raise RuntimeError("a socket was opened")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
"""


@pytest.fixture
def sana(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `sana ...` as a process of its own in `tmp_path`, with the network refused."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sana_cli", *arguments],
            cwd=tmp_path,
            env=process_environment(tmp_path) | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def process_environment(folder: Path) -> dict[str, str]:
    """For a `sana` process: offline, one thread, no colours, 80 columns."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(REPOSITORY)]),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "80",
        "TERM": "dumb",
    }


def child(work: Callable[[], object]) -> BaseProcess:
    """`work` in a process of its own; its exit code is what `sana` would end with."""

    def process() -> None:
        torch.set_num_threads(1)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a suite run by nohup ignores it, and so would what it starts
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            work()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(0)

    started = multiprocessing.get_context("fork").Process(target=process, daemon=True)  # ends with the suite, whatever happens
    started.start()
    return started


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 2 of two layers with a byte-level tokenizer of its own, saved as Hugging Face saves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "random-gemma-2"
    special = ["<pad>", "<eos>", "<bos>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate([*special, *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    fast.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    Gemma2Model(
        Gemma2Config(
            vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, initializer_range=0.2,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder
