"""Where the environment forbids downloads, missing weights are one sentence at once, and those in a local cache load."""

from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import save_file

from teacher_cache.errors import BadInputError
from teacher_cache.teachers import load_teacher
from teacher_cache.teachers.weights.load import random_weights
from teacher_cache.teachers.weights.offline import downloaded, offline_setting


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    """No cache of this machine, and no route to anywhere: looking up a host is an error."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path))

    def refuse(*_, **__):
        raise AssertionError("something went to the network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "setting"),
    [
        ({}, None),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE=1"),
        ({"TRANSFORMERS_OFFLINE": "yes"}, "TRANSFORMERS_OFFLINE=yes"),
        ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}, None),
        ({"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "ON"}, "TRANSFORMERS_OFFLINE=ON"),
    ],
    ids=str,
)
def test_the_variables_mean_what_the_hub_takes_them_for(variables, setting, monkeypatch):
    """The first variable that is not empty decides, by the hub's words for true."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert offline_setting() == setting


@pytest.mark.parametrize("name", ["timm:test_vit", "open_clip:ViT-S-test/tag"])
def test_missing_weights_are_one_sentence_that_names_the_variable(name, monkeypatch):
    """timm and open_clip say which variable forbids it, which file is needed and how to pass it, and do not try."""
    import open_clip
    from open_clip import pretrained

    config = open_clip.get_model_config("ViT-S-16") | {"embed_dim": 8}
    config["vision_cfg"] = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-S-test", config)
    monkeypatch.setitem(pretrained._PRETRAINED, "vit-s-test", {"tag": {"hf_hub": "org/tiny/"}})
    monkeypatch.setitem(pretrained._PRETRAINED, "ViT-S-test", {"tag": {"hf_hub": "org/tiny/"}})
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    was_offline = constants.HF_HUB_OFFLINE
    with pytest.raises(
        BadInputError, match="TRANSFORMERS_OFFLINE=1 forbids.*--weights PATH with .*(org|hub).*random:0"
    ) as caught:
        load_teacher(name)
    assert "\n" not in str(caught.value) and was_offline == constants.HF_HUB_OFFLINE
    assert load_teacher(name, "random:0").spec.weights == "random:0"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_gated_download_says_what_opens_it(wrapped):
    """Without rights the sentence says so, where to ask for them, and which file would do; also behind another error."""

    def fetch():
        try:
            raise GatedRepoError(
                "403 Client Error.\n\nCannot access gated repo", response=SimpleNamespace(headers={}, request=None)
            )
        except GatedRepoError as error:
            if wrapped:
                raise RuntimeError("cannot load") from error
            raise

    with pytest.raises(BadInputError, match="are gated: w is given only.*hf auth login.*--weights PATH.*random:0") as caught:
        downloaded("t", "w", "a", fetch)
    assert "\n" not in str(caught.value)


def test_a_plain_address_is_not_opened(tmp_path, monkeypatch):
    """A file from a plain address is not fetched offline, and is taken where it lies from before."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetched = []
    with pytest.raises(BadInputError, match="HF_HUB_OFFLINE=1 forbids"):
        downloaded("t", "w", "a", lambda: fetched.append(1), tmp_path / "w.pth")
    assert not fetched
    (tmp_path / "w.pth").touch()
    assert downloaded("t", "w", "a", lambda: "there", tmp_path / "w.pth") == "there"


def test_what_is_in_the_hubs_cache_loads_offline(tmp_path, monkeypatch):
    """A file in the local cache of the hub is loaded although downloads are forbidden."""
    model = timm.create_model("test_vit.r160_in1k")
    random_weights(model, 3)
    folder = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    save_file(model.state_dict(), folder / "snapshots" / ("a" * 40) / "model.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    teacher = load_teacher("timm:test_vit.r160_in1k")
    assert torch.equal(teacher._anatomy.model.cls_token, model.cls_token)
