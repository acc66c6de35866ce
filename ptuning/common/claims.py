"""What a file claims, and where a name leads, is checked before anything of it is read.

Answers to nothing in the official scripts. A few bytes of a stranger's file can claim gigabytes (a compressed or huge
pickle, a long header), and a name in it can lead out of its folder. Of a weight file the reason alone is said: its
readers know what it is for.
"""

import contextlib
import pickletools
import struct
import zipfile
from pathlib import Path, PurePath

# The pickle of a checkpoint has about 100 bytes a tensor, so 60 KB for an optimizer of all weights. Unpickled, a byte
# can become an object of 200 bytes.
MOST_PICKLE_BYTES = 2**20
MOST_DIRECTORY_BYTES = 2**22  # of a zip file: 90 bytes for a tensor
MOST_HEADER_BYTES = 2**22  # of a safetensors file: 150 bytes for a tensor
MOST_INDEX_BYTES = 2**24  # of FSDP's shards: 300 bytes for a tensor and process
MOST_JSON_BYTES = 2**24
MOST_LOG_BYTES = 2**27  # trainer_state.json holds the log of the run
MOST_TOKENIZER_BYTES = 2**26  # ChatGLM2's has 1,018,370

ZIP_MARK = b"PK\x03\x04"
END, LOCATOR, END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")


def check_size(file: Path | str, most: int) -> None:
    """ValueError for a file of more than `most` bytes."""
    size = Path(file).stat().st_size
    if size > most:
        raise ValueError(f"{file} has {size:,} bytes, expected at most {most:,}. Is it the right file? Copy it again.")


def path_inside(folder: Path | str, name: str, source: str) -> Path:
    """`name` in `folder`; ValueError for a name, or a link so named, that leads out of it. `source` holds the name.

    Nothing outside the folder is looked up. A snapshot of the hub's cache links to the blobs beside it, which belong
    to it.
    """
    pure = PurePath(name)
    inside = not pure.is_absolute() and ".." not in pure.parts and "\0" not in name
    if inside:
        here = Path(folder).resolve()
        place = (here / name).resolve()
        inside = place.is_relative_to(here) or place.parent == here.parent.parent / "blobs"
    if not inside:
        raise ValueError(
            f"{source} names {name!r}, which leads out of {folder}; nothing outside that folder is read. Put the file "
            "itself there and give its name."
        )
    return Path(folder) / name


# ---- weight files


def check_torch_file(file: Path | str) -> None:
    """ValueError unless what a torch file claims is within the file: stored, not compressed, with a short pickle."""
    with open(file, "rb") as opened:
        is_zip = opened.read(4) == ZIP_MARK
        opened.seek(0)
        if not is_zip:
            return check_pickles(opened)
        try:
            check_zip(opened, Path(file).stat().st_size)
        except (zipfile.BadZipFile, struct.error, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(f"its table of contents cannot be read: {error}") from error


def check_zip(opened, size):
    """ValueError for a zip file with compressed members, a long pickle, or more than one table of contents."""
    start = directory_start(opened, size)
    with zipfile.ZipFile(opened) as archive:
        for member in archive.infolist():
            name, claimed = member.filename, member.file_size
            if member.compress_type != zipfile.ZIP_STORED or claimed != member.compress_size:
                raise ValueError(f"{name[:100]} is compressed and claims {claimed:,} bytes; torch never compresses")
            if claimed > start:
                raise ValueError(f"{name[:100]} claims {claimed:,} bytes, the file has {size:,}")
            is_numbers = name.partition("/")[2].startswith("data/")
            if not is_numbers and claimed > MOST_PICKLE_BYTES:
                raise ValueError(f"{name[:100]} has {claimed:,} bytes, expected at most {MOST_PICKLE_BYTES:,}")


def directory_start(opened, size):
    """Where the table of contents of a zip file starts. It must end where the end records begin.

    Otherwise zipfile, which looks in front of the end records, and torch, which goes by their numbers, could read two
    different ones.
    """
    opened.seek(max(0, size - END.size - LOCATOR.size - END64.size))
    tail = opened.read()
    mark, *_, length, start, comment = END.unpack(tail[-END.size :])
    if mark != b"PK\x05\x06" or comment:
        raise ValueError("its end is missing, so it is not whole")
    end = size - END.size
    if tail[-END.size - LOCATOR.size :][:4] == b"PK\x06\x07":
        _, _, place, _ = LOCATOR.unpack(tail[-END.size - LOCATOR.size : -END.size])
        end -= LOCATOR.size + END64.size
        mark, *_, long_length, long_start = END64.unpack(tail[: END64.size])
        known = {(length, long_length), (start, long_start)}
        if mark != b"PK\x06\x06" or place != end or any(a not in (b, 2**32 - 1) for a, b in known):
            raise ValueError("its end records contradict each other")
        length, start = long_length, long_start
    if start + length != end or length > MOST_DIRECTORY_BYTES:
        raise ValueError(f"its table of contents claims {length:,} bytes from byte {start:,} on")
    return start


class Bounded:
    """The first MOST_PICKLE_BYTES of an open file, for pickletools: EOFError beyond them, and then none are left."""

    def __init__(self, opened):
        self.opened, self.left = opened, MOST_PICKLE_BYTES

    def _take(self, read, count):
        if count > self.left:
            self.left = 0
            raise EOFError
        found = read(count)
        self.left -= len(found)
        return found

    def read(self, count):
        return self._take(self.opened.read, count)

    def readline(self):
        return self._take(self.opened.readline, self.left)


def check_pickles(opened):
    """ValueError where the pickles that begin a file from before torch 1.6 are too long.

    These are a magic number, the version, facts of the system, the tensors and the names of their numbers, which follow.
    """
    bounded = Bounded(opened)
    with contextlib.suppress(Exception):  # bytes at random: no pickle, as torch.load will say
        for _ in range(5):
            for _ in pickletools.genops(bounded):
                pass
    if bounded.left < 1:
        raise ValueError(f"its pickles have more than {MOST_PICKLE_BYTES:,} bytes")


def check_safetensors(file: Path | str) -> None:
    """ValueError where the header of a safetensors file claims more than the file has, or than any model needs."""
    size = Path(file).stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(8)
    length = int.from_bytes(start, "little")
    if len(start) == 8 and length > min(size - 8, MOST_HEADER_BYTES):
        raise ValueError(
            f"its header claims {length:,} bytes, the file has {size:,}, and at most {MOST_HEADER_BYTES:,} are expected"
        )


def check_claim(name: str, tensor, size: int) -> None:
    """ValueError where a tensor in a file of `size` bytes claims more numbers than lie there for it."""
    claimed = tensor.numel() * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    on_file = min(held, size) if tensor.device.type == "cpu" else 0
    if max(claimed, held) > on_file:
        raise ValueError(f"{name} claims {max(claimed, held):,} bytes, and the file has {on_file:,} for it")
