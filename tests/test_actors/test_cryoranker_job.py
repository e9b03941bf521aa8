"""Training as a Ray job."""

from pathlib import Path

import pytest
import yaml

_ROOT = Path(__file__).parents[2]


@pytest.mark.ray
def test_training_job_prints_one_document_and_leaves_a_checkpoint(tmp_path, run_job):
    config = {
        "size": "nano",
        "model": {"input_size_px": 32, "patch_size_px": 16, "depth": 1},
        "data": {
            "n_train_phantoms": 1,
            "n_validation_phantoms": 1,
            "fields_per_structure": 4,
            "n_shapes": 1,
            "first_seed": 7,
            "cache": str(tmp_path / "cache"),
        },
        "n_steps": 3,
        "batch_size": 8,
        "warm_up_steps": 1,
        "evaluate_every": 3,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    document = run_job("cryoranker", path, tmp_path / "out")
    assert Path(document["checkpoint"]).is_file()
    assert 0.0 <= document["metrics"]["auc"] <= 1.0
