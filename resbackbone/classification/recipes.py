"""Training recipes for ImageNet classifiers, each with where it is from and what was published with it."""

from dataclasses import dataclass, replace

from resbackbone.checks import UserError, check_ranges
from resbackbone.engine.schedule import Schedule

_LARGEST = 1e9
RANGES = {  # the values of a recipe: smallest, largest, in words
    "epochs batch_size repeats size shorter_side resize crop": (1, _LARGEST, "at least 1"),
    "rate drops warmup_epochs weight_decay mixup cutmix": (0, _LARGEST, "at least 0"),
    "warmup_factor erase smoothing bce_threshold ema_window": (0, 1, "from 0 to 1"),
    "clip_grad": (1e-12, _LARGEST, "above 0"),
}


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained and tested: all that is not data, hardware or network.

    Lengths are in epochs (as many images as the training set has), and `rate` is stated for `batch_size` images an
    update. Training crops are of `size` pixels: of an image whose shorter side is drawn from `shorter_side`, or, where
    that is None, of random scale and shape as torchvision's RandomResizedCrop; mirrored half the time. Test images get
    a shorter side of `resize`, of which `crop` pixels are seen.
    """

    source: str
    published: str
    epochs: int
    batch_size: int
    rate: float
    optimizer: str = "sgd"  # or "lamb", "adamw", whose rates do not follow the batch size
    drops: tuple[int, ...] = ()  # epochs after which the rate is a tenth
    cosine: bool = False
    warmup_epochs: int = 0
    warmup_factor: float = 0.01
    weight_decay: float = 1e-4
    decay_norms: bool = True  # False: neither norms nor biases
    size: int = 224
    shorter_side: tuple[int, int] | None = None
    pca: bool = False  # noise in the colours
    auto_augment: str | None = None  # "trivial", or RandAugment in timm's words
    erase: float = 0.0  # probability of a blank rectangle
    repeats: int = 1  # copies of an image, augmented differently, among those that are drawn together
    mixup: float = 0.0  # alpha; where both are, half the batches are mixed one way and half the other
    cutmix: float = 0.0
    smoothing: float = 0.0
    bce: bool = False  # a binary cross entropy of each class, in place of the softmax's
    bce_threshold: float | None = None  # soft targets over it count as 1, others as 0
    ema_window: float = 0.0  # share of the run over which the weights are averaged, for evaluation too; 0: none
    clip_grad: float | None = None  # norm of the gradient; LAMB has its own limit of 1
    zero_init_residual: bool = False  # every block starts as its shortcut alone
    resize: int = 256
    crop: int = 224
    depth: int = 50

    def __post_init__(self):
        check_ranges(self, RANGES)
        if self.auto_augment not in (None, "trivial") and not self.auto_augment.startswith("rand-"):
            raise UserError(f"auto_augment is {self.auto_augment!r}; it must be trivial or timm's rand-..")

    def schedule(self, images: int, batch_size: int, epochs: int | None = None) -> Schedule:
        """The rate by update for a training set of `images`; with other `epochs`, drops and warm-up in proportion."""
        stretch = 1.0 if epochs is None else epochs / self.epochs
        updates = images / batch_size * stretch  # in an epoch of the recipe's
        scale = batch_size / self.batch_size if self.optimizer == "sgd" else 1.0  # Goyal et al. 2017, Sec. 2.1
        return Schedule(
            self.rate * scale,
            max(1, round(self.epochs * updates)),
            milestones=tuple(round(epoch * updates) for epoch in self.drops),
            cosine=self.cosine,
            warmup_steps=round(self.warmup_epochs * updates),
            warmup_factor=self.warmup_factor,
        )


# Not as there: one mean colour is subtracted, not one a pixel; batch norm is tested with moving averages, not with
# statistics computed after training; strides are in the 3x3 unless --stride-in-1x1 asks for the paper's.
PAPER = Recipe(
    source="He et al. 2015, Sec. 3.4: 60e4 updates of 256 images, which is 120 epochs",
    published="top-1 error, 10-crop, Table 3: 34 25.0 (A), 24.5 (B), 24.2 (C), 50 22.9, 101 21.8, 152 21.4; 1 crop "
    "(KaimingHe/deep-residual-networks): 50 24.7, 101 23.6, 152 23.0. Time not given",
    epochs=120,
    batch_size=256,
    rate=0.1,
    drops=(30, 60, 90),  # the paper drops it when the error plateaus; Fig. 4 falls after about 15e4 and 30e4 updates
    shorter_side=(256, 480),
    pca=True,
)

TORCHVISION_V1 = Recipe(
    source="torchvision, references/classification, its defaults (8 x 32 images), the IMAGENET1K_V1 weights",
    published="top-1: 18 69.758, 34 73.314, 50 76.130, 101 77.374, 152 78.312 on 8 V100; time not given",
    epochs=90,
    batch_size=256,
    rate=0.1,
    drops=(30, 60),
)

# Not as there: the last layer's bias is not decayed either, as norms are not.
TORCHVISION_V2 = Recipe(
    source="torchvision, issue 3995 and pull request 5201 (8 x 128 images), the IMAGENET1K_V2 weights",
    published="top-1: 50 80.858, 101 81.886, 152 82.284 (repeated augmentation for 50 only); time not given",
    epochs=600,
    batch_size=1024,
    rate=0.5,
    cosine=True,
    warmup_epochs=5,
    weight_decay=2e-5,
    decay_norms=False,
    size=176,
    auto_augment="trivial",
    erase=0.1,
    repeats=4,
    mixup=0.2,
    cutmix=1.0,
    smoothing=0.1,
    ema_window=0.039,  # its decay of 0.99998, adjusted to 600 epochs of 1024 images an update
    resize=232,
)


# "ResNet strikes back", Table 2. timm's defaults belong to it: blocks start as their shortcuts, and the warm-up starts
# at a rate of 1e-4. Checked against mmpretrain's configurations (configs/resnet/*rsb*), commands of timm's train.py for
# A2 that users published (they have the threshold of 0.2), and timm's results-imagenet.csv.
# Not as there: A1's and A2's stochastic depth of 0.05, which these blocks lack; images are resized bilinearly, not
# bicubically; the rate ends at 0, not at 1e-6, and moves with every update, not every epoch.
A2 = Recipe(
    source="Wightman et al. 2021 (arXiv 2110.00476), Table 2, without stochastic depth",
    published="top-1 at 224: 18 70.6, 34 75.5, 50 79.8, 101 81.3, 152 81.8",
    epochs=300,
    batch_size=2048,
    rate=5e-3,
    optimizer="lamb",
    cosine=True,
    warmup_epochs=5,
    warmup_factor=1e-4 / 5e-3,
    weight_decay=0.02,
    decay_norms=False,
    auto_augment="rand-m7-mstd0.5-inc1",
    repeats=3,
    mixup=0.1,
    cutmix=1.0,
    bce=True,
    bce_threshold=0.2,
    zero_init_residual=True,
    resize=235,  # 224 / 0.95
)
A1 = replace(
    A2,
    published="top-1 at 224: 18 71.5, 34 76.4, 50 80.4, 101 81.5, 152 82.0; R50 4.6 days on 4 V100",
    epochs=600,
    weight_decay=0.01,
    mixup=0.2,
    smoothing=0.1,
    bce_threshold=None,  # soft targets count as they are
)
A3 = replace(
    A2,
    published="top-1 at 224: 18 68.2, 34 73.0, 50 78.1, 101 79.8, 152 80.5",
    epochs=100,
    rate=8e-3,
    warmup_factor=1e-4 / 8e-3,
    size=160,
    auto_augment="rand-m6-mstd0.5-inc1",
    repeats=1,
)

DEMO = Recipe(
    source="this package's own, for the built-in data set: small images, few epochs, from scratch on two CPU cores",
    published="see MODEL_ZOO.md",
    epochs=4,
    batch_size=32,
    rate=1e-3,
    optimizer="adamw",
    cosine=True,
    warmup_epochs=1,
    weight_decay=0.05,
    decay_norms=False,
    size=64,
    shorter_side=(64, 76),  # whole objects: their forms are what tells them apart
    resize=64,
    crop=64,
    depth=18,
)

RECIPES: dict[str, Recipe] = {
    "paper": PAPER,
    "torchvision-v1": TORCHVISION_V1,
    "torchvision-v2": TORCHVISION_V2,
    "a1": A1,
    "a2": A2,
    "a3": A3,
    "demo": DEMO,
}
