"""The package tree: imports point down."""

import ast

from helpers import REPOSITORY

WINGS = (  # each may import the lines above it, and its own modules
    {"errors", "units", "choices", "buckets"},
    {"runtime"},
    {"config"},
    {"flow", "kernels", "trigflow"},
    {"model", "adapters"},
    {"sources", "text", "autoencoder"},
    {"dataset"},
    {"weights"},
    {"sampling"},
    {"training", "judging", "play"},
    {"commands", "console", "interrupts"},
    {"cli"},
    {"__main__"},
)


def test_the_tree_imports_downwards() -> None:
    """Commands do not import each other either: what two of them need is one level down."""
    level = {name: number for number, names in enumerate(WINGS) for name in names}
    package = REPOSITORY / "sana_cli"
    for path in package.rglob("*.py"):
        wing = path.relative_to(package).parts[0].removesuffix(".py")
        if wing == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("sana_cli"):
                continue
            parts = (node.module or "").split(".")[1:]
            for target in [parts[0]] if parts else [a.name for a in node.names if a.name != "__version__"]:
                inside = target == wing != "commands"
                assert inside or level[target] < level[wing], f"{path.relative_to(package)} imports {target}"
