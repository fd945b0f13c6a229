"""A store of reference values on disk: one checksummed record a sequence, in an LMDB environment.

LMDB is memory-mapped, has one writer and many readers at a time over all processes of a machine, and a commit is whole
or not there, at whatever byte a process is killed. What it cannot see, wrong bytes in a page, the checksums do.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tokenpo.errors import InputError, TokenpoError
from tokenpo.reference.key import Fingerprint, difference, digest

Record = dict[str, Tensor]
"""`logps` (T,), and what else is kept: `hidden` (T, d), or `top_ids`, `top_logps` (T, k) and `rest` (T, 3)."""

META = b"meta"
MAGIC = b"tpo1"
ARRAYS = ("logps", "hidden", "top_ids", "top_logps", "rest")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32)
HEAD = struct.Struct("<4s8sIB")  # magic, store, tokens, arrays
ARRAY = struct.Struct("<BBI")  # name, dtype, width: 0 for (T,)
CHECKSUM = 16
MAP_SIZE = 1 << 42
"""Address space, not memory or disk: the file grows as it is filled, up to this."""
_OPEN: WeakValueDictionary[tuple[int, int, int], Any] = WeakValueDictionary()


def sequence_key(prompt_ids: Any, response_ids: Any) -> bytes:
    """16 bytes that stand for a prompt and a response, given as int64 arrays."""
    content = hashlib.sha256(len(prompt_ids).to_bytes(8, "little"))
    content.update(prompt_ids.tobytes())
    content.update(response_ids.tobytes())
    return content.digest()[:16]


class Store:
    """The records of one fingerprint, in `folder`; `keep` says what a record holds ("logps", "hidden", "topk 64").

    `write`: may be created and added to. Without `key` any store is opened, to look at it.
    Closed when it is forgotten.
    Raises InputError, in one sentence, for a folder that holds no store, one that cannot be read or written, a store
    of another fingerprint (with the first field that differs and both values) or of another `keep`, a file cut short.
    """

    def __init__(
        self, folder: Path | str, key: Fingerprint | None = None, keep: str | None = None, *, write: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.env = _environment(self.folder, write)
        self.key, self.keep = self._agree(key, keep, write)
        self._refuse_cut()
        self.id = digest(self.key)[:8]

    def put(self, records: Mapping[bytes, Record]) -> None:
        """Write records in one transaction: all of them are on the disk when this returns, or none."""
        with self._writing() as transaction:
            for key, record in records.items():
                transaction.put(key, encode(record, key, self.id))

    def get(self, keys: Sequence[bytes], names: Sequence[str]) -> list[Record]:
        """The records of `keys`, each checked whole; `names` say in errors whose they are ("train row 3, chosen")."""
        found = []
        for (record, fault), name in zip(self.look(keys), names, strict=True):
            if record is None:
                raise InputError(
                    f"the reference cache in {self.folder} has {fault} for {name}: run tokenpo cache build, which "
                    "computes it"
                )
            found.append(record)
        return found

    def look(self, keys: Iterable[bytes]) -> Iterator[tuple[Record | None, str]]:
        """(record, "") for each key, or (None, what is wrong): "no record", or the fault of the one there is."""
        with self._reading() as transaction:
            for key in keys:
                data = transaction.get(key)
                yield (None, "no record") if data is None else decode(data, key, self.id)

    def keys(self) -> list[bytes]:
        """Of all records."""
        with self._reading() as transaction:
            return [bytes(key) for key in transaction.cursor().iternext(values=False) if bytes(key) != META]

    def __len__(self) -> int:
        return self.env.stat()["entries"] - 1

    def tokens(self) -> int:
        """Response tokens in all records, by what their headers say."""
        with self._reading() as transaction:
            records = (value for key, value in transaction.cursor() if bytes(key) != META)
            return sum(HEAD.unpack_from(value)[2] for value in records if len(value) >= HEAD.size)

    def bytes_on_disk(self) -> int:
        return os.stat(self.folder / "data.mdb").st_blocks * 512

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        try:
            with self.env.begin(write=True) as transaction:
                yield transaction
        except _lmdb().Error as reason:
            raise TokenpoError(
                f"could not write to the reference cache in {self.folder} (is the disk full?): {reason}; the rows "
                "finished before are kept, and the same command goes on with them"
            ) from reason

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        try:
            with self.env.begin(buffers=True) as transaction:
                yield transaction
        except _lmdb().Error as reason:
            raise InputError(
                f"the reference cache in {self.folder} is damaged ({reason}): remove the folder and run tokenpo cache "
                "build"
            ) from reason

    def _agree(self, key: Fingerprint | None, keep: str | None, write: bool) -> tuple[Fingerprint, str]:
        """The store's fingerprint and `keep`, after comparison with those wanted; written first where it is new."""
        with self.env.begin() as transaction:  # both in one: another process may write the first of them, META
            found, something = transaction.get(META), transaction.cursor().first()
        if found is None and something:
            raise InputError(f"{self.folder} holds an LMDB that is no reference cache: choose another folder")
        if found is None and (not write or key is None or keep is None):
            raise InputError(_nothing(self.folder))
        if found is None:
            ours = json.dumps({"keep": keep, "fingerprint": key}).encode()
            with self._writing() as transaction:
                transaction.put(META, ours, overwrite=False)  # another process may have been here first
                found = transaction.get(META)
        meta = json.loads(found)
        differs = None if key is None else difference(meta["fingerprint"], key)
        if differs is not None:
            raise InputError(
                f"the reference cache in {self.folder} was made for something else: {differs}; give another "
                "cache.folder, or remove this one"
            )
        if keep is not None and keep != meta["keep"]:
            raise InputError(
                f"the reference cache in {self.folder} keeps {meta['keep']} and {keep} is needed ('keep' differs): "
                "give another cache.folder, or remove this one"
            )
        return meta["fingerprint"], meta["keep"]

    def _refuse_cut(self) -> None:
        """Pages beyond the end of a memory-mapped file would end the process without a word."""
        needed = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        size = (self.folder / "data.mdb").stat().st_size
        if size < needed:
            raise InputError(
                f"{self.folder / 'data.mdb'} is cut short: it has {size} of {needed} bytes; copy it again, or remove "
                "the folder and run tokenpo cache build"
            )


def encode(record: Record, key: bytes, store: bytes) -> bytes:
    """Header, checksum, arrays. The checksum is over all other bytes and the key."""
    names = [name for name in ARRAYS if name in record]
    arrays = [record[name].detach().cpu().contiguous() for name in names]
    head = HEAD.pack(MAGIC, store, len(record["logps"]), len(names))
    for name, array in zip(names, arrays, strict=True):
        width = array.shape[1] if array.dim() == 2 else 0
        head += ARRAY.pack(ARRAYS.index(name), DTYPES.index(array.dtype), width)
    body = b"".join(array.reshape(-1).view(torch.uint8).numpy().tobytes() for array in arrays)
    return head + _checksum(head, key, body) + body


def decode(data: Any, key: bytes, store: bytes) -> tuple[Record | None, str]:
    """(record, "") from what `encode` gave, its bytes copied; or (None, the fault)."""
    data = memoryview(data)
    if len(data) < HEAD.size or bytes(data[:4]) != MAGIC:
        return None, "a corrupt record"
    _, owner, tokens, count = HEAD.unpack_from(data)
    if owner != store:
        return None, "a record of another store"
    start = HEAD.size + count * ARRAY.size
    body = data[start + CHECKSUM :]
    if bytes(data[start : start + CHECKSUM]) != _checksum(data[:start], key, body):
        return None, "a corrupt record (its checksum is wrong)"
    record, done = {}, 0
    whole = bytearray(body)
    for i in range(count):
        name, dtype, width = ARRAY.unpack_from(data, HEAD.size + i * ARRAY.size)
        shape = (tokens, width) if width else (tokens,)
        numbers = tokens * max(width, 1)
        record[ARRAYS[name]] = torch.frombuffer(whole, dtype=DTYPES[dtype], count=numbers, offset=done).view(shape)
        done += numbers * DTYPES[dtype].itemsize
    return record, ""


def _checksum(head: Any, key: bytes, body: Any) -> bytes:
    found = hashlib.sha256(head)
    found.update(key)
    found.update(body)
    return found.digest()[:CHECKSUM]


def _environment(folder: Path, write: bool) -> Any:
    """The environment in `folder`: the one that is open in this process, since LMDB allows no second, or a new one."""
    lmdb = _lmdb()
    there = (folder / "data.mdb").is_file()
    if there and (found := _OPEN.get(_place(folder))) is not None:
        return found
    if not there and not write:
        raise InputError(_nothing(folder))
    try:
        ours = ("lock.mdb", "data.mdb")  # another process may make the store just now
        if not there and folder.is_dir() and any(f.name not in ours for f in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no reference cache: choose another cache.folder")
        if write:
            folder.mkdir(parents=True, exist_ok=True)
        # a folder that cannot be written has no writer either: then nothing to lock
        options = {"readonly": not os.access(folder, os.W_OK), "lock": os.access(folder, os.W_OK)}
        if write and options["readonly"] and not there:
            raise PermissionError(errno.EACCES, "Permission denied")
        found = lmdb.open(str(folder), map_size=MAP_SIZE, readahead=False, **options)
    except (OSError, lmdb.Error) as reason:
        use = "write" if write else "read"
        why = getattr(reason, "strerror", None) or reason
        raise InputError(f"cannot {use} the reference cache in {folder}: {why}; take another cache.folder") from reason
    _OPEN[_place(folder)] = found
    return found


def _place(folder: Path) -> tuple[int, int, int]:
    file = (folder / "data.mdb").stat()
    return os.getpid(), file.st_dev, file.st_ino  # not across a fork


def _nothing(folder: Path) -> str:
    return f"there is no reference cache in {folder}: run tokenpo cache build"


def _lmdb() -> Any:
    import lmdb

    return lmdb
