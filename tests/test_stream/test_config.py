"""Settings: every fault is one clear line with key, value and rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from stream.config import load_settings
from stream.records.errors import ConfigurationError
from stream.wiring import build_worker_spec

GOOD: dict[str, Any] = {
    "movies": "movies",
    "out": "out",
    "microscope": {"voltage_kv": 300, "cs_mm": 2.7},
    "acquisition": {"pixel_size_angstrom": 0.885, "dose_e_per_angstrom2": 30, "gain": "gain.mrc"},
}


def write(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "session.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def changed(**sections: Any) -> dict[str, Any]:
    document = {k: dict(v) if isinstance(v, dict) else v for k, v in GOOD.items()}
    for key, value in sections.items():
        document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    return document


def test_paths_are_relative_to_the_configuration_file(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, GOOD))
    assert settings.movies == tmp_path / "movies"
    assert settings.acquisition.gain == tmp_path / "gain.mrc"


def test_the_written_session_has_every_default_and_reads_back_equal(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, GOOD))
    again = tmp_path / "again.yaml"
    again.write_text(settings.to_yaml())
    assert load_settings(again) == settings
    assert "growth_factor: 1.5" in settings.to_yaml()


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (
            changed(acquisition={"pixel_size_angstrom": 0.0885}),
            "acquisition.pixel_size_angstrom.*Å, not nm.*0.0885",
        ),
        (changed(microscope={"voltage_kv": 300000}), "microscope.voltage_kv.*volts.*300000"),
        (changed(microscope={"amplitude_contrast": 10}), "amplitude_contrast.*not per cent.*10"),
        (
            changed(acquisition={"pixel_size_nm": 0.0885}),
            "unknown key acquisition.pixel_size_nm, did you mean pixel_size",
        ),
        (changed(engin={"name": "embedded"}), "unknown key engin, did you mean engine"),
        (changed(micrographs="m"), "exactly one of movies, micrographs, particles.*movies, micrographs"),
        (changed(engine={"symmetry": "X4"}), "engine.symmetry.*X4"),
        (
            changed(policy={"rungs": [100, 500], "final_min_particles": 500}),
            "final_min_particles is at most the first of the rungs",
        ),
        (changed(policy={"rungs": [500, 200]}), "rungs ascend"),
        (changed(policy={"rungs": []}), "policy.rungs"),
        (changed(policy={"full_rungs": [1000]}), "full_rungs are at least full_min_particles"),
        (changed(policy={"search_sizes": [500, 500]}), "search_sizes differ"),
        (changed(policy={"bound_scores": [0.1, 0.8]}), "bound_scores are the upper one first"),
        (changed(policy={"cluster_min_particles": 4000}), "at least twice cluster_min_particles"),
        (changed(policy={"cfar_bound": 15}), "policy.cfar_bound.*not per cent.*15"),
        (
            changed(policy={"first_run_particles": 100}),
            "first_run_particles is now the first of policy.rungs",
        ),
        ({k: v for k, v in GOOD.items() if k != "microscope"}, "microscope is missing"),
        (
            changed(policy={"max_ctf_fit_angstrom": 5}),
            "policy.max_ctf_fit_angstrom is now quality.max_ctf_fit_angstrom",
        ),
        (
            changed(policy={"max_total_motion_angstrom": None}),
            "policy.max_total_motion_angstrom is now quality.max_total_motion_angstrom",
        ),
        (changed(quality={"max_masked_fraction": 30}), "quality.max_masked_fraction.*not per cent.*30"),
        (changed(quality={"min_defocus_angstrom": 0.5}), "quality.min_defocus_angstrom.*not µm.*0.5"),
        (changed(quality={"min_picks": 9, "max_picks": 3}), "min_picks is at most max_picks"),
        (
            changed(acquisition={"gain_orientation": "auto", "gain_rotate_deg": 90}),
            "gain_orientation auto finds flips and rotation itself",
        ),
        (changed(acquisition={"gain_orientation": "auto", "gain": None}), "auto needs a gain"),
        (changed(particle={"picker": "deep"}), "particle.picker.*deep"),
    ],
)
def test_a_fault_names_the_key_the_value_and_the_rule(
    tmp_path: Path, document: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_settings(write(tmp_path, document))
    assert str(tmp_path / "session.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_controller_is_told_of_automatic_gain_and_templates_for_movies_alone(tmp_path: Path) -> None:
    chosen = changed(acquisition={"gain_orientation": "auto"}, particle={"picker": "template-after-map"})
    told = load_settings(write(tmp_path, chosen)).controller_settings(n_preprocess_workers=1)
    assert told.is_gain_orientation_sought
    assert told.is_picking_by_template
    averaged = {key: value for key, value in chosen.items() if key != "movies"} | {"micrographs": "m"}
    told = load_settings(write(tmp_path, averaged)).controller_settings(n_preprocess_workers=1)
    assert not told.is_gain_orientation_sought


def test_a_program_by_its_bare_name_is_looked_up_and_a_path_is_anchored(tmp_path: Path) -> None:
    for given, expected in (("topaz", Path("topaz")), ("bin/topaz", tmp_path / "bin/topaz")):
        settings = load_settings(write(tmp_path, changed(particle={"topaz_executable": given})))
        assert settings.particle.topaz_executable == expected


def test_the_search_for_the_ctf_reaches_every_worker(tmp_path: Path) -> None:
    ctf = {"max_defocus_angstrom": 30000, "has_phase_shift": True, "max_thickness_angstrom": 2000}
    settings = load_settings(write(tmp_path, changed(ctf=ctf, acquisition={"binning": 2})))
    told = build_worker_spec(settings).preprocess
    assert told.ctf_search.max_defocus_angstrom == 30000
    assert told.ctf_search.phase_shift_range_deg == (0.0, 175.0)
    assert told.ctf_search.max_thickness_angstrom == 2000
    assert told.micrograph_pixel_size_angstrom == pytest.approx(1.77)


@pytest.mark.parametrize("executable", [None, "no/such/topaz"])
def test_topaz_that_is_not_there_is_found_before_any_movie(tmp_path: Path, executable: str | None) -> None:
    particle = {"picker": "topaz", "topaz_executable": executable}
    with pytest.raises(ConfigurationError, match="the picker topaz needs its program"):
        build_worker_spec(load_settings(write(tmp_path, changed(particle=particle))))


def test_an_empty_range_of_defocus_is_refused(tmp_path: Path) -> None:
    ctf = {"min_defocus_angstrom": 20000, "max_defocus_angstrom": 10000}
    with pytest.raises(ConfigurationError, match="min_defocus_angstrom is below max_defocus_angstrom"):
        load_settings(write(tmp_path, changed(ctf=ctf)))


def test_a_file_that_is_not_yaml_or_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: }")
    with pytest.raises(ConfigurationError, match="must be YAML"):
        load_settings(tmp_path / "bad.yaml")
    with pytest.raises(ConfigurationError, match="must be readable"):
        load_settings(tmp_path / "none.yaml")
