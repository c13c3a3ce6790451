"""The pictures of classes: painted by the teacher, taken from the distillation cache, or photographs of one's own."""

from stages.pictures.ledger import Ledger, Picture, Source
from stages.pictures.listing import PicturesConfig, Wanted, wanted
from stages.pictures.making import make_pictures
from stages.pictures.photographs import Photograph, hidden_lines, photographs
from stages.pictures.reuse import reusable, unlike

__all__ = [
    "Ledger",
    "Photograph",
    "Picture",
    "PicturesConfig",
    "Source",
    "Wanted",
    "hidden_lines",
    "make_pictures",
    "photographs",
    "reusable",
    "unlike",
    "wanted",
]
