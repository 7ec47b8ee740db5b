import numpy as np
import pytest
import torch

from detection import responses
from detection.evaluate import detect
from detection.faster_rcnn import build_faster_rcnn
from detection.responses import SIDE, Response, heat_map, look
from detection.transforms import to_model_input
from resbackbone import build_resnet_backbone

CPU = torch.device("cpu")
SIZES = {"min_size": 64, "max_size": 97, "box_score_thresh": 0.0}


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=16)
    return build_faster_rcnn(backbone, 2, representation_size=16, **SIZES).eval()


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 50, 61), dtype=torch.uint8)  # resized to 64 x 78, padded to 64 x 96


def test_one_pass_gives_the_detections_and_the_responses_of_trunk_and_pyramid(detector, image):
    seen = look(detector, image, CPU)
    [detections] = detect(detector, [image], [0], CPU)
    assert np.array_equal(seen.detections, detections) and len(detections)
    assert seen.image is image
    assert list(seen.responses) == ["c2", "c3", "c4", "c5", "p2", "p3", "p4", "p5", "p6"]
    for level, response in seen.responses.items():
        stride = 2 ** int(level[1])
        assert response.stride == stride
        assert response.values.shape == (-(-64 // stride), -(-78 // stride)) and response.values.dtype == np.float32
        assert response.channels == (16 if level[0] == "p" else 2 ** (int(level[1]) + 4))


def test_a_response_is_the_mean_magnitude_of_the_channels_without_the_padding(detector, image):
    with torch.inference_mode():
        resized, _ = detector.transform([to_model_input(image, CPU)])
        maps = detector.backbone(resized.tensors)
    response = look(detector, image, CPU).responses["p3"]
    assert maps["p3"].shape[-1] == 12 and (maps["p3"] < 0).any()
    assert torch.allclose(torch.from_numpy(response.values), maps["p3"][0, :, :, :10].abs().mean(0), atol=1e-6)


def test_nothing_is_left_hanging_on_the_detector_even_by_a_pass_that_fails(detector, image, monkeypatch):
    look(detector, image, CPU)
    monkeypatch.setattr(responses, "detect", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        look(detector, image, CPU)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in detector.modules())


def test_without_a_pyramid_the_levels_are_the_trunks(image):
    backbone = build_resnet_backbone(18, levels=["c4", "c5"])
    seen = look(build_faster_rcnn(backbone, 2, variant="c4", rpn_post_nms_top_n_test=5, **SIZES).eval(), image, CPU)
    assert {level: (r.channels, r.stride) for level, r in seen.responses.items()} == {"c4": (256, 16)}


def test_a_heat_map_is_the_images_shape_and_brightest_where_the_response_is_most():
    values = np.zeros((2, 4), np.float32)
    values[0, 3] = 5.0
    picture = np.asarray(heat_map(torch.full((3, 90, 180), 128, dtype=torch.uint8), Response(values, 8, 45)))
    assert picture.shape == (90, 180, 3)
    brightness = picture.astype(float).sum(2)
    assert brightness[:40, 140:].mean() > 2 * brightness[50:, :90].mean()


@pytest.mark.parametrize("values", [np.full((3, 2), 7.0), np.array([[np.nan, 1.0], [np.inf, 2.0]])])
def test_a_flat_response_and_one_that_is_not_finite_have_a_heat_map_too(values):
    image = torch.zeros(3, 2 * SIDE, SIDE, dtype=torch.uint8)
    assert heat_map(image, Response(values.astype(np.float32), 1, 4)).size == (SIDE // 2, SIDE)
