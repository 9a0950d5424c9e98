"""Nothing that is read can bring code: no pickles, custom classes, functions or templates that escape."""

from __future__ import annotations

import ast
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression.checkpoint import load_tokenizer, open_checkpoint
from compression.families import family
from compression.shell import Shell
from evaluators.harness import Harness
from experiments import zoo
from spaces.errors import UserError
from tests.compression.support import refused
from tests.hostile.seeds import CONFIG

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "experiments/reference_model/checkpoint"
LAYERS = ("spaces", "compression", "evaluators", "search", "experiments")
_SERIALIZERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def faults(source: str) -> Iterator[str]:
    """What of a module's source would run code that it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in _SERIALIZERS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _SERIALIZERS:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in ("eval", "exec", "pd.read_pickle", "yaml.unsafe_load", "yaml.full_load"):
                yield name
            if name == "torch.load" and given.get("weights_only") != "True":
                yield name
            if "from_pretrained" in name and given.get("trust_remote_code") != "False":
                yield name
            if given.get("allow_pickle", "False") != "False" or given.get("trust_remote_code") == "True":
                yield name


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "torch.load(f)", "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)", "AutoTokenizer.from_pretrained(p)", "eval(text)",
        "M.from_config(c, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_search_for_faults_finds_them(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize("package", LAYERS)
def test_no_module_reads_what_could_run(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        found = list(faults(file.read_text("utf-8")))
        # A llama.cpp download that an experiment's user names is a GGUF file, which holds no code.
        assert not found or file.name == "real_english.py", f"{file}: {found}"


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.write_text, (self.file, "it ran")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_named_and_not_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refused(lambda: open_checkpoint(tmp_path), "model.safetensors", "never read")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the reference model's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((REFERENCE / name).read_bytes())
    return tmp_path


def test_a_tokenizer_that_is_code_is_refused_and_not_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run the code"))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(lambda: load_tokenizer(folder), folder, "never run")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_cannot_choose_kernels_of_the_hub(field: str) -> None:
    """transformers would fetch them and run them, where the package `kernels` is installed."""
    plain = family(zoo.config("qwen3_moe"), "plain")
    named = family({**zoo.config("qwen3_moe"), field: "someone/kernels:run"}, "named")
    assert named.config.to_dict() == plain.config.to_dict()
    assert named.config._attn_implementation == plain.config._attn_implementation
    Shell(named)


def test_custom_code_of_a_config_is_ignored() -> None:
    named = family({**CONFIG, "auto_map": {"AutoConfig": "evil.Config"}}, "named")
    assert type(named.config).__module__.startswith("transformers.models.deepseek_v3")


# Task folders.


def task(folder: Path, **fields: Any) -> Path:
    """A folder with the task `own`; fields of its file are text in YAML's form."""
    (folder / "own.jsonl").write_text(json.dumps({"ctx": "a", "ends": ["b", "c"], "label": 0}) + "\n")
    values = {
        "task": "own", "dataset_path": "json", "dataset_kwargs": "{data_files: {test: own.jsonl}}",
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "ctx", "doc_to_choice": "ends",
        "doc_to_target": "label",
        "metric_list": "[{metric: acc, aggregation: mean, higher_is_better: true}]",
    } | fields  # fmt: skip
    (folder / "own.yaml").write_text("".join(f"{k}: {v}\n" for k, v in values.items()))
    return folder


def harness(folder: Path, tokenizer: Any = None) -> Harness:
    return Harness(tokenizer, ["own"], limit=5, tasks_path=folder, max_length=64)


def test_the_task_without_code_is_taken(tmp_path: Path) -> None:
    assert len(harness(task(tmp_path)).requests()["own"]) == 2


_METRIC = "[{{metric: {}, aggregation: mean, higher_is_better: true{}}}]"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"process_docs": "!function evil.run"}, "'evil.run'"),
        ({"doc_to_text": "!function evil.run"}, "'evil.run'"),
        ({"metric_list": _METRIC.format("!function evil.run", "")}, "'evil.run'"),
        ({"doc_to_text": "!function os.getcwd"}, "'os.getcwd'"),
        ({"class": "!function evil.run"}, "'evil.run'"),
        ({"class": "os.system"}, "own.yaml"),
        ({"include": "more/other.yaml"}, "'evil.run'"),
        ({"metric_list": _METRIC.format("./evil.py", "")}, "'./evil.py'"),
        ({"metric_list": _METRIC.format("acc", ", hf_evaluate: true")}, "'acc'"),
        ({"dataset_path": "pandas", "dataset_kwargs": "{data_files: {test: data.pkl}}"}, "own.yaml"),
        ({"dataset_path": "evil.py", "dataset_kwargs": "{data_files: {test: own.jsonl}}"}, "own.yaml"),
    ],
)
def test_code_of_a_task_folder_is_refused(
    fields: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "more").mkdir()
    (tmp_path / "more/other.yaml").write_text("doc_to_text: !function evil.run\n")
    for place in (tmp_path, tmp_path / "more"):
        (place / "evil.py").write_text(f"open({str(ran)!r}, 'w')\ndef run(x): return x\n")
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(Bomb(ran)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(lambda: harness(task(tmp_path, **fields)).requests(), said)
    assert not ran.exists()


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    text = "'{{ cycler.__init__.__globals__.os.mkdir(\"" + str(tmp_path / "ran") + "\") }}'"
    refused(lambda: harness(task(tmp_path, doc_to_text=text)), "own.yaml", "unsafe")
    # One that only does so for an item that is not looked at when the task is loaded.
    items = [{"ctx": str(i), "ends": ["b", "c"], "label": 0} for i in range(3)]
    made = task(tmp_path, doc_to_text=text.replace("{{", "{{ ctx if ctx == '0' else ".replace("'", "''")))
    (made / "own.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    refused(lambda: harness(made).requests(), "template", "unsafe")
    assert not (tmp_path / "ran").exists()


def test_a_pipe_among_the_tasks_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "x.yaml")
    refused(lambda: harness(tmp_path), "x.yaml")


def test_numpy_files_with_objects_are_refused(tmp_path: Path) -> None:
    from compression.calibration import Calibration

    file = tmp_path / "calibration.npz"
    np.savez(file, about=np.array([Bomb(tmp_path / "ran")], object))
    with pytest.raises(UserError, match="damaged"):
        Calibration.load(file)
    assert not (tmp_path / "ran").exists()


_LISTENERS = re.compile(r"\b(mlflow (ui|server)|optuna-dashboard) --?\w[^`\n]*")


def test_what_people_are_told_to_start_listens_to_this_machine_only() -> None:
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "search").rglob("*.py")]
    commands = [m[0] for file in texts for m in _LISTENERS.finditer(file.read_text("utf-8"))]
    assert len(commands) >= 4
    for command in commands:
        assert "--host 127.0.0.1" in command, command
