"""Tables of shapes, and which shape an image takes."""

import numpy as np
import pytest

from sana_cli import buckets
from sana_cli.config.file import parse_config
from sana_cli.errors import SanaError


def published() -> dict[int, dict[str, list[float]]]:
    """The tables of diffusers, by size."""
    alpha = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha")
    sigma = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma")
    sana = pytest.importorskip("diffusers.pipelines.sana.pipeline_sana")
    return {
        256: alpha.ASPECT_RATIO_256_BIN,
        512: alpha.ASPECT_RATIO_512_BIN,
        1024: alpha.ASPECT_RATIO_1024_BIN,
        2048: sigma.ASPECT_RATIO_2048_BIN,
        4096: sana.ASPECT_RATIO_4096_BIN,
    }


def test_the_tables_are_those_of_diffusers() -> None:
    for size, table in published().items():
        assert len(table) == (33 if size < 2048 else 40)
        assert [(f"{h / w:.2f}".rstrip("0").rstrip("."), h, w) for h, w in buckets.shapes(size)] == [
            (key.rstrip("0").rstrip("."), h, w) for key, (h, w) in table.items()
        ]


def test_smaller_tables_are_scaled() -> None:
    for size in (16, 32, 48, 64, 128):
        scaled = [(h * 1024 // size, w * 1024 // size) for h, w in buckets.shapes(size)]
        assert scaled == list(buckets.shapes(1024))
        assert all(0.9 * size**2 < h * w <= size**2 for h, w in buckets.shapes(size))
    for size in (0, 8, 100, 1000):
        with pytest.raises(ValueError, match=f"{size} has no table of shapes"):
            buckets.shapes(size)


def test_the_choice_is_that_of_diffusers() -> None:
    processor = pytest.importorskip("diffusers.image_processor").PixArtImageProcessor
    drawn = np.random.default_rng(0)
    sides = np.exp(drawn.uniform(np.log(16), np.log(8000), (10_000, 2))).astype(int)
    sides[:2000] = drawn.integers(500, 1500, (2000, 2))
    tables = published()
    for number, (height, width) in enumerate(sides.tolist()):
        size = (256, 512, 1024, 2048, 4096)[number % 5]
        expected = processor.classify_height_width_bin(height, width, ratios=tables[size])
        assert buckets.closest(size, height, width) == expected


def test_the_largest_size_that_does_not_enlarge() -> None:
    sizes = (256, 512, 1024)
    drawn = np.random.default_rng(1).integers(100, 2500, (3000, 2))
    used = set()
    for height, width in drawn.tolist():
        for fit, times in (("crop", max), ("pad", min)):
            chosen = buckets.choose(sizes, height, width, fit)
            each = {size: buckets.closest(size, height, width) for size in sizes}
            fitting = [s for s, (h, w) in each.items() if times(h / height, w / width) <= 1]
            assert chosen == each[max(fitting, default=256)]
            used.add(next(size for size in sizes if each[size] == chosen))
    assert used == {*sizes}


def test_an_image_of_a_shape_keeps_it() -> None:
    for sizes in ((1024,), (512, 1024), (32, 48, 64, 80), (1008, 1024), (1024, 2048)):
        for size in sizes:
            assert all(buckets.choose(sizes, *shape) == shape for shape in buckets.shapes(size))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.buckets=[100]"], "data.buckets 100 has no table of shapes: sizes are multiples of 16"),
        (["data.buckets=[]"], "data.buckets "),
        (
            ["data.source=mnist"],
            "data.buckets: are for images of many shapes; mnist has one, data.image_size",
        ),
        (["data.source=critters"], "critters has one, data.image_size"),
        (
            ["data.buckets=[64]"],
            "model.patch_size: shapes of size 64 have sides in steps of 4 pixels, which 8 does not divide; "
            "the smallest size that fits is 128",
        ),
        (
            ["data.buckets=[256,512]", "data.autoencoder=dc-ae", "model.patch_size=1"],
            "data.buckets: shapes of size 256 .* 16 pixels, which 32 does not divide; .* is 512",
        ),
        (
            ["data.buckets=[512,1024]", "data.autoencoder=dc-ae", "model.patch_size=2"],
            "model.patch_size: shapes of size 512 .* 32 pixels, which 64 does not divide; .* is 1024",
        ),
        (["data.also={data/quickstart: 2}"], "data.also: data/quickstart is data.dir as well; data.repeats"),
        (["data.also={data/other: 0}"], "data.also must be greater than or equal to 0.001"),
        (["data.also={data/a: 1, ./data/a: 2}"], "data.also names a folder twice"),
        (["data.buckets=[40000]"], "40000 is too large; the most is 32768"),
        (["data.repeats=0"], "data.repeats must be greater than or equal to 0.001"),
    ],
)
def test_sizes_that_do_not_fit_are_one_message(overrides: list[str], message: str) -> None:
    fitting = ["data.source=folder", "data.buckets=[128]", "model.patch_size=8", "data.image_size=1024"]
    with pytest.raises(SanaError, match=message):
        parse_config("", "c.yaml", [*fitting, *overrides])


def test_configs_with_buckets_and_further_datasets_load_back() -> None:
    config = parse_config(
        "data: {source: folder, buckets: [64, 32, 32], repeats: 3, also: {data/a: 0.5, ~/b: 2}}", "c.yaml"
    )
    assert config.data.buckets == (32, 64)
    assert config.model.patch_size == 2  # the largest that divides every shape
    assert config.data.size == (64, 64)
    assert next(str(path) for path in config.data.also) == "data/a"
    assert parse_config(config.to_yaml(), "c.yaml") == config
    assert parse_config(config.to_commented_yaml(), "c.yaml") == config
