"""PeftConfig: its file, its place on the hub, and what it does with keys it does not know."""

import json
import warnings

import pytest
from huggingface_hub import constants as hub_constants

from fastpeft import adapter_files
from fastpeft.config import PEFT_FORMAT, PeftConfig, PromptLearningConfig
from fastpeft.tuners.lora.config import LoraConfig
from fastpeft.utils.peft_types import PeftType, TaskType, UnsupportedMethodError


def saved_json(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture
def folder(tmp_path):
    LoraConfig(r=4, target_modules=["v", "q"], task_type=TaskType.CAUSAL_LM).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- writing ----


def test_the_file_is_sorted_and_says_which_format_it_is(folder):
    values = saved_json(folder)
    assert list(values) == sorted(values)
    assert values["target_modules"] == ["q", "v"]
    assert values["peft_type"] == "LORA"
    assert values["task_type"] == "CAUSAL_LM"
    assert values["peft_version"] == PEFT_FORMAT
    assert "runtime_config" not in values
    assert [path.name for path in folder.iterdir()] == ["adapter_config.json"]


def test_auto_mapping_is_stored_in_the_file_alone(tmp_path):
    config = LoraConfig()
    mapping = {"base_model_class": "Net", "parent_library": "somewhere"}
    config.save_pretrained(tmp_path, auto_mapping_dict=mapping)
    assert saved_json(tmp_path)["auto_mapping"] == mapping
    assert config.auto_mapping is None


def test_saving_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="must be a folder"):
        LoraConfig().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_save_leaves_the_old_file(folder, monkeypatch):
    before = saved_json(folder)

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(adapter_files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        LoraConfig(r=16).save_pretrained(folder)
    assert saved_json(folder) == before
    assert [path.name for path in folder.iterdir()] == ["adapter_config.json"]


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    import numpy as np

    LoraConfig(r=np.int64(4), lora_alpha=np.float32(0.5)).save_pretrained(tmp_path)
    assert (saved_json(tmp_path)["r"], saved_json(tmp_path)["lora_alpha"]) == (4, 0.5)


def test_what_json_cannot_hold_is_named():
    with pytest.raises(TypeError, match="object, cannot be written as JSON"):
        LoraConfig(modules_to_save=object()).to_json()


# ---- reading ----


@pytest.mark.parametrize("reader", [PeftConfig, LoraConfig])
def test_the_class_is_that_of_the_method(folder, reader):
    config = reader.from_pretrained(folder)
    assert type(config) is LoraConfig
    assert config == LoraConfig(r=4, target_modules=["v", "q"], task_type="CAUSAL_LM")


def test_str_path_and_subfolder(folder):
    expected = PeftConfig.from_pretrained(folder)
    assert PeftConfig.from_pretrained(str(folder)) == expected
    assert PeftConfig.from_pretrained(folder.parent, subfolder="adapter") == expected
    assert PeftConfig._get_peft_type(folder.parent, subfolder="adapter") == "LORA"


def test_fields_by_keyword_fill_in_but_do_not_override(folder):
    edit(folder, r=4)
    values = saved_json(folder)
    del values["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(values))
    config = LoraConfig.from_pretrained(folder, r=64, lora_alpha=3, torch_device="cpu")
    assert (config.r, config.lora_alpha) == (4, 3)


def test_unknown_keys_are_named_and_left_out(folder):
    edit(folder, new_option=1, another=None)
    with pytest.warns(UserWarning, match=r"\['another', 'new_option'\].*LoraConfig.*newer PEFT"):
        config = PeftConfig.from_pretrained(folder)
    assert config.r == 4
    assert not hasattr(config, "new_option")


def test_unknown_keys_without_a_peft_type_are_no_adapter(folder):
    values = saved_json(folder)
    del values["peft_type"]
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(TypeError, match="must at least name a peft_type"):
        PeftConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="no peft_type"):
        PeftConfig._get_peft_type(folder)


def test_other_type_errors_are_not_taken_for_unknown_keys(folder):
    edit(folder, target_modules=5)
    with pytest.raises(TypeError, match="target_modules must be a list"):
        PeftConfig.from_pretrained(folder)


def test_a_runtime_config_in_a_file_is_ignored_with_a_warning(folder):
    edit(folder, runtime_config={"ephemeral_gpu_offload": True})
    with pytest.warns(UserWarning, match="runtime_config"):
        config = PeftConfig.from_pretrained(folder)
    assert config.runtime_config.ephemeral_gpu_offload is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ('{"peft_type": "LO', "is not JSON .*truncated"),
        ("[1, 2]", "should hold a JSON object.*list"),
        (b"\xff\xfe\x00", "is not JSON"),
    ],
)
def test_a_damaged_file_is_named(folder, content, message):
    path = folder / "adapter_config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as raised:
        PeftConfig.from_pretrained(folder)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("peft_type", "message"), [("ADALORA", "not supported yet"), ("HYPER_LORA", "unknown PEFT type")]
)
def test_an_adapter_of_another_method_says_so(folder, peft_type, message):
    edit(folder, peft_type=peft_type)
    with pytest.raises(UnsupportedMethodError, match=message):
        PeftConfig.from_pretrained(folder)


def test_a_folder_without_an_adapter(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at '.*that folder holds \['notes.txt'\]"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="subfolder 'x': no such folder"):
        PeftConfig.from_pretrained(tmp_path, subfolder="x")


def test_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    """Offline, a repository that was downloaded before: its config is read from the hub's cache."""
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--some--adapter" / "snapshots" / "abc"
    LoraConfig(r=3).save_pretrained(snapshot / "sub")
    (tmp_path / "models--some--adapter" / "refs").mkdir()
    (tmp_path / "models--some--adapter" / "refs" / "main").write_text("abc")
    assert PeftConfig.from_pretrained("some/adapter", subfolder="sub", cache_dir=tmp_path).r == 3
    with pytest.raises(ValueError, match="Can't find"):
        PeftConfig.from_pretrained("some/other", cache_dir=tmp_path)


# ---- the classes ----


def test_task_type_is_checked():
    assert PeftConfig(task_type="SEQ_CLS").task_type == TaskType.SEQ_CLS
    with pytest.raises(ValueError, match=r"one of SEQ_CLS, .*got 'CHAT'"):
        PeftConfig(task_type="CHAT")


def test_a_version_in_a_file_is_kept():
    assert PeftConfig(peft_version="0.9.0").peft_version == "0.9.0"
    assert LoraConfig().peft_version == PEFT_FORMAT


def test_what_kind_of_method_it_is():
    assert PromptLearningConfig().is_prompt_learning
    assert not LoraConfig().is_prompt_learning
    assert not LoraConfig().is_adaption_prompt


def test_from_peft_type():
    assert LoraConfig.from_peft_type(r=3) == LoraConfig(r=3)
    assert PeftConfig.from_peft_type(peft_type=PeftType.LORA, r=3) == LoraConfig(r=3)


def test_subclasses_can_look_at_what_a_file_says(folder):
    class Watchful(LoraConfig):
        @classmethod
        def check_kwargs(cls, **kwargs):
            assert kwargs["r"] == 4
            return kwargs | {"r": 5}

    assert Watchful.from_pretrained(folder).r == 5


# ---- what the weights mean ----


def test_the_signature_follows_what_changes_the_weights_meaning():
    base = LoraConfig(target_modules=["q", "v"])
    for other in (
        LoraConfig(target_modules={"v", "q"}, inference_mode=True, base_model_name_or_path="moved", revision="2"),
        LoraConfig(target_modules=["q", "v"], task_type="CAUSAL_LM", lora_dropout=0.1, init_lora_weights=False),
        LoraConfig(target_modules=["q", "v"], peft_version="0.9.0", auto_mapping={"parent_library": "x"}),
    ):
        assert other.signature() == base.signature()
    for other in (
        LoraConfig(target_modules=["q", "v"], lora_alpha=16),
        LoraConfig(target_modules=["q", "v"], r=4),
        LoraConfig(target_modules=["q", "v"], use_rslora=True),
        LoraConfig(target_modules=["q"]),
        LoraConfig(target_modules=["q", "v"], rank_pattern={"q": 2}),
    ):
        assert other.signature() != base.signature()


def test_the_signature_outlives_a_round_trip(tmp_path):
    config = LoraConfig(
        target_modules=["q", "v"], modules_to_save=["z", "a"], layers_to_transform=[1, 0], alpha_pattern={"q": 2.5}
    )
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftConfig.from_pretrained(tmp_path).signature() == config.signature()
