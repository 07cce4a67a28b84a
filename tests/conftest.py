"""Fixtures: a tiny dataset, a random Gemma 2, `sana` as a process."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("helpers")

from helpers import NO_NETWORK, PYTHON_SANA, SMALL, Sana, embedded, process_environment, small_config  # noqa: E402
from helpers.steps import sample_predicting_step, step_folder  # noqa: E402

from sana_cli.config.keys import Config  # noqa: E402
from sana_cli.runtime import device  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
# Bitwise comparisons need a fixed number of threads. Also, two workers with two threads each on
# two cores are ten times slower than with one.
torch.set_num_threads(1)
# SANA_TESTS_BF16=yes (no) runs the suite as if this processor had (lacked) bf16 arithmetic.
FORCED_BF16 = os.environ.get("SANA_TESTS_BF16")
if FORCED_BF16:
    device.cpu_has_bf16 = lambda: FORCED_BF16 == "yes"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A small config with its dataset embedded."""
    made = small_config(tmp_path)
    embedded(made)
    return made


@pytest.fixture
def sana(tmp_path: Path) -> Sana:
    """Run `sana ...` as a process in `tmp_path`, without network."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PYTHON_SANA, *arguments],
            cwd=tmp_path,
            env=process_environment(tmp_path) | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random two-layer Gemma 2 and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "random-gemma-2"
    special = ["<pad>", "<eos>", "<bos>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate([*special, *letters])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    Gemma2Model(
        Gemma2Config(
            vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, initializer_range=0.2,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A config file for runs of a few seconds, in the working directory of `sana`."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    return path


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small run, for the tests of a module."""
    return step_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def predicts_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a run that predicts the data."""
    return sample_predicting_step(tmp_path_factory)
