"""The site is made of files that are written to be read in the repository; this fits their links to it.

README and CONTRIBUTING become pages, pictures of the benchmarks come along, a line that is nothing but a link to a Python
file is followed by that file, and a link to anything that is no page becomes its text.
"""

import re
from pathlib import Path
from posixpath import normpath

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")
LISTING = re.compile(r"^\[[^\]]*\]\(([^)#]+\.py)\)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for picture in sorted((ROOT / "benchmarks").rglob("*.png")):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = next((name for name, uri in PAGES.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}")
    folder = source.rpartition("/")[0]

    def listing(match: re.Match[str]) -> str:
        name = normpath(f"{folder}/{match[1]}".lstrip("/"))
        code = (ROOT / name).read_text(encoding="utf-8")
        return f'```python title="{name}"\n{code}```'

    def link(match: re.Match[str]) -> str:
        is_picture, text, target, anchor = match.groups()
        name = normpath(f"{folder}/{target}".lstrip("/"))
        if not (ROOT / name).exists():
            raise FileNotFoundError(f"{source} has a link to {target}, which does not exist.")
        uri = PAGES.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return text
        return f"{is_picture}[{text}]({uri}{anchor or ''})"

    return LINK.sub(link, LISTING.sub(listing, markdown))


class Examples(griffe.Extension):
    """`Example:` is a section of doctests, which the parser knows by its plural only."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
