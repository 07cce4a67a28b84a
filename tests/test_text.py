"""Caption encoders against transformers: states equal the model's for that caption alone."""

import hashlib
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_cli import text
from sana_cli.config.keys import TextConfig
from sana_cli.errors import SanaError

CPU = torch.device("cpu")
CAPTIONS = ["4", "two", "a much longer caption, with commas", "", "été 🎈"]


def encode(encoder: text.CaptionEncoder, captions: list[str]) -> dict[str, Tensor]:
    return dict(encoder.encode(captions))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, gemma: Path) -> dict[str, Path]:
    """Random models of each family, with Gemma's tokenizer files."""
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertModel,
        ModernBertConfig,
        ModernBertModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    tokenizer = AutoTokenizer.from_pretrained(gemma)
    words, folder = len(tokenizer), tmp_path_factory.mktemp("families")
    torch.manual_seed(0)
    made = {
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=words, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=0)
        ),
        "bert": BertModel(BertConfig(vocab_size=words, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64)),
        "modernbert": ModernBertModel(
            ModernBertConfig(
                vocab_size=words, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=64,
                pad_token_id=0, bos_token_id=2, eos_token_id=1, cls_token_id=2, sep_token_id=1,
            )
        ),
    }  # fmt: skip
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in made} | {"gemma": gemma}


@pytest.mark.parametrize("family", ["gemma", "t5", "bert", "modernbert"])
def test_states_are_those_of_transformers_for_each_caption_alone(
    models: dict[str, Path], family: str
) -> None:
    from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer

    encoder = text.load_encoder(TextConfig(encoder=str(models[family])), CPU)
    found = encode(encoder, CAPTIONS)
    loader: Any = AutoModelForTextEncoding if family == "t5" else AutoModel
    reference = loader.from_pretrained(models[family]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[family])
    assert list(found) == sorted(CAPTIONS, key=lambda caption: len(tokenizer(caption)["input_ids"]))
    for caption in CAPTIONS:
        with torch.no_grad():
            expected = reference(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        assert found[caption].dtype == torch.bfloat16
        assert found[caption].shape == expected.shape
        # one rounding to bf16 (8 bits), and float32's rounding between a batch and one caption
        assert torch.allclose(found[caption].float(), expected, rtol=2**-8, atol=1e-4), caption
    assert encoder.dim == 32


@pytest.mark.parametrize("family", ["gemma", "t5", "bert", "modernbert"])
def test_a_layers_states_are_the_hidden_states_of_transformers_after_its_final_norm(
    models: dict[str, Path], family: str
) -> None:
    from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer

    encoder = text.load_encoder(TextConfig(encoder=str(models[family]), layer=1), CPU)
    found = dict(encoder.encode(CAPTIONS, torch.float32))
    loader: Any = AutoModelForTextEncoding if family == "t5" else AutoModel
    reference = loader.from_pretrained(models[family]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[family])
    norms = {"gemma": "norm", "t5": "encoder.final_layer_norm", "modernbert": "final_norm"}
    norm = reference.get_submodule(norms[family]) if family in norms else torch.nn.Identity()
    for caption in CAPTIONS:
        with torch.no_grad():
            given = tokenizer(caption, return_tensors="pt")
            whole = reference(**given, output_hidden_states=True)
            expected = norm(whole.hidden_states[1])[0]
        assert torch.allclose(found[caption], expected, rtol=1e-4, atol=1e-4), caption
        assert not torch.allclose(expected, whole.last_hidden_state[0], atol=1e-3)
    assert encoder.fingerprint["layer"] == 1
    whole_one = text.load_encoder(TextConfig(encoder=str(models[family])), CPU)
    assert encoder.fingerprint["weights"] != whole_one.fingerprint["weights"]


@pytest.mark.parametrize(("family", "warned"), [("gemma", True), ("t5", False), ("bert", False)])
def test_a_decoder_without_a_first_token_is_warned_of(
    models: dict[str, Path], family: str, warned: bool, tmp_path: Path
) -> None:
    folder = shutil.copytree(models[family], tmp_path / family)
    encoder = text.load_encoder(TextConfig(encoder=str(folder)), CPU)
    assert encoder.warnings() == (), "its tokenizer puts <bos> first"

    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    tokenizer["post_processor"] = None
    file.write_text(json.dumps(tokenizer), "utf-8")
    encoder = text.load_encoder(TextConfig(encoder=str(folder)), CPU)
    assert isinstance(encoder.tokenizer, text.HuggingFaceTokenizer)
    assert encoder.tokenizer("two", 9) == encoder.tokenizer.tokenizer.convert_tokens_to_ids(list("two"))
    assert ["reads from left to right" in warning for warning in encoder.warnings()] == [True] * warned
    for mended in (TextConfig(instruction="Picture: "), TextConfig(template="chat")):
        encoder = text.load_encoder(mended.model_copy(update={"encoder": str(folder)}), CPU)
        assert encoder.warnings() == (), mended
    assert text.load_encoder(TextConfig(), CPU).warnings() == ()


def test_a_layer_that_is_not_there_is_refused(gemma: Path) -> None:
    with pytest.raises(SanaError, match=r"text\.layer: .* has \d+ layers\ngive fewer, or null"):
        text.load_encoder(TextConfig(encoder=str(gemma), layer=99), CPU)
    with pytest.raises(SanaError, match="tiny encoder has no layers"):
        text.load_encoder(TextConfig(layer=1), CPU)


def test_a_dataset_of_another_layer_is_refused() -> None:
    recorded = text.config_fingerprint(TextConfig(layer=6))
    with pytest.raises(SanaError, match=r"text\.layer: it has 6, not None"):
        text.check_same_encoder(recorded, text.config_fingerprint(TextConfig()), "it")
    old = {key: value for key, value in recorded.items() if key != "layer"}
    text.check_same_encoder(old, text.config_fingerprint(TextConfig()), "it")  # from before there were layers
    assert text.text_config(recorded | {"dtype": "fp32"}).layer == 6


def test_each_distinct_caption_goes_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = text.load_encoder(TextConfig(), CPU)
    rows = 0
    forward = encoder.model.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal rows
        rows += len(named["input_ids"])
        return forward(*arguments, **named)

    monkeypatch.setattr(encoder.model, "forward", counted)
    assert len(encode(encoder, ["4", "two", "4", "4", "two"])) == 2
    assert rows == 2


def test_batches_keep_to_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = text.load_encoder(TextConfig(), CPU)
    captions = ["x " * n for n in (1, 30, 2, 9, 17, 3)]
    together = encode(encoder, captions)
    monkeypatch.setattr(text, "TOKENS_PER_BATCH", 20)
    apart = encode(encoder, captions)
    for caption in captions:
        assert torch.allclose(together[caption].float(), apart[caption].float(), atol=0.02)


def test_tiny_is_the_same_everywhere() -> None:
    """Its vectors by hand: SHAKE-256 of the word's hash and of its position."""

    def numbers(name: str) -> Tensor:
        raw = hashlib.shake_256(f"sana tiny encoder 2: {name}".encode()).digest(256)
        return torch.tensor(
            [
                ((int.from_bytes(raw[i : i + 2], "little") + 0.5) / 32768 - 1) * 3**0.5
                for i in range(0, 256, 2)
            ]
        )

    def number(word: str) -> int:
        return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little") >> 1

    word = number("four")
    expected = torch.stack(
        [numbers("word 1") + 0.25 * numbers("place 0"), numbers(f"word {word}") + 0.25 * numbers("place 1")]
    )
    found = encode(text.load_encoder(TextConfig(), CPU), ["four", "a much longer one beside it"])["four"]
    assert torch.equal(found, (expected / (1 + 0.25**2) ** 0.5).bfloat16())
    red, old, cup = map(number, ("red", "old", "cup"))  # each knows the words beside it, not the beginning
    by_hand = [
        (numbers("word 1") + 0.25 * numbers("place 0")) / (1 + 0.25**2) ** 0.5,
        (numbers(f"word {red}") + 0.25 * numbers("place 1") + 0.5 * numbers(f"before {old}"))
        / (1 + 0.25**2 + 0.5**2) ** 0.5,
        (
            numbers(f"word {old}")
            + 0.25 * numbers("place 2")
            + 0.5 * (numbers(f"after {red}") + numbers(f"before {cup}"))
        )
        / (1 + 0.25**2 + 2 * 0.5**2) ** 0.5,
        (numbers(f"word {cup}") + 0.25 * numbers("place 3") + 0.5 * numbers(f"after {old}"))
        / (1 + 0.25**2 + 0.5**2) ** 0.5,
    ]
    states = encode(text.load_encoder(TextConfig(), CPU), ["Red old cup", "and a longer one, padded"])
    assert torch.allclose(states["Red old cup"].float(), torch.stack(by_hand), atol=2**-8, rtol=2**-8)
    draws = torch.stack([text._shake(f"word {n}") for n in range(1000)])
    assert float(draws.mean()) == pytest.approx(0, abs=0.01)
    assert float(draws.std()) == pytest.approx(1, abs=0.01)


def test_tiny_tells_captions_apart() -> None:
    captions = [
        "4",
        "four",
        "forty",
        "four.",
        "six",
        "a red cup on a blue table",
        "a blue cup on a red table",
        "四十",
        "4 2",
    ]
    states = encode(text.load_encoder(TextConfig(), CPU), captions)
    assert [len(states[caption]) for caption in captions] == [2, 2, 2, 3, 2, 8, 8, 3, 3]
    # without order, as in attention
    means = torch.stack([states[caption].float().relu().mean(0) for caption in captions])
    distance = torch.cdist(means, means) / 128**0.5 + 9 * torch.eye(len(captions))
    assert float(distance.min()) > 0.01  # sizes are 1, so far above bf16's rounding
    # white space separates words
    assert torch.equal(states["4"], encode(text.load_encoder(TextConfig(), CPU), [" 4  "])[" 4  "])


def test_instruction_follows_the_select_index_rule(gemma: Path) -> None:
    """`instruction + caption` is cut to n + max_length - 2 tokens.

    The first state and the last max_length - 1 are kept.
    """
    from transformers import AutoModel, AutoTokenizer

    instruction, caption, limit = "Write well.\nUser Prompt: ", "a red cup and a very long tail of words", 12
    encoder = text.load_encoder(
        TextConfig(encoder=str(gemma), instruction=instruction, max_length=limit), CPU
    )
    tokenizer, model = AutoTokenizer.from_pretrained(gemma), AutoModel.from_pretrained(gemma).eval()
    instruction_tokens = len(tokenizer.encode(instruction))
    for words in (caption, "cat"):
        padded = tokenizer(
            instruction + words,
            padding="max_length",
            max_length=instruction_tokens + limit - 2,
            truncation=True,
            return_tensors="pt",
        )
        assert tokenizer.padding_side == "right"
        with torch.no_grad():
            states = model(**padded).last_hidden_state[0]
        select = [0, *range(-limit + 1, 0)]
        expected = states[select][padded["attention_mask"][0][select].bool()]
        found = encode(encoder, [words])[words]
        assert found.shape == expected.shape
        assert torch.allclose(found.float(), expected, rtol=2**-8, atol=1e-4)
    assert len(encode(encoder, [""])[""]) == 1  # the null caption has no instruction


def test_chat_template_has_one_beginning(gemma: Path) -> None:
    encoder = text.load_encoder(TextConfig(encoder=str(gemma), template="chat"), CPU)
    ids, dropped = encoder.token_ids("cat")
    assert (ids.count(2), dropped) == (1, 0)
    assert len(ids) == 1 + len("<user>cat")
    with pytest.raises(SanaError, match="tiny encoder has no chat template"):
        text.load_encoder(TextConfig(template="chat"), CPU)


def test_captions_are_cut_at_max_length(gemma: Path) -> None:
    encoder = text.load_encoder(TextConfig(encoder=str(gemma), max_length=5), CPU)
    long = encode(encoder, ["abcdefghij"])["abcdefghij"]
    assert torch.equal(long, encode(encoder, ["abcd"])["abcd"])


def test_cutting_keeps_the_special_token_at_the_end(models: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from tokenizers import processors
    from transformers import AutoTokenizer

    shutil.copytree(models["bert"], tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(models["bert"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer.save_pretrained(tmp_path / "bert")
    encoder = text.load_encoder(TextConfig(encoder=str(tmp_path / "bert"), max_length=5), CPU)
    ids, _ = encoder.token_ids("abcdefghij")
    assert ids == [2, *tokenizer.convert_tokens_to_ids(["a", "b", "c"]), 1]


def test_states_that_are_not_finite_name_the_caption(gemma: Path) -> None:
    encoder = text.load_encoder(TextConfig(encoder=str(gemma)), CPU)
    with torch.no_grad():
        encoder.model.get_parameter("norm.weight")[0] = float("nan")
    with pytest.raises(SanaError, match=r"not finite for caption 'cat'\nuse text.dtype: fp32"):
        encode(encoder, ["cat"])


def test_fingerprint_is_of_the_weights_not_of_the_path(gemma: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(gemma, tmp_path / "elsewhere")
    first, second = (
        text.load_encoder(TextConfig(encoder=str(path)), CPU).fingerprint
        for path in (gemma, tmp_path / "elsewhere")
    )
    text.check_same_encoder(first, second, "there")
    assert str(gemma) not in str(first)
    tiny = text.load_encoder(TextConfig(), CPU).fingerprint
    with pytest.raises(SanaError, match="text.weights: there has"):
        text.check_same_encoder(first, tiny, "there")
    shorter = text.load_encoder(TextConfig(encoder=str(gemma), max_length=7), CPU).fingerprint
    with pytest.raises(SanaError, match=r"^text\.max_length: there has 300, not 7$"):
        text.check_same_encoder(first, shorter, "there")


# --- what is not available ----------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The hub answers with `error`, as transformers wraps it; nothing is cached."""
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers import AutoConfig

    def refuse(*_: object, local_files_only: bool = False, **__: object) -> None:
        cause = LocalEntryNotFoundError("not cached") if local_files_only else error
        raise OSError("We couldn't load it") from cause

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def response(status: int) -> Any:
    from huggingface_hub import errors

    http = importlib.import_module(
        errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]
    )  # httpx or httpx2, depending on its version
    return http.Response(status, request=http.Request("GET", "https://huggingface.co/x"))


def test_gated_models_name_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    failing(monkeypatch, GatedRepoError("gated", response=response(401)))
    with pytest.raises(SanaError) as caught:
        text.load_encoder(TextConfig(encoder="google/gemma-2-2b-it"), CPU)
    assert str(caught.value).splitlines() == [
        "text.encoder: google/gemma-2-2b-it is gated: https://huggingface.co/google/gemma-2-2b-it",
        "accept the licence there, then `hf auth login`, or set HF_TOKEN",
        "or the ungated copy: --set text.encoder=Efficient-Large-Model/gemma-2-2b-it",
        "or another encoder: --set text.encoder=tiny needs no download; T5, BERT and ModernBERT models are not gated",
    ]
    failing(monkeypatch, GatedRepoError("gated", response=response(403)))
    with pytest.raises(SanaError, match="your token is valid but has no access yet"):
        text.load_encoder(TextConfig(encoder="google/gemma-2-2b-it"), CPU)


def test_missing_and_offline_models_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    failing(monkeypatch, RepositoryNotFoundError("none", response=response(404)))
    with pytest.raises(SanaError, match="there is no no/such on Hugging Face, or it is private"):
        text.load_encoder(TextConfig(encoder="no/such"), CPU)
    failing(monkeypatch, RevisionNotFoundError("none", response=response(404)))
    with pytest.raises(SanaError, match="text.revision: no/such has no such branch, tag or commit"):
        text.load_encoder(TextConfig(encoder="no/such", revision="x"), CPU)
    failing(monkeypatch, LocalEntryNotFoundError("no connection"))
    with pytest.raises(SanaError, match="not in the local cache, and Hugging Face cannot be reached"):
        text.load_encoder(TextConfig(encoder="no/such"), CPU)
    with pytest.raises(SanaError, match=r"text.encoder: no folder \./nowhere"):
        text.load_encoder(TextConfig(encoder="./nowhere"), CPU)
    monkeypatch.undo()
    with pytest.raises(SanaError, match="is not a text encoder that can be loaded"):
        text.load_encoder(TextConfig(encoder=str(tmp_path)), CPU)


def test_the_lessons_template_begins_twice(gemma: Path) -> None:
    """Unlike the paper's code, it tokenises its chat template again, with special tokens."""
    once, twice = (
        text.load_encoder(TextConfig(encoder=str(gemma), template=name), CPU).token_ids("four")[0]
        for name in ("chat", "lesson")
    )
    beginning = once[0]
    assert once.count(beginning) == 1
    assert twice[:2] == [beginning, beginning]
    assert twice[1:] == once
    plain, null = (
        text.load_encoder(TextConfig(encoder=str(gemma), template=name), CPU).token_ids("")[0]
        for name in ("none", "lesson")
    )
    assert null == plain


def test_lone_surrogates_are_encoded(gemma: Path) -> None:
    """File names need not be text, and captions can come from them."""
    for encoder in ("tiny", str(gemma)):
        ((_, states),) = text.load_encoder(TextConfig(encoder=encoder), CPU).encode(["a\udcff"])
        assert states.isfinite().all()


# --- words --------------------------------------------------------------------------------------------------


def test_words_that_differ_only_by_case_are_one_and_lower_case_ones_keep_their_vectors() -> None:
    import hashlib

    states = encode(
        text.load_encoder(TextConfig(), CPU), ["four", "FOUR", "Four", "ÉTÉ", "été", "straße", "ΟΔΟΣ", "οδος"]
    )
    assert torch.equal(states["four"], states["FOUR"])
    assert torch.equal(states["four"], states["Four"])
    assert torch.equal(states["ÉTÉ"], states["été"])
    assert torch.equal(states["ΟΔΟΣ"], states["οδος"])
    for word in ("four", "straße"):  # ids hash the word as written, so trained models stay valid
        written = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little") >> 1
        assert text.WordTokenizer()(word, 9) == [text.WordTokenizer.bos_id, written]


def test_unseen_words_are_those_that_no_caption_has() -> None:
    known = {"a", "red", "cube", "4"}
    assert text.unseen_words(["A red CUBE", "a blue ball, red", "44"], known) == ["blue", "ball", ","]
    assert text.unseen_words(["anything"], None) == [], "no warning from a checkpoint without a word list"
    assert list(text.words_of("a red-Cube, 12 四十!")) == [
        "a",
        "red",
        "-",
        "cube",
        ",",
        "1",
        "2",
        "四",
        "十",
        "!",
    ]


@pytest.mark.parametrize("instruction", [None, "Say more of it: "])
@pytest.mark.parametrize("kind", ["tiny", "gemma"])
def test_what_is_cut_is_known(kind: str, instruction: str | None, gemma: Path) -> None:
    """The longest caption that fits loses nothing; with one more token, its end is cut."""
    settings = TextConfig(
        encoder="tiny" if kind == "tiny" else str(gemma), max_length=8, instruction=instruction
    )
    encoder = text.load_encoder(settings, CPU)
    words = ["w"] * 12 if kind == "tiny" else []

    def caption(tokens: int) -> str:
        return " ".join(words[:tokens]) if kind == "tiny" else "w" * tokens

    room = next(
        n
        for n in range(1, 12)
        if len(encoder.token_ids(caption(n + 1))[0]) == len(encoder.token_ids(caption(n))[0])
    )
    assert [encoder.is_cut(caption(n)) for n in range(1, 12)] == [n > room for n in range(1, 12)]
    assert not encoder.is_cut("")
    known = encoder.token_ids(caption(11))
    assert encoder.is_cut(caption(11), tokens=known)
    assert encoder.is_cut("x" * 50 if kind == "gemma" else "x " * 50, instruct=False)
