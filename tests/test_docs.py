"""The pages of documentation: links lead somewhere, code beside equations is the program's, and the site is strict."""

import html.parser
import os
import re
import subprocess
import sys

import pytest

from tests.support import places

DOCS = places.REPOSITORY / "docs"
PAGES = sorted([*places.REPOSITORY.glob("*.md"), *DOCS.glob("*.md")])
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_SHOWN = re.compile(r"`((?:diffusion|reverse)/\w+\.py)`|```python\n(.*?)```", re.DOTALL)


def _headings(path):
    """Anchors of a page's headings, as GitHub makes them."""
    lines = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in _headings(target), link


def test_the_code_beside_the_equations_is_the_program_s():
    file, compared = None, 0
    for name, code in _SHOWN.findall((DOCS / "equations.md").read_text(encoding="utf-8")):
        if name:
            file = places.PACKAGE / name
            continue
        plain = lambda text: "\n".join(line.strip() for line in text.strip().splitlines())
        assert plain(code) in plain(file.read_text(encoding="utf-8")), f"{file.name} has no such lines:\n{code}"
        compared += 1
    assert compared > 15


def _build(pages, target):
    """Makes a site of a folder of pages, by a process of its own; returns its status and what it says."""
    for library in ("sphinx", "furo", "myst_parser", "latex2mathml"):
        pytest.importorskip(library, reason="pip install -e '.[docs]'")
    code = (
        "import pathlib, runpy, sys; script, *places = map(pathlib.Path, sys.argv[1:]); "
        "sys.exit(runpy.run_path(script)['make'](*places))"
    )
    command = [sys.executable, "-c", code, DOCS / "site" / "build.py", pages, target]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("[x](nowhere.md)", "nowhere.md"),
        ("[x](#nowhere)", "nowhere"),
        ("![x](nowhere.png)", "image file not readable"),
    ],
)
def test_a_broken_link_fails_the_site(tmp_path, link, said):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text(f"# A page\n\n{link}\n")
    status, printed = _build(tmp_path / "pages", tmp_path / "site")
    assert status == 1, printed
    assert said in printed


class _Loaded(html.parser.HTMLParser):
    """What a browser fetches for a page."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        if tag in ("script", "img"):
            self.addresses.append(named.get("src"))
        if tag == "link":
            self.addresses.append(named.get("href"))


@pytest.mark.slow
def test_a_page_loads_nothing_from_elsewhere_and_formulas_need_no_program(tmp_path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text(
        (DOCS / "equations.md").read_text().replace("(from_the_paper.md)", "#")
    )
    status, printed = _build(tmp_path / "pages", tmp_path / "site")
    assert status == 0, printed
    page = _Loaded((tmp_path / "site" / "index.html").read_text())
    addresses = [address for address in page.addresses if address]
    assert addresses
    assert not [address for address in addresses if re.match(r"(https?:)?//", address)]
    assert page.tags.count("math") > 40
    styles = "".join(path.read_text() for path in (tmp_path / "site" / "_static").rglob("*.css"))
    assert not re.findall(r"url\(['\"]?(?:https?:)?//", styles)
