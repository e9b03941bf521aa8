"""From a movie file to sums and figures: what the alignment reports, and that the file is decoded once."""

import mrcfile
import numpy as np
import pytest
import torch

from actors.preprocess import movie as movie_module
from actors.preprocess.clock import StageClock
from actors.preprocess.movie import align_movie
from actors.preprocess.settings import PreprocessSettings
from models.fourier.filters import squared_frequencies
from models.motion.align import AlignmentSettings
from stream.ingest.files import identify_file
from stream.ingest.movie_reader import inspect_movie
from stream.records.values import AcquisitionMetadata, Exposure, ExposureId, InputKind, Optics
from stream.sinks.motion_star import evaluate_motion, read_motion_star
from stream.store.layout import OutputLayout

PIXEL, SIZE, N_FRAMES = 1.5, 320, 8


def shear_px():
    """Return the motion along y at the right edge, the left one's opposite, for each frame."""
    return 3.0 * (1.0 - np.exp(-np.arange(N_FRAMES) / 2.0))


@pytest.fixture(scope="module")
def counts():
    generator = torch.Generator().manual_seed(1)
    k2 = squared_frequencies((SIZE, SIZE), PIXEL)
    spectrum = torch.fft.rfft2(torch.randn(SIZE, SIZE, generator=generator)) * torch.exp(-20 * k2)
    specimen = torch.fft.irfft2(spectrum, s=(SIZE, SIZE))
    specimen = 0.25 * specimen / specimen.std()
    axis = torch.arange(SIZE, dtype=torch.float32)
    yy, xx = torch.meshgrid(axis, axis, indexing="ij")
    frames = []
    for move in shear_px().tolist():
        grid = torch.stack([xx, yy - move * (2.0 * xx / SIZE - 1.0)], dim=-1) * (2 / (SIZE - 1)) - 1
        still = torch.nn.functional.grid_sample(
            specimen[None, None], grid[None], mode="bicubic", padding_mode="reflection", align_corners=True
        )[0, 0]
        frames.append(torch.poisson((4.0 * (1 + still)).clamp(min=0), generator=generator))
    return torch.stack(frames).numpy()


def align(path, out, **more):
    header = inspect_movie(path)
    exposure = Exposure(
        exposure_id=ExposureId("m"),
        name="m",
        kind=InputKind.MOVIE,
        file=identify_file(path),
        n_frames=header.n_frames,
        shape_yx=header.shape_yx,
        metadata=AcquisitionMetadata(),
    )
    settings = PreprocessSettings(
        pixel_size_angstrom=PIXEL,
        optics=Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1),
        dose_e_per_angstrom2=16.0,
        alignment=AlignmentSettings(patch_angstrom=120.0),
        **more,
    )
    layout = OutputLayout(out)
    layout.motion("m").parent.mkdir(parents=True)
    return align_movie(exposure, settings, layout, StageClock()), read_motion_star(layout.motion("m"))


def write(path, frames):
    with mrcfile.new(path) as mrc:
        mrc.set_data(frames)
        mrc.set_image_stack()
    return path


def test_local_motion_is_reported_and_written(counts, tmp_path):
    aligned, table = align(write(tmp_path / "m.mrc", counts.astype(np.int8)), tmp_path / "out")
    # at u the shear moves by 2 u; its rms over the field is 1/√3 of that at the edge
    rms = np.sqrt(np.mean(shear_px() ** 2) / 3.0) * PIXEL
    assert aligned.motion.rms_local_motion_angstrom == pytest.approx(rms, rel=0.25)
    assert (
        0.6 * shear_px()[-1] * PIXEL < aligned.motion.max_patch_motion_angstrom < 2 * shear_px()[-1] * PIXEL
    )
    assert aligned.motion.total_motion_angstrom < 1.5
    edge = evaluate_motion(table, np.array([[SIZE / 2, SIZE * 0.95]]))[:, 0, 0]
    np.testing.assert_allclose(edge - edge.mean(), -0.9 * (shear_px() - shear_px().mean()), atol=0.4)


def test_without_local_motion_there_are_no_figures_of_it(counts, tmp_path):
    path = write(tmp_path / "m.mrc", counts.astype(np.int8))
    aligned, table = align(path, tmp_path / "out", has_local_motion=False)
    assert aligned.motion.rms_local_motion_angstrom is None
    assert aligned.motion.max_patch_motion_angstrom is None
    assert table.local_coefficients is None


def test_a_movie_of_counts_is_decoded_once_and_any_other_gives_the_same(counts, tmp_path, monkeypatch):
    n_decoded = []
    decode = movie_module.iterate_frames

    def counted(path, **kwargs):
        n_decoded.append(path)
        return decode(path, **kwargs)

    monkeypatch.setattr(movie_module, "iterate_frames", counted)
    whole, _ = align(write(tmp_path / "a.mrc", counts.astype(np.int8)), tmp_path / "a")
    assert len(n_decoded) == 1
    # no integers: a gain has been applied already
    other, _ = align(write(tmp_path / "b.mrc", (1.25 * counts + 0.1).astype(np.float32)), tmp_path / "b")
    assert len(n_decoded) > 2
    ratio = (other.summed.micrograph - 0.1 * N_FRAMES) / 1.25 - whole.summed.micrograph
    assert float(ratio.std()) < 0.05 * float(whole.summed.micrograph.std())


def test_one_frame_has_no_motion(counts, tmp_path):
    aligned, table = align(write(tmp_path / "m.mrc", counts[:1].astype(np.int8)), tmp_path / "out")
    assert aligned.motion is None
    assert table.shifts_px.tolist() == [[0.0, 0.0]]
    assert float(aligned.summed.micrograph.mean()) == pytest.approx(float(counts[0].mean()), rel=1e-3)
