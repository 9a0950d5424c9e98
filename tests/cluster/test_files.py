"""Files on machines without the driver's disk: what is served, copied, brought back and removed."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compression.variant_bank import VariantBank, sound
from search.cluster import file_server, places
from search.cluster.file_server import FileServer
from search.cluster.mirror import Mirror
from search.cluster.places import NODE_CACHE, Place, base_folder, remove
from search.cluster.seat import Home
from search.cluster.served import Served
from spaces.errors import UserError
from spaces.inventory import Tensor

TENSOR = Tensor("blk.0.attn_q.weight", (4, 256), "attn_q", 0)


@pytest.fixture
def served(tmp_path: Path) -> Served:
    """A checkpoint and a cache of a few files, and of some that no worker needs."""
    model, cache = tmp_path / "model", tmp_path / "study" / "cache"
    model.mkdir()
    cache.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "notes.py"):
        (model / name).write_bytes(os.urandom(1000))
    for name in ("calibration.npz", "calibration.npz.seal", "base-search.npy", "option_costs.jsonl"):
        (cache / name).write_bytes(os.urandom(1000))
    (tmp_path / "secret.json").write_text("secret")
    return Served(model, cache)


@pytest.fixture
def mirror(served: Served, tmp_path: Path) -> Mirror:
    return Mirror(tmp_path / "node", FileServer(served))


def bank_of(folder: Path, remote: Mirror | None = None) -> VariantBank:
    return VariantBank(folder / "cache" / "bank", remote=remote)


def quantized(bank: VariantBank, types: tuple[str, ...] = ("Q4_K", "Q8_0")) -> list[tuple[str, str, float]]:
    weights = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    return bank.add(TENSOR, types, lambda expert: weights, None, "origin")


def test_a_copy_has_what_workers_need_and_nothing_else(mirror: Mirror, served: Served) -> None:
    mirror.refresh()
    found = {p.relative_to(mirror.folder).as_posix(): p for p in mirror.folder.rglob("[!.]*") if p.is_file()}
    assert {*found} == {
        "model/config.json", "model/model.safetensors",
        "cache/calibration.npz", "cache/calibration.npz.seal", "cache/base-search.npy",
    }  # fmt: skip
    for name, path in found.items():
        assert path.read_bytes() == served.path(name).read_bytes()
        assert path.stat().st_mode & 0o222 == 0


def test_a_copy_follows_what_stages_change(mirror: Mirror, served: Served) -> None:
    mirror.refresh()
    before = (mirror.folder / "cache" / "base-search.npy").stat().st_ino
    (served.cache / "calibration.npz").write_bytes(b"another")
    (served.cache / "calibration.npz.seal").unlink()
    mirror.refresh()
    assert (mirror.folder / "cache" / "calibration.npz").read_bytes() == b"another"
    assert not (mirror.folder / "cache" / "calibration.npz.seal").exists()
    assert (mirror.folder / "cache" / "base-search.npy").stat().st_ino == before


def test_a_file_of_many_chunks_arrives_once_for_all_workers(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_server, "CHUNK", 100)
    reads = []

    class Counting(FileServer):
        def read(self, name: str, offset: int) -> bytes:
            reads.append((name, offset))
            return super().read(name, offset)

    files = Counting(served)
    workers = [threading.Thread(target=Mirror(tmp_path / "node", files).refresh) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(reads) == len({*reads}) == 50
    for name in files.listing():
        assert (tmp_path / "node" / name).read_bytes() == served.path(name).read_bytes()


def test_what_arrives_damaged_is_asked_for_again_and_then_refused(served: Served, tmp_path: Path) -> None:
    class Noisy(FileServer):
        left = 1

        def read(self, name: str, offset: int) -> bytes:
            data = super().read(name, offset)
            if name.endswith("calibration.npz") and self.left:
                self.left -= 1
                return bytes(len(data))
            return data

    once, always = Noisy(served), Noisy(served)
    Mirror(tmp_path / "node", once).refresh()
    copied = (tmp_path / "node" / "cache" / "calibration.npz").read_bytes()
    assert copied == (served.cache / "calibration.npz").read_bytes()
    always.left = 10**6
    with pytest.raises(UserError, match="damaged 3 times"):
        Mirror(tmp_path / "other", always).refresh()
    assert not (tmp_path / "other" / "cache" / "calibration.npz").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../secret.json", "model/../../secret.json", "/etc/passwd", "cache/../../secret.json",
        "model/notes.py",
        "cache/bank/../../../secret.json", "cache/option_costs.jsonl", "", "model", "cache/link.npz",
        "cache/bank/aa/" + "a" * 40 + ".q\n", "model/out.json", "cache/base-out.npy",
    ],
)  # fmt: skip
def test_no_name_leads_out_of_the_study(served: Served, tmp_path: Path, name: str) -> None:
    (served.checkpoint / "out.json").symlink_to(tmp_path / "secret.json")
    (served.cache / "base-out.npy").symlink_to(tmp_path / "secret.json")
    files = FileServer(served)
    for ask in (files.describe, lambda n: files.read(n, 0)):
        with pytest.raises(UserError, match="not a file of this study"):
            ask(name)
    with pytest.raises(UserError, match="not a file of this study"):
        files.write(name, "0" * 32, 0, b"x")
    assert "secret" not in str(files.listing())


def test_a_bank_behind_a_link_is_not_written(served: Served, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (served.cache / "bank").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not a file of this study"):
        FileServer(served).write(f"cache/bank/aa/{'a' * 40}.q", "0" * 32, 0, b"x")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["../x", "cache/../../x", "/x", "other/x", ""])
def test_a_copy_stays_in_its_folder(mirror: Mirror, name: str) -> None:
    mirror.files.listing = lambda: {name: (0, "")}  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not a name"):
        mirror.refresh()


def test_a_downloaded_checkpoint_of_links_is_served(served: Served, tmp_path: Path) -> None:
    store = tmp_path / "hub"
    (store / "blobs").mkdir(parents=True)
    (store / "blobs" / "abc").write_bytes(b"weights")
    snapshot = store / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    files = FileServer(replace(served, checkpoint=snapshot))
    assert files.read("model/model.safetensors", 0) == b"weights"


def test_variants_come_from_the_driver_when_they_are_used(mirror: Mirror, served: Served) -> None:
    home = bank_of(served.cache.parent)
    rows = quantized(home)
    away = bank_of(mirror.folder, mirror)
    for type_name, key, _ in rows:
        home.register(TENSOR.name, type_name, key)
        away.register(TENSOR.name, type_name, key)
    np.testing.assert_array_equal(away.blocks(TENSOR, "Q4_K"), home.blocks(TENSOR, "Q4_K"))
    assert [p.name for p in mirror.folder.rglob("[!.]*.q")] == [f"{rows[0][1]}.q"]
    assert isinstance(away.blocks(TENSOR, "Q4_K"), np.memmap)


def test_variants_made_elsewhere_arrive_at_the_driver(
    mirror: Mirror, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.cluster.mirror.CHUNK", 300)
    rows = quantized(bank_of(mirror.folder, mirror))
    assert rows == quantized(alone := bank_of(tmp_path / "alone"))
    home = bank_of(served.cache.parent)
    for _, key, _ in rows:
        assert home.path(key).read_bytes() == alone.path(key).read_bytes()
    assert not list(mirror.folder.rglob("[!.]*.q"))
    assert not list(served.cache.rglob("*.part"))


def test_a_variant_that_changed_on_the_way_is_refused(served: Served, tmp_path: Path) -> None:
    class Noisy(FileServer):
        def write(self, name: str, token: str, offset: int, data: bytes) -> None:
            super().write(name, token, offset, bytes(len(data)))

    mirror = Mirror(tmp_path / "node", Noisy(served))
    with pytest.raises(UserError, match="arrived damaged"):
        quantized(bank_of(mirror.folder, mirror))
    assert not [p for p in served.cache.rglob("*") if p.suffix in (".q", ".part")]


def test_a_variant_damaged_at_the_driver_is_removed_there(mirror: Mirror, served: Served) -> None:
    home = bank_of(served.cache.parent)
    ((_, key, _),) = quantized(home, ("Q4_K",))
    raw = bytearray(home.path(key).read_bytes())
    raw[-1] ^= 1
    home.path(key).write_bytes(raw)
    assert not sound(home.path(key))
    away = bank_of(mirror.folder, mirror)
    away.register(TENSOR.name, "Q4_K", key)
    with pytest.raises(UserError, match="damaged, and removed"):
        away.blocks(TENSOR, "Q4_K")
    assert not home.path(key).exists()


def test_only_the_drivers_files_are_home(served: Served, tmp_path: Path) -> None:
    home = Home.of(served)
    assert home.seen(served)
    assert Home.of(served) == home
    other = tmp_path / "other" / "cache"
    other.mkdir(parents=True)
    assert not home.seen(Served(served.checkpoint, other))
    (other / "home.token").write_text("0" * 32)
    assert not home.seen(Served(served.checkpoint, other))
    (other / "home.token").write_text(home.token)
    assert home.seen(Served(served.checkpoint, other))
    (served.checkpoint / "model.safetensors").write_bytes(b"another")
    assert not home.seen(served)
    assert not home.seen(Served(tmp_path / "none.gguf", served.cache))


def test_copies_are_removed_when_nobody_uses_them(tmp_path: Path) -> None:
    used, left = Place(tmp_path / "b", "used"), Place(tmp_path / "b", "left")
    for folder in (used.folder, left.folder):
        (folder / "file").write_text("x")
    assert not remove(left.folder, patience=0.0)
    assert left.folder.exists()
    folder = left.folder
    del left  # its worker has died
    Place(tmp_path / "b", "new")
    assert not folder.exists()
    assert used.folder.exists()


def test_copies_go_to_memory_if_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NODE_CACHE, raising=False)
    monkeypatch.setattr(places, "_MEMORY", tmp_path / "memory")
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path / "disk"))
    (tmp_path / "memory").mkdir()
    assert base_folder(1000, "a").parent == tmp_path / "memory"
    assert base_folder(10**15, "a").parent == tmp_path / "disk"
    Place(base_folder(10**15, "a"), "a")
    assert base_folder(1000, "a").parent == tmp_path / "disk"  # one copy for all workers of the node
    monkeypatch.setenv(NODE_CACHE, str(tmp_path / "chosen"))
    assert base_folder(10**15, "a").parent == tmp_path / "chosen"
