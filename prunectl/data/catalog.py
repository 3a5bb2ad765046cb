"""The registered data sets: one function each, from a place to look to a `Source`. To add one, write one function here;
the tests over the registry then apply to it.

mean and std are those of pixels / 255 over the official training images, in the values in general use: ImageNet's are
torchvision's, the others are over all pixels. (CIFAR-10's often seen std of 0.20 averages the images' own stds.)"""

from __future__ import annotations

from dataclasses import replace

from prunectl.data import datasets
from prunectl.data.folders import annotated_split, photo_folder, small_images
from prunectl.data.listing import class_names, has_classes, list_split
from prunectl.data.readers import CIFAR10, CIFAR100, DEBIAN_FASHION_MNIST, read_cifar, read_embedded, read_mnist, read_svhn
from prunectl.data.source import Place, Raw, Source

CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGITS = tuple("0123456789")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# fmt: off
CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy", "bridge", "bus",
    "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch",
    "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house",
    "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle",
    "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
    "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark",
    "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
    "woman", "worm",
)
# fmt: on


@datasets.register
def fashion_mini(place: Place) -> Source:
    """12,000 images of Fashion-MNIST, 28x28 grey, 10 classes; part of prunectl, nothing to download."""
    return Source("fashion-mini", CLOTHES, 1, 28, lambda _: read_embedded(), mean=(0.2860,), std=(0.3530,))


@datasets.register
def fashion_mnist(place: Place) -> Source:
    """Clothes, 28x28 grey, 10 classes, 60,000 + 10,000 images (Xiao, Rasul and Vollgraf 2017)."""

    def read(_: int) -> Raw:
        return read_mnist(place, "FashionMNIST", DEBIAN_FASHION_MNIST)

    return Source("fashion-mnist", CLOTHES, 1, 28, read, mean=(0.2860,), std=(0.3530,), sizes=(60_000, 10_000))


@datasets.register
def mnist(place: Place) -> Source:
    """Handwritten digits, 28x28 grey, 10 classes, 60,000 + 10,000 images (LeCun et al. 1998)."""
    mean, std = (0.1307,), (0.3081,)
    return Source("mnist", DIGITS, 1, 28, lambda _: read_mnist(place, "MNIST"), mean, std, augment="crop", sizes=(60_000, 10_000))


@datasets.register
def cifar10(place: Place) -> Source:
    """Small photos, 32x32 colour, 10 classes, 50,000 + 10,000 images (Krizhevsky 2009)."""
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return Source("cifar10", CIFAR10_CLASSES, 3, 32, lambda _: read_cifar(place, CIFAR10), mean, std, sizes=(50_000, 10_000))


@datasets.register
def cifar100(place: Place) -> Source:
    """Small photos, 32x32 colour, 100 classes, 50,000 + 10,000 images (Krizhevsky 2009)."""
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return Source("cifar100", CIFAR100_CLASSES, 3, 32, lambda _: read_cifar(place, CIFAR100), mean, std, sizes=(50_000, 10_000))


@datasets.register
def svhn(place: Place) -> Source:
    """House numbers, 32x32 colour, 10 classes, 73,257 + 26,032 images (Netzer et al. 2011)."""
    mean, std = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    return Source("svhn", DIGITS, 3, 32, lambda _: read_svhn(place), mean, std, augment="crop", sizes=(73_257, 26_032))


@datasets.register
def tiny_imagenet(place: Place) -> Source:
    """ImageNet at 64x64, 200 classes, 100,000 + 10,000 images (Stanford CS231n); to be fetched by hand."""
    root = place.require("train", "tiny-imagenet-200/train", origin="http://cs231n.stanford.edu/tiny-imagenet-200.zip").parent
    classes = tuple(class_names(root / "train"))

    def read(_: int) -> Raw:
        # val/ is one flat folder with a table, or, as many sort it, one folder for each class
        flat = (root / "val" / "val_annotations.txt").exists() or not has_classes(root / "val")
        test = annotated_split(root, "val", "val_annotations.txt") if flat else list_split(root, "val")
        return small_images(root, [list_split(root, "train"), test], classes, 64)

    mean, std = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
    return Source("tiny-imagenet", classes, 3, 64, read, mean, std)


@datasets.register
def imagenet(place: Place) -> Source:
    """ImageNet-1k (ILSVRC 2012), photos, 1,000 classes, 1,281,167 + 50,000 images; to be fetched by hand."""
    origin = "https://image-net.org/challenges/LSVRC/2012, unpacked into train/WNID/*.JPEG and val/WNID/*.JPEG,"
    root = place.require("train", "ILSVRC/Data/CLS-LOC/train", origin=origin).parent
    return replace(
        photo_folder(root, "imagenet", test="val"),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        val_fraction=0.02,  # 25,600 photos: an accuracy's standard error is 0.3 points, and 98 % remain for training
    )
