"""PyTorch and pickle files give what torch.load, and numpy through pickle, give."""

import enum
import pickle
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from resbackbone.weights.pickles import Foreign, read_pickle

FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


@pytest.fixture(params=FORMATS)
def through_torch(request, tmp_path):
    """Saves with torch.save in one of its formats, and reads it back."""

    def save_and_read(value, **options):
        torch.save(value, tmp_path / "w.pth", **FORMATS[request.param], **options)
        return read_pickle(tmp_path / "w.pth")

    return save_and_read


def through_pickle(value, protocol, tmp_path):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(value, protocol))
    return read_pickle(tmp_path / "w.pkl")


def test_parameters_and_buffers_of_a_module_come_back_as_plain_tensors(through_torch):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5))
    state = module.state_dict(keep_vars=True)
    state["0.weight"].note = "an attribute somebody set"
    state["1.running_mean"].note = "another"
    got = through_torch(state)
    assert type(got) is dict and list(got) == list(state)  # an OrderedDict with _metadata before
    for name in state:
        assert type(got[name]) is torch.Tensor and not got[name].requires_grad and torch.equal(got[name], state[name])


def test_a_training_checkpoint_comes_back_as_tensors_numbers_texts_and_names_of_the_rest(through_torch):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    got = through_torch(
        {
            "state_dict": OrderedDict(w=weight), "optimizer": optimizer.state_dict(), "epoch": 3,
            "best": np.float64(0.5), "schedule": schedule.state_dict(),
            "raw": b"\x00\xff", "none": None, "yes": True,
            "later": defaultdict(dict, {1: {}}), "mean": (0.5, 0.25), "random": torch.get_rng_state(), "big": 2**100,
        }
    )  # fmt: skip
    assert torch.equal(got["state_dict"]["w"], weight) and got["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert torch.equal(got["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert got["schedule"]["milestones"].name == "collections.Counter"
    assert got["best"] == 0.5 and type(got["best"]) is float
    assert got["raw"] == b"\x00\xff" and got["later"] == {1: {}} and torch.equal(got["random"], torch.get_rng_state())
    assert (got["none"], got["yes"], got["mean"], got["big"], got["epoch"]) == (None, True, (0.5, 0.25), 2**100, 3)


class Settings(dict):
    """A dict with attributes, as many libraries have for their settings."""


class Kind(enum.Enum):
    SMALL = 1


def test_objects_of_other_classes_become_their_names_wherever_they_are(through_torch):
    settings = Settings(lr=0.1, nested=Settings(a=[1]))
    settings.frozen = True
    objects = {
        "pathlib.PosixPath": Path("/a/b"), "argparse.Namespace": Namespace(lr=0.1),
        "functools.partial": partial(print, 1),
        "datetime.datetime": datetime(2020, 1, 2), "datetime.timedelta": timedelta(3),
        "decimal.Decimal": Decimal("0.1"),
        f"{__name__}.Kind": Kind.SMALL, f"{__name__}.Settings": settings, "collections.deque": deque([1, 2], 3),
        "collections.Counter": Counter("aab"), "torch.Size": torch.Size([2]), "torch.device": torch.device("cuda", 1),
        "array of dtype O8": np.array(["a", None], object), "array of dtype M8": np.array("2020-01-02", "M8[D]"),
        "array of dtype U2": np.array(["ab"]), "numpy.random._pickle.__generator_ctor": np.random.default_rng(0),
        "torch.torch_version.TorchVersion": torch.__version__,
        "torch._utils._rebuild_sparse_tensor": torch.ones(2).to_sparse(),
        "torchvision.models.resnet.ResNet": torchvision.models.resnet18(num_classes=2),
    }  # fmt: skip
    objects = {name.replace("PosixPath", type(Path()).__name__): value for name, value in objects.items()}
    got = through_torch({"rest": objects, "listed": [Path("/"), {Kind.SMALL: {1, 2}}], "w": torch.ones(2)})
    for name, value in got["rest"].items():
        assert type(value) is Foreign and value.name in (name, name.replace("Kind", "getattr"))
    assert type(got["listed"][0]) is Foreign and torch.equal(got["w"], torch.ones(2))


def test_tensors_that_share_memory_or_come_from_devices_without_storages_are_read(through_torch):
    x = torch.arange(24.0).view(2, 3, 4)
    given = {
        "x": x, "part": x[:, 1], "swapped": x.transpose(0, 2), "expanded": torch.ones(1).expand(3),
        "0d": torch.tensor(7),
        "none": torch.ones(0, 3), "bf16": x.bfloat16(), "fp8": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64), "u16": torch.ones(2).to(torch.uint16),
        "i8": torch.ones(2).char(),
    }  # fmt: skip
    got = through_torch(given)
    for name, tensor in given.items():
        assert got[name].dtype == tensor.dtype and got[name].stride() == tensor.stride()
        assert got[name].tolist() == tensor.tolist()
    assert got["part"].untyped_storage().data_ptr() == got["x"].untyped_storage().data_ptr()


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors", ""])
def test_the_kind_of_file_is_told_by_content(through_torch, tmp_path, suffix):
    through_torch([torch.ones(2)])
    (tmp_path / f"other{suffix}").write_bytes((tmp_path / "w.pth").read_bytes())
    assert torch.equal(read_pickle(tmp_path / f"other{suffix}")[0], torch.ones(2))


def test_what_is_read_lies_on_the_cpu_whatever_the_default_device_is(through_torch, tmp_path):
    through_torch({"w": torch.ones(2), "none": torch.empty(0)})
    (tmp_path / "n.pkl").write_bytes(pickle.dumps({"w": np.ones(2), "none": np.ones(0)}))
    with torch.device("meta"):
        tensors = [*read_pickle(tmp_path / "w.pth").values(), *read_pickle(tmp_path / "n.pkl").values()]
    assert [tensor.device.type for tensor in tensors] == ["cpu"] * 4


# numpy's arrays


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("code", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"])
def test_arrays_of_every_protocol_and_byte_order_come_back(tmp_path, protocol, code):
    array = (np.arange(6).reshape(2, 3) % 5 * 50).astype(code)
    given = {"native": array, "big": array.astype(f">{code}"), "little": array.astype(f"<{code}")}
    for got in through_pickle(given, protocol, tmp_path).values():
        assert got.numpy().dtype == array.dtype and np.array_equal(got.numpy(), array)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_orders_empty_arrays_and_scalars_of_numpy_come_back(tmp_path, protocol):
    array = np.arange(24.0).reshape(2, 3, 4)
    read_only = array.copy()
    read_only.flags.writeable = False
    arrays = {
        "fortran": np.asfortranarray(array), "swapped": array.transpose(1, 0, 2), "part": array[:, 1],
        "0d": np.array(7), "empty": np.zeros((0, 3), "f4"), "read_only": read_only,
    }  # fmt: skip
    scalars = {"f": np.float32(1.5), "d": np.float64(0.1), "i": np.int64(-3), "u": np.uint8(200), "b": np.bool_(True)}
    got = through_pickle({**arrays, **scalars}, protocol, tmp_path)
    for name, given in arrays.items():
        assert np.array_equal(got[name].numpy(), given) and got[name].numpy().dtype == given.dtype
        got[name].zero_()  # its own memory, that may be written to
    for name, given in scalars.items():
        assert got[name] == given.item() and type(got[name]) is type(given.item())


ARRAY = np.array([[0.5, -2.0], [3.0, 2.0**100]], dtype="<f4")  # its bytes are not ASCII


def python_2(protocol: int) -> bytes:
    """{"weight": ARRAY, "name": "\\xe9"} as Python 2 wrote it: byte strings, the old name of numpy's module."""
    if protocol == 0:
        data = repr(ARRAY.tobytes())[1:].encode()
        return (
            b"(dp0\nS'weight'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\n"
            b"tp6\nRp7\n(I1\n(I2\nI2\ntp8\ncnumpy\ndtype\np9\n(S'f4'\np10\nI0\nI1\ntp11\nRp12\n(I3\nS'<'\np13\nNNNI-1\n"
            b"I-1\nI0\ntp14\nbI00\nS" + data + b"\np15\ntp16\nbsS'name'\nS'\\xe9'\ns."
        )
    data = ARRAY.tobytes()
    return (
        b"\x80\x02}q\x00(U\x06weightcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        b"\x8a\x01\x02\x8a\x01\x02\x86cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff"
        b"\xff\xffK\x00tb\x89T" + len(data).to_bytes(4, "little") + data + b"tbU\x04nameU\x01\xe9u."
    )


@pytest.mark.parametrize("protocol", [0, 2])
def test_pickles_of_python_2_are_read_as_numpy_reads_them(tmp_path, protocol):
    reference = pickle.loads(python_2(protocol), encoding="latin1")  # noqa: S301 - our own bytes
    (tmp_path / "w.pkl").write_bytes(python_2(protocol))
    got = read_pickle(tmp_path / "w.pkl")
    assert np.array_equal(got["weight"].numpy(), reference["weight"]) and np.array_equal(reference["weight"], ARRAY)
    assert got["name"] == reference["name"] == "é"


def test_an_ordered_dict_of_python_2_is_read_with_its_items(tmp_path):
    (tmp_path / "w.pkl").write_bytes(
        b"\x80\x02ccollections\nOrderedDict\n](](U\x01bK\x01e](U\x01aK\x02ee\x85R}U\x01_K\x00sb."
    )
    assert list(read_pickle(tmp_path / "w.pkl").items()) == [("b", 1), ("a", 2)]
