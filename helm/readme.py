"""Writes the chart's README from README.md.tmpl, values.yaml and values.schema.json: `make chart`.

The template stands as it is but for two words: `@values@` is the table of all values, `@version@` the chart's version.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "latentac"
README = CHART / "README.md"


def rendered() -> str:
    """The README as it should be."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    rows = ["| Value | Default | Meaning |", "|---|---|---|"]
    rows += [f"| `{path}` | {shown} | {meaning} |" for path, shown, meaning in leaves("", schema, values)]
    text = (CHART / "README.md.tmpl").read_text()
    return text.replace("@values@", "\n".join(rows)).replace("@version@", chart["version"])


def leaves(path: str, schema: Mapping[str, Any], value: Any) -> Iterator[tuple[str, str, str]]:
    """Path, default and meaning of each value that the schema names; what it gives a name of its own is one value."""
    meaning = schema.get("description", "")
    inner = schema.get("properties")
    if inner is None:
        yield path, f"`{json.dumps(value, ensure_ascii=False)}`", meaning
        return
    if path and meaning:
        yield path, "", f"*{meaning}*"
    for name, below in inner.items():
        here = f"{path}.{name}" if path else name
        yield from leaves(here, below, (value or {}).get(name))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python helm/readme.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the README is another")
    options = parser.parse_args()
    if not options.check:
        README.write_text(rendered())
    elif README.read_text() != rendered():
        sys.exit(f"{README.name} is not what its template and the values give: run `make chart`")


if __name__ == "__main__":
    main()
