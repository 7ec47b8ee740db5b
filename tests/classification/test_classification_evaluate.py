import math

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import functional as F
from torchvision.transforms._presets import ImageClassification

from resbackbone import build_resnet_classifier
from resbackbone.classification.evaluate import Ensemble, evaluate, predict
from resbackbone.classification.images import Images
from resbackbone.engine.distributed import Rank
from resbackbone.image_io import BadImage
from resbackbone.weights.inputs import MEAN, STD

ALONE = Rank(0, 1, torch.device("cpu"))
SMALL = {"crop": 28, "resize": 32}


class Drawn(Images):
    """Noise images of odd sizes, two of each of `classes` classes, but for `broken` ones."""

    def __init__(self, classes=7, sizes=((45, 33), (30, 51), (40, 40)), broken=(), **options):
        super().__init__([f"class {i}" for i in range(classes)], np.tile(np.arange(classes), 2), **options)
        self.sizes, self.broken = sizes, broken

    def read(self, index):
        if index in self.broken:
            raise BadImage(f"image {index}: empty file")
        width, height = self.sizes[index % len(self.sizes)]
        pixels = np.random.default_rng(index).integers(0, 256, (height // 3, width // 3, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((width, height))


class Files(Images):
    """Real images, each of a class of its own among 1000."""

    def __init__(self, paths):
        super().__init__([str(i) for i in range(1000)], np.arange(len(paths)))
        self.paths = paths

    def file(self, index):
        return self.paths[index].read_bytes()

    def name(self, index):
        return str(self.paths[index])


class Watched(nn.Module):
    """Keeps what it is given; the scores of an image follow from its colours, sharply."""

    def __init__(self, classes=7, sharpness=30):
        super().__init__()
        self.fc = nn.Linear(3, classes)
        self.sharpness, self.seen = sharpness, []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.sharpness * self.fc(x[:, :, 5:, : x.shape[3] // 2].mean((2, 3)))


class Says(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def real_files(data):
    return sorted((data / "imagenet_sample").glob("*/*"))


def test_the_networks_input_is_torchvisions_bit_for_bit_on_real_images(data):
    files, model = real_files(data), Watched(1000)
    predict(model, Files(files), ALONE, batch_size=16)
    transform = ImageClassification(crop_size=224)
    seen = torch.cat(model.seen)
    assert len(seen) == len(files) == 100
    for file, x in zip(files, seen, strict=True):
        assert torch.equal(x, transform(Image.open(file).convert("RGB"))), file


def test_the_top_five_of_a_checkpoint_are_torchvisions_own_image_for_image(data, randomised):
    theirs = randomised(torchvision.models.resnet18())
    ours = build_resnet_classifier(18, weights=theirs.state_dict())
    files = real_files(data)[::4]
    transform = ImageClassification(crop_size=160, resize_size=176)
    with torch.inference_mode():
        expected = [theirs(transform(Image.open(f).convert("RGB"))[None]).topk(5).indices[0] for f in files]
    predicted, _ = predict(ours, Files(files), ALONE, crop=160, resize=176, batch_size=8)
    assert torch.equal(predicted, torch.stack(expected))
    assert len({tuple(row.tolist()) for row in predicted}) > 5  # the images are told apart


def test_ten_crops_are_the_corners_and_the_centre_and_their_mirror_images():
    images, model = Drawn(), Watched()
    predict(model, images, ALONE, protocol="10crop", **SMALL, batch_size=1)
    for index, seen in enumerate(model.seen):
        crops = torchvision.transforms.FiveCrop(28)(F.resize(images.read(index), 32))
        expected = [F.normalize(F.to_tensor(c), MEAN, STD) for c in (*crops, *(F.hflip(crop) for crop in crops))]
        assert torch.equal(seen, torch.stack(expected))


@pytest.mark.parametrize("protocol, views", [("10crop", 1), ("multiscale", 5)])
def test_a_class_scores_its_softmax_averaged_over_the_views(protocol, views):
    images, model = Drawn(), Watched()
    predicted, losses = predict(model, images, ALONE, protocol=protocol, **SMALL, batch_size=1)
    passes = [model.seen[i : i + views] for i in range(0, len(model.seen), views)]
    logits = [torch.cat([model(x) for x in one]) for one in passes]
    scores = torch.stack([each.double().softmax(1).mean(0) for each in logits])
    assert torch.equal(predicted, scores.topk(5).indices)
    of_true = scores[torch.arange(len(scores)), torch.as_tensor(images.labels)]
    torch.testing.assert_close(losses, -of_true.log())
    assert not torch.equal(predicted, torch.stack([each.mean(0).topk(5).indices for each in logits]))


def test_multiscale_looks_at_the_whole_image_and_its_mirror_image_at_the_papers_scales():
    images, model = Drawn(classes=1, sizes=((45, 33), (33, 50))), Watched(1)
    predict(model, images, ALONE, protocol="multiscale")
    sides = [224, 256, 384, 480, 640]
    assert [tuple(x.shape[2:]) for x in model.seen[:5]] == [(side, side * 45 // 33) for side in sides]
    assert [tuple(x.shape[2:]) for x in model.seen[5:]] == [(side * 50 // 33, side) for side in sides]
    assert all(len(x) == 2 and torch.equal(x[1], x[0].flip(-1)) for x in model.seen)
    model.seen.clear()
    predict(model, images, ALONE, protocol="multiscale", crop=28)
    assert [min(x.shape[2:]) for x in model.seen[:5]] == [28, 32, 48, 60, 80]


def test_on_a_whole_image_the_classifier_averages_the_score_map_of_its_last_layer(randomised):
    model = randomised(build_resnet_classifier(18, num_classes=5)).double()
    images, maps = torch.randn(2, 3, 97, 161).double(), []
    model.layer4[-1].register_forward_hook(lambda module, inputs, output: maps.append(output))
    logits = model(images)
    score_map = torch.nn.functional.conv2d(maps[0], model.fc.weight[:, :, None, None], model.fc.bias)
    assert score_map.shape == (2, 5, 4, 6)
    torch.testing.assert_close(logits, score_map.mean((2, 3)))


def test_an_ensemble_averages_softmax_scores():
    images = Drawn(classes=3)
    sure, other = Says(9.0, 0.0, 5.0), Says(0.0, 1.9, 1.7)  # of 1 and 2 the logits' mean prefers 2, the scores' 1
    assert predict(Ensemble([sure, other]), images, ALONE, **SMALL).best[0].tolist() == [0, 1, 2]
    assert predict(sure, images, ALONE, **SMALL).best[0].tolist() == [0, 2, 1]
    assert predict(Ensemble([sure, sure, other]), images, ALONE, **SMALL).best[0].tolist() == [0, 1, 2]


def test_what_is_counted_is_the_best_class_and_the_best_five():
    images = Drawn(classes=7)  # two images of each, and every image is said to be 6, 5, 4, 3, 2, 1, 0
    logits = torch.arange(7.0)
    results, _ = evaluate(Says(*logits.tolist()), images, ALONE, **SMALL)
    assert results.pop("loss") == pytest.approx(logits.logsumexp(0).item() - 3)  # 3: the mean logit of the true classes
    assert results == {"top1": 1 / 7, "top5": 5 / 7, "images": 14, "unreadable": 0, "protocol": "1crop"}
    results, _ = evaluate(Says(1.0, 2.0, 0.0), Drawn(classes=3), ALONE, protocol="10crop", **SMALL)  # fewer than five
    assert results.items() >= {"top1": 1 / 3, "top5": 1.0, "images": 6, "unreadable": 0, "protocol": "10crop"}.items()


@pytest.mark.parametrize("protocol, batch_size, largest", [("1crop", 4, 4), ("10crop", 25, 20), ("multiscale", 9, 2)])
def test_no_more_crops_than_the_batch_size_go_through_at_once_and_it_changes_no_prediction(
    protocol, batch_size, largest
):
    images, model = Drawn(), Watched()
    predicted = predict(model, images, ALONE, protocol=protocol, **SMALL, batch_size=batch_size)
    assert max(map(len, model.seen)) == largest
    for other in ({"batch_size": 1}, {"workers": 2}):
        again = predict(model, images, ALONE, protocol=protocol, **SMALL, **other)
        assert torch.equal(predicted.best, again.best)


def test_logits_that_differ_in_their_last_bit_are_told_apart():
    close = [0.1, float(np.nextafter(np.float32(0.1), np.float32(1))), 0.0]  # equal after a softmax in fp32
    assert predict(Says(*close), Drawn(classes=3), ALONE, **SMALL).best[0].tolist() == [1, 0, 2]
    assert predict(Says(*close[::-1]), Drawn(classes=3), ALONE, **SMALL).best[0].tolist() == [1, 2, 0]


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_evaluated_in_eval_mode_and_left_as_it_was(training):
    modes, model = [], nn.Sequential(nn.BatchNorm2d(3), Says(1.0, 2.0)).train(training)
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    evaluate(model, Drawn(classes=2), ALONE, **SMALL)
    assert modes and not any(modes) and model.training == model[0].training == training
    assert model[0].num_batches_tracked == 0


def test_progress_sees_every_batch_and_their_number():
    seen = []

    def progress(items, total):
        seen.append(total)
        yield from items

    evaluate(Says(*[0.0] * 7), Drawn(classes=7), ALONE, **SMALL, batch_size=4, progress=progress)
    assert seen == [4]


@pytest.mark.parametrize("protocol", ["1crop", "10crop", "multiscale"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_and_ends_it_or_counts_as_wrong(protocol, workers):
    model, options = Says(*[0.0] * 5, 2.0, 1.0), {"protocol": protocol, "workers": workers, **SMALL}
    with pytest.raises(BadImage, match="^image 5: empty file$"):
        evaluate(model, Drawn(broken=(5, 6)), ALONE, **options)
    images = Drawn(broken=(5, 8), skip_bad_images=True)
    results, predicted = evaluate(model, images, ALONE, **options)
    assert results["top1"] == 1 / 14 and results["images"] == 14 and results["unreadable"] == 2
    assert images.skipped == {"image 5: empty file", "image 8: empty file"}
    assert [i for i, row in enumerate(predicted.best.tolist()) if row == [-1] * 5] == [5, 8]
    assert predicted.losses.isnan().nonzero().flatten().tolist() == [5, 8] and math.isfinite(results["loss"])


@pytest.mark.parametrize(
    "model, options, message",
    [
        (
            Says(0.0, 0.0),
            {"protocol": "5crop"},
            r"unknown protocol '5crop'; choose from 1crop, 10crop, multiscale; did you mean 1crop\?",
        ),
        (Says(0.0, 0.0), {"crop": 33, "resize": 32}, "a crop of 33 does not fit into a shorter side of 32"),
        (Says(0.0, 0.0, 0.0), SMALL, "the network has 3 classes, the images have 2"),
        (Says(0.0, float("nan")), SMALL, "the network's scores are not finite"),
    ],
)
def test_what_cannot_be_evaluated_is_answered_in_one_sentence(model, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        evaluate(model, Drawn(classes=2), ALONE, **options)


def test_several_ranks_share_the_images_and_end_with_the_results_of_one(monkeypatch):
    parts, options = {}, {**SMALL, "batch_size": 3}

    def gather(value, rank):  # as if the others had come here already
        parts[rank.rank] = value
        return [parts[r] for r in sorted(parts)] if rank.is_main else None

    images, model = Drawn(), Watched()
    images.labels = images.labels[:13]
    results, alone = evaluate(model, images, ALONE, **options)
    results["loss"] = pytest.approx(results["loss"])  # rounding depends on the sizes of batches
    monkeypatch.setattr("resbackbone.classification.evaluate.gather", gather)
    monkeypatch.setattr("resbackbone.classification.evaluate.broadcast", lambda value, rank: (value, rank.rank))
    looked_at = []
    for rank in (2, 1, 0):
        model.seen.clear()
        shared, predicted = evaluate(model, images, Rank(rank, 3, torch.device("cpu")), **options)
        assert shared == (None if rank else results, rank)  # what is broadcast from here
        assert predicted is None if rank else all(map(torch.allclose, predicted, alone))
        looked_at.append(sum(map(len, model.seen)))
    assert looked_at == [4, 4, 5]
