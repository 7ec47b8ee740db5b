"""A Backbone inside torchvision's detectors: their names for the maps and for the parameters."""

from collections import OrderedDict

from torch import Tensor, nn

from resbackbone.backbone import Backbone
from resbackbone.checks import UserError, brief, one_of

FROZEN_THROUGH = {5: None, 4: "stem", 3: "c2", 2: "c3", 1: "c4", 0: "c5"}  # by torchvision's trainable_layers


def frozen_through(trainable_layers: int) -> str | None:
    """torchvision's `trainable_layers`, 0..5 counted from the top, as the `frozen_through` of the same choice."""
    return FROZEN_THROUGH[one_of("trainable_layers", trainable_layers, FROZEN_THROUGH)]


class TorchvisionBackbone(nn.Module):
    """What torchvision's detectors ask of a backbone; made by `as_torchvision`."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.names = {level: str(i) for i, level in enumerate(backbone.features)}
        if "p7" in self.names:
            self.names |= {level: level for level in ("p6", "p7") if level in self.names}
        elif "p6" in self.names:
            self.names["p6"] = "pool"
        self.register_state_dict_post_hook(_to_torchvision_keys)
        self.register_load_state_dict_pre_hook(_from_torchvision_keys)

    @property
    def out_channels(self) -> int:
        channels = {level: feature.channels for level, feature in self.backbone.features.items()}
        if len(set(channels.values())) > 1:
            raise UserError(
                f"the maps have different channels ({channels}), and torchvision's detectors take maps of one number: "
                "build the backbone with fpn=True, or with a single level"
            )
        return self.backbone.out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:  # [B, channels, H, W]
        return OrderedDict((self.names[level], x) for level, x in self.backbone(images).items())


def as_torchvision(backbone: Backbone) -> TorchvisionBackbone:
    """`backbone` for torchvision.models.detection: FasterRCNN, MaskRCNN, KeypointRCNN, RetinaNet, FCOS.

    Forward gives an OrderedDict, finest first: "0", "1", .. for c2.. or p2..p5, then "pool" for p6, or "p6" and "p7"
    where there are both; these are the names that torchvision's own backbones give and its RoI pooling expects.
    `out_channels` is the backbone's; levels of different channels have none. The state dict has torchvision's names
    (`body.conv1.weight`, `fpn.inner_blocks.0.0.weight`), so whole-detector files of either side load into
    the other. RetinaNet and FCOS take levels p3..p7, and torchvision's published ones p6 from p5 (`p6_from="p5"`).

    torchvision's detectors normalize images themselves, by ImageNet's mean and std unless told otherwise: what the
    backbone takes. They also accept a Backbone as it is, if its RoI pooling is given `featmap_names=["p2", ..]`.
    """
    if not isinstance(backbone, Backbone):
        raise UserError(f"as_torchvision takes what build_resnet_backbone or from_timm gave, not {brief(backbone)}")
    return TorchvisionBackbone(backbone)


def _to_torchvision_keys(module: nn.Module, state_dict, prefix: str, *_) -> None:
    own = f"{prefix}backbone."
    for key in [key for key in state_dict if key.startswith(own)]:
        name = key.removeprefix(own)
        state_dict[prefix + (name if name.startswith("fpn.") else f"body.{name}")] = state_dict.pop(key)


def _from_torchvision_keys(module: nn.Module, state_dict, prefix: str, *_) -> None:
    for part, name in ((f"{prefix}body.", ""), (f"{prefix}fpn.", "fpn.")):
        for key in [key for key in state_dict if key.startswith(part)]:
            state_dict[f"{prefix}backbone.{name}{key.removeprefix(part)}"] = state_dict.pop(key)
