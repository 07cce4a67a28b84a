"""Print constraints with the oldest version of each library that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path


def lowest() -> list[str]:
    """`name==version` of each dependency except torch, whose pin also chooses a build."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    ranges = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    found = (re.fullmatch(r"([\w.-]+)>=([\d.]+)(?:,<[\d.]+)?", one) for one in ranges)
    return sorted({f"{match[1]}=={match[2]}" for match in found if match and match[1] != "torch"})


if __name__ == "__main__":
    print("\n".join(lowest()))
