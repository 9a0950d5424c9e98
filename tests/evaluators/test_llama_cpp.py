"""llama.cpp gives transformers' logits, and what kills it does not kill the caller."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import DeepseekV3ForCausalLM

from evaluators.llama_cpp import file_logits, probe_file
from spaces.errors import UserError
from tests.evaluators.tiny_deepseek import CONFIG, random_model, reference, write_gguf

LENGTH = 48


@pytest.fixture(scope="module")
def model() -> DeepseekV3ForCausalLM:
    return random_model()


@pytest.fixture(scope="module")
def file(model: DeepseekV3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, LENGTH))


def test_logits_are_those_of_transformers(
    model: DeepseekV3ForCausalLM, file: Path, windows: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "logits.npy"
    logits = file_logits(file, windows, out)
    assert isinstance(logits, np.memmap)
    assert not logits.flags.writeable
    assert (logits.shape, logits.dtype) == ((3, LENGTH, CONFIG.vocab_size), np.float32)
    expected = reference(model, windows)
    assert expected.std() > 0.5
    assert np.abs(logits - expected).max() <= 1e-3
    assert [p.name for p in out.parent.iterdir()] == ["logits.npy"]


def test_probe_generates_the_most_likely_tokens(file: Path, windows: np.ndarray, tmp_path: Path) -> None:
    prompt = windows[0, :8].tolist()
    probe = probe_file(file, prompt, generate=12, speed=(16, 8))
    assert len(probe.generated) == 12
    whole = np.array([[*prompt, *probe.generated]])
    logits = file_logits(file, whole, tmp_path / "logits.npy")
    assert tuple(logits[0, 7:-1].argmax(-1)) == probe.generated
    assert len(set(probe.generated)) > 1
    assert probe.vocabulary == CONFIG.vocab_size
    assert 0 < file.stat().st_size - probe.model_bytes < 20_000
    assert probe.prompt_tokens_per_second is not None
    assert probe.prompt_tokens_per_second > 0
    assert probe.generated_tokens_per_second is not None
    assert probe.generated_tokens_per_second > 0


def test_probe_without_speed_measures_none(file: Path) -> None:
    probe = probe_file(file, [1, 2], generate=1)
    assert (probe.prompt_tokens_per_second, probe.generated_tokens_per_second) == (None, None)


def test_the_child_is_found_from_a_folder_with_another_evaluators(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evaluators").mkdir()
    (tmp_path / "evaluators" / "__init__.py").write_text("raise SystemExit(3)")
    (tmp_path / "link.gguf").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    assert len(probe_file(Path("link.gguf"), [1, 2], generate=1).generated) == 1


def failing(tmp_path: Path, path: Path, call: str) -> str:
    """The message of the UserError that `call` on `path` ends in; nothing else is left behind."""
    before = sorted(tmp_path.iterdir())
    calls = {
        "probe": lambda: probe_file(path, [1, 2, 3], generate=2),
        "logits": lambda: file_logits(path, np.array([[1, 2, 3]]), tmp_path / "logits.npy"),
    }
    with pytest.raises(UserError) as caught:
        calls[call]()
    assert sorted(tmp_path.iterdir()) == before
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("call", ["probe", "logits"])
def test_missing_truncated_and_garbage_files(tmp_path: Path, file: Path, call: str) -> None:
    assert "no such file" in failing(tmp_path, tmp_path / "missing.gguf", call)
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "it is cut short" in failing(tmp_path, truncated, call)
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"nonsense" * 100)
    assert "not a GGUF file" in failing(tmp_path, garbage, call)


@pytest.mark.parametrize("call", ["probe", "logits"])
def test_an_aborting_child_is_a_user_error(tmp_path: Path, model: DeepseekV3ForCausalLM, call: str) -> None:
    # A later layer with more experts than the first: ggml asserts.
    path = write_gguf(tmp_path / "aborts.gguf", model, top_k=[1, 2, 2])
    message = failing(tmp_path, path, call)
    assert "SIGABRT" in message
    assert "GGML_ASSERT" in message


def test_a_slow_child_is_a_user_error(file: Path) -> None:
    reading = file.stat().st_size / 10e6  # what a slow disk is given beside it
    with pytest.raises(UserError, match=r"tiny\.gguf: .*not done after 0\.05 s"):
        probe_file(file, [1], timeout=0.05 - reading)


def test_tokens_outside_the_vocabulary_are_a_user_error(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tiny\.gguf: token ids 0\.\.9999"):
        file_logits(file, np.array([[0, 9999]]), tmp_path / "logits.npy")
    with pytest.raises(UserError, match=r"tiny\.gguf: windows must be"):
        file_logits(file, np.array([1, 2]), tmp_path / "logits.npy")


def test_importing_the_safe_face_loads_no_runtime() -> None:
    code = "import sys, evaluators.llama_cpp; sys.exit(any(m in sys.modules for m in ('cffi', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
