"""The trunk in DETR of Hugging Face transformers, through the AutoBackbone interface.

python examples/transformers_detr.py                                                 seconds on a CPU, random weights
python examples/transformers_detr.py --depth 50 --weights torchvision:ResNet50_Weights.IMAGENET1K_V2

Importing the adapter registers its configuration, so you can save and load models with it like any other. Needs
`pip install transformers`; DETR's own loss, which this script does not use, also needs scipy.
"""

import argparse
import tempfile

import torch
from transformers import DetrConfig, DetrForObjectDetection

from resbackbone import build_resnet_backbone
from resbackbone.adapters.transformers import as_transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--weights", help="a weight file, or a named source as above; default: random")
    options = parser.parse_args()
    torch.manual_seed(0)

    trunk = as_transformers(build_resnet_backbone(options.depth, weights=options.weights), out_features=["stage4"])
    tiny = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = DetrConfig(backbone_config=trunk.config, num_queries=5, num_labels=3, **tiny, **heads)
    detr = DetrForObjectDetection(config)
    detr.model.backbone.model.load_state_dict(trunk.state_dict())  # built from the config with random weights

    # transformers' models take images already normalized by ImageNet's mean and standard deviation.
    output = detr(torch.randn(2, 3, 97, 130))
    print("class scores", tuple(output.logits.shape), "boxes", tuple(output.pred_boxes.shape))
    (output.logits.square().mean() + output.pred_boxes.mean()).backward()  # stands for DETR's loss
    gradient = detr.model.backbone.model.backbone.layer4[1].conv2.weight.grad
    print(f"gradient that reaches stage 5 of the trunk: {gradient.norm():.2g}")

    with tempfile.TemporaryDirectory() as folder:
        detr.save_pretrained(folder)
        again = DetrForObjectDetection.from_pretrained(folder).model.backbone.model
    print("saved and loaded again:", type(again).__name__, again.out_features, again.channels)


if __name__ == "__main__":
    main()
