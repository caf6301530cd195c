"""Check that the built documentation site loads nothing from a network.

python -m tools.docs.check_site site    # `make docs` runs this command
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import click

# {tag: attributes with an address that a browser fetches without a click}; an <a> is fetched only after a click.
LOADED = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
}
NOT_FETCHED = {"alternate", "author", "canonical", "next", "prev"}  # values of <link rel> that a browser does not fetch
REMOTE = re.compile(r"(?:https?:)?//")
REMOTE_IN_CSS = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""")


class _Page(HTMLParser):
    """Collects the remote addresses that a browser loads for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.remote += REMOTE_IN_CSS.findall(values.get("style", ""))
        if tag == "link" and set(values.get("rel", "").split()) <= NOT_FETCHED:
            return
        self.remote += [values[name] for name in LOADED.get(tag, ()) if REMOTE.match(values.get(name, "").strip())]

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.remote += REMOTE_IN_CSS.findall(data)


def remote_resources(site: Path) -> Iterator[tuple[Path, str]]:
    """Yield pairs (file of the site, remote address that a browser would load for this file)."""
    for path in sorted(site.rglob("*.html")):
        page = _Page()
        page.feed(path.read_text("utf-8"))
        yield from ((path, address) for address in page.remote)
    for path in sorted(site.rglob("*.css")):
        yield from ((path, address) for address in REMOTE_IN_CSS.findall(path.read_text("utf-8")))


@click.command()
@click.argument("site", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(site: Path) -> None:
    """Fail if a page or style sheet of SITE loads anything from a network."""
    remote = list(remote_resources(site))
    for path, address in remote:
        click.echo(f"{path}: loads {address}", err=True)
    if remote:
        raise click.ClickException(f"{site}: {len(remote)} remote resources. Put these files into docs/assets.")
    pages = len(list(site.rglob("*.html")))
    if not pages:
        raise click.ClickException(f"{site}: no page. Build the site first: make docs")
    click.echo(f"{site}: {pages} pages, nothing loaded from a network. Open {site / 'index.html'}")


if __name__ == "__main__":
    main()
