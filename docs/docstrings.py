"""mkdocstrings: the arguments that a docstring lists line by line become a list on the page."""

import re

import griffe

ARGUMENT = re.compile(r"(?m)^([a-z]\w*(?:, [a-z]\w*)*): ")


class ListedArguments(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            parts = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(
                ARGUMENT.sub(lambda name: f"- `{name[1]}`: ", part) if ARGUMENT.match(part) else part for part in parts
            )
