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
from dataclasses import MISSING, fields
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
    """Coerce the fields in place; ValueError with a line per problem, those in found included."""
    if found := problems(options, found):
        raise ValueError("\n".join(found))


def problems(options, found=()) -> list[str]:
    """Coerce the fields in place; a line per problem: found, values that do not fit, conflicts."""
    cls, found = type(options), list(found)
    values, wrong = typed(cls, vars(options), strict=True)
    vars(options).update(values)
    found += [line for line in wrong if not named(line) & named(*found)]
    if hasattr(cls, "conflicts"):
        found += [line for line in cls(**values).conflicts() if not named(line) & named(*found)]
    return found


def named(*lines: str) -> set[str]:
    """The fields that lines are about: their flags, or a leading positional argument; not those of
    the remedy after a semicolon.
    """
    problems_alone = (line.partition("; ")[0] for line in lines)
    return {name for line in problems_alone for name in re.findall(r"(?:^|--)(\w+)", line)}


def typed(cls, values: dict, strict: bool = False) -> tuple[dict, list[str]]:
    """Values coerced to the types of cls's fields, and a line for each that does not fit. They are
    strings from the command line; if strict, values from Python or JSON.
    """
    good, found = {}, []
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if name not in values:
            continue
        value = values[name]
        if not strict and type(None) in get_args(hint) and str(value).lower() == "none":
            value = None
        try:
            good[name] = TypeAdapter(hint).validate_python(value, strict=strict)
        except ValidationError as error:
            first, flag = error.errors()[0], _flag(cls, name)
            shown = repr(first["input"]) if strict else str(first["input"])  # '6' is no number
            found.append(f"{flag} {shown[:100]}: {reason(first)}")
            if flag == name:  # a positional argument has no default
                good[name] = None
    return good, found


def reason(error: dict) -> str:
    """One of pydantic's errors in our words, without its field."""
    message = error["msg"].split(", unable to")[0].removeprefix("Value error, ")
    message = re.sub("^(Input|String) should", "must", message)
    message = message.replace("greater than or equal to", "at least")
    message = message.replace("less than or equal to", "at most")
    return message.replace("Field required", "is missing")


def _flag(cls, name):
    field = cls.__dataclass_fields__[name]
    return name if field.default is field.default_factory is MISSING else f"--{name}"


def parse_args(cls, argv, doc, usage=None):
    """A script's options from its command line; ValueError with a line for every problem."""
    (options,), _, found = parse(argv, doc, cls, usage=usage)
    validate(options, found)
    return options


def parse(argv, doc, *classes, usage=None) -> tuple[list, set[str], list[str]]:
    """An instance of each dataclass, the names of the fields that the command line has set, and its
    problems. Nothing is checked across fields: presets and files may still change them.
    """
    parser = Parser(doc, classes, usage)
    known, unknown = parser.parse_known_args(argv)
    texts = {name: text for name, text in vars(known).items() if text is not None}
    instances, found = [], []
    for flag in [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown[:1]:
        near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} --help"
        found.append(f"unknown argument {flag}; {hint}")
    for cls in classes:
        values, wrong = typed(cls, texts)
        instances.append(cls(**values))
        found += wrong
    return instances, set(texts) - {"debug"}, found


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
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        groups = {}
        for cls in classes:
            notes, hints = describe_fields(cls), get_type_hints(cls)
            for field in fields(cls):
                flag, (title, comment) = _flag(cls, field.name), notes[field.name]
                groups[title] = groups.get(title) or self.add_argument_group(title)
                comment, _, unset = comment.partition("; unset: ")  # what None stands for
                if field.default is not False and field.default not in (MISSING, ""):
                    comment += f" (default: {unset or str(field.default).lower()})"
                details = _details(field.name, hints[field.name])
                groups[title].add_argument(flag, help=comment.replace("%", "%%"), **details)

    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")


def _details(name, hint) -> dict:
    """argparse's keyword arguments for a field's type."""
    choices = get_args(hint)
    if type(None) in choices:
        return _details(name, choices[0])
    if hint is bool:
        return {"nargs": "?", "const": "true", "metavar": "{true,false}"}
    if get_origin(hint) is list:
        return {"nargs": "+", "metavar": (_details(name, choices[0])["metavar"], "")}
    if get_origin(hint) is Literal:
        return {"metavar": f"{{{','.join(choices)}}}"}
    other = "DIR" if name.endswith("_dir") else name.upper()
    return {"metavar": {int: "N", float: "X"}.get(hint, other)}


def describe_fields(cls) -> dict[str, tuple[str, str]]:
    """(group, comment) of each field, read from the source: written once, for code and --help."""
    notes, group = {}, "options"
    for base in reversed(cls.__mro__[:-1]):
        pattern = r"^    (?:# (.*)|(\w+): [^#\n]*?(?:  # (.*))?)$"
        for title, name, comment in re.findall(pattern, inspect.getsource(base), re.MULTILINE):
            group = title or group
            if name:
                notes[name] = group, comment
    return notes
