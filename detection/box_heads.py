"""What follows RoI pooling in each variant: box heads, the predictors behind them, and the cascade of several."""

from typing import Any, cast

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead

from detection.cascade import CascadeRoIHeads
from detection.config import DetectorConfig
from detection.paper import ContextHead, VGGHead
from detection.roi_align import PyramidRoIAlign
from detection.roi_heads import BatchedRoIHeads, FP32Predictor
from resbackbone import Backbone
from resbackbone.layers import ConvBlocks, norm_layer


class ConvFCHead(FastRCNNConvFCHead):
    """torchvision's box head of convolutions and linear layers (Wu and He 2018), its steps joined where they can be."""

    forward = ConvBlocks.forward


class Stage5Head(nn.Module):
    """The C4 detector's box head: stage 5 on every region, then the mean (He et al. 2015, appendix A)."""

    def __init__(self, stage: nn.Sequential):
        super().__init__()
        self.layer4 = stage

    def forward(self, regions: Tensor) -> Tensor:  # [N, 1024, 14, 14] -> [N, 2048]
        return self.layer4(regions).mean((2, 3))


def build_box_head(config: DetectorConfig, backbone: Backbone, trunk: Any) -> tuple[nn.Module, int]:
    """The box head, a list of them for a cascade, and its output channels; `trunk` has the stage 5 that c4 takes."""
    channels = trunk.stage_features["c5"].channels if config.variant == "c4" else cast(int, config.representation_size)
    if config.cascade_ious:
        return nn.ModuleList(_box_head(config, backbone, trunk) for _ in config.cascade_ious), channels
    head = _box_head(config, backbone, trunk)
    return (ContextHead(head), 2 * channels) if config.global_context else (head, channels)


def _box_head(config: DetectorConfig, backbone: Backbone, trunk: Any) -> nn.Module:
    if config.variant == "c4":
        return Stage5Head(trunk.layer4)
    channels = cast(int, config.representation_size)
    if config.box_conv_layers:
        norm = norm_layer(config.box_norm, backbone.config.eps_of(config.box_norm)) if config.box_norm else None
        return ConvFCHead((backbone.out_channels, 7, 7), list(config.box_conv_layers), [channels], norm)
    return (VGGHead if config.variant == "vgg16" else TwoMLPHead)(backbone.out_channels * 7 * 7, channels)


def build_roi_heads(config: DetectorConfig, pool: PyramidRoIAlign, head: nn.Module, channels: int) -> BatchedRoIHeads:
    """The second stage of the detector around the box head, or heads, of `build_box_head`."""
    outputs = config.num_classes + 1
    arguments = (
        config.box_fg_iou_thresh,
        config.box_bg_iou_thresh,
        config.box_batch_size_per_image,
        config.box_positive_fraction,
        config.bbox_reg_weights,
        config.box_score_thresh,
        config.box_nms_thresh,
        config.box_detections_per_img,
    )
    options: dict[str, Any] = {"box_loss": config.box_loss, "box_loss_weight": config.box_loss_weight}
    if not config.cascade_ious:
        return BatchedRoIHeads(pool, head, FP32Predictor(channels, outputs), *arguments, **options)
    predictors = nn.ModuleList(FP32Predictor(channels, outputs, boxes=1) for _ in config.cascade_ious)
    return CascadeRoIHeads(pool, head, predictors, *arguments, **options, ious=config.cascade_ious)
