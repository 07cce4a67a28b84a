"""Caption encoders: captions to caption states, the features of their tokens that the transformer attends to.

`tiny` is built in and needs no download; any other is a Hugging Face model, by id or local path: causal decoders (Gemma 2, the paper's choice),
T5 encoders, BERT, ModernBERT. `embed` and `sample` encode with the same `CaptionEncoder.encode`. This module knows
neither where captions come from nor where states go.

Shapes: B captions of a batch, T tokens of the longest, D the encoder's width.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sana_cli.config.keys import TextConfig
from sana_cli.errors import SanaError
from sana_cli.runtime import hub

FINGERPRINT_VERSION = 1
TINY_DIM = 128  # width of the built-in encoder's states
TINY_PLACE = 0.25  # size of a place's vector beside a word's
TINY_VERSION = 2  # of its vectors; 1 was a random Gemma 2 on bytes
MAX_INSTRUCTION = 4096  # tokens of an instruction
UNLIMITED = 10**9  # tokens: the longest caption that is taken has fewer bytes
TOKENS_PER_BATCH = 8192  # padded tokens that go through an encoder at once
UNGATED_GEMMA = "Efficient-Large-Model/gemma-2-2b-it"


# --- fingerprint ------------------------------------------------------------------------------------------------------


def asked_for(text: TextConfig) -> dict[str, Any]:
    """What a config alone says of an encoder; the fields of a fingerprint that can be checked without loading it."""
    settings = {
        "encoder": hub.model_name(text.encoder),
        "revision": text.revision,
        "max_length": text.max_length,
        "instruction": text.instruction,
        "template": text.template,
        "lowercase": text.lowercase,
    }
    return settings if text.dtype == "auto" else settings | {"dtype": text.dtype}


_FORMERLY = {"lowercase": False}  # what fingerprints from before a setting was there mean


def check_same_encoder(recorded: Mapping[str, Any], given: Mapping[str, Any], where: str, *next_steps: str) -> None:
    """Refuse another encoder or other settings than `recorded`; fields that `given` lacks are not compared.

    Raises:
        SanaError: naming each field that differs.
    """
    fields = [key for key in given if key != "encoder" or "weights" not in given]  # weights tell better than a name
    wrong = [key for key in fields if recorded.get(key, _FORMERLY.get(key)) != given[key]]
    if wrong:
        raise SanaError(
            *(f"text.{key}: {where} has {recorded.get(key)!r:.200}, not {given[key]!r:.200}" for key in wrong), *next_steps
        )


_WITH_CAPITALS, _LOWER_CASE = (hashlib.sha256(kind.encode()).hexdigest() for kind in ("words", "words in lower case"))


def as_of_today(fingerprint: Mapping[str, Any], captions: Iterable[str]) -> Mapping[str, Any]:
    """A fingerprint of `tiny` from before it took words in lower case, where its captions have no capitals: they kept their vectors."""
    if not knew_capitals(fingerprint) or any(caption != caption.lower() for caption in captions):
        return fingerprint
    return {**fingerprint, "tokenizer": _LOWER_CASE}


def knew_capitals(fingerprint: Mapping[str, Any]) -> bool:
    """Whether a fingerprint is of `tiny` from before it took words in lower case."""
    return fingerprint.get("tokenizer") == _WITH_CAPITALS


def check_capitals(fingerprint: Mapping[str, Any], captions: Callable[[], Iterable[str]], where: str, *next_steps: str) -> None:
    """Refuse captions with capitals that `tiny` encoded when it still told them apart: prompts would have other vectors.

    `captions` gives them, and is asked only where it matters: there may be millions.

    Raises:
        SanaError: there is one; names it.
    """
    if knew_capitals(fingerprint) and (odd := next((text for text in captions() if text != text.lower()), None)) is not None:
        raise SanaError(
            f"{where} was embedded when capitals made other words, as in {odd!r:.60}; they make none now", *next_steps
        )


def text_config(fingerprint: Mapping[str, Any], encoder: str | None = None) -> TextConfig:
    """The settings that a fingerprint records; `encoder` says where its model lies when the name alone does not."""
    keys = ("revision", "dtype", "max_length", "instruction", "template", "lowercase")
    settings = _FORMERLY | dict(fingerprint)
    return TextConfig(encoder=encoder or settings["encoder"], **{key: settings[key] for key in keys})


# --- tokenizing -------------------------------------------------------------------------------------------------------


_WORD = re.compile(r"[\d\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\S")


def words_of(text: str) -> Iterator[str]:
    """Words, single digits, single CJK characters and signs, in lower case. White space only parts them."""
    return (word[0].lower() for word in _WORD.finditer(text))


def unseen_words(prompts: Iterable[str], known: Collection[str] | None) -> list[str]:
    """The words of prompts that are not among the `known`, in order; none where these are not known."""
    if known is None:
        return []
    return list(dict.fromkeys(word for prompt in prompts for word in words_of(prompt) if word not in known))


class WordTokenizer:
    """The words of a caption (`words_of`), after a beginning-of-sequence token.

    There is no vocabulary: the id of a word is 63 bits of its hash. Ids 0 and 1 are padding and the beginning.
    """

    pad_id, bos_id = 0, 1

    def __call__(self, text: str, max_length: int) -> list[int]:
        """Token ids of a caption, the first `max_length`."""
        return [self.bos_id, *map(self._id, itertools.islice(words_of(text), max_length - 1))]

    def length(self, text: str) -> int:
        """How many tokens a caption has, uncut."""
        return 1 + sum(1 for _ in words_of(text))

    @staticmethod
    def _id(word: str) -> int:
        digest = hashlib.sha256(word.encode("utf-8", errors="surrogatepass")).digest()
        return max(2, int.from_bytes(digest[:8], "little") >> 1)


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer's ids with its own special tokens, or its chat template, which brings its own."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.pad_id = tokenizer.pad_token_id or 0
        if template != "none" and not tokenizer.chat_template:
            raise SanaError(
                "text.template: this encoder's tokenizer has no chat template", "use text.template: none", exit_code=2
            )

    def __call__(self, text: str, max_length: int) -> list[int]:
        """Token ids of a caption, special tokens once; what is cut is text, not the special token at the end."""
        text = text.encode("utf-8", errors="replace").decode()  # tokenizers take no lone surrogates, which names can have
        if self.template != "none" and text:
            message = [{"role": "user", "content": text}]
            if self.template == "lesson":  # tokenised again as text, which puts a second beginning before the template's
                text = self.tokenizer.apply_chat_template(message, tokenize=False)
                return list(self.tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
            return list(self.tokenizer.apply_chat_template(message, tokenize=True, return_dict=False))[:max_length]
        ids = list(self.tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
        if not ids:  # a tokenizer without special tokens has nothing for the null caption
            special = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.pad_id]
            ids = [next(token for token in special if token is not None)]
        return ids

    def length(self, text: str) -> int:
        """How many tokens a caption has, uncut. Tokenizers warn of more than their own limit; nothing goes through a model."""
        before = self.tokenizer.model_max_length
        self.tokenizer.model_max_length = UNLIMITED
        try:
            return len(self(text, UNLIMITED))
        finally:
            self.tokenizer.model_max_length = before


# --- encoding ---------------------------------------------------------------------------------------------------------


@dataclass
class CaptionEncoder:
    """A model, its tokenizer and the settings they run with. `fingerprint` says whether two would give the same states."""

    model: nn.Module
    tokenizer: WordTokenizer | HuggingFaceTokenizer
    text: TextConfig
    fingerprint: dict[str, Any]
    device: torch.device

    @property
    def dim(self) -> int:
        """Width of a caption state."""
        config: Any = self.model.config
        return int(getattr(config, "hidden_size", 0) or config.d_model)

    def token_ids(self, caption: str, instruct: bool = True) -> tuple[list[int], int]:
        """Token ids, and how many of them after the first are instruction, whose states are dropped.

        With an instruction this is the paper's select-index rule (NVlabs/Sana and diffusers `pipeline_sana.py`): of the
        first n + max_length - 2 tokens, where the instruction has n, keep the first and those from n - 1 on. The null
        caption never has one, nor do negative prompts (`instruct` false).
        """
        instruction, limit = self.text.instruction, self.text.max_length
        if self.text.lowercase:
            caption = caption.lower().strip()
        if instruction is None or not caption or not instruct:
            return self.tokenizer(caption, limit), 0
        tokens = len(self.tokenizer(instruction, MAX_INSTRUCTION))
        return self.tokenizer(instruction + caption, tokens + limit - 2), max(tokens - 2, 0)

    def is_cut(self, caption: str, instruct: bool = True, tokens: tuple[list[int], int] | None = None) -> bool:
        """Whether a caption has more tokens than `text.max_length` lets through, so that its end is not seen.

        `tokens` is its `token_ids`, where they are known.
        """
        ids, dropped = tokens or self.token_ids(caption, instruct)
        if len(ids) - dropped < self.text.max_length:
            return False  # the usual case, without a second look
        if self.text.lowercase:
            caption = caption.lower().strip()
        instructed = instruct and caption and self.text.instruction
        return self.tokenizer.length(f"{self.text.instruction}{caption}" if instructed else caption) > len(ids)

    def encode(
        self, captions: Iterable[str], dtype: torch.dtype = torch.bfloat16, instruct: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Each distinct caption once, with its states (tokens, D) on the CPU, shortest first, padding removed.

        They are bf16 wherever datasets are concerned, so also where a model trained on one is sampled.

        Raises:
            SanaError: a state is not finite; names the caption.
        """
        yield from self.encode_tokens(self.tokenize(captions, instruct), dtype)

    def tokenize(self, captions: Iterable[str], instruct: bool = True) -> dict[str, tuple[list[int], int]]:
        """`token_ids` of each distinct caption, in order of first appearance."""
        return {caption: self.token_ids(caption, instruct) for caption in dict.fromkeys(captions)}

    @torch.inference_mode()
    def encode_tokens(
        self, tokens: Mapping[str, tuple[list[int], int]], dtype: torch.dtype = torch.bfloat16
    ) -> Iterator[tuple[str, Tensor]]:
        """`encode`, for captions whose tokens are known."""
        order = sorted(tokens, key=lambda caption: len(tokens[caption][0]))
        for batch in _batches(order, [len(tokens[caption][0]) for caption in order]):
            ids = [tokens[caption][0] for caption in batch]
            longest = max(map(len, ids))
            padded = torch.tensor([row + [self.tokenizer.pad_id] * (longest - len(row)) for row in ids])  # (B, T)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])  # right padding
            states = self.model(input_ids=padded.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
            states = states.to("cpu", dtype)  # (B, T, D)
            for caption, row, all_states in zip(batch, ids, states, strict=True):
                dropped = tokens[caption][1]
                kept = torch.cat([all_states[:1], all_states[1 + dropped : len(row)]])
                if not kept.isfinite().all():
                    raise SanaError(
                        f"the encoder {self.fingerprint['encoder']} gave a state that is not finite for caption {caption!r:.200}",
                        "use text.dtype: fp32, or another encoder",
                    )
                yield caption, kept.clone()


def _batches(items: Sequence[str], lengths: Sequence[int]) -> Iterator[list[str]]:
    """Runs of items whose padded tokens fit the budget; lengths do not fall."""
    start = 0
    for end in range(1, len(items) + 1):
        if end == len(items) or lengths[end] * (end + 1 - start) > TOKENS_PER_BATCH:
            yield list(items[start:end])
            start = end


def pad_states(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """States of several captions, (tokens_i, D) each, to (B, T, D) and their mask (B, T), padded to the longest."""
    lengths = torch.tensor([len(state) for state in states])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return nn.utils.rnn.pad_sequence(list(states), batch_first=True), mask


# --- loading ----------------------------------------------------------------------------------------------------------


def load_encoder(text: TextConfig, device: torch.device) -> CaptionEncoder:
    """The encoder that `text` names, on `device`.

    Raises:
        SanaError: it cannot be had (gated, missing, offline, not a text encoder), with the ways out.
    """
    name = text.dtype if text.dtype != "auto" else ("fp32" if device.type == "cpu" else "bf16")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    model: nn.Module
    tokenizer: WordTokenizer | HuggingFaceTokenizer
    if text.encoder == "tiny":
        if text.template != "none":
            raise SanaError("text.template: the tiny encoder has no chat template", "use text.template: none", exit_code=2)
        model, tokenizer, vocabulary = WordVectors(), WordTokenizer(), "words in lower case"
    else:
        model, hf_tokenizer = _from_hugging_face(text.encoder, text.revision, dtype)
        tokenizer = HuggingFaceTokenizer(hf_tokenizer, text.template)
        vocabulary = json.dumps([type(hf_tokenizer).__name__, sorted(hf_tokenizer.get_vocab().items())])
    fingerprint = {
        "version": FINGERPRINT_VERSION,
        "encoder": hub.model_name(text.encoder),
        "revision": text.revision,
        "architecture": type(model).__name__,
        "weights": f"tiny {TINY_VERSION}" if text.encoder == "tiny" else hub.hash_weights(model),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "dtype": name,
        "max_length": text.max_length,
        "instruction": text.instruction,
        "template": text.template,
        "lowercase": text.lowercase,
    }
    model.requires_grad_(False).eval().to(device)
    return CaptionEncoder(model, tokenizer, text, fingerprint, device)


class WordVectors(nn.Module):
    """The `tiny` encoder: a fixed random vector for each word, and a fainter one for its place.

    It knows no language, but tells captions apart, and gives a word the same vector wherever it stands but for the place. A
    model learns from such vectors faster than from a random transformer's states, in which all that went before a word mixes
    with it. Vectors are uniform numbers read off SHAKE-256, so neither torch nor numpy can change them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=TINY_DIM)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Token ids and mask (B, T) to an object with `last_hidden_state` (B, T, D), of mean square 1."""
        places = torch.stack([_shake(f"place {i}") for i in range(input_ids.shape[1])])  # (T, D)
        words = {i: _shake(f"word {i}") for i in input_ids[attention_mask.bool()].unique().tolist()} | {0: torch.zeros(TINY_DIM)}
        states = torch.stack([torch.stack([words[i] for i in row]) for row in (input_ids * attention_mask).tolist()])
        states = (states + TINY_PLACE * places) / (1 + TINY_PLACE**2) ** 0.5
        return SimpleNamespace(last_hidden_state=states.to(input_ids.device))


@lru_cache(maxsize=65536)
def _shake(name: str) -> Tensor:
    """Uniform numbers (D,) of mean 0 and variance 1 that depend on `name` alone."""
    raw = hashlib.shake_256(f"sana tiny encoder {TINY_VERSION}: {name}".encode()).digest(2 * TINY_DIM)
    integers = torch.frombuffer(bytearray(raw), dtype=torch.uint16).to(torch.float32)
    return ((integers + 0.5) / 32768 - 1) * 3**0.5


def _from_hugging_face(encoder: str, revision: str | None, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Model and tokenizer by id or from a folder: of their own, or the two sub-folders of a diffusers pipeline."""
    folder = hub.local_folder(encoder, "text.encoder")
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of reading weights, which takes a moment; downloads show theirs
    model_place = tokenizer_place = encoder if folder is None else str(folder)
    if folder is not None and (folder / "text_encoder").is_dir():
        model_place, tokenizer_place = str(folder / "text_encoder"), str(folder / "tokenizer")

    def load(local_files_only: bool) -> tuple[nn.Module, Any]:
        common: dict[str, Any] = {
            "revision": revision or "main", "local_files_only": local_files_only, "trust_remote_code": False
        }  # fmt: skip
        config = AutoConfig.from_pretrained(model_place, **common)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_place, **common)
        tokenizer.padding_side = "right"
        loader = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel  # T5 without its decoder
        model, info = loader.from_pretrained(
            model_place, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **common
        )
        hub.check_whole("text.encoder", encoder, info, unused=("pooler",))  # we read the last hidden state
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        return model, tokenizer

    others = ["or another encoder: --set text.encoder=tiny needs no download; T5, BERT and ModernBERT models are not gated"]
    if "gemma-2" in encoder.lower() and encoder != UNGATED_GEMMA:
        others = [f"or the ungated copy: --set text.encoder={UNGATED_GEMMA}", *others]
    return hub.load("text.encoder", encoder, load, folder is not None, "text encoder", "text.revision", others)
