"""One file from one URL: torch.hub downloads it, once for all processes of a machine."""

import os
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import torch

from resbackbone.atomic import file_digest
from resbackbone.checks import UserError


def download(url: str, to: str | os.PathLike, *, sha256: str = "", md5: str = "") -> None:
    """Download `url` to `to` if there is no such file yet. Other processes that want it wait for the first one.

    `sha256` or `md5` are the first hexadecimal digits of the hash that the publisher states. A file gets the name `to`
    only when it has that hash. Raises ValueError if the file cannot be downloaded; the message says what to fetch and
    where to put it.
    """
    from filelock import FileLock

    to = Path(to)
    part = to.with_name(f"{to.name}.part")
    algorithm, stated = ("md5", md5.lower()) if md5 else ("sha256", sha256.lower())
    if to.is_file():  # before the lock: the folder may be read-only
        return
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(to.with_name(f".{to.name}.lock")):
            if to.is_file():
                return
            print(f"downloading {url} to {to}", file=sys.stderr)
            torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
            if not (digest := file_digest(part, algorithm)).startswith(stated):
                part.unlink()
                raise UserError(f"{url} has the {algorithm} {digest}, but {stated} is published; it was not kept")
            os.replace(part, to)
    except (OSError, HTTPException) as error:  # URLError and HTTPError are OSErrors
        reason = f"{error.code} {error.reason}" if isinstance(error, HTTPError) else getattr(error, "reason", error)
        reason = (str(reason).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{url} could not be downloaded ({reason}); download it elsewhere and put it at {to}") from None
