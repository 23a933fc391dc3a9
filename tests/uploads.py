"""What users bring to a training: images as bytes, zips, and webdataset shards."""

import io
import tarfile
import zipfile

from PIL import Image


def image(size=(128, 128), colour="red", suffix="png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, suffix.upper().replace("JPG", "JPEG"))
    return file.getvalue()


def zipped(target, files):
    """Write `files` as a zip to `target`, a path or an open file, and return that."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target


def shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
