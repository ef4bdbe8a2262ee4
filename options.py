"""Options: a dataclass gives a script its flags, their limits, its --help and its error messages.

A field is a flag, its trailing comment the help; a comment on a line of its own opens a group. A
field without a default is a positional argument, `X | None` takes `none`, a list several values.

    @dataclass
    class Options:
        # how tokens are drawn
        top_k: integer(1) | None = 200  # choose among the k most likely tokens

    options = parse_args(Options, argv, __doc__)
"""

import argparse
import difflib
import inspect
import re
import textwrap
from dataclasses import fields
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError


def integer(least: int | None = None, most: int | None = None):
    """The type of a whole number with inclusive limits."""
    return Annotated[int, Field(ge=least, le=most)]


def number(least=None, most=None, above=None, below=None):
    """The type of a finite number; least and most are inclusive, above and below exclusive."""
    return Annotated[float, Field(ge=least, le=most, gt=above, lt=below, allow_inf_nan=False)]


FolderName = Annotated[str, Field(pattern=r"^\w[\w.\-]{0,127}$")]  # no path


def validate(options, found=()):
    """Return options, its fields coerced in place; ValueError lists `found` and each problem."""
    if lines := [*found, *problems(options)]:
        raise ValueError("\n".join(lines))
    return options


def problems(options) -> list[str]:
    """Coerce the fields in place; a line for each value that does not fit and each conflict."""
    cls, values, wrong = type(options), {}, {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        value = str(v) if isinstance(v := getattr(options, name), bool) else v  # int takes True
        if type(None) in get_args(hint) and str(value).lower() == "none":
            value = None
        try:
            values[name] = TypeAdapter(hint).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            wrong[name] = f"{_flag(cls, name)} {str(first['input'])[:100]}: {reason(first)}"
            values[name] = getattr(cls, name, None)  # its default
    checked = cls(**values)
    vars(options).update({n: value for n, value in vars(checked).items() if n not in wrong})
    conflicts = checked.conflicts() if hasattr(cls, "conflicts") else ()
    return [*wrong.values(), *(line for line in conflicts if not named(line) & wrong.keys())]


def named(line: str) -> set[str]:
    """The fields whose flags a line names before its remedy, which follows a semicolon."""
    return set(re.findall(r"--(\w+)", line.partition("; ")[0]))


def reason(error: dict) -> str:
    """One of pydantic's errors in our words, without its field."""
    message = re.sub("^(Input|String) should", "must", error["msg"].split(", unable to")[0])
    message = message.removeprefix("Value error, ").replace("Field required", "is missing")
    message = message.replace("greater than or equal to", "at least")
    return message.replace("less than or equal to", "at most")


def _flag(cls, name):
    return f"--{name}" if hasattr(cls, name) else name  # a default is an attribute of the class


def parse_args(cls, argv, doc, usage=None):
    """A script's options from its command line; ValueError with a line for every problem."""
    [options], _, found = parse(argv, doc, cls, usage=usage)
    return validate(options, found)


def parse(argv, doc, *classes, usage=None) -> tuple[list, set[str], list[str]]:
    """An instance of each dataclass, whose values are still text; the names of the fields that are
    set; a line for each unknown flag.
    """
    parser = Parser(doc, classes, usage)
    known, unknown = parser.parse_known_args(argv)
    texts, found = vars(known), []
    for flag in [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown[:1]:
        near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
        found.append(f"unknown argument {flag}; try {near[0] if near else f'{parser.prog} --help'}")
    instances = [
        cls(**{field.name: texts[field.name] for field in fields(cls) if field.name in texts})
        for cls in classes
    ]
    return instances, set(texts), found


class Parser(argparse.ArgumentParser):
    """argparse with a flag for each field; errors are raised as ValueError."""

    def __init__(self, doc, classes, usage):
        purpose, commands, *_ = doc.split("\n\n")
        super().__init__(
            usage=usage,
            description=textwrap.fill(purpose.strip(), 78),
            epilog=f"examples:\n{textwrap.indent(textwrap.dedent(commands), '  ')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # the examples stand as they are
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # the defaults are the dataclass's
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        groups = {}
        for cls in classes:
            hints = get_type_hints(cls)
            for name, (title, comment) in describe_fields(cls).items():
                groups[title] = groups.get(title) or self.add_argument_group(title)
                comment, _, unset = comment.partition("; unset: ")  # what None stands for
                default = getattr(cls, name, "")
                if default is not False and default != "":
                    comment += f" (default: {unset or str(default).lower()})"
                how = _how(name, hints[name]) | {"help": comment.replace("%", "%%")}
                groups[title].add_argument(_flag(cls, name), **how)

    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")


def _how(name, hint) -> dict:
    """argparse's keyword arguments for a field's type."""
    inner = get_args(hint)
    if type(None) in inner:
        return _how(name, inner[0])
    if hint is bool:
        return {"nargs": "?", "const": "true", "metavar": "{true,false}"}
    if get_origin(hint) is list:
        return {"nargs": "+", "metavar": (_how(name, inner[0])["metavar"], "")}
    if get_origin(hint) is Literal:
        return {"metavar": f"{{{','.join(inner)}}}"}
    other = "DIR" if name.endswith("_dir") else name.upper()
    return {"metavar": {int: "N", float: "X"}.get(hint, other)}


def describe_fields(cls) -> dict[str, tuple[str, str]]:
    """(group, comment) of each field, read from the source: written once, for code and --help."""
    notes, group = {}, "options"
    source = "".join(map(inspect.getsource, reversed(cls.__mro__[:-1])))
    pattern = r"^    (?:# (.*)|(\w+): [^#\n]*?(?:  # (.*))?)$"
    for title, name, comment in re.findall(pattern, source, re.MULTILINE):
        group = title or group
        if name:
            notes[name] = group, comment
    return notes
