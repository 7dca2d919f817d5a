"""The readers of layouts, by the names that `known_sets.toml` gives them."""

from clip_cid.data.sets.readers import binary, folders, listed
from clip_cid.data.sets.readers.contract import Reader
from clip_cid.data.sets.readers.tars import read_tars

ANY_SET: tuple[Reader, ...] = (read_tars, folders.read_folders)
"""The layouts every set may come in."""

READERS: dict[str, Reader] = {
    "birdsnap": listed.read_birdsnap,
    "caltech101": folders.read_caltech101,
    "cifar_binary": binary.read_cifar_binary,
    "cifar_python": binary.read_cifar_python,
    "dtd": listed.read_dtd,
    "eurosat": folders.read_eurosat,
    "fgvc_aircraft": listed.read_fgvc_aircraft,
    "flowers102": listed.read_flowers102,
    "flat_imagenet": listed.read_flat_imagenet,
    "food101": listed.read_food101,
    "imagenet": folders.read_imagenet,
    "imagenet_v2": folders.read_imagenet_v2,
    "objectnet": folders.read_objectnet,
    "oxford_pets": listed.read_oxford_pets,
    "stanford_cars": listed.read_stanford_cars,
    "stl10": binary.read_stl10,
    "sun397": listed.read_sun397,
    "wnid_folders": folders.read_wnid_folders,
}
