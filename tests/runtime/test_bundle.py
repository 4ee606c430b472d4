"""Opening a bundle: a clean one opens, and thousands of damaged or hostile ones are refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from tandemrt.runtime import bundle as bundle_module
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BundleError
from tandemrt.runtime.files import locked
from tandemrt.runtime.manifest import Dtype, Manifest, TensorSpec
from tandemrt.runtime.manifest_files import MANIFEST_NAME, MAX_MANIFEST_BYTES, SEAL_NAME, rewrite, seal, write

from .tiny_bundle import resign, write_tiny_bundle

Files = dict[str, bytes]


@dataclass(frozen=True)
class Corruption:
    """Damage to a bundle folder; the error must name `file`. `rewrites` are the files it changes, if it adds none."""

    name: str
    file: str
    apply: Callable[[Path], object]
    rewrites: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def contents(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rebuilt(folder: Path, files: Files) -> None:
    shutil.rmtree(folder)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def rewritten(what: str, name: str, data: bytes, *, named: str | None = None) -> Corruption:
    """The file `name` with other bytes; the error names that file unless `named` says otherwise."""
    apply: Callable[[Path], object] = lambda folder: (folder / name).write_bytes(data)  # noqa: E731
    return Corruption(what, name if named is None else named, apply, rewrites=(name,))


def forged(what: str, raw: bytes, *, named: str = MANIFEST_NAME) -> Corruption:
    """Another manifest, sealed as an author of a hostile bundle would seal it."""
    return Corruption(what, named, lambda folder: write_sealed(folder, raw), rewrites=(MANIFEST_NAME, SEAL_NAME))


def write_sealed(folder: Path, raw: bytes) -> None:
    (folder / MANIFEST_NAME).write_bytes(raw)
    (folder / SEAL_NAME).write_bytes(seal(raw))


def restored(folder: Path, files: Files, corruption: Corruption) -> None:
    for name in corruption.rewrites:
        (folder / name).write_bytes(files[name])
    if not corruption.rewrites:
        rebuilt(folder, files)


def edited(raw: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    manifest = json.loads(raw)
    edit(manifest)
    return json.dumps(manifest).encode()


def bit_flips(files: Files) -> Iterator[Corruption]:
    rng = random.Random(1)
    for name, data in sorted(files.items()):
        for _ in range(400 if name == MANIFEST_NAME else 70):
            at, bit = rng.randrange(len(data)), rng.randrange(8)
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            yield rewritten(f"{name} byte {at} bit {bit}", name, bytes(flipped), named=blamed(name))


def truncations(files: Files) -> Iterator[Corruption]:
    rng = random.Random(3)
    for name, data in sorted(files.items()):
        for length in {0, len(data) - 1, *rng.sample(range(len(data)), min(40, len(data)))}:
            yield rewritten(f"{name} cut to {length}", name, data[:length], named=blamed(name))
        for more in (b"\0", b"\n", data):
            yield rewritten(f"{name} grown by {len(more)}", name, data + more, named=blamed(name))


def blamed(name: str) -> str:
    """The file an error names when `name` is damaged: the manifest does not fit a damaged seal."""
    return MANIFEST_NAME if name == SEAL_NAME else name


def swaps(files: Files) -> Iterator[Corruption]:
    for first, second in itertools.combinations(sorted(files.keys() - {MANIFEST_NAME}), 2):

        def swapped(folder: Path, first: str = first, second: str = second) -> None:
            (folder / first).write_bytes(files[second])
            (folder / second).write_bytes(files[first])

        yield Corruption(f"{first} and {second} swapped", "", swapped)


def missing(files: Files) -> Iterator[Corruption]:
    for name in sorted(files):
        expected = "" if name == MANIFEST_NAME else name
        yield Corruption(f"{name} missing", expected, lambda folder, name=name: (folder / name).unlink())
        moved = name + ".moved"
        yield Corruption(f"{name} moved", "", lambda folder, a=name, b=moved: (folder / a).rename(folder / b))


def extras(files: Files) -> Iterator[Corruption]:
    folders = sorted({str(Path(name).parent) for name in files})
    names = ("evil.onnx", ".hidden", "model.onnx~", "x.pkl", "MODEL.ONNX", "run.py", "\u00fc", "a b", "tandem.json.bak")
    for folder, name in itertools.product(folders, names):
        path = str(Path(folder) / name)
        yield Corruption(f"extra {path}", path, lambda root, path=path: (root / path).write_bytes(b"x"))
        yield Corruption(f"extra folder {path}", path, lambda root, path=path: (root / path).mkdir())
    yield Corruption("extra bytes name", "\\xff", lambda root: (root / os.fsdecode(b"\xff")).write_bytes(b"x"))


def links(files: Files) -> Iterator[Corruption]:
    def linked(folder: Path, name: str, link: Callable[[Path, Path], object]) -> None:
        outside = folder.parent / "outside"
        outside.write_bytes(files[name])
        (folder / name).unlink()
        link(outside, folder / name)

    def symbolic(source: Path, name: Path) -> None:
        name.symlink_to(source)

    def hard(source: Path, name: Path) -> None:
        os.link(source, name)

    def inside(folder: Path, name: str) -> None:
        (folder / name).rename(folder / "moved")
        (folder / name).symlink_to(folder / "moved")

    for name in sorted(files):
        yield Corruption(f"{name} symbolic link", name, lambda root, name=name: linked(root, name, symbolic))
        yield Corruption(f"{name} hard link", name, lambda root, name=name: linked(root, name, hard))
        yield Corruption(f"{name} pipe", name, lambda root, name=name: ((root / name).unlink(), os.mkfifo(root / name)))
        yield Corruption(
            f"{name} folder", name, lambda root, name=name: ((root / name).unlink(), (root / name).mkdir())
        )
        yield Corruption(f"{name} dangling", name, lambda root, name=name: linked(root, name, dangling))
        yield Corruption(f"{name} link inside", "", lambda root, name=name: inside(root, name))
    for name in ("unet", "tokenizer", "vae_decoder"):
        yield Corruption(f"folder {name} linked", name, lambda root, name=name: folder_linked(root, name))


def dangling(source: Path, name: Path) -> None:
    source.unlink()
    name.symlink_to(source)


def folder_linked(root: Path, name: str) -> None:
    outside = root.parent / "outside_folder"
    shutil.rmtree(outside, ignore_errors=True)
    shutil.move(root / name, outside)
    (root / name).symlink_to(outside, target_is_directory=True)


HOSTILE_PATHS = (
    "../outside", "../../etc/passwd", "/etc/passwd", "//etc/passwd", "unet/../../outside", "unet/../model.onnx",
    "./unet/model.onnx", "unet/./model.onnx", "unet//model.onnx", "/unet/model.onnx", "unet/model.onnx/", ".", "..", "",
    "unet\\model.onnx", "..\\outside", "C:\\model.onnx", "C:model.onnx", "\\\\host\\share", "unet/model\0.onnx",
    "unet/model.onnx\0.txt", "\0", "unet/mo\ndel.onnx", "unet/model.onnx ", "unet /model.onnx", "~/model.onnx",
    "$HOME/model.onnx", "unet/model.onnx.", "unet./model.onnx", "u\u0308net/model.onnx", "\u202eunet/model.onnx",
    "file:///etc/passwd", "http://host/model.onnx", "unet/%2e%2e/model.onnx", "a/" * 200 + "b", "x" * 300,
    "unet/model.onnx:stream", "*", "unet/*.onnx", "unet/model.onnx|cat", "-", "tandem.json", "TANDEM.JSON",
    "tandem.sha256",
)  # fmt: skip


def path_escapes(files: Files) -> Iterator[Corruption]:
    """Hostile paths as a file, as a component's model, and as a rename of a listed file."""
    raw = files[MANIFEST_NAME]
    for path in HOSTILE_PATHS:
        if path != "-":

            def listed(manifest: dict[str, Any], path: str = path) -> None:
                manifest["files"][path] = manifest["files"]["unet/model.onnx"]

            yield forged(f"lists {path!r}", edited(raw, listed))

            def renamed(manifest: dict[str, Any], path: str = path) -> None:
                manifest["files"][path] = manifest["files"].pop("unet/model.onnx")
                manifest["components"]["unet"]["model"] = path

            yield forged(f"unet is {path!r}", edited(raw, renamed))

        def model(manifest: dict[str, Any], path: str = path) -> None:
            manifest["components"]["unet"]["model"] = path

        yield forged(f"model {path!r}", edited(raw, model))


def case_collisions(files: Files) -> Iterator[Corruption]:
    raw = files[MANIFEST_NAME]
    for name in sorted(files.keys() - {MANIFEST_NAME, SEAL_NAME}):
        for other in (name.upper(), name.capitalize(), name.swapcase(), f"{Path(name).parent}/x.bin".upper()):

            def collided(root: Path, name: str = name, other: str = other) -> None:
                def listed(manifest: dict[str, Any]) -> None:
                    manifest["files"][other] = manifest["files"][name]

                write_sealed(root, edited(raw, listed))
                (root / other.lstrip("/")).parent.mkdir(exist_ok=True)
                (root / other.lstrip("/")).write_bytes(files[name])

            if "/" in name:
                yield Corruption(f"{name} beside {other}", MANIFEST_NAME, collided)

    def nested(manifest: dict[str, Any]) -> None:
        manifest["files"]["unet/model.onnx/x.bin"] = manifest["files"]["unet/model.onnx"]

    yield forged("a file that is a folder too", edited(raw, nested))


def set_at(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    def edit(manifest: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for key in parents:
            manifest = manifest[key]
        manifest[last] = value

    return edit


DENOISER = {
    "role": "denoiser", "model": "unet/model.onnx", "inputs": [], "outputs": [], "precision": "fp32", "parameters": 1,
    "source": {"class_name": "Tiny", "sha256": "0" * 64}, "prediction_type": "epsilon", "evidence": [],
}  # fmt: skip

MANIFEST_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"format {value!r}": set_at("format", value) for value in (2, 99, 0, -1, 10**30, 1.5, "1", None, True, [1])},
    **{
        f"role {value!r}": set_at("components/unet/role", value)
        for value in ("controlnet", "vae_decoder", "transformer", "", "Denoiser", None, 1, ["denoiser"])
    },
    **{
        f"{path} = {value!r}": set_at(path, value)
        for path in ("latent/channels", "latent/downsampling", "text/encoders/text_encoder/max_length", "text/width",
                     "defaults/height", "defaults/width", "defaults/num_inference_steps",
                     "components/unet/spatial_multiple")
        for value in (0, -1, 2**40, 1.5, "8", None)
    },
    **{f"scaling_factor {value!r}": set_at("latent/scaling_factor", value) for value in (0, "x", None, [])},
    **{f"component {key!r}": lambda manifest, key=key: manifest["components"].update({key: DENOISER})
       for key in ("", "Unet", "un et", "x" * 100, "\0", "\u00fc", "1", "..", "-")},
    **{f"without {key}": lambda manifest, key=key: manifest.pop(key)
       for key in ("format", "producers", "components", "files", "latent", "text", "scheduler", "defaults")},
    **{f"default steps {value!r}": set_at("defaults/steps", value)
       for value in ([["unet", 9]], [["unet", 0], ["unet_small", 10]], [["unet", 11], ["unet_small", -1]], [],
                     [["vae_decoder", 10]], [["unet_large", 10]], [["unet"]], ["unet", 10], "10", 10)},
    "fewer time steps than default steps": lambda manifest: manifest["defaults"].update(
        steps=[["unet", 10]], timesteps=[999, 499]),
    "no text encoder": lambda manifest: manifest["components"].pop("text_encoder"),
    **{f"unknown field in {path or 'the manifest'}": set_at(f"{path}/evil".lstrip("/"), 1)
       for path in ("", "latent", "text", "components/unet", "components/unet/source", "defaults")},
    "no denoiser": lambda manifest: [manifest["components"].pop(name) for name in ("unet", "unet_small")],
    "no decoder": lambda manifest: [manifest["components"].pop(n) for n in ("vae_decoder", "vae_decoder_tiny")],
    "no components": set_at("components", {}),
    "no files": set_at("files", {}),
    "no prediction type": set_at("components/unet/prediction_type", None),
    "unlisted tokenizer": lambda manifest: manifest["files"].pop("tokenizer/tokenizer.json"),
    "a model that is a tokenizer": set_at("components/unet/model", "tokenizer/tokenizer.json"),
    **{f"size {value!r}": lambda manifest, value=value: manifest["files"]["unet/model.onnx"].update(size=value)
       for value in (-1, 0, 1, 10**30, 1.5, "9", None, True)},
    **{f"sha256 {value!r}": lambda manifest, value=value: manifest["files"]["unet/model.onnx"].update(sha256=value)
       for value in ("", "0" * 64, "0" * 63, "g" * 64, "A" * 64, "0" * 65, None, 0, "\0" * 64)},
}  # fmt: skip

LIES_ABOUT_A_FILE = {"size 0", "size 1", f"size {10**30!r}", f"sha256 {'0' * 64!r}"}

RAW_MANIFESTS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"tandem"',
    "a number": b"1",
    "not UTF-8": b'{"format": 1, "producers": {"a": "\xff\xfe"}}',
    "a byte order mark": b'\xef\xbb\xbf{"format": 1}',
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "a zip": b"PK\x03\x04" + bytes(100),
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"format":1,"producers":' + b'{"a":' * 200_000,
    "deep configuration": b'{"format":1,"scheduler":{"config":' + b'{"a":' * 9_999 + b"1" + b"}" * 10_001,
    "giant": b'{"format": 1, "producers": {"a": "' + b"x" * MAX_MANIFEST_BYTES + b'"}}',
    "giant spaces": b" " * (MAX_MANIFEST_BYTES + 1),
    "giant number": b'{"format": ' + b"9" * 100_000 + b"}",
    "NaN": b'{"format": NaN}',
    "infinity": b'{"format": 1e999}',
}  # fmt: skip


def foreign_manifests(files: Files) -> Iterator[Corruption]:
    raw = files[MANIFEST_NAME]
    for name, data in RAW_MANIFESTS.items():
        yield forged(f"manifest: {name}", data)
    for name, edit in MANIFEST_EDITS.items():
        # A well-formed record that lies is found out at the file it is about.
        at = "unet/model.onnx" if name in LIES_ABOUT_A_FILE else MANIFEST_NAME
        yield forged(f"manifest: {name}", edited(raw, edit), named=at)
    for name in ("NaN", "Infinity", "-Infinity", "1e999"):
        text = raw.replace(b'"scaling_factor": 1.0', b'"scaling_factor": ' + name.encode())
        yield forged(f"manifest: scaling {name}", text)
    for at in range(raw.index(b'"files"'), raw.index(b'"latent"') - 150, 20):
        yield rewritten(f"manifest: hole at {at}", MANIFEST_NAME, raw[:at] + raw[at + 150 :], named="")


KINDS: dict[str, Callable[[Files], Iterator[Corruption]]] = {
    "bit_flips": bit_flips,
    "truncations": truncations,
    "swaps": swaps,
    "missing": missing,
    "extras": extras,
    "links": links,
    "path_escapes": path_escapes,
    "case_collisions": case_collisions,
    "foreign_manifests": foreign_manifests,
}


def test_a_clean_bundle_opens(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    manifest = msgspec.json.decode((bundle / MANIFEST_NAME).read_bytes(), type=Manifest)
    assert opened.path == bundle
    assert opened.manifest == manifest
    assert opened.digest == hashlib.sha256((bundle / MANIFEST_NAME).read_bytes()).hexdigest()
    assert opened.model_path("unet_small") == bundle / "unet_small" / "model.onnx"
    assert opened.tokenizer_path("text_encoder") == bundle / "tokenizer" / "tokenizer.json"
    assert Bundle.open(str(bundle)) == opened


def test_sha256sum_checks_the_manifest(bundle: Path) -> None:
    command = ["sha256sum", "-c", SEAL_NAME]
    subprocess.run(command, cwd=bundle, check=True, capture_output=True)
    with (bundle / MANIFEST_NAME).open("ab") as manifest:
        manifest.write(b" ")
    assert subprocess.run(command, cwd=bundle, check=False, capture_output=True).returncode == 1


def test_the_folder_itself_may_be_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert Bundle.open(tmp_path / "link").manifest == Bundle.open(bundle).manifest


@pytest.mark.parametrize("kind", KINDS)
def test_every_corruption_is_refused_by_name(kind: str, bundle: Path) -> None:
    files = contents(bundle)
    accepted, misnamed = [], []
    for corruption in KINDS[kind](files):
        corruption.apply(bundle)
        try:
            Bundle.open(bundle)
        except BundleError as error:
            advised = error.remedy.startswith("Copy the bundle again") or kind not in ("bit_flips", "truncations")
            if (
                corruption.file not in error.where
                or str(bundle) not in error.where
                or "\n" in str(error)
                or not advised
            ):
                misnamed.append((corruption.name, str(error)))
        else:
            accepted.append(corruption.name)
        restored(bundle, files, corruption)
    assert accepted == []
    assert misnamed == []
    Bundle.open(bundle)


def test_the_corruptions_are_over_two_thousand(bundle: Path) -> None:
    files = contents(bundle)
    assert sum(len(list(corruptions(files))) for corruptions in KINDS.values()) >= 2000


def test_a_manifest_is_replaced_whole_whenever_the_process_is_killed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Bundle.open(bundle).manifest
    defaults = msgspec.structs.replace(before.defaults, steps=(("unet", 4), ("unet_small", 6)))
    after = msgspec.structs.replace(before, defaults=defaults)
    opened, real = [], os.fsync

    def killed_at(count: int) -> None:
        calls = itertools.count()

        def fsync(descriptor: int) -> None:
            real(descriptor)
            if next(calls) == count:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", fsync)

    for count in range(7):
        killed_at(count)
        with contextlib.suppress(KeyboardInterrupt):
            rewrite(after, bundle)
        monkeypatch.setattr(os, "fsync", real)
        with locked(bundle):  # as by a process that has not been killed: its work is left alone
            opened.append(Bundle.open(bundle).manifest)
        assert Bundle.open(bundle).manifest == opened[-1]
        # What was begun is finished then, and anything else finds the bundle sealed too.
        subprocess.run(["sha256sum", "-c", "--strict", SEAL_NAME], cwd=bundle, check=True, capture_output=True)
        rewrite(before, bundle)
    # Each file is flushed, then the folder its name is in: the third is that of the manifest.
    assert opened == [before] * 3 + [after] * 4
    assert Bundle.open(bundle).manifest == before
    assert (bundle / SEAL_NAME).read_bytes() == seal((bundle / MANIFEST_NAME).read_bytes())


def test_a_manifest_that_is_replaced_while_it_is_opened_is_no_damage(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the reading of the manifest and that of its seal."""
    before, read = Bundle.open(bundle).manifest, bundle_module._start_of
    defaults = msgspec.structs.replace(before.defaults, steps=(("unet", 4), ("unet_small", 6)))
    after = [msgspec.structs.replace(before, defaults=defaults)]

    def replaced(path: Path, size: int) -> bytes:
        found = read(path, size)
        if path.name == MANIFEST_NAME and after:
            rewrite(after.pop(), bundle)
        return found

    monkeypatch.setattr(bundle_module, "_start_of", replaced)
    opened = Bundle.open(bundle)
    assert opened.manifest.defaults == defaults
    assert opened.digest == hashlib.sha256((bundle / MANIFEST_NAME).read_bytes()).hexdigest()


def test_what_a_killed_process_began_beside_the_manifest_is_passed_over(bundle: Path) -> None:
    (bundle / ".0123456789abcdef.part").write_bytes(b"{")
    Bundle.open(bundle)
    (bundle / "unet" / ".0123456789abcdef.part").touch()
    with pytest.raises(BundleError, match="a file the manifest does not list"):
        Bundle.open(bundle)


def test_the_files_digest_holds_whatever_the_defaults_are(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    other = msgspec.structs.replace(manifest, defaults=msgspec.structs.replace(manifest.defaults, guidance_scale=1.0))
    assert other.files_digest == manifest.files_digest
    fewer = {name: record for name, record in manifest.files.items() if name != "unet/model.onnx"}
    assert msgspec.structs.replace(manifest, files=fewer).files_digest != manifest.files_digest


def test_what_hubs_and_file_managers_leave_is_passed_over(bundle: Path) -> None:
    digest = Bundle.open(bundle).digest
    for name in (".cache/huggingface", ".git"):
        (bundle / name).mkdir(parents=True)
        (bundle / name / "x").touch()
    for name in (".gitattributes", ".gitignore", ".DS_Store", "README.md", "LICENSE"):
        (bundle / name).write_text("x")
    assert Bundle.open(bundle).digest == digest
    (bundle / "unet" / "README.md").touch()
    with pytest.raises(BundleError, match=r"unet/README\.md: a file the manifest does not list"):
        Bundle.open(bundle)


LOCATIONS = (
    "../outside", "../../outside", "/etc/passwd", "../unet_small/../../outside", "model.onnx.data/../../../outside",
    "missing.data", "..", ".", "", "*/_ORT_MEM_ADDR_/*", "model.onnx.data\0", "C:\\x", "\\\\host\\x", "MODEL.ONNX.DATA",
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
)  # fmt: skip


def tensor_outside(location: str) -> onnx.TensorProto:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def with_initializer(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.initializer.append(tensor)


def with_attribute(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def with_subgraph(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["c"])], "branch", [], [], [tensor])
    model.graph.node.append(helper.make_node("If", ["flag"], ["c"], then_branch=branch, else_branch=branch))


def with_sparse_initializer(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)


def with_function(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    model.functions.append(helper.make_function("own", "f", [], ["c"], [node], [helper.make_opsetid("", 18)]))


def with_training(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.training_info.add().algorithm.initializer.append(tensor)


PLACES = (with_initializer, with_attribute, with_subgraph, with_sparse_initializer, with_function, with_training)


@pytest.mark.parametrize("place", PLACES)
def test_weights_outside_the_bundle_are_refused_though_the_digests_fit(
    place: Callable[[onnx.ModelProto, onnx.TensorProto], None], bundle: Path
) -> None:
    path = bundle / "unet_small" / "model.onnx"
    clean = onnx.load_model(str(path), load_external_data=False)
    for location in LOCATIONS:
        model = onnx.ModelProto()
        model.CopyFrom(clean)
        place(model, tensor_outside(location))
        path.write_bytes(model.SerializeToString())
        resign(bundle)
        with pytest.raises(BundleError, match="not part of the bundle") as caught:
            Bundle.open(bundle)
        assert "unet_small/model.onnx" in caught.value.where
    model = onnx.ModelProto()
    model.CopyFrom(clean)
    place(model, tensor_outside("../unet/model.onnx.data"))
    path.write_bytes(model.SerializeToString())
    resign(bundle)
    Bundle.open(bundle)


def test_a_model_of_any_bytes_opens_or_is_refused_by_name(bundle: Path) -> None:
    rng = random.Random(4)
    path = bundle / "unet_small" / "model.onnx"
    clean = path.read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(clean)
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        resign(bundle)
        try:
            Bundle.open(bundle)
        except BundleError as error:
            refused += 1
            assert "unet_small/model.onnx" in error.where
    assert refused > 100


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08",
        b"\x08\x0a",
        b"\x00\x00",
        b"\x3b" * 10,
        b"\x3a\x7f",
        b"\xff" * 20,
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"ORTM" + bytes(64),
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        b"\x3a" * 7,
    ],
)
def test_what_is_no_model_is_refused(data: bytes, bundle: Path) -> None:
    (bundle / "unet_small" / "model.onnx").write_bytes(data)
    resign(bundle)
    with pytest.raises(BundleError, match="not an ONNX model") as caught:
        Bundle.open(bundle)
    assert "unet_small/model.onnx" in caught.value.where


def test_a_model_nested_without_end_is_refused(bundle: Path) -> None:
    def varint(value: int) -> bytes:
        digits = []
        while value > 0x7F:
            digits.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*digits, value])

    graph = b""
    for _ in range(2000):  # graph { node { attribute { g { node { attribute { g …
        for field in (6, 5, 1):
            graph = bytes([field << 3 | 2]) + varint(len(graph)) + graph
    (bundle / "unet_small" / "model.onnx").write_bytes(b"\x3a" + varint(len(graph)) + graph)
    resign(bundle)
    with pytest.raises(BundleError, match="nested deeper"):
        Bundle.open(bundle)


def test_the_message_says_what_to_do(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none: not a bundle folder\. Make a bundle with"):
        Bundle.open(tmp_path / "none")
    with pytest.raises(BundleError, match=r"not a bundle: it holds no tandem\.json\. Make a bundle"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="not a bundle folder"):
        Bundle.open("\0")
    with pytest.raises(BundleError, match="no such component, got 'transformer', expected one of text_encoder, unet"):
        Bundle.open(bundle).model_path("transformer")
    (bundle / "unet" / "model.onnx").write_bytes(b"half")
    with pytest.raises(BundleError, match=r"unet/model\.onnx: size, got 4, expected \d+ bytes\. Copy the bundle again"):
        Bundle.open(bundle)
    with (bundle / MANIFEST_NAME).open("ab") as manifest_file:
        manifest_file.write(b"\n")
    with pytest.raises(
        BundleError, match=r"json: sha256, got '[0-9a-f]{64}', expected the one in tandem.sha256\. Copy"
    ):
        Bundle.open(bundle)
    (bundle / SEAL_NAME).unlink()
    with pytest.raises(BundleError, match=r"tandem\.sha256: is missing\. Copy the bundle again"):
        Bundle.open(bundle)
    resign(bundle, lambda manifest: msgspec.structs.replace(manifest, format=2))
    with pytest.raises(BundleError, match=r"bundle format, got 2, expected 1\. Upgrade tandemrt"):
        Bundle.open(bundle)


def test_large_files_are_hashed_side_by_side_and_still_compared(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandemrt.runtime.bundle.LARGE_FILE_BYTES", 1)
    Bundle.open(bundle)
    path = bundle / "unet_small" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"unet_small/model\.onnx: sha256, got '[0-9a-f]{64}', expected [0-9a-f]{64}"):
        Bundle.open(bundle)


def test_a_file_that_cannot_be_read_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, *arguments: Any) -> int:
        if str(path).endswith("unet/model.onnx"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BundleError, match=r"unet/model\.onnx: cannot be read \(Permission denied\)"):
        Bundle.open(bundle)


def test_pooled_or_unusual_but_valid_manifests_open(bundle: Path) -> None:
    """The checks refuse what is wrong, not what is only different."""

    def changed(manifest: Manifest) -> Manifest:
        latent = msgspec.structs.replace(manifest.latent, channels=16, scaling_factor=1.5305, shift_factor=0.0609)
        small = manifest.components["unet_small"]
        parts = {**manifest.components, "unet_third": small}
        return msgspec.structs.replace(manifest, latent=latent, components=parts)

    resign(bundle, changed)
    assert Bundle.open(bundle).manifest.latent.shift_factor == 0.0609
    assert Bundle.open(bundle).model_path("unet_third") == bundle / "unet_small" / "model.onnx"


def retyped(spec: TensorSpec, dtype: Dtype) -> TensorSpec:
    return msgspec.structs.replace(spec, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "kind", "edit"),
    [
        ("unet", "inputs", lambda specs: specs[:-1]),
        ("unet", "inputs", lambda specs: (*specs, msgspec.structs.replace(specs[0], name="time_ids"))),
        ("unet_small", "outputs", lambda specs: (msgspec.structs.replace(specs[0], name="noise"),)),
        ("text_encoder", "inputs", lambda specs: (msgspec.structs.replace(specs[0], name="tokens"),)),
        ("text_encoder", "outputs", lambda specs: specs[1:]),
        ("vae_decoder", "inputs", lambda specs: (specs[0], specs[0])),
        ("vae_decoder", "outputs", lambda specs: ()),
        ("unet", "inputs", lambda specs: (specs[0], retyped(specs[1], "int64"), specs[2])),
        ("unet_small", "outputs", lambda specs: (retyped(specs[0], "float16"),)),
        ("text_encoder", "inputs", lambda specs: (retyped(specs[0], "float32"),)),
        ("text_encoder", "outputs", lambda specs: (retyped(specs[0], "float16"), specs[1])),
        ("vae_decoder", "inputs", lambda specs: (retyped(specs[0], "float16"),)),
    ],
)
def test_a_component_has_the_tensors_of_its_role(
    name: str, kind: str, edit: Callable[[Any], Any], bundle: Path
) -> None:
    def changed(manifest: Manifest) -> Manifest:
        component = manifest.components[name]
        component = msgspec.structs.replace(component, **{kind: edit(getattr(component, kind))})
        return msgspec.structs.replace(manifest, components={**manifest.components, name: component})

    resign(bundle, changed)
    with pytest.raises(BundleError, match=f"{kind} of .* '{name}', got "):
        Bundle.open(bundle)


def test_an_encoder_reads_pictures(bundle: Path) -> None:
    def changed(manifest: Manifest) -> Manifest:
        encoder = msgspec.structs.replace(manifest.components["vae_decoder"], role="vae_encoder")
        return msgspec.structs.replace(manifest, components={**manifest.components, "vae_encoder": encoder})

    resign(bundle, changed)
    with pytest.raises(
        BundleError,
        match=r"inputs of vae_encoder 'vae_encoder', got 'latent_sample float32 .*, expected sample float32 of",
    ):
        Bundle.open(bundle)


def test_opening_imports_no_parser(bundle: Path) -> None:
    """Checking is done by the standard library and msgspec; no model or tokenizer library is there to be attacked."""
    code = (
        "import sys; from tandemrt.runtime.bundle import Bundle; Bundle.open(sys.argv[1]); "
        "import tandemrt.runtime.text, tandemrt.runtime.backends; "
        "print([name for name in ('onnxruntime', 'tokenizers', 'onnx', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_tiny_bundle_is_the_same_every_time(tmp_path: Path, pristine: Path) -> None:
    manifest = write_tiny_bundle(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(pristine)
    write(msgspec.structs.replace(manifest, format=7), tmp_path / "again")
    with pytest.raises(BundleError, match="got 7"):
        Bundle.open(tmp_path / "again")
