"""What moves between machines: a directory known by a hash, as a list of what is in it."""

from schemas.base import Contract
from schemas.stage import FileDigest


class Parcel(Contract):
    """A directory that moves, with the hash of every file."""

    name: str
    """What it is and a hash: `model-`, `data-` or `cell-`."""
    files: tuple[FileDigest, ...]
    adapter_of: str = ""
    """Hash of the model that `adapter` is added to: the weights among `files` are then made anew
    where they are wanted, and do not travel."""
    adapter: tuple[FileDigest, ...] = ()

    @property
    def size_bytes(self) -> int:
        """What it takes where it has arrived."""
        return sum(one.size_bytes for one in (*self.files, *self.adapter))

    @property
    def sent_bytes(self) -> int:
        """What travels, and lies in the store."""
        sent = (one for one in self.files if not self.is_made(one))
        return sum(one.size_bytes for one in (*sent, *self.adapter))

    def is_made(self, file: FileDigest) -> bool:
        """Whether a file comes from the adapter and its base."""
        return bool(self.adapter_of) and ".safetensors" in file.path
