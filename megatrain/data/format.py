"""The shard format, version 1: what tar shards, their indexes and the manifest hold, and how they are read.

docs/format.md describes the bytes; data_prep/shards/ writes them. A set is a folder that `megatrain prep` wrote:

    DIR/tokenizer.json
    DIR/train/manifest.json              written last: without it there is no set
    DIR/train/shard-000000.tar           N.tokens and N.lengths, one pair a member
    DIR/train/shard-000000.json          the index: where each member lies, and its hash
    DIR/train/shard-000000.parquet       a row a document: id, url, source, language, metadata
    DIR/held_out/...                     the same for documents that are never trained on

Design choices:
- A member is about 4 MB of whole documents, so hashing, packing and remote reads have one unit, and the tar's padding
  is under 0.1% of the bytes.
- Everything is checked against something: manifest by its own sha256, index by the manifest, members by the index.
  Opening lists the folder once; an index is read when asked for; a member is hashed by who touches it first.
- A ShardSet may have its tars elsewhere than its indexes: so remote.py opens a set in a store.
- The shards of an open manifest are kept as the text that its sha256 is of, 350 bytes each, and an entry is made when
  asked for: a hundred thousand of them as Python objects would be 150 MB in every rank.
- Tars are plain USTAR with nothing in them that depends on when or by whom they were written, so equal input gives
  equal bytes. Payloads begin at multiples of 512: views of an mmap are aligned.
- No torch, no pyarrow: the trainer and the offline stage share this file alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.errors import GaveUp, InputError
from megatrain.storage import listing

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
TRAIN = "train"
HELD_OUT = "held_out"
LENGTH_DTYPE = np.dtype("<u4")
"""What `N.lengths` holds: the tokens of each document, its EOS included."""


@dataclass(frozen=True, slots=True)
class Member:
    """One pair `N.tokens`, `N.lengths` of a shard.

    name: N. tokens, documents: how many it holds. tokens_offset, lengths_offset: where the payloads begin in the tar,
    in bytes, multiples of 512. xxh3_128: `member_digest` of the payloads, hexadecimal.
    """

    name: str
    tokens: int
    documents: int
    tokens_offset: int
    lengths_offset: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard in the manifest.

    name: of the tar, in the manifest's folder. bytes: of the tar. source, language: what all its documents share, else
    None. xxh3_128, index_xxh3_128, metadata_xxh3_128: of the tar, the index and the Parquet file, hexadecimal.
    """

    name: str
    bytes: int
    members: int
    tokens: int
    documents: int
    source: str | None
    language: str | None
    xxh3_128: str
    index_xxh3_128: str
    metadata_xxh3_128: str


ENTRY_KEYS = tuple(field.name for field in fields(ShardEntry))


@dataclass(frozen=True)
class ShardList:
    """The shards of a manifest, in order. text: their canonical JSON, with commas between; ends: where each ends."""

    text: bytes
    ends: npt.NDArray[np.int64] = field(compare=False)

    @classmethod
    def of(cls, shards: Iterable[ShardEntry]) -> ShardList:
        """These shards."""
        return cls.joined([canonical_json(asdict(shard)) for shard in shards])

    @classmethod
    def joined(cls, texts: list[bytes]) -> ShardList:
        """The shards whose canonical JSON these are."""
        return cls(b",".join(texts), np.cumsum([len(text) + 1 for text in texts], dtype=np.int64) - 1)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> ShardEntry:
        return self._entry(self._begin(number), int(self.ends[number]))

    def __iter__(self) -> Iterator[ShardEntry]:
        begin = 0
        for end in self.ends.tolist():
            yield self._entry(begin, end)
            begin = end + 1

    def part(self, first: int, stop: int) -> ShardList:
        """Shards [first, stop), as far as there are; not an empty range."""
        begin, ends = self._begin(first), self.ends[first:stop]
        return ShardList(self.text[begin : int(ends[-1])], ends - begin)

    def _begin(self, number: int) -> int:
        return int(self.ends[number - 1]) + 1 if number else 0

    def _entry(self, begin: int, end: int) -> ShardEntry:
        return ShardEntry(**json.loads(self.text[begin:end]))


@dataclass(frozen=True)
class Manifest:
    """What a split is made of. `id_dtype` is "uint16" or "uint32"; every id is below `vocab_size`.

    counts: [source, language, documents, tokens] of each kind of documents. ids_compared, ids_different: documents
    whose ids were compared with those of Hugging Face's tokenizers, and how many of them had others before they were
    made anew. lineage_sha256: of lineage.json, which says how the set was made; None: there is none.
    """

    split: str
    id_dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    tokens: int
    documents: int
    shards: ShardList
    counts: tuple[tuple[str | None, str | None, int, int], ...] = ()
    ids_compared: int = 0
    ids_different: int = 0
    lineage_sha256: str | None = None
    tokenizer: str = TOKENIZER
    version: int = VERSION

    @cached_property
    def sha256(self) -> str:
        """sha256 of the canonical form, hexadecimal: what identifies this data."""
        empty = b'"shards":['
        before, _, after = canonical_json(self.with_shards([])).partition(empty)
        digest = hashlib.sha256(before + empty)
        digest.update(self.shards.text)
        digest.update(after)
        return digest.hexdigest()

    def with_shards(self, shards: object) -> dict[str, Any]:
        """Its fields by name, with something else as its shards."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"shards": shards}


class Tars(Protocol):
    """A folder in a remote store that tars are read from. str() is its URL."""

    def read_range(self, name: str, start: int, stop: int, make: Callable[[bytes], T]) -> T:
        """What `make` returns of bytes [start, stop) of a file. It may be called again, if it raises.

        Raises FileNotFoundError; GaveUp where the store doesn't answer, or what `make` raised last, if that is one.
        """


@dataclass(frozen=True)
class ShardSet:
    """One split. Made by `open_set` or `open_remote`, which have checked it.

    folder: where its manifest and indexes lie. tars: where the tars do, if in a remote store.
    damaged: which tars have another size than the manifest says, and theirs in bytes; empty unless that was allowed.
    """

    folder: Path
    manifest: Manifest
    tars: Tars | None = None
    damaged: Mapping[int, int] = field(default_factory=dict)

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The dtype of the stored ids, little-endian."""
        return np.dtype(self.manifest.id_dtype).newbyteorder("<")

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json that made the ids."""
        return self.folder.parent / self.manifest.tokenizer

    def path(self, shard: int) -> Path:
        """The tar of shard number `shard`, if it is local; its index lies beside this path in any case."""
        return self.folder / self.manifest.shards[shard].name

    def where(self, shard: int) -> str:
        """The path or URL of that tar, for people."""
        return f"{self.tars or self.folder}/{self.manifest.shards[shard].name}"

    def members(self, shard: int) -> tuple[Member, ...]:
        """The members of shard number `shard`, read anew from its index.

        Raises GaveUp if the index is not the one that the manifest was written with.
        """
        entry = self.manifest.shards[shard]
        path = index_path(self.path(shard))
        try:
            data = path.read_bytes()
        except OSError as error:
            raise GaveUp(f"{path}: can't read the index of the shard: {error.strerror}") from None
        if xxhash.xxh3_128_hexdigest(data) != entry.index_xxh3_128:
            raise GaveUp(f"{path}: altered since the manifest was written (xxh3-128 differs)")
        return tuple(Member(**member) for member in json.loads(data)["members"])


def open_set(path: Path | str, split: str = TRAIN, allow_damage: bool = False) -> ShardSet:
    """Opens the split of a set and checks that it is there.

    path: the folder that `megatrain prep` wrote, or that of the split itself. allow_damage: also with shards of another
    size, which are then in `damaged`.
    Raises InputError, naming the file, if the manifest is missing, altered or of another version, if it is another
    split's, or if the tokenizer, a shard or its index is missing, or a shard has another size.
    """
    path = Path(path)
    folder = path / split if (path / split / MANIFEST).is_file() else path
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{path}: no {split}/{MANIFEST} in it; give a folder that `megatrain prep` finished")
    manifest = read_manifest(folder / MANIFEST)
    if manifest.split != split:
        raise InputError(f"{folder}: holds the split {manifest.split}, and {split} was asked for")
    damaged = damaged_shards(manifest, str(folder), listing(folder), allow_damage, with_indexes=True)
    opened = ShardSet(folder, manifest, damaged=damaged)
    if not opened.tokenizer.is_file():
        raise InputError(f"{opened.tokenizer}: missing, and {folder / MANIFEST} names it")
    if hashlib.sha256(opened.tokenizer.read_bytes()).hexdigest() != opened.manifest.tokenizer_sha256:
        raise InputError(f"{opened.tokenizer}: not the tokenizer that made the shards (sha256 differs)")
    return opened


def damaged_shards(
    manifest: Manifest, folder: str, sizes: Mapping[str, int | None], allow_damage: bool, with_indexes: bool = False
) -> dict[int, int]:
    """The shards of another size than the manifest says, by number, and theirs.

    folder: where they are, for people. sizes: of the files that are there; None: not known. with_indexes: these have to
    be there too.
    Raises InputError where a shard is missing or, unless allow_damage, has another size.
    """
    damaged = {}
    for number, entry in enumerate(manifest.shards):
        needed = (entry.name, index_name(entry.name)) if with_indexes else (entry.name,)
        for name in needed:
            if name not in sizes:
                raise InputError(f"{folder}/{name}: missing, and the manifest lists it")
        size = sizes[entry.name]
        if size is not None and size != entry.bytes:
            if not allow_damage:
                raise InputError(f"{folder}/{entry.name}: has {size} bytes, and the manifest says {entry.bytes}")
            damaged[number] = size
    return damaged


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest by itself. Raises InputError naming the file."""
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(data: bytes, path: Path | str) -> Manifest:
    """Checks a manifest by itself. path: where it was read. Raises InputError naming it."""
    try:
        value = json.loads(data, object_hook=partial(_short_entry, path))
        version, sha256 = value["version"], value.pop("sha256")
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a manifest (JSON with version and sha256)") from None
    if version != VERSION:
        raise InputError(f"{path}: version {version} of the format, and this program reads version {VERSION}")
    try:
        for shard in value["shards"]:
            if not isinstance(shard, bytes):
                raise TypeError(f"its shards have {', '.join(ENTRY_KEYS)}, and not {', '.join(shard)}")
        counts = tuple((source, language, *numbers) for source, language, *numbers in value["counts"])
        manifest = Manifest(**value | {"shards": ShardList.joined(value["shards"]), "counts": counts})
        altered = manifest.sha256 != sha256
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a manifest of version {VERSION}: {error}") from None
    if altered:
        raise InputError(f"{path}: altered since it was written (sha256 differs)")
    _check_name(manifest.tokenizer, path)
    if manifest.id_dtype != id_dtype_name(manifest.vocab_size):
        legal = id_dtype_name(manifest.vocab_size)
        raise InputError(f"{path}: id_dtype={manifest.id_dtype}: {legal} is for vocab_size={manifest.vocab_size}")
    return manifest


def _short_entry(path: Path | str, value: dict[str, Any]) -> dict[str, Any] | bytes:
    """The canonical JSON of a shard's entry, where it is one: so that never all of them are Python objects."""
    if value.keys() != set(ENTRY_KEYS):
        return value
    _check_name(value["name"], path)
    return canonical_json(value)


def _check_name(name: str, path: Path | str) -> None:
    """Raises InputError where a manifest names a file outside of its folder."""
    if "/" in name or name in ("", ".", ".."):
        raise InputError(f"{path}: names {name!r}, which is not a plain file name")


def member_arrays(
    shard: bytes | mmap | npt.NDArray[np.uint8], member: Member, id_dtype: np.dtype[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint32]]:
    """Views of a member's payloads, not yet verified: ids id_dtype[tokens], lengths uint32[documents].

    shard: the bytes of the whole tar, such as an mmap.
    """
    ids = np.frombuffer(shard, id_dtype, member.tokens, member.tokens_offset)
    return ids, np.frombuffer(shard, LENGTH_DTYPE, member.documents, member.lengths_offset)


def member_digest(tokens: Buffer, lengths: Buffer) -> str:
    """xxh3-128 over the payload of `N.tokens` followed by that of `N.lengths`, hexadecimal."""
    digest = xxhash.xxh3_128(tokens)
    digest.update(lengths)
    return digest.hexdigest()


def id_dtype_name(vocab_size: int) -> str:
    """The id type of a vocabulary: uint16 where every id fits."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_name(number: int) -> str:
    """The file name of shard `number` of a split."""
    return f"shard-{number:06d}.tar"


def index_name(shard: str) -> str:
    """The file name of a shard's index."""
    return f"{Path(shard).stem}.json"


def index_path(shard: Path) -> Path:
    """The index beside a shard."""
    return shard.with_name(index_name(shard.name))


def metadata_path(shard: Path) -> Path:
    """The document metadata beside a shard."""
    return shard.with_suffix(".parquet")


def canonical_json(value: object) -> bytes:
    """What a hash over JSON is a hash of: sorted keys, no spaces, ASCII. Values hold no floats."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
