"""What a decoded image means: which way is up, how many frames, and any mode of Pillow as RGB."""

from __future__ import annotations

from PIL import ExifTags, Image, ImageFile

DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
WHITES = (255, 1023, 4095, 16383, 65535)  # white of 8, 10, 12, 14 and 16 bits
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Counting walks through the file in Python: about 5 microseconds for a GIF frame, 100 for a TIFF page.
MAX_COUNTED_BYTES = 16 << 20
MAX_COUNTED_PAGES = 1000


def orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation of a loaded image, 1 to 8; 1 where none is given. TIFF comes upright from Pillow.

    Not ImageOps.exif_transpose: that writes the EXIF block again, which raises on broken ones.
    """
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and value in UPRIGHT else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned as its orientation says."""
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def num_frames(image: ImageFile.ImageFile) -> str:
    """How many frames or pages a file has, as a word; "several" where counting would take long. Moves the image."""
    if not getattr(image, "is_animated", False):
        return "1"
    if image.format == "TIFF":
        for page in range(1, MAX_COUNTED_PAGES):
            try:
                image.seek(page)
            except EOFError:
                return str(page)
        return "several"
    if image.format == "GIF" and _size_bytes(image) > MAX_COUNTED_BYTES:
        return "several"
    return str(getattr(image, "n_frames", 1))


def to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """A new RGB image of the loaded one; adds to `notes` what had to be decided."""
    if image.mode in DEEP_GREY:
        return _scaled(image, notes)
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        if alpha.getextrema() != (255, 255):
            notes.append("transparency put on white")
            white = Image.new("RGB", image.size, "white")
            white.paste(with_alpha, mask=alpha)
            return white
        return with_alpha.convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image, notes: list[str]) -> Image.Image:
    """Grey of 10 to 32 bits, or of floats, as 8 bits. Pillow's own conversion clips at 255: a 16-bit scan turns white.

    White is the smallest of WHITES that holds the brightest pixel (else that pixel), and 1.0 for floats up to 1.
    """
    import numpy as np

    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    black = min(float(values.min()), 0.0)
    brightest = float(values.max()) - black
    if image.mode == "F" and brightest <= 1 and black == 0:
        white = 1.0
    else:
        white = next((float(white) for white in WHITES if brightest <= white and black == 0), brightest or 1.0)
    notes.append(f"{'float' if image.mode == 'F' else '16-bit'} scaled: {black:g} to {black + white:g} became 0 to 255")
    values -= black
    values *= 255.0 / white
    np.rint(values, out=values)
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _size_bytes(image: ImageFile.ImageFile) -> int:
    stream = image.fp
    if stream is None:
        return 0
    here = stream.tell()
    size = stream.seek(0, 2)
    stream.seek(here)
    return size
