"""Settings: the commented default file, what is refused and how the message reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from mclnf_edge.config import AdaptConfig, SecurityConfig, ServeConfig, load_config
from mclnf_edge.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PRESETS = sorted(path.name for path in CONFIGS.glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_default_file_names_every_setting_with_its_default() -> None:
    stored = yaml.safe_load((CONFIGS / "default.yaml").read_text())
    assert stored == dataclasses.asdict(ServeConfig()), "edit configs/default.yaml and config.py"


def test_every_setting_in_the_default_file_has_a_comment() -> None:
    lines = (CONFIGS / "default.yaml").read_text().splitlines()
    comments = sum(line.lstrip().startswith("#") for line in lines)
    assert comments > len([line for line in lines if line.startswith("  ")]) / 3


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load(name: str) -> None:
    config = load_config(CONFIGS / name)
    assert (config == ServeConfig()) == (name == "default.yaml")


def test_none_and_an_empty_file_are_the_defaults(tmp_path: Path) -> None:
    assert load_config(None) == ServeConfig()
    assert load_config(write(tmp_path, "# nothing\n")) == ServeConfig()


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    path = write(tmp_path, "map:\n  cell_size_m: 40\nadapt: {rays_per_step: 7}\n")
    config = load_config(path)
    assert config.map.cell_size_m == 40.0 and isinstance(config.map.cell_size_m, float)
    assert config.adapt == dataclasses.replace(AdaptConfig(), rays_per_step=7)
    assert config.wire == ServeConfig().wire


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("map:\n  cel_size_m: 3\n", ":2: unknown key map.cel_size_m; did you mean cell_size_m?"),
        ("maps: {}\n", ":1: unknown key maps; did you mean map?"),
        (
            "adapt:\n  rays_per_step: many\n",
            ":2: adapt.rays_per_step: expected a whole number, received 'many'",
        ),
        (
            "adapt:\n  rays_per_step: true\n",
            "adapt.rays_per_step: expected a whole number, received True",
        ),
        (
            "adapt:\n  rays_per_step: 1.5\n",
            "adapt.rays_per_step: expected a whole number, received 1.5",
        ),
        ("adapt:\n  rays_per_step: 0\n", "adapt.rays_per_step: expected at least 1, received 0"),
        ("adapt:\n\n  lr: 0\n", ":3: adapt.lr: expected more than 0, received 0.0"),
        ("adapt: {lr: 11}\n", "adapt.lr: expected at most 10, received 11.0"),
        ("adapt: {lr: .nan}\n", "adapt.lr: expected a number, received nan"),
        ("adapt: {lr: [1]}\n", "adapt.lr: expected a number, received [1]"),
        ("map: {cell_size_m: big}\n", "expected a number or 'auto', received 'big'"),
        ("map: {cell_size_m: -1}\n", "map.cell_size_m: expected more than 0, received -1.0"),
        ("map: {tasks: cell}\n", "expected 'grid', 'time', 'publisher', received 'cell'"),
        ("map: 3\n", ":1: map: expected keys and values, received '3'"),
        ("- 1\n", ":1: expected keys and values, received a list"),
        ("watch:\n  hang_s: 1\n  hang_s: 2\n", ":3: watch.hang_s stands here a second time"),
        ("watch: {hang_s: !!python/object/apply:os.getcwd []}\n", "python/object/apply"),
        ("watch: {hang_s: 2026-02-31}\n", "watch.hang_s"),
        ("a: [\n", "not YAML"),
        ("a: \x07\n", "not YAML"),
    ],
)
def test_what_is_refused_says_where_and_why(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary")


@pytest.mark.parametrize("values", [{"rays_per_step": 0}, {"seed": -1}, {"weighting": "exact"}])
def test_settings_made_in_code_are_checked_too(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        AdaptConfig(**values)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServeConfig().adapt.seed = 3  # type: ignore[misc]


def test_key_files_stand_in_the_folder_of_keys() -> None:
    security = SecurityConfig("keys")
    assert security.secret_file == Path("keys/server.secret")
    assert security.authorised_file == Path("keys/authorised-clients")
    with pytest.raises(ConfigError, match=r"security\.keys"):
        _ = SecurityConfig().secret_file
