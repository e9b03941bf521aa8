"""How exposures are preprocessed: one frozen record that travels to every worker."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from models.fourier.transforms import good_size
from models.motion.align import AlignmentSettings
from models.optics.ctf_fit import CtfSearch
from models.picking.extract import BoxSettings
from stream.ingest.eer import EerUpsampling, count_fractions
from stream.ingest.gain import GainConvention
from stream.records.errors import ConfigurationError
from stream.records.values import Optics

# What a box of the default size is rescaled to at most: the embedded engine's range is 64-96 pixels.
_DEFAULT_MAX_BOX_PX = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSettings:
    """How exposures are preprocessed; the pixel size is the sensor's (or the input micrograph's).

    `dose_e_per_angstrom2` is the movie's total (None: what the microscope's metadata say, else no dose
    weighting). `box_size_px` and `extract_pixel_size_angstrom` speak of the extracted particles; None derives
    a box of 1.5 diameters, rescaled to at most 96 pixels. Defocus is searched between the two limits, in Å.
    `pick_threshold_sd` is a calibrated z-score, `pick_diameter_tolerance` the half width of the picked diameters. `picker` is
    "blob", "template-after-map" (blobs until a command names a run) or "topaz", with its program and model.
    The events of an EER are summed into `eer_fractions` frames, or into as many as come nearest to
    `eer_dose_per_fraction_e_per_angstrom2`, on pixels of 1 / `eer_upsampling` the sensor's. `keeps_unweighted` writes the
    sum without dose weights as well.
    """

    pixel_size_angstrom: float
    optics: Optics
    dose_e_per_angstrom2: float | None = None
    pre_exposure_e_per_angstrom2: float = 0.0
    gain: Path | None = None
    gain_flip_x: bool = False
    gain_flip_y: bool = False
    gain_rotate_deg: int = 0
    gain_convention: GainConvention = "auto"
    binning: float = 1.0
    eer_fractions: int = 40
    eer_dose_per_fraction_e_per_angstrom2: float | None = None
    eer_upsampling: EerUpsampling = 1
    has_local_motion: bool = True
    keeps_unweighted: bool = False
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    ctf_search: CtfSearch = field(default_factory=CtfSearch)
    particle_diameter_angstrom: float = 150.0
    pick_diameter_tolerance: float = 0.15
    pick_threshold_sd: float = 2.5
    max_picks: int = 2000
    picker: str = "blob"
    topaz_executable: Path | None = None
    topaz_model: Path | None = None
    box_size_px: int | None = None
    extract_pixel_size_angstrom: float | None = None
    is_float16: bool = True
    n_threads: int = 1

    @property
    def movie_pixel_size_angstrom(self) -> float:
        """Pixel size of the frames that are aligned: the sensor's, or finer where the events of an EER are up-sampled."""
        return self.pixel_size_angstrom / self.eer_upsampling

    @property
    def micrograph_pixel_size_angstrom(self) -> float:
        """Pixel size of the aligned micrograph."""
        return self.movie_pixel_size_angstrom * self.binning

    def count_eer_fractions(self, n_raw_frames: int, dose_e_per_angstrom2: float | None) -> int:
        """Return into how many frames an EER of `n_raw_frames` and this dose is summed.

        Raises
        ------
        ConfigurationError
            Fractions are asked for by dose, and the dose is not known.
        """
        wanted = self.eer_dose_per_fraction_e_per_angstrom2
        if wanted is None:
            return min(self.eer_fractions, n_raw_frames)
        if dose_e_per_angstrom2 is None:
            raise ConfigurationError(
                "eer_dose_per_fraction_e_per_angstrom2",
                "needs the movie's dose (settings or metadata)",
                wanted,
            )
        return count_fractions(n_raw_frames, dose_e_per_angstrom2, wanted)

    @property
    def boxes(self) -> BoxSettings:
        """Box sizes in pixels of the micrograph and of the extracted particle, and the background's radius."""
        pixel = self.micrograph_pixel_size_angstrom
        box_angstrom = 1.5 * self.particle_diameter_angstrom
        target = self.extract_pixel_size_angstrom
        if target is None:
            size_angstrom = box_angstrom if self.box_size_px is None else 0.0
            target = max(pixel, size_angstrom / _DEFAULT_MAX_BOX_PX)
        size = self.box_size_px or min(good_size(math.ceil(box_angstrom / target)), 4096)
        size += size % 2
        box = max(size, 2 * round(size * target / pixel / 2.0))
        radius = 0.575 * self.particle_diameter_angstrom / (pixel * box / size)
        return BoxSettings(
            box_size_px=box, extract_box_px=size, background_radius_px=min(radius, 0.45 * size)
        )

    @property
    def particle_pixel_size_angstrom(self) -> float:
        """Pixel size of the extracted particles: as asked for, to the nearest that an even box allows."""
        boxes = self.boxes
        return self.micrograph_pixel_size_angstrom * boxes.box_size_px / boxes.extract_box_px
