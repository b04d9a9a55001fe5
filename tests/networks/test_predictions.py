"""What files say that their model predicts, in the words of the programs that wrote them."""

from pathlib import Path

import pytest

from networks.predictions import compare_predictions, read_prediction
from stable_diffusion.files import read_model_type

XL = ("model.diffusion_model.a", "first_stage_model.b", "conditioner.embedders.1.model.c")


@pytest.mark.parametrize(
    ("metadata", "velocity", "zero"),
    [
        ({}, None, False),
        ({"modelspec.prediction_type": "v"}, True, False),  # sd-scripts, ours
        ({"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "True"}, False, False),
        ({"modelspec.predict_key": "v"}, True, False),  # ComfyUI
        ({"modelspec.predict_key": "epsilon"}, False, False),
        ({"modelspec.prediction_type": "v_prediction", "ss_zero_terminal_snr": "True"}, True, True),
        ({"modelspec.prediction_type": "V-Prediction"}, True, False),
        ({"modelspec.prediction_type": "v", "ss_v_parameterization": "False"}, True, False),
        ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, True, True),
        ({"ss_v_parameterization": "False"}, None, False),  # only not typed
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, True, False),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, True, False),
        ({"modelspec.prediction_type": "None"}, None, False),
    ],
)
def test_metadata_of_known_programs_are_read(
    metadata: dict[str, str], velocity: bool | None, zero: bool
) -> None:
    said = read_prediction(metadata)

    assert (said.velocity, said.zero_terminal_snr, said.unknown) == (velocity, zero, "")
    marks = read_model_type(Path("x.safetensors"), XL, metadata)
    assert (marks.predicts_velocity, marks.zero_terminal_snr) == (velocity is True, zero)
    assert (marks.describe_prediction() == "") == (velocity is not True)


def test_tensors_count_more_than_metadata(caplog: pytest.LogCaptureFixture) -> None:
    marks = read_model_type(Path("x.safetensors"), (*XL, "v_pred"), {"modelspec.prediction_type": "epsilon"})

    assert marks.predicts_velocity
    assert "as its tensor v_pred says" in marks.describe_prediction()
    assert caplog.text == ""


def test_a_prediction_that_is_not_known_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    marks = read_model_type(Path("x.safetensors"), XL, {"modelspec.prediction_type": "sample"})

    assert not marks.predicts_velocity
    assert "modelspec.prediction_type = sample" in caplog.text


@pytest.mark.parametrize(
    ("said", "predicts_v", "level"),
    [("v", False, "WARNING"), ("epsilon", True, "INFO"), ("v", True, ""), ("epsilon", False, "")],
)
def test_a_lora_of_a_model_that_predicts_something_else_is_reported(
    said: str, predicts_v: bool, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    metadata = {"modelspec.prediction_type": said, "ss_zero_terminal_snr": "True"}

    compare_predictions({Path("a.safetensors"): metadata}, predicts_v)

    assert [record.levelname for record in caplog.records] == [level] * bool(level)
    assert ("add --v_parameterization --zero_terminal_snr" in caplog.text) == (level == "WARNING")
