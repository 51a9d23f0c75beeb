"""Images: odd files decode to known pixels or are faults, and training crops are the official ones within a grey level."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from tiny import encoded, noise_image
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import InterpolationMode, functional

from lift.common.images import MAX_IMAGE_PIXELS, ImageFault, decode_image, decode_rgb
from lift.images import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    crop_box,
    evaluation_transform,
    image_processor,
    normalise,
    random_resized_crop,
)

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
END = b"\xff\xd9"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 96, height: int = 64) -> Image.Image:
    """Smooth, so that a JPEG keeps it."""
    return noise_image(0, (6, 4)).resize((width, height), Image.Resampling.BICUBIC)


def png(width: int, height: int, depth: int, colour_type: int, raw: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """The same JPEG with another size in its header."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]


def pixels(content: bytes) -> list[list[list[int]]]:
    """Rows of RGB triples, the same from both functions."""
    decoded = decode_rgb(content)
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous and decoded.flags.writeable
    assert np.array_equal(np.asarray(decode_image(content)), decoded)
    return decoded.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"keep_rgb": True},
        {"quality": 30},
        {"optimize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (96, 64)])
def test_jpegs_decode_as_pil_decodes_them(options: dict[str, Any], size: tuple[int, int]) -> None:
    content = saved(photo(*size), "jpeg", **options)
    assert np.array_equal(decode_rgb(content), np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp"])
def test_one_pixel(kind: str) -> None:
    assert pixels(saved(Image.new("RGB", (1, 1), (80, 80, 80)), kind)) == [[[80, 80, 80]]]


def test_lossless_formats_keep_their_pixels() -> None:
    image = noise_image(1)
    for content in (encoded(image, "png"), encoded(image, "bmp"), saved(image, "webp", lossless=True)):
        assert np.array_equal(decode_rgb(content), np.asarray(image))


def test_grey_jpeg() -> None:
    assert pixels(saved(Image.new("L", (2, 1), 77), "jpeg")) == [[[77] * 3, [77] * 3]]


def test_cmyk_jpeg_is_read_as_adobe_writes_it() -> None:
    content = saved(Image.new("CMYK", (2, 1), (255, 0, 0, 0)), "jpeg", quality=100)
    assert b"Adobe" in content and pixels(content) == [[[0, 255, 255]] * 2]
    image = photo().convert("CMYK")
    content = saved(image, "jpeg", quality=95)
    assert np.array_equal(decode_rgb(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_sixteen_bits_keep_their_high_byte() -> None:
    grey = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    assert pixels(encoded(grey)) == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]
    assert pixels(saved(grey, "png", transparency=256)) == [[[0] * 3, [255] * 3, [128] * 3, [255] * 3]]
    assert pixels(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 256, 65535, 32768, 1, 2))) == [[[0, 1, 255], [128, 0, 0]]]
    assert pixels(png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 32768, 65535, 32768, 0))) == [[[128] * 3, [255] * 3]]


def test_transparent_pixels_lie_on_white() -> None:
    rgba = Image.new("RGBA", (3, 1), (0, 0, 255, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 51))
    expected = [[list(BLUE), [255] * 3, [204] * 3]]
    assert pixels(encoded(rgba)) == expected
    assert pixels(saved(rgba, "webp", lossless=True)) == expected
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert pixels(encoded(grey)) == [[[10] * 3, [255] * 3]]
    assert pixels(saved(Image.new("RGB", (1, 1), RED), "png", transparency=RED)) == [[list(WHITE)]]
    assert pixels(saved(Image.new("L", (1, 1), 9), "png", transparency=9)) == [[list(WHITE)]]


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\x00"], ids=["opaque", "index", "alpha table"])
@pytest.mark.parametrize("kind", ["png", "gif"])
def test_palette(kind: str, transparency: int | bytes | None) -> None:
    if kind == "gif" and isinstance(transparency, bytes):
        pytest.skip("GIF has no alpha table")
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    options = {} if transparency is None else {"transparency": transparency}
    second = BLUE if transparency is None else WHITE
    assert pixels(saved(image, kind, **options)) == [[list(RED), list(second)]]


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (4, 3), RED), Image.new("RGB", (4, 3), BLUE)
    options = {"lossless": True} if kind == "webp" else {}
    content = saved(first, kind, save_all=True, append_images=[second], **options)
    assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 2
    assert pixels(content) == [[list(RED)] * 4] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(photo(), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert decode_image(content).size == ((64, 96) if orientation > 4 else (96, 64))
    assert np.array_equal(decode_rgb(content), np.asarray(upright))


def test_orientation_in_xmp_counts_and_broken_metadata_do_not() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    assert decode_rgb(saved(photo(), "jpeg", xmp=xmp)).shape == (96, 64, 3)
    for exif in (b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        assert decode_rgb(saved(photo(), "jpeg", exif=exif)).shape == (64, 96, 3)


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_cut_jpeg_is_a_fault_also_where_pil_fills_it_with_grey(
    mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as a library may leave it
    whole = saved(noise_image(0, (96, 64)).convert(mode), "jpeg", **options)
    scan = whole.index(b"\xff\xda")
    # a progressive image that is closed between two scans is valid, and whole at a lower quality
    endings = (b"", bytes(100)) if options else (b"", bytes(100), END)
    for cut in (2, 3, scan, *range(scan + 20, len(whole) - 20, len(whole) // 15), len(whole) - 3):
        for ending in endings:
            with pytest.raises(ImageFault):
                decode_rgb(whole[:cut] + ending)
    assert Image.open(io.BytesIO(whole[: len(whole) // 2] + END)).convert("RGB").size == (96, 64)  # what PIL lets pass


def test_bytes_left_over_around_the_end_marker_do_no_harm() -> None:
    whole = saved(photo(), "jpeg")
    for content in (whole + b"appended", whole[:-2] + b"padding" + END):
        assert np.array_equal(decode_rgb(content), decode_rgb(whole))


@pytest.mark.parametrize("kind", ["png", "webp", "gif", "bmp"])
def test_other_cut_files_are_faults(kind: str) -> None:
    whole = encoded(noise_image(0, (96, 64)), kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(ImageFault):
            decode_rgb(whole[: int(len(whole) * share)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b"<html>404</html>", r"expected a JPEG, .* or AVIF image, found 16 bytes that begin with b'<html>40'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "found 47 bytes that begin with b'%!PS-Ado'"),
        (encoded(Image.new("RGB", (1, 1)), "tiff"), "begin with b'II"),
        (b"\xff\xd8\xff", "begin with"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "begin with"),
    ],
    ids=["empty", "text", "eps", "tiff", "jpeg start", "png start"],
)
def test_what_is_no_image_is_named(content: bytes, message: str) -> None:
    with pytest.raises(ImageFault, match=message) as fault:
        decode_rgb(content)
    assert "0x" not in str(fault.value)  # no address: the ledger of a repeated run is the same


@pytest.mark.parametrize("guard", [Image.MAX_IMAGE_PIXELS, None], ids=["PIL's guard on", "PIL's guard off"])
def test_decompression_bombs_are_refused_by_their_header(guard: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", guard)

    def must_not_decode(*_: object) -> None:
        raise AssertionError("decoded a bomb")

    monkeypatch.setattr(ImageFile.ImageFile, "load", must_not_decode)
    monkeypatch.setattr("simplejpeg.decode_jpeg", must_not_decode)
    bombs = [
        with_size(saved(photo(), "jpeg"), 20000, 20000),
        with_size(saved(photo().convert("CMYK"), "jpeg"), 20000, 20000),
        png(20000, 20000, 1, 0, b""),
        png(MAX_IMAGE_PIXELS // 1000 + 1, 1000, 1, 0, b""),
    ]
    for bomb in bombs:
        with pytest.raises(ImageFault, match=r"20000 x 20000 pixels are more|exceeds limit|89479 x 1000 pixels are more"):
            decode_rgb(bomb)


def test_text_chunks() -> None:
    black = b"\0\x00"
    assert pixels(png(1, 1, 8, 0, black, png_chunk(b"tEXt", b"k\0" + b"a" * 3_000_000))) == [[[0, 0, 0]]]
    with pytest.raises(ImageFault, match="Decompressed data too large"):
        decode_rgb(png(1, 1, 8, 0, black, png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000)))))


def test_damaged_bytes_give_pixels_or_a_fault_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    image = noise_image(2, (48, 32))
    wholes = [saved(image.convert(mode), kind) for mode in ("RGB", "L", "P") for kind in ("png", "gif", "webp", "bmp")]
    wholes += [saved(image.convert(mode), "jpeg") for mode in ("RGB", "L", "CMYK")]
    faults = 0
    for whole in wholes:
        for _ in range(40):
            content = bytearray(whole)
            for place in generator.integers(0, min(len(whole), 200), 3):
                content[place] = generator.integers(256)
            try:
                assert decode_rgb(bytes(content)).shape[2] == 3
            except ImageFault:
                faults += 1
    assert 0 < faults < 40 * len(wholes)


def test_unreadable_paths(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(saved(photo(), "jpeg"))
    assert decode_image(tmp_path / "a.jpg").size == (96, 64)
    with pytest.raises(ImageFault, match="IsADirectoryError"):
        decode_image(tmp_path)
    with pytest.raises(FileNotFoundError):
        decode_image(tmp_path / "none.png")


def test_crop_boxes_are_seeded_and_lie_inside() -> None:
    def draw(seed: int) -> tuple[int, int, int, int]:
        return crop_box(323, 288, (0.9, 1.0), np.random.default_rng(seed))

    assert draw(0) == draw(0) != draw(1)
    for seed in range(200):
        left, top, right, bottom = draw(seed)
        width, height = right - left, bottom - top
        assert 0 <= left < right <= 323 and 0 <= top < bottom <= 288
        assert 0.89 < width * height / (323 * 288) < 1.01 and 0.74 < width / height < 1.35
    assert crop_box(400, 10, (0.9, 1.0), np.random.default_rng(0)) == (195, 0, 205, 10)  # no ratio up to 4/3 fits


@pytest.mark.parametrize("size", [(323, 288), (256, 400), (90, 60), (1, 1), (1, 300), (900, 700)], ids=str)
def test_crops_are_the_official_ones_within_a_fifth_of_a_grey_level(size: tuple[int, int]) -> None:
    image = noise_image(3, (max(1, size[0] // 6), max(1, size[1] // 6))).resize(size, Image.Resampling.BICUBIC)
    crop_SS3 = random_resized_crop(np.array(image), 224, (0.5, 1.0), np.random.default_rng(5))
    left, top, right, bottom = crop_box(*size, (0.5, 1.0), np.random.default_rng(5))
    official = functional.resized_crop(
        image, top, left, bottom - top, right - left, [224, 224], InterpolationMode.BICUBIC, antialias=True
    )
    assert crop_SS3.shape == (224, 224, 3) and crop_SS3.dtype == torch.uint8 and crop_SS3.is_contiguous()
    difference = (crop_SS3.int() - torch.from_numpy(np.array(official)).int()).abs()
    assert difference.float().mean() < 0.2 and difference.max() <= 3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_normalise_is_the_plain_formula(memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels_B3HW = torch.randint(0, 256, (3, 3, 6, 5), dtype=torch.uint8, generator=generator).contiguous(
        memory_format=memory_format
    )
    mean, deviation = (torch.tensor(c, dtype=torch.float64).view(3, 1, 1) for c in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    normalised_B3HW = normalise(pixels_B3HW)
    assert normalised_B3HW.dtype == torch.float32 and normalised_B3HW.is_contiguous(memory_format=memory_format)
    assert torch.allclose(normalised_B3HW.double(), (pixels_B3HW / 255 - mean) / deviation, atol=1e-6, rtol=0)


class _Crops(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, position: int) -> torch.Tensor:
        content = saved(noise_image(position, (50, 40)), "jpeg")
        return random_resized_crop(decode_rgb(content), 32, (0.5, 1.0), np.random.default_rng(position))


def test_crops_are_the_same_from_workers() -> None:
    here, there = (torch.cat(list(DataLoader(_Crops(), 4, num_workers=n, collate_fn=default_collate))) for n in (0, 2))
    assert here.shape == (6, 32, 32, 3) and torch.equal(here, there)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 37), (33, 33), (34, 33), (9, 200), (200, 9), (7, 5)])
def test_evaluation_pixels_are_bit_identical_to_the_processors(size: tuple[int, int]) -> None:
    processor, image = image_processor(33), noise_image(1, size)
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(evaluation_transform(processor)(image), expected)


@pytest.mark.parametrize("change", [{"size": {"shortest_edge": 40}}, {"do_normalize": False}, {"do_center_crop": False}])
def test_other_processors_are_called_as_they_are(change: dict[str, Any]) -> None:
    processor, image = image_processor(33), noise_image(1, (64, 48))
    for name, value in change.items():
        setattr(processor, name, value)
    assert torch.equal(evaluation_transform(processor)(image), processor(images=image, return_tensors="pt")["pixel_values"][0])
