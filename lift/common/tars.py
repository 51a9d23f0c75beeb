"""The files in an uncompressed tar, by their headers alone: in goes the open tar, out come names and places of the contents."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, Any

from lift.common.errors import UserError


def tar_files(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo]:
    """The members of the tar that are files, in order; `offset_data` and `size` say where in `file` their contents lie.

    The caller may read from `file` on the way. Member names are as they stand in the tar: they may lead out of a folder.

    Args:
        file: open for reading, seekable.
        name: of the tar, for messages.
    Raises:
        UserError: not a whole, uncompressed tar.
    """
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            archive: Any = opened
            for member in archive:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isfile():
                    yield member
                archive.members = []  # else it keeps a large object for each of a million members
            # tarfile takes a file that was cut off for one that ends there; only the mark of the end tells them apart
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"the mark of its end is missing at byte {end}")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{name}: not a whole, uncompressed tar: {error}. Fetch the file again or remove it.") from error
