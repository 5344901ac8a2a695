"""Second moments that somebody else published: what is in their files is what a run uses, and a
file that cannot be a second moment of the model is refused with one message.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from editkit.cli.main import app
from editkit.config.build import build
from editkit.config.compose import compose
from editkit.config.identity import config_hash
from editkit.errors import ConfigError, OptionError
from editkit.model.editable import EditableModel
from editkit.records.reader import load_run
from editkit.report.notes import notes_of
from editkit.runner.session import run
from editkit.stats.build import build as build_moments
from editkit.stats.imported import import_moments
from editkit.stats.store import MomentKey, list_stored, verify
from tests.support.helpers import SENTENCES, tiny_model
from tests.support.statistics import text_stats

KEYS = 500
NAME = "transformer.h.{}.mlp.c_proj_float32_mom2_100000.npz"


def moment(size: int, seed: int = 0, keys: int = KEYS) -> numpy.ndarray[Any, Any]:
    """A sum of k k^T in float32."""
    drawn = numpy.random.default_rng(seed).normal(size=(keys, size))
    product: numpy.ndarray[Any, Any] = (drawn.T @ drawn).astype(numpy.float32)
    return product


def published(path: Path, matrix: Any, count: Any = KEYS) -> Path:
    """A file as `tally` of ROME's and MEMIT's code writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"constructor": "util.runningstats.CombinedStat()", "sample_size": 100000}
    inner = {"constructor": "util.runningstats.SecondMoment()", "count": count, "mom2": matrix}
    numpy.savez(path, **names, **{f"mom2.{name}": value for name, value in inner.items()})
    return path


def size_of(model: EditableModel) -> int:
    return model.weight(model.down_projections([0])[0]).shape[1]


def imported(folder: Path, **changes: Any) -> Any:
    return text_stats(folder, "unused", source="imported", **{"path": None, **changes})


def test_a_folder_of_published_files_gives_the_moments_of_the_layers_in_their_names(
    tmp_path: Path,
) -> None:
    model = tiny_model("gpt2")
    files = tmp_path / "data/stats/gpt2-xl/wikipedia_stats"
    for layer in (0, 2):
        published(files / NAME.format(layer), moment(size_of(model), seed=layer))
    numpy.save(files / "null_space.npy", numpy.zeros((3, 3)))
    told: list[str] = []
    done = import_moments(model, tmp_path / "data", tmp_path / "stats", announce=told.append)
    assert told == [f"left out, as its name has no layer: {files / 'null_space.npy'}"]
    assert all(each.is_definite and each.count == KEYS for each in done)
    assert {each.key.num_documents for each in done} == {100000}

    modules = model.down_projections([0, 2])
    moments = build_moments(model, modules, imported(tmp_path))
    for layer, module in zip((0, 2), modules, strict=True):
        expected = torch.from_numpy(moment(size_of(model), seed=layer)).double() / KEYS
        assert torch.equal(moments.second_moment(module), expected)
        assert moments.imported[module] == NAME.format(layer)
    assert not [each.problem for each in verify(tmp_path / "stats") if each.problem]
    with pytest.raises(ConfigError, match=r"no imported second moment of transformer\.h\.1\.mlp"):
        build_moments(model, model.down_projections([0, 1]), imported(tmp_path))
    other = tiny_model("gpt2", seed=1)
    with pytest.raises(ConfigError, match="for these weights and this dtype"):
        build_moments(other, modules, imported(tmp_path))


def write_torch(path: Path, matrix: torch.Tensor) -> None:
    torch.save(matrix, path)


def write_numpy(path: Path, matrix: torch.Tensor) -> None:
    numpy.save(path, matrix.numpy())


def write_safetensors(path: Path, matrix: torch.Tensor) -> None:
    save_file({"cov": matrix}, path)


@pytest.mark.parametrize(
    ("name", "writer"),
    [("a.pt", write_torch), ("layer_1.npy", write_numpy), ("cov.safetensors", write_safetensors)],
)
@pytest.mark.parametrize("is_sum", [False, True])
def test_a_matrix_alone_needs_its_count_and_gives_the_same_moment(
    tmp_path: Path, name: str, writer: Callable[[Path, torch.Tensor], None], is_sum: bool
) -> None:
    model = tiny_model("gpt2")
    total = torch.from_numpy(moment(size_of(model)))
    writer(tmp_path / name, total if is_sum else total / KEYS)
    with pytest.raises(ConfigError, match=r"how many keys it is about.*--count N"):
        import_moments(model, tmp_path / name, tmp_path / "stats", layer=1)
    (done,) = import_moments(
        model, tmp_path / name, tmp_path / "stats", layer=1, count=KEYS, is_sum=is_sum
    )
    moments = build_moments(model, [done.key.module], imported(tmp_path))
    expected = total.double() / KEYS
    torch.testing.assert_close(
        moments.second_moment(done.key.module), expected, rtol=1e-6, atol=1e-7
    )
    assert done.count == KEYS and done.key.module == model.down_projections([1])[0]


def test_a_sum_that_is_taken_for_a_mean_is_noticed(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    (module,) = model.down_projections([1])
    collected = build_moments(model, [module], text_stats(tmp_path, "\n".join(SENTENCES * 9)))
    moment_II, keys = collected.second_moment(module), collected.by_module[module].num_tokens
    found = []
    for total, is_sum in ((moment_II, False), (keys * moment_II, True), (keys * moment_II, False)):
        torch.save(total, tmp_path / "cov.pt")
        (done,) = import_moments(
            *(model, tmp_path / "cov.pt", tmp_path / "stats"), layer=1, count=keys, is_sum=is_sum
        )
        found.append(done.is_odd)
    assert found == [False, False, True]


def test_the_newest_import_counts_unless_a_path_is_given(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    (module,) = model.down_projections([0])
    paths = [tmp_path / str(seed) / NAME.format(0) for seed in range(2)]
    for seed, path in enumerate(paths):
        published(path, moment(size_of(model), seed=seed))
        (done,) = import_moments(model, path, tmp_path / "stats")
        os.utime(tmp_path / "stats" / done.key.file_name, (seed, seed))
    newest = build_moments(model, [module], imported(tmp_path))
    first = build_moments(model, [module], imported(tmp_path, path=str(paths[0])))
    for found, seed in ((newest, 1), (first, 0)):
        expected = torch.from_numpy(moment(size_of(model), seed=seed)).double() / KEYS
        assert torch.equal(found.second_moment(module), expected)
    (tmp_path / "other").mkdir()
    anew = imported(tmp_path / "other", path=str(paths[0].parent))  # not imported yet
    assert build_moments(model, [module], anew).digests == first.digests


class Hostile:
    """Would run a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch unpickled",)


def write_bytes(content: bytes) -> Callable[[Path, int], None]:
    return lambda path, _: path.write_bytes(content) and None


def savez(**arrays: Callable[[int], Any]) -> Callable[[Path, int], None]:
    return lambda path, size: numpy.savez(path, **{n: make(size) for n, make in arrays.items()})


def sum_of(change: Callable[[numpy.ndarray[Any, Any]], Any], count: Any = KEYS) -> Any:
    return lambda path, size: published(path, change(moment(size)), count) and None


def lopsided(matrix: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    matrix[0, 1] += 0.01 * matrix.max()
    return matrix


def indefinite(matrix: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    matrix[0, 0] *= -1
    return matrix


def not_finite(matrix: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    matrix[3, 3] = numpy.nan
    return matrix


BAD: list[tuple[str, Callable[[Path, int], Any], str]] = [
    ("h.0.npz", write_bytes(b"no archive"), "cannot be read"),
    ("h.0.npz", write_bytes(b""), "cannot be read"),
    ("h.0.npy", write_bytes(b"\x93NUMPY"), "cannot be read"),
    ("h.0.safetensors", write_bytes(b"\xff" * 40), "cannot be read"),
    ("h.0.pt", write_bytes(pickle.dumps(Hostile())), "more than tensors and numbers"),
    ("h.0.pt", lambda path, _: torch.save({"mom2": Hostile()}, path), "more than tensors"),
    ("h.0.pt", write_bytes(b"no pickle"), "the file is damaged"),
    ("h.0.pt", lambda path, _: torch.save([1, 2], path), "no second moment"),
    (
        "h.0.npz",
        savez(mom2=lambda _: numpy.array([Hostile()])),
        "cannot be read: it is damaged, or holds pickled objects",
    ),
    ("h.0.npz", savez(count=lambda _: 3), "no second moment.*got 'count'"),
    ("h.0.npz", savez(cmom2=lambda n: numpy.eye(n)), "centred covariance"),
    ("h.0.npz", savez(a=numpy.eye, b=numpy.eye), "many matrices"),
    ("h.0.npz", savez(mom2=lambda n: moment(n)), "how many keys"),
    ("h.0.npz", sum_of(lambda matrix: matrix, count=0), "not a positive whole number.*got 0"),
    ("h.0.npz", sum_of(lambda matrix: matrix, count=2.5), "not a positive whole number.*got 2.5"),
    ("h.0.npz", sum_of(lambda matrix: matrix[:-1]), "does not fit.*got \\(127, 128\\)"),
    ("h.0.npz", sum_of(lambda matrix: matrix[:16, :16]), "expected shape \\(128, 128\\)"),
    ("h.0.npz", sum_of(lambda matrix: matrix.astype(int)), "no matrix of floating-point.*int64"),
    ("h.0.npz", sum_of(lopsided), "not symmetric"),
    ("h.0.npz", sum_of(indefinite), "negative eigenvalue"),
    ("h.0.npz", sum_of(not_finite), "not finite"),
    ("h.0.npz", sum_of(numpy.zeros_like), "is zero"),
    ("h.77.npz", sum_of(lambda matrix: matrix), r"\(3 layers\) has no such matrix.*got 'h.77'"),
    (
        "model.layers.0.mlp.down_proj_float32_mom2.npz",
        sum_of(lambda matrix: matrix),
        "has no such matrix.*expected names like transformer.h.0.mlp.c_proj",
    ),
    ("cov.npz", sum_of(lambda matrix: matrix), "no file is named after a layer.*--layer N"),
    ("h.0.txt", write_bytes(b"x"), "unknown type of file"),
]


@pytest.mark.parametrize(("name", "write", "expected"), BAD, ids=[f"{n}-{t}" for n, _, t in BAD])
def test_a_file_that_is_no_second_moment_of_the_model_is_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path, int], Any],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model("gpt2")
    write(tmp_path / name, size_of(model))
    with pytest.raises(ConfigError, match=expected) as raised:
        import_moments(model, tmp_path / name, tmp_path / "stats")
    assert len(raised.value.problems) == 1 and "\n" not in str(raised.value)
    assert not list_stored(tmp_path / "stats") and not (tmp_path / "unpickled").exists()


def test_all_bad_files_of_a_folder_are_reported_together(tmp_path: Path) -> None:
    model, files = tiny_model("gpt2"), tmp_path / "files"
    size = size_of(model)
    published(files / NAME.format(0), lopsided(moment(size)))
    published(files / NAME.format(1), moment(size)[:4])
    published(files / NAME.format(2), moment(size))
    with pytest.raises(ConfigError) as raised:
        import_moments(model, files, tmp_path / "stats")
    first, second = raised.value.problems
    assert NAME.format(0) in first and "not symmetric" in first
    assert NAME.format(1) in second and "does not fit" in second
    published(files / "copy" / NAME.format(2), moment(size))
    with pytest.raises(
        ConfigError, match=r"several files are about transformer\.h\.2\.mlp\.c_proj"
    ):
        import_moments(model, files, tmp_path / "stats")
    with pytest.raises(ConfigError, match="--layer: is about one file"):
        import_moments(model, files, tmp_path / "stats", layer=1)
    with pytest.raises(ConfigError, match=r"--layer: .* \(got 3; expected 0 to 2\)"):
        import_moments(model, files / NAME.format(2), tmp_path / "stats", layer=3)


def test_a_moment_of_fewer_keys_than_dimensions_is_imported_and_not_inverted(
    tmp_path: Path,
) -> None:
    model = tiny_model("gpt2")
    size = size_of(model)
    path = published(tmp_path / NAME.format(0), moment(size, keys=size // 2), size // 2)
    (done,) = import_moments(model, path, tmp_path / "stats")
    assert not done.is_definite
    moments = build_moments(model, [done.key.module], imported(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot be inverted.*import one of more keys"):
        moments.factorise(done.key.module)


def test_the_files_of_computed_moments_keep_their_names() -> None:
    key = {"model": "m", "fingerprint": "f", "module": "a.b", "corpus": "c", "num_documents": 3}
    names = {"context_length": 4, "dtype": "float32", "products": "float32"}
    assert MomentKey(**key, **names).file_name == "a.b-e99c3882a1b3fb4b7a58.safetensors"  # type: ignore[arg-type]


def test_imported_moments_have_no_smaller_preset(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="preset: imported second moments have no texts"):
        imported(tmp_path, preset="minimal")


def test_every_record_of_a_run_with_an_import_says_so(tmp_path: Path) -> None:
    stats, model = tmp_path / "stats", "model=tiny-gpt2"
    path = published(tmp_path / NAME.format(0), moment(512, keys=2000), 2000)
    overrides = [
        *(model, "editor=rome", "stats=imported", f"stats.folder={stats}", "tracker=none"),
        *("edits=1", "milestones=[1]", "suite=none", "editor.target.steps=2"),
        *("editor.context_lengths=[]", f"paths.outputs={tmp_path / 'outputs'}"),
    ]
    composed = compose(overrides)
    with pytest.raises(ConfigError, match="stats: no second moment was imported for tiny-gpt2"):
        build(composed.config)
    result = CliRunner().invoke(
        app, ["stats", "import", str(path), model, f"stats.folder={stats}"], catch_exceptions=False
    )
    assert "transformer.h.0.mlp.c_proj: 2000 keys from" in result.output
    listed = CliRunner().invoke(app, ["stats", "ls", model, f"stats.folder={stats}"])
    assert f"imported from {path.name}" in listed.output

    experiment = build(composed.config)
    assert run(experiment) == 0
    for name in ("steps.jsonl", "evals.jsonl"):
        lines = (experiment.folder / name).read_text().splitlines()
        assert lines and all(json.loads(line)["statistics"] == "imported" for line in lines)
    provenance = json.loads((experiment.folder / "provenance.json").read_text())
    (entry,) = provenance["statistics_imported"].values()
    assert (entry["file"], entry["keys"]) == (path.name, 2000)
    assert entry["digest"].startswith("sha256 ")
    (note,) = notes_of(load_run(experiment.folder))
    assert f"not computed here: {path.name}" in note
    assert config_hash(composed.config) != config_hash(compose(["editor=rome"]).config)


def test_a_command_without_a_file_is_one_message(tmp_path: Path) -> None:
    for path, expected in (("nothing", "no such file or folder"), (".", "has no such file")):
        arguments = ["stats", "import", str(tmp_path / path), "model=tiny-gpt2"]
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, ConfigError)
        assert expected in str(result.exception)
