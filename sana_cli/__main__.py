"""`python -m sana_cli`, which torchrun needs, is `sana`."""

from sana_cli.cli import app

if __name__ == "__main__":
    app(prog_name="sana")
