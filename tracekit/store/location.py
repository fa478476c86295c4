"""Where a store lies: in a directory, or at a URL of object storage, where Polars reads it and nothing writes."""

from __future__ import annotations

import atexit
import hashlib
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracekit.errors import StoreError, UsageError

if TYPE_CHECKING:
    import polars as pl

_S3 = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL, or AWS_SKIP_SIGNATURE=true"
_AZURE = "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
ACCESS = {
    **dict.fromkeys(("s3", "s3a"), _S3),
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    **dict.fromkeys(("az", "azure", "abfs", "abfss", "adl"), _AZURE),
    "hf": "HF_TOKEN",
    **dict.fromkeys(("https", "http"), ""),
}
"""What URLs may begin with: what Polars reads. With each the variables of the environment that give access."""

_PATIENCE: dict[str, Any] = {"read_timeout": "30s"}
"""Without it, Polars waits for ever for a server that says nothing. It tries again for half a minute by itself."""


class Url(str):
    """The URL of a store or of a file of it, with what is used of a path's methods."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The last part of it."""
        return self.rpartition("/")[2]

    @property
    def access(self) -> str:
        """What to do where it cannot be read."""
        variables = ACCESS[self.partition("://")[0]]
        return "Check the URL" + (f", and what gives access to it in the environment: {variables}" if variables else "")

    @property
    def options(self) -> dict[str, Any] | None:
        """The ``storage_options`` that Polars reads it with."""
        return None if self.startswith("hf:") else _PATIENCE  # of Hugging Face it takes a token alone

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self}/{name}")

    def absolute(self) -> Url:
        """Return itself."""
        return self

    def text(self) -> str:
        """Return the text of the file that lies there.

        Raises
        ------
        OSError, polars.exceptions.PolarsError
            It cannot be read.
        """
        import polars as pl

        return "\n".join(pl.read_lines(self, glob=False, storage_options=self.options).to_series())


Location = Path | Url


def location(path: str | Path) -> Location:
    """Return the path, or the URL if it is one.

    Raises
    ------
    UsageError
        Nothing reads URLs that begin so.
    """
    scheme, colon, rest = str(path).partition("://")
    if isinstance(path, Path) or not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return Path(path)
    if scheme not in ACCESS or not rest.strip("/"):
        first = ", ".join(f"{scheme}://" for scheme in ACCESS)
        raise UsageError(f"the URL {path}", expected=f"a directory, or a URL that begins with {first}")
    return Url(path.rstrip("/"))


def scan(*files: Location) -> pl.LazyFrame:
    """Return the rows of Parquet files of a store, with the columns of the first."""
    import polars as pl

    options = files[0].options if isinstance(files[0], Url) else None
    return pl.scan_parquet(list(map(str, files)), glob=False, extra_columns="ignore", storage_options=options)


def on_disk(path: str | Path) -> Path:
    """Return the directory of a store that is to be written to.

    Raises
    ------
    StoreError
        It is a URL.
    """
    place = location(path)
    if isinstance(place, Url):
        raise StoreError(
            "a store at a URL can be read only",
            where=place,
            remedy="Write to a store on a disk, and copy its folder there with a tool of that storage",
        )
    return place


def beside(root: Location) -> Path:
    """Return where the results of a store are kept: in itself, or of a URL in a directory of this process."""
    if isinstance(root, Path):
        return root
    directory = temporary() / hashlib.blake2b(root.encode(), digest_size=8).hexdigest()
    directory.mkdir(exist_ok=True)
    return directory


@cache
def temporary() -> Path:
    """Return this process's private directory; it is removed at exit."""
    directory = tempfile.mkdtemp(prefix="tracekit-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def reason(error: object) -> str:
    """Return what an error, or a text, says is wrong; of object storage, without the request and its answer."""
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket" if "NoSuchBucket" in text else "it is not there"
    if isinstance(error, PermissionError) and "object-store error" in text:
        return "access is denied"
    first, _, rest = text.partition("\n")
    first = re.sub(r" \(path: .*\)", "", first.removeprefix("object-store error: ")).strip()
    *_, cause = rest.partition("Caused by:")[2].split("\n")
    return ": ".join(filter(None, [first, re.sub(r"^\d+: ", "", cause.strip())]))
