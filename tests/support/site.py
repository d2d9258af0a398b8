"""What `mkdocs build` does beyond mkdocs.yml: the READMEs are first pages, links that leave docs/ lead somewhere."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.nav import Navigation
    from mkdocs.structure.pages import Page
    from mkdocs.utils.templates import TemplateContext

ROOT = Path(__file__).parents[2]
#: File of the repository -> page of the site.
FIRST_PAGES = {"README.md": "index.md", "README.zh-CN.md": "zh/index.md"}
FILES = {page: file for file, page in FIRST_PAGES.items()}
CODE_OR_LINK = re.compile(
    r"^```.*?^```|(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?!https?:)(?P<file>[^)#\s]+)(?P<heading>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the READMEs."""
    from mkdocs.structure.files import File

    for readme, page in FIRST_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / readme).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of the repository into those of the site."""
    return site_links(markdown, page.file.src_uri, config.repo_url)


def on_page_context(context: TemplateContext, page: Page, config: MkDocsConfig, nav: Navigation) -> TemplateContext:
    """Let the theme speak the page's language: its own words, and `lang`, by which browsers choose fonts."""
    config.theme["language"] = "zh" if page.file.src_uri.startswith("zh/") else "en"
    return context


def site_links(markdown: str, page: str, repo_url: str | None) -> str:
    """Return a page's text with its links turned into those of the site.

    Args:
        markdown: as it is in the repository.
        page: the page in the site, such as `zh/switch.md`.
        repo_url: where the repository is on the web. A link to a file that is no page leads there; without it, only
            the link's text is left.
    """
    folder = posixpath.dirname(FILES.get(page, f"docs/{page}"))

    def turned(link: re.Match[str]) -> str:
        if not link["file"]:
            return link[0]
        target, heading = posixpath.normpath(posixpath.join(folder, link["file"])), link["heading"] or ""
        if target in FIRST_PAGES or target.startswith("docs/"):
            there = FIRST_PAGES.get(target, target.removeprefix("docs/"))
            return f"{link['text']}({posixpath.relpath(there, posixpath.dirname(page) or '.')}{heading})"
        if repo_url:
            return f"{link['text']}({repo_url.rstrip('/')}/blob/main/{target}{heading})"
        return link["text"].removeprefix("[").removesuffix("]")

    return CODE_OR_LINK.sub(turned, markdown)
