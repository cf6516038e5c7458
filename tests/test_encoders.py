import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from clip_index import encoders
from clip_index.encoders import list_models, load_encoder
from clip_index.encoders.runtime import resolve_device, resolve_precision
from clip_index.types import UsageError


def test_listing_models_imports_no_torch():
    code = "import sys; from clip_index import encoders; encoders.list_models(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_listed_models_say_what_they_are():
    (mini,) = [model for model in list_models() if model["name"] == "mini"]
    assert set(mini) == {"name", "dim", "resolution", "licence", "size_mb", "note"}
    assert (mini["dim"], mini["resolution"]) == (384, 224)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mni", "did you mean 'mini'"),
        ("Mini", "did you mean 'mini'"),
        ("resnet50", "clip-index models lists them"),
        ("nowhere:thing", "clip-index models lists them"),
        ("", "clip-index models lists them"),
    ],
)
def test_unknown_model_is_refused_with_a_hint(name, hint):
    with pytest.raises(UsageError, match=hint):
        load_encoder(name)


@pytest.fixture
def fake_module(monkeypatch):
    calls = []
    module = SimpleNamespace(load=lambda name, **options: calls.append((name, options)) or "encoder")
    monkeypatch.setitem(sys.modules, "clip_index.encoders.fake", module)
    return calls


def test_prefix_leads_to_its_module_with_the_whole_name(monkeypatch, fake_module):
    monkeypatch.setitem(encoders.PREFIXES, "fake", "fake")
    assert load_encoder("fake:some/model", device="cpu", towers=("text",)) == "encoder"
    assert fake_module == [("fake:some/model", {"device": "cpu", "precision": "auto", "towers": ("text",)})]


def test_existing_path_is_a_checkpoint(monkeypatch, fake_module, tmp_path):
    monkeypatch.setitem(encoders.PREFIXES, "path", "fake")
    load_encoder(str(tmp_path))
    assert fake_module[0][0] == str(tmp_path)


@pytest.mark.parametrize("towers", [(), ("image", "sound"), ("texts",)])
def test_unknown_towers_are_refused(towers):
    with pytest.raises(UsageError, match="choose from image, text"):
        load_encoder("mini", towers=towers)


def test_threads_are_set_for_the_process():
    before = torch.get_num_threads()
    try:
        load_encoder("mini", towers=("text",), device="cpu", threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "meta", ""])
def test_unknown_device_is_refused(device):
    with pytest.raises(UsageError, match="unknown device"):
        resolve_device(device)


def test_absent_device_is_refused():
    with pytest.raises(UsageError, match="no such device 'cuda:99'"):
        resolve_device("cuda:99")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_on_the_cpu_follows_its_instructions(monkeypatch, native, expected):
    monkeypatch.setattr("clip_index.encoders.runtime.cpu_has_bfloat16", lambda: native)
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == expected
    assert resolve_precision("fp32", cpu) == "fp32"


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_auto_precision_on_a_gpu_follows_its_generation(monkeypatch, capability, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("precision", "message"), [("int4", "unknown precision 'int4'"), ("fp16", "needs a CUDA device")]
)
def test_impossible_precision_is_refused(precision, message):
    with pytest.raises(UsageError, match=message):
        resolve_precision(precision, torch.device("cpu"))
