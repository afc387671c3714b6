"""Models of the Hugging Face hub, by the real client against a small hub on this machine."""

import json
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from megagpt.exchange.hub_models import _COMMITS
from tests.conftest import Tiny
from tests.data.hub import Hub
from tests.exchange.conftest import COMMIT, GPT2, SAMPLE, WEIGHTS, contents, make_folder
from tests.exchange.hub_runs import opened, run, run_each
from tests.processes import environment, run_ranks
from tests.runs import PATIENCE


def refused(hub: Hub, cwd: Path, name: str, *parts: str, **variables: str) -> str:
    """The one line with which `sample` refuses a model."""
    code, _, err = run(hub.environment(cwd / "home") | variables, cwd, "sample", name)
    assert code == 2, err
    assert err.startswith("megagpt: error: "), err
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err
    return err


def test_each_short_name_has_a_commit() -> None:
    assert [repo.partition("/")[2] for repo in _COMMITS] == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    assert all(len(commit) == 40 and int(commit, 16) for commit in _COMMITS.values())


@pytest.mark.slow
def test_openais_gpt2_is_one_word(hub: Hub, tmp_path: Path, text: str) -> None:
    """The second time nothing is asked of the hub, which has gone."""
    variables = hub.environment(tmp_path / "home")
    code, out, err = run(variables, tmp_path, "sample", "gpt2", *SAMPLE)
    assert (code, out) == (0, text)
    assert f"fetching {GPT2}: {WEIGHTS}, 2 MB, into {tmp_path / 'home' / 'hub'}" in err
    fetched = {path.rpartition("/")[2] for path in hub.requests if path.startswith("GET")}
    assert fetched >= {WEIGHTS, "config.json", "vocab.json"}
    assert not fetched & {"pytorch_model.bin", "flax_model.msgpack", "model.onnx"}
    hub.shutdown()
    asked = len(hub.requests)
    names = ["gpt2", GPT2, f"gpt2@{COMMIT}", f"https://huggingface.co/{GPT2}"]
    for done in run_each(variables, tmp_path, [["sample", name, *SAMPLE] for name in names]):
        assert done == (0, text, "")
    assert len(hub.requests) == asked


@pytest.mark.slow
def test_hub_models_are_imported_and_exported(hub: Hub, tiny: Tiny, tmp_path: Path, folder: Path) -> None:
    """Both record the commit, also when the imported run is exported."""
    variables, shape = hub.environment(tmp_path / "home"), ["model.layers=1", "model.width=8", "model.heads=1"]
    tuned = tmp_path / "runs" / "tiny"
    exports = (("gpt2", tmp_path / "direct"), (str(tuned), tmp_path / "of a run"))
    commands = [["import", "gpt2", str(tiny()), *shape]]
    commands += [["export", name, "--to", str(out)] for name, out in exports]
    assert [code for code, _, _ in run_each(variables, tmp_path, commands)] == [0, 0, 0]
    assert json.loads((tuned / "imported.json").read_text())["hub"] == {"repo": GPT2, "commit": COMMIT}
    wanted = load_file(folder / WEIGHTS)
    for _, out in exports:
        assert f"`{GPT2}` at commit `{COMMIT}`" in (out / "README.md").read_text()
        weights = load_file(out / WEIGHTS)
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


@pytest.mark.slow
def test_a_branch_is_resolved_to_a_commit(other: Hub, tmp_path: Path, text: str) -> None:
    first, name = other.commit, other.repository
    variables = other.environment(tmp_path / "home")
    code, out, err = run(variables, tmp_path, "sample", name, *SAMPLE)
    assert (code, out) == (0, text)
    assert f"main is commit {first}; to name it always: {name}@{first}\n" in err
    other.revise({WEIGHTS: contents(make_folder(tmp_path / "new", 2))[WEIGHTS]})
    code, new, err = run(variables, tmp_path, "sample", name, *SAMPLE)
    assert other.commit in err
    assert new != text
    assert run(variables, tmp_path, "sample", f"{name}@{first}", *SAMPLE) == (0, text, "")
    other.shutdown()
    other.server_close()
    code, out, err = run(variables, tmp_path, "sample", name, *SAMPLE)
    assert (code, out) == (0, new)
    assert other.commit in err, "the branch as it was when the hub was last reached"


# --- troubles on the way ---


def test_a_broken_download_is_resumed(hub: Hub, tmp_path: Path, text: str) -> None:
    hub.faults[WEIGHTS] = ["cut"]
    assert run(hub.environment(tmp_path / "home"), tmp_path, "sample", "gpt2", *SAMPLE)[:2] == (0, text)
    (begin,) = [int(path.split()[-1]) for path in hub.requests if f"{WEIGHTS} from " in path]
    assert begin > len(hub.files[WEIGHTS]) // 3


@pytest.mark.slow
def test_another_attempt_follows_each_fault(hub: Hub, tmp_path: Path, text: str) -> None:
    hub.faults = {
        "config.json": ["busy"], "vocab.json": ["silent"], WEIGHTS: ["reset"], "merges.txt": ["stalled"],
        "tokenizer.json": ["corrupt"],
    }  # fmt: skip
    seconds = {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    code, out, err = run(hub.environment(tmp_path / "home") | seconds, tmp_path, "sample", "gpt2", *SAMPLE)
    assert (code, out) == (0, text), err
    assert not any(hub.faults.values())
    for said in (
        "config.json: the hub answers 503; trying again in 1 s", "vocab.json: ReadTimeout", f"{WEIGHTS}: ReadError",
        "tokenizer.json: was corrupt, its SHA-1 is",
    ):  # fmt: skip
        assert said in err, err
    assert "merges.txt" not in err, "the client itself tries again within a file"
    assert all(err.splitlines()), "a bar on a log"


@pytest.mark.slow
def test_a_hub_that_stays_down_is_one_error(hub: Hub, tmp_path: Path) -> None:
    hub.faults["config.json"] = ["busy"] * 9
    code, _, err = run(hub.environment(tmp_path / "home"), tmp_path, "sample", "gpt2")
    assert code == 2
    assert err.splitlines()[-1] == f"megagpt: error: {GPT2}: config.json: the hub answers 503; try again later"
    hub.down = True
    code, _, err = run(hub.environment(tmp_path / "home"), tmp_path, "sample", "runs/tny")
    assert code == 2
    words = "no folder runs/tny here; on the Hugging Face hub: runs/tny: config.json: the hub answers 503; try again"
    assert words in err.splitlines()[-1]


@pytest.mark.slow
def test_a_wrong_checksum_is_refused(hub: Hub, tmp_path: Path, text: str) -> None:
    """Whether the hub sends another file twice, or the cache's disk has changed a byte."""
    variables = hub.environment(tmp_path / "home")
    hub.faults[WEIGHTS] = ["corrupt", "corrupt"]
    code, _, err = run(variables, tmp_path, "sample", "gpt2")
    assert code == 2
    last = err.splitlines()[-1]
    assert f"{WEIGHTS} is corrupt after a second download" in last
    assert "its SHA-256 is" in last
    assert not list((tmp_path / "home").rglob(WEIGHTS)), "another program would take it"
    assert run(variables, tmp_path, "sample", "gpt2", *SAMPLE)[:2] == (0, text)
    (small,) = (tmp_path / "home").rglob("config.json")
    small.write_text(small.read_text() + " ")
    words = [f"{small}: corrupt, its SHA-1 is", "an intact config.json is not in the cache here, and HF_HUB_OFFLINE"]
    refused(hub, tmp_path, "gpt2", *words, HF_HUB_OFFLINE="1")
    code, out, err = run(variables, tmp_path, "sample", "gpt2", *SAMPLE)
    assert (code, out) == (0, text)
    assert f"{small}: was corrupt, its SHA-1 is" in err


def test_a_gated_model_says_how_to_log_in(hub: Hub, tmp_path: Path) -> None:
    hub.gated = "Access to this model is restricted."
    advice = [f"accept its terms at {hub.url}/{GPT2}", "`hf auth login`", "HF_TOKEN", hub.gated]
    refused(hub, tmp_path, "gpt2", "gated", *advice)
    refused(hub, tmp_path, "gpt2", "gated", *advice, HF_TOKEN="hf_of_nobody")


def test_a_model_that_the_hub_lacks_is_named(other: Hub, folder: Path, tmp_path: Path) -> None:
    name = other.repository
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    cases = {
        "runs/tny": "no folder runs/tny here (did you mean runs/tiny?); on the Hugging Face hub: runs/tny: ",
        "runs/tny@main": "has no model of that name that you may see",
        f"{name}@v9": "has no revision 'v9'",
        "someone/small--gpt2": "no name of a repository",
    }
    done = run_each(other.environment(tmp_path / "home"), tmp_path, [["sample", name] for name in cases])
    for words, (code, _, err) in zip(cases.values(), done, strict=True):
        assert (code, err.count("\n")) == (2, 1), err
        assert words in err
    other.files = {"config.json": other.files["config.json"]}
    code, _, err = run(other.environment(tmp_path / "home"), tmp_path, "sample", name)
    assert code == 2
    assert "holds no model.safetensors or pytorch_model.bin" in err.splitlines()[-1]


def test_another_kind_of_model_is_refused_unfetched(other: Hub, tmp_path: Path) -> None:
    config = json.loads(other.files["config.json"]) | {"model_type": "llama"}
    other.files = other.files | {"config.json": json.dumps(config).encode()}
    code, _, err = run(other.environment(tmp_path / "home"), tmp_path, "sample", other.repository)
    assert code == 2
    assert "model_type is 'llama'" in err.splitlines()[-1]
    assert not any(WEIGHTS in path for path in other.requests)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pickle", "several"])
def test_weights_in_other_forms_are_fetched(other: Hub, folder: Path, tmp_path: Path, text: str, form: str) -> None:
    files = other.files
    if form == "pickle":
        torch.save(load_file(folder / WEIGHTS), tmp_path / "pytorch_model.bin")
        files = files | {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    else:
        GPT2LMHeadModel.from_pretrained(folder).save_pretrained(tmp_path / "cut", max_shard_size="1KB")
        files = files | contents(tmp_path / "cut")
        assert sum(name.endswith(".safetensors") for name in files) > 3
    other.files = {name: data for name, data in files.items() if name != WEIGHTS}
    variables = other.environment(tmp_path / "home")
    name = f"{other.repository}@{other.commit}"
    assert run(variables, tmp_path, "sample", name, *SAMPLE)[:2] == (0, text)
    assert run(variables | {"HF_HUB_OFFLINE": "1"}, tmp_path, "sample", name, *SAMPLE) == (0, text, "")


def test_an_endpoint_that_is_no_address_is_named(hub: Hub, tmp_path: Path) -> None:
    refused(hub, tmp_path, "gpt2", "HF_ENDPOINT is 'mirror.example.org', no address", HF_ENDPOINT="mirror.example.org")


def test_a_cache_that_cannot_be_written_is_one_line(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    refused(hub, tmp_path, "gpt2", "cannot be stored in", "Not a directory", "HF_HOME")


@pytest.mark.slow
def test_a_full_disk_is_one_line(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", home], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("only root can mount a small file system")
    try:
        code, _, err = run(hub.environment(home), tmp_path, "sample", "gpt2")
    finally:
        subprocess.run(["umount", "-l", home], check=True)
    assert code == 2
    assert "No space left on device; free some space, or set HF_HOME" in err.splitlines()[-1]
    assert "Traceback" not in err


# --- without a network ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "someone/small-gpt2"])
def test_the_advice_without_a_network_helps(hub: Hub, other: Hub, tmp_path: Path, text: str, name: str) -> None:
    server = hub if name == "gpt2" else other
    offline = server.environment(tmp_path / "home") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    code, _, err = run(offline, tmp_path, "sample", name)
    assert (code, err.count("\n")) == (2, 1)
    assert "config.json is not in the cache here, and the Hugging Face hub cannot be reached (ConnectError" in err
    there = tmp_path / "there"
    words = shlex.split(err.split("`")[1])
    words[0] = str(Path(sys.executable).parent / words[0])
    subprocess.run(
        words, env=environment() | server.environment(there), capture_output=True, check=True, timeout=PATIENCE
    )
    brought = err.partition("copy the folder ")[2].split()[0]
    cache = Path(err.partition(") into ")[2].partition(";")[0])
    assert not any("pytorch_model.bin" in path for path in server.requests)
    shutil.copytree(there / "hub" / brought, cache / brought, symlinks=True)
    for change in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert run(offline | change, tmp_path, "sample", name, *SAMPLE)[:2] == (0, text)


# --- ranks ---


@pytest.mark.slow
def test_one_rank_of_each_host_fetches(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """The main rank's host has the model already; it says for whom it waits."""
    homes = {host: hub.environment(tmp_path / host) for host in ("near", "far")}
    assert run(homes["near"], tmp_path, "sample", "gpt2", "--max-tokens", "1")[0] == 0
    hub.requests.clear()
    hub.hold(WEIGHTS)
    said = tmp_path / "waiting"

    def release() -> None:
        while not said.exists() and not ended.wait(0.05):
            pass
        hub.release()

    ended = threading.Event()
    thread = threading.Thread(target=release)
    thread.start()
    try:
        results = run_ranks(4, opened, ["gpt2", str(folder)], homes, ["near", "near", "far", "far"], said)
    finally:
        ended.set()
        thread.join()
    total = pytest.approx(load_file(folder / WEIGHTS)["transformer.wte.weight"].sum().item())
    assert results == [[(f"{GPT2}@{COMMIT}", total), (str(folder), total)]] * 4
    assert said.read_text() == f"waiting for rank 2 on far, which fetches {GPT2}"
    assert len([path for path in hub.requests if path.startswith("GET") and path.endswith(WEIGHTS)]) == 1


@pytest.mark.slow
def test_a_failed_fetch_is_told_once_and_ends_all(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both hosts fail, and the second rank of each waits."""
    hub.gated = "Ask the owner."
    hosts = {host: hub.environment(tmp_path / host) for host in ("near", "far")}
    with pytest.raises(AssertionError, match="Reported"):
        run_ranks(4, opened, ["gpt2"], hosts, ["near", "near", "far", "far"], tmp_path / "waiting")
    assert capsys.readouterr().out.count("accept its terms at") == 1
