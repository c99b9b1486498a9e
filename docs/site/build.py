"""Builds the documentation site: the pages of docs/, and those that are made from the program.

    python docs/site/build.py [DIR]

DIR is site/ if not given. Every warning, a broken link among them, fails the build. Nothing is fetched.
"""

import contextlib
import io
import pathlib
import re
import shutil
import sys
import tempfile

from sphinx.cmd import build as sphinx

from sedd_jax.cli import main as cli

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PACKAGE = REPOSITORY / "sedd_jax"
# Pages whose files stand in the repository's root.
BESIDE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
CONTENTS = {
    "Guides": ("training", "data", "sampling", "evaluation", "conversion", "scaling", "performance"),
    "The paper": ("equations", "from_the_paper"),
    "Reference": ("commands", "api"),
    "Development": ("architecture", "contributing", "security", "changelog", "log"),
}
# They need torch, transformers or lm-evaluation-harness, which need not be installed.
LEFT_OUT = {
    "sedd_jax.conversion.modeling_sedd",
    "sedd_jax.conversion.torch_model",
    "sedd_jax.harness",
    "sedd_jax.performance.benchmark_published",
}
_TOP = """## sedd_jax

```{eval-rst}
.. autofunction:: sedd_jax.open
.. autofunction:: sedd_jax.train
```
"""


def main(target: pathlib.Path) -> int:
    """Builds the site and returns the exit status."""
    with tempfile.TemporaryDirectory() as directory:
        pages = pathlib.Path(directory) / "pages"
        shutil.copytree(HERE.parent, pages, ignore=shutil.ignore_patterns("site", "*.py"))
        for page, name in BESIDE.items():
            (pages / page).write_text(_from_root(REPOSITORY / name), encoding="utf-8")
        (pages / "commands.md").write_text(_commands(), encoding="utf-8")
        for page, content in _reference().items():
            (pages / page).parent.mkdir(exist_ok=True)
            (pages / page).write_text(content, encoding="utf-8")
        with (pages / "index.md").open("a", encoding="utf-8") as index:
            index.write("".join(_contents(title, names) for title, names in CONTENTS.items()))
        shutil.rmtree(target, ignore_errors=True)
        return make(pages, target)


def make(pages: pathlib.Path, target: pathlib.Path) -> int:
    """Turns a folder of pages into a site and returns the exit status."""
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--conf-dir", str(HERE)]
    return sphinx.main([*options, "--doctree-dir", f"{pages}-read", str(pages), str(target)])


def _contents(title, names):
    return "\n".join(["\n```{toctree}", ":hidden:", f":caption: {title}\n", *names, "```\n"])


def _from_root(path):
    """The text of a file of the root, its links as seen from docs/."""
    text = path.read_text(encoding="utf-8").replace("](docs/", "](")
    for page, name in BESIDE.items():
        text = text.replace(f"]({name})", f"]({page})")
    return re.sub(r"\[([^\]]*)\]\((LICENSE|CITATION\.cff)\)", r"\1", text)


def _reference():
    """Pages of the API: the front door, and one for each folder of the package."""
    top = [f"sedd_jax.{path.stem}" for path in sorted(PACKAGE.glob("[a-z]*.py"))]
    top = [name for name in top if name not in LEFT_OUT]
    pages = {"api/front_door.md": _modules("Python's front door", top, first=_TOP)}
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        names = (f"sedd_jax.{folder.name}.{path.stem}" for path in sorted(folder.glob("*.py")))
        modules = [name for name in names if not name.endswith(".__init__") and name not in LEFT_OUT]
        pages[f"api/{folder.name}.md"] = _modules(f"sedd_jax.{folder.name}", modules)
    names = "\n".join(page.removesuffix(".md") for page in pages)
    text = "Shapes are those of jaxtyping: `Float[Array, 'B L V']` is an array of B sequences, L positions, V states.\n"
    return pages | {"api.md": f"# Python's API\n\n{text}\n```{{toctree}}\n:maxdepth: 2\n\n{names}\n```\n"}


def _modules(title, names, first=""):
    parts = [f"# {title}\n", first]
    for name in names:
        parts.append(f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n")
    return "\n".join(parts)


def _commands():
    """What `--help` says of every command."""
    parts = ["# Commands and flags", "`sedd COMMAND --help` prints the same."]
    for name in cli.COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = cli.main([name, "--help"])
        assert status == 0, f"sedd {name} --help fails"
        summary, example, *sections = printed.getvalue().strip().split("\n\n")
        parts += [f"## sedd {name}", summary, f"```\n{example.strip()}\n```"]
        for section in sections:
            title, *lines = section.splitlines()
            rows = [_row(*line.strip().partition("  ")[::2]) for line in lines]
            parts.append("\n".join([f"| {title.removesuffix(':')} | |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _row(flag, meaning):
    literal = lambda text: re.sub(r"[|*_<>\[\]{}$\\]", lambda found: f"&#{ord(found[0])};", text)
    # Other flags that are named there stand as code, which keeps their dashes.
    parts = re.split(r"(--\w+(?:=\w+)?)", meaning)
    shown = "".join(f"`{part}`" if part.startswith("--") else literal(part) for part in parts)
    escaped = flag.replace("|", "\\|")
    return f"| `{escaped}` | {shown} |"


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else REPOSITORY / "site")))
