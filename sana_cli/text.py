"""Caption encoders: captions to caption states, the token features for cross-attention.

`tiny` is built in and needs no download. Any other encoder is a Hugging Face model, by id or
local path: causal decoders (Gemma 2 in the paper), T5 encoders, BERT, ModernBERT. `embed` and
`sample` both call `CaptionEncoder.encode`. This module does not know where captions come from
or where states go.

Shapes: B captions of a batch, T tokens of the longest, D the encoder's width.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli import kernels
from sana_cli.config.keys import TextConfig
from sana_cli.errors import SanaError
from sana_cli.runtime import hub
from sana_cli.runtime.device import frozen_dtype

FINGERPRINT_VERSION = 1
TINY_DIM = 128  # width of the built-in encoder's states
TINY_POSITION = 0.25  # size of a position's vector relative to a word's
TINY_NEIGHBOUR = 0.5  # size of the vectors that say which words are beside
TINY_VERSION = 3  # of its states; 1 was a random Gemma 2 on bytes, in 2 a word did not know its neighbours
MAX_INSTRUCTION = 4096  # tokens of an instruction
UNLIMITED = 10**9  # tokens: no accepted caption has as many bytes
TOKENS_PER_BATCH = 8192  # padded tokens that are encoded at once
UNGATED_GEMMA = "Efficient-Large-Model/gemma-2-2b-it"


# --- fingerprint ------------------------------------------------------------------------------


def config_fingerprint(text: TextConfig) -> dict[str, Any]:
    """The fields of a fingerprint that a config gives, without loading the encoder."""
    settings = {
        "encoder": hub.model_name(text.encoder),
        "revision": text.revision,
        "max_length": text.max_length,
        "instruction": text.instruction,
        "template": text.template,
        "lowercase": text.lowercase,
        **_layer(text),
    }
    return settings if text.dtype == "auto" else settings | {"dtype": text.dtype}


def _layer(text: TextConfig) -> dict[str, int]:
    """The layer, if there is one: without one a fingerprint is as it was before there were layers."""
    return {} if text.layer is None else {"layer": text.layer}


_OLD_DEFAULTS = {"lowercase": False, "layer": None}  # of fingerprints without these settings


def check_same_encoder(
    recorded: Mapping[str, Any], given: Mapping[str, Any], where: str, *next_steps: str
) -> None:
    """Refuse an encoder or settings that differ from `recorded` in a field of `given`.

    Raises:
        SanaError: naming each field that differs.
    """
    given = _OLD_DEFAULTS | dict(given)
    # weights identify an encoder, while its name may differ
    fields = [key for key in given if key != "encoder" or "weights" not in given]
    wrong = [key for key in fields if recorded.get(key, _OLD_DEFAULTS.get(key)) != given[key]]
    if wrong:
        differing = ((key, recorded.get(key), given[key]) for key in wrong)
        lines = [f"text.{key}: {where} has {old!r:.200}, not {new!r:.200}" for key, old, new in differing]
        raise SanaError(*lines, *next_steps)


def text_config(fingerprint: Mapping[str, Any], encoder: str | None = None) -> TextConfig:
    """The settings that a fingerprint records. `encoder` replaces the recorded model name."""
    keys = ("revision", "dtype", "max_length", "instruction", "template", "lowercase", "layer")
    settings = _OLD_DEFAULTS | dict(fingerprint)
    return TextConfig(encoder=encoder or settings["encoder"], **{key: settings[key] for key in keys})


# --- tokenizing -------------------------------------------------------------------------------

_WORD = re.compile(
    r"[\d\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\S"
)


def words_of(text: str) -> Iterator[str]:
    """Yield words, single digits, CJK characters and symbols, in lower case."""
    return (word[0].lower() for word in _WORD.finditer(text))


def unseen_words(prompts: Iterable[str], known: Collection[str] | None) -> list[str]:
    """List the words of prompts that are not `known`, in order; none if `known` is None."""
    if known is None:
        return []
    return list(dict.fromkeys(word for prompt in prompts for word in words_of(prompt) if word not in known))


class WordTokenizer:
    """A beginning-of-sequence token, then the words of a caption (`words_of`).

    There is no vocabulary: the id of a word is 63 bits of its hash. Id 0 is padding, 1 the
    beginning.
    """

    pad_id, bos_id = 0, 1

    def __call__(self, text: str, max_length: int) -> list[int]:
        """The first `max_length` token ids of a caption."""
        return [self.bos_id, *map(self._id, itertools.islice(words_of(text), max_length - 1))]

    def length(self, text: str) -> int:
        """Count the tokens of a whole caption."""
        return 1 + sum(1 for _ in words_of(text))

    @staticmethod
    @lru_cache(maxsize=65536)
    def _id(word: str) -> int:
        digest = hashlib.sha256(word.encode("utf-8", errors="surrogatepass")).digest()
        return max(2, int.from_bytes(digest[:8], "little") >> 1)


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer with its special tokens, or with its chat template."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.pad_id = tokenizer.pad_token_id or 0
        if template != "none" and not tokenizer.chat_template:
            raise SanaError(
                "text.template: this encoder's tokenizer has no chat template",
                "use text.template: none",
                exit_code=2,
            )

    def __call__(self, text: str, max_length: int) -> list[int]:
        """Token ids of a caption, special tokens once. The text is cut, not the last token."""
        text = text.encode("utf-8", errors="replace").decode()  # tokenizers refuse lone surrogates
        if self.template != "none" and text:
            message = [{"role": "user", "content": text}]
            if self.template == "lesson":  # tokenised as text: a second beginning-of-sequence token
                text = self.tokenizer.apply_chat_template(message, tokenize=False)
                return list(self.tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
            ids = list(self.tokenizer.apply_chat_template(message, tokenize=True, return_dict=False))
            return ids[:max_length]
        ids = list(self.tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
        if not ids:  # the null caption, and a tokenizer without special tokens
            special = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.pad_id]
            ids = [next(token for token in special if token is not None)]
        return ids

    def length(self, text: str) -> int:
        """Count the tokens of a whole caption, without the tokenizer's length warning."""
        before = self.tokenizer.model_max_length
        self.tokenizer.model_max_length = UNLIMITED
        try:
            return len(self(text, UNLIMITED))
        finally:
            self.tokenizer.model_max_length = before


# --- encoding ---------------------------------------------------------------------------------


@dataclass
class CaptionEncoder:
    """A model, its tokenizer and settings. Equal fingerprints give equal states."""

    model: nn.Module
    tokenizer: WordTokenizer | HuggingFaceTokenizer
    text: TextConfig
    device: torch.device
    vocabulary: str  # of the tokenizer, whatever tells it from others
    dtype: str  # fp32 or bf16

    @property
    def name(self) -> str:
        """What people and files call the encoder."""
        return hub.model_name(self.text.encoder)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What states depend on. The weights are hashed when it is first asked for, which takes seconds."""
        tiny = self.text.encoder == "tiny"
        return {
            "version": FINGERPRINT_VERSION,
            "encoder": self.name,
            "revision": self.text.revision,
            "architecture": type(self.model).__name__,
            "weights": f"tiny {TINY_VERSION}" if tiny else hub.hash_weights(self.model),
            "tokenizer": hashlib.sha256(self.vocabulary.encode()).hexdigest(),
            "dtype": self.dtype,
            "max_length": self.text.max_length,
            "instruction": self.text.instruction,
            "template": self.text.template,
            "lowercase": self.text.lowercase,
            **_layer(self.text),
        }

    @property
    def dim(self) -> int:
        """Width of a caption state."""
        config: Any = self.model.config
        return int(getattr(config, "hidden_size", 0) or config.d_model)

    def token_ids(self, caption: str, instruct: bool = True) -> tuple[list[int], int]:
        """Token ids, and how many after the first are instruction, whose states are dropped.

        With an instruction of n tokens this is the paper's select-index rule (NVlabs/Sana and
        diffusers `pipeline_sana.py`): of the first n + max_length - 2 tokens, keep the first
        and those from n - 1 on. The null caption and negative prompts (`instruct` false) have
        none.
        """
        instruction, limit = self.text.instruction, self.text.max_length
        if self.text.lowercase:
            caption = caption.lower().strip()
        if instruction is None or not caption or not instruct:
            return self.tokenizer(caption, limit), 0
        tokens = len(self.tokenizer(instruction, MAX_INSTRUCTION))
        return self.tokenizer(instruction + caption, tokens + limit - 2), max(tokens - 2, 0)

    def is_cut(
        self, caption: str, instruct: bool = True, tokens: tuple[list[int], int] | None = None
    ) -> bool:
        """Whether a caption exceeds `text.max_length` tokens, so that its end is cut.

        `tokens` is its `token_ids`, if known.
        """
        ids, dropped = tokens or self.token_ids(caption, instruct)
        if len(ids) - dropped < self.text.max_length:
            return False  # the usual case, without tokenising again
        if self.text.lowercase:
            caption = caption.lower().strip()
        instructed = instruct and caption and self.text.instruction
        whole = f"{self.text.instruction}{caption}" if instructed else caption
        return self.tokenizer.length(whole) > len(ids)

    @torch.inference_mode()
    def warnings(self) -> tuple[str, ...]:
        """What a person should know of this encoder before a model learns from its states.

        Of a trained model that reads from left to right, the first token's state says little of that token, because
        attention uses it to rest on (arXiv 2309.17453). So something must come before a caption. Whether the model
        reads so is tried out: then another second token does not change the first state.
        """
        if isinstance(self.tokenizer, WordTokenizer) or self.text.instruction or self.text.template != "none":
            return ()
        first, *rest = self.tokenizer("two words", UNLIMITED)
        if first in self.tokenizer.tokenizer.all_special_ids:
            return ()
        pairs = torch.tensor([[first, rest[-1] if rest else first], [first, self.tokenizer.pad_id]])
        one, other = self.model(input_ids=pairs.to(self.device)).last_hidden_state[:, 0]
        if not torch.equal(one, other):
            return ()
        return (
            f"{self.name} reads from left to right, and its tokenizer puts no token before a caption: "
            "its first state then says little of a caption's first word. To keep that word, put something before it: "
            "text.instruction, such as 'Picture: '",
        )

    def encode(
        self, captions: Iterable[str], dtype: torch.dtype = torch.bfloat16, instruct: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield each distinct caption and its states (tokens, D) on the CPU, shortest first.

        Padding is removed. Datasets store bf16, so sampling uses it too.

        Raises:
            SanaError: a state is not finite; names the caption.
        """
        yield from self.encode_tokens(self.tokenize(captions, instruct), dtype)

    def tokenize(self, captions: Iterable[str], instruct: bool = True) -> dict[str, tuple[list[int], int]]:
        """Map each distinct caption to its `token_ids`, in order of first appearance."""
        return {caption: self.token_ids(caption, instruct) for caption in dict.fromkeys(captions)}

    @torch.inference_mode()
    def encode_tokens(
        self, tokens: Mapping[str, tuple[list[int], int]], dtype: torch.dtype = torch.bfloat16
    ) -> Iterator[tuple[str, Tensor]]:
        """Like `encode`, for captions that are already tokenised."""
        order = sorted(tokens, key=lambda caption: len(tokens[caption][0]))
        for batch in _batches(order, [len(tokens[caption][0]) for caption in order]):
            ids = [tokens[caption][0] for caption in batch]
            longest = max(map(len, ids))
            pad = self.tokenizer.pad_id
            padded = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])  # (B, T), on the right
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
            encoded = self.model(input_ids=padded.to(self.device), attention_mask=mask.to(self.device))
            states = encoded.last_hidden_state.to("cpu", dtype)  # (B, T, D)
            whole = bool(states.isfinite().all())  # with padding and instruction; if not, each is looked at
            for caption, row, all_states in zip(batch, ids, states.unbind(), strict=True):
                dropped = tokens[caption][1]
                kept = all_states[: len(row)].clone()
                if dropped:
                    kept = torch.cat([kept[:1], kept[1 + dropped :]])
                if not whole and not kept.isfinite().all():
                    raise SanaError(
                        f"the encoder {self.name} gave a state that is not finite for caption {caption!r:.200}",
                        "use text.dtype: fp32, or another encoder",
                    )
                yield caption, kept


def _batches(items: Sequence[str], lengths: Sequence[int]) -> Iterator[list[str]]:
    """Split items, sorted by length, into batches of `TOKENS_PER_BATCH` padded tokens."""
    start = 0
    for end in range(1, len(items) + 1):
        if end == len(items) or lengths[end] * (end + 1 - start) > TOKENS_PER_BATCH:
            yield list(items[start:end])
            start = end


def pad_states(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad states (tokens_i, D) to (B, T, D). Also return their mask (B, T)."""
    lengths = torch.tensor([len(state) for state in states])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return nn.utils.rnn.pad_sequence(list(states), batch_first=True), mask


# --- loading ----------------------------------------------------------------------------------


def load_encoder(text: TextConfig, device: torch.device) -> CaptionEncoder:
    """Load the encoder that `text` names onto `device`.

    Raises:
        SanaError: it is gated, missing, offline or no text encoder; says what to do.
    """
    named = {"fp32": torch.float32, "bf16": torch.bfloat16}
    dtype = named.get(text.dtype) or frozen_dtype(device)
    name = next(name for name, known in named.items() if known == dtype)
    model: nn.Module
    tokenizer: WordTokenizer | HuggingFaceTokenizer
    if text.encoder == "tiny":
        if text.template != "none":
            what = "text.template: the tiny encoder has no chat template"
            raise SanaError(what, "use text.template: none", exit_code=2)
        if text.layer is not None:
            raise SanaError("text.layer: the tiny encoder has no layers", "use text.layer: null", exit_code=2)
        model, tokenizer, vocabulary = WordVectors(), WordTokenizer(), "words in lower case"
    else:
        model, hf_tokenizer = _from_hugging_face(text.encoder, text.revision, dtype)
        if text.layer is not None:
            _keep_layers(model, text.layer, text.encoder)
        tokenizer = HuggingFaceTokenizer(hf_tokenizer, text.template)
        vocabulary = json.dumps([type(hf_tokenizer).__name__, sorted(hf_tokenizer.get_vocab().items())])
    kernels.quick_products(model.requires_grad_(False).eval().to(device))
    return CaptionEncoder(model, tokenizer, text, device, vocabulary, name)


class WordVectors(nn.Module):
    """The `tiny` encoder: a fixed random vector per word, plus smaller ones of its neighbours and its place.

    It knows no language, but distinguishes captions. A word has nearly the same state in any of
    them, and says which word comes before and which after: "white" beside "horns" is another
    white than beside "monster". A model learns from it faster than from a random transformer,
    where all earlier words change a word's state. Vectors come from SHAKE-256, so no version of
    torch or numpy changes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=TINY_DIM)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Encode ids with mask (B, T): `last_hidden_state` is (B, T, D), of mean square 1."""
        ids = (input_ids * attention_mask).cpu()
        places = torch.stack([_shake(f"place {i}") for i in range(ids.shape[1])])  # (T, D)
        words = ids * (ids != WordTokenizer.bos_id)
        before = F.pad(words, (1, -1)) * (words != 0)  # the word before each word, 0 without one
        after = F.pad(words, (-1, 1)) * (words != 0)
        neighbours = _looked_up("after", before) + _looked_up("before", after)
        states = _looked_up("word", ids) + TINY_POSITION * places + TINY_NEIGHBOUR * neighbours
        count = (before != 0).double() + (after != 0).double()
        size = (1 + TINY_POSITION**2 + TINY_NEIGHBOUR**2 * count).sqrt()
        return SimpleNamespace(last_hidden_state=(states / size[..., None].float()).to(input_ids.device))


def _looked_up(role: str, ids: Tensor) -> Tensor:
    """The vector of each id (B, T) in a role: (B, T, D); zeros for 0."""
    known, places = ids.unique(return_inverse=True)
    vectors = [_shake(f"{role} {i}") if i else torch.zeros(TINY_DIM) for i in known.tolist()]
    return torch.stack(vectors)[places]


@lru_cache(maxsize=65536)
def _shake(name: str) -> Tensor:
    """Uniform numbers (D,) of mean 0 and variance 1 that depend on `name` alone."""
    # a word keeps the vector that it had in version 2: captions of one word are encoded as then
    raw = hashlib.shake_256(f"sana tiny encoder 2: {name}".encode()).digest(2 * TINY_DIM)
    integers = torch.frombuffer(bytearray(raw), dtype=torch.uint16).to(torch.float32)
    return ((integers + 0.5) / 32768 - 1) * 3**0.5


def _keep_layers(model: nn.Module, count: int, encoder: str) -> None:
    """Leave out all but the first `count` layers, in place. What follows them, such as a final norm, stays.

    Raises:
        SanaError: it has no more than that, or it does not show which modules are its layers.
    """
    config: Any = model.config
    there = getattr(config, "num_hidden_layers", None)
    if there is not None and count >= there:
        raise SanaError(
            f"text.layer: {encoder} has {there} layers", "give fewer, or null for all of them", exit_code=2
        )
    stacks = {
        name: child
        for name, child in model.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == there
    }
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(outer) != 1:
        raise SanaError(
            f"text.layer: {encoder} does not show which of its modules are its layers",
            "use text.layer: null",
        )
    parent, _, attribute = outer[0].rpartition(".")
    setattr(model.get_submodule(parent), attribute, stacks[outer[0]][:count])
    config.num_hidden_layers = count


def _from_hugging_face(encoder: str, revision: str | None, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Load model and tokenizer by id or from a folder, which may be a diffusers pipeline."""
    folder = hub.local_folder(encoder, "text.encoder")
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of reading weights; downloads keep theirs
    model_path = tokenizer_path = encoder if folder is None else str(folder)
    if folder is not None and (folder / "text_encoder").is_dir():
        model_path, tokenizer_path = str(folder / "text_encoder"), str(folder / "tokenizer")

    def load(local_files_only: bool) -> tuple[nn.Module, Any]:
        common: dict[str, Any] = {
            "revision": revision or "main",
            "local_files_only": local_files_only,
            "trust_remote_code": False,
        }
        config = AutoConfig.from_pretrained(model_path, **common)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, **common)
        tokenizer.padding_side = "right"
        # T5 without its decoder
        loader = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
        model, info = loader.from_pretrained(
            model_path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **common
        )
        # only the last hidden state is used
        hub.check_complete("text.encoder", encoder, info, unused=("pooler",))
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        return model, tokenizer

    others = [
        "or another encoder: --set text.encoder=tiny needs no download;"
        " T5, BERT and ModernBERT models are not gated"
    ]
    if "gemma-2" in encoder.lower() and encoder != UNGATED_GEMMA:
        others = [f"or the ungated copy: --set text.encoder={UNGATED_GEMMA}", *others]
    return hub.load(
        "text.encoder", encoder, load, folder is not None, "text encoder", "text.revision", others
    )
