"""Kills runs and trainings at random moments, completes them, and compares each with one that was
never disturbed: records, samples and exported weights must have the same bits.

    python -m tests.support.killing --trials 100 --together 10 --seed 0 --jobs 2

This process imports everything once. Each session is a fork of it, so that a trial pays for no
import. A trial ends 1 or 2 sessions by SIGKILL, SIGTERM or SIGINT: after a random time, or inside of
a function that computes statistics, measures, writes a file or trains. In a trial with three
processes on one run, one begins, one waits for it, one leaves, and the first is killed or not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.sessions import records, run_folder

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE_S = 300.0  # with a session on a loaded machine
# One restraint of each place.
RESTRAINTS = ("eac", "d4s", "rect", "prune")
# The functions inside of which a session is ended, by what it does there.
INSIDE = {
    "statistics": ("editkit.stats.collect:Collector.add_block",),
    "evaluation": ("editkit.evaluation.scoring.teacher_forcing:_run",),
    "writing": ("os:fsync", "os:replace"),
    "training": ("editkit.hypernet.learning:AbstractLearner.take_step",),
}
WITHOUT_STATISTICS = (
    *("adalora", "ft", "grace", "ice", "ike", "kn", "locft", "lora", "malmen", "memoe", "memoir"),
    *("mend", "none", "rag", "rledit", "scr", "serac", "t_patcher", "ultraedit", "wise"),
)
SEARCH = ("editor.target.steps=3", "editor.context_lengths=[[4,2]]")
STEPS = ("editor.steps=3",)
QUICK = {
    **dict.fromkeys(("rome", "memit", "emmet", "pmet", "d4s", "alphaedit"), SEARCH),
    **dict.fromkeys(
        ("adalora", "ft", "grace", "lora", "lora_merged", "memoe", "memoir", "t_patcher", "wise"),
        STEPS,
    ),
    "ike": ("editor.demonstrations=1",),
    "serac": ("editor.pair=untrained",),
    "kn": ("editor.steps=2", "editor.refine=none", "editor.answer=predicted"),
    "crispedit": ("editor.epochs=2", "editor.texts=20"),
    "locft": ("editor.epochs=2",),
    "mend": ("editor.hypernetwork=asset:mend/tiny-gpt2",),
    "eac": ("restraint.eac.steps_search=1", "restraint.eac.steps_retrain=2"),
    "prune": ("restraint.prune.function=linear",),
}
RUN = (
    *("edits=6", "milestones=[0,3,6]", "evaluation.block_size=3"),
    "evaluation.timings=[milestone,immediate,final]",
    *("stats=text", "stats.path=texts.txt", "stats.save_every_s=0"),
)
TRAINING = (
    *("editor.train.steps=6", "editor.train.validate_every=2", "editor.train.accumulate=2"),
    *("editor.train.validation=3", "editor.train.held_apart=2"),
)
COMMON = (
    *("model=tiny-gpt2", "suite=none", "tracker=none", "checkpoint.every=2"),
    *("dataset=jsonl", "dataset.path=requests.jsonl"),
)


# What torch says where a fork has no pool of threads, about once in 200 forks. The session has not
# begun; a process that is no fork cannot meet it.
NO_POOL = "Invalid thread pool"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run or trained."""

    name: str
    arguments: tuple[str, ...]
    is_training: bool = False

    @property
    def inside(self) -> tuple[str, ...]:
        """What its sessions do at least once."""
        if self.is_training:
            return ("writing", "training")
        needs_statistics = not self.name.startswith(WITHOUT_STATISTICS)
        return ("evaluation", "writing", *(("statistics",) if needs_statistics else ()))


@dataclass(frozen=True, kw_only=True)
class Kill:
    """How a session ends. Without `inside`: after `share` of the time of a whole session."""

    number: signal.Signals
    share: float  # of the time, or of the calls of a function
    inside: str | None = None

    def __str__(self) -> str:
        where = self.inside or "anywhere"
        return f"{self.number.name} in {where} at {self.share:.0%}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    number: int
    case: Case
    kills: tuple[Kill, ...]
    together: float | None = None  # three processes: when the others begin, as a share of the time

    def __str__(self) -> str:
        what = ", then ".join(map(str, self.kills)) or "no kill"
        three = "" if self.together is None else f"two more processes at {self.together:.0%}, "
        return f"trial {self.number}, {self.case.name}: {three}{what}"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An undisturbed session."""

    results: dict[str, Any]
    seconds: float
    calls: dict[str, int]


def cases() -> list[Case]:
    """Every editor alone and with one restraint of each place, where the pair is allowed; and a
    training.
    """
    from tests.editors.test_pairs import EDITORS, inherent, is_allowed

    found = []
    for editor in EDITORS:
        for restraint in ("none", *RESTRAINTS):
            chosen = () if restraint == "none" else (restraint,)
            if restraint in inherent(editor) or (chosen and not is_allowed(editor, chosen)):
                continue
            quick = (*QUICK.get(editor, ()), *QUICK.get(restraint, ()))
            choice = (f"editor={editor}", *(f"restraint={name}" for name in chosen))
            found.append(
                Case(name=f"{editor}-{restraint}", arguments=(*choice, *COMMON, *RUN, *quick))
            )
    training = ("editor=mend", *COMMON, *TRAINING)
    return [*found, Case(name="training", arguments=training, is_training=True)]


def trials(chosen: Sequence[Case], count: int, *, seed: int, together: int = 0) -> list[Trial]:
    """So many trials of the runs in turn, every fourth of a training; and some with three processes
    on one run.
    """
    rng = random.Random(seed)
    runs = [case for case in chosen if not case.is_training]
    trainings = [case for case in chosen if case.is_training]
    made = []
    for number in range(count):
        is_training = not runs or (bool(trainings) and number % 4 == 3)
        case = trainings[0] if is_training else runs[(number - number // 4) % len(runs)]
        kills = tuple(
            Kill(
                number=rng.choice(SIGNALS),
                share=rng.random(),
                inside=rng.choice((None, *case.inside)),
            )
            for _ in range(rng.choice((1, 2)))
        )
        made.append(Trial(number=number, case=case, kills=kills))
    for number in range(count, count + together):
        kill = Kill(number=rng.choice(SIGNALS), share=rng.random())
        kills = (kill,) if number % 2 else ()
        case = rng.choice(chosen)
        made.append(Trial(number=number, case=case, kills=kills, together=rng.random() * 0.8))
    return made


def write_inputs(folder: Path) -> None:
    """The requests and the text of all sessions, which run in this folder."""
    from editkit.datasets import world

    made = world.generate_world(0)
    fields = ("prompt", "subject", "target", "target_old", "paraphrases")
    with open(folder / "requests.jsonl", "w") as file:
        for request in world.requests(made)[:24]:
            content: dict[str, Any] = {name: getattr(request, name) for name in fields}
            content["neighbours"] = [
                {"prompt": probe.prompt, "answer": probe.answer} for probe in request.neighbours[:2]
            ]
            file.write(json.dumps(content) + "\n")
    documents = world.corpus(made, num_documents=1200)
    (folder / "texts.txt").write_text("\n".join(documents))


def stand_in(folder: Path) -> None:
    """Instead of figures, whose drawing takes longer than everything else in these sessions."""
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "stand_in.png").write_bytes(b"drawn")


def session(case: Case, place: Path, *, stats: Path, more: Sequence[str] = ()) -> int:
    """A session as the command makes it. Returns its exit code."""
    import typer

    from editkit.cli.run import run
    from editkit.cli.train import train

    arguments = [*case.arguments, f"paths.outputs={place}", *more]
    if not case.is_training:
        return run([*arguments, f"stats.folder={stats}"])
    try:
        train(arguments)
    except typer.Exit as left:
        return left.exit_code
    return 0


def counted(work: Callable[[], int], report: Callable[[str], None]) -> int:
    """The work, while each call of a function of `INSIDE` is reported before and after it."""
    for name, functions in INSIDE.items():
        for function in functions:
            module, _, path = function.partition(":")
            *parents, attribute = path.split(".")
            owner: Any = importlib.import_module(module)
            for parent in parents:
                owner = getattr(owner, parent)
            original = getattr(owner, attribute)

            def watched(
                *given: Any, _name: str = name, _original: Any = original, **named: Any
            ) -> Any:
                report(_name)
                result = _original(*given, **named)
                report(_name)
                return result

            setattr(owner, attribute, watched)
    return work()


def killed_inside(work: Callable[[], int], kill: Kill, calls: int) -> int:
    """The work, which ends itself before or after a call of a function."""
    left = 1 + int(kill.share * calls)

    def report(name: str) -> None:
        nonlocal left
        if name == kill.inside:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), kill.number)

    return counted(work, report)


def forked(work: Callable[[], int], log: Path | None = None) -> int:
    """The process of a fork that does the work, with its output in a file."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        if log is not None:
            with open(log, "ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
        code = work()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> int:
    """The exit code of a process; that of a killed one is negative.

    Raises:
        TimeoutError: it does not end.
    """
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise TimeoutError(f"a session did not end in {PATIENCE_S:.0f} seconds")


def results_of(case: Case, place: Path) -> dict[str, Any]:
    """What must not depend on interruptions: records without what a clock measured, the bytes of
    samples, and the exported weights or the hypernetwork.
    """
    from editkit.model.beside import SIDE_TENSORS
    from editkit.runner.export import export

    folder = run_folder(place)
    found: dict[str, Any] = {name: records(folder, name) for name in ("steps.jsonl", "evals.jsonl")}
    found |= {path.name: path.read_bytes() for path in folder.glob("samples/*")}
    if case.is_training:
        found["weights"] = (folder / "hypernetwork.safetensors").read_bytes()
    else:
        export(folder, place / "exported")
        found["weights"] = (place / "exported" / "model.safetensors").read_bytes()
        side = place / "exported" / SIDE_TENSORS
        found["side"] = side.read_bytes() if side.exists() else None
    found["left behind"] = sorted(path.name for path in folder.rglob(".*.tmp"))
    found["failed"] = (folder / "FAILED.json").exists()
    found["figures"] = sorted(path.name for path in folder.glob("figures/*"))
    return found


def reference_of(case: Case, root: Path) -> Reference:
    """An undisturbed session, in the folder `root`, with the statistics that all share."""
    place, counts = root / f"whole-{case.name}", dict.fromkeys(INSIDE, 0)

    def work() -> int:
        def report(name: str) -> None:
            counts[name] += 1

        code = counted(partial(session, case, place, stats=root / "own" / case.name), report)
        if code == 0:
            (place / "calls.json").write_text(json.dumps(counts))
        return code

    log = root / f"whole-{case.name}.log"
    for _ in range(3):
        started = time.monotonic()
        code = ended(forked(work, log))
        seconds = time.monotonic() - started
        if code == 0 or NO_POOL not in log.read_text():
            break
    assert code == 0, log.read_text()
    calls = json.loads((place / "calls.json").read_text())
    assert all(calls[name] for name in case.inside), calls
    return Reference(results=results_of(case, place), seconds=seconds, calls=calls)


def problems_of(trial: Trial, reference: Reference, root: Path) -> Iterator[str]:
    """Kills, completes and compares. Yields what is wrong."""
    place, log = root / f"trial-{trial.number}", root / f"trial-{trial.number}.log"
    has_own = any(kill.inside == "statistics" for kill in trial.kills)
    stats = place / "stats" if has_own else root / "own" / trial.case.name
    work = partial(session, trial.case, place, stats=stats)
    for kill in trial.kills:
        begin = log.stat().st_size if log.exists() else 0
        if kill.inside is None:
            process = forked(work, log)
            time.sleep(kill.share * reference.seconds)
            os.kill(process, kill.number)  # not waited for yet: it is there, or a zombie
        else:
            calls = reference.calls[kill.inside]
            process = forked(partial(killed_inside, work, kill, calls), log)
        code = ended(process)
        text = log.read_bytes()[begin:].decode()
        is_stopped = code in (0, -kill.number, 128 + kill.number)
        has_failed = "Traceback" in text and "KeyboardInterrupt" not in text
        # Before a run begins, omegaconf's clean-up may turn an interrupt into an error of its own.
        is_lost = kill.number == signal.SIGINT and code == 1 and "/omegaconf/" in text
        if (not is_stopped or has_failed) and not is_lost:
            yield f"exit code {code} after {kill}: {text[-2000:]}"
    if code := ended(forked(work, log)):
        yield f"exit code {code} of the session that completes it: {log.read_text()[-2000:]}"
        return
    yield from differences(trial.case, place, reference)


def problems_together(trial: Trial, reference: Reference, root: Path) -> Iterator[str]:
    """Starts three processes on one run, kills the first or not, and compares."""
    place, logs = (
        root / f"trial-{trial.number}",
        [root / f"trial-{trial.number}.{n}" for n in "012"],
    )
    assert trial.together is not None
    work = partial(session, trial.case, place, stats=root / "own" / trial.case.name)
    first = forked(work, logs[0])
    time.sleep(trial.together * reference.seconds)
    waiting = forked(partial(work, more=("when_locked=wait",)), logs[1])
    leaving = forked(work, logs[2])
    for kill in trial.kills:
        time.sleep(kill.share * 0.2 * reference.seconds)
        os.kill(first, kill.number)
    codes = [ended(process) for process in (first, waiting, leaving)]
    number = trial.kills[0].number if trial.kills else 0
    # The one that leaves may find the lock free: before the first takes it, or after a kill.
    allowed = ((0, 3, -number, 128 + number), (0,), (0, 3))
    if not all(code in each for code, each in zip(codes, allowed, strict=True)):
        yield f"exit codes {codes}: {[log.read_text()[-700:] for log in logs]}"
    yield from differences(trial.case, place, reference)


def differences(case: Case, place: Path, reference: Reference) -> Iterator[str]:
    """How the results in a place differ from the undisturbed ones."""
    found = results_of(case, place)
    for name in found.keys() | reference.results.keys():
        if found.get(name) != reference.results.get(name):
            got, expected = found.get(name), reference.results.get(name)
            shown = (
                "other bytes" if isinstance(got, bytes) else f"{got!s:.300} != {expected!s:.300}"
            )
            yield f"{name} differs: {shown}"


def work_through(mine: Sequence[Trial], root: Path, *, is_verbose: bool) -> int:
    """Does these trials. Returns 1 if one of them failed."""
    references: dict[str, Reference] = {}
    code = 0
    for trial in mine:
        if trial.case.name not in references:
            references[trial.case.name] = reference_of(trial.case, root)
        started = time.monotonic()
        of_kind = problems_of if trial.together is None else problems_together
        problems = list(of_kind(trial, references[trial.case.name], root))
        if any(NO_POOL in problem for problem in problems):  # once more, in a folder of its own
            again = replace(trial, number=trial.number + 1000)
            problems = list(of_kind(again, references[trial.case.name], root))
        code = 1 if problems else code
        seconds = time.monotonic() - started
        if problems or is_verbose:
            print(f"{trial}: {'; '.join(problems) or 'the same'} ({seconds:.1f} s)", flush=True)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--together", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument("--quiet", action="store_true", help="report only failures")
    given = parser.parse_args()
    prepare()
    chosen = [case for case in cases() if case.name.startswith(given.only)]
    every = trials(chosen, given.trials, seed=given.seed, together=given.together)
    names = [case.name for case in chosen]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        os.chdir(root)
        write_inputs(root)
        workers = []
        for job in range(given.jobs):
            mine = [each for each in every if names.index(each.case.name) % given.jobs == job]
            workers.append(forked(partial(work_through, mine, root, is_verbose=not given.quiet)))
        return max(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers)


def prepare() -> None:
    """Imports what sessions need, on one thread: a pool of threads does not survive a fork."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MPLBACKEND": "agg"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    for module in (
        *("matplotlib.pyplot", "transformers", "typer", "editkit.cli.main"),
        *("editkit.runner.session", "editkit.runner.export", "editkit.training.session"),
    ):
        importlib.import_module(module)
    from editkit.model.load import ModelConfig

    for module, drawing in (("runner", "draw_figures"), ("training", "draw_training")):
        setattr(importlib.import_module(f"editkit.{module}.session"), drawing, stand_in)
    ModelConfig(id="asset:tiny-gpt2").load("cpu")  # what transformers imports late


if __name__ == "__main__":
    sys.exit(main())
