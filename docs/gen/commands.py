"""The page of the command line, made from the typer app."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from docs.gen.reference import code, prose, table
from editkit.cli.main import app

HYDRA = "[HYDRA OVERRIDES]"
EXIT_CODES = [
    ("0", "done"),
    ("1", "internal failure, with its traceback; or the run collapsed"),
    ("2", "invalid command or data; all problems are reported together"),
    ("3", "another process is writing this run (`when_locked=leave`)"),
    ("4", "the disk is full; the same command resumes once there is space"),
    ("128 + n", "stopped by signal n; the state is saved"),
]


def commands(group: Any, prefix: str = "editkit") -> Iterator[tuple[str, Any]]:
    """Every command of the app with its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def command_page() -> str:
    root = typer.main.get_command(app)
    every = dict(commands(root))
    lines = [
        "# Command line",
        "",
        "Generated from the program's own help texts. `editkit COMMAND --help` shows the same.",
        "",
        table(
            ["command", "does"],
            [
                [f"[`{name}`](#{name.replace(' ', '-')})", prose(first_line(command.help))]
                for name, command in every.items()
            ],
        ),
        "## Exit codes",
        "",
        table(["code", "meaning"], [[code(number), text] for number, text in EXIT_CODES]),
    ]
    for name, command in every.items():
        lines += [f"## {name} {{ #{name.replace(' ', '-')} }}", "", *command_lines(name, command)]
    return "\n".join(lines)


def first_line(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


def command_lines(name: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    takes_hydra = command.context_settings.get("ignore_unknown_options", False)
    usage = [name, *(["[OPTIONS]"] if options else []), *(map(usage_of, arguments))]
    yield "```text\n" + " ".join([*usage, *([HYDRA] if takes_hydra else [])]) + "\n```\n"
    for paragraph in (command.help or "").strip().split("\n\n"):
        yield prose(" ".join(paragraph.split())) + "\n"
    rows = [[code(usage_of(each)), "", prose(each.help or "")] for each in arguments]
    for each in options:
        names = ", ".join(code(option) for option in each.opts)
        rows.append([names, default_of(each), prose(each.help or "")])
    if rows:
        yield table(["argument or option", "default", "meaning"], rows)


def usage_of(argument: Any) -> str:
    label = (argument.metavar or argument.name).upper().strip("[]")
    label += "..." if argument.nargs == -1 else ""
    return label if argument.required else f"[{label}]"


def default_of(option: Any) -> str:
    if option.required:
        return "required"
    if option.is_flag or option.default is None or option.default == "":
        return ""
    return code(str(option.default))
