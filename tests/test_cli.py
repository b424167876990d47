"""The command line: help for every verb, one clear line for every mistake, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import tiny

from mmray import cli, config
from mmray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
VERBS = (
    "pack",
    "inspect",
    "train",
    "evaluate",
    "quantize",
    "score",
    "verify",
    "rejects",
    "retry",
    "serve",
    "demo",
)


def test_every_verb_has_help_that_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(cli.cli.commands) == VERBS
    for verb in VERBS:
        assert cli.run([verb, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"mmray {verb}" in text
        for option in cli.cli.commands[verb].params:
            if isinstance(option, click.Option):
                assert option.help, f"{verb} {option.opts}: no help"


def test_the_readme_and_no_other_text_documents_every_verb() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"`mmray {verb}" in readme


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs" / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_a_shipped_config_needs_only_an_archive_and_a_place(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.archive: missing.*out: missing"):
        config.load(path)
    loaded = config.load(path, ["data.archive=here", "out=there"])
    assert loaded.model.image.weights is None, "a shipped config names no file outside the project"


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (["train", "no.yaml"], 2, ["no.yaml", "no such config file"]),
        (["train", "{config}", "--set", "model.fusoin=gated"], 2, ["model.fusoin", "fusion"]),
        (["train", "{config}", "--set", "model.fusion=best"], 2, ["'best'", "'gated'"]),
        (["train", "{config}", "--set", "epochs"], 2, ["epochs", "key=value"]),
        (["train", "{config}"], 2, ["data.archive", "--set"]),
        (["train", "{config}", "--set", "data.archive=none", "--set", "out=o"], 2, ["none"]),
        (["verify", "none"], 2, ["none", "no scoring run"]),
        (["rejects", "none"], 2, ["none", "no scoring run"]),
        (["retry", "none"], 2, ["none", "no scoring run"]),
        (["score", "none", "none", "--out", "o"], 2, ["none", "no bundle"]),
        (["score", "b", "a", "--out", "o", "--max-errors", "many"], 2, ["'many'", "0.1%"]),
        (["serve", "none"], 2, ["none", "no bundle"]),
        (["serve", "none", "--replicas", "many"], 2, ["'many'", "1-4"]),
        (["serve", "none", "--set", "score.batch_rows=99"], 2, ["max_ongoing", "99 x 1"]),
        (["inspect", "none"], 2, ["none", "no such directory"]),
        (["pack", "none", "dest"], 2, ["none"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_allowed(
    line: list[str],
    code: int,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    classic = str(ROOT / "jobs" / "configs" / "classic.yaml")
    assert cli.run([part.format(config=classic) for part in line]) == code
    error = capsys.readouterr().err
    assert error.startswith("mmray: ") and error.count("\n") == 1
    for word in words:
        assert word in error


def test_a_label_that_is_not_there_is_refused_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    up = ray.is_initialized()
    tiny.write_archive(tmp_path / "archive", [6])
    line = ["train", str(ROOT / "jobs" / "configs" / "classic.yaml")]
    sets = {"data.archive": tmp_path / "archive", "out": tmp_path / "out", "data.label": "mood"}
    for key, value in sets.items():
        line += ["--set", f"{key}={value}"]
    assert cli.run(line) == 2
    error = capsys.readouterr().err
    assert "mood" in error and "label" in error and "split" in error
    assert ray.is_initialized() == up and not (tmp_path / "out").exists()


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["nonsense"]) == 2
    assert cli.run(["score", "only-one"]) == 2
    assert "No such command" in capsys.readouterr().err


def test_pack_and_inspect_speak_json_and_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.write_archive(tmp_path / "source", [4, 3])
    dest = str(tmp_path / "packed")
    assert cli.run(["pack", str(source), dest, "--format", "parquet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 7
    assert cli.run(["inspect", dest, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == {"parquet": 1}
    assert cli.run(["inspect", dest]) == 0
    assert "calm" in capsys.readouterr().out
