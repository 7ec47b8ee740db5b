"""Top-1 and top-5 by the protocols of He et al. 2015 (Sec. 3.4), every image once on any number of ranks."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from resbackbone.checks import UserError, one_of
from resbackbone.classification.images import Images
from resbackbone.classification.transforms import to_model_input
from resbackbone.engine.distributed import Rank, broadcast, gather
from resbackbone.engine.termination import worker_processes
from resbackbone.image_io import BadImage

PROTOCOLS = ("1crop", "10crop", "multiscale")
SCALES = (224, 256, 384, 480, 640)  # shorter sides, for a network trained on crops of 224


class Ensemble(nn.Module):
    """The log of the mean softmax of several classifiers (He et al. 2015, Table 5): [B, 3, H, W] to [B, classes]."""

    def __init__(self, models: Iterable[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([model(images).double().softmax(1) for model in self.models]).mean(0).log()


class Predicted(NamedTuple):
    """What a network says of n images."""

    best: Tensor  # int64 [n, 5 or the number of classes if less]: classes, the best first; -1 for an unreadable image
    losses: Tensor  # fp64 [n]: minus the log of the true class's score, in nats; nan for an unreadable image


def evaluate(
    model: nn.Module, images: Images, rank: Rank, *, protocol: str = "1crop", **options
) -> tuple[dict, Predicted | None]:
    """Classify every image: {"top1", "top5", "loss", "images", "unreadable", "protocol"}, the same on every rank.

    `top1` and `top5` are the fractions, 0..1, of images whose class is the first, or among the first five, that
    `predict` returns; `loss` is the mean cross entropy, in nats, of the images that can be read.
    Arguments (also `options`) and errors are those of `predict`, whose result comes second. With
    `images.skip_bad_images` an unreadable image counts as wrong.
    """
    predicted = predict(model, images, rank, protocol=protocol, **options)
    results = None
    if predicted is not None:
        right = predicted.best == torch.as_tensor(images.labels).view(-1, 1)  # [images, 5]
        top1, top5 = (hits.double().mean().item() for hits in (right[:, 0], right.any(1)))
        unreadable = int((predicted.best[:, 0] < 0).sum())
        readable = unreadable < len(right)
        loss = predicted.losses.nanmean().item() if readable else None
        counts = {"images": len(right), "unreadable": unreadable}
        results = {"top1": top1, "top5": top5, "loss": loss, **counts, "protocol": protocol}
    return broadcast(results, rank), predicted


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Images,
    rank: Rank,
    *,
    protocol: str = "1crop",
    crop: int = 224,
    resize: int = 256,
    batch_size: int = 64,
    workers: int = 0,
    bf16: bool = False,
    progress: Callable[[Iterator, int], Iterator] = lambda items, total: items,
) -> Predicted | None:
    """The five best classes and the loss of every image, on the CPU of rank 0; None elsewhere.

    `model` takes [B, 3, H, W] (RGB, normalized by MEAN and STD) to logits [B, classes]. The score of a class is its
    softmax averaged over the views of `protocol`:
    - "1crop": the central `crop` of the image resized to a shorter side of `resize`. The input equals that of
      torchvision's ImageClassification bit for bit: the same functions decode, resize and normalize a PIL image.
    - "10crop": the four corners and the centre of the same image, and their mirror images (Krizhevsky et al. 2012).
    - "multiscale": the whole image, fully convolutional, at shorter sides of SCALES (in proportion where `crop` is
      not 224), and its mirror image, as in Simonyan and Zisserman 2014 (Sec. 3.2), whom the paper follows. There the
      last layer is a 1x1 convolution whose score map is averaged over its positions; pool and fc of a ResNet are
      linear, so fc of the mean over the whole map, which the classifier computes at any size, equals that average.
      Images keep their aspect ratio and are evaluated one by one.

    `batch_size` is the number of crops in a forward pass on this rank. `progress` wraps the loop over this rank's
    batches and gets their number. Raises BadImage for an image that cannot be read; with `images.skip_bad_images` its
    classes are -1, and rank 0's `images.skipped` holds the message. Raises UserError if the protocol is unknown, if
    there are no images, if the crop exceeds the resized image, if the model has another number of classes than
    `images`, and if scores are not finite.
    """
    if not len(images.labels):
        raise UserError("nothing to evaluate: there are no images")
    if one_of("protocol", protocol, PROTOCOLS) != "multiscale" and crop > resize:
        raise UserError(f"a crop of {crop} does not fit into a shorter side of {resize}")
    views = {"1crop": 1, "10crop": 10, "multiscale": batch_size}[protocol]  # of one size, per image
    share = rank.share(len(images.labels))
    loader = DataLoader(
        _Views(images, protocol, crop, resize),
        batch_size=max(1, batch_size // views),
        sampler=share,
        pin_memory=rank.device.type == "cuda",
        **worker_processes(workers),
    )
    was_training = model.training
    model.eval()
    found: list = []
    skipped: list[str] = []
    try:
        for groups, labels, problems in progress(iter(loader), len(loader)):
            bad = torch.tensor([bool(problem) for problem in problems])
            skipped += filter(None, problems)
            if skipped and not images.skip_bad_images:
                raise BadImage(skipped[0])
            scores = sum(
                _scores(model, group, rank.device, mirrored=protocol != "1crop", bf16=bf16, classes=len(images.classes))
                for group in groups
            )
            best = scores.topk(min(5, scores.shape[1])).indices.masked_fill(bad[:, None], -1)
            of_true = scores.gather(1, labels[:, None])[:, 0] / len(groups)
            losses = -of_true.clamp_min(torch.finfo(scores.dtype).tiny).log()
            found.append(Predicted(best, losses.masked_fill(bad, torch.nan)))
    finally:
        model.train(was_training)
    parts = gather((list(share), found, skipped), rank)
    if parts is None:
        return None
    images.skipped.update(message for _, _, messages in parts for message in messages)
    order = torch.tensor([index for indices, _, _ in parts for index in indices])
    columns = zip(*(batch for _, batches, _ in parts for batch in batches), strict=True)
    best, losses = (torch.cat(column)[order.argsort()] for column in columns)
    return Predicted(best, losses)


def _scores(model: nn.Module, group: Tensor, device: torch.device, *, mirrored: bool, bf16: bool, classes: int):
    """uint8 [images, views, 3, H, W] to class scores, fp64 [images, classes]: softmax, averaged over the views."""
    x = to_model_input(group.flatten(0, 1), device)
    if mirrored:
        x = torch.cat([x, x.flip(-1)])
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = model(x)
    if logits.shape[1] != classes:
        raise UserError(f"the network has {logits.shape[1]} classes, the images have {classes}")
    if not logits.isfinite().all():
        raise UserError("the network's scores are not finite")
    probabilities = logits.cpu().double().softmax(1)  # in fp32 different logits may come out equal
    return probabilities.view(-1, *group.shape[:2], classes).mean((0, 2))


class _Views(Dataset):
    """The views of each image, a list of uint8 [views, 3, H, W] before mirroring, its label, and "".

    An image that cannot be read is blank, and its message follows: an exception raised in a worker would lose it.
    """

    def __init__(self, images: Images, protocol: str, crop: int, resize: int):
        self.images, self.protocol, self.crop, self.resize = images, protocol, crop, resize

    def __getitem__(self, index: int) -> tuple[list[Tensor], int, str]:
        label = int(self.images.labels[index])
        try:
            return self._views(self.images.read(index)), label, ""
        except BadImage as error:
            return self._views(Image.new("RGB", (self.crop, self.crop))), label, str(error)

    def _views(self, image: Image.Image) -> list[Tensor]:
        if self.protocol == "multiscale":
            sides = [round(scale * self.crop / 224) for scale in SCALES]
            return [F.pil_to_tensor(F.resize(image, side))[None] for side in sides]
        image = F.resize(image, self.resize)  # PIL's own bilinear filter, which is antialiased
        crops = F.five_crop(image, self.crop) if self.protocol == "10crop" else [F.center_crop(image, self.crop)]
        return [torch.stack([F.pil_to_tensor(one) for one in crops])]

    def __len__(self) -> int:
        return len(self.images.labels)
