"""nanoVLM from image splitting on: ``images`` as lists of lists, image tokens inside the text, tiles."""

from .base import Adapter as Base
from .configs import signature_names


class Adapter(Base):
    dialect = "upstream"

    @classmethod
    def speaks(cls, subject):
        return "images" in signature_names(subject.model_class.forward)
