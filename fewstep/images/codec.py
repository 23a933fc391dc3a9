"""Images to files and back: encode what was generated, open what a caller sent. It takes milliseconds to
tenths of a second, for a large upload seconds: call it off the model thread and off the event loop."""

import hashlib
import io
import math
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageChops, ImageCms, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from fewstep.errors import InvalidRequest

# A file's suffix is its format's name; its type on the web is this.
MIME_TYPES = {"webp": "image/webp", "jpg": "image/jpeg", "png": "image/png"}

INPUT_FORMATS = ("JPEG", "PNG", "WEBP")
_ONE_OF = f"one of {', '.join(INPUT_FORMATS)}"
# Phones send 12 to 24 million pixels in 2 to 15 MB. An image at this limit takes up to 620 MB to open,
# where a bomb of 50 kB would take gigabytes.
INPUT_MAX_PIXELS = 32_000_000
INPUT_MAX_BYTES = 30_000_000
INPUT_MIN_SIDE = 8  # in px; less is not even one latent pixel

# Pillow walks a file's parts in Python: a flood of empty ones keeps it for 9 s and takes 900 MB.
_MAX_READS = 200_000
# Each is a pass over all pixels: 500 kB of them take 10 s. A progressive JPEG has about ten, though in a film
# that a phone put behind it some hundred pairs of bytes look like one.
_MAX_SCANS = 1000
_MAX_METADATA = 65_536  # bytes of a chunk; what is longer is ignored

_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_PNG_METADATA = frozenset({b"tRNS", b"iCCP", b"eXIf"})


def encode_image(image: Image.Image, output_format: str, quality: int, **metadata: Any) -> bytes:
    """Return `image` (RGB) as a file of a format in MIME_TYPES; `quality` is 1 to 100, and PNG has none.

    `metadata` goes to Pillow's `save`. The same image always gives the same bytes.
    """
    options: dict[str, dict[str, Any]] = {
        # Method 0 of 6 takes a third of the time of Pillow's 4 for files that are as good and a twentieth
        # larger: 39 and 119 ms, 197 and 187 kB for a photograph of 1024 px; docs/speed.md has more.
        "webp": {"format": "WEBP", "quality": quality, "method": 0},
        # Colour at full resolution once quality is asked for: halved, it smears red edges visibly.
        "jpg": {"format": "JPEG", "quality": quality, "subsampling": "4:4:4" if quality >= 90 else "4:2:0"},
        # Level 1 takes half the time of the default 6; whoever wants small files takes another format.
        "png": {"format": "PNG", "compress_level": 1},
    }
    if output_format not in options:
        raise ValueError(f"encode_image knows {', '.join(MIME_TYPES)}")
    file = io.BytesIO()
    image.save(file, **options[output_format], **metadata)
    return file.getvalue()


def open_image(path: Path, name: str) -> Image.Image:
    """Return the image in a JPEG, PNG or WebP file as RGB: upright, in sRGB, on white where transparent.

    Of an animation it is the first frame. Nothing else of the file is kept, such as where a photo was taken,
    but its hash: `info["sha256"]`.
    Raises InvalidRequest, whose sentence calls the input `name`, for whatever cannot be opened safely.
    """
    return _opened(path, name, _to_rgb)


def open_mask(path: Path, name: str) -> Image.Image:
    """Return the mask in a file as grey (L), 255 where to repaint: white is repainted and black is kept.

    Where it is transparent it is kept, so that white strokes on an empty layer are a mask. Greys stay grey,
    and colours count by their brightness. Otherwise as open_image.
    """
    return _opened(path, name, _to_grey)


def open_alpha_mask(path: Path, name: str) -> Image.Image:
    """Return the mask in a file that is transparent where to repaint, as OpenAI's API has it; one that is
    opaque throughout is read as by open_mask."""
    return _opened(path, name, _to_inverse_alpha)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale `image` until it covers width x height px, and cut off what juts out evenly on both sides.

    Images of equal size lose equal parts, so that a mask (L) stays where it was on its image.
    """
    # Lanczos draws faint echoes along a mask's hard edges.
    method = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
    return ImageOps.fit(image, (width, height), method)


def same_shape(size: tuple[int, int], native_size: int) -> tuple[int, int]:
    """Return the size to generate an input of `size` at: of its shape, about native_size**2 px, in eights.

    What is longer than 21:9 becomes 21:9, and the area is never over 1.1 * native_size**2.
    """
    aspect = min(max(size) / min(size), 21 / 9)

    def beside(short: int) -> int:
        return min(round(short * aspect / 8) * 8, short * 21 // 9 // 8 * 8)

    short = round(native_size / math.sqrt(aspect) / 8) * 8
    if short * beside(short) > 1.1 * native_size**2:
        short -= 8
    return (beside(short), short) if size[0] > size[1] else (short, beside(short))


def _opened(path: Path, name: str, flatten: Callable[[Image.Image], Image.Image]) -> Image.Image:
    content = _content(path, name)
    try:
        with _decoder(content) as file:
            wide, high = file.size
            rule = ""
            if min(file.size) < INPUT_MIN_SIDE:
                rule = f"each side needs {INPUT_MIN_SIDE} px or more, so send a larger one"
            elif wide * high > INPUT_MAX_PIXELS:
                rule = f"at most {INPUT_MAX_PIXELS} px in all are allowed, so scale it down"
            if rule:
                raise InvalidRequest(f"{name} is {wide}x{high} px; {rule}")
            file.load()
            image = flatten(file)
            image.info = {"sha256": hashlib.sha256(content).hexdigest()}
            if (orientation := _orientation(file.info.get("exif", b""))) > 1:
                image.getexif()[ExifTags.Base.Orientation] = orientation
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except InvalidRequest:
        raise
    except MemoryError:
        raise InvalidRequest(f"{name} needs more memory than is free; send a smaller picture") from None
    # On damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, AssertionError and more.
    except Exception:
        raise InvalidRequest(f"{name} does not open as a picture; send a whole file as {_ONE_OF}") from None


def _content(path: Path, name: str) -> bytes:
    try:
        status = path.stat()
        if status.st_size > INPUT_MAX_BYTES:
            raise InvalidRequest(
                f"{name} is a file of {status.st_size / 1e6:.1f} MB; at most {INPUT_MAX_BYTES / 1e6:g} MB "
                "are allowed, so send a smaller one"
            )
        # A pipe or a device could keep a reader for ever.
        if not stat.S_ISREG(status.st_mode):
            raise OSError
        return path.read_bytes()
    except (OSError, ValueError):
        raise InvalidRequest(f"{name} is no file that can be read; send a picture as {_ONE_OF}") from None


class _Jpeg(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Nobody asks for it, and Pillow would warn about every odd tag on the way."""


class _FewReads(io.BytesIO):
    """A file in memory that fails after many reads."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise OSError("too many parts")
        return super().read(size)


def _decoder(data: bytes) -> ImageFile.ImageFile:
    """Return the file with its header read. Not by Image.open, which warns about bombs that are refused here,
    and takes a phone's JPEG with a depth map or a second view for another format."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(_FewReads(_bare_png(data)))
    if data.startswith(b"\xff\xd8\xff"):
        if data.count(b"\xff\xda") > _MAX_SCANS:
            raise OSError("too many scans")
        return _Jpeg(_FewReads(data))
    return WebPImageFile(_FewReads(data))  # which looks for its own signature


def _bare_png(data: bytes) -> bytes:
    """Return a PNG without texts, frames and huge metadata: of texts, Pillow unpacks 60 kB to 230 MB."""
    depth, colour = data[24], data[25]
    # Except in palettes, Pillow seeks the transparent colour unscaled among pixels scaled to 8 bits.
    wanted = _PNG_METADATA if depth == 8 or colour == 3 else _PNG_METADATA - {b"tRNS"}
    parts, at, kind = [data[:8]], 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind in _PNG_PIXELS or (kind in wanted and length <= _MAX_METADATA):
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def _orientation(exif: bytes) -> int:
    """Return how EXIF says it is held, 1 for upright. Pillow's own reader warns about every odd tag."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = ">" if tiff.startswith(b"MM") else "<"
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, value = struct.unpack_from(order + "H6xH", tiff, entry)
            if tag == ExifTags.Base.Orientation:
                return int(value)
    except struct.error:
        pass
    return 1


def _to_rgb(file: Image.Image) -> Image.Image:
    image = _opaque(file, "white")
    profile = io.BytesIO(file.info.get("icc_profile") or b"")
    try:
        srgb = ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB") or image
    except ImageCms.PyCMSError:
        pass  # none, a broken one, or one for other channels: the numbers are taken as sRGB
    return image.convert("RGB")


def _to_grey(file: Image.Image) -> Image.Image:
    return _opaque(file, "black").convert("L")


def _to_inverse_alpha(file: Image.Image) -> Image.Image:
    if not file.has_transparency_data:
        return _to_grey(file)
    return ImageChops.invert(file.convert("RGBA").getchannel("A"))


def _opaque(file: Image.Image, ground: str) -> Image.Image:
    """Return the image as L, RGB or CMYK."""
    if file.mode == "I;16":
        return file.point(lambda value: value / 256).convert("L")  # Pillow would clip at 255
    if file.has_transparency_data:
        image = file.convert("RGBA")
        opaque = Image.new("RGB", file.size, ground)
        opaque.paste(image, mask=image)
        return opaque
    return file.convert("RGB") if file.mode in ("1", "P") else file
