"""Which files the names in an annotation file mean, if exporters added folders, backslashes or escapes to them."""

import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from posixpath import splitext
from urllib.parse import unquote

LABEL_STUDIO = re.compile(r"[0-9a-f]{8}-(?=.)")  # what it puts in front of the name of an upload


def match_names(names: Iterable[str], files: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    r"""Find the file that each name means: ({name: file}, {name: the files it may mean} where that is not clear).

    A name and a file match if one ends in all of the other, part by part: `C:\data\a\1.png` and `a/1.png`, or `1.png`
    and `a/1.png`. The longest match counts. Both are compared without percent-encoding and upper case, with `/` for
    `\` and in Unicode's NFC. A name that matches no file is tried again without Label Studio's `1a2b3c4d-`, and a URL
    without its query. A file that several names mean is none of theirs, nor is one of another suffix; `unclear` says
    why there is no match.
    """
    by_end: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
    by_stem: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
    for file in files:
        for index, parts in ((by_end, _parts(file)), (by_stem, _stem(_parts(file)))):
            if parts:
                index[parts[-1]].append((parts, file))
    found, several = {}, {}
    for name in dict.fromkeys(names):
        parts, of_url = _parts(name), _parts(name.partition("?")[0]) if "://" in name else ()
        uploaded = (*parts[:-1], LABEL_STUDIO.sub("", "".join(parts[-1:]), count=1))
        best = _best(parts, by_end) or _best(uploaded, by_end) or _best(of_url, by_end)
        if len(best) == 1:
            found[name] = best[0]
        elif best or (best := _best(_stem(parts), by_stem)):
            several[name] = best
    claims = Counter(found.values())
    several |= {name: [file] for name, file in found.items() if claims[file] > 1}
    return {name: file for name, file in found.items() if claims[file] == 1}, several


def unclear(name: str, several: Mapping[str, list[str]]) -> str:
    """Why `match_names` has no file for `name`, to end a message: ` may be a/1.png or b/1.png`; "" without a reason."""
    files = several.get(name, [])
    others = [other for other, of in several.items() if of == files and other != name]
    if files and splitext(files[0])[1].lower() != splitext(name)[1].lower():
        return f" has another suffix than {files[0]}: correct the name"
    if len(files) == 1 and others:
        return f" may be {files[0]}, and so may {others[0]}"
    return f" may be {' or '.join(sorted(files)[:2])}" if files else ""


def _parts(name: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFC", unquote(name)).casefold().replace("\\", "/")
    return tuple(part for part in posixpath.normpath(text).split("/") if part not in ("", ".", ".."))


def _stem(parts: tuple[str, ...]) -> tuple[str, ...]:
    return (*parts[:-1], splitext(parts[-1])[0]) if parts else ()


def _best(parts: tuple[str, ...], by_end: dict[str, list[tuple[tuple[str, ...], str]]]) -> list[str]:
    """The files that match the longest part of a name."""
    matches: dict[tuple[int, bool], list[str]] = defaultdict(list)
    for of_file, file in by_end.get(parts[-1], ()) if parts else ():
        shared = min(len(parts), len(of_file))
        if parts[-shared:] == of_file[-shared:]:
            matches[shared, parts == of_file].append(file)
    return matches[max(matches)] if matches else []
