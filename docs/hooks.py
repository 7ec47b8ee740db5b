"""mkdocs: pages may link to files of the repository that lie outside docs/; these become part of the site."""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")  # text, path, anchor; of no picture or URL


def address(path: Path) -> str:
    """Where a file of the repository lies in the site: docs/ is its root, what is outside lies beside."""
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def on_files(files, config):
    """Add what pages link to outside docs/, and what these link to in turn."""
    paths = [Path(file.abs_src_path) for file in files]
    seen = {address(path) for path in paths if path.is_relative_to(ROOT)}  # the theme's may lie elsewhere
    pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
    while pages:
        page = pages.pop()
        for _, link, _ in LINK.findall(page.read_text(encoding="utf-8")):
            target = Path(os.path.normpath(page.parent / link))
            if target.is_file() and target.is_relative_to(ROOT) and address(target) not in seen:
                seen.add(address(target))
                files.append(File.generated(config, address(target), abs_src_path=str(target)))
                pages += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown, page, config, files):
    """Links by where files lie in the site. A folder has no page there: of a link to one its text is left."""
    source = Path(page.file.abs_src_path)

    def rewritten(link: re.Match) -> str:
        text, path, anchor = link.groups()
        target = Path(os.path.normpath(source.parent / path))
        if target.is_dir():
            return text
        if not target.is_file():
            return link[0]  # mkdocs warns of it
        here = os.path.dirname(address(source)) or "."
        return f"[{text}]({Path(os.path.relpath(address(target), here)).as_posix()}{anchor or ''})"

    return LINK.sub(rewritten, markdown)
