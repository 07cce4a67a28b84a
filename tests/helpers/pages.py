"""A few-step model, the page of `sana play` on a socket, and requests to it."""

import http.client
import io
import json
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from sana_cli.config.keys import Architecture
from sana_cli.model import build
from sana_cli.play import server
from sana_cli.play.studio import Message, PictureRequest
from sana_cli.play.worker import MOST_WAITING, Draw, Worker
from sana_cli.weights import configs

STUDENT = Architecture(
    in_channels=1, sample_size=32, patch_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=16,
    num_cross_attention_heads=2, cross_attention_head_dim=16, caption_channels=128, guidance_embeds=True,
)  # fmt: skip


def student(folder: Path) -> Path:
    """A random one-step model of pixels with guidance built in, for the tiny encoder."""
    model = build(STUDENT, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # weights for which caption, time and guidance all matter
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(configs.diffusers_config(STUDENT)))
    save_file(model.state_dict(), folder / configs.WEIGHTS)
    return folder


def request(**changes: Any) -> PictureRequest:
    """A request for one step, with some values changed."""
    return PictureRequest.parse(json.dumps(asked(**changes)).encode())


def asked(**changes: Any) -> dict[str, Any]:
    """The same as the page sends it."""
    return {"tab": "a", "prompt": "four", "seed": 3, "guidance_scale": 2.0, "steps": 1} | changes


def pixels(png: bytes) -> np.ndarray:
    """The pixels of a PNG."""
    with Image.open(io.BytesIO(png)) as image:
        return np.array(image)


@contextmanager
def served(draw: Draw, about: Any = None, host: str = "127.0.0.1", most: int = MOST_WAITING) -> Iterator[int]:
    """Serve drawings on a free port, which is yielded."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        worker = Worker(draw, most)
        with server.serving(server.make_app(about or {}, worker, host), listening), closing(worker):
            yield listening.getsockname()[1]


def fetched(
    port: int, path: str = "/", method: str = "GET", body: str | bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer. A header's name has _ for -."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def drawing(port: int, **changes: Any) -> list[Message]:
    """The messages that a request is answered with."""
    status, _, body = fetched(port, "/draw", "POST", json.dumps(asked(**changes)))
    assert status == 200, body
    return list(parsed(body))


def parsed(body: bytes) -> Iterator[Message]:
    """The messages of an answer."""
    while body:
        head, _, rest = body.partition(b"\n")
        facts = json.loads(head)
        kind, length = facts.pop("kind"), facts.pop("bytes")
        assert len(rest) >= length
        yield Message(kind, facts, rest[:length])
        body = rest[length:]
