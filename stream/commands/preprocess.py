"""`icestream preprocess` and `icestream ctf`: the stages of preprocessing on given files, without a session.

One bad file costs one line on stderr; the others go on, and the command ends with exit code 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from stream.commands.common import AsJson, PixelSize, console, print_json
from stream.records.errors import ConfigurationError, IcestreamError, InputError, ResourceError

if TYPE_CHECKING:
    from actors.preprocess.settings import PreprocessSettings
    from stream.ingest.eer import EerUpsampling
    from stream.ingest.gain import GainConvention
    from stream.records.values import Exposure, GainOrientation

_MAX_MOVIES_TO_ORIENT = 8

Voltage = Annotated[float, typer.Option("--voltage-kv", min=50, max=1500, help="Acceleration voltage in kV.")]
Cs = Annotated[float, typer.Option("--cs-mm", min=0, max=10, help="Spherical aberration in mm.")]
Contrast = Annotated[
    float, typer.Option("--amplitude-contrast", min=0, max=0.5, help="Amplitude contrast, a fraction.")
]
MinDefocus = Annotated[
    float, typer.Option("--min-defocus-angstrom", min=0, help="Smallest defocus searched, in Å.")
]
MaxDefocus = Annotated[
    float, typer.Option("--max-defocus-angstrom", min=0, help="Largest defocus searched, in Å.")
]
PhaseShift = Annotated[
    bool, typer.Option("--phase-shift", help="Fit a phase shift (0-175°) as well (phase plates).")
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Compute threads.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("preprocess")(preprocess)
    app.command("ctf")(ctf)


def preprocess(
    movies: Annotated[list[Path], typer.Argument(help="Movies (TIFF, MRC, EER) or micrographs (MRC).")],
    out: Annotated[Path, typer.Option("--out", help="Output folder.")],
    pixel_size_angstrom: PixelSize,
    voltage_kv: Voltage = 300.0,
    cs_mm: Cs = 2.7,
    dose_e_per_angstrom2: Annotated[
        float | None,
        typer.Option(
            "--dose-e-per-angstrom2", min=0.01, help="Total dose of a movie; none: no dose weighting."
        ),
    ] = None,
    pre_exposure_e_per_angstrom2: Annotated[
        float, typer.Option("--pre-exposure-e-per-angstrom2", min=0, help="Dose before the first frame.")
    ] = 0.0,
    particle_diameter_angstrom: Annotated[
        float, typer.Option("--particle-diameter-angstrom", min=20, help="Particle diameter in Å.")
    ] = 150.0,
    gain: Annotated[Path | None, typer.Option("--gain", help="Gain reference.")] = None,
    gain_flip_x: Annotated[bool, typer.Option("--gain-flip-x", help="Reverse the gain's columns.")] = False,
    gain_flip_y: Annotated[bool, typer.Option("--gain-flip-y", help="Reverse the gain's rows.")] = False,
    gain_rotate_deg: Annotated[
        int, typer.Option("--gain-rotate-deg", help="Turn the gain counter-clockwise (0, 90, 180, 270).")
    ] = 0,
    gain_orientation: Annotated[
        str,
        typer.Option(
            "--gain-orientation",
            help="given: as the three options above say; auto: as the given movies show.",
        ),
    ] = "given",
    gain_convention: Annotated[
        str,
        typer.Option(
            "--gain-convention", help="multiply, divide, or auto: .gain files (EER) divide, others multiply."
        ),
    ] = "auto",
    binning: Annotated[
        float, typer.Option("--binning", min=1, max=8, help="Fourier cropping of the movie.")
    ] = 1.0,
    keeps_unweighted: Annotated[
        bool, typer.Option("--unweighted", help="Write the sums without dose weights as well.")
    ] = False,
    eer_fractions: Annotated[
        int, typer.Option("--eer-fractions", min=1, help="Dose fractions of an EER.")
    ] = 40,
    eer_dose_per_fraction_e_per_angstrom2: Annotated[
        float | None,
        typer.Option(
            "--eer-dose-per-fraction-e-per-angstrom2", min=0.01, help="In place of a number of fractions."
        ),
    ] = None,
    eer_upsampling: Annotated[
        int,
        typer.Option(
            "--eer-upsampling", min=1, max=2, help="Frames of an EER on pixels of the sensor's size, or half."
        ),
    ] = 1,
    box_size_px: Annotated[
        int | None, typer.Option("--box-size-px", min=16, help="Side of an extracted particle.")
    ] = None,
    extract_pixel_size_angstrom: Annotated[
        float | None,
        typer.Option("--extract-pixel-size-angstrom", min=0.1, help="Pixel size of extracted particles."),
    ] = None,
    pick_threshold_sd: Annotated[
        float, typer.Option("--pick-threshold-sd", min=0.1, help="Lowest z-score of a pick.")
    ] = 2.5,
    amplitude_contrast: Contrast = 0.1,
    min_defocus_angstrom: MinDefocus = 2000.0,
    max_defocus_angstrom: MaxDefocus = 50000.0,
    has_phase_shift: PhaseShift = False,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    r"""Align, dose-weight, fit the CTF, pick and extract given movies or micrographs.

    Example: icestream preprocess raw/*.tiff --out OUT --pixel-size-angstrom 0.885 --voltage-kv 200
    --cs-mm 1.4 --dose-e-per-angstrom2 30 --particle-diameter-angstrom 180 --gain gain.mrc --gain-orientation auto
    """
    from actors.preprocess.ctf import describe_fit
    from actors.preprocess.exposure import preprocess_exposure
    from actors.preprocess.settings import PreprocessSettings
    from models.optics.ctf_search import PHASE_SHIFT_RANGE_DEG, CtfSearch
    from stream.records.values import Optics
    from stream.store.layout import OutputLayout

    _check_defocus(min_defocus_angstrom, max_defocus_angstrom)
    _one_of("--gain-orientation", gain_orientation, ("given", "auto"))
    _one_of("--gain-convention", gain_convention, ("auto", "multiply", "divide"))
    settings = PreprocessSettings(
        pixel_size_angstrom=_positive("pixel_size_angstrom", pixel_size_angstrom),
        optics=Optics(voltage_kv=voltage_kv, cs_mm=cs_mm, amplitude_contrast=amplitude_contrast),
        dose_e_per_angstrom2=dose_e_per_angstrom2,
        pre_exposure_e_per_angstrom2=pre_exposure_e_per_angstrom2,
        gain=gain,
        gain_flip_x=gain_flip_x,
        gain_flip_y=gain_flip_y,
        gain_rotate_deg=gain_rotate_deg,
        gain_convention=cast("GainConvention", gain_convention),
        keeps_unweighted=keeps_unweighted,
        binning=binning,
        eer_fractions=eer_fractions,
        eer_dose_per_fraction_e_per_angstrom2=eer_dose_per_fraction_e_per_angstrom2,
        eer_upsampling=cast("EerUpsampling", eer_upsampling),
        ctf_search=CtfSearch(
            min_defocus_angstrom=min_defocus_angstrom,
            max_defocus_angstrom=max_defocus_angstrom,
            phase_shift_range_deg=PHASE_SHIFT_RANGE_DEG if has_phase_shift else None,
        ),
        particle_diameter_angstrom=particle_diameter_angstrom,
        pick_threshold_sd=pick_threshold_sd,
        box_size_px=box_size_px,
        extract_pixel_size_angstrom=extract_pixel_size_angstrom,
        n_threads=threads,
    )
    if gain is not None and not gain.is_file():
        raise ConfigurationError(gain, "--gain names a file that exists")
    layout = OutputLayout(out)
    names = _unique_names(movies)
    orientation = None
    if gain_orientation == "auto":
        if gain_flip_x or gain_flip_y or gain_rotate_deg:
            raise ConfigurationError(
                "--gain-orientation auto",
                "finds flips and rotation itself: leave --gain-flip-… and -rotate-deg out",
            )
        orientation = _orient_gain(movies, names, settings)

    def process(path: Path) -> dict[str, Any]:
        exposure = _inspect(path, names[path], settings)
        result = preprocess_exposure(exposure, settings, layout, gain_orientation=orientation)
        motion = None if result.motion is None else result.motion.total_motion_angstrom
        fit = result.ctf
        return {
            "movie": str(path),
            "total_motion_angstrom": motion,
            **describe_fit(fit),
            "ice_ratio": result.ice_ratio,
            "crystalline_ice": result.crystalline_ice,
            "masked_fraction": result.masked_fraction,
            "picks": result.n_picks,
            "particles": result.n_particles,
            "gain_residual": result.gain_residual,
            "seconds": {stage: round(value, 3) for stage, value in result.seconds.items()},
        }

    _run(movies, process, as_json=as_json)


def _orient_gain(
    movies: Sequence[Path], names: Mapping[Path, str], settings: PreprocessSettings
) -> GainOrientation:
    """Return how the gain reference lies, by one movie or as many of the given as it takes, at most 8."""
    from actors.preprocess.gain import orient_session_gain
    from stream.records.values import InputKind

    if settings.gain is None:
        raise ConfigurationError("--gain-orientation auto", "needs a reference: --gain")
    exposures = []
    for path in movies[:_MAX_MOVIES_TO_ORIENT]:
        try:
            exposure = _inspect(path, names[path], settings)
        except IcestreamError:
            continue  # it is told of when its turn comes
        if exposure.kind is InputKind.MOVIE:
            exposures.append(exposure)
    note = "none of the files can be read as a movie"
    n_movies = 1
    while exposures:
        found = orient_session_gain(exposures[:n_movies], settings)
        note = found.note
        if found.orientation is not None:
            console.print(f"gain: {note}", highlight=False, soft_wrap=True)
            return found.orientation
        if n_movies >= len(exposures):
            break
        n_movies *= 2
    raise ConfigurationError(
        settings.gain, "shows in the movies how it lies (else say so: --gain-orientation given)", note
    )


def ctf(
    micrographs: Annotated[list[Path], typer.Argument(help="Micrographs, or power spectra (MRC).")],
    pixel_size_angstrom: PixelSize,
    voltage_kv: Voltage = 300.0,
    cs_mm: Cs = 2.7,
    amplitude_contrast: Contrast = 0.1,
    min_defocus_angstrom: MinDefocus = 2000.0,
    max_defocus_angstrom: MaxDefocus = 50000.0,
    has_phase_shift: PhaseShift = False,
    max_thickness_angstrom: Annotated[
        float | None,
        typer.Option(
            "--max-thickness-angstrom", min=300, help="Look for the node of rings in ice up to this thick."
        ),
    ] = None,
    is_power_spectrum: Annotated[
        bool, typer.Option("--power-spectrum", help="The files are centred power spectra, not micrographs.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write ctf/NAME.png and .json below it.")] = None,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    r"""Fit the CTF of micrographs or of power spectra.

    Example: icestream ctf micrographs/*.mrc --pixel-size-angstrom 0.885 --voltage-kv 200 --cs-mm 1.4 --json
    """
    import torch

    from actors.preprocess.ctf import describe_fit, judge_ice, make_microscope, to_record, write_ctf_files
    from actors.preprocess.exposure import clip_outliers
    from models.fourier.spectra import half_from_centred
    from models.optics.ctf_fit import fit_ctf, fit_ctf_spectrum
    from models.optics.ctf_local import fit_local_defocus
    from models.optics.ctf_search import PHASE_SHIFT_RANGE_DEG, CtfSearch
    from models.optics.ice import estimate_crystalline_ice
    from stream.ingest.movie_reader import read_micrograph
    from stream.records.values import Optics
    from stream.store.layout import OutputLayout

    torch.set_num_threads(threads)
    _check_defocus(min_defocus_angstrom, max_defocus_angstrom)
    pixel = _positive("pixel_size_angstrom", pixel_size_angstrom)
    optics = Optics(voltage_kv=voltage_kv, cs_mm=cs_mm, amplitude_contrast=amplitude_contrast)
    microscope = make_microscope(optics)
    search = CtfSearch(
        min_defocus_angstrom=min_defocus_angstrom,
        max_defocus_angstrom=max_defocus_angstrom,
        phase_shift_range_deg=PHASE_SHIFT_RANGE_DEG if has_phase_shift else None,
        max_thickness_angstrom=max_thickness_angstrom,
    )
    names = _unique_names(micrographs)

    def process(path: Path) -> dict[str, Any]:
        image = torch.from_numpy(read_micrograph(path))
        local = None
        try:
            if is_power_spectrum:
                _check_spectrum(path, tuple(image.shape))
                power = half_from_centred(image)
                fitted = fit_ctf_spectrum(power, pixel, microscope, search)
            else:
                image = clip_outliers(image)
                fitted, power = fit_ctf(image, pixel, microscope, search)
                local = fit_local_defocus(image, pixel, microscope, fitted, search)
        except ValueError as error:
            raise InputError(path, str(error)) from error
        ice_ratio = judge_ice(power, pixel, microscope, fitted)
        crystals = estimate_crystalline_ice(power, pixel)
        if out is not None:
            write_ctf_files(
                OutputLayout(out), names[path], power, pixel, microscope, fitted, ice_ratio, crystals, local
            )
        fit = to_record(fitted, local)
        return {
            "movie": str(path),
            **describe_fit(fit),
            "ctf_status": fitted.status.value,
            "ice_ratio": ice_ratio,
            "crystalline_ice": crystals,
        }

    _run(micrographs, process, as_json=as_json)


def _run(paths: Sequence[Path], process: Callable[[Path], dict[str, Any]], *, as_json: bool) -> None:
    documents, n_failed = [], 0
    for path in paths:
        try:
            document = process(path)
        except (IcestreamError, OSError) as error:
            n_failed += 1
            # one line, whoever raised it
            known = error if isinstance(error, IcestreamError) else ResourceError(path, str(error))
            console.print(f"[red]error:[/red] {known}", highlight=False, soft_wrap=True)
            continue
        documents.append(document)
        if not as_json:
            typer.echo(_as_text(document))
    if as_json:
        print_json(documents)
    if n_failed:
        raise typer.Exit(1)


def _as_text(document: dict[str, Any]) -> str:
    parts = [document["movie"]]
    if document.get("total_motion_angstrom") is not None:
        parts.append(f"motion {document['total_motion_angstrom']:.1f} Å")
    if document["ctf_is_reliable"]:
        u, v = document["defocus_u_angstrom"], document["defocus_v_angstrom"]
        parts.append(f"defocus {u:.0f}/{v:.0f} Å, rings to {document['ctf_fit_angstrom']:.1f} Å")
    else:
        parts.append("no Thon rings found")
    if "picks" in document:
        parts.append(f"{document['picks']} picks, {document['particles']} particles")
        parts.append(f"{sum(document['seconds'].values()):.1f} s")
    return "; ".join(parts)


def _inspect(path: Path, name: str, settings: PreprocessSettings) -> Exposure:
    """Return the file's exposure, valid as the service has it: a movie, or a micrograph of a single image."""
    from stream.ingest.movie_reader import MovieFormat, inspect_movie
    from stream.ingest.validation import ExpectedAcquisition, validate_image_file
    from stream.records.values import InputKind

    header = inspect_movie(path)
    is_single = header.n_frames == 1 and header.format is not MovieFormat.EER
    expected = ExpectedAcquisition(
        pixel_size_angstrom=settings.pixel_size_angstrom,
        voltage_kv=settings.optics.voltage_kv,
        dose_e_per_angstrom2=settings.dose_e_per_angstrom2,
    )
    kind = InputKind.MICROGRAPH if is_single else InputKind.MOVIE
    return replace(validate_image_file(path, path.name, kind, expected=expected, gain=None), name=name)


def _unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a name per file: its stem, with a number where two files share one."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name, n = path.stem, 1
        while name in taken:
            n += 1
            name = f"{path.stem}_{n}"
        taken.add(name)
        names[path] = name
    return names


def _check_spectrum(path: Path, shape: tuple[int, ...]) -> None:
    if shape[0] != shape[1] or shape[0] % 2:
        raise InputError(path, "a power spectrum is square with an even side", " x ".join(map(str, shape)))


def _check_defocus(low: float, high: float) -> None:
    if not low < high:
        raise ConfigurationError("--max-defocus-angstrom", f"is above --min-defocus-angstrom ({low:g})", high)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigurationError(name, f"is one of {', '.join(allowed)}", value)


def _positive(name: str, value: float) -> float:
    if not 0.1 < value < 20.0:
        raise ConfigurationError(name, "lies between 0.1 and 20 Å", value)
    return value
