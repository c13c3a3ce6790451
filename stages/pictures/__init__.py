"""The pictures of classes: painted by the teacher, taken from the distillation cache, or photographs of one's own."""

from stages.pictures.ledger import NAME, Ledger, Picture
from stages.pictures.listing import PicturesConfig, Wanted, wanted
from stages.pictures.making import make_pictures
from stages.pictures.photographs import Photograph, photographs
from stages.pictures.reuse import reusable

__all__ = [
    "NAME",
    "Ledger",
    "Photograph",
    "Picture",
    "PicturesConfig",
    "Wanted",
    "make_pictures",
    "photographs",
    "reusable",
    "wanted",
]
