"""Names of models on hosts without a shared disk."""

import shutil
from pathlib import Path

import pytest

from tests.exchange.conftest import make_folder
from tests.exchange.hub_runs import refusals
from tests.processes import run_ranks


@pytest.mark.slow
def test_a_name_with_two_meanings_is_refused_everywhere(tmp_path: Path) -> None:
    """The names that a host lacks might be models on the hub; folders of one name may hold other weights."""
    folders = {host: tmp_path / host for host in ("near", "far")}
    near, far = folders.values()
    models = [near / "models/mine", far / "models/theirs"]
    for path in [near / "runs/mine/checkpoints", near / "both", far / "both", *models]:
        path.mkdir(parents=True)
    for path in models:
        (path / "config.json").write_text("{}")
    shutil.copytree(make_folder(near / "same", 1), far / "same")
    make_folder(near / "retrained", 1)
    make_folder(far / "retrained", 2)
    names = ["runs/mine", "models/mine", "models/theirs", "both", "same", "retrained"]
    main, *others = run_ranks(3, refusals, names, ["near", "near", "far"], folders)
    assert others == [main, main]
    assert main[0].startswith("runs/mine: no file or folder on far, but a run on near: copy it to every host")
    assert main[1].startswith("models/mine: no file or folder on far, but a transformers folder on near")
    assert main[2].startswith("models/theirs: a transformers folder on far, but no file or folder on near")
    assert main[3].startswith("both: a folder without a model")
    assert main[4] == "same"
    assert main[5].startswith("retrained: the model on far is another one than on near; copy the folder of near")
