"""The one door to checkpoint files: hashes, formats, and nothing unpickled."""

import hashlib
import pickle

import pytest
import torch

from models.weights import load_checkpoint, save_checkpoint, sha256_of_file


class Harmful:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_saved_checkpoint_comes_back_with_tensors_metadata_and_hash(tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    sha256 = save_checkpoint(path, tensors, {"model": {"width": 3}})
    loaded = load_checkpoint(path, expected_sha256=sha256)
    assert loaded.sha256 == sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.metadata == {"model": {"width": 3}}
    assert set(loaded.tensors) == {"a", "n"}
    assert torch.equal(loaded.tensors["a"], tensors["a"])
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_torch_file_loads_bare_or_wrapped(tmp_path, wrap):
    path = tmp_path / "model.pth"
    state = {"w": torch.ones(2)}
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, path)
    assert torch.equal(load_checkpoint(path).tensors["w"], torch.ones(2))


def test_another_hash_than_expected_is_refused_naming_both(tmp_path):
    path = tmp_path / "model.safetensors"
    sha256 = save_checkpoint(path, {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=f"{sha256}, expected {'0' * 64}"):
        load_checkpoint(path, expected_sha256="0" * 64)


def test_file_with_objects_is_refused_and_runs_nothing(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(1), "x": Harmful()}, path)
    with pytest.raises(ValueError, match="not unpickled"):
        load_checkpoint(path)


def test_bare_pickle_is_refused_and_runs_nothing(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(ValueError, match=r"model\.bin"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_truncated_file_is_refused(tmp_path, name):
    path = tmp_path / name
    if name.endswith("pt"):
        torch.save({"w": torch.ones(1000)}, path)
    else:
        save_checkpoint(path, {"w": torch.ones(1000)}, {})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="not a whole"):
        load_checkpoint(path)


def test_error_page_saved_as_weights_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("<html>404</html>" * 10)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_checkpoint(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_checkpoint(tmp_path / "none.pt")


def test_file_without_tensors_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="no tensors"):
        load_checkpoint(path)


def test_hash_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"ice" * 1_000_000)
    assert sha256_of_file(path) == hashlib.sha256(b"ice" * 1_000_000).hexdigest()
