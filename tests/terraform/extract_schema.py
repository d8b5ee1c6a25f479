"""Take the schema of Google's Terraform provider, as far as scripts/deploy/terraform uses it, out of a package made from it.

The provider itself is a program that only Terraform's own registry has. Its schema stands also in the classes that CDK Terrain
generates, in the package `cdktn-provider-google`: names, types, what is required and what the provider sets. To renew it:
    pip download --no-deps cdktn-provider-google, unpack the wheel, then the .tgz in it, and
    python tests/terraform/extract_schema.py FOLDER/package/lib google_storage_bucket … >tests/terraform/google.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

#: What the classes call types, as Terraform calls them.
TYPES: Final = {
    "string": "string",
    "number": "number",
    "boolean": "bool",
    "stringList": ["list", "string"],
    "numberList": ["list", "number"],
    "stringMap": ["map", "string"],
}
GETTERS: Final = {"String": "string", "Number": "number", "Boolean": "bool"}


def resource(source: str) -> dict[str, Any]:
    """Return the schema of the resource that a module defines."""
    return block(source, source[source.index("synthesizeHclAttributes()") :], source[source.rindex("\nclass ") :])


def block(source: str, attributes: str, class_: str) -> dict[str, Any]:
    """Return the schema of a block, from the map of its attributes and the class of its values."""
    modes = {
        name: "required" if required == "true" else "optional" if optional == "true" else "computed"
        for name, optional, required in re.findall(
            r"// (\w+) - computed: \w+, optional: (\w+), required: (\w+)", class_
        )
    }
    computed = set(re.findall(r"// (\w+) - computed: true", class_))
    found: dict[str, Any] = {"attributes": {}, "blocks": {}}
    # Up to the end of the function, which may have none.
    listed = attributes.partition("\n}\n")[0].partition("const attrs = {")[2].partition("// remove undefined")[0]
    for name, value, is_block, nesting, type_ in re.findall(
        r'(\w+): \{\s+value: (.*),\s+isBlock: (\w+),\s+type: "(\w+)",\s+storageClassType: "(\w+)"', listed
    ):
        mode = modes[name]
        if is_block == "false":
            terraform = TYPES[type_]
            terraform = ["set", terraform[1]] if nesting == "set" else terraform
            found["attributes"][name] = {
                "type": terraform,
                mode: True,
                **({"computed": True} if name in computed else {}),
            }
            continue
        nested = re.search(r"(\w+)ToHclTerraform", value)
        assert nested
        function = source[source.index(f"\nfunction {nested[1]}ToHclTerraform") :]
        title = nested[1][0].upper() + nested[1][1:]
        inner = block(source, function, class_of(source, f"{title}OutputReference"))
        found["blocks"][name] = {
            "nesting": "single" if name == "timeouts" else nesting,
            "required": mode == "required",
            "many": "listMapper" in value,
            **inner,
        }
    for name in sorted(modes.keys() - found["attributes"].keys() - found["blocks"].keys()):
        if getter := re.search(rf"get(String|Number|Boolean)Attribute\('{name}'\)", class_):
            found["attributes"][name] = {"type": GETTERS[getter[1]], "computed": True}
    return found


def class_of(source: str, name: str) -> str:
    """Return the text of a class."""
    rest = source[source.index(f"\nclass {name} ") + 1 :]
    return rest[: rest.index("\n}\n")]


def main(folder: Path, *resources: str) -> None:
    """Print the schemas of these resources."""
    schemas, versions = {}, set()
    for name in sorted(resources):
        source = (folder / name.removeprefix("google_").replace("_", "-") / "index.js").read_text()
        versions |= set(re.findall(r"providerVersion: '([^']+)'", source))
        schemas[name] = resource(source)
    (version,) = versions
    print(json.dumps({"version": version, "resources": schemas}, indent=1, sort_keys=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
