"""The trunk as a backbone of Hugging Face transformers; importing this registers it with AutoBackbone."""

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel, initialization
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import can_return_tuple

from resbackbone.backbone import ResNetBackbone
from resbackbone.checks import UserError
from resbackbone.compat import has_hooks
from resbackbone.config import BackboneConfig
from resbackbone.resnet import TRUNK_LEVELS

STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]  # c1 .. c5
FOUR_STAGES = "transformers takes the four stages of a ResNet: build the backbone with fpn=False, c2 to c5"


class ResBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """`depth`, and as `trunk` the other arguments of `build_resnet_backbone` that are not its defaults.

    `out_features` (or `out_indices`) are transformers' own: of "stem", "stage1" .. "stage4", the maps c1 .. c5, the
    last if none is named.
    """

    model_type = "resbackbone"
    depth: int = 50
    trunk: dict | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = list(STAGES)
        asked = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        self.set_output_features_output_indices(**asked)
        super().__post_init__(**kwargs)


class ResBackboneModel(BackboneMixin, PreTrainedModel):
    """[B, 3, H, W], normalized by ImageNet's mean and std -> BackboneOutput whose feature_maps are `out_features`.

    Every stage is built, as transformers' own backbones do it: what lies above the last map asked for has no gradient.
    """

    config_class = ResBackboneConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: ResBackboneConfig):
        super().__init__(config)
        trunk = BackboneConfig.from_json({**(config.trunk or {}), "depth": config.depth})
        if trunk.fpn or trunk.levels != TRUNK_LEVELS or (config.trunk or {}).get("depth", trunk.depth) != trunk.depth:
            raise UserError(f"{FOUR_STAGES}, and `trunk` without a second depth")
        self.backbone = ResNetBackbone(trunk)
        self.num_features = [64, *(feature.channels for feature in self.backbone.features.values())]
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments, **options):
        """As transformers has it; what was frozen is frozen again, for a parameter that it loads is a trainable one."""
        loaded = super().from_pretrained(*arguments, **options)
        backbone = (loaded[0] if isinstance(loaded, tuple) else loaded).backbone
        if backbone.config.frozen_through is not None:
            backbone.freeze(backbone.config.frozen_through)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:  # for what a file does not hold, as ResNet does it
        if isinstance(module, nn.Conv2d):
            initialization.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **unused) -> BackboneOutput:
        stem = self.backbone.stem(pixel_values)  # [B, 64, H/2, W/2]
        maps = (stem, *self.backbone.from_stem(stem).values())
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BackboneOutput(
            feature_maps=tuple(maps[STAGES.index(name)] for name in self.out_features),  # type: ignore[arg-type]
            hidden_states=maps if wanted else None,
        )


def as_transformers(backbone: ResNetBackbone, out_features: list[str] | None = None) -> ResBackboneModel:
    """The trunk of `backbone`, its weights included, as a transformers backbone, to train, save and load over there.

    It does not share memory with `backbone`; dtype, device, mode and what trains are the same. Raises ValueError for
    one with a pyramid, without all of c2..c5, or whose layers are not those that its config describes (fused, replaced,
    of another eps).
    """
    if not isinstance(backbone, ResNetBackbone) or backbone.fpn is not None or tuple(backbone.levels) != TRUNK_LEVELS:
        raise UserError(FOUR_STAGES)
    trunk = backbone.config.to_json()
    config = ResBackboneConfig(depth=trunk.pop("depth"), trunk=trunk, out_features=out_features)  # type: ignore[call-arg]
    model = ResBackboneModel(config)
    _refuse_changed_layers(backbone, model.backbone)
    model.backbone.to(next(backbone.parameters()))  # its dtype and device
    model.backbone.load_state_dict(backbone.state_dict())
    trains = {name: x.requires_grad for name, x in backbone.named_parameters(remove_duplicate=False)}
    for name, theirs in model.backbone.named_parameters():
        theirs.requires_grad_(trains[name])
    return model.train(backbone.training)


def _described(module: nn.Module) -> str:
    hooked = " with hooks" if has_hooks(module) else ""
    patched = " with another forward" if "forward" in vars(module) else ""
    return f"{type(module).__name__}({module.extra_repr()}){hooked}{patched}"


def _refuse_changed_layers(backbone: ResNetBackbone, rebuilt: ResNetBackbone) -> None:
    """Raise UserError if a layer differs from that of the config, from which transformers builds it again."""
    found, described = (
        {name: _described(module) for name, module in network.named_modules()} for network in (backbone, rebuilt)
    )
    changed = [name for name in {**described, **found} if found.get(name) != described.get(name)]
    if changed:
        name = changed[0]
        raise UserError(
            f"transformers builds the network again from its config, which does not describe {len(changed)} of its "
            f"layers: {name or 'the network'} is {found.get(name, 'absent')}, not {described.get(name, 'absent')}; "
            "call as_transformers before fuse() and other changes, or give what changed to build_resnet_backbone"
        )


AutoConfig.register(ResBackboneConfig.model_type, ResBackboneConfig, exist_ok=True)
AutoBackbone.register(ResBackboneConfig, ResBackboneModel, exist_ok=True)
