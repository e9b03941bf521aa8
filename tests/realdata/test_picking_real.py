"""Real micrographs: contamination against a reference mask, clean fields, crystalline ice, what is drawn in pictures."""

import bz2
import gzip
import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from models.fourier.spectra import average_tile_power
from models.optics.ice import estimate_crystalline_ice
from models.picking.blob import BlobSettings, pick_blobs
from models.picking.correlation import mask_micrograph

DEFAULT = Path(__file__).parents[2].parent / "shared" / "data"
DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", DEFAULT)) / "micrographs"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA} (ICESTREAM_TEST_DATA)"),
]


def read_png(name):
    return np.asarray(Image.open(DATA / name), dtype=np.float32)


def mask_of(image, diameter_px):
    return mask_micrograph(torch.from_numpy(image.copy()), 1.0, diameter_angstrom=diameter_px)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Return the raw 3838 × 3710 micrograph, X-rays cut, at 0.8538 Å."""
    path = tmp_path_factory.mktemp("fei") / "fei.mrc"
    path.write_bytes(bz2.decompress((DATA / "fei-extended.mrc.bz2").read_bytes()))
    with mrcfile.open(path, permissive=True) as mrc:
        image = np.array(mrc.data, dtype=np.float32)
    median = np.median(image)
    limit = 12.0 * 1.4826 * np.median(np.abs(image - median))
    return torch.from_numpy(np.clip(image, median - limit, median + limit))


def test_contamination_is_that_of_the_reference_mask(tmp_path):
    """MicrographCleaner's own reference for a crystal that covers a seventh of the field."""
    path = tmp_path / "ucsf.mrc"
    path.write_bytes(gzip.decompress((DATA / "Ucsf_stack_1142_DW.mrc.gz").read_bytes()))
    with mrcfile.open(path, permissive=True) as mrc:
        image = np.array(mrc.data, dtype=np.float32)
    reference = read_png("Ucsf_stack_1142_DW_contamination_mask_derived.png") > 0
    small = Image.fromarray((255 * mask_of(image, 22.0)).astype(np.uint8))
    mask = np.asarray(small.resize(reference.shape[::-1])) > 127
    both = (mask & reference).sum()
    assert both / (mask | reference).sum() > 0.8
    assert both / mask.sum() > 0.9
    assert both / reference.sum() > 0.8


def test_two_drops_on_apoferritin_are_masked_and_nothing_else_is():
    image = read_png("apoferritin_empiar10146/May08_03.05.02.bin_avg.png")
    settings = BlobSettings(
        min_diameter_angstrom=106.0, max_diameter_angstrom=144.0, border_angstrom=62.0, threshold=3.0
    )
    picks = pick_blobs(torch.from_numpy(image), 1.5, settings)
    assert 0.005 < picks.excluded_fraction < 0.03
    # the two drops' middles, in px of the micrograph, as seen by eye
    for y, x in ((265.0, 10.0), (830.0, 1130.0)):
        assert np.hypot(*(picks.centres_yx_px - (y, x)).T).min() > 40.0
        row = int(y / image.shape[0] * picks.mask.shape[0])
        column = int(x / image.shape[1] * picks.mask.shape[1])
        assert picks.mask[row, column]


def test_particles_of_any_view_are_not_contamination():
    image = tifffile.imread(DATA / "KLH_xmipp.tif").astype(np.float32)
    assert mask_of(image, 150.0).mean() < 0.01


def test_a_clean_full_size_micrograph_is_not_masked_and_has_no_crystals(full_size):
    assert mask_micrograph(full_size, 0.8538, diameter_angstrom=160.0).mean() < 0.03
    assert estimate_crystalline_ice(average_tile_power(full_size, 512), 0.8538) < 1e-3


def test_what_can_be_seen_in_the_quality_examples_is_masked():
    """Drops on the good grid, the foil's half of the second, drops and ice on the third."""
    fractions = []
    for path in sorted((DATA / "quality_examples").glob("*.png")):
        image = np.asarray(Image.open(path), dtype=np.float32)[3:-3, 4:-4]
        fractions.append(mask_of(image, 12.0).mean())
    great, decent, contaminated, empty, crystalline, vitreous = fractions
    assert great < 0.03
    assert 0.3 < decent < 0.6
    assert contaminated > 3.0 * great
    assert max(empty, crystalline, vitreous) < 0.05
