"""What MkDocs gets beside mkdocs.yml: the documents of the whole repository, and the pages of the reference.

Pages have the paths of their files in the repository, so a relative link means the same here and on GitHub. The library
is read, never imported: the environment of the site has no torch.
"""

import ast
import os
import posixpath
import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHOWN = (".md", ".png", ".svg")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
MODULE = "      show_root_full_path: true\n      show_source: false\n      show_if_no_docstring: false\n"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def tracked() -> list[str]:
    """Paths of the repository's files: committed, or new and not ignored. Hidden folders are not documents."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, check=True, text=True).stdout.split("\0")
    return [name for name in sorted(set(names)) if name and not name.startswith(".") and (ROOT / name).is_file()]


def documents() -> list[str]:
    """Paths of the documents and of their figures."""
    return [name for name in tracked() if name.endswith(SHOWN)]


def public() -> dict[str, str]:
    """Public name -> its module, of the imports in `latentac/__init__.pyi`."""
    lines = ast.parse((ROOT / "latentac" / "__init__.pyi").read_text()).body
    imported = [line for line in lines if isinstance(line, ast.ImportFrom) and line.level == 1]
    return {name.asname or name.name: f"latentac.{line.module}" for line in imported for name in line.names}


def modules() -> dict[str, list[str]]:
    """Folder of the library, dotted -> its modules, dotted. `components` and `pipelines` are links in it."""
    found: dict[str, list[str]] = {}
    for name in tracked():
        if name.endswith(".py") and name.split("/")[0] in ("latentac", "components", "pipelines"):
            parts = Path(name).with_suffix("").parts
            dotted = ".".join(parts if parts[0] == "latentac" else ("latentac", *parts))
            if not dotted.endswith("__main__"):
                folder, _, stem = dotted.rpartition(".")
                found.setdefault(folder, []).append(folder if stem == "__init__" else dotted)
    return {folder: sorted(names) for folder, names in sorted(found.items()) if folder != "latentac"}


def page_of(folder: str) -> str:
    return f"reference/modules/{folder.removeprefix('latentac.')}.md"


def reference() -> dict[str, str]:
    """Path -> text of each page of the reference."""
    exported, pages = public(), {}
    index = "# Reference\n\n## Public names\n\nAll of them can be imported from `latentac` itself.\n"
    for layer in sorted({module.split(".")[1] for module in exported.values()}):
        names = {name: f"{module}.{name}" for name, module in exported.items() if module.split(".")[1] == layer}
        index += f"\n- [`{layer}`]({layer}.md): " + ", ".join(f"[`{name}`][{path}]" for name, path in names.items())
        text = f"# {layer}\n\nWhat `latentac` exports of its folder [`{layer}`](../latentac/{layer}/README.md).\n\n"
        pages[f"reference/{layer}.md"] = text + "\n".join(f"::: {path}\n" for path in names.values())
    index += "\n\n## Modules\n\nWhat is not exported may change from version to version.\n\n"
    for folder, members in modules().items():
        content = ast.get_docstring(ast.parse((ROOT / folder.replace(".", "/") / "__init__.py").read_text()))
        index += f"- [`{folder}`]({page_of(folder).removeprefix('reference/')})"
        index += f": {content.splitlines()[0]}\n" if content else "\n"
        text = f"---\nsearch:\n  boost: 0.5\n---\n\n# {folder}\n\n"
        for module in members:
            hidden = "".join(f', "!^{name}$"' for name, place in exported.items() if place == module)
            text += f"::: {module}\n    options:\n{MODULE}"
            text += f'      show_root_heading: {str(module != folder).lower()}\n      filters: ["!^_"{hidden}]\n\n'
        pages[page_of(folder)] = text
    return {"reference/index.md": index, **pages}


def on_config(config: Any) -> Any:
    inner = {folder.removeprefix("latentac."): page_of(folder) for folder in modules()}
    outer = [name for name in reference() if name not in inner.values()]
    config.nav.append({"Reference": [*outer, {"Modules": [{folder: page} for folder, page in inner.items()]}]})
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File  # the tests use this module without MkDocs

    for name in documents():
        place = posixpath.relpath(name, "docs") if name.startswith("docs/") else name
        shown = None if place == name else place.replace(".md", ".html")
        files.append(File(name, str(ROOT), config.site_dir, False, dest_uri=shown))
    for name, text in reference().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A link to what is not a page leads to its module in the reference, or to its source on GitHub."""
    place = os.path.dirname(page.file.src_uri)
    folders = modules()

    def target(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(place, match[1]))
        if files.get_file_from_path(path) or not (ROOT / path).exists():
            return match[1]
        if files.get_file_from_path(f"{path}/README.md"):
            return f"{match[1].rstrip('/')}/README.md"
        module = path.removesuffix(".py").replace("/", ".")
        folder = module.rpartition(".")[0]
        if module in folders.get(folder, ()):
            return posixpath.relpath(page_of(folder), place or ".") + f"#{module}"
        return f"{config.extra['source']}/{path}"

    return LINK.sub(target, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Formulas become MathML, which browsers draw without a script. One that is not LaTeX ends the build."""
    from math_core import LatexError, LatexToMathML
    from mkdocs.exceptions import PluginError

    converter = LatexToMathML(fancy_error=False)

    def drawn(found: re.Match[str]) -> str:
        try:
            return str(converter.convert_with_local_state(unescape(found[2]), displaystyle=found[1] == "div"))
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: {found[2]!r}: {error}") from None

    return FORMULA.sub(drawn, html)
