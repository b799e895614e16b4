"""A campaign of damaged backbones and finished runs: each ends with exit code 2 and one sentence."""

import json
import os
import shutil
from pathlib import Path

import pytest
from campaign import options
from PIL import Image
from safetensors.torch import load_file, save_file

from flamingo import __main__ as captioning
from flamingo.errors import InputError, run_command
from flamingo.files import asset
from flamingo.interop.backbones import build_flamingo, load_language_model, load_vision_encoder
from flamingo.presets import model_config
from flamingo.training.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("bounded_memory")


ROOT = Path(__file__).resolve().parent.parent
ASSETS = asset("classroom/flamingo")


def changed_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def without(*patterns: str):
    def damage(folder: Path) -> None:
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return damage


def code_of_its_own(folder: Path, model_type: str) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    changed_config(folder, model_type=model_type, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})


def tensors_changed(change):
    def damage(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return damage


def shortened(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


BAD_LANGUAGE_MODELS = {
    "no tokenizer": (without("*token*"), "no tokenizer"),
    "code of its own": (lambda f: code_of_its_own(f, "evil"), "code of its own, which is never run"),
    "no config": (without("config.json"), "cannot load"),
    "no weights": (without("*.safetensors"), "cannot load"),
    "cut short": (shortened, "cannot load"),
    "pickle": (as_pickle, "cannot load"),
    "larger vocabulary": (lambda f: changed_config(f, vocab_size=99999), "cannot load"),
    "small vocabulary": (lambda f: changed_config(f, vocab_size=7), "cannot load"),
    "negative vocabulary": (lambda f: changed_config(f, vocab_size=-1), "cannot load"),
    "words for a vocabulary": (lambda f: changed_config(f, vocab_size="many"), "cannot load"),
    "no layers": (lambda f: changed_config(f, num_hidden_layers="x"), "cannot load"),
    "more layers than weights": (lambda f: changed_config(f, num_hidden_layers=9), "lacks"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "cannot load"),
    "config cut short": (lambda f: (f / "config.json").write_text('{"model'), "cannot load"),
    "tokenizer cut short": (lambda f: (f / "tokenizer.json").write_text('{"ver'), "cannot load"),
    "not a number": (tensors_changed(lambda t: {n: v * float("nan") for n, v in t.items()}), "not finite"),
    "a tensor missing": (tensors_changed(lambda t: dict(list(sorted(t.items()))[1:])), "lacks 1 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage, word", BAD_LANGUAGE_MODELS.values(), ids=BAD_LANGUAGE_MODELS)
def test_damaged_language_models(damage, word, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    folder = shutil.copytree(asset("classroom/opt"), tmp_path / "opt")
    damage(folder)
    refused(lambda: load_language_model(str(folder)), "cannot load the language model", word)
    assert not (folder / "ran").exists() and not (ROOT / "ran").exists()


def test_a_known_kind_of_model_is_loaded_without_the_code_beside_it(tmp_path):
    folder = shutil.copytree(asset("classroom/opt"), tmp_path / "opt")
    code_of_its_own(folder, "opt")
    assert load_language_model(str(folder))[0].config.hidden_size == 192
    assert not (folder / "ran").exists()


def test_texts_longer_than_the_positions_are_refused_before_weights_are_read(monkeypatch, refused):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("read"))
    build = lambda: build_flamingo(model_config(options()), max_tokens=513)  # noqa: E731
    refused(build, "--max-tokens 513", "its 512 positions")


@pytest.mark.parametrize("name", ["/nope", "./nope", "~/nope/nope", "../nope"])
def test_a_missing_folder_is_called_a_folder(name):
    for load in (load_language_model, load_vision_encoder):
        with pytest.raises(InputError, match=r"there is no folder .*nope"):
            load(name if load is load_language_model else f"{name}/x")


@pytest.mark.parametrize("damage", [shortened, without("*.safetensors"), without("open_clip_config.json"),
                                    tensors_changed(lambda t: {n: v * float("nan") for n, v in t.items()}),
                                    lambda f: (f / "open_clip_config.json").write_text("[]"),
                                    lambda f: (f / "open_clip_config.json").write_text('{"model_cfg": {}}')],
                         ids=["cut short", "no weights", "no config", "not a number", "list", "empty"])  # fmt: skip
def test_damaged_vision_encoders(damage, tmp_path, refused):
    folder = shutil.copytree(asset("classroom/clip"), tmp_path / "clip")
    damage(folder)
    refused(lambda: load_vision_encoder(f"local-dir:{folder}"))


def test_an_architecture_that_does_not_fit_is_counted_and_not_built(monkeypatch):
    monkeypatch.setattr("flamingo.interop.backbones.build_from_parts", lambda *_: pytest.fail("it was built"))
    overrides = ["tokenizer.depth=512", "tokenizer.heads=1024", "tokenizer.dim_head=4096", "tokenizer.ff_mult=64"]
    with pytest.raises(InputError, match=r"the trained parts would take [\d,.]+ GiB, and this machine has"):
        build_flamingo(model_config(options(overrides=overrides)))


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Path:
    """A finished run: the committed one."""
    folder = tmp_path_factory.mktemp("run") / "classroom"
    return Path(shutil.copytree(ASSETS, folder))


def in_place_of(name: str, make):
    return lambda folder: ((folder / name).unlink(), make(folder / name))


BAD_RUNS = {
    "weights are a pipe": in_place_of("model.safetensors", os.mkfifo),
    "config is a pipe": in_place_of("config.json", os.mkfifo),
    "weights from elsewhere": lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../elsewhere.safetensors"}}'
    ),
    "an adapter of nothing": lambda f: changed_config(f, adapters={"x": {}}),
    "an adapter without its kind": lambda f: changed_config(f, adapters={"x": {"r": 10**9}}),
    "adapters in a list": lambda f: changed_config(f, adapters=[1]),
    "an adapter that is a number": lambda f: changed_config(f, adapters={"x": 1}),
    "a dtype that is none": lambda f: changed_config(f, dtype="float99"),
    "an old dtype that is none": lambda f: changed_config(f, torch_dtype=16),
    "values that are no numbers": tensors_changed(lambda t: {n: v * float("nan") for n, v in t.items()}),
    "cut short": shortened,
    "another depth": lambda f: changed_config(f, resampler_depth=3),
    "a huge depth": lambda f: changed_config(f, resampler_depth=10**6),
    "false in words": lambda f: changed_config(f, vision_feature_norm="false"),
    "another kind": lambda f: changed_config(f, model_type="opt"),
    "weights are a folder": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
    "config is a folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD_RUNS.values(), ids=BAD_RUNS)
def test_damaged_runs(damage, a_run, tmp_path, refused):
    folder = Path(shutil.copytree(a_run, tmp_path / "run"))
    damage(folder)
    refused(lambda: load_model(folder))


def test_captions_of_good_pictures_are_not_lost_to_a_bad_one(a_run, tmp_path, capsys):
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pictures = [str(tmp_path / name) for name in ("good.png", "bad.png", "none.png", "good.png")]
    with pytest.raises(SystemExit) as ended:
        run_command("it", lambda: captioning.main([str(a_run), *pictures, "--max-new-tokens", "4"]))
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and "2 of 4 pictures could not be captioned" in err and "Traceback" not in err
    assert out.count(f"{pictures[0]}\t") == 2 and "bad.png" in err and "none.png" in err
    for prompt, more in (
        ("<image>", []),
        ("a <|endofchunk|>", []),
        ("half a letter \udcff", []),
        ("word " * 3000, []),
        ("", ["--max-new-tokens", "9999"]),
    ):
        with pytest.raises(InputError, match="--prompt"):
            captioning.main([str(a_run), pictures[0], "--prompt", prompt, *more])
