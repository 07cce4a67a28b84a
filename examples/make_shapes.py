"""Draw `examples/shapes`, a Hugging Face imagefolder: coloured shapes with two captions each.

Run it as: python examples/make_shapes.py [FOLDER]
"""

import colorsys
import json
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, FINE = 32, 8  # pixels; drawn FINE times larger, then shrunk, for smooth edges
EACH = 20  # pictures of each colour and shape
COLORS = {"red": 0.0, "yellow": 0.15, "green": 0.33, "cyan": 0.5, "blue": 0.63, "purple": 0.8}  # hues
CORNERS = {"triangle": 3, "square": 4, "star": 5}


def draw(color: str, shape: str, chosen: random.Random) -> Image.Image:
    """Draw one shape on white, at a random position, angle and size."""
    sheet = Image.new("RGB", (SIDE * FINE, SIDE * FINE), "white")
    pen = ImageDraw.Draw(sheet)
    hue = (COLORS[color] + chosen.uniform(-0.02, 0.02)) % 1
    fill = tuple(
        round(255 * part)
        for part in colorsys.hsv_to_rgb(hue, chosen.uniform(0.75, 1), chosen.uniform(0.75, 0.95))
    )
    radius = chosen.uniform(9, 12.5) * FINE
    x, y = (chosen.uniform(radius, SIDE * FINE - radius) for _ in "xy")
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return sheet.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    points = CORNERS[shape] * (2 if shape == "star" else 1)
    turn = math.pi / 4 if shape == "square" else -math.pi / 2  # level base, tip on top
    turn, corners = turn + chosen.uniform(-0.15, 0.15), []
    for corner in range(points):
        length = radius * (0.4 if shape == "star" and corner % 2 else 1.0)
        angle = turn + math.tau * corner / points
        corners.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    pen.polygon(corners, fill=fill)
    return sheet.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main(folder: Path) -> None:
    """Draw all pictures and write metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen, lines = random.Random(0), []
    for color in COLORS:
        for shape in ("circle", *CORNERS):
            for number in range(EACH):
                name = f"{color}-{shape}-{number:02d}.png"
                draw(color, shape, chosen).save(folder / name, optimize=True)
                lines.append({"file_name": name, "text": [f"a {color} {shape}", f"{shape}, {color}"]})
    chosen.shuffle(lines)
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "shapes")
