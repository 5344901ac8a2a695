"""The reference pages that are made from the program: command line, configuration, records.

Every page is a text by its path below `docs/`. Nothing here is written by hand a second time: the
command line comes from the typer app, options from the comments in `conf/`, fields from the
comments in the classes.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

import editkit
from docs.gen.annotated import (
    TARGET,
    ConfigFile,
    Key,
    field_comment,
    field_comments,
    located,
    read,
    shown,
)
from editkit import types
from editkit.config.compose import conf_folder

ROOT = Path(__file__).resolve().parents[2]
NAME = "name in tables, figures and folder names"
NOT_BUILT = ("recipe", "restraint_recipe", "experiment", "scale", "sweep", "debug", "setting")
GROUPS = {  # title and what the group chooses, in the order of the navigation
    "editor": "the method that turns edit requests into updates of weights",
    "restraint": "what protects the model; several stack: `restraint=[a,b]`",
    "model": "the network: bundled (`tiny-*`), known by name, or `hf` with `model.id`",
    "dataset": "the edit requests",
    "suite": "the tasks that stand for general abilities",
    "evaluation": "how edits are measured: protocols, timings, samples, thresholds",
    "stats": "the text over which second moments of keys are computed",
    "tracker": "what a person sees of a run",
    "runtime": "device, threads and memory limit",
    "setting": "the four settings of the literature: single, batch, sequential, sequential batch",
    "scale": "`scale=tiny` runs any experiment on the bundled models, in minutes",
    "experiment": "presets of several choices: the demo, and the papers' figures and tables",
    "sweep": "a grid of runs by name",
    "tune": "what `editkit tune` searches, and its budget",
    "debug": "small runs that show whether everything fits together",
}


def pages() -> dict[str, str]:
    """Every generated page: its path below `docs/` -> markdown."""
    from docs.gen.commands import command_page

    made = {"reference/cli.md": command_page(), "reference/configuration/index.md": root_page()}
    made |= {f"reference/configuration/{group}.md": group_page(group) for group in GROUPS}
    made["reference/configuration/recipes.md"] = recipe_page()
    made["reference/configuration/launchers.md"] = launcher_page()
    for readme in sorted((ROOT / "experiments").glob("*/README.md")):
        made[f"guides/papers/{readme.parent.name}.md"] = readme.read_text()
    for name in ("reference/records.md", "reference/python.md"):
        made[name] = with_fields((ROOT / "docs" / name).read_text())
    made["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text()
    made["changelog.md"] = (ROOT / "CHANGELOG.md").read_text()
    for name in ("benchmarks/pairs.md", "benchmarks/real.md", "benchmarks/long.md"):
        made[name] = (ROOT / name).read_text()
    return made


def prose(text: str) -> str:
    """A plain comment as markdown: nothing in it is markup. Backticks keep their meaning."""
    parts = text.split("`")
    parts[::2] = [
        html.escape(re.sub(r"([\\*_\[\]#{}])", r"\\\1", part), quote=False).replace("|", "&#124;")
        for part in parts[::2]
    ]
    parts[1::2] = [part.replace("|", "&#124;") for part in parts[1::2]]
    return "`".join(parts).replace("\n", "<br>")


def code(text: str) -> str:
    if not text:
        return ""
    if "|" in text:  # a table's cell ends at a bar, also inside of backticks
        return (
            f"<code>{text.replace('&', '&amp;').replace('<', '&lt;').replace('|', '&#124;')}</code>"
        )
    return f"`{text}`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def described(key: Key, file: ConfigFile) -> str:
    """What a key means: the file's comment, else the comment of the class's field."""
    if key.comment:
        return key.comment
    for node in sorted(file.targets, key=len, reverse=True):
        inside = key.path.removeprefix(f"{node}.") if node else key.path
        if (not node or key.path.startswith(f"{node}.")) and (
            target := located(file.targets[node])
        ):
            if comment := field_comment(target, inside):
                return comment
            break
    return NAME if key.path == "name" else ""


def key_rows(file: ConfigFile, prefix: str) -> Iterator[list[str]]:
    for key in file.keys:
        if key.path.rpartition(".")[2] == TARGET:
            continue
        value = "required" if key.value == "???" else code(key.value)
        meaning = prose(described(key, file))
        if value or meaning:  # not of a node whose keys follow
            yield [code(f"{prefix}{key.path}"), value, meaning]


def root_page() -> str:
    file = read(conf_folder() / "config.yaml")
    groups = [[f"[`{group}`]({group}.md)", about] for group, about in GROUPS.items()]
    groups += [
        ["[`recipe`, `restraint_recipe`](recipes.md)", "numbers of a pair of method and model"],
        ["[`hydra/launcher`](launchers.md)", "where the runs of a sweep are executed"],
        ["`local`", "`conf/local/default.yaml`, if you write one: this machine's values"],
    ]
    return "\n".join(
        [
            "# Configuration",
            "",
            "Every run is composed from one option of each group and from the keys below. Override"
            " any of them on the command line: `editkit run editor=memit edits=50"
            " editor.target.lr=0.1`. The pages of this section are generated from the files in"
            " `conf/`.",
            "",
            "## Groups",
            "",
            table(["group", "chooses"], groups),
            "## Keys of the root",
            "",
            table(["key", "default", "meaning"], list(key_rows(file, ""))),
        ]
    )


def prefix_of(group: str) -> str:
    return "" if group in NOT_BUILT else f"{group}."


def group_page(group: str) -> str:
    folder = conf_folder() / group
    files = {
        str(path.relative_to(folder).with_suffix("")): read(path)
        for path in sorted(folder.glob("**/*.yaml"))
    }
    lines = [f"# {group}", "", f"Chooses {GROUPS[group]}.", ""]
    lines.append(
        table(
            ["option", "description"],
            [[f"[`{group}={name}`](#{anchor(name)})", prose(files[name].about)] for name in files],
        )
    )
    shown_before: dict[tuple[tuple[str, str], ...], str] = {}
    for name, file in files.items():
        lines += [
            f"## {name} {{ #{anchor(name)} }}",
            "",
            f"{sentence(prose(file.about))} {prose(file.notes)}",
            "",
        ]
        lines += [f"{line}\n" for line in facts(group, file)]
        signature = tuple((key.path, described(key, file)) for key in file.keys)
        same = shown_before.get(tuple(sorted(signature)))
        if same is not None and same in files:
            lines += [difference(group, same, files[same], file), ""]
        elif rows := list(key_rows(file, prefix_of(group))):
            shown_before[tuple(sorted(signature))] = name
            lines += [table(["key", "default", "meaning"], rows)]
    return "\n".join(lines)


def anchor(name: str) -> str:
    return name.replace("/", "-").replace(".", "-").lower()


def sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def facts(group: str, file: ConfigFile) -> Iterator[str]:
    """The class of an option and the options that it starts from."""
    for target in file.targets.values():
        yield f"Class: `{target}`."
    starts = [text for entry in file.defaults if (text := started_from(group, entry))]
    if starts:
        yield f"Starts from {', '.join(starts)}."


def started_from(group: str, entry: Any) -> str:
    """One entry of a defaults list, as a choice."""
    if entry == "_self_":
        return ""
    if isinstance(entry, str):
        source, _, _ = entry.partition("@")
        *parents, name = source.strip("/").split("/")
        return f"`{parents[0] if parents else group}={name}`"
    ((source, name),) = entry.items()
    if source.startswith("optional "):
        parts = source.removeprefix("optional ").strip("/").split("/")
        return f"`{'/'.join(parts)}/<model>` where that exists"
    source = source.removeprefix("override ").strip("/").partition("@")[0]
    return f"`{source}={shown(name).replace(' ', '')}`"


def difference(group: str, same: str, other: ConfigFile, file: ConfigFile) -> str:
    """The values in which an option differs from one with the same keys."""
    before = {key.path: key.value for key in other.keys}
    changed = [
        code(f"{prefix_of(group)}{key.path}={key.value}")
        for key in file.keys
        if key.value != before[key.path] and key.path.rpartition(".")[2] not in (TARGET, "name")
    ]
    values = f", with {', '.join(changed)}" if changed else ""
    return f"Keys as for [`{same}`](#{anchor(same)}){values}."


def recipe_page() -> str:
    """The numbers of every pair of method and model, with their source."""
    lines = [
        "# Recipes",
        "",
        "A recipe holds the numbers of one pair of editor and model. It is chosen automatically:"
        " `editor=rome model=gpt2-xl` takes `recipe=rome/gpt2-xl`. Name another one to use it for"
        " a model that has none.",
        "",
        "`provenance` is `published` (from the paper's authors or another paper's code), `copied`"
        " (from a model of the same family and size), `tuned` (by us, on that model) or `untuned`"
        " (a place to start; a run warns).",
        "",
    ]
    for folder in sorted((conf_folder() / "recipe").iterdir()):
        rows = []
        for path in sorted(folder.glob("*.yaml")):
            data = yaml.safe_load(path.read_text())
            numbers = [
                prose(f"{name}={value}".replace(" ", ""))
                for name, value in flat(data.get("editor", {}))
            ]
            starts = [f"as {text}" for entry in read(path).defaults if (text := as_recipe(entry))]
            origin = data.get("recipe", {})
            rows.append(
                [
                    code(path.stem),
                    ", ".join([*starts, *numbers]),
                    origin.get("provenance", ""),
                    prose(str(origin.get("source", ""))),
                ]
            )
        lines += [
            f"## {folder.name}",
            "",
            table(["model", "numbers (`editor.`)", "provenance", "source"], rows),
        ]
    lines += [
        "## Restraints",
        "",
        "`restraint_recipe` holds the numbers of a restraint for a model, or for an editor, a model"
        " and a dataset. It is chosen automatically, too.",
        "",
    ]
    folder = conf_folder() / "restraint_recipe"
    rows = [
        [
            code(restraint),
            code("/".join(pair)),
            code(f"{key.path}={key.value}"),
            prose(key.comment),
        ]
        for path in sorted(folder.glob("**/*.yaml"))
        for restraint, *pair in [path.relative_to(folder).with_suffix("").parts]
        for key in read(path).keys
        if key.value
    ]
    return "\n".join([*lines, table(["restraint", "for", "value", "why"], rows)])


def as_recipe(entry: Any) -> str:
    """The recipe that another one starts from."""
    found = re.match(r"/recipe/([\w./-]+)@", str(entry))
    return f"`{found[1]}`" if found else ""


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", shown(value)


def launcher_page() -> str:
    """Where a sweep's runs are executed."""
    lines = [
        "# Launchers",
        "",
        "`hydra/launcher=` chooses where the runs of a sweep are executed. Without it they run one"
        " after another in this process; `hydra/launcher=joblib` (extra `joblib`) spreads them"
        " over the cores.",
        "",
    ]
    for path in sorted((conf_folder() / "hydra/launcher").glob("*.yaml")):
        file = read(path)
        rows = list(key_rows(file, "hydra.launcher."))
        lines += [f"## {path.stem}", "", sentence(prose(file.about)), ""]
        lines += [f"{line}\n" for line in facts("hydra/launcher", file)]
        lines.append(table(["key", "default", "meaning"], rows))
    return "\n".join(lines)


def with_fields(page: str) -> str:
    """A page with a table in each place that names a class: `<!-- fields: EditRequest -->`."""
    for name in re.findall(r"<!-- fields: (\w+) -->", page):
        comments = field_comments(getattr(editkit, name, None) or getattr(types, name))
        order = tuple(comments)
        if name == "EvalRecord":  # a line is flat
            comments |= field_comments(types.Measurement)
            order = types.EVAL_FIELDS
        rows = [[code(field), prose(comments[field])] for field in order]
        page = page.replace(f"<!-- fields: {name} -->", table(["field", "meaning"], rows))
    return page
