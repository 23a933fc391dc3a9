"""What users bring to a training: images as bytes, and webdataset shards."""

import io
import tarfile

from PIL import Image


def image(size=(128, 128), colour="red", suffix="png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, suffix.upper().replace("JPG", "JPEG"))
    return file.getvalue()


def shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
