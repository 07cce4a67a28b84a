"""Config files: found by path or name, read with `--set` overrides, all problems reported at once."""

import difflib
import os
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from sana_cli.config.document import Document, is_more_than_a_value, parse
from sana_cli.config.keys import Config, at_home
from sana_cli.config.renamed import RENAMED, in_new_names
from sana_cli.errors import SanaError, one_line
from sana_cli.runtime import textfile

MAX_CONFIG_BYTES = 1_000_000
DEFAULT_CONFIG = "quickstart"
RUN_CONFIG = "config.yaml"  # of a run directory


def _known_keys() -> list[str]:
    sections = Config.model_fields
    return [f"{s}.{key}" for s, f in sections.items() for key in f.annotation.model_fields]  # type: ignore[union-attr]


def _suggest(path: tuple[str, ...]) -> str:
    """The end of a message: the most similar key of the section, or a key of that name in any section."""
    dotted = ".".join(path)
    if len(path) == 1:
        close = difflib.get_close_matches(dotted, list(Config.model_fields), n=1)
        close = close or [key for key in _known_keys() if key.endswith(f".{dotted}")][:1]
    else:
        here = [key for key in (*_known_keys(), *RENAMED) if key.startswith(f"{path[0]}.")]
        close = difflib.get_close_matches(dotted, here, n=1, cutoff=0.75)
        close = close or [key for key in _known_keys() if key.rsplit(".", 1)[1] == path[-1]][:1]
    if not close:
        return "; `sana inspect CONFIG --yaml` prints every key there is"
    return f"; did you mean {RENAMED.get(close[0], close[0])}?"


def _problems(error: ValidationError, document: Document) -> Iterator[tuple[tuple[str, ...], str]]:
    """(key, message) for each error that pydantic found, in the words of a config file."""
    for detail in error.errors():
        path = tuple(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if not path:  # Config._consistent: each line begins with its key
            for line in message.splitlines():
                yield tuple(line.partition(":")[0].split(".")), line
            continue
        while path and path not in document.lines:  # pydantic adds union members and list indices
            path = path[:-1]
        dotted, value = ".".join(path), document.values
        for part in path:
            value = value[part]
        if dotted in RENAMED:
            yield path, f"{dotted} is called {RENAMED[dotted]} now"
        elif detail["type"] == "extra_forbidden":
            yield path, f"unknown key {dotted}{_suggest(path)}"
        elif detail["type"] == "model_type":
            yield path, f"{dotted} needs keys below it, not {value!r:.60}"
        else:
            message = (message[0].lower() + message[1:]).replace("input should be ", "must be ")
            yield path, f"{dotted} {message}" + ("" if "cannot be" in message else f", not {value!r:.60}")


def _line_of(path: tuple[str, ...], document: Document, name: str) -> str:
    """`file:line` of a key, or of the nearest section that has one."""
    while path and path not in document.lines:
        path = path[:-1]
    return document.lines.get(path, name)


def parse_config(
    text: str, name: str, overrides: Sequence[str] = (), recorded: bool = False, is_file: bool = True
) -> Config:
    """A config from YAML text; `overrides` are `a.b=value`, later ones win.

    Renamed keys are refused; with `recorded`, for text that sana wrote, they are read. Problems are
    reported with their line if it `is_file`.

    Raises:
        SanaError: exit code 2, with every problem on a line of its own, each with file and line.
    """
    document = parse(text, name)
    if recorded:
        document.values = in_new_names(document.values)
        for old, new in RENAMED.items():
            if (path := tuple(old.split("."))) in document.lines:
                document.lines[tuple(new.split("."))] = document.lines[path]
    if not is_file:
        document.lines.clear()
    for override in overrides:
        _apply(override, document)
    document.values = {
        key: value for key, value in document.values.items() if value is not None
    }  # an emptied section
    problems, wrong = list(document.problems), set[tuple[str, ...]]()
    while True:
        try:
            config = Config.model_validate(document.values)
        except ValidationError as error:
            found = list(_problems(error, document))
        else:
            found = []
        for path, message in found:
            if path not in wrong and not any(".".join(other) in message for other in wrong):
                problems.append(f"{_line_of(path, document, name)}: {message}")
        dropped = [path for path, _ in found if _drop(document.values, path)]
        wrong.update(path for path, _ in found)
        if not dropped:
            break
    if problems:
        raise SanaError(*map(one_line, dict.fromkeys(problems)), exit_code=2)
    return config


def _drop(values: dict[str, Any], path: tuple[str, ...]) -> bool:
    """Remove a wrong value, so that checks across keys still run on the others; False if it is not there."""
    for part in path[:-1]:
        values = values.get(part, {})
    return isinstance(values, dict) and values.pop(path[-1], path) is not path


def _apply(override: str, document: Document) -> None:
    key, equals, value = override.partition("=")
    path = tuple(key.strip().split("."))
    origin = f"--set {override}"
    if not equals or not all(path):
        document.problems.append(f"{origin}: expected section.key=value, for example --set optim.lr=1e-3")
        return
    try:
        parsed = _value(path, value)
    except (yaml.YAMLError, ValueError):
        document.problems.append(f"{origin}: {value!r} is not a YAML value")
        return
    target: Any = document.values
    for depth, part in enumerate(path[:-1]):
        if not isinstance(target.get(part), dict):
            target[part] = {}
        document.lines.setdefault(path[: depth + 1], origin)
        target = target[part]
    target[path[-1]] = parsed
    document.lines[path] = origin


def _value(path: tuple[str, ...], text: str) -> Any:
    """The value of `--set KEY=TEXT`: all of the text for a key that holds text, else a YAML value.

    Raises:
        ValueError: it is not one YAML value. A comment after it would be lost silently.
    """
    section = Config.model_fields.get(path[0])
    fields = getattr(section.annotation, "model_fields", {}) if section is not None and len(path) == 2 else {}
    kind = fields[path[1]].annotation if path[-1] in fields else None
    if _holds_text(kind):
        nullable = type(None) in get_args(kind)
        return None if nullable and text in ("null", "") else text
    document = parse(f"value: {text}", "")
    if document.problems or "\n" in text or is_more_than_a_value(text):
        raise ValueError(text)
    return document.values.get("value")


def _holds_text(kind: Any) -> bool:
    """Whether a key of this type holds a string, a path or null, and nothing else."""
    if get_origin(kind) is Annotated:
        return _holds_text(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return all(_holds_text(part) for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return all(isinstance(value, str) for value in get_args(kind))
    return kind in (str, Path)


def packaged_configs() -> Path:
    """The folder of the shipped configs: in the installed package, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """The path of a config: an existing file, else `configs/NAME.yaml` here, else the shipped one.

    Raises:
        SanaError: exit code 2, with the names of all configs.
    """
    given = Path(at_home(name))
    if os.path.exists(given) and not os.path.isdir(given):  # noqa: PTH110, PTH112 (they take any name, and pipes)
        return given
    if given.name == name:
        for folder in (Path("configs"), packaged_configs()):
            for candidate in (folder / f"{name}.yaml", folder / name):
                if candidate.is_file():
                    return candidate
    names = sorted(
        {path.stem for folder in (Path("configs"), packaged_configs()) for path in folder.glob("*.yaml")}
    )
    close = difflib.get_close_matches(given.stem, names, n=1)
    raise SanaError(
        f"no config {name!r}" + (f"; did you mean {close[0]}?" if close else ""),
        f"there are: {', '.join(names)}; or give the path of a YAML file",
        exit_code=2,
    )


def load_config(name: str | None, overrides: Sequence[str] = ()) -> Config:
    """The config of a path or name (`find_config`), with `--set` overrides. `None` is the default config."""
    path = find_config(name or DEFAULT_CONFIG)
    return parse_config(_read(path), str(path), overrides)


def load_run_config(run: Path) -> Config:
    """The config that a run recorded, which may be from before keys were renamed."""
    path = run / RUN_CONFIG
    return parse_config(_read(path), str(path), recorded=True)


def _read(path: Path) -> str:
    try:
        return textfile.read(path, MAX_CONFIG_BYTES)
    except OSError as error:
        raise SanaError(f"{path}: cannot be read: {error.strerror}", exit_code=2) from error
    except textfile.NotTextError as error:
        raise SanaError(
            f"{path}: cannot be read as UTF-8 text: {error}", "a config is a page of YAML", exit_code=2
        ) from error
