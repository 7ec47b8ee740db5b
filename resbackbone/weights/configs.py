"""What the config.json beside weights says: that of transformers, of timm, and of this package in transformers.

Each key that can change the network is in a table with the values that this package computes. Another value, and a key
that is in no table, is refused by its name: a file with the names and shapes of a ResNet may be another network.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resbackbone.checks import UserError
from resbackbone.resnet import DEPTHS, Bottleneck
from resbackbone.weights.arguments import (
    ANY,
    TIMM_ARGUMENTS,
    check_known,
    harmless,
    refuse_blurring_names,
    stated_by_arguments,
    stated_input,
)
from resbackbone.weights.inputs import INPUT, MEAN, STD
from resbackbone.weights.zoo import TRUNK

_log = logging.getLogger("resbackbone")


TRANSFORMERS: dict[str, Sequence] = {
    "model_type": ("resnet",),
    "hidden_act": ("relu",),
    "downsample_in_first_stage": (False,),
    "downsample_in_bottleneck": (False, True),
    "embedding_size": (64,),
    "layer_type": ("bottleneck", "basic"),
    "depths": ANY,
    "hidden_sizes": ANY,
    "num_channels": ANY,
    # Of every PreTrainedConfig, and of backbones; a ResNet does not compute with them.
    **harmless(
        "_name_or_path architectures dtype torch_dtype transformers_version id2label label2id num_labels problem_type "
        "return_dict use_return_dict output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss "
        "finetuning_task task_specific_params chunk_size_feed_forward is_encoder_decoder is_decoder pruned_heads "
        "add_cross_attention cross_attention_hidden_size tie_encoder_decoder tie_word_embeddings tokenizer_class "
        # What transformers 4 writes for every network if the whole config is saved; of generated text.
        "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
        "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
        "bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id "
        "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
        "begin_suppress_tokens _attn_implementation_internal "
        "prefix bos_token_id pad_token_id eos_token_id sep_token_id decoder_start_token_id _commit_hash "
        "_attn_implementation_autoset stage_names out_features out_indices"
    ),
}
PROCESSOR: dict[str, Sequence] = {
    "do_normalize": (True, False),
    "do_rescale": (True, False),
    "do_flip_channel_order": (False, True),
    "rescale_factor": ANY,
    "image_mean": ANY,
    "image_std": ANY,
    # Sizes and files
    **harmless(
        "image_processor_type feature_extractor_type processor_class do_resize size resample crop_pct do_center_crop "
        "crop_size default_to_square do_convert_rgb do_pad pad_size size_divisor data_format input_data_format "
        "return_tensors device disable_grouping _processor_class _valid_processor_keys"
    ),
}
TIMM: dict[str, Sequence] = {
    "global_pool": TIMM_ARGUMENTS["global_pool"],
    "mean": ANY,
    "std": ANY,
    **harmless(
        "architecture model_args pretrained_cfg num_classes num_features label_names label_descriptions labels "
        "label_offset url file hf_hub_id hf_hub_filename hf_hub_revision source tag custom_load input_size "
        "test_input_size min_input_size fixed_input_size interpolation test_interpolation crop_pct test_crop_pct "
        "crop_mode pool_size test_pool_size first_conv classifier license license_link library_name description "
        "origin_url paper_name paper_ids notes"
    ),
}
# zoo.TRUNK with the prefixes and suffixes of the same networks in timm before 0.9, and the one with group norm
TIMM_NETWORKS = re.compile(rf"(?:(?:tv|gluon|ssl|swsl|ig)_)?{TRUNK.pattern}(?:_v1[bcd]|_gn)?")


def stated_by_config(folder: Path, *, required: bool = True) -> dict[str, Any]:
    """What the config.json in `folder` says, in the layout of our own files' metadata; {} if there is none.

    Raises ValueError that names a key or value which this package does not compute with. Of a config that neither
    transformers nor timm wrote, a training's arguments are read; with `required`, for a file with the name of theirs,
    another network of theirs is an error. Without a config.json, a preprocessor's alone tells the input.
    """
    config = _json(folder / "config.json", required=required)
    kind, name = config.get("model_type"), config.get("architecture")
    if not config:
        stated = _stated_by_processor(folder)
        return {**stated, "stated_by": "the preprocessor's config"} if stated else {}
    if config.get("format") == "resbackbone":  # tools/publish.py: of the file of ours beside it
        return {}
    if kind == "resbackbone":  # `adapters.transformers`
        return {"backbone": {"depth": config.get("depth", 50), **(config.get("trunk") or {})}, "input": INPUT}
    if kind == "resnet" and (required or len(config.keys() & TRANSFORMERS.keys()) > 1):
        stated = _stated_by_transformers(config) | _stated_by_processor(folder)
        return {**stated, "publisher": "transformers", "stated_by": "config.json"}
    if isinstance(name, str) and kind is None and (required or "pretrained_cfg" in config or _timm_network(name)):
        own: dict[str, Any] = {}
        if "pretrained_cfg" not in config:  # perhaps a training's, with timm's name of a network
            own = stated_by_arguments("config.json", {key: x for key, x in config.items() if key not in TIMM})
            config = {key: value for key, value in config.items() if key in TIMM}
        stated = own | stated_by_timm(config)
        backbone = {**stated["backbone"], **own.get("backbone", {})}
        return {**stated, "backbone": backbone, "publisher": "timm", "stated_by": "config.json"}
    signs = [key for key in ("model_type", "transformers_version", "pretrained_cfg") if config.get(key) is not None]
    if required and signs:
        raise UserError(
            f"its config.json has {signs[0]} {config[signs[0]]!r:.80}; this package reads the ResNets of transformers "
            "(model_type 'resnet') and timm (architecture): to load the tensors by their names alone, give the file in "
            "a folder without it"
        )
    return {**stated_by_arguments("config.json", config), "stated_by": "config.json"}


def _timm_network(name: str) -> re.Match | None:
    return TIMM_NETWORKS.fullmatch(" ".join(name.split()).partition(".")[0])  # without its tag


def _whole(where: str, values: Mapping, key: str) -> int | None:
    number = values.get(key)
    if number is not None and type(number) is not int:
        raise UserError(f"its {where} has {key} {number!r:.80}, not a whole number")
    return number


def _stated_by_transformers(config: Mapping) -> dict[str, Any]:
    check_known("config.json", config, TRANSFORMERS)
    backbone: dict[str, Any] = {"stride_in_1x1": bool(config.get("downsample_in_bottleneck")), "eps": 1e-5}
    bottleneck = config.get("layer_type", "bottleneck") == "bottleneck"
    if (depths := config.get("depths")) is not None:
        found = [d for d, (block, n) in DEPTHS.items() if [*n] == depths and (block is Bottleneck) == bottleneck]
        backbone |= {"depth": found[0]} if found else {}
    if (channels := _whole("config.json", config, "num_channels")) is not None:
        backbone["in_channels"] = channels
    usual = [width * (4 if bottleneck else 1) for width in (64, 128, 256, 512)]
    if config.get("hidden_sizes", usual) != usual:
        raise UserError(f"its config.json has hidden_sizes {config['hidden_sizes']!r}; only {usual} are supported")
    stated: dict[str, Any] = {"backbone": backbone}
    labels = config.get("id2label")
    if isinstance(labels, Mapping) and set(labels) == {str(i) for i in range(len(labels))}:
        names = [str(labels[str(i)]) for i in range(len(labels))]
        if names and names != [f"LABEL_{i}" for i in range(len(names))]:  # what transformers writes for unnamed ones
            stated["classes"] = names
    return stated


def _stated_by_processor(folder: Path) -> dict[str, Any]:
    """{"input": ..} of a preprocessor_config.json, or of a processor_config.json and the image_processor in it."""
    alone, nested = "preprocessor_config.json", "processor_config.json"
    content = _json(folder / nested)
    inner = content if "image_mean" in content or "image_std" in content else content.get("image_processor")
    found = ((alone, _json(folder / alone)), (nested, inner))
    stated = [_input_of_processor(name, values) for name, values in found if isinstance(values, Mapping) and values]
    if len(stated) == 2 and stated[0] != stated[1]:
        raise UserError("its preprocessor_config.json and processor_config.json state different inputs; keep one")
    return stated[0] if stated else {}


def _input_of_processor(where: str, processor: Mapping) -> dict[str, Any]:
    """{"input": ..}: (value * rescale_factor - image_mean) / image_std."""
    check_known(where, processor, PROCESSOR)
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise UserError(f"its {where} has rescale_factor {factor!r}, not a number above 0")
    mean, std = (processor.get(key) for key in ("image_mean", "image_std"))
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    order = "BGR" if processor.get("do_flip_channel_order") else "RGB"
    if abs(factor * 255 - 1) < 1e-6:
        return {"input": stated_input(where, mean, std, order=order)}
    given = stated_input(where, mean, std, order=order, top=255)
    return {"input": {**given, **{key: [x / factor for x in given[key]] for key in ("mean", "std")}}}


def stated_by_timm(config: Mapping) -> dict[str, Any]:
    """What a pretrained_cfg with its architecture says, from timm's registry or from a config.json."""
    inner, arguments = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    for name, values, accepted in (
        ("config.json", config, TIMM),
        ("pretrained_cfg", inner, TIMM),
        ("model_args", arguments, TIMM_ARGUMENTS),
    ):
        if not isinstance(values, Mapping):
            raise UserError(f"its config.json has {name} {values!r}, not a table")
        layers = ("norm_layer", "act_layer", "aa_layer")  # "BatchNorm2d" is timm's "batchnorm2d"
        values = {k: x.lower() if k in layers and isinstance(x, str) else x for k, x in values.items()}
        if name == "model_args":
            arguments = values
        check_known(name, values, accepted)
    config = {**config, **inner}  # older files have the content of pretrained_cfg at the top
    name = " ".join(str(config["architecture"]).split()).partition(".")[0]  # without its tag
    refuse_blurring_names(name)
    if (network := _timm_network(name)) is None:
        raise UserError(
            f"{name} is not one of timm's ResNets that this package builds, which list_sources() names; for another "
            "network, name it too: from_timm(NAME, weights=..), or train_coco.py --backbone timm:NAME"
        )
    backbone: dict[str, Any] = {"stride_in_1x1": False, "eps": 1e-5, "depth": int(network[1])}
    if (channels := _whole("model_args", arguments, "in_chans")) is not None:
        backbone["in_channels"] = channels
    if arguments.get("output_stride") == 16:
        backbone["dilate_c5"] = True
    if norm := arguments.get("norm_layer", "groupnorm" if name.endswith("_gn") else None):
        backbone["norm"] = "GN" if norm == "groupnorm" else "BN"
    stated: dict[str, Any] = {"backbone": backbone}
    mean, std = config.get("mean"), config.get("std")
    shape = config.get("input_size")
    colours = channels or (shape[0] if isinstance(shape, list | tuple) and shape else 3)
    if colours != 3:  # the caller normalises other images than RGB: no conversion
        lists = [x for x in (mean, std) if x is not None]
        if lists and not all(isinstance(x, list | tuple) and len(x) in (1, 3, colours) for x in lists):
            raise UserError(f"its pretrained_cfg has mean {mean!r} and std {std!r}, not one number for each channel")
        _log.warning(
            "timm's %s has %s channels: give it images normalised with the mean %s and std %s of its config",
            *(name, colours, mean, std),
        )
        mean = std = None
    if mean is not None or std is not None:
        mean, std = (list(usual) if x is None else x for x, usual in ((mean, MEAN), (std, STD)))
        stated["input"] = stated_input("pretrained_cfg", mean, std)
    if isinstance(config.get("license"), str):
        stated["licence"] = config["license"]
    if isinstance(config.get("label_names"), list | tuple):
        stated["classes"] = [str(name) for name in config["label_names"]]
    if config.get("tag") and config.get("paper_ids"):
        papers = config["paper_ids"]
        stated["recipe"] = f"{config['tag']} ({papers if isinstance(papers, str) else ', '.join(map(str, papers))})"
    return stated


def _json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file, or not a readable one and none is `required`."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return content
    if required:
        raise UserError(f"its {path.name} is not readable JSON with an object in it")
    return {}
