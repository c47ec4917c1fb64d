"""Pictures and animations are what Pillow says of them, as files and as PIL objects alike."""

from __future__ import annotations

import functools
import io
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps
from video.media_attacks import png_chunk

from vtts_rt.video import open_video

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB")
MODES += ("HSV", "I", "F")
# Formats that keep a mode without loss.
STORED = {
    "1": ("PNG", "TIFF", "PPM", "BMP"),
    "L": ("PNG", "TIFF", "PPM", "BMP", "SGI", "PSD"),
    "LA": ("PNG", "TIFF"),
    "P": ("PNG", "TIFF", "BMP"),
    "PA": ("TIFF",),
    "RGB": ("PNG", "TIFF", "PPM", "BMP", "SGI", "JPEG", "WEBP", "AVIF", "JPEG2000", "QOI", "DDS"),
    "RGBA": ("PNG", "TIFF", "WEBP", "AVIF", "BMP", "ICO", "JPEG2000", "QOI", "DDS"),
    "RGBX": ("TIFF",),
    "CMYK": ("TIFF", "JPEG"),
    "YCbCr": ("TIFF", "JPEG"),
    "LAB": ("TIFF",),
    "I": ("TIFF",),
    "F": ("TIFF",),
}
UNWRITTEN = {"PSD"}  # Pillow reads it only


def colours(hw: tuple[int, int] = (12, 18)) -> Image.Image:
    """Four plain quarters with an alpha that varies, lossless through most subsampling."""
    tiles = np.random.default_rng(3).integers(0, 256, (hw[0] // 6, hw[1] // 6, 4), np.uint8)
    return Image.fromarray(np.kron(tiles, np.ones((6, 6, 1), np.uint8)), "RGBA")


def in_mode(mode: str) -> Image.Image:
    image = colours()
    if mode in ("I", "F"):  # values of which some are beyond 8 bits
        values = np.array(image.convert("L"), np.int32) * 2 - 100
        return Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    if mode == "LAB":
        values = np.array(image)[..., :3]
        return Image.frombytes("LAB", image.size, values.tobytes())
    if mode == "La":
        return image.convert("LA").convert("La")
    if mode == "PA":
        return image.convert("P").convert("PA")
    if mode in ("LA", "RGBa"):
        return image.convert(mode)
    return image.convert("RGB").convert(mode)


def pixels_of(video: Any) -> np.ndarray:
    with open_video(video) as source:
        assert source.metadata.is_image and source.metadata.decoder in ("image", "array")
        return np.asarray(dict(source.read([0]))[0])


def by_pillow(image: Image.Image) -> np.ndarray:
    upright = ImageOps.exif_transpose(image)
    return np.asarray((upright.convert("LA") if upright.mode == "La" else upright).convert("RGB"))


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: str) -> None:
    image = in_mode(mode)
    np.testing.assert_array_equal(pixels_of(image), by_pillow(image))
    for kind in set(STORED.get(mode, ())) - UNWRITTEN:
        data = stored(image, kind)
        want = by_pillow(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(pixels_of(data), want, err_msg=kind)
        np.testing.assert_array_equal(pixels_of(Image.open(io.BytesIO(data))), want, err_msg=kind)


DEEP = np.array([[0, 255, 256, 1000, 0x8000, 0xFFFF]], np.uint16)


def png16(colour_type: int, values: np.ndarray) -> bytes:
    """A PNG of 16 bits; colour_type: 0 gray, 2 RGB, 4 gray and alpha, 6 RGBA."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = np.array([width, height], ">u4").tobytes() + bytes([16, colour_type, 0, 0, 0])
    body = png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_cut_to_the_upper_8(channels: int) -> None:
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    values = np.stack([np.roll(DEEP, c, axis=1) for c in range(channels)], axis=-1)
    data = png16(colour_type, values)
    gray = channels < 3
    want = np.repeat(values[..., :1], 3, axis=-1) if gray else values[..., :3]
    for video in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(pixels_of(video), (want >> 8).astype(np.uint8))


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "JPEG2000", "I;16", "I;16B"])
def test_deep_gray_of_every_kind(kind: str) -> None:
    want = np.repeat((DEEP >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if kind.startswith("I"):
        values = DEEP.astype(">u2" if kind[-1] == "B" else "<u2").tobytes()
        videos: list[Any] = [Image.frombytes(kind, (6, 1), values)]
    else:
        header = b"P5\n6 1\n65535\n"
        deep = DEEP.astype(">u2").tobytes()
        data = header + deep if kind == "PPM" else stored(Image.fromarray(DEEP), kind)
        videos = [data, Image.open(io.BytesIO(data))]
    for video in videos:
        np.testing.assert_array_equal(pixels_of(video), want)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation(kind: str) -> None:
    image = colours().convert("RGB")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = stored(image, kind, exif=exif)
        want = by_pillow(Image.open(io.BytesIO(data)))
        assert want.shape[:2] == ((12, 18) if orientation < 5 else (18, 12))
        for video in (data, Image.open(io.BytesIO(data))):
            np.testing.assert_array_equal(pixels_of(video), want, err_msg=str(orientation))


def test_broken_exif_leaves_a_picture_as_it_is_stored() -> None:
    image = colours().convert("RGB")
    data = stored(image, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1\x12\0\3" * 3)
    np.testing.assert_array_equal(pixels_of(data), np.asarray(image))


def test_files_of_several_pictures_of_one_thing_are_images(tmp_path: Path) -> None:
    image = colours().convert("RGB")
    photo = stored(image, "MPO", save_all=True, append_images=[image.transpose(0)])
    np.testing.assert_array_equal(pixels_of(photo), by_pillow(Image.open(io.BytesIO(photo))))
    film = stored(image, "JPEG") + b"\0\0\0\x18ftypmp42" + stored(image, "JPEG")
    np.testing.assert_array_equal(pixels_of(film), by_pillow(Image.open(io.BytesIO(film))))
    icon = stored(colours((48, 48)), "ICO", sizes=[(16, 16), (48, 48)])
    assert pixels_of(icon).shape == (48, 48, 3)  # the largest


@pytest.mark.parametrize("cut", [0.3, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_picture_that_is_cut_off_is_refused(kind: str, cut: float) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = stored(image, kind)
    half = data[: int(cut * len(data))]
    opened = None
    with pytest.raises(ValueError, match="^open_video: video must ") as caught:
        opened = open_video(half)
    assert opened is None and "\n" not in str(caught.value)
    if kind in ("JPEG", "PNG"):
        with pytest.raises(ValueError, match="^open_video: video must be an image that can be"):
            open_video(Image.open(io.BytesIO(half)))


def test_mutated_pictures_end_in_a_sentence_or_in_pixels() -> None:
    rng = random.Random(5)
    image = colours((30, 36))
    kinds = ("PNG", "TIFF", "BMP", "WEBP", "ICO", "AVIF", "JPEG2000", "QOI", "DDS", "JPEG")
    outcomes = set()
    for kind in kinds:
        data = stored(image.convert("RGB") if kind == "JPEG" else image, kind)
        for _ in range(15):
            changed = bytearray(data)
            for _ in range(rng.choice([1, 3, 20])):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            try:
                with open_video(bytes(changed)) as source:
                    assert len(dict(source.read([0]))) == 1
                    outcomes.add("pixels")
            except (ValueError, RuntimeError) as error:
                assert str(error).count("\n") == 0
                outcomes.add("sentence")
    assert outcomes == {"pixels", "sentence"}


# -- pictures that follow each other -------------------------------------------------------


def sequence(kind: str, count: int, junk: bytes = b"") -> tuple[bytes, list[np.ndarray]]:
    pictures, frames = [], []
    for n in range(count):
        image = Image.fromarray(np.full((24, 32, 3), (10 * n, 255 - 9 * n, 77), np.uint8))
        lossless = {"lossless": True} if kind == "WEBP" else {}
        pictures.append(stored(image, kind, **lossless))
        frames.append(np.asarray(Image.open(io.BytesIO(pictures[-1])).convert("RGB")))
    return junk.join(pictures), frames


@pytest.mark.parametrize("source_fps", [None, 4.0])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "WEBP"])
def test_pictures_in_one_file_are_a_video(
    kind: str, source_fps: float | None, tmp_path: Path
) -> None:
    data, frames = sequence(kind, 12)
    path = tmp_path / "frames.bin"
    path.write_bytes(data)
    rate = source_fps or 25.0
    for video in (data, path):
        with open_video(video, source_fps=source_fps) as source:
            meta = source.metadata
            assert not meta.is_image and meta.num_frames == 12 and meta.source_fps == rate
            np.testing.assert_allclose(meta.timestamps_seconds, np.arange(12) / rate, atol=1e-6)
            assert meta.duration_seconds == pytest.approx(12 / rate)
            for i in (7, 2, 11, 0, 7):
                got = dict(source.read([i]))[i].astype(int)
                assert np.abs(got - frames[i]).max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("junk", [b"\0" * 700, b"\xff\0junk"])
def test_padding_between_jpegs(junk: bytes) -> None:
    data, _ = sequence("JPEG", 5, junk)
    with open_video(data) as source:
        assert source.metadata.num_frames == 5


# -- animations ----------------------------------------------------------------------------

SECONDS = [0.1, 0.2, 0.3, 0.05, 0.07, 0.4]


def animation(kind: str, alpha: bool, disposal: Any = None) -> bytes:
    rng = np.random.default_rng(7)
    frames = []
    for _ in SECONDS:
        tiles = rng.integers(0, 4, (6, 8, 4)).astype(np.uint8) * 85
        tiles[..., 3] = np.where(tiles[..., 3] < (128 if alpha else 0), 0, 255)
        frames.append(Image.fromarray(np.kron(tiles, np.ones((5, 5, 1), np.uint8)), "RGBA"))
    if not alpha:
        frames = [frame.convert("RGB") for frame in frames]
    options: dict[str, Any] = {"duration": [round(1e3 * s) for s in SECONDS]}
    options |= {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(
        kind, {} if disposal is None else {"disposal": disposal}
    )
    if kind == "PNG" and disposal is not None:
        options["blend"] = [n % 2 for n in range(len(SECONDS))]
    return stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def composed(kind: str, data: bytes) -> list[np.ndarray]:
    """Pillow's frames without alpha; of a GIF over white, as FFmpeg paints what has no colour."""
    image = Image.open(io.BytesIO(data))
    frames = []
    for n in range(image.n_frames):
        image.seek(n)
        rgba = np.asarray(image.convert("RGBA"))
        seen = rgba[..., 3:] > 0
        frames.append(np.where(seen | (kind != "GIF"), rgba[..., :3], np.uint8(255)))
    return frames


# One of the decoders that compose animations is right of each, as the specifications say; Pillow
# is wrong of the transparency in these, FFmpeg of PNG's in MIXED. What no decoder composes right
# is refused.
MIXED = (0, 1, 2, 0, 2, 1)
BY_FFMPEG = {("GIF", MIXED, True)}


def by_ffmpeg(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize(
    ("kind", "disposal"),
    [("WEBP", None), ("AVIF", None)] + [(k, d) for k in ("GIF", "PNG") for d in (0, 1, 2, MIXED)],
)
def test_animations(kind: str, disposal: Any, alpha: bool, tmp_path: Path) -> None:
    data = animation(kind, alpha, list(disposal) if disposal == MIXED else disposal)
    right = by_ffmpeg if (kind, disposal, alpha) in BY_FFMPEG else functools.partial(composed, kind)
    want = right(data)
    path = tmp_path / "animation"
    path.write_bytes(data)
    if (kind, disposal, alpha) == ("PNG", 2, True):
        with pytest.raises(ValueError, match="^open_video: .* disposed to the previous .*save it"):
            open_video(path)
        return
    with open_video(path) as source:
        meta = source.metadata
        assert not meta.is_image and meta.num_frames == len(SECONDS) == len(want)
        starts = np.concatenate([[0.0], np.cumsum(SECONDS)[:-1]])
        np.testing.assert_allclose(meta.timestamps_seconds, starts, atol=1e-6)
        for order in (range(6), [5, 1, 3]):
            for i in order:
                got = dict(source.read([i]))[i].astype(int)
                limit = 2 if kind == "AVIF" else 0  # conversions of 4:4:4 that round otherwise
                assert np.abs(got - want[i]).max() <= limit, i
        assert source.frames_substituted == 0


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_lasts_as_long_as_it_says(kind: str) -> None:
    with open_video(animation(kind, False)) as source:
        assert source.metadata.duration_seconds == pytest.approx(sum(SECONDS))
        assert source.metadata.source_fps == pytest.approx(6 / sum(SECONDS))
    with open_video(animation(kind, False), start_seconds=0.15, end_seconds=0.5) as source:
        assert source.metadata.num_frames == 2


@pytest.mark.parametrize(("kind", "chunk", "pixels"), [("WEBP", b"ANMF", 28), ("PNG", b"fdAT", 4)])
def test_frames_from_a_broken_one_on_are_errors(kind: str, chunk: bytes, pixels: int) -> None:
    data = bytearray(animation(kind, False))
    chunks = [i for i in range(len(data)) if data[i : i + 4] == chunk]
    start = chunks[3 if kind == "WEBP" else 2] + 4 + pixels  # the first PNG frame is in IDAT
    data[start + 5 : start + 30] = b"\xff" * 25
    with open_video(bytes(data)) as source:
        want = composed(kind, animation(kind, False))
        for i in (5, 0, 3, 1, 2, 4):
            if i < 3:
                np.testing.assert_array_equal(dict(source.read([i]))[i], want[i])
                continue
            with pytest.raises(RuntimeError, match=f"^frame {i} of the video .* cannot be decoded"):
                list(source.read([i]))


def test_a_tiff_of_pages_is_refused_and_one_with_a_thumbnail_is_an_image() -> None:
    image = colours().convert("RGB")
    pages = stored(image, "TIFF", save_all=True, append_images=[image, image])
    with pytest.raises(ValueError, match="be a TIFF file of one page"):
        open_video(pages)
    from PIL import TiffImagePlugin

    file = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(file, True) as writer:
        image.save(writer, "TIFF")
        writer.newFrame()
        small = TiffImagePlugin.ImageFileDirectory_v2()
        small[254] = 1  # a smaller version of the page before
        image.resize((6, 4)).save(writer, "TIFF", tiffinfo=small)
    np.testing.assert_array_equal(pixels_of(file.getvalue()), np.asarray(image))


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "HEIF"),
    "mng": (b"\x8aMNG\r\n\x1a\n" + bytes(100), "readable"),
    "jpeg xl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "video must"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'></svg>", "video must"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "video must"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_formats_that_nothing_here_reads(kind: str) -> None:
    data, words = UNREADABLE[kind]
    with pytest.raises(ValueError, match=f"^open_video: .*{words}") as caught:
        open_video(data)
    assert "\n" not in str(caught.value)


def test_the_current_frame_of_a_pil_animation() -> None:
    data = animation("WEBP", False)
    image = Image.open(io.BytesIO(data))
    image.seek(4)
    np.testing.assert_array_equal(pixels_of(image), composed("WEBP", data)[4])


def test_ids_of_pictures_follow_their_content(tmp_path: Path) -> None:
    data = stored(colours(), "PNG")
    path = tmp_path / "p.png"
    path.write_bytes(data)
    read: Callable[[Any], str] = lambda video: open_video(video).metadata.video_id  # noqa: E731
    assert read(data) == read(path) != read(stored(colours().rotate(90), "PNG"))


def test_an_apng_whose_first_picture_is_no_frame() -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (10, 20, 30)]
    data = stored(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
    with open_video(data) as source:
        assert source.metadata.num_frames == 2
        assert [int(f[0, 0, 0]) for _, f in source.read([0, 1])] == [20, 30]
